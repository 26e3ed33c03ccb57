"""Every aircraft a stream of events: flights are appended, one aircraft is loaded, all are rebuilt.

    python flights_as_aggregates.py                             a few thousand flights
    python flights_as_aggregates.py flights.csv.gz              a whole file of that form
    python flights_as_aggregates.py flights.csv.gz tcp://127.0.0.1:7101    on a cluster

Without a cluster the events are kept in ./flights-data. What a projection makes of them is compared
with a plain fold of the file. Running it again appends nothing: the ids of the events are made of
the rows, and a repeat is known by its ids.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import itertools
import sys
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from aegis_cluster import StreamingEngine
from aegis_cluster.event import AggregateRoot, Event, EventStore, Projection, ProjectionRunner

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator

SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "flights-sample.csv.gz"
SAMPLE_ROWS = 3_000
IN_FLIGHT = 64
IDS = uuid.UUID("6f1d9c0e-7a52-4f53-9f2e-5f2c8d1b7a10")

Row = dict[str, str]
Flight = tuple[str, list[Event]]


class Aircraft(AggregateRoot):
    """What has become of one aircraft."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.minutes = 0

    def apply(self, event: Event) -> None:
        self.counts[event.event_type] += 1
        self.minutes += event.data.get("minutes", 0)


class Fleet(Projection):
    """The same of all aircraft, in a table."""

    name, streams = "fleet", "aircraft-*"

    def create(self, db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE happened (aircraft, type, count, PRIMARY KEY (aircraft, type))")
        db.execute("CREATE TABLE flown (aircraft PRIMARY KEY, minutes)")

    def drop(self, db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE IF EXISTS happened")
        db.execute("DROP TABLE IF EXISTS flown")

    def apply(self, event: Event, db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO happened VALUES (?, ?, 1)"
            " ON CONFLICT (aircraft, type) DO UPDATE SET count = count + 1",
            (event.aggregate_id, event.event_type),
        )
        db.execute(
            "INSERT INTO flown VALUES (?1, ?2)"
            " ON CONFLICT (aircraft) DO UPDATE SET minutes = minutes + ?2",
            (event.aggregate_id, event.data.get("minutes", 0)),
        )


def read_rows(path: Path, count: int | None) -> Iterator[Row]:
    with gzip.open(path, "rt", newline="") as file:
        yield from itertools.islice(csv.DictReader(file), count)


def flights_of(rows: Iterable[Row]) -> Iterator[Flight]:
    """Of each row, the aircraft's stream and what happened to the flight."""
    for number, row in enumerate(rows):
        happened = [("Scheduled", {"at": row["time_hour"], "to": row["dest"]})]
        if row["dep_time"] == "NA":
            happened.append(("Cancelled", {}))
        else:
            happened.append(("Departed", {"from": row["origin"], "delay": int(row["dep_delay"])}))
            if row["air_time"] != "NA":  # else it came down elsewhere
                happened.append(("Arrived", {"at": row["dest"], "minutes": int(row["air_time"])}))
        events = [
            Event(kind, data, event_id=uuid.uuid5(IDS, f"{number} {kind}"))
            for kind, data in happened
        ]
        yield f"aircraft-{row['tailnum']}", events


async def append_all(store: EventStore, flights: Iterable[Flight]) -> int:
    """Each flight in one append, which expects the version that the flight before it has made."""
    by_worker: list[list[Flight]] = [[] for _ in range(IN_FLIGHT)]
    workers = itertools.cycle(by_worker)
    worker_of: dict[str, list[Flight]] = defaultdict(lambda: next(workers))
    for flight in flights:
        worker_of[flight[0]].append(flight)

    async def work(mine: list[Flight]) -> int:
        versions: dict[str, int] = {}
        for stream, events in mine:
            expected = versions.get(stream, -1)
            done = await store.append(stream, events, expected_version=expected, timeout=60)
            versions[stream] = done.version
        return sum(len(events) for _, events in mine)

    return sum(await asyncio.gather(*map(work, by_worker)))


def show_progress(done: int, count: int) -> None:
    sys.stderr.write(f"\r[{'#' * (40 * done // max(count, 1)):40}] {done:,} of {count:,}")


def fold(rows: Iterable[Row]) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """The same without any event store: how often what happened to whom, and minutes flown."""
    happened: Counter[tuple[str, str]] = Counter()
    minutes: Counter[str] = Counter()
    for row in rows:
        aircraft = f"aircraft-{row['tailnum']}"
        happened[aircraft, "Scheduled"] += 1
        happened[aircraft, "Cancelled"] += row["dep_time"] == "NA"
        happened[aircraft, "Departed"] += row["dep_time"] != "NA"
        arrived = row["dep_time"] != "NA" and row["air_time"] != "NA"
        happened[aircraft, "Arrived"] += arrived
        minutes[aircraft] += int(row["air_time"]) if arrived else 0
    return {key: count for key, count in happened.items() if count}, dict(minutes)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


async def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE
    count = None if len(sys.argv) > 1 else SAMPLE_ROWS
    open_ = StreamingEngine.connect if len(sys.argv) > 2 else StreamingEngine.open
    async with open_(sys.argv[2] if len(sys.argv) > 2 else "./flights-data") as engine:
        store = EventStore(engine, "flights")
        start = time.perf_counter()
        appended = await append_all(store, flights_of(read_rows(path, count)))
        say(f"{appended:,} events appended in {time.perf_counter() - start:.1f} s")

        one = Aircraft.from_events(await store.load("aircraft-N14228"))
        say(f"N14228, at version {one.version}: {one.minutes / 60:.1f} hours, {dict(one.counts)}")

        start = time.perf_counter()
        async with ProjectionRunner(store, Fleet(), "fleet.sqlite") as fleet:
            applied = await fleet.rebuild(show_progress)
            say(f"{applied:,} events projected in {time.perf_counter() - start:.1f} s")
            happened = {(a, kind): n for a, kind, n in fleet.query("SELECT * FROM happened")}
            flown = dict(fleet.query("SELECT * FROM flown"))

    wanted_happened, wanted_flown = fold(read_rows(path, count))
    kinds: Counter[str] = Counter()
    for (_, kind), number in happened.items():
        kinds[kind] += number
    say(f"{len(flown):,} aircraft, {sum(flown.values()) / 60:,.1f} hours, {dict(kinds)}")
    if (happened, flown) != (wanted_happened, wanted_flown):
        sys.exit("the projection and the fold of the file differ")
    mine = {kind: n for (aircraft, kind), n in wanted_happened.items() if aircraft[9:] == "N14228"}
    if (dict(one.counts), one.minutes) != (mine, wanted_flown.get("aircraft-N14228", 0)):
        sys.exit("the aggregate and the fold of the file differ")
    say("the same as a plain fold of the file")


asyncio.run(main())
