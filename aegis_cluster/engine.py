"""The engine: what a program holds to publish, read and manage topics.

Every public call takes `timeout=` (seconds; default: the engine's `request_timeout`), one deadline
that covers metadata, retries and waiting, and ends in success, a `Refused` (it certainly did not
happen) or an `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aegis_cluster import arguments
from aegis_cluster.channel import Channel
from aegis_cluster.client import transactions
from aegis_cluster.client.background import Background
from aegis_cluster.client.cluster import ClusterClient, addresses_of
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.config import StreamingConfig, load_streaming_config
from aegis_cluster.errors import ConfigError, Misuse, TopicExists, TopicNotFound
from aegis_cluster.filters import EventFilter
from aegis_cluster.group import ConsumerGroup, list_groups
from aegis_cluster.history import History, last_messages, messages_after
from aegis_cluster.keys import ClientKeys, configured_keys, load_client_keys
from aegis_cluster.message import PartitionOffsets, to_ms
from aegis_cluster.persistent import PersistentConfig, PersistentSubscription, listed
from aegis_cluster.producer import Producer, ProducerConfig
from aegis_cluster.publishing import all_or_partly
from aegis_cluster.subscribe_config import SubscribeConfig
from aegis_cluster.subscriber import Subscriber
from aegis_cluster.topics import TopicConfig, TopicDescription, wanted_changes
from aegis_cluster.transaction import TransactionalProducer
from aegis_cluster.transactional_ids import describe_id, list_ids
from aegis_cluster.wire.descriptions import settings_to_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from types import TracebackType
    from typing import Any, Self, Unpack

    from aegis_cluster.embedded import EmbeddedNode
    from aegis_cluster.group import GroupListing
    from aegis_cluster.keys import LinkKeys
    from aegis_cluster.message import BatchReceipt, Message, Receipt
    from aegis_cluster.persistent import SubscriptionListing
    from aegis_cluster.topics import TopicChanges
    from aegis_cluster.transactional_ids import TransactionDescription, TransactionListing


__all__ = ["EngineStats", "StreamingEngine", "TopicConfig", "TopicDescription"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What `engine.stats()` tells.

    messages: offsets that are kept, log start to high watermark, over all partitions.
    buffered_bytes: of messages that this engine's producers have sent and not seen answered.
    """

    cluster_id: str
    nodes: int
    topics: int
    partitions: int
    messages: int
    buffered_bytes: int


class _Reader(Protocol):
    """Whatever reads from an engine until it is closed."""

    async def close(self) -> None: ...


class StreamingEngine:
    """Made by `open` or `connect`; an async context manager, for one event loop."""

    def __init__(
        self,
        *,
        bootstrap: Sequence[str] = (),
        directory: Path | None = None,
        durability: str = "fsync",
        request_timeout: float | None = None,
        config: StreamingConfig | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        if config is not None:
            hint = "give what load_streaming_config() returns"
            arguments.instance(config, StreamingConfig, "config", hint)
        if (
            request_timeout is not None
            and arguments.seconds(request_timeout, "request_timeout") <= 0
        ):
            raise Misuse(f"request_timeout is {request_timeout}; give more than no seconds.")
        self.settings = load_streaming_config() if config is None else config
        """The configured defaults."""
        configured_s = self.settings.request_timeout_ms / 1000
        self.request_timeout = configured_s if request_timeout is None else request_timeout
        self._bootstrap = bootstrap
        self._directory = directory
        self._durability = durability
        self._keys: LinkKeys | None = None
        if directory is None:
            keys = _client_keys(keys) or configured_keys(self.settings)
            self._keys = None if keys is None else load_client_keys(keys)
        self._node: EmbeddedNode | None = None
        self._cluster: ClusterClient | None = None
        self._publisher: Producer | None = None
        self._producers: set[Producer] = set()
        self._subscribers: set[_Reader] = set()
        self._background: Background | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        durability: str = "fsync",
        request_timeout: float | None = None,
        config: StreamingConfig | None = None,
    ) -> StreamingEngine:
        """An engine whose one node runs in this process and keeps its files in the directory
        `path`, which is made when missing.

        The directory is locked while the engine is open: entering raises `NotReady` when another
        engine or node uses it. It can also be served by `aegis node run`, as a cluster of one
        node, and be opened here again. What was acknowledged is on disk, so a crash of the
        process loses none of it.

        durability: `"memory"` acknowledges once the system has the bytes and syncs behind: a crash
        of the process still loses nothing, a power cut the last moments.
        request_timeout: seconds, the default of every call's `timeout`. config: defaults of topics
        and clients; None: from `./aegis.toml` and the environment.
        """
        if durability not in ("fsync", "memory"):
            raise ConfigError(
                f"durability = {durability!r}; allowed: 'fsync', 'memory'.", key="durability"
            )
        if not isinstance(path, str | os.PathLike) or not str(path):
            raise Misuse(f"path is {path!r}; give the directory to keep the log in.")
        return cls(
            directory=Path(path),
            durability=durability,
            request_timeout=request_timeout,
            config=config,
        )

    @classmethod
    def connect(
        cls,
        bootstrap: str,
        *,
        request_timeout: float | None = None,
        config: StreamingConfig | None = None,
        keys: ClientKeys | None = None,
    ) -> StreamingEngine:
        """An engine for the cluster at these addresses (`"tcp://host:port,tcp://…"`).

        request_timeout: seconds, the default of every call's `timeout`. config: defaults of topics
        and clients; None: from `./aegis.toml` and the environment. keys: this client's key pair
        and the nodes' public keys, with which every link is encrypted; None: those of
        `[streaming.security]`, and where it names none, links without keys, which may not leave
        this machine. Raises `ConfigError`; entering raises `Unavailable` when no node answers in
        time, and `Unauthorized` when the nodes do not accept the key.
        """
        addresses = addresses_of(bootstrap)
        return cls(bootstrap=addresses, request_timeout=request_timeout, config=config, keys=keys)

    async def __aenter__(self) -> Self:
        if self._cluster is not None:
            raise Misuse("The engine is open already.")
        try:
            self._cluster = await self._start()
            await self._cluster.connect(self._cluster.deadline(self.request_timeout))
        except BaseException:
            await self.close()
            raise
        return self

    async def _start(self) -> ClusterClient:
        if self._directory is None:
            return self._client()
        from aegis_cluster.embedded import EmbeddedNode  # a client never loads a broker

        node = EmbeddedNode(self._directory, self._durability)
        cluster = await node.start()
        self._node = node
        return cluster

    def _client(self) -> ClusterClient:
        """Links of their own to the cluster, for the event loop that calls."""
        insecure = self.settings.security.insecure
        return ClusterClient(self._bootstrap, keys=self._keys, insecure=insecure)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all links. What is not acknowledged yet ends as unknown or unsent; subscriptions
        end as if they were closed."""
        for subscriber in list(self._subscribers):
            await subscriber.close()
        for producer in list(self._producers):
            await producer.close()
        self._publisher = None
        if self._background is not None:
            await self._background.close()
            self._background = None
        if self._cluster is not None:
            await self._cluster.close()
            self._cluster = None
        if self._node is not None:
            await self._node.close()
            self._node = None

    @property
    def is_embedded(self) -> bool:
        """Its node runs in this process, and nobody else can use its directory."""
        return self._directory is not None

    @property
    def cluster(self) -> ClusterClient:
        """The client below, for the classes that an engine makes. Raises `Misuse` when the engine
        is not open."""
        if self._cluster is None:
            raise Misuse(
                "The engine is not open; use 'async with StreamingEngine.open(…)' or"
                " 'StreamingEngine.connect(…)'."
            )
        if self._cluster.failure is not None:
            raise self._cluster.failure
        return self._cluster

    def deadline(self, timeout: float | None) -> float:
        """In the loop's time: the absolute deadline of a call with this `timeout`."""
        return self.cluster.deadline(self.request_timeout if timeout is None else timeout)

    # ---- topics

    async def create_topic(
        self,
        name: str,
        config: TopicConfig | None = None,
        *,
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Create a topic. Raises `TopicExists` (unless `exist_ok`, which takes one as it is),
        `InvalidTopic`, `NotEnoughReplicas`, `ConfigError`, `RequestTimeout`, `OutcomeUnknown`."""
        config = _topic_config(config)
        try:
            await self.cluster.create_topic(
                arguments.name(name),
                partitions=config.partitions,
                replicas=config.replication_factor,
                settings=settings_to_fields(config.settings(self.settings)),
                deadline=self.deadline(timeout),
            )
        except TopicExists:
            if not exist_ok:
                raise

    async def alter_topic(
        self,
        name: str,
        config: TopicConfig | None = None,
        *,
        timeout: float | None = None,
        **changes: Unpack[TopicChanges],
    ) -> None:
        """Change how a topic is kept: `await engine.alter_topic("orders", retention="1d")`.

        config: what to change; None in it leaves a setting as it is. The same may be said by
        keywords instead. Settings hold at once, on the leaders too, without a restart.

        `partitions` can only grow. Keys move then: from that moment on a key may belong to
        another partition than before, so its older messages stand in one and its newer ones in
        another, and order is kept within each only. Readers take up the new partitions within
        seconds, from their first message on; producers that are running elsewhere learn of them
        within half a minute.

        `replication_factor` may grow and shrink; leaders copy to new replicas in the background,
        one at a time, and `aegis topic describe` shows when they are in sync. A topic that was
        written embedded has one replica, until it is given more in a cluster.

        Raises `TopicNotFound`, `InvalidTopic` (fewer partitions, a value that is not possible),
        `NotEnoughReplicas`, `ConfigError`, `OutcomeUnknown`; `Misuse` when nothing, or both ways,
        are given.
        """
        wanted = wanted_changes(None if config is None else _topic_config(config), changes)
        await self.cluster.alter_topic(
            arguments.name(name),
            partitions=wanted.partitions,
            replicas=wanted.replication_factor,
            changes=wanted.changed_settings(),
            deadline=self.deadline(timeout),
        )

    async def delete_topic(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a topic and all its messages. Raises `TopicNotFound`, `RequestTimeout`,
        `OutcomeUnknown`."""
        await self.cluster.delete_topic(arguments.name(name), self.deadline(timeout))

    async def list_topics(self, *, timeout: float | None = None) -> list[str]:
        """Names of all topics, in order. Raises `Unavailable` when no node answers in time."""
        await self.cluster.refresh(None, self.deadline(timeout))
        return sorted(name for name in self.cluster.metadata.topics if not name.startswith("__"))

    async def describe_topic(self, name: str, *, timeout: float | None = None) -> TopicDescription:
        """Its settings, and where its replicas are. Raises `TopicNotFound`, `Unavailable`."""
        await self.cluster.refresh([arguments.name(name)], self.deadline(timeout))
        info = self.cluster.metadata.topic(name)
        nodes = self.cluster.metadata.nodes
        replicas = {
            placed.partition: [
                nodes[member.node].name if member.node in nodes else f"node {member.node}"
                for member in placed.replicas
            ]
            for placed in info.partitions
        }
        return TopicDescription(
            name, len(info.partitions), info.replication_factor, info.settings, replicas
        )

    async def offsets(
        self, topic: str, *, timeout: float | None = None
    ) -> dict[int, PartitionOffsets]:
        """Per partition: log start, high watermark, last stable offset, as of now (read index).

        Raises `TopicNotFound`; `RequestTimeout` when a partition has no leader that answers.
        """
        found = await list_offsets(self.cluster, arguments.name(topic), self.deadline(timeout))
        return {
            partition: PartitionOffsets(
                offsets.log_start, offsets.high_watermark, offsets.last_stable_offset
            )
            for partition, offsets in found.items()
        }

    async def stats(self, *, timeout: float | None = None) -> EngineStats:
        """Numbers of the cluster, as of now, and of this engine. Raises `RequestTimeout`,
        `Unavailable`."""
        deadline = self.deadline(timeout)
        await self.cluster.refresh(None, deadline)
        metadata = self.cluster.metadata
        topics = sorted(name for name in metadata.topics if not name.startswith("__"))
        messages = 0
        for topic in topics:
            with contextlib.suppress(TopicNotFound):  # deleted meanwhile
                for offsets in (await list_offsets(self.cluster, topic, deadline)).values():
                    messages += offsets.high_watermark - offsets.log_start
        return EngineStats(
            cluster_id=metadata.cluster_id,
            nodes=len(metadata.nodes),
            topics=len(topics),
            partitions=sum(len(metadata.topics[name].partitions) for name in topics),
            messages=messages,
            buffered_bytes=sum(producer.buffered_bytes for producer in self._producers),
        )

    # ---- publishing

    async def publish(
        self, topic: str, message: Message, *, timeout: float | None = None
    ) -> Receipt:
        """Publish one message; returns once it is durable on a majority.

        Raises `TopicNotFound`, `MessageTooLarge`, `UnsupportedPayload`, `OutcomeUnknown`, ….
        """
        return await self._own_producer().publish(topic, message, self.deadline(timeout))

    async def publish_to_many(
        self, topics: Sequence[str], message: Message, *, timeout: float | None = None
    ) -> list[Receipt]:
        """Publish one message to several topics, independently of each other.

        Returns one receipt for each topic, in their order. Raises `PartlyPublished` when only
        some have it: its `failed` and `unknown` are positions in `topics`.
        """
        deadline = self.deadline(timeout)
        hint = "give a list of topics; publish() takes one"
        topics = [arguments.name(topic) for topic in arguments.many(topics, "topics", hint)]
        producer = self._own_producer()
        calls = [producer.publish(topic, message, deadline) for topic in topics]
        return all_or_partly(await asyncio.gather(*calls, return_exceptions=True))

    async def publish_many(
        self,
        topic: str,
        messages: Iterable[Any],
        keys: Iterable[str | bytes | None] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[BatchReceipt]:
        """Publish many messages, or bare payloads with optional `keys` beside them.

        Raises `PartlyPublished` when only a part went through: it says which inputs were refused
        and of which the outcome is unknown.
        """
        deadline = self.deadline(timeout)
        return await self._own_producer().publish_many(topic, messages, keys, deadline)

    def producer(self, config: ProducerConfig | None = None) -> Producer:
        """A producer of its own, with a buffer of its own. Raises `ConfigError`."""
        config = ProducerConfig() if config is None else config
        arguments.instance(config, ProducerConfig, "config", "give a ProducerConfig(…)")
        options = config.options(self.settings)
        timeout = config.timeout_s(self.request_timeout)
        transactional = None
        if config.transactional_id is not None:
            transactional = TransactionalProducer(
                self,
                options,
                name=config.transactional_id,
                timeout_ms=config.transaction_timeout_ms(),
                request_timeout=timeout,
            )
        producer = Producer(self, options, timeout, transactional)
        self._producers.add(producer)
        return producer

    def background(self) -> Background:
        """Where heartbeats go on while handlers work; ends with the engine."""
        if self._background is None:
            node = self._node
            self._background = Background(self._client if node is None else node.another_client)
        return self._background

    def started(self, subscriber: _Reader) -> None:
        """A subscriber reads, and has to be closed before the engine."""
        self._subscribers.add(subscriber)

    def go_back(self, owner: TransactionalProducer) -> None:
        """A transaction of this producer is not committed: what it handled comes again."""
        for one in self._subscribers:
            if isinstance(one, Subscriber):
                one.go_back_for(owner)

    def forget(self, one: Producer | _Reader) -> None:
        """A producer or subscriber was closed."""
        if isinstance(one, Producer):
            self._producers.discard(one)
        else:
            self._subscribers.discard(one)

    def _own_producer(self) -> Producer:
        if self._publisher is None:
            self._publisher = self.producer()
        return self._publisher

    def channel(self, topic: str) -> Channel:
        """The same calls, bound to one topic; nothing is asked until one is used."""
        return Channel(self, arguments.name(topic))

    # ---- transactions

    async def list_transactions(self, *, timeout: float | None = None) -> list[TransactionListing]:
        """All transactional ids, by name. Raises `RequestTimeout`."""
        return await list_ids(self.cluster, self.deadline(timeout))

    async def describe_transaction(
        self, transactional_id: str, *, timeout: float | None = None
    ) -> TransactionDescription:
        """What is open under this id, and how its last transactions ended. Raises
        `NoOpenTransaction` for an id that nobody knows, `RequestTimeout`."""
        return await describe_id(self.cluster, transactional_id, self.deadline(timeout))

    async def abort_transaction(
        self, transactional_id: str, *, timeout: float | None = None
    ) -> None:
        """Abort what is open under this id, whoever has begun it; returns when every partition
        knows. Raises `NoOpenTransaction`, `RequestTimeout`, `OutcomeUnknown`."""
        await transactions.abort(self.cluster, transactional_id, self.deadline(timeout))

    # ---- groups

    def group(self, name: str) -> ConsumerGroup:
        """A consumer group, to look at and to move; nothing is asked until a call is made."""
        return ConsumerGroup(self, arguments.name(name, "group"))

    async def list_groups(self, *, timeout: float | None = None) -> list[GroupListing]:
        """All consumer groups, by name. Raises `RequestTimeout`."""
        return await list_groups(self, self.deadline(timeout))

    # ---- persistent subscriptions

    def persistent_subscription(
        self, topic: str, name: str, config: PersistentConfig | None = None
    ) -> PersistentSubscription:
        """A subscription that is kept on the server, whose consumers compete for single messages:
        an async context manager and an async iterator; entering makes it when it is not there.

        config: None takes the subscription as it is. Entering raises `TopicNotFound`, and
        `ConfigError` when it exists with other rules.
        """
        if config is not None:
            arguments.instance(config, PersistentConfig, "config", "give a PersistentConfig(…)")
        return PersistentSubscription(self, topic, name, config)

    async def list_subscriptions(
        self, topic: str | None = None, *, timeout: float | None = None
    ) -> list[SubscriptionListing]:
        """All persistent subscriptions, or those of one topic. Raises `RequestTimeout`."""
        return await listed(self, topic, self.deadline(timeout))

    # ---- reading

    def subscribe(
        self,
        topics: str | Sequence[str],
        config: SubscribeConfig | None = None,
        *,
        filter: EventFilter | None = None,
        timeout: float | None = None,
    ) -> Subscriber:
        """Read topics: an async context manager and an async iterator.

        topics: names, and patterns with `*`, `?` or `[…]`, which follow new topics too, from
        their first message on. filter: hand out only what it matches. Starting raises
        `TopicNotFound` for a name that no topic has.
        """
        names = _names(topics)
        config = SubscribeConfig() if config is None else config
        arguments.instance(config, SubscribeConfig, "config", "give a SubscribeConfig(…)")
        if filter is not None:
            hint = "give an EventFilter(…), for example EventFilter(where=your_function)"
            arguments.instance(filter, EventFilter, "filter", hint)
        return Subscriber(
            self,
            names,
            config,
            self.request_timeout if timeout is None else arguments.seconds(timeout),
            max_poll_records=self.settings.consumer.max_poll_records,
            event_filter=filter,
        )

    def history(self, topic: str, count: int, *, timeout: float | None = None) -> History:
        """The newest `count` messages of a topic by their timestamps, oldest first.

        `await` it for a list, or step through it with `async for`. Raises `TopicNotFound`,
        `RequestTimeout`, `CorruptRecord`.
        """
        topic, count = arguments.name(topic), arguments.whole(count, "count", least=1)
        return History(lambda: last_messages(self.cluster, topic, count, self.deadline(timeout)))

    def history_after(
        self, topic: str, timestamp: datetime, *, timeout: float | None = None
    ) -> History:
        """Every message of that time or later that a topic holds by now, partition by partition.

        `await` it for a list, or step through it with `async for`. Raises `TopicNotFound`,
        `RequestTimeout`, `CorruptRecord`; `Misuse` for a time without a zone.
        """
        topic, time_ms = arguments.name(topic), max(0, to_ms(timestamp))
        return History(lambda: messages_after(self.cluster, topic, time_ms, self.deadline(timeout)))


def _topic_config(config: TopicConfig | None) -> TopicConfig:
    """The default for None. Raises `Misuse`."""
    found = TopicConfig() if config is None else config
    return arguments.instance(found, TopicConfig, "config", "give a TopicConfig(…)")


def _client_keys(keys: ClientKeys | None) -> ClientKeys | None:
    if keys is not None:
        arguments.instance(keys, ClientKeys, "keys", "give ClientKeys(key=…, servers=…)")
    return keys


def _names(topics: str | Sequence[str]) -> list[str]:
    """Names and patterns, each once. Raises `Misuse`."""
    hint = "give a topic's name or a list of names"
    asked = [topics] if isinstance(topics, str) else arguments.many(topics, "topics", hint)
    names = list(dict.fromkeys(arguments.name(topic) for topic in asked))
    if not names:
        raise Misuse("A subscription needs at least one topic or pattern.")
    return names
