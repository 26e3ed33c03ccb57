"""A shop's database, and a place for an embedded engine."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Two users, and a table of orders without a row."""
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, mail TEXT);"
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, user INTEGER, amount REAL);"
            "INSERT INTO users VALUES (1, 'Ann', 'ann@x'), (2, 'Bob', 'bob@x');"
        )
    return path


@pytest.fixture
def connection(shop: Path) -> Iterator[sqlite3.Connection]:
    """A writer, as any other process would be."""
    with closing(sqlite3.connect(shop, isolation_level=None)) as connection:
        yield connection
