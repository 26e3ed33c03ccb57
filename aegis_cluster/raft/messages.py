"""What replicas of one group say to each other, and the entries they talk about.

The idea: every message is an immutable tuple that carries the sender's term, so a receiver can
always tell the past from the present (Raft §5.1). Messages name entries by index and term; the
bytes of an entry never enter the core.

The rule it protects: a reply is a promise about durable state, so each kind of reply says exactly
what it promises, and nothing in it depends on when it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from aegis_cluster.ids import LogIndex, Member, Term
    from aegis_cluster.raft.membership import Membership

# The core tells only these two kinds from others; the numbers are those of the frame format.
KIND_NOOP: Final = 2
KIND_MEMBERSHIP: Final = 3


class Entry(NamedTuple):
    """One entry of the log as the core knows it; the shell keeps its bytes by (index, term)."""

    index: LogIndex  # type: ignore[assignment] # hides tuple.index
    term: Term
    kind: int
    """The frame kind; opaque but for no-op and membership."""
    size: int
    """Bytes of the whole frame, for flow control; a wrong value costs speed, not safety."""
    membership: Membership | None = None
    """Set for membership entries only; in effect as soon as it is appended (thesis §4.1)."""


class PreVoteRequest(NamedTuple):
    """Would you vote for me? Changes no state anywhere (thesis §9.6)."""

    term: Term
    """The sender's present term, which it has not raised."""
    proposed_term: Term
    """The term it would campaign in."""
    last_index: LogIndex
    last_term: Term


class PreVoteReply(NamedTuple):
    """Answer to a pre-vote; not a promise, so it survives no crash and needs none."""

    term: Term
    proposed_term: Term
    """Repeats the request, so that an answer to an older round is not counted."""
    granted: bool


class VoteRequest(NamedTuple):
    """Raft §5.2; leaves only when the candidate's own term and vote are durable."""

    term: Term
    last_index: LogIndex
    last_term: Term
    transfer: bool
    """The present leader asked for this election, so loyalty to it is no reason to refuse
    (thesis §4.2.3)."""


class VoteReply(NamedTuple):
    """A durable vote, or its refusal."""

    term: Term
    granted: bool


class AppendRequest(NamedTuple):
    """Entries `prev_index + 1 .. last_index`, and the commit index (Raft §5.3).

    It leaves the core as a range with `entries=()`; the shell fills in entries and bytes and may
    shorten the range. The receiver looks only at `entries`.
    """

    term: Term
    prev_index: LogIndex
    prev_term: Term
    commit_index: LogIndex
    acknowledged: LogIndex
    """The highest index that the receiver has told this leader it holds. A receiver with a
    shorter log has lost data that it had promised."""
    last_index: LogIndex
    entries: tuple[Entry, ...] = ()


class AppendReply(NamedTuple):
    """The sender holds, durably, the leader's log up to and including `matched`."""

    term: Term
    matched: LogIndex
    commit_index: LogIndex
    """What the sender knows to be committed; lets a leader find out when all know everything."""


class AppendRefusal(NamedTuple):
    """The sender has no entry (`prev_index`, `prev_term`), with a hint where logs may agree."""

    term: Term
    prev_index: LogIndex
    """Repeats the request, so that a late refusal is not taken for a new one."""
    hint_index: LogIndex
    """The last index, at most `prev_index`, whose term here is at most the request's; logs cannot
    agree anywhere between it and `prev_index` (conflict back-off by term, end of Raft §5.3)."""
    hint_term: Term


class Heartbeat(NamedTuple):
    """I lead; small enough that those of many groups travel as one message."""

    term: Term
    commit_index: LogIndex
    """Never beyond what this receiver has acknowledged: a heartbeat checks no log."""
    read_round: int
    """Number of the newest read-index round of this term, 0 = none yet (thesis §6.4)."""
    quiet: bool
    """All have everything and know it: expect no more heartbeats until something happens."""


class HeartbeatReply(NamedTuple):
    """The sender follows this leader in this term."""

    term: Term
    read_round: int
    commit_index: LogIndex
    quiet: bool
    """The sender agreed to be quiet."""


class TimeoutNow(NamedTuple):
    """Campaign at once, without a pre-vote: the leader steps aside for you (thesis §3.10)."""

    term: Term


class InstallSnapshot(NamedTuple):
    """The shell holds a complete snapshot from the leader, up to and including `index`."""

    term: Term
    index: LogIndex  # type: ignore[assignment] # hides tuple.index
    index_term: Term
    membership: Membership


Message = (
    PreVoteRequest
    | PreVoteReply
    | VoteRequest
    | VoteReply
    | AppendRequest
    | AppendReply
    | AppendRefusal
    | Heartbeat
    | HeartbeatReply
    | TimeoutNow
    | InstallSnapshot
)


class Envelope(NamedTuple):
    """A message and who it is for."""

    to: Member
    message: Message
