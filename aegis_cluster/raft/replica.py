"""One replica of one group: everything that happens to it comes in here.

The idea: time, links, messages and requests are the only inputs; which chapter handles what is
decided here and nowhere else.

The rule it protects: a message of another term is settled before anything looks at its content
(Raft §5.1, figure 2 "Rules for Servers: All Servers").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.errors import PeerViolation
from aegis_cluster.raft.core import Role
from aegis_cluster.raft.elections import ElectionChapter
from aegis_cluster.raft.messages import (
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVoteReply,
    PreVoteRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)

if TYPE_CHECKING:
    from aegis_cluster.ids import Member


class Replica(ElectionChapter):
    """A Raft replica without input or output; see the package's docstring for how to drive it."""

    # -- time -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One tick passed. After a stall drain the inbox first, and do not make up for ticks."""
        if self.quiet:
            return
        self._now += 1
        if self.role is Role.LEADER:
            self._tick_leader()
        else:
            self._tick_election()

    # -- messages ---------------------------------------------------------------------------------

    def receive(self, sender: Member, message: Message) -> None:
        """A message came from `sender`; it may be late, repeated or out of order."""
        if self.quiet and not (isinstance(message, HeartbeatReply) and message.quiet):
            self._wake()
        if message.term != self.term and not self._settle_term(sender, message):
            return
        match message:
            case AppendReply():
                self._on_append_reply(sender, message)
            case AppendRequest():
                self._on_append_request(sender, message)
            case HeartbeatReply():
                self._on_heartbeat_reply(sender, message)
            case Heartbeat():
                self._on_heartbeat(sender, message)
            case _:
                self._receive_rare(sender, message)

    def _receive_rare(self, sender: Member, message: Message) -> None:
        match message:
            case AppendRefusal():
                self._on_append_refusal(sender, message)
            case PreVoteRequest():
                self._on_pre_vote_request(sender, message)
            case PreVoteReply():
                self._on_pre_vote_reply(sender, message)
            case VoteRequest():
                self._on_vote_request(sender, message)
            case VoteReply():
                self._on_vote_reply(sender, message)
            case InstallSnapshot():
                self._on_install_snapshot(sender, message)
            case TimeoutNow():
                self._on_timeout_now(sender, message)
            case _:
                raise PeerViolation("not a Raft message", have=type(message).__name__)

    def _settle_term(self, sender: Member, message: Message) -> bool:
        """Deal with a message of another term; return whether its content still matters."""
        if isinstance(message, PreVoteRequest):
            return True  # never changes a term, and is answered whatever its own
        if message.term < self.term:
            if isinstance(message, PreVoteReply):
                return True  # a voter whose term is behind may well be willing
            self._answer_past(sender, message)
            return False
        if isinstance(message, VoteRequest) and self._ignores_vote_request(message):
            return False
        self._become_follower(message.term, None)
        return True

    def _answer_past(self, sender: Member, message: Message) -> None:
        """Tell leaders and candidates of the past that it is past; replies from there are void.

        A leader must hear it, or a replica whose term is ahead could never rejoin it; a damaged one
        neither, which promises nothing by that.
        """
        if isinstance(message, VoteRequest):
            self._say(sender, VoteReply(self.term, granted=False))
        elif isinstance(message, AppendRequest | Heartbeat | InstallSnapshot):
            self._say(sender, HeartbeatReply(self.term, 0, self.commit_index, quiet=False))

    # -- links ------------------------------------------------------------------------------------

    def link_lost(self, member: Member) -> None:
        """The link to a member broke. Deliver what came over it before saying so."""
        self._links_lost.add(member)
        if self.role is Role.LEADER:
            self._leader_lost_link(member)
        elif member == self.leader:
            self._lost_leader()

    def _leader_lost_link(self, member: Member) -> None:
        progress = self.progress.get(member)
        if progress is None:
            return
        if self.quiet:
            self._wake()
        progress.link_lost = True
        progress.probe(progress.next_index)

    def _lost_leader(self) -> None:
        """Ask for pre-votes soon, staggered: hundreds of groups may lose one leader at once."""
        if self.quiet:
            self._wake()
        if self.role is Role.FOLLOWER:
            soon = self._elapsed + self._rng.randint(1, self.config.link_lost_ticks_max)
            self._timeout = min(self._timeout, soon)

    def link_up(self, member: Member) -> None:
        """There is a fresh link to a member, perhaps to a new start of its process."""
        self._links_lost.discard(member)
        if self.role is Role.LEADER:
            self._leader_regained_link(member)
        elif member == self.leader and self.quiet:
            self._wake()

    def _leader_regained_link(self, member: Member) -> None:
        progress = self.progress.get(member)
        if progress is None:
            return
        if self.quiet:
            self._wake()
        if progress.link_lost:
            self._link_is_back(progress)

    # -- repair -----------------------------------------------------------------------------------

    def mark_repaired(self) -> None:
        """The shell has restored from peers what this replica had acknowledged."""
        self.damaged = False
