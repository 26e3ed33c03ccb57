"""Rebuilding a damaged replica from its leader.

The idea: a replica that has lost what it had acknowledged promises nothing (the core is mute), so
it cannot be brought up by ordinary appends, which are acknowledged. Its shard copies instead: it
fetches the start of the log and the folded state from the leader (`snapshot_transfer`), begins anew
with them, fetches every committed frame after that, and notes how long the leader's log was when
the state was captured. Once it holds that much durably it is opened again as a healthy replica.

    ASK ──start, state──▶ COPY ──holds the target, durably──▶ FINISH ──says so──▶ opened again
     ▲                      │
     └── leader lost, frames do not fit ──┘

Why the target is enough: the leader captures once a majority, to which this mute replica does not
belong, has confirmed that it leads (read index), and it has committed a no-op of its own term. So
its log holds everything that was ever committed on the strength of an acknowledgement from here,
even if our own term was lost with the disk; and what this replica acknowledged in the leader's own
term stands in the leader's log. Our vote of that term may be lost too, so it is given to the
leader: nobody else can win that term any more (Raft §5.2).

The rule it protects: until then the snapshot on disk says *rebuilding*, so a restart in between
finds a replica that still may not vote (C3).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.errors import AegisError, Corruption, CorruptRecord, OffsetOutOfRange
from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex
from aegis_cluster.limits import RAFT_APPEND_BYTES_MAX
from aegis_cluster.storage.types import HardState
from aegis_cluster.wire.frame import check_frame, iter_frames
from aegis_cluster.wire.protocol import Api, Part, Reply, take_part

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.snapshot_transfer import Copied
    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.ids import Member
    from aegis_cluster.storage.types import ReadResult

    Answer = Callable[[list[Any], list[Part]], None]

EVERY_MS: Final = 200
LOOK_EVERY_MS: Final = 1_000
HAND_OVER_MS: Final = 2_000
"""A damaged leader whose successor got no entry for so long gives up without one."""
"""At the replicas that were whole when last looked at."""
CALL_MS: Final = 5_000

log = logging.getLogger(__name__)


# The leader's half


def answer_frames(partition: Partition, first: LogIndex, answer: Answer, shard: Shard) -> None:
    """[first index] -> committed frames from there on, as many as fit; none if there are none."""
    if not partition.serving:
        raise partition.not_leader()
    frames, last = partition.log, partition.applied
    if first > last:
        answer([last], [b""])
        return

    def read() -> ReadResult | Corruption | OffsetOutOfRange:
        try:
            return frames.read_range(first, last, RAFT_APPEND_BYTES_MAX)
        except (Corruption, OffsetOutOfRange) as error:
            return error

    def done(result: ReadResult | Corruption | OffsetOutOfRange) -> None:
        if isinstance(result, Corruption):
            partition.damage_met(result)
        elif not isinstance(result, OffsetOutOfRange):
            answer([last], [result.data])

    shard.transport.read_later(read, done)


# The damaged replica's half


class Stage(Enum):
    ASK = "ask"
    COPY = "copy"
    FINISH = "finish"


@dataclass(slots=True)
class Repair:
    """One replica that is being rebuilt."""

    stage: Stage = Stage.ASK
    busy: bool = False
    """A question is out, or the helper thread writes for it."""
    copied: Copied | None = None
    target: LogIndex = NO_INDEX
    """What the leader's log ended with when the state was captured."""
    vote_round: int | None = None
    """The round of writes that makes our vote for the leader durable."""


class Repairs:
    """All repairs of one shard; `tick` moves them on."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._repairs: dict[GroupId, Repair] = {}
        self._due_ms = shard.now_ms
        self._look_at_ms = shard.now_ms
        self._damaged: list[GroupId] = []
        self._handing_over: dict[GroupId, tuple[LogIndex, float]] = {}
        """By group that leads: what its best successor holds, and until when it must hold more."""

    def tick(self) -> None:
        """Let damaged leaders hand over, and damaged replicas be rebuilt."""
        now_ms, partitions = self._shard.now_ms, self._shard.manager.partitions
        if now_ms < self._due_ms:
            return
        self._due_ms = now_ms + EVERY_MS
        if now_ms >= self._look_at_ms:
            self._look_at_ms = now_ms + LOOK_EVERY_MS
            self._damaged = [
                group
                for group, one in partitions.items()
                if one.damage is not None or one.replica.damaged
            ]
        for group in self._damaged:
            partition = partitions.get(group)
            if partition is None:
                continue
            if partition.replica.damaged:
                self._move_on(group, partition)
            elif partition.damage is not None:
                self._stop_promising(partition)

    def report(self) -> list[dict[str, Any]]:
        """What is damaged here, for a status answer."""
        found = []
        for group, partition in sorted(self._shard.manager.partitions.items()):
            if partition.damage is None and not partition.replica.damaged:
                continue
            if partition.is_alone:
                why = str(partition.unable())
            else:
                repair = self._repairs.get(group)
                why = (
                    f"{partition.damage or 'it lost what it had acknowledged'};"
                    f" {_progress(partition, repair)}"
                )
            found.append({"group": group, "topic": partition.name.topic, "why": why})
        return found

    def _stop_promising(self, partition: Partition) -> None:
        """Damage was met while reading: hand over first, then be rebuilt."""
        if partition.leads and not partition.is_alone and self._may_hand_over(partition):
            partition.step_aside()
            return
        self._handing_over.pop(partition.group, None)
        partition.replica.mark_damaged()
        self._shard.manager.due(partition)

    def _may_hand_over(self, partition: Partition) -> bool:
        """Whether successors still get nearer.

        Where what they lack is just what cannot be read any more, they never arrive, and neither
        would a new leader.
        """
        held, now_ms = partition.replica.successor_index, self._shard.now_ms
        before, until_ms = self._handing_over.get(partition.group, (None, 0.0))
        if before is None or held > before:
            self._handing_over[partition.group] = (held, now_ms + HAND_OVER_MS)
            return True
        return now_ms < until_ms

    def _move_on(self, group: GroupId, partition: Partition) -> None:
        if partition.damage is None:
            partition.damage = "frames that it had acknowledged are missing"
            log.error("The replica of %s on this node lost acknowledged frames.", partition.name)
        repair = self._repairs.setdefault(group, Repair())
        leader = partition.replica.leader
        if repair.busy or partition.is_alone or leader is None:
            return
        if repair.stage is Stage.ASK:
            self._fetch(group, partition, repair, leader)
        elif partition.log.durable_index == partition.log.last_index:
            self._go_on(group, partition, repair)

    def _go_on(self, group: GroupId, partition: Partition, repair: Repair) -> None:
        """All that was copied is durable: copy more, or be done."""
        if partition.log.last_index >= repair.target and not partition.log.resetting:
            self._finish(group, partition, repair)
            return
        first = LogIndex(partition.log.last_index + 1)
        self._ask(group, [group, first], lambda reply: self._copied(group, reply))

    def _is_current(self, group: GroupId, repair: Repair) -> bool:
        return self._repairs.get(group) is repair and group in self._shard.manager.partitions

    def _key_of(self, leader: Member, group: GroupId) -> PeerKey:
        return self._shard.addresses.key_of(self._shard.table, leader.node, group)

    def _ask(
        self, group: GroupId, fields: list[Any], done: Callable[[Reply | AegisError], None]
    ) -> None:
        shard, repair = self._shard, self._repairs[group]
        leader = shard.manager.partitions[group].replica.leader
        if leader is None:
            return
        repair.busy = True

        def answered(reply: Reply | AegisError) -> None:
            repair.busy = False
            if self._is_current(group, repair):
                done(reply)

        key = self._key_of(leader, group)
        call = Call(shard.now_ms + CALL_MS, answered)
        shard.ensure_link(key)  # a mute replica sends nothing that would have opened it
        shard.links.call(key, Api.COPY_LOG, fields, now_ms=shard.now_ms, call=call)

    def _fetch(self, group: GroupId, partition: Partition, repair: Repair, leader: Member) -> None:
        """Have the start of the log and the state."""
        repair.busy = True

        def done(copied: Copied | AegisError) -> None:
            repair.busy = False
            if isinstance(copied, AegisError):
                log.debug("Group %s waits for its leader: %s", group, copied)
            elif self._is_current(group, repair):
                self._write(group, repair, copied)

        key, loader = self._key_of(leader, group), partition.state.loader()
        self._shard.snapshot_copies.start(key, group, loader, done, confirm=True)

    def _write(self, group: GroupId, repair: Repair, copied: Copied) -> None:
        """Write the start down, marked as that of a replica that is not whole."""
        store, package = self._shard.store, copied.package
        body = package.body(rebuilding=True).to_values()
        ticket = store.begin_install(group, package.point, body)

        def written(has_room: bool) -> None:
            repair.busy = False
            if has_room and self._is_current(group, repair):
                store.install(ticket, rebuild=True)
                self._started(group, repair, copied)

        repair.busy = True
        self._shard.transport.read_later(
            lambda: store.write_snapshot(ticket, copied.blocks), written
        )

    def _started(self, group: GroupId, repair: Repair, copied: Copied) -> None:
        partition = self._shard.manager.partitions[group]
        repair.copied, repair.target = copied, copied.last_index
        log.warning("Rebuilding %s up to index %s from its leader.", partition.name, repair.target)
        repair.stage = Stage.COPY
        self._shard.manager.wait_for_round(partition)

    def _copied(self, group: GroupId, reply: Reply | AegisError) -> None:
        repair, partition = self._repairs[group], self._shard.manager.partitions[group]
        try:
            if isinstance(reply, AegisError):
                raise reply
            frames = _checked(partition, take_part(reply.parts, 0, "frames"))
        except AegisError as error:
            log.info("Rebuilding %s starts over: %s", partition.name, error)
            repair.stage = Stage.ASK
            return
        if not frames:
            return  # the rest of what is wanted is not committed yet
        self._shard.store.append(group, frames)
        self._shard.store.note_commit(group, partition.log.last_index)
        self._shard.manager.wait_for_round(partition)
        self._due_ms = self._shard.now_ms  # no need to wait for the next piece

    def _vote(self, group: GroupId, partition: Partition) -> None:
        """Where no vote of the present term is known, it is the leader's."""
        partition.step()
        replica, store = partition.replica, self._shard.store
        state = store.hard_state(group)
        if state.vote is None and replica.leader is not None and state.term == replica.term:
            store.set_hard_state(group, HardState(state.term, replica.leader))

    def _finish(self, group: GroupId, partition: Partition, repair: Repair) -> None:
        """Say durably that it is whole again, then open it anew."""
        copied = repair.copied
        if partition.has_unfinished or copied is None:
            return
        if repair.vote_round is None:
            self._vote(group, partition)
            repair.vote_round = self._shard.manager.wait_for_round(partition)
        if partition.rounds_done < repair.vote_round:
            return
        repair.stage = Stage.FINISH
        store, package = self._shard.store, copied.package
        body = package.body(rebuilding=False).to_values()
        ticket = store.begin_snapshot(group, package.index, body)

        def written(has_room: bool) -> None:
            repair.busy = False
            if has_room and self._is_current(group, repair) and store.put_snapshot(ticket):
                repair.busy = True
                self._shard.transport.read_later(lambda: store.sync_snapshot(ticket), synced)

        def synced(_: None) -> None:
            if self._is_current(group, repair):
                del self._repairs[group]
                last = partition.log.last_index
                log.warning("%s is whole again, up to index %s.", partition.name, last)
                self._shard.manager.reopen(group)

        repair.busy = True
        self._shard.transport.read_later(
            lambda: store.write_snapshot(ticket, copied.blocks), written
        )


def _checked(partition: Partition, data: Part) -> list[bytes]:
    """The frames in `data`, each proved to follow the one before."""
    chain, index = partition.log.last_chain, partition.log.last_index
    frames = []
    for position, header in iter_frames(data):
        check_frame(partition.group, data, position, previous_chain=chain)
        index = LogIndex(index + 1)
        if header.index != index:
            raise CorruptRecord("the leader sent another frame", have=header.index, want=index)
        chain = header.chain
        frames.append(bytes(data[position : position + header.size]))
    return frames


def _progress(partition: Partition, repair: Repair | None) -> str:
    if repair is None or repair.stage is Stage.ASK:
        return "it takes no part in votes until a leader of the partition can rebuild it"
    return f"it is being rebuilt: index {partition.log.last_index} of {repair.target}"
