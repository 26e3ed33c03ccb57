"""All replicas of one shard: opening them, moving them on, and their shared rounds of writes.

The idea: a turn of the shard's loop touches many replicas; each stages its writes, and one round
with one sync makes them durable together (group commit). Only replicas that something happened to
are looked at.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.campaigns import Campaigns
from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.broker.groups.group_stm import GroupFold
from aegis_cluster.broker.metadata_stm import MetadataFold
from aegis_cluster.broker.partition import Partition
from aegis_cluster.broker.snapshot_maker import SnapshotMaker
from aegis_cluster.broker.snapshots import Body, body_from_values, recovered_membership
from aegis_cluster.broker.subscriptions.subscription_stm import SubscriptionFold
from aegis_cluster.broker.transactions.transaction_stm import TransactionFold
from aegis_cluster.errors import Corruption, invariant
from aegis_cluster.ids import (
    GROUPS_TOPIC,
    METADATA_GROUP,
    SUBSCRIPTIONS_TOPIC,
    TRANSACTIONS_TOPIC,
    GroupId,
    LogIndex,
    Member,
    NodeId,
    TopicPartition,
)
from aegis_cluster.raft import Membership, RaftConfig, RaftLog, Replica
from aegis_cluster.storage.manifest import ManifestEntry
from aegis_cluster.storage.types import NO_HARD_STATE, HardState, RecoveredGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.folds import Fold
    from aegis_cluster.broker.partition import ReadLater, Sender
    from aegis_cluster.raft import InstallSnapshot
    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.storage.store import ShardStore

UNKNOWN: Final = Member(NodeId(0), "unknown")
"""Stands for the voters of a group whose manifest cannot be read: damaged, and never alone."""

LOOK_AT_ALL_TICKS: Final = 20
"""Whatever wakes a replica also makes it due; should that ever be missed, it costs a second."""

log = logging.getLogger(__name__)


class ReplicaManager:
    """Replicas by group; `turn` steps those that are due, `begin_round` writes what they staged."""

    def __init__(
        self,
        *,
        me: Member,
        store: ShardStore,
        rng: random.Random,
        wall_ms: Callable[[], int],
        send: Sender,
        read_later: ReadLater,
        on_advance: Callable[[Partition], None],
        on_opened: Callable[[Partition], None],
        on_offer: Callable[[Partition, Member, InstallSnapshot], None],
        in_memory: bool = False,
    ) -> None:
        self.partitions: dict[GroupId, Partition] = {}
        self.metadata: MetadataFold | None = None
        self._me = me
        self._store = store
        self._rng = rng
        self._wall_ms = wall_ms
        self._send = send
        self._read_later = read_later
        self._on_advance = on_advance
        self._on_opened = on_opened
        self._on_offer = on_offer
        self.snapshots = SnapshotMaker(store, read_later)
        self._in_memory = in_memory
        self._due: dict[GroupId, Partition] = {}
        self._awake: dict[GroupId, Partition] = {}
        """Those that time passes for; of thousands of idle ones it need not even be asked."""
        self._ticks = 0
        self.campaigns = Campaigns(me.node)
        self._round_number = 1
        self._waiting: dict[GroupId, Partition] = {}
        self._round_members: dict[int, list[Partition]] = {}

    # ---- opening and closing

    def recover(self) -> None:
        """Open what the disk holds; what is damaged there stays mute until it is rebuilt."""
        for found in self._store.recover():
            self._open_found(found)

    def reopen(self, group: GroupId) -> Partition:
        """Open a replica anew from what storage holds of it now."""
        old = self.partitions[group]
        old.close()
        snapshot = self._store.load_snapshot(group)
        found = RecoveredGroup(
            group,
            old.name.topic,
            old.name.partition,
            old.replica.membership.voters,
            self._store.hard_state(group),
            old.log,
            old.log.commit_index,
            (snapshot.at, snapshot.body) if snapshot else None,
            old.log.damage,
            snapshot.slices if snapshot else (),
        )
        opened = self._open_found(found)
        self._on_opened(opened)
        return opened

    def _open_found(self, found: RecoveredGroup) -> Partition:
        body = body_from_values(found.snapshot[1]) if found.snapshot is not None else None
        start, changes = recovered_membership(
            found, Membership.of(found.voters or (UNKNOWN,)), body
        )
        partition = self._open(
            group=found.group,
            name=TopicPartition(found.topic, found.partition),
            membership=start,
            changes=changes,
            log_=found.log,
            hard_state=found.hard_state,
            commit_index=max(found.commit_index, found.snapshot[0] if found.snapshot else 0),
            damaged=found.damage is not None or (body is not None and body.rebuilding),
        )
        if found.damage is not None:
            place = f"{found.damage.file}, byte {found.damage.position}"
            partition.damage = f"{found.damage.reason} ({place}, index {found.damage.index})"
        elif body is not None and body.rebuilding:
            partition.damage = "its rebuilding was interrupted"
        elif body is not None:
            self._load(partition, found, body)
        if partition.damage is not None:
            log.error("The replica of %s is damaged: %s", partition.name, partition.damage)
        return partition

    def _load(self, partition: Partition, found: RecoveredGroup, body: Body) -> None:
        try:
            index = LogIndex(found.snapshot[0] if found.snapshot else 0)
            partition.load_snapshot(index, body, found.slices)
        except Corruption as error:
            partition.damage_met(error)
            partition.replica.mark_damaged()

    def create(self, group: GroupId, name: TopicPartition, voters: Sequence[Member]) -> Partition:
        """Start a new, empty replica; its directory and manifest entry are durable on return."""
        entry = ManifestEntry(group, name.topic, name.partition, tuple(voters))
        self._store.prepare_groups((entry,))
        return self.start(entry)

    def start(self, entry: ManifestEntry) -> Partition:
        """Start a new, empty replica that the store was prepared for."""
        group = entry.group
        invariant(group not in self.partitions, "a group is opened once", group=group)
        opened = self._open(
            group=group,
            name=TopicPartition(entry.topic, entry.partition),
            membership=Membership.of(entry.voters),
            changes=(),
            log_=self._store.start_group(entry),
        )
        self._on_opened(opened)
        return opened

    def remove(self, group: GroupId) -> None:
        """Forget and delete a replica whose topic is gone."""
        partition = self.partitions.pop(group)
        partition.close()
        self._due.pop(group, None)
        self._awake.pop(group, None)
        self._waiting.pop(group, None)
        self._store.remove_group(group)
        self._on_advance(partition)  # who waits for its data waits in vain

    def _open(
        self,
        *,
        group: GroupId,
        name: TopicPartition,
        membership: Membership,
        changes: Sequence[tuple[LogIndex, Membership]],
        log_: PartitionLog,
        hard_state: HardState = NO_HARD_STATE,
        commit_index: int = 0,
        damaged: bool = False,
    ) -> Partition:
        fold: Fold | None = None
        if group == METADATA_GROUP:
            fold = self.metadata = MetadataFold()
        elif name.topic == GROUPS_TOPIC:
            fold = GroupFold()
        elif name.topic == SUBSCRIPTIONS_TOPIC:
            fold = SubscriptionFold()
        elif name.topic == TRANSACTIONS_TOPIC:
            fold = TransactionFold()
        raft_log = RaftLog(
            first_index=log_.first_index,
            last_index=log_.last_index,
            term_runs=log_.term_runs(),
            previous_term=log_.begin.term,
        )
        replica = Replica(
            RaftConfig(may_lose_tail=self._in_memory and not name.topic.startswith("__")),
            self._me,
            term=hard_state.term,
            vote=hard_state.vote,
            log=raft_log,
            membership=membership,
            membership_entries=changes,
            commit_index=LogIndex(commit_index),
            rng=random.Random(self._rng.getrandbits(64)),
            damaged=damaged,
        )
        partition = Partition(
            group=group,
            name=name,
            replica=replica,
            log=log_,
            store=self._store,
            state=PartitionState(fold),
            rounds=self,
            wall_ms=self._wall_ms,
            send=self._send,
            read_later=self._read_later,
        )
        partition.on_advance = self._on_advance
        self.partitions[group] = partition
        self._due[group] = self._awake[group] = partition
        return partition

    # ---- moving on

    def due(self, partition: Partition) -> None:
        """Something happened to it: step it in this turn."""
        self._due[partition.group] = partition

    def want_snapshot(self, partition: Partition) -> None:
        """Have a snapshot made, a slice a turn."""
        self.snapshots.want(partition)

    def offered(self, partition: Partition, leader: Member, offer: InstallSnapshot) -> None:
        """A leader has a snapshot for one of its followers here."""
        self._on_offer(partition, leader, offer)

    def tick(self) -> None:
        """One Raft tick for every replica that is not quiet."""
        self._ticks += 1
        if self._ticks % LOOK_AT_ALL_TICKS == 0:
            self._awake = dict(self.partitions)
        quiet, waiting = [], []
        for group, partition in self._awake.items():
            if partition.replica.quiet:
                quiet.append(group)
            elif partition.replica.lacks_leader:
                waiting.append(partition)
            else:
                self._tick(partition)
        for group in quiet:
            del self._awake[group]
        for partition in self.campaigns.those_to_tick(waiting):
            self._tick(partition)

    def _tick(self, partition: Partition) -> None:
        partition.tick()
        if partition.replica.has_effects:
            self._due[partition.group] = partition

    def turn(self) -> None:
        """Step what is due, and what that makes due."""
        while self._due:
            due, self._due = self._due, {}
            for partition in due.values():
                # A step of `__cluster/0` may have removed those of a deleted topic.
                if self.partitions.get(partition.group) is partition:
                    partition.step()
                    if not partition.replica.quiet:
                        self._awake[partition.group] = partition

    # ---- rounds of writes

    def wait_for_round(self, partition: Partition) -> int:
        """A replica has staged something: it is told when the round that holds it is on disk."""
        self._waiting[partition.group] = partition
        return self._round_number

    def begin_round(self) -> tuple[int, Round | None] | None:
        """Write all that is staged; None when nothing is, or when the journal has no room now.

        In the latter case everything stays staged until a checkpoint has made room. A replica
        whose work found room only in part waits for the next round, with all of its promises.
        """
        if not self._waiting:
            return None
        written = self._store.begin_round()
        left = self._store.staged_groups
        if written is None and left:
            return None
        number = self._round_number
        waiting = self._waiting
        self._waiting = {group: waiting.pop(group) for group in left if group in waiting}
        self._round_members[number] = list(waiting.values())
        self._round_number += 1
        return number, written

    def end_round(self, number: int, written: Round | None) -> None:
        """The round is on disk: promises may leave, and leaders count themselves."""
        if written is not None:
            self._store.end_round(written)
        self._promise(number)

    def end_in_memory(self, number: int, written: Round) -> bool:
        """With `durability = "memory"`: promises may leave before the round is on disk. Never
        where a term or vote is among it, or a log of the cluster's own: those are synced first.
        Nor where a snapshot is due, which must not run ahead of the disk.
        """
        members = self._round_members[number]
        if not self._in_memory or written.hard_states:
            return False
        if any(one.is_internal or one.snapshot_is_due for one in members):
            return False
        self._promise(number)
        return True

    def _promise(self, number: int) -> None:
        for partition in self._round_members.pop(number):
            if self.partitions.get(partition.group) is partition:
                partition.round_done(number)
                self.due(partition)
