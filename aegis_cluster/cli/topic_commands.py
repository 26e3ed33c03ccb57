"""`aegis topic create | list | describe | alter | delete`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from aegis_cluster.cli.connection import (
    bootstrap_option,
    cluster_address,
    cluster_status,
    connect,
    json_option,
    run_async,
    timeout_option,
)
from aegis_cluster.cli.tables import topic_table
from aegis_cluster.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster import StreamingEngine

CLEANUP = click.Choice(["delete", "compact", "compact,delete"])


@click.group()
def topic() -> None:
    """Create, list, describe, alter and delete topics."""


@topic.command()
@click.argument("name")
@click.option("--partitions", type=click.IntRange(min=1), help="[default: 1]")
@click.option("--replication-factor", type=click.IntRange(min=1), help="[default: min(3, nodes)]")
@click.option("--retention", metavar="DURATION", help='How long messages are kept, as "7d".')
@click.option("--retention-bytes", metavar="SIZE", help='How much a partition keeps, as "10GB".')
@click.option("--cleanup", type=CLEANUP, help="What becomes of old messages.  [default: delete]")
@click.option(
    "--tombstone-retention", metavar="DURATION", help='How long a compacted null stays, as "1d".'
)
@click.option("--compression", type=click.Choice(["none", "lz4", "zstd"]), help="[default: none]")
@click.option("--max-message-size", metavar="SIZE", help='The largest message, as "1MB".')
@click.option("--if-not-exists", is_flag=True, help="A topic of that name is no failure.")
@bootstrap_option
@timeout_option()
@json_option
def create(
    name: str,
    if_not_exists: bool,
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Create the topic NAME.

    \b
    Example:
      aegis topic create flights --partitions 6 --replication-factor 3
      aegis topic create carriers --cleanup compact
    """
    from aegis_cluster import TopicConfig

    config = TopicConfig(**settings)

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(name, config, exist_ok=if_not_exists)

    _with_engine(bootstrap, timeout_ms, work)
    _told(name, "created" if not if_not_exists else "exists", as_json=as_json)


@topic.command("list")
@bootstrap_option
@timeout_option()
@json_option
def list_command(bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """List the names of all topics.

    \b
    Example:
      aegis topic list --json
    """

    async def work(engine: StreamingEngine) -> list[str]:
        return await engine.list_topics()

    names = _with_engine(bootstrap, timeout_ms, work)
    click.echo(json.dumps(names) if as_json else "\n".join(names), nl=bool(names) or as_json)


@topic.command()
@click.argument("name")
@bootstrap_option
@timeout_option()
@json_option
def describe(name: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Show the partitions of the topic NAME: leaders, replicas, offsets.

    \b
    Example:
      aegis topic describe flights
    """
    # A status may come from a node that has just started; only an answer that is up to date may say
    # that there is no such topic.
    _with_engine(bootstrap, timeout_ms, lambda engine: engine.describe_topic(name))
    view = cluster_status(cluster_address(bootstrap), timeout_ms / 1000)
    found = next((topic for topic in view["topics"] if topic["name"] == name), None)
    if found is None:
        raise NotReady(f"The nodes have not told yet where {name} is; try again in a moment.")
    if as_json:
        click.echo(json.dumps(found))
    else:
        topic_table([found])


@topic.command()
@click.argument("name")
@click.option("--partitions", type=click.IntRange(min=1), help="More of them; never fewer.")
@click.option("--replication-factor", type=click.IntRange(min=1), help="More or fewer replicas.")
@click.option("--retention", metavar="DURATION", help='As "7d", or "unlimited".')
@click.option(
    "--retention-bytes", metavar="SIZE", help='Of a partition, as "10GB", or "unlimited".'
)
@click.option("--cleanup", type=CLEANUP, help="What becomes of old messages.")
@click.option(
    "--tombstone-retention", metavar="DURATION", help='How long a compacted null stays, as "1d".'
)
@click.option("--compression", type=click.Choice(["none", "lz4", "zstd"]), help="Of its producers.")
@click.option("--max-message-size", metavar="SIZE", help='The largest message, as "1MB".')
@bootstrap_option
@timeout_option()
@json_option
def alter(
    name: str, bootstrap: str | None, timeout_ms: int, as_json: bool, **settings: Any
) -> None:
    """Change the topic NAME: what is named changes at once, the rest stays.

    With more partitions, keys move: a key's new messages may go to another partition than its older
    ones, and order holds within each only.

    \b
    Examples:
      aegis topic alter flights --retention 1d --max-message-size 2MB
      aegis topic alter flights --partitions 12
      aegis topic alter flights --replication-factor 3
    """
    from aegis_cluster import TopicConfig

    config = TopicConfig(**settings)
    if config == TopicConfig():
        raise click.UsageError("Nothing to alter was named; for example --retention 1d.")

    async def work(engine: StreamingEngine) -> None:
        await engine.alter_topic(name, config)

    _with_engine(bootstrap, timeout_ms, work)
    _told(name, "altered", as_json=as_json)


@topic.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@bootstrap_option
@timeout_option()
@json_option
def delete(name: str, yes: bool, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Delete the topic NAME and all of its messages; asks first when a person types it.

    \b
    Example:
      aegis topic delete flights --yes
    """
    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete {name} and all of its messages?", abort=True)

    async def work(engine: StreamingEngine) -> None:
        await engine.delete_topic(name)

    _with_engine(bootstrap, timeout_ms, work)
    _told(name, "deleted", as_json=as_json)


def _told(name: str, done: str, *, as_json: bool) -> None:
    """What became of a topic, for people or for scripts."""
    if as_json:
        click.echo(json.dumps({"topic": name, "done": done}))
    else:
        click.echo(f"{name} exists" if done == "exists" else f"{done} {name}")


def _with_engine(
    bootstrap: str | None, timeout_ms: int, work: Callable[[StreamingEngine], Awaitable[Any]]
) -> Any:
    async def connected() -> Any:
        async with connect(bootstrap, timeout_ms / 1000) as engine:
            return await work(engine)

    return run_async(connected())
