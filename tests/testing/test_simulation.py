"""Clusters from seeds keep their promises, and a seed is a run."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.testing import network
from aegis_cluster.testing.plan import Plan, draw_plan
from aegis_cluster.testing.scheduler import MS, SECOND, Runaway, Scheduler
from aegis_cluster.testing.simulation import Simulation, Verdict, run_seed
from chaos.soak import ROOT, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

SEEDS = 300
CHUNK = 20

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Clusters that break all the time have much to say."""
    logger = logging.getLogger("aegis_cluster")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)  # other tests of this process look for what is logged


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_promises_are_kept(start: int) -> None:
    for seed in range(start, start + CHUNK):
        report = run_seed(seed)
        assert report.verdict is Verdict.OK, describe(report)


@pytest.mark.slow
def test_one_seed_is_one_run() -> None:
    first, second = run_seed(5), run_seed(5)
    assert first.trace == second.trace
    assert first.counts == second.counts
    assert run_seed(6).trace != first.trace


EVERYTHING = Plan(
    nodes=4,
    shards=2,
    partitions=2,
    safety_us=2 * SECOND,
    faults={"wipe": 2, "move": 2, "reshard": 1, "kill_shard": 1, "power": 1},
    fault_every_us=150 * MS,
    lease_us=300 * MS,
)


@pytest.mark.slow
def test_hashing_of_texts_does_not_matter() -> None:
    code = (
        "import logging; logging.disable(50)\n"
        "from aegis_cluster.testing.simulation import run_seed\n"
        "from tests.testing.test_simulation import EVERYTHING\n"
        "print([run_seed(1).trace, run_seed(2).trace, run_seed(30, EVERYTHING).trace])"
    )
    traces = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for number in ("0", "1")
    }
    assert len(traces) == 1


def test_seeds_differ_in_configuration() -> None:
    """Quiet runs, single nodes, several shards, leases, every kind of fault: all are drawn."""
    plans = [draw_plan(random.Random(seed)) for seed in range(300)]
    assert {plan.nodes for plan in plans} == {1, 3, 4, 5}
    assert {plan.shards for plan in plans} == {1, 2, 3}
    assert any(not plan.faults for plan in plans)
    assert any(plan.lease_us for plan in plans)
    assert {"wipe", "move", "reshard", "rot", "sync_error", "cut_one_way"} <= {
        kind for plan in plans for kind in plan.faults
    }


@pytest.mark.slow
def test_two_of_three_wiped_is_refused_and_loses_nothing_that_is_there() -> None:
    """The one that is left serves nothing, says why, and keeps what it has; with the old
    directories back, everything that was acknowledged is there."""
    sim = Simulation(3, Plan(producers=1, write_every_us=200 * MS))
    sim.bootstrap()
    sim.begin_load()
    sim.scheduler.run(sim.scheduler.now_us + SECOND)
    wiped = [(node, node.member, node.wipe()) for node in sim.nodes[:2]]
    left = sim.nodes[2]
    kept = {path: data for path, data in left.disk.files().items() if path.endswith(".log")}
    sim.scheduler.run(sim.scheduler.now_us + 6 * SECOND)

    assert all(not p.serving for node in sim.nodes for _, p in node.partitions())
    said = [problem["why"] for shard in left.running() for problem in shard.damaged]
    assert said
    assert all("give them their old data directories back" in why for why in said)
    now = left.disk.files()
    assert all(now[path].startswith(data.rstrip(b"\0")) for path, data in kept.items())

    for node, member, disk in wiped:
        node.give_back(disk, member)
    sim.heal()
    assert sim.report.verdict is Verdict.OK, sim.report.problems
    assert not sim.watch.violations


# A run that grows without bound


def test_a_storm_of_events_is_a_failure_of_its_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "MESSAGES_PER_SECOND_MAX", 20)
    report = run_seed(1)
    assert report.verdict is Verdict.RUNAWAY
    assert "messages in a second" in report.problems[0]
    assert "SEED 1: RUNAWAY" in describe(report)


def test_events_and_what_waits_are_bounded() -> None:
    scheduler = Scheduler()

    def again() -> None:
        scheduler.after(1, again)

    again()
    with pytest.raises(Runaway, match="events in a second"):
        scheduler.run(SECOND)

    scheduler = Scheduler()

    def more() -> None:
        for _ in range(3):
            scheduler.after(SECOND, more)

    more()
    with pytest.raises(Runaway, match="events wait"):
        scheduler.run(60 * SECOND)
