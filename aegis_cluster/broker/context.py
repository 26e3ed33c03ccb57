"""Who a shard is: the facts that do not change while its process runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.wire.descriptions import NodeInfo
from aegis_cluster.wire.protocol import PROTOCOL_VERSION, Hello

if TYPE_CHECKING:
    from aegis_cluster.config import NodeAddress
    from aegis_cluster.ids import Member, ShardId


@dataclass(frozen=True, slots=True)
class ShardContext:
    """founders: who founds `__cluster` together; empty on a node that joins an older cluster.

    peers: addresses from the node's file, node n at position n - 1.
    in_memory: `durability = "memory"`: users' writes count once they are written, synced or not.
    event_index: file of the index of streams; None: it is kept in memory (simulations).
    """

    cluster_id: str
    me: Member
    name: str
    address: NodeAddress
    shard: ShardId
    shards: int
    boot_id: str
    founders: tuple[Member, ...]
    peers: tuple[NodeAddress, ...]
    in_memory: bool = False
    event_index: str | None = None

    @property
    def hello(self) -> Hello:
        return Hello(
            PROTOCOL_VERSION,
            "peer",
            self.cluster_id,
            self.me.node,
            self.me.incarnation,
            self.boot_id,
            self.shard,
        )

    @property
    def node_info(self) -> NodeInfo:
        """As this node registers itself."""
        return NodeInfo(
            self.me.node,
            self.me.incarnation,
            self.name,
            self.address.host,
            self.address.base_port,
            self.shards,
            self.boot_id,
        )
