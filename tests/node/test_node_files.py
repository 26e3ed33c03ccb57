"""Node files: written once, readable, and never in silent disagreement."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from aegis_cluster.config import load_streaming_config
from aegis_cluster.errors import ConfigError
from aegis_cluster.keys import load_pair
from aegis_cluster.node.node_files import Wanted, bootstrap_of, ensure_nodes, load_nodes
from aegis_cluster.node.node_security import node_keys

ROOT = Path(__file__).parents[2]


def test_what_is_written_reads_back_as_one_cluster(tmp_path: Path) -> None:
    nodes = ensure_nodes(tmp_path, Wanted(nodes=3))
    assert [node.name for node in nodes] == ["node-1", "node-2", "node-3"]
    assert [node.config.node_id for node in nodes] == [1, 2, 3]
    assert [node.config.base_port for node in nodes] == [7100, 7200, 7300]
    assert nodes[1].config.data == tmp_path / "data" / "node-2"
    assert bootstrap_of(nodes) == "tcp://127.0.0.1:7101,tcp://127.0.0.1:7201,tcp://127.0.0.1:7301"
    assert sorted(path.name for path in (tmp_path / "nodes").iterdir()) == [
        "node-1.toml",
        "node-2.toml",
        "node-3.toml",
    ]


def test_a_secure_cluster_has_keys_and_a_client_that_has_one_too(tmp_path: Path) -> None:
    nodes = ensure_nodes(tmp_path, Wanted(nodes=2, secure=True))
    keys = [node_keys(node.config) for node in nodes]
    client = load_streaming_config(tmp_path / "aegis.toml").security
    assert client.key is not None
    assert client.servers == tmp_path / "nodes" / "keys" / "peers"
    for mine in keys:
        assert mine is not None
        assert sorted(mine.peers.names.values()) == ["node-1", "node-2"]
        assert load_pair(client.key).public in mine.clients.names
    again = ensure_nodes(tmp_path, Wanted(secure=True))
    assert [node_keys(node.config).links.own for node in again] == [k.links.own for k in keys]  # type: ignore[union-attr]


def test_keys_that_nobody_would_use_are_not_made(tmp_path: Path) -> None:
    (tmp_path / "aegis.toml").write_text("[streaming]\n")
    with pytest.raises(ConfigError, match="Add these lines"):
        ensure_nodes(tmp_path, Wanted(secure=True))
    ensure_nodes(tmp_path, Wanted())
    with pytest.raises(ConfigError, match="--secure does not agree"):
        ensure_nodes(tmp_path, Wanted(secure=True))


def test_the_default_is_three_nodes_of_one_shard(tmp_path: Path) -> None:
    nodes = ensure_nodes(tmp_path, Wanted())
    assert [node.config.shards for node in nodes] == [1, 1, 1]


def test_ten_nodes_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    nodes = ensure_nodes(tmp_path, Wanted(nodes=11))
    assert [node.name for node in nodes] == [f"node-{number}" for number in range(1, 12)]


def test_the_nodes_of_this_project_are_what_up_writes(tmp_path: Path) -> None:
    ensure_nodes(tmp_path, Wanted(nodes=3))
    for written in (tmp_path / "nodes").iterdir():
        assert (ROOT / "nodes" / written.name).read_text() == written.read_text()


def test_files_that_are_there_are_left_alone(tmp_path: Path) -> None:
    ensure_nodes(tmp_path, Wanted(nodes=1, shards=2, base_port=8000))
    file = tmp_path / "nodes" / "node-1.toml"
    changed = file.read_text().replace('name = "node-1"', 'name = "one"')
    file.write_text(changed)
    nodes = ensure_nodes(tmp_path, Wanted(nodes=1, shards=2, base_port=8000))
    assert [node.name for node in nodes] == ["one"]
    assert file.read_text() == changed
    assert tomllib.loads(changed)["node"]["base_port"] == 8100


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(nodes=5), r"--nodes 5 does not agree .* has 3 nodes"),
        (Wanted(shards=2), r"--shards 2 does not agree .*node-1.toml says 1"),
        (Wanted(base_port=8000), r"--base-port 8000 does not agree .* says 7100, not 8100"),
    ],
)
def test_options_must_agree_with_what_is_there(tmp_path: Path, wanted: Wanted, says: str) -> None:
    ensure_nodes(tmp_path, Wanted(nodes=3))
    with pytest.raises(ConfigError, match=says):
        ensure_nodes(tmp_path, wanted)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(nodes=0), "0 nodes; allowed: 1 to"),
        (Wanted(nodes=33), "33 nodes; allowed: 1 to"),
        (Wanted(shards=11), "11 shards take more than the 100 ports"),
        (Wanted(base_port=65_400), "take the ports up to"),
        (Wanted(base_port=0), "allowed are 1024 to 65535"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, wanted: Wanted, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ensure_nodes(tmp_path, wanted)
    assert not (tmp_path / "nodes").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "node-2"', 'name = "node-1"', "have the same `node.name`: node-1"),
        ("../data/node-2", "../data/node-1", "have the same `node.data`"),
        ("base_port = 7200", "base_port = 7100", "have the same `node.base_port`"),
        (', "127.0.0.1:7300"]', "]", "list different `node.peers`"),
    ],
)
def test_files_that_are_not_one_cluster(tmp_path: Path, old: str, new: str, says: str) -> None:
    ensure_nodes(tmp_path, Wanted(nodes=3))
    file = tmp_path / "nodes" / "node-2.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_nodes(tmp_path)


def test_a_missing_file_is_named_by_its_address(tmp_path: Path) -> None:
    ensure_nodes(tmp_path, Wanted(nodes=3))
    (tmp_path / "nodes" / "node-3.toml").unlink()
    with pytest.raises(ConfigError, match=r"no file for 127\.0\.0\.1:7300"):
        load_nodes(tmp_path)


def test_no_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`aegis cluster up` writes them"):
        load_nodes(tmp_path)
