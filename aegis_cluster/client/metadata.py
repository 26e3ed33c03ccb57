"""What a client knows of the cluster: nodes, topics, and who it believes leads each partition.

All of it is a hint but for the group ids: a wrong leader costs one more question, because the
shard that is asked refuses and says who leads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from aegis_cluster.config import control_endpoint, data_endpoint
from aegis_cluster.errors import TopicNotFound
from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex, NodeId
from aegis_cluster.wire.descriptions import (
    NodeInfo,
    TopicInfo,
    node_from_fields,
    topic_from_fields,
)
from aegis_cluster.wire.protocol import take_int, take_list, take_str

if TYPE_CHECKING:
    from collections.abc import Sequence


NO_NODE: Final = NodeId(0)
"""Nobody knows."""


class ShardAddress(NamedTuple):
    """One shard of one node, and where it takes produce and fetch requests; control: all others."""

    node: NodeId
    shard: int
    endpoint: str
    control: str


class Routes(Protocol):
    """Where a node that is described in the metadata listens."""

    def control(self, node: NodeInfo, shard: int = 0, /) -> str:
        """For questions about the cluster, for the controller, and for coordinators."""

    def data(self, node: NodeInfo, shard: int, /) -> str:
        """For produce and fetch."""


class TcpRoutes:
    """By the ports that follow from a node's base port."""

    def control(self, node: NodeInfo, shard: int = 0) -> str:
        return control_endpoint(node.host, node.base_port, shard)

    def data(self, node: NodeInfo, shard: int) -> str:
        return data_endpoint(node.host, node.base_port, shard)


@dataclass(slots=True)
class Metadata:
    """The newest answer of any node, merged."""

    routes: Routes = field(default_factory=TcpRoutes)
    cluster_id: str = ""
    index: LogIndex = NO_INDEX
    controller: NodeId = NO_NODE
    nodes: dict[NodeId, NodeInfo] = field(default_factory=dict)
    topics: dict[str, TopicInfo] = field(default_factory=dict)
    leaders: dict[GroupId, NodeId] = field(default_factory=dict)
    _guesses: dict[GroupId, int] = field(default_factory=dict)
    _addresses: dict[tuple[NodeId, int], ShardAddress] = field(default_factory=dict)
    """Those of `nodes` that were asked for."""

    def merge(self, fields: Sequence[Any], asked: Sequence[str] | None) -> None:
        """Take in a METADATA reply, unless it is older than what is known."""
        index = LogIndex(take_int(fields, 1, "index"))
        self.cluster_id = take_str(fields, 0, "cluster_id")
        if index < self.index:
            return
        self.index = index
        self.controller = NodeId(take_int(fields, 2, "controller"))
        nodes = [node_from_fields(values) for values in take_list(fields, 3, "nodes")]
        self.nodes = {info.node: info for info in nodes}
        self._addresses.clear()
        self._merge_topics(take_list(fields, 4, "topics"), asked)

    def _merge_topics(self, answered: Sequence[Any], asked: Sequence[str] | None) -> None:
        found: dict[str, TopicInfo] = {}
        for item in answered:
            values, leaders = take_list(item, 0, "topic"), take_list(item, 1, "leaders")
            info = topic_from_fields(values)
            found[info.name] = info
            for partition, leader in zip(info.partitions, leaders, strict=False):
                if leader:
                    self.leaders[partition.group] = NodeId(leader)
        gone = set(self.topics if asked is None else asked) - set(found)
        for name in gone:
            self.topics.pop(name, None)
        self.topics.update(found)

    def require(self, index: LogIndex, changed: Sequence[str]) -> None:
        """Believe nothing older than `index` from now on, and forget what has changed since."""
        self.index = max(self.index, index)
        for name in changed:
            self.topics.pop(name, None)

    def topic(self, name: str) -> TopicInfo:
        """Raise `TopicNotFound`."""
        try:
            return self.topics[name]
        except KeyError:
            raise TopicNotFound(f"There is no topic {name!r}.", topic=name) from None

    def address_of(self, info: TopicInfo, partition: int) -> ShardAddress | None:
        """Where to send for a partition: its leader as believed, else one replica after another.

        None while the node in question is not known: ask for metadata.
        """
        placed = info.partitions[partition]
        leader = self.leaders.get(placed.group)
        if leader is None or leader not in self.nodes:
            turn = self._guesses.get(placed.group, 0)
            leader = placed.replicas[turn % len(placed.replicas)].node
        node = self.nodes.get(leader)
        if node is None:
            return None
        shard = node.shard_of(placed.group)
        found = self._addresses.get((leader, shard))
        if found is None:
            data, control = self.routes.data(node, shard), self.routes.control(node, shard)
            found = self._addresses[leader, shard] = ShardAddress(leader, shard, data, control)
        return found

    def note_leader(self, group: GroupId, leader: object) -> None:
        """A shard has said who leads: believe it, or guess another one if it does not know."""
        if isinstance(leader, int) and leader in self.nodes:
            self.leaders[group] = NodeId(leader)
        else:
            self.forget_leader(group)

    def forget_leader(self, group: GroupId) -> None:
        """The believed leader does not answer or does not lead: try the next replica."""
        if self.leaders.pop(group, None) is None:
            self._guesses[group] = self._guesses.get(group, 0) + 1

    def control_endpoints(self) -> list[str]:
        """Of every known node, the controller's first."""
        infos = sorted(self.nodes.values(), key=lambda n: (n.node != self.controller, n.node))
        return [self.routes.control(info) for info in infos]
