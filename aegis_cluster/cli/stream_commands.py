"""`aegis stream run | describe`: a processor from a module of yours, in several processes.

The idea: workers find each other by the application's group, so several are just the same command
several times: this process starts them, passes its end on to them, and ends with the first that
fails.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from aegis_cluster.cli.app import CommandFailed
from aegis_cluster.cli.connection import bootstrap_option, connect, run_async, timeout_option
from aegis_cluster.cli.loading import load_variable

if TYPE_CHECKING:
    from aegis_cluster import StreamingEngine
    from aegis_cluster.stream import StreamProcessor
    from aegis_cluster.stream.changelog import Progress as Restored

WORKERS_MAX: Final = 64
STOP_S: Final = 30.0
"""For workers to commit and leave once told, before they are killed."""
_POLL_S: Final = 0.2


@click.group()
def stream() -> None:
    """Run stream processors."""


@stream.command()
@click.argument("target", metavar="MODULE:PROCESSOR")
@click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_MAX),
    default=1,
    show_default=True,
    help="Processes that share the work.",
)
@bootstrap_option
@timeout_option()
def run(target: str, workers: int, bootstrap: str | None, timeout_ms: int) -> None:
    """Run a processor until Ctrl-C or SIGTERM.

    PROCESSOR is a variable of MODULE: a StreamProcessor (made with None in place of an engine), or
    a function that is given the engine and returns one. The current directory is searched first.

    \b
    Example, with `processor = StreamProcessor(None, "metrics")` in metrics.py:
      aegis stream run metrics:processor --workers 2
    """
    made = load(target)
    if workers > 1:
        _run_several(workers)
        return
    run_async(_run(connect(bootstrap, timeout_ms / 1000), made))


@stream.command()
@click.argument("target", metavar="MODULE:PROCESSOR")
@click.option("--mermaid", is_flag=True, help="As a diagram for Mermaid.")
def describe(target: str, mermaid: bool) -> None:
    """Print what a processor does; it needs no cluster.

    \b
    Example:
      aegis stream describe metrics:processor --mermaid
    """
    made = load(target)
    processor = made if _is_processor(made) else made(None)
    click.echo(processor.describe("mermaid" if mermaid else "text"))


def load(target: str) -> Any:
    """A processor, or a function that makes one. Raises `BadParameter`, which names what is wrong
    with it."""
    found = load_variable(target, example="metrics:processor")
    if not _is_processor(found) and not callable(found):
        raise click.BadParameter(
            f"{target} is {type(found).__name__}; a StreamProcessor is needed, or a function that"
            " makes one"
        )
    return found


def _is_processor(made: Any) -> bool:
    from aegis_cluster.stream import StreamProcessor

    return isinstance(made, StreamProcessor)


async def _run(engine: StreamingEngine, made: Any) -> None:
    async with engine:
        processor: StreamProcessor = made if _is_processor(made) else made(engine)
        with RestoreBars() as bars:
            running = await processor.start(engine, on_restore=bars.show)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        click.echo(f"{processor.application_id} is running; Ctrl-C stops it.", err=True)
        ends = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(running.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        ends[0].cancel()
        await running.stop()
        await asyncio.gather(*ends, return_exceptions=True)


class RestoreBars:
    """A bar for each task whose state is restored while a processor starts, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bars = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> RestoreBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, name: str, progress: Restored) -> None:
        """How far one task is."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(f"restoring {name}", total=progress.total)
        self._bars.update(self._tasks[name], completed=progress.done)


def _run_several(workers: int) -> None:
    """The same command in processes of their own, with one worker each."""
    arguments = [sys.executable, "-m", "aegis_cluster.cli", *sys.argv[1:], "--workers", "1"]
    processes = [subprocess.Popen(arguments, start_new_session=True) for _ in range(workers)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while all(process.poll() is None for process in processes):
            try:
                processes[0].wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
    except KeyboardInterrupt:
        _stop(processes)
        return
    _stop(processes)
    failed = [process for process in processes if process.returncode != 0]
    raise CommandFailed(
        f"{len(failed)} of {workers} workers failed, and said why above; the others are stopped."
    )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
