"""`aegis group list | describe | reset | delete`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from aegis_cluster.cli.connection import (
    bootstrap_option,
    connect,
    json_option,
    run_async,
    timeout_option,
)
from aegis_cluster.cli.consume import start_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster import GroupDescription, StreamingEngine, TopicPartition


@click.group()
def group() -> None:
    """List, describe, reset and delete consumer groups."""


@group.command("list")
@bootstrap_option
@timeout_option()
@json_option
def list_command(bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """List all consumer groups.

    \b
    Example:
      aegis group list --json
    """

    async def work(engine: StreamingEngine) -> list[dict[str, Any]]:
        return [asdict(one) for one in await engine.list_groups()]

    found = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("group", "state", "members", box=None, pad_edge=False)
    for one in found:
        table.add_row(one["name"], one["state"], str(one["members"]))
    Console().print(table)


@group.command()
@click.argument("name")
@bootstrap_option
@timeout_option()
@json_option
def describe(name: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Show who is in the group NAME, what each member reads, and how far the group is behind.

    \b
    Example:
      aegis group describe order-processor
    """

    async def work(engine: StreamingEngine) -> tuple[GroupDescription, dict[TopicPartition, int]]:
        one = engine.group(name)
        return await one.describe(), await one.lag()

    found, lag = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(_as_json(found, lag)))
        return
    click.echo(f"{found.name}: {found.state}, epoch {found.epoch}, coordinator {found.coordinator}")
    _show_members(found)
    _show_positions(found, lag)


@group.command()
@click.argument("name")
@click.option(
    "--to",
    "place",
    required=True,
    metavar="PLACE",
    help="earliest, latest, an offset, or a time (UTC unless it says otherwise).",
)
@click.option("--topic", "topics", multiple=True, help="Of these topics only; may be repeated.")
@bootstrap_option
@timeout_option()
@json_option
def reset(
    name: str,
    place: str,
    topics: tuple[str, ...],
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Move the positions of the group NAME, which must have no members.

    \b
    Examples:
      aegis group reset order-processor --to earliest
      aegis group reset order-processor --to 2026-01-31T12:00:00Z --topic orders
    """
    to = start_of(place, "--to").as_offset

    async def work(engine: StreamingEngine) -> dict[TopicPartition, int]:
        return await engine.group(name).reset(to, list(topics) or None)

    positions = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        rows = [{**one._asdict(), "offset": offset} for one, offset in sorted(positions.items())]
        click.echo(json.dumps(rows))
        return
    for one, offset in sorted(positions.items()):
        click.echo(f"{one}\t{offset}")


@group.command()
@click.argument("name")
@bootstrap_option
@timeout_option()
def delete(name: str, bootstrap: str | None, timeout_ms: int) -> None:
    """Forget the group NAME and its positions; it must have no members.

    \b
    Example:
      aegis group delete order-processor
    """

    async def work(engine: StreamingEngine) -> None:
        await engine.group(name).delete()

    _with_engine(bootstrap, timeout_ms, work)
    click.echo(f"deleted {name}")


def _with_engine(
    bootstrap: str | None, timeout_ms: int, work: Callable[[StreamingEngine], Awaitable[Any]]
) -> Any:
    async def run() -> Any:
        async with connect(bootstrap, timeout_ms / 1000) as engine:
            return await work(engine)

    return run_async(run())


def _as_json(found: GroupDescription, lag: dict[TopicPartition, int]) -> dict[str, Any]:
    members = []
    for member in found.members:
        fields = asdict(member)
        for key in ("assigned", "revoking", "target"):
            fields[key] = [one._asdict() for one in getattr(member, key)]
        members.append(fields)
    positions = [
        {**one._asdict(), "offset": offset, "lag": lag.get(one)}
        for one, offset in found.positions.items()
    ]
    return {
        "name": found.name,
        "state": found.state,
        "epoch": found.epoch,
        "coordinator": found.coordinator,
        "members": members,
        "positions": positions,
    }


def _show_members(found: GroupDescription) -> None:
    if not found.members:
        return
    table = Table("member", "client", "reads", "gives up", "heard", box=None, pad_edge=False)
    for member in found.members:
        table.add_row(
            member.member_id,
            member.client,
            ", ".join(map(str, member.assigned)) or "-",
            ", ".join(map(str, member.revoking)) or "-",
            "yes" if member.connected else "[red]no[/red]",
        )
    Console().print(table)


def _show_positions(found: GroupDescription, lag: dict[TopicPartition, int]) -> None:
    table = Table("topic", "partition", "position", "lag", box=None, pad_edge=False)
    for one, offset in found.positions.items():
        table.add_row(one.topic, str(one.partition), str(offset), str(lag.get(one, "-")))
    Console().print(table)
