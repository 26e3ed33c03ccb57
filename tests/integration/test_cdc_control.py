"""`aegis cdc`: connectors are asked how far they are, told to read a table again, and stopped."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.cdc.envelope import change_from
from tests.integration.cluster import cluster, read_all, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.cluster import RunningCluster

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]


def status(running: RunningCluster) -> dict[str, Any]:
    (found,) = json.loads(running.run("cdc", "status", "--json"))
    return dict(found)


async def snapshot_rows(running: RunningCluster) -> int:
    async with running.engine() as engine:
        changes = [change_from(message) for message in await read_all(engine, "shop")]
        return sum(1 for change in changes if change is not None and change.is_snapshot)


def test_a_connector_does_what_it_is_told_wherever_it_runs(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster") as running:
        assert "There is no change feed" in running.run("cdc", "stop", code=1)
        with closing(sqlite3.connect(running.path / "shop.db")) as connection:
            connection.executescript(
                "CREATE TABLE users (id INTEGER PRIMARY KEY, x);"
                "INSERT INTO users VALUES (1, 'a'), (2, 'b');"
            )
        (running.path / "shop.toml").write_text('[cdc]\nsource = "sqlite:shop.db"\n')
        processes = [
            running.start("cdc", "run", "shop.toml", "--bootstrap", running.bootstrap)
            for _ in range(2)
        ]
        try:
            wait_until(lambda: "shop" in running.run("cdc", "status"), "there is a feed", 20)
            wait_until(lambda: status(running).get("is_current") is True, "it has all", 20)
            found = status(running)
            assert (found["feed"], found["role"], found["records"]) == ("shop", "running", 2)
            assert "read" in running.run("cdc", "snapshot", "users")
            assert "no table 'nothing'" in running.run("cdc", "snapshot", "nothing", code=1)
            assert "no change feed 'shop2'" in running.run("cdc", "status", "shop2", code=1)

            async def work() -> None:
                assert await snapshot_rows(running) == 4

            run(work())
            assert "stopped" in running.run("cdc", "stop", "--feed", "shop")
            wait_until(lambda: all(p.poll() == 0 for p in processes), "both have stopped", 20)
            assert status(running)["role"] == "stopped"
        finally:
            for process in processes:
                process.kill()
                process.communicate()
