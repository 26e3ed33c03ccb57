"""Real flights by hour, airport and carrier, and joined by hour: equal to a plain computation."""

from __future__ import annotations

import csv
import gzip
import random
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message
from aegis_cluster.stream import Avg, Count, StreamProcessor
from aegis_cluster.testing import TopologyTestDriver
from tests.integration.test_readme import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
HOUR = timedelta(hours=1)
ROWS = 2_500
SEED = 20130101


def flights() -> list[dict[str, Any]]:
    """Shuffled, so that each comes up to 6 hours too late."""
    with gzip.open(ROOT / "tests" / "data" / "flights-sample.csv.gz", "rt") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(ROWS), strict=False)]
    rng = random.Random(SEED)
    late = {id(row): _hour(row) + rng.uniform(0, 6 * 3600) for row in rows}
    return sorted(rows, key=lambda row: late[id(row)])


def _hour(row: dict[str, Any]) -> float:
    return datetime.fromisoformat(row["time_hour"]).timestamp()


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[Message]]:
    for at in range(0, len(rows), 200):
        yield [Message(payload=row) for row in rows[at : at + 200]]


def test_delays_and_cancellations_by_airport_and_carrier() -> None:
    rows = flights()
    app = StreamProcessor(None, "delays")
    keyed = app.source("flights", timestamp="time_hour").key_by(
        lambda row: (row["origin"], row["carrier"])
    )
    cancelled, flown, _ = keyed.branch(
        lambda row: row["dep_time"] == "NA", lambda row: row["dep_delay"] != "NA"
    )
    late: list[Any] = []
    windowed = flown.window(HOUR, grace=6 * HOUR)
    windowed.aggregate(
        {"n": Count(), "delay": Avg(lambda row: int(row["dep_delay"]))},
        late=lambda stream: stream.sink(late.append),
    ).sink("delays")
    cancelled.window(HOUR, grace=6 * HOUR).aggregate(len).sink("cancelled")
    driver = TopologyTestDriver(app, partitions=3)
    for number, batch in enumerate(_batches(rows)):
        driver.pipe_many("flights", batch, partition=number % 3)
    driver.advance(datetime.fromisoformat("2013-03-01T00:00:00Z"))

    delays: dict[Any, list[int]] = defaultdict(list)
    gone: Counter[Any] = Counter()
    for row in rows:
        place = f'["{row["origin"]}","{row["carrier"]}"]', _hour(row)
        if row["dep_time"] == "NA":
            gone[place] += 1
        else:
            delays[place].append(int(row["dep_delay"]))
    assert not late
    assert {_place(m): m.payload for m in driver.read("delays")} == {
        place: {"n": len(some), "delay": sum(some) / len(some)} for place, some in delays.items()
    }
    assert {_place(m): m.payload for m in driver.read("cancelled")} == dict(gone)


def _place(message: Message) -> tuple[str, float]:
    start = datetime.fromisoformat(str(message.headers["window-start"]))
    return str(message.key), start.timestamp()


def test_flights_meet_the_weather_of_their_hour_and_airport() -> None:
    rows = flights()[:600]
    places = sorted({(row["origin"], row["time_hour"]) for row in rows})
    weather = [{"at": at, "hour": hour, "wind": number} for number, (at, hour) in enumerate(places)]
    app = StreamProcessor(None, "weather")
    left = app.source("flights", timestamp="time_hour").key_by(lambda row: row["origin"])
    right = app.source("weather", timestamp="hour").key_by("at")
    joined = left.join(
        right, lambda row, sky: [row["flight"], sky["wind"]], within=timedelta(0), grace=6 * HOUR
    )
    joined.sink("out")
    driver = TopologyTestDriver(app, partitions=2)
    random.Random(SEED).shuffle(weather)
    inputs = [("flights", row) for row in rows] + [("weather", row) for row in weather]
    inputs.sort(key=lambda one: one[1].get("time_hour") or one[1]["hour"])
    for topic, row in inputs:
        driver.pipe(topic, row, partition=int(row.get("flight", "1")) % 2)
    wind = {place: number for number, place in enumerate(places)}
    expected = [[row["flight"], wind[row["origin"], row["time_hour"]]] for row in rows]
    assert sorted(m.payload for m in driver.read("out")) == sorted(expected)
