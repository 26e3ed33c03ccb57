"""Real databases under load, while connectors, leaders and databases are killed and two connectors
hold one lease: afterwards the feed is the database. For longer: `python -m chaos.cdc.run`."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from chaos.cdc.run import VALID, Plan, play

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("source", ["postgres", "sqlite"])
def test_whatever_is_killed_the_feed_is_the_database(tmp_path: Path, source: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    plan = Plan(source, 8.0, seed, partitions=1 + seed % 2, pause_s=(0.5, 2.0))
    print(f"SEED {seed}")  # noqa: T201 - shown when it fails
    outcome = asyncio.run(play(plan, tmp_path, print))
    said = (tmp_path / "connectors.log").read_text(errors="replace")[-2_000:]
    assert outcome.code == VALID, f"{outcome.describe()}\n{said}"
    assert outcome.changes > 500
    assert len(outcome.blows) == 3
