"""The example with flights and weather: shuffled, and with a worker that is killed, on a slice."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_readme import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(170)]
SEED = random.Random().randrange(2**32)


def test_flights_and_weather_equal_a_plain_computation(tmp_path: Path) -> None:
    print(f"SEED {SEED}")  # noqa: T201 - it replays the test
    command = [sys.executable, str(ROOT / "examples" / "flights_and_weather.py")]
    command += ["--rows", "1200", "--shuffle", str(SEED), "--kills", "1", "--seconds", "120"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all equal" in done.stdout
    assert not list(tmp_path.iterdir())
