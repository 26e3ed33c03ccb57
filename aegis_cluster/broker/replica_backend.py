"""Compares the metadata with what this shard really runs, and mends the difference.

A partition that the table places here is opened; one whose topic the table has dropped is removed.
A replica on disk that the table has never heard of is neither: it stays as it is, because the
table may simply be young (deleting by inference is how others lost data). Also keeps this node
registered.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.errors import AegisError
from aegis_cluster.ids import METADATA_GROUP, GroupId, LogIndex, TopicPartition
from aegis_cluster.wire.descriptions import node_to_fields
from aegis_cluster.wire.protocol import Api, Reply

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transport import PeerKey

REGISTER_EVERY_MS: Final = 1_000
REGISTER_AGAIN_MS: Final = 100
"""After a refusal: at a start, the controller is often about to be elected."""
CALL_MS: Final = 2_000

log = logging.getLogger(__name__)


class ReplicaBackend:
    """One per shard; `reconcile` runs whenever the table has moved on."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._done_index = LogIndex(0)
        self._register_at_ms = shard.now_ms
        self._turn = 0

    # ---- replicas

    def reconcile(self) -> None:
        """Open what belongs here and is not open; remove what was deleted."""
        table = self._shard.table
        if table.index == self._done_index:
            return
        self._done_index = table.index
        for group in self._gone():
            log.info("Removing the replica of a deleted topic, group %s.", group)
            self._shard.manager.remove(group)
        for topic in sorted(table.topics):
            for number, group, replicas in table.topics[topic].partitions:
                if self._belongs_here(group) and self._shard.context.me in replicas:
                    self._open(group, TopicPartition(topic, number))

    def prefers_us(self, partition: Partition) -> bool:
        """Whether placement wants this node to lead the partition."""
        found = self._shard.table.partition_of(partition.group)
        return found is not None and found[1].replicas[0] == self._shard.context.me

    def _belongs_here(self, group: GroupId) -> bool:
        context = self._shard.context
        return group % context.shards == context.shard

    def _gone(self) -> list[GroupId]:
        """Replicas whose group the table once gave out and has dropped since."""
        table = self._shard.table
        return [
            group
            for group in self._shard.manager.partitions
            if group != METADATA_GROUP
            and group < table.next_group
            and table.partition_of(group) is None
        ]

    def _open(self, group: GroupId, name: TopicPartition) -> None:
        manager = self._shard.manager
        if group in manager.partitions:
            return
        found = self._shard.table.partition_of(group)
        if found is None:
            return
        partition = manager.create(group, name, self._shard.table.founders_of(group))
        if self.prefers_us(partition):
            partition.replica.campaign()
        manager.due(partition)

    # ---- registration

    def tick(self) -> None:
        """Register this node again until the table shows it as it is."""
        shard = self._shard
        if shard.context.shard != 0 or shard.now_ms < self._register_at_ms:
            return
        info = shard.context.node_info
        if shard.table.nodes.get(info.node) == info:
            self._register_at_ms = shard.now_ms + REGISTER_EVERY_MS
            return
        key = self._controller()
        if key is None:
            return  # the next tick may know one
        self._register_at_ms = shard.now_ms + REGISTER_EVERY_MS
        call = Call(shard.now_ms + CALL_MS, self._registered)
        fields = [node_to_fields(info)]
        if key.node == shard.context.me.node:
            shard.peer_api.register_node(fields, call.done)
        else:
            shard.links.call(key, Api.REGISTER_NODE, fields, now_ms=shard.now_ms, call=call)

    def _controller(self) -> PeerKey | None:
        """The controller's shard, or the next candidate where we don't know it."""
        known = self._shard.controller_key()
        if known is not None:
            return known
        keys = [key for key in self._shard.links.ups() if key.shard == 0]
        self._turn += 1
        return keys[self._turn % len(keys)] if keys else None

    def _registered(self, reply: Reply | AegisError) -> None:
        if isinstance(reply, AegisError):
            self._register_at_ms = self._shard.now_ms + REGISTER_AGAIN_MS
            log.debug("Registering this node failed, trying again: %s", reply)
