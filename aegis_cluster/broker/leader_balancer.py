"""Gives leaderships back to the replicas that placement prefers, gently.

After a node was away, others lead what it used to lead, and would do so for ever. Each leader looks
at its own partitions once a second: where the preferred replica has followed closely for a while,
it gets the leadership, a few partitions at a time. Writes to a partition pause for one round trip.

The rule it protects: balance never costs availability. A replica that has just come back, or falls
behind, is left in peace; nothing is moved while the disk is full or leaders step aside anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.ids import GroupId, Member

LOOK_EVERY_MS: Final = 1_000
STEADY_MS: Final = 5_000
"""How long the preferred replica must have kept up before it gets the leadership."""
HANDOVERS_MAX: Final = 20
"""Per look, so that one node does not get hundreds of leaderships in an instant."""


class LeaderBalancer:
    """One per shard; acts on what this shard leads."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._look_at_ms = shard.now_ms + LOOK_EVERY_MS
        self._steady_since_ms: dict[GroupId, int] = {}

    def tick(self) -> None:
        """Look once a second, and hand over what is due."""
        now_ms = self._shard.now_ms
        if now_ms < self._look_at_ms:
            return
        self._look_at_ms = now_ms + LOOK_EVERY_MS
        left = HANDOVERS_MAX
        for group, partition in self._shard.manager.partitions.items():
            preferred = self._preferred_follower(group, partition)
            if preferred is None:
                self._steady_since_ms.pop(group, None)
                continue
            since_ms = self._steady_since_ms.setdefault(group, now_ms)
            if left and now_ms - since_ms >= STEADY_MS:
                left -= 1
                partition.step_aside(preferred)

    def _preferred_follower(self, group: GroupId, partition: Partition) -> Member | None:
        """The replica that should lead instead of us and could do so at once."""
        if not partition.serving:
            return None
        found = self._shard.table.partition_of(group)
        if found is None:
            return None
        preferred = found[1].replicas[0]
        replica = partition.replica
        if preferred == self._shard.context.me or preferred not in replica.membership.voters:
            return None
        disks = self._shard.peer_disks
        if disks.is_full(preferred, partition) or disks.is_slow(preferred, partition):
            return None
        return preferred if replica.is_caught_up(preferred) else None
