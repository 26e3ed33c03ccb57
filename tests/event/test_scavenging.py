"""An event store from the outside, before and after its deleted events have left the disk."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import StreamingEngine
from aegis_cluster.broker import compaction, scavenging
from aegis_cluster.event import Event, EventStore
from aegis_cluster.limits import KIB
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

SEGMENT = 256 * KIB
PEOPLE = 60
DATA = "x" * 2_000


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scavenging, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(compaction, "EVERY_MS", 100)


def on_disk(directory: Path) -> int:
    """Bytes of closed and growing segments, written aside or not."""
    return sum(file.stat().st_size for file in directory.rglob("*.log"))


async def shrinks(directory: Path, size: int) -> None:
    await asyncio.to_thread(wait_until, lambda: on_disk(directory) < size, "room is freed", 40)


async def everything(store: EventStore) -> list[tuple[str | None, int | None]]:
    async with store.subscribe("*", live=False) as subscription:
        return [(event.aggregate_id, event.version) async for event in subscription]


@pytest.mark.usefixtures("small_segments")
def test_deleted_people_leave_the_disk(tmp_path: Path) -> None:
    directory = tmp_path / "data"

    async def fill(store: EventStore) -> None:
        await store.append("news", [Event("Said", {"n": n, "text": DATA}) for n in range(50)])
        for number in range(PEOPLE):
            events = [Event("Said", {"n": n, "text": DATA}) for n in range(10)]
            await store.append(f"person-{number}", events)

    async def look(store: EventStore) -> None:
        last = PEOPLE - 1
        for number in (1, last):
            found = await store.load(f"person-{number}")
            assert [event.version for event in found] == list(range(10))
            assert {event.data["text"] for event in found} == {DATA}
        assert await store.load("person-0") == []
        assert [event.version for event in await store.load("news")] == list(range(45, 50))
        newest = await store.load("news", backwards=True, limit=2)
        assert [event.version for event in newest] == [49, 48]
        found_all = await everything(store)
        assert len(set(found_all)) == len(found_all)
        for number in (1, last):
            assert [v for name, v in found_all if name == f"person-{number}"] == list(range(10))

    async def test() -> None:
        engine = StreamingEngine.open(directory, request_timeout=10)
        async with asyncio.timeout(90), engine:
            store = EventStore(engine, "events", partitions=1)
            await fill(store)
            full = on_disk(directory)
            await store.configure("news", max_count=5)
            for number in range(0, PEOPLE, 2):
                if number % 4:
                    await store.delete(f"person-{number}", for_ever=True)
                else:
                    await store.delete(f"person-{number}")
            await shrinks(directory, full * 2 // 3)
            await look(store)
            # The name of a person who was deleted can be used again; the versions go on.
            done = await store.append("person-0", [Event("Said", {"n": 0, "text": "again"})])
            assert done.version == 10
            (event,) = await store.load("person-0")
            assert (event.version, event.data["text"]) == (10, "again")
            # What is gone does not come back when more is to be shown.
            await store.configure("news", max_count=40)
            shown = [event.version for event in await store.load("news")]
            assert shown == list(range(50 - len(shown), 50))
            assert 5 <= len(shown) < 40
            await store.configure("news", max_count=5)
            await store.delete("person-0")
        again = StreamingEngine.open(directory, request_timeout=10)
        async with asyncio.timeout(60), again:
            await look(EventStore(again, "events", partitions=1))

    asyncio.run(test())


@pytest.mark.usefixtures("small_segments")
def test_durable_readers_go_on_over_what_is_gone(tmp_path: Path) -> None:
    directory = tmp_path / "data"

    async def test() -> None:
        engine = StreamingEngine.open(directory, request_timeout=10)
        async with asyncio.timeout(90), engine:
            store = EventStore(engine, "events", partitions=1)
            for number in range(PEOPLE):
                events = [Event("Said", {"n": n, "text": DATA}) for n in range(10)]
                await store.append(f"person-{number}", events)
            full = on_disk(directory)
            handled: list[tuple[str | None, int | None]] = []
            async with store.persistent_subscription("billing", "person-*") as consumer:
                while len(handled) < PEOPLE:
                    events_ = await consumer.poll(20)
                    handled += [(event.aggregate_id, event.version) for event in events_]
                    await consumer.ack(events_)
                held = await consumer.poll(20)  # its records are in memory already
                for number in range(PEOPLE - 1):
                    await store.delete(f"person-{number}")
                await shrinks(directory, full // 2)
                handled += [(event.aggregate_id, event.version) for event in held]
                await consumer.ack(held)
                last = f"person-{PEOPLE - 1}"
                while sum(name == last for name, _ in handled) < 10:
                    events_ = await consumer.poll(20)
                    handled += [(event.aggregate_id, event.version) for event in events_]
                    await consumer.ack(events_)
            assert len(set(handled)) == len(handled)
            assert [version for name, version in handled if name == last] == list(range(10))

    asyncio.run(test())


@pytest.mark.usefixtures("small_segments")
def test_what_is_too_old_leaves_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scavenging, "RARELY_MS", 500)
    directory = tmp_path / "data"

    async def test() -> None:
        engine = StreamingEngine.open(directory, request_timeout=10)
        async with asyncio.timeout(60), engine:
            store = EventStore(engine, "events", partitions=1)
            for name in ("log", "kept") * 10:
                events = [Event("Said", {"text": DATA}) for _ in range(25)]
                await store.append(name, events)
            full = on_disk(directory)
            await store.configure("log", max_age="1ms")
            await shrinks(directory, full * 3 // 4)
            assert len(await store.load("kept")) == 250
            assert await store.load("log") == []

    asyncio.run(test())
