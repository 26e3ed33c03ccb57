"""A connector as a process of its own, on a real cluster: `kill -9` of it and of the feed's leader
loses no change and repeats none."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.cdc.envelope import change_from
from tests.cdc.model import exactly, folded
from tests.integration.cluster import cluster, read_all, run

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.integration.cluster import RunningCluster

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]

CONFIG = """
[cdc]
source = "sqlite:shop.db"
partitions = 2
"""


def write(connection: sqlite3.Connection, rng: random.Random, rows: int) -> None:
    for _ in range(rows):
        key, value = rng.randrange(200), rng.random()
        match rng.randrange(4):
            case 0:
                connection.execute("DELETE FROM users WHERE id = ?", (key,))
            case 1:
                connection.execute("UPDATE users SET x = ? WHERE id = ?", (value, key))
            case _:
                connection.execute("INSERT OR REPLACE INTO users VALUES (?, ?)", (key, value))


def rows(connection: sqlite3.Connection) -> list[Any]:
    found = connection.execute("SELECT id, x FROM users")
    return sorted((exactly({"id": id, "x": x}) for id, x in found), key=repr)


async def until_equal(running: RunningCluster, connection: sqlite3.Connection) -> None:
    """Read the feed until it is the table. Raises `TimeoutError`."""
    async with running.engine() as engine, asyncio.timeout(60):
        while True:
            changes = [change_from(message) for message in await read_all(engine, "shop")]
            found = folded([change for change in changes if change is not None])
            if found.get("users", []) == rows(connection):
                return
            await asyncio.sleep(0.2)


def start(running: RunningCluster) -> subprocess.Popen[bytes]:
    return running.start("cdc", "run", "shop.toml", "--bootstrap", running.bootstrap)


def test_connectors_and_leaders_die_and_the_feed_is_the_table(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"SEED {seed}")  # noqa: T201 - shown when it fails
    rng = random.Random(seed)
    with cluster(tmp_path / "cluster") as running:
        (running.path / "shop.toml").write_text(CONFIG)
        path = running.path / "shop.db"
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, x)")
            write(connection, rng, 300)
            connectors = [start(running)]
            try:
                run(play(running, connection, connectors, rng), 100)
            finally:
                for process in connectors:
                    process.kill()
                    process.communicate()


async def play(
    running: RunningCluster,
    connection: sqlite3.Connection,
    connectors: list[subprocess.Popen[bytes]],
    rng: random.Random,
) -> None:
    (working,) = connectors
    assert working.stdout is not None
    assert b"feed shop: running" in await asyncio.to_thread(working.stdout.readline)
    await until_equal(running, connection)
    connectors.append(start(running))
    for change in range(3):
        write(connection, rng, 150)
        await asyncio.sleep(rng.random() / 10)  # something is under way
        if change == 0:
            running.run("cluster", "kill", await running.leader_of("shop", 0))
        elif change == 1:
            working.kill()
    await until_equal(running, connection)
    assert all(process.poll() is None for process in connectors[1:])
