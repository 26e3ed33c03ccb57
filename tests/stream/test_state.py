"""State that is forgotten, looked through and shown early; functions in other processes and over
columns; a database as a sink; who copies whose state."""

from __future__ import annotations

import importlib.util
import random
import sqlite3
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.errors import ConfigError
from aegis_cluster.stream import Count, DatabaseSink, Session, StreamProcessor, Sum
from aegis_cluster.stream.sqlite_store import SqliteStore
from aegis_cluster.stream.standby import copied_here
from aegis_cluster.stream.state import Agenda, MemoryStore, TaskState
from aegis_cluster.testing import TopologyTestDriver

if TYPE_CHECKING:
    from pathlib import Path

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


def values(driver: TopologyTestDriver, topic: str) -> list[Any]:
    return [message.payload for message in driver.read(topic)]


@pytest.mark.parametrize("crash", [False, True])
def test_a_key_that_nothing_comes_for_is_forgotten(crash: bool) -> None:
    app = StreamProcessor(None, "app")
    app.source("in").aggregate(Count(), ttl=MINUTE, name="n").sink("out")
    app.table("users", ttl=MINUTE, name="t").sink("gone")
    driver = TopologyTestDriver(app)
    for second in (0, 50):
        driver.pipe("in", 1, key="a", timestamp=second)
        driver.pipe("users", {"at": second}, key="u", timestamp=second)
    if crash:
        driver.crash()
    driver.advance(109)
    assert driver.query("a") == {"n": 2}
    assert driver.query("u") == {"t": {"at": 50}}
    driver.advance(110)
    assert driver.query("a") == driver.query("u") == {}
    assert values(driver, "gone")[-1] is None
    driver.pipe("in", 1, key="a", timestamp=120)
    assert values(driver, "out") == [1, 2, 1]


def test_a_range_of_keys_is_looked_through_in_order() -> None:
    app = StreamProcessor(None, "app")
    app.source("in").aggregate(Sum(), name="sums").sink("out")
    driver = TopologyTestDriver(app, partitions=2)
    for number, key in enumerate(["b", "aa", "c", "a", "b"]):
        driver.pipe("in", number, key=key)
    assert driver.range("a", "b") == {"sums": {"a": 3, "aa": 1, "b": 4}}
    assert list(driver.range(None, None)["sums"]) == ["a", "aa", "b", "c"]


@pytest.mark.parametrize("window", [MINUTE, Session(MINUTE)])
def test_results_so_far_of_what_has_changed(window: Any) -> None:
    app = StreamProcessor(None, "app")
    windowed = app.source("in").window(window)
    windowed.aggregate(Count(), early=lambda s: s.sink("early"), every=10 * SECOND).sink("out")
    driver = TopologyTestDriver(app)
    for second in (0, 1, 12, 13, 31):
        driver.pipe("in", second, key="a", timestamp=second)
    assert values(driver, "early") == [2, 4]
    driver.advance(45)
    assert values(driver, "early") == [5]
    driver.advance(59)
    assert values(driver, "early") == []
    driver.advance(120)
    assert values(driver, "out") == [5]


def test_early_needs_to_know_how_often() -> None:
    windowed = StreamProcessor(None, "app").source("in").window(MINUTE)
    with pytest.raises(ConfigError, match="every="):
        windowed.aggregate(Count(), early=lambda s: s.sink("early"))


def halves(value: int) -> float:
    return 12 / value


def test_a_function_in_other_processes_fails_for_its_record_only() -> None:
    app = StreamProcessor(None, "app", on_error="dead_letter")
    app.source("in").map(halves, processes=1).sink("out")
    driver = TopologyTestDriver(app)
    for value in (1, 0, 4):
        driver.pipe("in", value)
    assert values(driver, "out") == [12.0, 3.0]
    (dead,) = driver.read("app.dead")
    assert dead.payload == 0
    assert "ZeroDivisionError" in str(dead.headers["error"])


def test_a_lambda_cannot_go_to_another_process() -> None:
    source = StreamProcessor(None, "app").source("in")
    with pytest.raises(ConfigError, match="no lambda"):
        source.map(lambda value: value, processes=2)
    with pytest.raises(ConfigError, match="processes = 0"):
        source.map(halves, processes=0)


def test_a_batch_by_column() -> None:
    def doubled(columns: dict[str, list[int]]) -> dict[str, list[int]]:
        return {"n": [2 * n for n in columns["n"]], "m": columns["m"]}

    app = StreamProcessor(None, "app")
    app.source("in").map_batches(doubled, columns="dict").sink("out")
    driver = TopologyTestDriver(app)
    driver.pipe("in", {"n": 1, "m": 5})
    assert values(driver, "out") == [{"n": 2, "m": 5}]


def test_a_batch_as_an_arrow_table() -> None:
    source = StreamProcessor(None, "app").source("in")
    with pytest.raises(ConfigError, match="'list', 'dict', 'arrow'"):
        source.map_batches(list, columns="pandas")
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(ConfigError, match="pip install pyarrow"):
            source.map_batches(list, columns="arrow")
        return
    app = StreamProcessor(None, "app")
    app.source("in").map_batches(lambda table: table.select(["n"]), columns="arrow").sink("out")
    driver = TopologyTestDriver(app)
    driver.pipe("in", {"n": 1, "m": 5})
    assert values(driver, "out") == [{"n": 1}]


def test_rows_of_a_database(tmp_path: Path) -> None:
    path = tmp_path / "out.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE counts (who TEXT PRIMARY KEY, n INTEGER)")
    upsert = "INSERT INTO counts VALUES (?, ?) ON CONFLICT (who) DO UPDATE SET n = excluded.n"
    sink = DatabaseSink(partial(sqlite3.connect, path), upsert, lambda key, n: (key, n))
    app = StreamProcessor(None, "app", on_error="skip")
    app.source("in").aggregate(Count()).sink(sink)
    driver = TopologyTestDriver(app)
    for key in "aba":
        driver.pipe("in", 1, key=key)
    with sqlite3.connect(path) as database:
        assert dict(database.execute("SELECT * FROM counts")) == {"a": 2, "b": 1}
    database.close()


def test_who_copies_whose_state() -> None:
    tasks = [f"in/{number}" for number in range(100)]
    members = ["m1", "m2", "m3"]
    owners = {task: members[number % 3] for number, task in enumerate(tasks)}
    chosen = {me: copied_here(tasks, owners, members, me, 1) for me in members}
    assert sorted(task for some in chosen.values() for task in some) == sorted(tasks)
    assert not any(owners[task] == me for me, some in chosen.items() for task in some)
    more = {me: copied_here(tasks, owners, [*members, "m4"], me, 1) for me in members}
    assert all(set(more[me]) <= set(chosen[me]) for me in members)
    assert copied_here(tasks, owners, ["m1"], "m1", 1) == [t for t in tasks if owners[t] != "m1"]


def test_a_store_takes_a_changelog_over_and_knows_how_far(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    store = SqliteStore(path, "one")
    rows: dict[bytes, bytes | None] = {b"%05d" % n: b"%d" % n for n in range(4_500)}
    store.load(rows, 4_500)
    store.load({b"%05d" % n: None for n in range(0, 4_500, 2)} | {b"new": b"1"}, 7_000)
    store.put(b"not committed", b"")
    store.close()
    again = SqliteStore(path, "one")
    expected = {key: value for key, value in rows.items() if int(key) % 2} | {b"new": b"1"}
    assert dict(again.scan(b"", b"\xff")) == expected
    assert again.checkpoint == 7_000
    again.close()
    other = SqliteStore(path, "another changelog")
    assert other.scan(b"", b"\xff") == []
    assert other.checkpoint == 0
    other.close()


@pytest.mark.parametrize("seed", range(3))
def test_an_agenda_is_a_sorted_mapping_that_survives(seed: int) -> None:
    rng = random.Random(seed)
    store, plain = MemoryStore(), dict[tuple[int, bytes], int]()
    state = TaskState(store)
    agenda = Agenda(state, 1, b"w")
    for step in range(2_000):
        due, name = rng.randrange(20) + step // 50, rng.choice([b"a", b"bb", b"c"])
        match rng.randrange(8):
            case 0 | 1 | 2:
                agenda.put(due, name, step)
                plain[due, name] = step
            case 3:
                agenda.delete(due, name)
                plain.pop((due, name), None)
            case 4:
                assert agenda.get(due, name) == plain.get((due, name))
            case 5:
                agenda.flush()
                if rng.random() < 0.5:
                    agenda = Agenda(state, 1, b"w")
            case 6 if rng.random() < 0.3:
                taken = [(*key, plain.pop(key)) for key in sorted(plain) if key[0] <= due]
                assert agenda.take_until(due) == taken
            case _:
                assert agenda.next_due <= min((key[0] for key in plain), default=agenda.next_due)
    agenda.flush()
    assert len(store.scan(b"", b"\xff")) == len(plain)
