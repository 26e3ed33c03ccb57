"""Persistent subscriptions as programs use them, embedded and on a cluster."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import (
    LeasedMessage,
    LockLost,
    Message,
    Offset,
    PersistentConfig,
    PersistentSubscription,
    StreamingEngine,
    TopicConfig,
    TopicPartition,
)
from aegis_cluster.client import burials, moments, transactions
from aegis_cluster.errors import (
    ConfigError,
    Misuse,
    OffsetOutOfRange,
    SubscriptionInUse,
    SubscriptionNotFound,
    TopicNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Run = Callable[[Callable[[StreamingEngine], Awaitable[Any]]], Any]

PATIENCE_S = 25.0
SHORT = "1s"


async def some(subscription: PersistentSubscription, count: int) -> list[LeasedMessage]:
    """So many messages, not settled."""
    found: list[LeasedMessage] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            found += await subscription.poll(count - len(found))
    return found


async def none_is_left(subscription: PersistentSubscription) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any((await subscription.lag()).values()):  # noqa: ASYNC110 - the server tells
            await asyncio.sleep(0.02)


async def fill(engine: StreamingEngine, topic: str, count: int, partitions: int = 1) -> None:
    await engine.create_topic(topic, TopicConfig(partitions=partitions))
    await engine.publish_many(topic, range(count), keys=[str(n % 10) for n in range(count)])


def test_what_is_acknowledged_stays_so_and_the_rest_comes_again(
    engine_run: Run, topic: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 30, partitions=3)
        async with engine.persistent_subscription(topic, "work") as one:
            messages = await some(one, 30)
            assert {message.delivery_count for message in messages} == {1}
            await messages[0].ack()
            await one.ack(messages[10:])
            left = sorted(message.payload for message in messages[1:10])
        async with engine.persistent_subscription(topic, "work") as two:
            again = await some(two, 9)
            assert sorted(message.payload for message in again) == left
            assert {message.delivery_count for message in again} == {2}
            await asyncio.gather(*(message.ack() for message in again))
            await none_is_left(two)
            assert await two.poll(timeout=0.2) == []
            with pytest.raises(LockLost):
                await again[0].ack()
        with pytest.raises(Misuse):
            await again[0].ack()

    engine_run(work)


def test_a_lock_that_ran_out_is_told(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 2)
        config = PersistentConfig(ack_timeout=SHORT)
        async with engine.persistent_subscription(topic, "work", config) as one:
            slow, patient = await some(one, 2)
            again: list[LeasedMessage] = []
            async with asyncio.timeout(PATIENCE_S):
                while not again:
                    await patient.extend()
                    again = await one.poll(timeout=0.1)
            await patient.ack()
            assert again[0].payload == slow.payload
            assert again[0].delivery_count > slow.delivery_count
            for late in (slow.ack(), slow.nack(), slow.park("late"), slow.extend()):
                with pytest.raises(LockLost, match="ack_timeout"):
                    await late

    engine_run(work)


def test_dead_letters_parking_and_replay(engine_run: Run, topic: str) -> None:
    dead = f"{topic}.dead"
    config = PersistentConfig(ack_timeout="5s", max_deliveries=2, dead_letter=dead)

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        for value in ("good", "poison", "odd"):
            await engine.publish(topic, Message(key=value, payload=value, headers={"h": value}))
        async with engine.persistent_subscription(topic, "work", config) as one:
            for message in await some(one, 3):
                match message.payload:
                    case "good":
                        await message.ack()
                    case "poison":
                        await message.nack(delay=0.1)
                    case _:
                        await message.park("look at this")
            (poison,) = await some(one, 1)
            assert (poison.payload, poison.delivery_count) == ("poison", 2)
            await poison.nack()
            (parked,) = await one.parked()
            assert (parked.reason, parked.delivery_count) == ("look at this", 1)
            assert parked.message is not None
            assert parked.message.payload == "odd"
            await none_is_left(one)
            assert await one.replay_parked([parked]) == 1
            (odd,) = await some(one, 1)
            assert (odd.payload, odd.delivery_count) == ("odd", 2)
            await odd.ack()
            state = await one.describe()
            assert (state.parked, state.unsettled) == (0, 0)
        (letter,) = await engine.history(dead, 10)
        assert (letter.key, letter.payload) == ("poison", "poison")
        assert letter.headers["h"] == "poison"
        assert letter.headers["aegis-dead-letter-offset"] == "1"
        assert letter.headers["aegis-dead-letter-deliveries"] == "2"

    engine_run(work)


@pytest.mark.parametrize("step", ["_settle_within", "_write", "end"])
def test_a_consumer_that_is_lost_over_a_dead_letter_leaves_all_of_it_or_nothing(
    engine_run: Run, topic: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The first consumer never gets beyond this step, which has happened; the next one does."""
    place: Any = transactions if step == "end" else burials
    original, lost = getattr(place, step), asyncio.Event()

    async def stuck(*args: Any, **named: Any) -> Any:
        if lost.is_set():
            return await original(*args, **named)
        if step != "end":  # the decision never leaves
            await original(*args, **named)
        lost.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(place, step, stuck)
    config = PersistentConfig(ack_timeout="5s", max_deliveries=1, dead_letter=f"{topic}.dead")

    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 5)
        async with engine.persistent_subscription(topic, "work", config) as one:
            await one.nack(await some(one, 5))
            async with asyncio.timeout(PATIENCE_S):
                await lost.wait()
            state = await one.describe()
            assert (state.unsettled, sum(state.lag.values())) == (5, 5)
            assert await engine.history(f"{topic}.dead", 10) == []
        async with engine.persistent_subscription(topic, "work") as one:
            await none_is_left(one)
            letters = await engine.history(f"{topic}.dead", 10)
            assert [letter.payload for letter in letters] == list(range(5))
            assert (await one.describe()).to_bury == 0

    engine_run(work)


def test_a_reset_begins_anew_elsewhere(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 10)
        async with engine.persistent_subscription(topic, "work") as one:
            await one.ack((await some(one, 10))[:4])
            with pytest.raises(SubscriptionInUse):
                await engine.persistent_subscription(topic, "work").reset(Offset.EARLIEST)
        other = engine.persistent_subscription(topic, "work")
        with pytest.raises(OffsetOutOfRange):
            await other.reset(Offset.at(11))
        assert (await other.describe()).lag == {TopicPartition(topic, 0): 6}, "nothing is changed"
        assert await other.reset(Offset.at(2)) == {TopicPartition(topic, 0): 2}
        assert (await other.describe()).positions == {TopicPartition(topic, 0): 2}
        async with engine.persistent_subscription(topic, "work") as one:
            again = await some(one, 8)
            assert sorted(message.payload for message in again) == list(range(2, 10))
            assert {message.delivery_count for message in again} == {1}

    engine_run(work)


def test_in_order_more_consumers_than_partitions(engine_run: Run, topic: str) -> None:
    """Each key one at a time and in order; the keys of one partition are shared by four."""
    config = PersistentConfig(max_in_flight=5, ordered=True)

    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 60)
        busy: set[Any] = set()
        seen: dict[Any, list[int]] = {}
        by_consumer = [0] * 4

        async def consume(number: int, one: PersistentSubscription) -> None:
            async for message in one:
                assert message.key not in busy
                busy.add(message.key)
                await asyncio.sleep(0.002)
                seen.setdefault(message.key, []).append(message.payload)
                by_consumer[number] += 1
                busy.remove(message.key)
                await message.ack()

        async with AsyncExitStack() as stack:
            four = [
                await stack.enter_async_context(
                    engine.persistent_subscription(topic, "work", config)
                )
                for _ in range(4)
            ]
            tasks = [asyncio.create_task(consume(n, one)) for n, one in enumerate(four)]
            async with asyncio.timeout(PATIENCE_S):
                while sum(by_consumer) < 60:
                    await asyncio.sleep(0.02)
                    assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        assert sorted(itertools.chain(*seen.values())) == list(range(60))
        assert all(values == sorted(values) for values in seen.values())
        assert sum(map(bool, by_consumer)) > 1, "one partition is shared"

    engine_run(work)


def test_tasks_that_read_without_entering_are_one_consumer(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 20)
        one = engine.persistent_subscription(topic, "work")
        polls = await asyncio.gather(*(one.poll(5, timeout=PATIENCE_S) for _ in range(4)))
        assert sorted(message.payload for messages in polls for message in messages) == [*range(20)]
        assert len((await one.describe()).consumers) == 1
        await one.close()
        assert (await one.describe()).consumers == ()

    engine_run(work)


def test_an_engine_that_closes_ends_what_is_about_to_read(
    new_engine: Callable[[], StreamingEngine], topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that waits may still be asking where to begin."""

    async def work() -> None:
        asking, closed = asyncio.Event(), asyncio.Event()

        async def slowly(*given: Any, **named: Any) -> Any:
            asking.set()
            await closed.wait()
            return await moments.offsets_at(*given, **named)

        monkeypatch.setattr("aegis_cluster.persistent.offsets_at", slowly)
        async with new_engine() as engine:
            await engine.create_topic(topic)
            one, two = (engine.persistent_subscription(topic, name) for name in ("one", "two"))
            stepping = asyncio.create_task(anext(one))
            await asking.wait()
            asking.clear()
            polling = asyncio.create_task(two.poll(timeout=PATIENCE_S))
            await asking.wait()
        closed.set()
        with pytest.raises(StopAsyncIteration):
            await stepping
        assert await polling == []
        with pytest.raises(Misuse, match="is closed"):
            await two.poll()

    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


def test_what_cannot_be_is_refused(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        with pytest.raises(TopicNotFound):
            await anext(engine.persistent_subscription("no-such-topic", "work"))
        await fill(engine, topic, 1)
        with pytest.raises(SubscriptionNotFound):
            await engine.persistent_subscription(topic, "nobody").describe()
        with pytest.raises(ConfigError, match="dead_letter"):
            engine.persistent_subscription(topic, "w", PersistentConfig(dead_letter=topic))
        async with engine.persistent_subscription(
            topic, "work", PersistentConfig(start=Offset.LATEST)
        ) as one:
            with pytest.raises(ConfigError, match="ordered"):
                await anext(
                    engine.persistent_subscription(topic, "work", PersistentConfig(ordered=True))
                )
            assert await one.poll(timeout=0.2) == []
            await engine.publish(topic, Message(payload="new"))
            (message,) = await some(one, 1)
            await one.update(PersistentConfig(max_deliveries=1, ack_timeout="5s"))
            assert (await one.describe()).config.max_deliveries == 1
            await message.ack()
            names = [found.name for found in await engine.list_subscriptions(topic)]
            assert names == ["work"]
            await one.delete()
            with pytest.raises(SubscriptionNotFound):
                await one.poll(timeout=PATIENCE_S)
        assert await engine.list_subscriptions(topic) == []

    engine_run(work)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"ack_timeout": "1"}, "ack_timeout"),
        ({"ack_timeout": "1ms"}, "ack_timeout"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_deliveries": 0}, "max_deliveries"),
        ({"strategy": "random"}, "strategy"),
        ({"lost": "ignore"}, "lost"),
    ],
)
def test_a_wrong_setting_is_refused_where_it_is_written(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PersistentConfig(**wrong)
