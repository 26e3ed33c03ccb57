"""The commands on a real cluster of three nodes: processes, ports, signals and all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from aegis_cluster.node.free_ports import can_bind, free_base_port
from aegis_cluster.node.node_files import LocalNode, load_nodes
from aegis_cluster.node.run_file import read_run_file
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "flights-sample.csv.gz"

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class Directory:
    """A directory with a cluster in it, and the program `aegis` run there."""

    def __init__(self, path: Path, base_port: int) -> None:
        self.path = path
        self.base_port = base_port
        path.mkdir(exist_ok=True)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """`aegis …`, running."""
        return subprocess.Popen(
            [sys.executable, "-m", "aegis_cluster.cli", *arguments],
            cwd=self.path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """`aegis …` to its end; its output, and for a failure what it said."""
        with self.start(*arguments, stdin=subprocess.DEVNULL) as process:
            out, error = process.communicate(timeout=100)
        assert process.returncode == code, f"{arguments}: {error.decode()}"
        return (error if code else out).decode()

    def up(self, *, code: int = 0) -> str:
        return self.run(
            "cluster", "up", "--nodes", "3", "--base-port", f"{self.base_port}", code=code
        )

    def status(self) -> dict[str, Any]:
        view: dict[str, Any] = json.loads(self.run("cluster", "status", "--json"))
        return view

    def alive(self) -> list[str]:
        return [node["name"] for node in self.status()["nodes"] if node["alive"]]

    def in_sync(self, topic: str) -> bool:
        found = json.loads(self.run("topic", "describe", topic, "--json"))
        return all(
            set(partition["in_sync"]) == set(partition["replicas"])
            for partition in found["partitions"]
        )

    def nodes(self) -> list[LocalNode]:
        return load_nodes(self.path)

    def processes(self, name: str) -> list[psutil.Process]:
        """Supervisor and shards of a node."""
        (node,) = (node for node in self.nodes() if node.name == name)
        run = read_run_file(node.config.data)
        assert run is not None
        supervisor = psutil.Process(run.mark.pid)
        return [supervisor, *supervisor.children()]

    def consume(self, topic: str, *options: str) -> list[dict[str, Any]]:
        arguments = ("--from", "earliest", "--to-end", "--format", "json", *options)
        lines = self.run("consume", topic, *arguments).splitlines()
        return [json.loads(line) for line in lines]


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def cluster(module_path: Path) -> Iterator[Directory]:
    directory = Directory(module_path, free_base_port())
    directory.up()
    yield directory
    directory.run("cluster", "down")
    assert all(can_bind(node.config.base_port + 1) for node in directory.nodes())


@pytest.fixture
def whole(cluster: Directory) -> Directory:
    """The cluster with all of its nodes running."""
    cluster.up()
    return cluster


def test_status_has_the_promised_shape(whole: Directory) -> None:
    whole.run("topic", "create", "shape", "--partitions", "2", "--replication-factor", "3")
    view = whole.status()
    assert [node["name"] for node in view["nodes"]] == ["node-1", "node-2", "node-3"]
    assert all(node["alive"] for node in view["nodes"])
    assert view["nodes"][0]["endpoint"] == f"tcp://127.0.0.1:{whole.base_port + 101}"
    (topic,) = (topic for topic in view["topics"] if topic["name"] == "shape")
    for number, partition in enumerate(topic["partitions"]):
        assert partition["partition"] == number
        assert sorted(partition["replicas"]) == ["node-1", "node-2", "node-3"]
        assert {"leader", "in_sync", "log_start", "high_watermark"} <= partition.keys()
    assert "node-1" in whole.run("cluster", "status")
    whole.run("topic", "delete", "shape")
    assert "shape" not in json.loads(whole.run("topic", "list", "--json"))
    assert "shape" in whole.run("topic", "describe", "shape", code=1)


def test_up_again_starts_nothing(whole: Directory) -> None:
    before = [process.pid for process in whole.processes("node-1")]
    assert "3 nodes serve" in whole.up()
    assert [process.pid for process in whole.processes("node-1")] == before


def test_a_file_goes_in_and_comes_out(whole: Directory) -> None:
    whole.run("topic", "create", "flights", "--partitions", "3")
    whole.run(
        "publish", "flights", "--file", str(SAMPLE), "--key", "tailnum", "--no-key-value", "NA"
    )
    messages = whole.consume("flights")
    assert len(messages) == 25_000
    assert {message["partition"] for message in messages} == {0, 1, 2}
    assert all(
        message["key"]
        == (None if message["payload"]["tailnum"] == "NA" else message["payload"]["tailnum"])
        for message in messages
    )
    assert len(whole.consume("flights", "--count", "7")) == 7


def test_a_pipe_is_published_as_it_comes_and_read_as_it_comes(whole: Directory) -> None:
    whole.run("topic", "create", "live")
    with (
        whole.start("consume", "live", "--from", "earliest", stdin=subprocess.DEVNULL) as reader,
        whole.start("publish", "live", stdin=subprocess.PIPE) as writer,
    ):
        assert writer.stdin is not None
        assert reader.stdout is not None
        for text in (b"one", b"two"):
            writer.stdin.write(text + b"\n")
            writer.stdin.flush()
            assert reader.stdout.readline().endswith(text + b"\n")
        writer.stdin.close()
        assert writer.wait(20) == 0
        reader.send_signal(signal.SIGINT)
        assert reader.wait(20) == 130
        assert b"Traceback" not in (reader.stderr.read() if reader.stderr else b"")


def test_a_reader_that_has_had_enough(whole: Directory) -> None:
    whole.run("topic", "create", "many")
    text = whole.path / "many.txt"
    text.write_text("".join(f"{number}\n" for number in range(20_000)))
    whole.run("publish", "many", "--file", str(text))
    with whole.start("consume", "many", "--from", "earliest") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_killed_node_costs_nothing_and_comes_back(whole: Directory) -> None:
    whole.run("topic", "create", "kept", "--partitions", "3", "--replication-factor", "3")
    text = whole.path / "kept.txt"
    text.write_text("".join(f"{number}\n" for number in range(1_000)))
    whole.run("publish", "kept", "--file", str(text))
    processes = whole.processes("node-2")
    assert len(processes) == 2
    whole.run("cluster", "kill", "node-2")
    assert not any(runs(process) for process in processes)
    assert whole.alive() == ["node-1", "node-3"]
    whole.run("publish", "kept", "--file", str(text))
    assert "does not run" in whole.run("cluster", "kill", "node-2", code=1)
    whole.run("cluster", "restart", "node-2")
    assert whole.alive() == ["node-1", "node-2", "node-3"]
    wait_until(lambda: whole.in_sync("kept"), "node-2 catches up", 30)
    read = sorted(int(message["payload"]) for message in whole.consume("kept"))
    assert read == sorted([*range(1_000), *range(1_000)])


def test_a_shard_that_dies_is_started_again(whole: Directory) -> None:
    supervisor, shard = whole.processes("node-1")
    shard.kill()
    wait_until(lambda: not runs(shard), "the shard is dead")
    wait_until(lambda: len(supervisor.children()) == 1, "there is a new one")
    wait_until(lambda: len(whole.alive()) == 3, "it serves", 30)
    assert "was ended by signal 9" in (whole.nodes()[0].config.data / "node.log").read_text()


def test_a_supervisor_that_dies_takes_its_shard_along(whole: Directory) -> None:
    supervisor, shard = whole.processes("node-3")
    supervisor.kill()
    wait_until(lambda: not runs(supervisor) and not runs(shard), "both are gone")
    whole.up()
    assert len(whole.alive()) == 3


def test_a_second_cluster_lives_beside_the_first(whole: Directory, tmp_path: Path) -> None:
    second = Directory(tmp_path / "second", free_base_port())
    try:
        second.up()
        second.run("topic", "create", "here")
        assert json.loads(second.run("topic", "list", "--json")) == ["here"]
        assert "here" not in json.loads(whole.run("topic", "list", "--json"))
    finally:
        second.run("cluster", "down")
    assert len(whole.alive()) == 3


def test_a_taken_port_is_named_and_the_next_up_mends_it(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "taken", free_base_port())
    port = directory.base_port + 201
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not of an earlier cluster
        taken.bind(("127.0.0.1", port))
        taken.listen()
        said = directory.up(code=1)
        assert "node-2 ended while starting" in said
        assert str(port) in said
    try:
        directory.up()
        assert len(directory.alive()) == 3
    finally:
        directory.run("cluster", "down")


def test_a_cluster_that_is_down_is_a_sentence(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "down", free_base_port())
    said = directory.run("cluster", "status", code=2)
    assert said.startswith("aegis: ")
    bootstrap = f"tcp://127.0.0.1:{directory.base_port + 101}"
    said = directory.run("topic", "list", "--bootstrap", bootstrap, "--timeout", "500ms", code=1)
    assert said.startswith("aegis: ")
    assert "Traceback" not in said
