"""The README's examples run as they stand, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AEGIS = Path(sys.executable).with_name("aegis")
# The README's ports are the defaults; a test must not meet a cluster that a person has running.
BASE_PORT = 42_000

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(command: str | list[str], directory: Path) -> str:
    environment = os.environ | {"PATH": f"{AEGIS.parent}:{os.environ['PATH']}"}
    environment.pop("AEGIS_BOOTSTRAP", None)
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    run([str(AEGIS), "cluster", "down"], tmp_path)


def moved(text: str) -> str:
    """The same example on ports of this test's own."""
    text = text.replace("cluster up --nodes 3", f"cluster up --nodes 3 --base-port {BASE_PORT}")
    return re.sub(r":7(\d\d\d)", lambda found: f":{BASE_PORT + int(found[1])}", text)


def test_the_console_example(directory: Path) -> None:
    (example,) = blocks("console")
    outputs = {}
    for line in moved(example).splitlines():
        command = line.removeprefix("$ ")
        outputs[command] = run(command, directory)
    read = outputs["aegis consume orders --from earliest --to-end --format json"]
    assert sorted(line for line in read.splitlines() if line)[0].startswith("{")
    assert len(read.splitlines()) == 2


def test_the_python_example(directory: Path) -> None:
    (example,) = blocks("python")
    run(moved("aegis cluster up --nodes 3"), directory)
    (directory / "example.py").write_text(moved(example), encoding="utf-8")
    output = run([sys.executable, "example.py"], directory)
    assert "sum of all payments: 499599.99" in output
