"""What many partitions cost, and whether a busy neighbour alone makes anybody elect.

Partitions are created, left alone, restarted, and lose a node. Both scenarios run once, on nodes of
their own, and only when named: they take minutes.

The rule it protects: states are believed only as the nodes tell them: a partition is ready when a
leader that serves says that all of its replicas hold what is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.bench.failover import writing
from aegis_cluster.bench.figures import (
    CREATE_S,
    ELECTIONS,
    FSYNC,
    IDLE_CPU,
    READY_S,
    RELED_S,
    RSS_MB,
    Goal,
    Sample,
    Scenario,
)
from aegis_cluster.bench.stage import NODES, largest_shard_mb, node_cpu_s
from aegis_cluster.client.admin import shard_status
from aegis_cluster.errors import AegisError
from aegis_cluster.node.node_files import Wanted
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from aegis_cluster.bench.stage import Stage
    from aegis_cluster.node.node_files import LocalNode

PARTITIONS: Final = 1_000
TOPIC: Final = "scale"
SETTLE_S: Final = 10.0
"""After the last event, until nothing is under way and idle groups have fallen silent."""
WAIT_S: Final = 180.0
_POLL_S: Final = 0.5
"""An answer about a thousand replicas is work that the nodes lack elsewhere."""


async def scale(stage: Stage, seconds: float) -> Sample:
    """Create the partitions, leave them alone for so long, restart all nodes, kill one."""
    figures: dict[str, float] = {}
    extra: dict[str, float] = {}
    before_s, start = stage.nodes_cpu_s(), time.perf_counter()
    config = TopicConfig(partitions=PARTITIONS, replication_factor=NODES)
    await stage.engine.create_topic(TOPIC, config, timeout=WAIT_S)
    await stage.engine.offsets(TOPIC, timeout=WAIT_S)  # every leader has answered
    figures[CREATE_S] = time.perf_counter() - start
    await until_ready(stage.nodes)
    await asyncio.sleep(SETTLE_S)
    extra["processor s a node, until all is quiet"] = (stage.nodes_cpu_s() - before_s) / NODES
    figures[IDLE_CPU] = await _idle_percent(stage, seconds)
    figures[RSS_MB] = largest_shard_mb(stage)
    await asyncio.to_thread(stage.cluster.down)
    start = time.perf_counter()
    await asyncio.to_thread(stage.cluster.up, Wanted())
    extra["s for up to return"] = time.perf_counter() - start
    await until_ready(stage.nodes)
    figures[READY_S] = time.perf_counter() - start
    extra["processor s a node, to ready"] = stage.nodes_cpu_s() / NODES
    await asyncio.sleep(SETTLE_S)
    figures[RELED_S], extra["leaders lost"] = await _kill_one(stage)
    await asyncio.to_thread(stage.cluster.up, Wanted())
    return Sample(PARTITIONS, 1.0, figures, extra=extra)


async def _kill_one(stage: Stage) -> tuple[float, float]:
    """Seconds from the end of one node until all partitions are led; how many it had led."""
    victim, *others = reversed(stage.nodes)
    led = sum(_led(replica) for replica in (await _status(victim))["replicas"])
    start = time.perf_counter()
    await asyncio.to_thread(stage.cluster.kill, victim.name)
    await _until(others, _are_all_led, 0.1)
    return time.perf_counter() - start, led


async def _idle_percent(stage: Stage, seconds: float) -> float:
    """Of a core, of the node that takes most, supervisor and all."""
    before = [node_cpu_s(node) for node in stage.nodes]
    await asyncio.sleep(seconds)
    after = [node_cpu_s(node) for node in stage.nodes]
    return max(b - a for a, b in zip(before, after, strict=True)) / seconds * 100


async def calm(stage: Stage, seconds: float) -> Sample:
    """Writers, and beside them processes that burn all the time of every core: no fault."""
    async with writing(stage), _burners():
        await until_ready(stage.nodes)
        before = await _terms(stage.nodes)
        await asyncio.sleep(seconds)
        after = await _terms(stage.nodes)
    elections = sum(after[group] - before[group] for group in before)
    return Sample(1, seconds, {ELECTIONS: float(elections)}, extra={"minutes": seconds / 60})


@contextlib.asynccontextmanager
async def _burners() -> AsyncIterator[None]:
    """One for each core."""
    count = os.cpu_count() or 1
    burn = (sys.executable, "-c", "while True: pass")
    running = [await asyncio.create_subprocess_exec(*burn) for _ in range(count)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
        await asyncio.gather(*(one.wait() for one in running))


# What the nodes say


async def _status(node: LocalNode) -> dict[str, Any]:
    return await shard_status(node.config.endpoint, WAIT_S)


def _led(replica: dict[str, Any]) -> bool:
    return bool(replica["serving"])


def _are_all_led(replicas: list[dict[str, Any]]) -> bool:
    return {one["group"] for one in replicas} == {one["group"] for one in replicas if _led(one)}


def _are_all_ready(replicas: list[dict[str, Any]]) -> bool:
    """Led, and all of its replicas hold what is committed."""
    ready = {
        one["group"]
        for one in replicas
        if _led(one) and set(one["in_sync"]) == set(one["voters"]) and len(one["voters"]) == NODES
    }
    return {one["group"] for one in replicas} == ready


async def until_ready(nodes: Collection[LocalNode]) -> None:
    await _until(nodes, _are_all_ready)


async def _until(
    nodes: Collection[LocalNode],
    holds: Callable[[list[dict[str, Any]]], bool],
    poll_s: float = _POLL_S,
) -> None:
    """Ask all nodes until what they say of all replicas together is as wanted."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(AegisError):
                told = await asyncio.gather(*map(_status, nodes))
                if holds([replica for one in told for replica in one["replicas"]]):
                    return
            await asyncio.sleep(poll_s)


async def _terms(nodes: Collection[LocalNode]) -> dict[int, int]:
    """The newest term of each group."""
    found: dict[int, int] = {}
    for node in nodes:
        for replica in (await _status(node))["replicas"]:
            found[replica["group"]] = max(found.get(replica["group"], 0), replica["term"])
    return found


SCENARIOS: Final = (
    Scenario(
        "scale",
        f"{PARTITIONS:,} partitions x {NODES} replicas",
        scale,
        {
            FSYNC: (
                Goal(CREATE_S, None, 20.0),
                Goal(IDLE_CPU, None, 10.0, 3.0),
                Goal(RSS_MB, None, 400.0, 200.0),
                Goal(READY_S, None, 30.0),
                Goal(RELED_S, None, 3.0, 1.0),
            ),
        },
        apart=True,
    ),
    Scenario(
        "calm",
        "no fault, all cores busy beside",
        calm,
        {FSYNC: (Goal(ELECTIONS, None, 0.0),)},
        apart=True,
    ),
)
