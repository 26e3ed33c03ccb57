"""What the cluster knows of itself, and the commands that change it.

A *command* is a plain value; the controller (the leader of `__cluster/0`) decides on one, its log
carries it, and every `MetadataTable` applies it. A command therefore holds results, never
questions: the replicas it names were chosen before it was written, so applying it needs no
clock, no chance and no look at the world.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgpack

from aegis_cluster.errors import CorruptRecord, PeerViolation
from aegis_cluster.ids import GroupId, Member, NodeId, ProducerId, ShardId

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

COMMAND_VERSION: Final = 1


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
    """What a topic was created with; times in milliseconds, `None` = without limit."""

    kind: str = "topic"
    retention_ms: int | None = None
    retention_bytes: int | None = None
    cleanup: str = "delete"
    compression: str = "none"
    max_message_bytes: int = 1_000_000


class PartitionInfo(NamedTuple):
    """One partition: its Raft group and where its replicas were placed, preferred leader first."""

    partition: int
    group: GroupId
    replicas: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class TopicInfo:
    name: str
    settings: TopicSettings
    partitions: tuple[PartitionInfo, ...]

    @property
    def replication_factor(self) -> int:
        return len(self.partitions[0].replicas)


@dataclass(frozen=True, slots=True)
class RegisterNode:
    info: NodeInfo


@dataclass(frozen=True, slots=True)
class CreateTopic:
    info: TopicInfo


@dataclass(frozen=True, slots=True)
class DeleteTopic:
    name: str


@dataclass(frozen=True, slots=True)
class GrantProducerIds:
    """`count` producer ids from `first` on belong to one shard process and nobody else."""

    first: ProducerId
    count: int


Command = RegisterNode | CreateTopic | DeleteTopic | GrantProducerIds


def node_to_fields(info: NodeInfo) -> list[Any]:
    return [getattr(info, field.name) for field in fields(info)]


def node_from_fields(values: Sequence[Any]) -> NodeInfo:
    info = _build(NodeInfo, values)
    return replace(info, node=NodeId(info.node))


def topic_to_fields(info: TopicInfo) -> list[Any]:
    settings = [getattr(info.settings, field.name) for field in fields(info.settings)]
    return [
        info.name,
        settings,
        [[p.group, [list(m) for m in p.replicas]] for p in info.partitions],
    ]


def topic_from_fields(values: Sequence[Any]) -> TopicInfo:
    try:
        name, settings, placed = values
        partitions = tuple(
            PartitionInfo(
                number,
                GroupId(group),
                tuple(Member(NodeId(n), incarnation) for n, incarnation in on),
            )
            for number, (group, on) in enumerate(placed)
        )
        return TopicInfo(str(name), _build(TopicSettings, settings), partitions)
    except (TypeError, ValueError) as error:
        raise PeerViolation(f"A topic's description is malformed: {error}.") from error


def _build(kind: type[T], values: Sequence[Any]) -> T:
    """Make a dataclass from its fields in order; a wrong count is the sender's fault."""
    try:
        return kind(*values)
    except TypeError as error:
        raise PeerViolation(f"{kind.__name__} came with the wrong fields: {error}.") from error


def encode_command(command: Command) -> bytes:
    """The value of one record in `__cluster/0`."""
    match command:
        case RegisterNode(info):
            body: list[Any] = ["register_node", node_to_fields(info)]
        case CreateTopic(topic):
            body = ["create_topic", topic_to_fields(topic)]
        case DeleteTopic(name):
            body = ["delete_topic", name]
        case GrantProducerIds(first, count):
            body = ["grant_producer_ids", first, count]
    return bytes(msgpack.packb([COMMAND_VERSION, *body]))


def decode_command(value: bytes) -> Command:
    """Raise `CorruptRecord` when the value is no command that this version knows."""
    try:
        version, kind, *body = msgpack.unpackb(value, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptRecord(
            f"A record of the cluster's metadata is no command: {error}."
        ) from error
    if version > COMMAND_VERSION:
        raise CorruptRecord(
            f"A metadata command has version {version}; this program reads up to {COMMAND_VERSION}."
            " Run a newer aegis-cluster."
        )
    match kind, body:
        case "register_node", [values]:
            return RegisterNode(node_from_fields(values))
        case "create_topic", [values]:
            return CreateTopic(topic_from_fields(values))
        case "delete_topic", [str(name)]:
            return DeleteTopic(name)
        case "grant_producer_ids", [int(first), int(count)]:
            return GrantProducerIds(ProducerId(first), count)
    raise CorruptRecord(f"The metadata command {kind!r} is unknown to this version.")
