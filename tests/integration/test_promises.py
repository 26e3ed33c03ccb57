"""What DESIGN §9 promises, on three real nodes: kill, restart, delete, and compare what is read."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq

from aegis_cluster.client.link import Link
from aegis_cluster.engine import StreamingEngine, TopicConfig
from aegis_cluster.errors import OutcomeUnknown, Refused, TopicNotFound, WrongCluster
from aegis_cluster.message import Message
from tests.integration.cluster import EARLIEST, RunningCluster, cluster, read_all, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def nodes(module_path: Path) -> Iterator[RunningCluster]:
    with cluster(module_path) as running:
        yield running


@pytest.fixture
def whole(nodes: RunningCluster) -> RunningCluster:
    """All nodes running."""
    nodes.up()
    return nodes


def test_what_goes_in_comes_out_equal(whole: RunningCluster) -> None:
    time = datetime(2013, 1, 31, 23, 59, 59, 551_000, UTC)
    payloads: list[Any] = [
        b"", b"\x00\xff", "", "naïve ✈", None, True, 0, -(2**63), 1.5, math.pi, [], {},
        {"a": [1, {"b": None}], "": "empty"}, "x" * 200_000, b"y" * 900_000,
    ]  # fmt: skip
    keys: list[str | bytes | None] = [None, "text", b"bytes", "", b"", "ключ", b"\xff"]
    messages = [
        Message(
            key=keys[number % len(keys)],
            payload=payload,
            headers={"source": "web", "raw": b"\xff\x00", "": "no name"},
            timestamp=time,
        )
        for number, payload in enumerate(payloads * 2)
    ]

    async def test() -> None:
        async with whole.engine() as engine:
            await engine.create_topic("equal", TopicConfig(partitions=3))
            receipts = [await engine.publish("equal", message) for message in messages]
            found = {(m.partition, m.offset): m for m in await read_all(engine, "equal")}
            assert len(found) == len(messages)
            for message, receipt in zip(messages, receipts, strict=True):
                read = found[receipt.partition, receipt.offset]
                assert (read.key, read.payload) == (message.key, message.payload)
                assert type(read.payload) is type(message.payload)
                assert (read.headers, read.timestamp) == (message.headers, message.timestamp)

    run(test())


class Writer:
    """Keys that are written in order, one message after another, until told to stop."""

    def __init__(self, engine: StreamingEngine, topic: str, keys: int) -> None:
        self.acknowledged: dict[str, list[int]] = defaultdict(list)
        self.unknown: dict[str, list[int]] = defaultdict(list)
        self.longest_pause_s = 0.0
        self._engine = engine
        self._topic = topic
        self._stopping = False
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        self._tasks = [loop.create_task(self._write(f"key-{n}")) for n in range(keys)]

    @property
    def count(self) -> int:
        return sum(map(len, self.acknowledged.values()))

    async def _write(self, key: str) -> None:
        loop = asyncio.get_running_loop()
        number = 0
        while not self._stopping:
            try:
                await self._engine.publish(self._topic, Message(key=key, payload=number))
            except OutcomeUnknown:
                self.unknown[key].append(number)
            except Refused:
                pass
            else:
                self.acknowledged[key].append(number)
                self.longest_pause_s = max(self.longest_pause_s, loop.time() - self._last)
                self._last = loop.time()
            number += 1

    async def until(self, count: int) -> None:
        """Go on until so many more were acknowledged."""
        wanted = self.count + count
        async with asyncio.timeout(30):
            while self.count < wanted:  # noqa: ASYNC110 - a condition without an event
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def check(self, messages: list[Any]) -> None:
        """Nothing lost, nothing twice, order kept for each key."""
        read: dict[str, list[int]] = defaultdict(list)
        for message in messages:
            read[message.key].append(message.payload)
        for key, written in self.acknowledged.items():
            assert read[key] == sorted(set(read[key])), f"{key}: twice, or out of order"
            assert set(written) <= set(read[key]), f"{key}: lost"
            assert set(read[key]) <= {*written, *self.unknown[key]}, f"{key}: never written"


@pytest.mark.parametrize("times", [2])
def test_leaders_killed_while_many_write(whole: RunningCluster, times: int) -> None:
    async def test() -> None:
        async with whole.engine() as engine:
            await engine.create_topic("killed", TopicConfig(partitions=3, replication_factor=3))
            writer = Writer(engine, "killed", 12)
            for _ in range(times):
                await writer.until(200)
                leader = await whole.leader_of("killed")
                await asyncio.to_thread(whole.run, "cluster", "kill", leader)
                await writer.until(200)
                await asyncio.to_thread(whole.run, "cluster", "restart", leader)
                await writer.until(100)
            await writer.stop()
            assert not writer.unknown, "an idempotent producer resolves it by itself"
            writer.check(await read_all(engine, "killed"))
            assert writer.longest_pause_s < 5

    run(test(), 100)


def test_all_nodes_killed_at_once(whole: RunningCluster) -> None:
    async def test() -> None:
        async with whole.engine(timeout=5) as engine:
            await engine.create_topic("power", TopicConfig(partitions=3, replication_factor=3))
            writer = Writer(engine, "power", 12)
            await writer.until(300)
            processes = whole.all_processes()
            assert len(processes) == 6
            for process in processes:
                process.kill()
            await asyncio.to_thread(psutil.wait_procs, processes, 10)
            await asyncio.to_thread(whole.up)
            await writer.stop()
        async with whole.engine() as engine:
            writer.check(await read_all(engine, "power"))

    run(test(), 100)


def test_a_graceful_restart_moves_leaders_first(whole: RunningCluster) -> None:
    async def test() -> None:
        async with whole.engine() as engine:
            await engine.create_topic("grace", TopicConfig(partitions=3, replication_factor=3))
            writer = Writer(engine, "grace", 6)
            await writer.until(50)
            leader = await whole.leader_of("grace")
            writer.longest_pause_s = 0.0
            await asyncio.to_thread(whole.run, "cluster", "restart", leader)
            await writer.until(50)
            await writer.stop()
            assert not writer.unknown
            writer.check(await read_all(engine, "grace"))
            assert writer.longest_pause_s < 2, "writes stand still briefly"

    run(test())


def test_a_deleted_topic_is_not_found(whole: RunningCluster) -> None:
    async def test() -> None:
        async with whole.engine() as engine:
            await engine.create_topic("doomed", TopicConfig(partitions=2))
            await engine.publish("doomed", Message(payload="x"))
            async with engine.subscribe("doomed", EARLIEST) as subscriber:
                assert len(await subscriber.poll(timeout=10)) == 1
                await engine.delete_topic("doomed")
                with pytest.raises(TopicNotFound):
                    await subscriber.poll(timeout=10)
            with pytest.raises(TopicNotFound):
                await engine.publish("doomed", Message(payload="y"))
            with pytest.raises(TopicNotFound):
                await read_all(engine, "doomed")
            with pytest.raises(TopicNotFound):
                await engine.delete_topic("doomed")
            await engine.create_topic("doomed")
            assert await read_all(engine, "doomed") == []

    run(test())


def test_a_client_of_another_cluster_is_refused(whole: RunningCluster) -> None:
    async def test() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        endpoint = whole.bootstrap.split(",")[0]
        link = Link(context, endpoint, client_id="ab" * 16, cluster_id="another")
        try:
            with pytest.raises(WrongCluster):
                await link.ready(asyncio.get_running_loop().time() + 10)
        finally:
            link.close()
            context.destroy(linger=0)

    run(test())


def test_a_node_that_was_away_catches_up(whole: RunningCluster) -> None:
    async def test() -> None:
        async with whole.engine() as engine:
            await engine.create_topic("away", TopicConfig(partitions=2, replication_factor=3))
            await asyncio.to_thread(whole.run, "cluster", "kill", "node-3")
            await engine.publish_many("away", [f"{n}" * 100 for n in range(5_000)])
            await asyncio.to_thread(whole.run, "cluster", "restart", "node-3")
            await asyncio.to_thread(
                wait_until, lambda: whole.in_sync("away"), "node-3 holds everything", 30
            )
            assert len(await read_all(engine, "away")) == 5_000

    run(test())
