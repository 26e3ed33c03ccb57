"""Streams that a transaction holds: what it prepared counts from its marker on, or never."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from aegis_cluster.broker.events.event_stm import Append, Decision, EventFold
from aegis_cluster.errors import StreamHeld, WrongExpectedVersion
from aegis_cluster.ids import LogIndex, ProducerId, RecordOffset, Term
from aegis_cluster.wire.batch import batch_header, encode_batch, stamp
from aegis_cluster.wire.event_frames import ANY, NO_STREAM, encode_annotation
from aegis_cluster.wire.frame import FrameHeader, FrameKind
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT
from aegis_cluster.wire.markers import Marker
from tests.broker.events.test_event_fold import copy_of, ids

ONE, TWO = ProducerId(1), ProducerId(2)
EPOCH = 7


@dataclass
class Log:
    """What a leader has appended; frames are folded when they are committed."""

    fold: EventFold = field(default_factory=EventFold)
    frames: list[tuple[int, bytes, int, ProducerId | None, Marker | None]] = field(
        default_factory=list
    )
    committed: int = 0
    end: int = 0

    def append(self, *appends: Append, by: ProducerId | None = None) -> Decision:
        decision = self.fold.decide(appends, transaction=by is not None)
        if decision.placed:
            index, offset = LogIndex(len(self.frames) + 1), RecordOffset(self.end)
            self.fold.appended(
                decision.placed, index=index, offset=offset, time_ms=index, producer=by
            )
            count = sum(one.count for one in decision.placed)
            self.frames.append((offset, encode_annotation(decision.placed), count, by, None))
            self.end += count
        return decision

    def mark(self, producer: ProducerId, *, committed: bool) -> None:
        marker = Marker(producer, EPOCH + 1, committed, 1)
        self.frames.append((self.end, b"", 1, producer, marker))
        self.end += 1

    def commit(self, upto: int | None = None) -> None:
        upto = len(self.frames) if upto is None else upto
        for index in range(self.committed + 1, upto + 1):
            apply(self.fold, index, *self.frames[index - 1])
        self.committed = max(self.committed, upto)


def apply(
    fold: EventFold,
    index: int,
    offset: int,
    annotation: bytes,
    count: int,
    producer: ProducerId | None,
    marker: Marker | None,
) -> None:
    header = FrameHeader(
        0, 0, FrameKind.DATA, len(annotation), Term(1), LogIndex(index), index, b""
    )
    if marker is not None:
        fold.transaction_ended(header, marker)
        return
    data = encode_batch(
        [(1, None, b"x", [])] * count,
        producer_id=-1 if producer is None else producer,
        producer_epoch=-1 if producer is None else EPOCH,
        base_sequence=-1 if producer is None else 0,
        attributes=0 if producer is None else TRANSACTIONAL_BIT,
    )
    fold.apply(header, batch_header(stamp(data, offset, 1)), memoryview(annotation))


def test_nobody_appends_to_what_a_transaction_has_appended_to_or_depends_on() -> None:
    log = Log()
    log.append(Append("a", NO_STREAM, ids(1)), Append("b", NO_STREAM, b""), by=ONE)
    for _ in ("ahead", "committed", "after a snapshot"):
        for append in (Append("a", ANY, ids(2)), Append("b", ANY, ids(3)), Append("b", -1, b"")):
            assert isinstance(log.append(append).error, StreamHeld)
            assert isinstance(log.append(append, by=TWO).error, StreamHeld)
        assert log.fold.stream("a") is None
        if log.committed:
            assert log.fold.is_held("a")
            log.fold = copy_of(log.fold)
        log.commit()
    assert log.append(Append("c", ANY, ids(4))).placed
    log.mark(ONE, committed=True)
    assert isinstance(log.append(Append("a", ANY, ids(2))).error, StreamHeld)
    log.commit()
    state = log.fold.stream("a")
    assert state is not None
    assert (state.version, state.index) == (0, 3)  # the marker's frame
    assert not log.fold.is_held("a")
    assert log.append(Append("b", NO_STREAM, ids(3))).placed
    assert log.append(Append("a", NO_STREAM, ids(1))).known  # a repeat, with the ids of then


def test_what_was_aborted_has_used_no_version_and_no_id() -> None:
    log = Log()
    log.append(Append("a", ANY, ids(1)))
    log.append(Append("a", 0, ids(2, 3)), by=ONE)
    log.mark(ONE, committed=False)
    log.commit()
    placed = log.append(Append("a", 0, ids(2))).placed
    assert [(one.first, one.last) for one in placed] == [(1, 1)]


def test_conditions_are_judged_when_it_is_prepared() -> None:
    log = Log()
    log.append(Append("a", ANY, ids(1)))
    refused = log.append(Append("a", 4, b""), Append("b", ANY, ids(2)), by=ONE)
    assert isinstance(refused.error, WrongExpectedVersion)
    assert not log.fold.prepared_by(ONE)


def test_the_next_transaction_of_a_producer_may_come_before_the_marker_is_committed() -> None:
    log = Log()
    log.append(Append("a", ANY, ids(1)), by=ONE)
    log.mark(ONE, committed=True)
    log.append(Append("b", ANY, ids(2)), by=ONE)
    log.commit(1)
    prepared = log.fold.prepared_by(ONE)
    assert prepared is not None
    assert prepared.index == 3
    log.commit()
    assert (log.fold.is_held("a"), log.fold.is_held("b")) == (False, True)


def test_a_lost_leadership_forgets_what_was_not_committed() -> None:
    log = Log()
    log.append(Append("a", ANY, ids(1)), by=ONE)
    log.fold.leadership_lost()
    log.frames.clear()
    assert log.append(Append("a", NO_STREAM, ids(2))).placed


def test_versions_have_no_gap_whatever_is_committed_or_aborted() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)  # noqa: T201
    rng = random.Random(seed)
    log, number = Log(), 0
    want: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    open_: dict[ProducerId, list[tuple[str, list[int]]]] = {}
    for _ in range(600):
        producer = rng.choice([ONE, TWO, None])
        if producer in open_:
            assert producer is not None
            committed = rng.random() < 0.5
            log.mark(producer, committed=committed)
            log.commit()
            for name, numbers in open_.pop(producer):
                want[name] += numbers if committed else []
        else:
            appends, mine = [], []
            for name in rng.sample(sorted(want), rng.randrange(1, 3)):
                numbers = list(range(number, number + rng.randrange(1, 3)))
                number += len(numbers)
                mine.append((name, numbers))
                appends.append(Append(name, len(want[name]) - 1, ids(*numbers)))
            held = {name for parts in open_.values() for name, _ in parts}
            decision = log.append(*appends, by=producer)
            if any(name in held for name, _ in mine):
                assert isinstance(decision.error, StreamHeld)
            elif producer is None:
                for name, numbers in mine:
                    want[name] += numbers
            else:
                open_[producer] = mine
        if rng.random() < 0.3:
            log.commit()
            log.fold = copy_of(log.fold)
    log.commit()
    for name, numbers in want.items():
        state = log.fold.stream(name)
        assert (-1 if state is None else state.version) == len(numbers) - 1
    follower = EventFold()
    for index, frame in enumerate(log.frames, 1):
        apply(follower, index, *frame)
    assert list(follower.slices()) == list(log.fold.slices())
