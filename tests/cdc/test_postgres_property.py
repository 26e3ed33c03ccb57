"""Random transactions against a real PostgreSQL, several of them open at once, while its connector
reads in small steps, dies and begins again, and tables are read anew: the feed, replayed, is the
database."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import psycopg2
import pytest

from aegis_cluster.cdc import PostgresSource
from aegis_cluster.errors import SourceError, SourceUnavailable
from aegis_cluster.testing.postgres_server import postgres
from chaos.cdc.fold import Fold, difference, row_text
from tests.cdc.model import Runner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.testing.postgres_server import PostgresServer
    from chaos.cdc.fold import Rows

TABLES = {
    "plain": "(id int PRIMARY KEY, x text, n numeric)",
    "pairs": '(k text COLLATE "C", n bigint, x timestamptz, PRIMARY KEY (k, n))',
    "keyless": "(x int, y text)",
    "large": "(id int PRIMARY KEY, small int, big text)",
    "added": "(id int PRIMARY KEY, x text)",
}
ROWS_AT_FIRST = 120


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres(logical_decoding_work_mem="64kB", max_replication_slots="20") as server:
        yield server


class Writers:
    """Connections with transactions that stay open for a while, and statements for them."""

    def __init__(self, server: PostgresServer, rng: random.Random) -> None:
        self.rng = rng
        self._main = server.connect()
        self._ask("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        for table in ("plain", "pairs", "keyless", "large"):
            self._create(table)
        for number in range(ROWS_AT_FIRST):
            self._ask(*self._insert("plain", number), *self._insert("pairs", number))
        self._ask(*self._insert("large", 1), *self._insert("keyless", 1))
        self._others = [psycopg2.connect(server.dsn) for _ in range(2)]
        for other in self._others:
            other.cursor().execute("SET lock_timeout = '20ms'")
            other.commit()

    def close(self) -> None:
        for other in (*self._others, self._main):
            other.close()

    def settle(self) -> None:
        """No transaction is open."""
        for other in self._others:
            other.rollback()

    def _ask(self, *statements: str) -> None:
        with self._main.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def _create(self, table: str) -> None:
        self._ask(f"CREATE TABLE {table} {TABLES[table]}")
        if table == "keyless":
            self._ask("ALTER TABLE keyless REPLICA IDENTITY FULL")
        if table == "large":
            self._ask("ALTER TABLE large ALTER COLUMN big SET STORAGE EXTERNAL")

    def _insert(self, table: str, key: int) -> list[str]:
        value = self.rng.randrange(1_000)
        match table:
            case "pairs":
                return [
                    f"INSERT INTO pairs VALUES ('k{key % 30}', {key % 7}, now())"
                    " ON CONFLICT DO NOTHING"
                ]
            case "keyless":
                return [f"INSERT INTO keyless VALUES ({key % 9}, 'y{value % 3}')"]
            case "large":
                return [
                    f"INSERT INTO large VALUES ({key % 20}, {value}, repeat('{value}', 1500))"
                    f" ON CONFLICT (id) DO UPDATE SET small = {value}"
                ]
            case "added":
                return [
                    f"INSERT INTO added VALUES ({key}, 'a\tb\\c{value}') ON CONFLICT DO NOTHING"
                ]
        return [
            f"INSERT INTO plain VALUES ({key}, 'x{value}', {value}.5)"
            f" ON CONFLICT (id) DO UPDATE SET x = 'again{value}'"
        ]

    def _statement(self) -> str:
        rng, key = self.rng, self.rng.randrange(200)
        match rng.randrange(10):
            case 0:
                return f"DELETE FROM plain WHERE id = {key}"
            case 1:
                return f"UPDATE plain SET id = {key + 300} WHERE id = {key}"
            case 2:
                return f"UPDATE pairs SET n = n + 10 WHERE k = 'k{key % 30}' AND n < 5"
            case 3:
                return f"UPDATE keyless SET y = 'z' WHERE x = {key % 9}"
            case 4:
                return f"DELETE FROM keyless WHERE x = {key % 9}"
            case 5:
                return f"UPDATE large SET small = small + 1 WHERE id = {key % 20}"
            case 6 if rng.random() < 0.2:
                return f"TRUNCATE {rng.choice(('plain', 'keyless', 'pairs'))}"
            case 7 if rng.random() < 0.1:
                return (
                    "INSERT INTO plain SELECT n, 'many', 0 FROM generate_series(500, 1500) n"
                    " ON CONFLICT DO NOTHING"
                )
        return self._insert(rng.choice(("plain", "pairs", "keyless", "large")), key)[0]

    def write(self) -> None:
        """A statement of one transaction, some of which end here."""
        connection, rng = self.rng.choice(self._others), self.rng
        cursor = connection.cursor()
        try:
            if rng.random() < 0.15:
                cursor.execute("SAVEPOINT s")
                cursor.execute(self._statement())
                cursor.execute("ROLLBACK TO SAVEPOINT s")
            cursor.execute(self._statement())
        except psycopg2.Error:
            connection.rollback()
            return
        if rng.random() < 0.4:
            (connection.commit if rng.random() < 0.85 else connection.rollback)()

    def alter(self) -> None:
        """A table comes or goes."""
        self.settle()
        with suppress(psycopg2.errors.DuplicateTable):
            if self.rng.random() < 0.5:
                self._create("added")
                self._ask(*self._insert("added", 1), *self._insert("added", 2))
            else:
                self._ask("DROP TABLE IF EXISTS added")

    def tables(self) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        with self._main.cursor() as cursor:
            cursor.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace ="
                           " 'public'::regnamespace")  # fmt: skip
            for (table,) in cursor.fetchall():
                cursor.execute(f"SELECT * FROM {table}")
                names = [column.name for column in cursor.description]
                rows = Counter(row_text(dict(zip(names, row, strict=True))) for row in cursor)
                if rows:
                    found[table] = rows
        return found


async def step(runner: Runner) -> bool:
    """Whether there may be more; a slot that its last reader still holds is waited for."""
    try:
        return (await runner.step()).more
    except SourceUnavailable:
        await runner.die()
        await asyncio.sleep(0.02)
        return True


async def play(server: PostgresServer, seed: int) -> None:
    rng = random.Random(seed)
    writers = Writers(server, rng)
    name = f"shop{seed}"
    runner = Runner(
        lambda: PostgresSource(server.dsn, name=name),
        rng.choice((1, 3)), rng, crashes=rng.choice((0.0, 0.03, 0.15)),
    )  # fmt: skip
    crashes, runner.crashes = runner.crashes, 0.0
    try:
        for _ in range(4):
            await step(runner)  # a slot is made once all open transactions have ended
        runner.crashes = crashes
        for _ in range(150):
            for _ in range(rng.randrange(6)):
                writers.write()
            choice = rng.random()
            if choice < 0.03:
                writers.alter()
            elif choice < 0.07:
                await runner.die()
            elif choice < 0.10:
                table = rng.choice(("plain", "large", "keyless", "pairs"))
                with suppress(SourceError, AttributeError):
                    runner.source._opened().ask_for(table)  # type: ignore[union-attr]
            else:
                await step(runner)
        writers.settle()
        runner.crashes = 0.0
        wanted, found = writers.tables(), ["nothing"]
        deadline = time.monotonic() + 20
        while found and time.monotonic() < deadline:
            while await step(runner):
                pass
            fold = Fold()
            for change in runner.feed.changes():
                fold.add(change)
            found = difference(fold.tables(), wanted)
        assert not fold.problems, f"SEED {seed}"
        assert not found, f"SEED {seed}"
    finally:
        await runner.die()
        writers.close()
        drop(server, f"aegis_{name}")


def drop(server: PostgresServer, slot: str) -> None:
    connection = server.connect()
    deadline = time.monotonic() + 10
    with connection.cursor() as cursor:
        while time.monotonic() < deadline:
            with suppress(psycopg2.errors.ObjectInUse):
                cursor.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE"
                    " slot_name = %s",
                    (slot,),
                )
                break
        cursor.execute(f'DROP PUBLICATION IF EXISTS "{slot}"')
    connection.close()


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_feed_replayed_is_the_database(
    server: PostgresServer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aegis_cluster.cdc.postgres.LOOK_S", 0.05)
    asyncio.run(play(server, seed))
