"""A shard's store beside an obvious model of it: lists of frames, and what may survive a crash.

The model knows, per group: the frames staged now, the versions of the log that a crash may bring
back because no truncation after them is durable yet, and the hard states handed in. After every
crash the store must show one of the versions, cut somewhere at or above what was declared durable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aegis_cluster.errors import StorageFailed
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.storage.types import LOG_BEGIN, NO_HARD_STATE, HardState, LogPoint
from aegis_cluster.testing.disk import SimulatedCrash, SimulatedDisk
from aegis_cluster.wire.frame import FrameKind, check_frame, decode_header
from tests.storage.support import (
    NODE,
    SMALL,
    VOTERS,
    after,
    batch,
    data_frame,
    install,
    new_disk,
    plain_frame,
    read_all,
)

if TYPE_CHECKING:
    import random

    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.rounds import Checkpoint, Round
    from aegis_cluster.storage.types import RecoveredGroup


@dataclass(slots=True)
class Version:
    """One course of a log: a start and the frames after it."""

    begin: LogPoint = LOG_BEGIN
    frames: list[bytes] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.begin.index + len(self.frames)

    def point(self, index: int) -> LogPoint:
        point = self.begin
        for frame in self.frames[: index - self.begin.index]:
            point = after(point, frame)
        return point

    def upto(self, index: int) -> Version:
        return Version(self.begin, self.frames[: index - self.begin.index])

    def holds(self, first: int, frames: list[bytes]) -> bool:
        start = first - self.begin.index - 1
        return 0 <= start <= len(self.frames) and self.frames[start : start + len(frames)] == frames


@dataclass(slots=True)
class ModelGroup:
    """One group of the model."""

    now: Version = field(default_factory=Version)
    older: list[tuple[int, Version]] = field(default_factory=list)
    """(staging number, version): what a truncation or an install since has replaced."""
    durable: int = 0
    commit: int = 0
    hard_state: HardState = NO_HARD_STATE
    hard_states: list[tuple[int, HardState]] = field(default_factory=lambda: [(0, NO_HARD_STATE)])
    """(staging number, state): the last one declared durable, then every later one."""


class Machine:
    """Random steps on a store and the model, and the comparison after each crash."""

    def __init__(self, rng: random.Random, *, store_class: type[ShardStore] = ShardStore) -> None:
        self.rng = rng
        self.store_class = store_class
        self.disk: SimulatedDisk = new_disk(shards=1)
        self.shards = 1
        self.groups: dict[GroupId, ModelGroup] = {}
        self.next_group = 0
        self.staging = 0
        self.rounds: list[tuple[Round, int, frozenset[GroupId]]] = []
        """(round, staging number at its begin, groups that had to leave work for later)."""
        self.checkpoint: Checkpoint | None = None
        self.now_ms = 0
        self.creating: GroupId | None = None
        self.removing: GroupId | None = None
        self.open()

    # Life and death

    def open(self) -> None:
        """Recover until no crash comes in between."""
        for attempt in range(4):
            try:
                if attempt < 3 and self.rng.random() < 0.3:
                    self.crash_after(self.rng.randrange(1, 60))
                self.recover()
                break
            except SimulatedCrash:
                self.power()
        self.disk.before = None

    def recover(self) -> None:
        prepare_node_dir(self.disk, NODE, self.shards, limits=SMALL)
        self.stores: list[ShardStore] = []
        found: dict[GroupId, RecoveredGroup] = {}
        for shard in range(self.shards):
            store = self.store_class(
                self.disk, NODE, shard, clock_ms=lambda: self.now_ms, limits=SMALL
            )
            found.update({one.group: one for one in store.recover()})
            self.stores.append(store)
        self.disk.before = None
        self.compare(found)

    def crash_after(self, operations: int) -> None:
        """End the process at the disk's n-th operation from now."""
        left = [operations]

        def count(operation: str, path: str) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise SimulatedCrash

        self.disk.before = count

    def power(self) -> None:
        """The machine, or only the process, starts again."""
        if self.rng.random() < 0.7:
            self.disk.crash(self.rng)
        else:
            self.disk.restart()

    def die(self) -> None:
        """Crash, perhaps with another number of shards afterwards."""
        self.power()
        self.rounds.clear()
        self.checkpoint = None
        if self.rng.random() < 0.2:
            self.shards = self.rng.choice((1, 2, 3))
        self.open()

    # Comparing

    def compare(self, found: dict[GroupId, RecoveredGroup]) -> None:
        """What was recovered is something that the model allows; the model goes on from there."""
        if self.creating is not None and self.creating not in found:
            self.groups.pop(self.creating, None)
        if self.removing is not None and self.removing not in found:
            self.groups.pop(self.removing, None)
        self.creating = self.removing = None
        assert found.keys() == self.groups.keys()
        for group, one in found.items():
            self.compare_group(self.groups[group], one)

    def compare_group(self, model: ModelGroup, one: RecoveredGroup) -> None:
        log = one.log
        assert one.damage is None, one.damage
        frames = read_all(log)
        self.check_chain(one.group, log.begin, frames)
        versions = [version for _, version in model.older] + [model.now]
        fitting = [version for version in versions if version.holds(log.first_index, frames)]
        assert fitting, f"group {one.group}: invented {log.first_index}..{log.last_index}"
        assert log.last_index >= model.durable, f"group {one.group} lost durable frames"
        assert log.durable_index == log.last_index
        self.compare_hard_state(model, one)
        assert one.commit_index <= log.last_index
        kept = fitting[-1].upto(log.last_index)
        model.now, model.older = kept, []
        model.durable = log.last_index
        model.commit = max(min(model.commit, log.last_index), log.begin.index)
        model.hard_state = one.hard_state
        model.hard_states = [(0, one.hard_state)]

    def compare_hard_state(self, model: ModelGroup, one: RecoveredGroup) -> None:
        raised = one.hard_state == (one.log.last_term, None)
        known = [state for _, state in model.hard_states]
        assert raised or one.hard_state in known, "hard state invented or gone back"
        assert one.hard_state.term >= known[0].term

    def check_chain(self, group: GroupId, begin: LogPoint, frames: list[bytes]) -> None:
        point = begin
        for frame in frames:
            header = check_frame(group, frame, previous_chain=point.chain)
            assert header.index == point.index + 1
            point = after(point, frame)

    # Steps

    def store_of(self, group: GroupId) -> ShardStore:
        return self.stores[group % self.shards]

    def step(self) -> None:
        """One random step; a planted crash or failure may end it."""
        names = (
            ["append"] * 8
            + ["truncate", "hard_state", "hard_state", "commit", "create", "reads", "drop"]
            + ["begin"] * 5
            + ["sync"] * 4
            + ["end"] * 4
            + ["checkpoint"] * 4
            + ["snapshot", "install", "remove", "fail"]
        )
        name = self.rng.choice(names)
        try:
            getattr(self, f"step_{name}")()
        except SimulatedCrash:
            self.die()
        except StorageFailed:
            self.after_failure()

    def after_failure(self) -> None:
        """A failed store refuses everything for ever."""
        assert any(store.failed for store in self.stores), "a failure was not kept in mind"
        for store in self.stores:
            if store.failed:
                for call in (store.begin_round, store.begin_checkpoint):
                    try:
                        call()
                    except StorageFailed:
                        continue
                    raise AssertionError("a failed store went on")
        self.die()

    def any_group(self) -> GroupId | None:
        return self.rng.choice(sorted(self.groups)) if self.groups else None

    def step_create(self) -> None:
        if len(self.groups) >= 5:
            return
        group = GroupId(self.next_group)
        self.next_group += 1
        self.creating = group
        self.groups[group] = ModelGroup()
        self.store_of(group).create_group(group, f"topic-{group}", 0, VOTERS)
        self.creating = None

    def step_remove(self) -> None:
        group = self.any_group()
        if group is None or self.rng.random() < 0.7:
            return
        self.removing = group
        self.store_of(group).remove_group(group)
        del self.groups[group]
        self.removing = None

    def step_append(self) -> None:
        group = self.any_group()
        if group is None:
            return
        model = self.groups[group]
        point = model.now.point(model.now.last)
        term = max(point.term, model.hard_state.term, 1)
        frames = []
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            frames.append(self.random_frame(group, point, term))
            point = after(point, frames[-1])
        model.now.frames += frames
        self.store_of(group).append(group, frames)

    def random_frame(self, group: GroupId, point: LogPoint, term: int) -> bytes:
        kind = self.rng.choice((FrameKind.DATA,) * 6 + (FrameKind.NOOP, FrameKind.LOG_START))
        if kind is not FrameKind.DATA:
            return plain_frame(group, point, kind, term=term)
        payload = batch(
            records=self.rng.choice((1, 3)),
            size=self.rng.choice((0, 30, 300, 900)),
            time=self.rng.randrange(1_000, 1_010),
        )
        return data_frame(group, point, term=term, payload=payload)

    def step_truncate(self) -> None:
        group = self.any_group()
        if group is None:
            return
        model = self.groups[group]
        first = max(model.commit, model.now.begin.index, self.log_begin(group)) + 1
        if first > model.now.last:
            return
        from_index = self.rng.randrange(first, model.now.last + 1)
        self.replace(model, model.now.upto(from_index - 1))
        model.durable = min(model.durable, from_index - 1)
        self.raise_term(group)
        self.store_of(group).truncate(group, LogIndex(from_index))

    def log_begin(self, group: GroupId) -> int:
        return self.store_of(group).log(group).begin.index

    def replace(self, model: ModelGroup, version: Version) -> None:
        self.staging += 1
        model.older.append((self.staging, model.now))
        model.now = version

    def raise_term(self, group: GroupId) -> None:
        """As in Raft, frames are replaced only by those of a later term."""
        model = self.groups[group]
        last = model.older[-1][1]
        term = max(model.hard_state.term, last.point(last.last).term) + 1
        self.hand_in(group, HardState(Term(term), None))

    def step_hard_state(self) -> None:
        group = self.any_group()
        if group is None:
            return
        now = self.groups[group].hard_state
        vote = self.rng.choice((None, *VOTERS, Member(NodeId(3), "three")))
        self.hand_in(group, HardState(Term(now.term + 1), vote))

    def hand_in(self, group: GroupId, state: HardState) -> None:
        model = self.groups[group]
        self.staging += 1
        model.hard_state = state
        model.hard_states.append((self.staging, state))
        self.store_of(group).set_hard_state(group, state)

    def step_commit(self) -> None:
        group = self.any_group()
        if group is None:
            return
        model = self.groups[group]
        if model.durable > model.commit:
            model.commit = self.rng.randrange(model.commit, model.durable) + 1
            self.store_of(group).note_commit(group, LogIndex(model.commit))

    def step_drop(self) -> None:
        group = self.any_group()
        if group is not None and self.rng.random() < 0.5:
            index = LogIndex(self.groups[group].commit)
            self.store_of(group).drop_before(group, index)

    def step_snapshot(self) -> None:
        group = self.any_group()
        if group is None:
            return
        commit = self.groups[group].commit
        if commit >= max(1, self.log_begin(group)):
            store = self.store_of(group)
            store.save_snapshot(group, LogIndex(commit), {"upto": commit})
            loaded = store.load_snapshot(group)
            assert loaded is not None
            assert (loaded.at, loaded.body) == (commit, {"upto": commit})

    def step_install(self) -> None:
        group = self.any_group()
        if group is None or self.rng.random() < 0.5:
            return
        model = self.groups[group]
        index = model.commit + self.rng.randrange(1, 30)
        chain = bytes([self.rng.randrange(256) for _ in range(8)])
        term = Term(max(model.hard_state.term, model.now.point(model.now.last).term, 1))
        begin = LogPoint(LogIndex(index), term, chain, RecordOffset(index * 3))
        self.replace(model, Version(begin))
        model.durable = min(model.durable, index)
        self.raise_term(group)
        install(self.store_of(group), group, begin, "fold")
        model.older.clear()
        model.durable = model.commit = index

    def step_begin(self) -> None:
        store = self.rng.choice(self.stores)
        current = store.begin_round()
        if current is not None:
            self.rounds.append((current, self.staging, store.staged_groups))

    def step_sync(self) -> None:
        waiting = [one for one in self.rounds if not one[0].started]
        if waiting:
            current = self.rng.choice(waiting)[0]
            self.store_with(current).sync(current)

    def store_with(self, current: Round) -> ShardStore:
        return next(store for store in self.stores if current in store.open_rounds)

    def step_end(self) -> None:
        if self.rng.random() < 0.5:
            self.step_sync()
        for store in self.stores:
            proved: set[int] = set()
            for current in store.open_rounds:
                proved |= current.finished()
            ready = None
            for current in store.open_rounds:
                if current.number not in proved:
                    break
                ready = current
            if ready is not None and ready.synced:
                self.end(store, ready)

    def end(self, store: ShardStore, current: Round) -> None:
        mine = [one for one in self.rounds if one[0] in store.open_rounds]
        ended = [one for one in mine if one[0].number <= current.number]
        durable = store.end_round(current)
        self.rounds = [one for one in self.rounds if one not in ended]
        for group, index in durable.items():
            model = self.groups[group]
            assert index <= model.now.last, "more declared durable than there is"
            model.durable = max(model.durable, index)
        for one, staging, left in ended:
            self.note_ended(one, staging, left)

    def note_ended(self, ended: Round, staging: int, left: frozenset[GroupId]) -> None:
        """Versions and hard states from before this round cannot come back."""
        for group in set(ended.ends) - left:
            model = self.groups[group]
            model.older = [one for one in model.older if one[0] > staging]
        for group in ended.hard_states:
            known = self.groups[group].hard_states
            covered = [place for place, (at, _) in enumerate(known) if at <= staging]
            del known[: covered[-1]]

    def step_checkpoint(self) -> None:
        store = self.rng.choice(self.stores)
        self.now_ms += 400
        if self.checkpoint is None:
            if store.checkpoint_due(self.now_ms):
                self.checkpoint = store.begin_checkpoint()
                self.checkpoint_store = store
        elif not self.checkpoint.synced:
            self.checkpoint_store.sync_checkpoint(self.checkpoint)
        else:
            self.checkpoint_store.end_checkpoint(self.checkpoint)
            self.checkpoint = None

    def step_fail(self) -> None:
        """Now and then the disk refuses one write or sync."""
        if self.rng.random() < 0.2:
            self.disk.fail_next(self.rng.choice(("write", "sync", "sync", "sync_dir")))

    def step_reads(self) -> None:
        """Everything that can be asked, against the list."""
        for group, model in sorted(self.groups.items()):
            self.check_reads(group, model.now)

    def check_reads(self, group: GroupId, version: Version) -> None:
        log = self.store_of(group).log(group)
        assert log.last_index == version.last
        frames = version.frames[log.begin.index - version.begin.index :]
        if not frames:
            return
        first = self.rng.randrange(log.first_index, log.last_index + 1)
        last = self.rng.randrange(first, log.last_index + 1)
        found = log.read(LogIndex(first), LogIndex(last), self.rng.choice((1, 700, 5_000)))
        start = first - log.first_index
        assert found.data == b"".join(frames[start : start + found.last - first + 1])
        assert found.first == first <= found.last <= last
        self.check_lookups(log, version, first)

    def check_lookups(self, log: PartitionLog, version: Version, index: int) -> None:
        want = version.point(index)
        assert log.point_at(LogIndex(index)) == want
        assert log.term_at(LogIndex(index)) == want.term
        offset = self.rng.randrange(log.begin.offset, version.point(version.last).offset + 2)
        at = log.index_of_offset(RecordOffset(offset))
        holds = version.point(at).offset if at <= version.last else offset + 1
        assert holds > offset >= version.point(at - 1).offset or offset >= log.end_offset
        assert decode_header(version.frames[index - version.begin.index - 1]).index == index
