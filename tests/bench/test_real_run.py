"""The whole benchmark, very short, with real nodes: its counts hold and its files are written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_short_run_measures_and_checks_what_it_wrote(tmp_path: Path) -> None:
    arguments = ["--seconds", "0.5", "--repeats", "1", "--durability", "fsync", "--json"]
    for name in ("publish_many", "latency"):
        arguments += ["--only", name]
    done = subprocess.run(
        [sys.executable, "-m", "aegis_cluster.cli", "bench", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    by_scenario = {(one["scenario"], one["unit"]): one for one in found["figures"]}
    assert by_scenario["publish_many", "records/s"]["median"] > 0
    assert by_scenario["latency", "p50 ms"]["median"] > 0
    assert all(limit["value"] > 0 for limit in found["limits"])
    assert (tmp_path / "bench-results" / "bench.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bench-results"], "nothing is left"


def test_sigterm_ends_the_nodes_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aegis_cluster.cli", "bench", "--only", "publish_many"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while len(started := psutil.Process(process.pid).children(recursive=True)) < 6:
            assert time.monotonic() < deadline, "three nodes and their shards start"
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said
    gone, alive = psutil.wait_procs(started, timeout=30)
    assert len(gone) >= 6
    assert not alive
    assert list(tmp_path.iterdir()) == []
