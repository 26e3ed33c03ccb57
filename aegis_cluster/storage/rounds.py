"""The tickets of a shard's store: rounds of group commit, and checkpoints.

The idea: a ticket captures every handle that its sync needs, so the sync may run in a helper
thread while the loop goes on writing. A round covers all rounds before it whose sync has not begun:
one fdatasync then serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.ids import GroupId, LogIndex
    from aegis_cluster.storage.disk import File
    from aegis_cluster.storage.log import DirtyFiles
    from aegis_cluster.storage.manifest import ManifestEntry
    from aegis_cluster.storage.segment import Segment
    from aegis_cluster.storage.types import Snapshot


@dataclass(slots=True, eq=False)
class Round:
    """What one `begin_round` wrote and one `sync` makes durable."""

    number: int
    journal_round: int = 0
    """Number in the journal; 0 if this round skipped it."""
    files: dict[int, File] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    ends: dict[GroupId, LogIndex] = field(default_factory=dict)
    """Last index that becomes durable, per group; lowered when a later truncation cuts it."""
    hard_states: set[GroupId] = field(default_factory=set)
    """Groups whose term and vote become durable."""
    direct: set[GroupId] = field(default_factory=set)
    """Groups whose segments are synced instead of the journal."""
    covers: tuple[Round, ...] = ()
    """Earlier rounds that the same sync makes durable."""
    started: bool = False
    """Set by the thread that syncs, before its first fdatasync: what is written from then on is
    not sure to be covered."""
    synced: bool = False

    def cover(self, earlier: Sequence[Round]) -> None:
        """Take over the files of rounds whose sync has not begun."""
        if not earlier:
            return
        self.covers = tuple(one for one in earlier if not one.started)
        for one in self.covers:
            self.files.update(one.files)
            self.directories |= one.directories

    def finished(self) -> set[int]:
        """Numbers of the rounds that this one's sync proves durable."""
        return {self.number, *(one.number for one in self.covers)} if self.synced else set()


@dataclass(slots=True, eq=False)
class Checkpoint:
    """What one `begin_checkpoint` captured."""

    sequence: int
    round: int
    """Last journal round whose effects it holds."""
    data: bytes
    """Of the slot."""
    slot: File
    files: list[File]
    directories: set[str]
    taken: dict[GroupId, DirtyFiles]
    """The same files by group: a direct round that begins before this is durable needs them too."""
    doomed: list[Segment]
    """To be unlinked once the slot is durable."""
    removed: list[ManifestEntry]
    """Removed groups whose files are to be deleted."""
    synced: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotTicket:
    """A snapshot to be written aside, in a helper thread, and then put in its place."""

    group: GroupId
    directory: str
    aside: str
    """Name of the file that it is written to first."""
    snapshot: Snapshot
    """Still without slices."""
    installs: int
    """How often the group's log was replaced before; one of an older log is worth nothing."""
