"""Real nodes on this machine, each a process group that can be killed, stopped or paused.

The idea: node files and identities are the product's (`write_nodes`, `format_nodes`), and so is
what runs; this module only starts processes and signals them, without waiting for health: a fault
does not wait until the cluster has got over the last one.

The rule it protects: nothing outlives the run. Nodes die with the process that started them, and
`close` ends what is left, each by its own process group.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from aegis_cluster.client.admin import cluster_status, shard_status
from aegis_cluster.config import PORTS_PER_SHARD, port_span
from aegis_cluster.errors import AegisError
from aegis_cluster.ids import ShardId
from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.identity import PLAN_NAME, format_nodes
from aegis_cluster.node.node_files import (
    NODES_DIRECTORY,
    LocalNode,
    Wanted,
    bootstrap_of,
    ensure_nodes,
    load_nodes,
)
from aegis_cluster.node.processes import wait_for_end
from aegis_cluster.storage.disk import RealDisk
from chaos.processes.injection import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[2]
END_MS: Final = 10_000
POLL_S: Final = 0.1
STATUS_S: Final = 3.0
"""In which a node says how it is."""


def environment(settings: Path) -> dict[str, str]:
    """Of every process of a run."""
    return {**os.environ, "PYTHONPATH": str(ROOT), SETTINGS: str(settings)}


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    paused: bool = False
    ending: bool = False


class ProcessCluster:
    """The nodes of one directory. To be used from the main thread (see `orphans`)."""

    def __init__(self, directory: Path, *, nodes: int = 3, shards: int = 1) -> None:
        self.directory = directory
        self.settings = directory / "settings.json"
        wanted = Wanted(nodes, shards, free_base_port(nodes, shards))
        self.nodes: dict[str, LocalNode] = {
            node.name: node for node in ensure_nodes(directory, wanted)
        }
        self.unexpected: list[str] = []
        """Nodes that ended though nobody had asked them to."""
        self._running: dict[str, _Running] = {}

    @property
    def bootstrap(self) -> str:
        return bootstrap_of(list(self.nodes.values()))

    def addresses(self, name: str) -> list[tuple[str, int]]:
        """Every address at which that node may be dialled."""
        config = self.nodes[name].config
        span = port_span(config.shards)
        ports = [p for p in range(span) if p % PORTS_PER_SHARD < 4]
        return [(config.host, config.base_port + port) for port in ports]

    def format(self) -> None:
        """Give empty directories their identities."""
        plan = self.directory / NODES_DIRECTORY / PLAN_NAME
        configs = [node.config for node in load_nodes(self.directory)]
        format_nodes(RealDisk(), configs, str(plan))

    # ---- processes

    def alive(self, name: str) -> bool:
        running = self._running.get(name)
        if running is None:
            return False
        code = running.process.poll()
        if code is None:
            return True
        if not running.ending:
            self.unexpected.append(f"{name} ended by itself with code {code}")
        del self._running[name]
        return False

    def start(self, name: str) -> None:
        """Start it if it does not run; does not wait until it serves."""
        running = self._running.get(name)
        if running is not None and running.ending:
            self._wait_for_end(name)
        if self.alive(name):
            return
        node = self.nodes[name]
        with (self.directory / f"{name}.out").open("ab") as said:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "chaos.processes.node",
                    "--config", str(node.file),
                    "--parent-pid", str(os.getpid()),
                ],
                cwd=self.directory,
                env=environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )  # fmt: skip
        self._running[name] = _Running(process)

    def stop(self, name: str) -> None:
        """Ask it to end in order; `start` waits for that."""
        if self.alive(name):
            running = self._running[name]
            running.ending = True
            running.process.send_signal(signal.SIGTERM)
            self._resume(running)

    def kill(self, *names: str) -> None:
        """SIGKILL to all processes of all of them, in one instant; waits until they are gone."""
        families = []
        hit = [name for name in names if self.alive(name)]
        for name in hit:
            families += _family(self._running[name].process.pid)
        for name in hit:
            os.killpg(self._running[name].process.pid, signal.SIGKILL)
        for name in hit:
            self._running.pop(name).process.wait()
        wait_for_end(families, END_MS)

    def pause(self, name: str) -> None:
        """SIGSTOP to all processes of a node."""
        if self.alive(name) and not self._running[name].ending:
            os.killpg(self._running[name].process.pid, signal.SIGSTOP)
            self._running[name].paused = True

    def resume(self, name: str) -> None:
        """SIGCONT."""
        if self.alive(name):
            self._resume(self._running[name])

    def _resume(self, running: _Running) -> None:
        if running.paused:
            os.killpg(running.process.pid, signal.SIGCONT)
            running.paused = False

    def _wait_for_end(self, name: str) -> None:
        try:
            self._running[name].process.wait(END_MS / 1000)
        except subprocess.TimeoutExpired:
            self.unexpected.append(f"{name} did not end by itself")
            self.kill(name)
        self._running.pop(name, None)

    def close(self) -> None:
        """End everything."""
        self.kill(*self.nodes)

    # ---- directories

    def data(self, name: str) -> Path:
        return self.nodes[name].config.data

    def wipe(self, name: str) -> None:
        """Lose the disk of a node that is down, and give it an empty one."""
        shutil.rmtree(self.data(name))
        self.format()

    # ---- what it says of itself

    def status(self, timeout: float = STATUS_S) -> dict[str, Any] | None:
        """As `aegis cluster status --json`, asked directly; None when nobody answers."""
        try:
            return asyncio.run(cluster_status(self.bootstrap, timeout))
        except AegisError:
            return None

    def leader(self, topic: str, partition: int) -> str | None:
        """The name of the node that leads, None while none does."""
        for found in _topics(self.status(), topic):
            leader = found["partitions"][partition]["leader"]
            return None if leader is None else str(leader)
        return None

    def troubles(self, topic: str | None = None) -> list[str]:
        """What is not as it should be: dead or damaged nodes, replicas without a leader or behind.

        topic: to be looked at too, besides the nodes.
        """
        view = self.status()
        if view is None:
            return ["no node answers"]
        found = [f"{node['name']} does not serve" for node in view["nodes"] if not node["alive"]]
        if len(view["nodes"]) < len(self.nodes):
            found.append("not all nodes are registered")
        for node in view["nodes"]:
            for shard in node["shards"]:
                found += [f"{node['name']}: {one['why']}" for one in shard.get("damaged", ())]
        for one in _topics(view, topic):
            found += _partition_troubles(one)
        return found or asyncio.run(self._strangers())

    async def _strangers(self) -> list[str]:
        """Groups whose voters are not exactly the present members: one whose disk was wiped is a
        new member, and until it has taken the old one's place there is a vote less to lose."""
        try:
            shards = [
                await shard_status(node.config.control_endpoint(ShardId(shard)), STATUS_S)
                for node in self.nodes.values()
                for shard in range(node.config.shards)
            ]
        except AegisError as error:
            return [str(error)]
        members = {shard["identity"]["incarnation"] for shard in shards}
        return [
            f"{replica['topic']}/{replica['partition']} has other voters than the present nodes"
            for shard in shards
            for replica in shard["replicas"]
            if replica["role"] == "leader" and set(replica["incarnations"]) != members
        ]

    def wait_whole(
        self, topic: str | None = None, *, seconds: float, tell: Callable[[str], None] | None = None
    ) -> list[str]:
        """Return as soon as nothing is wrong; at the deadline, what still is.

        tell: gets the first trouble, whenever it is another one.
        """
        return wait_for(lambda: self.troubles(topic), seconds, tell)


def wait_for(
    troubles: Callable[[], list[str]], seconds: float, tell: Callable[[str], None] | None = None
) -> list[str]:
    """Ask until there are none, or until the deadline; returns the last answer."""
    deadline = time.monotonic() + seconds
    told = ""
    while (found := troubles()) and time.monotonic() < deadline:
        if tell is not None and found[0] != told:
            told = found[0]
            tell(f"not whole: {told}")
        time.sleep(POLL_S)
    return found


def _topics(view: dict[str, Any] | None, topic: str | None) -> list[dict[str, Any]]:
    return [] if view is None else [one for one in view["topics"] if one["name"] == topic]


def _partition_troubles(topic: dict[str, Any]) -> list[str]:
    found = []
    for one in topic["partitions"]:
        place = f"{topic['name']}/{one['partition']}"
        if one["leader"] is None:
            found.append(f"{place} has no leader")
        elif set(one["in_sync"]) != set(one["replicas"]):
            found.append(f"{place}: of {one['replicas']} only {one['in_sync']} are in sync")
    return found


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
