"""The guide's pieces run as they stand, one after the other, in one empty directory; so do the
examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.node.free_ports import free_base_port
from tests.integration.test_readme import AEGIS, ROOT, moved, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
NEEDS_A_CLUSTER = "flights_exactly_once"
"""Run by `test_flights`."""
EXAMPLES = [one for one in sorted((ROOT / "examples").glob("*.py")) if one.stem != NEEDS_A_CLUSTER]
MARK = "=== command "
ANYTHING = "…"

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(400)]


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of every block."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[tuple[str, str]]:
    """Each command of a console block, and what it should print."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def run_block(block: str, directory: Path) -> list[tuple[str, str, str]]:
    """Run the commands in one shell; give back each with what it should print and what it did."""
    wanted = commands(block)
    lines = [f"echo '{MARK}{number}'; {command}" for number, (command, _) in enumerate(wanted)]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    printed = re.split(rf"^{MARK}\d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return [(command, want, have) for (command, want), have in zip(wanted, printed, strict=True)]


def environment() -> dict[str, str]:
    found = os.environ | {"PATH": f"{AEGIS.parent}:{os.environ['PATH']}"}
    found.pop("AEGIS_BOOTSTRAP", None)
    return found


def matches(want: str, have: str) -> bool:
    """As it is written, where … stands for anything."""
    pattern = re.escape(want).replace(re.escape(ANYTHING), ".*")
    return re.fullmatch(pattern, have, re.DOTALL) is not None


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if (tmp_path / "nodes").exists():
        run([str(AEGIS), "cluster", "down"], tmp_path)


def test_the_guide_from_the_first_message_to_the_first_failover(directory: Path) -> None:
    base_port = free_base_port()
    text = moved(GUIDE, base_port)
    for language, content in pieces(text):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", content)
            assert name is not None, content
            (directory / name[1]).write_text(content, encoding="utf-8")
            continue
        assert language == "console"
        for command, want, have in run_block(content, directory):
            assert matches(want, have), f"$ {command}\n{have}\nshould be\n{want}"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_in_an_empty_directory(example: Path, tmp_path: Path) -> None:
    """Twice: an example can be run again. It says itself whether all went well."""
    for _ in range(2):
        printed = run([sys.executable, str(example)], tmp_path)
        assert printed.strip()
