"""A real PostgreSQL: snapshot while others write, every type, large values, truncate, restarts."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg2
import pytest

from aegis_cluster import StreamingEngine, TopicConfig
from aegis_cluster.cdc import (
    UNCHANGED,
    CDCEngine,
    Delete,
    Insert,
    PostgresSource,
    PostgresTarget,
    SourceError,
    SourceUnavailable,
    Truncate,
    Update,
)
from aegis_cluster.testing.postgres_server import postgres
from tests.cdc.model import folded
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.cdc import ChangeEvent
    from aegis_cluster.testing.postgres_server import PostgresServer

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(90)]

SETUP = """
CREATE TYPE mood AS ENUM ('sad', 'it''s ok');
CREATE TABLE users (id bigint PRIMARY KEY, name text, balance numeric);
CREATE TABLE kinds (
    id uuid, n numeric, ts timestamptz, t timestamp, d date, j json, b jsonb, raw bytea, m mood,
    f float8, flag bool, ints int[], texts text[], moods mood[], nested numeric[], i interval,
    odd varchar(9), pad char(4), PRIMARY KEY (id)
);
CREATE TABLE logs (line text);
CREATE TABLE whole (a int, b text); ALTER TABLE whole REPLICA IDENTITY FULL;
"""
KIND = """
INSERT INTO kinds VALUES ('6ba7b810-9dad-11d1-80b4-00c04fd430c8', 12345678901234567890.00000000012,
 '2024-02-29 23:59:59.123456+02', '1999-12-31 00:00:00.5', '0044-03-15 BC', '{"a": [1, 2.50]}',
 '{"b": null}', '\\x00ff27', 'it''s ok', 'Infinity', true, '{1,NULL,-3}',
 ARRAY['a,"b\\', NULL, 'NULL', ''], '{sad}', '{{1.10,2},{3,4}}', '1 day 02:00', 'x''y', 'ab')
"""
VALUES: dict[str, Any] = {
    "id": UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    "n": Decimal("12345678901234567890.00000000012"),
    "ts": datetime(2024, 2, 29, 21, 59, 59, 123456, tzinfo=UTC),
    "t": datetime(1999, 12, 31, 0, 0, 0, 500000),  # noqa: DTZ001 - as it is in the database
    "d": "0044-03-15 BC",
    "j": {"a": [1, 2.5]},
    "b": {"b": None},
    "raw": b"\x00\xff'",
    "m": "it's ok",
    "f": float("inf"),
    "flag": True,
    "ints": [1, None, -3],
    "texts": ['a,"b\\', None, "NULL", ""],
    "moods": ["sad"],
    "nested": [[Decimal("1.10"), Decimal(2)], [Decimal(3), Decimal(4)]],
    "i": "1 day 02:00:00",
    "odd": "x'y",
    "pad": "ab  ",
}


def writing(server: PostgresServer, stop: threading.Event) -> None:
    """Somebody writes all the time."""
    connection = server.connect()
    with connection.cursor() as cursor:
        number = 0
        while not stop.is_set() and number < 1_500:
            number += 1
            cursor.execute(
                "INSERT INTO users VALUES (%s, 'w', 1) ON CONFLICT (id) DO UPDATE SET balance ="
                " users.balance + 1; DELETE FROM users WHERE id = %s",
                (number % 700, (number * 7) % 900),
            )
    connection.close()


async def read_until(cdc: CDCEngine, want: Wanted) -> list[ChangeEvent]:
    """All changes, up to the moment when the users are those of the database."""
    changes: list[ChangeEvent] = []
    async with cdc.subscribe("*") as subscription:
        async for change in subscription:
            changes.append(change)
            if len(changes) % 100 and not want.is_last(change):
                continue
            if folded(changes).get("users", []) == await asyncio.to_thread(want.rows):
                return changes
    raise AssertionError("the subscription ended")


class Wanted:
    """The rows of `users` once nobody writes any more, and the last change to look for."""

    def __init__(self, server: PostgresServer, last_id: int) -> None:
        self._server = server
        self._last_id = last_id

    def is_last(self, change: ChangeEvent) -> bool:
        return change.key == {"id": self._last_id}

    def rows(self) -> list[Any]:
        connection = self._server.connect()
        with connection.cursor() as cursor:
            cursor.execute("SELECT id, name, balance FROM users")
            rows = [dict(zip(("id", "name", "balance"), row, strict=True)) for row in cursor]
        connection.close()
        return sorted(({n: (type(v), v) for n, v in row.items()} for row in rows), key=repr)


def test_a_database_is_captured_without_gap_or_repeat(tmp_path: Path) -> None:
    with postgres() as server:
        asyncio.run(asyncio.wait_for(play(tmp_path, server), 60))


async def play(tmp_path: Path, server: PostgresServer) -> None:
    connection = server.connect()
    cursor = connection.cursor()
    cursor.execute(SETUP)
    cursor.execute("INSERT INTO users SELECT n, 'first', n FROM generate_series(1, 900) n")
    cursor.execute(KIND)

    def source() -> PostgresSource:
        return PostgresSource(server.dsn, name="shop")

    async with StreamingEngine.open(tmp_path / "data") as engine:
        stop = threading.Event()
        writer = threading.Thread(target=writing, args=(server, stop))
        writer.start()
        try:
            async with CDCEngine(engine, source(), topic=TopicConfig(partitions=2)):
                await asyncio.sleep(0.3)  # whoever comes next shall have something to find
            async with CDCEngine(engine, source()):
                await asyncio.sleep(0.3)
        finally:
            stop.set()
            writer.join()
        connection.close()
        server.kill()
        server.start()
        connection = server.connect()
        cursor = connection.cursor()
        async with CDCEngine(engine, source()) as cdc:
            cursor.execute("INSERT INTO users VALUES (5000, 'last', 0.10)")
            changes = await read_until(cdc, Wanted(server, 5000))
            kinds = [change for change in changes if change.source.table == "kinds"]
            assert [change.is_snapshot for change in kinds] == [True]
            await live(cdc, cursor, kinds[0])
    connection.close()


async def live(cdc: CDCEngine, cursor: Any, snapshot: ChangeEvent) -> None:
    """Types, large values, keys, truncate, a table without key, a column more."""
    assert isinstance(snapshot, Insert)
    assert snapshot.new_row == VALUES
    cursor.execute("DELETE FROM kinds")
    cursor.execute(KIND)
    cursor.execute("INSERT INTO logs VALUES ('not captured')")
    cursor.execute("ALTER TABLE users ADD COLUMN big text")
    cursor.execute("INSERT INTO users VALUES (6000, 'x', 1, (SELECT string_agg(md5(n::text), '')"
                   " FROM generate_series(1, 1000) n))")  # fmt: skip
    cursor.execute("UPDATE users SET name = 'y' WHERE id = 6000")
    cursor.execute("UPDATE users SET id = 6001 WHERE id = 6000")
    cursor.execute("INSERT INTO whole VALUES (1, 'a'), (1, 'a')")
    cursor.execute("UPDATE whole SET b = 'b'")
    cursor.execute("TRUNCATE users")
    found: dict[str, list[ChangeEvent]] = {"users": [], "kinds": [], "whole": [], "logs": []}
    async with cdc.subscribe("*") as subscription:
        async for change in subscription:
            is_old = change.source.table == "users" and (change.key or {}).get("id", 6000) < 6000
            if not is_old and not change.is_snapshot:
                found[change.source.table].append(change)
            counts = {table: len(events) for table, events in found.items()}
            if counts == {"users": 6, "kinds": 2, "whole": 4, "logs": 0}:
                break
    delete, again = found["kinds"]
    assert isinstance(delete, Delete)
    assert delete.old_row == {"id": VALUES["id"]}
    assert isinstance(again, Insert)
    assert again.new_row == VALUES
    assert again.transaction_id is not None
    rows = [change for change in found["users"] if not isinstance(change, Truncate)]
    rows.sort(key=lambda change: change.position)
    insert, update, gone, moved = rows
    assert isinstance(insert, Insert)
    assert len(insert.new_row["big"]) == 32_000
    assert isinstance(update, Update)
    assert update.new_row == {"id": 6000, "name": "y", "balance": 1, "big": UNCHANGED}
    assert isinstance(gone, Delete)
    assert gone.key == {"id": 6000}
    assert moved.key == {"id": 6001}
    last = found["whole"][-1]
    assert isinstance(last, Update)
    assert (last.old_row, last.new_row) == ({"a": 1, "b": "a"}, {"a": 1, "b": "b"})
    assert not found["logs"]


def in_use(cursor: Any) -> bool:
    cursor.execute("SELECT 1 FROM pg_replication_slots WHERE active_pid IS NOT NULL")
    return cursor.fetchone() is not None


def test_a_feed_is_mirrored_into_postgres(tmp_path: Path) -> None:
    """Types come back as they were; what is missing there is said, and mended goes on."""

    async def work(server: PostgresServer) -> None:
        connection = server.connect()
        cursor = connection.cursor()
        cursor.execute("CREATE SCHEMA copy; SET search_path = public")
        cursor.execute(SETUP)
        cursor.execute(KIND)
        cursor.execute("INSERT INTO users VALUES (1, 'Ann', 1.5), (2, 'Bob', 2.5)")
        cursor.execute("INSERT INTO whole VALUES (1, 'a'), (1, 'a'), (2, NULL)")
        target = PostgresTarget(server.dsn, schema="copy")
        tables = ["users", "kinds", "whole"]
        source = PostgresSource(server.dsn, name="shop", tables=tables)
        async with (
            StreamingEngine.open(tmp_path / "data") as engine,
            CDCEngine(engine, source) as cdc,
        ):
            async with cdc.apply_to(target) as mirror:
                with pytest.raises(SourceError, match=r"no table .*; make it"):
                    await mirror.stopped()
            for table in tables:
                cursor.execute(f"CREATE TABLE copy.{table} (LIKE public.{table} INCLUDING ALL)")
            async with cdc.apply_to(target) as mirror:
                cursor.execute("UPDATE users SET id = 3, name = 'Bo?%' WHERE id = 2")
                cursor.execute("DELETE FROM whole WHERE ctid = (SELECT min(ctid) FROM whole)")
                cursor.execute(
                    "UPDATE whole SET b = 'b' WHERE a = 2; DELETE FROM users WHERE id = 1"
                )
                for table in tables:
                    here, there = (
                        f"SELECT t::text FROM {table} t",
                        f"SELECT t::text FROM copy.{table} t",
                    )
                    same, back = f"{there} EXCEPT ALL {here}", f"{here} EXCEPT ALL {there}"
                    found: list[Any] = [None]
                    while found:
                        await mirror.caught_up()
                        cursor.execute(f"({same}) UNION ALL ({back})")
                        found = cursor.fetchall()
        connection.close()

    with postgres() as server:
        asyncio.run(asyncio.wait_for(work(server), 18))


def can_log_in(server: PostgresServer, password: str) -> bool:
    try:
        psycopg2.connect(server.dsn.replace("postgres@", f"locked:{password}@")).close()
    except psycopg2.OperationalError:
        return False
    return True


async def changes_of_tables(cdc: CDCEngine, cursor: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A table that is made, and has a type that nobody knows; one that is dropped; a slot that is
    in use."""
    async with cdc.subscribe("made") as changes:
        cursor.execute("CREATE TYPE point_of AS (x int, y int)")
        cursor.execute("CREATE TABLE made (id int PRIMARY KEY, p point_of)")
        cursor.execute("INSERT INTO made VALUES (1, (2, 3))")
        first = await anext(changes)
        assert isinstance(first, Insert)
        assert first.new_row == {"id": 1, "p": "(2,3)"}
        assert "The type point_of of postgres is not known here" in caplog.text
        cursor.execute("DROP TABLE made")
        while not isinstance(await anext(changes), Truncate):
            pass
        assert "Table public.made of postgres is gone" in caplog.text
    with pytest.raises(
        SourceError, match=r"no table 'made' that is captured; there are: public\.t"
    ):
        await cdc.snapshot("made")
    await cdc.snapshot("t")


def test_a_server_without_logical_log_says_what_to_set(tmp_path: Path) -> None:
    async def work(server: PostgresServer) -> None:
        async with StreamingEngine.open(tmp_path / "data", request_timeout=5) as engine:
            with pytest.raises(SourceError, match="wal_level = replica; set it to logical"):
                async with CDCEngine(engine, PostgresSource(server.dsn)):
                    pass
            server.connect().cursor().execute("CREATE TABLE t (id int PRIMARY KEY)")

    with postgres(wal_level="replica") as server:
        asyncio.run(asyncio.wait_for(work(server), 20))


def test_a_slot_in_use_is_waited_for_and_said(tmp_path: Path) -> None:
    async def work(server: PostgresServer) -> None:
        server.connect().cursor().execute("CREATE TABLE t (id int PRIMARY KEY)")
        async with (
            StreamingEngine.open(tmp_path / "data", request_timeout=2) as engine,
            CDCEngine(engine, PostgresSource(server.dsn, name="shop")) as cdc,
        ):
            while cdc.state is not None and not cdc.state.is_current:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            other = PostgresSource(server.dsn, name="shop2", slot="aegis_shop")
            with pytest.raises(SourceUnavailable, match="slot aegis_shop is in use by"):
                async with CDCEngine(engine, other):
                    pass

    with postgres() as server:
        asyncio.run(asyncio.wait_for(work(server), 20))


def test_what_cannot_be_captured_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aegis_cluster.cdc.postgres.LOOK_S", 0.1)

    async def refused(engine: StreamingEngine, source: PostgresSource) -> str:
        with pytest.raises(SourceError) as caught:
            async with CDCEngine(engine, source):
                pass
        return str(caught.value)

    async def work(server: PostgresServer) -> None:
        connection = server.connect()
        cursor = connection.cursor()
        cursor.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE guest LOGIN")
        cursor.execute("INSERT INTO t VALUES (1)")
        async with StreamingEngine.open(tmp_path / "data") as engine:
            guest = PostgresSource(server.dsn.replace("postgres@", "guest@"), tables=["t"])
            assert "REPLICATION" in await refused(engine, guest)
            other = PostgresSource(server.dsn.replace("/postgres?", "/nothing?"))
            assert "does not exist" in await refused(engine, other)
            cursor.execute("CREATE ROLE reader LOGIN REPLICATION")
            cursor.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
            cursor.execute("GRANT CREATE ON DATABASE postgres TO reader")
            reader = PostgresSource(server.dsn.replace("postgres@", "reader@"), tables=["t"])
            assert "own the tables" in await refused(engine, reader)
            hba = server.directory / "pg_hba.conf"
            hba.write_text("local all locked scram-sha-256\n" + hba.read_text())
            cursor.execute("SELECT pg_reload_conf()")
            wrong = PostgresSource(server.dsn.replace("postgres@", "locked:wrong@"))
            await asyncio.to_thread(wait_until, lambda: not can_log_in(server, "wrong"), "reloaded")
            assert "password authentication failed" in await refused(engine, wrong)
            nothing = PostgresSource(server.dsn, tables=["u"])
            assert "no table 'u'" in await refused(engine, nothing)
            async with CDCEngine(engine, PostgresSource(server.dsn)) as cdc:
                await changes_of_tables(cdc, cursor, caplog)
            # The server notices a little later that its reader has gone.
            await asyncio.to_thread(wait_until, lambda: not in_use(cursor), "the slot is free")
            cursor.execute("SELECT pg_drop_replication_slot('aegis_postgres')")
            cursor.execute("DELETE FROM t; INSERT INTO t VALUES (2)")
            assert "is lost" in await refused(engine, PostgresSource(server.dsn))
            again = PostgresSource(server.dsn, on_lost_slot="snapshot")
            async with CDCEngine(engine, again) as cdc, cdc.subscribe("t") as changes:
                found = [await anext(changes) for _ in range(3)]
            assert [change.key for change in found] == [{"id": 1}, None, {"id": 2}]
            assert isinstance(found[1], Truncate)
        connection.close()

    with postgres() as server:
        asyncio.run(asyncio.wait_for(work(server), 40))


def test_without_a_server_it_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        async with StreamingEngine.open(tmp_path / "data", request_timeout=2) as engine:
            source = PostgresSource(f"postgresql://nobody@/shop?host={tmp_path}")
            with pytest.raises(Exception, match=r"could not begin in time.*does not answer"):
                async with CDCEngine(engine, source):
                    pass

    asyncio.run(work())
