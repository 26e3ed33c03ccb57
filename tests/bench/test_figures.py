"""Figures from runs, the table they make, and what a plan lets through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.bench.data_path import keys_of, latencies, values_of
from aegis_cluster.bench.figures import (
    FSYNC,
    P50_MS,
    P99_MS,
    RECORDS_S,
    Goal,
    Sample,
    Scenario,
    WrongCount,
    figures_of,
)
from aegis_cluster.bench.machine import Limit
from aegis_cluster.bench.report import plot, table
from aegis_cluster.bench.run import SCENARIOS, Plan, Report
from aegis_cluster.errors import ConfigError
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.bench.figures import Figure
    from aegis_cluster.bench.stage import Stage

LIMITS = {"disk": 200.0, "wire": 1.0}


async def _never(_stage: Stage, _seconds: float) -> Sample:
    raise AssertionError("nothing is measured here")


def scenario(*goals: Goal) -> Scenario:
    return Scenario("one", "one thing", _never, {FSYNC: goals})


def rates(*values: float) -> list[Sample]:
    return [Sample(10, 1.0, {RECORDS_S: value}, 0.00002, 0.00004) for value in values]


def only(scenario_: Scenario, samples: list[Sample]) -> Figure:
    (figure,) = figures_of(scenario_, FSYNC, samples, LIMITS)
    return figure


def test_the_median_counts_and_the_spread_is_kept() -> None:
    figure = only(scenario(Goal(RECORDS_S, "disk")), rates(120, 90, 100))
    assert (figure.median, figure.least, figure.most) == (100, 90, 120)
    assert figure.share == pytest.approx(0.5)
    assert [figure.client_us, figure.nodes_us] == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize(
    ("value", "reached"), [(99, "below"), (100, "must"), (149, "must"), (150, "aim")]
)
def test_rates_reach_their_goals_upwards(value: float, reached: str) -> None:
    assert only(scenario(Goal(RECORDS_S, "disk", 100, 150)), rates(value)).reached == reached


@pytest.mark.parametrize(
    ("value", "reached"), [(2.01, "below"), (2.0, "must"), (1.5, "must"), (1.0, "aim")]
)
def test_times_reach_their_goals_downwards(value: float, reached: str) -> None:
    samples = [Sample(1, 1.0, {P50_MS: value})]
    figure = only(scenario(Goal(P50_MS, "wire", 2.0, 1.0)), samples)
    assert figure.reached == reached
    assert figure.share == pytest.approx(1.0 / value)


def test_a_goal_may_be_a_share_of_its_limit() -> None:
    figure = only(scenario(Goal(RECORDS_S, "disk", 0.6, 0.8, of_limit=True)), rates(130))
    assert [figure.must, figure.aim] == pytest.approx([120, 160])
    assert figure.reached == "must"


def test_latencies_are_those_of_the_ordered_runs() -> None:
    assert latencies([number / 1000 for number in range(100, 0, -1)]) == {P50_MS: 51, P99_MS: 100}
    with pytest.raises(WrongCount):
        latencies([])


def test_every_partition_has_a_key() -> None:
    keys = keys_of(50)
    assert [partition_for(key.encode(), 50) for key in keys] == list(range(50))


def test_values_are_the_same_in_every_run() -> None:
    assert values_of(8, 3) == values_of(8, 3)
    assert {len(value) for value in values_of(100, 10)} == {100}


def test_a_plan_refuses_what_is_not_there() -> None:
    with pytest.raises(ConfigError, match="publish_many"):
        Plan(only=("publish_some",)).scenarios(FSYNC)
    assert [one.name for one in Plan(only=("latency",)).scenarios(FSYNC)] == ["latency"]


def test_scenarios_have_names_of_their_own() -> None:
    names = [one.name for one in SCENARIOS]
    assert len(set(names)) == len(names)


def report() -> Report:
    samples = [Sample(10, 1.0, {P50_MS: 2.0, P99_MS: 9.0}, extra={"syncs/s": 300.0})]
    found = figures_of(
        scenario(Goal(P50_MS, "wire", 3.0, 1.0), Goal(P99_MS, "wire")), FSYNC, samples, LIMITS
    )
    machine = {
        "at": "2026-01-01 00:00",
        "commit": "abc",
        "cores": 2,
        "processor": "a processor",
        "kernel": "6",
        "python": "3",
        "load": 0.1,
    }
    return Report(Plan(), machine, [Limit("wire", "there and back", "ms", 1.0)], found)


def test_the_table_shows_figures_limits_and_what_else_is_known() -> None:
    text = "\n".join(table(report()))
    assert (
        "| one thing | fsync | **2.00** p50 ms (2.00..2.00) | 50% of wire | 3.00 / 1.00 |" in text
    )
    assert "one thing: syncs/s 300" in text
    assert "| wire: there and back | 1.00 ms |" in text


def test_the_report_is_plain_json() -> None:
    found = report().to_json()
    assert found["figures"][0]["reached"] == "must"
    assert found["figures"][1]["must"] is None
    assert found["limits"] == [
        {"name": "wire", "title": "there and back", "unit": "ms", "value": 1.0}
    ]


def test_a_plot_is_drawn_where_there_is_something_to_draw_with(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(report(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
