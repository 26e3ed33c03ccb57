"""What shards tell each other of their disks: whether they are full, and how slow they are.

The idea: once a second, and at once when that changes, a shard tells every shard that it is linked
to. So a leader does not send a follower what its full disk would refuse, leadership goes to nodes
that have room, and a leader whose own disk is far slower than those of its followers finds out:
nothing is wrong with its heartbeats, yet every write crawls (a *gray failure*, PITFALLS A19). It
then hands over to followers with a faster disk.

The rule it protects: this is advice. A wrong or old word costs time, never an acknowledged record.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.links import Call
from aegis_cluster.errors import Refused
from aegis_cluster.ids import METADATA_GROUP, ShardId
from aegis_cluster.wire.protocol import Api, take_bool, take_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.ids import Member, NodeId
    from aegis_cluster.wire.protocol import Hello

TELL_EVERY_MS: Final = 1_000
LOOK_EVERY_MS: Final = 250
VALID_MS: Final = 5_000
"""What was said longer ago counts for nothing."""
CALL_MS: Final = 2_000
SYNCS_KEPT: Final = 64
SYNCS_MIN: Final = 8
"""So many are needed to judge a disk by."""
SLOW_SYNC_MS: Final = 50
SLOW_FACTOR: Final = 8
"""A disk is slow when its syncs take so long, and so many times as long as its peers'."""
SLOW_FOR_MS: Final = 3_000
HANDOVERS_MAX: Final = 20
"""Per look, as in `leader_balancer`."""

log = logging.getLogger(__name__)


class DiskState(NamedTuple):
    """One shard's word."""

    full: bool
    sync_ms: int
    """The time that nine of ten of its last syncs stayed below; 0 where there were too few."""
    at_ms: int


class PeerDisks:
    """One per shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._known: dict[tuple[NodeId, ShardId], DiskState] = {}
        self._syncs: deque[tuple[int, int]] = deque(maxlen=SYNCS_KEPT)
        """When a sync ended, and how long it took."""
        self._tell_at_ms = shard.now_ms
        self._look_at_ms = shard.now_ms
        self._told_full = False
        self._holds_back = False
        """Some follower is sent nothing, because its disk is full."""
        self._slow_since_ms: int | None = None

    # ---- what is said

    def note_sync(self, took_ms: int) -> None:
        """One of our own syncs came back."""
        self._syncs.append((self._shard.now_ms, took_ms))

    @property
    def sync_ms(self) -> int:
        """Nine of ten of our recent syncs took at most so long."""
        since = self._shard.now_ms - 2 * VALID_MS
        times = sorted(took for at, took in self._syncs if at >= since)
        return times[len(times) * 9 // 10] if len(times) >= SYNCS_MIN else 0

    def heard(self, peer: Hello, fields: Sequence[Any]) -> None:
        """[full, sync milliseconds] of another shard. Raises `PeerViolation`."""
        full = take_bool(list(fields), 0, "full")
        sync_ms = take_int(list(fields), 1, "sync_ms")
        key = (type(self._shard.context.me.node)(peer.node), ShardId(peer.shard))
        self._known[key] = DiskState(full, sync_ms, self._shard.now_ms)
        self._look_at_ms = self._shard.now_ms

    def _tell(self) -> None:
        shard, full = self._shard, self._shard.store.disk_full
        if shard.now_ms < self._tell_at_ms and full == self._told_full:
            return
        self._tell_at_ms, self._told_full = shard.now_ms + TELL_EVERY_MS, full
        for key in shard.links.ups():
            call = Call(shard.now_ms + CALL_MS, lambda _: None)
            fields = [full, self.sync_ms]
            shard.links.call(key, Api.DISK_STATE, fields, now_ms=shard.now_ms, call=call)

    # ---- what follows from it

    def is_full(self, member: Member, partition: Partition) -> bool:
        """Whether the shard of that member's replica has said that its disk is full."""
        state = self._state_of(member, partition)
        return state is not None and state.full

    def is_slow(self, member: Member, partition: Partition) -> bool:
        """Whether its syncs are no faster than ours, where ours are slow."""
        state = self._state_of(member, partition)
        return state is None or self._is_slower(state.sync_ms, self._peers_sync_ms())

    def _state_of(self, member: Member, partition: Partition) -> DiskState | None:
        key: PeerKey = self._shard.addresses.key_of(self._shard.table, member.node, partition.group)
        return self._valid().get((key.node, key.shard))

    def _valid(self) -> dict[tuple[NodeId, ShardId], DiskState]:
        since = self._shard.now_ms - VALID_MS
        return {key: state for key, state in self._known.items() if state.at_ms >= since}

    def tick(self) -> None:
        """Tell others, hold back what they would refuse, and step aside if our disk is slow."""
        self._tell()
        now_ms = self._shard.now_ms
        if now_ms < self._look_at_ms:
            return
        self._look_at_ms = now_ms + LOOK_EVERY_MS
        is_full = any(state.full for state in self._valid().values())
        if is_full or self._holds_back:
            for partition in self._shard.manager.partitions.values():
                if partition.leads and not partition.is_internal:
                    self._hold(partition)
        self._holds_back = is_full
        self._look_at_own_disk()

    def _hold(self, partition: Partition) -> None:
        for member, progress in partition.replica.progress.items():
            full = self.is_full(member, partition)
            if progress.held != full:
                partition.replica.hold(member, held=full)
                self._shard.manager.due(partition)

    def report(self) -> list[dict[str, Any]]:
        """For a status answer: followers that lag because their disks are full."""
        lacking: dict[NodeId, list[str]] = {}
        for partition in self._shard.manager.partitions.values():
            for member, progress in partition.replica.progress.items():
                if progress.held:
                    lacking.setdefault(member.node, []).append(str(partition.name))
        return [
            {
                "group": METADATA_GROUP,
                "topic": "",
                "why": (
                    f"Node {node} takes no messages because its disk is full: it lags in"
                    f" {len(names)} partitions that are led here ({', '.join(names[:5])}"
                    f"{', …' if len(names) > 5 else ''}) and catches up when it has room again."
                ),
            }
            for node, names in sorted(lacking.items())
        ]

    # ---- gray failure

    def _peers_sync_ms(self) -> int:
        """The usual sync of the others; 0 where nobody has said anything."""
        times = [state.sync_ms for state in self._valid().values() if state.sync_ms]
        return int(median(times)) if times else 0

    def _is_slower(self, own_ms: int, others_ms: int) -> bool:
        return others_ms > 0 and own_ms >= max(SLOW_SYNC_MS, SLOW_FACTOR * others_ms)

    def _look_at_own_disk(self) -> None:
        now_ms, own_ms, others_ms = self._shard.now_ms, self.sync_ms, self._peers_sync_ms()
        if not self._is_slower(own_ms, others_ms):
            self._slow_since_ms = None
            return
        if self._slow_since_ms is None:
            self._slow_since_ms = now_ms
        if now_ms - self._slow_since_ms < SLOW_FOR_MS:
            return
        log.warning(
            "The disk of this node is slow: a sync takes %s ms here and %s ms elsewhere."
            " Leaderships go to other nodes.",
            own_ms,
            others_ms,
        )
        self._slow_since_ms = now_ms
        left = HANDOVERS_MAX
        for partition in self._shard.manager.partitions.values():
            if left and partition.serving and self._hand_over(partition):
                left -= 1

    def _hand_over(self, partition: Partition) -> bool:
        """To a follower that is as far as we are and whose disk is faster."""
        replica = partition.replica
        for member in replica.membership.voters:
            if (
                member != replica.me
                and replica.is_caught_up(member)
                and not self.is_full(member, partition)
                and not self.is_slow(member, partition)
            ):
                with suppress(Refused):
                    replica.transfer_leadership(member)
                    self._shard.manager.due(partition)
                    return True
        return False
