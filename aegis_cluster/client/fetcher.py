"""Reading: long polls at the leaders of many partitions, frames in, records out in order.

The idea: a partition is idle, being fetched, or full (enough of it waits to be read). All idle
partitions of one leader go into one long poll, so a quiet topic costs one open request a leader,
and a busy one is fetched ahead while the reader works.

The rule it protects: within a partition, offsets come in order, without gap or repeat, over any
number of leader changes: the next fetch starts where the last whole batch ended.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    OffsetOutOfRange,
    OutcomeUnknown,
    TopicNotFound,
)
from aegis_cluster.limits import FETCH_BYTES_DEFAULT, MIB
from aegis_cluster.wire.batch import decode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.layout import batch_header
from aegis_cluster.wire.protocol import Api, Reply, take_int, take_list, take_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.metadata import ShardAddress
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.records import Record

WAIT_MS: Final = 1_000
ANSWER_S: Final = 3.0
"""A long poll that is not answered so long after its time counts as lost."""
BUFFER_BYTES_MAX: Final = 16 * MIB
"""Frames of one reader that wait to be read."""
RETRY_S: Final = 0.02
RETRY_S_MAX: Final = 0.5


class Chunk(NamedTuple):
    """Frames of one partition, not decoded yet."""

    partition: int
    frames: bytes
    position: int


@dataclass(slots=True, eq=False)
class _Cursor:
    """One partition: the next offset to fetch, and the next one to hand out."""

    partition: int
    fetch_offset: int
    read_offset: int
    fetching: bool = False
    retry_at: float = 0.0
    failures: int = 0
    buffered: int = 0


@dataclass(slots=True)
class Fetcher:
    """Reads some partitions of one topic; belongs to one event loop."""

    cluster: ClusterClient
    info: TopicInfo
    positions: dict[int, int]
    """Next offset by partition; kept up as records are handed out."""
    _cursors: dict[int, _Cursor] = field(default_factory=dict)
    _chunks: deque[Chunk] = field(default_factory=deque)
    _buffered: int = 0
    _failure: AegisError | None = None
    _closed: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        """Begin to fetch ahead."""
        self._cursors = {p: _Cursor(p, at, at) for p, at in self.positions.items()}
        self._spawn(self._run())

    async def close(self) -> None:
        """Stop fetching; a `next_records` that waits ends with None."""
        self._closed = True
        self._news.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next_records(self, deadline: float | None) -> tuple[int, list[Record]] | None:
        """Records of one partition, in order; None when the deadline passes without any.

        Raises `OffsetOutOfRange`, `TopicNotFound`, `Corruption`.
        """
        while not self._closed:
            if self._chunks:
                chunk = self._chunks.popleft()
                records = self._decode(chunk)
                if records:
                    return chunk.partition, records
                continue
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return None
        return None

    def seek(self, partition: int, offset: int) -> None:
        """Go on reading one partition from another offset."""
        cursor = self._cursors[partition]
        kept = [chunk for chunk in self._chunks if chunk.partition != partition]
        dropped = sum(len(c.frames) for c in self._chunks if c.partition == partition)
        self._chunks = deque(kept)
        self._release(dropped)
        fresh = _Cursor(partition, offset, offset)
        self._cursors[partition] = fresh
        cursor.fetching = False
        self._failure = None
        self._room.set()

    # ---- decoding

    def _decode(self, chunk: Chunk) -> list[Record]:
        """The records of a chunk from the cursor's offset on; earlier ones were read before."""
        self._release(len(chunk.frames))
        cursor = self._cursors[chunk.partition]
        records: list[Record] = []
        for position, header in iter_frames(chunk.frames):
            if header.kind is FrameKind.DATA:
                records.extend(decode_batch(frame_payload(chunk.frames, header, position)))
        if records and records[0].offset < cursor.read_offset:
            records = [record for record in records if record.offset >= cursor.read_offset]
        if records:
            cursor.read_offset = records[-1].offset + 1
            self.positions[chunk.partition] = cursor.read_offset
        return records

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
            if cursor.fetching:
                continue
            if cursor.retry_at > now:
                left = cursor.retry_at - now
                pause = left if pause is None else min(pause, left)
                continue
            address = self.cluster.metadata.address_of(self.info, cursor.partition)
            if address is None:
                self._pause(cursor)
                self._spawn(self._locate())
                continue
            by_shard[address].append(cursor)
        for address, cursors in by_shard.items():
            for cursor in cursors:
                cursor.fetching = True
            self._spawn(self._fetch(address, cursors))
        return pause

    async def _fetch(self, address: ShardAddress, cursors: list[_Cursor]) -> None:
        loop = asyncio.get_running_loop()
        budget = max(FETCH_BYTES_DEFAULT // len(cursors), 64 * 1024)
        items = [[self.info.partitions[c.partition].group, c.fetch_offset, budget] for c in cursors]
        try:
            link = self.cluster.link(address.endpoint)
            await link.ready(loop.time() + RETRY_S_MAX)
            deadline = loop.time() + WAIT_MS / 1000 + ANSWER_S
            reply = await link.request(Api.FETCH, [WAIT_MS, items], deadline=deadline)
            self._take_reply(cursors, reply)
        except AegisError as error:
            for cursor in cursors:
                self._failed(cursor, error)
            await self._locate()
        finally:
            for cursor in cursors:
                cursor.fetching = False
            self._room.set()

    def _take_reply(self, cursors: Sequence[_Cursor], reply: Reply) -> None:
        results = take_list(reply.fields, 0, "results")
        for slot, cursor in enumerate(cursors):
            if self._cursors.get(cursor.partition) is not cursor:
                continue  # somebody has sought elsewhere meanwhile
            result = take_list(results, slot, "result")
            if take_int(result, 0, "code") == 0:
                cursor.failures = 0
                self._take_frames(cursor, bytes(take_part(reply.parts, slot, "frames")))
            else:
                self._refused(cursor, result)

    def _take_frames(self, cursor: _Cursor, frames: bytes) -> None:
        if not frames:
            return
        for position, header in iter_frames(frames):
            if header.kind is FrameKind.DATA:
                batch = batch_header(frame_payload(frames, header, position))
                cursor.fetch_offset = batch.base_offset + batch.last_offset_delta + 1
        self._chunks.append(Chunk(cursor.partition, frames, cursor.fetch_offset))
        self._buffered += len(frames)
        self._news.set()

    def _refused(self, cursor: _Cursor, result: Sequence[Any]) -> None:
        error = error_from_reply(result[0], result[1:])
        if isinstance(error, NotLeader):
            group = self.info.partitions[cursor.partition].group
            self.cluster.metadata.note_leader(group, error.details.get("leader"))
            if error.details.get("leader") is None:
                self._pause(cursor)
                self._spawn(self._locate())
        elif isinstance(error, OffsetOutOfRange) or not error.retriable:
            self._fail(error)
        else:
            self._pause(cursor)

    def _failed(self, cursor: _Cursor, error: AegisError) -> None:
        """A whole request failed: the leader is gone, or not who we think."""
        if not error.retriable and not isinstance(error, OutcomeUnknown):
            self._fail(error)
            return
        self.cluster.metadata.forget_leader(self.info.partitions[cursor.partition].group)
        self._pause(cursor)

    def _pause(self, cursor: _Cursor) -> None:
        cursor.failures += 1
        pause = min(RETRY_S * 1.5**cursor.failures, RETRY_S_MAX)
        cursor.retry_at = asyncio.get_running_loop().time() + pause

    def _fail(self, error: AegisError) -> None:
        self._failure = error
        self._news.set()

    async def _locate(self) -> None:
        """Ask who leads now, and whether the topic still is the one we read."""
        loop = asyncio.get_running_loop()
        try:
            await self.cluster.refresh([self.info.name], loop.time() + 1.0)
            fresh = self.cluster.metadata.topic(self.info.name)
            if fresh.partitions[0].group != self.info.partitions[0].group:
                raise TopicNotFound(f"Topic {self.info.name!r} was deleted and made anew.")
        except TopicNotFound as error:
            self._fail(error)
        except AegisError:
            return

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that broke down must not leave the reader waiting for ever."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(OutcomeUnknown(f"The reader broke down: {error!r}."))
