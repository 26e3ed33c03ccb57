"""Look-ups, reads and the parts below them: tail cache, sparse index, handles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import Misuse, OffsetOutOfRange
from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.limits import MIB
from aegis_cluster.storage.sparse_index import IndexEntry, SparseIndex
from aegis_cluster.storage.tail_cache import FRAME_OVERHEAD_BYTES, Tail, TailCache, read_meta
from aegis_cluster.storage.types import LOG_BEGIN, NO_TIME, LogPoint, StoreLimits
from aegis_cluster.testing.disk import SimulatedFile
from aegis_cluster.wire.frame import FrameKind
from tests.storage.support import (
    SMALL,
    VOTERS,
    after,
    batch,
    commit_round,
    data_frame,
    frames_after,
    joined,
    new_disk,
    open_store,
    plain_frame,
    read_all,
    run_checkpoint,
)

if TYPE_CHECKING:
    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.testing.disk import SimulatedDisk

GROUP = GroupId(0)
NO_CACHE = StoreLimits(
    segment_bytes=SMALL.segment_bytes,
    journal_bytes=SMALL.journal_bytes,
    index_interval_bytes=SMALL.index_interval_bytes,
    tail_cache_bytes=0,
    reserve_bytes=0,
    open_segments=1,
)


def a_log(limits: StoreLimits = SMALL) -> tuple[SimulatedDisk, ShardStore, PartitionLog]:
    disk = new_disk()
    store, _ = open_store(disk, limits=limits)
    return disk, store, store.create_group(GROUP, "t", 0, VOTERS)


def mixed_frames(count: int) -> list[bytes]:
    """Data frames of three records at times 1000, 1010, … with a no-op after every second one."""
    point, frames = LOG_BEGIN, []
    for number in range(count):
        if number % 3 == 2:
            frame = plain_frame(GROUP, point, FrameKind.NOOP, term=1 + number // 10)
        else:
            payload = batch(records=3, size=200, time=1_000 + 10 * number)
            frame = data_frame(GROUP, point, term=1 + number // 10, payload=payload)
        frames.append(frame)
        point = after(point, frame)
    return frames


def points(frames: list[bytes]) -> list[LogPoint]:
    found = [LOG_BEGIN]
    for frame in frames:
        found.append(after(found[-1], frame))
    return found


@pytest.mark.parametrize("limits", [SMALL, NO_CACHE])
@pytest.mark.parametrize("restarted", [False, True])
def test_every_look_up_against_a_list(limits: StoreLimits, restarted: bool) -> None:
    disk, store, log = a_log(limits)
    frames = mixed_frames(60)
    store.append(GROUP, frames)
    commit_round(store)
    if restarted:
        run_checkpoint(store)
        disk.restart()
        _, found = open_store(disk, limits=limits)
        log = found[GROUP].log
    known = points(frames)
    assert len(log.segments) > 2
    for index in range(61):
        assert log.point_at(LogIndex(index)) == known[index]
        assert log.term_at(LogIndex(index)) == known[index].term
        assert log.end_offset_at(LogIndex(index)) == known[index].offset
    for offset in range(known[-1].offset):
        at = log.index_of_offset(RecordOffset(offset))
        assert known[at - 1].offset <= offset < known[at].offset
    assert log.index_of_offset(log.end_offset) == 61
    assert log.term_runs() == [(1 + 10 * run, 1 + run) for run in range(6)]
    assert read_all(log) == frames


@pytest.mark.parametrize("limits", [SMALL, NO_CACHE])
def test_offset_of_time(limits: StoreLimits) -> None:
    _, store, log = a_log(limits)
    frames = mixed_frames(60)
    store.append(GROUP, frames)
    commit_round(store)
    known = points(frames)
    data = [number for number in range(60) if number % 3 != 2]
    for time in range(990, 1_600, 7):
        later = [number for number in data if 1_000 + 10 * number >= time]
        want = known[later[0]].offset if later else None
        assert log.offset_of_time(time) == want


def test_times_that_go_back_are_found_by_the_first_that_is_late_enough() -> None:
    _, store, log = a_log()
    for time in (1_000, 5_000, 2_000, 3_000):
        store.append(GROUP, frames_after(log, 1, time=time))
    commit_round(store)
    assert log.offset_of_time(2_500) == 1
    assert log.offset_of_time(6_000) is None
    assert log.offset_of_time(0) == 0


def test_a_log_start_counts_once_it_is_committed() -> None:
    disk, store, log = a_log()
    store.append(GROUP, frames_after(log, 5))
    store.append(GROUP, [plain_frame(GROUP, log.end, FrameKind.LOG_START)])
    store.append(GROUP, frames_after(log, 2))
    commit_round(store)
    assert log.log_start_offset == 0
    store.note_commit(GROUP, LogIndex(5))
    assert log.log_start_offset == 0
    store.note_commit(GROUP, LogIndex(6))
    assert log.log_start_offset == 5
    assert log.offset_of_time(0) == 5
    run_checkpoint(store)
    disk.restart()
    _, found = open_store(disk)
    assert found[GROUP].log.log_start_offset == 5


def test_a_log_start_that_is_cut_is_forgotten() -> None:
    _, store, log = a_log()
    store.append(GROUP, frames_after(log, 2))
    store.append(GROUP, [plain_frame(GROUP, log.end, FrameKind.LOG_START)])
    store.truncate(GROUP, LogIndex(3))
    store.append(GROUP, frames_after(log, 1, term=2))
    store.note_commit(GROUP, LogIndex(3))
    assert log.log_start_offset == 0


def test_a_read_takes_whole_frames_and_at_least_one() -> None:
    _, store, log = a_log(NO_CACHE)
    frames = frames_after(log, 4)
    store.append(GROUP, frames)
    commit_round(store)
    assert log.read_cached(LogIndex(1), LogIndex(4), 1 << 20) is None
    size = len(frames[0])
    for budget, count in ((0, 1), (1, 1), (2 * size - 1, 1), (2 * size, 2), (1 << 20, 4)):
        found = log.read(LogIndex(1), LogIndex(4), budget)
        assert (found.data, found.first, found.last) == (joined(frames[:count]), 1, count)
    assert log.read(LogIndex(3), LogIndex(3), 1 << 20).data == frames[2]


def test_a_read_outside_the_log_is_refused() -> None:
    _, store, log = a_log()
    store.append(GROUP, frames_after(log, 2))
    for first, last in ((0, 1), (3, 3), (2, 1)):
        with pytest.raises(OffsetOutOfRange):
            log.read(LogIndex(first), LogIndex(last), 100)
    with pytest.raises(Misuse):
        log.term_at(LogIndex(3))


def test_a_ticket_reads_on_after_its_segment_is_gone() -> None:
    disk, store, log = a_log(NO_CACHE)
    frames = frames_after(log, 40, size=900)
    store.append(GROUP, frames)
    commit_round(store)
    run_checkpoint(store)
    ticket = log.plan_read(LogIndex(2), LogIndex(3), 1 << 20)
    store.drop_before(GROUP, LogIndex(30))
    run_checkpoint(store)
    assert not disk.exists(ticket.segment.path)
    assert ticket.read().data == joined(frames[1:3])


# Tail cache


def cached(cache: TailCache, count: int) -> Tail:
    tail, point = Tail(), LOG_BEGIN
    for _ in range(count):
        frame = data_frame(GROUP, point)
        meta = read_meta(frame, point.offset)
        cache.extend(tail, [frame], [meta])
        point = meta.after
    tail.pinned_above = LogIndex(count)
    return tail


def test_the_oldest_frame_of_all_logs_goes_first() -> None:
    cost = len(data_frame(GROUP, LOG_BEGIN)) + FRAME_OVERHEAD_BYTES
    cache = TailCache(4 * cost)
    first, second = cached(cache, 3), cached(cache, 3)
    cache.trim()
    assert (first.first, second.first) == (3, 1)
    assert cache.size_bytes == 4 * cost
    assert first.read(LogIndex(2), LogIndex(3), 1 << 20) is None
    assert second.read(LogIndex(1), LogIndex(3), 1 << 20) is not None


def test_what_is_not_in_its_segment_stays() -> None:
    cache = TailCache(0)
    tail = cached(cache, 5)
    tail.pinned_above = LogIndex(2)
    cache.trim()
    assert tail.first == 3
    tail.pinned_above = LogIndex(5)
    cache.trim()
    assert (len(tail), cache.size_bytes) == (0, 0)


def test_truncated_frames_leave_no_trace_for_ever() -> None:
    cache = TailCache(1 << 30)
    tail = cached(cache, 1)
    for _ in range(3_000):
        frame = data_frame(GROUP, after(LOG_BEGIN, data_frame(GROUP, LOG_BEGIN)))
        cache.extend(tail, [frame], [read_meta(frame, RecordOffset(1))])
        cache.cut(tail, LogIndex(2))
    assert len(cache._by_age) < 2_100
    assert len(tail) == 1


# Sparse index


def an_index(count: int) -> SparseIndex:
    index = SparseIndex(GROUP, LogIndex(1))
    for number in range(count):
        time = NO_TIME if number == 0 else 1_000 + number
        index.add(
            IndexEntry(
                LogIndex(1 + 10 * number),
                RecordOffset(20 * number),
                time,
                64 + number,
                Term(1),
                bytes(8),
            )
        )
    return index


def test_entries_are_found_by_index_offset_and_time() -> None:
    index = an_index(5)
    assert [found.index for at in (1, 10, 11, 99) if (found := index.by_index(LogIndex(at)))] == [
        1,
        1,
        11,
        41,
    ]
    assert index.by_index(LogIndex(0)) is None
    by_offset = index.by_offset(RecordOffset(39))
    assert by_offset is not None
    assert by_offset.index == 11
    by_time = index.before_time(1_002)
    assert by_time is not None
    assert by_time.index == 11


def test_a_cut_index_grows_again_and_its_file_follows() -> None:
    disk = new_disk()
    index = an_index(5)
    index.save(lambda: disk.open("/node/index", create=True))
    index.cut(LogIndex(25))
    assert len(index) == 3
    index.add(IndexEntry(LogIndex(31), RecordOffset(70), 5, 99, Term(2), bytes(8)))
    index.save(lambda: disk.open("/node/index"))
    assert len(disk.files()["/node/index"]) == 40 + 4 * 56
    assert not index.unsaved


def test_sealed_segments_give_their_handles_back() -> None:
    _, store, log = a_log(NO_CACHE)
    store.append(GROUP, frames_after(log, 60, size=900))
    commit_round(store)
    run_checkpoint(store)
    read_all(log)
    assert len(log.segments) > 5
    assert sum(1 for segment in log.segments if segment.handle is not None) <= 2


def test_a_removed_group_keeps_no_file_open() -> None:
    """A file that is open keeps its room on a disk that is full, however often it was deleted."""
    _, store, log = a_log(NO_CACHE)
    store.append(GROUP, mixed_frames(60))
    commit_round(store)
    assert any(segment.handle is not None for segment in log.segments)
    store.remove_group(GROUP)
    assert all(segment.handle is None for segment in log.segments)


def test_a_range_goes_over_the_borders_of_segments() -> None:
    _, store, log = a_log(NO_CACHE)
    frames = mixed_frames(60)
    store.append(GROUP, frames)
    commit_round(store)
    assert len(log.segments) >= 3
    first, last = LogIndex(2), LogIndex(59)
    found = log.read_range(first, last, 1 << 20)
    assert (found.data, found.first, found.last) == (joined(frames[1:59]), first, last)
    size = sum(map(len, frames[1:40]))
    for more in (0, 1, len(frames[40]) - 1):
        found = log.read_range(first, last, size + more)
        assert (found.data, found.last) == (joined(frames[1:40]), 40), "no byte over the budget"
    assert log.read_range(first, last, 1).last == first, "but one frame at least"


# Page cache


@pytest.mark.parametrize("kept", [0, MIB, 1 << 40])
def test_writing_much_leaves_the_end_in_the_page_cache(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[int, list[tuple[int, int]]] = {}

    def forget(file: SimulatedFile, start: int, end: int) -> None:
        told.setdefault(id(file), []).append((start, end))

    monkeypatch.setattr(SimulatedFile, "forget", forget)
    limits = StoreLimits(segment_bytes=12 * MIB, page_cache_bytes=kept)
    _, store, log = a_log(limits)
    for _ in range(40):
        store.append(GROUP, frames_after(log, 1, size=MIB))
        commit_round(store)
        growing = log.segments[-1]
        for start, end in told.get(id(growing.handle), []):
            assert start < end <= growing.end - kept
    assert len(log.segments) == 4
    for segment in log.segments[:-1]:
        ranges = told.get(id(segment.handle), [])
        if kept < segment.end:
            assert [0, *(end for _, end in ranges)] == [
                *(start for start, _ in ranges),
                segment.end,
            ]
        else:
            assert not ranges
