"""An engine that keeps messages in lists: what the commands see of a cluster, and no more."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aegis_cluster import BatchReceipt, Message, Offset, PartitionOffsets, ReceivedMessage
from aegis_cluster.errors import TopicExists, TopicNotFound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aegis_cluster import SubscribeConfig, TopicConfig

TIME = datetime(2026, 1, 31, 12, tzinfo=UTC)


class FakeEngine:
    """Two partitions for every topic; a record goes to the one of its key's first letter."""

    def __init__(self) -> None:
        self.topics: dict[str, list[list[ReceivedMessage]]] = {}
        self.configs: dict[str, TopicConfig] = {}
        self.chunks: list[int] = []
        self.fail_at: int | None = None
        """The number of the chunk that fails, from 0 on."""
        self.failure: BaseException = TopicNotFound("it is gone")

    async def __aenter__(self) -> FakeEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def messages(self, topic: str) -> list[ReceivedMessage]:
        return [message for partition in self.topics[topic] for message in partition]

    async def create_topic(self, name: str, config: TopicConfig, *, exist_ok: bool) -> None:
        config.settings()
        if name in self.topics and not exist_ok:
            raise TopicExists(f"topic {name} exists")
        self.topics.setdefault(name, [[], []])
        self.configs[name] = config

    async def describe_topic(self, name: str) -> None:
        self._topic(name)

    async def alter_topic(self, name: str, config: TopicConfig) -> None:
        self._topic(name)
        config.changed_settings()
        self.configs[name] = config

    async def delete_topic(self, name: str) -> None:
        self._topic(name)
        del self.topics[name]

    async def list_topics(self) -> list[str]:
        return sorted(self.topics)

    def _topic(self, name: str) -> list[list[ReceivedMessage]]:
        if name not in self.topics:
            raise TopicNotFound(f"there is no topic {name}")
        return self.topics[name]

    async def publish_many(self, topic: str, messages: Iterable[Message]) -> list[BatchReceipt]:
        partitions = self._topic(topic)
        if self.fail_at == len(self.chunks):
            raise self.failure
        receipts = []
        count = 0
        for message in messages:
            count += 1
            number = ord(str(message.key)[0]) % 2 if message.key else 0
            partition = partitions[number]
            receipts.append(BatchReceipt(number, len(partition), 1))
            partition.append(
                ReceivedMessage(
                    message.key, message.payload, message.headers, TIME, topic, number,
                    len(partition),
                )
            )  # fmt: skip
        self.chunks.append(count)
        return receipts

    async def offsets(self, topic: str) -> dict[int, PartitionOffsets]:
        return {
            number: PartitionOffsets(0, len(partition), len(partition))
            for number, partition in enumerate(self._topic(topic))
        }

    def subscribe(self, topic: str, config: SubscribeConfig) -> FakeSubscriber:
        return FakeSubscriber(self._topic(topic), config.start)


class FakeSubscriber:
    def __init__(self, partitions: list[list[ReceivedMessage]], start: Offset) -> None:
        self._partitions = partitions
        self.positions = {
            number: start.resolve(log_start=0, high_watermark=len(partition))
            for number, partition in enumerate(partitions)
        }

    async def __aenter__(self) -> FakeSubscriber:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def poll(self, max_records: int, timeout: float) -> list[ReceivedMessage]:
        for number, partition in enumerate(self._partitions):
            position = self.positions[number]
            found = partition[position : position + max_records]
            if found:
                self.positions[number] = position + len(found)
                return found
        return []


def status(*topics: str) -> dict[str, Any]:
    """What `cluster_status` gives."""
    partition = {
        "partition": 0,
        "leader": "node-1",
        "replicas": ["node-1", "node-2", "node-3"],
        "in_sync": ["node-1", "node-2"],
        "log_start": 0,
        "high_watermark": 42,
    }
    nodes = [
        {"name": f"node-{n}", "endpoint": f"tcp://127.0.0.1:7{n}01", "alive": n < 3, "shards": 1}
        for n in (1, 2, 3)
    ]
    return {
        "nodes": nodes,
        "topics": [{"name": name, "partitions": [partition]} for name in topics],
    }
