"""What a connector tells of itself, and what it can be told, wherever it runs.

The idea: both are messages of one small compacted topic, so that whoever can read the cluster can
ask, and a wish waits for a connector that is not there yet. A *status* has its feed's name as key,
so the newest stays. A *command* has a key of its own, and is deleted once it is done: `snapshot` is
done by the connector that runs, `stop` by all that had begun when it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError, SourceError, TopicNotFound
from aegis_cluster.message import Message, Offset
from aegis_cluster.subscribe_config import SubscribeConfig
from aegis_cluster.topics import UNLIMITED, TopicConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.cdc.connector import Connector
    from aegis_cluster.cdc.source import Source
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.message import ReceivedMessage

TOPIC: Final = "aegis.cdc"
STATUS_S: Final = 2.0
"""A connector that runs tells of itself so often; silent for longer than that, it is gone."""
WAITING_S: Final = 30.0
POLL_S: Final = 0.5
SILENT_S: Final = 15.0
SNAPSHOT: Final = "snapshot"
STOP: Final = "stop"


async def make_topic(engine: StreamingEngine) -> None:
    """Have it."""
    config = TopicConfig(partitions=1, retention=UNLIMITED, cleanup="compact")
    await engine.create_topic(TOPIC, config, exist_ok=True)


async def statuses(engine: StreamingEngine) -> dict[str, dict[str, Any]]:
    """The newest of every feed, by its name; `silent_s`: how long ago it was told."""
    found: dict[str, dict[str, Any]] = {}
    try:
        end = (await engine.offsets(TOPIC))[0].high_watermark
    except TopicNotFound:
        return found
    reading = SubscribeConfig(start=Offset.EARLIEST)
    async with engine.subscribe(TOPIC, reading) as subscriber:
        while end:
            messages = await subscriber.poll(timeout=POLL_S)
            for message in messages:
                kind, _, feed = str(message.key).partition("/")
                if kind == "status" and isinstance(message.payload, dict):
                    told = message.timestamp
                    silent_s = 0.0 if told is None else time.time() - told.timestamp()
                    found[feed] = {**message.payload, "silent_s": round(max(0.0, silent_s), 1)}
            if not messages or messages[-1].offset >= end - 1:
                break
    return found


async def command(engine: StreamingEngine, feed: str, what: str, table: str = "") -> str:
    """Give one; returns its name. It waits until a connector does it."""
    await make_topic(engine)
    name = uuid.uuid4().hex[:12]
    payload = {"feed": feed, "command": what, "table": table}
    await engine.publish(TOPIC, Message(key=f"command/{feed}/{name}", payload=payload))
    return name


class Control:
    """Runs beside a connector, until it is cancelled. stop: ends the connector."""

    def __init__(
        self,
        engine: StreamingEngine,
        feed: str,
        source: Source,
        connector: Connector,
        stop: Callable[[], None],
    ) -> None:
        self._engine, self._feed, self._source = engine, feed, source
        self._connector, self._stop = connector, stop
        self._done: dict[str, str] = {}
        """The last commands, and what became of each."""
        self._waiting: dict[str, str] = {}
        """Snapshots that were asked for: the command's key, and the table."""

    async def run(self) -> None:
        """A cluster that does not answer is asked again."""
        while True:
            with contextlib.suppress(AegisError):
                await self._run()
            await asyncio.sleep(STATUS_S)

    async def _run(self) -> None:
        await make_topic(self._engine)
        begun = (await self._engine.offsets(TOPIC))[0].high_watermark
        reading = SubscribeConfig(start=Offset.EARLIEST)
        told_at, told = 0.0, ""
        async with self._engine.subscribe(TOPIC, reading) as subscriber:
            while True:
                for message in await subscriber.poll(timeout=POLL_S):
                    self._hear(message, is_new=message.offset >= begun)
                role = self._connector.state.role
                if role == "running" and self._waiting:
                    await self._snapshot()
                pause_s = STATUS_S if role == "running" else WAITING_S
                if role != told or time.monotonic() >= told_at + pause_s:
                    await self._tell()
                    told_at, told = time.monotonic(), role

    def _hear(self, message: ReceivedMessage, *, is_new: bool) -> None:
        kind, _, rest = str(message.key).partition("/")
        feed, _, _ = rest.rpartition("/")
        if kind != "command" or feed != self._feed:
            return
        if not isinstance(message.payload, dict):
            self._waiting.pop(str(message.key), None)  # done, by whom ever
        elif message.payload.get("command") == SNAPSHOT:
            self._waiting[str(message.key)] = str(message.payload.get("table"))
        elif message.payload.get("command") == STOP and is_new:
            self._stop()

    async def _snapshot(self) -> None:
        for key, table in list(self._waiting.items()):
            name = key.rpartition("/")[2]
            try:
                await self._source.snapshot(table)
                self._done[name] = "begun"
            except SourceError as error:
                self._done[name] = str(error)
            self._done = dict(list(self._done.items())[-10:])
            self._waiting.pop(key, None)
            await self._engine.publish(TOPIC, Message(key=key, payload=None))

    async def _tell(self) -> None:
        state = self._connector.state
        if state.role == "waiting":
            return  # whoever has the lease tells
        progress = self._source.progress() if state.role == "running" else None
        status = {
            "feed": self._feed,
            "holder": f"{socket.gethostname()}:{os.getpid()}",
            "role": state.role,
            "changes": state.changes,
            "is_current": state.is_current,
            "last_ms": state.last_ms,
            "error": state.error,
            "snapshot": None if progress is None else progress._asdict(),
            "commands": self._done,
            **await self._lag(),
        }
        await self._engine.publish(TOPIC, Message(key=f"status/{self._feed}", payload=status))

    async def _lag(self) -> dict[str, float]:
        lag = getattr(self._source, "lag", None)
        if lag is None or self._connector.state.role != "running":
            return {}
        with contextlib.suppress(AegisError):
            found = await lag()
            return {"lag_bytes": found.bytes, "lag_seconds": found.seconds}
        return {}

    async def end(self) -> None:
        """Say that it has stopped."""
        with contextlib.suppress(AegisError):
            await self._tell()
