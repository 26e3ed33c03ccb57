"""All replicas of one shard: opening them, moving them on, and their shared rounds of writes.

The idea: a turn of the shard's loop touches many replicas; each stages its writes, and one round
with one sync makes them durable together (group commit). Only replicas that something happened to
are looked at.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.broker.metadata_stm import MetadataFold
from aegis_cluster.broker.partition import Partition
from aegis_cluster.errors import invariant
from aegis_cluster.ids import METADATA_GROUP, GroupId, LogIndex, Member, Term, TopicPartition
from aegis_cluster.raft import Membership, RaftConfig, RaftLog, Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.partition import ReadLater, Sender
    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.storage.types import RecoveredGroup


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
        self._due: dict[GroupId, Partition] = {}
        self._round_number = 1
        self._waiting: dict[GroupId, Partition] = {}
        self._round_members: dict[int, list[Partition]] = {}

    # ---- opening and closing

    def recover(self) -> list[RecoveredGroup]:
        """Open what the disk holds; return the groups that are damaged and so stay mute."""
        damaged = []
        for found in self._store.recover():
            partition = self._open(
                group=found.group,
                name=TopicPartition(found.topic, found.partition),
                voters=found.voters,
                log=found.log,
                term=found.hard_state.term,
                vote=found.hard_state.vote,
                commit_index=max(found.commit_index, found.snapshot[0] if found.snapshot else 0),
                damaged=found.damage is not None,
            )
            if found.snapshot is not None:
                partition.load_snapshot(*found.snapshot)
            if found.damage is not None:
                damaged.append(found)
        return damaged

    def create(self, group: GroupId, name: TopicPartition, voters: Sequence[Member]) -> Partition:
        """Start a new, empty replica; its directory and manifest entry are durable on return."""
        invariant(group not in self.partitions, "a group is opened once", group=group)
        log = self._store.create_group(group, name.topic, name.partition, tuple(voters))
        return self._open(group=group, name=name, voters=voters, log=log)

    def remove(self, group: GroupId) -> None:
        """Forget and delete a replica whose topic is gone."""
        partition = self.partitions.pop(group)
        partition.close()
        self._due.pop(group, None)
        self._waiting.pop(group, None)
        self._store.remove_group(group)
        self._on_advance(partition)  # who waits for its data waits in vain

    def _open(
        self,
        *,
        group: GroupId,
        name: TopicPartition,
        voters: Sequence[Member],
        log: PartitionLog,
        term: Term = Term(0),  # noqa: B008 - a NewType call is a constant
        vote: Member | None = None,
        commit_index: int = 0,
        damaged: bool = False,
    ) -> Partition:
        fold = None
        if group == METADATA_GROUP:
            fold = self.metadata = MetadataFold()
        raft_log = RaftLog(
            first_index=log.first_index, last_index=log.last_index, term_runs=log.term_runs()
        )
        replica = Replica(
            RaftConfig(),
            self._me,
            term=term,
            vote=vote,
            log=raft_log,
            membership=Membership.of(voters),
            commit_index=LogIndex(commit_index),
            rng=random.Random(self._rng.getrandbits(64)),
            damaged=damaged,
        )
        partition = Partition(
            group=group,
            name=name,
            replica=replica,
            log=log,
            store=self._store,
            state=PartitionState(fold),
            rounds=self,
            wall_ms=self._wall_ms,
            send=self._send,
            read_later=self._read_later,
        )
        partition.on_advance = self._on_advance
        self.partitions[group] = partition
        self._due[group] = partition
        return partition

    # ---- moving on

    def due(self, partition: Partition) -> None:
        """Something happened to it: step it in this turn."""
        self._due[partition.group] = partition

    def tick(self) -> None:
        """One Raft tick for every replica that is not quiet."""
        for partition in self.partitions.values():
            replica = partition.replica
            if not replica.quiet:
                partition.tick()
                if replica.has_effects:
                    self._due[partition.group] = partition

    def turn(self) -> None:
        """Step what is due, and what that makes due."""
        while self._due:
            due, self._due = self._due, {}
            for partition in due.values():
                partition.step()

    # ---- rounds of writes

    def wait_for_round(self, partition: Partition) -> int:
        """A replica has staged something: it is told when the round that holds it is on disk."""
        self._waiting[partition.group] = partition
        return self._round_number

    def begin_round(self) -> tuple[int, Round | None] | None:
        """Write all that is staged; None when nothing is, or when the journal has no room now.

        In the latter case everything stays staged until a checkpoint has made room.
        """
        if not self._waiting:
            return None
        written = self._store.begin_round()
        if written is None and self._store.staged_groups:
            return None
        number = self._round_number
        self._round_members[number] = list(self._waiting.values())
        self._waiting.clear()
        self._round_number += 1
        return number, written

    def end_round(self, number: int, written: Round | None) -> None:
        """The round is on disk: promises may leave, and leaders count themselves."""
        if written is not None:
            self._store.end_round(written)
        for partition in self._round_members.pop(number):
            if self.partitions.get(partition.group) is partition:
                partition.round_done(number)
                self.due(partition)
