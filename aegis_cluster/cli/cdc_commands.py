"""`aegis cdc`: connectors as processes of their own, what they do, and what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from aegis_cluster.cli.connection import (
    bootstrap_option,
    connect,
    json_option,
    run_async,
    timeout_option,
)
from aegis_cluster.errors import RequestTimeout, SourceError, TopicNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster import StreamingEngine
    from aegis_cluster.cdc import CDCEngine
    from aegis_cluster.cdc.configuration import ConnectorConfig

LOOK_S: Final = 0.2
FEED_KIND: Final = "cdc"


@click.group()
def cdc() -> None:
    """Capture the changes of databases into feeds."""


@cdc.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@bootstrap_option
@timeout_option()
def run(config: Path, bootstrap: str | None, timeout_ms: int) -> None:
    """Capture the database that CONFIG names into its feed, until it is told to stop.

    Start it on several machines: one of them works, the others take over when it dies.

    \b
    CONFIG is a TOML file:
      [cdc]
      source = "sqlite:shop.db"       # or "postgresql://user@host/shop"
      name = "shop"                   # of the feed; default: the database's name
      tables = ["users", "orders"]    # default: all

    \b
    Example:
      aegis cdc run shop.toml
    """
    from aegis_cluster.cdc.configuration import load_connector

    run_async(_run(load_connector(config), bootstrap, timeout_ms / 1000))


async def _run(config: ConnectorConfig, bootstrap: str | None, timeout: float) -> None:
    from aegis_cluster.cdc import CDCEngine

    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with (
        connect(bootstrap, timeout) as engine,
        CDCEngine(engine, config.source, topic=config.topic, tables=config.tables) as capture,
    ):
        telling = asyncio.create_task(_tell(capture))
        ending = [asyncio.create_task(capture.stopped()), asyncio.create_task(stopping.wait())]
        try:
            done, _ = await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for other in (telling, *ending):
                other.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(telling, *ending, return_exceptions=True)
        click.echo(f"feed {capture.feed}: stopped")


async def _tell(capture: CDCEngine) -> None:
    """A line whenever something changes that a person wants to know; a bar for a snapshot."""
    told = None
    with _bar() as show:
        while True:
            state = capture.state
            if state is not None and (state.role, state.error) != told:
                told = (state.role, state.error)
                reason = f": {state.error}" if state.error else ""
                click.echo(f"feed {capture.feed}: {state.role}{reason}")
            progress = capture.progress()
            show(None if progress is None else progress._asdict())
            await asyncio.sleep(LOOK_S)


@cdc.command()
@click.argument("feed", required=False)
@json_option
@bootstrap_option
@timeout_option()
def status(feed: str | None, as_json: bool, bootstrap: str | None, timeout_ms: int) -> None:
    """What every connector does, or that of FEED.

    \b
    Example:
      aegis cdc status
      aegis cdc status shop --json
    """
    found = run_async(_status(feed, bootstrap, timeout_ms / 1000))
    if as_json:
        click.echo(json.dumps(found))
        return
    for one in found:
        click.echo(_described(one))
    if not found:
        click.echo("There is no change feed; 'aegis cdc run CONFIG' makes one.", err=True)


async def _status(feed: str | None, bootstrap: str | None, timeout: float) -> list[dict[str, Any]]:
    from aegis_cluster.cdc.control import statuses

    async with connect(bootstrap, timeout) as engine:
        feeds = await _feeds(engine)
        if feed is not None and feed not in feeds:
            raise _no_feed(feed, feeds)
        known = await statuses(engine)
        found = []
        for name in feeds if feed is None else [feed]:
            offsets = await engine.offsets(name)
            records = sum(one.high_watermark - one.log_start for one in offsets.values())
            told = known.get(name) or {"role": "unknown"}
            found.append({**told, "feed": name, "partitions": len(offsets), "records": records})
        return found


async def _feeds(engine: StreamingEngine) -> list[str]:
    names = await engine.list_topics()
    topics = engine.cluster.metadata.topics
    return [name for name in names if name in topics and topics[name].settings.kind == FEED_KIND]


def _no_feed(feed: str, feeds: list[str]) -> TopicNotFound:
    there = f"there are: {', '.join(feeds)}" if feeds else "there is none"
    return TopicNotFound(f"There is no change feed {feed!r}; {there}.", topic=feed)


def _described(one: dict[str, Any]) -> str:
    """A line for a person."""
    from aegis_cluster.cdc.control import SILENT_S

    parts = [f"{one['records']:,} records in {one['partitions']} partitions"]
    role = one["role"]
    if role == "unknown":
        return f"{one['feed']}: nobody has captured it lately; {parts[0]}"
    if one["silent_s"] > SILENT_S and role != "stopped":
        parts.append(f"nothing heard for {one['silent_s']:.0f} s")
    elif role == "running":
        parts.append("current" if one["is_current"] else "behind")
        if "lag_bytes" in one:
            parts.append(f"lag {one['lag_bytes']:,} bytes, {one['lag_seconds']:.1f} s")
        snapshot = one["snapshot"]
        if snapshot is not None:
            of = "" if snapshot["estimate"] is None else f" of about {snapshot['estimate']:,}"
            parts.append(f"reading {snapshot['table']}: {snapshot['rows']:,}{of} rows")
    if one["error"]:
        parts.append(one["error"])
    return f"{one['feed']}: {role} ({one['holder']}); {'; '.join(parts)}"


def _feed_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--feed", help="Which feed, where there are several.")(command)


@cdc.command()
@click.argument("table")
@_feed_option
@click.option("--wait/--no-wait", default=True, help="Show how far it is until it is done.")
@bootstrap_option
@timeout_option()
def snapshot(
    table: str, feed: str | None, wait: bool, bootstrap: str | None, timeout_ms: int
) -> None:
    """Have all rows of TABLE read again, while changes go on.

    They come between the changes, as rows of a snapshot. The connector that runs does it; where
    none runs, the next one.

    \b
    Example:
      aegis cdc snapshot users --feed shop
    """
    run_async(_snapshot(table, feed, wait, bootstrap, timeout_ms / 1000))


async def _snapshot(
    table: str, feed: str | None, wait: bool, bootstrap: str | None, timeout: float
) -> None:
    from aegis_cluster.cdc.control import SNAPSHOT, command

    async with connect(bootstrap, timeout) as engine:
        feed = await _one_feed(engine, feed)
        name = await command(engine, feed, SNAPSHOT, table)
        if not wait:
            click.echo(f"feed {feed}: a snapshot of {table} was asked for")
            return
        with _bar() as show:
            await _until_read(engine, feed, table, name, timeout, show)
    click.echo(f"feed {feed}: the rows of {table} were read")


async def _until_read(
    engine: StreamingEngine,
    feed: str,
    table: str,
    name: str,
    timeout: float,
    show: Callable[[dict[str, Any] | None], None],
) -> None:
    """Raises `SourceError` as the connector does, and `RequestTimeout` where none runs."""
    from aegis_cluster.cdc.control import statuses

    until = time.monotonic() + timeout
    while True:
        told = (await statuses(engine)).get(feed, {})
        outcome = told.get("commands", {}).get(name)
        if outcome is None and time.monotonic() > until:
            raise RequestTimeout(
                f"No connector of {feed} has begun with it in {timeout:g} s. The wish stays: the"
                " next connector that runs will do it ('aegis cdc run CONFIG')."
            )
        if outcome not in (None, "begun"):
            raise SourceError(outcome)
        progress = told.get("snapshot")
        if outcome == "begun":
            mine = progress is not None and progress["table"].split(".")[-1] == table.split(".")[-1]
            show(progress)
            if not mine and not (progress and progress["waiting"]) and told.get("is_current"):
                return
        await asyncio.sleep(LOOK_S)


@cdc.command()
@_feed_option
@bootstrap_option
@timeout_option()
def stop(feed: str | None, bootstrap: str | None, timeout_ms: int) -> None:
    """Stop all connectors of a feed, those that wait included, wherever they run.

    \b
    Example:
      aegis cdc stop --feed shop
    """
    run_async(_stop(feed, bootstrap, timeout_ms / 1000))


async def _stop(feed: str | None, bootstrap: str | None, timeout: float) -> None:
    from aegis_cluster.cdc.control import SILENT_S, STOP, command, statuses

    async with connect(bootstrap, timeout) as engine:
        feed = await _one_feed(engine, feed)
        before = (await statuses(engine)).get(feed)
        await command(engine, feed, STOP)
        until = time.monotonic() + timeout
        while before is not None and before["role"] != "stopped":
            if before["silent_s"] > SILENT_S:
                break  # nobody is there
            if time.monotonic() > until:
                raise RequestTimeout(
                    f"The connector of {feed} ({before['holder']}) was told to stop and still runs."
                )
            await asyncio.sleep(LOOK_S)
            before = (await statuses(engine)).get(feed)
    click.echo(f"feed {feed}: its connectors are stopped")


async def _one_feed(engine: StreamingEngine, feed: str | None) -> str:
    feeds = await _feeds(engine)
    if feed is None and len(feeds) == 1:
        return feeds[0]
    if feed is None and feeds:
        raise click.UsageError(f"There are several feeds; choose one: --feed {' | '.join(feeds)}")
    if feed is None or feed not in feeds:
        raise _no_feed(feed or "", feeds)
    return feed


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[dict[str, Any] | None], None]]:
    """Shows how far a snapshot is, where somebody looks."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", visible=False, total=None)

        def show(found: dict[str, Any] | None) -> None:
            if found is None:
                progress.update(task, visible=False)
                return
            progress.update(
                task,
                description=found["table"],
                completed=found["rows"],
                total=found["estimate"],
                visible=True,
            )

        yield show
