"""The producer table: appended, repeated or refused, and what an answer has to wait for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.broker.producer_stm import SEQUENCES, Decision, ProducerTable
from aegis_cluster.errors import (
    InvariantBroken,
    OutOfOrderSequence,
    ProducerFenced,
    Refused,
    UnknownProducer,
)
from aegis_cluster.ids import LogIndex, RecordOffset
from aegis_cluster.limits import PRODUCER_WINDOW_BATCHES
from aegis_cluster.wire.batch import batch_header, encode_batch

if TYPE_CHECKING:
    from aegis_cluster.wire.layout import BatchHeader


def batch(sequence: int, count: int = 1, *, producer: int = 7, epoch: int = 0) -> BatchHeader:
    data = encode_batch(
        [(0, None, b"v", [])] * count,
        producer_id=producer,
        producer_epoch=epoch,
        base_sequence=sequence,
    )
    return batch_header(data)


class Leader:
    """A partition's leader and log in miniature."""

    def __init__(self) -> None:
        self.table = ProducerTable()
        self.index = 0
        self.offset = 0
        self.log: list[tuple[BatchHeader, int, int]] = []

    def produce(self, header: BatchHeader) -> Decision:
        decision = self.table.decide(header)
        if decision == Decision():
            self.index += 1
            self.table.appended(
                header, index=LogIndex(self.index), offset=RecordOffset(self.offset), time_ms=1
            )
            self.log.append((header, self.index, self.offset))
            self.offset += header.last_offset_delta + 1
        return decision

    def commit_all(self) -> None:
        for header, index, offset in self.log:
            self.table.apply(header, index=LogIndex(index), offset=RecordOffset(offset), time_ms=1)
        self.log.clear()


def test_batches_without_a_producer_id_are_always_appended() -> None:
    leader = Leader()
    plain = batch_header(encode_batch([(0, None, b"v", [])]))
    assert leader.produce(plain) == Decision()
    assert leader.produce(plain) == Decision()


def test_a_repeat_is_answered_with_its_first_offset() -> None:
    leader = Leader()
    leader.produce(batch(0, 3))
    leader.produce(batch(3, 2))
    leader.commit_all()
    again = leader.produce(batch(0, 3))
    assert again.known is not None
    assert again.known.offset == 0


def test_a_repeat_of_an_uncommitted_batch_waits_for_its_commit() -> None:
    leader = Leader()
    leader.produce(batch(0))
    again = leader.produce(batch(0))
    assert again.known is not None
    assert again.wait_for == 1


def test_a_gap_is_refused() -> None:
    leader = Leader()
    leader.produce(batch(0))
    leader.commit_all()
    decision = leader.produce(batch(2))
    assert isinstance(decision.error, OutOfOrderSequence)
    assert decision.error.details == {"have": 2, "want": 1}
    assert decision.wait_for == 0


def test_a_refusal_that_rests_on_an_uncommitted_batch_waits_for_it() -> None:
    leader = Leader()
    leader.produce(batch(0))
    decision = leader.produce(batch(5))
    assert isinstance(decision.error, OutOfOrderSequence)
    assert decision.wait_for == 1


def test_an_unknown_producer_may_begin_at_zero_only() -> None:
    leader = Leader()
    assert isinstance(leader.produce(batch(4)).error, UnknownProducer)
    assert leader.produce(batch(0)) == Decision()


def test_an_older_epoch_is_fenced_and_a_newer_one_begins_at_zero() -> None:
    leader = Leader()
    leader.produce(batch(0, epoch=3))
    leader.commit_all()
    assert isinstance(leader.produce(batch(1, epoch=2)).error, ProducerFenced)
    assert isinstance(leader.produce(batch(1, epoch=4)).error, OutOfOrderSequence)
    assert leader.produce(batch(0, epoch=4)) == Decision()


def test_a_repeat_older_than_the_window_is_refused_not_appended() -> None:
    leader = Leader()
    for sequence in range(PRODUCER_WINDOW_BATCHES + 1):
        leader.produce(batch(sequence))
    leader.commit_all()
    assert isinstance(leader.produce(batch(0)).error, OutOfOrderSequence)
    assert leader.produce(batch(1)).known is not None


def test_sequences_wrap_to_zero() -> None:
    leader = Leader()
    leader.produce(batch(0))
    state = leader.table
    state.load_body([[7, 0, [[SEQUENCES - 2, SEQUENCES - 1, 50, 9, 1]]]])
    leader.index = 9
    assert leader.produce(batch(0)) == Decision()


def test_the_overlay_goes_with_leadership() -> None:
    leader = Leader()
    leader.produce(batch(0))
    leader.commit_all()
    leader.produce(batch(1))
    leader.table.drop_overlay()
    assert leader.table.decide(batch(1)) == Decision()


def test_producers_beyond_the_limit_are_forgotten_oldest_first() -> None:
    table = ProducerTable(producers_max=2)
    for number in (1, 2, 3):
        header = batch(0, producer=number)
        table.apply(header, index=LogIndex(number), offset=RecordOffset(0), time_ms=1)
    assert isinstance(table.decide(batch(1, producer=1)).error, UnknownProducer)
    assert table.decide(batch(1, producer=3)) == Decision()


def test_applying_an_older_epoch_ends_the_process() -> None:
    table = ProducerTable()
    table.apply(batch(0, epoch=2), index=LogIndex(1), offset=RecordOffset(0), time_ms=1)
    with pytest.raises(InvariantBroken):
        table.apply(batch(0, epoch=1), index=LogIndex(2), offset=RecordOffset(1), time_ms=1)


@pytest.mark.parametrize("seed", range(200))
def test_against_an_obvious_twin(seed: int) -> None:
    """Whatever is sent, in whatever order: each sequence is in the log once, and in order."""
    rng = random.Random(seed)
    leader = Leader()
    stored: list[int] = []
    for _ in range(60):
        sequence = max(0, len(stored) + rng.choice([-3, -2, -1, 0, 0, 0, 1]))
        decision = leader.produce(batch(sequence))
        if decision == Decision():
            assert sequence == len(stored), f"seed {seed}"
            stored.append(sequence)
        elif decision.known is not None:
            assert decision.known.offset == sequence, f"seed {seed}"
        else:
            assert isinstance(decision.error, Refused)
        if rng.random() < 0.3:
            leader.commit_all()
        if rng.random() < 0.1:
            body = leader.table.to_body()
            leader.commit_all()
            leader.table.load_body(leader.table.to_body() or body)
    assert stored == list(range(len(stored)))
