"""The engine: what a program holds to publish, read and manage topics.

Every public call takes `timeout=` (seconds; default: the engine's `request_timeout`), one deadline
that covers metadata, retries and waiting, and ends in success, a `Refused` (it certainly did not
happen) or an `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.cluster import ClusterClient, Pause
from aegis_cluster.client.producer import Producer, ProducerOptions
from aegis_cluster.config import parse_duration, parse_size
from aegis_cluster.errors import (
    AegisError,
    ConfigError,
    Misuse,
    NotLeader,
    OutcomeUnknown,
    PartlyPublished,
    RequestTimeout,
    TopicExists,
)
from aegis_cluster.limits import REQUEST_TIMEOUT_MS_DEFAULT
from aegis_cluster.message import (
    BatchReceipt,
    Message,
    PartitionOffsets,
    Receipt,
    from_ms,
    to_row,
)
from aegis_cluster.subscriber import SubscribeConfig, Subscriber
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.descriptions import TopicInfo, TopicSettings, settings_to_fields
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Self

    from aegis_cluster.client.metadata import ShardAddress
    from aegis_cluster.client.producer import Stored
    from aegis_cluster.embedded import EmbeddedNode

DEFAULT_TIMEOUT_S: Final = REQUEST_TIMEOUT_MS_DEFAULT / 1000
DEFAULT_RETENTION: Final = "7d"
DEFAULT_MESSAGE_SIZE: Final = "1MB"
OFFSETS_TRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class TopicConfig:
    """How a topic is made; None means the configured default.

    partitions: 1. replication_factor: min(3, nodes). retention: `"7d"`. retention_bytes:
    unlimited. cleanup: `"delete"`. compression: none. max_message_size: `"1MB"`.
    """

    partitions: int | None = None
    replication_factor: int | None = None
    retention: str | None = None
    retention_bytes: str | int | None = None
    cleanup: str | None = None
    compression: str | None = None
    max_message_size: str | int | None = None
    kind: str = "topic"

    def settings(self) -> TopicSettings:
        """As numbers. Raises `ConfigError`, naming the value."""
        size = self.max_message_size or DEFAULT_MESSAGE_SIZE
        return TopicSettings(
            kind=self.kind,
            retention_ms=_parse(parse_duration, "retention", self.retention or DEFAULT_RETENTION),
            retention_bytes=None
            if self.retention_bytes is None
            else _parse(parse_size, "retention_bytes", self.retention_bytes),
            cleanup=self.cleanup or "delete",
            compression=self.compression or "none",
            max_message_bytes=_parse(parse_size, "max_message_size", size),
        )


def _parse(parse: Callable[[object], int], name: str, value: object) -> int:
    try:
        return parse(value)
    except ValueError:
        raise ConfigError(
            f"{name} = {value!r} is not understood; write it like '7d' or '1MB'.", key=name
        ) from None


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic as the cluster sees it; replicas: node names, preferred leader first."""

    name: str
    partitions: int
    replication_factor: int
    settings: TopicSettings
    replicas: dict[int, list[str]]


class StreamingEngine:
    """Made by `open` or `connect`; an async context manager, for one event loop."""

    def __init__(
        self,
        bootstrap: Sequence[str] = (),
        request_timeout: float = DEFAULT_TIMEOUT_S,
        *,
        directory: Path | None = None,
    ) -> None:
        self.request_timeout = request_timeout
        self._bootstrap = bootstrap
        self._directory = directory
        self._node: EmbeddedNode | None = None
        self._cluster: ClusterClient | None = None
        self._producer: Producer | None = None

    @classmethod
    def open(
        cls, path: str | Path, *, request_timeout: float = DEFAULT_TIMEOUT_S
    ) -> StreamingEngine:
        """An engine whose one node runs in this process and keeps its files in the directory
        `path`, which is made when missing.

        The directory is locked while the engine is open: entering raises `NotReady` when another
        engine or node uses it. It can also be served by `aegis node run`, as a cluster of one
        node, and be opened here again. What was acknowledged is on disk, so a crash of the
        process loses none of it.
        """
        return cls(request_timeout=request_timeout, directory=Path(path))

    @classmethod
    def connect(
        cls, bootstrap: str, *, request_timeout: float = DEFAULT_TIMEOUT_S
    ) -> StreamingEngine:
        """An engine for the cluster at these addresses (`"tcp://host:port,tcp://…"`)."""
        addresses = [address.strip() for address in bootstrap.split(",") if address.strip()]
        if not addresses or not all(address.startswith("tcp://") for address in addresses):
            raise ConfigError(
                f"{bootstrap!r} is no list of addresses; write"
                " 'tcp://127.0.0.1:7101,tcp://127.0.0.1:7201'."
            )
        return cls(addresses, request_timeout)

    async def __aenter__(self) -> Self:
        try:
            self._cluster = await self._start()
            await self._cluster.connect(self._cluster.deadline(self.request_timeout))
        except BaseException:
            await self.close()
            raise
        return self

    async def _start(self) -> ClusterClient:
        if self._directory is None:
            return ClusterClient(self._bootstrap)
        from aegis_cluster.embedded import EmbeddedNode  # a client never loads a broker

        node = EmbeddedNode(self._directory)
        cluster = await node.start()
        self._node = node
        return cluster

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all links; what is not acknowledged yet ends as unknown or unsent."""
        if self._producer is not None:
            await self._producer.close()
            self._producer = None
        if self._cluster is not None:
            await self._cluster.close()
            self._cluster = None
        if self._node is not None:
            await self._node.close()
            self._node = None

    @property
    def cluster(self) -> ClusterClient:
        if self._cluster is None:
            raise Misuse("The engine is not open; use 'async with StreamingEngine.connect(…)'.")
        if self._cluster.failure is not None:
            raise self._cluster.failure
        return self._cluster

    def _deadline(self, timeout: float | None) -> float:
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
        """Create a topic. Raises `TopicExists` (unless `exist_ok`), `InvalidTopic`,
        `NotEnoughReplicas`, `ConfigError`."""
        config = config or TopicConfig()
        try:
            await self.cluster.create_topic(
                name,
                partitions=config.partitions,
                replicas=config.replication_factor,
                settings=settings_to_fields(config.settings()),
                deadline=self._deadline(timeout),
            )
        except TopicExists:
            if not exist_ok:
                raise

    async def delete_topic(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a topic and all its messages. Raises `TopicNotFound`."""
        await self.cluster.delete_topic(name, self._deadline(timeout))

    async def list_topics(self, *, timeout: float | None = None) -> list[str]:
        """Names of all topics, in order."""
        await self.cluster.refresh(None, self._deadline(timeout))
        return sorted(self.cluster.metadata.topics)

    async def describe_topic(self, name: str, *, timeout: float | None = None) -> TopicDescription:
        """Raise `TopicNotFound`."""
        await self.cluster.refresh([name], self._deadline(timeout))
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
        """Per partition: log start, high watermark, last stable offset, as of now (read index)."""
        deadline = self._deadline(timeout)
        info = await self.cluster.topic(topic, deadline)
        missing = set(range(len(info.partitions)))
        found: dict[int, PartitionOffsets] = {}
        pause = Pause(deadline)
        while missing:
            for address, partitions in self._by_leader(info, sorted(missing)).items():
                found.update(await self._ask_offsets(info, address, partitions, deadline))
            missing -= set(found)
            if missing:
                if self.cluster.now() >= deadline:
                    raise RequestTimeout(
                        f"Partitions {sorted(missing)} of {topic} have no leader that answers."
                    )
                await pause.wait()
                await self.cluster.refresh([topic], deadline)
                info = self.cluster.metadata.topic(topic)
        return dict(sorted(found.items()))

    def _by_leader(
        self, info: TopicInfo, partitions: Iterable[int]
    ) -> dict[ShardAddress, list[int]]:
        by_leader: dict[ShardAddress, list[int]] = defaultdict(list)
        for partition in partitions:
            address = self.cluster.metadata.address_of(info, partition)
            if address is not None:
                by_leader[address].append(partition)
        return by_leader

    async def _ask_offsets(
        self, info: TopicInfo, address: ShardAddress, partitions: list[int], deadline: float
    ) -> dict[int, PartitionOffsets]:
        """What one shard knows; partitions that it does not lead are left out."""
        metadata = self.cluster.metadata
        groups = [info.partitions[partition].group for partition in partitions]
        until = min(deadline, self.cluster.now() + OFFSETS_TRY_S)
        try:
            link = self.cluster.link(address.endpoint)
            await link.ready(until)
            reply = await link.request(Api.LIST_OFFSETS, [groups], deadline=until)
        except AegisError as error:
            if not error.retriable and not isinstance(error, OutcomeUnknown):
                raise
            for group in groups:
                metadata.forget_leader(group)
            return {}
        found = {}
        results = take_list(reply.fields, 0, "results")
        for slot, partition in enumerate(partitions):
            result = take_list(results, slot, "result")
            if result[0] == 0:
                start, end, stable = (take_int(result, n, "offset") for n in (1, 2, 3))
                found[partition] = PartitionOffsets(start, end, stable)
                continue
            refusal = error_from_reply(result[0], result[1:])
            if not refusal.retriable:
                raise refusal
            if isinstance(refusal, NotLeader):
                metadata.note_leader(groups[slot], refusal.details.get("leader"))
        return found

    # ---- publishing

    async def publish(
        self, topic: str, message: Message, *, timeout: float | None = None
    ) -> Receipt:
        """Publish one message; returns once it is durable on a majority.

        Raises `TopicNotFound`, `MessageTooLarge`, `UnsupportedPayload`, `OutcomeUnknown`, ….
        """
        deadline = self._deadline(timeout)
        info = await self.cluster.topic(topic, deadline)
        producer = await self._own_producer(deadline)
        row = to_row(message, _now_ms())
        partition = _partition(producer, info, row[1])
        future, place = await producer.add(info, partition, row, deadline)
        stored = await asyncio.shield(future)  # others may have records in the same batch
        return Receipt(topic, partition, stored.base_offset + place, from_ms(stored.time_ms))

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
        deadline = self._deadline(timeout)
        info = await self.cluster.topic(topic, deadline)
        producer = await self._own_producer(deadline)
        now_ms = _now_ms()
        batches: dict[asyncio.Future[Stored], list[tuple[int, int]]] = defaultdict(list)
        refused: dict[int, AegisError] = {}
        for number, message in enumerate(_messages(messages, keys)):
            try:
                row = to_row(message, now_ms)
                partition = _partition(producer, info, row[1])
                future, place = await producer.add(info, partition, row, deadline)
            except AegisError as error:
                refused[number] = error  # those before it are under way already
            else:
                batches[future].append((number, place))
        if batches:
            await asyncio.wait(batches)
        return _receipts(batches, refused)

    async def _own_producer(self, deadline: float) -> Producer:
        if self._producer is None:
            self._producer = Producer(self.cluster, ProducerOptions())
        await self._producer.start(deadline)
        return self._producer

    # ---- reading

    def subscribe(
        self, topic: str, config: SubscribeConfig | None = None, *, timeout: float | None = None
    ) -> Subscriber:
        """Read a topic: an async context manager and an async iterator."""
        wait = self.request_timeout if timeout is None else timeout
        return Subscriber(self, topic, config or SubscribeConfig(), wait)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _partition(producer: Producer, info: TopicInfo, key: bytes | None) -> int:
    if key is None:
        return producer.choose_partition(info)
    return partition_for(key, len(info.partitions))


def _messages(
    messages: Iterable[Any], keys: Iterable[str | bytes | None] | None
) -> Iterable[Message]:
    if keys is None:
        return (m if isinstance(m, Message) else Message(payload=m) for m in messages)
    values, names = list(messages), list(keys)
    if len(values) != len(names):
        raise Misuse(f"{len(values)} messages came with {len(names)} keys; give one for each.")
    return (
        replace(m, key=key) if isinstance(m, Message) else Message(key=key, payload=m)
        for m, key in zip(values, names, strict=True)
    )


def _receipts(
    batches: dict[asyncio.Future[Stored], list[tuple[int, int]]],
    refused: dict[int, AegisError],
) -> list[BatchReceipt]:
    """What became of each batch; `batches` names the inputs in it and their places there.

    refused: inputs that never got into a batch.
    """
    receipts: list[BatchReceipt] = []
    failed: list[int] = list(refused)
    unknown: list[int] = []
    first: BaseException | None = next(iter(refused.values()), None)
    for future, members in batches.items():
        error = future.exception()
        if error is None:
            places = [place for _, place in members]
            receipts.extend(_runs(future.result(), places))
            continue
        first = first or error
        numbers = [number for number, _ in members]
        (unknown if isinstance(error, OutcomeUnknown) else failed).extend(numbers)
    if first is None:
        return receipts
    if not receipts and not unknown and isinstance(first, AegisError):
        raise first
    raise PartlyPublished(
        f"{len(failed)} messages were refused and of {len(unknown)} the outcome is unknown, the"
        f" others were stored. First reason: {first}",
        receipts=receipts,
        failed=sorted(failed),
        unknown=sorted(unknown),
    ) from first


def _runs(stored: Stored, places: list[int]) -> Iterable[BatchReceipt]:
    """One receipt for each run of neighbours: others may have records between ours."""
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            offset = stored.base_offset + places[start]
            yield BatchReceipt(stored.partition, offset, end - start)
            start = end
