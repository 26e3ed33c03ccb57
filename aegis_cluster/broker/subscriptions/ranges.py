"""A set of numbers as disjoint ranges, for offsets that are settled ahead of a position."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Ranges:
    """Ranges [first, end), in order, no two of which touch."""

    __slots__ = ("_ends", "_firsts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []
        for first, end in ranges:
            self.add(first, end)

    def add(self, first: int, end: int) -> None:
        """Take in a range that is not empty; what it touches becomes one with it."""
        low = bisect_left(self._ends, first)
        high = bisect_right(self._firsts, end)
        if low < high:
            first = min(first, self._firsts[low])
            end = max(end, self._ends[high - 1])
        self._firsts[low:high] = [first]
        self._ends[low:high] = [end]

    def overlaps(self, first: int, end: int) -> bool:
        """Whether any number of [first, end) is in the set."""
        place = bisect_right(self._ends, first)
        return place < len(self._firsts) and self._firsts[place] < end

    def __contains__(self, number: int) -> bool:
        return self.overlaps(number, number + 1)

    def take_prefix(self, position: int) -> int:
        """Drop the range that begins at `position`, if any; returns where it ended."""
        if not self._firsts or self._firsts[0] > position:
            return position
        del self._firsts[0]
        return self._ends.pop(0)

    @property
    def end(self) -> int:
        """Behind the largest number; 0 when there is none."""
        return self._ends[-1] if self._ends else 0

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(self._ends) - sum(self._firsts)

    def copy(self) -> Ranges:
        made = Ranges()
        made._firsts, made._ends = self._firsts[:], self._ends[:]
        return made

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._firsts, self._ends, strict=True)))

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._firsts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # it changes
