"""`aegis cluster up | down | status | kill | restart`: the cluster of this directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aegis_cluster import limits
from aegis_cluster.cli.connection import (
    bootstrap_option,
    cluster_address,
    cluster_status,
    json_option,
    timeout_option,
)
from aegis_cluster.node.local import LocalCluster
from aegis_cluster.node.node_files import Wanted, bootstrap_of

if TYPE_CHECKING:
    from aegis_cluster.node.node_files import LocalNode


@click.group()
def cluster() -> None:
    """Start, stop and look at the cluster of this directory: ./nodes and ./data."""


def _local() -> LocalCluster:
    return LocalCluster(
        Path.cwd(), probe=cluster_status, tell=lambda text: click.echo(text, err=True)
    )


@cluster.command()
@click.option(
    "--nodes",
    type=click.IntRange(1, limits.NODES_LOCAL_MAX),
    help="How many.  [default: what is in ./nodes, or 3]",
)
@click.option(
    "--shards",
    type=click.IntRange(1, limits.SHARDS_PER_NODE_MAX),
    help="Processes of each node.  [default: what the files say, or 1]",
)
@click.option(
    "--base-port",
    type=int,
    help="Node n listens from this + 100 n on.  [default: what the files say, or 7000]",
)
@click.option("--secure", is_flag=True, help="Make keys for nodes and a client, and use them.")
@timeout_option("60s")
@json_option
def up(
    nodes: int | None,
    shards: int | None,
    base_port: int | None,
    secure: bool,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Start the nodes of ./nodes (written when missing); return when all of them serve.

    Called again, it starts what is dead. With --secure every link is encrypted: keys are made in
    ./nodes/keys, and ./aegis.toml tells commands and programs of this directory to use them.

    \b
    Examples:
      aegis cluster up --nodes 3
      aegis cluster up --nodes 3 --base-port 8000     (a second cluster, in another directory)
      aegis cluster up --secure
    """
    wanted = Wanted(nodes, shards, base_port, secure)
    running = _local().up(wanted, seconds=timeout_ms / 1000)
    if as_json:
        click.echo(json.dumps({"bootstrap": bootstrap_of(running), "nodes": _listed(running)}))
    else:
        count = "1 node serves" if len(running) == 1 else f"{len(running)} nodes serve"
        click.echo(f"{count}: {bootstrap_of(running)}")


def _listed(nodes: list[LocalNode]) -> list[dict[str, Any]]:
    return [
        {"name": node.name, "endpoint": node.config.endpoint, "data": str(node.config.data)}
        for node in nodes
    ]


@cluster.command()
@json_option
def down(as_json: bool) -> None:
    """Stop all nodes: leaders hand over, shards end; what does not end by itself is killed.

    \b
    Example:
      aegis cluster down
    """
    stopped = _local().down()
    names = [node.name for node in stopped]
    click.echo(json.dumps({"stopped": names}) if as_json else _stopped(len(names)))


def _stopped(count: int) -> str:
    return "1 node stopped" if count == 1 else f"{count} nodes stopped"


@cluster.command()
@click.argument("node")
@json_option
def kill(node: str, as_json: bool) -> None:
    """SIGKILL to NODE's supervisor and shards in one instant, as if it had crashed.

    \b
    Example:
      aegis cluster kill node-2
    """
    _local().kill(node)
    click.echo(json.dumps({"killed": node}) if as_json else f"{node} is killed")


@cluster.command()
@click.argument("node")
@timeout_option("60s")
@json_option
def restart(node: str, timeout_ms: int, as_json: bool) -> None:
    """Stop NODE in order if it runs, start it, and return when it serves.

    \b
    Example:
      aegis cluster restart node-2
    """
    _local().restart(node, seconds=timeout_ms / 1000)
    click.echo(json.dumps({"serves": node}) if as_json else f"{node} serves")


@cluster.command()
@bootstrap_option
@timeout_option("5s")
@json_option
def status(bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Show nodes and their load, leases, topics, leaders and replicas.

    \b
    Example:
      aegis cluster status --json
    """
    view = cluster_status(cluster_address(bootstrap), timeout_ms / 1000)
    if as_json:
        click.echo(json.dumps(view))
        return
    from aegis_cluster.cli.tables import leases, node_table, problems, topic_table

    node_table(view["nodes"])
    problems(view["nodes"])
    leases(view.get("view", {}))
    if view["topics"]:
        click.echo()
        topic_table(view["topics"])
