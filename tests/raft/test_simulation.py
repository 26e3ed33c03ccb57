"""A few hundred short lives of a cluster, each from one seed."""

from __future__ import annotations

import pytest

from tests.raft.simulation import World

SEEDS_PER_TEST = 20
STEPS = 4_000


@pytest.mark.parametrize("first", range(0, 300, SEEDS_PER_TEST))
def test_safety_under_faults_then_progress(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        print(f"SEED {seed}; replay: World({seed}).run({STEPS})")  # noqa: T201
        World(seed).run(STEPS)


def test_the_worlds_do_something() -> None:
    """A simulation in which nothing happens would find nothing."""
    worlds = [World(seed) for seed in range(SEEDS_PER_TEST)]
    for world in worlds:
        world.run(STEPS)
    assert sum(len(world.leaders) for world in worlds) > 40
    assert sum(world.committed_last for world in worlds) > 500
    assert sum(len(host.ready) for world in worlds for host in world.hosts.values()) > 100


def test_one_seed_is_one_life() -> None:
    first, second = World(7), World(7)
    first.run(STEPS)
    second.run(STEPS)
    assert first.committed == second.committed
    assert first.leaders == second.leaders
    assert first.letters == second.letters
