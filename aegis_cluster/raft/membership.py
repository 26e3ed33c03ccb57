"""Who belongs to the group: voters and learners, and how that changes along the log.

The idea: a change adds or removes one voter at a time, so any majority before it and any after it
share a voter (thesis §4.1). A membership is in effect from the moment its entry is appended, on
every replica, and stops being so if that entry is truncated; hence the history is derived from
the log and cut with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.errors import Misuse, invariant
from aegis_cluster.ids import NO_INDEX, LogIndex, Member

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Membership(NamedTuple):
    """Voters count towards majorities; learners only receive (thesis §4.2.1). Both are sorted."""

    voters: tuple[Member, ...]
    learners: tuple[Member, ...] = ()

    @classmethod
    def of(cls, voters: Iterable[Member], learners: Iterable[Member] = ()) -> Membership:
        """Make one from members in any order; refuse doubles and an empty group."""
        made = cls(tuple(sorted(voters)), tuple(sorted(learners)))
        if not made.voters:
            raise Misuse("a group needs at least one voter")
        if len(set(made.members)) != len(made.members):
            raise Misuse("a member is named twice", members=made.members)
        return made

    @property
    def members(self) -> tuple[Member, ...]:
        """Everyone, voters first."""
        return self.voters + self.learners

    def with_learner(self, member: Member) -> Membership:
        """Add a member that only receives."""
        return Membership.of(self.voters, (*self.learners, member))

    def with_voter(self, member: Member) -> Membership:
        """Add a voter, or make a learner one."""
        learners = (other for other in self.learners if other != member)
        return Membership.of((*self.voters, member), learners)

    def without(self, member: Member) -> Membership:
        """Remove a voter or learner."""
        if member not in self.members:
            raise Misuse("not a member", member=member)
        return Membership.of(
            (other for other in self.voters if other != member),
            (other for other in self.learners if other != member),
        )


def is_single_step(before: Membership, after: Membership) -> bool:
    """Whether any majority of `before` shares a voter with any majority of `after`.

    That holds when at most one voter was added or removed, not one of each (thesis §4.1, fig. 4.3).
    """
    return len(set(before.voters) ^ set(after.voters)) <= 1


class MembershipHistory:
    """The membership at every index from the log's start on.

    `base` holds at the start of the log; each (index, membership) after it since that index.
    """

    def __init__(
        self, base: Membership, entries: Sequence[tuple[LogIndex, Membership]] = ()
    ) -> None:
        self._steps: list[tuple[LogIndex, Membership]] = [(NO_INDEX, base), *entries]
        indexes = [index for index, _ in self._steps]
        invariant(indexes == sorted(set(indexes)), "membership entries out of order", at=indexes)

    @property
    def effective(self) -> Membership:
        """The newest membership in the log, committed or not."""
        return self._steps[-1][1]

    @property
    def effective_index(self) -> LogIndex:
        """Index of the entry that brought it; 0 for the one the group began with."""
        return self._steps[-1][0]

    def at(self, index: LogIndex) -> Membership:
        """The membership that a snapshot up to `index` must carry."""
        return next(step for at, step in reversed(self._steps) if at <= index)

    def append(self, index: LogIndex, membership: Membership) -> None:
        """An entry of kind membership was appended."""
        invariant(index > self.effective_index, "membership entries only follow", index=index)
        self._steps.append((index, membership))

    def truncate(self, from_index: LogIndex) -> bool:
        """Forget what the removed entries brought; return whether that changed anything."""
        before = len(self._steps)
        while len(self._steps) > 1 and self._steps[-1][0] >= from_index:
            self._steps.pop()
        return len(self._steps) != before

    def compact(self, upto: LogIndex) -> None:
        """Fold what lies at or below `upto` into one step."""
        kept = [step for step in self._steps if step[0] > upto]
        newest = next(step for step in reversed(self._steps) if step[0] <= upto)
        self._steps = [newest, *kept]

    def reset(self, index: LogIndex, membership: Membership) -> None:
        """A snapshot up to `index` replaced the log."""
        self._steps = [(index, membership)]
