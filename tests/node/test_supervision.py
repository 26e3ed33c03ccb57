"""The supervisor's decisions, without a process: restarts, giving up, stopping in order."""

from __future__ import annotations

import pytest

from aegis_cluster import limits
from aegis_cluster.errors import InvariantBroken
from aegis_cluster.ids import ShardId
from aegis_cluster.node.exit_codes import EXIT_CONFIG, EXIT_STORAGE
from aegis_cluster.node.supervision import (
    Action,
    Kill,
    Phase,
    Report,
    Start,
    StepAside,
    Supervision,
    Terminate,
    backoff_ms,
    exit_reason,
)

S0, S1 = ShardId(0), ShardId(1)


def started(shards: int = 1) -> Supervision:
    core = Supervision(shards)
    core.tick(0)
    assert core.take_actions() == [Start(ShardId(number)) for number in range(shards)]
    return core


def without_reports(core: Supervision) -> list[Action]:
    return [action for action in core.take_actions() if not isinstance(action, Report)]


def reports(core: Supervision) -> list[str]:
    return [action.text for action in core.take_actions() if isinstance(action, Report)]


@pytest.mark.parametrize(
    ("failures", "expected"),
    [(0, 100), (1, 200), (2, 400), (5, 3_200), (6, 5_000), (7, 5_000), (10_000, 5_000)],
)
def test_the_back_off_doubles_up_to_its_limit(failures: int, expected: int) -> None:
    assert backoff_ms(failures) == expected


def test_every_shard_is_started_once() -> None:
    core = started(3)
    core.tick(10_000)
    assert core.take_actions() == []
    assert core.due_in_ms(10_000) is None


def test_a_crashed_shard_starts_again_after_the_back_off() -> None:
    core = started(2)
    core.exited(S1, -9, 1_000)
    assert reports(core) == ["shard 1 was ended by signal 9 after 1.0 s; it starts again in 0.1 s"]
    assert core.due_in_ms(1_000) == 100
    core.tick(1_099)
    assert core.take_actions() == []
    core.tick(1_100)
    assert core.take_actions() == [Start(S1)]


def test_crashes_in_a_row_are_answered_ever_more_slowly() -> None:
    core = started()
    now, waits = 0, []
    for _ in range(8):
        core.exited(S0, 1, now)
        wait = core.due_in_ms(now)
        assert wait is not None
        waits.append(wait)
        now += wait
        core.tick(now)
    assert waits == [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]


def test_a_calm_life_resets_the_back_off() -> None:
    core = started()
    core.exited(S0, 1, 0)
    core.tick(100)
    core.exited(S0, 1, 100 + limits.RESTART_CALM_MS)
    assert core.due_in_ms(100 + limits.RESTART_CALM_MS) == limits.RESTART_BACKOFF_MS_MIN


def test_a_failed_disk_is_an_ordinary_crash() -> None:
    core = started()
    core.exited(S0, EXIT_STORAGE, 5)
    assert "its disk failed" in reports(core)[0]
    assert core.due_in_ms(5) == 100
    assert not core.failed


def test_wrong_settings_at_the_first_start_end_the_node() -> None:
    core = started(2)
    core.exited(S0, EXIT_CONFIG, 50)
    assert core.failed
    assert without_reports(core) == [StepAside(S1)]
    core.stepped_aside(S1, 60)
    assert core.take_actions() == [Terminate(S1)]
    core.exited(S1, 0, 70)
    assert core.phase is Phase.ENDED


def test_wrong_settings_of_the_only_shard_end_the_node_at_once() -> None:
    core = started()
    core.exited(S0, EXIT_CONFIG, 50)
    assert core.failed
    assert core.phase is Phase.ENDED
    assert without_reports(core) == []


def test_a_port_taken_later_is_tried_a_few_times_and_then_given_up() -> None:
    core = started()
    core.exited(S0, -11, 0)
    now = tries = 0
    while not core.failed:
        wait = core.due_in_ms(now)
        assert wait is not None
        now += wait
        core.tick(now)
        core.exited(S0, EXIT_CONFIG, now)
        tries += 1
    assert tries == limits.RESTART_CONFIG_TRIES_MAX + 1
    assert core.phase is Phase.ENDED


def test_stopping_goes_step_by_step() -> None:
    core = started(2)
    core.stop(1_000)
    assert without_reports(core) == [StepAside(S0), StepAside(S1)]
    core.stepped_aside(S0, 1_100)
    assert core.take_actions() == []
    core.stepped_aside(S1, 1_200)
    assert core.take_actions() == [Terminate(S0), Terminate(S1)]
    core.exited(S0, 0, 1_300)
    assert core.due_in_ms(1_300) is not None
    core.exited(S1, 0, 1_400)
    assert core.phase is Phase.ENDED
    assert not core.failed
    assert core.due_in_ms(1_400) is None


def test_every_step_has_a_deadline() -> None:
    core = started(2)
    core.stop(0)
    core.take_actions()
    assert core.due_in_ms(0) == limits.STEP_ASIDE_MS
    now = limits.STEP_ASIDE_MS
    core.tick(now)
    assert core.take_actions() == [Terminate(S0), Terminate(S1)]
    core.exited(S0, 0, now)
    now += limits.SHARD_STOP_MS
    core.tick(now)
    assert without_reports(core) == [Kill(S1)]
    core.exited(S1, -9, now + 1)
    assert core.phase is Phase.ENDED


def test_a_second_stop_does_not_wait_for_leaders() -> None:
    core = started()
    core.stop(0)
    core.take_actions()
    core.stop(10)
    assert core.take_actions() == [Terminate(S0)]
    core.stop(20)
    core.stepped_aside(S0, 30)
    assert core.take_actions() == []


def test_a_shard_that_ends_while_stopping_stays_down() -> None:
    core = started(2)
    core.stop(0)
    core.take_actions()
    core.exited(S0, -9, 10)
    core.tick(500)
    assert core.take_actions() == []
    core.stepped_aside(S1, 600)
    assert core.take_actions() == [Terminate(S1)]


def test_stopping_while_a_shard_waits_for_its_restart() -> None:
    core = started()
    core.exited(S0, 1, 0)
    core.take_actions()
    core.stop(10)
    assert core.phase is Phase.ENDED
    core.tick(10_000)
    assert without_reports(core) == []


def test_a_process_cannot_end_twice() -> None:
    core = started()
    core.exited(S0, 1, 0)
    with pytest.raises(InvariantBroken):
        core.exited(S0, 1, 1)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (EXIT_CONFIG, "a port is taken"),
        (EXIT_STORAGE, "its disk failed"),
        (-15, "signal 15"),
        (1, "with code 1"),
    ],
)
def test_exits_in_words(code: int, says: str) -> None:
    assert says in exit_reason(code)
