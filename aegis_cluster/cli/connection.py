"""Where the cluster is, and the ways in which commands talk to it.

The idea: the one place of this room that knows the client. Commands are plain functions to click;
each opens one engine, does its work under it and closes it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from aegis_cluster.config import load_streaming_config, parse_duration, parse_size
from aegis_cluster.errors import ConfigError
from aegis_cluster.keys import configured_keys, load_client_keys
from aegis_cluster.node.node_files import bootstrap_of, load_nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aegis_cluster import StreamingEngine
    from aegis_cluster.config import StreamingConfig
    from aegis_cluster.keys import LinkKeys

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
    """`--bootstrap`; without it, the environment, and without that, the nodes of this directory.

    Also `--client-key` and `--server-keys`, which reach `security` beside the command's arguments.
    """
    command = _security_option(
        "--server-keys",
        "servers",
        help="The nodes' public keys: a directory of .pub files, or one of them.  "
        "[env: AEGIS_STREAMING__SECURITY__SERVERS]",
    )(command)
    command = _security_option(
        "--client-key",
        "key",
        help="Connect with this key pair, a .key file.  [env: AEGIS_STREAMING__SECURITY__KEY]",
    )(command)
    return click.option(
        "--bootstrap",
        envvar=BOOTSTRAP_VARIABLE,
        metavar="ADDRESSES",
        help="Addresses of nodes, such as tcp://127.0.0.1:7101, separated by commas.  "
        f"[env: {BOOTSTRAP_VARIABLE}; default: the nodes in ./nodes]",
    )(command)


_SECURITY: Final = "aegis_cluster.security"


def _security_option(flag: str, key: str, help: str) -> Callable[[Command], Command]:
    def keep(context: click.Context, _option: click.Parameter, value: Path | None) -> None:
        if value is not None:
            arguments = context.meta.setdefault(_SECURITY, {})
            arguments[f"streaming.security.{key}"] = value.absolute()

    return click.option(
        flag,
        type=click.Path(path_type=Path),
        callback=keep,
        expose_value=False,
        metavar="PATH",
        help=help,
    )


def settings() -> StreamingConfig:
    """`[streaming]` from `./aegis.toml`, the environment, and the options of the command."""
    context = click.get_current_context(silent=True)
    arguments = {} if context is None else context.meta.get(_SECURITY, {})
    return load_streaming_config(arguments=arguments)


class Security(NamedTuple):
    """How commands connect."""

    keys: LinkKeys | None
    insecure: bool


def security(bootstrap: str | None = None) -> Security:
    """As the settings say; the nodes of this directory may have said that no keys are needed."""
    config = settings()
    keys = configured_keys(config)
    insecure = config.security.insecure or (bootstrap is None and _insecure_here())
    return Security(None if keys is None else load_client_keys(keys), insecure)


def _insecure_here() -> bool:
    try:
        return any(node.config.insecure for node in load_nodes(Path.cwd()))
    except ConfigError:
        return False


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

    config = settings()
    if bootstrap is None and _insecure_here():
        config = replace(config, security=replace(config.security, insecure=True))
    return StreamingEngine.connect(
        cluster_address(bootstrap), request_timeout=timeout, config=config
    )


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's work to its end."""
    return asyncio.run(work)


def cluster_status(bootstrap: str, timeout: float) -> dict[str, Any]:
    """The cluster as its nodes see it, in the shape of `aegis cluster status --json`."""
    from aegis_cluster.client.admin import cluster_status as ask

    keys, insecure = security()
    return run_async(ask(bootstrap, timeout, keys=keys, insecure=insecure))


def shard_status(endpoint: str, timeout: float, keys: LinkKeys | None) -> None:
    """Raise `Unavailable` unless the shard at this control endpoint of this machine answers."""
    from aegis_cluster.client.admin import shard_status as ask

    run_async(ask(endpoint, timeout, keys=keys, insecure=keys is None))


def step_down(endpoint: str, timeout: float, keys: LinkKeys | None = None) -> None:
    """Ask the shard at this control endpoint to hand over what it leads."""
    from aegis_cluster.client.admin import step_down as ask

    # A supervisor asks its own shards only; that the node may be reached was settled in its file.
    run_async(ask(endpoint, timeout, keys=keys, insecure=keys is None))
