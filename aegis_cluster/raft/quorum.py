"""Majorities: of matched indexes, and of votes. Pure functions, no state."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from aegis_cluster.errors import invariant

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aegis_cluster.ids import Member


class Outcome(Enum):
    """Where an election stands."""

    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def quorum_size(voters: int) -> int:
    """Smallest number of voters of which any two groups share one (Raft §5.2)."""
    return voters // 2 + 1


def majority_value(values: Iterable[int]) -> int:
    """Highest value that a majority has reached; one value per voter.

    With values sorted upward, exactly `quorum_size` of them stand at or above the place returned.
    """
    ordered = sorted(values)
    invariant(bool(ordered), "a group has at least one voter")
    return ordered[len(ordered) - quorum_size(len(ordered))]


def election_outcome(voters: Iterable[Member], votes: Mapping[Member, bool]) -> Outcome:
    """Count the votes of voters; answers of others do not count (thesis §4.2.2)."""
    granted = refused = total = 0
    for voter in voters:
        total += 1
        answer = votes.get(voter)
        granted += answer is True
        refused += answer is False
    needed = quorum_size(total)
    if granted >= needed:
        return Outcome.WON
    # Lost when even all missing answers could not make a majority.
    return Outcome.LOST if total - refused < needed else Outcome.PENDING
