"""Random statements against a database, by several connections, while its connector reads, dies and
begins again: the feed, replayed, is the database."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.cdc import SQLiteSource
from aegis_cluster.cdc.sqlite_schema import quoted, user_tables
from tests.cdc.model import Runner, exactly, folded

if TYPE_CHECKING:
    from pathlib import Path

VALUES: tuple[Any, ...] = (
    None, 0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, 1.0, 0.1, -0.0, 1e300, float("inf"), "", "a",
    "A", "é𝄞", "it's \"x\"", "a\0b", b"", b"\x00\xff", b"a", "7", 7, True,
)  # fmt: skip
TABLES = {
    "plain": "(id INTEGER PRIMARY KEY, name TEXT UNIQUE, x, r REAL)",
    "pairs": "(k TEXT COLLATE NOCASE, n, x, u UNIQUE, PRIMARY KEY (k, n)) WITHOUT ROWID",
    "keyless": "(x, y)",
    'odd "name"': '("a b" TEXT PRIMARY KEY, "ro""w", rowid TEXT, g AS (length("a b")) VIRTUAL)',
}


class Writers:
    """Some processes' worth of connections, and statements for them."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.rng = rng
        self.connections = [sqlite3.connect(path, isolation_level=None) for _ in range(2)]
        self.connections[1].execute("PRAGMA recursive_triggers = ON")
        for table, body in TABLES.items():
            self.connections[0].execute(f"CREATE TABLE {quoted(table)} {body}")

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    def write(self) -> None:
        """A transaction of a few statements, which may fail, each or all."""
        connection = self.rng.choice(self.connections)
        connection.execute("BEGIN")
        for _ in range(self.rng.randint(1, 4)):
            with suppress(sqlite3.IntegrityError, sqlite3.OperationalError):
                self._statement(connection)
        if connection.in_transaction:
            connection.execute(self.rng.choice(("COMMIT", "COMMIT", "COMMIT", "ROLLBACK")))

    def alter(self) -> None:
        """Somebody changes a table."""
        connection, rng = self.rng.choice(self.connections), self.rng
        name = rng.choice(user_tables(connection))
        column = f"c{rng.randrange(10**6)}"
        statements = (
            f"ALTER TABLE {quoted(name)} ADD COLUMN {column} DEFAULT 5",
            f"ALTER TABLE {quoted(name)} RENAME COLUMN x TO {column}",
            f"ALTER TABLE {quoted(name)} RENAME TO {quoted(name + '2')}",
            f"DROP TABLE {quoted(name)}; CREATE TABLE {quoted(name)} (id INTEGER PRIMARY KEY, x)",
            f"CREATE TABLE new{column} (x PRIMARY KEY, y); INSERT INTO new{column} VALUES (1, 2)",
        )
        with suppress(sqlite3.OperationalError):
            connection.executescript(rng.choice(statements))

    def _statement(self, connection: sqlite3.Connection) -> None:
        rng = self.rng
        table = rng.choice(user_tables(connection))
        rows = connection.execute(f"PRAGMA table_info({quoted(table)})").fetchall()
        columns = [row[1] for row in rows]
        names = ", ".join(map(quoted, columns))
        holes = ", ".join("?" for _ in columns)
        values = [self._value(column) for column in columns]
        how = rng.choice(("", "OR REPLACE", "OR REPLACE", "OR IGNORE", "OR FAIL"))
        column = rng.choice(columns)
        where = f"{quoted(rng.choice(columns))} IS ?"
        match rng.randrange(8):
            case 0 | 1 | 2:
                sql = f"INSERT {how} INTO {quoted(table)} ({names}) VALUES ({holes})"
                connection.execute(sql, values)
            case 3:
                sql = f"INSERT INTO {quoted(table)} ({names}) VALUES ({holes}) ON CONFLICT DO"
                update = f"UPDATE SET {quoted(column)} = excluded.{quoted(column)}"
                connection.execute(f"{sql} {rng.choice(('NOTHING', update))}", values)
            case 4 | 5:
                sql = f"UPDATE {how} {quoted(table)} SET {quoted(column)} = ?"
                limit = rng.choice(("", f" WHERE {where}"))
                connection.execute(sql + limit, [values[0], self._value()][: 1 + bool(limit)])
            case 6:
                connection.execute(f"DELETE FROM {quoted(table)} WHERE {where}", [self._value()])
            case _:
                if rng.random() < 0.2:
                    connection.execute(f"DELETE FROM {quoted(table)}")
                select = f"SELECT {names} FROM {quoted(table)} LIMIT 3"
                connection.execute(f"INSERT {how} INTO {quoted(table)} ({names}) {select}")

    def _value(self, column: str = "") -> Any:
        if column == "id":
            return self.rng.choice((None, 1, 2, 3, 4, 5))
        return self.rng.choice(VALUES)

    def rows(self) -> dict[str, list[Any]]:
        """All tables as they are, with the types of their values."""
        found = {}
        for table in user_tables(self.connections[0]):
            cursor = self.connections[0].execute(f"SELECT * FROM {quoted(table)}")
            names = [column[0] for column in cursor.description]
            rows = [exactly(dict(zip(names, row, strict=True))) for row in cursor]
            if rows:
                found[table] = sorted(rows, key=repr)
        return dict(sorted(found.items()))


async def play(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    writers = Writers(path, rng)
    source = lambda: SQLiteSource(path, name="shop")  # noqa: E731
    runner = Runner(source, rng.choice((1, 3)), rng, crashes=rng.choice((0.0, 0.05, 0.3)))
    with closing(writers):
        for _ in range(rng.randrange(20)):
            writers.write()
        for _ in range(60):
            choice = rng.random()
            if choice < 0.6:
                writers.write()
            elif choice < 0.63:
                writers.alter()
            elif choice < 0.95:
                await runner.step()
            else:
                await runner.die()
        await runner.drain()
        await runner.die()
        assert folded(runner.feed.changes()) == writers.rows(), f"SEED {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [9, 32, 97])
def test_the_feed_replayed_is_the_database(tmp_path: Path, seed: int) -> None:
    asyncio.run(play(tmp_path / "shop.db", seed))
