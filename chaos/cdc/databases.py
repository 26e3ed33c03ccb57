"""What is captured: a PostgreSQL under its own `pgbench`, or an SQLite file with four writers."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from aegis_cluster.node.orphans import die_with_parent
from chaos.cdc.fold import Rows, row_text

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.testing.postgres_server import PostgresServer

WRITERS: Final = 4
TABLES: Final = ("pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history")


class Database(Protocol):
    """Somebody writes to it from `begin` on, until `end`; `tables` is what then is there."""

    source: str
    """As a connector's file names it."""
    once: frozenset[str]
    """Tables that a transaction changes once at most."""

    def begin(self) -> None: ...
    def keep_up(self) -> None:
        """Start again the writers that died with it."""

    def crash(self) -> None:
        """And come up again."""

    def end(self) -> None: ...
    def tables(self) -> dict[str, Rows]: ...


class Postgres:
    """TPC-B: each transaction updates one row of three tables and adds one to the fourth, which
    has no primary key."""

    once = frozenset(TABLES)

    def __init__(self, server: PostgresServer, *, scale: int = 1) -> None:
        self._server = server
        self.source = server.dsn
        self._writing: subprocess.Popen[bytes] | None = None
        if server.tool("pgbench", "-i", "-q", "-s", str(scale)).wait() != 0:
            raise RuntimeError("pgbench could not fill the database.")
        self._ask("ALTER TABLE pgbench_history REPLICA IDENTITY FULL")

    def _ask(self, sql: str) -> list[Any]:
        with closing(self._server.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall()) if cursor.description else []

    def begin(self) -> None:
        # -n: no VACUUM, and above all no emptying of the history.
        self._writing = self._server.tool("pgbench", "-n", "-c", str(WRITERS), "-T", "3600")

    def keep_up(self) -> None:
        if self._writing is not None and self._writing.poll() is not None:
            self.begin()

    def crash(self) -> None:
        self._server.kill()
        self._server.start()

    def end(self) -> None:
        if self._writing is not None:
            self._writing.terminate()
            self._writing.wait()
            self._writing = None
            # The server may still be at what a client had asked for last, a commit for example.
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and self._ask(
                "SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgbench'"
            ):
                time.sleep(0.05)

    def tables(self) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        with closing(self._server.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")  # all at one moment
            for table in TABLES:
                cursor.execute(f"SELECT * FROM {table}")
                names = [column.name for column in cursor.description]
                rows = Counter(row_text(dict(zip(names, row, strict=True))) for row in cursor)
                if rows:
                    found[table] = rows
        return found


class SQLite:
    """Four processes insert, replace, update and delete rows of three tables."""

    once = frozenset[str]()

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed
        self.source = f"sqlite:{path}"
        self._writers: list[subprocess.Popen[bytes]] = []
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.executescript(
                "PRAGMA journal_mode = WAL;"
                "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT UNIQUE, x);"
                "CREATE TABLE pairs (a TEXT, b INTEGER, x, PRIMARY KEY (a, b)) WITHOUT ROWID;"
                "CREATE TABLE notes (x, y);"
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400)"
                " INSERT INTO users SELECT i, 'first ' || i, i FROM n;"
            )

    def begin(self) -> None:
        for number in range(WRITERS):
            self._start(number)

    def _start(self, number: int) -> None:
        self._seed += 1
        command = [sys.executable, "-m", "chaos.cdc.databases", str(self._path), str(self._seed)]
        self._writers.insert(number, subprocess.Popen(command))

    def keep_up(self) -> None:
        for number, writer in enumerate(self._writers):
            if writer.poll() is not None:
                self._writers.pop(number)
                self._start(number)

    def crash(self) -> None:
        """One of its writers: SQLite has no process of its own."""
        self._writers[0].kill()
        self._writers[0].wait()

    def end(self) -> None:
        for writer in self._writers:
            writer.kill()
            writer.wait()
        self._writers.clear()

    def tables(self) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        with closing(sqlite3.connect(self._path, timeout=30)) as connection:
            for table in ("users", "pairs", "notes"):
                cursor = connection.execute(f"SELECT * FROM {table}")
                names = [column[0] for column in cursor.description]
                rows = Counter(row_text(dict(zip(names, row, strict=True))) for row in cursor)
                if rows:
                    found[table] = rows
        return found


def write(connection: sqlite3.Connection, rng: random.Random) -> None:
    """One transaction of one to five statements, some of which may fail; one in ten is undone."""
    connection.execute("BEGIN IMMEDIATE")
    for _ in range(rng.randint(1, 5)):
        key, value = rng.randrange(500), rng.choice((rng.random(), rng.randrange(99), "x", b"y"))
        with suppress(sqlite3.IntegrityError):
            match rng.randrange(7):
                case 0:
                    connection.execute("DELETE FROM users WHERE id = ?", (key,))
                case 1:
                    connection.execute("UPDATE users SET x = ? WHERE id = ?", (value, key))
                case 2:
                    connection.execute(
                        "INSERT OR REPLACE INTO users VALUES (?, ?, ?)",
                        (key, f"name {rng.randrange(500)}", value),
                    )
                case 3:
                    connection.execute(
                        "INSERT INTO pairs VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET x = x || 1",
                        (f"k{key % 20}", key % 7, value),
                    )
                case 4:
                    connection.execute("UPDATE OR REPLACE pairs SET b = b + 1 WHERE a = ?", ("k3",))
                case 5:
                    connection.execute("INSERT INTO notes VALUES (?, ?)", (key, value))
                case _:
                    connection.execute("DELETE FROM notes WHERE x = ?", (key,))
    connection.execute("ROLLBACK" if rng.random() < 0.1 else "COMMIT")


def main() -> None:
    """A writer: until it is killed."""
    die_with_parent(os.getppid())
    path, rng = sys.argv[1], random.Random(int(sys.argv[2]))
    with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as connection:
        while True:
            write(connection, rng)
            time.sleep(rng.random() / 100)


if __name__ == "__main__":
    main()
