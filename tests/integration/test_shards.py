"""Nodes of several shards, and a number of shards that changes between runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.engine import TopicConfig
from aegis_cluster.message import Message
from tests.integration.cluster import RunningCluster, cluster, read_all, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]


async def _publish(running: RunningCluster, name: str, *, create: bool) -> None:
    async with running.engine() as engine:
        if create:
            await engine.create_topic(name, TopicConfig(partitions=5))
        keys = [f"k{number % 20}" for number in range(300)]
        await engine.publish_many(name, list(range(300)), keys)


async def _check(running: RunningCluster, name: str, times: int) -> None:
    async with running.engine() as engine:
        messages = await read_all(engine, name)
        assert sorted(m.payload for m in messages) == sorted(list(range(300)) * times)
        for key in {m.key for m in messages}:
            values = [m.payload for m in messages if m.key == key]
            assert values == sorted(values[: len(values) // times]) * times


def test_two_shards_on_each_of_three_nodes(tmp_path: Path) -> None:
    with cluster(tmp_path / "shards", shards=2) as running:
        run(_publish(running, "wide", create=True))
        view = running.status()
        assert [[s["shard"] for s in node["shards"]] for node in view["nodes"]] == [[0, 1]] * 3
        run(_check(running, "wide", 1))
        running.run("cluster", "kill", "node-2")
        run(_publish(running, "wide", create=False))
        running.run("cluster", "restart", "node-2")
        run(_check(running, "wide", 2))


def test_changing_the_number_of_shards_keeps_everything(tmp_path: Path) -> None:
    with cluster(tmp_path / "change", nodes=1, shards=1) as running:
        run(_publish(running, "kept", create=True))
        for times, shards in enumerate((3, 2, 1), start=1):
            running.down()
            running.set_shards(shards)
            running.up()
            run(_check(running, "kept", times))
            run(_publish(running, "kept", create=False))
        run(_one_more(running))


async def _one_more(running: RunningCluster) -> None:
    async with running.engine() as engine:
        await engine.create_topic("new")
        assert (await engine.publish("new", Message(payload=1))).offset == 0
