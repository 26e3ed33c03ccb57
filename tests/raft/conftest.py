"""`pytest tests/raft --rewrite` writes the dialogues of the scripts anew; review the diff."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch."""
    parser.addoption("--rewrite", action="store_true", help="regenerate tests/scripts/raft")
