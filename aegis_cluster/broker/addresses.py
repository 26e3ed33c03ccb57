"""Where each shard of each node listens, as this node knows it.

Addresses in the node's own file come first: they are what the operator says now, while the
metadata says where a node was when it last registered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.broker.transport import PeerKey
from aegis_cluster.config import peers_endpoint
from aegis_cluster.ids import GroupId, NodeId, ShardId

if TYPE_CHECKING:
    from aegis_cluster.broker.context import ShardContext
    from aegis_cluster.cluster.metadata_table import MetadataTable


class AddressBook:
    """Answers for the present table; `table` is replaced as metadata moves on."""

    def __init__(self, context: ShardContext) -> None:
        self._context = context

    def seeds(self) -> list[PeerKey]:
        """First shards of all nodes in the node's file, this one's too if it is not this shard."""
        keys = [PeerKey(NodeId(n + 1), ShardId(0)) for n in range(len(self._context.peers))]
        me = PeerKey(self._context.me.node, self._context.shard)
        return [key for key in keys if key != me]

    def key_of(self, table: MetadataTable, node: NodeId, group: GroupId) -> PeerKey:
        """The shard of `node` that owns its replica of `group`."""
        if node == self._context.me.node:
            return PeerKey(node, ShardId(group % self._context.shards))
        info = table.nodes.get(node)
        return PeerKey(node, info.shard_of(group) if info else ShardId(0))

    def endpoint(self, table: MetadataTable, key: PeerKey) -> str | None:
        """Where that shard's peers listener is; None for a node nobody has told us about."""
        if 1 <= key.node <= len(self._context.peers):
            address = self._context.peers[key.node - 1]
            return peers_endpoint(address.host, address.base_port, key.shard)
        info = table.nodes.get(key.node)
        if info is None:
            return None
        return peers_endpoint(info.host, info.base_port, key.shard)
