"""The mark that a shard leaves when the disk refused a write or a sync.

The idea: after a failed fsync the page cache may show bytes that are not on disk and never will be
(C1), so what reads well after a restart proves nothing. The marker says what was durable at that
moment; recovery believes that and nothing above it. It is written where the disk still takes it;
when it does not, the ordinary rules of recovery hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptLog
from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.storage.checked_file import read_checked, shape_of, write_checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.storage.disk import Disk

MARKER_VERSION: Final = 1
MARKER_KIND: Final = "damage-marker"
MARKER_NAME: Final = "failed"


class Marker(NamedTuple):
    """What was durable when the disk failed."""

    synced_round: int
    """The last journal round known as durable."""
    durable: Mapping[GroupId, LogIndex]
    reason: str


def marker_path(directory: str) -> str:
    """Of a shard's directory."""
    return f"{directory}/{MARKER_NAME}"


def write_marker(disk: Disk, directory: str, marker: Marker) -> None:
    """Durable when it returns; the disk may well refuse."""
    durable = [[group, index] for group, index in sorted(marker.durable.items())]
    body = [marker.synced_round, durable, marker.reason]
    write_checked(disk, marker_path(directory), kind=MARKER_KIND, version=MARKER_VERSION, body=body)


def read_marker(disk: Disk, directory: str) -> Marker | None:
    """None where no disk failed; CorruptLog on damage."""
    path = marker_path(directory)
    if not disk.exists(path):
        return None
    version, body = read_checked(disk, path, kind=MARKER_KIND)
    if version != MARKER_VERSION:
        raise CorruptLog(f"{path}: unknown marker version {version}", path=path)
    with shape_of(path):
        synced_round, durable, reason = body
        indexes = {GroupId(group): LogIndex(index) for group, index in durable}
        return Marker(synced_round, indexes, reason)
