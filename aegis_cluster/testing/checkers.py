"""Verdicts over a history and over replicas' logs; they know nothing of how the cluster works.

The idea: each promise is one short function over plain data, so that it can be tested on a
history written by hand. A checker returns sentences, one a violation; none means that it holds.

Names follow Jepsen's (RELIABILITY §2.2): lost-write, duplicate, inconsistent-offsets, G1a,
poll-skip, nonmonotonic-poll, nonmonotonic-send.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing.history import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from aegis_cluster.testing.history import History, Watermark, Write


def check_history(history: History) -> list[str]:
    """Everything that a client can tell was broken."""
    return [f"{check.__name__}: {found}" for check in CHECKS for found in check(history)]


def _observed(history: History) -> Iterator[tuple[int, int, bytes, str]]:
    """(partition, offset, value, who says so), wherever a value was said to stand at an offset."""
    for write in history.writes:
        if write.outcome is Outcome.OK:
            for place, value in enumerate(write.values):
                who = f"the acknowledgement to producer {write.producer}"
                yield write.partition, write.base_offset + place, value, who
    for read in history.reads:
        yield read.partition, read.offset, read.value, f"reader {read.reader}"
    for partition, records in history.final.items():
        for offset, value in records:
            yield partition, offset, value, "the last read"


def inconsistent_offsets(history: History) -> Iterator[str]:
    """One value at one offset, whoever says so and whenever."""
    known: dict[tuple[int, int], tuple[bytes, str]] = {}
    for partition, offset, value, who in _observed(history):
        first = known.setdefault((partition, offset), (value, who))
        if first[0] != value:
            yield f"{partition}@{offset} is {first[0]!r} for {first[1]} and {value!r} for {who}"


def duplicate(history: History) -> Iterator[str]:
    """No value stands at two offsets."""
    known: dict[bytes, tuple[int, int]] = {}
    for partition, offset, value, who in _observed(history):
        place = known.setdefault(value, (partition, offset))
        if place != (partition, offset):
            yield f"{value!r} stands at {place} and, for {who}, at {(partition, offset)}"


def lost_write(history: History) -> Iterator[str]:
    """What was acknowledged is there in the end; so is what anybody has read."""
    for partition in history.final:
        there = dict(history.final[partition])
        start = history.starts.get(partition, 0)
        for other, offset, value, who in _observed(history):
            if other == partition and offset >= start and there.get(offset) != value:
                yield f"{value!r} at {partition}@{offset}, known from {who}, is not there any more"


def aborted_read(history: History) -> Iterator[str]:
    """What was refused never appears (G1a), nor does what nobody wrote."""
    outcomes = {value: write for write in history.writes for value in write.values}
    for partition, offset, value, who in _observed(history):
        write = outcomes.get(value)
        if write is None or write.partition != partition:
            yield f"{value!r} at {partition}@{offset} was never written there, says {who}"
        elif write.outcome is Outcome.REFUSED:
            yield f"{value!r} at {partition}@{offset} was refused ({write.reason}), says {who}"


def nonmonotonic_send(history: History) -> Iterator[str]:
    """A producer's records stand in the order in which it sent them; no batch stands in part."""
    order = {
        value: (write.producer, number, place)
        for number, write in enumerate(history.writes)
        for place, value in enumerate(write.values)
    }
    for partition, records in history.final.items():
        last: dict[int, tuple[int, int]] = {}
        for offset, value in records:
            if value not in order:
                continue  # aborted_read tells
            producer, number, place = order[value]
            if (number, place) <= last.get(producer, (-1, -1)):
                yield f"{value!r} at {partition}@{offset} stands behind what was sent after it"
            last[producer] = (number, place)


def lease_fenced(history: History) -> Iterator[str]:
    """Behind the first batch of a newer holder of a lease stands none of an older one."""
    if not history.tokens:
        return
    token_of = {
        value: history.tokens[write.producer]
        for write in history.writes
        if write.producer in history.tokens
        for value in write.values
    }
    for partition, records in history.final.items():
        newest = 0
        for offset, value in records:
            token = token_of.get(value, newest)
            if token < newest:
                yield f"{value!r} at {partition}@{offset} has token {token}, behind {newest}"
            newest = max(newest, token)


def torn_batch(history: History) -> Iterator[str]:
    """A batch is there as a whole or not at all."""
    for write in history.writes:
        if write.partition in history.final:
            there = {value for _, value in history.final[write.partition]}
            found = sum(value in there for value in write.values)
            if 0 < found < len(write.values):
                yield f"{found} of {len(write.values)} records of {write.values!r} are there"


def poll_skip(history: History) -> Iterator[str]:
    """A reader gets every offset, one after the other; or is told where the log begins now."""
    last: dict[tuple[int, int], int] = {}
    onward = {(one.reader, one.partition, one.offset): one.start for one in history.gone}
    for read in history.reads:
        key = (read.reader, read.partition)
        wanted = last.get(key, -1) + 1
        while read.offset > wanted and (*key, wanted) in onward:
            wanted = onward[*key, wanted]
        if read.offset != wanted:
            yield f"reader {read.reader} got {read.partition}@{read.offset}, not @{wanted}"
        last[key] = read.offset


def denied_read(history: History) -> Iterator[str]:
    """Nobody is told that a place which exists does not."""
    yield from history.denied
    for one in history.gone:
        if not history.expires or one.start <= one.offset:
            yield f"reader {one.reader} was sent from {one.partition}@{one.offset} to @{one.start}"


def hole(history: History) -> Iterator[str]:
    """Offsets are dense."""
    for partition, records in history.final.items():
        start = history.starts.get(partition, 0)
        for (before, _), (after, _) in pairwise(records):
            if after != before + 1 and before >= start:
                yield f"partition {partition} goes from offset {before} to {after}"


def stale_read(history: History) -> Iterator[str]:
    """An end offset that was asked for covers all that was known before the question (A5)."""
    facts: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for write in history.writes:
        if write.outcome is Outcome.OK:
            end = write.base_offset + len(write.values)
            facts[write.partition].append((write.ended_us, end))
    for read in history.reads:
        facts[read.partition].append((read.at_us, read.offset + 1))
    asked = [mark for mark in history.watermarks if mark.linearizable]
    for mark in asked:
        facts[mark.partition].append((mark.at_us, mark.offset))
    for mark in asked:
        known = max((end for at, end in facts[mark.partition] if at < mark.invoked_us), default=0)
        if mark.offset < known:
            yield _stale(mark, known)


def start_goes_back(history: History) -> Iterator[str]:
    """The log start that was asked for is never below one that was known before the question."""
    asked = [mark for mark in history.watermarks if mark.linearizable and history.expires]
    for mark in asked:
        before = [
            m.start for m in asked if m.partition == mark.partition and m.at_us < mark.invoked_us
        ]
        if mark.start < max(before, default=0):
            yield f"partition {mark.partition} begins at {mark.start}, and began at {max(before)}"


def _stale(mark: Watermark, known: int) -> str:
    return (
        f"partition {mark.partition} was said to end at {mark.offset} when asked at"
        f" {mark.invoked_us} us, and {known} was known before"
    )


CHECKS: Final[tuple[Callable[[History], Iterator[str]], ...]] = (
    inconsistent_offsets,
    duplicate,
    lost_write,
    aborted_read,
    nonmonotonic_send,
    lease_fenced,
    torn_batch,
    poll_skip,
    denied_read,
    hole,
    stale_read,
    start_goes_back,
)


def unseen(history: History) -> list[str]:
    """Acknowledged and, after healing, not in the last read at all (a part of `lost_write`)."""
    seen = {value for records in history.final.values() for _, value in records}
    return [
        f"{value!r}"
        for write in history.writes
        if write.outcome is Outcome.OK
        for value in write.values
        if value not in seen
    ]


def check_logs(logs: Mapping[str, Sequence[tuple[int, int, bytes]]]) -> list[str]:
    """Log matching (Raft §5.3) over whole logs: (index, term, bytes of the frame) by replica.

    Where two logs have the same index and term, the frames are the same bytes, and so is every
    frame before it that both have.
    """
    found: list[str] = []
    names = sorted(logs)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            found += _compare(one, logs[one], other, logs[other])
    return found


def _compare(
    one: str,
    ours: Sequence[tuple[int, int, bytes]],
    other: str,
    theirs: Sequence[tuple[int, int, bytes]],
) -> Iterator[str]:
    by_index = {index: (term, frame) for index, term, frame in theirs}
    both = [(i, t, f, *by_index[i]) for i, t, f in ours if i in by_index]
    matched = max((i for i, t, _, u, _ in both if t == u), default=0)
    for index, term, frame, other_term, other_frame in both:
        if index <= matched and (term != other_term or frame != other_frame):
            yield f"log matching: {one} and {other} differ at index {index}"


def settled(writes: Sequence[Write]) -> bool:
    """Whether every write has an outcome."""
    return all(write.outcome is not Outcome.OPEN for write in writes)
