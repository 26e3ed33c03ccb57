"""A processor that counts records by key and minute, and a process of its own that runs it:

    python -m tests.stream.counting DIRECTORY

It opens the engine in `DIRECTORY/data`, starts, says when it has committed, and works until it is
killed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from aegis_cluster import StreamingEngine
from aegis_cluster.stream import Count, StreamProcessor

PACE_S = 0.0003
"""A record takes so long, so that a kill finds work under way."""


def counting(engine: StreamingEngine, directory: Path, *, pace_s: float = 0.0) -> StreamProcessor:
    """Reads "in", writes "out" and, record by record, "copies"."""

    def slowly(value: Any) -> Any:
        if pace_s:
            time.sleep(pace_s)
        return value

    processor = StreamProcessor(
        engine,
        "counting",
        state_dir=directory / "state",
        commit_interval=timedelta(milliseconds=20),
        idle_timeout=timedelta(seconds=1),
    )
    source = processor.source("in", timestamp="t").map(slowly)
    source.map(lambda value: value["n"]).sink("copies")
    keyed = source.key_by(lambda value: value["n"] % 5)
    return (
        keyed.window(timedelta(minutes=1), grace=timedelta(hours=1)).aggregate(Count()).sink("out")
    )


async def _main(directory: Path) -> None:
    async with StreamingEngine.open(directory / "data") as engine:
        running = await counting(engine, directory, pace_s=PACE_S).start()
        while running.stats.commits == 0:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        sys.stdout.write("works\n")
        sys.stdout.flush()
        await running.wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
