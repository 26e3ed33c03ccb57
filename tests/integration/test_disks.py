"""Damaged, emptied, foreign and full data directories of real nodes.

Nothing acknowledged is lost, what peers can mend is mended, and the rest is said in plain words.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.client.admin import shard_status
from aegis_cluster.engine import TopicConfig
from aegis_cluster.ids import ShardId
from aegis_cluster.node.identity import read_identity
from aegis_cluster.storage.disk import RealDisk
from tests.cli.test_real_cluster import ENVIRONMENT
from tests.integration.cluster import RunningCluster, cluster, read_all, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

NAMES = ("node-1", "node-2", "node-3")
COUNT = 2_000
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def nodes(module_path: Path) -> Iterator[RunningCluster]:
    with cluster(module_path) as running:
        yield running


@pytest.fixture
def whole(nodes: RunningCluster) -> RunningCluster:
    nodes.up()
    return nodes


def data_of(nodes: RunningCluster, name: str) -> Path:
    (node,) = (node for node in nodes.nodes() if node.name == name)
    return node.config.data


def node_log(nodes: RunningCluster, name: str) -> str:
    path = data_of(nodes, name) / "node.log"
    return path.read_text() if path.exists() else ""


def segments(nodes: RunningCluster, name: str, topic: str, suffix: str = "log") -> list[Path]:
    (directory,) = (data_of(nodes, name) / "partitions").glob(f"{topic}-0-g*")
    return sorted(directory.glob(f"*.{suffix}"))


def log_bytes(nodes: RunningCluster, name: str, topic: str) -> bytes:
    return b"".join(path.read_bytes() for path in segments(nodes, name, topic))


def publish(nodes: RunningCluster, topic: str, count: int = COUNT, size: int = 100) -> list[str]:
    payloads = [f"{number:08}".ljust(size, ".") for number in range(count)]

    async def test() -> None:
        async with nodes.engine() as engine:
            if topic not in await engine.list_topics():
                await engine.create_topic(topic, TopicConfig(replication_factor=3))
            await engine.publish_many(topic, payloads)

    run(test())
    return payloads


def read(nodes: RunningCluster, topic: str) -> list[Any]:
    found: list[Any] = []

    async def test() -> None:
        async with nodes.engine() as engine:
            found.extend(message.payload for message in await read_all(engine, topic))

    run(test())
    return found


def complaints(nodes: RunningCluster, name: str) -> list[str]:
    """What the node says in its status answer; one that does not answer says so."""
    (node,) = (node for node in nodes.status()["nodes"] if node["name"] == name)
    if not node["alive"]:
        return ["it does not answer"]
    return [one["why"] for shard in node["shards"] for one in shard["damaged"]]


def wait_whole(nodes: RunningCluster, name: str, topic: str, seconds: float = 60) -> None:
    wait_until(lambda: complaints(nodes, name) == [], f"{name} is whole", seconds)
    wait_until(lambda: nodes.in_sync(topic), f"all replicas of {topic} are in sync", seconds)
    others = [other for other in NAMES if other != name]
    wait_until(
        lambda: log_bytes(nodes, name, topic) == log_bytes(nodes, others[0], topic),
        "the files are the same",
        seconds,
    )


def memberships_settled(nodes: RunningCluster, name: str) -> bool:
    """Every group that has a leader counts the votes of this formatting of the node, and of three.

    Until then a group counts one voter that is gone for ever, and needs all others.
    """
    identity = read_identity(RealDisk(), str(data_of(nodes, name)))
    assert identity is not None
    leading = []
    for node in nodes.nodes():
        endpoint = node.config.control_endpoint(ShardId(0))
        status = asyncio.run(shard_status(endpoint, 5.0))
        leading += [one for one in status["replicas"] if one["role"] == "leader"]
    return all(
        identity.incarnation in one["incarnations"] and len(one["incarnations"]) == len(NAMES)
        for one in leading
    )


def settle_and_kill(nodes: RunningCluster, name: str) -> None:
    """End a node so that its segments, not its journal, hold all there is."""
    for _ in range(2):
        nodes.run("cluster", "kill", name)
        nodes.run("cluster", "restart", name)
    nodes.run("cluster", "kill", name)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("where", ["middle", "end", "index", "truncated"])
def test_a_damaged_segment_is_mended_from_the_other_nodes(
    whole: RunningCluster, where: str
) -> None:
    topic = f"flip-{where}"
    payloads = publish(whole, topic, size=1_000 if where == "middle" else 100)
    leader = asyncio.run(whole.leader_of(topic))
    name = next(other for other in NAMES if other != leader)
    settle_and_kill(whole, name)
    (path,) = segments(whole, name, topic)
    size = path.stat().st_size
    if where == "truncated":
        os.truncate(path, size // 2)
    elif where == "index":
        (path,) = segments(whole, name, topic, "index")
        flip(path, path.stat().st_size // 2)
    else:
        flip(path, size // 2 if where == "middle" else size - 20)
    whole.run("cluster", "restart", name)
    if where != "index":  # that one is derived, and made anew where it does not fit
        wait_until(lambda: "is damaged" in node_log(whole, name), "it says so", 30)
    wait_whole(whole, name, topic)
    assert read(whole, topic) == payloads
    if where != "index":
        assert "is whole again" in node_log(whole, name)


def test_damage_under_a_running_leader_is_met_and_mended(whole: RunningCluster) -> None:
    """Whoever meets it, a reader or the scrub: no process ends, and readers get everything."""
    topic = "rot"
    payloads = publish(whole, topic, size=1_000)
    for name in NAMES:  # so that nothing is in memory
        whole.run("cluster", "kill", name)
    whole.up()
    wait_until(lambda: whole.in_sync(topic), "all replicas are in sync", 60)
    leader = asyncio.run(whole.leader_of(topic))
    (path,) = segments(whole, leader, topic)
    flip(path, 9_000)
    assert read(whole, topic) == payloads
    wait_until(lambda: "is whole again" in node_log(whole, leader), "it is mended", 90)
    wait_whole(whole, leader, topic)
    assert read(whole, topic) == payloads
    assert not any("ended with code" in node_log(whole, name) for name in NAMES)


def test_an_emptied_node_joins_as_a_new_member(whole: RunningCluster) -> None:
    payloads = publish(whole, "wiped")
    whole.run("cluster", "kill", "node-3")
    shutil.rmtree(data_of(whole, "node-3"))
    whole.up()
    wait_until(lambda: whole.in_sync("wiped"), "the new member has caught up", 60)
    wait_whole(whole, "node-3", "wiped")
    wait_until(lambda: segments(whole, "node-3", "wiped") != [], "it holds a replica", 30)
    wait_until(lambda: memberships_settled(whole, "node-3"), "it has taken all places", 30)
    whole.run("cluster", "kill", "node-1")
    assert read(whole, "wiped") == payloads
    more = publish(whole, "wiped")
    whole.up()
    whole.run("cluster", "kill", "node-2")
    assert read(whole, "wiped") == payloads + more
    whole.up()


def test_a_directory_of_another_cluster_is_refused(whole: RunningCluster, tmp_path: Path) -> None:
    payloads = publish(whole, "stranger")
    whole.run("cluster", "kill", "node-2")
    data = data_of(whole, "node-2")
    data.rename(tmp_path / "kept")
    config = whole.path / "nodes" / "node-2.toml"
    whole.run("node", "format", "--config", str(config), "--join", "another-cluster")
    said = whole.up(code=2)
    assert "belong to different clusters" in said
    with whole.start("node", "run", "--config", str(config)) as process:
        try:
            words = "refuses us: This node belongs to cluster"
            wait_until(lambda: words in node_log(whole, "node-2"), "it is refused", 30)
        finally:
            process.terminate()
    shutil.rmtree(data)
    (tmp_path / "kept").rename(data)
    whole.up()
    wait_whole(whole, "node-2", "stranger")
    assert read(whole, "stranger") == payloads


def test_a_directory_in_use_is_refused(whole: RunningCluster) -> None:
    config = whole.path / "nodes" / "node-1.toml"
    said = whole.run("node", "run", "--config", str(config), code=1)
    assert "in use" in said
    assert len(whole.alive()) == 3


def test_two_emptied_nodes_of_three_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        payloads = publish(nodes, "kept", 500)
        kept = {}
        for name in ("node-2", "node-3"):
            nodes.run("cluster", "kill", name)
            kept[name] = tmp_path / f"kept-{name}"
            data_of(nodes, name).rename(kept[name])
        before = log_bytes(nodes, "node-1", "kept")
        with nodes.start("cluster", "up") as process:
            words = "2 of its 3 voters came back with empty data directories"
            wait_until(lambda: words in node_log(nodes, "node-1"), "it says so", 60)
            process.terminate()
        assert log_bytes(nodes, "node-1", "kept") == before
        for one in nodes.all_processes():
            one.kill()
        for name, path in kept.items():
            shutil.rmtree(data_of(nodes, name))
            path.rename(data_of(nodes, name))
        nodes.up()
        assert read(nodes, "kept") == payloads


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A file system of its own, in memory."""
    path.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill_up(directory: Path) -> Path:
    """What another program may do: take every byte there is. In one moment, or it would take what
    the node gives up of its reserve meanwhile, and not a byte would be left for its start."""
    path = directory / "somebody-elses-file"
    with path.open("wb") as file:
        while True:
            left = os.statvfs(directory)
            try:
                os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # else the node has written since we asked
                    raise
            else:
                return path


def test_a_full_disk_takes_nothing_and_recovers_by_itself(tmp_path: Path) -> None:
    small = tmp_path / "data" / "node-2"
    with small_disk(small, 200 * MIB), cluster(tmp_path) as nodes:
        payloads = publish(nodes, "kept")
        ballast = fill_up(small)
        wait_until(lambda: "is full" in node_log(nodes, "node-2"), "it says so", 30)
        assert any("is full" in why for why in complaints(nodes, "node-2"))
        more = publish(nodes, "kept", 4_000, 1_000)
        assert not nodes.in_sync("kept")
        assert asyncio.run(nodes.leader_of("kept")) != "node-2"
        nodes.run("cluster", "kill", "node-2")
        nodes.run("cluster", "restart", "node-2")  # a start must find its way as well
        ballast.unlink()
        wait_until(lambda: "has room again" in node_log(nodes, "node-2"), "it goes on", 30)
        wait_whole(nodes, "node-2", "kept")
        assert sorted(read(nodes, "kept")) == sorted(payloads + more)
        # Now the log itself fills the disk; deleting a topic makes room.
        publish(nodes, "large", 60_000, 1_000)
        wait_until(lambda: complaints(nodes, "node-2") != [], "the disk is full", 30)
        nodes.run("topic", "delete", "large")
        wait_until(lambda: complaints(nodes, "node-2") == [], "there is room again", 30)
        again = publish(nodes, "kept", 100)
        wait_whole(nodes, "node-2", "kept")
        assert sorted(read(nodes, "kept")) == sorted(payloads + more + again)
        nodes.down()


FAILING_SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
int fdatasync(int file) {
    const char *order = getenv("FAIL_ONE_SYNC");
    if (order && unlink(order) == 0) { errno = EIO; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, "fdatasync"))(file);
}
"""


def test_a_failed_sync_ends_the_process_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library, order = (tmp_path / name for name in ("sync.c", "sync.so", "order"))
    source.write_text(FAILING_SYNC)
    if shutil.which("gcc") is None:
        pytest.skip("there is no compiler for the library that lets a sync fail")
    build = ["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(build, check=True)
    monkeypatch.setitem(ENVIRONMENT, "LD_PRELOAD", str(library))
    monkeypatch.setitem(ENVIRONMENT, "FAIL_ONE_SYNC", str(order))
    with cluster(tmp_path / "cluster") as nodes:
        acknowledged = publish(nodes, "kept")
        for _ in range(4):  # each time it hits whoever syncs first
            order.touch()
            acknowledged += publish(nodes, "kept", 200)
            wait_until(lambda: not order.exists(), "a sync has failed", 20)
        wait_until(lambda: len(nodes.alive()) == 3, "all shards run again", 60)
        wait_until(lambda: nodes.in_sync("kept"), "and hold everything", 60)
        said = "".join(node_log(nodes, name) for name in NAMES)
        assert said.count("stops using its files") >= 4
        assert said.count("ended because its disk failed") >= 4, "exit code 4, and a new start"
        assert sorted(read(nodes, "kept")) == sorted(acknowledged)


def test_a_node_with_a_large_log_is_ready_soon(tmp_path: Path) -> None:
    """Checkpoints, not a full scan; 964 MB were ready 0.6 to 0.8 s after the start by hand."""
    with cluster(tmp_path, nodes=1) as nodes:
        rows = [os.urandom(1_000) for _ in range(20_000)]

        async def fill() -> None:
            async with nodes.engine() as engine:
                await engine.create_topic("large", TopicConfig(partitions=2))
                for _ in range(10):
                    await engine.publish_many("large", rows)

        run(fill(), 100)
        nodes.run("cluster", "kill", "node-1")
        started = time.monotonic()
        nodes.run("cluster", "restart", "node-1")
        assert time.monotonic() - started < 6, "the command line's own start included"
        times = [
            datetime.fromisoformat(line.split()[0])
            for line in node_log(nodes, "node-1").splitlines()
            if "shard 0 starts" in line or " serves at " in line
        ]
        assert times[-1] - times[-2] < timedelta(seconds=3)
