"""The cluster's state as tables for people; scripts take `--json`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def node_table(nodes: list[dict[str, Any]]) -> None:
    """Print the nodes of a `status`."""
    table = Table("node", "endpoint", "alive", "shards", box=None, pad_edge=False)
    for node in nodes:
        alive = "yes" if node["alive"] else "[red]no[/red]"
        table.add_row(node["name"], node["endpoint"], alive, _shards(node["shards"]))
    Console().print(table)


def _shards(shards: Any) -> str:
    return str(len(shards)) if isinstance(shards, list) else str(shards)


def problems(nodes: list[dict[str, Any]]) -> None:
    """Print what the shards say is wrong with their disks and replicas, each sentence once."""
    said = {
        (node["name"], one["why"]): None
        for node in nodes
        for shard in (node["shards"] if isinstance(node["shards"], list) else ())
        for one in shard.get("damaged", ())
    }
    for name, why in said:
        Console(soft_wrap=True).print(f"{name}: {why}", style="red", markup=False, highlight=False)


def topic_table(topics: list[dict[str, Any]]) -> None:
    """Print the partitions of a `status`."""
    columns = ("topic", "partition", "leader", "replicas", "in sync", "log start", "high watermark")
    table = Table(*columns, box=None, pad_edge=False)
    for topic in topics:
        for partition in topic["partitions"]:
            behind = set(partition["replicas"]) - set(partition["in_sync"])
            in_sync = f"{len(partition['in_sync'])} of {len(partition['replicas'])}"
            table.add_row(
                topic["name"],
                str(partition["partition"]),
                partition["leader"] or "[red]none[/red]",
                ", ".join(partition["replicas"]),
                f"[yellow]{in_sync}[/yellow]" if behind else in_sync,
                _number(partition["log_start"]),
                _number(partition["high_watermark"]),
            )
    Console().print(table)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
