"""`aegis completion`: scripts that shells accept, and what they complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aegis_cluster.cli.app import run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

COMPLETE = """
source "$1"
COMP_WORDS=(aegis $2)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_aegis_completion aegis
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_for_that_shell(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    assert "_AEGIS_COMPLETE" in text
    assert f"{shell}_complete" in text
    if shutil.which(shell) is not None:
        file = tmp_path / "script"
        file.write_text(text)
        subprocess.run([shell, "-n", str(file)], check=True)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("top", ["topic"]),
        ("topic al", ["alter"]),
        ("log ", ["inspect", "salvage"]),
        ("topic create orders --comp", ["--compression"]),
        ("topic create orders --compression l", ["lz4"]),
        ("completion z", ["zsh"]),
    ],
)
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(
    typed: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script").write_text(script("bash", capsys))
    program = tmp_path / "aegis"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m aegis_cluster.cli "$@"\n')
    program.chmod(0o755)
    words = typed if not typed.endswith(" ") else typed + "''"
    done = subprocess.run(
        ["bash", "-c", COMPLETE.replace("$2", words), "bash", str(tmp_path / "script")],
        env=ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == offered, done.stderr
