"""What every role of a replica shares: term and vote, log and membership, and the outbox.

The idea: a step only changes memory and collects debts; `take_effects` hands the debts over, and
`effects_done` reports them paid, in order. What is durable is known from the latter alone.

The rule it protects: a message that reflects a term, vote or entry leaves only when that is on
disk; so `_say` sends at once only while the present term and vote are known to be durable, and
`_promise` always waits.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING

from aegis_cluster.errors import NotLeader, invariant
from aegis_cluster.ids import NO_INDEX, LogIndex, Member, Term
from aegis_cluster.raft.effects import Effects, HardState, SnapshotInstall, SnapshotNeed
from aegis_cluster.raft.membership import Membership, MembershipHistory
from aegis_cluster.raft.messages import Entry, Envelope, Message
from aegis_cluster.raft.quorum import quorum_size

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from aegis_cluster.raft.config import RaftConfig
    from aegis_cluster.raft.log import RaftLog


class Role(Enum):
    """Raft figure 4, with the pre-vote round of thesis §9.6."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class Core:
    """State that all roles share, and the debts of the present step."""

    def __init__(
        self,
        config: RaftConfig,
        me: Member,
        *,
        term: Term,
        vote: Member | None,
        log: RaftLog,
        membership: Membership,
        commit_index: LogIndex,
        rng: random.Random,
        membership_entries: Sequence[tuple[LogIndex, Membership]] = (),
        damaged: bool = False,
    ) -> None:
        """Start as a follower from what was on disk.

        membership: the one in effect at the start of the log; membership_entries: those found in
        the log, upward. commit_index: a `commit_hint` of an earlier run, or anything lower.
        """
        self.config = config
        self.me = me
        self.term = term
        self.vote = vote
        self.log = log
        self.role = Role.FOLLOWER
        self.leader: Member | None = None
        """Who leads the present term, if known."""
        self.damaged = damaged
        """Acknowledged data is missing here: no vote, no campaign, no acknowledgement (C3)."""
        self.quiet = False
        """Nothing is expected to happen: ticks do nothing until something wakes the replica."""
        # Committed, durable and yet not there: that is a loss, not a stale hint.
        self.damaged |= commit_index > log.last_index
        hint = min(commit_index, log.last_index)
        self.commit_index: LogIndex = LogIndex(max(hint, log.first_index - 1))
        self.applied_index: LogIndex = LogIndex(log.first_index - 1)
        """Told by the shell; only `serving` depends on it."""
        self.durable_index: LogIndex = log.last_index
        """Own entries up to here are on disk, as far as they are still in the log."""
        self._history = MembershipHistory(membership, membership_entries)
        self._rng = rng
        self._now = 0
        """Ticks lived through while not quiet."""
        self._elapsed = 0
        """Follower, candidate: ticks since the leader was heard or the campaign began."""
        self._timeout = 0
        self._leaderless_terms = 0
        """Terms that began since a leader was heard."""
        self._links_lost: set[Member] = set()  # asked for membership only, never iterated
        self._init_outbox()
        self._membership_changed()
        self._draw_timeout()

    def _init_outbox(self) -> None:
        self._append: list[Entry] = []
        self._send: list[Envelope] = []
        self._reply: list[Envelope] = []
        self._read_ready: list[tuple[int, LogIndex]] = []
        self._read_failed: list[int] = []
        self._snapshots: list[SnapshotNeed] = []
        self._install: SnapshotInstall | None = None
        self._truncate_from: LogIndex | None = None
        self._hard_state_due = False
        self._hard_state_durable = True
        self._commit_handed = NO_INDEX
        self._stored_last: LogIndex = self.log.last_index
        """Last index that earlier effects, or the disk at start, brought to storage."""
        self._effects_number = 0
        self._unfinished: deque[Effects] = deque()
        self._unfinished_last: deque[LogIndex] = deque()
        """Per unfinished effects: what will be durable then; lowered by truncations since."""

    # -- membership ---------------------------------------------------------------------------

    @property
    def membership(self) -> Membership:
        """In effect now, committed or not (thesis §4.1)."""
        return self._history.effective

    @property
    def membership_index(self) -> LogIndex:
        """Index of the entry that brought the membership in effect; 0 for the first one."""
        return self._history.effective_index

    def membership_at(self, index: LogIndex) -> Membership:
        """What a snapshot up to `index` must carry."""
        return self._history.at(index)

    @property
    def is_voter(self) -> bool:
        """Whether this replica counts towards majorities."""
        return self._is_voter

    def _membership_changed(self) -> None:
        """Recompute what is derived from the membership in effect; roles extend it."""
        self._voters = self.membership.voters
        self._is_voter = self.me in self._voters
        self._quorum = quorum_size(len(self._voters))

    # -- terms and roles ------------------------------------------------------------------------

    def _set_hard_state(self, term: Term, vote: Member | None) -> None:
        invariant(term >= self.term, "terms only rise", have=self.term, want=term)
        invariant(
            term > self.term or self.vote in (None, vote), "one vote per term", vote=self.vote
        )
        if (term, vote) != (self.term, self.vote):
            self._leaderless_terms += term > self.term
            self.term, self.vote = term, vote
            self._hard_state_due = True
            self._hard_state_durable = False

    def _become_follower(self, term: Term, leader: Member | None) -> None:
        """Follow in `term` (Raft §5.1), giving up whatever this replica was."""
        if term > self.term:
            self._set_hard_state(term, None)
        invariant(term == self.term, "nobody follows into the past", have=self.term, want=term)
        if self.role is Role.LEADER:
            self._stop_leading()
        self.role = Role.FOLLOWER
        self.leader = leader
        if leader is not None:
            self._leaderless_terms = 0
        self.quiet = False
        self._elapsed = 0
        self._draw_timeout()

    def _stop_leading(self) -> None:
        """Forget what only a leader needs; extended by the chapters that keep such state."""

    def _draw_timeout(self) -> None:
        """Randomised, so that few campaign at once (Raft §5.2)."""
        config = self.config
        drawn = self._rng.randint(config.election_ticks_min, config.election_ticks_max)
        self._timeout = drawn * self._patience

    @property
    def _patience(self) -> int:
        """Times as long as usual to wait before another term is asked for.

        Voters answer when their votes are on disk. Where that takes longer than a campaign waits,
        each term would end before its votes are in; so patience doubles with each that brought
        no leader.
        """
        lost = max(0, self._leaderless_terms - 1)
        return 1 << min(lost, self.config.patience_doublings_max)

    def _not_leader(self) -> NotLeader:
        return NotLeader("this replica does not lead", leader=self.leader, term=self.term)

    # -- outbox -----------------------------------------------------------------------------------

    def _say(self, to: Member, message: Message) -> None:
        """Send what promises nothing but the present term."""
        if self._hard_state_durable:
            self._send.append(Envelope(to, message))
        else:
            self._reply.append(Envelope(to, message))

    def _promise(self, to: Member, message: Message) -> None:
        """Send what must not leave before this step's disk work is done."""
        self._reply.append(Envelope(to, message))

    @property
    def has_effects(self) -> bool:
        """Whether `take_effects` has anything to hand over."""
        return bool(
            self._append
            or self._send
            or self._reply
            or self._hard_state_due
            or self.commit_index != self._commit_handed
            or self._truncate_from is not None
            or self._install is not None
            or self._read_ready
            or self._read_failed
            or self._snapshots
        )

    def take_effects(self) -> Effects:
        """Hand over the debts of all steps since the last call."""
        self._before_effects()
        self._effects_number += 1
        effects = Effects(
            self._effects_number,
            HardState(self.term, self.vote) if self._hard_state_due else None,
            self._install,
            self._truncate_from,
            tuple(self._append),
            tuple(self._send),
            tuple(self._reply),
            self.commit_index,
            tuple(self._read_ready),
            tuple(self._read_failed),
            tuple(self._snapshots),
        )
        self._clear_outbox()
        self._unfinished.append(effects)
        self._unfinished_last.append(self._stored_last)
        return effects

    def _clear_outbox(self) -> None:
        self._commit_handed = self.commit_index
        self._stored_last = self.log.last_index
        self._hard_state_due = False
        self._install = self._truncate_from = None
        self._append.clear()
        self._send.clear()
        self._reply.clear()
        if self._read_ready or self._read_failed or self._snapshots:
            self._read_ready.clear()
            self._read_failed.clear()
            self._snapshots.clear()

    def _before_effects(self) -> None:
        """Last chance to add to the outbox; chapters that batch extend it."""

    def effects_done(self, effects: Effects) -> None:
        """The disk work of these effects, and of all before them, is done."""
        if not self._unfinished:
            invariant(False, "nothing is under way", number=effects.number)
        head = self._unfinished.popleft()
        if head.number != effects.number:
            invariant(False, "effects are finished in order", have=effects.number)
        stored = self._unfinished_last.popleft()
        self.durable_index = stored
        durable = effects.durable
        if durable is not None and durable == (self.term, self.vote):
            self._hard_state_durable = True
        self._disk_work_done()

    def _disk_work_done(self) -> None:
        """Something became durable; roles that count on it extend this."""

    # -- log --------------------------------------------------------------------------------------

    def _append_entry(self, entry: Entry) -> None:
        self.log.append(entry.index, entry.term, entry.size)
        self._append.append(entry)
        if entry.membership is not None:
            self._history.append(entry.index, entry.membership)
            self._membership_changed()

    def _truncate_log(self, from_index: LogIndex) -> None:
        """Remove entries that a leader of a later term contradicts (Raft §5.3)."""
        invariant(
            from_index > self.commit_index,
            "committed entries are never removed",
            at=from_index,
            commit=self.commit_index,
        )
        self.log.truncate(from_index)
        self._append = [entry for entry in self._append if entry.index < from_index]
        last = LogIndex(from_index - 1)
        if last < self._stored_last:
            self._truncate_from = from_index
            self._stored_last = last
        # What is under way to the disk there will be replaced: it must never count as ours.
        self._unfinished_last = deque(min(stored, last) for stored in self._unfinished_last)
        self.durable_index = min(self.durable_index, last)
        if self._history.truncate(from_index):
            self._membership_changed()

    def _commit(self, index: LogIndex) -> None:
        if index > self.log.last_index:
            invariant(False, "commit beyond the log's end", commit=index)
        if index > self.commit_index:
            self.commit_index = index

    def applied(self, index: LogIndex) -> None:
        """The shell has applied everything up to `index`."""
        if not self.applied_index <= index <= self.commit_index:
            invariant(False, "applied out of order", at=index)
        self.applied_index = index

    @property
    def commit_hint(self) -> LogIndex:
        """The highest commit index that may be written down for the next start.

        Not `commit_index`: should the process die before the entries up to there are on disk,
        others of an older term may still stand in their place.
        """
        return min(self.commit_index, self.durable_index)

    def compact(self, upto: LogIndex) -> None:
        """The shell no longer keeps entries up to and including `upto`."""
        invariant(upto <= self.commit_hint, "only what is durable and committed may go", upto=upto)
        if upto >= self.log.first_index:
            self.log.compact(upto)
            self._history.compact(upto)
