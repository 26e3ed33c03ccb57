"""Keeps a shard's stream index as far as its logs, and reads streams through it.

The idea: the index is fed from the log, never from memory. A piece of the log is read in the helper
thread, its annotations become rows, and rows and progress are written together. The same goes on
after a restart, after a new replica came, and after the file was lost; so there is one way only.

The rule it protects: an answer holds every version that was asked for, each from the frame whose
own annotation says so. An index that does not lead there is thrown away and made anew.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from aegis_cluster.broker.events.stream_index import (
    IndexDamaged,
    IndexUnavailable,
    Span,
    StreamIndex,
)
from aegis_cluster.errors import AegisError, Corruption, NotReady, OffsetOutOfRange, Throttled
from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.limits import EVENT_READ_BYTES_MAX, EVENT_READS_WAITING_MAX, MIB
from aegis_cluster.wire.event_frames import decode_annotation, decode_committed
from aegis_cluster.wire.frame import (
    FrameKind,
    decode_header,
    frame_annotation,
    frame_payload,
    iter_frames,
)
from aegis_cluster.wire.layout import CONTROL_BIT, TRANSACTIONAL_BIT, batch_header

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aegis_cluster.broker.partition import Partition, ReadLater
    from aegis_cluster.storage.log import PartitionLog

INDEX_BYTES: Final = 1 * MIB
"""Of a log, read and indexed at one time."""
REBUILDS_MAX: Final = 2
"""Of one question: an index that does not fit the log straight after that never will."""

log_ = logging.getLogger(__name__)

T = TypeVar("T")


class Wanted(NamedTuple):
    """Versions low … high (inclusive) of a stream, not older than a time."""

    stream: str
    low: int
    high: int
    backwards: bool
    bytes_max: int
    not_before_ms: int


class Found(NamedTuple):
    """spans: in the order asked for. frames: each that a span names, in the same order. complete:
    nothing was left out for the sake of size."""

    spans: list[Span]
    frames: bytes
    complete: bool


class Indexer:
    """One per shard. `read` answers once the index has what is asked for; `tick` lets it follow."""

    def __init__(
        self, partitions: Mapping[GroupId, Partition], read_later: ReadLater, path: str | None
    ) -> None:
        self._partitions = partitions
        self._read_later = read_later
        self._index = StreamIndex(path)
        self._done: dict[GroupId, int] = {}
        """How far each partition is indexed, as far as that is known here."""
        self._running: set[GroupId] = set()
        self._waiting: defaultdict[GroupId, list[tuple[int, Callable[[AegisError | None], None]]]]
        self._waiting = defaultdict(list)

    # ---- questions

    def read(
        self,
        partition: Partition,
        wanted: Wanted,
        *,
        index: LogIndex,
        answer: Callable[[Found | AegisError], None],
        tries: int = REBUILDS_MAX,
    ) -> None:
        """The frames that hold a stream, whose last event stands in the frame `index`.

        Raises `Throttled`.
        """

        def ready(error: AegisError | None) -> None:
            if error is not None:
                answer(error)
            else:
                self._read_later(look, done)

        def look() -> Found | _Trouble:
            return _guarded(lambda: _find(self._index, partition.log, partition.group, wanted))

        def done(result: Found | _Trouble) -> None:
            if isinstance(result, Found):
                answer(result)
            elif isinstance(result.error, IndexDamaged) and tries:
                self._begin_anew(result.error)
                try:
                    self.read(partition, wanted, index=index, answer=answer, tries=tries - 1)
                except Throttled as error:
                    answer(error)
            else:
                self._failed(partition, result.error)
                answer(_cannot(partition, result.error))

        if self._done.get(partition.group, 0) >= index:
            ready(None)
            return
        if sum(map(len, self._waiting.values())) >= EVENT_READS_WAITING_MAX:
            raise Throttled("Too many reads of streams wait here for the index; try again.")
        self._waiting[partition.group].append((index, ready))
        self._follow(partition)

    def tick(self) -> None:
        """Follow every log that has moved on, and forget partitions that are gone."""
        for group in sorted({*self._done, *self._waiting} - set(self._partitions)):
            self._done.pop(group, None)
            self._answer(group, _gone())
            self._read_later(_forgetting(self._index, group), _nothing)
        for partition in self._partitions.values():
            if partition.state.events.is_empty or partition.damage is not None:
                continue
            if self._done.get(partition.group, -1) < partition.applied:
                self._follow(partition)

    def close(self) -> None:
        """Let go of the file, once the helper thread has ended."""
        self._index.close()

    # ---- following logs

    def _follow(self, partition: Partition) -> None:
        """Index the next piece of a log, and go on until it is as far as is applied."""
        group, log = partition.group, partition.log
        if group in self._running:
            return
        self._running.add(group)
        known, applied = self._done.get(group), partition.applied

        def work() -> int | _Trouble:
            return _guarded(lambda: _index_piece(self._index, log, group, known, applied))

        def done(result: int | _Trouble) -> None:
            self._running.discard(group)
            if self._partitions.get(group) is not partition:
                # Removed or opened anew meanwhile; `tick` begins again.
                self._answer(group, _gone())
                return
            if isinstance(result, int):
                self._reached(partition, result)
            elif isinstance(result.error, IndexDamaged):
                self._begin_anew(result.error)
                self._follow(partition)
            else:
                self._failed(partition, result.error)
                self._answer(group, _cannot(partition, result.error))

        self._read_later(work, done)

    def _reached(self, partition: Partition, index: int) -> None:
        group = partition.group
        moved_on = index > self._done.get(group, -1)
        self._done[group] = index
        waiting = self._waiting.pop(group, [])
        left = [(wanted, ready) for wanted, ready in waiting if wanted > index]
        if left:
            self._waiting[group] = left
        for wanted, ready in waiting:
            if wanted <= index:
                ready(None)
        if left and moved_on:
            self._follow(partition)

    def _answer(self, group: GroupId, error: AegisError) -> None:
        for _, ready in self._waiting.pop(group, []):
            ready(error)

    def _failed(self, partition: Partition, error: Exception) -> None:
        if isinstance(error, Corruption):
            partition.damage_met(error)

    def _begin_anew(self, why: IndexDamaged) -> None:
        log_.warning("The index of streams is damaged and is made anew from the logs: %s", why)
        self._done.clear()
        self._read_later(lambda: _guarded(self._index.begin_anew), _nothing)


class _Trouble(NamedTuple):
    """What went wrong in the helper thread, for the loop to judge."""

    error: IndexDamaged | IndexUnavailable | AegisError


def _guarded(work: Callable[[], T]) -> T | _Trouble:
    try:
        return work()
    except (IndexDamaged, IndexUnavailable, AegisError) as error:
        return _Trouble(error)


def _forgetting(index: StreamIndex, group: GroupId) -> Callable[[], object]:
    return lambda: _guarded(lambda: index.forget(group))


def _gone() -> NotReady:
    return NotReady("The partition is not here any more; ask again.")


def _nothing(_: object) -> None:
    """Nobody waits for the result; the next use tells."""


def _cannot(partition: Partition, error: Exception) -> AegisError:
    """What a reader hears: of damage, that another replica will lead soon, unless there is none."""
    if isinstance(error, Corruption) and not partition.is_alone:
        return partition.not_leader()
    if isinstance(error, AegisError):
        return error
    return NotReady(f"The index of streams cannot be used now: {error}. Try again.")


def _index_piece(
    index: StreamIndex, log: PartitionLog, group: GroupId, known: int | None, applied: LogIndex
) -> int:
    """Index the next frames of a log; how far that is now."""
    done = index.progress(group) if known is None else known
    if done > applied:  # the log lost its end, or another one stands in its place
        index.forget(group)
        done = 0
    if done >= applied:
        return done
    first = LogIndex(max(done + 1, log.first_index))
    try:
        piece = log.read_range(first, applied, INDEX_BYTES)
    except OffsetOutOfRange:
        return done  # dropped meanwhile; asked again with the next tick
    spans = []
    for position, header in iter_frames(piece.data):
        if header.kind is FrameKind.DATA and header.annotation_size:
            spans += _indexed(log, piece.data, position)
    index.add(group, spans, upto=piece.last)
    return piece.last


def _indexed(log: PartitionLog, data: bytes, position: int) -> list[Span]:
    """What a frame adds to streams: a marker, what it commits; others of a transaction, nothing."""
    header = decode_header(data, position)
    attributes = batch_header(frame_payload(data, header, position)).attributes
    if not attributes & TRANSACTIONAL_BIT:
        return _spans_of(data, position)
    if not attributes & CONTROL_BIT:
        return []
    committed = decode_committed(frame_annotation(data, header, position))
    if committed is None or committed < log.first_index:
        return []
    return _spans_of(log.read(LogIndex(committed), LogIndex(committed), 1).data)


def _spans_of(data: bytes, position: int = 0) -> list[Span]:
    """What one frame says that it holds."""
    header = decode_header(data, position)
    offset = int.from_bytes(frame_payload(data, header, position)[:8], "big")
    spans = []
    for one in decode_annotation(frame_annotation(data, header, position)):
        if one.count:  # else a transaction depends on it only
            spans.append(Span(one.stream, one.first, one.count, header.index, offset))
            offset += one.count
    return spans


def _find(index: StreamIndex, log: PartitionLog, group: GroupId, wanted: Wanted) -> Found:
    """Follow the index into the log. Raises `IndexDamaged` where it does not lead there."""
    spans: list[Span] = []
    frames: list[bytes] = []
    left = min(wanted.bytes_max, EVENT_READ_BYTES_MAX)
    rows = index.spans(group, wanted.stream, wanted.low, wanted.high, backwards=wanted.backwards)
    complete = True
    for span in rows:
        if span.frame < log.first_index:
            if wanted.backwards:
                break
            continue
        _check_next(spans, span, wanted)
        if left <= 0:
            complete = False
            break
        frame = _frame_of(log, span)
        if decode_header(frame).time_ms < wanted.not_before_ms:
            if wanted.backwards:
                break
            continue
        spans.append(span)
        frames.append(frame)
        left -= len(frame)
    _check_ends(spans, log, wanted, complete=complete)
    return Found(spans, b"".join(frames), complete)


def _check_next(spans: list[Span], span: Span, wanted: Wanted) -> None:
    """Spans follow each other without a gap."""
    if spans:
        gap = spans[-1].first - span.last if wanted.backwards else span.first - spans[-1].last
        if gap != 1:
            raise IndexDamaged(f"versions of {wanted.stream!r} at {span.first} are missing")


def _check_ends(spans: list[Span], log: PartitionLog, wanted: Wanted, *, complete: bool) -> None:
    """Nothing is missing at either end, but what the log itself has dropped, is too old, or is left
    for the next answer."""
    may_start_later = log.first_index > 1 or wanted.not_before_ms > 0
    may_end_early = not complete
    if not spans:
        fits = may_start_later or may_end_early
    else:
        low, high = min(spans[0].first, spans[-1].first), max(spans[0].last, spans[-1].last)
        left_low, left_high = (may_end_early, False) if wanted.backwards else (False, may_end_early)
        fits = (high >= wanted.high or left_high) and (
            low <= wanted.low or may_start_later or left_low
        )
    if not fits:
        raise IndexDamaged(f"versions {wanted.low}-{wanted.high} of {wanted.stream!r} are missing")


def _frame_of(log: PartitionLog, span: Span) -> bytes:
    """The frame that a span names, which has to say the same of itself."""
    try:
        data = log.read(LogIndex(span.frame), LogIndex(span.frame), 1).data
    except OffsetOutOfRange as error:
        raise IndexDamaged(f"there is no frame {span.frame}") from error
    if span not in _spans_of(data):
        raise IndexDamaged(f"frame {span.frame} does not hold what it should of {span.stream!r}")
    return data
