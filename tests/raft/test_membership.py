"""Memberships: which steps are allowed, and what holds at which index."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from aegis_cluster.errors import InvariantBroken, Misuse, NotReady
from aegis_cluster.ids import LogIndex
from aegis_cluster.raft import Membership, MembershipHistory, RaftConfig
from aegis_cluster.raft.membership import is_single_step
from aegis_cluster.raft.quorum import quorum_size
from tests.raft.harness import Cluster, member, membership


def quorums(voters: tuple[int, ...]) -> list[set[int]]:
    return [set(chosen) for chosen in combinations(voters, quorum_size(len(voters)))]


def all_groups(nodes: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(1, nodes + 1) for chosen in combinations(range(nodes), size)]


@pytest.mark.parametrize("before", all_groups(4))
def test_thesis_4_1_after_a_single_step_majorities_still_meet(before: tuple[int, ...]) -> None:
    for after in all_groups(4):
        if is_single_step(membership(*before), membership(*after)):
            assert all(a & b for a in quorums(before) for b in quorums(after))


def test_steps() -> None:
    group = membership(1, 2, 3)
    assert group.with_learner(member(4)) == membership(1, 2, 3, learners=(4,))
    assert group.with_learner(member(4)).with_voter(member(4)) == membership(1, 2, 3, 4)
    assert group.without(member(2)) == membership(1, 3)
    assert is_single_step(group, membership(1, 2, 3, learners=(4, 5)))
    assert not is_single_step(group, membership(1, 2, 4))


@pytest.mark.parametrize(("voters", "learners"), [((), ()), ((1, 1), ()), ((1,), (1,)), ((), (1,))])
def test_impossible_memberships(voters: tuple[int, ...], learners: tuple[int, ...]) -> None:
    with pytest.raises(Misuse):
        Membership.of(map(member, voters), map(member, learners))


def test_a_stranger_cannot_be_removed() -> None:
    with pytest.raises(Misuse):
        membership(1, 2).without(member(3))


def test_a_wiped_node_is_another_member() -> None:
    old = member(1)
    assert old._replace(incarnation="b") not in membership(1, 2, 3).members


def test_history_follows_the_log() -> None:
    history = MembershipHistory(membership(1))
    history.append(LogIndex(5), membership(1, 2))
    history.append(LogIndex(9), membership(1, 2, 3))
    assert [len(history.at(LogIndex(index)).voters) for index in (4, 5, 8, 9)] == [1, 2, 2, 3]
    assert history.truncate(LogIndex(9))
    assert not history.truncate(LogIndex(6))
    assert (history.effective, history.effective_index) == (membership(1, 2), 5)
    history.compact(LogIndex(7))
    assert history.at(LogIndex(7)) == membership(1, 2)
    with pytest.raises(InvariantBroken):
        history.append(LogIndex(5), membership(1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_ticks": 0},
        {"heartbeat_ticks": 5},
        {"quorum_ticks": 10},
        {"election_ticks_max": 10},
        {"campaign_ticks_min": 10},
        {"link_lost_ticks_max": 0},
        {"in_flight_appends_max": 0},
        {"append_bytes_max": 2**30},
    ],
)
def test_settings_that_contradict_each_other(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvariantBroken):
        RaftConfig(**wrong)


def test_a_living_voter_is_not_removed_beside_a_dead_one() -> None:
    """What is left could not commit the change, nor anything after it."""
    cluster = Cluster(1, 2, 3)
    cluster.elect(1)
    cluster.tick()
    cluster.hosts[3].crash()
    cluster[1].link_lost(member(3))
    now = cluster[1].membership
    with pytest.raises(NotReady, match="too few"):
        cluster[1].change_membership(now.without(member(2)), 60)
    cluster[1].change_membership(now.without(member(3)), 60)
