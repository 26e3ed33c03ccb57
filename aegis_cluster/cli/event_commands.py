"""`aegis event append | load`."""

from __future__ import annotations

import base64
import json
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
from aegis_cluster.event import TOPIC, Event, EventStore, ExpectedVersion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

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
    """Append events to streams, and load them."""


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
