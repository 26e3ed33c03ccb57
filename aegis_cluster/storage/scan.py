"""Walk frames in a segment's file, proving each one.

The idea: a walk starts at a point whose state is known (a segment's header or an index entry) and
moves frame by frame, checking CRC, batch, chain, index and offset, so whatever it returns is what
this log once appended there. It reads in windows, never a whole file at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.limits import MIB
from aegis_cluster.storage.segment import HEADER_BYTES
from aegis_cluster.storage.tail_cache import FrameMeta, read_meta
from aegis_cluster.storage.types import NO_TIME, LogPoint
from aegis_cluster.wire.frame import FRAME_HEADER_BYTES, check_frame, decode_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.disk import File
    from aegis_cluster.storage.segment import Segment
    from aegis_cluster.storage.sparse_index import IndexEntry

_WINDOW_BYTES: Final = 1 * MIB


class Place(NamedTuple):
    """A position between two frames of a segment, with the state of the log there."""

    position: int
    before: LogPoint
    max_time: int
    """Largest timestamp of the segment's batches before this position."""


def segment_start(segment: Segment) -> Place:
    """The place of a segment's first frame."""
    return Place(HEADER_BYTES, segment.header.before, NO_TIME)


def entry_place(entry: IndexEntry) -> Place:
    """The place of an entry's frame. The term before it is not known to it, nor needed."""
    before = LogPoint(type(entry.index)(entry.index - 1), entry.term, entry.chain, entry.offset)
    return Place(entry.position, before, entry.time)


def advance(place: Place, meta: FrameMeta) -> Place:
    """The place after a frame."""
    time = place.max_time if meta.time is None else max(place.max_time, meta.time)
    return Place(place.position + meta.size, meta.after, time)


class Window:
    """The bytes of a file around a position that only moves forward."""

    def __init__(self, file: File, end: int) -> None:
        self._file = file
        self._end = end
        self._start = 0
        self.data = b""

    def at(self, position: int, size: int) -> int:
        """Make `size` bytes at `position` available in `data`; return where they start there.

        Fewer are there only where the file ends.
        """
        if position < self._start or position + size > self._start + len(self.data):
            wanted = min(max(size, _WINDOW_BYTES), self._end - position)
            self.data = self._file.pread(max(0, wanted), position)
            self._start = position
        return position - self._start


class FrameScanner:
    """Frames of one file from a place on, each one proved."""

    def __init__(self, group: GroupId, file: File, place: Place, end: int) -> None:
        self.place = place
        """Just after the last frame that was returned."""
        self._group = group
        self._window = Window(file, end)
        self._end = end

    def next(self) -> tuple[FrameMeta, memoryview] | None:
        """The next frame, None at the end; CorruptRecord where the bytes are not such a frame."""
        if self.place.position >= self._end:
            return None
        position, before = self.place.position, self.place.before
        start = self._window.at(position, FRAME_HEADER_BYTES)
        size = decode_header(self._window.data, start).size
        start = self._window.at(position, size)
        data = self._window.data
        header = check_frame(self._group, data, start, previous_chain=before.chain)
        if header.index != before.index + 1:
            raise CorruptRecord("frame index", have=header.index, want=before.index + 1)
        meta = read_meta(data, before.offset, start)
        self.place = advance(self.place, meta)
        return meta, memoryview(data)[start : start + size]

    def __iter__(self) -> Iterator[tuple[Place, FrameMeta]]:
        """Each frame with the place before it."""
        place = self.place
        while found := self.next():
            yield place, found[0]
            place = self.place
