"""Real flights through three stages, exactly once, while their workers are killed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.cluster import cluster
from tests.integration.test_readme import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]


def test_carriers_are_counted_exactly_once_while_workers_are_killed(tmp_path: Path) -> None:
    script = ROOT / "examples" / "flights_exactly_once.py"
    with cluster(tmp_path / "cluster") as nodes:
        command = [sys.executable, str(script), nodes.bootstrap, "--kills", "4"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr  # the seed is in it
    assert "25,000 flights, 4 kills" in ended.stdout
    assert ended.stdout.rstrip().endswith("equal")
    assert "differs" not in ended.stdout
