"""The state that `__cluster/0` folds to: nodes, topics, and the next free numbers.

Every replica applies the same commands and holds the same table. A command that contradicts the
table cannot have come from a correct controller, so it ends the process rather than be guessed
at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cluster.metadata import (
    AlterTopic,
    Command,
    CreateTopic,
    DeleteTopic,
    GrantProducerIds,
    PlaceReplicas,
    RegisterNode,
    ReplaceMember,
)
from aegis_cluster.errors import invariant
from aegis_cluster.ids import METADATA_GROUP, GroupId, LogIndex, Member, NodeId, ProducerId
from aegis_cluster.wire.descriptions import (
    NodeInfo,
    PartitionInfo,
    TopicInfo,
    TopicSettings,
    node_from_fields,
    node_to_fields,
    topic_from_fields,
    topic_to_fields,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SLICE_ENTRIES: Final = 500
"""Partitions, or groups with other founders, in one slice of a snapshot."""


class MetadataTable:
    """Nodes and topics by name; `index` is the last command's place in the log of `__cluster/0`."""

    def __init__(self) -> None:
        self.index = LogIndex(0)
        self.nodes: dict[NodeId, NodeInfo] = {}
        self.topics: dict[str, TopicInfo] = {}
        self.next_group = GroupId(METADATA_GROUP + 1)
        self.next_producer_id = ProducerId(1)
        self._founders: dict[GroupId, tuple[Member, ...]] = {}
        """First voters of groups whose members changed since; other groups' are their replicas."""
        self._by_group: dict[GroupId, tuple[TopicInfo, PartitionInfo]] = {}

    def apply(self, index: LogIndex, command: Command) -> None:
        """Fold one committed command; `index` rises from call to call."""
        invariant(index > self.index, "metadata applied twice", have=self.index, got=index)
        self.index = index
        match command:
            case RegisterNode(info):
                self.nodes[info.node] = info
            case ReplaceMember(info, old):
                self.nodes[info.node] = info
                self._replace(old, info.member)
            case CreateTopic(info):
                self._add_topic(info)
            case AlterTopic(name, settings, added, moved):
                for placed in moved:
                    self._place(placed.group, placed.replicas)
                self._alter_topic(name, settings, added)
            case DeleteTopic(name):
                self._drop_topic(name)
            case PlaceReplicas(group, replicas):
                self._place(group, replicas)
            case GrantProducerIds(first, count):
                invariant(first >= self.next_producer_id, "producer ids granted twice", first=first)
                self.next_producer_id = ProducerId(first + count)

    def partition_of(self, group: GroupId) -> tuple[TopicInfo, PartitionInfo] | None:
        """The topic and partition whose log this group is; None for one that is gone or unknown."""
        return self._by_group.get(group)

    def founders_of(self, group: GroupId) -> tuple[Member, ...]:
        """The voters that the group began with; whoever came later joins as a learner."""
        placed = self._by_group[group][1]
        return self._founders.get(group, placed.replicas)

    def _replace(self, old: Member, new: Member) -> None:
        """Put `new` in the place of `old` wherever other replicas are left to bring it up from."""
        for _, topic in sorted(self.topics.items()):
            if not any(_moves(placed, old) for placed in topic.partitions):
                continue
            for placed in topic.partitions:
                if _moves(placed, old):
                    self._founders.setdefault(placed.group, placed.replicas)
            moved = tuple(
                placed._replace(replicas=tuple(new if m == old else m for m in placed.replicas))
                if _moves(placed, old)
                else placed
                for placed in topic.partitions
            )
            self._put_topic(replace(topic, partitions=moved))

    def _place(self, group: GroupId, replicas: tuple[Member, ...]) -> None:
        topic, placed = self._by_group[group]
        self._founders.setdefault(group, placed.replicas)
        moved = placed._replace(replicas=replicas)
        partitions = tuple(moved if p.group == group else p for p in topic.partitions)
        self._put_topic(replace(topic, partitions=partitions))

    def _add_topic(self, info: TopicInfo) -> None:
        invariant(info.name not in self.topics, "topic created twice", topic=info.name)
        self._take_groups(info.partitions)
        self._put_topic(info)

    def _alter_topic(
        self, name: str, settings: TopicSettings, added: tuple[PartitionInfo, ...]
    ) -> None:
        info = self.topics.get(name)
        invariant(info is not None, "altered topic was not there", topic=name)
        if info is None:
            return
        numbers = [placed.partition for placed in added]
        count = len(info.partitions)
        invariant(numbers == list(range(count, count + len(added))), "partitions with a gap")
        self._take_groups(added)
        self._put_topic(replace(info, settings=settings, partitions=info.partitions + added))

    def _put_topic(self, info: TopicInfo) -> None:
        self.topics[info.name] = info
        self._by_group |= {placed.group: (info, placed) for placed in info.partitions}

    def _take_groups(self, partitions: Sequence[PartitionInfo]) -> None:
        for partition in partitions:
            invariant(partition.group >= self.next_group, "group used twice", group=partition.group)
            self.next_group = GroupId(partition.group + 1)

    def _drop_topic(self, name: str) -> None:
        info = self.topics.pop(name, None)
        invariant(info is not None, "deleted topic was not there", topic=name)
        if info is not None:
            for partition in info.partitions:
                del self._by_group[partition.group]
                self._founders.pop(partition.group, None)

    def copy(self) -> MetadataTable:
        """An equal table that goes its own way; what it holds is immutable and shared."""
        made = MetadataTable()
        made.index, made.nodes, made.topics = self.index, dict(self.nodes), dict(self.topics)
        made.next_group, made.next_producer_id = self.next_group, self.next_producer_id
        made._founders, made._by_group = dict(self._founders), dict(self._by_group)
        return made

    def slices(self) -> Iterator[list[Any]]:
        """The table as it is at the call, in msgpack-able pieces of bounded size.

        A topic with more partitions than a piece holds comes in several. See `TableLoader`.
        """
        return self.copy()._slices()

    def _slices(self) -> Iterator[list[Any]]:
        yield ["table", self.index, self.next_group, self.next_producer_id]
        yield ["nodes", *(node_to_fields(node) for _, node in sorted(self.nodes.items()))]
        run: list[TopicInfo] = []
        size = 0
        for _, topic in sorted(self.topics.items()):
            for piece in _topic_pieces(topic):
                if run and size + len(piece.partitions) > SLICE_ENTRIES:
                    yield ["topics", *map(topic_to_fields, run)]
                    run, size = [], 0
                run.append(piece)
                size += len(piece.partitions)
        yield ["topics", *map(topic_to_fields, run)]
        founders = sorted(self._founders.items())
        for start in range(0, len(founders), SLICE_ENTRIES):
            some = founders[start : start + SLICE_ENTRIES]
            yield ["founders", *([group, *map(list, members)] for group, members in some)]

    def to_body(self) -> list[Any]:
        """The whole table as msgpack-able values, for a comparison."""
        return [
            self.index,
            [node_to_fields(node) for _, node in sorted(self.nodes.items())],
            [topic_to_fields(topic) for _, topic in sorted(self.topics.items())],
            self.next_group,
            self.next_producer_id,
            [[group, *map(list, members)] for group, members in sorted(self._founders.items())],
        ]

    @classmethod
    def from_body(cls, body: list[Any]) -> MetadataTable:
        table = cls()
        index, nodes, topics, next_group, next_producer_id, *later = body
        for values in nodes:
            node = node_from_fields(values)
            table.nodes[node.node] = node
        for topic in map(topic_from_fields, topics):
            table._put_topic(topic)
        table.index = LogIndex(index)
        table.next_group = GroupId(next_group)
        table.next_producer_id = ProducerId(next_producer_id)
        for group, *members in later[0] if later else ():
            first = tuple(Member(NodeId(node), incarnation) for node, incarnation in members)
            table._founders[GroupId(group)] = first
        return table


class TableLoader:
    """Puts a table together again from its slices, in their order."""

    def __init__(self) -> None:
        self.table = MetadataTable()

    def add(self, piece: list[Any]) -> None:
        """Raises `PeerViolation`, `TypeError` or `ValueError` for what is no such piece."""
        kind, *values = piece
        table = self.table
        match kind:
            case "table":
                index, next_group, next_producer_id = values
                table.index, table.next_group = LogIndex(index), GroupId(next_group)
                table.next_producer_id = ProducerId(next_producer_id)
            case "nodes":
                table.nodes |= {node.node: node for node in map(node_from_fields, values)}
            case "topics":
                for topic in map(topic_from_fields, values):
                    table._put_topic(_joined(table.topics.get(topic.name), topic))
            case "founders":
                for group, *members in values:
                    first = tuple(Member(NodeId(node), inc) for node, inc in members)
                    table._founders[GroupId(group)] = first
            case _:
                raise ValueError(f"{kind!r} is no piece of a metadata table")


def _topic_pieces(topic: TopicInfo) -> Iterator[TopicInfo]:
    for start in range(0, len(topic.partitions), SLICE_ENTRIES):
        yield replace(topic, partitions=topic.partitions[start : start + SLICE_ENTRIES])


def _joined(first: TopicInfo | None, rest: TopicInfo) -> TopicInfo:
    """A topic and a later piece of it; fields number partitions from 0, whatever came before."""
    if first is None:
        return rest
    count = len(first.partitions)
    more = tuple(p._replace(partition=count + p.partition) for p in rest.partitions)
    return replace(first, partitions=first.partitions + more)


def _moves(placed: PartitionInfo, old: Member) -> bool:
    """An only replica stays where it was: there is nothing to bring a new one up from."""
    return old in placed.replicas and len(placed.replicas) > 1
