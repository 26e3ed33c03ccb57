"""The schedule: the same from the same seed, quiet a quarter of the time, and of every kind."""

from __future__ import annotations

import random
from collections import Counter

from chaos.processes.schedule import (
    CLIENTS,
    COORDINATOR,
    LEADER,
    NODES,
    TRANSACTIONS,
    WORKLOADS,
    draw,
    draw_step,
)

EVERY_KIND = {
    "kill", "stop", "pause", "cut", "delay", "loss", "reset", "slow_disk", "sync_error",
    "kill_client", "pause_client", "repeat", "flip", "truncate", "wipe",
}  # fmt: skip


def test_a_seed_gives_the_same_plan_again() -> None:
    assert draw(7, 60) == draw(7, 60)
    assert draw(7, 60) != draw(8, 60)


def test_it_lasts_as_long_as_asked() -> None:
    plan = draw(3, 60)
    assert 60 <= sum(step.seconds for step in plan.steps) < 70


def test_a_quarter_of_the_steps_are_quiet_and_others_have_several_faults() -> None:
    rng = random.Random(0)
    counts = Counter(len(draw_step(rng).faults) for _ in range(2_000))
    assert 0.2 < counts[0] / 2_000 < 0.3
    assert counts[1] > counts[3] > 0
    assert counts[2] > 0


def test_every_fault_and_workload_is_drawn() -> None:
    plans = [draw(seed, 100) for seed in range(40)]
    faults = [fault for plan in plans for step in plan.steps for fault in step.faults]
    assert {fault.kind for fault in faults} == EVERY_KIND
    assert {plan.workload for plan in plans} == {*WORKLOADS, TRANSACTIONS}
    assert (COORDINATOR,) in {fault.targets for fault in faults}
    kills = {fault.targets for fault in faults if fault.kind == "kill"}
    assert {(LEADER,), NODES, NODES[:2]} <= kills, "one, a majority, all, and whoever leads"


def test_cuts_are_of_every_shape() -> None:
    plans = [draw(seed, 100) for seed in range(40)]
    cuts = [
        frozenset(fault.pairs)
        for plan in plans
        for step in plan.steps
        for fault in step.faults
        if fault.kind == "cut"
    ]
    one_way = [cut for cut in cuts if any(pair[::-1] not in cut for pair in cut)]
    both_ways = [cut for cut in cuts if all(pair[::-1] in cut for pair in cut)]
    among_nodes = [cut for cut in cuts if all(set(pair) <= set(NODES) for pair in cut)]
    with_clients = [cut for cut in cuts if all(set(pair) & set(CLIENTS) for pair in cut)]
    assert one_way
    assert both_ways
    assert among_nodes
    assert with_clients


def test_a_damaged_disk_is_alone() -> None:
    for seed in range(40):
        for step in draw(seed, 100).steps:
            faults = [fault for fault in step.faults if fault.kind != "repeat"]
            kinds = {fault.kind for fault in faults}
            if kinds & {"flip", "truncate", "wipe"}:
                assert len(faults) == 1
                assert len(faults[0].targets) == 1
