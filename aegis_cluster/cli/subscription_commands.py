"""`aegis subscription list | describe | parked | replay | reset | delete`."""

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
from aegis_cluster.cli.consume import as_json as message_as_json
from aegis_cluster.cli.consume import start_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster import (
        ParkedMessage,
        StreamingEngine,
        SubscriptionDescription,
        TopicPartition,
    )


@click.group()
def subscription() -> None:
    """List, describe, reset and delete persistent subscriptions, and replay what is parked."""


@subscription.command("list")
@click.option("--topic", help="Of this topic only.")
@bootstrap_option
@timeout_option()
@json_option
def list_command(topic: str | None, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """List persistent subscriptions.

    \b
    Examples:
      aegis subscription list
      aegis subscription list --topic orders --json
    """

    async def work(engine: StreamingEngine) -> list[dict[str, Any]]:
        return [asdict(one) for one in await engine.list_subscriptions(topic)]

    found = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(found))
        return
    names = ("topic", "name", "consumers", "unsettled", "parked")
    table = Table(*names, box=None, pad_edge=False)
    for one in found:
        table.add_row(*(str(one[name]) for name in names))
    Console().print(table)


@subscription.command()
@click.argument("topic")
@click.argument("name")
@bootstrap_option
@timeout_option()
@json_option
def describe(topic: str, name: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Show the rules of the subscription NAME of TOPIC, who consumes, and how far it is.

    \b
    Example:
      aegis subscription describe orders billing
    """

    async def work(engine: StreamingEngine) -> SubscriptionDescription:
        return await engine.persistent_subscription(topic, name).describe()

    found: SubscriptionDescription = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps(_as_json(found)))
        return
    config = found.config
    tries = config.max_deliveries or "any number of"
    order = "in the order of each key" if config.ordered else "in no order"
    then = f"written to {config.dead_letter}" if config.dead_letter else "parked"
    click.echo(
        f"{found.name} of {found.topic}: {config.strategy}, {order}; {tries} tries of"
        f" {config.ack_timeout} each, then {then}; coordinator {found.coordinator}"
    )
    click.echo(
        f"unsettled {found.unsettled} (held {found.held}, delayed {found.delayed}, to bury"
        f" {found.to_bury}), parked {found.parked}"
    )
    _show_consumers(found)
    table = Table("partition", "position", "lag", box=None, pad_edge=False)
    for place, position in found.positions.items():
        table.add_row(str(place.partition), str(position), str(found.lag.get(place, "-")))
    Console().print(table)


@subscription.command()
@click.argument("topic")
@click.argument("name")
@click.option("--count", type=click.IntRange(min=1), help="The first so many.")
@bootstrap_option
@timeout_option()
@json_option
def parked(
    topic: str,
    name: str,
    count: int | None,
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Show what the subscription NAME of TOPIC has parked, and why.

    \b
    Example:
      aegis subscription parked orders billing --count 20
    """

    async def work(engine: StreamingEngine) -> list[ParkedMessage]:
        return await engine.persistent_subscription(topic, name).parked(count)

    found: list[ParkedMessage] = _with_engine(bootstrap, timeout_ms, work)
    if as_json:
        click.echo(json.dumps([_parked_as_json(one) for one in found]))
        return
    table = Table(
        "partition", "offset", "deliveries", "reason", "message", box=None, pad_edge=False
    )
    for one in found:
        shown = "no longer kept" if one.message is None else message_as_json(one.message)
        row = (one.partition, one.offset, one.delivery_count)
        table.add_row(*map(str, row), one.reason, shown)
    Console().print(table)


@subscription.command()
@click.argument("topic")
@click.argument("name")
@click.option(
    "--message",
    "places",
    multiple=True,
    metavar="PARTITION/OFFSET",
    help="This one only; may be repeated. Without it: all.",
)
@bootstrap_option
@timeout_option()
@json_option
def replay(
    topic: str,
    name: str,
    places: tuple[str, ...],
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Have parked messages of the subscription NAME of TOPIC handed out again.

    \b
    Examples:
      aegis subscription replay orders billing
      aegis subscription replay orders billing --message 0/1234
    """
    wanted = {_place_of(one) for one in places}

    async def work(engine: StreamingEngine) -> int:
        one = engine.persistent_subscription(topic, name)
        if not wanted:
            return await one.replay_parked()
        found = [p for p in await one.parked() if (p.partition, p.offset) in wanted]
        missing = wanted - {(p.partition, p.offset) for p in found}
        if missing:
            partition, offset = min(missing)
            raise click.ClickException(f"{partition}/{offset} is not parked; nothing was replayed.")
        return await one.replay_parked(found)

    count = _with_engine(bootstrap, timeout_ms, work)
    click.echo(json.dumps({"replayed": count}) if as_json else f"replayed {count}")


@subscription.command()
@click.argument("topic")
@click.argument("name")
@click.option(
    "--to",
    "place",
    required=True,
    metavar="PLACE",
    help="earliest, latest, an offset, or a time (UTC unless it says otherwise).",
)
@bootstrap_option
@timeout_option()
@json_option
def reset(
    topic: str, name: str, place: str, bootstrap: str | None, timeout_ms: int, as_json: bool
) -> None:
    """Have the subscription NAME of TOPIC begin anew elsewhere; it must have no consumers.

    Delivery counts begin anew, and what is parked is forgotten.

    \b
    Examples:
      aegis subscription reset orders billing --to earliest
      aegis subscription reset orders billing --to 2026-01-31T12:00:00Z
    """
    to = start_of(place, "--to").as_offset

    async def work(engine: StreamingEngine) -> dict[TopicPartition, int]:
        return await engine.persistent_subscription(topic, name).reset(to)

    positions = sorted(_with_engine(bootstrap, timeout_ms, work).items())
    if as_json:
        click.echo(json.dumps([{**one._asdict(), "offset": offset} for one, offset in positions]))
        return
    for one, offset in positions:
        click.echo(f"{one}\t{offset}")


@subscription.command()
@click.argument("topic")
@click.argument("name")
@bootstrap_option
@timeout_option()
@json_option
def delete(topic: str, name: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Forget the subscription NAME of TOPIC, its progress and what it has parked.

    \b
    Example:
      aegis subscription delete orders billing
    """

    async def work(engine: StreamingEngine) -> None:
        await engine.persistent_subscription(topic, name).delete()

    _with_engine(bootstrap, timeout_ms, work)
    click.echo(json.dumps({"deleted": name}) if as_json else f"deleted {name}")


def _with_engine(
    bootstrap: str | None, timeout_ms: int, work: Callable[[StreamingEngine], Awaitable[Any]]
) -> Any:
    async def run() -> Any:
        async with connect(bootstrap, timeout_ms / 1000) as engine:
            return await work(engine)

    return run_async(run())


def _place_of(text: str) -> tuple[int, int]:
    partition, _, offset = text.partition("/")
    if partition.isdecimal() and offset.isdecimal():
        return int(partition), int(offset)
    raise click.BadParameter(f"{text!r} is no PARTITION/OFFSET such as 0/1234.")


def _show_consumers(found: SubscriptionDescription) -> None:
    if not found.consumers:
        return
    table = Table("consumer", "client", "holds", "reads ahead", box=None, pad_edge=False)
    for one in found.consumers:
        scouts = ", ".join(map(str, one.scouts)) or "-"
        table.add_row(one.name[:8], one.client, str(one.holds), scouts)
    Console().print(table)


def _as_json(found: SubscriptionDescription) -> dict[str, Any]:
    config = found.config
    return {
        "topic": found.topic,
        "name": found.name,
        "ack_timeout": config.ack_timeout,
        "max_deliveries": config.max_deliveries,
        "dead_letter": config.dead_letter,
        "strategy": str(config.strategy),
        "ordered": config.ordered,
        "coordinator": found.coordinator,
        "partitions": [
            {"partition": place.partition, "position": at, "lag": found.lag.get(place)}
            for place, at in found.positions.items()
        ],
        "unsettled": found.unsettled,
        "held": found.held,
        "delayed": found.delayed,
        "to_bury": found.to_bury,
        "parked": found.parked,
        "consumers": [asdict(one) for one in found.consumers],
    }


def _parked_as_json(one: ParkedMessage) -> dict[str, Any]:
    return {
        "partition": one.partition,
        "offset": one.offset,
        "delivery_count": one.delivery_count,
        "reason": one.reason,
        "parked_at": one.parked_at.isoformat(),
        "message": None if one.message is None else json.loads(message_as_json(one.message)),
    }
