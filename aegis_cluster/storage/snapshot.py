"""The folded state of one group, in a checked file beside its segments.

The idea: the file also holds the state of the *log* at its index (term, chain, next offset), so a
log can restart just after a snapshot: that is how a replica that lies too far behind is brought up
(Raft §7). The body is the fold's own business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import CorruptLog
from aegis_cluster.storage.checked_file import read_checked, write_checked
from aegis_cluster.storage.types import LogPoint, Snapshot

if TYPE_CHECKING:
    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.disk import Disk

SNAPSHOT_VERSION: Final = 1
SNAPSHOT_KIND: Final = "snapshot"
SNAPSHOT_NAME: Final = "snapshot"


def write_snapshot(disk: Disk, directory: str, group: GroupId, snapshot: Snapshot) -> None:
    """Durable when it returns."""
    body = [group, list(snapshot.point), snapshot.installed, snapshot.body]
    path = f"{directory}/{SNAPSHOT_NAME}"
    write_checked(disk, path, kind=SNAPSHOT_KIND, version=SNAPSHOT_VERSION, body=body)


def read_snapshot(disk: Disk, directory: str, group: GroupId) -> Snapshot | None:
    """None where there is none; CorruptLog on damage."""
    path = f"{directory}/{SNAPSHOT_NAME}"
    if not disk.exists(path):
        return None
    version, body = read_checked(disk, path, kind=SNAPSHOT_KIND)
    owner, point, installed, folded = body
    if version != SNAPSHOT_VERSION or owner != group:
        raise CorruptLog(f"{path}: version {version} of group {owner}", want=group)
    return Snapshot(LogPoint._make(point), folded, installed)
