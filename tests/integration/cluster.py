"""A real cluster in a directory of its own, for the tests of this room."""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil

from aegis_cluster import SubscribeConfig
from aegis_cluster.client.admin import cluster_status
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.message import Offset, ReceivedMessage
from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.run_file import read_run_file
from tests.cli.test_real_cluster import Directory

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from pathlib import Path

EARLIEST = SubscribeConfig(start=Offset.EARLIEST)


class RunningCluster(Directory):
    """Nodes that are up; whatever a test does to them, `cluster` ends them."""

    def __init__(self, path: Path, *, nodes: int = 3, shards: int | None = None) -> None:
        super().__init__(path, free_base_port())
        self.count = nodes
        self.shards = shards

    def up(self, *, code: int = 0) -> str:
        shards = () if self.shards is None else ("--shards", str(self.shards))
        ports = ("--base-port", str(self.base_port))
        return self.run("cluster", "up", "--nodes", str(self.count), *shards, *ports, code=code)

    def down(self) -> None:
        self.run("cluster", "down")

    def set_shards(self, count: int) -> None:
        """Change the node files, as the command line asks one to."""
        for file in sorted((self.path / "nodes").glob("*.toml")):
            text = re.sub(r"(?m)^shards = \d+", f"shards = {count}", file.read_text())
            file.write_text(text)
        self.shards = count

    @property
    def bootstrap(self) -> str:
        return ",".join(
            f"tcp://127.0.0.1:{self.base_port + 100 * node + 1}"
            for node in range(1, self.count + 1)
        )

    def engine(self, timeout: float = 20.0) -> StreamingEngine:
        return StreamingEngine.connect(self.bootstrap, request_timeout=timeout)

    def all_processes(self) -> list[psutil.Process]:
        """Every process of every node, by the pids in their run files."""
        found = []
        for node in self.nodes():
            if read_run_file(node.config.data) is not None:
                with suppress(psutil.NoSuchProcess):
                    found += self.processes(node.name)
        return found

    async def leader_of(self, topic: str, partition: int = 0) -> str:
        """The name of the node that leads; waits for there to be one."""
        async with asyncio.timeout(20):
            while True:
                view = await cluster_status(self.bootstrap, 5.0)
                found = next(t for t in view["topics"] if t["name"] == topic)
                leader = found["partitions"][partition]["leader"]
                if leader is not None:
                    return str(leader)


@contextmanager
def cluster(path: Path, *, nodes: int = 3, shards: int | None = None) -> Iterator[RunningCluster]:
    """A cluster that is up, and is gone afterwards, its own processes and no others."""
    running = RunningCluster(path, nodes=nodes, shards=shards)
    try:
        running.up()
        yield running
    finally:
        left = running.all_processes() if (path / "nodes").exists() else []
        with suppress(AssertionError):
            running.down()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


async def read_all(engine: StreamingEngine, topic: str) -> list[ReceivedMessage]:
    """Everything up to the present end, each partition in order."""
    offsets = await engine.offsets(topic)
    left = sum(found.high_watermark - found.log_start for found in offsets.values())
    messages: list[ReceivedMessage] = []
    async with engine.subscribe(topic, EARLIEST) as subscriber:
        while len(messages) < left:
            more = await subscriber.poll(timeout=10)
            assert more, f"{topic}: {len(messages)} of {left} came"
            messages += more
    return messages


def run(test: Coroutine[Any, Any, None], seconds: float = 60) -> None:
    asyncio.run(asyncio.wait_for(test, seconds))
