"""Appending, loading, conflicts, repeats and bad input, on an embedded engine."""

from __future__ import annotations

import asyncio
import random
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import sync
from aegis_cluster.errors import (
    InvalidTopic,
    MessageTooLarge,
    Misuse,
    StreamDeleted,
    UnsupportedPayload,
    WrongExpectedVersion,
)
from aegis_cluster.event import AggregateRoot, Event, EventStore, ExpectedVersion
from aegis_cluster.message import Message
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from pathlib import Path

    from tests.event.conftest import Run


class Account(AggregateRoot):
    def __init__(self) -> None:
        self.balance = 0.0

    def apply(self, event: Event) -> None:
        self.balance += event.data.get("amount", 0.0)


def deposits(*amounts: float) -> list[Event]:
    return [Event("MoneyDeposited", {"amount": amount}) for amount in amounts]


def versions(events: list[Event]) -> list[int | None]:
    return [event.version for event in events]


def test_what_is_appended_comes_back_equal(store_run: Run) -> None:
    async def first(store: EventStore) -> None:
        events = [
            Event("AccountCreated", {"owner": "Åsa"}, {"user": 7}),
            Event("Note", "text"),
            Event("Picture", b"\x00\xff", correlation_id="c", causation_id="d"),
        ]
        done = await store.append("account-123", events, expected_version=ExpectedVersion.NO_STREAM)
        assert (done.first_version, done.version, done.stream) == (0, 2, "account-123")
        found = await store.load("account-123")
        assert versions(found) == [0, 1, 2]
        assert [event.data for event in found] == [{"owner": "Åsa"}, "text", b"\x00\xff"]
        assert [event.event_type for event in found] == ["AccountCreated", "Note", "Picture"]
        assert [event.event_id for event in found] == [event.event_id for event in events]
        assert found[0].metadata == {"user": 7}
        assert (found[2].correlation_id, found[2].causation_id) == ("c", "d")
        assert {event.aggregate_id for event in found} == {"account-123"}
        assert found[0].timestamp is not None
        more = await store.append("account-123", deposits(1.5, 2.5), expected_version=done)
        assert more.first_version == 3

    async def after_a_restart(store: EventStore) -> None:
        account = Account.from_events(await store.load("account-123", from_version=3))
        assert (account.balance, account.version) == (4.0, 4)
        assert await store.load("nobody") == []
        assert (await store.describe("nobody")).exists is False
        assert (await store.describe("account-123")).version == 4

    store_run(first)
    store_run(after_a_restart)


def test_ranges_limits_and_both_directions(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        for start in range(0, 30, 3):
            await store.append("s", deposits(*range(start, start + 3)))
        every = list(range(30))
        cases: list[tuple[dict[str, Any], list[int]]] = [
            ({}, every),
            ({"from_version": 7}, every[7:]),
            ({"from_version": 7, "limit": 4}, every[7:11]),
            ({"limit": 0}, []),
            ({"backwards": True}, every[::-1]),
            ({"backwards": True, "limit": 5}, every[:-6:-1]),
            ({"backwards": True, "from_version": 10}, every[10::-1]),
            ({"backwards": True, "from_version": 10, "limit": 3}, [10, 9, 8]),
            ({"backwards": True, "from_version": 99, "limit": 1}, [29]),
            ({"from_version": 30}, []),
        ]
        for arguments, expected in cases:
            assert versions(await store.load("s", **arguments)) == expected, arguments

    store_run(work)


def test_a_stream_longer_than_one_answer(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        for _ in range(12):
            await store.append("big", [Event("Blob", bytes(100_000)) for _ in range(3)])
        assert versions(await store.load("big")) == list(range(36))
        assert versions(await store.load("big", backwards=True)) == list(range(36))[::-1]
        assert versions(await store.load("big", from_version=1, limit=30)) == list(range(1, 31))
        many = [Event("E", {"n": n}) for n in range(3_000)]
        await store.append("many", many)
        assert [event.data["n"] for event in await store.load("many")] == list(range(3_000))

    store_run(work)


def test_conflicts_and_conditions(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        with pytest.raises(WrongExpectedVersion) as caught:
            await store.append("a", deposits(1), expected_version=ExpectedVersion.EXISTS)
        assert (caught.value.expected, caught.value.actual) == (ExpectedVersion.EXISTS, -1)
        await store.append("a", deposits(1, 2))
        with pytest.raises(WrongExpectedVersion) as caught:
            await store.append("a", deposits(3), expected_version=0)
        assert (caught.value.stream, caught.value.expected, caught.value.actual) == ("a", 0, 1)
        assert "version 1" in str(caught.value)
        with pytest.raises(WrongExpectedVersion):
            await store.append("a", deposits(3), expected_version=ExpectedVersion.NO_STREAM)
        await store.append("a", deposits(3), expected_version=ExpectedVersion.EXISTS)
        await store.append("a", deposits(4), expected_version=2)
        assert versions(await store.load("a")) == [0, 1, 2, 3]

    store_run(work)


def test_of_many_writers_one_wins_each_version(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        async def writer(number: int) -> int:
            won = 0
            while True:
                version = (await store.describe("counter")).version
                if version >= 19:
                    return won
                try:
                    await store.append(
                        "counter", Event("Added", {"by": number}), expected_version=version
                    )
                    won += 1
                except WrongExpectedVersion as error:
                    assert error.actual > version  # noqa: PT017 - what is raised is a part of it

        won = await asyncio.gather(*map(writer, range(8)))
        found = await store.load("counter")
        assert versions(found) == list(range(len(found)))
        assert sum(won) == len(found)
        for number, count in enumerate(won):
            assert sum(event.data["by"] == number for event in found) == count

    store_run(work)


def test_a_repeat_appends_nothing(store_run: Run) -> None:
    events = deposits(1, 2)

    async def first(store: EventStore) -> Any:
        done = await store.append("a", events, expected_version=ExpectedVersion.NO_STREAM)
        await store.append("a", deposits(3))
        return done

    async def again(store: EventStore) -> Any:
        done = await store.append("a", events, expected_version=ExpectedVersion.NO_STREAM)
        with pytest.raises(WrongExpectedVersion, match="version 1 of 'a' already"):
            await store.append("a", [events[1], Event("New")])
        assert versions(await store.load("a")) == [0, 1, 2]
        return done

    assert store_run(first) == store_run(again)


def test_several_streams_in_one_step(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        names: dict[int, list[str]] = {}
        for number in range(20):
            names.setdefault(await store.partition_of(f"s{number}"), []).append(f"s{number}")
        (one, two, three, *_), (other, *_) = names[0], names[1]
        done = await store.append_many(
            {one: deposits(1, 2), two: deposits(3)}, {one: ExpectedVersion.NO_STREAM, three: -1}
        )
        assert (done[one].version, done[two].version) == (1, 0)
        assert done[two].offset == done[one].offset + 2
        with pytest.raises(WrongExpectedVersion) as caught:
            await store.append_many({one: deposits(1), three: deposits(1)}, {two: 5})
        assert caught.value.stream == two
        assert versions(await store.load(one)) == [0, 1]
        assert await store.load(three) == []
        assert [event.data for event in await store.load(two)] == [{"amount": 3}]
        assert (await store.append_many({one: deposits(1), other: deposits(1)}))[one].version == 2

    store_run(work)


def test_streams_of_several_partitions_in_one_step(store_run: Run, engine_directory: Path) -> None:
    moved = Event("Moved", {"n": 1})

    async def names(store: EventStore) -> list[str]:
        found: dict[int, str] = {}
        for number in range(20):
            found.setdefault(await store.partition_of(f"s{number}"), f"s{number}")
        return [name for _, name in sorted(found.items())]

    async def work(store: EventStore) -> None:
        one, other = await names(store)
        expected = {one: ExpectedVersion.NO_STREAM, other: -1}
        done = await store.append_many({one: deposits(1, 2), other: moved}, expected)
        assert (done[one].version, done[other].version) == (1, 0)
        with pytest.raises(WrongExpectedVersion) as caught:
            await store.append_many({one: deposits(3), other: deposits(3)}, {one: 1, other: 7})
        assert (caught.value.stream, caught.value.actual) == (other, 0)
        with pytest.raises(WrongExpectedVersion):  # a condition alone, in the other partition
            await store.append_many({one: deposits(3)}, {other: 7})
        await store.append_many({one: deposits(3)}, {other: 0})
        again = await store.append_many({one: deposits(4), other: deposits(5)}, {one: 2})
        assert (again[one].version, again[other].version) == (3, 1)
        with pytest.raises(WrongExpectedVersion, match="Some of these"):
            await store.append_many({one: deposits(9), other: moved})
        await store.append(one, deposits(6), expected_version=3)
        follow = [event async for event in store.subscribe("*", live=False)]
        assert sorted((e.aggregate_id, e.version) for e in follow) == sorted(
            [(one, n) for n in range(5)] + [(other, n) for n in range(2)]
        )

    async def look(store: EventStore) -> None:
        one, other = await names(store)
        amounts = [event.data["amount"] for event in await store.load(one)]
        assert amounts == [1, 2, 3, 4, 6]
        assert versions(await store.load(other)) == [0, 1]
        followed = [event async for event in store.subscribe(one, live=False)]
        assert versions(followed) == [0, 1, 2, 3, 4]

    store_run(work)
    store_run(look)
    (engine_directory / "index" / "streams-0.sqlite").unlink()
    store_run(look)


def test_transfers_between_partitions_that_race(store_run: Run) -> None:
    """Money is moved on the condition of both versions; nobody ever sees it on neither side."""

    async def work(store: EventStore) -> None:
        accounts = [f"account-{number}" for number in range(5)]
        assert len({await store.partition_of(name) for name in accounts}) == 2
        await store.append_many({name: deposits(100) for name in accounts})
        refused = 0

        async def move(number: int) -> None:
            nonlocal refused
            rng = random.Random(number)
            for _ in range(8):
                one, other = rng.sample(accounts, 2)
                expected = {name: (await store.describe(name)).version for name in (one, other)}
                try:
                    await store.append_many({one: deposits(-5), other: deposits(5)}, expected)
                except WrongExpectedVersion:
                    refused += 1

        await asyncio.gather(*map(move, range(6)))
        total = 0
        for name in accounts:
            events = await store.load(name)
            assert versions(events) == list(range(len(events)))
            total += sum(event.data["amount"] for event in events)
        assert total == 500
        assert refused

    store_run(work)


class Cart(AggregateRoot):
    def __init__(self) -> None:
        self.items: list[str] = []

    def add(self, item: str) -> None:
        self.record(Event("ItemAdded", {"item": item}))

    def apply(self, event: Event) -> None:
        self.items.append(event.data["item"])


def test_aggregates_are_saved_on_condition(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        cart = await store.load_aggregate(Cart, "cart-1")
        cart.add("book")
        cart.add("pen")
        await store.save("cart-1", cart)
        assert (cart.version, cart.recorded) == (1, [])
        mine, theirs = [await store.load_aggregate(Cart, "cart-1") for _ in range(2)]
        mine.add("cup")
        theirs.add("hat")
        await store.save("cart-1", theirs)
        with pytest.raises(WrongExpectedVersion):
            await store.save("cart-1", mine)
        assert (await store.load_aggregate(Cart, "cart-1")).items == ["book", "pen", "hat"]

    store_run(work)


def test_bad_input_is_refused_with_a_reason(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        for name in ("", "$mine", "$$a", 7, None, "x" * 256, "\ud800"):
            with pytest.raises(Misuse):
                await store.append(name, Event("E"))  # type: ignore[arg-type]
            with pytest.raises(Misuse):
                await store.load(name)  # type: ignore[arg-type]
        for version in (-3, -7, "0", 1.5, True, None, 2**63):
            with pytest.raises(Misuse, match="expected_version"):
                await store.append("a", Event("E"), expected_version=version)  # type: ignore[arg-type]
        bad: list[Any] = [[], 7, None, [Event("E"), "text"], [{"event_type": "E"}]]
        for events in bad:
            with pytest.raises(Misuse):
                await store.append("a", events)
        twice = Event("E")
        with pytest.raises(Misuse, match="one id"):
            await store.append("a", [twice, twice])
        for limit in (-1, "3", True):
            with pytest.raises(Misuse, match="limit"):
                await store.load("a", limit=limit)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedPayload):
            await store.append("a", Event("E", {"when": object()}))
        with pytest.raises(MessageTooLarge):
            await store.append("a", Event("E", bytes(2_000_000)))
        with pytest.raises(MessageTooLarge):
            await store.append("a", [Event("E") for _ in range(3_001)])
        with pytest.raises(MessageTooLarge, match="in a partition"):
            await store.append("a", [Event("E", bytes(1_000_000)) for _ in range(20)])
        with pytest.raises(MessageTooLarge, match="streams"):
            await store.append_many({f"s{number}": Event("E") for number in range(300)})
        with pytest.raises(Misuse, match="mapping"):
            await store.append_many([Event("E")])  # type: ignore[arg-type]
        for bad_one in ({"position": 5}, {"event_types": 5}, {"streams": "a*b"}):
            with pytest.raises(Misuse):
                store.subscribe(**bad_one)
        assert await store.load("a") == []

    store_run(work)


@pytest.mark.parametrize(
    "arguments", [("",), (None,), (7,), ("E", {}, "text"), ("E", {}, {}, "no")]
)
def test_events_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Misuse):
        Event(*arguments)


def test_what_follows_from_what() -> None:
    cause = Event("Ordered")
    effect = Event("Shipped").caused_by(cause)
    last = Event("Delivered").caused_by(effect)
    assert effect.causation_id == effect.correlation_id == str(cause.event_id)
    assert (last.causation_id, last.correlation_id) == (str(effect.event_id), str(cause.event_id))
    assert Event("E", event_id=str(cause.event_id)).event_id == cause.event_id
    assert isinstance(Event("E").event_id, uuid.UUID)


def test_deleted_streams_and_limits_of_what_is_shown(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        await store.append("a", deposits(1, 2, 3))
        with pytest.raises(WrongExpectedVersion):
            await store.delete("a", expected_version=1)
        await store.delete("a", expected_version=2)
        assert await store.load("a") == []
        assert (await store.describe("a")).deleted
        with pytest.raises(WrongExpectedVersion):
            await store.append("a", deposits(4), expected_version=ExpectedVersion.EXISTS)
        await store.append("a", deposits(4), expected_version=ExpectedVersion.NO_STREAM)
        assert versions(await store.load("a")) == [3]
        assert versions(await store.load("a", backwards=True, from_version=9)) == [3]
        everything = [event.version async for event in store.subscribe(live=False)]
        assert everything == [0, 1, 2, 3]  # what was decided about a stream is no event of anybody

        await store.append("a", deposits(*range(20)))
        await store.configure("a", max_count=5)
        assert versions(await store.load("a")) == [19, 20, 21, 22, 23]
        assert versions(await store.load("a", from_version=3, limit=2)) == [19, 20]
        assert (await store.describe("a")).first_version == 19
        await store.configure("a", max_age="1ms")
        await asyncio.sleep(0.02)
        assert await store.load("a") == []
        await store.configure("a")
        assert len(await store.load("a")) == 21
        for age in ("0s", "soon", -1):
            with pytest.raises(Misuse, match="max_age"):
                await store.configure("a", max_age=age)  # type: ignore[arg-type]

        await store.delete("a", for_ever=True)
        with pytest.raises(StreamDeleted):
            await store.append("a", deposits(5))
        assert await store.load("a") == []
        assert (await store.describe("a")).tombstone

    store_run(work)


def test_the_same_calls_that_block(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path / "sync") as engine:
        store = sync.EventStore(engine, partitions=1)
        assert store.append("a", deposits(1, 2)).version == 1
        assert versions(store.load("a")) == [0, 1]
        with store.subscribe("a") as subscription:
            assert [next(subscription).version for _ in range(2)] == [0, 1]
            assert subscription.next(timeout=0.05) is None
            assert str(subscription.position) == "0:2"


def test_other_topics_are_no_event_stores(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        engine = store._engine
        await engine.create_topic("plain", TopicConfig())
        with pytest.raises(InvalidTopic, match="cannot hold streams"):
            await EventStore(engine, "plain").append("a", Event("E"))
        await store.append("a", Event("E"))
        with pytest.raises(InvalidTopic, match="event store"):
            await engine.publish(store.topic, Message(payload=1))

    store_run(work)


def test_a_lost_or_broken_index_is_made_anew(store_run: Run, engine_directory: Path) -> None:
    async def fill(store: EventStore) -> None:
        for number in range(20):
            await store.append(f"s{number % 4}", deposits(number))
        assert len(await store.load("s0")) == 5

    async def look(store: EventStore) -> None:
        for number in range(4):
            found = await store.load(f"s{number}")
            assert [event.data["amount"] for event in found] == list(range(number, 20, 4))

    store_run(fill)
    index = engine_directory / "index" / "streams-0.sqlite"
    assert index.exists()
    index.write_bytes(b"no database at all" * 500)
    store_run(look)
    index.unlink()
    store_run(look)
