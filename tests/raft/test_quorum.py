"""Majorities against a slow, obvious twin that tries every set of voters."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.errors import InvariantBroken
from aegis_cluster.raft.quorum import Outcome, election_outcome, majority_value, quorum_size
from tests.raft.harness import member


def majorities(voters: int) -> list[set[int]]:
    """Every set of more than half of the voters."""
    sizes = range(1, voters + 1)
    return [
        set(chosen)
        for size in sizes
        if 2 * size > voters
        for chosen in combinations(range(voters), size)
    ]


def slow_majority_value(values: list[int]) -> int:
    """The highest value such that all of some majority have reached it."""
    return max(min(values[voter] for voter in majority) for majority in majorities(len(values)))


def slow_outcome(answers: list[bool | None]) -> Outcome:
    """Won if some majority said yes; lost if no majority can any more."""
    groups = majorities(len(answers))
    if any(all(answers[voter] is True for voter in group) for group in groups):
        return Outcome.WON
    if any(all(answers[voter] is not False for voter in group) for group in groups):
        return Outcome.PENDING
    return Outcome.LOST


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_majority_value_is_what_some_majority_reached(values: list[int]) -> None:
    assert majority_value(values) == slow_majority_value(values)


@given(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=7))
def test_election_outcome(answers: list[bool | None]) -> None:
    voters = [member(node) for node in range(len(answers))]
    votes = {
        voter: answer for voter, answer in zip(voters, answers, strict=True) if answer is not None
    }
    assert election_outcome(voters, votes) is slow_outcome(answers)


def test_answers_of_strangers_do_not_count() -> None:
    voters = [member(1), member(2), member(3)]
    votes = {member(1): True, member(8): True, member(9): True}
    assert election_outcome(voters, votes) is Outcome.PENDING


@pytest.mark.parametrize("voters", range(1, 8))
def test_any_two_quorums_meet(voters: int) -> None:
    groups = [set(chosen) for chosen in combinations(range(voters), quorum_size(voters))]
    assert all(a & b for a in groups for b in groups)


def test_a_group_without_voters_has_no_majority() -> None:
    with pytest.raises(InvariantBroken):
        majority_value([])
