"""Compaction keeps what a reader may still need, where it was, whatever is pulled from under it.

The model is plain: the records of a log, read frame by frame. Seeds are in the test's name; each
failure replays from its own.
"""

from __future__ import annotations

import errno
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import GroupId, RecordOffset
from aegis_cluster.storage import compaction
from aegis_cluster.storage.compaction import segments_of
from aegis_cluster.storage.compaction_job import (
    CompactionJob,
    decode_job,
    decode_result,
    encode_job,
    encode_result,
)
from aegis_cluster.storage.compaction_rules import Outcomes
from aegis_cluster.storage.segment_report import inspect_segment
from aegis_cluster.testing.disk import SimulatedCrash, SimulatedDisk
from aegis_cluster.wire.batch import Row, decode_batch, encode_batch
from aegis_cluster.wire.frame import (
    FrameKind,
    check_frame,
    decode_header,
    frame_payload,
    rewrite_frame,
)
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT, batch_header
from aegis_cluster.wire.markers import Marker, encode_marker
from aegis_cluster.wire.rewrite import with_records
from tests.storage.support import (
    NODE,
    SMALL,
    VOTERS,
    after,
    commit_round,
    data_frame,
    new_disk,
    open_store,
    plain_frame,
    read_all,
    run_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.wire.frame import FrameHeader

GROUP = GroupId(0)
DIRECTORY = f"{NODE}/partitions/t-0-g0"
LIMITS = replace(SMALL, tail_cache_bytes=1)
"""Everything is read from the files."""
SEEDS = range(6)


class Seen(NamedTuple):
    """A record as a reader of what is committed sees it."""

    key: bytes | None
    value: bytes | None
    time: int


class Writer:
    """Appends keyed records, tombstones, records without a key, and transactions."""

    def __init__(self, store: ShardStore, rng: random.Random) -> None:
        self.store = store
        self.rng = rng
        self.log = store.log(GROUP)
        self.open: set[int] = set()
        self.aborted: set[int] = set()
        """Offsets that readers never see."""
        self._written: dict[int, list[int]] = {}
        self._time = 1_000

    def add(self, batch: bytes) -> RecordOffset:
        begin = self.log.end
        self._time += 1
        frame = data_frame(GROUP, begin, payload=batch, time_ms=self._time)
        self.store.append(GROUP, [frame])
        return begin.offset

    def records(self, producer: int = -1) -> None:
        rng = self.rng
        rows: list[Row] = [
            (
                1_000 + rng.randrange(1_000),
                None if rng.random() < 0.1 else b"key-%d" % rng.randrange(12),
                None if rng.random() < 0.2 else rng.randbytes(rng.randrange(60)),
                [],
            )
            for _ in range(rng.randrange(1, 8))
        ]
        codec = rng.choice(["none", "none", "lz4", "zstd"])
        number = (producer, 0, 0) if producer >= 0 else (-1, -1, -1)
        batch = encode_batch(
            rows,
            compression=codec,
            producer_id=number[0],
            producer_epoch=number[1],
            base_sequence=number[2],
            attributes=TRANSACTIONAL_BIT if producer >= 0 else 0,
        )
        offset = self.add(batch)
        if producer >= 0:
            self.open.add(producer)
            self._written.setdefault(producer, []).extend(range(offset, offset + len(rows)))

    def end(self, producer: int, *, commit: bool) -> None:
        self.add(encode_marker(Marker(producer, 1, commit, 1), 1_000))
        self.open.discard(producer)
        offsets = self._written.pop(producer, [])
        if not commit:
            self.aborted.update(offsets)

    def step(self) -> None:
        rng = self.rng
        chance = rng.random()
        if self.open and chance < 0.2:
            self.end(rng.choice(sorted(self.open)), commit=rng.random() < 0.5)
        elif chance < 0.35:
            self.records(rng.randrange(3))
        elif chance < 0.4:
            self.store.append(GROUP, [plain_frame(GROUP, self.log.end, FrameKind.NOOP)])
        else:
            self.records()
        if rng.random() < 0.3:
            commit_round(self.store)


def written(seed: int, steps: int = 120) -> tuple[SimulatedDisk, ShardStore, Writer]:
    """A log of many small segments, all of it covered by a checkpoint."""
    disk = new_disk()
    store, _ = open_store(disk, limits=LIMITS)
    store.create_group(GROUP, "t", 0, VOTERS)
    log = store.log(GROUP)
    log.roll_bytes = 1_500
    writer = Writer(store, random.Random(seed))
    for _ in range(steps):
        writer.step()
    if store.staged_groups:
        commit_round(store)
    run_checkpoint(store)
    return disk, store, writer


def job_of(
    log: PartitionLog,
    *,
    clean_to: int = 0,
    keys_max: int = 1_000,
    tombstones_before_ms: int | None = None,
    room_bytes: int = 1_000_000,
) -> CompactionJob:
    return CompactionJob(
        group=GROUP,
        directory=DIRECTORY,
        token="test",
        segments=segments_of(log, log.durable_index),
        committed=log.durable_index,
        below=log.end_offset,
        clean_to=RecordOffset(clean_to),
        tombstones_before_ms=tombstones_before_ms,
        tombstones_to=log.durable_index,
        keys_max=keys_max,
        index_interval_bytes=512,
        room_bytes=room_bytes,
    )


def one_pass(store: ShardStore, job: CompactionJob) -> RecordOffset:
    """As a shard does it: built aside, then one by one into place."""
    segments = {one.base_index: one for one in store.log(GROUP).segments}
    assert decode_job(encode_job(job)) == job
    result = store.compact(job)
    assert decode_result(encode_result(result)) == result
    for found in result.rewritten:
        assert store.put_compacted(job, segments[found.header.base_index], found)
        store.sync_compacted(job)
    return result.clean_to


def visible(log: PartitionLog, aborted: set[int]) -> dict[int, Seen]:
    """Records by offset, with the log proved on the way: every index, offset and chain value."""
    found: dict[int, Seen] = {}
    point = log.begin
    for frame in read_all(log):
        check_frame(GROUP, frame, previous_chain=point.chain)
        assert decode_header(frame).index == point.index + 1
        following = after(point, frame)
        header = decode_header(frame)
        if header.kind is FrameKind.DATA:
            payload = frame_payload(frame, header)
            assert batch_header(payload).base_offset == point.offset
            if not batch_header(payload).is_control:
                for record in decode_batch(payload):
                    if record.offset not in aborted:
                        found[record.offset] = Seen(record.key, record.value, record.timestamp_ms)
        point = following
    assert point == log.end
    return found


def markers(log: PartitionLog) -> list[bytes]:
    """Whole, as they stand."""
    return [
        frame
        for frame in read_all(log)
        if decode_header(frame).kind is FrameKind.DATA
        and batch_header(frame_payload(frame, decode_header(frame))).is_control
    ]


def latest(records: dict[int, Seen]) -> dict[bytes, tuple[int, Seen]]:
    return {seen.key: (at, seen) for at, seen in sorted(records.items()) if seen.key is not None}


def values(records: dict[int, Seen]) -> dict[bytes, bytes]:
    """What a reader that keeps the last value of each key ends with."""
    return {key: seen.value for key, (_, seen) in latest(records).items() if seen.value is not None}


def check_kept(before: dict[int, Seen], now: dict[int, Seen], *, all_tombstones: bool) -> None:
    """What stays is as it was, and nothing that may be needed is gone."""
    assert now.items() <= before.items()
    assert values(now) == values(before)
    assert {at for at, seen in before.items() if seen.key is None} <= now.keys()
    if all_tombstones:
        assert latest(now) == latest(before)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_reader_needs_stays_where_it_was(seed: int) -> None:
    disk, store, writer = written(seed)
    log = store.log(GROUP)
    before, old_markers, end = visible(log, writer.aborted), markers(log), log.end
    old_bytes = sum(one.end for one in log.segments)
    keys_max = writer.rng.choice([5, 1_000])
    clean_to = RecordOffset(0)
    for _ in range(40):
        job = job_of(log, clean_to=clean_to, keys_max=keys_max)
        reached = one_pass(store, job)
        if reached == clean_to:
            break
        clean_to = reached
        check_kept(before, visible(log, writer.aborted), all_tombstones=True)
    now = visible(log, writer.aborted)
    below = {at: seen for at, seen in now.items() if at < clean_to and seen.key is not None}
    assert clean_to > 0
    assert len(below) == len({seen.key for seen in below.values()}), "one record of each key"
    assert markers(log) == old_markers
    assert log.end == end
    assert sum(one.end for one in log.segments) < old_bytes
    # Tombstones go when their time has come, and nothing older comes back.
    one_pass(store, job_of(log, tombstones_before_ms=10_000))
    check_kept(before, visible(log, writer.aborted), all_tombstones=False)
    # The files say the same after a restart, with and without their indexes.
    stands = visible(log, writer.aborted)
    for path in [f"{DIRECTORY}/{name}" for name in disk.list_dir(DIRECTORY)]:
        if path.endswith(".index") and writer.rng.random() < 0.5:
            disk.remove(path)
    disk.restart()
    _, found = open_store(disk, limits=LIMITS)
    assert found[GROUP].damage is None
    assert visible(found[GROUP].log, writer.aborted) == stands


def test_an_open_transaction_is_waited_for() -> None:
    """Its records may be aborted yet, and what they would replace must then still be there."""
    _, store, writer = written(5, steps=20)
    log = store.log(GROUP)
    for producer in sorted(writer.open):
        writer.end(producer, commit=True)
    for _ in range(40):
        writer.records(7)
        writer.records()
    commit_round(store)
    run_checkpoint(store)
    before = visible(log, writer.aborted)
    one_pass(store, job_of(log, tombstones_before_ms=10_000))
    writer.end(7, commit=False)
    before = {at: seen for at, seen in before.items() if at not in writer.aborted}
    check_kept(before, visible(log, writer.aborted), all_tombstones=False)
    commit_round(store)
    run_checkpoint(store)
    one_pass(store, job_of(log, tombstones_before_ms=10_000))
    check_kept(before, visible(log, writer.aborted), all_tombstones=False)


def test_look_ups_go_over_gaps() -> None:
    _, store, writer = written(3)
    log = store.log(GROUP)
    one_pass(store, job_of(log))
    now = visible(log, writer.aborted)
    for offset in range(log.end_offset):
        index = log.index_of_offset(RecordOffset(offset))
        frame = log.read(index, index, 1).data
        batch = batch_header(frame_payload(frame, decode_header(frame)))
        assert batch.base_offset <= offset <= batch.base_offset + batch.last_offset_delta
    closed = log.segments[-1].header.before.offset
    times = sorted({seen.time for at, seen in now.items() if at < closed})
    for time in times:
        start = log.offset_of_time(time)
        assert start is not None
        first = min(at for at, seen in now.items() if seen.time >= time)
        assert start <= first, "no record of that time or later stands before it"


def test_a_follower_takes_what_is_left_frame_by_frame() -> None:
    """One that lags behind a compacted range is sent the rewritten frames; its log is the same."""
    _, store, writer = written(4)
    log = store.log(GROUP)
    one_pass(store, job_of(log))
    behind, _ = open_store(new_disk(), limits=LIMITS)
    behind.create_group(GROUP, "t", 0, VOTERS)
    copy = behind.log(GROUP)
    for frame in read_all(log):
        check_frame(GROUP, frame, previous_chain=copy.last_chain)
        behind.append(GROUP, [frame])
    commit_round(behind)
    assert copy.end == log.end
    assert visible(copy, writer.aborted) == visible(log, writer.aborted)


def test_reports_know_compacted_segments(tmp_path: Path) -> None:
    disk, store, _ = written(3)
    log = store.log(GROUP)
    one_pass(store, job_of(log))
    seen = 0
    for name in disk.list_dir(DIRECTORY):
        (tmp_path / name).write_bytes(disk.files()[f"{DIRECTORY}/{name}"])
    for segment in log.segments:
        report = inspect_segment(str(tmp_path / segment.path.rpartition("/")[2]), frames=True)
        assert not report.problems
        assert report.leftover_bytes == 0
        assert report.compactions == segment.header.compactions
        assert (report.rewritten > 0) == (report.compactions > 0)
        if segment.sealed:
            assert (report.index["state"], report.index["sealed"]) == ("ok", True)
        assert report.listed is not None
        assert sum(one.get("rewritten", False) for one in report.listed) == report.rewritten
        seen += report.records
    assert seen == len(visible(log, set())) + len(markers(log)) < log.end_offset


def crash_at(disk: SimulatedDisk, step: int) -> None:
    """End the process ahead of so many operations that change something."""
    left = step

    def count(operation: str, path: str) -> None:
        nonlocal left
        if operation not in ("read", "size", "list_dir", "open"):
            left -= 1
            if left == 0:
                raise SimulatedCrash(f"{operation} {path}")

    disk.before = count


@pytest.mark.parametrize("power_loss", [False, True])
def test_a_crash_at_any_step_leaves_each_segment_old_or_new(*, power_loss: bool) -> None:
    """Every operation of a pass and of putting its files in place, cut off in turn."""
    step, done = 0, False
    while not done:
        step += 1
        disk, store, writer = written(step % 5, steps=24)
        log = store.log(GROUP)
        before = visible(log, writer.aborted)
        crash_at(disk, step)
        try:
            one_pass(store, job_of(log, tombstones_before_ms=10_000))
            done = step > 40
        except SimulatedCrash:
            pass
        disk.before = lambda operation, path: None
        if power_loss:
            disk.crash(random.Random(step))
        else:
            disk.restart()
        again, found = open_store(disk, limits=LIMITS)
        assert found[GROUP].damage is None, f"step {step}"
        check_kept(before, visible(found[GROUP].log, writer.aborted), all_tombstones=False)
        assert not [name for name in disk.list_dir(DIRECTORY) if name.endswith(".compact")]
        one_pass(again, job_of(again.log(GROUP), tombstones_before_ms=10_000))
        check_kept(before, visible(again.log(GROUP), writer.aborted), all_tombstones=False)


def test_a_full_disk_leaves_the_log_as_it_was() -> None:
    disk, store, writer = written(1)
    log = store.log(GROUP)
    before = visible(log, writer.aborted)
    disk.fail_next("write", ".compact", errno.ENOSPC)
    result = store.compact(job_of(log))
    assert not result.has_room
    assert not result.rewritten
    assert not [name for name in disk.list_dir(DIRECTORY) if name.endswith(".compact")]
    assert visible(log, writer.aborted) == before
    assert one_pass(store, job_of(log)) > 0


def test_little_room_makes_many_passes() -> None:
    """What one pass leaves, the next ones do; at last it is as if there had been room for all."""
    _, store, writer = written(1)
    _, other, _ = written(1)
    log, whole = store.log(GROUP), other.log(GROUP)
    assert not store.compact(job_of(log, room_bytes=100)).has_room
    before = visible(log, writer.aborted)
    clean_to, passes = RecordOffset(0), 0
    while clean_to < log.segments[-1].header.before.offset:
        reached = one_pass(store, job_of(log, clean_to=clean_to, room_bytes=4_000))
        assert reached > clean_to
        clean_to, passes = reached, passes + 1
        check_kept(before, visible(log, writer.aborted), all_tombstones=True)
    assert passes > 2
    one_pass(other, job_of(whole))
    assert visible(log, writer.aborted) == visible(whole, writer.aborted)


def test_what_has_moved_on_is_not_replaced() -> None:
    disk, store, _ = written(2)
    log = store.log(GROUP)
    job = job_of(log)
    segments = {one.base_index: one for one in log.segments}
    result = store.compact(job)
    first, second = result.rewritten[:2]
    store.drop_before(GROUP, second.header.base_index)
    assert not store.put_compacted(job, segments[first.header.base_index], first)
    assert store.put_compacted(job, segments[second.header.base_index], second)
    assert not store.put_compacted(job, segments[second.header.base_index], second)
    store.discard_compacted(job)
    assert not [name for name in disk.list_dir(DIRECTORY) if name.endswith(".compact")]


# Mistakes that these tests must find


def believes_aborted_records(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outcomes, "is_aborted", lambda self, batch: False)


def drops_markers(patch: pytest.MonkeyPatch) -> None:
    right = compaction._without_obsolete

    def without(
        job: CompactionJob, header: FrameHeader, frame: memoryview, *rest: Any
    ) -> tuple[bytes, int] | None:
        payload = frame_payload(frame, header)
        if header.kind is FrameKind.DATA and batch_header(payload).is_control:
            batch = with_records(bytes(payload), [])
            assert batch is not None
            return rewrite_frame(GROUP, bytes(frame), batch), 1
        return right(job, header, frame, *rest)

    patch.setattr(compaction, "_without_obsolete", without)


def ignores_open_transactions(patch: pytest.MonkeyPatch) -> None:
    right = compaction.read_outcomes

    def read(disk: SimulatedDisk, job: CompactionJob) -> Outcomes:
        found = right(disk, job)
        found.open_from = None
        return found

    patch.setattr(compaction, "read_outcomes", read)


def drops_young_tombstones(patch: pytest.MonkeyPatch) -> None:
    right = compaction._is_needed

    def needed(record: object, latest: object, *, drops_tombstones: bool) -> bool:
        return right(record, latest, drops_tombstones=True)  # type: ignore[arg-type]

    patch.setattr(compaction, "_is_needed", needed)


@pytest.mark.parametrize(
    "mistake",
    [believes_aborted_records, drops_markers, drops_young_tombstones, ignores_open_transactions],
    ids=lambda one: one.__name__,
)
def test_a_planted_mistake_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    for seed in SEEDS:
        try:
            test_what_a_reader_needs_stays_where_it_was(seed)
            test_an_open_transaction_is_waited_for()
        except (AssertionError, CorruptRecord):
            return
    pytest.fail("no seed has found it")
