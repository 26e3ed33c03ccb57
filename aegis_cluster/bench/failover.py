"""How long writes stand still when a leader dies, freezes, or a node is stopped in order.

The idea: one writer for each partition sends one message after another, and the figure is the
longest time without an acknowledgement from the blow on. So a write that was under way counts from
the blow, and one that a dead leader had answered already does not hide the rest.

The rule it protects: each trial begins with a whole cluster, all replicas in sync; otherwise the
second trial would measure the first one's recovery.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.admin import cluster_status
from aegis_cluster.errors import AegisError, NotReady, OutcomeUnknown, Refused
from aegis_cluster.message import Message
from aegis_cluster.node.node_files import bootstrap_of
from aegis_cluster.node.run_file import running_mark
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aegis_cluster.bench.stage import Stage

WHOLE_S: Final = 60.0
WRITES_AFTER: Final = 20
"""Acknowledged writes after the blow, before a trial is over."""
_POLL_S: Final = 0.02
_ASK_S: Final = 5.0


async def kill_leader(stage: Stage, trials: int = 20) -> list[float]:
    """Seconds without an acknowledgement after `kill -9` of the node that leads, one a trial."""
    return await _blows(stage, trials, signal.SIGKILL)


async def pause_leader(stage: Stage, trials: int = 5) -> list[float]:
    """The same after SIGSTOP: its connections stay open and say nothing."""
    return await _blows(stage, trials, signal.SIGSTOP)


async def stop_node(stage: Stage, trials: int = 5) -> list[float]:
    """The longest time without an acknowledgement while a node that leads is stopped in order and
    started again, one for each partition and trial."""
    found = []
    async with writing(stage) as writers:
        for _ in range(trials):
            leaders = await _leaders(stage, writers.topic)
            since = time.perf_counter()
            await asyncio.to_thread(stage.cluster.restart, leaders[0])
            await writers.go_on(since)
            found += [writers.pause(partition, since) for partition in writers.acknowledged]
    return found


async def _blows(stage: Stage, trials: int, blow: signal.Signals) -> list[float]:
    found = []
    async with writing(stage) as writers:
        for _ in range(trials):
            leaders = await _leaders(stage, writers.topic)
            victim = leaders[0]
            group = _process_group(stage, victim)
            since = time.perf_counter()
            os.killpg(group, blow)
            try:
                await writers.go_on(since)
            finally:
                if blow is signal.SIGSTOP:
                    os.killpg(group, signal.SIGCONT)
                else:
                    await asyncio.to_thread(stage.cluster.restart, victim)
            led = [partition for partition, leader in leaders.items() if leader == victim]
            found.append(max(writers.pause(partition, since) for partition in led))
    return found


def _process_group(stage: Stage, name: str) -> int:
    (node,) = (node for node in stage.nodes if node.name == name)
    mark = running_mark(node.config.data)
    if mark is None or mark.group != mark.pid:
        raise NotReady(f"{name} does not run in a process group of its own", node=name)
    return mark.group


class _Writers:
    """A writer for each partition of a topic, and when its writes were acknowledged."""

    def __init__(self, stage: Stage, topic: str) -> None:
        self.topic = topic
        self.acknowledged: dict[int, list[float]] = {n: [] for n in range(stage.partitions)}
        self._engine = stage.engine
        self._news = asyncio.Event()

    async def write(self, partition: int) -> None:
        """One message after another, until cancelled."""
        count = len(self.acknowledged)
        key = next(key for key in map(str, range(10_000)) if _lands(key, count) == partition)
        message = Message(key=key, payload=b"x" * 100)
        while True:
            with contextlib.suppress(Refused, OutcomeUnknown):
                await self._engine.publish(self.topic, message)
                self.acknowledged[partition].append(time.perf_counter())
                self._news.set()

    async def go_on(self, since: float) -> None:
        """Return when every partition has so many acknowledged writes after `since`."""
        async with asyncio.timeout(WHOLE_S):
            while any(self._count(n, since) < WRITES_AFTER for n in self.acknowledged):
                self._news.clear()
                await self._news.wait()

    def _count(self, partition: int, since: float) -> int:
        return sum(at > since for at in self.acknowledged[partition])

    def pause(self, partition: int, since: float) -> float:
        """The longest time without an acknowledgement, seconds."""
        after = [at for at in self.acknowledged[partition] if at > since]
        return max(later - earlier for earlier, later in pairwise([since, *after]))


def _lands(key: str, partitions: int) -> int:
    return partition_for(key.encode(), partitions)


@contextlib.asynccontextmanager
async def writing(stage: Stage) -> AsyncIterator[_Writers]:
    """Writers to each partition of a topic of the stage, until the block ends."""
    async with stage.topic() as topic:
        writers = _Writers(stage, topic)
        tasks = [asyncio.create_task(writers.write(n)) for n in writers.acknowledged]
        try:
            yield writers
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _leaders(stage: Stage, topic: str) -> dict[int, str]:
    """Partition -> the node that leads it, once the cluster is whole."""
    async with asyncio.timeout(WHOLE_S):
        while True:
            with contextlib.suppress(AegisError):
                view = await cluster_status(bootstrap_of(stage.nodes), _ASK_S)
                found = _leaders_when_whole(view, topic)
                if found:
                    return found
            await asyncio.sleep(_POLL_S)


def _leaders_when_whole(view: dict[str, Any], topic: str) -> dict[int, str]:
    """Empty while a node, a leader or a replica in sync is missing."""
    partitions = [p for one in view["topics"] if one["name"] == topic for p in one["partitions"]]
    whole = all(node["alive"] for node in view["nodes"]) and all(
        one["leader"] is not None and set(one["in_sync"]) == set(one["replicas"])
        for one in partitions
    )
    return {one["partition"]: one["leader"] for one in partitions} if whole else {}
