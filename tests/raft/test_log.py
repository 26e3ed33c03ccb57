"""The log's shape against a twin that keeps a plain list of (term, size)."""

from __future__ import annotations

import random

import pytest

from aegis_cluster.errors import InvariantBroken
from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft import RaftLog
from aegis_cluster.raft.log import TAIL_ENTRIES_MIN, UNKNOWN_TERM


class SlowLog:
    """Every entry in a list; index i is at place i - 1."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int]] = []
        self.first = 1

    def term(self, index: int) -> int:
        return self.entries[index - 1][0] if index else 0

    def last_with_term_at_most(self, term: int, upto: int) -> int:
        while upto >= self.first and self.term(upto) > term:
            upto -= 1
        return upto

    def fit(self, first: int, bytes_max: int) -> int:
        total, last = 0, first - 1
        for _, size in self.entries[first - 1 :]:
            total += size
            if total > bytes_max:
                break
            last += 1
        return last


def random_step(rng: random.Random, log: RaftLog, slow: SlowLog) -> None:
    last = len(slow.entries)
    match rng.choice(["append"] * 6 + ["truncate", "compact"]):
        case "append":
            term = Term(log.last_term + rng.choice([0, 0, 0, 1, 3]) or 1)
            size = rng.randint(1, 50)
            log.append(LogIndex(last + 1), term, size)
            slow.entries.append((term, size))
        case "truncate" if last >= slow.first:
            at = rng.randint(max(slow.first, last - 5), last)
            log.truncate(LogIndex(at))
            del slow.entries[at - 1 :]
        case "compact" if last >= slow.first:
            upto = rng.randint(slow.first, min(last, slow.first + 5))
            log.compact(LogIndex(upto))
            slow.first = upto + 1


@pytest.mark.parametrize("seed", range(30))
def test_like_a_plain_list(seed: int) -> None:
    rng = random.Random(seed)
    log, slow = RaftLog(), SlowLog()
    for _ in range(120):
        random_step(rng, log, slow)
        last = len(slow.entries)
        assert (log.first_index, log.last_index) == (slow.first, last)
        assert log.last_term == slow.term(last)
        for index in range(slow.first - 1, last + 1):
            assert log.term_at(LogIndex(index)) == slow.term(index)
        upto, term = rng.randint(slow.first - 1, last), Term(rng.randint(0, 20))
        expected = slow.last_with_term_at_most(term, upto)
        assert log.last_with_term_at_most(term, LogIndex(upto)) == expected
        if log.tail_first <= last:
            first = rng.randint(log.tail_first, last)
            limit = rng.randint(0, 300)
            assert log.fit(LogIndex(first), limit) == slow.fit(first, limit)


def test_the_tail_of_sizes_is_bounded() -> None:
    log = RaftLog()
    for index in range(1, 3 * TAIL_ENTRIES_MIN):
        log.append(LogIndex(index), Term(1), 10)
    kept = log.last_index - log.tail_first + 1
    assert TAIL_ENTRIES_MIN <= kept <= 2 * TAIL_ENTRIES_MIN
    assert log.bytes_between(LogIndex(log.tail_first - 1), log.last_index) == 10 * kept


def test_is_newer_compares_last_term_then_length() -> None:
    log = RaftLog(last_index=LogIndex(3), term_runs=[(LogIndex(1), Term(2))])
    assert log.is_newer_than(LogIndex(9), Term(1))
    assert log.is_newer_than(LogIndex(2), Term(2))
    assert not log.is_newer_than(LogIndex(3), Term(2))
    assert not log.is_newer_than(LogIndex(1), Term(3))


def test_a_forgotten_previous_term_matches_nothing() -> None:
    log = RaftLog(first_index=LogIndex(5), last_index=LogIndex(4))
    assert not log.can_follow(LogIndex(4))
    assert not log.matches(LogIndex(4), UNKNOWN_TERM)
    log = RaftLog(first_index=LogIndex(5), last_index=LogIndex(4), previous_term=Term(3))
    assert log.matches(LogIndex(4), Term(3))


@pytest.mark.parametrize(
    ("last", "runs"),
    [
        (3, []),  # entries without a term
        (3, [(2, 1)]),  # the first entry has none
        (3, [(1, 2), (2, 1)]),  # terms fall
        (3, [(1, 1), (4, 2)]),  # a term begins beyond the end
        (0, [(1, 1)]),  # a term of nothing
    ],
)
def test_impossible_logs_are_refused_at_start(last: int, runs: list[tuple[int, int]]) -> None:
    terms = [(LogIndex(index), Term(term)) for index, term in runs]
    with pytest.raises(InvariantBroken):
        RaftLog(last_index=LogIndex(last), term_runs=terms)


def test_an_append_leaves_no_gap_and_terms_never_fall() -> None:
    log = RaftLog(last_index=LogIndex(3), term_runs=[(LogIndex(1), Term(2))])
    with pytest.raises(InvariantBroken):
        log.append(LogIndex(5), Term(2), 1)
    with pytest.raises(InvariantBroken):
        log.append(LogIndex(4), Term(1), 1)
