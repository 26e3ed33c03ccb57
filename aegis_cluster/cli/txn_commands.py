"""`aegis txn list | describe | abort`."""

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

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster import StreamingEngine
    from aegis_cluster.transactional_ids import TransactionDescription, TransactionListing


@click.group()
def txn() -> None:
    """List, describe and abort transactions."""


@txn.command("list")
@click.option("--open", "only_open", is_flag=True, help="Only those that have not ended.")
@bootstrap_option
@timeout_option()
@json_option
def list_command(only_open: bool, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """List all transactional ids, and which of them have a transaction open.

    \b
    Examples:
      aegis txn list
      aegis txn list --open --json
    """

    async def work(engine: StreamingEngine) -> list[TransactionListing]:
        return await engine.list_transactions()

    found = _with_engine(bootstrap, timeout_ms, work)
    if only_open:
        found = [one for one in found if one.state != "idle"]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
        return
    table = Table(
        "transactional id", "state", "open for", "partitions", "client", box=None, pad_edge=False
    )
    for one in found:
        since = f"{one.open_seconds:.1f} s" if one.state != "idle" else ""
        table.add_row(one.transactional_id, one.state, since, str(one.partitions), one.client)
    Console().print(table)


@txn.command()
@click.argument("transactional_id")
@bootstrap_option
@timeout_option()
@json_option
def describe(transactional_id: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Show the state of TRANSACTIONAL_ID, its partitions, and how its last transactions ended.

    \b
    Example:
      aegis txn describe billing-1
    """

    async def work(engine: StreamingEngine) -> TransactionDescription:
        return await engine.describe_transaction(transactional_id)

    found = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(_as_json(found)))
    else:
        _show(found)


@txn.command()
@click.argument("transactional_id")
@bootstrap_option
@timeout_option()
@json_option
def abort(transactional_id: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Abort what TRANSACTIONAL_ID has open, so that readers go on without waiting for its time-out.

    Its producer, if it lives, is told at its next step and may begin another one.

    \b
    Example:
      aegis txn abort billing-1
    """

    async def work(engine: StreamingEngine) -> None:
        await engine.abort_transaction(transactional_id)

    _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps({"transactional_id": transactional_id, "aborted": True}))
    else:
        click.echo(f"The transaction of {transactional_id} is aborted.")


def _with_engine(
    bootstrap: str | None, timeout_ms: int, work: Callable[[StreamingEngine], Awaitable[Any]]
) -> Any:
    async def run() -> Any:
        async with connect(bootstrap, timeout_ms / 1000) as engine:
            return await work(engine)

    return run_async(run())


def _as_json(found: TransactionDescription) -> dict[str, Any]:
    values = asdict(found)
    for key in ("partitions", "waiting"):
        values[key] = [list(place) for place in getattr(found, key)]
    for one in values["outcomes"]:
        one["decided_at"] = one["decided_at"].isoformat()
    return values


def _show(found: TransactionDescription) -> None:
    click.echo(
        f"{found.transactional_id}: {found.state}, producer {found.producer_id}, epoch"
        f" {found.epoch}, of {found.client}, coordinator node {found.coordinator}"
    )
    if found.partitions:
        click.echo(
            f"open for {found.open_seconds:.1f} s of at most {found.timeout_seconds:g} s, with"
            f" {', '.join(map(str, found.partitions))}"
        )
    if found.waiting:
        click.echo(f"decided, and not known yet to {', '.join(map(str, found.waiting))}")
    table = Table("ended", "how", "why", box=None, pad_edge=False)
    for one in found.outcomes:
        how = "committed" if one.committed else "aborted"
        table.add_row(one.decided_at.isoformat(timespec="milliseconds"), how, one.reason)
    if found.outcomes:
        Console().print(table)
