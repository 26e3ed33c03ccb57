"""Bring a shard's files to one state after a restart: the steps, in their order.

The idea: checkpoint, journal and damage marker are read first and judged by pure functions
(`replay`); then each group's log is brought there (`recovery`); everything is synced; and a new
checkpoint closes the past, so a crash anywhere before it only means doing all this again.

The rule it protects: the journal is synced before it is believed, for after `kill -9` it may be
readable from the page cache alone, and a change to a segment must not outlive the round that
ordered it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aegis_cluster.errors import CorruptLog
from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex, Term
from aegis_cluster.storage.checkpoint import CheckpointSlots, CheckpointState, GroupState
from aegis_cluster.storage.disk import remove_tree
from aegis_cluster.storage.journal import JOURNAL_NAMES, FoundRound, Journal, scan_journal
from aegis_cluster.storage.layout import shard_dir
from aegis_cluster.storage.log import PartitionLog
from aegis_cluster.storage.log_recovery import LogFiles, LogRecovery, salvage_frames
from aegis_cluster.storage.manifest import (
    MANIFEST_DIR,
    PARTITIONS_DIR,
    QUARANTINE_DIR,
    REMOVED_DIR,
    ManifestEntry,
    entry_from_directory,
    list_manifest,
    manifest_path,
    partition_dir,
)
from aegis_cluster.storage.marker import Marker, marker_path, read_marker
from aegis_cluster.storage.replay import GroupReplay, JournalFindings, choose_rounds, replay
from aegis_cluster.storage.snapshot import SNAPSHOT_NAME, read_snapshot
from aegis_cluster.storage.types import LOG_BEGIN, Damage, HardState, LogPoint, Snapshot

if TYPE_CHECKING:
    from aegis_cluster.storage.disk import Disk, File
    from aegis_cluster.storage.handles import HandleCache
    from aegis_cluster.storage.tail_cache import TailCache
    from aegis_cluster.storage.types import StoreLimits


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """One group after recovery."""

    entry: ManifestEntry
    log: PartitionLog
    hard_state: HardState
    snapshot: Snapshot | None
    state: GroupState
    """As it goes into the next checkpoint."""


@dataclass(frozen=True, slots=True)
class FoundShard:
    """What a store goes on from, once the checkpoint that follows is durable."""

    groups: tuple[FoundGroup, ...]
    slots: CheckpointSlots
    sequence: int
    """Of the last checkpoint found."""
    generation: int
    round: int
    """The highest generation and round number that are used up."""


class ShardRecovery:
    """One pass over a shard's files."""

    def __init__(
        self,
        *,
        disk: Disk,
        node_dir: str,
        shard: int,
        shards: int,
        limits: StoreLimits,
        handles: HandleCache,
        cache: TailCache,
    ) -> None:
        self._disk = disk
        self._node_dir = node_dir
        self._shard = shard
        self._shards = shards
        self._directory = shard_dir(node_dir, shard)
        self._limits = limits
        self._handles = handles
        self._cache = cache
        self._shard_damage: tuple[str, int, str] | None = None
        """File, position and reason, if the shard's own files are damaged."""
        self._index_files: list[File] = []

    def run(self) -> FoundShard:
        """Everything but the checkpoint that follows."""
        self._sync_names()
        entries, unreadable = self._entries()
        slots = CheckpointSlots(self._disk, self._directory)
        checkpoint = self._checkpoint(slots, bool(entries))
        marker = read_marker(self._disk, self._directory)
        findings = choose_rounds(
            self._read_journals(checkpoint), checkpoint, marker.synced_round if marker else None
        )
        if findings.damage is not None:
            where = findings.damage
            reason = f"journal round {where.round} was durable and cannot be read"
            file = where.file or f"{self._directory}/{JOURNAL_NAMES[0]}"
            self._shard_damage = self._shard_damage or (file, where.position, reason)
        journals = replay(findings, checkpoint)
        states = {state.group: state for state in checkpoint.groups}
        groups = [
            self._group(
                entry,
                states.get(entry.group),
                journals.get(entry.group, GroupReplay()),
                marker,
                unreadable.get(entry.group),
            )
            for entry in entries
        ]
        self._sync(groups)
        self._set_aside_journals()
        return _found(groups, slots, checkpoint, findings)

    # The node's directory

    def _sync_names(self) -> None:
        """After `kill -9` a name may be seen and not be durable; what is built on it would go."""
        for name in (MANIFEST_DIR, PARTITIONS_DIR, REMOVED_DIR, QUARANTINE_DIR):
            self._disk.sync_dir(f"{self._node_dir}/{name}")
        self._disk.sync_dir(self._directory)

    def _mine(self, group: GroupId) -> bool:
        return group % self._shards == self._shard

    def _entries(self) -> tuple[list[ManifestEntry], dict[GroupId, str]]:
        """Groups of this shard, and which of them have an unreadable manifest."""
        listed, bad = list_manifest(self._disk, self._node_dir)
        unreadable = {group: reason for group, reason in bad.items() if self._mine(group)}
        entries = [entry for entry in listed if self._mine(entry.group)]
        for entry in [entry for entry in entries if entry.removing]:
            finish_removal(self._disk, self._node_dir, entry)
            entries.remove(entry)
        known = {entry.group for entry in entries}
        for name in self._disk.list_dir(f"{self._node_dir}/{PARTITIONS_DIR}"):
            guessed = entry_from_directory(name)
            if guessed is None or not self._mine(guessed.group) or guessed.group in known:
                continue
            if guessed.group in unreadable:
                entries.append(guessed)
            else:
                quarantine(self._disk, self._node_dir, name)
        return sorted(entries, key=lambda entry: entry.group), unreadable

    # Checkpoint and journal

    def _checkpoint(self, slots: CheckpointSlots, has_groups: bool) -> CheckpointState:
        found, bad = slots.load()
        if found is not None:
            return found
        if has_groups:
            reason = "; ".join(["no checkpoint can be read", *bad])
            self._shard_damage = (f"{self._directory}/checkpoint", 0, reason)
        return CheckpointState(0, self._shard, self._shards, 0, 0, ())

    def _read_journals(self, checkpoint: CheckpointState) -> list[FoundRound]:
        found: list[FoundRound] = []
        for name in JOURNAL_NAMES:
            path = f"{self._directory}/{name}"
            if self._disk.exists(path):
                file = self._disk.open(path)
                file.fdatasync()
                data = file.pread(file.size(), 0)
                found += scan_journal(data, file=path, generation_min=checkpoint.generation)
            elif checkpoint.generation > 0:
                self._shard_damage = self._shard_damage or (path, 0, "the journal is missing")
        return found

    def _set_aside_journals(self) -> None:
        """Keep what a damaged shard's journals hold: it is about to write them anew."""
        if self._shard_damage is None:
            return
        for name in JOURNAL_NAMES:
            path = f"{self._directory}/{name}"
            if self._disk.exists(path):
                self._disk.rename(path, f"{self._directory}/damaged-{name}")
        self._disk.sync_dir(self._directory)

    # One group

    def _group(
        self,
        entry: ManifestEntry,
        state: GroupState | None,
        journal: GroupReplay,
        marker: Marker | None,
        unreadable: str | None,
    ) -> FoundGroup:
        directory = partition_dir(self._node_dir, entry)
        files = LogFiles(entry.group, self._disk, directory, self._limits, self._handles)
        snapshot, snapshot_reason = self._snapshot(entry.group, directory)
        ceiling = _settle_watermark(entry.group, state, journal, marker)
        if snapshot is not None and not snapshot.installed:
            # It was saved when all that it covers was durable here; the word for that may be newer
            # than the last watermark that was written down.
            journal.durable = max(journal.durable, snapshot.at)
        recovery = self._walk(files, state, journal, ceiling, snapshot)
        if unreadable is not None:
            self._damage(recovery, manifest_path(self._node_dir, entry.group), 0, unreadable)
        if snapshot_reason is not None and recovery.starts_late:
            self._damage(recovery, f"{directory}/{SNAPSHOT_NAME}", 0, snapshot_reason)
        if self._shard_damage is not None:
            self._damage(recovery, *self._shard_damage)
        log = self._apply(recovery, files, journal)
        if state is not None:
            log.commit_index = min(state.commit_index, log.last_index)
        if snapshot is not None and recovery.damage is None:
            log.commit_index = max(log.commit_index, snapshot.at)
        hard_state = _at_least(journal.hard_state, log.last_term)
        return FoundGroup(
            entry, log, hard_state, snapshot, _next_state(log, hard_state, state, journal)
        )

    def _snapshot(self, group: GroupId, directory: str) -> tuple[Snapshot | None, str | None]:
        try:
            return read_snapshot(self._disk, directory, group), None
        except CorruptLog as error:
            return None, str(error)

    def _walk(
        self,
        files: LogFiles,
        state: GroupState | None,
        journal: GroupReplay,
        ceiling: LogIndex | None,
        snapshot: Snapshot | None,
    ) -> LogRecovery:
        recovery = LogRecovery(files, state, journal, ceiling)
        recovery.run()
        if snapshot is None or not _log_restarts(snapshot, state, journal):
            return recovery
        journal.reset = snapshot.point
        journal.durable = snapshot.at
        journal.lowest_cut = journal.open_cut = None
        journal.frames.clear()
        recovery = LogRecovery(files, state, journal, snapshot.at)
        recovery.run()
        return recovery

    def _damage(self, recovery: LogRecovery, file: str, position: int, reason: str) -> None:
        if recovery.damage is None:
            index = LogIndex(recovery.point.index + 1)
            recovery.damage = Damage(recovery.group, index, file, position, reason)

    def _apply(self, recovery: LogRecovery, files: LogFiles, journal: GroupReplay) -> PartitionLog:
        log = PartitionLog(
            group=files.group,
            disk=files.disk,
            directory=files.directory,
            limits=files.limits,
            handles=files.handles,
            cache=self._cache,
        )
        if recovery.damage is not None:
            salvage_frames(files, journal)
        self._index_files += recovery.apply(log)
        return log

    def _sync(self, groups: list[FoundGroup]) -> None:
        for group in groups:
            if group.log.damage is None:
                sync_log(self._disk, group.log)
                group.log.durable_index = group.log.last_index
        for file in self._index_files:
            file.fdatasync()


def _found(
    groups: list[FoundGroup],
    slots: CheckpointSlots,
    checkpoint: CheckpointState,
    findings: JournalFindings,
) -> FoundShard:
    return FoundShard(
        tuple(groups), slots, checkpoint.sequence, findings.generation_max, findings.round_max
    )


def _log_restarts(snapshot: Snapshot, state: GroupState | None, journal: GroupReplay) -> bool:
    """Whether the log has to begin anew just after its snapshot.

    An installed snapshot is an order to do so, until checkpoint or journal say that it was done. A
    snapshot of our own never is: what it covers and cannot be read any more is damage.
    """
    if journal.reset is not None:
        first = LogIndex(journal.reset.index + 1)
    else:
        first = state.first_index if state is not None else LogIndex(1)
    return snapshot.installed and first <= snapshot.at


def _settle_watermark(
    group: GroupId, state: GroupState | None, journal: GroupReplay, marker: Marker | None
) -> LogIndex | None:
    """Settle what was durable last; after a failed disk it is also the most to be believed."""
    if state is not None and state.watermark > state.durable.index and journal.reset is None:
        journal.durable = max(journal.durable, state.watermark)
    if marker is None:
        return None
    journal.durable = marker.durable.get(group, journal.durable)
    return journal.durable


def _at_least(state: HardState, term: Term) -> HardState:
    """A log never ends in a term above its voter's: the vote of that term was never promised."""
    return state if state.term >= term else HardState(term, None)


def _next_state(
    log: PartitionLog, hard_state: HardState, state: GroupState | None, journal: GroupReplay
) -> GroupState:
    """How the group stands in the checkpoint that follows recovery."""
    if log.damage is None:
        return group_state(log, hard_state)
    old = state or GroupState(log.group, hard_state, LOG_BEGIN, LogIndex(1), NO_INDEX)
    watermark = max(journal.durable, log.damage.index)
    return replace(old, hard_state=hard_state, watermark=watermark, damage=log.damage)


def group_state(log: PartitionLog, hard_state: HardState) -> GroupState:
    """A healthy group as a checkpoint describes it: what stands in its segments."""
    durable: LogPoint = log.written
    last = log.segments[-1] if log.segments else None
    return GroupState(
        log.group,
        hard_state,
        durable,
        log.first_index,
        min(log.commit_index, durable.index),
        log.log_starts,
        durable.index,
        last.base_index if last else NO_INDEX,
        last.end if last else 0,
        memberships=log.memberships,
    )


def sync_log(disk: Disk, log: PartitionLog) -> None:
    """Sync everything of one log, here and now; its names too, whoever made them."""
    taken = log.take_everything()
    for file in (*taken.files.values(), *taken.indexes):
        file.fdatasync()
    disk.sync_dir(log.directory)
    log.checkpointed(taken)


def open_journal(
    disk: Disk, node_dir: str, shard: int, limits: StoreLimits, found: FoundShard
) -> Journal:
    """Open both files, made and preallocated where they are missing."""
    directory = shard_dir(node_dir, shard)
    files: list[File] = []
    for name in JOURNAL_NAMES:
        file = disk.open(f"{directory}/{name}", create=True)
        if file.size() < limits.journal_bytes:
            file.allocate(limits.journal_bytes)
            file.fdatasync()
        files.append(file)
    disk.sync_dir(directory)
    journal = Journal((files[0], files[1]), limits.journal_bytes)
    journal.generation = found.generation
    journal.last_round = found.round
    journal.start_generation(found.generation + 1)
    return journal


def remove_marker(disk: Disk, node_dir: str, shard: int) -> None:
    """The checkpoint that obeyed the marker is durable."""
    directory = shard_dir(node_dir, shard)
    if disk.exists(marker_path(directory)):
        disk.remove(marker_path(directory))
        disk.sync_dir(directory)


def quarantine(disk: Disk, node_dir: str, name: str) -> None:
    """Move a directory that no manifest names out of the way; nothing is ever deleted there."""
    count = len(disk.list_dir(f"{node_dir}/{QUARANTINE_DIR}"))
    disk.rename(
        f"{node_dir}/{PARTITIONS_DIR}/{name}", f"{node_dir}/{QUARANTINE_DIR}/{count:06}-{name}"
    )
    disk.sync_dir(f"{node_dir}/{QUARANTINE_DIR}")
    disk.sync_dir(f"{node_dir}/{PARTITIONS_DIR}")


def move_to_removed(disk: Disk, node_dir: str, entry: ManifestEntry) -> None:
    """Take the log's directory out of `partitions/`; its manifest says already that it goes."""
    source = partition_dir(node_dir, entry)
    if disk.exists(source):
        disk.rename(source, removed_dir(node_dir, entry))
        disk.sync_dir(f"{node_dir}/{PARTITIONS_DIR}")


def removed_dir(node_dir: str, entry: ManifestEntry) -> str:
    """Where a removed group's log waits for its deletion."""
    return f"{node_dir}/{REMOVED_DIR}/{entry.directory_name}"


def finish_removal(disk: Disk, node_dir: str, entry: ManifestEntry) -> None:
    """Delete a removed group's files, and at last its manifest."""
    move_to_removed(disk, node_dir, entry)
    target = removed_dir(node_dir, entry)
    if disk.exists(target):
        remove_tree(disk, target)
        disk.sync_dir(f"{node_dir}/{REMOVED_DIR}")
    path = manifest_path(node_dir, entry.group)
    if disk.exists(path):
        disk.remove(path)
        disk.sync_dir(path.rpartition("/")[0])
