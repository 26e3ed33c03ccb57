"""Where the cluster is, and the ways in which commands talk to it.

The idea: the one place of this room that knows the client. Commands are plain functions to click;
each opens one engine, does its work under it and closes it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aegis_cluster.config import parse_duration, parse_size
from aegis_cluster.node.node_files import bootstrap_of, load_nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aegis_cluster import StreamingEngine

BOOTSTRAP_VARIABLE = "AEGIS_BOOTSTRAP"

Command = TypeVar("Command", bound="Callable[..., Any]")
Result = TypeVar("Result")


def duration(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """An option's "30s" as milliseconds."""
    return _checked(parse_duration, value)


def size(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """An option's "1MB" as bytes."""
    return _checked(parse_size, value)


def _checked(parse: Callable[[object], int], value: str | None) -> int | None:
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def bootstrap_option(command: Command) -> Command:
    """`--bootstrap`; without it, the environment, and without that, the nodes of this directory."""
    return click.option(
        "--bootstrap",
        envvar=BOOTSTRAP_VARIABLE,
        metavar="ADDRESSES",
        help="Addresses of nodes, such as tcp://127.0.0.1:7101, separated by commas.  "
        f"[env: {BOOTSTRAP_VARIABLE}; default: the nodes in ./nodes]",
    )(command)


def timeout_option(default: str = "30s") -> Callable[[Command], Command]:
    """`--timeout`, as milliseconds in `timeout_ms`."""
    return click.option(
        "--timeout",
        "timeout_ms",
        callback=duration,
        metavar="DURATION",
        default=default,
        show_default=True,
        help="How long to try before giving up.",
    )


def json_option(command: Command) -> Command:
    """`--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


def cluster_address(bootstrap: str | None) -> str:
    """The address as given, or that of the nodes of this directory."""
    return bootstrap or bootstrap_of(load_nodes(Path.cwd()))


def connect(bootstrap: str | None, timeout: float) -> StreamingEngine:
    """The engine of the cluster; to be entered with `async with`, which takes `timeout` at most."""
    from aegis_cluster import StreamingEngine

    return StreamingEngine.connect(cluster_address(bootstrap), request_timeout=timeout)


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's work to its end."""
    return asyncio.run(work)


def cluster_status(bootstrap: str, timeout: float) -> dict[str, Any]:
    """The cluster as its nodes see it, in the shape of `aegis cluster status --json`."""
    from aegis_cluster.client.admin import cluster_status as ask

    return run_async(ask(bootstrap, timeout))


def step_down(endpoint: str, timeout: float) -> None:
    """Ask the shard at this control endpoint to hand over what it leads."""
    from aegis_cluster.client.admin import step_down as ask

    run_async(ask(endpoint, timeout))
