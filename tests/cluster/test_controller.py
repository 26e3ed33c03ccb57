"""The controller's decisions: what is created where, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from aegis_cluster.cluster import controller
from aegis_cluster.cluster.metadata import (
    AlterTopic,
    Command,
    CreateTopic,
    DeleteTopic,
    GrantProducerIds,
    PlaceReplicas,
    RegisterNode,
    decode_command,
    encode_command,
)
from aegis_cluster.cluster.metadata_table import MetadataTable
from aegis_cluster.errors import (
    AegisError,
    CorruptRecord,
    InvalidTopic,
    InvariantBroken,
    NotEnoughReplicas,
    PeerViolation,
    TopicExists,
    TopicNotFound,
)
from aegis_cluster.ids import GROUPS_TOPIC, GroupId, LogIndex, NodeId, ProducerId
from aegis_cluster.wire.descriptions import NodeInfo, TopicSettings


def node(number: int, *, shards: int = 1) -> NodeInfo:
    name = f"node-{number}"
    return NodeInfo(
        NodeId(number), f"{number:032x}", name, "127.0.0.1", 7000 + 100 * number, shards, "boot"
    )


def table_of(nodes: int) -> MetadataTable:
    table = MetadataTable()
    for number in range(1, nodes + 1):
        table.apply(LogIndex(number), RegisterNode(node(number)))
    return table


def create(
    table: MetadataTable,
    name: str = "orders",
    partitions: int | None = None,
    replicas: int | None = None,
    settings: TopicSettings | None = None,
) -> CreateTopic:
    return controller.create_topic(
        table,
        name=name,
        partitions=partitions,
        replicas=replicas,
        settings=settings or TopicSettings(),
    )


def test_defaults_are_one_partition_and_three_replicas() -> None:
    made = create(table_of(5))
    assert len(made.info.partitions) == 1
    assert made.info.replication_factor == 3


@pytest.mark.parametrize(("nodes", "factor"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_default_factor_is_at_most_the_number_of_nodes(nodes: int, factor: int) -> None:
    assert create(table_of(nodes)).info.replication_factor == factor


def test_leaders_and_replicas_are_spread() -> None:
    made = create(table_of(3), partitions=6, replicas=3)
    leaders = Counter(placed.replicas[0].node for placed in made.info.partitions)
    assert leaders == {1: 2, 2: 2, 3: 2}
    assert all(len(set(placed.replicas)) == 3 for placed in made.info.partitions)


def test_replicas_of_factor_two_are_spread_over_three_nodes() -> None:
    made = create(table_of(3), partitions=9, replicas=2)
    held = Counter(member.node for placed in made.info.partitions for member in placed.replicas)
    assert held == {1: 6, 2: 6, 3: 6}


def test_many_small_topics_are_spread_as_well() -> None:
    table = table_of(3)
    for number in range(9):
        table.apply(LogIndex(10 + number), create(table, f"topic-{number}", replicas=1))
    leaders = Counter(t.partitions[0].replicas[0].node for t in table.topics.values())
    assert leaders == {1: 3, 2: 3, 3: 3}


def test_group_numbers_are_never_used_again() -> None:
    table = table_of(3)
    first = create(table, partitions=4)
    table.apply(LogIndex(10), first)
    table.apply(LogIndex(11), DeleteTopic("orders"))
    second = create(table, partitions=4)
    groups = {placed.group for placed in first.info.partitions}
    assert groups.isdisjoint(placed.group for placed in second.info.partitions)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": ""}, InvalidTopic),
        ({"name": "a" * 250}, InvalidTopic),
        ({"name": "with space"}, InvalidTopic),
        ({"name": "ümlaut"}, InvalidTopic),
        ({"name": "../etc"}, InvalidTopic),
        ({"name": ".."}, InvalidTopic),
        ({"name": "__cluster"}, InvalidTopic),
        ({"name": "line\n"}, InvalidTopic),
        ({"partitions": 0}, InvalidTopic),
        ({"partitions": 10_001}, InvalidTopic),
        ({"replicas": 0}, InvalidTopic),
        ({"replicas": 8}, InvalidTopic),
        ({"replicas": 4}, NotEnoughReplicas),
        ({"settings": TopicSettings(kind="queue")}, InvalidTopic),
        ({"settings": TopicSettings(cleanup="burn")}, InvalidTopic),
        ({"settings": TopicSettings(compression="rar")}, InvalidTopic),
        ({"settings": TopicSettings(max_message_bytes=0)}, InvalidTopic),
        ({"settings": TopicSettings(max_message_bytes=10**9)}, InvalidTopic),
        ({"settings": TopicSettings(retention_ms=0)}, InvalidTopic),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], error: type[AegisError]) -> None:
    with pytest.raises(error):
        create(table_of(3), **arguments)  # type: ignore[arg-type]


def test_a_topic_exists_once() -> None:
    table = table_of(3)
    table.apply(LogIndex(10), create(table))
    with pytest.raises(TopicExists):
        create(table)


def altered(table: MetadataTable, **wanted: Any) -> AlterTopic | None:
    wanted = {"name": "orders", "partitions": None, "changes": {}} | wanted
    return controller.alter_topic(table, **wanted)


def test_altered_settings_leave_the_others_as_they_are() -> None:
    table = table_of(3)
    table.apply(LogIndex(10), create(table, settings=TopicSettings(retention_bytes=5)))
    command = altered(table, changes={"retention_ms": 7, "compression": "lz4"})
    assert command is not None
    table.apply(LogIndex(11), command)
    info = table.topics["orders"]
    assert info.settings == TopicSettings(retention_ms=7, retention_bytes=5, compression="lz4")
    assert table.partition_of(info.partitions[0].group) == (info, info.partitions[0])
    assert altered(table, changes={"retention_ms": 7}) is None, "a repeat changes nothing"


def test_added_partitions_stand_behind_the_others_in_groups_of_their_own() -> None:
    table = table_of(3)
    table.apply(LogIndex(10), create(table, partitions=2, replicas=2))
    table.apply(LogIndex(11), create(table, "other", partitions=3))
    before = table.topics["orders"]
    command = altered(table, partitions=5)
    assert command is not None
    table.apply(LogIndex(12), command)
    info = table.topics["orders"]
    assert info.partitions[:2] == before.partitions
    assert [placed.partition for placed in info.partitions] == [0, 1, 2, 3, 4]
    assert {len(placed.replicas) for placed in info.partitions} == {2}
    groups = [p.group for topic in table.topics.values() for p in topic.partitions]
    assert len(set(groups)) == len(groups) == 8
    assert table.next_group > max(groups)
    again = MetadataTable.from_body(table.to_body())
    assert again.to_body() == table.to_body()
    assert again.partition_of(info.partitions[4].group) == (info, info.partitions[4])


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"name": "none"}, TopicNotFound),
        ({"partitions": 2}, InvalidTopic),
        ({"partitions": 0}, InvalidTopic),
        ({"partitions": 10_001}, InvalidTopic),
        ({"changes": {"cleanup": "burn"}}, InvalidTopic),
        ({"changes": {"compression": "rar"}}, InvalidTopic),
        ({"changes": {"kind": "cdc"}}, InvalidTopic),
        ({"changes": {"max_message_bytes": 10**9}}, InvalidTopic),
        ({"changes": {"colour": 1}}, PeerViolation),
        ({"changes": {"retention_ms": "1"}}, PeerViolation),
    ],
)
def test_what_cannot_be_altered_is_refused(wanted: dict[str, Any], error: type[AegisError]) -> None:
    table = table_of(3)
    table.apply(LogIndex(10), create(table, partitions=3))
    with pytest.raises(error):
        altered(table, **wanted)


def test_only_a_topic_that_exists_is_deleted() -> None:
    with pytest.raises(TopicNotFound):
        controller.delete_topic(table_of(1), "orders")


def test_replicas_move_where_they_are_told_to() -> None:
    table = table_of(4)
    table.apply(LogIndex(10), create(table, partitions=2))
    group = table.topics["orders"].partitions[1].group
    first = table.topics["orders"].partitions[1].replicas
    nodes = [NodeId(4), NodeId(2)]
    command = controller.place_replicas(table, topic="orders", partition=1, nodes=nodes)
    assert command is not None
    table.apply(LogIndex(table.index + 1), command)
    placed = table.partition_of(group)
    assert placed is not None
    assert [member.node for member in placed[1].replicas] == nodes
    assert table.topics["orders"].partitions[1] == placed[1]
    assert table.founders_of(group) == first
    assert controller.place_replicas(table, topic="orders", partition=1, nodes=nodes) is None


@pytest.mark.parametrize(
    ("topic", "partition", "nodes", "error"),
    [
        ("other", 0, [1], TopicNotFound),
        ("orders", 1, [1], InvalidTopic),
        ("orders", 0, [], InvalidTopic),
        ("orders", 0, [1, 1], InvalidTopic),
        ("orders", 0, [1, 9], NotEnoughReplicas),
    ],
)
def test_moves_that_cannot_be_are_refused(
    topic: str, partition: int, nodes: list[int], error: type[AegisError]
) -> None:
    table = table_of(3)
    table.apply(LogIndex(10), create(table))
    wanted = [NodeId(node) for node in nodes]
    with pytest.raises(error):
        controller.place_replicas(table, topic=topic, partition=partition, nodes=wanted)


def test_a_topic_gets_more_replicas_and_fewer_again() -> None:
    table = table_of(4)
    table.apply(LogIndex(10), create(table, partitions=8, replicas=1))
    before = table.topics["orders"].partitions
    command = altered(table, replicas=3)
    assert command is not None
    table.apply(LogIndex(11), command)
    info = table.topics["orders"]
    assert info.replication_factor == 3
    for old, new in zip(before, info.partitions, strict=True):
        assert new.replicas[0] == old.replicas[0], "who has it keeps it, and is preferred"
        assert len(set(new.replicas)) == 3
        assert table.founders_of(new.group) == old.replicas, "the others join as learners"
    held = Counter(member for placed in info.partitions for member in placed.replicas)
    assert set(held.values()) == {6}, "spread evenly"
    assert altered(table, replicas=3) is None, "a repeat changes nothing"
    more = altered(table, replicas=2, partitions=9)
    assert more is not None
    table.apply(LogIndex(12), more)
    after = table.topics["orders"].partitions
    assert [placed.replicas for placed in after[:8]] == [p.replicas[:2] for p in info.partitions]
    assert len(after[8].replicas) == 2
    with pytest.raises(NotEnoughReplicas):
        altered(table, replicas=5)
    with pytest.raises(InvalidTopic):
        altered(table, replicas=0)


def test_the_clusters_own_topics_get_three_replicas_once_there_are_three_nodes() -> None:
    table = table_of(1)
    assert controller.widen_internal_topic(table, GROUPS_TOPIC) is None, "it is not made yet"
    made = controller.internal_topic(table, GROUPS_TOPIC, 1)
    assert made is not None
    table.apply(LogIndex(10), made)
    table.apply(LogIndex(11), RegisterNode(node(2)))
    assert controller.widen_internal_topic(table, GROUPS_TOPIC) is None, "of two, both would matter"
    table.apply(LogIndex(12), RegisterNode(node(3)))
    command = controller.widen_internal_topic(table, GROUPS_TOPIC)
    assert command is not None
    table.apply(LogIndex(13), command)
    assert {len(p.replicas) for p in table.topics[GROUPS_TOPIC].partitions} == {3}
    assert controller.widen_internal_topic(table, GROUPS_TOPIC) is None


def test_registering_again_without_news_changes_nothing() -> None:
    table = table_of(1)
    assert controller.register_node(table, node(1)) is None
    assert controller.register_node(table, node(1, shards=2)) == RegisterNode(node(1, shards=2))


def test_producer_ids_are_granted_once() -> None:
    table = table_of(1)
    first = controller.grant_producer_ids(table)
    table.apply(LogIndex(10), first)
    assert controller.grant_producer_ids(table).first == first.first + first.count


def test_the_table_survives_a_snapshot() -> None:
    table = table_of(3)
    table.apply(LogIndex(10), create(table, partitions=3))
    table.apply(LogIndex(11), controller.grant_producer_ids(table))
    again = MetadataTable.from_body(table.to_body())
    assert again.to_body() == table.to_body()
    group = table.topics["orders"].partitions[2].group
    assert again.partition_of(group) == table.partition_of(group)


@pytest.mark.parametrize(
    "command",
    [
        RegisterNode(node(1)),
        create(table_of(3), partitions=2),
        AlterTopic("orders", TopicSettings(retention_ms=1)),
        AlterTopic("orders", TopicSettings(), create(table_of(3), partitions=2).info.partitions),
        AlterTopic(
            "orders", TopicSettings(), moved=create(table_of(3), partitions=2).info.partitions
        ),
        DeleteTopic("orders"),
        PlaceReplicas(GroupId(3), (node(1).member, node(2).member)),
        GrantProducerIds(ProducerId(1), 1000),
    ],
)
def test_commands_survive_the_log(command: Command) -> None:
    assert decode_command(encode_command(command)) == command


@pytest.mark.parametrize(
    "value", [b"", b"\x93\x01", b"\x92\x01\xa3nop", b"\x92\x63\xa3nop", b"\xc0"]
)
def test_a_broken_command_is_corruption(value: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode_command(value)


def test_a_command_that_contradicts_the_table_ends_the_process() -> None:
    table = table_of(1)
    made = create(table)
    table.apply(LogIndex(10), made)
    with pytest.raises(InvariantBroken):
        table.apply(LogIndex(11), made)
    with pytest.raises(InvariantBroken):
        table.apply(LogIndex(10), DeleteTopic("orders"))
