"""`aegis bench`: what a cluster of three nodes does on this machine."""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aegis_cluster.bench.report import plot, table
from aegis_cluster.bench.run import DURABILITIES, SCENARIOS, Plan, Report, run
from aegis_cluster.cli.connection import cluster_status, json_option, run_async
from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Coroutine


QUICK_SECONDS = 2.0


@click.command()
@click.option(
    "--seconds", type=click.FloatRange(0.2, 3600), default=10.0, show_default=True, help="Of a run."
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="Runs of each scenario; the median counts.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="SCENARIO",
    help=f"Only this one; may be repeated.  [{', '.join(one.name for one in SCENARIOS)}]",
)
@click.option(
    "--durability",
    type=click.Choice([*DURABILITIES, "both"]),
    default="both",
    show_default=True,
    help="Acknowledged after fdatasync on a majority, or from a majority's memory.",
)
@click.option(
    "--partitions",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Of the topics, where a scenario does not say otherwise.",
)
@click.option("--quick", is_flag=True, help="One run of 2 s each: a look, not a figure.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-results"),
    show_default=True,
    help="Where bench.json, bench.md and bench.png go.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path(),
    show_default=True,
    help="The data of the nodes goes into a new directory in here, removed afterwards: this is "
    "the disk that is measured.",
)
@json_option
def bench(
    seconds: float,
    repeats: int,
    only: tuple[str, ...],
    durability: str,
    partitions: int,
    quick: bool,
    output: Path,
    directory: Path,
    as_json: bool,
) -> None:
    """Start three nodes here, measure them and this machine, and show both side by side.

    \b
    Examples:
      aegis bench
      aegis bench --quick --only publish_many --only latency
    """
    if quick:
        seconds, repeats = QUICK_SECONDS, 1
    durabilities = DURABILITIES if durability == "both" else (durability,)
    plan = Plan(seconds, repeats, only, durabilities, partitions)
    for name in durabilities:
        plan.scenarios(name)  # refuses unknown names before anything is started
    with tempfile.TemporaryDirectory(prefix="aegis-bench-", dir=directory.absolute()) as place:
        work = run(
            plan,
            Path(place),
            probe=cluster_status,
            tell=lambda text: click.echo(text, err=True),
        )
        try:
            report = run_async(_until_sigterm(work))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    output.mkdir(parents=True, exist_ok=True)
    lines = table(report)
    found = report.to_json()
    (output / "bench.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (output / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    click.echo(json.dumps(found) if as_json else "\n".join(lines))
    try:
        plot(report, output / "bench.png")
    except ConfigError as error:
        click.echo(str(error), err=True)
    click.echo(f"Written to {output}/: bench.json, bench.md, bench.png", err=True)


async def _until_sigterm(work: Coroutine[None, None, Report]) -> Report:
    """SIGTERM ends it as Ctrl-C does, with the nodes stopped."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task
