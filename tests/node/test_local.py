"""`cluster up`, `down`, `kill`, `restart`, with nodes that are processes and nothing more."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from aegis_cluster import limits
from aegis_cluster.errors import ConfigError, NotReady, Unavailable, WrongCluster
from aegis_cluster.node.identity import read_identity
from aegis_cluster.node.local import LocalCluster
from aegis_cluster.node.node_files import LocalNode, Wanted, load_nodes
from aegis_cluster.node.run_file import read_run_file, running_mark
from aegis_cluster.storage.disk import RealDisk, remove_tree
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(60)]


class Cluster(LocalCluster):
    """Three fake nodes in a directory; the probe sees those whose run file is true."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[str] = []
        self.serving = True
        super().__init__(
            directory,
            probe=self.probe,
            tell=self.told.append,
            command=lambda file: [
                sys.executable, "-m", "tests.node.fake_node", "--config", str(file)
            ],
        )  # fmt: skip

    def nodes(self) -> list[LocalNode]:
        return load_nodes(self.directory)

    def probe(self, endpoint: str, timeout: float) -> dict[str, Any]:
        assert timeout > 0
        node = next(n for n in self.nodes() if n.config.endpoint == endpoint)
        if not self.serving or not self.serves(node):
            raise Unavailable(f"{endpoint} does not answer")
        seen = [{"name": n.name, "alive": self.serves(n)} for n in self.nodes()]
        return {"nodes": seen, "topics": []}

    def serves(self, node: LocalNode) -> bool:
        """It has written its run file itself, and is still there."""
        found = read_run_file(node.config.data)
        return found is not None and found.boot_id != "" and node.name in self.running()

    def running(self) -> list[str]:
        return [node.name for node in self.nodes() if running_mark(node.config.data) is not None]

    def pids(self) -> list[int]:
        found = [read_run_file(node.config.data) for node in self.nodes()]
        return [run.mark.pid for run in found if run is not None]

    def set_mode(self, name: str, mode: str) -> None:
        (self.directory / "data").mkdir(exist_ok=True)
        (self.directory / "data" / f"{name}.mode").write_text(mode)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(limits, "NODE_STOP_MS", 1_000)
    cluster = Cluster(tmp_path)
    yield cluster
    if (tmp_path / "nodes").exists():
        cluster.down()


ALL = ["node-1", "node-2", "node-3"]


def test_up_writes_formats_starts_and_waits(cluster: Cluster) -> None:
    nodes = cluster.up(Wanted(nodes=3))
    assert cluster.running() == ALL
    identities = [read_identity(RealDisk(), str(node.config.data)) for node in nodes]
    assert all(identity and len(identity.founders) == 3 for identity in identities)
    assert cluster.told[:3] == [f"starting {name}" for name in ALL]
    assert cluster.told[3:] == [f"{name} serves" for name in ALL]


def test_an_answer_from_another_cluster_is_not_taken_for_ours(cluster: Cluster) -> None:
    def other(endpoint: str, timeout: float) -> dict[str, Any]:
        return cluster.probe(endpoint, timeout) | {"cluster_id": "another"}

    cluster._probe = other
    with pytest.raises(WrongCluster, match="another --base-port"):
        cluster.up(Wanted(nodes=1))


def test_a_node_that_has_just_been_started_can_be_ended(cluster: Cluster) -> None:
    cluster.serving = False
    cluster.set_mode("node-1", "slow")
    with pytest.raises(Unavailable, match="did not serve in time"):
        cluster.up(Wanted(nodes=1), seconds=0.1)
    (pid,) = cluster.pids()
    assert [node.name for node in cluster.down()] == ["node-1"]
    assert not is_running(pid)


def test_nodes_lead_groups_of_their_own(cluster: Cluster) -> None:
    nodes = cluster.up(Wanted())
    groups = [read_run_file(node.config.data).mark.group for node in nodes]  # type: ignore[union-attr]
    assert groups == cluster.pids()


def test_down_ends_all_of_them_and_can_be_repeated(cluster: Cluster) -> None:
    cluster.up(Wanted())
    pids = cluster.pids()
    assert [node.name for node in cluster.down()] == ALL
    assert cluster.running() == []
    assert not any(is_running(pid) for pid in pids)
    assert cluster.down() == []


def test_up_starts_only_what_is_dead(cluster: Cluster) -> None:
    cluster.up(Wanted())
    before = cluster.pids()
    cluster.kill("node-2")
    assert cluster.running() == ["node-1", "node-3"]
    cluster.told.clear()
    cluster.up(Wanted())
    after = cluster.pids()
    assert cluster.told[0] == "starting node-2"
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1] != before[1]


def test_a_kill_ends_the_whole_group(cluster: Cluster) -> None:
    cluster.up(Wanted())
    run = read_run_file(cluster.nodes()[1].config.data)
    assert run is not None
    child = psutil.Process(int(run.boot_id))  # the fake node tells its child's pid there
    cluster.kill("node-2")
    assert not is_running(child.pid)
    with pytest.raises(NotReady, match="node-2 does not run"):
        cluster.kill("node-2")


def test_restart_of_a_running_and_of_a_dead_node(cluster: Cluster) -> None:
    cluster.up(Wanted())
    before = cluster.pids()
    cluster.restart("node-1")
    cluster.kill("node-3")
    cluster.restart("node-3")
    after = cluster.pids()
    assert cluster.running() == ALL
    assert after[1] == before[1]
    assert after[0] != before[0]
    assert after[2] != before[2]


def test_an_up_that_failed_half_way_is_mended_by_the_next(cluster: Cluster) -> None:
    cluster.set_mode("node-2", "die")
    with pytest.raises(
        Unavailable, match=r"node-2 ended while starting, with code 1:\n  port 7101"
    ):
        cluster.up(Wanted())
    cluster.set_mode("node-2", "")
    cluster.up(Wanted())
    assert cluster.running() == ALL


def test_a_wiped_node_comes_back_as_a_new_member(cluster: Cluster) -> None:
    nodes = cluster.up(Wanted())
    cluster.kill("node-3")
    remove_tree(RealDisk(), str(nodes[2].config.data))
    cluster.up(Wanted())
    identity = read_identity(RealDisk(), str(nodes[2].config.data))
    assert identity is not None
    assert identity.founders == ()


def test_nodes_that_do_not_serve_are_named_at_the_deadline(cluster: Cluster) -> None:
    cluster.serving = False
    with pytest.raises(Unavailable, match=r"node-1, node-2, node-3 did not serve in time: tcp://"):
        cluster.up(Wanted(), seconds=0.5)
    assert cluster.running() == ALL


def test_a_running_node_that_ends_while_others_start_is_told(cluster: Cluster) -> None:
    cluster.up(Wanted())
    cluster.kill("node-3")
    cluster.serving = False
    threading.Timer(0.3, lambda: cluster.kill("node-1")).start()
    with pytest.raises(Unavailable, match="node-1 has ended"):
        cluster.up(Wanted(), seconds=20)


def test_a_node_that_does_not_listen_is_killed(cluster: Cluster) -> None:
    cluster.set_mode("node-1", "stubborn")
    cluster.up(Wanted(nodes=1))
    cluster.down()
    assert "node-1 does not end by itself; it is killed" in cluster.told
    assert cluster.running() == []


def test_one_command_at_a_time(cluster: Cluster) -> None:
    cluster.serving = False
    failures: list[BaseException] = []

    def up() -> None:
        try:
            cluster.up(Wanted(), seconds=20)
        except Unavailable as error:
            failures.append(error)

    thread = threading.Thread(target=up)
    thread.start()
    wait_until(lambda: "starting node-3" in cluster.told, "the first command is at work")
    with pytest.raises(NotReady, match="another command is at work on the nodes in"):
        cluster.down()
    cluster.serving = True
    thread.join(20)
    assert failures == []


def test_unknown_nodes_and_no_nodes(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="holds no node files"):
        cluster.down()
    cluster.up(Wanted(nodes=1))
    with pytest.raises(ConfigError, match="there is no node node-9 here; nodes: node-1"):
        cluster.kill("node-9")


def test_files_that_may_not_be_read_are_not_called_missing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.up(Wanted(nodes=1))
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)
        with pytest.raises(ConfigError, match="nodes cannot be read: Permission denied"):
            cluster.down()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
