"""The simulator must be able to fail: each known mistake, planted, is found by some seed.

A mistake that stays unfound means that the harness does not look there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import pytest

from aegis_cluster.testing.simulation import Report, Verdict, run_seed
from chaos.scenarios import (
    BAD_DISK,
    FAILED_SYNC,
    FALLING_LEADERS,
    LEASE,
    MOVES,
    OLD_LEADER,
    PAUSE_KILL,
    POWER,
    QUIET,
    RETENTION,
    TORN,
    WIPED,
    scenario,
)
from tests.chaos import mistakes as planted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Mistake = Callable[[pytest.MonkeyPatch], None]
    Faults = dict[str, int] | None

SEEDS_MAX: Final = 200
"""Every mistake is found within so many seeds, from 0 on."""

MISTAKES: Final[list[tuple[Mistake, Faults, int]]] = [
    # Mistake, faults (None: whatever the seed draws), the seed that found it, to be tried first.
    (planted.vote_is_not_persisted, None, 0),
    (planted.term_is_not_persisted, None, 1),
    (planted.leader_counts_itself_before_its_fsync, POWER, 10),
    (planted.follower_acknowledges_before_its_fsync, PAUSE_KILL, 15),
    (planted.promises_leave_before_the_round, POWER, 10),
    (planted.sync_does_nothing, PAUSE_KILL, 1),
    (planted.failed_fsync_is_retried, FAILED_SYNC, 1),
    (planted.votes_twice, None, 1),
    (planted.votes_for_any_log, FALLING_LEADERS, 3),
    (planted.truncates_on_a_stale_append, OLD_LEADER, 22),
    (planted.acknowledges_its_whole_log, OLD_LEADER, 12),
    (planted.skips_the_consistency_check, OLD_LEADER, 0),
    (planted.believes_the_leaders_commit_index, OLD_LEADER, 13),
    (planted.stale_read_from_an_old_leader, OLD_LEADER, 27),
    (planted.reads_before_its_noop, OLD_LEADER, 1),
    (planted.quiet_group_never_wakes, QUIET, 0),
    (planted.lost_appends_are_never_sent_again, None, 2),
    (planted.old_frames_are_restamped_by_a_new_leader, None, 0),
    (planted.producer_table_is_left_out_of_snapshots, None, 5),
    (planted.repeat_is_acknowledged_before_its_commit, OLD_LEADER, 9),
    (planted.repeats_are_not_recognised, OLD_LEADER, 1),
    (planted.unknown_is_reported_as_refused, OLD_LEADER, 10),
    (planted.acknowledged_before_the_commit, OLD_LEADER, 0),
    (planted.readers_see_what_is_not_committed, None, 0),
    (planted.failed_recovery_leaves_a_marker, FAILED_SYNC, 5),
    (planted.older_terms_are_committed_by_counting, OLD_LEADER, 1),
    (planted.pre_votes_raise_terms, OLD_LEADER, 0),
    (planted.members_change_before_the_noop, MOVES, 2),
    (planted.living_voters_are_removed_beside_dead_ones, MOVES, 52),
    (planted.a_whole_append_is_acknowledged_when_a_part_came, OLD_LEADER, 1),
    (planted.a_wiped_node_votes_under_its_old_name, WIPED, 0),
    (planted.a_torn_tail_is_accepted, TORN, 16),
    (planted.damage_is_cut_as_a_torn_tail, BAD_DISK, 0),
    (planted.a_log_that_lost_its_end_begins_after_its_snapshot, BAD_DISK, 1),
    (planted.a_follower_moves_its_log_start, None, 0),
    (planted.records_go_before_their_time, RETENTION, 7),
    (planted.a_new_leader_ignores_its_predecessors_clock, OLD_LEADER, 6),
    (planted.old_epochs_are_let_in, LEASE, 0),
    (planted.client_gives_a_second_sequence, OLD_LEADER, 3),
    (planted.client_calls_unanswered_refused, OLD_LEADER, 3),
]


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    logger = logging.getLogger("aegis_cluster")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)  # other tests of this process look for what is logged


def run(seed: int, faults: Faults) -> Report:
    nodes = 4 if faults is MOVES else 3
    return run_seed(seed, None if faults is None else scenario(seed, faults, nodes=nodes))


def is_found(report: Report) -> bool:
    """A promise, an invariant or progress is broken; a mere error is the mistake's own."""
    if report.verdict is Verdict.CRASH:
        assert "InvariantBroken" in report.problems[0], report.problems
    return report.verdict is not Verdict.OK


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mistake", "faults", "first"), MISTAKES, ids=[mistake.__name__ for mistake, _, _ in MISTAKES]
)
def test_is_found(
    mistake: Mistake, faults: Faults, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    for seed in (first, *range(SEEDS_MAX)):
        if is_found(run(seed, faults)):
            print(f"SEED {seed}")  # noqa: T201 - which one, when this is run to update the table
            return
    pytest.fail(f"{mistake.__name__} survived {SEEDS_MAX} seeds")
