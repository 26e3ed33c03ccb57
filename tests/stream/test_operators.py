"""Operators, one by one, in memory; and the arguments that are refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aegis_cluster import Message
from aegis_cluster.errors import AegisError, ConfigError, Misuse
from aegis_cluster.stream import (
    Aggregator,
    Avg,
    Count,
    Hopping,
    Max,
    Min,
    ProcessingFailed,
    StreamProcessor,
    Sum,
    Tumbling,
)
from aegis_cluster.testing import TopologyTestDriver

MINUTE = timedelta(minutes=1)


def processor(**settings: Any) -> StreamProcessor:
    return StreamProcessor(None, "app", **settings)


def values(driver: TopologyTestDriver, topic: str = "out") -> list[Any]:
    return [message.payload for message in driver.read(topic)]


def run(app: StreamProcessor, inputs: list[Any], **more: Any) -> list[Any]:
    driver = TopologyTestDriver(app)
    for value in inputs:
        driver.pipe("in", value, **more)
    return values(driver)


async def _double(value: int) -> int:
    return 2 * value


def test_one_record_after_the_other() -> None:
    seen: list[int] = []
    app = processor()
    (
        app.source("in")
        .filter(lambda value: value > 1)
        .map(_double)
        .peek(seen.append)
        .flat_map(lambda value: [value] * (value // 4))
        .map(lambda key, value: f"{key}{value}", with_key=True)
        .map_batches(lambda batch: [text.upper() for text in batch])
        .sink("out")
    )
    assert run(app, [1, 2, 3, 4], key="k") == ["K4", "K6", "K8", "K8"]
    assert seen == [4, 6, 8]


def test_branches_and_what_is_merged_again_keeps_its_order() -> None:
    app = processor()
    even, three, rest = app.source("in").branch(lambda v: v % 2 == 0, lambda v: v % 3 == 0)
    even.map(lambda v: f"even {v}").merge(three.map(lambda v: f"three {v}"), rest).sink("out")
    driver = TopologyTestDriver(app)
    driver.pipe_many("in", [_message(number) for number in range(1, 7)])
    assert values(driver) == [1, "even 2", "three 3", "even 4", 5, "even 6"]


def _message(value: Any) -> Message:
    return Message(payload=value)


def test_a_sink_may_be_a_function() -> None:
    seen: list[Any] = []

    async def keep(key: str, value: int) -> None:
        seen.append((key, value))

    app = processor()
    app.source("in").sink(keep, with_key=True)
    assert run(app, [1, 2], key="k") == []
    assert seen == [("k", 1), ("k", 2)]


def test_keys_of_any_kind_meet_in_one_partition() -> None:
    app = processor()
    counted = app.source(["in", "more"]).key_by(lambda v: (v["a"], v["b"])).aggregate(Count())
    counted.sink("out")
    driver = TopologyTestDriver(app, partitions=3)
    for number in range(12):
        topic = "in" if number % 2 else "more"
        driver.pipe(topic, {"a": number % 2, "b": "x"}, partition=number % 3)
    found = driver.read("out")
    assert [m.payload for m in found if m.key == '[1,"x"]'] == [1, 2, 3, 4, 5, 6]
    assert driver.query((0, "x")) == {"aggregate-3": 6}


def test_aggregates() -> None:
    class Longest(Aggregator):
        def initial(self) -> str:
            return ""

        def add(self, state: str, value: Any) -> str:
            return max(state, str(value["name"]), key=len)

    app = processor()
    windowed = app.source("in", timestamp="t").window(MINUTE)
    windowed.aggregate(
        {
            "n": Count(),
            "sum": Sum("x"),
            "avg": Avg(lambda value: value["x"]),
            "min": Min("x"),
            "max": Max("x"),
            "longest": Longest(),
        }
    ).sink("out")
    windowed.reduce(lambda a, b: {**b, "x": a["x"] * b["x"]}).map(lambda v: v["x"]).sink("product")
    driver = TopologyTestDriver(app)
    rows = [(0.1, "a"), (0.2, "abc"), (0.3, "ab"), (1e16, ""), (-1e16, "")]
    for x, name in rows:
        driver.pipe("in", {"t": 1.5, "x": x, "name": name})
    driver.advance(60)
    (message,) = driver.read("out")
    assert message.payload == {
        "n": 5, "sum": 0.6, "avg": 0.12, "min": -1e16, "max": 1e16, "longest": "abc",
    }  # fmt: skip
    assert message.headers["window-end"] == "1970-01-01T00:01:00+00:00"
    assert len(driver.read("product")) == 1


def test_the_window_that_a_function_gets() -> None:
    app = processor()

    def told(window: Any) -> dict[str, Any]:
        assert window.end == window.start + MINUTE
        return {"key": window.key, "start": window.start.isoformat(), "values": list(window)}

    app.source("in").window(MINUTE).aggregate(told).sink("out")
    driver = TopologyTestDriver(app)
    for second in (30, 10, 20, 60):
        driver.pipe("in", second, key="k", timestamp=second)
    start = "1970-01-01T00:00:00+00:00"
    assert values(driver) == [{"key": "k", "start": start, "values": [10, 20, 30]}]


def test_a_result_belongs_to_a_larger_window() -> None:
    app = processor()
    counted = app.source("in").window(MINUTE, grace=2 * MINUTE).aggregate(Count())
    counted.window(timedelta(hours=1)).aggregate(lambda window: list(window)).sink("out")
    driver = TopologyTestDriver(app)
    for minute in (0, 0, 30, 59, 58):
        driver.pipe("in", None, key="k", timestamp=minute * 60)
    driver.pipe("in", None, key="k", timestamp=5 * 3600)
    assert values(driver) == [[2, 1, 1, 1]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("inner", ["a1", "b1"]),
        ("left", ["a1", "b1", "c-"]),
        ("outer", ["a1", "b1", "c-", "-2"]),
    ],
)
def test_streams_join_within_a_time(how: str, expected: list[str]) -> None:
    app = processor()
    left, right = app.source("left"), app.source("right")
    pair = left.join(
        right, lambda mine, theirs: f"{mine or '-'}{theirs or '-'}", within=MINUTE, how=how
    )
    pair.sink("out")
    driver = TopologyTestDriver(app, partitions=2)
    driver.pipe("left", "a", key="k", timestamp=100)
    driver.pipe("right", "1", key="k", timestamp=130)
    driver.pipe("left", "b", key="k", timestamp=190)
    driver.pipe("left", "c", key="k", timestamp=191)
    driver.pipe("right", "2", key="other", timestamp=140)
    driver.advance(1000)
    driver.advance(2000)
    assert sorted(values(driver)) == sorted(expected)
    assert not any(len(store.scan(b"", b"\xff\xff")) for store in driver._stores.values())


def test_a_stream_looks_up_a_table() -> None:
    app = processor()
    names = app.table("names")
    app.source("in").join(names, lambda value, name: [value, name], how="left").sink("out")
    driver = TopologyTestDriver(app, partitions=2)
    driver.pipe("in", 1, key="a")
    driver.pipe("names", "anna", key="a")
    driver.pipe("in", 2, key="a")
    driver.pipe("names", None, key="a")
    driver.pipe("in", 3, key="a")
    assert values(driver) == [[1, None], [2, "anna"], [3, None]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("inner", ["a1", "a2", None]),
        ("left", ["a-", "a1", "a2", None]),
        ("outer", ["a-", "a1", "a2", "-2", None]),
    ],
)
def test_tables_join(how: str, expected: list[str | None]) -> None:
    app = processor()
    left, right = app.table("left"), app.table("right")
    left.join(right, lambda a, b: f"{a or '-'}{b or '-'}", how=how).sink("out")
    driver = TopologyTestDriver(app)
    for topic, value in [
        ("left", "a"), ("right", "1"), ("right", "2"), ("left", None), ("right", None),
    ]:  # fmt: skip
        driver.pipe(topic, value, key="k")
    assert values(driver) == expected


# ---- errors


def test_a_failed_record_stops_the_processor() -> None:
    app = processor()
    app.source("in").map(lambda value: 1 // value).sink("out")
    driver = TopologyTestDriver(app)
    driver.pipe("in", 1)
    with pytest.raises(
        ProcessingFailed, match=r"map-1 failed at .* offset 1 of in/0: ZeroDivision"
    ):
        driver.pipe("in", 0)


def test_a_failed_record_is_skipped() -> None:
    app = processor(on_error="skip")
    app.source("in").map(lambda value: 4 // value).filter(lambda value: value + 0).sink("out")
    driver = TopologyTestDriver(app)
    driver.pipe_many("in", [_message(value) for value in (1, 0, 2, 0, 4)])
    assert values(driver) == [4, 2, 1]


def test_a_failed_record_goes_to_the_dead_letters() -> None:
    app = processor(on_error="dead_letter")
    app.source("in", timestamp="t").map(lambda v: v["x"]).map(lambda x: 1 // x).sink("out")
    driver = TopologyTestDriver(app)
    for value in ({"t": 1, "x": 1}, {"x": 2}, {"t": "soon"}, {"t": 3, "x": 0}):
        driver.pipe("in", value, key="k", timestamp=5)
    dead = driver.read("app.dead")
    assert [message.payload for message in dead] == [{"x": 2}, {"t": "soon"}, {"t": 3, "x": 0}]
    assert [message.headers["offset"] for message in dead] == ["1", "2", "3"]
    reasons = [str(message.headers["error"]) for message in dead]
    assert "no time field 't'; it has 'x'" in reasons[0]
    assert "ISO 8601" in reasons[1]
    assert reasons[2].startswith("ZeroDivisionError")
    assert dead[0].key == "k"
    assert dead[0].timestamp == datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)
    assert values(driver) == [1]


def test_a_window_that_grows_too_large() -> None:
    app = processor(on_error="dead_letter")
    app.source("in").window(MINUTE, limit=2).aggregate(len).sink("out")
    driver = TopologyTestDriver(app)
    for number in range(3):
        driver.pipe("in", number, key="k")
    driver.advance(60)
    assert values(driver) == [2]
    (dead,) = driver.read("app.dead")
    assert "more than 2 values of key 'k'" in str(dead.headers["error"])


def test_a_window_whose_function_fails() -> None:
    app = processor(on_error="dead_letter")
    app.source("in").window(MINUTE).aggregate(lambda window: 1 // (len(window) - 1)).sink("out")
    driver = TopologyTestDriver(app)
    for second in (0, 60, 61):
        driver.pipe("in", None, key="k", timestamp=second)
    driver.advance(120)
    assert values(driver) == [1]
    (dead,) = driver.read("app.dead")
    assert dead.key == "k"
    assert dead.headers["window-start"] == "1970-01-01T00:00:00+00:00"


def test_a_value_that_cannot_be_kept_is_refused() -> None:
    app = processor()
    app.source("in").map(lambda value: object()).window(MINUTE).aggregate(len).sink("out")
    with pytest.raises(ProcessingFailed, match="none of the types that come back equal"):
        run(app, [1])


@pytest.mark.parametrize(
    "build",
    [
        lambda app: app.source("in").window(timedelta(0)),
        lambda app: app.source("in").window(5),
        lambda app: app.source("in").window(MINUTE, grace=-MINUTE),
        lambda app: app.source("in").window(Tumbling(timedelta(microseconds=1))),
        lambda app: app.source("in").window(Hopping(MINUTE, every=2 * MINUTE)),
        lambda app: app.source("in").window(MINUTE).aggregate("count"),
        lambda app: app.source("in").window(MINUTE).aggregate({"n": len}),
        lambda app: app.source("in").aggregate(len),
        lambda app: app.source("in").map("x"),
        lambda app: app.source("in").sink(""),
        lambda app: app.source([]),
        lambda app: app.source("in", timestamp=5),
        lambda app: app.source("in").join(app.source("b"), lambda a, b: a),
        lambda app: app.source("in").map(len, name="a b"),
        lambda app: app.describe("drawing"),
        lambda app: StreamProcessor(None, "a b"),
        lambda app: StreamProcessor(None, "a", on_error="ignore"),
        lambda app: StreamProcessor(None, "a", on_eror="skip"),
        lambda app: app.source("in").merge(StreamProcessor(None, "b").source("in")),
        lambda app: TopologyTestDriver(app, partitions=0),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(build: Any) -> None:
    with pytest.raises((ConfigError, Misuse)) as caught:
        build(processor())
    assert isinstance(caught.value, AegisError)
    assert str(caught.value).endswith((".", "other"))


def test_a_description() -> None:
    app = processor()
    windowed = app.source("in").key_by("user").window(MINUTE, grace=MINUTE)
    windowed.aggregate(Count(), late=lambda late: late.sink("too-late")).sink("out")
    assert app.describe().splitlines() == [
        "Application app",
        "  One task for each partition of in:",
        "    source-0 [in]",
        "    key_by-1 <- source-0",
        "    keys-2 <- key_by-1 [app.keys-2.repartition]",
        "  One task for each partition of app.keys-2.repartition:",
        "    keys-2 [app.keys-2.repartition]",
        "    window-3 <- keys-2 (WindowAggregate tumbling 0:01:00 grace 60000 ms of Count)",
        "    sink-4 <- window-3 (late) [too-late]",
        "    sink-5 <- window-3 [out]",
        "    state: app.keys-2.repartition.changelog",
    ]
    drawn = app.describe("mermaid")
    assert drawn.startswith("flowchart LR\n")
    assert "n3 -->|late| n4" in drawn


def test_a_wrong_engine_or_name_is_refused_where_it_was_written() -> None:
    with pytest.raises(Misuse, match="give a StreamingEngine, or None"):
        StreamProcessor("tcp://127.0.0.1:7101", "app")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="application_id = 5"):
        StreamProcessor(None, 5)  # type: ignore[arg-type]
