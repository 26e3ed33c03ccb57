"""CDCEngine over SQLite on an embedded engine: what subscribers get, and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, StreamingEngine, TopicConfig
from aegis_cluster.cdc import (
    CDCConfig,
    CDCEngine,
    Delete,
    Insert,
    Operation,
    SQLiteSource,
    Update,
)
from aegis_cluster.config import CdcSettings, StreamingConfig
from aegis_cluster.errors import ConfigError, InvalidTopic, SourceError, TopicExists
from aegis_cluster.subscribe_config import AckMode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster.cdc import ChangeEvent, ChangeSubscription


ROOT = Path(__file__).parents[2]


def run(path: Path, work: Callable[[StreamingEngine], Awaitable[Any]], **more: Any) -> Any:
    async def opened() -> Any:
        async with asyncio.timeout(15), StreamingEngine.open(path / "data", **more) as engine:
            return await work(engine)

    return asyncio.run(opened())


async def take(changes: ChangeSubscription, count: int) -> list[ChangeEvent]:
    return [await anext(changes) for _ in range(count)]


def test_each_subscriber_sees_what_it_wants(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop)) as cdc:
            connection.execute("UPDATE users SET mail = 'ann@y' WHERE id = 1")
            connection.execute("INSERT INTO orders VALUES (7, 1, 9.5)")
            connection.execute("DELETE FROM users WHERE id = 2")

            async with cdc.subscribe("*") as everything:
                ann, bob, update, order, delete = await take(everything, 5)
            assert isinstance(ann, Insert)
            assert ann.is_snapshot
            assert ann.new_row == {"id": 1, "name": "Ann", "mail": "ann@x"}
            assert bob.key == {"id": 2}
            assert isinstance(update, Update)
            assert update.old_row == {"id": 1, "name": "Ann", "mail": "ann@x"}
            assert update.new_row == {"id": 1, "name": "Ann", "mail": "ann@y"}
            assert (order.source.database, order.source.table) == ("shop", "orders")
            assert isinstance(delete, Delete)
            assert delete.old_row == {"id": 2, "name": "Bob", "mail": "bob@x"}
            assert ann.position < update.position < order.position < delete.position
            assert update.timestamp <= delete.timestamp

            wanted = CDCConfig(
                operations=[Operation.UPDATE, Operation.DELETE],
                include_old_values=False,
                columns=["id", "mail"],
                masks={"mail": lambda mail: mail.split("@")[1]},
                where=lambda change: change.key is not None and change.key["id"] < 9,
            )
            async with cdc.subscribe("users", wanted) as some:
                update, delete = await take(some, 2)
            assert isinstance(update, Update)
            assert (update.old_row, update.new_row) == (None, {"id": 1, "mail": "y"})
            assert isinstance(delete, Delete)
            assert delete.old_row == {"id": 2}

            live = CDCConfig(snapshot=False, masks={"mail": "***"})
            async with cdc.subscribe(["u*"], live) as changes:
                (update,) = await take(changes, 1)
                assert isinstance(update, Update)
                assert update.new_row["mail"] == "***"

    run(tmp_path, work)


def test_a_name_goes_on_where_it_was_and_the_feed_where_the_connector_stopped(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    named = CDCConfig(name="billing", ack_mode=AckMode.MANUAL)

    async def first(engine: StreamingEngine) -> None:
        async with (
            CDCEngine(engine, SQLiteSource(shop)) as cdc,
            cdc.subscribe("users", named) as it,
        ):
            (ann,) = await take(it, 1)
            await ann.ack()
        connection.execute("INSERT INTO users VALUES (3, 'Cy', NULL)")

    async def second(engine: StreamingEngine) -> list[Any]:
        connection.execute("INSERT INTO users VALUES (4, 'Di', NULL)")
        async with (
            CDCEngine(engine, SQLiteSource(shop)) as cdc,
            cdc.subscribe("users", named) as it,
        ):
            found = await take(it, 3)
        return [change.key for change in found]

    run(tmp_path, first)
    assert run(tmp_path, second) == [{"id": 2}, {"id": 3}, {"id": 4}]


def test_the_feed_is_debeziums_envelope_with_tombstones(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop), topic=TopicConfig(partitions=3)) as cdc:
            connection.execute("INSERT INTO orders VALUES (7, 1, 9.5)")
            connection.execute("DELETE FROM orders")
            async with cdc.subscribe("orders") as changes:
                await take(changes, 2)
            found = await engine.history("shop", 10)
        orders = [message for message in found if message.key == '{"id":7}']
        assert len({message.partition for message in orders}) == 1
        created, deleted, tombstone = (message.payload for message in orders)
        assert created["op"] == "c"
        assert created["before"] is None
        assert created["after"] == {"id": 7, "user": 1, "amount": 9.5}
        assert created["ts_ms"] >= created["source"]["ts_ms"]
        assert created["source"]["connector"] == "sqlite"
        assert created["source"]["name"] == "shop"
        assert created["source"]["snapshot"] == "false"
        assert (deleted["op"], deleted["after"]) == ("d", None)
        assert tombstone is None
        with pytest.raises(InvalidTopic):
            await engine.publish("shop", Message(payload={"op": "c"}))

    run(tmp_path, work)


def test_what_cannot_be_captured_says_what_to_do(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    connection.execute("CREATE TABLE t (rowid, oid, _rowid_)")

    async def refused(engine: StreamingEngine, source: SQLiteSource) -> str:
        with pytest.raises((SourceError, TopicExists)) as caught:
            async with CDCEngine(engine, source):
                pass
        return str(caught.value)

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic("plain")
        assert "primary key" in await refused(engine, SQLiteSource(shop))
        missing = SQLiteSource(tmp_path / "none.db")
        assert "There is no database" in await refused(engine, missing)
        nothing = SQLiteSource(shop, tables=["userz"])
        assert "no table 'userz'" in await refused(engine, nothing)
        some = SQLiteSource(shop, tables=["users"], name="plain")
        assert "another name" in await refused(engine, some)
        async with CDCEngine(engine, SQLiteSource(shop, tables=["users"])):
            pass
        other = SQLiteSource(shop, tables=["users"], name="other")
        assert "is captured into the feed" in await refused(engine, other)

    run(tmp_path, work)


def test_a_connector_that_is_not_allowed_does_not_run(tmp_path: Path, shop: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        with pytest.raises(ConfigError, match=r"cdc\.enabled"):
            async with CDCEngine(engine, SQLiteSource(shop)):
                pass

    run(tmp_path, work, config=StreamingConfig(cdc=CdcSettings(enabled=False)))


def test_a_lost_database_ends_subscriptions_after_what_was_sent(tmp_path: Path, shop: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop)) as cdc, cdc.subscribe("*") as changes:
            await asyncio.to_thread(shop.write_bytes, b"this is no database any more" * 1000)
            await take(changes, 2)
            with pytest.raises(SourceError):
                await take(changes, 1)

    run(tmp_path, work)


def test_changes_held_are_few(tmp_path: Path, shop: Path, connection: sqlite3.Connection) -> None:
    """With `buffer_size = 10` no batch has more than 5 changes, in a snapshot or after it."""
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO orders VALUES (?, 1, 1)", ((n,) for n in range(100)))
    connection.execute("COMMIT")

    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop)) as cdc, cdc.subscribe("orders") as found:
            with closing(sqlite3.connect(shop)) as other, other:
                other.execute("UPDATE orders SET amount = 2")
            await take(found, 200)
            rows = await engine.history("shop", 300)
            assert len(rows) == 202

    run(tmp_path, work, config=StreamingConfig(cdc=CdcSettings(buffer_size=10)))


def test_a_copy_that_is_put_back_and_a_feed_that_is_made_anew_are_read_again(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    async def captured(engine: StreamingEngine, count: int) -> list[Any]:
        source = SQLiteSource(shop, tables=["users"])
        async with CDCEngine(engine, source) as cdc, cdc.subscribe("users") as changes:
            return await take(changes, count)

    async def work(engine: StreamingEngine) -> None:
        await captured(engine, 2)
        with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
            connection.backup(copy)
            connection.execute("DELETE FROM users WHERE id = 1")
            await captured(engine, 3)
            copy.backup(connection)
        found = [change.operation for change in await captured(engine, 6)]
        assert found[2:] == [
            Operation.DELETE, Operation.TRUNCATE, Operation.INSERT, Operation.INSERT,
        ]  # fmt: skip

        connection.execute("DELETE FROM _aegis_cdc_state")
        assert [change.operation for change in (await captured(engine, 9))[6:]] == found[3:]

        await engine.delete_topic("shop")
        assert [change.key for change in await captured(engine, 3)] == [None, {"id": 1}, {"id": 2}]

    run(tmp_path, work)


def test_the_page_s_first_example_runs_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cdc.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=15, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "new {'id': 1, 'name': 'Ann'}",
        "{'id': 1, 'name': 'Ann'} -> {'id': 1, 'name': 'Anne'}",
        "gone {'id': 1, 'name': 'Anne'}",
    ]


def test_what_is_left_out_of_the_feed_nobody_reads(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    tables = {
        "users": CDCConfig(
            columns=["name", "mail"],
            masks={"mail": "***"},
            operations=[Operation.INSERT, Operation.DELETE],
            where=lambda change: change.key != {"id": 2},
        )
    }

    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop), tables=tables) as cdc:
            connection.execute("UPDATE users SET name = 'x'")
            connection.execute("INSERT INTO orders VALUES (7, 1, 9.5)")
            connection.execute("DELETE FROM users")
            connection.execute("INSERT INTO orders VALUES (8, 1, 9.5)")
            async with cdc.subscribe("*") as changes:
                found = await take(changes, 4)
        ann, order, gone, _ = found
        assert isinstance(ann, Insert)
        assert (ann.new_row, ann.key) == ({"name": "Ann", "mail": "***"}, {"id": 1})
        assert (order.key, gone.key) == ({"id": 7}, {"id": 1})
        assert isinstance(gone, Delete)
        assert gone.old_row == {"name": "x", "mail": "***"}

    run(tmp_path, work)
