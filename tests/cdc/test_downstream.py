"""What stands on a feed: whole transactions, the mirror into another database, the outbox."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Offset, StreamingEngine, SubscribeConfig, TopicConfig, cdc, sync
from aegis_cluster.cdc import (
    CDCConfig,
    CDCEngine,
    Insert,
    Operation,
    OutboxConfig,
    SourceError,
    SQLiteSource,
    SQLiteTarget,
)
from aegis_cluster.cdc.mirror import Mirror
from aegis_cluster.errors import ConfigError, Misuse
from aegis_cluster.subscribe_config import AckMode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


def run(path: Path, work: Callable[[StreamingEngine], Awaitable[Any]]) -> Any:
    async def opened() -> Any:
        async with asyncio.timeout(18), StreamingEngine.open(path / "data") as engine:
            return await work(engine)

    return asyncio.run(opened())


def rows(path: Path, table: str) -> list[Any]:
    """None where there is no such table yet."""
    with closing(sqlite3.connect(path)) as connection:
        try:
            return sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
        except sqlite3.OperationalError:
            return []


def test_whole_transactions_and_never_a_part(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    named = CDCConfig(name="audit", ack_mode=AckMode.MANUAL, snapshot=False)

    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop)) as cdc:
            async with cdc.subscribe("*") as changes:
                first = await anext(changes.transactions())
                assert [change.key for change in first] == [{"id": 1}, {"id": 2}]
                assert all(change.is_snapshot for change in first)
            async with cdc.subscribe("users", named) as changes:
                steps = changes.transactions()
                for number in range(3):
                    connection.execute("BEGIN")
                    for row in range(5):
                        connection.execute(
                            "INSERT INTO users (name) VALUES (?)", (f"{number}/{row}",)
                        )
                        connection.execute("INSERT INTO orders (amount) VALUES (1)")
                    connection.execute("COMMIT")
                    found = await anext(steps)
                    assert len(found) == 5
                    assert {one.source.table for one in found} == {"users"}
                    if number == 0:
                        await found.ack()
            async with cdc.subscribe("users", named) as changes:
                again = await anext(changes.transactions())
                first_row = again.changes[0]
                assert isinstance(first_row, Insert)
                assert first_row.new_row["name"] == "1/0"
            with pytest.raises(Misuse, match="MANUAL"):
                await anext(cdc.subscribe("*", CDCConfig(name="x")).transactions())

    run(tmp_path, work)


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_mirror_has_every_change_once_whenever_it_dies(
    tmp_path: Path,
    shop: Path,
    connection: sqlite3.Connection,
    partitions: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aegis_cluster.cdc.mirror.PAUSE_S", 0.01)
    seed = random.SystemRandom().randrange(10**6)
    print(f"SEED {seed}")  # noqa: T201 - shown when it fails
    rng = random.Random(seed)
    copy = tmp_path / "copy.db"
    connection.execute("CREATE TABLE notes (x, y)")

    class Dying(Mirror):
        def _apply(self, messages: Any) -> None:
            """Now and then the transaction is broken off in its middle."""
            some = messages[: rng.randint(1, len(messages))]
            before = self._change
            left = [rng.randint(0, 2 * len(some))]

            def change(one: Any) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise sqlite3.OperationalError("database is locked")
                before(one)

            self._change = change  # type: ignore[method-assign,assignment]
            try:
                super()._apply(some)
            finally:
                del self._change
            if len(some) < len(messages):
                super()._apply(messages[len(some) :])

    async def work(engine: StreamingEngine) -> None:
        topic = TopicConfig(partitions=partitions)
        async with CDCEngine(engine, SQLiteSource(shop), topic=topic) as cdc:
            for turn in range(3):
                for _ in range(30):
                    key = rng.randrange(20)
                    connection.execute(
                        "INSERT OR REPLACE INTO users (id, name) VALUES (?, ?)", (key, turn)
                    )
                    connection.execute("DELETE FROM users WHERE id = ?", (rng.randrange(20),))
                    connection.execute("INSERT INTO notes VALUES (?, ?)", (key, b"y"))
                    connection.execute(
                        "DELETE FROM notes WHERE rowid ="
                        " (SELECT max(rowid) FROM notes WHERE x = ?)",
                        (rng.randrange(20),),
                    )
                if turn == 1:
                    connection.execute("ALTER TABLE users ADD COLUMN more DEFAULT 7")
                async with Dying(engine, cdc.feed, SQLiteTarget(copy), lambda _: True) as mirror:
                    while rows(copy, "users") != rows(shop, "users"):
                        await mirror.caught_up()
            assert rows(copy, "users") == rows(shop, "users")
            assert rows(copy, "notes") == rows(shop, "notes")

    run(tmp_path, work)


def test_a_target_that_refuses_says_so(tmp_path: Path, shop: Path) -> None:
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(copy)) as other:
        other.execute("CREATE TABLE users (id, name, mail)")  # no key to replace rows by

    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop)) as cdc:
            async with cdc.apply_to(SQLiteTarget(copy), "users") as mirror:
                with pytest.raises(SourceError, match="does not match any PRIMARY KEY"):
                    await mirror.stopped()
            assert rows(copy, "users") == []

    run(tmp_path, work)


def test_rows_of_an_outbox_are_published_once(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    connection.execute("CREATE TABLE outbox (id INTEGER PRIMARY KEY, aggregatetype, aggregateid,"
                       " type, payload)")  # fmt: skip
    say = "INSERT INTO outbox (aggregatetype, aggregateid, type, payload) VALUES (?, ?, ?, ?)"
    config = OutboxConfig(topic="told.{aggregatetype}")

    async def work(engine: StreamingEngine) -> None:
        async with CDCEngine(engine, SQLiteSource(shop)) as cdc:
            sent = 0
            for turn in range(3):  # a router that is followed by another
                for number in range(20):
                    connection.execute(
                        say, ("order", f"o{number % 3}", "Placed", f"{turn}/{number}")
                    )
                    connection.execute("DELETE FROM outbox")
                async with cdc.outbox(config) as router:
                    while router.published < 20:  # noqa: ASYNC110 - it has no event for that
                        await asyncio.sleep(0.01)
                sent += router.published
            assert sent == 60
            reading = SubscribeConfig(start=Offset.EARLIEST)
            async with engine.subscribe("told.order", reading) as subscriber:
                found: list[Any] = []
                while len(found) < 60:
                    found += await subscriber.poll(timeout=5)
                assert not await subscriber.poll(timeout=0.1)
            assert [one.payload for one in found] == [
                f"{t}/{n}" for t in range(3) for n in range(20)
            ]
            assert found[4].key == "o1"
            assert found[4].headers == {"id": "1", "type": "Placed"}

    run(tmp_path, work)


def test_an_outbox_without_the_columns_says_which(tmp_path: Path, shop: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        async with (
            CDCEngine(engine, SQLiteSource(shop)) as cdc,
            cdc.outbox(OutboxConfig(table="users")) as router,
        ):
            with pytest.raises(Exception, match="no column 'aggregatetype'"):
                await router.stopped()

    run(tmp_path, work)
    with pytest.raises(ConfigError):
        OutboxConfig(topic="{}")


def test_the_same_without_asyncio(
    tmp_path: Path, shop: Path, connection: sqlite3.Connection
) -> None:
    with (
        sync.StreamingEngine.open(tmp_path / "data", request_timeout=10) as engine,
        sync.CDCEngine(engine, SQLiteSource(shop)) as capture,
    ):
        connection.execute("DELETE FROM users WHERE id = 2")
        with capture.subscribe("users") as changes:
            assert [next(changes).key for _ in range(3)] == [{"id": 1}, {"id": 2}, {"id": 2}]
        with capture.subscribe("users") as changes:
            assert len(next(changes.transactions())) == 2
        with capture.apply_to(SQLiteTarget(tmp_path / "copy.db")) as mirror:
            mirror.caught_up()
            assert mirror.applied == 3
        assert rows(tmp_path / "copy.db", "users") == rows(shop, "users")
        capture.snapshot("users")
        with capture.subscribe("users", CDCConfig(operations=[Operation.INSERT])) as changes:
            assert [next(changes).key for _ in range(3)][-1] == {"id": 1}
    public = {n for n in dir(cdc.CDCEngine) if not n.startswith("_")}
    assert public <= set(dir(sync.CDCEngine))
