"""Nodes and topics as values, and as the fields in which requests, replies and metadata carry them.

Fields are only ever appended; both the cluster and its clients read them here, so there is one
description of each thing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aegis_cluster.errors import PeerViolation
from aegis_cluster.ids import GroupId, Member, NodeId, ShardId
from aegis_cluster.limits import MESSAGE_BYTES_DEFAULT, TOMBSTONE_RETENTION_MS_DEFAULT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

PORT_MAX: Final = 65_535
NUMBER_MAX: Final = 2**63 - 1
TEXT_CHARS_MAX: Final = 1_024
EVENT_STORE: Final = "eventstore"
"""The kind of topics whose records are events of streams."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node as it last registered.

    base_port: first of its ports; every endpoint follows from it and the shard's number.
    shards: how many shards it runs now; a group lives on shard `group % shards`.
    """

    node: NodeId
    incarnation: str
    name: str
    host: str
    base_port: int
    shards: int
    boot_id: str

    @property
    def member(self) -> Member:
        return Member(self.node, self.incarnation)

    def shard_of(self, group: GroupId) -> ShardId:
        return ShardId(group % self.shards)


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """How a topic is kept; times in milliseconds, `None` = without limit."""

    kind: str = "topic"
    retention_ms: int | None = None
    retention_bytes: int | None = None
    cleanup: str = "delete"
    compression: str = "none"
    max_message_bytes: int = MESSAGE_BYTES_DEFAULT
    tombstone_retention_ms: int = TOMBSTONE_RETENTION_MS_DEFAULT
    """How long a null value is kept in a compacted topic, from its append on."""

    @property
    def holds_events(self) -> bool:
        """It is an event store: its records are events of streams."""
        return self.kind == EVENT_STORE

    @property
    def compacts(self) -> bool:
        """Only the latest record of each key is kept."""
        return "compact" in self.cleanup

    @property
    def deletes(self) -> bool:
        """What is too old, or too much, goes."""
        return "delete" in self.cleanup


class PartitionInfo(NamedTuple):
    """One partition: its Raft group and where its replicas were placed, preferred leader first."""

    partition: int
    group: GroupId
    replicas: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic; token: whatever its creator marked the request with, so that a repeat is known."""

    name: str
    settings: TopicSettings
    partitions: tuple[PartitionInfo, ...]
    token: str = ""

    @property
    def replication_factor(self) -> int:
        return len(self.partitions[0].replicas)


def node_to_fields(info: NodeInfo) -> list[Any]:
    return [getattr(info, field.name) for field in fields(info)]


def node_from_fields(values: Sequence[Any]) -> NodeInfo:
    """Raise `PeerViolation` for what no node can be."""
    info = _build(NodeInfo, values)
    if info.node < 1 or info.shards < 1 or not 1 <= info.base_port <= PORT_MAX:
        raise PeerViolation("A node's number, shards or port is none.", have=list(values)[:7])
    return replace(info, node=NodeId(info.node))


def settings_to_fields(settings: TopicSettings) -> list[Any]:
    return [getattr(settings, field.name) for field in fields(settings)]


def settings_from_fields(values: Sequence[Any]) -> TopicSettings:
    return _build(TopicSettings, values)


def settings_with(settings: TopicSettings, changes: Mapping[str, Any]) -> TopicSettings:
    """The settings with some of their fields changed. Raises `PeerViolation` for what no field is
    called, and for a value that it cannot have."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise PeerViolation(f"A topic has no setting {unknown[0]!r}.")
    return _build(TopicSettings, list((values | dict(changes)).values()))


def topic_to_fields(info: TopicInfo) -> list[Any]:
    settings = settings_to_fields(info.settings)
    return [info.name, settings, partitions_to_fields(info.partitions), info.token]


def partitions_to_fields(partitions: Sequence[PartitionInfo]) -> list[Any]:
    return [[p.group, [list(m) for m in p.replicas]] for p in partitions]


def partitions_from_fields(placed: Sequence[Any], *, first: int = 0) -> tuple[PartitionInfo, ...]:
    """first: number of the first of them. Raises `TypeError` or `ValueError`."""
    return tuple(
        PartitionInfo(
            number,
            GroupId(group),
            tuple(Member(NodeId(node), incarnation) for node, incarnation in on),
        )
        for number, (group, on) in enumerate(placed, start=first)
    )


def topic_from_fields(values: Sequence[Any]) -> TopicInfo:
    try:
        name, settings, placed, token = values[:4]
        partitions = partitions_from_fields(placed)
        return TopicInfo(str(name), settings_from_fields(settings), partitions, str(token))
    except (TypeError, ValueError) as error:
        raise PeerViolation(f"A topic's description is malformed: {error}.") from error


_IS_OF_TYPE: Final[dict[Any, Callable[[object], bool]]] = {
    "str": lambda value: type(value) is str and len(value) <= TEXT_CHARS_MAX,
    "int": lambda value: type(value) is int and 0 <= value <= NUMBER_MAX,
    "NodeId": lambda value: type(value) is int and 0 <= value <= NUMBER_MAX,
    "int | None": lambda v: v is None or (type(v) is int and 0 <= v <= NUMBER_MAX),
}
"""What may stand in a field, by its annotation: strangers send these values."""


def _build(kind: type[T], values: Sequence[Any]) -> T:
    """Make a dataclass from its fields in order; a newer sender may know more of them."""
    known = fields(kind)  # type: ignore[arg-type]
    for field, value in zip(known, values, strict=False):
        if not _IS_OF_TYPE[field.type](value):
            raise PeerViolation(f"{kind.__name__}.{field.name} is no {field.type}.", have=value)
    try:
        return kind(*values[: len(known)])
    except TypeError as error:
        raise PeerViolation(f"{kind.__name__} came with the wrong fields: {error}.") from error
