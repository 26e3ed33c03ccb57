"""Identity of data directories: founders once, wiped disks as new members, half-done formatting."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import psutil
import pytest

from aegis_cluster.config import NodeAddress, NodeConfig
from aegis_cluster.errors import ConfigError, CorruptLog, NotReady
from aegis_cluster.node.identity import (
    Identity,
    check_identity,
    format_joining,
    format_nodes,
    lock_directory,
    read_identity,
)
from aegis_cluster.node.processes import mark_of
from aegis_cluster.node.run_file import write_run_file
from aegis_cluster.storage.disk import RealDisk, RealFile, remove_tree

if TYPE_CHECKING:
    from pathlib import Path


class StoppingDisk(RealDisk):
    """A disk that fails at its n-th change of the directory tree, and at all that follow."""

    def __init__(self, changes_left: int) -> None:
        self.changes_left = changes_left

    def _change(self) -> None:
        if self.changes_left == 0:
            raise OSError(errno.EIO, "stopped here")
        self.changes_left -= 1

    def open(self, path: str, *, create: bool = False) -> RealFile:
        if create:
            self._change()
        return super().open(path, create=create)

    def make_dir(self, path: str) -> None:
        self._change()
        super().make_dir(path)

    def rename(self, old: str, new: str) -> None:
        self._change()
        super().rename(old, new)

    def remove(self, path: str) -> None:
        self._change()
        super().remove(path)

    def sync_dir(self, path: str) -> None:
        self._change()
        super().sync_dir(path)


def configs_in(directory: Path, count: int = 3) -> list[NodeConfig]:
    peers = tuple(NodeAddress("127.0.0.1", 7000 + 100 * n) for n in range(1, count + 1))
    return [
        NodeConfig(f"node-{n}", peer.base_port, directory / "data" / f"node-{n}", peers)
        for n, peer in enumerate(peers, start=1)
    ]


def plan_in(directory: Path) -> str:
    return str(directory / "format-plan")


def check_founded(identities: list[Identity]) -> None:
    """All are founders of one cluster, each with an incarnation of its own."""
    assert len({identity.cluster_id for identity in identities}) == 1
    assert len({identity.incarnation for identity in identities}) == len(identities)
    own = [(identity.node, identity.incarnation) for identity in identities]
    for identity in identities:
        assert [(founder.node, founder.incarnation) for founder in identity.founders] == own


def test_empty_directories_become_founders(tmp_path: Path) -> None:
    disk, configs = RealDisk(), configs_in(tmp_path)
    identities = format_nodes(disk, configs, plan_in(tmp_path))
    check_founded(identities)
    assert [read_identity(disk, str(config.data)) for config in configs] == identities
    assert [founder.base_port for founder in identities[0].founders] == [7100, 7200, 7300]
    assert not disk.exists(plan_in(tmp_path))


def test_formatting_again_changes_nothing(tmp_path: Path) -> None:
    disk, configs = RealDisk(), configs_in(tmp_path)
    first = format_nodes(disk, configs, plan_in(tmp_path))
    assert format_nodes(disk, configs, plan_in(tmp_path)) == first


def test_a_wiped_directory_is_a_new_member_and_no_founder(tmp_path: Path) -> None:
    disk, configs = RealDisk(), configs_in(tmp_path)
    first = format_nodes(disk, configs, plan_in(tmp_path))
    remove_tree(disk, str(configs[1].data))
    second = format_nodes(disk, configs, plan_in(tmp_path))
    assert second[0] == first[0]
    assert second[2] == first[2]
    assert second[1].cluster_id == first[1].cluster_id
    assert second[1].node == first[1].node
    assert second[1].incarnation != first[1].incarnation
    assert second[1].founders == ()


def test_a_formatting_that_stops_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    """Whatever step fails, all nodes end as founders of one cluster, never some of two."""
    stopped = 0
    for changes in range(100):
        directory = tmp_path / str(changes)
        directory.mkdir()
        configs = configs_in(directory)
        try:
            format_nodes(StoppingDisk(changes), configs, plan_in(directory))
        except OSError:
            stopped += 1
        identities = format_nodes(RealDisk(), configs, plan_in(directory))
        check_founded(identities)
        assert not RealDisk().exists(plan_in(directory))
        if stopped <= changes:
            break
    assert stopped > 20


def test_the_plan_is_gone_before_anything_can_start(tmp_path: Path) -> None:
    """Else a directory that is wiped later would get its old incarnation back."""
    disk, configs = RealDisk(), configs_in(tmp_path)
    for changes in range(100):
        remove_tree(disk, str(tmp_path))
        tmp_path.mkdir()
        try:
            format_nodes(StoppingDisk(changes), configs, plan_in(tmp_path))
        except OSError:
            continue
        break
    assert not disk.exists(plan_in(tmp_path))


def test_a_plan_for_other_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="stopped here"):
        format_nodes(StoppingDisk(4), configs_in(tmp_path), plan_in(tmp_path))
    assert RealDisk().exists(plan_in(tmp_path))
    with pytest.raises(ConfigError, match="names other nodes than the node files do"):
        format_nodes(RealDisk(), configs_in(tmp_path, count=5), plan_in(tmp_path))


def test_a_plan_never_overwrites_an_identity(tmp_path: Path) -> None:
    configs = configs_in(tmp_path)
    with pytest.raises(OSError, match="stopped here"):
        format_nodes(StoppingDisk(4), configs, plan_in(tmp_path))
    format_joining(RealDisk(), configs[2], "elsewhere")
    with pytest.raises(ConfigError, match="which has its own identity"):
        format_nodes(RealDisk(), configs, plan_in(tmp_path))


def test_directories_of_two_clusters_do_not_mix(tmp_path: Path) -> None:
    disk, configs = RealDisk(), configs_in(tmp_path)
    format_nodes(disk, configs, plan_in(tmp_path))
    remove_tree(disk, str(configs[0].data))
    format_joining(disk, configs[0], "elsewhere")
    with pytest.raises(ConfigError, match="belong to different clusters"):
        format_nodes(disk, configs, plan_in(tmp_path))


def test_the_directory_of_another_node_is_refused(tmp_path: Path) -> None:
    disk, configs = RealDisk(), configs_in(tmp_path)
    identity = format_nodes(disk, configs, plan_in(tmp_path))[1]
    with pytest.raises(ConfigError, match="belongs to node 2, but node-1 is node 1"):
        check_identity(configs[0], identity)


def test_data_without_an_identity_is_not_a_new_directory(tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    with pytest.raises(CorruptLog, match="holds manifest but no `identity` file"):
        read_identity(RealDisk(), str(tmp_path))


def test_a_log_a_lock_and_half_a_write_are_no_data(tmp_path: Path) -> None:
    for name in ("node.log", "node.log.1", "lock", "node.run", "identity.tmp"):
        (tmp_path / name).write_bytes(b"x")
    assert read_identity(RealDisk(), str(tmp_path)) is None


def test_a_damaged_identity_is_told(tmp_path: Path) -> None:
    disk, configs = RealDisk(), configs_in(tmp_path)
    format_nodes(disk, configs, plan_in(tmp_path))
    file = configs[0].data / "identity"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptLog, match="identity"):
        read_identity(disk, str(configs[0].data))


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    disk = RealDisk()
    lock = lock_directory(disk, str(tmp_path))
    with pytest.raises(NotReady, match="is in use by another process"):
        lock_directory(disk, str(tmp_path))
    lock.release()
    lock_directory(disk, str(tmp_path)).release()


def test_the_holder_of_a_directory_is_named(tmp_path: Path) -> None:
    disk = RealDisk()
    some_word = psutil.Process().cmdline()[0]
    write_run_file(tmp_path, mark_of(os.getpid(), some_word), boot_id="b")
    lock = lock_directory(disk, str(tmp_path))
    with pytest.raises(NotReady, match=rf"process {os.getpid()} \(`aegis node run`, since 20"):
        lock_directory(disk, str(tmp_path))
    lock.release()
