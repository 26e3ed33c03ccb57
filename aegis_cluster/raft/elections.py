"""Who leads: time-outs, pre-votes, votes, and loyalty to a leader that is alive.

The idea: a replica that hears no leader first asks whether it would win (pre-vote); only then does
it raise its term. Others refuse while they hear a leader themselves. A lost link counts as not
hearing it, or loyalty and fast failover would contradict each other.

The rules it protects: one vote per term, durable before it is told (Raft §5.2); a vote only for a
log that is at least as new as the own one (§5.4.1), so every leader has every committed entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.ids import Term
from aegis_cluster.raft.changing import ChangeChapter
from aegis_cluster.raft.core import Role
from aegis_cluster.raft.messages import (
    PreVoteReply,
    PreVoteRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from aegis_cluster.raft.quorum import Outcome, election_outcome

if TYPE_CHECKING:
    from aegis_cluster.ids import Member


class ElectionChapter(ChangeChapter):
    """Campaigns and votes."""

    def _init_outbox(self) -> None:
        super()._init_outbox()
        self._votes: dict[Member, bool] = {}
        """Answers in the present round, pre-votes or votes."""

    # -- campaigning ------------------------------------------------------------------------------

    @property
    def lacks_leader(self) -> bool:
        """Nobody leads, as far as this replica knows, or the link to the leader is lost."""
        if self.role is Role.LEADER:
            return False
        return self.leader is None or self.leader in self._links_lost

    def campaign(self) -> None:
        """Ask for pre-votes now; does nothing on a leader or where it must not be asked."""
        if self.role is not Role.LEADER and self._may_campaign():
            self.quiet = False
            self._ask_pre_votes()

    def _may_campaign(self) -> bool:
        """Whether this replica may be needed as a leader.

        One that appended its own removal may hold the newest log until that is committed, so it
        still campaigns, without counting itself (thesis §4.2.2).
        """
        if self.damaged:
            return False
        return self._is_voter or self.me in self.membership_at(self.commit_index).voters

    def _tick_election(self) -> None:
        if self.role is Role.CANDIDATE and self.me not in self._votes:
            return  # its own vote is on the way to the disk: nobody has been asked yet
        self._elapsed += 1
        if self._elapsed >= self._timeout:
            self._elapsed = 0
            self.leader = None
            self._draw_timeout()
            if self._may_campaign():
                self._ask_pre_votes()

    def _ask_pre_votes(self) -> None:
        """Thesis §9.6: find out whether an election could be won, at no cost to others."""
        self.role = Role.PRE_CANDIDATE
        self.leader = None
        self._begin_round()
        self._votes[self.me] = True
        request = PreVoteRequest(
            self.term, Term(self.term + 1), self.log.last_index, self.log.last_term
        )
        for voter in self._voters:
            if voter != self.me:
                self._say(voter, request)
        self._count_votes()

    def _begin_round(self) -> None:
        """Wait for answers shorter than for a leader: nobody leads, so haste harms nobody."""
        self._votes.clear()
        self._elapsed = 0
        config = self.config
        drawn = self._rng.randint(config.campaign_ticks_min, config.election_ticks_min)
        self._timeout = drawn * self._patience

    def _ask_votes(self, *, transfer: bool) -> None:
        """Raft §5.2: a new term, a vote for itself, a request to every other voter."""
        self._set_hard_state(Term(self.term + 1), self.me)
        self.role = Role.CANDIDATE
        self.leader = None
        self._begin_round()
        request = VoteRequest(self.term, self.log.last_index, self.log.last_term, transfer)
        for voter in self._voters:
            if voter != self.me:
                self._promise(voter, request)
        # The own vote counts when it is on disk, see _disk_work_done.

    def _disk_work_done(self) -> None:
        super()._disk_work_done()
        if self.role is Role.CANDIDATE and self._hard_state_durable and self.me not in self._votes:
            self._votes[self.me] = True
            self._count_votes()

    def _count_votes(self) -> None:
        outcome = election_outcome(self._voters, self._votes)
        if outcome is Outcome.LOST:
            self._become_follower(self.term, None)
        elif outcome is Outcome.WON and self.role is Role.PRE_CANDIDATE:
            self._ask_votes(transfer=False)
        elif outcome is Outcome.WON:
            self._start_leading()

    # -- pre-votes --------------------------------------------------------------------------------

    def _on_pre_vote_request(self, sender: Member, request: PreVoteRequest) -> None:
        if self.damaged:
            return
        granted = self._would_vote(request)
        self._say(sender, PreVoteReply(self.term, request.proposed_term, granted))
        if granted and self.role is Role.PRE_CANDIDATE and self._yields_to(sender, request):
            self._become_follower(self.term, None)

    def _would_vote(self, request: PreVoteRequest) -> bool:
        return (
            request.proposed_term > self.term
            and not self._hears_leader()
            and not self.log.is_newer_than(request.last_index, request.last_term)
        )

    def _yields_to(self, sender: Member, request: PreVoteRequest) -> bool:
        """Of two that ask at the same time one gives way, or they would split the vote."""
        theirs = (request.last_term, request.last_index, sender)
        return theirs > (self.log.last_term, self.log.last_index, self.me)

    def _on_pre_vote_reply(self, sender: Member, reply: PreVoteReply) -> None:
        if self.role is Role.PRE_CANDIDATE and reply.proposed_term == self.term + 1:
            self._votes[sender] = reply.granted
            self._count_votes()

    # -- votes ------------------------------------------------------------------------------------

    def _hears_leader(self) -> bool:
        """Whether a leader is known to be alive (stickiness, thesis §4.2.3).

        A leader hears itself: check-quorum sees to it that this does not last without cause.
        """
        if self.role is Role.LEADER:
            return True
        return (
            self.leader is not None
            and self.leader not in self._links_lost
            and self._elapsed < self.config.election_ticks_min
        )

    def _ignores_vote_request(self, request: VoteRequest) -> bool:
        """A loyal replica does not even learn the new term, or a stranger could depose leaders."""
        return not request.transfer and self._hears_leader()

    def _on_vote_request(self, sender: Member, request: VoteRequest) -> None:
        if self.damaged:
            return
        granted = self._may_vote(sender, request)
        if granted:
            self._set_hard_state(self.term, sender)
            self._elapsed = 0
        self._promise(sender, VoteReply(self.term, granted))

    def _may_vote(self, sender: Member, request: VoteRequest) -> bool:
        """First come, first served, one per term, and only for a log that is new enough."""
        return (
            self.vote in (None, sender)
            and self.leader is None
            and not self.log.is_newer_than(request.last_index, request.last_term)
        )

    def _on_vote_reply(self, sender: Member, reply: VoteReply) -> None:
        if self.role is Role.CANDIDATE:
            self._votes[sender] = reply.granted
            self._count_votes()

    # -- transfer ---------------------------------------------------------------------------------

    def _on_timeout_now(self, sender: Member, _message: TimeoutNow) -> None:
        """The leader steps aside for this replica: no pre-vote, it would be refused."""
        if self.role is Role.FOLLOWER and self.leader in (None, sender) and self._may_campaign():
            self._ask_votes(transfer=True)
