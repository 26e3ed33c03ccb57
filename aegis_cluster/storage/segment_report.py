"""What one segment's file holds, for people and tools: everything is read, nothing is changed.

The idea: recovery decides what counts and mends it; the reports read the same files and only say
what they find, damaged or not, frame by frame where asked. They work on a directory that no node
uses; of one in use they give a picture that may be a moment old at its end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import CorruptLog
from aegis_cluster.storage.frame_walk import Gap, Good, walk
from aegis_cluster.storage.read_only import ReadOnlyDisk
from aegis_cluster.storage.segment import (
    HEADER_BYTES,
    INDEX_SUFFIX,
    LOG_SUFFIX,
    SegmentHeader,
    decode_segment_header,
    parse_segment_name,
)
from aegis_cluster.storage.sparse_index import ENTRY_BYTES, load_index
from aegis_cluster.wire.frame import FRAME_HEADER_BYTES, FrameHeader, FrameKind
from aegis_cluster.wire.layout import BatchHeader, batch_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.ids import GroupId

DISK: Final = ReadOnlyDisk()


class SeenFrame(NamedTuple):
    """One good frame of a segment."""

    position: int
    header: FrameHeader
    batch: BatchHeader | None
    """Of a data frame."""

    def describe(self) -> dict[str, Any]:
        """For people and scripts."""
        header, batch = self.header, self.batch
        told: dict[str, Any] = {
            "position": self.position,
            "bytes": header.size,
            "index": header.index,
            "term": header.term,
            "kind": header.kind.name.lower(),
            "time_ms": header.time_ms,
        }
        if header.is_rewritten:
            told["rewritten"] = True
        if batch is not None:
            told |= {
                "base_offset": batch.base_offset,
                "records": batch.count,
                "max_timestamp_ms": batch.max_timestamp,
                "codec": batch.codec,
                "producer_id": batch.producer_id,
                "producer_epoch": batch.producer_epoch,
                "base_sequence": batch.base_sequence,
            }
        return told


class Problem(NamedTuple):
    """Bytes of a file that are not what they should be."""

    position: int
    bytes: int
    reason: str
    after_index: int
    """Of the last good frame before them."""


@dataclass(slots=True)
class SegmentReport:
    """One segment's file and its sparse index. Times are milliseconds since 1970."""

    file: str
    bytes: int
    frames: int = 0
    records: int = 0
    first_index: int | None = None
    last_index: int | None = None
    base_offset: int | None = None
    end_offset: int | None = None
    terms: list[int] = field(default_factory=list)
    first_time_ms: int | None = None
    last_time_ms: int | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    compactions: int = 0
    """How often records were taken out of it."""
    rewritten: int = 0
    """Frames whose batch has lost records that way."""
    problems: list[Problem] = field(default_factory=list)
    leftover_bytes: int = 0
    """Whole frames behind the end, from before a truncation."""
    index: dict[str, Any] = field(default_factory=dict)
    listed: list[dict[str, Any]] | None = None

    def note(self, seen: SeenFrame) -> None:
        """Count one frame of the log."""
        header, batch = seen.header, seen.batch
        self.frames += 1
        self.rewritten += header.is_rewritten
        self.first_index = header.index if self.first_index is None else self.first_index
        self.last_index = header.index
        if header.term not in self.terms[-1:]:
            self.terms.append(header.term)
        self.first_time_ms = header.time_ms if self.first_time_ms is None else self.first_time_ms
        self.last_time_ms = header.time_ms
        kind = header.kind.name.lower()
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if batch is not None:
            self.records += batch.count
            self.end_offset = batch.base_offset + batch.last_offset_delta + 1
        if self.listed is not None:
            self.listed.append(seen.describe())


class Segment(NamedTuple):
    """A segment's file, read."""

    path: str
    header: SegmentHeader | None
    """None where it fails its check."""
    group: GroupId
    data: bytes


def read_segment(path: str, group: GroupId | None) -> Segment:
    """Read a segment. group: of the log it should belong to; None: what its header says.

    Raises `CorruptLog` where neither is known, `OSError`.
    """
    file = DISK.open(path)
    data = file.pread(file.size(), 0)
    header: SegmentHeader | None
    try:
        header = decode_segment_header(data)
    except CorruptLog:
        if group is None:
            raise
        return Segment(path, None, group, data)
    return Segment(path, header, header.group if group is None else group, data)


def frames_of(segment: Segment) -> Iterator[SeenFrame | Problem | int]:
    """Frames that belong to the log, problems between them, and at last the bytes of leftovers.

    A frame whose chain does not go on from the one just before it, without damage in between, is
    left over from before a truncation; so is everything behind it.
    """
    header, data = segment.header, segment.data
    if header is None:
        size = min(HEADER_BYTES, len(data))
        base = parse_segment_name(os.path.basename(segment.path)) or 1
        yield Problem(0, size, "the segment's header fails its check", base - 1)
    elif header.group != segment.group:
        yield Problem(0, HEADER_BYTES, f"the segment belongs to group {header.group}", 0)
    chain = header.before.chain if header is not None else None
    last_index = header.before.index if header is not None else 0
    last_term = header.before.term if header is not None else 0
    after_gap = header is None
    for found in walk(segment.group, data, HEADER_BYTES, chain):
        match found:
            case Gap(position, end, reason):
                yield Problem(position, end - position, reason, last_index)
                after_gap = True
            case Good(position, frame, continues):
                newer = frame.index > last_index and frame.term >= last_term
                if not newer or not (continues or after_gap):
                    yield len(data) - position
                    return
                last_index, last_term, after_gap = frame.index, frame.term, False
                yield SeenFrame(position, frame, _batch_of(frame, data, position))


def _batch_of(frame: FrameHeader, data: bytes, position: int) -> BatchHeader | None:
    if frame.kind is not FrameKind.DATA:
        return None
    return batch_header(data, position + FRAME_HEADER_BYTES + frame.annotation_size)


def inspect_segment(
    path: str, group: GroupId | None = None, *, frames: bool = False
) -> SegmentReport:
    """One segment and its index. frames: list each frame too. Raises `CorruptLog`, `OSError`."""
    segment = read_segment(path, group)
    report = SegmentReport(os.path.basename(path), len(segment.data), listed=[] if frames else None)
    if segment.header is not None:
        report.compactions = segment.header.compactions
        report.base_offset = report.end_offset = segment.header.before.offset
    for found in frames_of(segment):
        if isinstance(found, SeenFrame):
            report.note(found)
        elif isinstance(found, Problem):
            report.problems.append(found)
        else:
            report.leftover_bytes = found
    report.index = _inspect_index(path, segment, report)
    return report


def _inspect_index(path: str, segment: Segment, report: SegmentReport) -> dict[str, Any]:
    """The sparse index: derived data, so whatever is wrong with it costs nothing but time."""
    base = parse_segment_name(os.path.basename(path))
    index_path = path.removesuffix(LOG_SUFFIX) + INDEX_SUFFIX
    if base is None or not os.path.exists(index_path):
        return {"state": "missing", "entries": 0}
    file = DISK.open(index_path)
    data = file.pread(file.size(), 0)
    compactions = segment.header.compactions if segment.header is not None else 0
    index = load_index(segment.group, base, data, compactions)
    state = "ok" if len(data) - len(index) * ENTRY_BYTES < 2 * ENTRY_BYTES else "damaged"
    last = index.last
    if last is not None and last.position > report.bytes:
        state = "damaged"
    return {"state": state if data else "empty", "entries": len(index), "sealed": index.sealed}
