"""Compaction: closed segments are written anew with the latest record of each key alone.

The idea: every frame stays where it is, with its index, its term, its offsets and its place in the
chain; only its batch loses records, all of them at worst. So nothing that counts frames or offsets
(Raft, recovery, followers, readers) meets a gap, and a follower that lags behind gets what is left,
frame by frame, like everything else. One pass reads the closed segments twice: first to learn the
last offset of each key (by hash, up to a bound; the next pass goes on from there), then to write
those that lose anything aside. Putting them in place is the log's own doing (`put_compacted`).

The rules it protects: an offset never changes; a record is dropped only if a later one with its
key is kept, its transaction was aborted, or it is a tombstone whose time has passed and behind
which nothing older is left; transaction markers, records without a key and whatever does not
decode stay; a transaction that is still open, and everything after its begin, is left alone.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import Corruption, CorruptRecord
from aegis_cluster.ids import LogIndex, RecordOffset
from aegis_cluster.limits import MIB
from aegis_cluster.storage.compaction_job import (
    CompactionJob,
    CompactionResult,
    Rewritten,
    SegmentSpec,
)
from aegis_cluster.storage.compaction_rules import Outcomes
from aegis_cluster.storage.handles import HandleCache
from aegis_cluster.storage.scan import FrameScanner, segment_start
from aegis_cluster.storage.scavenging import Scavenging
from aegis_cluster.storage.segment import (
    HEADER_BYTES,
    Segment,
    SegmentHeader,
)
from aegis_cluster.storage.tail_cache import read_meta
from aegis_cluster.wire.batch import decode_batch, decode_columns
from aegis_cluster.wire.frame import (
    FrameKind,
    decode_header,
    frame_annotation,
    frame_payload,
    rewrite_frame,
)
from aegis_cluster.wire.layout import batch_header
from aegis_cluster.wire.markers import decode_marker
from aegis_cluster.wire.rewrite import check_kept, with_records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.storage.compaction_rules import Rule
    from aegis_cluster.storage.disk import Disk
    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import BatchHeader, Bytes
    from aegis_cluster.wire.records import Record

WRITE_BYTES: Final = 1 * MIB
_HASH_BYTES: Final = 16


def segments_of(log: PartitionLog, committed: LogIndex) -> tuple[SegmentSpec, ...]:
    """The files of a log as a job describes them. committed: the last index that is, here."""
    specs: list[SegmentSpec] = []
    closed = True
    for segment, following in pairwise(log.segments):
        before = following.header.before
        closed = closed and segment.settled and before.index <= committed
        specs.append(SegmentSpec(segment.header, segment.end, before.offset, closed))
    last = log.segments[-1]
    specs.append(SegmentSpec(last.header, last.end, log.written.offset, closed=False))
    return tuple(specs)


def compact(disk: Disk, job: CompactionJob) -> CompactionResult:
    """One pass. Blocks. Raises `CorruptRecord` where stored frames fail their check, `OSError`."""
    decided = read_outcomes(disk, job)
    limit = job.below if decided.open_from is None else min(job.below, decided.open_from)
    rule = _rule(disk, job, decided, RecordOffset(limit))
    rewritten: list[Rewritten] = []
    end, used = rule.end, 0
    try:
        for spec in job.segments:
            if not spec.closed or spec.header.before.offset >= end or spec.end_offset > limit:
                break
            if used + spec.end > job.room_bytes:
                end = spec.header.before.offset  # the rest is the next pass's
                break
            found = _rewrite(disk, job, spec, rule)
            if found is not None:
                rewritten.append(found)
                used += found.end
    except (OSError, Corruption) as error:
        discard(disk, job)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return CompactionResult((), job.clean_to, rule.keys, has_room=False)
    if end < rule.end and end <= job.clean_to:  # no further than an earlier pass came
        discard(disk, job)
        return CompactionResult((), job.clean_to, rule.keys, has_room=False)
    return CompactionResult(
        tuple(rewritten), end, rule.keys, oldest_tombstone_ms=rule.oldest_tombstone_ms
    )


def _rule(disk: Disk, job: CompactionJob, decided: Outcomes, limit: RecordOffset) -> Rule:
    if job.hidden is not None:
        return Scavenging(job.hidden, decided, _end_of_closed(job, limit))
    return _Compacting(job, decided, _latest(disk, job, decided, limit))


def _end_of_closed(job: CompactionJob, limit: RecordOffset) -> RecordOffset:
    ends = [spec.end_offset for spec in job.segments if spec.closed and spec.end_offset <= limit]
    return max(ends, default=job.clean_to)


def discard(disk: Disk, job: CompactionJob) -> None:
    """Remove what a pass has written aside and what is not in its place."""
    for spec in job.segments:
        aside = Segment(disk, job.directory, spec.header, HandleCache(1), suffix=job.suffix)
        with suppress(OSError):
            aside.remove()


# What became of transactions


def read_outcomes(disk: Disk, job: CompactionJob) -> Outcomes:
    """Read the markers; they may stand behind the segments that are compacted."""
    found = Outcomes()
    open_: dict[int, int] = {}
    for spec in job.segments:
        for _, header, frame in _frames(disk, job, spec):
            if header.kind is not FrameKind.DATA:
                continue
            payload = frame_payload(frame, header)
            batch = batch_header(payload)
            if batch.is_control:
                first = open_.pop(batch.producer_id, None)
                if first is not None and not decode_marker(payload).committed:
                    found.aborted[batch.producer_id].append((first, batch.base_offset))
            elif batch.is_transactional:
                open_.setdefault(batch.producer_id, batch.base_offset)
    found.open_from = min(open_.values(), default=None)
    return found


# The latest offset of each key


@dataclass(slots=True)
class _Latest:
    offsets: dict[bytes, int]
    end: RecordOffset
    """The offsets are those among the records below."""
    oldest_tombstone_ms: int | None = None
    """When the oldest null value that stays for now was appended."""
    keeps_tombstones: bool = False
    """Something could not be looked into: an older value may be hidden there."""


def _hash(key: bytes) -> bytes:
    return blake2b(key, digest_size=_HASH_BYTES).digest()


def _latest(disk: Disk, job: CompactionJob, decided: Outcomes, limit: RecordOffset) -> _Latest:
    """Last offsets from where the last pass ended, as far as the bound on keys allows."""
    found = _Latest({}, job.clean_to)
    for spec in job.segments:
        if not spec.closed or spec.end_offset > limit:
            break
        if spec.end_offset <= job.clean_to:
            continue
        for _, header, frame in _frames(disk, job, spec):
            if header.kind is not FrameKind.DATA:
                continue
            payload = frame_payload(frame, header)
            batch = batch_header(payload)
            if batch.base_offset < job.clean_to:
                continue
            if len(found.offsets) >= job.keys_max:
                return found
            if not (batch.is_control or batch.count == 0 or decided.is_aborted(batch)):
                _note_keys(found, payload)
            found.end = RecordOffset(batch.base_offset + batch.last_offset_delta + 1)
        found.end = max(found.end, spec.end_offset)
    return found


def _note_keys(found: _Latest, payload: memoryview) -> None:
    try:
        columns = decode_columns(payload)
    except CorruptRecord:
        found.keeps_tombstones = True
        return
    for key, offset in zip(columns.keys, columns.offsets, strict=True):
        if key is not None:
            found.offsets[_hash(key)] = offset


# Writing aside


def _rewrite(disk: Disk, job: CompactionJob, spec: SegmentSpec, rule: Rule) -> Rewritten | None:
    """Write the segment without what is obsolete; None, and nothing written, if nothing is."""
    writer: _Writer | None = None
    for position, header, frame in _frames(disk, job, spec):
        changed = _without_obsolete(job, header, frame, rule)
        if changed is None:
            if writer is not None:
                writer.add(bytes(frame))
            continue
        if writer is None:
            writer = _Writer(disk, job, spec)
            writer.copy_before(position)
        writer.add(changed[0])
        writer.dropped += changed[1]
    return writer.finish() if writer is not None else None


def _without_obsolete(
    job: CompactionJob, header: FrameHeader, frame: memoryview, rule: Rule
) -> tuple[bytes, int] | None:
    """The frame without records that nobody needs, and how many went; None: it stays as it is."""
    if header.kind is not FrameKind.DATA:
        return None
    payload = frame_payload(frame, header)
    batch = batch_header(payload)
    if batch.is_control or batch.count == 0 or batch.base_offset >= rule.end:
        return None
    try:
        records = decode_batch(payload)
    except CorruptRecord:
        rule.cannot_read()
        return None
    kept = rule.kept(header, batch, records, frame_annotation(frame, header))
    if len(kept) == len(records):
        return None
    before = bytes(payload)
    after = with_records(before, kept)
    if after is None:
        rule.cannot_read()
        return None
    check_kept(before, after)
    return rewrite_frame(job.group, bytes(frame), after), len(records) - len(kept)


@dataclass(slots=True)
class _Compacting:
    """The latest record of each key stays; see the module's first lines."""

    _job: CompactionJob
    _decided: Outcomes
    _latest: _Latest

    @property
    def end(self) -> RecordOffset:
        return self._latest.end

    @property
    def keys(self) -> int:
        return len(self._latest.offsets)

    @property
    def oldest_tombstone_ms(self) -> int | None:
        return self._latest.oldest_tombstone_ms

    def cannot_read(self) -> None:
        self._latest.keeps_tombstones = True

    def kept(
        self, header: FrameHeader, batch: BatchHeader, records: list[Record], _: Bytes
    ) -> list[Record]:
        if self._decided.is_aborted(batch):
            return []
        job, latest = self._job, self._latest
        drops_tombstones = (
            job.tombstones_before_ms is not None
            and not latest.keeps_tombstones
            and header.time_ms < job.tombstones_before_ms
            and header.index <= job.tombstones_to
        )
        kept = [
            one for one in records if _is_needed(one, latest, drops_tombstones=drops_tombstones)
        ]
        if any(one.value is None and one.key is not None for one in kept):
            known, time_ms = latest.oldest_tombstone_ms, header.time_ms
            latest.oldest_tombstone_ms = time_ms if known is None else min(known, time_ms)
        return kept


def _is_needed(record: Record, latest: _Latest, *, drops_tombstones: bool) -> bool:
    if record.key is None or record.offset >= latest.end:
        return True
    last = latest.offsets.get(_hash(record.key))
    if last is not None and last > record.offset:
        return False
    return not (drops_tombstones and record.value is None)


class _Writer:
    """One segment's file and index, written aside."""

    def __init__(self, disk: Disk, job: CompactionJob, spec: SegmentSpec) -> None:
        before = spec.header
        header = SegmentHeader(before.group, before.before, before.compactions + 1)
        self.dropped = 0
        self._spec = spec
        self._interval = job.index_interval_bytes
        self._point = before.before
        self._segment = Segment(disk, job.directory, header, HandleCache(1), suffix=job.suffix)
        self._segment.remove()  # what an earlier pass may have left
        self._segment.create()
        self._waiting: list[bytes] = []
        self._written = HEADER_BYTES

    def copy_before(self, position: int) -> None:
        """Take over the frames in front of the first that changes."""
        source = Segment(
            self._segment.disk, self._segment.directory, self._spec.header, HandleCache(1)
        )
        scanner = FrameScanner(
            self._spec.header.group, source.file, segment_start(source), position
        )
        while found := scanner.next():
            self.add(bytes(found[1]))

    def add(self, frame: bytes) -> None:
        segment = self._segment
        meta = read_meta(frame, self._point.offset)
        segment.note_frame(segment.end, self._point, meta, self._interval)
        self._waiting.append(frame)
        segment.end += meta.size
        self._point = meta.after
        if segment.end - self._written >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._segment.file.pwritev(self._waiting, self._written)
        self._waiting = []
        self._written = self._segment.end

    def finish(self) -> Rewritten:
        """Durable when it returns."""
        segment = self._segment
        self._flush()
        index = segment.seal(self._point)
        segment.file.fdatasync()
        if index is not None:
            index.fdatasync()
        return Rewritten(
            segment.header, segment.end, segment.max_time, self._spec.end, self.dropped
        )


def _frames(
    disk: Disk, job: CompactionJob, spec: SegmentSpec
) -> Iterator[tuple[int, FrameHeader, memoryview]]:
    """Committed frames of one segment, each proved."""
    segment = Segment(disk, job.directory, spec.header, HandleCache(1))
    scanner = FrameScanner(job.group, segment.file, segment_start(segment), spec.end)
    while True:
        position = scanner.place.position
        found = scanner.next()
        if found is None or found[0].at > job.committed:
            return
        yield position, decode_header(found[1]), found[1]
