"""Random work, random crashes: what was declared durable survives, and nothing is invented."""

from __future__ import annotations

import random

import pytest

from tests.storage.machine import Machine

SEEDS = 300
SEEDS_PER_CASE = 10
STEPS = 60


def run(seed: int, steps: int = STEPS) -> Machine:
    """One seed from start to end."""
    machine = Machine(random.Random(seed))
    machine.step_create()
    for _ in range(steps):
        if machine.rng.random() < 0.03:
            machine.crash_after(machine.rng.randrange(1, 40))
        machine.step()
    machine.die()
    machine.step_reads()
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_PER_CASE))
def test_what_is_durable_survives_any_crash(start: int) -> None:
    for seed in range(start, start + SEEDS_PER_CASE):
        print(f"SEED {seed}")  # noqa: T201 - shown by pytest when the seed fails
        run(seed)


def test_a_seed_gives_the_same_disk_twice() -> None:
    assert run(7).disk.files() == run(7).disk.files()
