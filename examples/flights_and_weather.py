"""Flights joined with the weather of their hour and airport, by airport, carrier and day.

    python flights_and_weather.py                                     a few thousand flights
    python flights_and_weather.py --flights F.csv.gz --weather W.csv.gz --rows 0     whole files
    python flights_and_weather.py --shuffle 7 --kills 3

--shuffle SEED gives every flight and every hour of weather up to six hours too late, in an order
that the seed draws. --kills N runs the processor in a process of its own, which is killed at random
N times. What comes out is compared with a plain computation of the same files: it is equal, each
result is there once. Everything is kept in a new directory under the current one, removed
afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.stream import Count, StreamProcessor, Sum

DATA = Path(__file__).parents[1] / "tests" / "data"
ROWS = 3_000
LATE = timedelta(hours=6)
DAY = timedelta(days=1)
END = "END"
AFTER_ALL = timedelta(days=30)
"""Event time goes on so far at the end, and closes every window."""

Row = dict[str, Any]


def application(engine: StreamingEngine | None, state: Path) -> StreamProcessor:
    """Reads flights and weather, writes delays."""
    processor = StreamProcessor(
        engine, "flights-and-weather", state_dir=state, idle_timeout=timedelta(seconds=1)
    )
    flights = processor.source("flights", timestamp="time_hour").key_by("origin")
    weather = processor.source("weather", timestamp="time_hour").key_by("origin")
    joined = flights.join(weather, together, within=timedelta(0), grace=LATE, how="left")
    by_carrier = joined.filter(lambda row: row is not None).key_by(
        lambda row: (row["origin"], row["carrier"])
    )
    sums = {name: Sum(name) for name in ("cancelled", "delay", "wind", "with_wind")}
    daily = by_carrier.window(DAY).aggregate({"flights": Count(), **sums})
    return daily.map(averages).sink("delays")


def together(flight: Row, weather: Row | None) -> Row | None:
    """One flight as numbers; None for the record that only ends the input."""
    if flight["origin"] == END:
        return None
    is_cancelled = flight["dep_delay"] == "NA"
    wind = "NA" if weather is None else weather["wind_speed"]
    return {
        "origin": flight["origin"],
        "carrier": flight["carrier"],
        "cancelled": int(is_cancelled),
        "delay": 0 if is_cancelled else int(flight["dep_delay"]),
        "wind": 0.0 if wind == "NA" else float(wind),
        "with_wind": int(wind != "NA"),
    }


def averages(sums: Row) -> Row:
    """What is sent on for a window."""
    flown = sums["flights"] - sums["cancelled"]
    return {
        "flights": sums["flights"],
        "cancelled": sums["cancelled"],
        "average_delay": sums["delay"] / flown if flown else None,
        "average_wind": sums["wind"] / sums["with_wind"] if sums["with_wind"] else None,
    }


def plainly(flights: list[Row], weather: list[Row]) -> dict[tuple[str, str, str], Row]:
    """The same without a stream: by airport, carrier and day."""
    skies = {(row["origin"], row["time_hour"]): row for row in weather}
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for flight in flights:
        place = flight["origin"], flight["carrier"], flight["time_hour"][:10]
        row = together(flight, skies.get((flight["origin"], flight["time_hour"])))
        assert row is not None
        groups[place].append(row)
    return {
        place: averages(
            {
                "flights": len(rows),
                "wind": math.fsum(row["wind"] for row in rows),
                **{n: sum(row[n] for row in rows) for n in ("cancelled", "delay", "with_wind")},
            }
        )
        for place, rows in groups.items()
    }


# ---- input


def read(path: Path, count: int) -> list[Row]:
    """The first rows of a file; 0: all."""
    with gzip.open(path, "rt", newline="") as file:
        return list(islice(csv.DictReader(file), count or None))


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Each up to six hours too late."""
    rng = random.Random(seed)
    late = {id(row): event_time(row) + rng.uniform(0, LATE.total_seconds()) for row in rows}
    return sorted(rows, key=lambda row: late[id(row)])


def event_time(row: Row) -> float:
    return datetime.fromisoformat(row["time_hour"]).timestamp()


async def publish(engine: StreamingEngine, flights: list[Row], weather: list[Row]) -> None:
    """In parts, each of both topics in turn, and a record at the end that closes all windows."""
    for topic in ("flights", "weather", "delays"):
        await engine.create_topic(topic, TopicConfig(partitions=2))
    last = datetime.fromisoformat(max(row["time_hour"] for row in flights)) + AFTER_ALL
    end = {"origin": END, "carrier": END, "time_hour": last.isoformat(), "dep_delay": "NA"}
    for topic, rows in (("flights", flights), ("weather", weather)):
        await engine.publish_many(topic, rows, keys=[row["origin"] for row in rows])
        await engine.publish(topic, Message(END, end))


# ---- output


async def results(engine: StreamingEngine, wanted: int) -> dict[tuple[str, str, str], Row]:
    """What was sent, once `wanted` results are there; one more than that is an error."""
    found: dict[tuple[str, str, str], Row] = {}
    async with engine.subscribe("delays", SubscribeConfig(start=Offset.EARLIEST)) as subscriber:
        while len(found) < wanted:
            for message in await subscriber.poll(timeout=1):
                origin, carrier = str(message.key)[2:-2].split('","')
                place = origin, carrier, str(message.headers["window-start"])[:10]
                if place in found:
                    sys.exit(f"{place} came twice")
                found[place] = message.payload
    return found


# ---- the program


async def work(place: Path) -> None:
    """Process until killed."""
    async with StreamingEngine.open(place / "data") as engine:
        running = await application(engine, place / "state").start()
        sys.stdout.write("works\n")
        sys.stdout.flush()
        await running.wait()


def work_and_die(place: Path, rest_s: float) -> None:
    """A process that works, and is killed a little later."""
    command = [sys.executable, __file__, "--work", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            time.sleep(rest_s)
        finally:
            process.kill()


async def main(options: argparse.Namespace, place: Path) -> None:
    flights, weather = read(options.flights, options.rows), read(options.weather, 0)
    expected = plainly(flights, weather)
    if options.shuffle is not None:
        flights, weather = shuffled(flights, options.shuffle), shuffled(weather, options.shuffle)
    async with StreamingEngine.open(place / "data") as engine:
        await publish(engine, flights, weather)
    rng = random.Random(options.shuffle)
    for _ in range(options.kills):
        await asyncio.to_thread(work_and_die, place, rng.uniform(0.0, 1.0))
    begin = time.perf_counter()
    async with StreamingEngine.open(place / "data") as engine:
        processor = application(engine, place / "state")
        async with asyncio.timeout(options.seconds), await processor.start() as running:
            found = await results(engine, len(expected))
            late = running.stats.late
    took = time.perf_counter() - begin
    if found != expected or late:
        different = sum(found.get(place) != row for place, row in expected.items())
        sys.exit(f"{different} of {len(expected)} results differ, {late} records were late")
    sys.stdout.write(
        f"{len(flights)} flights, {len(weather)} hours of weather: {len(found)} results by airport,"
        f" carrier and day, all equal ({took:.1f} s, {options.kills} kills)\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flights", type=Path, default=DATA / "flights-sample.csv.gz")
    parser.add_argument("--weather", type=Path, default=DATA / "weather-sample.csv.gz")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the flights; 0: all")
    parser.add_argument("--shuffle", type=int, metavar="SEED")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="at most")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        asyncio.run(work(given.work))
    else:
        with tempfile.TemporaryDirectory(prefix="flights-and-weather-", dir=".") as directory:
            asyncio.run(main(given, Path(directory).absolute()))
