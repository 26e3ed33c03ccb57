"""Transactions in one partition: what is open, how far readers see, what is fenced."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.broker.producer_stm import Aborted, ProducerTable
from aegis_cluster.errors import InvalidBatch, NotReady, OutOfOrderSequence, ProducerFenced
from aegis_cluster.ids import LogIndex, ProducerId, RecordOffset, Term
from aegis_cluster.limits import ABORTED_PER_FETCH_MAX
from aegis_cluster.wire.batch import batch_header, encode_batch
from aegis_cluster.wire.frame import FrameHeader, FrameKind
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT
from aegis_cluster.wire.markers import Marker, decode_marker, encode_marker

if TYPE_CHECKING:
    from aegis_cluster.errors import Refused
    from aegis_cluster.wire.layout import BatchHeader


def batch(
    sequence: int = 0, count: int = 1, *, producer: int = 7, epoch: int = 0, open_: bool = True
) -> bytes:
    return encode_batch(
        [(0, None, b"v", [])] * count,
        producer_id=producer,
        producer_epoch=epoch,
        base_sequence=sequence,
        attributes=TRANSACTIONAL_BIT if open_ else 0,
    )


class Log:
    """A leader with its log, and what all of it folds to."""

    def __init__(self) -> None:
        self.state = PartitionState()
        self.frames: list[tuple[FrameHeader, BatchHeader, bytes]] = []
        self.applied = 0
        self.end = 0

    @property
    def table(self) -> ProducerTable:
        return self.state.producers

    def write(self, data: bytes) -> Refused | None:
        decision = self.table.decide(batch_header(data))
        if decision.error is None and decision.known is None:
            self._append(data)
        return decision.error

    def mark(self, *, producer: int = 7, epoch: int = 1, committed: bool = True) -> bool:
        """Whether the marker was appended, not one that stood there."""
        marker = Marker(producer, epoch, committed, 3)
        if self.table.decide_marker(marker) is not None:
            return False
        self._append(encode_marker(marker, 0))
        return True

    def _append(self, data: bytes) -> None:
        header = batch_header(data)._replace(base_offset=self.end)
        index = LogIndex(len(self.frames) + 1)
        frame = FrameHeader(0, 0, FrameKind.DATA, 0, Term(1), index, 0, b"")
        self.table.appended(header, index=index, offset=RecordOffset(self.end), time_ms=0)
        self.frames.append((frame, header, data))
        self.end += header.last_offset_delta + 1

    def commit(self) -> None:
        for frame, header, data in self.frames[self.applied :]:
            self.state.apply(frame, header, memoryview(data))
        self.applied = len(self.frames)

    @property
    def stable(self) -> int:
        return self.table.last_stable_offset(RecordOffset(self.end))


def test_an_open_transaction_holds_readers_back_until_its_marker() -> None:
    log = Log()
    log.write(batch(open_=False, producer=1))
    log.write(batch(count=3))
    log.write(batch(open_=False, producer=1, sequence=1))
    log.commit()
    assert log.stable == 1
    assert log.table.open_transactions == {7: (0, 1)}
    assert log.mark()
    assert log.stable == 1, "a marker counts once it is committed"
    log.commit()
    assert log.stable == log.end == 6


def test_the_oldest_open_one_decides_and_aborted_ranges_are_told() -> None:
    log = Log()
    log.write(batch(producer=1))
    log.write(batch(producer=2, count=2))
    log.mark(producer=2, committed=False)
    log.commit()
    assert log.stable == 0
    log.mark(producer=1)
    log.commit()
    assert log.stable == log.end
    aborted = Aborted(ProducerId(2), RecordOffset(1), RecordOffset(3))
    assert log.table.aborted_from(RecordOffset(0), RecordOffset(log.end)) == ([aborted], log.end)
    assert log.table.aborted_from(RecordOffset(3), RecordOffset(log.end))[0] == [aborted]
    assert log.table.aborted_from(RecordOffset(4), RecordOffset(log.end))[0] == []
    log.table.forget_below(RecordOffset(4))
    assert log.table.aborted_from(RecordOffset(0), RecordOffset(log.end))[0] == []


def test_what_comes_after_the_marker_is_fenced_also_ahead_of_its_commit() -> None:
    log = Log()
    log.write(batch())
    log.commit()
    log.mark()
    for _ in range(2):
        assert isinstance(log.write(batch(1)), ProducerFenced)
        assert isinstance(log.write(batch(0, epoch=0)), ProducerFenced)
        log.commit()
    assert isinstance(log.write(batch(1, epoch=1)), OutOfOrderSequence)
    assert log.write(batch(0, epoch=1)) is None


def test_a_marker_that_comes_again_ends_nothing_newer() -> None:
    """A stale coordinator's marker, after the producer has begun its next transaction."""
    log = Log()
    log.write(batch())
    assert log.mark()
    assert not log.mark()
    log.commit()
    log.write(batch(epoch=1))
    assert not log.mark()
    log.commit()
    assert log.table.open_transactions == {7: (1, 2)}


def test_the_next_transaction_waits_for_the_marker_of_the_last() -> None:
    log = Log()
    log.write(batch())
    assert isinstance(log.write(batch(epoch=1)), NotReady)
    log.mark()
    assert log.write(batch(epoch=1)) is None


def test_an_epoch_is_a_transaction_or_is_none() -> None:
    log = Log()
    log.write(batch())
    assert isinstance(log.write(batch(1, open_=False)), InvalidBatch)
    log.write(batch(producer=8, open_=False))
    assert isinstance(log.write(batch(1, producer=8)), InvalidBatch)


def test_dropping_what_was_ahead_leaves_what_is_committed() -> None:
    log = Log()
    log.write(batch())
    log.commit()
    log.mark()
    log.state.leadership_lost()
    assert log.stable == 0
    assert log.write(batch(1)) is None


def test_a_producer_with_an_open_transaction_is_not_forgotten() -> None:
    log = Log()
    log.state.producers = ProducerTable(producers_max=3)
    log.write(batch())
    for producer in range(10, 20):
        log.write(batch(producer=producer, open_=False))
    log.commit()
    assert log.stable == 0
    assert isinstance(log.write(batch(0, epoch=1)), NotReady)


def test_markers_come_back_as_they_were() -> None:
    for committed in (True, False):
        marker = Marker(9, 32_766, committed, 2**31 - 1)
        assert decode_marker(encode_marker(marker, 5)) == marker
    header = batch_header(encode_marker(marker, 5))
    assert (header.count, header.is_control, header.is_transactional) == (1, True, True)


def test_many_aborted_ranges_are_told_bit_by_bit() -> None:
    log = Log()
    for epoch in range(2 * ABORTED_PER_FETCH_MAX + 10):
        log.write(batch(epoch=2 * epoch))
        log.mark(epoch=2 * epoch + 1, committed=False)
    log.commit()
    offset, found = RecordOffset(0), set()
    while offset < log.end:
        ranges, known_to = log.table.aborted_from(offset, RecordOffset(log.end))
        assert known_to > offset
        found |= {one for one in ranges if one.first < known_to}
        offset = known_to
    assert len(found) == 2 * ABORTED_PER_FETCH_MAX + 10


def test_any_history_reads_as_a_slow_twin_says_also_from_a_snapshot() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        log = Log()
        twin: list[tuple[int, str]] = []  # producer, state of each offset
        epochs = {1: 0, 2: 0, 3: 0}
        sequences = {1: 0, 2: 0, 3: 0}
        for _ in range(40):
            producer = rng.choice((1, 2, 3))
            if rng.random() < 0.6:
                count = rng.randint(1, 3)
                data = batch(sequences[producer], count, producer=producer, epoch=epochs[producer])
                assert log.write(data) is None
                sequences[producer] += count
                twin += [(producer, "open")] * count
            else:
                committed = rng.random() < 0.5
                epochs[producer] += 1
                sequences[producer] = 0
                log.mark(producer=producer, epoch=epochs[producer], committed=committed)
                fate = "committed" if committed else "aborted"
                twin = [(p, fate if p == producer and s == "open" else s) for p, s in twin]
                twin.append((0, "marker"))
            if rng.random() < 0.3:
                log.commit()
        log.commit()
        copy = PartitionState()
        loader = copy.loader()
        for piece in log.state.slices():
            loader.add(piece)
        loader.finish()
        assert copy.to_body() == log.state.to_body()
        undecided = [offset for offset, (_, state) in enumerate(twin) if state == "open"]
        for table in (log.table, copy.producers):
            end = RecordOffset(log.end)
            assert table.last_stable_offset(end) == (undecided[0] if undecided else end), seed
            ranges, _ = table.aborted_from(RecordOffset(0), end)
            hidden = {
                offset
                for offset, (producer, _) in enumerate(twin)
                for one in ranges
                if one.producer == producer and one.first <= offset <= one.last
            }
            assert hidden == {n for n, (_, state) in enumerate(twin) if state == "aborted"}, seed
