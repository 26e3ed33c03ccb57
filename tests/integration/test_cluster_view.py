"""The cluster view of real nodes: its leader killed and paused, its library and address taken away.

What must hold every time: status is right about nodes, leaders and replicas, messages flow, and the
figures come back by themselves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from aegis_cluster.client.admin import cluster_status
from aegis_cluster.client.cluster import ClusterClient
from aegis_cluster.client.leases import Lease, Leases
from aegis_cluster.config import view_endpoint
from aegis_cluster.engine import TopicConfig
from aegis_cluster.errors import LeaseHeld
from aegis_cluster.message import Message
from aegis_cluster.node.run_file import read_run_file
from tests.cli.test_real_cluster import ENVIRONMENT
from tests.integration.cluster import RunningCluster, cluster, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

BREAKS = "AEGIS_TEST_BREAKS_THE_VIEW"
SITECUSTOMIZE = f'''
import os, sys

if "run" in sys.orig_argv:  # of `aegis node run`
    from pysyncobj.syncobj import SyncObj

    tick = SyncObj._onTick

    def on_tick(self, wait_s=0.0):
        if os.path.exists(os.environ["{BREAKS}"]):
            raise RuntimeError("planted")
        tick(self, wait_s)

    SyncObj._onTick = on_tick
'''
"""Has PySyncObj's tick raise in every supervisor while a file is there."""


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, the library raises in every supervisor."""
    return tmp_path_factory.mktemp("switch") / "broken"


@pytest.fixture(scope="module")
def nodes(module_path: Path, switch: Path) -> Iterator[RunningCluster]:
    hooks, place = module_path / "hooks", module_path / "view"
    hooks.mkdir()
    place.mkdir()
    (hooks / "sitecustomize.py").write_text(SITECUSTOMIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "PYTHONPATH", f"{hooks}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}")
        patch.setitem(ENVIRONMENT, BREAKS, str(switch))
        with cluster(place, shards=2) as running:
            yield running


@pytest.fixture
def whole(nodes: RunningCluster, switch: Path) -> RunningCluster:
    """All nodes running, and the view with all of their figures."""
    switch.unlink(missing_ok=True)
    nodes.up()
    wait_until(lambda: is_whole(status(nodes)), "the view is whole", 40)
    return nodes


def status(nodes: RunningCluster) -> Any:
    return asyncio.run(cluster_status(nodes.bootstrap, 10.0))


def is_whole(found: Any) -> bool:
    shards = [shard for node in found["nodes"] for shard in node["shards"]]
    return (
        found["view"]["state"] == "up"
        and all(node["alive"] and node.get("announced") for node in found["nodes"])
        and all("memory_bytes" in shard.get("load", {}) for shard in shards)
    )


def view_leader(nodes: RunningCluster) -> str:
    return str(status(nodes)["view"]["leader"])


def supervisor_pid(nodes: RunningCluster, name: str) -> int:
    (data,) = (node.config.data for node in nodes.nodes() if node.name == name)
    found = read_run_file(data)
    assert found is not None
    return found.mark.pid


def test_status_shows_since_when_where_and_under_what_load(whole: RunningCluster) -> None:
    found = status(whole)
    assert [node["name"] for node in found["nodes"]] == ["node-1", "node-2", "node-3"]
    assert found["view"]["leader"] in {"node-1", "node-2", "node-3"}
    for node in found["nodes"]:
        assert time.time() - 600 < node["since_ms"] / 1000 <= time.time() + 1
        assert node["load"]["disk_free_bytes"] > 0
        assert node["load"]["memory_free_bytes"] > 0
        assert [shard["shard"] for shard in node["shards"]] == [0, 1]
        for shard in node["shards"]:
            assert shard["load"]["memory_bytes"] > 1_000_000
    shown = whole.run("cluster", "status", "--bootstrap", whole.bootstrap)
    assert "disk free" in shown
    assert "no load figures" not in shown


def test_a_killed_leader_of_the_view(whole: RunningCluster) -> None:
    leader = view_leader(whole)
    whole.run("cluster", "kill", leader)
    wait_until(
        lambda: status(whole)["view"].get("leader") not in (None, leader), "a new leader", 30
    )
    found = {node["name"]: node for node in status(whole)["nodes"]}
    assert not found[leader]["alive"]
    assert all(node["alive"] for name, node in found.items() if name != leader)
    whole.up()
    wait_until(lambda: is_whole(status(whole)), "the view is whole again", 40)


def test_a_paused_supervisor_costs_figures_and_nothing_else(whole: RunningCluster) -> None:
    """Its shards go on: the node is alive, leads what it led, and takes messages."""

    async def publish(topic: str) -> None:
        async with whole.engine() as engine:
            await engine.create_topic(topic, TopicConfig(partitions=3), exist_ok=True)
            for number in range(30):
                await engine.publish(topic, Message(key=str(number), payload=number))

    run(publish("paused"))
    leader = view_leader(whole)
    pid = supervisor_pid(whole, leader)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: status(whole)["view"].get("leader") not in (None, leader), "another", 30)
        found = status(whole)
        assert all(node["alive"] for node in found["nodes"])
        assert all(part["leader"] for topic in found["topics"] for part in topic["partitions"])
        own = {node["name"]: node["view"]["state"] for node in found["nodes"]}
        assert own[leader] == "down"
        run(publish("paused"))
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: is_whole(status(whole)), "the view is whole again", 40)
    assert view_leader(whole) != leader


def test_a_library_that_raises_everywhere(whole: RunningCluster, switch: Path) -> None:
    switch.touch()
    wait_until(lambda: status(whole)["view"]["state"] == "down", "the view is down", 30)
    found = status(whole)
    assert all(node["alive"] for node in found["nodes"])
    assert found["view"]["why"]
    shown = whole.run("cluster", "status", "--bootstrap", whole.bootstrap)
    assert "no load figures and no leases just now" in shown

    async def publish() -> None:
        async with whole.engine() as engine:
            await engine.create_topic("broken", exist_ok=True)
            await engine.publish("broken", Message(payload=1))

    run(publish())
    whole.run("cluster", "restart", "node-2")  # neither does a node need it to start
    assert all(node["alive"] for node in status(whole)["nodes"])
    switch.unlink()
    wait_until(lambda: is_whole(status(whole)), "the view is whole again", 60)


def test_leases_of_two_clients_while_the_view_loses_its_leader(whole: RunningCluster) -> None:
    async def test() -> None:
        clients = [ClusterClient(whole.bootstrap.split(",")) for _ in range(2)]
        try:
            for client in clients:
                await client.connect(client.deadline(20))
            first, second = (Leases(client) for client in clients)
            async with await first.acquire("cdc/shop", ttl=5.0, holder="a", timeout=20) as held:
                with pytest.raises(LeaseHeld, match="a#"):
                    await second.acquire("cdc/shop", ttl=5.0, timeout=20)
                leader = await asyncio.to_thread(view_leader, whole)
                assert "cdc/shop" in await asyncio.to_thread(shown_leases, whole)
                await asyncio.to_thread(whole.run, "cluster", "kill", leader)
                taken = asyncio.create_task(wait_for(second, held))
                await asyncio.sleep(6.0)  # longer than the lease: it has been renewed meanwhile
                assert held.is_valid
                assert not taken.done()
            lease = await taken
            assert lease.is_valid
            assert not held.is_valid
            assert lease.token > held.token
            await lease.release()
        finally:
            for client in clients:
                await client.close()

    async def wait_for(leases: Leases, held: Lease) -> Lease:
        lease = await leases.acquire("cdc/shop", ttl=5.0, holder="b", wait=True, timeout=60)
        assert not held.is_valid
        return lease

    run(test(), 120)


def shown_leases(nodes: RunningCluster) -> set[str]:
    return {lease["name"] for lease in status(nodes)["view"]["leases"]}


def test_a_taken_address_costs_that_node_s_part_alone(whole: RunningCluster) -> None:
    endpoint = view_endpoint("127.0.0.1", whole.base_port + 300)
    whole.run("cluster", "kill", "node-3")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as holder:
        wait_until(lambda: binds(holder, endpoint), "the address is free", 20)
        whole.up()
        found = {node["name"]: node for node in status(whole)["nodes"]}
        assert found["node-3"]["alive"]
        wait_until(
            lambda: endpoint in str(status(whole)["nodes"][2]["view"]["why"]), "it is named", 20
        )
    wait_until(lambda: is_whole(status(whole)), "the view is whole again", 40)


def binds(socket: zmq.Socket[bytes], endpoint: str) -> bool:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError:
        return False
    return True
