"""Bring one group's segments to the state that checkpoint and journal describe.

The idea: frames that the checkpoint covers are trusted, with the sparse index as guide; only what
lies above is scanned. There the journal's frames are written over what the segment holds, other
frames are proved one by one, and what follows is kept as long as its chain continues.

The rule it protects (C3): when the readable log ends below the durable watermark, that is damage:
it is reported, nothing is cut and nothing is deleted. When it ends at or above, the rest is a torn
tail and is cut, whatever follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptLog, CorruptRecord
from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.storage.log import FramesOp, PartitionLog, read_log_start, read_payload
from aegis_cluster.storage.replay import GroupReplay, contiguous
from aegis_cluster.storage.scan import FrameScanner, Place, entry_place, segment_start
from aegis_cluster.storage.segment import (
    ASIDE_SUFFIX,
    HEADER_BYTES,
    Segment,
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
    parse_segment_name,
    segment_name,
)
from aegis_cluster.storage.tail_cache import FrameMeta, read_meta
from aegis_cluster.storage.types import LOG_BEGIN, NO_TIME, Damage, LogPoint
from aegis_cluster.wire.frame import FrameKind, check_frame

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.storage.checkpoint import GroupState
    from aegis_cluster.storage.disk import Disk, File
    from aegis_cluster.storage.handles import HandleCache
    from aegis_cluster.storage.sparse_index import SparseIndex
    from aegis_cluster.storage.types import StoreLimits


_COPY_BYTES: Final = 1 << 20


class Stop(Exception):
    """The readable log ends here."""

    def __init__(self, file: str, position: int, reason: str) -> None:
        super().__init__(reason)
        self.file = file
        self.position = position
        self.reason = reason


class Patch(NamedTuple):
    """A frame of the journal that is written over bytes of a segment."""

    segment: Segment
    position: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class LogFiles:
    """Where a group's log lies, and how to open it."""

    group: GroupId
    disk: Disk
    directory: str
    limits: StoreLimits
    handles: HandleCache


class LogRecovery:
    """One walk over one group's segments. `run` decides and `apply` changes files."""

    def __init__(
        self,
        files: LogFiles,
        state: GroupState | None,
        journal: GroupReplay,
        ceiling: LogIndex | None = None,
    ) -> None:
        """ceiling: after a failed sync, the last index that may be believed."""
        self.group = files.group
        self._files = files
        self._state = state
        self._journal = journal
        self._ceiling = ceiling
        self._trusted = _trusted_index(state, journal, ceiling)
        self.point = LOG_BEGIN
        self.segments: list[Segment] = []
        self.extra: list[str] = []
        """Segment files above the end, to be removed."""
        self.asides: list[str] = []
        """What a compaction left half-way; to be removed."""
        self.runs: list[tuple[LogIndex, Term]] = []
        self.log_starts: list[tuple[LogIndex, RecordOffset]] = []
        self.memberships: list[tuple[LogIndex, bytes]] = []
        self.appended: Sequence[memoryview] = ()
        self.damage: Damage | None = None
        self.rebuilt: list[Segment] = []
        """Sealed segments whose index must be saved anew."""
        self._patches: list[Patch] = []
        self._unsure: dict[Segment, int] = {}
        """Where frames begin that were read, and that no sync is known to have covered."""
        self._cuts: list[Segment] = []
        """Segments whose file may be longer than what counts of it."""
        self._bases: list[LogIndex] = []

    # Deciding

    def run(self) -> None:
        """Walk the log; afterwards the attributes say what there is and what is to be done."""
        try:
            self._find_segments()
            self._walk()
        except Stop as stop:
            self._end(stop)
        except FileNotFoundError as error:
            self._end(Stop(str(error.filename), 0, "the file is missing"))

    def _find_segments(self) -> None:
        disk, directory = self._files.disk, self._files.directory
        if not disk.exists(directory):
            raise Stop(directory, 0, "the directory of the log is missing")
        names = disk.list_dir(directory)
        self.asides = [name for name in names if name.endswith(ASIDE_SUFFIX)]
        named = (parse_segment_name(name) for name in names)
        bases = sorted(base for base in named if base is not None)
        if self._journal.reset is not None:
            self._find_reset(bases, self._journal.reset)
        else:
            first = self._state.first_index if self._state else LogIndex(1)
            self._bases = [base for base in bases if base >= first]
            self.extra = [segment_name(base) for base in bases if base < first]
            self.point = self._point_before(first)

    def _find_reset(self, bases: Sequence[LogIndex], begin: LogPoint) -> None:
        """Keep files only if they are the new log already."""
        self.point = begin
        start = LogIndex(begin.index + 1)
        header = self._known_header(start) if start in bases else None
        renewed = header is not None and header.before == begin
        self._bases = [base for base in bases if renewed and base >= start]
        self.extra = [segment_name(base) for base in bases if base not in self._bases]

    def _point_before(self, first: LogIndex) -> LogPoint:
        """The state before the first segment: its header says it."""
        if first in self._bases and (header := self._header(first)) is not None:
            if first > 1 or header.before == LOG_BEGIN:
                return header.before
            raise Stop(self._path(first), 0, "the first segment starts in the middle of a log")
        if self._state is not None and self._state.durable.index + 1 == first:
            return self._state.durable
        if first == 1:
            return LOG_BEGIN
        raise Stop(self._path(first), 0, "the first segment is missing or its header is bad")

    def _path(self, base: LogIndex) -> str:
        return f"{self._files.directory}/{segment_name(base)}"

    def _header(self, base: LogIndex) -> SegmentHeader | None:
        """The header of a segment, None if it is bad or belongs elsewhere."""
        try:
            header = decode_segment_header(
                self._files.disk.open(self._path(base)).pread(HEADER_BYTES, 0)
            )
        except CorruptLog:
            return None
        fits = header.group == self._files.group and header.base_index == base
        return header if fits else None

    def _known_header(self, base: LogIndex) -> SegmentHeader | None:
        """The header as it is, or as it must have been: above what a checkpoint saw a bad one may
        be torn or rotten, and frames that continue the log say that it stood there."""
        header = self._header(base)
        if header is not None or base <= self._trusted or base != self.point.index + 1:
            return header
        file = self._files.disk.open(self._path(base))
        begin = Place(HEADER_BYTES, self.point, NO_TIME)
        try:
            found = FrameScanner(self._files.group, file, begin, file.size()).next()
        except CorruptRecord:
            return None
        return None if found is None else SegmentHeader(self._files.group, self.point)

    def _walk(self) -> None:
        if self._state is not None and self._journal.reset is None:
            self.log_starts = [one for one in self._state.log_starts if one[0] <= self._trusted]
            self.memberships = [one for one in self._state.memberships if one[0] <= self._trusted]
        for place, base in enumerate(self._bases):
            successor = self._bases[place + 1] if place + 1 < len(self._bases) else None
            segment = self._open(base)
            self.segments.append(segment)
            sealed = successor is not None and successor - 1 <= self._trusted
            if not (sealed and self._adopt(segment, successor)):
                self._scan(segment, successor)
            self._check_end_of_trust()
        raise Stop(self._path(LogIndex(self.point.index + 1)), 0, "the log ends")

    def _open(self, base: LogIndex) -> Segment:
        header = self._known_header(base)
        if header is None or header.before != self.point:
            raise Stop(self._path(base), 0, "the segment's header is bad or does not continue")
        segment = Segment(self._files.disk, self._files.directory, header, self._files.handles)
        self._files.handles.pin(segment)
        return segment

    def _adopt(self, segment: Segment, successor: LogIndex | None) -> bool:
        """Take a sealed segment below the watermark by its index, without reading its frames."""
        index = segment.load_index()
        footer = index.last
        following = self._header(successor) if successor is not None else None
        if footer is None or not footer.is_footer or following is None:
            return False
        end = LogPoint(LogIndex(footer.index - 1), footer.term, footer.chain, footer.offset)
        if end != following.before or footer.position != segment.file.size():
            return False
        segment.hold_index(index)
        segment.end, segment.max_time, segment.sealed = footer.position, footer.time, True
        self._note_runs(index)
        self.point = end
        self._files.handles.unpin(segment)
        self._files.handles.touch(segment)
        return True

    def _note_runs(self, index: SparseIndex) -> None:
        for place in range(len(index)):
            entry = index[place]
            if not entry.is_footer:
                self._note_term(entry.index, entry.term)

    def _note_term(self, index: LogIndex, term: Term) -> None:
        if not self.runs or self.runs[-1][1] != term:
            self.runs.append((index, term))

    def _scan(self, segment: Segment, successor: LogIndex | None) -> None:
        """Walk frames from the last index entry that may be trusted."""
        size = segment.file.size()
        scanner = self._scanner(segment, self._start(segment, size), size)
        while True:
            index = LogIndex(self.point.index + 1)
            if index == successor and self._continues(index):
                self._seal(segment)
                return
            if not self._wanted(index):
                raise Stop(segment.path, segment.end, "the log was cut here")
            self._step(segment, scanner, index, size)

    def _wanted(self, index: LogIndex) -> bool:
        cut, ceiling = self._journal.open_cut, self._ceiling
        return (cut is None or index < cut) and (ceiling is None or index <= ceiling)

    def _continues(self, base: LogIndex) -> bool:
        header = self._known_header(base)
        return header is not None and header.before == self.point

    def _scanner(self, segment: Segment, place: Place, size: int) -> FrameScanner:
        return FrameScanner(self._files.group, segment.file, place, size)

    def _step(self, segment: Segment, scanner: FrameScanner, index: LogIndex, size: int) -> None:
        """Take one frame, from the journal if it has it, else from the segment.

        The journal's frame is written even where the segment reads the same: after a failed sync
        the page cache shows bytes that are on no disk, and only a new write makes them dirty (C1).
        """
        place = scanner.place._replace(before=self.point)
        known = self._journal.frames.get(index)
        if known is None:
            self._take_stored(segment, scanner, place)
            return
        if place.position + len(known) > size:
            raise Stop(segment.path, place.position, "the file ends")
        meta = self._check_known(known, place)
        self._patches.append(Patch(segment, place.position, known))
        self._accept(segment, place, meta, known)
        scanner.place = Place(segment.end, self.point, segment.max_time)

    def _take_stored(self, segment: Segment, scanner: FrameScanner, place: Place) -> None:
        try:
            found = scanner.next()
        except CorruptRecord as error:
            raise Stop(segment.path, place.position, str(error)) from error
        if found is None:
            raise Stop(segment.path, place.position, "the file ends")
        if found[0].at > self._journal.durable:
            self._unsure.setdefault(segment, place.position)
        self._accept(segment, place, *found)

    def _check_known(self, frame: memoryview, place: Place) -> FrameMeta:
        """A frame of the journal must continue the log as any other."""
        try:
            check_frame(self._files.group, frame, previous_chain=self.point.chain)
            return read_meta(frame, self.point.offset)
        except CorruptRecord as error:
            raise Stop("journal", place.position, str(error)) from error

    def _accept(self, segment: Segment, place: Place, meta: FrameMeta, frame: memoryview) -> None:
        interval = self._files.limits.index_interval_bytes
        segment.note_frame(place.position, self.point, meta, interval)
        segment.end = place.position + meta.size
        self._note_frame(meta, frame)

    def _note_frame(self, meta: FrameMeta, frame: memoryview) -> None:
        self.point = meta.after
        self._note_term(meta.at, meta.after.term)
        if meta.kind is FrameKind.LOG_START and meta.at > self._trusted:
            self.log_starts.append((meta.at, read_log_start(frame)))
        if meta.kind is FrameKind.MEMBERSHIP and meta.at > self._trusted:
            self.memberships.append((meta.at, read_payload(frame)))
        if self._ends_trust(meta.after.index):
            self._check_end_of_trust()

    def _ends_trust(self, index: LogIndex) -> bool:
        state = self._state
        return (
            state is not None
            and self._journal.reset is None
            and index == self._trusted == state.durable.index
        )

    def _check_end_of_trust(self) -> None:
        """The checkpoint's chain: older but whole content of a file is found out here (C4)."""
        if self._ends_trust(self.point.index) and self._state is not None:
            want = self._state.durable
            if self.point.chain != want.chain or self.point.offset != want.offset:
                wrong = self.point
                self.point = wrong._replace(index=LogIndex(wrong.index - 1))
                where = self.segments[-1] if self.segments else None
                raise Stop(
                    where.path if where else "", where.end if where else 0, "not what was synced"
                )

    def _start(self, segment: Segment, size: int) -> Place:
        """Where the scan of a segment begins; the index keeps what lies before."""
        index = segment.load_index()
        segment.hold_index(index)
        for count in range(index.count_by_index(LogIndex(self._trusted + 1)), 0, -1):
            entry = index[count - 1]
            if not entry.is_footer and self._verified(segment, entry_place(entry), size):
                index.keep(count - 1)
                return self._enter(segment, entry_place(entry))
        index.keep(0)
        return self._enter(segment, segment_start(segment))

    def _verified(self, segment: Segment, place: Place, size: int) -> bool:
        """The entry belongs to what the file holds now, so everything before it does too."""
        state = self._state
        before = place.before
        if state is not None and self._ends_trust(before.index):
            return before.chain == state.durable.chain and before.offset == state.durable.offset
        try:
            return self._scanner(segment, place, size).next() is not None
        except CorruptRecord:
            return False

    def _enter(self, segment: Segment, place: Place) -> Place:
        """Start at an entry: the term before it is that of the entries before."""
        self._note_runs(segment.index)
        last = segment.index.last
        term = last.term if last else segment.header.before.term
        before = place.before._replace(term=term)
        self.point = before
        segment.grow_from(place.position, place.max_time, self._files.limits.index_interval_bytes)
        if self._ends_trust(before.index):
            self._check_end_of_trust()
        return place._replace(before=before)

    def _seal(self, segment: Segment) -> None:
        """The log goes on in the next file."""
        self._cuts.append(segment)
        self.rebuilt.append(segment)

    def _end(self, stop: Stop) -> None:
        """Decide what the end of the readable log means."""
        run = contiguous(self._journal.frames, self.point.index + 1)
        self.appended = self._follow(run)
        if self.end_index < self._journal.durable:
            self.appended = ()
            index = LogIndex(self.point.index + 1)
            self.damage = Damage(self._files.group, index, stop.file, stop.position, stop.reason)
        else:
            kept = {segment.base_index for segment in self.segments}
            self.extra += [segment_name(base) for base in self._bases if base not in kept]

    def _follow(self, run: Sequence[memoryview]) -> Sequence[memoryview]:
        """As many frames of the journal as continue the log."""
        point = self.point
        for count, frame in enumerate(run):
            try:
                if not self._wanted(LogIndex(point.index + 1)):
                    return run[:count]
                check_frame(self._files.group, frame, previous_chain=point.chain)
                point = read_meta(frame, point.offset).after
            except CorruptRecord:
                return run[:count]
        return run

    @property
    def starts_late(self) -> bool:
        """The log does not hold its first frames any more, so its snapshot is needed."""
        return self.begin.index > 0

    @property
    def begin(self) -> LogPoint:
        """The state before the oldest frame."""
        return self.segments[0].header.before if self.segments else self.point

    @property
    def end_index(self) -> LogIndex:
        """The last index of what was found, the journal's frames included."""
        return LogIndex(self.point.index + len(self.appended))

    # Changing files

    def apply(self, log: PartitionLog) -> list[File]:
        """Carry the decisions out; return index files to be synced. A damaged log is untouched."""
        if self.damage is not None:
            log.open_at(self.segments, self.point, self.runs, self.log_starts, self.memberships)
            log.damage = self.damage
            log.durable_index = self.point.index
            return []
        self._remove_extra(log)
        self._write_unsure(log)
        self._write_patches(log)
        saved = self._reseal()
        self._cut_last(log)
        if not self.segments:
            self._start_anew(log)
        else:
            log.open_at(self.segments, self.point, self.runs, self.log_starts, self.memberships)
        self._append(log)
        for segment in self.rebuilt:
            self._files.handles.unpin(segment)
            self._files.handles.touch(segment)
        return saved

    def _remove_extra(self, log: PartitionLog) -> None:
        disk, directory = self._files.disk, self._files.directory
        for name in self.asides:
            disk.remove(f"{directory}/{name}")
        for name in self.extra:
            disk.remove(f"{directory}/{name}")
            index = f"{directory}/{name.removesuffix('.log')}.index"
            if disk.exists(index):
                disk.remove(index)
            log.dirty.directory = True

    def _write_unsure(self, log: PartitionLog) -> None:
        """Write again what may be in the page cache alone, so that the sync which follows means it.

        After a failed sync such pages count as clean. Where a marker tells of the failure these
        frames were not even accepted; this is for the marker that could not be written.
        """
        for segment in self.segments:
            if segment.base_index > self._trusted:
                segment.file.pwrite(encode_segment_header(segment.header), 0)
                log.dirty.add(segment.file)
        for segment, start in self._unsure.items():
            for position in range(start, segment.end, _COPY_BYTES):
                size = min(_COPY_BYTES, segment.end - position)
                segment.file.pwrite(segment.file.pread(size, position), position)

    def _write_patches(self, log: PartitionLog) -> None:
        """Neighbours go in one write."""
        run: list[Patch] = []
        end: tuple[Segment, int] | None = None
        for patch in self._patches:
            if end != (patch.segment, patch.position):
                _write_run(run)
                run = []
            run.append(patch)
            end = (patch.segment, patch.position + len(patch.data))
            log.dirty.add(patch.segment.file)
        _write_run(run)

    def _reseal(self) -> list[File]:
        """Sum up again the sealed segments that had to be scanned."""
        saved: list[File] = []
        for segment in self.rebuilt:
            successor = self._after(segment)
            if successor is not None and (file := segment.seal(successor.header.before)):
                saved.append(file)
        return saved

    def _after(self, segment: Segment) -> Segment | None:
        place = self.segments.index(segment) + 1
        return self.segments[place] if place < len(self.segments) else None

    def _cut_last(self, log: PartitionLog) -> None:
        for segment in {id(one): one for one in (*self._cuts, *self.segments[-1:])}.values():
            if segment.file.size() > segment.end:
                segment.file.truncate(segment.end)
            log.dirty.add(segment.file)

    def _start_anew(self, log: PartitionLog) -> None:
        log.open_at((), self.point, (), (), ())
        log.write(log.stage_reset(self.point))

    def _append(self, log: PartitionLog) -> None:
        if self.appended:
            frames = [bytes(frame) for frame in self.appended]
            op: FramesOp = log.stage_frames(frames)
            log.write(op)


def _write_run(run: Sequence[Patch]) -> None:
    if run:
        run[0].segment.file.pwritev([patch.data for patch in run], run[0].position)


def _trusted_index(
    state: GroupState | None, journal: GroupReplay, ceiling: LogIndex | None
) -> LogIndex:
    """Frames up to here are those that the checkpoint saw durable.

    A checkpoint whose own sync failed may be readable, and says more than may be believed.
    """
    if journal.reset is not None:
        return journal.reset.index
    if state is None:
        return NO_INDEX
    cut = journal.lowest_cut
    bounds = [state.durable.index]
    if cut is not None:
        bounds.append(LogIndex(cut - 1))
    if ceiling is not None:
        bounds.append(ceiling)
    return min(bounds)


def salvage_frames(files: LogFiles, journal: GroupReplay) -> None:
    """Keep the journal's frames of a damaged group: the journal is about to be reused."""
    if not journal.frames or not files.disk.exists(files.directory):
        return
    first = min(journal.frames)
    path = f"{files.directory}/salvage-{first:020}.frames"
    file = files.disk.open(path, create=True)
    file.truncate(0)
    file.pwritev([bytes(journal.frames[index]) for index in sorted(journal.frames)], 0)
    file.fdatasync()
    files.disk.sync_dir(files.directory)
