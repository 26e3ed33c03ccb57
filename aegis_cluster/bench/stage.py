"""The stage of a scenario: three nodes on loopback, one client, and a look at what both cost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import psutil

from aegis_cluster.client.admin import shard_status
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.errors import ConfigError
from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.local import LocalCluster, Probe
from aegis_cluster.node.node_files import Wanted, bootstrap_of, ensure_nodes
from aegis_cluster.node.run_file import running_mark
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from aegis_cluster.node.node_files import LocalNode

NODES: Final = 3
TOPIC_SECONDS: Final = 60.0


@dataclass(slots=True)
class Stage:
    """A running cluster and an engine of one client process."""

    engine: StreamingEngine
    cluster: LocalCluster
    nodes: list[LocalNode]
    durability: str
    partitions: int
    kept: dict[str, Any] = field(default_factory=dict)
    """What a scenario's preparation leaves for its runs."""
    _names: Iterator[int] = field(default_factory=itertools.count)

    @contextlib.asynccontextmanager
    async def topic(self, partitions: int | None = None) -> AsyncIterator[str]:
        """A fresh topic, replicated three times; deleted afterwards."""
        name = f"bench-{next(self._names)}"
        await self.make_topic(name, partitions)
        try:
            yield name
        finally:
            await self.engine.delete_topic(name, timeout=TOPIC_SECONDS)

    async def make_topic(self, name: str, partitions: int | None = None) -> None:
        """A topic that serves when this returns."""
        config = TopicConfig(
            partitions=self.partitions if partitions is None else partitions,
            replication_factor=NODES,
        )
        await self.engine.create_topic(name, config, timeout=TOPIC_SECONDS)
        await self.engine.offsets(name, timeout=TOPIC_SECONDS)  # every leader has answered

    def nodes_cpu_s(self) -> float:
        """User and system time of all processes of all nodes since they started."""
        return sum(map(node_cpu_s, self.nodes))

    async def syncs(self) -> int:
        """Rounds of writes that all shards have synced since they started."""
        return sum([await _syncs(node) for node in self.nodes])


@dataclass(slots=True)
class Clock:
    """What a stretch of a run took: time, and processor time of client and nodes."""

    stage: Stage
    seconds: float = 0.0
    client_cpu_s: float = 0.0
    nodes_cpu_s: float = 0.0

    def __enter__(self) -> Clock:
        self.nodes_cpu_s = -self.stage.nodes_cpu_s()
        self.client_cpu_s = -time.process_time()
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.client_cpu_s += time.process_time()
        self.nodes_cpu_s += self.stage.nodes_cpu_s()


@contextlib.asynccontextmanager
async def running_stage(
    directory: Path, durability: str, partitions: int, *, probe: Probe
) -> AsyncIterator[Stage]:
    """Three nodes with their data in `directory`; stopped however the block ends."""
    cluster = LocalCluster(directory, probe=probe, tell=lambda _: None)
    wanted = Wanted(nodes=NODES, shards=1, base_port=free_base_port(NODES))
    for node in ensure_nodes(directory, wanted):
        text = node.file.read_text(encoding="utf-8")
        changed = text.replace('durability = "fsync"', f'durability = "{durability}"')
        node.file.write_text(changed, encoding="utf-8")
    starting = asyncio.create_task(asyncio.to_thread(cluster.up, wanted))
    try:
        nodes = await asyncio.shield(starting)
        async with StreamingEngine.connect(bootstrap_of(nodes)) as engine:
            yield Stage(engine, cluster, nodes, durability, partitions)
    finally:
        await asyncio.wait([starting])  # who stops us meanwhile does not stop the thread
        with contextlib.suppress(ConfigError):
            await asyncio.to_thread(cluster.down)


def family(node: LocalNode) -> list[psutil.Process]:
    """A node's supervisor and its shards; none where it does not run."""
    mark = running_mark(node.config.data)
    if mark is None:
        return []
    supervisor = psutil.Process(mark.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def node_cpu_s(node: LocalNode) -> float:
    """User and system time of all processes of one node since they started."""
    total = 0.0
    for process in family(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def _syncs(node: LocalNode) -> int:
    status = await shard_status(node.config.endpoint, TOPIC_SECONDS)
    return int(status["identity"].get("syncs", 0))


def largest_shard_mb(stage: Stage) -> float:
    """Resident memory of the largest process of all nodes."""
    processes = [process for node in stage.nodes for process in family(node)]
    return float(max(process.memory_info().rss for process in processes) / 1e6)
