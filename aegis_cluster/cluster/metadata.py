"""What the cluster knows of itself, and the commands that change it.

A *command* is a plain value; the controller (the leader of `__cluster/0`) decides on one, its log
carries it, and every `MetadataTable` applies it. A command therefore holds results, never
questions: the replicas it names were chosen before it was written, so applying it needs no
clock, no chance and no look at the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgpack

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import GroupId, Member, NodeId, ProducerId
from aegis_cluster.wire.descriptions import (
    NodeInfo,
    PartitionInfo,
    TopicInfo,
    TopicSettings,
    node_from_fields,
    node_to_fields,
    partitions_from_fields,
    partitions_to_fields,
    settings_from_fields,
    settings_to_fields,
    topic_from_fields,
    topic_to_fields,
)

COMMAND_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class RegisterNode:
    info: NodeInfo


@dataclass(frozen=True, slots=True)
class ReplaceMember:
    """The node came back with an empty directory: a new member takes the places of the old one."""

    info: NodeInfo
    old: Member


@dataclass(frozen=True, slots=True)
class CreateTopic:
    info: TopicInfo


@dataclass(frozen=True, slots=True)
class AlterTopic:
    """Other settings from now on, and partitions behind those that the topic has.

    moved: all partitions that it has, where other members hold them from now on; else empty.
    """

    name: str
    settings: TopicSettings
    added: tuple[PartitionInfo, ...] = ()
    moved: tuple[PartitionInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class DeleteTopic:
    name: str


@dataclass(frozen=True, slots=True)
class PlaceReplicas:
    """From now on these members hold the partition, preferred leader first."""

    group: GroupId
    replicas: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class GrantProducerIds:
    """`count` producer ids from `first` on belong to one shard process and nobody else."""

    first: ProducerId
    count: int


Command = (
    RegisterNode
    | ReplaceMember
    | CreateTopic
    | AlterTopic
    | DeleteTopic
    | PlaceReplicas
    | GrantProducerIds
)


def encode_command(command: Command) -> bytes:
    """The value of one record in `__cluster/0`."""
    match command:
        case RegisterNode(info):
            body: list[Any] = ["register_node", node_to_fields(info)]
        case ReplaceMember(info, old):
            body = ["replace_member", node_to_fields(info), list(old)]
        case CreateTopic(topic):
            body = ["create_topic", topic_to_fields(topic)]
        case AlterTopic(name, settings, added, moved):
            first = added[0].partition if added else 0
            placed = partitions_to_fields(added)
            body = ["alter_topic", name, settings_to_fields(settings), first, placed]
            if moved:
                body.append(partitions_to_fields(moved))
        case DeleteTopic(name):
            body = ["delete_topic", name]
        case PlaceReplicas(group, replicas):
            body = ["place_replicas", group, [list(member) for member in replicas]]
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
    if type(version) is not int:
        raise CorruptRecord("A record of the cluster's metadata has no version.")
    if version > COMMAND_VERSION:
        raise CorruptRecord(
            f"A metadata command has version {version}; this program reads up to {COMMAND_VERSION}."
            " Run a newer aegis-cluster."
        )
    match kind, body:
        case "register_node", [values]:
            return RegisterNode(node_from_fields(values))
        case "replace_member", [values, [int(node), str(incarnation)]]:
            return ReplaceMember(node_from_fields(values), Member(NodeId(node), incarnation))
        case "create_topic", [values]:
            return CreateTopic(topic_from_fields(values))
        case "alter_topic", [str(name), list(settings), int(first), list(placed), *moved]:
            added = partitions_from_fields(placed, first=first)
            elsewhere = partitions_from_fields(moved[0]) if moved else ()
            return AlterTopic(name, settings_from_fields(settings), added, elsewhere)
        case "delete_topic", [str(name)]:
            return DeleteTopic(name)
        case "place_replicas", [int(group), list(members)]:
            replicas = tuple(Member(NodeId(node), incarnation) for node, incarnation in members)
            return PlaceReplicas(GroupId(group), replicas)
        case "grant_producer_ids", [int(first), int(count)]:
            return GrantProducerIds(ProducerId(first), count)
    raise CorruptRecord(f"The metadata command {kind!r} is unknown to this version.")
