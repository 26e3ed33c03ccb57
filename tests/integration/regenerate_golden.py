"""Writes the golden data directory anew: `python -m tests.integration.regenerate_golden --rewrite`.

Only for a new format, and then beside the old ones (`data-dir-v2…`): what an older version wrote
stays readable for ever, so the file of v1 is never to be replaced once a release has carried it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psutil

from aegis_cluster.engine import StreamingEngine, TopicConfig
from aegis_cluster.message import Message
from tests.integration.cluster import RunningCluster, cluster, read_all
from tests.integration.golden import ARCHIVE, EXPECTED, Records, as_rows, pack
from tests.waiting import wait_until

TIME: Final = datetime(2013, 1, 1, 5, 15, tzinfo=UTC)
PAYLOADS: Final[list[Any]] = [b"\x00\xff", "naïve", None, {"a": [1, None, 2.5]}, True, "x" * 300]
KEYS: Final[list[str | bytes | None]] = ["N14228", None, b"\xff\x00", "", "ключ"]


async def write(running: RunningCluster) -> Records:
    """Some topics, two leaders' terms, a deleted topic, and all kinds of records."""
    async with running.engine() as engine:
        await engine.create_topic("plain", TopicConfig(partitions=3, replication_factor=3))
        await engine.create_topic(
            "zipped", TopicConfig(partitions=1, replication_factor=3, compression="zstd")
        )
        await engine.create_topic("single", TopicConfig(partitions=2, replication_factor=1))
        await engine.create_topic("empty", TopicConfig(partitions=1, retention="30d"))
        await engine.create_topic("deleted")
        await engine.publish("deleted", Message(payload="gone"))
        await fill(engine)
        await engine.delete_topic("deleted")
        leader = await running.leader_of("plain")
        await asyncio.to_thread(running.run, "cluster", "restart", leader)
        await fill(engine)
        await asyncio.to_thread(
            wait_until,
            lambda: all(running.in_sync(topic) for topic in ("plain", "zipped", "single")),
            "all replicas hold everything",
        )
        return {name: as_rows(await read_all(engine, name)) for name in await engine.list_topics()}


async def fill(engine: StreamingEngine) -> None:
    for topic in ("plain", "zipped", "single"):
        await engine.publish_many(
            topic,
            [
                Message(
                    key=KEYS[number % len(KEYS)],
                    payload=PAYLOADS[number % len(PAYLOADS)],
                    headers={"n": str(number), "raw": b"\xff"} if number % 3 else {},
                    timestamp=TIME + timedelta(milliseconds=number),
                )
                for number in range(70)
            ],
        )


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "golden") as running:
        records = asyncio.run(write(running))
        processes = running.all_processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, 10)
        pack(running.path / "data", ARCHIVE)
    rows = ",\n".join(
        f'"{topic}": [\n' + ",\n".join(json.dumps(row) for row in found) + "]"
        for topic, found in sorted(records.items())
    )
    EXPECTED.write_text("{" + rows + "}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        sys.exit(__doc__)
    rewrite()
