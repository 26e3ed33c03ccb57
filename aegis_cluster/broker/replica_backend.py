"""Compares the metadata with what this shard really runs, and mends the difference.

A partition that the table places here is opened; one whose topic the table has dropped is removed.
A replica on disk that the table has never heard of is neither: it stays as it is, because the
table may simply be young (deleting by inference is how others lost data). Also keeps this node
registered.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.errors import AegisError
from aegis_cluster.ids import METADATA_GROUP, GroupId, LogIndex, Member
from aegis_cluster.storage.manifest import ManifestEntry
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
OPENED_AT_ONCE: Final = 64
"""New replicas whose directories share their syncs, and which are opened in one turn."""
REMOVED_PER_TURN: Final = 4

log = logging.getLogger(__name__)


class ReplicaBackend:
    """One per shard; `reconcile` runs whenever the table has moved on."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._done_index = LogIndex(0)
        self._to_remove: deque[GroupId] = deque()
        self._to_open: deque[ManifestEntry] = deque()
        self._preparing = False
        self._register_at_ms = shard.now_ms
        self._turn = 0

    # ---- replicas

    def reconcile(self) -> None:
        """See what belongs here and is not open, and what was deleted; `turn` does it, a few at a
        time.
        """
        table = self._shard.table
        if table.index == self._done_index:
            return
        self._done_index = table.index
        self._to_remove = deque(self._gone())
        self._to_open = deque(self._missing())
        self._prepare()

    def turn(self) -> None:
        """Remove a few of the replicas whose topic was deleted: others want their heartbeats."""
        for _ in range(min(REMOVED_PER_TURN, len(self._to_remove))):
            group = self._to_remove.popleft()
            if group in self._shard.manager.partitions:
                log.info("Removing the replica of a deleted topic, group %s.", group)
                self._shard.manager.remove(group)

    @property
    def has_more_to_do(self) -> bool:
        """The next turn should come at once."""
        return bool(self._to_remove)

    def prefers_us(self, partition: Partition) -> bool:
        """Whether placement wants this node to lead the partition."""
        found = self._shard.table.partition_of(partition.group)
        return found is not None and found[1].replicas[0] == self._shard.context.me

    def succeeds(self, partition: Partition, lost: Member) -> bool:
        """Whether this node is the first to ask for votes where a leader is lost. If all did, they
        would split the votes of hundreds of partitions.
        """
        found = self._shard.table.partition_of(partition.group)
        others = [member for member in found[1].replicas if member != lost] if found else []
        return others[:1] == [self._shard.context.me]

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

    def _missing(self) -> list[ManifestEntry]:
        """What the table places here and is not open."""
        table, manager = self._shard.table, self._shard.manager
        return [
            ManifestEntry(group, topic, number, table.founders_of(group))
            for topic in sorted(table.topics)
            for number, group, replicas in table.topics[topic].partitions
            if group not in manager.partitions
            and self._belongs_here(group)
            and self._shard.context.me in replicas
        ]

    def _prepare(self) -> None:
        """Have the disk made ready for the next replicas, in a helper thread."""
        if self._preparing or not self._to_open:
            return
        self._preparing = True
        store = self._shard.store
        entries = [self._to_open.popleft() for _ in range(min(OPENED_AT_ONCE, len(self._to_open)))]

        def done(_: None) -> None:
            self._preparing = False
            self._open(entries)

        self._shard.transport.read_later(lambda: store.prepare_groups(entries), done)

    def _open(self, entries: list[ManifestEntry]) -> None:
        manager = self._shard.manager
        for entry in entries:
            partition = manager.start(entry)
            if self.prefers_us(partition):
                manager.campaigns.want(partition)
            manager.due(partition)
        # The table may have moved on meanwhile: deleted some of them, or not known them as open.
        self._to_remove = deque(self._gone())
        self._to_open = deque(self._missing())
        self._prepare()

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
