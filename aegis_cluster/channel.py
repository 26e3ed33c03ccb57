"""A channel: the engine's calls, bound to one topic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from typing import Unpack

    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.filters import EventFilter
    from aegis_cluster.history import History
    from aegis_cluster.message import BatchReceipt, Message, PartitionOffsets, Receipt
    from aegis_cluster.subscribe_config import SubscribeConfig
    from aegis_cluster.subscriber import Subscriber
    from aegis_cluster.topics import TopicChanges, TopicConfig, TopicDescription


class Channel:
    """Made by `engine.channel(topic)`; each call raises what the engine's call of that name does.

    It holds nothing of its own: closing the engine ends it.
    """

    def __init__(self, engine: StreamingEngine, topic: str) -> None:
        self.topic = topic
        self._engine = engine

    async def publish(self, message: Message, *, timeout: float | None = None) -> Receipt:
        """As `engine.publish`."""
        return await self._engine.publish(self.topic, message, timeout=timeout)

    async def publish_many(
        self,
        messages: Iterable[Any],
        keys: Iterable[str | bytes | None] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[BatchReceipt]:
        """As `engine.publish_many`."""
        return await self._engine.publish_many(self.topic, messages, keys, timeout=timeout)

    def subscribe(
        self,
        config: SubscribeConfig | None = None,
        *,
        filter: EventFilter | None = None,
        timeout: float | None = None,
    ) -> Subscriber:
        """As `engine.subscribe`."""
        return self._engine.subscribe(self.topic, config, filter=filter, timeout=timeout)

    def history(self, count: int, *, timeout: float | None = None) -> History:
        """As `engine.history`."""
        return self._engine.history(self.topic, count, timeout=timeout)

    def history_after(self, timestamp: datetime, *, timeout: float | None = None) -> History:
        """As `engine.history_after`."""
        return self._engine.history_after(self.topic, timestamp, timeout=timeout)

    async def offsets(self, *, timeout: float | None = None) -> dict[int, PartitionOffsets]:
        """As `engine.offsets`."""
        return await self._engine.offsets(self.topic, timeout=timeout)

    async def alter(
        self,
        config: TopicConfig | None = None,
        *,
        timeout: float | None = None,
        **changes: Unpack[TopicChanges],
    ) -> None:
        """As `engine.alter_topic`."""
        await self._engine.alter_topic(self.topic, config, timeout=timeout, **changes)

    async def describe(self, *, timeout: float | None = None) -> TopicDescription:
        """As `engine.describe_topic`."""
        return await self._engine.describe_topic(self.topic, timeout=timeout)
