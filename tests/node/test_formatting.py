"""Formatting nodes by their files: all founders at once, or one that joins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import ConfigError
from aegis_cluster.node.formatting import format_files
from aegis_cluster.node.node_files import Wanted, ensure_nodes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [node.file for node in ensure_nodes(tmp_path, Wanted(nodes=3))]


def test_all_files_found_a_cluster_whatever_their_order(files: list[Path]) -> None:
    formatted = format_files(files[::-1], None)
    assert [config.name for config, _ in formatted] == ["node-1", "node-2", "node-3"]
    assert [identity.node for _, identity in formatted] == [1, 2, 3]
    assert all(len(identity.founders) == 3 for _, identity in formatted)
    assert format_files(files, None) == formatted


def test_some_of_the_founders_are_not_enough(files: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"node-1 also names 127\.0\.0\.1:7300"):
        format_files(files[:2], None)
    assert not (files[0].parents[1] / "data").exists()


def test_one_node_joins_by_the_cluster_s_id(files: list[Path]) -> None:
    ((config, identity),) = format_files(files[2:], "the-cluster")
    assert config.name == "node-3"
    assert identity.cluster_id == "the-cluster"
    assert identity.founders == ()
    assert format_files(files[2:], "the-cluster") == [(config, identity)]
    with pytest.raises(ConfigError, match="belongs to cluster the-cluster; it cannot join another"):
        format_files(files[2:], "another")
