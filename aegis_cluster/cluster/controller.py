"""The controller's decisions: a request and the table go in, a command comes out, or a refusal.

Pure. The leader of `__cluster/0` calls these on its *ahead* table (committed commands plus those
under way), so requests can follow each other without waiting for a commit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cluster.metadata import (
    AlterTopic,
    CreateTopic,
    DeleteTopic,
    GrantProducerIds,
    PlaceReplicas,
    RegisterNode,
    ReplaceMember,
)
from aegis_cluster.cluster.placement import place, resize
from aegis_cluster.errors import (
    InvalidTopic,
    NotEnoughReplicas,
    NotReady,
    TopicExists,
    TopicNotFound,
)
from aegis_cluster.ids import INTERNAL_TOPICS, GroupId
from aegis_cluster.limits import (
    INTERNAL_PARTITIONS,
    MESSAGE_BYTES_MAX,
    PRODUCER_ID_BLOCK,
    REPLICATION_FACTOR_MAX,
    TOPIC_NAME_CHARS_MAX,
    TOPIC_PARTITIONS_MAX,
)
from aegis_cluster.wire.descriptions import (
    EVENT_STORE,
    NodeInfo,
    PartitionInfo,
    TopicInfo,
    TopicSettings,
    settings_with,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aegis_cluster.cluster.metadata_table import MetadataTable
    from aegis_cluster.ids import NodeId

DEFAULT_REPLICATION: Final = 3
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_KINDS: Final = ("topic", EVENT_STORE, "cdc")
_CLEANUPS: Final = ("delete", "compact", "compact,delete")
_COMPRESSIONS: Final = ("none", "gzip", "snappy", "lz4", "zstd")


def register_node(table: MetadataTable, info: NodeInfo) -> RegisterNode | ReplaceMember | None:
    """None when the node stands there already just so."""
    known = table.nodes.get(info.node)
    if known == info:
        return None
    if known is not None and known.incarnation != info.incarnation:
        return ReplaceMember(info, known.member)
    return RegisterNode(info)


def create_topic(
    table: MetadataTable,
    *,
    name: str,
    partitions: int | None,
    replicas: int | None,
    settings: TopicSettings,
    token: str = "",
) -> CreateTopic:
    """Choose groups and replicas for a new topic; `None` means the default.

    Raises `InvalidTopic`, `TopicExists`, `NotEnoughReplicas`.
    """
    check_topic_name(name)
    _check_settings(name, settings)
    count = 1 if partitions is None else partitions
    factor = min(DEFAULT_REPLICATION, max(1, len(table.nodes))) if replicas is None else replicas
    _check_partitions(name, count)
    _check_factor(name, factor)
    if name in table.topics:
        raise TopicExists(f"Topic {name!r} exists already.", topic=name)
    infos = _placed(table, first=0, count=count, replicas=factor)
    return CreateTopic(TopicInfo(name, settings, infos, token))


def alter_topic(
    table: MetadataTable,
    *,
    name: str,
    partitions: int | None,
    changes: Mapping[str, Any],
    replicas: int | None = None,
) -> AlterTopic | None:
    """Other settings, more partitions, placed like those of a new topic, or another number of
    replicas; None: as it is already, so a repeat of the same request succeeds again.

    The leaders bring their partitions to other members by themselves, one at a time.

    changes: fields of `TopicSettings`. Raises `TopicNotFound`, `InvalidTopic`,
    `NotEnoughReplicas`; `PeerViolation` for what no setting is called.
    """
    info = _users(table, name)
    settings = settings_with(info.settings, changes)
    if settings.kind != info.settings.kind:
        raise InvalidTopic(f"Topic {name!r} is of kind {info.settings.kind!r} for ever.")
    _check_settings(name, settings)
    have = len(info.partitions)
    want = have if partitions is None else partitions
    _check_partitions(name, want)
    if want < have:
        raise InvalidTopic(
            f"Topic {name!r} has {have} partitions and cannot have fewer, {want}: a partition's"
            " messages would be lost. Make another topic and publish them there.",
            have=have,
            want=want,
        )
    factor = info.replication_factor if replicas is None else replicas
    _check_factor(name, factor)
    moved = () if replicas is None else _resized(table, info, factor)
    if settings == info.settings and want == have and not moved:
        return None
    added = _placed(table, first=have, count=want - have, replicas=factor) if want > have else ()
    return AlterTopic(name, settings, added, moved)


def _resized(table: MetadataTable, info: TopicInfo, replicas: int) -> tuple[PartitionInfo, ...]:
    """Its partitions with so many replicas each; empty where they have as many."""
    if all(len(placed.replicas) == replicas for placed in info.partitions):
        return ()
    return resize(
        nodes=list(table.nodes.values()),
        topics=table.topics.values(),
        partitions=info.partitions,
        replicas=replicas,
    )


def _placed(
    table: MetadataTable, *, first: int, count: int, replicas: int
) -> tuple[PartitionInfo, ...]:
    """New partitions from number `first` on. Raises `NotEnoughReplicas`."""
    placed = place(
        nodes=list(table.nodes.values()),
        topics=table.topics.values(),
        partitions=count,
        replicas=replicas,
    )
    return tuple(
        PartitionInfo(first + number, GroupId(table.next_group + number), members)
        for number, members in enumerate(placed)
    )


def _users(table: MetadataTable, name: str) -> TopicInfo:
    """A topic that a user may change. Raises `TopicNotFound`, `InvalidTopic`."""
    if name in INTERNAL_TOPICS:
        raise InvalidTopic(f"{name} is the cluster's own: it is neither altered nor deleted.")
    return _existing(table, name)


def _existing(table: MetadataTable, name: str) -> TopicInfo:
    try:
        return table.topics[name]
    except KeyError:
        raise TopicNotFound(f"There is no topic {name!r}.", topic=name) from None


def internal_topic(table: MetadataTable, name: str, founders: int) -> CreateTopic | None:
    """One of the cluster's own topics, made on first use; None when it is there.

    It waits for as many nodes as it is to have replicas, or it would have too few for ever.
    Raises `InvalidTopic`, `NotReady`.
    """
    if name not in INTERNAL_TOPICS:
        raise InvalidTopic(f"{name!r} is no topic of the cluster's own.")
    if name in table.topics:
        return None
    replicas = max(1, min(DEFAULT_REPLICATION, founders))
    if len(table.nodes) < replicas:
        raise NotReady(
            f"The cluster's topic {name} waits for {replicas} nodes; {len(table.nodes)} have"
            " registered."
        )
    infos = _placed(table, first=0, count=INTERNAL_PARTITIONS, replicas=replicas)
    return CreateTopic(TopicInfo(name, TopicSettings(), infos))


def widen_internal_topic(table: MetadataTable, name: str) -> AlterTopic | None:
    """More replicas for one of the cluster's own topics that was made in a smaller cluster, once
    there are three nodes, and not two before: of two, both would have to live.

    None where there is nothing to do.
    """
    info = table.topics.get(name)
    if info is None or not info.replication_factor < DEFAULT_REPLICATION <= len(table.nodes):
        return None
    return AlterTopic(name, info.settings, (), _resized(table, info, DEFAULT_REPLICATION))


def delete_topic(table: MetadataTable, name: str) -> DeleteTopic:
    _users(table, name)
    return DeleteTopic(name)


def place_replicas(
    table: MetadataTable, *, topic: str, partition: int, nodes: Sequence[NodeId]
) -> PlaceReplicas | None:
    """Let these nodes hold a partition, preferred leader first; None when they do already.

    The leader of the partition then brings it about, one member at a time. A node that no longer
    holds it keeps its files: were they deleted and the node asked again, it would have forgotten
    what it voted for.

    Raises `TopicNotFound`, `InvalidTopic`, `NotEnoughReplicas`.
    """
    if topic not in table.topics:
        raise TopicNotFound(f"There is no topic {topic!r}.", topic=topic)
    partitions = table.topics[topic].partitions
    if not 0 <= partition < len(partitions):
        raise InvalidTopic(f"Topic {topic!r} has {len(partitions)} partitions, no {partition}.")
    if not 1 <= len(set(nodes)) == len(nodes) <= REPLICATION_FACTOR_MAX:
        raise InvalidTopic(f"1 to {REPLICATION_FACTOR_MAX} different nodes can hold a partition.")
    unknown = [node for node in nodes if node not in table.nodes]
    if unknown:
        raise NotEnoughReplicas(f"Node {unknown[0]} is not registered.", node=unknown[0])
    placed = partitions[partition]
    replicas = tuple(table.nodes[node].member for node in nodes)
    return None if placed.replicas == replicas else PlaceReplicas(placed.group, replicas)


def grant_producer_ids(table: MetadataTable) -> GrantProducerIds:
    return GrantProducerIds(table.next_producer_id, PRODUCER_ID_BLOCK)


def check_topic_name(name: str) -> None:
    """Raise `InvalidTopic` for a name that no topic of a user may have."""
    if not 1 <= len(name) <= TOPIC_NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise InvalidTopic(
            f"{name[:300]!r} is no name for a topic: use 1 to {TOPIC_NAME_CHARS_MAX} of letters,"
            " digits, '.', '_' and '-'."
        )
    if name in {".", ".."} or name.startswith("__"):
        raise InvalidTopic(f"{name!r} is no name for a topic: '__', '.' and '..' are reserved.")


def _check_partitions(name: str, count: int) -> None:
    if not 1 <= count <= TOPIC_PARTITIONS_MAX:
        raise InvalidTopic(
            f"Topic {name!r} asks for {count} partitions; 1 to {TOPIC_PARTITIONS_MAX} are possible."
        )


def _check_factor(name: str, factor: int) -> None:
    if not 1 <= factor <= REPLICATION_FACTOR_MAX:
        raise InvalidTopic(
            f"Topic {name!r} asks for {factor} replicas;"
            f" 1 to {REPLICATION_FACTOR_MAX} are possible."
        )


def _check_settings(name: str, settings: TopicSettings) -> None:
    for what, value, allowed in (
        ("kind", settings.kind, _KINDS),
        ("cleanup", settings.cleanup, _CLEANUPS),
        ("compression", settings.compression, _COMPRESSIONS),
    ):
        if value not in allowed:
            raise InvalidTopic(
                f"Topic {name!r}: {what} {value!r} is not possible; use {' or '.join(allowed)}."
            )
    if settings.compacts and settings.holds_events:
        raise InvalidTopic(
            f"Topic {name!r} holds events, whose streams are whole: it cannot be compacted."
        )
    if not 1 <= settings.max_message_bytes <= MESSAGE_BYTES_MAX:
        raise InvalidTopic(
            f"Topic {name!r}: max_message_size {settings.max_message_bytes} is not possible;"
            f" 1 to {MESSAGE_BYTES_MAX} bytes are."
        )
    for what, limit in (
        ("retention", settings.retention_ms),
        ("retention_bytes", settings.retention_bytes),
    ):
        if limit is not None and limit < 1:
            raise InvalidTopic(f"Topic {name!r}: {what} must be positive, or absent for no limit.")
