"""The sparse index of one segment: index, offset, time, file position and term of some frames.

The idea: an entry describes the frame at its position and everything *before* it: the next offset,
the largest timestamp and the chain so far. So one entry is enough to go on reading from, and a
`footer` entry at the end of a sealed segment sums the segment up. Entries stand at the first frame,
at least every so many bytes, and at each change of term, so `term_at` never scans.

The file is derived data. It is written without a sync while its segment grows, so after a crash
any part may be missing or old. Each entry's CRC is seeded with the CRC before it, so an accepted
run of entries is one that was once written as a whole; its last entry is then checked against the
frame in the segment, whose chain binds everything before it.

Layout, little endian: header of 40 bytes (magic, version, group, base index, compactions, CRC),
then entries of 56 bytes (index, offset, time, position, term, chain before, flags, CRC).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import invariant
from aegis_cluster.wire.crc import crc32c, crc32c_extend

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
    from aegis_cluster.storage.disk import File

INDEX_VERSION: Final = 1
_MAGIC: Final = b"AEGISIDX"
_HEADER: Final = struct.Struct("<8sHHIQQI")
_ENTRY: Final = struct.Struct("<QqqQQ8sI")
_CRC: Final = struct.Struct("<I")
_NUMBER: Final = struct.Struct("<q")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
ENTRY_BYTES: Final = _ENTRY.size + _CRC.size
_INDEX_AT, _OFFSET_AT, _TIME_AT = 0, 8, 16
FOOTER: Final = 1
"""Flag of the entry that ends a sealed segment; no frame stands at its position."""


class IndexEntry(NamedTuple):
    """One frame of a segment, and what lies before it."""

    index: LogIndex  # type: ignore[assignment]
    """Of the frame at `position`; in a footer one above the last."""
    offset: RecordOffset
    """Next offset before this frame."""
    time: int
    """Largest timestamp of the segment's batches before this frame; NO_TIME for none."""
    position: int
    term: Term
    """Of this frame; in a footer of the last frame."""
    chain: bytes
    """Before this frame."""
    flags: int = 0

    @property
    def is_footer(self) -> bool:
        """The segment is sealed and ends here."""
        return bool(self.flags & FOOTER)


class SparseIndex:
    """Packed entries of one segment: 56 bytes each, no objects."""

    def __init__(self, group: GroupId, base_index: LogIndex, compactions: int = 0) -> None:
        """compactions: as in the segment's header; an index of other bytes is none."""
        head = _HEADER.pack(_MAGIC, INDEX_VERSION, 0, 0, group, base_index, compactions)
        self._crc = crc32c(head)
        self._header = head + _CRC.pack(self._crc)
        self._packed = bytearray()
        self._persisted = 0
        """Leading entries that stand in the file as they are here."""
        self._file_entries = 0
        """Entries that may stand in the file at all."""

    def __len__(self) -> int:
        return len(self._packed) // ENTRY_BYTES

    def __getitem__(self, place: int) -> IndexEntry:
        invariant(0 <= place < len(self), "an entry that exists", place=place)
        return IndexEntry._make(_ENTRY.unpack_from(self._packed, place * ENTRY_BYTES))

    @property
    def last(self) -> IndexEntry | None:
        """The newest entry."""
        return self[len(self) - 1] if self._packed else None

    @property
    def sealed(self) -> bool:
        """A footer ends it."""
        return bool(self._packed) and self[len(self) - 1].is_footer

    def add(self, entry: IndexEntry) -> None:
        """Append one entry."""
        invariant(not self.sealed, "nothing follows a footer")
        data = _ENTRY.pack(*entry)
        self._crc = crc32c_extend(self._crc, data)
        self._packed += data + _CRC.pack(self._crc)

    def keep(self, count: int) -> None:
        """Drop all entries but the first `count`."""
        if count >= len(self):
            return
        del self._packed[count * ENTRY_BYTES :]
        end = self._packed[-_CRC.size :] if self._packed else self._header[-_CRC.size :]
        (self._crc,) = _CRC.unpack(end)
        self._persisted = min(self._persisted, count)

    def cut(self, from_index: LogIndex) -> None:
        """Drop the entries of frames at or above `from_index`, and any footer."""
        count = self._count_up_to(_INDEX_AT, from_index - 1)
        if count and self[count - 1].is_footer:
            count -= 1
        self.keep(count)

    def by_index(self, index: LogIndex) -> IndexEntry | None:
        """The last entry of a frame at or below `index`."""
        return self._at(self._count_up_to(_INDEX_AT, index) - 1)

    def by_offset(self, offset: RecordOffset) -> IndexEntry | None:
        """The last entry that has at most `offset` before its frame."""
        return self._at(self._count_up_to(_OFFSET_AT, offset) - 1)

    def before_time(self, time: int) -> IndexEntry | None:
        """The last entry with nothing at or after `time` before its frame."""
        return self._at(self._count_up_to(_TIME_AT, time - 1) - 1)

    def count_by_index(self, index: LogIndex) -> int:
        """How many entries describe frames at or below `index`."""
        return self._count_up_to(_INDEX_AT, index)

    def _at(self, place: int) -> IndexEntry | None:
        if place < 0:
            return None
        entry = self[place]
        return self._at(place - 1) if entry.is_footer else entry

    def _count_up_to(self, field: int, value: int) -> int:
        read, packed = _NUMBER.unpack_from, self._packed

        def number(place: int) -> int:
            return int(read(packed, place * ENTRY_BYTES + field)[0])

        return bisect_right(range(len(self)), value, key=number)

    @property
    def unsaved(self) -> bool:
        """The file does not yet say what this index says."""
        return self._persisted < len(self) or self._file_entries > len(self)

    def save(self, open_file: Callable[[], File]) -> File | None:
        """Bring the file up to date, without a sync; return it if anything was written."""
        if not self.unsaved:
            return None
        file = open_file()
        if self._file_entries > len(self):
            file.truncate(HEADER_BYTES + len(self) * ENTRY_BYTES)
        if self._persisted == 0:
            file.pwrite(self._header + self._packed, 0)
        else:
            start = self._persisted * ENTRY_BYTES
            file.pwrite(bytes(self._packed[start:]), HEADER_BYTES + start)
        self._persisted = self._file_entries = len(self)
        return file


def load_index(
    group: GroupId, base_index: LogIndex, data: bytes, compactions: int = 0
) -> SparseIndex:
    """Accept the longest run of entries that hangs together; nothing is an error here."""
    index = SparseIndex(group, base_index, compactions)
    index._file_entries = max(0, len(data) - HEADER_BYTES + ENTRY_BYTES - 1) // ENTRY_BYTES
    if data[:HEADER_BYTES] != index._header:
        return index
    crc, end = index._crc, HEADER_BYTES
    while end + ENTRY_BYTES <= len(data):
        next_crc = crc32c_extend(crc, data[end : end + _ENTRY.size])
        if data[end + _ENTRY.size : end + ENTRY_BYTES] != _CRC.pack(next_crc):
            break
        crc, end = next_crc, end + ENTRY_BYTES
    index._packed += data[HEADER_BYTES:end]
    index._crc = crc
    index._persisted = len(index)
    return index
