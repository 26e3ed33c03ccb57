"""Feeds of changes and streams of events as sources."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import StreamingEngine
from aegis_cluster.cdc import CDCEngine, SQLiteSource
from aegis_cluster.event import Event, EventStore
from aegis_cluster.stream import StreamProcessor, Sum, changes, events

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]


def _execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


def _deposit(amount: int) -> Event:
    return Event("Deposited", {"amount": amount})


def test_changes_and_events_are_sources(tmp_path: Path) -> None:
    shop = tmp_path / "shop.db"
    _execute(
        shop,
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)",
        "CREATE TABLE other (id INTEGER PRIMARY KEY)",
        "INSERT INTO users VALUES (1, 'Anna'), (2, 'Bert')",
        "INSERT INTO other VALUES (1)",
    )

    async def work() -> None:
        async with (
            asyncio.timeout(80),
            StreamingEngine.open(tmp_path / "data") as engine,
            CDCEngine(engine, SQLiteSource(shop)) as cdc,
        ):
            store = EventStore(engine)
            for stream, amount in (("account-1", 5), ("account-2", 7), ("other-1", 9)):
                await store.append(stream, [_deposit(amount), _deposit(amount)])
            app = StreamProcessor(engine, "app", state_dir=tmp_path / "state")
            rows = app.source(changes(cdc.feed, "users"))
            rows.map(lambda change: change["after"]).to_table(name="users")
            amounts = app.source(events("account-*")).map(lambda event: event["data"])
            amounts.aggregate(Sum("amount"), name="sums")
            async with await app.start() as running:
                _execute(
                    shop,
                    "UPDATE users SET name = 'Ann' WHERE id = 1",
                    "DELETE FROM users WHERE id = 2",
                )
                wanted = {"sums": {"account-1": 10, "account-2": 14}}
                wanted["users"] = {'{"id":1}': {"id": 1, "name": "Ann"}}  # type: ignore[dict-item]
                while (found := await running.range()) != wanted:
                    print(found)  # noqa: T201 - where it stands, if it never gets there
                    await asyncio.sleep(0.05)

    asyncio.run(work())
