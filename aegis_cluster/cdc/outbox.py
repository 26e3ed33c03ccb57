"""The outbox: rows that a program inserts, published as messages of their own topics, exactly once.

The idea: a program that has to change its tables *and* tell others cannot do both safely, unless
telling is an insert, too. So it writes what it has to tell into a table; the feed captures the row,
and a router reads the feed in a group and publishes each, together with its position, in one
transaction of the cluster. Deletes say nothing here, so the program may delete a row at once.
"""

from __future__ import annotations

import asyncio
import string
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cdc.envelope import change_from
from aegis_cluster.cdc.events import Insert
from aegis_cluster.errors import AegisError, ConfigError, CorruptRecord, Misuse
from aegis_cluster.message import Message, Offset
from aegis_cluster.producer import ProducerConfig
from aegis_cluster.subscribe_config import DeliveryMode, SubscribeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from aegis_cluster.cdc.events import ChangeEvent
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.message import ReceivedMessage
    from aegis_cluster.producer import Producer
    from aegis_cluster.subscriber import Subscriber

POLL_RECORDS: Final = 500
LOOK_S: Final = 0.5
PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class OutboxConfig:
    """How rows of a table become messages; the columns' names are Debezium's.

    table: with or without the schema. topic: with columns in braces. key, payload: columns of the
    message's key and payload. headers: of a message, by the column whose text they hold. snapshot:
    whether rows that were there before the feed began are published. Raises `ConfigError`.
    """

    table: str = "outbox"
    topic: str = "{aggregatetype}"
    key: str = "aggregateid"
    payload: str = "payload"
    headers: Sequence[str] = ("id", "type")
    snapshot: bool = True

    def __post_init__(self) -> None:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.topic)]
        except ValueError as error:
            raise ConfigError(f"topic = {self.topic!r}: {error}.", key="topic") from error
        if "" in fields:
            raise ConfigError(
                f"topic = {self.topic!r}; name a column in the braces: '{{aggregatetype}}'.",
                key="topic",
            )

    def message(self, change: ChangeEvent) -> tuple[str, Message] | None:
        """Topic and message of a change; None for one that says nothing. Raises
        `CorruptRecord` where a column is missing."""
        if not isinstance(change, Insert) or (change.is_snapshot and not self.snapshot):
            return None
        if self.table not in (change.source.table, change.source.full_name):
            return None
        row = change.new_row
        try:
            topic = self.topic.format(**row)
            key, payload = row[self.key], row[self.payload]
            headers = {name: _text(row[name]) for name in self.headers if row[name] is not None}
        except KeyError as error:
            raise CorruptRecord(
                f"The row at offset {change.offset} of the feed has no column {error.args[0]!r};"
                f" {self.table} has {', '.join(row)}. Name its columns in OutboxConfig.",
                offset=change.offset,
            ) from error
        return topic, Message(key=_key(key), payload=payload, headers=headers)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _key(value: Any) -> str | bytes | None:
    return value if value is None or isinstance(value, (str, bytes)) else str(value)


class OutboxRouter:
    """Publishes while it is entered; an async context manager. Of several for one table the
    partitions of the feed are shared.

    published: messages since it was entered.
    """

    def __init__(self, engine: StreamingEngine, feed: str, config: OutboxConfig) -> None:
        self.published = 0
        self._engine, self._feed, self._config = engine, feed, config
        self._name = f"cdc-outbox/{feed}/{config.table}"
        self._running: asyncio.Task[None] | None = None
        self._topics: set[str] = set()

    async def __aenter__(self) -> Self:
        if self._running is not None:
            raise Misuse("This router is in use already.")
        self._running = asyncio.create_task(self._run(), name=self._name)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; what is published stays so, and the next router goes on behind it."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def stopped(self) -> None:
        """Wait for the end. Raises why it has ended."""
        if self._running is not None:
            await asyncio.wait([self._running])
            if not self._running.cancelled():
                self._running.result()

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except CorruptRecord:
                raise
            except AegisError as error:
                if not error.retriable:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def _follow(self) -> None:
        reading = SubscribeConfig(
            group_id=self._name, start=Offset.EARLIEST, delivery_mode=DeliveryMode.EXACTLY_ONCE
        )
        # The group fences who lost a partition, so each may have a name of its own here.
        writing = ProducerConfig(transactional_id=f"{self._name}/{uuid.uuid4().hex}")
        async with (
            self._engine.subscribe(self._feed, reading) as subscriber,
            self._engine.producer(writing) as producer,
        ):
            while True:
                messages = await subscriber.poll(POLL_RECORDS, timeout=LOOK_S)
                if messages:
                    await self._publish(messages, subscriber, producer)

    async def _publish(
        self, messages: Sequence[ReceivedMessage], subscriber: Subscriber, producer: Producer
    ) -> None:
        found = []
        for message in messages:
            change = change_from(message)
            routed = None if change is None else self._config.message(change)
            if routed is not None:
                found.append(routed)
        for topic in {topic for topic, _ in found} - self._topics:
            await self._engine.create_topic(topic, exist_ok=True)
            self._topics.add(topic)
        async with producer.transaction(subscriber) as tx:
            for topic, message_out in found:
                await tx.send(topic, message_out)
            await tx.send_offsets(subscriber)
        self.published += len(found)
