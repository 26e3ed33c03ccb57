"""Snapshots, upcasters, erasure and projections: what happens to events in the long run."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.errors import Misuse
from aegis_cluster.event import (
    ERASED,
    AggregateRoot,
    Event,
    EventStore,
    Projection,
    ProjectionRunner,
    StateProjection,
    SubjectErased,
    SubjectKeys,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from pathlib import Path

    from tests.event.conftest import Run


class Counter(AggregateRoot):
    def __init__(self) -> None:
        self.total = 0
        self.applied: list[int] = []

    def add(self, number: int) -> None:
        self.record(Event("Added", {"n": number}))

    def apply(self, event: Event) -> None:
        self.total += event.data["n"]
        self.applied.append(event.data["n"])

    def snapshot(self) -> Any:
        return {"total": self.total}

    def restore(self, state: Any) -> None:
        self.total = state["total"]


class NewCounter(Counter):
    snapshot_revision = 2


def another(store: EventStore, **options: Any) -> EventStore:
    """A store on the same topic, with options."""
    return EventStore(store.engine, store.topic, partitions=2, **options)


def test_aggregates_begin_with_their_snapshots(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        keeping = another(store, snapshot_every=10)
        counter = Counter()
        for number in range(24):
            counter.add(number)
            await keeping.save("c", counter)
        found = await store.load_aggregate(Counter, "c")
        assert (found.total, found.version) == (sum(range(24)), 23)
        assert found.applied == [20, 21, 22, 23]
        other = await store.load_aggregate(NewCounter, "c")
        assert (other.total, len(other.applied)) == (found.total, 24)
        everything = [event async for event in store.subscribe(live=False)]
        assert len(everything) == 24  # a snapshot is no event of anybody
        assert len(await store.load("c")) == 24

        await store.configure("c", max_count=3)
        assert (await store.load_aggregate(Counter, "c")).applied == [21, 22, 23]
        await store.snapshot("c", found)
        assert (await store.load_aggregate(Counter, "c")).total == sum(range(24))
        await store.delete("c")
        gone = await store.load_aggregate(Counter, "c")
        assert (gone.total, gone.version) == (0, -1)
        gone.add(1)
        await store.save("c", gone)
        assert (await store.load_aggregate(Counter, "c")).total == 1
        with pytest.raises(Misuse, match="save it first"):
            await store.snapshot("c", Counter())

    store_run(work)


def test_old_events_come_as_those_of_today(store_run: Run) -> None:
    def renamed(event: Event) -> Event:
        event.event_type, event.data = "Credited", {"amount": event.data["sum"]}
        return event

    def in_cents(event: Event) -> Event:
        event.event_type, event.data = "CreditedCents", {"cents": event.data["amount"] * 100}
        return event

    async def work(store: EventStore) -> None:
        await store.append("a", [Event("Paid", {"sum": 3}), Event("Credited", {"amount": 5})])
        today = another(store, upcasters={"Paid": renamed, "Credited": in_cents})
        wanted = [("CreditedCents", {"cents": 300}), ("CreditedCents", {"cents": 500})]
        assert [(event.event_type, event.data) for event in await today.load("a")] == wanted
        for pattern in ("a", "*"):
            follow = today.subscribe(pattern, event_types=["CreditedCents"], live=False)
            assert [(event.event_type, event.data) async for event in follow] == wanted
        assert [event.event_type for event in await store.load("a")] == ["Paid", "Credited"]

        def turned(event: Event) -> Event:
            event.event_type = {"Paid": "Credited", "Credited": "Paid"}[event.event_type]
            return event

        circle = another(store, upcasters={"Paid": turned, "Credited": turned})
        with pytest.raises(Misuse, match="circles"):
            await circle.load("a")

    store_run(work)


def test_what_is_about_a_person_can_be_erased(store_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "subjects.sqlite"

    async def work(store: EventStore) -> None:
        keys = SubjectKeys(path)
        mine = another(store, subject_keys=keys)
        named = Event("Named", {"name": "Zebedee"}, subject="customer-7")
        await mine.append("c", [named, Event("Paid", {"amount": 1})])
        await mine.append("c", Event("Named", {"name": "Ann"}, subject="customer-8"))
        found = await mine.load("c")
        assert [event.data for event in found] == [
            {"name": "Zebedee"}, {"amount": 1}, {"name": "Ann"},
        ]  # fmt: skip
        assert [event.subject for event in found] == ["customer-7", None, "customer-8"]
        assert (await store.load("c"))[0].data is ERASED
        with pytest.raises(Misuse, match="subject_keys"):
            await store.append("c", Event("Named", {}, subject="customer-7"))
        sealed = await store.engine.history(store.topic, 10)
        assert not any(b"Zebedee" in message.payload for message in sealed if message.payload)

        keys.destroy("customer-7")
        keys.close()
        keys = SubjectKeys(path)
        mine = another(store, subject_keys=keys)
        left = await mine.load("c")
        assert [event.version for event in left] == [0, 1, 2]
        assert left[0].data is ERASED
        assert left[0].data.get("name", "?") == "?"
        assert left[2].data == {"name": "Ann"}
        with pytest.raises(SubjectErased):
            await mine.append("c", Event("Named", {}, subject="customer-7"))
        keys.close()

    store_run(work)
    assert b"Zebedee" not in path.read_bytes()


class Balances(Projection):
    name, streams = "balances", "account-*"

    def create(self, db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE balance (account TEXT PRIMARY KEY, amount INTEGER, seen INTEGER)")

    def drop(self, db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE IF EXISTS balance")

    def apply(self, event: Event, db: sqlite3.Connection) -> None:
        if event.event_type == "Poison":
            raise ValueError("this projection cannot take it")
        db.execute(
            "INSERT INTO balance VALUES (?1, ?2, 1) ON CONFLICT (account) DO UPDATE SET"
            " amount = amount + ?2, seen = seen + 1",
            (event.aggregate_id, event.data["n"]),
        )


class BalancesAgain(Balances):
    revision = 2


def test_projections_take_each_event_once(store_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "balances.sqlite"

    async def write(store: EventStore, first: int, last: int) -> None:
        for number in range(first, last):
            await store.append(f"account-{number % 3}", Event("Added", {"n": number}))

    async def work(store: EventStore) -> None:
        await write(store, 0, 30)
        await store.append("other-1", Event("Added", {"n": 1_000}))
        async with ProjectionRunner(store, Balances(), path) as running:
            assert await running.catch_up() == 30
            assert await running.catch_up() == 0
            assert total(running) == (sum(range(30)), 30)
        await write(store, 30, 40)
        await store.append("account-1", Event("Poison"))
        async with ProjectionRunner(store, Balances(), path) as running:
            with pytest.raises(ValueError, match="cannot take it"):
                await running.catch_up()
            before = running.query("SELECT sum(seen) FROM balance")[0][0]
            assert 30 <= before <= 40  # nothing of what was not committed
        told: list[tuple[int, int]] = []
        async with ProjectionRunner(store, WithoutPoison(), path) as running:
            assert running.applied == 0
            await running.catch_up(lambda done, count: told.append((done, count)))
            assert total(running) == (sum(range(40)), 40)
            assert told[-1][0] == told[-1][1] > 0
            live = asyncio.create_task(running.run())
            await write(store, 40, 50)
            await asyncio.to_thread(
                wait_until, lambda: total(running) == (sum(range(50)), 50), "all are applied"
            )
            live.cancel()
            await asyncio.gather(live, return_exceptions=True)
        async with ProjectionRunner(store, WithoutPoison(), path) as running:
            assert await running.rebuild() == 50
            assert total(running) == (sum(range(50)), 50)

    def total(running: ProjectionRunner) -> tuple[int, int]:
        return running.query("SELECT sum(amount), sum(seen) FROM balance")[0]

    store_run(work)


class WithoutPoison(BalancesAgain):
    event_types = ("Added",)


class Totals(StateProjection):
    name, streams = "totals of all", "account-*"

    def fold(self, state: Any, event: Event) -> Any:
        return {"n": state.get("n", 0) + event.data["n"], "version": event.version}


class Kinds(Totals):
    name = "kinds"

    def key(self, event: Event) -> str | None:
        return event.event_type if event.data["n"] % 2 else None


def test_several_projections_run_on_one_file_while_it_is_asked(
    store_run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "views.sqlite"

    async def work(store: EventStore) -> None:
        await store.append("account-0", [Event("Added", {"n": n}) for n in range(1_500)])
        made = [ProjectionRunner(store, one, path) for one in (Totals(), Kinds(), Balances())]
        async with made[0] as totals, made[1] as kinds, made[2] as balances:
            tasks = [asyncio.create_task(one.run()) for one in made]
            seen = []
            async with asyncio.timeout(20):
                async for rows in balances.live("SELECT seen FROM balance"):
                    seen += [count for (count,) in rows]
                    if seen[-1:] == [1_500]:
                        await store.append("account-1", Event("Added", {"n": 7}))
                    elif len(rows) == 2:
                        break
            await asyncio.to_thread(
                wait_until, lambda: totals.applied == kinds.applied == 1_501, "all are applied"
            )
            assert seen == sorted(seen[:-1]) + seen[-1:]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert totals.state("account-0") == {"n": sum(range(1_500)), "version": 1_499}
            assert totals.state("account-1") == {"n": 7, "version": 0}
            assert totals.state("account-2") is None
            assert kinds.states() == {"Added": {"n": sum(range(1, 1_500, 2)) + 7, "version": 0}}
            with pytest.raises(Misuse, match="StateProjection"):
                balances.state("account-0")
            assert await totals.rebuild() == 1_501
            assert totals.state("account-0") == {"n": sum(range(1_500)), "version": 1_499}

    store_run(work)


class Elsewhere:
    """A target of another kind: values in memory, with transactions."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.work: dict[str, Any] = {}

    def open(self) -> None:
        """There is nothing to open."""

    def close(self) -> None:
        """And nothing to close."""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[dict[str, Any]]:
        self.work = dict(self.kept)
        yield self.work
        self.kept = self.work

    def progress(self, name: str) -> tuple[int, str] | None:
        found: tuple[int, str] | None = self.kept.get(f"progress of {name}")
        return found

    def note_progress(self, name: str, revision: int, position: str) -> None:
        self.work[f"progress of {name}"] = (revision, position)

    def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        return [(self.kept[sql],)]


class Count(Projection):
    name = "count"

    def create(self, db: dict[str, Any]) -> None:
        db["count"] = 0

    def apply(self, event: Event, db: dict[str, Any]) -> None:
        db["count"] += 1
        if event.event_type == "Poison":
            raise ValueError("this projection cannot take it")


def test_projections_write_to_what_a_user_brings(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        target = Elsewhere()
        await store.append("a", [Event("Added"), Event("Added")])
        async with ProjectionRunner(store, Count(), target) as running:
            await running.catch_up()
        await store.append("b", Event("Poison"))
        async with ProjectionRunner(store, Count(), target) as running:
            with pytest.raises(ValueError, match="cannot take it"):
                await running.catch_up()
            assert running.query("count") == [(2,)]

    store_run(work)
