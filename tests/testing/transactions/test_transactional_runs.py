"""Transactions, groups and compaction keep their promises while everything around them fails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.simulation import Simulation, Verdict
from chaos.scenarios import transactional
from chaos.soak import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    logger = logging.getLogger("aegis_cluster")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)  # other tests of this process look for what is logged


@pytest.mark.parametrize("seed", [77, 79, 108])
def test_promises_are_kept(seed: int) -> None:
    """77: a worker that is thawed commits what it read in an earlier assignment. 108: a shard with
    two links asks the wrong one for producer ids, again and again."""
    simulation = Simulation(seed, transactional(seed))
    report = simulation.run()
    assert report.verdict is Verdict.OK, describe(report)


def test_a_quiet_run_does_all_that_there_is_to_do() -> None:
    """What is checked has happened: commits, aborts, polls, repeated requests, a compaction."""
    simulation = Simulation(5, transactional(5, {}, repeated=0.1, repeated_us=5_000_000))
    report = simulation.run()
    assert report.verdict is Verdict.OK, describe(report)
    run = simulation.transactions
    assert run is not None
    record = run.record
    outcomes = {one.outcome for one in record.transactions}
    assert {Outcome.OK, Outcome.REFUSED} <= outcomes
    assert sum(len(rows) for rows in record.inputs.values()) > 20
    assert any(one.polls for one in record.transactions)
    assert len(record.takeovers) > 3
    assert run.repeated_requests > 0


def test_one_seed_is_one_run() -> None:
    traces = {Simulation(14, transactional(14)).run().trace for _ in range(2)}
    assert len(traces) == 1
