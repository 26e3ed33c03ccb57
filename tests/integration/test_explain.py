"""`aegis explain` in real trouble: a consumer that is stuck, a node and then a majority that is
away."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Offset, SubscribeConfig, TopicConfig
from tests.integration.cluster import RunningCluster, cluster, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]


async def explained(nodes: RunningCluster, *what: str) -> dict[str, Any]:
    told = await asyncio.to_thread(nodes.run, "explain", *what, "--json")
    found: dict[str, Any] = json.loads(told)
    return found


def codes(found: dict[str, Any]) -> list[str]:
    return [finding["code"] for finding in found["findings"]]


async def until_said(nodes: RunningCluster, code: str, *what: str) -> dict[str, Any]:
    """Nodes take a moment to notice."""
    found: dict[str, Any] = {}
    async with asyncio.timeout(40):
        while code not in codes(found or {"findings": []}):
            found = await explained(nodes, *what)
    wanted: dict[str, Any] = next(one for one in found["findings"] if one["code"] == code)
    return wanted | found


async def until_all(nodes: RunningCluster, wanted: list[str], *what: str) -> None:
    """A replica of a new partition is behind for a moment."""
    async with asyncio.timeout(40):
        while codes(await explained(nodes, *what)) != wanted:
            pass


def test_a_stuck_consumer_and_nodes_that_are_away(tmp_path: Path) -> None:
    async def test(nodes: RunningCluster) -> None:
        async with nodes.engine() as engine:
            await engine.create_topic("orders", TopicConfig(partitions=2))
            await until_all(nodes, ["serves", "serves"], "partition", "orders")
            config = SubscribeConfig(group_id="billing", start=Offset.EARLIEST)
            async with engine.subscribe("orders", config) as subscriber:
                await engine.publish_many("orders", range(200), keys=map(str, range(200)))
                await subscriber.poll(500, timeout=10)  # and acks none of them
                found = await until_said(
                    nodes, "not_committing", "group", "billing", "--watch", "0.5s"
                )
                assert found["blocked"]
                assert "orders/0 and orders/1" in found["what"]
                assert "200 messages wait" in found["what"]
            found = await until_said(nodes, "no_members", "group", "billing", "--watch", "0.1s")
            assert "200 messages wait in 2 partitions" in found["what"]
        said = await asyncio.to_thread(nodes.run, "explain", "partition", "nothing/0", code=2)
        assert "no partition" in said
        await asyncio.to_thread(nodes.run, "cluster", "kill", "node-3")
        found = await until_said(nodes, "replica_missing", "partition", "orders/0")
        assert not found["blocked"]
        assert "node-3 does not answer" in found["what"]
        await asyncio.to_thread(nodes.run, "cluster", "kill", "node-2")
        found = await until_said(nodes, "no_quorum", "partition", "orders/0")
        assert found["blocked"]
        assert set(found["who"]) == {"node-2", "node-3"}
        assert "needs 2 of 3 replicas and has 1" in found["what"]
        found = await until_said(nodes, "no_coordinator", "group", "billing", "--watch", "0.1s")
        assert "node-2 and node-3" in found["what"]

    with cluster(tmp_path) as nodes:
        run(test(nodes), 110)
