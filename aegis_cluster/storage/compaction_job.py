"""What one pass of compaction is told, and what comes of it, as values that reach another process.

The rule it protects: a pass knows nothing but this; whatever happened to the log meanwhile is
found out when its files are put in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.storage.checked_file import pack_body, shape_of, unpack_body
from aegis_cluster.storage.handles import HandleCache
from aegis_cluster.storage.segment import ASIDE_SUFFIX, Segment, SegmentHeader
from aegis_cluster.storage.types import LogPoint

if TYPE_CHECKING:
    from aegis_cluster.storage.disk import Disk


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """One segment as it stands: its header, the end of its frames and the offset after them."""

    header: SegmentHeader
    end: int
    end_offset: RecordOffset
    closed: bool
    """It may be written anew; others are only looked through for markers."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the streams of an event store do not show any more, by their names."""

    below: dict[str, int]
    """The first version that is shown."""
    before_ms: dict[str, int]
    """When the oldest event that is shown was appended, at the earliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionJob:
    """Everything that one pass needs to know."""

    group: GroupId
    directory: str
    token: str
    """In the names of what it writes aside, so that two passes never write into one file."""
    segments: tuple[SegmentSpec, ...]
    """All of the log's, oldest first, without a gap."""
    committed: LogIndex
    """Frames above are not read."""
    below: RecordOffset
    """Nothing at or above is touched: the last stable offset."""
    clean_to: RecordOffset
    """Records below were compacted among each other."""
    tombstones_before_ms: int | None
    """Null values appended before this time go; None: all stay."""
    tombstones_to: LogIndex
    """And only those that every replica is known to hold, at or below this index."""
    keys_max: int
    index_interval_bytes: int
    room_bytes: int
    """What may be written aside at once; the next pass goes on."""
    hidden: Hidden | None = None
    """Of an event store: these events go, and nothing else does."""

    @property
    def suffix(self) -> str:
        """Of the names of files that are written aside."""
        return f".{self.token}{ASIDE_SUFFIX}"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A segment that was written aside, to be put in place of the one of this base index."""

    header: SegmentHeader
    end: int
    max_time: int
    bytes_before: int
    records_dropped: int

    def aside(self, disk: Disk, job: CompactionJob) -> Segment:
        """The files that were written."""
        segment = Segment(disk, job.directory, self.header, HandleCache(1), suffix=job.suffix)
        segment.end, segment.max_time = self.end, self.max_time
        return segment


@dataclass(frozen=True, slots=True)
class CompactionResult:
    """What one pass has come to."""

    rewritten: tuple[Rewritten, ...]
    clean_to: RecordOffset
    """Where the next pass goes on."""
    keys: int
    oldest_tombstone_ms: int | None = None
    """When the oldest null value that stays for now was appended."""
    has_room: bool = True
    """False: the disk had no room to write aside, and nothing was kept."""


def encode_job(job: CompactionJob) -> bytes:
    """For another process."""
    segments = [
        [_header_values(one.header), one.end, one.end_offset, one.closed] for one in job.segments
    ]
    return pack_body(
        [
            job.group,
            job.directory,
            job.token,
            segments,
            job.committed,
            job.below,
            job.clean_to,
            job.tombstones_before_ms,
            job.tombstones_to,
            job.keys_max,
            job.index_interval_bytes,
            job.room_bytes,
            None if job.hidden is None else [job.hidden.below, job.hidden.before_ms],
        ]
    )


def decode_job(data: bytes) -> CompactionJob:
    """Raises `CorruptLog`."""
    with shape_of("compaction job"):
        group, directory, token, segments, *numbers = unpack_body(data)
        committed, below, clean_to, before_ms, to, keys_max, interval, room, hidden = numbers
        return CompactionJob(
            group=GroupId(group),
            directory=directory,
            token=token,
            segments=tuple(
                SegmentSpec(_header(header), end, RecordOffset(offset), closed)
                for header, end, offset, closed in segments
            ),
            committed=LogIndex(committed),
            below=RecordOffset(below),
            clean_to=RecordOffset(clean_to),
            tombstones_before_ms=before_ms,
            tombstones_to=LogIndex(to),
            keys_max=keys_max,
            index_interval_bytes=interval,
            room_bytes=room,
            hidden=None if hidden is None else Hidden(*hidden),
        )


def encode_result(result: CompactionResult) -> bytes:
    """For the process that asked."""
    rewritten = [
        [_header_values(one.header), one.end, one.max_time, one.bytes_before, one.records_dropped]
        for one in result.rewritten
    ]
    return pack_body(
        [rewritten, result.clean_to, result.keys, result.oldest_tombstone_ms, result.has_room]
    )


def decode_result(data: bytes) -> CompactionResult:
    """Raises `CorruptLog`."""
    with shape_of("compaction result"):
        rewritten, clean_to, keys, tombstone_ms, has_room = unpack_body(data)
        found = tuple(Rewritten(_header(header), *numbers) for header, *numbers in rewritten)
        return CompactionResult(found, RecordOffset(clean_to), keys, tombstone_ms, has_room)


def _header_values(header: SegmentHeader) -> list[Any]:
    return [header.group, list(header.before), header.compactions]


def _header(values: list[Any]) -> SegmentHeader:
    group, (index, term, chain, offset), compactions = values
    before = LogPoint(LogIndex(index), Term(term), chain, RecordOffset(offset))
    return SegmentHeader(GroupId(group), before, compactions)
