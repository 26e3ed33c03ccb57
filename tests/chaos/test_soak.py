"""What the tool says and how it ends: whoever reads it must be able to replay what it found."""

from __future__ import annotations

import logging
import resource
import sys
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.testing.scheduler import Runaway
from aegis_cluster.testing.simulation import Report, Verdict
from chaos import soak

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tool bounds its own process; this one is shared with other tests."""
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    yield
    logging.disable(logging.NOTSET)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soak", *arguments])
    return soak.main()


def fail_at(monkeypatch: pytest.MonkeyPatch, verdicts: dict[int, Verdict]) -> None:
    def run_seed(seed: int) -> Report:
        report = Report(seed)
        if seed in verdicts:
            report.fail(verdicts[seed], ["something went wrong"])
        return report

    monkeypatch.setattr(soak, "run_seed", run_seed)


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.OK])
def test_each_kind_of_failure_has_its_exit_code(
    verdict: Verdict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, {7: verdict})
    assert run(monkeypatch, "--seeds", "20") == verdict
    said = capsys.readouterr().out
    assert f"SEED 7: {verdict.name}" in said
    assert "./tools/soak --seed 7" in said
    assert f"commit {soak.commit()}" in said
    assert "8 seeds in" in said


def test_codes_differ() -> None:
    assert (Verdict.RUNAWAY, Verdict.CRASH, Verdict.LIVENESS, Verdict.SAFETY) == (
        126,
        127,
        128,
        129,
    )


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_at(monkeypatch, {})
    assert run(monkeypatch, "--seeds", "20", "--start", "100") == 0
    assert "20 seeds in" in capsys.readouterr().out


def test_keep_going_ends_with_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, {3: Verdict.LIVENESS, 8: Verdict.SAFETY})
    assert run(monkeypatch, "--seeds", "10", "--keep-going") == Verdict.SAFETY
    lines = capsys.readouterr().out.splitlines()
    assert "2 failed" in lines[-3]
    assert lines[-2:] == [
        "  LIVENESS ./tools/soak --seed 3",
        "  SAFETY ./tools/soak --seed 8",
    ]


def test_a_seed_that_spins_in_one_event_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(_seed: int) -> Report:
        while True:
            pass

    monkeypatch.setattr(soak, "CPU_SECONDS_MAX", 0.1)
    monkeypatch.setattr(soak, "run_seed", spin)
    with pytest.raises(Runaway, match="seconds of computing"):
        soak.guarded(1)
