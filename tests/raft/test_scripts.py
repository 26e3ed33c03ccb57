"""Every script under tests/scripts/raft must lead to the dialogue that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.raft.script import Script

SCRIPTS = Path(__file__).parent.parent / "scripts" / "raft"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.txt")), ids=lambda path: path.stem)
def test_dialogue(path: Path, request: pytest.FixtureRequest) -> None:
    expected = path.read_text(encoding="utf-8")
    actual = Script().run(expected)
    if request.config.getoption("--rewrite", default=False):
        path.write_text(actual, encoding="utf-8")
    else:
        assert actual == expected
