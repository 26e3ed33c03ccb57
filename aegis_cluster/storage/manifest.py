"""Names of the node's directory, and the manifest: one checked file per group started here.

The idea: `manifest/<group>` says which groups this node has started and where their logs lie, so
"listed but missing on disk" is known as damage and never mistaken for a group that is new. The
rule it protects: nothing is deleted by inference (A14). A group goes only after its manifest says,
durably, that it is being removed; a directory that no manifest names is moved to `quarantine/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import CorruptLog
from aegis_cluster.ids import GroupId, Member, NodeId
from aegis_cluster.storage.checked_file import read_checked, shape_of, write_all_checked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aegis_cluster.storage.disk import Disk

MANIFEST_VERSION: Final = 1
MANIFEST_KIND: Final = "manifest"
MANIFEST_DIR: Final = "manifest"
PARTITIONS_DIR: Final = "partitions"
REMOVED_DIR: Final = "removed"
QUARANTINE_DIR: Final = "quarantine"
SHARDS_DIR: Final = "shards"
NODE_DIRS: Final = (MANIFEST_DIR, PARTITIONS_DIR, REMOVED_DIR, QUARANTINE_DIR)


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One group that was started on this node."""

    group: GroupId
    topic: str
    partition: int
    voters: tuple[Member, ...]
    """As the group was created; later changes are frames in its log."""
    removing: bool = False

    @property
    def directory_name(self) -> str:
        """Of the group's log below `partitions/`."""
        return f"{self.topic}-{self.partition}-g{self.group}"


def manifest_path(node_dir: str, group: GroupId) -> str:
    """The group's manifest file."""
    return f"{node_dir}/{MANIFEST_DIR}/{group:020}"


def partition_dir(node_dir: str, entry: ManifestEntry) -> str:
    """The directory of the group's log."""
    return f"{node_dir}/{PARTITIONS_DIR}/{entry.directory_name}"


def write_manifest(disk: Disk, node_dir: str, entry: ManifestEntry) -> None:
    """Durable when it returns."""
    write_manifests(disk, node_dir, (entry,))


def write_manifests(disk: Disk, node_dir: str, entries: Iterable[ManifestEntry]) -> None:
    """All of them durable when it returns."""
    bodies = {
        manifest_path(node_dir, one.group): [
            one.group,
            one.topic,
            one.partition,
            list(one.voters),
            one.removing,
        ]
        for one in entries
    }
    write_all_checked(disk, bodies, kind=MANIFEST_KIND, version=MANIFEST_VERSION)


def read_manifest(disk: Disk, path: str) -> ManifestEntry:
    """CorruptLog on damage."""
    version, body = read_checked(disk, path, kind=MANIFEST_KIND)
    if version != MANIFEST_VERSION:
        raise CorruptLog(f"{path}: unknown manifest version {version}", path=path)
    with shape_of(path):
        group, topic, partition, voters, removing = body
        members = tuple(Member(NodeId(node), incarnation) for node, incarnation in voters)
        return ManifestEntry(GroupId(group), topic, partition, members, removing)


def list_manifest(disk: Disk, node_dir: str) -> tuple[list[ManifestEntry], dict[GroupId, str]]:
    """All groups, and those whose manifest cannot be read, with the reason."""
    entries: list[ManifestEntry] = []
    bad: dict[GroupId, str] = {}
    directory = f"{node_dir}/{MANIFEST_DIR}"
    for name in disk.list_dir(directory):
        if not name.isdecimal():
            continue  # a file that was being written aside
        try:
            entries.append(read_manifest(disk, f"{directory}/{name}"))
        except CorruptLog as error:
            bad[GroupId(int(name))] = str(error)
    return entries, bad


def entry_from_directory(name: str) -> ManifestEntry | None:
    """What the name of a log's directory tells, for a manifest that cannot be read."""
    head, mark, group = name.rpartition("-g")
    topic, dash, partition = head.rpartition("-")
    if not (mark and dash and topic and group.isdecimal() and partition.isdecimal()):
        return None
    return ManifestEntry(GroupId(int(group)), topic, int(partition), ())
