"""Consumers in processes of their own are killed, and so are the nodes that coordinate them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import Offset, SubscribeConfig, TopicConfig, TopicPartition
from tests.integration.cluster import RunningCluster, cluster, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aegis_cluster import StreamingEngine

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

CONSUMER = """
import asyncio, sys
from aegis_cluster import Offset, StreamingEngine, SubscribeConfig

async def main(bootstrap, group, seen):
    config = SubscribeConfig(group_id=group, start=Offset.EARLIEST, session_timeout="30s")
    async with StreamingEngine.connect(bootstrap) as engine:
        async with engine.subscribe("numbers", config) as subscriber:
            with open(seen, "a", buffering=1) as file:
                async for message in subscriber:
                    file.write(f"{message.payload}\\n")
                    await message.ack()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def nodes(module_path: Path) -> Iterator[RunningCluster]:
    with cluster(module_path) as running:
        yield running


def consumer(nodes: RunningCluster, group: str, seen: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", CONSUMER, nodes.bootstrap, group, str(seen)]
    return subprocess.Popen(arguments)


def numbers(*files: Path) -> list[int]:
    return [int(line) for file in files if file.exists() for line in file.read_text().split()]


async def members(engine: StreamingEngine, group: str) -> dict[str, tuple[TopicPartition, ...]]:
    state = await engine.group(group).describe()
    return {member.member_id: member.assigned for member in state.members}


async def until_shared(engine: StreamingEngine, group: str, count: int) -> None:
    """So many members hold all partitions."""
    async with asyncio.timeout(60):
        while True:
            found = await members(engine, group)
            if len(found) == count and sum(map(len, found.values())) == 4:
                return
            await asyncio.sleep(0.05)


def test_kill_9_of_a_consumer_and_of_its_coordinator(nodes: RunningCluster, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    processes: list[subprocess.Popen[bytes]] = []

    async def test() -> None:
        async with nodes.engine() as engine:
            await engine.create_topic("numbers", TopicConfig(partitions=4))
            await engine.publish_many("numbers", range(400), keys=map(str, range(400)))
            watch = SubscribeConfig(group_id="workers", start=Offset.EARLIEST)
            async with engine.subscribe("numbers", watch):
                pass  # the group exists, and begins at the beginning
            processes.extend(consumer(nodes, "workers", file) for file in (first, second))
            await until_shared(engine, "workers", 2)
            before = await members(engine, "workers")

            # The coordinator's node dies: nothing moves, and work goes on.
            name = (await engine.group("workers").describe()).coordinator
            nodes.run("cluster", "kill", name)
            values = range(400, 800)
            await engine.publish_many("numbers", values, keys=map(str, values))
            assert await members(engine, "workers") == before
            await asyncio.to_thread(
                wait_until,
                lambda: set(numbers(first, second)) == set(range(800)),
                "all of it is handled",
                60,
            )
            assert await members(engine, "workers") == before
            nodes.up()

            # A consumer dies: its connection closes, and the other one has its partitions at once.
            processes[0].kill()
            killed = time.monotonic()
            await until_shared(engine, "workers", 1)
            assert time.monotonic() - killed < 25, "not by its session time-out of 30 s"
            values = range(800, 900)
            await engine.publish_many("numbers", values, keys=map(str, values))
            await asyncio.to_thread(
                wait_until,
                lambda: set(range(800, 900)) <= set(numbers(second)),
                "the survivor handles what comes",
                60,
            )

            shown = json.loads(nodes.run("group", "describe", "workers", "--json"))
            assert len(shown["members"]) == 1
            assert {row["topic"] for row in shown["positions"]} == {"numbers"}
            assert "workers" in nodes.run("group", "list")
            assert "workers" in nodes.run("group", "describe", "workers")
            nodes.run("group", "reset", "workers", "--to", "earliest", code=1)
            nodes.run("group", "describe", "nobody", code=1)

    try:
        run(test(), 170)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_command_line_reads_as_a_member(nodes: RunningCluster) -> None:
    """What one call has printed, the next one goes on behind."""

    async def fill() -> None:
        async with nodes.engine() as engine:
            await engine.create_topic("printed", TopicConfig(partitions=2), exist_ok=True)
            await engine.publish_many("printed", [f"n{number}" for number in range(50)])

    def printed(*options: str) -> list[str]:
        said = nodes.run("consume", "printed", "--group", "readers", "--from", "earliest", *options)
        return [line.split("\t")[2] for line in said.splitlines()]

    run(fill(), 30)
    first = printed("--count", "20")
    assert len(first) == 20
    rest = printed("--to-end")
    assert sorted(first + rest) == sorted(f"n{number}" for number in range(50))
    assert printed("--to-end") == []
