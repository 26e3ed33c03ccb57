"""The folded state of one group, in a file beside its segments.

The idea: the file also holds the state of the *log* at its index (term, chain, next offset), so a
log can restart just after a snapshot: that is how a replica that lies too far behind is brought up
(Raft §7). A short body says what the snapshot is, and any number of *slices* follow, each a block
with a version and a checksum of its own, so that a large state is made, sent and checked in pieces.
What body and slices mean is the fold's own business. The file is a row of checked blocks (see
`checked_file`): one of kind `snapshot`, then as many of kind `slice` as the first one says. In
version 1 there were no slices.

The rule it protects: the file is written aside, whole and synced, before it takes its name, so a
reader finds the old or the new snapshot and never half of one (C7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import CorruptLog
from aegis_cluster.storage.checked_file import decode_block, encode_checked, shape_of
from aegis_cluster.storage.types import LogPoint, Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.disk import Disk

SNAPSHOT_VERSION: Final = 2
SLICE_VERSION: Final = 1
SNAPSHOT_KIND: Final = "snapshot"
SLICE_KIND: Final = "slice"
SNAPSHOT_NAME: Final = "snapshot"
ASIDE: Final = "snapshot.next"
"""Where one of the own state is written first."""
INCOMING: Final = "snapshot.incoming"
"""The same for one that came from elsewhere."""


def encode_slice(group: GroupId, number: int, data: bytes) -> bytes:
    """One piece as it stands in the file, and as it travels; numbers count from 0."""
    return encode_checked(kind=SLICE_KIND, version=SLICE_VERSION, body=[group, number, data])


def decode_slice(block: bytes, group: GroupId, number: int, *, path: str = "") -> bytes:
    """The piece; CorruptLog where it is damaged, another one, or of another group."""
    version, body, end = decode_block(block, 0, kind=SLICE_KIND, path=path)
    if version != SLICE_VERSION or end != len(block) or not isinstance(body, list):
        raise CorruptLog(f"{path}: a slice of version {version}", want=SLICE_VERSION)
    if len(body) != 3 or body[:2] != [group, number] or not isinstance(body[2], bytes):
        raise CorruptLog(f"{path}: not slice {number} of group {group}", have=body[:2])
    return body[2]


def snapshot_path(directory: str) -> str:
    """Where a group's snapshot is found."""
    return f"{directory}/{SNAPSHOT_NAME}"


def write_aside(
    disk: Disk, directory: str, group: GroupId, snapshot: Snapshot, name: str = ASIDE
) -> None:
    """Write it beside its place, durable when this returns; `put_in_place` does the rest."""
    body = [group, list(snapshot.point), snapshot.installed, snapshot.body, len(snapshot.slices)]
    head = encode_checked(kind=SNAPSHOT_KIND, version=SNAPSHOT_VERSION, body=body)
    file = disk.open(f"{directory}/{name}", create=True)
    file.truncate(0)
    position = 0
    for block in (head, *snapshot.slices):
        file.pwrite(block, position)
        position += len(block)
    file.fdatasync()
    file.close()


def put_in_place(disk: Disk, directory: str, name: str = ASIDE) -> None:
    """Give it its name; durable once the directory is synced."""
    disk.rename(f"{directory}/{name}", snapshot_path(directory))


def write_snapshot(disk: Disk, directory: str, group: GroupId, snapshot: Snapshot) -> None:
    """Durable when it returns."""
    write_aside(disk, directory, group, snapshot)
    put_in_place(disk, directory)
    disk.sync_dir(directory)


def read_snapshot(disk: Disk, directory: str, group: GroupId) -> Snapshot | None:
    """None where there is none; CorruptLog on damage."""
    path = snapshot_path(directory)
    if not disk.exists(path):
        return None
    file = disk.open(path)
    data = file.pread(file.size(), 0)
    file.close()
    version, body, position = decode_block(data, 0, kind=SNAPSHOT_KIND, path=path)
    with shape_of(path):
        if version == 1:
            body = [*body, 0]
        owner, point, installed, folded, count = body
        if version > SNAPSHOT_VERSION or owner != group:
            raise CorruptLog(f"{path}: version {version} of group {owner}", want=group)
        slices = _read_slices(data, position, group, count, path)
        return Snapshot(LogPoint._make(point), folded, installed, slices)


def _read_slices(
    data: bytes, position: int, group: GroupId, count: int, path: str
) -> tuple[bytes, ...]:
    """The blocks, each proved; they are handed on as they are."""
    blocks: list[bytes] = []
    for number in range(count):
        _, _, end = decode_block(data, position, kind=SLICE_KIND, path=path)
        block = data[position:end]
        decode_slice(block, group, number, path=path)
        blocks.append(block)
        position = end
    if position != len(data):
        raise CorruptLog(f"{path}: something follows the last slice", path=path)
    return tuple(blocks)


def slices_of(group: GroupId, parts: Sequence[bytes]) -> tuple[bytes, ...]:
    """Pieces as numbered blocks."""
    return tuple(encode_slice(group, number, part) for number, part in enumerate(parts))


def decode_slices(group: GroupId, blocks: Sequence[bytes]) -> list[Any]:
    """What the blocks hold, in order."""
    return [decode_slice(block, group, number) for number, block in enumerate(blocks)]
