"""A follower's half of replication: accept what continues the own log, say where it does not.

The rule it protects: a follower removes entries only when a leader's entry really contradicts
one (same index, other term); a late or repeated append changes nothing (Raft figure 2,
AppendEntries, receiver steps 3-4).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aegis_cluster.errors import PeerViolation, invariant
from aegis_cluster.ids import NO_INDEX, LogIndex, Term
from aegis_cluster.raft.core import Core, Role
from aegis_cluster.raft.effects import SnapshotInstall
from aegis_cluster.raft.messages import (
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
)

if TYPE_CHECKING:
    from aegis_cluster.ids import Member
    from aegis_cluster.raft.membership import Membership
    from aegis_cluster.raft.messages import Entry


class FollowerChapter(Core):
    """What a replica does with messages from its leader."""

    def _hear_leader(self, sender: Member) -> None:
        """A message of the present term came from its leader."""
        if self.leader != sender:
            if self.leader is not None:
                self._require_impostor(sender, self.leader)
            self._become_follower(self.term, sender)
        self._elapsed = 0
        if self._links_lost and sender in self._links_lost:
            # It speaks, so the link is back: be loyal again, and wait as long as usual.
            self._links_lost.discard(sender)
            self._draw_timeout()

    def _require_impostor(self, sender: Member, leader: Member) -> None:
        """Two say that they lead in one term: the one that is no member here lies, for only members
        are elected. Raises `PeerViolation` when that is the sender.
        """
        members = self.membership.members
        if sender not in members:
            raise PeerViolation("a stranger says that it leads", stranger=sender, leader=leader)
        both = leader in members
        invariant(not both, "one leader per term", term=self.term, leaders=(leader, sender))

    # -- append -----------------------------------------------------------------------------------

    def _on_append_request(self, sender: Member, request: AppendRequest) -> None:
        self._hear_leader(sender)
        if request.acknowledged > self.log.last_index:
            # Only a loss explains that: within a term nothing that was acknowledged is removed.
            self.mark_damaged()
        if self.damaged:
            return
        _check_entries(request)
        if self.config.may_lose_tail and self._contradicts(request):
            self.mark_damaged()
        elif request.prev_index < self.commit_index:
            # Overtaken: what is committed here is in every later leader's log (Raft §5.4).
            self._acknowledge(sender, self._common_with(request))
        elif self.log.matches(request.prev_index, request.prev_term):
            self._accept(sender, request)
        else:
            self._refuse(sender, request)

    def _contradicts(self, request: AppendRequest) -> bool:
        """Whether the leader has another entry where one is committed here: a majority lost what
        it had acknowledged, and this replica is to be rebuilt as the leader is now."""
        places = [(request.prev_index, request.prev_term)]
        places += [(entry.index, entry.term) for entry in request.entries]
        return any(
            index <= self.commit_index
            and self.log.can_follow(index)
            and not self.log.matches(index, term)
            for index, term in places
        )

    def _common_with(self, request: AppendRequest) -> LogIndex:
        """What is committed here; of that, what is known to be in the leader's log, where it might
        have lost some."""
        if not self.config.may_lose_tail:
            return self.commit_index
        return LogIndex(min(self.commit_index, request.prev_index + len(request.entries)))

    def _accept(self, sender: Member, request: AppendRequest) -> None:
        self._store(request.entries)
        matched = LogIndex(request.prev_index + len(request.entries))
        self._commit(min(request.commit_index, matched))
        self._acknowledge(sender, matched)

    def _store(self, entries: tuple[Entry, ...]) -> None:
        """Append what is new; cut the log only at the first real contradiction."""
        for entry in entries:
            if entry.index <= self.log.last_index:
                if self.log.term_at(entry.index) == entry.term:
                    continue
                self._truncate_log(entry.index)
            self._append_entry(entry)

    def _acknowledge(self, sender: Member, matched: LogIndex) -> None:
        self._promise(sender, AppendReply(self.term, matched, self.commit_index))

    def _refuse(self, sender: Member, request: AppendRequest) -> None:
        upto = min(request.prev_index, self.log.last_index)
        hint = self.log.last_with_term_at_most(request.prev_term, upto)
        term = self.log.term_at(hint) if hint >= self.log.first_index - 1 else Term(0)
        self._say(sender, AppendRefusal(self.term, request.prev_index, hint, term))

    # -- heartbeat --------------------------------------------------------------------------------

    def _on_heartbeat(self, sender: Member, heartbeat: Heartbeat) -> None:
        self._hear_leader(sender)
        if self.damaged:
            return
        # The leader names at most what this replica acknowledged in this term, so it is the same
        # entry here; should it be missing, data was lost.
        if heartbeat.commit_index > self.log.last_index:
            self.mark_damaged()
            return
        self._commit(heartbeat.commit_index)
        self.quiet = heartbeat.quiet and self._knows_all(heartbeat.commit_index)
        self._say(
            sender,
            HeartbeatReply(self.term, heartbeat.read_round, self.commit_index, self.quiet),
        )

    def _knows_all(self, commit_index: LogIndex) -> bool:
        return self.log.last_index == self.commit_index == commit_index

    # -- snapshots --------------------------------------------------------------------------------

    def _on_install_snapshot(self, sender: Member, snapshot: InstallSnapshot) -> None:
        self._hear_leader(sender)
        if self.damaged:
            return
        if snapshot.index > self.commit_index:
            self.install(snapshot.index, snapshot.index_term, snapshot.membership)
        self._acknowledge(sender, self.commit_index)

    def install(self, index: LogIndex, term: Term, membership: Membership) -> None:
        """Continue from a snapshot up to and including `index` (Raft §7).

        If the log holds that very entry, nothing is lost by keeping what follows it (figure 13,
        step 6); else the whole log is replaced.
        """
        invariant(index > self.commit_index, "a snapshot only leads forward", index=index)
        invariant(self.role is not Role.LEADER, "a leader needs no snapshot", index=index)
        if self.log.matches(index, term):
            self._commit(index)
            return
        self.log.reset(index, term)
        self._history.reset(index, membership)
        self._membership_changed()
        self._append.clear()
        self._truncate_from = None
        self._install = SnapshotInstall(index, term, membership)
        self._stored_last = index
        # Until the snapshot is on disk, nothing of the new log is.
        self.durable_index = NO_INDEX
        self._unfinished_last = deque(NO_INDEX for _ in self._unfinished_last)
        self.commit_index = index
        self.applied_index = max(self.applied_index, index)

    # -- damage -----------------------------------------------------------------------------------

    def mark_damaged(self) -> None:
        """Acknowledged data is missing here: from now on promise nothing (RELIABILITY §1)."""
        self.damaged = True
        self._reply.clear()
        if self.role is not Role.FOLLOWER:
            self._become_follower(self.term, None)


def _check_entries(request: AppendRequest) -> None:
    """Refuse what no correct leader sends."""
    want = request.prev_index
    term = request.prev_term
    for entry in request.entries:
        want = LogIndex(want + 1)
        if entry.index != want or not term <= entry.term <= request.term:
            raise PeerViolation(
                "append with impossible entries", have=(entry.index, entry.term), want=(want, term)
            )
        term = entry.term
