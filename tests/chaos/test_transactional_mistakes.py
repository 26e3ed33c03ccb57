"""Mistakes about transactions, groups and compaction: each, planted, is found by some seed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import pytest

from aegis_cluster.testing.scheduler import MS
from aegis_cluster.testing.simulation import Verdict, run_seed
from chaos.scenarios import transactional
from tests.chaos import transactional_mistakes as planted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Mistake = Callable[[pytest.MonkeyPatch], None]

SEEDS_MAX: Final = 20
"""Every mistake is found within so many seeds, from 0 on."""

LOST_TO_ITS_GROUP: Final[dict[str, Any]] = {
    "workers": 2,
    "tellers": 0,
    "inputs": 1,
    "timeout_ms": 6_000,
    "think_us": 1_500 * MS,
    "troubles": ("freeze",),
    "trouble_every_us": 800 * MS,
}
"""Workers stand still between their results and their positions, for longer than their session."""

CUT_OFF: Final[dict[str, Any]] = {"nodes": 5, "timeout_ms": 1_000}
"""A coordinator reaches leaders of other logs, and not those who hold its own."""

FOLDED_AGAIN: Final[dict[str, Any]] = {"restarts": True, "balance_bytes": 200}

MISTAKES: Final[list[tuple[Mistake, dict[str, int], dict[str, Any], int]]] = [
    # Mistake, faults, load, the seed that found it, to be tried first.
    (planted.offset_commits_are_not_fenced, {}, LOST_TO_ITS_GROUP, 0),
    (
        planted.markers_leave_before_the_decision_is_durable,
        {"cut_coordinator": 1},
        CUT_OFF,
        2,
    ),
    (planted.fetches_that_waited_ignore_the_last_stable_offset, {}, {}, 0),
    (planted.sequences_are_lost_with_the_leader, {"cut_leader": 2, "reset": 2}, {}, 1),
    (planted.compaction_drops_markers, {}, FOLDED_AGAIN, 0),
]


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    logger = logging.getLogger("aegis_cluster")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)  # other tests of this process look for what is logged


def is_found(seed: int, faults: dict[str, int], load: dict[str, Any]) -> bool:
    """A promise is broken; an error of the mistake's own does not count."""
    plan = transactional(seed, faults, **{"repeated": 0.0, "restarts": False, **load})
    if load is FOLDED_AGAIN:
        plan.snapshot_frames = 100_000  # a snapshot would stand in for what is folded
    return run_seed(seed, plan).verdict is Verdict.SAFETY


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mistake", "faults", "load", "first"), MISTAKES, ids=[one[0].__name__ for one in MISTAKES]
)
def test_is_found(
    mistake: Mistake,
    faults: dict[str, int],
    load: dict[str, Any],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    for seed in (first, *range(SEEDS_MAX)):
        if is_found(seed, faults, load):
            print(f"SEED {seed}")  # noqa: T201 - which one, when this is run to update the table
            return
    pytest.fail(f"{mistake.__name__} survived {SEEDS_MAX} seeds")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_mistake_nothing_is_found() -> None:
    for _, faults, load, first in MISTAKES:
        assert not is_found(first, faults, load)
