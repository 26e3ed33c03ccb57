"""Clusters from seeds keep their promises, and a seed is a run."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from aegis_cluster.testing.simulation import Verdict, run_seed
from chaos.soak import ROOT, describe

SEEDS = 240
CHUNK = 20


@pytest.fixture(autouse=True)
def _silence() -> None:
    """Clusters that break all the time have much to say."""
    logging.getLogger("aegis_cluster").setLevel(logging.CRITICAL)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_promises_are_kept(start: int) -> None:
    for seed in range(start, start + CHUNK):
        report = run_seed(seed)
        assert report.verdict is Verdict.OK, describe(report)


def test_one_seed_is_one_run() -> None:
    first, second = run_seed(5), run_seed(5)
    assert first.trace == second.trace
    assert first.counts == second.counts
    assert run_seed(6).trace != first.trace


@pytest.mark.slow
def test_hashing_of_texts_does_not_matter() -> None:
    code = (
        "import logging; logging.disable(50); from aegis_cluster.testing.simulation import"
        " run_seed; print([run_seed(seed).trace for seed in (1, 2, 30)])"
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
    """Quiet runs, single nodes, five nodes: all are drawn."""
    counts = [run_seed(seed).counts for seed in range(8)]
    assert any(count["ends"] == 0 for count in counts)
    assert any(count["ends"] > 3 for count in counts)


def test_a_gap_in_a_pipeline_starts_no_storm() -> None:
    """Seed 1337: cold reads shortened a follower's appends, every refusal began another probe and
    every answer filled the pipeline anew, until messages filled the memory."""
    report = run_seed(1337)
    assert report.verdict is Verdict.OK, report.problems


def test_no_log_begins_later_than_was_decided() -> None:
    """Seed 200070: a segment ended too early, above the last watermark that was written down, and
    the log was begun anew after its own snapshot; its leader then denied what others still had."""
    report = run_seed(200070)
    assert report.verdict is Verdict.OK, report.problems
