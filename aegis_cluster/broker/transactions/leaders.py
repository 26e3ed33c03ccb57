"""Where the leader of some log is, as far as this shard can tell: a guess that answers correct."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from aegis_cluster.errors import NotLeader
from aegis_cluster.ids import GroupId, NodeId

if TYPE_CHECKING:
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.errors import AegisError


class Leaders:
    """One per use and shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._told: dict[GroupId, NodeId] = {}
        self._turns: defaultdict[GroupId, int] = defaultdict(int)

    def of(self, log: GroupId) -> PeerKey | None:
        """Its leader's shard, or the next replica to be asked; None for a log that is unknown."""
        shard = self._shard
        found = shard.table.partition_of(log)
        if found is None:
            return None
        here = shard.manager.partitions.get(log)
        if here is not None and here.replica.leader is not None:
            node = here.replica.leader.node
        elif log in self._told:
            node = self._told[log]
        else:
            replicas = found[1].replicas
            node = replicas[self._turns[log] % len(replicas)].node
        return shard.addresses.key_of(shard.table, node, log)

    def is_here(self, key: PeerKey) -> bool:
        context = self._shard.context
        return (key.node, key.shard) == (context.me.node, context.shard)

    def failed(self, log: GroupId, error: AegisError) -> None:
        """Who was asked does not lead it, or did not answer: ask another one next time."""
        leader = error.details.get("leader") if isinstance(error, NotLeader) else None
        if isinstance(leader, int) and leader > 0:
            self._told[log] = NodeId(leader)
            return
        self._told.pop(log, None)
        self._turns[log] += 1
