"""The cluster's state as tables for people; scripts take `--json`."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from aegis_cluster.wall_clock import clock_problem


def node_table(nodes: list[dict[str, Any]]) -> None:
    """Print the nodes of a `status`."""
    columns = ("node", "endpoint", "alive", "shards", "up for", "cpu", "memory", "disk free")
    table = Table(*columns, box=None, pad_edge=False)
    for node in nodes:
        alive = "yes" if node["alive"] else "[red]no[/red]"
        row = (node["name"], node["endpoint"], alive, _shards(node["shards"]))
        table.add_row(*row, *(_figures(node) if node["alive"] else ()))
    Console().print(table)


def _figures(node: dict[str, Any]) -> tuple[str, ...]:
    """What the cluster view knows of a node: since when, and what its shards use."""
    load = node.get("load", {})
    shards = node["shards"] if isinstance(node["shards"], list) else []
    shard_loads = [shard["load"] for shard in shards if shard.get("load")]
    return (
        _age(node.get("since_ms"), node.get("clock_ahead_ms") or 0),
        f"{sum(each['cpu_percent'] for each in shard_loads):.0f} %" if shard_loads else "-",
        _size(sum(each["memory_bytes"] for each in shard_loads)) if shard_loads else "-",
        _size(load.get("disk_free_bytes")),
    )


def _age(since_ms: int | None, clock_ahead_ms: int) -> str:
    if since_ms is None:
        return "-"
    seconds = max(0, int(time.time() - (since_ms - clock_ahead_ms) / 1000))
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    amount = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TB"


def leases(view: dict[str, Any]) -> None:
    """Print who holds which lease, or why that cannot be told."""
    console = Console(soft_wrap=True)
    if view.get("state") == "down":
        said = f"no load figures and no leases just now: {view['why']}"
        console.print(said, style="yellow", markup=False, highlight=False)
    if view.get("leases"):
        table = Table("lease", "holder", "token", "ends in", box=None, pad_edge=False)
        for lease in view["leases"]:
            ends_in = f"{lease['ends_in_s']:.0f} s"
            table.add_row(lease["name"], lease["holder"], str(lease["token"]), ends_in)
        console.print()
        console.print(table)


def _shards(shards: Any) -> str:
    return str(len(shards)) if isinstance(shards, list) else str(shards)


def problems(nodes: list[dict[str, Any]]) -> None:
    """Print what is wrong with nodes' clocks, disks and replicas, each sentence once."""
    clocks = {
        (node["name"], why): None
        for node in nodes
        if node["alive"] and (why := clock_problem(node.get("clock_ahead_ms"))) is not None
    }
    said = {
        (node["name"], one["why"]): None
        for node in nodes
        for shard in (node["shards"] if isinstance(node["shards"], list) else ())
        for one in shard.get("damaged", ())
    }
    for name, why in clocks | said:
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
