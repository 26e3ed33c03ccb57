"""The log of one group: segments on disk, the newest frames in memory, reads over both.

The idea: changes arrive as *operations* (frames, a truncation, a new start). `stage_*` makes one
visible to readers at once, in memory; `write` carries it out in the segments' files, when the
store decides so. A truncation reaches the files only after it is durable in the journal, since it
overwrites bytes that were durable; until then the frames that replace the old ones are read from
memory.

The rule it protects: readers see one log at every moment, `durable_index` never exceeds what a
sync has covered, and a file is never changed below the durable watermark before the journal can
repeat the change.

One thread owns a log. `ReadTicket.read` alone may run elsewhere: it touches only the handle that
the ticket captured. `read` of committed frames is safe in a helper thread too.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aegis_cluster.errors import (
    Corruption,
    CorruptLog,
    CorruptRecord,
    Misuse,
    OffsetOutOfRange,
    invariant,
)
from aegis_cluster.ids import LogIndex, RecordOffset, Term
from aegis_cluster.limits import PAGE_CACHE_STEP_BYTES
from aegis_cluster.storage.checked_file import unpack_body
from aegis_cluster.storage.scan import FrameScanner, Place, entry_place, segment_start
from aegis_cluster.storage.segment import HEADER_BYTES, Segment, SegmentHeader
from aegis_cluster.storage.tail_cache import FrameMeta, Tail, TailCache, read_meta
from aegis_cluster.storage.types import LOG_BEGIN, Damage, LogPoint, ReadResult
from aegis_cluster.wire.frame import (
    FRAME_HEADER_BYTES,
    FrameKind,
    check_frame,
    decode_header,
    frame_payload,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.disk import Disk, File
    from aegis_cluster.storage.handles import HandleCache
    from aegis_cluster.storage.types import StoreLimits
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import Bytes


@dataclass(frozen=True, slots=True)
class FramesOp:
    """Frames that follow the log's end."""

    frames: Sequence[bytes]
    metas: Sequence[FrameMeta]
    size: int
    """Bytes of all frames."""

    @property
    def last(self) -> LogIndex:
        """Index of the last frame."""
        return self.metas[-1].at


@dataclass(frozen=True, slots=True)
class TruncateOp:
    """Everything at or above `from_index` goes."""

    from_index: LogIndex


@dataclass(frozen=True, slots=True)
class ResetOp:
    """The whole log goes; the next frame is the one after `begin`."""

    begin: LogPoint
    old: tuple[Segment, ...]


LogOp = FramesOp | TruncateOp | ResetOp


@dataclass(frozen=True, slots=True)
class ReadTicket:
    """A read from one segment, with everything it needs captured, for a helper thread."""

    log: PartitionLog
    segment: Segment
    file: File
    position: int
    """Of the frame at `start`."""
    start: LogIndex
    chain: bytes
    """Before that frame; a frame's own checksum does not cover its link of the chain."""
    first: LogIndex
    last: LogIndex
    end: int
    """File position up to which the segment holds whole frames."""
    bytes_max: int

    def read(self) -> ReadResult:
        """At least one frame; CorruptLog, with the place, where the bytes fail their check."""
        position, chain = self._find_first()
        size = min(max(self.bytes_max, FRAME_HEADER_BYTES), self.end - position)
        data = self.file.pread(size, position)
        try:
            whole = decode_header(data).size
            if whole > len(data):
                data = self.file.pread(whole, position)
            length, last, chain = self._check(data, chain)
        except CorruptRecord as error:
            raise self._damaged(position, error) from error
        self.log.note_read(self.segment, LogIndex(last + 1), position + length, chain)
        return ReadResult(data if length == len(data) else data[:length], self.first, last)

    def _find_first(self) -> tuple[int, bytes]:
        """Position of the first wanted frame, walked to from `start`, and the chain before it."""
        position, index, chain, step = self.position, self.start, self.chain, 64 * 1024
        data, data_start = b"", position
        while index < self.first:
            if position + FRAME_HEADER_BYTES > data_start + len(data):
                data, data_start = self.file.pread(step, position), position
            try:
                header = decode_header(data, position - data_start)
                _require_index(header.index, index)
            except CorruptRecord as error:
                raise self._damaged(position, error) from error
            position += header.size
            index, chain = LogIndex(index + 1), header.chain
        return position, chain

    def _check(self, data: bytes, chain: bytes) -> tuple[int, LogIndex, bytes]:
        """Bytes and last index of the whole frames in `data` that are wanted; the chain after."""
        position, index = 0, self.first
        while index <= self.last and position + FRAME_HEADER_BYTES <= len(data):
            size = decode_header(data, position).size
            if position + size > len(data) or (position and position + size > self.bytes_max):
                break
            header = check_frame(self.log.group, data, position, previous_chain=chain)
            _require_index(header.index, index)
            chain = header.chain
            position += size
            index = LogIndex(index + 1)
        if position == 0:
            raise CorruptRecord("the log ends inside a frame", have=len(data))
        return position, LogIndex(index - 1), chain

    def _damaged(self, position: int, error: CorruptRecord) -> CorruptLog:
        return CorruptLog(
            f"group {self.log.group}: {self.segment.path} is damaged at or after byte {position}, "
            f"index {self.first}: {error}",
            group=self.log.group,
            index=self.first,
            file=self.segment.path,
            position=position,
            reason=error.message,
        )


def _require_index(have: LogIndex, want: LogIndex) -> None:
    if have != want:
        raise CorruptRecord("frame index", have=have, want=want)


@dataclass(slots=True)
class DirtyFiles:
    """What was written since it was last handed to a sync."""

    files: dict[int, File] = field(default_factory=dict)
    indexes: list[File] = field(default_factory=list)
    """Index files of sealed segments: only checkpoints sync them."""
    directory: bool = False
    sealed: list[Segment] = field(default_factory=list)
    """Sealed since the last checkpoint; their handles may go once that is durable."""
    doomed: list[Segment] = field(default_factory=list)
    """Dropped; to be unlinked once a checkpoint says that the log starts above them."""

    def add(self, file: File) -> None:
        """A file has new bytes."""
        self.files[id(file)] = file


class PartitionLog:
    """See the module's first lines. Indexes are inclusive, `end_offset` is exclusive."""

    def __init__(
        self,
        *,
        group: GroupId,
        disk: Disk,
        directory: str,
        limits: StoreLimits,
        handles: HandleCache,
        cache: TailCache,
    ) -> None:
        self.group = group
        self.directory = directory
        self.durable_index = LogIndex(0)
        """Frames up to here survive a power loss of this node."""
        self.commit_index = LogIndex(0)
        """The highest that `note_commit` was told; a hint."""
        self.damage: Damage | None = None
        """What recovery found at or below the durable watermark; no append while it stands."""
        self.dirty = DirtyFiles()
        self.roll_ms: int | None = None
        """A frame that was appended so much later than its segment's first one begins another."""
        self.roll_bytes: int | None = None
        """A smaller size for segments than the store's; None: the store's."""
        self._disk = disk
        self._limits = limits
        self._handles = handles
        self._cache = cache
        self._tail = Tail()
        self._begin = LOG_BEGIN
        self._end = LOG_BEGIN
        self._written = LOG_BEGIN
        """End of what stands in the files."""
        self._on_file = LogIndex(0)
        """The files' frames up to here are still the log's; above, only memory is right."""
        self._pending_cuts: list[LogIndex] = []
        """Staged truncations that are not yet carried out in the files, in order."""
        self._pending_resets = 0
        """Staged new starts; what was staged before the last of them is not written any more."""
        self._segments: tuple[Segment, ...] = ()
        self._doomed: list[Segment] = []
        """Dropped, and perhaps not yet unlinked by the checkpoint that says so."""
        self._runs: list[tuple[LogIndex, Term]] = []
        self._log_starts: list[tuple[LogIndex, RecordOffset]] = []
        """LOG_START frames: the last committed one, then those that may become so."""
        self._memberships: list[tuple[LogIndex, bytes]] = []
        """MEMBERSHIP frames: index and payload, and the newest one below the log's start."""
        self._read_hint: tuple[Segment, LogIndex, int, bytes] | None = None

    # What the log holds

    @property
    def first_index(self) -> LogIndex:
        """The oldest frame kept; one above `last_index` in an empty log."""
        return LogIndex(self._begin.index + 1)

    @property
    def last_index(self) -> LogIndex:
        """The newest frame, durable or not."""
        return self._end.index

    @property
    def last_term(self) -> Term:
        """Term of the newest frame; of the one before the start in an empty log."""
        return self._end.term

    @property
    def last_chain(self) -> bytes:
        """Chain value that the next frame continues."""
        return self._end.chain

    @property
    def end_offset(self) -> RecordOffset:
        """The next offset to be given out."""
        return self._end.offset

    @property
    def begin(self) -> LogPoint:
        """The state before the oldest frame kept."""
        return self._begin

    @property
    def end(self) -> LogPoint:
        """The state after the newest frame."""
        return self._end

    @property
    def written(self) -> LogPoint:
        """The state after the newest frame that stands in a segment."""
        return self._written

    @property
    def log_start_offset(self) -> RecordOffset:
        """First offset that consumers may read: the last committed LOG_START frame says so."""
        decided = [start for index, start in self._log_starts if index <= self.commit_index]
        return max([self._begin.offset, *decided])

    @property
    def log_starts(self) -> tuple[tuple[LogIndex, RecordOffset], ...]:
        """LOG_START frames that matter: the last committed one and any above it."""
        return tuple(self._log_starts)

    @property
    def memberships(self) -> tuple[tuple[LogIndex, bytes], ...]:
        """MEMBERSHIP frames of the log, committed or not: index and payload, oldest first."""
        return tuple(self._memberships)

    @property
    def resetting(self) -> bool:
        """The log was replaced in memory, and the files do not say so yet."""
        return self._pending_resets > 0

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The files, oldest first."""
        return self._segments

    def term_runs(self) -> list[tuple[LogIndex, Term]]:
        """(first index, term) of each run of frames of one term, oldest first."""
        return list(self._runs)

    def term_at(self, index: LogIndex) -> Term:
        """Term of a frame, or of the one before the oldest kept (0 before the first of all)."""
        if index == self._begin.index:
            return self._begin.term
        self._require_kept(index)
        place = bisect_right(self._runs, index, key=_run_start) - 1
        return self._runs[place][1]

    def point_at(self, index: LogIndex) -> LogPoint:
        """The state of the log after a frame: from memory, or by a short walk in its segment."""
        if index == self._end.index:
            return self._end
        if index == self._begin.index:
            return self._begin
        self._require_kept(index)
        meta = self._tail.meta(index)
        if meta is not None:
            return meta.after
        return self._place_after(index).before

    def end_offset_at(self, index: LogIndex) -> RecordOffset:
        """Offset after a frame: the high watermark, for a commit index."""
        return self.point_at(index).offset

    def _require_kept(self, index: LogIndex) -> None:
        if not self.first_index <= index <= self.last_index:
            raise Misuse(
                "an index outside the log",
                group=self.group,
                have=index,
                first=self.first_index,
                last=self.last_index,
            )

    # Reading

    def read(self, first: LogIndex, last: LogIndex, bytes_max: int) -> ReadResult:
        """Whole contiguous frames from `first` on, at least one, at most up to `last`."""
        return (
            self.read_cached(first, last, bytes_max)
            or self.plan_read(first, last, bytes_max).read()
        )

    def read_range(self, first: LogIndex, last: LogIndex, bytes_max: int) -> ReadResult:
        """As `read`, over the borders of segments: who asked for a range that fits gets all of it,
        or a leader would wait for the answer to what it never sent. What stands before damage, or
        before what was dropped meanwhile, is handed over; whoever asks for the rest hears of it.
        """
        found = self.read(first, last, bytes_max)
        parts, reached, left = [found.data], found.last, bytes_max - len(found.data)
        while reached < last and left > 0:
            try:
                found = self.read(LogIndex(reached + 1), last, left)
            except (Corruption, OffsetOutOfRange):
                break
            left -= len(found.data)
            if left < 0:
                break  # a single frame that is larger than what was left
            parts.append(found.data)
            reached = found.last
        return ReadResult(parts[0] if len(parts) == 1 else b"".join(parts), first, reached)

    def read_cached(self, first: LogIndex, last: LogIndex, bytes_max: int) -> ReadResult | None:
        """As `read`, but only from memory; None where the frames are not there."""
        if first < self.first_index or last > self.last_index or first > last:
            self._refuse_range(first, last)
        return self._tail.read(first, last, bytes_max)

    def plan_read(self, first: LogIndex, last: LogIndex, bytes_max: int) -> ReadTicket:
        """Capture a read of frames that stand in a segment; its `read` may run in any thread."""
        if first < self.first_index or last > self._on_file or first > last:
            last = min(last, self._on_file)
            if first < self.first_index or first > last:
                self._refuse_range(first, last)
        segment = self._segment_of(first)
        start, position, chain = self._nearest(segment, first)
        return ReadTicket(
            self, segment, segment.file, position, start, chain, first, last, segment.end, bytes_max
        )

    def _refuse_range(self, first: LogIndex, last: LogIndex) -> None:
        raise OffsetOutOfRange(
            f"group {self.group} has no frames {first} to {last}",
            group=self.group,
            first=first,
            last=last,
            have_first=self.first_index,
            have_last=self.last_index,
        )

    def _nearest(self, segment: Segment, index: LogIndex) -> tuple[LogIndex, int, bytes]:
        """A frame at or before `index`, its position, and the chain before it."""
        hint = self._read_hint
        if hint is not None and hint[0] is segment and hint[1] == index:
            return hint[1:]
        entry = segment.index.by_index(index)
        if entry is None:
            return segment.base_index, HEADER_BYTES, segment.header.before.chain
        return entry.index, entry.position, entry.chain

    def note_read(
        self, segment: Segment, next_index: LogIndex, position: int, chain: bytes
    ) -> None:
        """Remember where a reader that goes on will go on. One assignment, so any thread may."""
        self._read_hint = (segment, next_index, position, chain)

    def _segment_of(self, index: LogIndex) -> Segment:
        segments = self._segments
        place = bisect_right(segments, index, key=_base_index) - 1
        invariant(place >= 0, "a segment holds every index kept", index=index)
        return segments[place]

    def _place_of(self, index: LogIndex) -> tuple[Segment, Place]:
        """Where the frame at `index` stands, or would stand next, in the files."""
        segment = self._segment_of(index)
        entry = segment.index.by_index(index)
        place = entry_place(entry) if entry else segment_start(segment)
        scanner = FrameScanner(self.group, segment.file, place, segment.end)
        while scanner.place.before.index + 1 < index and scanner.next():
            pass
        before = scanner.place.before
        invariant(before.index + 1 == index, "the walk arrives", have=before.index, want=index)
        before = before._replace(term=self._written_term(segment, before))
        return segment, scanner.place._replace(before=before)

    def _written_term(self, segment: Segment, before: LogPoint) -> Term:
        """An index entry does not know the term before its frame; the segment before it does."""
        if before.index == segment.header.before.index:
            return segment.header.before.term
        entry = segment.index.by_index(before.index)
        return entry.term if entry else before.term

    def _place_after(self, index: LogIndex) -> Place:
        segment = self._segment_of(index)
        try:
            entry = segment.index.by_index(index)
            place = entry_place(entry) if entry else segment_start(segment)
            scanner = FrameScanner(self.group, segment.file, place, segment.end)
            while scanner.place.before.index < index and scanner.next():
                pass
        except CorruptRecord as error:
            raise self._unreadable(segment, index, error) from error
        invariant(scanner.place.before.index == index, "the walk arrives", want=index)
        return scanner.place

    def _unreadable(self, segment: Segment, index: LogIndex, error: CorruptRecord) -> CorruptLog:
        return CorruptLog(
            f"group {self.group}: {segment.path} is damaged before index {index}: {error}",
            group=self.group,
            index=index,
            file=segment.path,
            reason=error.message,
        )

    # Looking up

    def index_of_offset(self, offset: RecordOffset) -> LogIndex:
        """The frame that holds `offset`, else the next data frame, else one above the last."""
        if offset >= self.end_offset:
            return LogIndex(self.last_index + 1)
        if offset < self._begin.offset:
            return self.first_index
        meta = self._tail.by_offset(offset)
        if meta is not None:
            return meta.at
        for _, found in self._walk_from_offset(offset):
            if found.after.offset > offset:
                return found.at
        raise CorruptLog(f"group {self.group}: no frame holds offset {offset}", group=self.group)

    def _walk_from_offset(self, offset: RecordOffset) -> Iterator[tuple[LogPoint, FrameMeta]]:
        segments = self._segments
        place = bisect_right(segments, offset, key=_base_offset) - 1
        for segment in segments[max(place, 0) :]:
            entry = segment.index.by_offset(offset)
            yield from self._walk(segment, entry_place(entry) if entry else None)
        yield from self._walk_unwritten()

    def offset_of_time(self, time_ms: int) -> RecordOffset | None:
        """Base offset of the first batch whose largest timestamp is at or after `time_ms`."""
        start = self.log_start_offset
        for before, meta in self._walk_from_time(time_ms):
            if meta.time is not None and meta.time >= time_ms and meta.after.offset > start:
                return max(before.offset, start)
        return None

    def _walk_from_time(self, time_ms: int) -> Iterator[tuple[LogPoint, FrameMeta]]:
        for segment in self._segments:
            if segment.max_time >= time_ms:
                entry = segment.index.before_time(time_ms)
                yield from self._walk(segment, entry_place(entry) if entry else None)
        yield from self._walk_unwritten()

    def _walk(self, segment: Segment, place: Place | None) -> Iterator[tuple[LogPoint, FrameMeta]]:
        """Frames of one file that are still the log's, each with the state before it."""
        start = place or segment_start(segment)
        try:
            for at, meta in FrameScanner(self.group, segment.file, start, segment.end):
                if meta.at > self._on_file:
                    return
                yield at.before, meta
        except CorruptRecord as error:
            raise self._unreadable(segment, start.before.index, error) from error

    def _walk_unwritten(self) -> Iterator[tuple[LogPoint, FrameMeta]]:
        """Frames that only memory holds."""
        index = LogIndex(max(self._on_file + 1, self._tail.first))
        while (meta := self._tail.meta(index)) is not None:
            yield self.point_at(LogIndex(index - 1)), meta
            index = LogIndex(index + 1)

    # Staging: visible at once, on disk later

    def stage_frames(
        self, frames: Sequence[bytes], headers: Sequence[FrameHeader] | None = None
    ) -> FramesOp:
        """Append frames in memory. Nothing is staged if any of them does not follow. headers: of
        the frames, where they were read already."""
        invariant(self.damage is None, "a damaged log takes no frames", group=self.group)
        metas: list[FrameMeta] = []
        point, size, is_plain = self._end, 0, True
        for place, frame in enumerate(frames):
            meta = read_meta(frame, point.offset, 0, headers[place] if headers else None)
            after = meta.after
            if meta.size != len(frame) or after.index != point.index + 1 or after.term < point.term:
                invariant(
                    False,
                    "whole frames follow the log's end",
                    group=self.group,
                    have=(after.index, after.term, len(frame)),
                    want=(point.index + 1, point.term, meta.size),
                )
            metas.append(meta)
            size += meta.size
            is_plain = is_plain and meta.kind is FrameKind.DATA
            point = after
        if not is_plain:
            self._log_starts += _log_starts(frames, metas)
            self._memberships += _memberships(frames, metas)
        self._note_terms(metas)
        self._end = point
        self._cache.extend(self._tail, frames, metas)
        return FramesOp(frames, metas, size)

    def _note_terms(self, metas: Sequence[FrameMeta]) -> None:
        for meta in metas:
            if not self._runs or self._runs[-1][1] != meta.after.term:
                self._runs.append((meta.at, meta.after.term))

    def stage_truncate(self, from_index: LogIndex) -> TruncateOp:
        """Forget the frames at or above `from_index` in memory."""
        invariant(self.damage is None, "a damaged log is not cut", group=self.group)
        self._require_kept(from_index)
        end = self.point_at(LogIndex(from_index - 1))
        self._end = end._replace(term=self.term_at(end.index))
        self._cache.cut(self._tail, from_index)
        while self._runs and self._runs[-1][0] >= from_index:
            self._runs.pop()
        self._log_starts = [start for start in self._log_starts if start[0] < from_index]
        self._memberships = [one for one in self._memberships if one[0] < from_index]
        self.durable_index = min(self.durable_index, self._end.index)
        self._pending_cuts.append(from_index)
        self._read_hint = None
        self._set_on_file(self._on_file)
        return TruncateOp(from_index)

    def stage_reset(self, begin: LogPoint) -> ResetOp:
        """Replace the whole log by an empty one that starts after `begin`."""
        old, self._segments = self._segments, ()
        self._cache.cut(self._tail, LogIndex(0))
        self._begin = self._end = begin
        self._pending_resets += 1
        self._runs.clear()
        self._log_starts.clear()
        self._memberships.clear()
        self._read_hint = None
        self._pending_cuts.append(LogIndex(begin.index + 1))
        self.durable_index = begin.index
        self.damage = None
        self._set_on_file(begin.index)
        return ResetOp(begin, old)

    def _set_on_file(self, index: LogIndex) -> None:
        lowest_cut = min(self._pending_cuts, default=LogIndex(index + 1))
        self._on_file = LogIndex(min(index, lowest_cut - 1))
        self._tail.pinned_above = self._on_file

    # Writing what was staged; nothing here is durable yet

    def write(self, op: LogOp) -> None:
        """Carry out one staged operation in the files. In the order of staging."""
        match op:
            case FramesOp():
                if not self._pending_resets:
                    self._write_frames(op)
            case TruncateOp():
                self._pending_cuts.pop(0)
                if not self._pending_resets:
                    self._write_truncate(op)
            case ResetOp():
                self._pending_cuts.pop(0)
                self._pending_resets -= 1
                self._write_reset(op)

    def _write_frames(self, op: FramesOp) -> None:
        segment = self._segments[-1]
        run: list[bytes] = []
        position = segment.end
        point = self._written
        rolls = self._is_old(segment, op.metas[0])
        bytes_max = min(self._limits.segment_bytes, self.roll_bytes or self._limits.segment_bytes)
        for frame, meta in zip(op.frames, op.metas, strict=True):
            if (
                position + meta.size > bytes_max
                or rolls
                or (meta.kind is FrameKind.LOG_START and _starts_within(segment, frame))
            ) and position > HEADER_BYTES:
                rolls = False
                self._write_run(segment, run, position)
                segment, run, position = self._roll(segment, point), [], HEADER_BYTES
            segment.note_frame(position, point, meta, self._limits.index_interval_bytes)
            run.append(frame)
            position += meta.size
            point = meta.after
        self._write_run(segment, run, position)
        self._written = point
        self._set_on_file(point.index)

    def _write_run(self, segment: Segment, run: list[bytes], end: int) -> None:
        if run:
            segment.file.pwritev(run, segment.end)
            segment.end = end
            self.dirty.add(segment.file)
            behind = end - self._limits.page_cache_bytes
            if behind - segment.forgotten >= PAGE_CACHE_STEP_BYTES:
                self._forget(segment, behind)

    def _forget(self, segment: Segment, behind: int) -> None:
        """Leave only the end of what is written in the page cache. Who reads it soon is served from
        the tail cache, and pages that were just in use are the fastest to write into."""
        segment.file.forget(segment.forgotten, behind)
        segment.forgotten = behind
        for sealed in self._segments[-2:-1]:
            if sealed.handle is not None and sealed.forgotten < sealed.end:
                sealed.handle.forget(sealed.forgotten, sealed.end)
                sealed.forgotten = sealed.end

    def _is_old(self, segment: Segment, meta: FrameMeta) -> bool:
        """Whether so much time lies between a segment's first frame and this one.

        Judged by append times alone, so replicas with the same setting cut at the same frames.
        """
        if self.roll_ms is None or segment.end <= HEADER_BYTES:
            return False
        try:
            first_ms = segment.first_append_ms()
        except CorruptRecord:
            return False  # whoever reads that frame reports the damage
        return meta.appended_ms - first_ms >= self.roll_ms

    def _roll(self, segment: Segment, end: LogPoint) -> Segment:
        """Seal the last segment and start the next."""
        index_file = segment.seal(end)
        if index_file is not None:
            self.dirty.indexes.append(index_file)
        self.dirty.sealed.append(segment)
        return self._start_segment(end)

    def _start_segment(self, before: LogPoint) -> Segment:
        header = SegmentHeader(self.group, before)
        segment = Segment(self._disk, self.directory, header, self._handles)
        self._handles.pin(segment)
        segment.create()
        self.dirty.add(segment.file)
        self.dirty.directory = True
        self._segments = (*self._segments, segment)
        return segment

    def _write_truncate(self, op: TruncateOp) -> None:
        if op.from_index <= self._written.index:
            self._drop_segments_above(op.from_index)
            segment, place = self._place_of(op.from_index)
            self._cut_segment(segment, place, op.from_index)
            self._written = place.before
        self._set_on_file(self._written.index)

    def _drop_segments_above(self, index: LogIndex) -> None:
        keep = max(1, bisect_right(self._segments, index, key=_base_index))
        for segment in self._segments[keep:]:
            self._remove(segment)
        self._segments = self._segments[:keep]

    def _remove(self, segment: Segment) -> None:
        self._handles.forget(segment)
        self.dirty.files.pop(id(segment.handle), None)
        segment.remove()
        self.dirty.directory = True

    def _cut_segment(self, segment: Segment, place: Place, from_index: LogIndex) -> None:
        """Make this the growing segment, ending before `from_index`."""
        self._handles.pin(segment)
        segment.file.truncate(place.position)
        segment.index.cut(from_index)
        segment.grow_from(place.position, place.max_time, self._limits.index_interval_bytes)
        self.dirty.add(segment.file)

    def _write_reset(self, op: ResetOp) -> None:
        for segment in (*self._doomed, *op.old):
            self._remove(segment)
        self._doomed.clear()
        if not self._pending_resets:
            self._start_segment(op.begin)
            self._written = op.begin
            self._set_on_file(op.begin.index)

    # Retention

    def drop_before(self, index: LogIndex) -> LogIndex:
        """Drop the segments that lie wholly below `index`; return the first index kept.

        The files go once a checkpoint says that the log starts above them, so a missing file is
        never mistaken for damage, nor damage for retention.
        """
        limit = min(index, self.durable_index, self._on_file)
        keep = max(0, bisect_right(self._segments, limit, key=_base_index) - 1)
        for segment in self._segments[:keep]:
            self.dirty.doomed.append(segment)
            self._doomed.append(segment)
        if keep:
            self._segments = self._segments[keep:]
            self._begin = self._segments[0].header.before
            self._trim_runs()
            self._trim_memberships()
        return self.first_index

    # Compaction

    def put_compacted(self, old: Segment, aside: Segment) -> bool:
        """Put a segment's compacted files in its place; False where the log has moved on since.

        Their names are durable once the directory is synced; until then a power loss leaves the
        old or the new file of each, and an index that is not its segment's is made anew. Readers
        that hold the old file go on reading it.
        """
        if old not in self._segments or self.resetting or self.damage is not None:
            return False
        invariant(old.settled, "only what a checkpoint covers is compacted", at=old.base_index)
        # Whoever still walks the old segment must not open the new file by its name.
        self._handles.pin(old)
        _ = (old.file, old.index)
        self._handles.forget(old)
        new = Segment(self._disk, self.directory, aside.header, self._handles)
        new.end, new.max_time = aside.end, aside.max_time
        new.sealed = new.settled = True
        self._disk.rename(aside.index_path, new.index_path)
        self._disk.rename(aside.path, new.path)
        self._segments = tuple(new if one is old else one for one in self._segments)
        self._read_hint = None
        following = self._segments[self._segments.index(new) + 1]
        self._cache.drop_upto(self._tail, following.header.before.index)
        return True

    def _trim_runs(self) -> None:
        place = bisect_right(self._runs, self.first_index, key=_run_start) - 1
        if place >= 0:
            self._runs[: place + 1] = [(self.first_index, self._runs[place][1])]

    def _trim_memberships(self) -> None:
        """The newest one below the start stays: it is in effect there."""
        below = sum(1 for at, _ in self._memberships if at <= self._begin.index)
        if below > 1:
            del self._memberships[: below - 1]

    def note_commit(self, index: LogIndex) -> None:
        """Remember a commit index; log starts at or below it count from now on."""
        self.commit_index = max(self.commit_index, index)
        while len(self._log_starts) > 1 and self._log_starts[1][0] <= self.commit_index:
            del self._log_starts[0]

    # For the store: opening after a restart, checkpoints, the end

    def create(self) -> None:
        """Start an empty log with its first segment."""
        self._start_segment(LOG_BEGIN)

    def open_at(
        self,
        segments: Sequence[Segment],
        end: LogPoint,
        runs: Sequence[tuple[LogIndex, Term]],
        log_starts: Sequence[tuple[LogIndex, RecordOffset]],
        memberships: Sequence[tuple[LogIndex, bytes]],
    ) -> None:
        """Take over segments that recovery has checked; the last one grows on."""
        self._segments = tuple(segments)
        self._begin = segments[0].header.before if segments else end
        self._end = self._written = end
        self._runs = list(runs)
        self._log_starts = list(log_starts)
        self._memberships = list(memberships)
        self._on_file = self._tail.pinned_above = end.index
        for segment in segments[:-1]:
            segment.settled = True
        if segments:
            self._handles.pin(segments[-1])

    def take_data_files(self) -> tuple[list[File], bool]:
        """Files with new bytes, and whether the directory has new names; both count as taken."""
        files = list(self.dirty.files.values())
        directory, self.dirty.directory = self.dirty.directory, False
        self.dirty.files.clear()
        return files, directory

    def take_everything(self) -> DirtyFiles:
        """As `take_data_files`, with the indexes saved: for a checkpoint."""
        if self._segments:
            self._segments[-1].save_index()
        taken, self.dirty = self.dirty, DirtyFiles()
        return taken

    def checkpointed(self, taken: DirtyFiles) -> None:
        """A checkpoint covers what was taken: handles of sealed segments may be given up from now
        on, and what was doomed is unlinked.
        """
        self._doomed = [segment for segment in self._doomed if not segment.removed]
        for segment in taken.sealed:
            if segment.sealed:
                segment.settled = True
                self._handles.unpin(segment)
                self._handles.touch(segment)

    def forget(self) -> None:
        """The group is removed: give back memory and handles.

        At once, and not when somebody lets go of this object: an open file keeps its room on disk.
        """
        self._cache.cut(self._tail, LogIndex(0))
        for segment in self._segments:
            self._handles.forget(segment)
            segment.let_go()


def _run_start(run: tuple[LogIndex, Term]) -> LogIndex:
    return run[0]


def _base_index(segment: Segment) -> LogIndex:
    return segment.base_index


def _base_offset(segment: Segment) -> RecordOffset:
    return segment.header.before.offset


def _log_starts(
    frames: Sequence[bytes], metas: Sequence[FrameMeta]
) -> list[tuple[LogIndex, RecordOffset]]:
    return [
        (meta.at, read_log_start(frame))
        for frame, meta in zip(frames, metas, strict=True)
        if meta.kind is FrameKind.LOG_START
    ]


def _memberships(
    frames: Sequence[bytes], metas: Sequence[FrameMeta]
) -> list[tuple[LogIndex, bytes]]:
    return [
        (meta.at, read_payload(frame))
        for frame, meta in zip(frames, metas, strict=True)
        if meta.kind is FrameKind.MEMBERSHIP
    ]


def _starts_within(segment: Segment, frame: bytes) -> bool:
    """Whether a LOG_START frame makes something in this segment obsolete, all of it at best: only
    whole segments are dropped, so this one ends here.
    """
    return read_log_start(frame) > segment.header.before.offset


def read_payload(frame: Bytes) -> bytes:
    """A frame's payload, as it is."""
    return bytes(frame_payload(frame, decode_header(frame)))


def read_log_start(frame: Bytes) -> RecordOffset:
    """The payload of a LOG_START frame is the offset in msgpack."""
    offset = unpack_body(bytes(frame_payload(frame, decode_header(frame))))
    if not isinstance(offset, int):
        raise CorruptRecord("a log start is an offset", have=type(offset).__name__)
    return RecordOffset(offset)
