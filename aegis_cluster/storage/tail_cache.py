"""The newest frames of every log of a shard, kept in memory under one budget.

The idea: followers, consumers and the leader's own fold nearly always read what was written a
moment ago. Frames of all logs stand in one queue by age; over budget, the oldest goes. A frame
that is not yet in its segment is pinned: memory is then its only readable copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import NO_INDEX, LogIndex, RecordOffset
from aegis_cluster.storage.types import LogPoint, ReadResult
from aegis_cluster.wire.frame import FRAME_HEADER_BYTES, FrameKind, decode_header
from aegis_cluster.wire.layout import batch_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import Bytes

FRAME_OVERHEAD_BYTES: Final = 400
"""What Python keeps beside the bytes of one cached frame."""
_COMPACT_AT: Final = 1_024


class FrameMeta(NamedTuple):
    """What storage knows of one frame: the log's state after it, its size and time."""

    after: LogPoint
    size: int
    time: int | None
    """Largest timestamp of its batch; None for frames that take no offset."""
    kind: FrameKind
    appended_ms: int
    """By the clock of the leader that appended it."""

    @property
    def at(self) -> LogIndex:
        """The frame's index."""
        return self.after.index


def read_meta(
    frame: Bytes, offset: RecordOffset, position: int = 0, header: FrameHeader | None = None
) -> FrameMeta:
    """Describe the frame at `position`; `offset` is the next one before it. header: the frame's,
    where it was read already.

    CorruptRecord where the batch's offsets do not continue there: offsets are dense.
    """
    if header is None:
        header = decode_header(frame, position)
    time = None
    if header.kind is FrameKind.DATA:
        batch = batch_header(frame, position + FRAME_HEADER_BYTES + header.annotation_size)
        if batch.base_offset != offset or batch.last_offset_delta < 0:
            raise CorruptRecord(
                "batch offset", index=header.index, have=batch.base_offset, want=offset
            )
        offset = RecordOffset(offset + batch.last_offset_delta + 1)
        time = batch.max_timestamp
    after = LogPoint(header.index, header.term, header.chain, offset)
    return FrameMeta(after, header.size, time, header.kind, header.time_ms)


class Tail:
    """The cached end of one log, contiguous up to its last index.

    Frames that were pushed out leave b"" behind until the lists are compacted, so eviction costs
    nothing per frame that stays.
    """

    __slots__ = ("_first", "_frames", "_head", "_metas", "pinned_above")

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._metas: list[FrameMeta] = []
        self._head = 0
        self._first = NO_INDEX
        """Index of the frame in slot 0."""
        self.pinned_above = NO_INDEX
        """Frames above this index are not in their segment yet."""

    @property
    def first(self) -> LogIndex:
        """Index of the oldest cached frame; one above the last where there is none."""
        return LogIndex(self._first + self._head)

    @property
    def last(self) -> LogIndex:
        """Index of the newest cached frame."""
        return LogIndex(self._first + len(self._frames) - 1)

    def __len__(self) -> int:
        return len(self._frames) - self._head

    def extend(self, frames: Sequence[bytes], metas: Sequence[FrameMeta]) -> None:
        """Add frames that follow the last one."""
        if not self._frames:
            self._first = metas[0].at
        self._frames += frames
        self._metas += metas

    def cut(self, from_index: LogIndex) -> list[int]:
        """Forget the frames at or above `from_index`; return the cost of each."""
        keep = max(self._head, from_index - self._first) if self._frames else 0
        freed = [_cost(frame) for frame in self._frames[keep:]]
        del self._frames[keep:]
        del self._metas[keep:]
        if self._head >= len(self._frames):
            self._clear()
        return freed

    def _clear(self) -> None:
        self._frames.clear()
        self._metas.clear()
        self._head = 0

    def drop_oldest(self) -> int:
        """Push the oldest frame out; return the bytes that this freed."""
        head = self._head
        freed = _cost(self._frames[head])
        self._frames[head] = b""
        self._head = head + 1
        if self._head == len(self._frames):
            self._clear()
        elif self._head >= _COMPACT_AT and self._head * 2 >= len(self._frames):
            self._compact()
        return freed

    def _compact(self) -> None:
        head = self._head
        self._frames = self._frames[head:]
        self._metas = self._metas[head:]
        self._first = LogIndex(self._first + head)
        self._head = 0

    def meta(self, index: LogIndex) -> FrameMeta | None:
        """What is known of a frame. Judged by what is found, as in `read`."""
        metas, place = self._metas, index - self._first
        if not 0 <= place < len(metas):
            return None
        meta = metas[place]
        return meta if meta.at == index else None

    def by_offset(self, offset: RecordOffset) -> FrameMeta | None:
        """The frame that holds `offset`, if that is sure to be a cached one.

        The oldest cached frame is left out: what lies before it is not known here.
        """
        if not self._frames or offset < self._metas[self._head].after.offset:
            return None
        place = bisect_right(self._metas, offset, lo=self._head, key=_end_offset)
        return self._metas[place] if place < len(self._metas) else None

    def read(self, first: LogIndex, last: LogIndex, bytes_max: int) -> ReadResult | None:
        """Frames from `first` on, or None where it is not cached.

        A helper thread may call this while the loop evicts, so the result is judged by the bytes
        that were found and not by the counters.
        """
        start = first - self._first
        frames = self._frames[start : last - self._first + 1] if start >= 0 else []
        taken, size = 0, 0
        for frame in frames:
            size += len(frame)
            if not frame or (taken and size > bytes_max):
                break
            taken += 1
        if taken == 0 or decode_header(frames[0]).index != first:
            return None
        data = frames[0] if taken == 1 else b"".join(frames[:taken])
        return ReadResult(data, first, LogIndex(first + taken - 1))


def _cost(frame: bytes) -> int:
    return len(frame) + FRAME_OVERHEAD_BYTES if frame else 0


def _end_offset(meta: FrameMeta) -> RecordOffset:
    return meta.after.offset


class TailCache:
    """The budget that all tails of a shard share."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._by_age: deque[Tail] = deque()
        """One token per frame in order of arrival; a truncated frame leaves its token behind."""
        self._stale_tokens = 0

    @property
    def size_bytes(self) -> int:
        """Bytes cached now, overhead included."""
        return self._bytes

    def extend(self, tail: Tail, frames: Sequence[bytes], metas: Sequence[FrameMeta]) -> None:
        """Add frames to one tail. The budget is enforced by `trim`, once they are written."""
        tail.extend(frames, metas)
        self._bytes += sum(map(_cost, frames))
        self._by_age.extend([tail] * len(frames))

    def cut(self, tail: Tail, from_index: LogIndex) -> None:
        """Forget the frames of one tail at or above `from_index`."""
        freed = tail.cut(from_index)
        self._bytes -= sum(freed)
        self._note_stale(len(freed))

    def drop_upto(self, tail: Tail, index: LogIndex) -> None:
        """Forget the frames of one tail at or below `index`: their segment says something else."""
        dropped = 0
        while len(tail) and tail.first <= min(index, tail.pinned_above):
            self._bytes -= tail.drop_oldest()
            dropped += 1
        self._note_stale(dropped)

    def _note_stale(self, count: int) -> None:
        self._stale_tokens += count
        if self._stale_tokens > _COMPACT_AT and self._stale_tokens * 2 > len(self._by_age):
            self._drop_stale_tokens()

    def _drop_stale_tokens(self) -> None:
        """Keep as many tokens as there are frames; a log's oldest tokens stand for its frames."""
        left: dict[int, int] = {}
        kept: deque[Tail] = deque()
        for tail in self._by_age:
            rest = left.get(id(tail), len(tail))
            if rest:
                kept.append(tail)
            left[id(tail)] = max(0, rest - 1)
        self._by_age = kept
        self._stale_tokens = 0

    def trim(self) -> None:
        """Push out the oldest frames until the budget holds; pinned ones stay."""
        pinned: list[Tail] = []
        while self._bytes > self._bytes_max and self._by_age:
            tail = self._by_age.popleft()
            if not len(tail):
                continue
            if tail.first > tail.pinned_above:
                pinned.append(tail)
            else:
                self._bytes -= tail.drop_oldest()
        if pinned:
            self._by_age.extendleft(reversed(pinned))
