"""Publishing: single messages, many, to several topics, and through a producer of one's own."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import (
    BatchReceipt,
    Message,
    Offset,
    Pending,
    ProducerConfig,
    Receipt,
    StreamingEngine,
    SubscribeConfig,
    TopicConfig,
)
from aegis_cluster.client.partition_queue import EPOCH_MAX
from aegis_cluster.errors import (
    ConfigError,
    MessageTooLarge,
    Misuse,
    OutcomeUnknown,
    PartlyPublished,
    RequestTimeout,
    TopicExists,
    TopicNotFound,
    UnsupportedPayload,
)

if TYPE_CHECKING:
    from tests.engine.conftest import Run

EARLIEST = SubscribeConfig(start=Offset.EARLIEST)


async def read(engine: StreamingEngine, topic: str, count: int) -> list[Any]:
    """Payloads of the first `count` messages that come."""
    found: list[Any] = []
    async with engine.subscribe(topic, EARLIEST) as subscriber:
        while len(found) < count:
            polled = await subscriber.poll(count - len(found), timeout=10)
            assert polled, f"only {len(found)} of {count} came"
            found.extend(message.payload for message in polled)
    return found


def test_topics_are_made_listed_described_and_deleted(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=3, retention="1h"))
        assert topic in await engine.list_topics()
        found = await engine.describe_topic(topic)
        assert (found.partitions, found.settings.retention_ms) == (3, 3_600_000)
        assert sorted(found.replicas) == [0, 1, 2]
        with pytest.raises(TopicExists):
            await engine.create_topic(topic)
        await engine.create_topic(topic, exist_ok=True)
        await engine.delete_topic(topic)
        assert topic not in await engine.list_topics()
        with pytest.raises(TopicNotFound):
            await engine.describe_topic(topic)

    engine_run(work)


def test_a_receipt_says_where_the_message_stands(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        before = datetime.now(UTC)
        first = await engine.publish(topic, Message(payload="a"))
        second = await engine.publish(topic, Message(payload="b"))
        assert (first.topic, first.partition, first.offset) == (topic, 0, 0)
        assert second.offset == 1
        assert abs((first.timestamp - before).total_seconds()) < 30
        offsets = await engine.offsets(topic)
        assert offsets[0].high_watermark == 2

    engine_run(work)


def test_one_key_lands_in_one_partition(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=4))
        receipts = [await engine.publish(topic, Message(key="k", payload=n)) for n in range(5)]
        assert len({receipt.partition for receipt in receipts}) == 1
        assert [receipt.offset for receipt in receipts] == [0, 1, 2, 3, 4]

    engine_run(work)


def test_many_are_accounted_for(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=2))
        receipts = await engine.publish_many(topic, range(1_000), keys=map(str, range(1_000)))
        assert all(isinstance(receipt, BatchReceipt) for receipt in receipts)
        assert sum(receipt.count for receipt in receipts) == 1_000
        assert sorted(await read(engine, topic, 1_000)) == list(range(1_000))

    engine_run(work)


def test_to_many_topics(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        names = [f"{topic}-{n}" for n in range(3)]
        for name in names:
            await engine.create_topic(name)
        receipts = await engine.publish_to_many(names, Message(payload={"to": "all"}))
        assert [receipt.topic for receipt in receipts] == names
        for name in names:
            assert await read(engine, name, 1) == [{"to": "all"}]

    engine_run(work)


def test_to_many_topics_of_which_one_is_missing(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        with pytest.raises(PartlyPublished) as caught:
            await engine.publish_to_many([topic, f"{topic}-none"], Message(payload=1))
        assert (caught.value.failed, caught.value.unknown) == ([1], [])
        assert [receipt.topic for receipt in caught.value.receipts] == [topic]
        with pytest.raises(TopicNotFound):
            await engine.publish_to_many([f"{topic}-none"], Message(payload=1))

    engine_run(work)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Message(payload=b"x" * 2_000_000), MessageTooLarge),
        (Message(payload=(1, 2)), UnsupportedPayload),
        (Message(payload={1: "one"}), UnsupportedPayload),
        (Message(payload=float("nan")), UnsupportedPayload),
        (Message(key=5, payload=1), UnsupportedPayload),  # type: ignore[arg-type]
        (Message(payload=1, headers={"aegis": "x"}), Misuse),
        (Message(payload=1, timestamp=datetime(2026, 1, 1)), Misuse),  # noqa: DTZ001 - the point
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(
    engine_run: Run, topic: str, message: Message, error: type[Exception]
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        with pytest.raises(error):
            await engine.publish(topic, message)
        async with engine.producer() as producer:
            with pytest.raises(error):
                await producer.send(topic, message)
        assert (await engine.offsets(topic))[0].high_watermark == 0

    engine_run(work)


def test_a_producer_sends_without_waiting(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        async with engine.producer(ProducerConfig(linger="1ms", compression="lz4")) as producer:
            pending = [await producer.send(topic, Message(payload=n)) for n in range(500)]
            assert isinstance(pending[0], Pending)
            receipts = [await one for one in pending]
            assert all(one.done for one in pending)
        assert all(isinstance(receipt, Receipt) for receipt in receipts)
        assert [receipt.offset for receipt in receipts] == list(range(500))
        assert await read(engine, topic, 500) == list(range(500))

    engine_run(work)


def test_flush_waits_for_all(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        producer = engine.producer(ProducerConfig(linger="60s"))
        pending = [await producer.send(topic, Message(payload=n)) for n in range(10)]
        await producer.flush()
        assert all(one.done for one in pending)
        assert (await engine.offsets(topic))[0].high_watermark == 10
        await producer.flush()
        await producer.close()
        with pytest.raises(Misuse, match="closed"):
            await producer.send(topic, Message(payload=1))

    engine_run(work)


def test_flush_tells_of_what_nobody_awaited(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        producer = engine.producer()
        await producer.send(topic, Message(payload=1))
        await producer.flush()
        await producer.send(topic, Message(payload=2), timeout=1e-9)
        with pytest.raises((RequestTimeout, OutcomeUnknown)):
            await producer.flush()
        await producer.flush()  # told once
        await producer.close()

    engine_run(work)


def test_a_full_buffer_slows_its_sender_down(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        async with engine.producer(ProducerConfig(buffer_size="8MB", batch_size="1MB")) as producer:
            for _ in range(60):
                await producer.send(topic, Message(payload=b"x" * 500_000))
                assert producer.buffered_bytes <= 8 * 1024 * 1024
        assert (await engine.offsets(topic))[0].high_watermark == 60

    engine_run(work)


def test_many_at_once_fill_larger_batches(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        many = [b"x" * 1_000] * 3_000
        counts = [receipt.count for receipt in await engine.publish_many(topic, many)]
        assert sum(counts) == 3_000
        assert max(counts) * 1_000 > 1_000_000
        async with engine.producer() as producer:
            pending = [await producer.send(topic, Message(payload=value)) for value in many]
            await asyncio.gather(*(one.receipt() for one in pending))
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            sizes = []
            async for batch in subscriber.batches():
                sizes.append(len(batch))
                if sum(sizes) == 6_000:
                    break
        assert max(sizes[len(counts) :]) * 1_000 < 256 * 1024  # of those that came one by one

    engine_run(work)


def test_without_idempotence_messages_are_stored_too(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        async with engine.producer(ProducerConfig(idempotent=False)) as producer:
            for number in range(20):
                await producer.send(topic, Message(payload=number))
        assert await read(engine, topic, 20) == list(range(20))

    engine_run(work)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ProducerConfig(acks="all"), "allowed: 'quorum', 'leader', 'none'"),
        (ProducerConfig(acks="leader", idempotent=True), "idempotent = True with acks"),
        (ProducerConfig(acks="none", idempotent=True), "idempotent = True with acks"),
        (ProducerConfig(linger="5"), "linger"),
        (ProducerConfig(batch_size="9GB"), "batch_size"),
        (ProducerConfig(buffer_size="1KB"), "buffer_size"),
        (ProducerConfig(compression="rar"), "compression"),
        (ProducerConfig(request_timeout="soon"), "request_timeout"),
    ],
)
def test_settings_of_a_producer_that_are_not_allowed(config: ProducerConfig, said: str) -> None:
    engine = StreamingEngine.connect("tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match=said):
        engine.producer(config)


def test_a_channel_is_the_engine_bound_to_a_topic(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        channel = engine.channel(topic)
        assert channel.topic == topic
        await channel.publish(Message(payload=1))
        await channel.publish_many([2, 3])
        assert (await channel.offsets())[0].high_watermark == 3
        assert (await channel.describe()).name == topic
        assert [message.payload for message in await channel.history(2)] == [2, 3]
        async with channel.subscribe(EARLIEST) as subscriber:
            assert (await subscriber.poll(1, timeout=10))[0].payload == 1

    engine_run(work)


def test_publishers_of_one_engine_at_the_same_time(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=2))
        await asyncio.gather(
            *(engine.publish(topic, Message(key=str(n), payload=n)) for n in range(200))
        )
        assert sorted(await read(engine, topic, 200)) == list(range(200))

    engine_run(work)


def test_numbers_of_the_engine(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        before = await engine.stats()
        await engine.create_topic(topic, TopicConfig(partitions=2))
        await engine.publish_many(topic, range(7))
        after = await engine.stats()
        assert after.topics == before.topics + 1
        assert after.partitions == before.partitions + 2
        assert after.messages == before.messages + 7
        assert (after.nodes in (1, 3), after.buffered_bytes) == (True, 0)

    engine_run(work)


def test_a_producer_id_without_another_epoch_makes_way(engine_run: Run, topic: str) -> None:
    """KIP-98: epochs are int16; nobody who publishes hears of it."""

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish(topic, Message(payload="0"))
        (own,) = engine._producers
        assert own._lanes is not None
        queue = own._lanes._lanes[topic, 0].queue
        first_id = queue.producer_id
        queue.epoch = EPOCH_MAX - 1  # as after so many batches whose outcome stayed unknown
        queue.next_sequence = 0
        for number in range(1, 6):
            await engine.publish(topic, Message(payload=str(number)))
            queue._new_epoch()
        assert queue.producer_id != first_id
        assert await read(engine, topic, 6) == [str(number) for number in range(6)]

    engine_run(work)


@pytest.mark.parametrize("acks", ["leader", "none"])
def test_fewer_acks(engine_run: Run, topic: str, acks: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=2))
        async with engine.producer(ProducerConfig(acks=acks)) as producer:
            pending = [
                await producer.send(topic, Message(key=str(n), payload=n)) for n in range(100)
            ]
            receipts = [await one for one in pending]
            await producer.flush()
            assert producer.buffered_bytes == 0
        if acks == "none":
            assert {receipt.offset for receipt in receipts} == {-1}
        else:
            assert len({(receipt.partition, receipt.offset) for receipt in receipts}) == 100
        assert sorted(await read(engine, topic, 100)) == list(range(100))
        with pytest.raises(TopicNotFound):
            async with engine.producer(ProducerConfig(acks=acks)) as producer:
                await producer.send(f"{topic}-none", Message(payload=1))

    engine_run(work)


@pytest.mark.parametrize(
    "values",
    [
        [b"bytes %d" % n for n in range(5_100)],
        [f"text {n} ä" for n in range(300)],
        [{"n": n, "list": [n]} for n in range(300)],
        [None, b"mixed", "kinds", 1.5, True, [1], {}, "", b""] * 30,
        [b"x" * (n % 7) * 1_000 for n in range(300)],  # more than one batch, of uneven values
    ],
    ids=["bytes", "text", "json", "mixed", "uneven"],
)
@pytest.mark.parametrize("keyed", [False, True], ids=["bare", "keyed"])
def test_many_bare_values_come_out_equal_and_in_order(
    engine_run: Run, topic: str, values: list[Any], keyed: bool
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=1))
        keys = [f"key {n}" for n in range(len(values))] if keyed else None
        receipts = await engine.publish_many(topic, iter(values), keys)
        assert sum(receipt.count for receipt in receipts) == len(values)
        starts = [receipt.base_offset for receipt in receipts]
        assert starts == sorted(starts)
        assert await read(engine, topic, len(values)) == values

    engine_run(work)


def test_of_many_the_one_that_is_refused_is_named(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        values: list[Any] = [b"a", b"x" * 2_000_000, b"b"]
        with pytest.raises(PartlyPublished) as caught:
            await engine.publish_many(topic, values)
        assert (caught.value.failed, caught.value.unknown) == ([1], [])
        assert await read(engine, topic, 2) == [b"a", b"b"]
        with pytest.raises(PartlyPublished) as caught:
            await engine.publish_many(topic, ["good", "\ud800", "good"], ["k", "k", "\ud800"])
        assert (caught.value.failed, caught.value.unknown) == ([1, 2], [])
        with pytest.raises(Misuse, match="one for each"):
            await engine.publish_many(topic, [1, 2], ["only one"])

    engine_run(work)
