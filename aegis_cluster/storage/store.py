"""One shard's store: appends of many groups become durable with few syncs.

The idea: `append`, `truncate` and `set_hard_state` stage work, visible to reads at once.
`begin_round` writes all of it: into the journal, and into the segments from the same buffers; or
into the segments alone where that is cheaper (`sync_plan`). `sync` makes a round durable and
`end_round` says what is durable now. Checkpoints sync the segments, so that the journal can be
used again.

Threads: one loop owns the store. Only what says that it blocks may run elsewhere, and it touches
nothing but what it was given.

The rules it protects: an index is durable only after the sync of its round came back; a failed
write or sync ends the use of these files for ever, and says so in a marker (C1); a truncation
reaches a segment only after it is durable in the journal.
"""

from __future__ import annotations

import errno
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import Misuse, StorageFailed, invariant
from aegis_cluster.ids import GroupId, LogIndex, Member
from aegis_cluster.storage.checkpoint import (
    CheckpointSlots,
    CheckpointState,
    GroupState,
    join_checkpoint,
    pack_group,
)
from aegis_cluster.storage.compaction import compact, discard
from aegis_cluster.storage.compaction_job import CompactionResult
from aegis_cluster.storage.disk import make_dir_durable
from aegis_cluster.storage.handles import HandleCache
from aegis_cluster.storage.journal import (
    Claim,
    Journal,
    RoundBuilder,
    item_bytes,
    round_bytes,
)
from aegis_cluster.storage.layout import read_layout, shard_dir
from aegis_cluster.storage.log import FramesOp, LogOp, PartitionLog, ResetOp, TruncateOp
from aegis_cluster.storage.manifest import (
    PARTITIONS_DIR,
    ManifestEntry,
    partition_dir,
    write_manifest,
    write_manifests,
)
from aegis_cluster.storage.marker import Marker, write_marker
from aegis_cluster.storage.reserve import Reserve
from aegis_cluster.storage.rounds import Checkpoint, Round, SnapshotTicket
from aegis_cluster.storage.shard_recovery import (
    FoundGroup,
    ShardRecovery,
    finish_removal,
    group_state,
    move_to_removed,
    open_journal,
    quarantine,
    remove_marker,
)
from aegis_cluster.storage.snapshot import (
    ASIDE,
    INCOMING,
    put_in_place,
    read_snapshot,
    write_aside,
    write_snapshot,
)
from aegis_cluster.storage.sync_plan import GroupWork, sync_plan
from aegis_cluster.storage.tail_cache import TailCache
from aegis_cluster.storage.types import (
    NO_HARD_STATE,
    HardState,
    LogPoint,
    RecoveredGroup,
    Snapshot,
    StoreLimits,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.storage.compaction_job import CompactionJob, Rewritten
    from aegis_cluster.storage.disk import Disk
    from aegis_cluster.storage.segment import Segment
    from aegis_cluster.wire.frame import FrameHeader

_ROUND_ITEM_BYTES_MAX: Final = 256
"""Room for any item that carries no frames: hard state, truncation, new start."""
_ITEM_ROOM: Final = item_bytes(_ROUND_ITEM_BYTES_MAX)


@dataclass(slots=True, eq=False)
class _Group:
    """One group in the running store."""

    entry: ManifestEntry
    log: PartitionLog
    hard_state: HardState
    """The newest that was written to the journal or found there."""
    packed: bytes
    """Its part of the next checkpoint; b"" when that must be made anew."""
    frozen: GroupState | None = None
    """Its state in checkpoints while its log is damaged, or about to be replaced."""
    staged: list[LogOp] = field(default_factory=list)
    staged_hard_state: HardState | None = None
    held: deque[tuple[int, LogOp]] = field(default_factory=deque)
    """(round, operation) that wait for a truncation to become durable in the journal."""
    installs: int = 0
    """How often the log was replaced since the start."""
    cut_round: int = 0
    """Journal round of the newest truncation that no checkpoint covers; 0 for none."""


class ShardStore:
    """See the module's first lines."""

    def __init__(
        self,
        disk: Disk,
        node_dir: str,
        shard: int,
        *,
        clock_ms: Callable[[], int],
        limits: StoreLimits | None = None,
    ) -> None:
        self._disk = disk
        self._node_dir = node_dir
        self._shard = shard
        self._shards = 0
        self._clock_ms = clock_ms
        self._limits = limits or StoreLimits()
        self._handles = HandleCache(self._limits.open_segments)
        self._cache = TailCache(self._limits.tail_cache_bytes)
        self._groups: dict[GroupId, _Group] = {}
        self._touched: dict[GroupId, _Group] = {}
        """Groups with staged work."""
        self._held: dict[GroupId, _Group] = {}
        """Groups whose segments wait for a truncation's round."""
        self._changed: dict[GroupId, _Group] = {}
        """Groups that differ from the last checkpoint begun."""
        self._claims: dict[GroupId, LogIndex] = {}
        """Directly synced segments that no journal round has told of yet."""
        self._open_rounds: list[Round] = []
        self._rounds = 0
        self._synced_round = 0
        """Last journal round known as durable."""
        self._checkpoint: Checkpoint | None = None
        self._checkpoint_ms = 0
        self._sequence = 0
        self._removed: list[ManifestEntry] = []
        self.blocked = False
        """The journal is full: a round waits for a checkpoint to begin, see `checkpoint_due`."""
        self._failure: StorageFailed | None = None
        self.syncs = 0
        """Rounds that were synced since the start, for whoever measures."""
        self._slots: CheckpointSlots | None = None
        self._journal_files: Journal | None = None
        self._free_bytes = 0
        self._reserve = Reserve(disk, shard_dir(node_dir, shard), self._limits.reserve_bytes)
        self._free_bytes_ms = 0
        """When the free space was looked at; bytes written since are taken off."""

    # Life

    def recover(self) -> list[RecoveredGroup]:
        """Bring the files to one state and return every group of this shard; call it first."""
        with self._guard("recover"):
            found = self._recover()
        return [self._recovered(one) for one in found]

    def _recover(self) -> tuple[FoundGroup, ...]:
        shards = read_layout(self._disk, self._node_dir)
        if shards is None or not 0 <= self._shard < shards:
            raise Misuse(
                f"{self._node_dir} has no shard {self._shard}: prepare_node_dir comes first",
                have=shards,
            )
        self._shards = shards
        self._reserve.open(self._measure_space())
        recovery = ShardRecovery(
            disk=self._disk,
            node_dir=self._node_dir,
            shard=self._shard,
            shards=shards,
            limits=self._limits,
            handles=self._handles,
            cache=self._cache,
        )
        found = recovery.run()
        self._sequence = found.sequence
        self._synced_round = found.round
        self._slots = found.slots
        self._slots.prepare()
        self._journal_files = open_journal(
            self._disk, self._node_dir, self._shard, self._limits, found
        )
        for one in found.groups:
            self._adopt(one)
        self._first_checkpoint()
        remove_marker(self._disk, self._node_dir, self._shard)
        self._free_bytes_ms = self._clock_ms() - self._limits.checkpoint_interval_ms
        self._look_at_space(self._clock_ms())
        return found.groups

    def _adopt(self, found: FoundGroup) -> None:
        packed = pack_group(found.state)
        frozen = found.state if found.log.damage is not None else None
        group = _Group(found.entry, found.log, found.hard_state, packed, frozen)
        self._groups[found.entry.group] = group

    def _recovered(self, found: FoundGroup) -> RecoveredGroup:
        entry, snapshot = found.entry, found.snapshot
        return RecoveredGroup(
            entry.group,
            entry.topic,
            entry.partition,
            entry.voters,
            found.hard_state,
            found.log,
            found.log.commit_index,
            (snapshot.at, snapshot.body) if snapshot else None,
            found.log.damage,
            snapshot.slices if snapshot else (),
        )

    def _first_checkpoint(self) -> None:
        """Close the past: from here on the new generation of the journal counts."""
        checkpoint = self._capture()
        self._sync_captured(checkpoint)
        self._checkpoint_done(checkpoint)

    def close(self) -> None:
        """Drop every handle. What was not synced may be lost, as in a crash."""
        for found in self._groups.values():
            found.log.forget()
        for table in (self._groups, self._touched, self._held, self._changed):
            table.clear()
        self._slots = self._journal_files = None
        self._failure = self._failure or StorageFailed("the store is closed")

    @property
    def failed(self) -> bool:
        """The disk refused something: this store answers no more calls."""
        return self._failure is not None

    @property
    def disk_full(self) -> bool:
        """Less than the reserve is free: users' appends are to be refused (`DiskFull`), so that
        deletes, offset commits and membership go on. False again by itself.
        """
        return not self._reserve.held or self._free_bytes < self._limits.reserve_bytes

    @property
    def limits(self) -> StoreLimits:
        """The sizes of this shard's files."""
        return self._limits

    @property
    def free_bytes(self) -> int:
        """Free space when it was last looked at, less what was written since."""
        return self._free_bytes

    @property
    def open_rounds(self) -> tuple[Round, ...]:
        """Rounds that were begun and not ended, oldest first."""
        return tuple(self._open_rounds)

    @property
    def staged_groups(self) -> frozenset[GroupId]:
        """Groups with work that no round has taken yet."""
        return frozenset(self._touched)

    def log(self, group: GroupId) -> PartitionLog:
        """The log of a group that was created or recovered here."""
        return self._get(group).log

    def hard_state(self, group: GroupId) -> HardState:
        """The newest term and vote that were handed in."""
        found = self._get(group)
        return found.staged_hard_state or found.hard_state

    def group_states(self) -> list[GroupState]:
        """Every group as a checkpoint describes it; for a change of layout."""
        return [self._state(group) for group in self._groups.values()]

    def _get(self, group: GroupId) -> _Group:
        self._check()
        found = self._groups.get(group)
        if found is None:
            raise Misuse(f"group {group} is not in shard {self._shard}", group=group)
        return found

    # Failure is final

    def _check(self) -> None:
        if self._failure is not None:
            raise StorageFailed(self._failure.message, **self._failure.details)

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Any refusal of the disk in here is the end of this store."""
        self._check()
        try:
            yield
        except OSError as error:
            raise self._fail(doing, error) from error

    def _fail(self, doing: str, error: OSError) -> StorageFailed:
        failure = StorageFailed(
            f"shard {self._shard} stops using its files: {doing}: {error}",
            shard=self._shard,
            errno=error.errno,
        )
        if self._failure is None:
            self._failure = failure
            self._leave_marker(failure.message)
        return failure

    def _leave_marker(self, reason: str) -> None:
        """Say what was durable. A helper thread may come here, so the groups are copied first."""
        if self._journal_files is None:
            return  # recovery is not done: an earlier marker, if there is one, still holds
        groups = list(self._groups.copy().values())
        durable = {
            one.entry.group: one.log.durable_index for one in groups if one.log.damage is None
        }
        marker = Marker(self._synced_round, durable, reason)
        try:
            write_marker(self._disk, shard_dir(self._node_dir, self._shard), marker)
        except OSError:
            return  # the disk takes nothing any more; recovery then goes by its ordinary rules

    # Groups

    def create_group(
        self, group: GroupId, topic: str, partition: int, voters: tuple[Member, ...]
    ) -> PartitionLog:
        """Start a group on this node; manifest and directory are durable when it returns."""
        entry = ManifestEntry(group, topic, partition, voters)
        self._check_new(entry)
        self.prepare_groups((entry,))
        return self.start_group(entry)

    def _check_new(self, entry: ManifestEntry) -> None:
        group = entry.group
        self._check()
        if group in self._groups or group % max(self._shards, 1) != self._shard:
            raise Misuse(f"group {group} cannot be created in shard {self._shard}", group=group)

    def prepare_groups(self, entries: Sequence[ManifestEntry]) -> None:
        """Directories and manifests of groups that are not here, durable on return; `start_group`
        follows for each. Blocks.
        """
        try:
            for entry in entries:
                self._make_log_dir(entry)
            self._disk.sync_dir(f"{self._node_dir}/{PARTITIONS_DIR}")
            write_manifests(self._disk, self._node_dir, entries)
        except OSError as error:
            raise self._fail(f"create {len(entries)} groups", error) from error

    def start_group(self, entry: ManifestEntry) -> PartitionLog:
        """Start a group that was prepared, with an empty log."""
        self._check_new(entry)
        with self._guard(f"create group {entry.group}"):
            log = self._new_log(entry)
            log.create()
        created = _Group(entry, log, NO_HARD_STATE, b"")
        self._groups[entry.group] = self._changed[entry.group] = created
        return log

    def _make_log_dir(self, entry: ManifestEntry) -> None:
        directory = partition_dir(self._node_dir, entry)
        if self._disk.exists(directory):
            quarantine(self._disk, self._node_dir, entry.directory_name)
        self._disk.make_dir(directory)

    def _new_log(self, entry: ManifestEntry) -> PartitionLog:
        return PartitionLog(
            group=entry.group,
            disk=self._disk,
            directory=partition_dir(self._node_dir, entry),
            limits=self._limits,
            handles=self._handles,
            cache=self._cache,
        )

    def remove_group(self, group: GroupId) -> None:
        """Forget a group for good: durable when it returns, deleted with the next checkpoint."""
        found = self._get(group)
        entry = ManifestEntry(
            group, found.entry.topic, found.entry.partition, found.entry.voters, removing=True
        )
        with self._guard(f"remove group {group}"):
            write_manifest(self._disk, self._node_dir, entry)
            move_to_removed(self._disk, self._node_dir, entry)
        for table in (self._groups, self._touched, self._held, self._changed):
            table.pop(group, None)
        self._claims.pop(group, None)
        for one in self._open_rounds:
            one.ends.pop(group, None)
            one.hard_states.discard(group)
        found.log.forget()
        self._removed.append(entry)

    # Staging

    def append(
        self,
        group: GroupId,
        frames: Sequence[bytes],
        headers: Sequence[FrameHeader] | None = None,
    ) -> None:
        """Stage frames that follow the log's end; readable at once, durable after a round.
        headers: of the frames, where they were read already."""
        found = self._get(group)
        for part in _parts(frames, self._limits.journal_bytes // 4):
            op = found.log.stage_frames(frames[part], headers[part] if headers else None)
            found.staged.append(op)
            self._touch(found)

    def truncate(self, group: GroupId, from_index: LogIndex) -> None:
        """Stage the removal of every frame at or above `from_index`."""
        found = self._get(group)
        with self._guard(f"truncate group {group}"):
            found.staged.append(found.log.stage_truncate(from_index))
        self._lower(group, LogIndex(from_index - 1))
        self._touch(found)

    def _lower(self, group: GroupId, index: LogIndex) -> None:
        """Rounds under way prove nothing above `index` any more."""
        for one in self._open_rounds:
            if group in one.ends:
                one.ends[group] = min(one.ends[group], index)
        if group in self._claims:
            self._claims[group] = min(self._claims[group], index)

    def set_hard_state(self, group: GroupId, state: HardState) -> None:
        """Stage a group's term and vote; nothing that reflects them may leave before the round."""
        found = self._get(group)
        now = found.staged_hard_state or found.hard_state
        invariant(state.term >= now.term, "a term only rises", have=now.term, want=state.term)
        invariant(
            state.term > now.term or now.vote in (None, state.vote),
            "one vote per term",
            have=now.vote,
            want=state.vote,
        )
        found.staged_hard_state = state
        self._touch(found)

    def note_commit(self, group: GroupId, index: LogIndex) -> None:
        """A hint for the next start; goes into checkpoints."""
        found = self._get(group)
        found.log.note_commit(index)
        self._change(found)

    def drop_before(self, group: GroupId, index: LogIndex) -> LogIndex:
        """Drop whole segments below `index`; return the first index kept."""
        found = self._get(group)
        if not found.held:
            found.log.drop_before(index)
            self._change(found)
        return found.log.first_index

    # Snapshots

    def begin_snapshot(self, group: GroupId, index: LogIndex, body: Any) -> SnapshotTicket:
        """Capture where the log stands at `index`, for a snapshot of the state folded up to there.

        Only what is durable here may be folded: a log that ends before its own snapshot is taken
        for damage when the shard starts, as nothing else explains it.
        """
        found = self._get(group)
        durable = found.log.durable_index
        invariant(index <= durable, "a snapshot ahead of its log", at=index, durable=durable)
        with self._guard(f"snapshot of group {group}"):
            point = found.log.point_at(index)._replace(term=found.log.term_at(index))
        # It replaces an installed one, whose order it hands on until that is carried out.
        snapshot = Snapshot(point, body, installed=found.log.resetting)
        return SnapshotTicket(group, found.log.directory, ASIDE, snapshot, found.installs)

    def write_snapshot(self, ticket: SnapshotTicket, slices: Sequence[bytes]) -> bool:
        """Write it aside, durably; False where there is no room, or the group has gone. Blocks."""
        snapshot = ticket.snapshot._replace(slices=tuple(slices))
        try:
            if snapshot.installed and ticket.group in self._groups:
                make_dir_durable(self._disk, ticket.directory)  # damage may have cost it
            write_aside(self._disk, ticket.directory, ticket.group, snapshot, ticket.aside)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False
            raise self._fail(f"snapshot of group {ticket.group}", error) from error
        return True

    def put_snapshot(self, ticket: SnapshotTicket) -> bool:
        """Put a written snapshot in its place; False where the log was replaced since. Durable
        after `sync_snapshot`.
        """
        found = self._groups.get(ticket.group)
        self._check()
        if found is None or found.installs != ticket.installs:
            return False
        with self._guard(f"snapshot of group {ticket.group}"):
            put_in_place(self._disk, ticket.directory, ticket.aside)
        return True

    def sync_snapshot(self, ticket: SnapshotTicket) -> None:
        """Make its name durable. Blocks."""
        try:
            self._sync_dirs({ticket.directory})
        except OSError as error:
            raise self._fail(f"snapshot of group {ticket.group}", error) from error

    def save_snapshot(
        self, group: GroupId, index: LogIndex, body: Any, slices: Sequence[bytes] = ()
    ) -> None:
        """All of these steps at once; durable on return. Blocks."""
        ticket = self.begin_snapshot(group, index, body)
        with self._guard(f"snapshot of group {group}"):
            snapshot = ticket.snapshot._replace(slices=tuple(slices))
            write_snapshot(self._disk, ticket.directory, group, snapshot)

    # Compaction: the log is read and written aside elsewhere, see `compaction`

    def compact(self, job: CompactionJob) -> CompactionResult:
        """One pass, here and now; nothing is in its place yet. Blocks. Raises `CorruptRecord`."""
        self._check()
        try:
            return compact(self._disk, job)
        except FileNotFoundError:  # the group was removed, or its log replaced, meanwhile
            return CompactionResult((), job.clean_to, 0)
        except OSError as error:
            raise self._fail(f"compaction of group {job.group}", error) from error

    def installs(self, group: GroupId) -> int:
        """How often the group's log was replaced as a whole since the start."""
        return self._get(group).installs

    def put_compacted(self, job: CompactionJob, old: Segment, found: Rewritten) -> bool:
        """Put one segment that was written aside in the place of `old`; False where the log has
        moved on. The next one follows only after `sync_compacted`: what takes a tombstone away
        must not be there before what takes the older values away.
        """
        self._check()
        group = self._groups.get(job.group)
        if group is None or old.header.compactions + 1 != found.header.compactions:
            return False
        with self._guard(f"compaction of group {job.group}"):
            return group.log.put_compacted(old, found.aside(self._disk, job))

    def discard_compacted(self, job: CompactionJob) -> None:
        """What was written aside is not wanted any more. Blocks."""
        discard(self._disk, job)

    def sync_compacted(self, job: CompactionJob) -> None:
        """Make the names durable. Blocks."""
        try:
            self._sync_dirs({job.directory})
        except OSError as error:
            raise self._fail(f"compaction of group {job.group}", error) from error

    def load_snapshot(self, group: GroupId) -> Snapshot | None:
        """The group's snapshot."""
        found = self._get(group)
        with self._guard(f"snapshot of group {group}"):
            return read_snapshot(self._disk, found.log.directory, group)

    def begin_install(self, group: GroupId, begin: LogPoint, body: Any) -> SnapshotTicket:
        """As `begin_snapshot`, for one that came from elsewhere: the log will start after it."""
        found = self._get(group)
        snapshot = Snapshot(begin, body, installed=True)
        return SnapshotTicket(group, found.log.directory, INCOMING, snapshot, found.installs)

    def install(self, ticket: SnapshotTicket, *, rebuild: bool = False) -> None:
        """Replace the whole log by a snapshot that was written: the next frame is the one after it.

        rebuild: it may take the log back, because what it held is damaged; the body must then say
        that the replica is not whole before it holds all that it had acknowledged.

        The snapshot is in place durably when this returns, and recovery restarts the log after it
        even if nothing else is; so `durable_index` is its index at once. It also heals a damaged
        log.
        """
        group, begin = ticket.group, ticket.snapshot.point
        found = self._get(group)
        committed = max(found.log.begin.index, found.log.commit_index)
        if begin.index < committed and not rebuild:
            raise Misuse("a snapshot never takes a log back", have=begin.index, group=group)
        invariant(found.installs == ticket.installs, "one replacement after the other", at=group)
        with self._guard(f"install group {group}"):
            put_in_place(self._disk, ticket.directory, ticket.aside)
            self._disk.sync_dir(ticket.directory)
            if rebuild:  # the manifest may have been what was damaged
                write_manifest(self._disk, self._node_dir, found.entry)
        found.installs += 1
        found.frozen = self._state(found)
        found.staged.append(found.log.stage_reset(begin))
        found.log.commit_index = begin.index
        for one in self._open_rounds:
            one.ends.pop(group, None)
        self._claims.pop(group, None)
        self._touch(found)

    # Staged work

    def _touch(self, found: _Group) -> None:
        self._touched[found.entry.group] = found
        self._change(found)

    def _change(self, found: _Group) -> None:
        self._changed[found.entry.group] = found
        found.packed = b""

    # Rounds

    def begin_round(self) -> Round | None:
        """Write what is staged. None: nothing is staged, or the journal is full until a
        checkpoint begins (`checkpoint_due` says so); the work then stays staged.
        """
        self._check()
        if not self._touched:
            return None
        try:  # what `_guard` does, at a third of its price, and in every round
            return self._write_round()
        except OSError as error:
            raise self._fail("write a round", error) from error

    def _write_round(self) -> Round | None:
        work = [self._work(one) for one in self._touched.values()]
        direct = sync_plan(work, self._limits)
        current = Round(self._rounds + 1)
        builder = RoundBuilder(list(map(Claim._make, self._claims.items())))
        taken = [
            (group, ops)
            for group, one in zip(list(self._touched.values()), work, strict=True)
            if (ops := self._take(group, one, direct, builder, current)) is not None
        ]
        if not taken:
            return None
        if builder.items:
            self._write_journal(builder, current)
        for group, ops in taken:
            self._write_segments(group, ops, current)
        for one in work:
            self._free_bytes -= one.size
        self._open(current)
        return current

    def _work(self, found: _Group) -> GroupWork:
        size, forced = 0, bool(found.held or found.cut_round)
        for op in found.staged:
            if isinstance(op, FramesOp):
                size += op.size
            else:
                forced = True
        return GroupWork(found.entry.group, size, forced)

    def _take(
        self,
        found: _Group,
        work: GroupWork,
        direct: frozenset[GroupId],
        builder: RoundBuilder,
        current: Round,
    ) -> list[LogOp] | None:
        """Move staged work of one group into the round; None if there is no room for any."""
        room = self._journal.room - _ROUND_ITEM_BYTES_MAX
        needed = _ITEM_ROOM if found.staged_hard_state else 0
        whole = needed + work.size + len(found.staged) * _ITEM_ROOM
        fits = self._size_with(builder, whole) <= room
        if not fits and self._size_with(builder, needed) > room:
            self.blocked = True
            return None
        journaled = work.forced or (work.group not in direct and fits)
        if found.staged_hard_state is not None:
            self._take_hard_state(found, builder, current)
        if not journaled:
            ops = found.staged
        elif fits:
            ops = found.staged
            for op in ops:
                _add(builder, work.group, op)
        else:
            ops = self._take_what_fits(found, builder, room)
        if not ops and work.group not in current.hard_states:
            self.blocked = True
            return None
        found.staged = found.staged[len(ops) :]
        if found.staged:
            self.blocked = True
        else:
            del self._touched[work.group]
        if ops and not journaled:
            current.direct.add(work.group)
        _note_end(current, work.group, ops, found.staged)
        self._change(found)
        return ops

    def _size_with(self, builder: RoundBuilder, more: int) -> int:
        return round_bytes(builder.size + more, len(builder.claims))

    def _take_hard_state(self, found: _Group, builder: RoundBuilder, current: Round) -> None:
        state = found.staged_hard_state
        invariant(state is not None, "a hard state is staged")
        found.hard_state, found.staged_hard_state = state or found.hard_state, None
        builder.add_hard_state(found.entry.group, found.hard_state)
        current.hard_states.add(found.entry.group)

    def _take_what_fits(self, found: _Group, builder: RoundBuilder, room: int) -> list[LogOp]:
        taken: list[LogOp] = []
        for op in found.staged:
            needed = op.size if isinstance(op, FramesOp) else 0
            if self._size_with(builder, item_bytes(needed + _ROUND_ITEM_BYTES_MAX)) > room:
                break
            _add(builder, found.entry.group, op)
            taken.append(op)
        return taken

    @property
    def _journal(self) -> Journal:
        if self._journal_files is None:
            raise Misuse("recover() comes first")
        return self._journal_files

    def _write_journal(self, builder: RoundBuilder, current: Round) -> None:
        journal = self._journal
        current.journal_round = journal.write(builder, synced_up_to=self._synced_round)
        current.files[id(journal.file)] = journal.file
        self._claims.clear()

    def _write_segments(self, found: _Group, ops: Sequence[LogOp], current: Round) -> None:
        for op in ops:
            if not isinstance(op, FramesOp):
                found.cut_round = current.journal_round
                self._held[found.entry.group] = found
        if found.entry.group in self._held:
            found.held.extend((current.number, op) for op in ops)
            return
        for op in ops:
            found.log.write(op)
        if found.entry.group in current.direct:
            self._take_files(found.log, current)

    def _take_files(self, log: PartitionLog, current: Round) -> None:
        """A direct sync covers all of the group that is not durable, names included."""
        files, directory = log.take_data_files()
        current.files.update((id(file), file) for file in files)
        begun = self._checkpoint.taken.get(log.group) if self._checkpoint else None
        if begun is not None:
            current.files.update(begun.files)
        if directory or (begun is not None and begun.directory):
            current.directories.add(log.directory)

    def _open(self, current: Round) -> None:
        current.cover(self._open_rounds)
        self._rounds = current.number
        self._open_rounds.append(current)
        self._cache.trim()

    def sync(self, ticket: Round) -> None:
        """Make a round durable, and every round before it whose sync has not begun. Blocks."""
        self._check()
        ticket.started = True
        try:
            for file in ticket.files.values():
                file.fdatasync()
            self._sync_dirs(ticket.directories)
        except OSError as error:
            raise self._fail("sync a round", error) from error
        ticket.synced = True
        self.syncs += 1

    def _sync_dirs(self, directories: set[str]) -> None:
        for directory in sorted(directories):
            with suppress(FileNotFoundError):  # its group was removed meanwhile
                self._disk.sync_dir(directory)

    def end_round(self, ticket: Round) -> dict[GroupId, LogIndex]:
        """Note a synced round, and those before it: the durable index of every group in them."""
        self._check()
        ended = [one for one in self._open_rounds if one.number <= ticket.number]
        proved = {number for one in ended for number in one.finished()}
        for one in ended:
            if one.number not in proved:
                invariant(False, "a round ends after its sync", number=one.number, proved=proved)
        self._open_rounds = self._open_rounds[len(ended) :]
        durable: dict[GroupId, LogIndex] = {}
        for one in ended:
            self._note_durable(one, durable)
        if self._held:
            with self._guard("write what waited for a truncation"):
                self._release_held(ticket.number)
        return durable

    def _note_durable(self, ended: Round, durable: dict[GroupId, LogIndex]) -> None:
        self._synced_round = max(self._synced_round, ended.journal_round)
        for group, index in ended.ends.items():
            log = self._groups[group].log
            log.durable_index = max(log.durable_index, index)
            durable[group] = log.durable_index
            if group in ended.direct:
                self._claims[group] = log.durable_index
        for group in ended.hard_states:
            durable[group] = self._groups[group].log.durable_index

    def _release_held(self, ended: int) -> None:
        """Carry out in the segments what waited for a truncation to be durable."""
        for group, found in list(self._held.items()):
            while found.held and (
                found.held[0][0] <= ended or isinstance(found.held[0][1], FramesOp)
            ):
                found.log.write(found.held.popleft()[1])
            self._change(found)
            if not found.held:
                del self._held[group]

    # Checkpoints

    def checkpoint_due(self, now_ms: int) -> bool:
        """A checkpoint should begin: the journal fills up, or the last one is a while ago.

        To be asked often; it also looks at the free space now and then.
        """
        if self._failure is None:
            self._look_at_space(now_ms)
        if self._checkpoint is not None or self._held or self._failure is not None:
            return False
        if self.blocked or self._journal.used * 2 > self._limits.journal_bytes:
            return True
        waited = now_ms - self._checkpoint_ms >= self._limits.checkpoint_interval_ms
        return waited and bool(self._changed or self._claims or self._removed)

    def begin_checkpoint(self) -> Checkpoint:
        """Capture what the segments hold, and go on in the other journal file."""
        self._check()
        if self._checkpoint is not None or self._held:
            raise Misuse("a checkpoint begins when checkpoint_due says so")
        with self._guard("begin a checkpoint"):
            self._journal.start_generation(self._journal.generation + 1)
            self._checkpoint = self._capture()
        self.blocked = False
        return self._checkpoint

    def _capture(self) -> Checkpoint:
        sequence = self._sequence + 1
        head = CheckpointState(
            sequence,
            self._shard,
            self._shards,
            self._journal.generation,
            self._journal.last_round,
            (),
        )
        checkpoint = Checkpoint(
            sequence=sequence,
            round=self._journal.last_round,
            data=b"",
            slot=self._checkpoint_slots.file(sequence),
            files=[],
            directories=set(),
            taken={},
            doomed=[],
            removed=self._removed,
        )
        for found in self._changed.values():
            self._capture_log(found.log, checkpoint)
        for one in self._open_rounds:  # written and taken, but not yet synced
            checkpoint.files += one.files.values()
            checkpoint.directories |= one.directories
        checkpoint.data = join_checkpoint(
            head, [self._packed(found) for found in self._groups.values()]
        )
        self._removed = []
        self._changed = {}
        return checkpoint

    @property
    def _checkpoint_slots(self) -> CheckpointSlots:
        if self._slots is None:
            raise Misuse("recover() comes first")
        return self._slots

    def _capture_log(self, log: PartitionLog, checkpoint: Checkpoint) -> None:
        taken = log.take_everything()
        checkpoint.files += taken.files.values()
        checkpoint.files += taken.indexes
        checkpoint.doomed += taken.doomed
        if taken.directory:
            checkpoint.directories.add(log.directory)
        checkpoint.taken[log.group] = taken

    def _packed(self, found: _Group) -> bytes:
        if not found.packed:
            found.packed = pack_group(self._state(found))
        return found.packed

    def _state(self, found: _Group) -> GroupState:
        settled = found.log.damage is None and not found.log.resetting
        if settled or found.frozen is None:
            return group_state(found.log, found.hard_state)
        return replace(found.frozen, hard_state=found.hard_state)

    def sync_checkpoint(self, ticket: Checkpoint) -> None:
        """Make a checkpoint durable, then delete what it says is gone. Blocks."""
        self._check()
        try:
            self._sync_captured(ticket)
        except OSError as error:
            raise self._fail("sync a checkpoint", error) from error

    def _sync_captured(self, ticket: Checkpoint) -> None:
        for file in {id(file): file for file in ticket.files}.values():
            file.fdatasync()
        self._sync_dirs(ticket.directories)
        ticket.slot.pwrite(ticket.data, 0)
        ticket.slot.fdatasync()
        for segment in ticket.doomed:
            segment.remove()
        for entry in ticket.removed:
            finish_removal(self._disk, self._node_dir, entry)
        ticket.synced = True

    def end_checkpoint(self, ticket: Checkpoint) -> None:
        """The checkpoint is durable: the other journal file is free."""
        self._check()
        invariant(ticket is self._checkpoint and ticket.synced, "a checkpoint ends after its sync")
        self._checkpoint = None
        self._checkpoint_done(ticket)

    def _checkpoint_done(self, ticket: Checkpoint) -> None:
        self._sequence = ticket.sequence
        self._checkpoint_ms = self._clock_ms()
        for found in self._groups.values():
            if found.cut_round <= ticket.round:
                found.cut_round = 0
        for group, taken in ticket.taken.items():
            if group in self._groups:
                self._groups[group].log.checkpointed(taken)

    def _measure_space(self) -> int:
        return self._disk.free_bytes(f"{self._node_dir}/{PARTITIONS_DIR}")

    def _look_at_space(self, now_ms: int) -> None:
        if now_ms - self._free_bytes_ms >= self._limits.checkpoint_interval_ms:
            with self._guard("look at the free space"):
                self._free_bytes = self._measure_space()
                if self._reserve.update(self._free_bytes):
                    self._free_bytes = self._measure_space()
            self._free_bytes_ms = now_ms


def _parts(frames: Sequence[bytes], bytes_max: int) -> Iterator[slice]:
    """Parts of the frames that fit the journal; nearly always one part."""
    start = size = 0
    for place, frame in enumerate(frames):
        if size and size + len(frame) > bytes_max:
            yield slice(start, place)
            start, size = place, 0
        size += len(frame)
    if start < len(frames):
        yield slice(start, len(frames))


def _note_end(
    current: Round, group: GroupId, taken: Sequence[LogOp], left: Sequence[LogOp]
) -> None:
    """Which index this round makes durable for a group; what is cut already does not count."""
    for op in taken:
        match op:
            case FramesOp():
                current.ends[group] = op.last
            case TruncateOp():
                current.ends[group] = LogIndex(op.from_index - 1)
            case ResetOp():
                current.ends[group] = op.begin.index
    for op in left:
        if isinstance(op, TruncateOp) and group in current.ends:
            current.ends[group] = min(current.ends[group], LogIndex(op.from_index - 1))
        elif isinstance(op, ResetOp):
            current.ends.pop(group, None)


def _add(builder: RoundBuilder, group: GroupId, op: LogOp) -> None:
    match op:
        case FramesOp():
            builder.add_frames(group, op.metas[0].at, op.frames)
        case TruncateOp():
            builder.add_truncate(group, op.from_index)
        case ResetOp():
            builder.add_reset(group, op.begin)
