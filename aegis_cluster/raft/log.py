"""The shape of the log: which index has which term, and how big the newest entries are.

The idea: terms change rarely, so the log is a short list of runs (first index, term); sizes
matter only for what is being replicated now, so only a tail of them is kept, as running totals.

The rule it protects: two entries with the same index and term are the same entry, and so are all
before them (log matching, Raft §5.3); hence terms never fall along the log.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import invariant
from aegis_cluster.ids import NO_INDEX, LogIndex, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

TAIL_ENTRIES_MIN: Final = 4096
"""Sizes kept at least, once so many entries were appended; twice that at most."""

UNKNOWN_TERM: Final = Term(0)
"""Term of the place before the first entry, and of a compacted place that nobody remembers."""


class RaftLog:
    """Indexes `first_index .. last_index` (empty when last < first), terms and recent sizes."""

    def __init__(
        self,
        *,
        first_index: LogIndex = LogIndex(1),  # noqa: B008 - a NewType call is a constant
        last_index: LogIndex = NO_INDEX,
        term_runs: Sequence[tuple[LogIndex, Term]] = (),
        previous_term: Term = UNKNOWN_TERM,
    ) -> None:
        """Take over what storage found.

        term_runs: (first index of the run, term), upward, covering first_index..last_index.
        previous_term: term at first_index - 1, if known; followers that stand there then need no
        snapshot.
        """
        invariant(last_index >= first_index - 1, "log ends before it begins", last=last_index)
        self.first_index: LogIndex = first_index
        self.last_index: LogIndex = last_index
        self.previous_term: Term = previous_term
        self._run_starts: list[LogIndex] = [index for index, _ in term_runs]
        self._run_terms: list[Term] = [term for _, term in term_runs]
        self.last_term: Term = self._run_terms[-1] if self._run_terms else previous_term
        # _ends[i] = bytes of all entries from the tail's start through tail_first + i.
        self.tail_first: LogIndex = LogIndex(last_index + 1)
        self._ends: list[int] = []
        self._tail_base = 0
        self._check_runs()

    def _check_runs(self) -> None:
        if self.last_index < self.first_index:
            invariant(not self._run_starts, "an empty log has no terms")
            return
        invariant(bool(self._run_starts), "a log has terms")
        invariant(self._run_starts[0] <= self.first_index, "the first entry has a term")
        invariant(self._run_starts[-1] <= self.last_index, "a term begins inside the log")
        rising = all(a < b for a, b in zip(self._run_starts, self._run_starts[1:], strict=False))
        invariant(rising, "runs of terms are in order")
        rising = all(a < b for a, b in zip(self._run_terms, self._run_terms[1:], strict=False))
        invariant(rising, "terms only rise along the log", terms=self._run_terms)

    @property
    def term_runs(self) -> list[tuple[LogIndex, Term]]:
        """(first index, term) of every run, upward."""
        return list(zip(self._run_starts, self._run_terms, strict=True))

    def term_at(self, index: LogIndex) -> Term:
        """Term of an entry, or of the place before the first one."""
        starts = self._run_starts
        if starts and starts[-1] <= index <= self.last_index:
            return self._run_terms[-1]
        if index == self.first_index - 1:
            return self.previous_term
        invariant(
            self.first_index <= index <= self.last_index,
            "no such entry",
            index=index,
            first=self.first_index,
            last=self.last_index,
        )
        return self._run_terms[bisect_right(starts, index) - 1]

    def can_follow(self, index: LogIndex) -> bool:
        """Whether an append may start right after `index`: is its term known here?"""
        if index == self.first_index - 1:
            return index == NO_INDEX or self.previous_term != UNKNOWN_TERM
        return self.first_index <= index <= self.last_index

    def matches(self, index: LogIndex, term: Term) -> bool:
        """Whether this log holds that entry (the consistency check of Raft §5.3)."""
        return self.can_follow(index) and self.term_at(index) == term

    def is_newer_than(self, last_index: LogIndex, last_term: Term) -> bool:
        """Whether this log is the newer one: by last term, then by length (Raft §5.4.1)."""
        return (self.last_term, self.last_index) > (last_term, last_index)

    def last_with_term_at_most(self, term: Term, upto: LogIndex) -> LogIndex:
        """The last index, at most `upto`, whose term is at most `term`.

        May be first_index - 1, when all entries up to there are newer.
        """
        run = bisect_right(self._run_terms, term) - 1
        if run < 0:
            return LogIndex(min(upto, self.first_index - 1))
        is_last = run + 1 == len(self._run_starts)
        end = self.last_index if is_last else LogIndex(self._run_starts[run + 1] - 1)
        return min(upto, end)

    def append(self, index: LogIndex, term: Term, size: int) -> None:
        """Add one entry at the end."""
        if index != self.last_index + 1 or term < self.last_term:
            invariant(index == self.last_index + 1, "an append leaves no gap", index=index)
            invariant(term >= self.last_term, "terms only rise along the log", term=term)
        if term != self.last_term or not self._run_starts:
            self._run_starts.append(index)
            self._run_terms.append(term)
            self.last_term = term
        self.last_index = index
        ends = self._ends
        ends.append((ends[-1] if ends else self._tail_base) + size)
        if len(ends) > 2 * TAIL_ENTRIES_MIN:
            self._trim_tail(TAIL_ENTRIES_MIN)

    def _trim_tail(self, dropped: int) -> None:
        self._tail_base = self._ends[dropped - 1]
        del self._ends[:dropped]
        self.tail_first = LogIndex(self.tail_first + dropped)

    def truncate(self, from_index: LogIndex) -> None:
        """Remove entries from `from_index` on."""
        invariant(
            self.first_index <= from_index <= self.last_index, "nothing to cut", at=from_index
        )
        self.last_index = LogIndex(from_index - 1)
        while self._run_starts and self._run_starts[-1] >= from_index:
            self._run_starts.pop()
            self._run_terms.pop()
        self.last_term = self._run_terms[-1] if self._run_terms else self.previous_term
        if from_index < self.tail_first:
            self._forget_tail()
        else:
            del self._ends[from_index - self.tail_first :]

    def _forget_tail(self) -> None:
        self.tail_first = LogIndex(self.last_index + 1)
        self._ends.clear()
        self._tail_base = 0

    def compact(self, upto: LogIndex) -> None:
        """Entries up to and including `upto` are no longer kept."""
        if upto < self.first_index:
            return
        invariant(upto <= self.last_index, "only what is there can be compacted", upto=upto)
        self.previous_term = self.term_at(upto)
        while len(self._run_starts) > 1 and self._run_starts[1] <= upto + 1:
            del self._run_starts[0], self._run_terms[0]
        self.first_index = LogIndex(upto + 1)
        self._run_starts[0] = max(self._run_starts[0], self.first_index)
        if upto == self.last_index:
            self._run_starts.clear()
            self._run_terms.clear()
        if self.tail_first < self.first_index:
            self._trim_tail(self.first_index - self.tail_first)

    def reset(self, index: LogIndex, term: Term) -> None:
        """A snapshot up to and including `index` replaced the log."""
        self.first_index = LogIndex(index + 1)
        self.last_index = index
        self.previous_term = self.last_term = term
        self._run_starts.clear()
        self._run_terms.clear()
        self._forget_tail()

    def bytes_between(self, after: LogIndex, upto: LogIndex) -> int:
        """Bytes of the entries after + 1 .. upto; both must be in the tail, or just before it."""
        return self._end_of(upto) - self._end_of(after)

    def _end_of(self, index: LogIndex) -> int:
        place = index - self.tail_first
        if place >= 0:
            return self._ends[place]
        invariant(place == -1, "size no longer known", index=index, tail=self.tail_first)
        return self._tail_base

    def fit(self, first: LogIndex, bytes_max: int) -> LogIndex:
        """The last index such that first..it is at most `bytes_max`; first - 1 if none fits."""
        limit = self._end_of(LogIndex(first - 1)) + bytes_max
        if not self._ends or self._ends[-1] <= limit:
            return self.last_index
        return LogIndex(self.tail_first + bisect_right(self._ends, limit) - 1)
