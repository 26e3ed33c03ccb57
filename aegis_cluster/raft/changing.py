"""Changes that the operator asks of a leader: other members, another leader.

The rules it protects: one membership change at a time, and none before the leader's own no-op has
committed. Without the latter, two leaders can each hold an uncommitted change and form majorities
that do not meet (the bug in the thesis's single-server change, raft-dev 2015).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.errors import Misuse, NotReady
from aegis_cluster.raft.core import Role
from aegis_cluster.raft.membership import Membership, is_single_step
from aegis_cluster.raft.messages import KIND_MEMBERSHIP, Entry, TimeoutNow
from aegis_cluster.raft.progress import Following
from aegis_cluster.raft.quorum import quorum_size
from aegis_cluster.raft.reading import ReadChapter

if TYPE_CHECKING:
    from aegis_cluster.ids import Member


class ChangeChapter(ReadChapter):
    """Membership changes (thesis §4) and leadership transfer (thesis §3.10)."""

    # -- membership -------------------------------------------------------------------------------

    def change_membership(self, membership: Membership, size: int) -> Entry:
        """Propose the membership that follows the one in effect, at most one voter away.

        Build it with `replica.membership.with_learner(m)`, `.with_voter(m)` or `.without(m)`.
        Raises NotLeader; NotReady while an earlier change, the leader's no-op or the learner's
        catching up is not finished, or while too few of the new voters are heard; Misuse for more
        than one step.
        """
        if self.role is not Role.LEADER or self._transfer_to is not None:
            raise self._not_leader()
        if not self._may_change_membership():
            raise NotReady("a change waits until the leader's no-op and the last change committed")
        if membership == self.membership or not is_single_step(self.membership, membership):
            raise Misuse("one voter at a time", have=self.membership, want=membership)
        self._check_promotions(membership)
        self._check_majority(membership)
        return self._append_own(KIND_MEMBERSHIP, size, membership)

    def _may_change_membership(self) -> bool:
        return self._is_established() and self.membership_index <= self.commit_index

    def _check_promotions(self, membership: Membership) -> None:
        """A new voter must have caught up first, or commits would wait for it (thesis §4.2.1)."""
        for voter in membership.voters:
            if voter not in self._voters and not self.is_caught_up(voter):
                raise NotReady("the new voter has to catch up as a learner first", member=voter)

    def _check_majority(self, membership: Membership) -> None:
        """Those who are left must be able to commit, or taking a living voter away from beside dead
        ones stops the group for ever."""
        heard = [voter for voter in membership.voters if voter == self.me or self._hears(voter)]
        if len(heard) < quorum_size(len(membership.voters)):
            raise NotReady("too few of the new voters are heard", have=heard, want=membership)

    def _hears(self, member: Member) -> bool:
        progress = self.progress.get(member)
        return (
            progress is not None
            and not progress.link_lost
            and self._now - progress.heard_at <= self.config.quorum_ticks
        )

    def is_caught_up(self, member: Member) -> bool:
        """Whether a member holds nearly all that is committed."""
        progress = self.progress.get(member)
        if progress is None or progress.state is not Following.REPLICATE:
            return False
        return self.commit_index - progress.matched <= self.config.promotion_lag_entries_max

    # -- transfer ---------------------------------------------------------------------------------

    @property
    def transferring(self) -> bool:
        """Whether leadership is being handed over; proposals are refused meanwhile."""
        return self._transfer_to is not None

    def transfer_leadership(self, to: Member | None = None) -> Member:
        """Hand leadership to a voter, by default the one that holds most; return who it is.

        Ends by itself: this replica follows, or after `transfer_ticks` leads on. Raises NotLeader;
        NotReady if nobody can take over; Misuse if `to` is no other voter.
        """
        if self.role is not Role.LEADER:
            raise self._not_leader()
        successor = self.best_successor() if to is None else to
        if successor is None:
            raise NotReady("no other voter can be reached")
        if successor == self.me or successor not in self._voters:
            raise Misuse("leadership goes to another voter", to=successor)
        self._transfer_to = successor
        self._transfer_deadline = self._now + self.config.transfer_ticks
        self._active()
        self._push_transfer()
        return successor

    def _push_transfer(self) -> None:
        """Once the successor holds the whole log, tell it to campaign (thesis §3.10, step 3)."""
        successor = self._transfer_to
        if successor is None or successor not in self.progress:
            return
        if self.progress[successor].matched == self.log.last_index:
            self._say(successor, TimeoutNow(self.term))

    def _beat(self) -> None:
        if self._transfer_to is not None:
            if self._now >= self._transfer_deadline:
                self._transfer_to = None  # it did not come about: lead on
            else:
                self._push_transfer()  # the first one may have been lost
        super()._beat()

    def _may_be_quiet(self) -> bool:
        return self._transfer_to is None and super()._may_be_quiet()
