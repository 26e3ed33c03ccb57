"""The README's examples run as they stand, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.node.free_ports import free_base_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AEGIS = Path(sys.executable).with_name("aegis")

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


def moved(text: str, base_port: int) -> str:
    """The same example on ports of its own: a person may have a cluster on the defaults."""
    text = text.replace("cluster up --nodes 3", f"cluster up --nodes 3 --base-port {base_port}")
    return re.sub(r":7(\d\d\d)", lambda found: f":{base_port + int(found[1])}", text)


def test_the_console_example(directory: Path) -> None:
    (example,) = blocks("console")
    outputs = {}
    for line in moved(example, free_base_port()).splitlines():
        command = line.removeprefix("$ ")
        outputs[command] = run(command, directory)
    read = outputs["aegis consume orders --from earliest --to-end --format json"]
    assert sorted(line for line in read.splitlines() if line)[0].startswith("{")
    assert len(read.splitlines()) == 2


def test_the_example_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(blocks("python")[0], encoding="utf-8")
    for offset in (0, 0):
        output = run([sys.executable, "example.py"], tmp_path)
        assert output == f"order-123 {{'amount': 99.99}} at offset {offset}\n"


def test_the_example_of_captured_changes(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(blocks("python")[2], encoding="utf-8")
    ann, anne = "{'id': 1, 'name': 'Ann'}", "{'id': 1, 'name': 'Anne'}"
    output = run([sys.executable, "example.py"], tmp_path)
    assert output == f"new {ann}\n{ann} -> {anne}\ngone {anne}\n"


def test_the_example_with_a_cluster(directory: Path) -> None:
    example = blocks("python")[1]
    base_port = free_base_port()
    run(moved("aegis cluster up --nodes 3", base_port), directory)
    (directory / "example.py").write_text(moved(example, base_port), encoding="utf-8")
    output = run([sys.executable, "example.py"], directory)
    assert "sum of all payments: 499599.99" in output
