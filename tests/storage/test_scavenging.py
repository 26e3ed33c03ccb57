"""Events that no stream shows any more go from closed segments, and nothing else does.

The model is plain: every record with its stream and version. Seeds are in the test's name.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aegis_cluster.storage.compaction_job import Hidden
from aegis_cluster.storage.scavenging import Scavenging
from aegis_cluster.wire.batch import decode_batch, encode_batch
from aegis_cluster.wire.event_frames import SETTINGS_PREFIX, StreamEvents, encode_annotation
from aegis_cluster.wire.frame import (
    check_frame,
    frame_annotation,
    frame_payload,
)
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT, batch_header
from aegis_cluster.wire.markers import Marker, encode_marker
from tests.storage.support import (
    VOTERS,
    commit_round,
    data_frame,
    new_disk,
    open_store,
    read_all,
    run_checkpoint,
)
from tests.storage.test_compaction import GROUP, LIMITS, job_of, one_pass

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.ids import RecordOffset
    from aegis_cluster.storage.compaction_rules import Outcomes
    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import BatchHeader, Bytes
    from aegis_cluster.wire.records import Record

STREAMS = ["a", "b", "c", SETTINGS_PREFIX + "a"]


class Put(NamedTuple):
    """Where an event stands, and when it was appended."""

    stream: str
    version: int
    time_ms: int
    aborted: bool


class Writer:
    """Appends events of a few streams, also in transactions, and knows where each of them is."""

    def __init__(self, store: ShardStore, rng: random.Random) -> None:
        self.store = store
        self.rng = rng
        self.events: dict[int, Put] = {}
        self._next = dict.fromkeys(STREAMS, 0)
        self._time_ms = 1_000

    def add(self, batch: bytes, annotation: bytes = b"") -> int:
        begin = self.store.log(GROUP).end
        self._time_ms += 1
        frame = data_frame(
            GROUP, begin, payload=batch, time_ms=self._time_ms, annotation=annotation
        )
        self.store.append(GROUP, [frame])
        return begin.offset

    def step(self) -> None:
        rng = self.rng
        placed = [
            StreamEvents(stream, self._next[stream], rng.randbytes(16 * rng.randrange(1, 4)))
            for stream in rng.sample(STREAMS, rng.randrange(1, 3))
        ]
        count = sum(one.count for one in placed)
        producer = 5 if rng.random() < 0.2 else -1
        commits = producer < 0 or rng.random() < 0.5
        batch = encode_batch(
            [(1_000, b"k", rng.randbytes(40), [])] * count,
            producer_id=producer,
            producer_epoch=0 if producer >= 0 else -1,
            base_sequence=0 if producer >= 0 else -1,
            attributes=TRANSACTIONAL_BIT if producer >= 0 else 0,
        )
        offset = self.add(batch, encode_annotation(placed))
        for one in placed:
            for version in range(one.first, one.first + one.count):
                self.events[offset] = Put(one.stream, version, self._time_ms, not commits)
                offset += 1
            if commits:
                self._next[one.stream] += one.count
        if producer >= 0:
            self.add(encode_marker(Marker(producer, 1, commits, 1), 1_000))


def written(seed: int, steps: int = 150) -> tuple[ShardStore, Writer]:
    """A log of many small segments, all of it covered by a checkpoint."""
    store, _ = open_store(new_disk(), limits=LIMITS)
    store.create_group(GROUP, "t", 0, VOTERS)
    store.log(GROUP).roll_bytes = 1_500
    writer = Writer(store, random.Random(seed))
    for number in range(steps):
        writer.step()
        commit_round(store)
        if number % 20 == 0:
            run_checkpoint(store)  # makes room in the journal
    run_checkpoint(store)
    return store, writer


def stands(log: PartitionLog) -> tuple[set[int], list[bytes]]:
    """Offsets of the events that are left, and every annotation; the log is proved on the way."""
    offsets: set[int] = set()
    annotations = []
    chain = log.begin.chain
    for frame in read_all(log):
        header = check_frame(GROUP, frame, previous_chain=chain)
        chain = header.chain
        payload = frame_payload(frame, header)
        if not batch_header(payload).is_control:
            offsets.update(record.offset for record in decode_batch(payload))
            annotations.append(bytes(frame_annotation(frame, header)))
    return offsets, annotations


@pytest.mark.parametrize("seed", range(6))
def test_what_is_hidden_goes_and_nothing_else(seed: int) -> None:
    store, writer = written(seed)
    log = store.log(GROUP)
    before, annotations = stands(log)
    assert before == writer.events.keys()
    closed = log.segments[-1].header.before.offset
    below = {"a": 40, "b": 10_000}
    oldest_ms = 1_000 + 150 * writer.rng.randrange(1, 3) // 2
    hidden = Hidden(below, {"c": oldest_ms})

    def goes(offset: int, put: Put) -> bool:
        too_old = put.stream == "c" and put.time_ms < oldest_ms
        return offset < closed and (
            put.aborted or put.version < below.get(put.stream, 0) or too_old
        )

    wanted = {offset for offset, put in writer.events.items() if not goes(offset, put)}
    job = replace(job_of(log), hidden=hidden)
    assert one_pass(store, job) == closed
    assert stands(log) == (wanted, annotations)
    assert {writer.events[offset].stream for offset in before - wanted} >= {"a", "b", "c"}
    # Another pass finds nothing more; one that hides more goes on from there.
    again = replace(job_of(log), hidden=hidden, token="again")
    assert not store.compact(again).rewritten
    more = replace(job_of(log), hidden=Hidden({"a": 45, "b": 10_000}, {}), token="more")
    one_pass(store, more)
    left = stands(log)[0]
    assert {writer.events[offset].version for offset in wanted - left} <= set(range(40, 45))


def test_what_nobody_can_tell_stays() -> None:
    """Frames whose annotation is broken, or speaks of other records than the frame has."""
    store, _ = open_store(new_disk(), limits=LIMITS)
    store.create_group(GROUP, "t", 0, VOTERS)
    log = store.log(GROUP)
    log.roll_bytes = 1_500
    writer = Writer(store, random.Random(0))
    batch = encode_batch([(1_000, b"k", bytes(40), [])] * 2)
    one_event = encode_annotation([StreamEvents("a", 0, bytes(16))])
    for annotation in (b"", b"\xc1", b"\x93", one_event) * 20:
        writer.add(batch, annotation)
        commit_round(store)
        run_checkpoint(store)
    job = replace(job_of(log), hidden=Hidden({"a": 1_000}, {"a": 10_000}))
    assert not store.compact(job).rewritten


def test_a_pass_goes_on_where_room_ended() -> None:
    store, _ = written(1)
    log = store.log(GROUP)
    hidden = Hidden({"a": 10_000, "b": 10_000}, {})
    whole = replace(job_of(log), hidden=hidden)
    left = len(store.compact(whole).rewritten)
    store.discard_compacted(whole)
    for number in range(100):
        job = replace(job_of(log, room_bytes=4_000), hidden=hidden, token=f"pass-{number}")
        result = store.compact(job)
        store.discard_compacted(job)
        if not result.rewritten:
            break
        assert len(result.rewritten) < left
        one_pass(store, replace(job, token=f"put-{number}"))
    assert not store.compact(replace(whole, token="last", segments=job.segments)).rewritten
    assert result.clean_to == log.segments[-1].header.before.offset


# Mistakes that these tests must find


def hides_one_more(patch: pytest.MonkeyPatch) -> None:
    right = Scavenging.__init__

    def init(self: Scavenging, hidden: Hidden, decided: Outcomes, end: RecordOffset) -> None:
        below = {name: version + 1 for name, version in hidden.below.items()}
        right(self, Hidden(below, hidden.before_ms), decided, end)

    patch.setattr(Scavenging, "__init__", init)


def counts_from_what_is_left(patch: pytest.MonkeyPatch) -> None:
    """Takes the first record that is there for the first that was."""
    right = Scavenging.kept

    def kept(
        self: Scavenging,
        header: FrameHeader,
        batch: BatchHeader,
        records: list[Record],
        annotation: Bytes,
    ) -> list[Record]:
        moved = batch._replace(base_offset=records[0].offset)
        return right(self, header, moved, records, annotation)

    patch.setattr(Scavenging, "kept", kept)


def forgets_the_age(patch: pytest.MonkeyPatch) -> None:
    right = Scavenging.__init__

    def init(self: Scavenging, hidden: Hidden, decided: Outcomes, end: RecordOffset) -> None:
        right(self, Hidden(hidden.below, {}), decided, end)

    patch.setattr(Scavenging, "__init__", init)


@pytest.mark.parametrize("mistake", [hides_one_more, counts_from_what_is_left, forgets_the_age])
def test_a_mistake_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)

    def all_seeds() -> None:
        for seed in range(6):
            test_what_is_hidden_goes_and_nothing_else(seed)

    with pytest.raises(AssertionError):
        all_seeds()
