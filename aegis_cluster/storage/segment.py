"""One segment: a header, then frames without a gap; and the header's bytes.

The idea: a segment says in its header what came before it (chain, term, next offset), so each file
can be checked and read alone, and a log whose first segments were dropped still knows where it
starts. Layout, little endian, 64 bytes:

    bytes  0..7   magic           b"AEGISSEG"
    bytes  8..9   version         1
    bytes 10..11  flags           0
    bytes 12..15  header size     64
    bytes 16..23  group
    bytes 24..31  base index      index of the first frame; the file's name
    bytes 32..39  base offset     next offset before the first frame
    bytes 40..47  previous term   term of the frame before, 0 for none
    bytes 48..55  chain before
    bytes 56..59  compactions     how often records were taken out; its index says the same
    bytes 60..63  crc             CRC-32C of the 60 bytes before
"""

from __future__ import annotations

import struct
from threading import Lock
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptLog, invariant
from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.storage.sparse_index import FOOTER, IndexEntry, SparseIndex, load_index
from aegis_cluster.storage.types import NO_TIME, LogPoint
from aegis_cluster.wire.crc import crc32c
from aegis_cluster.wire.frame import FRAME_HEADER_BYTES, decode_header

if TYPE_CHECKING:
    from aegis_cluster.storage.disk import Disk, File
    from aegis_cluster.storage.handles import HandleCache
    from aegis_cluster.storage.tail_cache import FrameMeta

SEGMENT_VERSION: Final = 1
_MAGIC: Final = b"AEGISSEG"
_HEADER: Final = struct.Struct("<8sHHIQQqQ8sI")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
LOG_SUFFIX: Final = ".log"
INDEX_SUFFIX: Final = ".index"
ASIDE_SUFFIX: Final = ".compact"
"""Of a file that compaction is still writing."""
_REMOVING: Final = Lock()
"""Held while names are given up: by a checkpoint's thread, or by the loop for a replaced log."""


class SegmentHeader(NamedTuple):
    """Where a segment belongs, and the state of the log before it."""

    group: GroupId
    before: LogPoint
    compactions: int = 0
    """How often the file was written anew by compaction."""

    @property
    def base_index(self) -> LogIndex:
        """Index of the first frame."""
        return LogIndex(self.before.index + 1)


def encode_segment_header(header: SegmentHeader) -> bytes:
    """The first bytes of a segment."""
    before = header.before
    data = _HEADER.pack(
        _MAGIC,
        SEGMENT_VERSION,
        0,
        HEADER_BYTES,
        header.group,
        header.base_index,
        before.offset,
        before.term,
        before.chain,
        header.compactions,
    )
    return data + _CRC.pack(crc32c(data))


def decode_segment_header(data: bytes) -> SegmentHeader:
    """CorruptLog on anything that `encode_segment_header` did not write."""
    if len(data) < HEADER_BYTES:
        raise CorruptLog("too short for a segment header", have=len(data), want=HEADER_BYTES)
    magic, version, flags, size, group, base, offset, term, chain, compactions = (
        _HEADER.unpack_from(data)
    )
    if _CRC.pack(crc32c(data[: _HEADER.size])) != data[_HEADER.size : HEADER_BYTES]:
        raise CorruptLog("segment header checksum")
    if magic != _MAGIC or version != SEGMENT_VERSION or size != HEADER_BYTES or flags:
        raise CorruptLog("unknown segment format", version=version, flags=flags, size=size)
    if base < 1:
        raise CorruptLog("a segment starts at index 1 or above", have=base)
    before = LogPoint(LogIndex(base - 1), Term(term), chain, RecordOffset(offset))
    return SegmentHeader(GroupId(group), before, compactions)


def segment_name(base_index: int) -> str:
    """File name of the segment that starts with this index."""
    return f"{base_index:020}{LOG_SUFFIX}"


def parse_segment_name(name: str) -> LogIndex | None:
    """The base index in a segment's file name, None for other files."""
    digits = name.removesuffix(LOG_SUFFIX)
    is_segment = len(digits) == 20 and name != digits and digits.isdecimal()
    return LogIndex(int(digits)) if is_segment else None


class Segment:
    """One file of a log with its sparse index.

    The last segment of a log grows and keeps its handle and index. Sealed ones may give both up
    and open them again on demand, which is bounded by the shard's `HandleCache`.
    """

    __slots__ = (
        "_file",
        "_first_append_ms",
        "_handles",
        "_index",
        "directory",
        "disk",
        "end",
        "entry_due",
        "forgotten",
        "header",
        "max_time",
        "removed",
        "sealed",
        "settled",
        "suffix",
    )

    def __init__(
        self,
        disk: Disk,
        directory: str,
        header: SegmentHeader,
        handles: HandleCache,
        *,
        suffix: str = "",
    ) -> None:
        """suffix: of both files' names, while they are written aside."""
        self.suffix = suffix
        self.disk = disk
        self.directory = directory
        self.header = header
        self.end = HEADER_BYTES
        """File position after the last whole frame."""
        self.max_time = NO_TIME
        """Largest timestamp of its batches."""
        self.sealed = False
        """Nothing is appended any more; the index ends with a footer."""
        self.settled = False
        """A checkpoint has covered all of it: the journal never writes into it again."""
        self.removed = False
        """Its names are given up."""
        self.forgotten = 0
        """File position up to which the page cache was told to keep nothing."""
        self.entry_due = 0
        """File position from which on the next frame gets an index entry."""
        self._handles = handles
        self._first_append_ms: int | None = None
        self._file: File | None = None
        self._index: SparseIndex | None = None

    @property
    def base_index(self) -> LogIndex:
        """Index of the first frame."""
        return self.header.base_index

    @property
    def path(self) -> str:
        """Of the segment's file."""
        return f"{self.directory}/{segment_name(self.base_index)}{self.suffix}"

    @property
    def index_path(self) -> str:
        """Of the sparse index's file."""
        return f"{self.directory}/{self.base_index:020}{INDEX_SUFFIX}{self.suffix}"

    @property
    def handle(self) -> File | None:
        """The handle, if it is at hand."""
        return self._file

    @property
    def file(self) -> File:
        """The handle, opened when it is not at hand."""
        found = self._file
        if found is None:
            found = self._file = self.disk.open(self.path)
            self._handles.touch(self)
        return found

    @property
    def index(self) -> SparseIndex:
        """The sparse index, read when it is not at hand."""
        found = self._index
        if found is None:
            found = self._index = self.load_index()
            self._handles.touch(self)
        return found

    def first_append_ms(self) -> int:
        """When its first frame was appended, by the clock of its leader; 0 while it is empty.

        Reads the file at the first call. CorruptRecord where there is no frame's header.
        """
        if self._first_append_ms is None and self.end > HEADER_BYTES:
            head = self.file.pread(FRAME_HEADER_BYTES, HEADER_BYTES)
            self._first_append_ms = decode_header(head).time_ms
        return self._first_append_ms or 0

    def load_index(self) -> SparseIndex:
        """What the index's file says, as far as it hangs together; less of it only means longer
        walks.
        """
        try:
            file = self.disk.open(self.index_path)
        except FileNotFoundError:
            return self._new_index()
        data = file.pread(file.size(), 0)
        return load_index(self.header.group, self.base_index, data, self.header.compactions)

    def _new_index(self) -> SparseIndex:
        return SparseIndex(self.header.group, self.base_index, self.header.compactions)

    def create(self) -> None:
        """Write the header into a new file; nothing is synced."""
        self.removed = False
        self._file = self.disk.open(self.path, create=True)
        self._file.truncate(0)
        self._file.pwrite(encode_segment_header(self.header), 0)
        self._index = self._new_index()

    def hold_index(self, index: SparseIndex) -> None:
        """Take an index that was rebuilt."""
        self._index = index

    def note_frame(self, position: int, before: LogPoint, meta: FrameMeta, interval: int) -> None:
        """Give a frame at the end an index entry where one is due, and note its time."""
        term = meta.after.term
        if position >= self.entry_due or term != before.term:
            self.index.add(
                IndexEntry(meta.at, before.offset, self.max_time, position, term, before.chain)
            )
            self.entry_due = position + interval
        if meta.time is not None and meta.time > self.max_time:
            self.max_time = meta.time

    def grow_from(self, position: int, max_time: int, interval: int) -> None:
        """The segment ends here for now, and its index knows nothing above; it may grow."""
        last = self.index.last
        self.end = position
        self.max_time = max_time
        self.sealed = False
        self._first_append_ms = None
        self.entry_due = last.position + interval if last else 0

    def save_index(self) -> File | None:
        """Write what the index's file lacks, unsynced; return the file if there was anything."""
        return self.index.save(lambda: self.disk.open(self.index_path, create=True))

    def seal(self, end: LogPoint) -> File | None:
        """Close the segment for appends: the footer sums it up, so it is never scanned again."""
        self.index.add(
            IndexEntry(
                LogIndex(end.index + 1),
                end.offset,
                self.max_time,
                self.end,
                end.term,
                end.chain,
                flags=FOOTER,
            )
        )
        self.sealed = True
        return self.save_index()

    def release(self) -> None:
        """Give up handle and index; both come back on demand. Only for sealed segments."""
        invariant(self.sealed, "a growing segment keeps its handle")
        self._file = None
        self._index = None

    def let_go(self) -> None:
        """Give up handle and index for good: the group is removed. Readers that hold the handle go
        on reading."""
        self._file = None
        self._index = None

    def remove(self) -> None:
        """Unlink both files, once; readers that hold the handle go on reading.

        A log that was replaced may have a new segment of this name: it is not this one's to unlink.
        """
        with _REMOVING:
            if not self.removed:
                self.removed = True
                for path in (self.path, self.index_path):
                    if self.disk.exists(path):
                        self.disk.remove(path)
        self._file = None
