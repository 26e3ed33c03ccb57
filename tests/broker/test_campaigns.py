"""Elections take turns where hundreds are due; where few are, nobody waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from aegis_cluster.broker.campaigns import CAMPAIGNS_PER_TICK, Campaigns
from aegis_cluster.ids import GroupId, NodeId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.broker.partition import Partition


class FakeReplica:
    """Counts how often it was told to campaign."""

    def __init__(self) -> None:
        self.campaigns = 0

    def campaign(self) -> None:
        self.campaigns += 1


def replicas(count: int) -> list[Partition]:
    return [
        cast("Partition", SimpleNamespace(group=GroupId(number), replica=FakeReplica()))
        for number in range(count)
    ]


def groups(partitions: Iterable[Partition]) -> list[int]:
    return sorted(one.group for one in partitions)


def begun(partitions: Sequence[Partition]) -> int:
    return sum(cast("FakeReplica", one.replica).campaigns for one in partitions)


def test_where_few_lack_a_leader_time_passes_for_all_of_them() -> None:
    campaigns, waiting = Campaigns(NodeId(1)), replicas(CAMPAIGNS_PER_TICK)
    for _ in range(3):
        assert groups(campaigns.those_to_tick(waiting)) == groups(waiting)


def test_where_many_do_all_have_their_turn() -> None:
    campaigns, waiting = Campaigns(NodeId(1)), replicas(5 * CAMPAIGNS_PER_TICK)
    ticks = [list(campaigns.those_to_tick(waiting)) for _ in range(5)]
    assert {len(tick) for tick in ticks} == {CAMPAIGNS_PER_TICK}
    assert groups(one for tick in ticks for one in tick) == groups(waiting)


def test_nodes_begin_at_different_places() -> None:
    waiting = replicas(10 * CAMPAIGNS_PER_TICK)
    firsts = [set(groups(Campaigns(NodeId(node)).those_to_tick(waiting))) for node in (1, 2, 3)]
    assert not firsts[0] & firsts[1]
    assert not firsts[1] & firsts[2]
    assert not firsts[0] & firsts[2]


def test_campaigns_that_are_wanted_begin_at_once_and_then_a_tick_s_worth_at_a_time() -> None:
    campaigns, waiting = Campaigns(NodeId(1)), replicas(3 * CAMPAIGNS_PER_TICK)
    for one in waiting:
        campaigns.want(one)
    assert begun(waiting) == CAMPAIGNS_PER_TICK
    for tick in (2, 3):
        ticked = list(campaigns.those_to_tick(waiting))
        assert len(ticked) == CAMPAIGNS_PER_TICK, "the wanted ones take all the room"
        assert begun(waiting) == tick * CAMPAIGNS_PER_TICK
    list(campaigns.those_to_tick(waiting))
    assert begun(waiting) == 3 * CAMPAIGNS_PER_TICK


def test_one_that_has_got_a_leader_meanwhile_asks_for_none() -> None:
    campaigns, waiting = Campaigns(NodeId(1)), replicas(CAMPAIGNS_PER_TICK + 2)
    for one in waiting:
        campaigns.want(one)
    list(campaigns.those_to_tick(waiting[:-1]))
    assert [begun([one]) for one in waiting[-2:]] == [1, 0]
