"""`aegis node format` and `aegis node run`: one node, for service managers and containers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from aegis_cluster.cli.app import CommandFailed
from aegis_cluster.cli.connection import step_down
from aegis_cluster.config import load_node_config
from aegis_cluster.errors import ConfigError
from aegis_cluster.node.identity import (
    PLAN_NAME,
    Identity,
    format_joining,
    format_nodes,
    read_identity,
)
from aegis_cluster.node.log import LOG_NAME
from aegis_cluster.storage.disk import RealDisk

if TYPE_CHECKING:
    from aegis_cluster.config import NodeConfig

CONFIG_TYPE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def node() -> None:
    """Format and run single nodes; `aegis cluster` does both for a whole directory."""


@node.command("run")
@click.option("--config", "config_file", type=CONFIG_TYPE, required=True, help="The node's file.")
def run(config_file: Path) -> None:
    """Run a node in the foreground until SIGTERM or Ctrl-C; a second one does not wait.

    \b
    Example:
      aegis node run --config nodes/node-1.toml
    """
    from aegis_cluster.node.run import run_node

    config_file = config_file.absolute()
    config = load_node_config(config_file)
    log = config.data / LOG_NAME
    click.echo(f"{config.name} starts; its log is {log}", err=True)
    if not run_node(config_file, step_down=step_down):
        raise CommandFailed(f"{config.name} cannot run as it is; {log} says why")


@node.command("format")
@click.option(
    "--config",
    "config_files",
    type=CONFIG_TYPE,
    multiple=True,
    required=True,
    help="A node's file; once for each node of a new cluster.",
)
@click.option(
    "--join",
    metavar="CLUSTER_ID",
    help="Format the nodes as new members of a cluster that exists, not as founders of one.",
)
def format_command(config_files: tuple[Path, ...], join: str | None) -> None:
    """Give the empty data directories of nodes their identity.

    A new cluster is founded by all of its nodes at once, so all of their files are named together.
    A directory that has an identity keeps it.

    \b
    Example:
      aegis node format --config nodes/node-1.toml --config nodes/node-2.toml \\
          --config nodes/node-3.toml
    """
    configs = [load_node_config(file.absolute()) for file in config_files]
    configs.sort(key=lambda config: config.node_id)
    if join is None:
        _require_all_peers(configs)
        plan = config_files[0].absolute().parent / PLAN_NAME
        identities = format_nodes(RealDisk(), configs, str(plan))
    else:
        disk = RealDisk()
        identities = [
            read_identity(disk, str(config.data)) or format_joining(disk, config, join)
            for config in configs
        ]
    for config, identity in zip(configs, identities, strict=True):
        click.echo(f"{config.name}: {_described(identity)}")


def _require_all_peers(configs: list[NodeConfig]) -> None:
    given = {config.address for config in configs}
    for config in configs:
        missing = sorted(set(config.peers) - given)
        if missing:
            raise ConfigError(
                f"{config.name} also names {', '.join(map(str, missing))}: give the files of all "
                "nodes of a new cluster together, or the id of the cluster to join with --join"
            )


def _described(identity: Identity) -> str:
    role = "founder" if identity.founders else "joins"
    return f"cluster {identity.cluster_id}, incarnation {identity.incarnation} ({role})"
