"""One trial of each; how large the figures may be is no question for a busy machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.bench.failover import kill_leader, pause_leader, stop_node
from aegis_cluster.bench.stage import running_stage
from aegis_cluster.cli.connection import cluster_status

if TYPE_CHECKING:
    from pathlib import Path

PARTITIONS = 2
LONG_S = 30.0


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_pauses_are_measured(tmp_path: Path) -> None:
    async def measure() -> list[list[float]]:
        stage = running_stage(tmp_path, "fsync", PARTITIONS, probe=cluster_status)
        async with stage as running:
            return [
                await kill_leader(running, 1),
                await pause_leader(running, 1),
                await stop_node(running, 1),
            ]

    killed, paused, stopped = asyncio.run(measure())
    assert len(killed) == len(paused) == 1
    assert len(stopped) == PARTITIONS
    assert all(0 < pause < LONG_S for pause in (*killed, *paused, *stopped))
    assert paused[0] > 0.2, "a node that is stopped is not missed at once"
