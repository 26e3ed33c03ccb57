"""Bring a node's directory to the shards that are about to start.

The idea: how many shards a node runs may change from one start to the next, while journals and
checkpoints belong to shards. So the supervisor calls `prepare_node_dir` once, before any shard
starts; `shard_recovery` and `log_recovery` do the work for one shard and one log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.errors import StorageFailed
from aegis_cluster.storage.layout import finish_change, make_node_dirs, read_layout, write_layout
from aegis_cluster.storage.store import ShardStore

if TYPE_CHECKING:
    from aegis_cluster.storage.checkpoint import GroupState
    from aegis_cluster.storage.disk import Disk
    from aegis_cluster.storage.types import StoreLimits


def prepare_node_dir(
    disk: Disk, node_dir: str, shards: int, *, limits: StoreLimits | None = None
) -> None:
    """Lay a node's directory out for this many shards; the supervisor calls it before any starts.

    Cheap when nothing changed. After a change, every old shard is recovered first, so no journal
    holds anything when the groups are divided anew. A crash at any step means doing it again.
    Raises StorageFailed where the disk refuses.
    """
    try:
        _prepare(disk, node_dir, shards, limits)
    except OSError as error:
        raise StorageFailed(
            f"{node_dir} cannot be laid out for {shards} shards: {error}", errno=error.errno
        ) from error


def _prepare(disk: Disk, node_dir: str, shards: int, limits: StoreLimits | None) -> None:
    make_node_dirs(disk, node_dir)
    finish_change(disk, node_dir)
    old = read_layout(disk, node_dir)
    if old == shards:
        return
    states: list[GroupState] = []
    for shard in range(old or 0):
        store = ShardStore(disk, node_dir, shard, clock_ms=lambda: 0, limits=limits)
        store.recover()
        states += store.group_states()
        store.close()
    write_layout(disk, node_dir, shards, states)
