"""Reading a topic: an async context manager, an async iterator, and polls.

It starts on entering or on the first step, and `close()` ends it. Without a group it keeps no
positions: it reads every partition from `start` on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.errors import Misuse
from aegis_cluster.message import Offset, ReceivedMessage, from_record

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from aegis_cluster.engine import StreamingEngine


@dataclass(frozen=True, slots=True)
class SubscribeConfig:
    """How to read. start: where, in partitions that have no position yet."""

    start: Offset = Offset.LATEST


class Subscriber:
    """Messages of one topic, each partition in order; belongs to one event loop."""

    def __init__(
        self, engine: StreamingEngine, topic: str, config: SubscribeConfig, timeout: float
    ) -> None:
        self._engine = engine
        self._topic = topic
        self._config = config
        self._timeout = timeout
        self._fetcher: Fetcher | None = None
        self._ready: deque[ReceivedMessage] = deque()
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReceivedMessage:
        if self._closed:
            raise StopAsyncIteration
        while not self._ready:
            if not await self._fill(None):
                raise StopAsyncIteration
        return self._ready.popleft()

    async def poll(
        self, max_records: int = 500, timeout: float | None = None
    ) -> list[ReceivedMessage]:
        """At most `max_records` messages; empty when none came within `timeout` seconds."""
        if max_records < 1:
            raise Misuse(f"poll was asked for {max_records} records; ask for at least 1.")
        wait = self._timeout if timeout is None else timeout
        if not self._ready:
            await self._fill(asyncio.get_running_loop().time() + wait)
        return [self._ready.popleft() for _ in range(min(max_records, len(self._ready)))]

    @property
    def positions(self) -> dict[int, int]:
        """Next offset to be handed out, by partition; known once started."""
        if self._fetcher is None:
            return {}
        positions = dict(self._fetcher.positions)
        for message in reversed(self._ready):
            positions[message.partition] = message.offset
        return positions

    async def close(self) -> None:
        """Stop reading; a step that waits ends."""
        self._closed = True
        if self._fetcher is not None:
            await self._fetcher.close()

    async def _start(self) -> Fetcher:
        if self._closed:
            raise Misuse("This subscriber is closed; subscribe again.")
        if self._fetcher is None:
            cluster = self._engine.cluster
            deadline = cluster.deadline(self._timeout)
            info = await cluster.topic(self._topic, deadline)
            offsets = await self._engine.offsets(self._topic, timeout=self._timeout)
            positions = {
                partition: self._config.start.resolve(
                    log_start=found.log_start, high_watermark=found.high_watermark
                )
                for partition, found in offsets.items()
            }
            self._fetcher = Fetcher(cluster, info, positions)
            self._fetcher.start()
        return self._fetcher

    async def _fill(self, deadline: float | None) -> bool:
        fetcher = await self._start()
        found = await fetcher.next_records(deadline)
        if found is None:
            return False
        partition, records = found
        topic = self._topic
        self._ready.extend(from_record(topic, partition, record) for record in records)
        return True
