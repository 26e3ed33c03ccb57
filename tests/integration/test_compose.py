"""docker-compose.cluster.yml and what its containers run, without docker: three nodes in a
directory, each with volumes of its own, at three addresses of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from aegis_cluster.keys import load_pair, load_public
from aegis_cluster.node.free_ports import free_base_port
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.cluster.yml"
NODES = ("node-1", "node-2", "node-3")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return found


def test_the_file_has_three_nodes_each_with_its_own_volume_and_health_check() -> None:
    file = compose()
    services = file["services"]
    assert set(services) == {"format", *NODES, "client"}
    for name in NODES:
        service = services[name]
        assert service["command"] == ["run", name]
        assert service["hostname"] == name
        assert service["healthcheck"]["test"] == ["CMD", "aegis-entrypoint", "health", name]
        assert service["depends_on"] == {"format": {"condition": "service_completed_successfully"}}
        mounted = {volume.split(":")[0] for volume in service["volumes"]}
        assert mounted == {name, "public"}, "no node sees another's secret"
        assert "ports" not in service
    assert {volume.split(":")[0] for volume in services["format"]["volumes"]} == set(
        file["volumes"]
    )
    assert {volume.split(":")[0] for volume in services["client"]["volumes"]} == {
        "client",
        "public",
    }
    dockerfile = ROOT / services["node-1"]["build"]["dockerfile"]
    assert "COPY nodes/entrypoint" in dockerfile.read_text(encoding="utf-8")


def test_the_file_is_what_docker_takes() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], check=False).returncode:
        pytest.skip("docker compose is not at hand")
    command = [docker, "compose", "--file", str(COMPOSE), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


class Containers:
    """The volumes of the containers in a directory; `run` is what a container does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base_port = free_base_port() + 70
        self.etc = home / "etc"
        self.etc.mkdir(parents=True)
        for name in NODES:
            text = (ROOT / "nodes" / "docker" / f"{name}.toml").read_text(encoding="utf-8")
            text = text.replace('bind = "0.0.0.0"', "").replace("/var/lib/aegis", str(home))
            text = text.replace("7100", str(self.base_port))
            for number, host in enumerate(NODES, start=1):
                text = text.replace(f'host = "{host}"', f'host = "127.0.0.{number}"')
                text = text.replace(f'"{host}:', f'"127.0.0.{number}:')
            (self.etc / f"{name}.toml").write_text(text, encoding="utf-8")
        self.running: dict[str, subprocess.Popen[str]] = {}

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "AEGIS_ETC": str(self.etc),
            "AEGIS_HOME": str(self.home),
            "AEGIS_BOOTSTRAP": ",".join(
                f"tcp://127.0.0.{number}:{self.base_port + 1}" for number in (1, 2, 3)
            ),
        }
        return subprocess.Popen(
            [str(ROOT / "nodes" / "entrypoint"), *words],
            cwd=self.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        with self.start(*words) as process:
            said, _ = process.communicate(timeout=100)
        return process.returncode, said

    def serves(self, name: str) -> bool:
        return self.run("health", name)[0] == 0

    def up(self) -> None:
        code, said = self.run("format")
        assert code == 0, said
        for name in NODES:
            self.running[name] = self.start("run", name)

    def down(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        self.running.clear()


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    made = Containers(tmp_path / "aegis")
    yield made
    made.down()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_entry_point_makes_keys_and_serves(containers: Containers) -> None:
    containers.up()
    for name in NODES:
        wait_until(partial(containers.serves, name), name, 120)
    pairs = {name: load_pair(containers.home / name / "secret" / f"{name}.key") for name in NODES}
    public = containers.home / "public"
    for name, pair in pairs.items():
        assert load_public(public / "peers" / f"{name}.pub") == (name, pair.public)
    assert len({pair.public for pair in pairs.values()}) == 3
    assert not list(public.rglob("*.key")), "secrets are shared with nobody"
    code, said = containers.run("topic", "create", "orders", "--partitions", "2")
    assert code == 0, said
    containers.down()
    containers.up()
    code, said = containers.run("topic", "describe", "orders", "--json", "--timeout", "60s")
    assert code == 0, said
    assert len(json.loads(said)["partitions"]) == 2
    for name, pair in pairs.items():
        assert load_pair(containers.home / name / "secret" / f"{name}.key") == pair, "made once"
