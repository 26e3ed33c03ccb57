"""`aegis node format` and `aegis node run`: one node, for service managers and containers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from aegis_cluster.cli.app import CommandFailed
from aegis_cluster.cli.connection import shard_status, step_down, timeout_option
from aegis_cluster.config import load_node_config
from aegis_cluster.ids import ShardId
from aegis_cluster.node.formatting import format_files
from aegis_cluster.node.log import LOG_NAME

if TYPE_CHECKING:
    from aegis_cluster.node.identity import Identity

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


@node.command("health")
@click.option("--config", "config_file", type=CONFIG_TYPE, required=True, help="The node's file.")
@timeout_option("5s")
def health(config_file: Path, timeout_ms: int) -> None:
    """Ask every shard of a node of this machine whether it serves; exit code 1 when one does not.

    For whoever may read the node's data directory; it needs no client key.

    \b
    Example:
      aegis node health --config nodes/node-1.toml
    """
    from aegis_cluster.node.node_security import operator_links

    config = load_node_config(config_file.absolute())
    links = operator_links(config)
    for shard in range(config.shards):
        endpoint = config.control_endpoint(ShardId(shard))
        shard_status(endpoint, timeout_ms / 1000, links)
    click.echo(f"{config.name} serves with {config.shards} shards")


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
    for config, identity in format_files(config_files, join):
        click.echo(f"{config.name}: {_described(identity)}")


def _described(identity: Identity) -> str:
    role = "founder" if identity.founders else "joins"
    return f"cluster {identity.cluster_id}, incarnation {identity.incarnation} ({role})"
