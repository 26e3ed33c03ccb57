"""`aegis explain group | partition | subscription | txn NAME`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from aegis_cluster.cli.connection import (
    bootstrap_option,
    cluster_address,
    connect,
    duration,
    json_option,
    run_async,
    security,
    timeout_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from aegis_cluster import StreamingEngine
    from aegis_cluster.explain.findings import Explanation
    from aegis_cluster.explain.gather import Looker


@click.group()
def explain() -> None:
    """Say why something makes no progress, who holds what, and what to do.

    The exit code is 0 whatever is found; with --json, "blocked" says if something is in the way.
    """


watch_option = click.option(
    "--watch",
    "watch_ms",
    callback=duration,
    metavar="DURATION",
    default="2s",
    show_default=True,
    help="How long to watch whether it moves.",
)


@explain.command()
@click.argument("name")
@watch_option
@bootstrap_option
@timeout_option("10s")
@json_option
def group(name: str, watch_ms: int, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Why the consumer group NAME does not go on, or how it does.

    \b
    Example:
      aegis explain group order-processor
    """
    from aegis_cluster.explain import gather

    def work(engine: StreamingEngine, looker: Looker) -> Coroutine[Any, Any, Explanation]:
        return gather.group(engine, looker, name, watch_ms / 1000)

    _show(_with_engine(bootstrap, timeout_ms, work), as_json=as_json)


@explain.command()
@click.argument("name")
@bootstrap_option
@timeout_option("5s")
@json_option
def partition(name: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Why the partition NAME takes no writes; of a topic, all partitions.

    \b
    Examples:
      aegis explain partition orders/0
      aegis explain partition orders --json
    """
    from aegis_cluster.explain import gather

    _show(run_async(gather.partition(_looker(bootstrap, timeout_ms), name)), as_json=as_json)


@explain.command()
@click.argument("name")
@watch_option
@bootstrap_option
@timeout_option("10s")
@json_option
def subscription(
    name: str, watch_ms: int, bootstrap: str | None, timeout_ms: int, as_json: bool
) -> None:
    """Why the persistent subscription NAME, or TOPIC/NAME, hands nothing out.

    \b
    Example:
      aegis explain subscription orders/billing
    """
    from aegis_cluster.explain import gather

    def work(engine: StreamingEngine, looker: Looker) -> Coroutine[Any, Any, Explanation]:
        return gather.subscription(engine, looker, name, watch_ms / 1000)

    _show(_with_engine(bootstrap, timeout_ms, work), as_json=as_json)


@explain.command()
@click.argument("name")
@bootstrap_option
@timeout_option("10s")
@json_option
def txn(name: str, bootstrap: str | None, timeout_ms: int, as_json: bool) -> None:
    """Who has a transaction of the transactional id NAME open, and what its end waits for.

    \b
    Example:
      aegis explain txn billing-1
    """
    from aegis_cluster.explain import gather

    def work(engine: StreamingEngine, looker: Looker) -> Coroutine[Any, Any, Explanation]:
        return gather.transaction(engine, looker, name)

    _show(_with_engine(bootstrap, timeout_ms, work), as_json=as_json)


def _looker(bootstrap: str | None, timeout_ms: int) -> Looker:
    from aegis_cluster.explain.gather import Looker

    keys, insecure = security(bootstrap)
    return Looker(cluster_address(bootstrap), timeout_ms / 1000, keys=keys, insecure=insecure)


def _with_engine(
    bootstrap: str | None,
    timeout_ms: int,
    work: Callable[[StreamingEngine, Looker], Coroutine[Any, Any, Explanation]],
) -> Explanation:
    looker = _looker(bootstrap, timeout_ms)

    async def connected() -> Explanation:
        async with connect(bootstrap, timeout_ms / 1000) as engine:
            return await work(engine, looker)

    return run_async(connected())


def _show(found: Explanation, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    for finding in found.findings:
        click.echo(finding.what)
        if finding.do:
            click.echo(f"  What to do: {finding.do}")
