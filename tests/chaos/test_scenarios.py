"""Published failures, and the seeds that found ours: none of them happens any more."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.testing.simulation import Verdict, run_seed
from chaos import scenarios
from chaos.soak import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SEEDS = 8


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    logger = logging.getLogger("aegis_cluster")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)  # other tests of this process look for what is logged


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "faults",
    [
        scenarios.PAUSE_KILL,
        scenarios.PARTITION_KILL,
        scenarios.POWER,
        scenarios.OLD_LEADER,  # seed 3: a contradicted last frame kept a follower out for ever
        scenarios.BAD_DISK,
        scenarios.FAILED_SYNC,
        scenarios.QUIET,
        scenarios.TORN,
        scenarios.WIPED,
        scenarios.MOVES,
        scenarios.FALLING_LEADERS,
        scenarios.LEASE,
    ],
    ids=[
        "pause-kill",
        "partition-kill",
        "power",
        "old-leader",
        "bad-disk",
        "failed-sync",
        "quiet",
        "torn",
        "wiped",
        "moves",
        "falling-leaders",
        "lease",
    ],
)
def test_promises_are_kept(faults: Mapping[str, int]) -> None:
    for seed in range(SEEDS):
        report = run_seed(
            seed, scenarios.scenario(seed, faults, nodes=4 if faults is scenarios.MOVES else 3)
        )
        assert report.verdict is Verdict.OK, describe(report)
