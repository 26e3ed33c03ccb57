"""Transactions as programs use them, embedded and on a cluster."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import (
    DeliveryMode,
    Message,
    Offset,
    ProducerConfig,
    StreamingEngine,
    SubscribeConfig,
    TopicConfig,
    TopicPartition,
)
from aegis_cluster.client import transactions
from aegis_cluster.errors import (
    ConfigError,
    Misuse,
    OutcomeUnknown,
    ProducerFenced,
    RequestTimeout,
    TransactionAborted,
)
from aegis_cluster.transaction import TransactionalProducer, TransactionOutcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Run = Callable[[Callable[[StreamingEngine], Awaitable[Any]]], Any]

_NAMES = itertools.count()
PATIENCE_S = 25.0


@pytest.fixture
def name() -> str:
    return f"producer-{next(_NAMES)}"


async def payloads(engine: StreamingEngine, topic: str) -> list[Any]:
    return sorted(message.payload for message in await engine.history(topic, 10_000))


def exactly_once(group: str) -> SubscribeConfig:
    return SubscribeConfig(
        group_id=group, start=Offset.EARLIEST, delivery_mode=DeliveryMode.EXACTLY_ONCE
    )


def test_all_of_it_or_nothing(engine_run: Run, topic: str, name: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=3))
        async with engine.producer(ProducerConfig(transactional_id=name)) as producer:
            for number in range(3):
                async with producer.transaction() as tx:
                    for key in range(4):
                        await tx.send(topic, Message(payload=number, key=str(key)))
            with suppress(ZeroDivisionError):
                async with producer.transaction() as tx:
                    await tx.send_many(topic, [99] * 100)
                    await (await tx.send(topic, Message(payload=99)))
                    raise ZeroDivisionError
            async with producer.transaction():
                pass
            assert await payloads(engine, topic) == sorted([0, 1, 2] * 4)
            async with producer.transaction() as tx:
                await tx.send(topic, Message(payload=3, key="0"))
        assert await payloads(engine, topic) == sorted([0, 1, 2] * 4 + [3])
        everything = SubscribeConfig(start=Offset.EARLIEST, isolation="read_uncommitted")
        async with engine.subscribe(topic, everything) as reader:
            found: list[Any] = []
            async with asyncio.timeout(PATIENCE_S):
                while len(found) < 114:
                    found += [message.payload for message in await reader.poll()]
            assert found.count(99) == 101
        ends = await engine.offsets(topic)
        assert all(one.last_stable_offset == one.high_watermark for one in ends.values())

    engine_run(work)


def test_an_open_transaction_holds_readers_back(engine_run: Run, topic: str, name: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        async with engine.producer(ProducerConfig(transactional_id=name)) as producer:
            async with producer.transaction() as tx:
                await (await tx.send(topic, Message(payload="in")))
                await engine.publish(topic, Message(payload="after"))
                (offsets,) = (await engine.offsets(topic)).values()
                assert (offsets.last_stable_offset, offsets.high_watermark) == (0, 2)
                assert await payloads(engine, topic) == []
                everything = SubscribeConfig(start=Offset.EARLIEST, isolation="read_uncommitted")
                async with engine.subscribe(topic, everything) as reader:
                    assert [m.payload for m in await reader.poll(2)] == ["in", "after"]
            assert await payloads(engine, topic) == ["after", "in"]

    engine_run(work)


def test_a_newer_producer_takes_the_name_over(engine_run: Run, topic: str, name: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        config = ProducerConfig(transactional_id=name)
        old, new = engine.producer(config), engine.producer(config)
        tx, newer = old.transaction(), new.transaction()
        await tx.__aenter__()
        await (await tx.send(topic, Message(payload="old")))
        async with new, newer:
            await newer.send(topic, Message(payload="new"))
        with pytest.raises(ProducerFenced):
            await tx.__aexit__(None, None, None)
        with pytest.raises(ProducerFenced):
            await old.transaction().__aenter__()
        assert await payloads(engine, topic) == ["new"]
        assert await tx.outcome() is TransactionOutcome.ABORTED
        assert await newer.outcome() is TransactionOutcome.COMMITTED

    engine_run(work)


def test_what_is_open_for_too_long_is_aborted(engine_run: Run, topic: str, name: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        config = ProducerConfig(transactional_id=name, transaction_timeout="1s")
        async with engine.producer(config) as producer:
            late = producer.transaction()
            await late.__aenter__()
            await (await late.send(topic, Message(payload="late")))
            async with asyncio.timeout(PATIENCE_S):
                while (await engine.offsets(topic))[0].last_stable_offset == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            with pytest.raises(TransactionAborted, match="time-out"):
                await late.__aexit__(None, None, None)
            async with producer.transaction() as tx:
                await tx.send(topic, Message(payload="in time"))
        assert await payloads(engine, topic) == ["in time"]

    engine_run(work)


def test_positions_are_committed_with_what_was_made_of_the_messages(
    engine_run: Run, topic: str, name: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        made = f"{topic}-made"
        await engine.create_topic(topic, TopicConfig(partitions=2))
        await engine.create_topic(made)
        await engine.publish_many(topic, range(40), keys=map(str, range(40)))
        group = f"group-of-{name}"
        done = 0
        async with engine.producer(ProducerConfig(transactional_id=name)) as producer:
            for attempt in itertools.count():
                if done == 40:
                    break
                with suppress(ZeroDivisionError):
                    async with engine.subscribe(topic, exactly_once(group)) as subscriber:
                        while done < 40:
                            messages = await subscriber.poll(7)
                            async with producer.transaction() as tx:
                                for message in messages:
                                    await tx.send(made, Message(payload=message.payload))
                                await tx.send_offsets(subscriber)
                                if attempt < 3 and len(messages) > attempt:
                                    raise ZeroDivisionError
                            done += len(messages)
        assert await payloads(engine, made) == list(range(40))
        lag = await engine.group(group).lag()
        assert lag == {TopicPartition(topic, 0): 0, TopicPartition(topic, 1): 0}

    engine_run(work)


def test_what_an_aborted_transaction_handled_is_handed_out_again(
    engine_run: Run, topic: str, name: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(10))
        async with (
            engine.producer(ProducerConfig(transactional_id=name)) as producer,
            engine.subscribe(topic, exactly_once(f"g-{name}")) as subscriber,
        ):
            with suppress(ZeroDivisionError):
                async with producer.transaction():
                    assert [m.payload for m in await subscriber.poll(4)] == [0, 1, 2, 3]
                    raise ZeroDivisionError
            async with producer.transaction() as tx:
                with pytest.raises(Misuse, match="handed out again"):
                    await tx.send_offsets(subscriber)
            messages = await subscriber.poll(4)
            assert [m.payload for m in messages] == [0, 1, 2, 3]
            await messages[0].ack()  # means nothing here
            with pytest.raises(Misuse):
                await subscriber.commit()
            async with producer.transaction() as tx:
                await tx.send_offsets(subscriber)
            assert [m.payload for m in await subscriber.poll(2)] == [4, 5]
        assert await engine.group(f"g-{name}").positions() == {TopicPartition(topic, 0): 4}

    engine_run(work)


@pytest.mark.parametrize("another_task_reads", [False, True])
def test_a_transaction_that_could_not_begin_hands_the_messages_out_again(
    engine_run: Run,
    topic: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    another_task_reads: bool,
) -> None:
    async def unreachable(*_: object) -> None:
        raise RequestTimeout("no coordinator answers")

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(4))
        config = ProducerConfig(transactional_id=name)
        async with (
            engine.producer(config) as producer,
            engine.subscribe(topic, exactly_once(f"g-{name}")) as subscriber,
        ):
            reading = subscriber.poll(2)
            first = await (asyncio.create_task(reading) if another_task_reads else reading)
            assert [one.payload for one in first] == [0, 1]
            with monkeypatch.context() as patch:
                patch.setattr(TransactionalProducer, "ready", unreachable)
                with pytest.raises(RequestTimeout):
                    async with producer.transaction(subscriber):
                        pass
            again = [one.payload for one in await subscriber.poll(2)]
            assert again == [0, 1]
            async with producer.transaction() as tx:
                await tx.send_offsets(subscriber)
            assert [one.payload for one in await subscriber.poll(2)] == [2, 3]

    engine_run(work)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_commit_that_was_not_answered_can_be_asked_about(
    engine_run: Run, topic: str, name: str, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    right = transactions.end

    async def lost(*args: Any, **kwargs: Any) -> Any:
        if arrived:
            await right(*args, **kwargs)
        raise OutcomeUnknown("The coordinator did not answer in time.")

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.create_topic(f"{topic}-made")
        await engine.publish_many(topic, range(6))
        async with (
            engine.producer(ProducerConfig(transactional_id=name)) as producer,
            engine.subscribe(topic, exactly_once(f"g-{name}")) as subscriber,
        ):
            tx = producer.transaction(subscriber)
            await tx.__aenter__()
            for message in await subscriber.poll(3):
                await tx.send(f"{topic}-made", Message(payload=message.payload))
            await tx.send_offsets(subscriber)
            with monkeypatch.context() as patch:
                patch.setattr(transactions, "end", lost)
                with pytest.raises(OutcomeUnknown, match="outcome"):
                    await tx.__aexit__(None, None, None)
            found = await tx.outcome()
            assert found is (
                TransactionOutcome.COMMITTED if arrived else TransactionOutcome.ABORTED
            )
            assert await tx.outcome() is found
            left = list(range(3, 6) if arrived else range(6))
            while left:
                messages = await subscriber.poll(6)
                async with producer.transaction() as again:
                    for message in messages:
                        assert message.payload == left.pop(0)
                        await again.send(f"{topic}-made", Message(payload=message.payload))
                    await again.send_offsets(subscriber)
        assert await payloads(engine, f"{topic}-made") == list(range(6))

    engine_run(work)


def test_a_group_waits_for_what_a_dead_member_has_left_open(
    engine_run: Run, topic: str, name: str
) -> None:
    """KIP-447: or what its transaction handled would be handled again before it is committed."""

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(4))
        config = ProducerConfig(transactional_id=name)
        dead = engine.producer(config)
        async with engine.subscribe(topic, exactly_once(f"g-{name}")) as subscriber:
            tx = dead.transaction()
            await tx.__aenter__()
            assert len(await subscriber.poll(2)) == 2
            await tx.send_offsets(subscriber)
        async with engine.subscribe(topic, exactly_once(f"g-{name}")) as heir:
            assert await heir.poll(4, timeout=0.5) == []
            async with engine.producer(config):  # ends what its predecessor left open
                assert [m.payload for m in await heir.poll(4)] == [0, 1, 2, 3]

    engine_run(work)


def test_a_commit_that_is_cancelled_hands_the_messages_out_again(
    engine_run: Run, topic: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(3))
        async with (
            engine.producer(ProducerConfig(transactional_id=name)) as producer,
            engine.subscribe(topic, exactly_once(f"g-{name}")) as subscriber,
        ):
            tx = producer.transaction(subscriber)
            await tx.__aenter__()
            assert len(await subscriber.poll(3)) == 3
            await tx.send_offsets(subscriber)
            with monkeypatch.context() as patch:
                patch.setattr(transactions, "end", never)
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await tx.__aexit__(None, None, None)
            assert [m.payload for m in await subscriber.poll(3)] == [0, 1, 2]

    engine_run(work)


def test_misuse_is_told(engine_run: Run, topic: str, name: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        for wrong in (
            ProducerConfig(transactional_id=""),
            ProducerConfig(transactional_id="x", acks="leader"),
            ProducerConfig(transaction_timeout="5s"),
            ProducerConfig(transactional_id="x", transaction_timeout="1ms"),
        ):
            with pytest.raises(ConfigError):
                engine.producer(wrong)
        with pytest.raises(ConfigError):
            SubscribeConfig(delivery_mode=DeliveryMode.EXACTLY_ONCE)
        async with engine.producer() as plain:
            with pytest.raises(Misuse):
                plain.transaction()
        async with engine.producer(ProducerConfig(transactional_id=name)) as producer:
            with pytest.raises(Misuse):
                await producer.send(topic, Message(payload=1))
            async with producer.transaction() as tx:
                with pytest.raises(Misuse):
                    await producer.transaction().__aenter__()
                at_least_once = SubscribeConfig(group_id=f"g-{name}")
                async with engine.subscribe(topic, at_least_once) as subscriber:
                    with pytest.raises(Misuse):
                        await tx.send_offsets(subscriber)
            with pytest.raises(Misuse):
                await tx.send(topic, Message(payload=1))
            async with engine.subscribe(topic, at_least_once) as subscriber:
                with pytest.raises(Misuse, match="EXACTLY_ONCE"):
                    await producer.transaction(subscriber).__aenter__()
            async with producer.transaction() as tx:  # the producer is free for another one
                await tx.send(topic, Message(payload=2))

    engine_run(work)
