"""`aegis event append | load | project`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from aegis_cluster.cli.app import CommandFailed
from aegis_cluster.cli.connection import (
    bootstrap_option,
    connect,
    json_option,
    run_async,
    timeout_option,
)
from aegis_cluster.cli.loading import load_variable
from aegis_cluster.event import (
    TOPIC,
    Event,
    EventStore,
    ExpectedVersion,
    Projection,
    ProjectionRunner,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

WORDS: Final = {
    "any": ExpectedVersion.ANY,
    "no-stream": ExpectedVersion.NO_STREAM,
    "exists": ExpectedVersion.EXISTS,
}
FIELDS: Final = frozenset({"event_type", "type", "data", "metadata", "event_id"})

topic_option = click.option(
    "--topic", default=TOPIC, show_default=True, help="The topic that holds the streams."
)


class Expected(click.ParamType):  # type: ignore[type-arg]
    """A version number, or one of a few words."""

    name = "VERSION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        word = str(value).lower().replace("_", "-")
        if word in WORDS:
            return int(WORDS[word])
        if word.isdecimal():
            return int(word)
        self.fail(f"{value!r}: use a version number, or one of {', '.join(WORDS)}.", param, ctx)


@click.group()
def event() -> None:
    """Append events to streams, load them, and fold them into tables."""


@event.command()
@click.argument("stream")
@click.option("--type", "event_type", help="Type of the one event that --data is of.")
@click.option("--data", help="The event's data, as JSON.  [default: {}]")
@click.option("--metadata", help="The event's metadata, as a JSON object.")
@click.option("--id", "event_id", help="The event's id, a UUID; by it a repeat is known.")
@click.option(
    "--file",
    "file",
    type=click.File("r", encoding="utf-8"),
    help="Events as JSON Lines (event_type, data, metadata, event_id); - is standard input.",
)
@click.option(
    "--expected-version",
    "expected",
    type=Expected(),
    default="any",
    show_default=True,
    help="Version of the stream's last event, or any, no-stream, exists.",
)
@topic_option
@bootstrap_option
@timeout_option()
@json_option
def append(
    stream: str,
    event_type: str | None,
    data: str | None,
    metadata: str | None,
    event_id: str | None,
    file: Iterable[str] | None,
    expected: int,
    topic: str,
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Append one event, or those of a file, to STREAM: all of them or none.

    \b
    Example:
      aegis event append account-123 --type MoneyDeposited --data '{"amount": 100}'
    """
    if (event_type is None) == (file is None):
        raise click.UsageError("Give one event with --type, or a file of events with --file.")
    if file is not None:
        events = [_from_line(line, number) for number, line in enumerate(file, 1) if line.strip()]
    else:
        content = {} if data is None else _json("--data", data)
        meta = None if metadata is None else _json("--metadata", metadata)
        events = [Event(event_type or "", content, meta, event_id)]

    async def work(store: EventStore) -> dict[str, Any]:
        return asdict(await store.append(stream, events, expected_version=expected))

    done = _with_store(topic, bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(done))
    else:
        click.echo(
            f"Appended {len(events)} events to {stream}: versions {done['first_version']} to"
            f" {done['version']}."
        )


@event.command()
@click.argument("stream")
@click.option("--from", "from_version", type=click.IntRange(min=0), help="First version to load.")
@click.option("--backwards", is_flag=True, help="From the newest event on.")
@click.option("--limit", type=click.IntRange(min=0), help="So many events at most.")
@topic_option
@bootstrap_option
@timeout_option()
@json_option
def load(
    stream: str,
    from_version: int | None,
    backwards: bool,
    limit: int | None,
    topic: str,
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Load the events of STREAM, one a line; with --json, as one JSON array.

    \b
    Example:
      aegis event load account-123 --limit 10 --json
    """

    async def work(store: EventStore) -> list[Event]:
        return await store.load(stream, from_version=from_version, backwards=backwards, limit=limit)

    found = _with_store(topic, bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps([_as_json(one) for one in found], ensure_ascii=False))
        return
    for one in found:
        shown = json.dumps(_content(one.data), ensure_ascii=False)
        click.echo(f"{one.version}\t{one.event_type}\t{shown}")


@event.command()
@click.argument("target", metavar="MODULE:PROJECTION")
@click.option(
    "--file", "path", type=click.Path(dir_okay=False), required=True, help="The SQLite file."
)
@click.option("--rebuild", is_flag=True, help="Begin anew with empty tables.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C or SIGTERM.")
@topic_option
@bootstrap_option
@timeout_option()
@json_option
def project(
    target: str,
    path: str,
    rebuild: bool,
    follow: bool,
    topic: str,
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Fold events into tables of a SQLite file, by a projection or several side by side.

    PROJECTION is a variable of MODULE: a Projection, or a list of them. The current directory is
    searched first.

    \b
    Example, with `balances = Balances()` in views.py:
      aegis event project views:balances --file views.sqlite --rebuild
    """
    projections = _projections(target)

    async def work(store: EventStore) -> dict[str, int]:
        with _bars(quiet=as_json) as bar_of:
            runners = [ProjectionRunner(store, one, path) for one in projections]
            return await _project(runners, projections, bar_of, rebuild=rebuild, follow=follow)

    applied = _with_store(topic, bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(applied))
        return
    for name, count in applied.items():
        click.echo(f"{name}: {count} events applied.")


def _projections(target: str) -> list[Projection]:
    found = load_variable(target, example="views:balances")
    listed = list(found) if isinstance(found, list | tuple) else [found]
    made = [one() if isinstance(one, type) else one for one in listed]
    if not made or not all(isinstance(one, Projection) for one in made):
        raise click.BadParameter(f"{target} is no Projection, and no list of them")
    return made


async def _project(
    runners: list[ProjectionRunner],
    projections: list[Projection],
    bar_of: Callable[[str], Callable[[int, int], None]],
    *,
    rebuild: bool,
    follow: bool,
) -> dict[str, int]:
    """How many events each has applied."""
    async with contextlib.AsyncExitStack() as stack:
        for runner in runners:
            await stack.enter_async_context(runner)
        async with asyncio.TaskGroup() as group:
            for runner, one in zip(runners, projections, strict=True):
                begin = runner.rebuild if rebuild else runner.catch_up
                group.create_task(begin(bar_of(one.name)))
        if follow:
            running = [asyncio.create_task(runner.run()) for runner in runners]
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            stopping = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (*running, stopping):
                task.cancel()
            await asyncio.gather(*running, stopping, return_exceptions=True)
            for task in done - {stopping}:
                task.result()
        return {one.name: runner.applied for one, runner in zip(projections, runners, strict=True)}


@contextlib.contextmanager
def _bars(*, quiet: bool) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A bar for each projection, on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: lambda _done, _count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar_of(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name, total=None)
            return lambda done, count: progress.update(task, completed=done, total=count)

        yield bar_of


def _with_store(
    topic: str,
    bootstrap: str | None,
    timeout_ms: int,
    work: Callable[[EventStore], Awaitable[Any]],
) -> Any:
    async def under_engine() -> Any:
        async with connect(bootstrap, timeout_ms / 1000) as engine:
            return await work(EventStore(engine, topic))

    return run_async(under_engine())


def _from_line(line: str, number: int) -> Event:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CommandFailed(f"line {number} is no JSON: {error}") from error
    kind = found.get("event_type", found.get("type")) if isinstance(found, dict) else None
    if not isinstance(kind, str) or set(found) - FIELDS:
        raise CommandFailed(
            f"line {number} is no event: write an object with event_type, and perhaps data,"
            " metadata and event_id"
        )
    return Event(kind, found.get("data"), found.get("metadata"), found.get("event_id"))


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text[:80]!r} is no JSON: {error}", param_hint=option) from error


def _content(data: Any) -> Any:
    return {"base64": base64.b64encode(data).decode()} if isinstance(data, bytes) else data


def _as_json(one: Event) -> dict[str, Any]:
    return {
        "aggregate_id": one.aggregate_id,
        "version": one.version,
        "event_type": one.event_type,
        "data": _content(one.data),
        "metadata": one.metadata,
        "event_id": str(one.event_id),
        "timestamp": None if one.timestamp is None else one.timestamp.isoformat(),
        "partition": one.partition,
        "offset": one.offset,
    }
