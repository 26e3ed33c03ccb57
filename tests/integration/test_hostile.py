"""Strangers attack every socket of a real cluster while somebody writes and reads.

Longer, and against the same checks: `./tools/fuzz --live --minutes 10`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos.fuzz_live import Siege
from tests.integration.cluster import cluster

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_cluster_under_hostile_fire_loses_nothing_and_elects_nobody(tmp_path: Path) -> None:
    with cluster(tmp_path) as running:
        siege = Siege(running.path, running.bootstrap, seed=1)
        report = siege.run(seconds=12)
    print(report)  # noqa: T201 - shown when the test fails
    assert report.problems == []
    assert report.violations > 0, "what they did was seen"
    assert report.acknowledged > 10
