"""`aegis consume`: the messages of a topic, one a line, on standard output.

The idea: the engine's subscriber does the reading; this decides where to start, when to end and
how a message looks. What was in the topic at the start is read to its end exactly: by comparing
positions with the offsets of that moment, not by waiting until nothing comes.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from aegis_cluster.cli.connection import bootstrap_option, connect, run_async, timeout_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster import Offset, ReceivedMessage, StreamingEngine, Subscriber

POLL_RECORDS: Final = 500
POLL_SECONDS: Final = 0.5


class Start(NamedTuple):
    """Where to start; `not_before` passes over what is older, in each partition."""

    offset: Offset
    not_before: datetime | None = None

    @property
    def as_offset(self) -> Offset:
        """As a place in each partition."""
        from aegis_cluster import Offset

        return self.offset if self.not_before is None else Offset.at_time(self.not_before)


def start_of(text: str, option: str = "--from") -> Start:
    """What `--from`, or another option, says."""
    from aegis_cluster import Offset

    if text in ("earliest", "latest"):
        return Start(Offset.EARLIEST if text == "earliest" else Offset.LATEST)
    if text.isdecimal():
        return Start(Offset.at(int(text)))
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f'"{text}" is no place to start; allowed: earliest, latest, an offset such as 42, '
            "or a time such as 2026-01-31T12:00:00Z",
            param_hint=option,
        ) from None
    return Start(Offset.EARLIEST, time if time.tzinfo else time.replace(tzinfo=UTC))


class Older:
    """Passes over what is older than a moment, in each partition up to the first that is not."""

    def __init__(self, not_before: datetime | None) -> None:
        self._not_before = not_before
        self._reached: set[int] = set()

    def skips(self, message: ReceivedMessage) -> bool:
        """Whether this message lies before the start."""
        if self._not_before is None or message.partition in self._reached:
            return False
        assert message.timestamp is not None
        if message.timestamp < self._not_before:
            return True
        self._reached.add(message.partition)
        return False


@dataclass(frozen=True, slots=True)
class Wish:
    """When to end: after so many messages, at the end as it is now, or never."""

    count: int | None
    to_end: bool


@click.command()
@click.argument("topic")
@click.option(
    "--from",
    "start",
    metavar="PLACE",
    default="latest",
    show_default=True,
    help="earliest, latest, an offset, or a time (UTC unless it says otherwise).",
)
@click.option(
    "--group",
    metavar="GROUP",
    help="As a member of this group, from its positions on; --from counts where it has none.",
)
@click.option("--count", type=click.IntRange(min=1), help="End after so many messages.")
@click.option("--to-end", is_flag=True, help="End when what is there at the start has been read.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="text: partition, offset, key, payload; json: an object a line, with all fields.",
)
@bootstrap_option
@timeout_option()
def consume(
    topic: str,
    start: str,
    group: str | None,
    count: int | None,
    to_end: bool,
    kind: str,
    bootstrap: str | None,
    timeout_ms: int,
) -> None:
    """Print the messages of TOPIC until Ctrl-C, --count or --to-end.

    \b
    Examples:
      aegis consume flights --from earliest --to-end --format json
      aegis consume orders --from 2026-01-31T12:00:00Z --count 10
      aegis consume orders --group billing --from earliest --to-end
    """
    render = as_json if kind == "json" else as_text
    place, wish = start_of(start), Wish(count, to_end)
    engine = connect(bootstrap, timeout_ms / 1000)
    run_async(_consume(engine, topic, place, wish, render, group))


async def _consume(
    engine: StreamingEngine,
    topic: str,
    start: Start,
    wish: Wish,
    render: Callable[[ReceivedMessage], str],
    group: str | None,
) -> None:
    """Read, print, and, as a member of a group, acknowledge what was printed."""
    from aegis_cluster import SubscribeConfig

    config = SubscribeConfig(start=start.offset, group_id=group)
    async with engine, engine.subscribe(topic, config) as subscriber:
        ends = await _ends(engine, topic) if wish.to_end else None
        older = Older(start.not_before)
        left = wish.count
        others: dict[int, int] = {}
        while (left is None or left > 0) and not _reached(subscriber, others, ends):
            polled = await subscriber.poll(POLL_RECORDS, POLL_SECONDS)
            wanted = [message for message in polled if not older.skips(message)]
            wanted = [message for message in wanted if _within(message, ends)][:left]
            for message in wanted:
                sys.stdout.write(render(message) + "\n")
            sys.stdout.flush()
            left = None if left is None else left - len(wanted)
            if group is not None:
                await _acknowledge(polled, wanted)
                others = await _positions(engine, group, topic) if not polled else others


async def _acknowledge(polled: list[ReceivedMessage], printed: list[ReceivedMessage]) -> None:
    """What was printed is handled, and what was passed over before it."""
    last = {message.partition: message.offset for message in printed}
    for message in polled:
        if message.offset <= last.get(message.partition, -1):
            await message.ack()


async def _positions(engine: StreamingEngine, group: str, topic: str) -> dict[int, int]:
    """How far the whole group is, by partition; nowhere, where nothing was committed yet."""
    from aegis_cluster.errors import GroupNotFound

    try:
        found = await engine.group(group).positions()
    except GroupNotFound:
        return {}
    return {place.partition: offset for place, offset in found.items() if place.topic == topic}


async def _ends(engine: StreamingEngine, topic: str) -> dict[int, int]:
    offsets = await engine.offsets(topic)
    return {partition: found.last_stable_offset for partition, found in offsets.items()}


def _reached(subscriber: Subscriber, others: dict[int, int], ends: dict[int, int] | None) -> bool:
    """Whether this reader, or another member of its group, has come to the end everywhere."""
    if ends is None:
        return False
    positions = subscriber.positions
    return all(
        max(positions.get(partition, 0), others.get(partition, 0)) >= end
        for partition, end in ends.items()
    )


def _within(message: ReceivedMessage, ends: dict[int, int] | None) -> bool:
    """Not beyond the end as it was at the start."""
    return ends is None or message.offset < ends.get(message.partition, message.offset)


def as_text(message: ReceivedMessage) -> str:
    """Partition and offset, key, payload; texts as they are, everything else as JSON."""
    key = "-" if message.key is None else _text(message.key)
    return f"{message.partition}/{message.offset}\t{key}\t{_text(message.payload)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_jsonable(value), ensure_ascii=False)


def as_json(message: ReceivedMessage) -> str:
    """All fields of a message; bytes as {"base64": …}."""
    assert message.timestamp is not None
    time = message.timestamp.astimezone(UTC).isoformat(timespec="milliseconds")
    fields = {
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "key": _jsonable(message.key),
        "payload": _jsonable(message.payload),
        "headers": {name: _jsonable(content) for name, content in message.headers.items()},
        "timestamp": time.replace("+00:00", "Z"),
    }
    return json.dumps(fields, ensure_ascii=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return value
