"""`aegis node format`: identities for the nodes whose files are given, and for no others.

The rule it protects: a new cluster is founded by all of its nodes in one step of `format_nodes`;
a node whose peers are somewhere else can only join, and only by the id of a cluster that exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.config import NodeConfig, load_node_config
from aegis_cluster.errors import ConfigError
from aegis_cluster.node.identity import (
    PLAN_NAME,
    Identity,
    check_identity,
    format_joining,
    format_nodes,
    read_identity,
)
from aegis_cluster.storage.disk import RealDisk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def format_files(files: Sequence[Path], join: str | None) -> list[tuple[NodeConfig, Identity]]:
    """Format the nodes of these files; return each with its identity, by id.

    join: the id of the cluster to join; None founds a new one.
    """
    configs = [load_node_config(file.absolute()) for file in files]
    configs.sort(key=lambda config: config.node_id)
    if join is not None:
        return [(config, _joined(config, join)) for config in configs]
    _require_all_peers(configs)
    plan = files[0].absolute().parent / PLAN_NAME
    return list(zip(configs, format_nodes(RealDisk(), configs, str(plan)), strict=True))


def _joined(config: NodeConfig, cluster_id: str) -> Identity:
    disk = RealDisk()
    found = read_identity(disk, str(config.data))
    if found is None:
        return format_joining(disk, config, cluster_id)
    check_identity(config, found)
    if found.cluster_id != cluster_id:
        raise ConfigError(
            f"{config.data} belongs to cluster {found.cluster_id}; it cannot join {cluster_id}"
        )
    return found


def _require_all_peers(configs: Sequence[NodeConfig]) -> None:
    given = {config.address for config in configs}
    for config in configs:
        missing = sorted(set(config.peers) - given)
        if missing:
            raise ConfigError(
                f"{config.name} also names {', '.join(map(str, missing))}: give the files of all "
                "nodes of a new cluster together, or the id of the cluster to join with --join"
            )
