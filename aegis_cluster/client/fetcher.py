"""Reading: long polls at the leaders of many partitions, frames in, records out in order.

The idea: a partition is idle, being fetched, held, or full (enough of it waits to be read). All
idle partitions of one leader go into one long poll, so a quiet topic costs one open request a
leader, and a busy one is fetched ahead while the reader works. A held partition drops what was
fetched ahead and fetches it again later, so that it takes no room from the others.

The rules it protects: within a partition, offsets come in order, without gap or repeat, over any
number of leader changes: the next fetch starts where the last whole batch ended. Markers of
transactions are never handed out, and aborted records only to those who asked for them: with every
answer the leader tells which ranges were aborted.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import (
    AegisError,
    Corruption,
    CorruptRecord,
    Misuse,
    NotLeader,
    OffsetOutOfRange,
    OutcomeUnknown,
    TopicNotFound,
)
from aegis_cluster.ids import TopicPartition
from aegis_cluster.limits import FETCH_BYTES_DEFAULT, FETCH_BYTES_MAX, KIB, MIB, REQUEST_PARTS_MAX
from aegis_cluster.wire.batch import decode_columns
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.compression import CODEC_NONE
from aegis_cluster.wire.frame import FrameKind, frame_annotation, frame_payload, iter_frames
from aegis_cluster.wire.layout import CONTROL_BIT, TRANSACTIONAL_BIT, batch_header
from aegis_cluster.wire.protocol import Api, Isolation, Reply, take_int, take_list, take_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.metadata import ShardAddress
    from aegis_cluster.ids import GroupId
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.layout import BatchHeader
    from aegis_cluster.wire.records import RecordColumns

WAIT_MS: Final = 1_000
ANSWER_S: Final = 3.0
"""A long poll that is not answered so long after its time counts as lost."""
BUFFER_BYTES_MAX: Final = 16 * MIB
"""Frames of one reader that wait to be read."""
PARTITION_BYTES_MIN: Final = 64 * KIB
"""What each of many partitions may answer in one fetch."""
DECODE_BYTES: Final = 1 * MIB
"""Frames, or what they decompress to, whose records are made at one time."""
RETRY_S: Final = 0.02
RETRY_S_MAX: Final = 0.5


@dataclass(slots=True, eq=False)
class _Chunk:
    """Frames of one partition, not decoded yet; position: the offset behind them.

    aborted: [producer, first, last]: records of that producer in there never happened.
    """

    place: TopicPartition
    frames: bytes
    position: int
    aborted: Sequence[Sequence[int]] = ()
    decoded: int = 0
    """Bytes of the frames whose records have been handed out."""


@dataclass(slots=True, eq=False)
class _Cursor:
    """One partition: the next offset to fetch, and the next one to hand out.

    skip_before_ms: leave out the first records as long as they are older; None: leave out none.
    """

    place: TopicPartition
    info: TopicInfo
    fetch_offset: int
    read_offset: int
    skip_before_ms: int | None = None
    fetching: bool = False
    held: bool = False
    retry_at: float = 0.0
    failures: int = 0

    @property
    def group(self) -> GroupId:
        return self.info.partitions[self.place.partition].group


class Fetcher:
    """Reads some partitions of some topics; belongs to one event loop.

    required: topics whose readers are told `TopicNotFound` when they are deleted; others leave.
    isolation: what is seen of transactions.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        *,
        required: Iterable[str],
        isolation: Isolation = Isolation.COMMITTED,
    ) -> None:
        self._cluster = cluster
        self._isolation = isolation
        self._required = frozenset(required)
        self._cursors: dict[TopicPartition, _Cursor] = {}
        self._chunks: deque[_Chunk] = deque()
        self._buffered = 0
        self._asked = 0
        """Bytes that fetches under way may bring."""
        self._failure: AegisError | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._locating: set[str] = set()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._spawn(self._run())

    # ---- what to read

    def add(
        self, info: TopicInfo, positions: Mapping[int, int], *, skip_before_ms: int | None = None
    ) -> None:
        """Read these partitions of a topic too, each from its position on."""
        for partition, offset in positions.items():
            place = TopicPartition(info.name, partition)
            self._cursors[place] = _Cursor(place, info, offset, offset, skip_before_ms)
        self._room.set()

    def remove(self, topic: str) -> None:
        """Read a topic no longer."""
        self.remove_places([place for place in self._cursors if place.topic == topic])

    def remove_places(self, places: Iterable[TopicPartition]) -> None:
        """Read these partitions no longer."""
        for place in places:
            if place in self._cursors:
                self._drop_chunks(place)
                del self._cursors[place]

    def seek(self, place: TopicPartition, offset: int) -> None:
        """Go on reading one partition from another offset. Raises `Misuse` if it isn't read."""
        self._renew(place, offset, held=self._cursor(place).held)
        self._failure = None

    def hold(self, place: TopicPartition, *, held: bool) -> None:
        """Fetch nothing of a partition for now, or fetch again. Raises `Misuse`."""
        cursor = self._cursor(place)
        if cursor.held != held:
            self._renew(place, cursor.read_offset, held=held)

    @property
    def positions(self) -> dict[TopicPartition, int]:
        """Next offset to be handed out."""
        return {place: cursor.read_offset for place, cursor in self._cursors.items()}

    def group_of(self, topic: str) -> GroupId | None:
        """By which a topic that was deleted and made anew is told from the one that is read."""
        cursor = self._cursors.get(TopicPartition(topic, 0))
        return cursor.group if cursor else None

    def partitions_of(self, topic: str) -> int:
        """How many partitions of a topic are read."""
        return sum(place.topic == topic for place in self._cursors)

    def _cursor(self, place: TopicPartition) -> _Cursor:
        try:
            return self._cursors[place]
        except KeyError:
            raise Misuse(f"{place} is not read here; see `assignment`.") from None

    def _renew(self, place: TopicPartition, offset: int, *, held: bool) -> None:
        """Another cursor, so that an answer to the old one is known as such."""
        old = self._cursors[place]
        self._drop_chunks(place)
        skip = old.skip_before_ms if offset == old.read_offset else None
        self._cursors[place] = _Cursor(place, old.info, offset, offset, skip, held=held)
        self._room.set()

    def _drop_chunks(self, place: TopicPartition) -> None:
        dropped = sum(len(c.frames) for c in self._chunks if c.place == place)
        self._chunks = deque(chunk for chunk in self._chunks if chunk.place != place)
        self._release(dropped)

    async def close(self) -> None:
        """Stop fetching; a `next_batches` that waits ends with None."""
        self._closed = True
        self._news.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """Have a `next_batches` that waits look again, and end with None."""
        self._news.set()

    # ---- handing out

    async def next_batches(
        self, deadline: float | None
    ) -> tuple[TopicPartition, list[RecordColumns]] | None:
        """Batches of one partition, in order, perhaps none of them left to hand out.

        None when the deadline passes first, after `wake`, and after `close`. Raises
        `OffsetOutOfRange`, `TopicNotFound`, `Corruption`; again at every call, until `seek`.
        """
        if self._closed:
            return None
        if not self._chunks and self._failure is None:
            self._news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return None
        if self._chunks:
            chunk = self._chunks[0]
            return chunk.place, self._decode(chunk)
        if self._failure is not None:
            raise self._failure
        return None

    def _decode(self, chunk: _Chunk) -> list[RecordColumns]:
        """The batches of the first chunk from the cursor's offset on; earlier ones were read.

        What stands before a damaged batch is handed out first; then it raises, and the chunk
        stays until somebody seeks elsewhere.
        """
        cursor = self._cursors[chunk.place]
        batches: list[RecordColumns] = []
        try:
            self._decode_some(chunk, cursor, batches)
        except Corruption as error:
            if not batches:
                raise CorruptRecord(
                    f"{chunk.place}: what stands at offset {cursor.read_offset} or shortly after"
                    f" fails its check: {error}. Seek past it to read on.",
                    topic=chunk.place.topic,
                    partition=chunk.place.partition,
                    offset=cursor.read_offset,
                ) from error
            cursor.read_offset = batches[-1].last_offset + 1
            return batches
        if chunk.decoded < len(chunk.frames):
            if batches:
                cursor.read_offset = batches[-1].last_offset + 1
            return batches
        self._chunks.popleft()
        self._release(len(chunk.frames))
        cursor.read_offset = max(cursor.read_offset, chunk.position)
        return batches

    def _decode_some(self, chunk: _Chunk, cursor: _Cursor, batches: list[RecordColumns]) -> None:
        """Add the batches of the chunk's next frames, but no more than fit well in memory."""
        budget = DECODE_BYTES
        frames = chunk.frames
        for position, header in iter_frames(frames, chunk.decoded):
            if header.kind is FrameKind.DATA:
                payload = frame_payload(frames, header, position)
                described = batch_header(payload)
                budget -= header.size
                if not is_hidden(described, chunk.aborted):
                    found = decode_columns(payload)
                    if header.annotation_size:
                        found.annotation = bytes(frame_annotation(frames, header, position))
                        found.base_offset = described.base_offset
                    batch = _from(found, cursor)
                    if len(batch):
                        batches.append(batch)
                    if described.codec != CODEC_NONE:
                        budget -= sum(len(value or b"") for value in found.values)
            chunk.decoded = position + header.size
            if budget <= 0:
                return

    def _release(self, size: int) -> None:
        self._buffered -= size
        self._room.set()

    # ---- fetching

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._room.clear()
            pause = self._fetch_idle(loop.time())
            try:
                async with asyncio.timeout(pause):
                    await self._room.wait()
            except TimeoutError:
                continue

    def _fetch_idle(self, now: float) -> float | None:
        """Open long polls for idle partitions; return when to look again."""
        if self._buffered >= BUFFER_BYTES_MAX or self._failure is not None:
            return None
        pause: float | None = None
        by_shard: dict[ShardAddress, list[_Cursor]] = defaultdict(list)
        for cursor in self._cursors.values():
            if cursor.fetching or cursor.held:
                continue
            if cursor.retry_at > now:
                left = cursor.retry_at - now
                pause = left if pause is None else min(pause, left)
                continue
            address = self._cluster.metadata.address_of(cursor.info, cursor.place.partition)
            if address is None:
                self._pause(cursor)
                self._locate(cursor.place.topic)
                continue
            by_shard[address].append(cursor)
        for address, cursors in by_shard.items():
            for start in range(0, len(cursors), REQUEST_PARTS_MAX):
                self._begin(address, cursors[start : start + REQUEST_PARTS_MAX])
        return pause

    def _begin(self, address: ShardAddress, cursors: list[_Cursor]) -> None:
        for cursor in cursors:
            cursor.fetching = True
        self._spawn(self._fetch(address, cursors))

    async def _fetch(self, address: ShardAddress, cursors: list[_Cursor]) -> None:
        loop = asyncio.get_running_loop()
        room = (BUFFER_BYTES_MAX - self._buffered - self._asked) // 2
        whole = min(FETCH_BYTES_DEFAULT, max(room, 0))
        budget = max(whole // len(cursors), PARTITION_BYTES_MIN)
        asked = min(budget * len(cursors), FETCH_BYTES_MAX)
        self._asked += asked
        items = [[cursor.group, cursor.fetch_offset, budget] for cursor in cursors]
        try:
            link = self._cluster.link(address.endpoint)
            await link.ready(loop.time() + RETRY_S_MAX)
            deadline = loop.time() + WAIT_MS / 1000 + ANSWER_S
            fields = [WAIT_MS, items, self._isolation]
            reply = await link.request(Api.FETCH, fields, deadline=deadline)
            self._take_reply(cursors, reply)
        except AegisError as error:
            for cursor in cursors:
                self._failed(cursor, error)
            self._locate_all(cursors)
        finally:
            self._asked -= asked
            for cursor in cursors:
                cursor.fetching = False
            self._room.set()

    def _take_reply(self, cursors: Sequence[_Cursor], reply: Reply) -> None:
        results = take_list(reply.fields, 0, "results")
        for slot, cursor in enumerate(cursors):
            if not self._is_current(cursor):
                continue  # somebody has sought elsewhere meanwhile
            result = take_list(results, slot, "result")
            if take_int(result, 0, "code") == 0:
                cursor.failures = 0
                frames = bytes(take_part(reply.parts, slot, "frames"))
                self._take_frames(cursor, frames, *aborted_ranges(result))
            else:
                self._refused(cursor, result)

    def _is_current(self, cursor: _Cursor) -> bool:
        return self._cursors.get(cursor.place) is cursor

    def _take_frames(
        self, cursor: _Cursor, frames: bytes, aborted: list[list[int]], known_to: int | None
    ) -> None:
        """known_to: `aborted` is complete up to there; None: it is for all of the frames."""
        if not frames:
            return
        for position, header in iter_frames(frames):
            if header.kind is FrameKind.DATA:
                batch = batch_header(frame_payload(frames, header, position))
                if known_to is not None and batch.base_offset >= known_to:
                    frames = frames[:position]
                    break
                cursor.fetch_offset = batch.base_offset + batch.last_offset_delta + 1
        self._chunks.append(_Chunk(cursor.place, frames, cursor.fetch_offset, aborted))
        self._buffered += len(frames)
        self._news.set()

    def _refused(self, cursor: _Cursor, result: Sequence[Any]) -> None:
        error = error_from_reply(result[0], result[1:])
        if isinstance(error, NotLeader):
            self._cluster.metadata.note_leader(cursor.group, error.details.get("leader"))
            if error.details.get("leader") is None:
                self._pause(cursor)
                self._locate(cursor.place.topic)
        elif isinstance(error, OffsetOutOfRange) or not error.retriable:
            self._fail(error)
        else:
            self._pause(cursor)

    def _failed(self, cursor: _Cursor, error: AegisError) -> None:
        """A whole request failed: the leader is gone, or not who we think."""
        if not error.retriable and not isinstance(error, OutcomeUnknown):
            self._fail(error)
            return
        self._cluster.metadata.forget_leader(cursor.group)
        self._pause(cursor)

    def _pause(self, cursor: _Cursor) -> None:
        cursor.failures += 1
        pause = min(RETRY_S * 1.5**cursor.failures, RETRY_S_MAX)
        cursor.retry_at = asyncio.get_running_loop().time() + pause

    def _fail(self, error: AegisError) -> None:
        self._failure = error
        self._news.set()

    # ---- where topics are

    def _locate_all(self, cursors: Iterable[_Cursor]) -> None:
        for topic in {cursor.place.topic: None for cursor in cursors}:
            self._locate(topic)

    def _locate(self, topic: str) -> None:
        """Ask who leads now, and whether the topic still is the one we read."""
        if topic not in self._locating:
            self._locating.add(topic)
            self._spawn(self._refresh(topic))

    async def _refresh(self, topic: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._cluster.refresh([topic], loop.time() + 1.0)
            fresh = self._cluster.metadata.topic(topic)
            if self.group_of(topic) not in (None, fresh.partitions[0].group):
                raise TopicNotFound(f"Topic {topic!r} was deleted and made anew.", topic=topic)
        except TopicNotFound as error:
            if topic in self._required:
                self._fail(error)
            else:
                self.remove(topic)
        except AegisError:
            return
        finally:
            self._locating.discard(topic)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that broke down must not leave the reader waiting for ever."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(OutcomeUnknown(f"The reader broke down: {error!r}."))


def aborted_ranges(result: Sequence[Any]) -> tuple[list[list[int]], int | None]:
    """The aborted ranges of one partition's answer, and up to where they are all there are."""
    if len(result) < 6:
        return [], None
    rows = take_list(result, 4, "aborted")
    ranges = []
    for place in range(len(rows)):
        row = take_list(rows, place, "range")
        ranges.append([take_int(row, at, "producer, first, last") for at in range(3)])
    return ranges, take_int(result, 5, "aborted_to")


def is_hidden(batch: BatchHeader, aborted: Sequence[Sequence[int]]) -> bool:
    """A marker, or records of a transaction that was aborted."""
    if not batch.attributes & (CONTROL_BIT | TRANSACTIONAL_BIT):
        return False
    return bool(batch.attributes & CONTROL_BIT) or any(
        producer == batch.producer_id and first <= batch.base_offset <= last
        for producer, first, last in aborted
    )


def _from(batch: RecordColumns, cursor: _Cursor) -> RecordColumns:
    """What a cursor has not handed out yet, and is not too old for it."""
    if len(batch) and batch.first_offset < cursor.read_offset:
        batch = batch.after(bisect_left(batch.offsets, cursor.read_offset))
    if cursor.skip_before_ms is None:
        return batch
    for number, time_ms in enumerate(batch.timestamps):
        if time_ms >= cursor.skip_before_ms:
            cursor.skip_before_ms = None
            return batch.after(number)
    return batch.after(len(batch))
