"""The simulation must be able to fail: each known mistake, planted, is found by some seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import InvariantBroken
from aegis_cluster.raft import (
    AppendReply,
    AppendRequest,
    Entry,
    Envelope,
    Message,
    PreVoteRequest,
    Replica,
    VoteRequest,
)
from tests.raft.script import Script
from tests.raft.simulation import Violation, World
from tests.raft.test_scripts import SCRIPTS

if TYPE_CHECKING:
    from aegis_cluster.ids import LogIndex, Member

SEEDS_MAX = 400
STEPS = 4_000


class CountsItselfBeforeItsFsync(Replica):
    """A1."""

    def _held_by_me(self) -> LogIndex:
        return self.log.last_index


class PromisesBeforeItsFsync(Replica):
    """A1, A2: votes and acknowledgements leave at once."""

    def _promise(self, to: Member, message: Message) -> None:
        self._send.append(Envelope(to, message))


class VotesTwice(Replica):
    """A2."""

    def _may_vote(self, sender: Member, request: VoteRequest) -> bool:
        if self.leader is None and self.vote not in (None, sender):
            self.vote = None
        return super()._may_vote(sender, request)


class VotesForAnyLog(Replica):
    """Raft §5.4.1 forgotten."""

    def _may_vote(self, sender: Member, request: VoteRequest) -> bool:
        return self.vote in (None, sender) and self.leader is None

    def _would_vote(self, request: PreVoteRequest) -> bool:
        return request.proposed_term > self.term and not self._hears_leader()


class CutsOnEveryAppend(Replica):
    """A21: a late append removes what follows it."""

    def _store(self, entries: tuple[Entry, ...]) -> None:
        if entries and entries[0].index <= self.log.last_index:
            self._truncate_log(entries[0].index)
        super()._store(entries)


class AcknowledgesItsWholeLog(Replica):
    """Says what it has, not what was found to match."""

    def _acknowledge(self, sender: Member, matched: LogIndex) -> None:
        reply = AppendReply(self.term, self.log.last_index, self.commit_index)
        self._promise(sender, reply)


class SkipsTheConsistencyCheck(Replica):
    """Raft §5.3 forgotten: accepts what does not continue its log."""

    def _refuse(self, sender: Member, request: AppendRequest) -> None:
        if request.prev_index <= self.log.last_index:
            self._accept(sender, request)
        else:
            super()._refuse(sender, request)


class BelievesTheLeadersCommitIndex(Replica):
    """Commits what the leader committed, not only what was found to match."""

    def _accept(self, sender: Member, request: AppendRequest) -> None:
        super()._accept(sender, request)
        self._commit(min(request.commit_index, self.log.last_index))


class ReadsWithoutARound(Replica):
    """A5."""

    def _confirmed_round(self) -> int:
        return self._read_round


class ReadsBeforeItsNoop(Replica):
    """A6."""

    def _is_established(self) -> bool:
        return True


class WaitsForNobody(Replica):
    """Liveness: a lost append is never sent again."""

    def _is_stalled(self, progress: object) -> bool:
        return False


class NeverCampaigns(Replica):
    """Liveness: nobody leads."""

    def _may_campaign(self) -> bool:
        return False


class RemovedLeaderNeverCampaigns(Replica):
    """Liveness, thesis §4.2.2: only it has the entry that removes it, and it keeps silent."""

    def _may_campaign(self) -> bool:
        return self.is_voter and not self.damaged


MISTAKES = [
    CountsItselfBeforeItsFsync,
    PromisesBeforeItsFsync,
    VotesTwice,
    VotesForAnyLog,
    CutsOnEveryAppend,
    AcknowledgesItsWholeLog,
    SkipsTheConsistencyCheck,
    BelievesTheLeadersCommitIndex,
    ReadsWithoutARound,
    ReadsBeforeItsNoop,
    WaitsForNobody,
    NeverCampaigns,
    RemovedLeaderNeverCampaigns,
]


FOUND_BY = {VotesTwice: 42, ReadsWithoutARound: 133}
"""Seeds to try first, where finding takes long."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_is_found(mistake: type[Replica]) -> None:
    for seed in (FOUND_BY.get(mistake, 0), *range(SEEDS_MAX)):
        try:
            World(seed, mistake).run(STEPS)
        except (Violation, InvariantBroken, AssertionError) as found:
            print(f"SEED {seed}: {found}")  # noqa: T201
            return
    pytest.fail(f"{mistake.__name__} survived {SEEDS_MAX} seeds")


# What needs a rare order of events is shown by the script that was written for it.


class CommitsOlderTermsByCounting(Replica):
    """A7: Raft §5.4.2 forgotten."""

    def _may_commit(self, index: LogIndex) -> bool:
        return index > 0


class ChangesBeforeItsNoop(Replica):
    """A8."""

    def _may_change_membership(self) -> bool:
        return self.membership_index <= self.commit_index


class ChangesTwiceAtOnce(Replica):
    """Thesis §4.1 forgotten."""

    def _may_change_membership(self) -> bool:
        return self._is_established()


class IsNeverLoyal(Replica):
    """A3: whoever asks gets a vote."""

    def _hears_leader(self) -> bool:
        return False


class IsLoyalBeyondTheLink(Replica):
    """Stickiness that forgets lost links makes fast failover slow."""

    def _lost_leader(self) -> None:
        pass


class LeadsWithoutAQuorum(Replica):
    """A4."""

    def _check_quorum(self) -> bool:
        return True


class NeverGivesWay(Replica):
    """Two that ask at once split the vote."""

    def _yields_to(self, sender: Member, request: PreVoteRequest) -> bool:
        return False


SHOWN = [
    ("figure_8", CommitsOlderTermsByCounting),
    ("membership_bug", ChangesBeforeItsNoop),
    ("membership_bug", ChangesTwiceAtOnce),
    ("stickiness_and_lost_link", IsNeverLoyal),
    ("stickiness_and_lost_link", IsLoyalBeyondTheLink),
    ("check_quorum", LeadsWithoutAQuorum),
    ("two_candidates", NeverGivesWay),
]


@pytest.mark.parametrize(("script", "mistake"), SHOWN)
def test_changes_the_dialogue(script: str, mistake: type[Replica]) -> None:
    expected = (SCRIPTS / f"{script}.txt").read_text(encoding="utf-8")
    try:
        actual = Script(mistake).run(expected)
    except InvariantBroken:
        return
    assert actual != expected
