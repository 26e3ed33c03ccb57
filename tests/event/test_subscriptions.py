"""Following streams: catch up, then live, from positions, by name, category and type."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import Misuse
from aegis_cluster.event import Event, EventStore, EventSubscription, Position

if TYPE_CHECKING:
    from aegis_cluster.wire.descriptions import TopicInfo
    from tests.event.conftest import Run

STREAMS = [f"account-{number}" for number in range(5)] + [f"order-{number}" for number in range(5)]


async def write(store: EventStore, first: int, last: int) -> None:
    """Event number n goes to stream n % 10, and its type says whether it is even."""
    for number in range(first, last):
        kind = "Odd" if number % 2 else "Even"
        await store.append(STREAMS[number % 10], Event(kind, {"n": number}))


async def take(subscription: EventSubscription, count: int) -> list[Event]:
    return [await anext(subscription) for _ in range(count)]


def numbers(events: list[Event]) -> list[int]:
    return sorted(event.data["n"] for event in events)


def assert_ordered(events: list[Event], first: int = 0) -> None:
    """Versions of each stream follow each other."""
    seen: dict[str | None, int] = {}
    for event in events:
        assert event.version == seen.get(event.aggregate_id, first - 1) + 1
        seen[event.aggregate_id] = event.version


def test_catch_up_then_live(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        await write(store, 0, 40)
        everything, accounts = store.subscribe(), store.subscribe("account-*")
        one, odd = store.subscribe("order-1"), store.subscribe("*", event_types=["Odd"])
        late = store.subscribe("*", from_now=True)
        assert await late.next(timeout=0.2) is None
        for subscription, wanted in (
            (everything, list(range(40))),
            (accounts, [n for n in range(40) if n % 10 < 5]),
            (one, [6, 16, 26, 36]),
            (odd, list(range(1, 40, 2))),
        ):
            events = await take(subscription, len(wanted))
            assert numbers(events) == wanted
            assert_ordered(events)
        waiting = asyncio.create_task(take(one, 2))
        await write(store, 40, 60)
        assert numbers(await waiting) == [46, 56]
        assert numbers(await take(everything, 20)) == list(range(40, 60))
        assert numbers(await take(late, 20)) == list(range(40, 60))
        assert numbers(await take(odd, 10)) == list(range(41, 60, 2))
        assert await everything.next(timeout=0.1) is None
        await write(store, 60, 61)
        event = await everything.next(timeout=10)
        assert event is not None
        assert event.data == {"n": 60}
        for subscription in (everything, accounts, one, odd, late):
            await subscription.close()
        with pytest.raises(StopAsyncIteration):
            await anext(everything)

    store_run(work)


def test_an_engine_that_closes_ends_what_is_about_to_read(
    store_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that waits may still be asking where to begin."""

    async def work(store: EventStore) -> None:
        asking, closed = asyncio.Event(), asyncio.Event()
        info = store.info

        async def slowly() -> TopicInfo:
            asking.set()
            await closed.wait()
            return await info()

        monkeypatch.setattr(store, "info", slowly)
        stepping = asyncio.create_task(anext(store.subscribe()))
        waiting = asyncio.create_task(store.subscribe("account-*").next(timeout=20))
        await asking.wait()
        await store.engine.close()
        closed.set()
        with pytest.raises(StopAsyncIteration):
            await stepping
        assert await waiting is None

    store_run(work)


def test_from_any_position_nothing_is_missed_or_repeated(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        for start in range(0, 30, 3):
            await store.append(
                STREAMS[start % 4], [Event("E", {"n": n}) for n in range(start, start + 3)]
            )
        for pattern in ("*", STREAMS[0]):
            found = [e async for e in store.subscribe(pattern, live=False)]
            for count in range(len(found) + 1):
                async with store.subscribe(pattern, live=False) as first:
                    head = await take(first, count)
                    position = Position.parse(str(first.position))
                rest = [e async for e in store.subscribe(pattern, position=position, live=False)]
                assert numbers(head + rest) == numbers(found), (pattern, count)

    store_run(work)


def test_an_append_of_many_streams_is_taken_apart(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        here = [f"s{n}" for n in range(20) if await store.partition_of(f"s{n}") == 0][:3]
        await store.append_many({name: [Event("E", name), Event("E", name)] for name in here})
        found = [event async for event in store.subscribe(here[1], position="0:0", live=False)]
        assert [(event.version, event.data) for event in found] == [(0, here[1]), (1, here[1])]
        found = [event async for event in store.subscribe(live=False)]
        assert [event.aggregate_id for event in found] == [n for name in here for n in (name, name)]
        assert_ordered(found)

    store_run(work)


def test_nothing_to_follow_ends_or_waits(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        assert [event async for event in store.subscribe(live=False)] == []
        waiting = store.subscribe("nobody")
        assert await waiting.next(timeout=0.05) is None
        await store.append("nobody", Event("E"))
        assert (await anext(waiting)).version == 0

    store_run(work)


@pytest.mark.parametrize("pattern", ["", "a*b", "**", 7, None, "$$a"])
def test_patterns_that_are_none(pattern: str, store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        with pytest.raises(Misuse):
            store.subscribe(pattern)

    store_run(work)


def test_positions_are_checked(store_run: Run) -> None:
    with pytest.raises(Misuse, match="no position"):
        Position.parse("here")
    assert Position.parse("1:4,0:17") == Position.of({0: 17, 1: 4})
    assert str(Position.of({1: 4, 0: 17})) == "0:17,1:4"


def test_who_stops_waiting_loses_nothing(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        async with store.subscribe("a-*") as follow:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(follow), 0.05)
            assert await follow.next(timeout=0.05) is None
            assert await follow.poll(timeout=0.05) == []
            await store.append("a-1", [Event("E", {"n": n}) for n in range(700)])
            first = await anext(follow)
            rest: list[Event] = []
            async with asyncio.timeout(10):
                while len(rest) < 699:
                    rest += await follow.poll(300)
            assert [first.version, *(event.version for event in rest)] == list(range(700))
            assert follow.position.as_dict()[first.partition or 0] == 700

    store_run(work)
