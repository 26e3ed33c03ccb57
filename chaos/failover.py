"""How long writes stand still, beside what is promised: `python -m chaos.failover`.

Three nodes of one shard each, three partitions, one writer for each; `aegis_cluster.bench.failover`
says what exactly is measured. Exit code 1 when a promise is missed, so run it on a machine that has
nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.bench.failover import kill_leader, pause_leader, stop_node
from aegis_cluster.bench.stage import running_stage
from aegis_cluster.cli.connection import cluster_status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster.bench.stage import Stage

PARTITIONS: Final = 3


class Promise(NamedTuple):
    """What is measured, and the seconds that its median and its worst may take."""

    title: str
    measure: Callable[[Stage, int], Awaitable[list[float]]]
    median_s: float
    worst_s: float


PROMISES: Final = {
    "kills": Promise("kill -9 of a leader", kill_leader, 0.5, 1.5),
    "pauses": Promise("SIGSTOP of a leader", pause_leader, 2.0, 2.0),
    "stops": Promise("graceful restart, per partition", stop_node, 0.1, 0.1),
}


async def measure(trials: dict[str, int]) -> bool:
    """Print a line for each; return whether all promises were kept."""
    kept = True
    with tempfile.TemporaryDirectory(prefix="aegis-failover-") as place:
        async with running_stage(Path(place), "fsync", PARTITIONS, probe=cluster_status) as stage:
            for name, promise in PROMISES.items():
                if trials[name]:
                    found = await promise.measure(stage, trials[name])
                    kept &= _show(promise, found)
    return kept


def _show(promise: Promise, found: list[float]) -> bool:
    median, worst = statistics.median(found), max(found)
    kept = median <= promise.median_s and worst <= promise.worst_s
    print(
        f"{promise.title:32} {len(found):3} pauses: median {median:.3f} s"
        f" (must {promise.median_s:g}), worst {worst:.3f} s (must {promise.worst_s:g})"
        f"{'' if kept else '  MISSED'}",
        flush=True,
    )
    return kept


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="chaos.failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="trials of kill -9")
    parser.add_argument("--pauses", type=int, default=5, help="trials of SIGSTOP")
    parser.add_argument("--stops", type=int, default=5, help="restarts of a node")
    return 0 if asyncio.run(measure(vars(parser.parse_args()))) else 1


if __name__ == "__main__":
    sys.exit(main())
