"""Windows against a plain Python count: out of order, in any interleaving, through crashes."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_cluster.errors import AegisError
from aegis_cluster.message import Message, from_ms, to_ms
from aegis_cluster.stream import (
    PROCESSING_TIME,
    Count,
    Hopping,
    Session,
    Sliding,
    StreamProcessor,
    Sum,
    TopologyChanged,
    Tumbling,
)
from aegis_cluster.stream.state import MemoryStore
from aegis_cluster.stream.task import Task
from aegis_cluster.testing import TopologyTestDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Row = tuple[str, int, int]
"""Key, second, value."""

SIZE = 10


def second(number: int) -> timedelta:
    return timedelta(seconds=number)


def aligned(starts: Callable[[int], Iterable[int]], rows: list[Row]) -> dict[tuple[str, int], int]:
    found: dict[tuple[str, int], int] = defaultdict(int)
    for key, time, value in rows:
        for start in starts(time):
            found[key, start] += value
    return dict(found)


def slid(rows: list[Row]) -> dict[tuple[str, int], int]:
    return {
        (key, time): sum(v for k, t, v in rows if k == key and time - SIZE < t <= time)
        for key, time, _ in rows
    }


def sessions(rows: list[Row]) -> dict[tuple[str, int], int]:
    found: dict[tuple[str, int], int] = {}
    last: dict[str, tuple[int, int]] = {}
    for key, time, value in sorted(rows):
        start, before = last.get(key, (time, time))
        if time - before > SIZE:
            start = time
        last[key] = (start, time)
        found[key, start] = found.get((key, start), 0) + value
    return found


KINDS: dict[str, tuple[Any, Callable[[list[Row]], dict[tuple[str, int], int]]]] = {
    "tumbling": (Tumbling(second(SIZE)), lambda rows: aligned(lambda t: [t - t % SIZE], rows)),
    "hopping": (
        Hopping(second(SIZE), every=second(4)),
        lambda rows: aligned(lambda t: [s for s in range(-12, t + 1, 4) if s > t - SIZE], rows),
    ),
    "sliding": (Sliding(second(SIZE)), slid),
    "session": (Session(second(SIZE)), sessions),
}
AGGREGATES = {"function": sum, "incremental": Sum()}


def results(kind: Any, aggregate: Any, rows: list[Row], crashes: set[int], size: int) -> Any:
    """Final windows by key and start, through two partitions and a repartition topic."""
    grace = second(max((t for _, t, _ in rows), default=0))
    app = StreamProcessor(None, "app")
    stream = app.source("in", timestamp=lambda value: value["t"]).key_by("k")
    stream.map(lambda value: value["v"]).window(kind, grace=grace).aggregate(aggregate).sink("out")
    driver = TopologyTestDriver(app, partitions=2)
    for at in range(0, len(rows), size):
        messages = [Message(payload={"k": k, "t": t, "v": v}) for k, t, v in rows[at : at + size]]
        driver.pipe_many("in", messages, partition=at // size % 2)
        if at // size in crashes:
            driver.crash()
    driver.advance(10_000)
    found: dict[tuple[str, int], int] = {}
    for message in driver.read("out"):
        place = str(message.key), _name_of(kind, message)
        assert place not in found, "a window's result is sent once"
        found[place] = message.payload
    assert not driver.late
    return found


def _name_of(kind: Any, message: Message) -> int:
    """In seconds: a window's start; of a sliding one the time of its last record."""
    if isinstance(kind, Sliding):
        end = datetime.fromisoformat(str(message.headers["window-end"]))
        return (to_ms(end) - 1) // 1000
    return to_ms(datetime.fromisoformat(str(message.headers["window-start"]))) // 1000


rows_of = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.integers(0, 9)), max_size=25
)


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None)
@given(rows=rows_of, crashes=st.sets(st.integers(0, 10), max_size=3), size=st.integers(1, 6))
def test_any_interleaving_gives_the_windows_of_a_plain_count(
    name: str, aggregate: str, rows: list[Row], crashes: set[int], size: int
) -> None:
    kind, plain = KINDS[name]
    found = results(kind, AGGREGATES[aggregate], rows, crashes, size)
    assert found == plain(rows)


@pytest.mark.parametrize("aggregate", [Count(), len])
@pytest.mark.parametrize("kind", [Tumbling(second(10)), Hopping(second(10), every=second(5))])
def test_nothing_is_left_in_the_state_when_windows_are_over(kind: Any, aggregate: Any) -> None:
    left = _left_after(kind, aggregate)
    assert left == [], "but the progress that a task saves"


@pytest.mark.parametrize("kind", [Sliding(second(10)), Session(second(10))])
def test_nothing_is_left_of_windows_that_keep_values(kind: Any) -> None:
    assert _left_after(kind, len) == []


def _left_after(kind: Any, aggregate: Any) -> Any:
    app = StreamProcessor(None, "app")
    app.source("in").window(kind, grace=second(3)).aggregate(aggregate).sink("out")
    driver = TopologyTestDriver(app)
    for time in (5, 17, 15, 4, 30, 29):
        driver.pipe("in", time, key="k", timestamp=time)
    driver.advance(100)
    return driver._stores["in", 0].scan(b"", b"\xff\xff")


def test_late_records_come_out_at_the_side() -> None:
    app = StreamProcessor(None, "app")
    windowed = app.source("in").window(second(10), grace=second(5))
    windowed.aggregate(Count(), late=lambda late: late.sink("late")).sink("out")
    driver = TopologyTestDriver(app)
    for time in (1, 14, 9, 15, 8, 16):
        driver.pipe("in", time, key="k", timestamp=time)
    assert [message.payload for message in driver.read("out")] == [2]
    assert [message.payload for message in driver.read("late")] == [8]
    assert driver.late == {"window-1": 1}
    driver.advance(25)
    assert [message.payload for message in driver.read("out")] == [3]


def test_a_window_closes_after_a_crash_without_another_record_of_its_key() -> None:
    app = StreamProcessor(None, "app")
    app.source("in").window(second(10)).aggregate(Count()).sink("out")
    driver = TopologyTestDriver(app)
    driver.pipe("in", None, key="quiet", timestamp=1)
    driver.crash()
    driver.pipe("in", None, key="other", timestamp=11)
    assert [message.key for message in driver.read("out")] == ["quiet"]


def test_a_partition_that_nobody_writes_to_holds_the_watermark_back_until_it_follows() -> None:
    app = StreamProcessor(None, "app")
    app.source("in").key_by("k").window(second(10)).aggregate(Count()).sink("out")
    driver = TopologyTestDriver(app, partitions=2)
    driver.pipe("in", {"k": 1}, timestamp=1, partition=0)
    driver.pipe("in", {"k": 1}, timestamp=100, partition=0)
    assert not driver.read("out"), "the other partition may still have records of that time"
    driver.advance(50)
    assert len(driver.read("out")) == 1


def test_late_is_decided_alike_however_records_are_batched() -> None:
    times = [1, 12, 3, 25, 14, 11, 40, 27, 38, 22, 60]

    def run(size: int) -> list[list[Any]]:
        app = StreamProcessor(None, "app")
        windowed = app.source("in").filter(lambda t: t != 60).window(second(10), grace=second(2))
        windowed.aggregate(list, late=lambda late: late.sink("late")).sink("out")
        driver = TopologyTestDriver(app)
        for at in range(0, len(times), size):
            driver.pipe_many(
                "in",
                [Message("k", t, timestamp=from_ms(t * 1000)) for t in times[at : at + size]],
            )
        return [[m.payload for m in driver.read(topic)] for topic in ("out", "late")]

    one_by_one = run(1)
    assert one_by_one == [[[1], [12], [25], [38], [40]], [3, 14, 11, 27, 22]]
    assert all(run(size) == one_by_one for size in (2, 3, 11))


def test_windows_over_the_time_of_processing() -> None:
    app = StreamProcessor(None, "app")
    source = app.source("in", timestamp=PROCESSING_TIME)
    source.window(second(10)).aggregate(list).sink("out")
    driver = TopologyTestDriver(app)
    for time, told in ((1, 500), (9, -3), (11, 2)):  # the clock, and what the record says
        driver.pipe("in", told, key="k", timestamp=time)
    assert [message.payload for message in driver.read("out")] == [[500, -3]]


@pytest.mark.parametrize("aggregate", [sum, Sum()])
@pytest.mark.parametrize("kind", [Tumbling(second(10)), Session(second(3))])
def test_results_so_far_on_demand(kind: Any, aggregate: Any) -> None:
    app = StreamProcessor(None, "app")
    app.source("in").window(kind).aggregate(aggregate).sink("out")
    driver = TopologyTestDriver(app)
    for time in (10, 11, 12):
        driver.pipe("in", time, key="k", timestamp=time)
    assert driver.query("k") == {"window-1": {10_000: 33}}
    assert driver.query("other") == {}


def test_state_of_another_topology_is_refused() -> None:
    def app(size: int) -> StreamProcessor:
        made = StreamProcessor(None, "app")
        made.source("in").window(second(size)).aggregate(Count()).sink("out")
        return made

    store = MemoryStore()
    Task(app(10).topology, "in", 0, store).save()
    Task(app(10).topology, "in", 0, store)
    with pytest.raises(TopologyChanged, match=r"step 1 was .*0:00:10.* and is .*0:00:20") as caught:
        Task(app(20).topology, "in", 0, store)
    assert isinstance(caught.value, AegisError)
