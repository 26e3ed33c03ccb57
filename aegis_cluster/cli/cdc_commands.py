"""`aegis cdc run`: a connector as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from aegis_cluster.cli.connection import bootstrap_option, connect, run_async, timeout_option

if TYPE_CHECKING:
    from aegis_cluster.cdc import CDCEngine
    from aegis_cluster.cdc.configuration import ConnectorConfig

LOOK_S: Final = 0.2


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
        CDCEngine(engine, config.source, topic=config.topic) as capture,
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


async def _tell(capture: CDCEngine) -> None:
    """A line whenever something changes that a person wants to know."""
    told = None
    while True:
        state = capture.state
        if state is not None and (state.role, state.error) != told:
            told = (state.role, state.error)
            reason = f": {state.error}" if state.error else ""
            click.echo(f"feed {capture.feed}: {state.role}{reason}")
        await asyncio.sleep(LOOK_S)
