"""What a shard does while its disk is full: it leads nothing that others could lead, and says so.

The idea: the store says when the disk is full and when it is not any more. Meanwhile users' batches
are refused (`DiskFull`, which a client may try again), a follower takes none either, and it does
not follow a call to lead. Leaders hand over to other voters in turn, but for those whose disks are
full too (`peer_disks`). Metadata, memberships and log starts go on.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import Refused
from aegis_cluster.ids import METADATA_GROUP
from aegis_cluster.limits import MIB

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard

EVERY_MS: Final = 250
HAND_OVER_MS: Final = 3_000

log = logging.getLogger(__name__)


class DiskSpace:
    """One per shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._due_ms = shard.now_ms
        self._hand_over_ms = shard.now_ms
        self._turn = 0
        self._was_full = False

    def tick(self) -> None:
        shard = self._shard
        if shard.now_ms < self._due_ms:
            return
        self._due_ms = shard.now_ms + EVERY_MS
        is_full = shard.store.disk_full
        if is_full != self._was_full:
            self._was_full = is_full
            if is_full:
                log.error("%s", self._words())
            else:
                log.warning("The disk has room again: messages are taken.")
        if is_full and shard.now_ms >= self._hand_over_ms:
            self._hand_over_ms = shard.now_ms + HAND_OVER_MS
            self._turn += 1
            for partition in shard.manager.partitions.values():
                self._hand_over(partition)

    def report(self) -> list[dict[str, Any]]:
        """For a status answer."""
        if not self._shard.store.disk_full:
            return []
        return [{"group": METADATA_GROUP, "topic": "", "why": self._words()}]

    def _words(self) -> str:
        free = self._shard.store.free_bytes
        return (
            f"The disk of node {self._shard.context.me.node} is full ({max(free, 0) // MIB} MiB"
            " left): it takes no messages until there is room. Delete topics, shorten their"
            " retention, or make the disk larger."
        )

    def _hand_over(self, partition: Partition) -> None:
        replica = partition.replica
        others = [
            voter
            for voter in replica.membership.voters
            if voter != replica.me and not self._shard.peer_disks.is_full(voter, partition)
        ]
        if partition.is_internal or not partition.serving or not others:
            return
        with suppress(Refused):
            replica.transfer_leadership(others[self._turn % len(others)])
            self._shard.manager.due(partition)
