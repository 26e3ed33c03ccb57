"""A directory that was written embedded becomes the first node of a cluster of three."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.client.admin import shard_status
from tests.integration.cluster import EARLIEST, RunningCluster, cluster, read_all, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(240)]


GROUPED = SubscribeConfig(group_id="shippers", start=Offset.EARLIEST, max_poll_records=10)


def voters(running: RunningCluster, topic: str) -> set[tuple[int, ...]]:
    """Who votes in the partitions of a topic, as node 1 sees it."""
    endpoint = running.nodes()[0].config.endpoint
    found = asyncio.run(shard_status(endpoint, 5.0))
    return {tuple(sorted(one["voters"])) for one in found["replicas"] if one["topic"] == topic}


def all_three(running: RunningCluster, topic: str) -> bool:
    return voters(running, topic) == {(1, 2, 3)}


async def write(path: Path) -> None:
    async with StreamingEngine.open(path) as engine:
        await engine.create_topic("orders", TopicConfig(partitions=2))
        await engine.publish_many("orders", range(100))
        async with engine.subscribe("orders", GROUPED) as subscriber:
            for message in await subscriber.poll(10):
                await message.ack()


async def grown(running: RunningCluster) -> None:
    async with running.engine(60) as engine:
        assert sorted(m.payload for m in await read_all(engine, "orders")) == list(range(100))
        await engine.create_topic("wide", TopicConfig(replication_factor=3))
        await engine.alter_topic("orders", replication_factor=3)
        await engine.publish("wide", Message(payload="with three"))


async def without_the_first(running: RunningCluster) -> None:
    async with running.engine(60) as engine:
        await engine.publish("wide", Message(payload="with two"))
        await engine.create_topic("later")
        assert [m.payload for m in await read_all(engine, "wide")] == ["with three", "with two"]
        await engine.publish("orders", Message(payload=100))
        assert sorted(m.payload for m in await read_all(engine, "orders")) == list(range(101))
        assert sum((await engine.group("shippers").positions()).values()) == 10


async def complete(running: RunningCluster) -> None:
    async with running.engine(60) as engine, engine.subscribe("orders", EARLIEST) as subscriber:
        assert len(await subscriber.poll(100, timeout=30)) > 0
        assert len(await read_all(engine, "orders")) >= 100


def test_it_grows_to_three_nodes_that_do_without_the_first(tmp_path: Path) -> None:
    run(write(tmp_path / "data" / "node-1"))
    with cluster(tmp_path) as running:
        run(grown(running), 120)
        for topic in ("__cluster", "__groups", "orders"):
            wait_until(partial(all_three, running, topic), f"three hold {topic}", 60)
        running.run("cluster", "kill", "node-1")
        run(without_the_first(running), 120)
        running.up()
        run(complete(running), 120)
