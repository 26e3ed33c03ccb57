"""How a node's directory is divided among its shards, and how that division changes.

The idea: segments lie under the node and belong to no shard; only journals and checkpoints do. To
change the number of shards, every old shard is recovered, which leaves its journal empty; then a
whole new `shards` directory is written aside and takes the old one's place. At every moment one of
the two is complete, so a crash at any step is repaired by doing it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import CorruptLog, invariant
from aegis_cluster.storage.checked_file import read_checked, write_checked
from aegis_cluster.storage.checkpoint import SLOT_NAMES, CheckpointState, encode_checkpoint, slot_of
from aegis_cluster.storage.disk import remove_tree
from aegis_cluster.storage.manifest import NODE_DIRS, SHARDS_DIR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.storage.checkpoint import GroupState
    from aegis_cluster.storage.disk import Disk

LAYOUT_VERSION: Final = 1
LAYOUT_KIND: Final = "layout"
_NEXT: Final = "shards.next"
_OLD: Final = "shards.old"


def shard_dir(node_dir: str, shard: int) -> str:
    """Where a shard's journal and checkpoints lie."""
    return f"{node_dir}/{SHARDS_DIR}/{shard}"


def read_layout(disk: Disk, node_dir: str) -> int | None:
    """Shards that the directory is laid out for; None before the first."""
    path = f"{node_dir}/{SHARDS_DIR}/layout"
    if not disk.exists(path):
        return None
    version, shards = read_checked(disk, path, kind=LAYOUT_KIND)
    if version != LAYOUT_VERSION or not isinstance(shards, int) or shards < 1:
        raise CorruptLog(f"{path}: unknown layout", version=version, shards=shards)
    return shards


def make_node_dirs(disk: Disk, node_dir: str) -> None:
    """The directories that every shard uses, durable."""
    for name in NODE_DIRS:
        if not disk.exists(f"{node_dir}/{name}"):
            disk.make_dir(f"{node_dir}/{name}")
    disk.sync_dir(node_dir)


def finish_change(disk: Disk, node_dir: str) -> None:
    """Bring an interrupted change of layout to one of its two ends."""
    current, following, old = (f"{node_dir}/{name}" for name in (SHARDS_DIR, _NEXT, _OLD))
    if disk.exists(current):
        leftovers = [path for path in (following, old) if disk.exists(path)]
        for path in leftovers:
            remove_tree(disk, path)
    elif disk.exists(following):  # it was complete before the old one made way
        disk.rename(following, current)
        disk.sync_dir(node_dir)
        finish_change(disk, node_dir)
    elif disk.exists(old):
        disk.rename(old, current)
        disk.sync_dir(node_dir)


def write_layout(disk: Disk, node_dir: str, shards: int, groups: Sequence[GroupState]) -> None:
    """Divide the groups anew, in one step that a crash cannot halve."""
    invariant(shards >= 1, "a node has a shard", shards=shards)
    following = f"{node_dir}/{_NEXT}"
    if disk.exists(following):
        remove_tree(disk, following)
    disk.make_dir(following)
    for shard in range(shards):
        mine = tuple(state for state in groups if state.group % shards == shard)
        _write_shard(disk, f"{following}/{shard}", CheckpointState(1, shard, shards, 0, 0, mine))
    write_checked(
        disk, f"{following}/layout", kind=LAYOUT_KIND, version=LAYOUT_VERSION, body=shards
    )
    disk.sync_dir(following)
    _swap(disk, node_dir)


def _write_shard(disk: Disk, directory: str, state: CheckpointState) -> None:
    disk.make_dir(directory)
    file = disk.open(f"{directory}/{SLOT_NAMES[slot_of(state.sequence)]}", create=True)
    file.pwrite(encode_checkpoint(state), 0)
    file.fdatasync()
    disk.sync_dir(directory)


def _swap(disk: Disk, node_dir: str) -> None:
    current = f"{node_dir}/{SHARDS_DIR}"
    disk.sync_dir(node_dir)
    if disk.exists(current):
        disk.rename(current, f"{node_dir}/{_OLD}")
        disk.sync_dir(node_dir)
    disk.rename(f"{node_dir}/{_NEXT}", current)
    disk.sync_dir(node_dir)
    finish_change(disk, node_dir)
