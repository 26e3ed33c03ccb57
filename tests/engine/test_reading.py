"""Reading: positions, several topics, patterns, filters, batches, repeats, and the past."""

from __future__ import annotations

import asyncio
import copy
import pickle
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import (
    AckMode,
    DeliveryMode,
    EventFilter,
    Message,
    MessageBatch,
    Offset,
    ReceivedMessage,
    StreamingEngine,
    SubscribeConfig,
    Subscriber,
    TopicConfig,
    TopicPartition,
)
from aegis_cluster.client.producer import Producer as Lanes
from aegis_cluster.client.producer import ProducerOptions
from aegis_cluster.errors import (
    ConfigError,
    CorruptRecord,
    Misuse,
    OffsetOutOfRange,
    TopicNotFound,
)

if TYPE_CHECKING:
    from aegis_cluster.client.producer import Row
    from tests.engine.conftest import Run

EARLIEST = SubscribeConfig(start=Offset.EARLIEST)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


async def take(subscriber: Subscriber, count: int) -> list[ReceivedMessage]:
    """The next `count` messages; fails when they do not come."""
    found: list[ReceivedMessage] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found.extend(await subscriber.poll(count - len(found), timeout=5))
    return found


async def payloads(subscriber: Subscriber, count: int) -> list[Any]:
    return [message.payload for message in await take(subscriber, count)]


async def nothing_comes(subscriber: Subscriber, seconds: float = 0.2) -> bool:
    return not await subscriber.poll(timeout=seconds)


def test_what_arrives_is_the_message_and_its_place(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        sent = Message("k", {"a": 1}, {"source": "web", "raw": b"\xff"}, NOON)
        await engine.publish(topic, sent)
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            async for message in subscriber:
                assert (message.key, message.payload, message.headers) == (
                    sent.key,
                    sent.payload,
                    sent.headers,
                )
                assert (message.topic, message.partition, message.offset) == (topic, 0, 0)
                assert message.timestamp == NOON
                await message.ack()
                break

    engine_run(work)


def test_where_reading_starts(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        for number in range(4):
            await engine.publish(topic, Message(payload=number, timestamp=_at(number)))
        for start, wanted in (
            (Offset.EARLIEST, 0),
            (Offset.at(2), 2),
            (Offset.at_time(_at(3)), 3),
            (Offset.at_time(_at(1) - timedelta(milliseconds=1)), 1),
            (Offset.at_time(datetime(1960, 1, 1, tzinfo=UTC)), 0),
        ):
            async with engine.subscribe(topic, SubscribeConfig(start=start)) as subscriber:
                assert await payloads(subscriber, 1) == [wanted], start
        for start in (Offset.LATEST, Offset.at_time(_at(4))):
            async with engine.subscribe(topic, SubscribeConfig(start=start)) as subscriber:
                assert await nothing_comes(subscriber)
        async with engine.subscribe(topic, SubscribeConfig(start=Offset.at(99))) as subscriber:
            with pytest.raises(OffsetOutOfRange):
                await subscriber.poll(timeout=5)

    engine_run(work)


def _at(minute: int) -> datetime:
    return NOON + timedelta(minutes=minute)


def test_a_time_in_the_middle_of_a_batch(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, [Message(payload=n, timestamp=_at(n)) for n in range(100)])
        start = SubscribeConfig(start=Offset.at_time(_at(40)))
        async with engine.subscribe(topic, start) as subscriber:
            assert await payloads(subscriber, 60) == list(range(40, 100))
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            await subscriber.seek(0, Offset.at_time(_at(200)))
            assert await nothing_comes(subscriber)

    engine_run(work)


def test_several_topics(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        names = [f"{topic}-a", f"{topic}-b"]
        for name in names:
            await engine.create_topic(name, TopicConfig(partitions=2))
            await engine.publish_many(name, [name] * 5)
        async with engine.subscribe(names, EARLIEST) as subscriber:
            messages = await take(subscriber, 10)
            assert sorted(m.topic for m in messages) == sorted(names * 5)
            assert all(m.payload == m.topic for m in messages)
            assert subscriber.assignment == [TopicPartition(n, p) for n in names for p in (0, 1)]
            assert set((await subscriber.lag()).values()) == {0}
            with pytest.raises(Misuse, match="several topics"):
                _ = subscriber.positions
            with pytest.raises(Misuse, match="several topics"):
                await subscriber.seek(0, 0)
            ends = await engine.offsets(names[0])
            assert subscriber.position(TopicPartition(names[0], 0)) == ends[0].high_watermark

    engine_run(work)


def test_a_pattern_follows_new_topics(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(f"{topic}.one")
        await engine.create_topic(f"{topic}-other")
        async with engine.subscribe(f"{topic}.*") as subscriber:
            await engine.publish(f"{topic}.one", Message(payload=1))
            assert await payloads(subscriber, 1) == [1]
            await engine.create_topic(f"{topic}.two")
            await engine.publish(f"{topic}.two", Message(payload=2))
            await engine.publish(f"{topic}-other", Message(payload=3))
            assert await payloads(subscriber, 1) == [2]  # from its beginning, though LATEST
            await engine.delete_topic(f"{topic}.one")
            await engine.publish(f"{topic}.two", Message(payload=4))
            assert await payloads(subscriber, 1) == [4]
            await engine.create_topic(f"{topic}.one")
            await engine.publish(f"{topic}.one", Message(payload=5))
            assert await payloads(subscriber, 1) == [5]

    engine_run(work)


def test_a_topic_that_is_not_there(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        with pytest.raises(TopicNotFound):
            async with engine.subscribe(topic):
                pass
        with pytest.raises(Misuse):
            engine.subscribe([])

    engine_run(work)


@pytest.mark.parametrize(
    ("event_filter", "wanted"),
    [
        (EventFilter(keys=frozenset({"a1", "b1"})), [0, 2]),
        (EventFilter(key_prefix="a"), [0, 1]),
        (EventFilter(headers={"kind": "x"}), [1, 2]),
        (EventFilter(where=lambda message: message.payload > 1), [2, 3]),
        (EventFilter(key_prefix="a", headers={"kind": "x"}), [1]),
        (EventFilter(), [0, 1, 2, 3]),
    ],
)
def test_filters(engine_run: Run, topic: str, event_filter: EventFilter, wanted: list[int]) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        sent: list[tuple[str | bytes, dict[str, str]]]
        sent = [("a1", {}), ("a2", {"kind": "x"}), ("b1", {"kind": "x"}), (b"\xff", {"kind": "y"})]
        await engine.publish_many(topic, [Message(k, n, h) for n, (k, h) in enumerate(sent)])
        async with engine.subscribe(topic, EARLIEST, filter=event_filter) as subscriber:
            assert await payloads(subscriber, len(wanted)) == wanted
            assert await nothing_comes(subscriber, 0.05)
            assert subscriber.positions == {0: 4}
            with pytest.raises(Misuse):
                await anext(subscriber.batches())

    engine_run(work)


def test_batches_are_columns(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        sent = [Message(str(n), {"n": n}, timestamp=_at(n)) for n in range(300)]
        await engine.publish_many(topic, sent)
        columns = MessageBatch("", 0, [], [], [], [])
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            async for batch in subscriber.batches():
                assert (batch.topic, batch.partition) == (topic, 0)
                assert len(batch) == len(batch.keys) == len(batch.values) == len(batch.timestamps)
                columns.offsets.extend(batch.offsets)
                columns.keys.extend(batch.keys)
                columns.values.extend(batch.values)
                columns.timestamps.extend(batch.timestamps)
                if len(columns) == 300:
                    break
        assert columns.offsets == list(range(300))
        assert columns.keys == [message.key for message in sent]
        assert columns.values == [message.payload for message in sent]
        assert columns.timestamps == [_at(n).timestamp() * 1000 for n in range(300)]

    engine_run(work)


def test_seeking_back_and_forth(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(100))
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            assert await payloads(subscriber, 3) == [0, 1, 2]
            assert subscriber.positions == {0: 3}
            assert await subscriber.lag() == {TopicPartition(topic, 0): 97}
            await subscriber.seek(0, 90)
            assert await payloads(subscriber, 2) == [90, 91]
            await subscriber.seek(0, 1)
            assert await payloads(subscriber, 2) == [1, 2]
            await subscriber.seek(0, Offset.LATEST)
            assert await nothing_comes(subscriber)
            await subscriber.seek(0, Offset.EARLIEST)
            assert await payloads(subscriber, 1) == [0]
            await subscriber.seek(0, 1_000)
            with pytest.raises(OffsetOutOfRange):
                await subscriber.poll(timeout=5)
            await subscriber.seek(0, 99)
            assert await payloads(subscriber, 1) == [99]
            with pytest.raises(Misuse, match="not read here"):
                await subscriber.seek(7, 0)

    engine_run(work)


@pytest.mark.parametrize("batched", [False, True])
def test_a_record_that_does_not_decode_stops_reading_there(
    engine_run: Run, topic: str, batched: bool
) -> None:
    """What a foreign client may write: our header with a marker that we do not know."""

    async def read(subscriber: Subscriber) -> list[Any]:
        if not batched:
            return [message.payload for message in await subscriber.poll(timeout=5)]
        return (await anext(subscriber.batches())).values

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        lanes = Lanes(engine.cluster, ProducerOptions())
        deadline = engine.cluster.deadline(10)
        await lanes.start(deadline)
        info = await engine.cluster.topic(topic, deadline)
        rows: list[Row] = [
            (0, None, b"a", []),
            (0, None, b"b", [("aegis", b"?")]),
            (0, None, b"c", []),
        ]
        for row in rows:
            stored, _ = await lanes.add(info, 0, row, deadline)
        await stored
        await lanes.close()
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            assert await read(subscriber) == [b"a"]
            for _ in range(2):  # it does not go away by itself
                with pytest.raises(CorruptRecord, match="offset 1 of") as caught:
                    await read(subscriber)
                assert subscriber.positions == {0: 1}
            await subscriber.seek(0, caught.value.details["offset"] + 1)
            assert await read(subscriber) == [b"c"]

    engine_run(work)


def test_pausing_some_partitions(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=2))
        for number in range(40):
            await engine.publish(topic, Message(key=str(number), payload=number))
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            first = await take(subscriber, 3)
            subscriber.pause([0])
            ends = await engine.offsets(topic)
            seen = [m for m in first if m.partition == 1]
            seen += await take(subscriber, ends[1].high_watermark - len(seen))
            assert {m.partition for m in seen} == {1}
            assert await nothing_comes(subscriber)
            subscriber.resume([0])
            rest = [m for m in first if m.partition == 0]
            rest += await take(subscriber, ends[0].high_watermark - len(rest))
            assert [m.offset for m in rest] == list(range(ends[0].high_watermark))
            subscriber.pause()
            await engine.publish_many(topic, [1, 2, 3])
            assert await nothing_comes(subscriber)
            subscriber.resume()
            assert sorted(await payloads(subscriber, 3)) == [1, 2, 3]

    engine_run(work)


def test_a_message_that_is_not_handled_comes_again_first(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(10))
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            zero, one, two = await take(subscriber, 3)
            await one.nack()
            await zero.nack()
            assert await payloads(subscriber, 4) == [0, 1, 3, 4]
            await two.nack(delay=0.2)
            assert await nothing_comes(subscriber, 0.05)
            assert subscriber.positions == {0: 2}
            assert await payloads(subscriber, 3) == [2, 5, 6]
        await two.nack()  # closed: nobody is left to hand it out
        with pytest.raises(Misuse):
            await ReceivedMessage(payload=1).nack()

    engine_run(work)


def test_the_past(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=3))
        assert await engine.history(topic, 5) == []
        await engine.publish_many(
            topic,
            [Message(payload=n, timestamp=_at(n)) for n in range(50)],
            keys=[str(n) for n in range(50)],
        )
        assert [m.payload for m in await engine.history(topic, 5)] == [45, 46, 47, 48, 49]
        assert [m.payload for m in await engine.history(topic, 1_000)] == list(range(50))
        after = await engine.history_after(topic, _at(30))
        assert sorted(m.payload for m in after) == list(range(30, 50))
        stepped = [m.payload async for m in engine.history_after(topic, _at(48))]
        assert sorted(stepped) == [48, 49]
        assert await engine.history_after(topic, _at(50)) == []
        with pytest.raises(Misuse):
            engine.history(topic, 0)
        with pytest.raises(TopicNotFound):
            await engine.history(f"{topic}-none", 1)

    engine_run(work)


def test_a_reader_that_never_reads_holds_little(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        async with engine.producer() as producer:
            for _ in range(120):
                await producer.send(topic, Message(payload=b"x" * 500_000))
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            first = await take(subscriber, 1)
            await engine.publish_many(topic, [1, 2, 3])
            fetcher = subscriber._reader()
            assert fetcher._buffered <= 24 * 1024 * 1024
            rest = await take(subscriber, 122)
            assert [m.offset for m in first + rest] == list(range(123))

    engine_run(work)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"member_id": "m"}, "group_id"),
        ({"session_timeout": "30s"}, "group_id"),
        ({"delivery_mode": DeliveryMode.EXACTLY_ONCE}, "group_id"),
        ({"delivery_mode": DeliveryMode.AT_MOST_ONCE}, "group_id"),
        ({"isolation": "dirty"}, "isolation"),
        ({"max_poll_records": 0}, "max_poll_records"),
    ],
)
def test_settings_that_are_not_allowed(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SubscribeConfig(**fields)


def test_max_poll_records_is_the_default_of_poll(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, range(10))
        config = SubscribeConfig(start=Offset.EARLIEST, max_poll_records=3, ack_mode=AckMode.MANUAL)
        async with engine.subscribe(topic, config) as subscriber:
            assert [m.payload for m in await subscriber.poll()] == [0, 1, 2]
            assert [m.payload for m in await subscriber.poll(2)] == [3, 4]

    engine_run(work)


def test_a_received_message_is_a_value() -> None:
    time = datetime(2026, 1, 2, tzinfo=UTC)
    one = ReceivedMessage("k", {"a": 1}, {"h": "x"}, time, "orders", 3, 17)
    assert (one.key, one.payload, one.headers, one.timestamp) == ("k", {"a": 1}, {"h": "x"}, time)
    assert (one.topic, one.partition, one.offset, one.source) == ("orders", 3, 17, None)
    assert one == ReceivedMessage("k", {"a": 1}, {"h": "x"}, time, "orders", 3, 17)
    assert one != ReceivedMessage("k", {"a": 1}, {"h": "x"}, time, "orders", 3, 18)
    assert copy.copy(one) == pickle.loads(pickle.dumps(one)) == one
    assert "offset=17" in repr(one)
    again = replace(one, key="other")
    assert isinstance(again, Message)
    assert (again.key, again.payload) == ("other", {"a": 1})
    for name in ("key", "payload", "headers", "timestamp", "topic", "partition", "offset"):
        with pytest.raises(AttributeError):
            setattr(one, name, None)


@pytest.mark.parametrize("values", [[b"1", b"2", b"3"] * 50, ["a", b"b", None, {"c": 1}] * 40])
def test_messages_and_batches_can_be_taken_in_turn(
    engine_run: Run, topic: str, values: list[Any]
) -> None:
    """Single steps in the middle of a batch; what is left of it comes as columns."""

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(topic, values)
        found: list[Any] = []
        offsets: list[int] = []
        async with engine.subscribe(topic, EARLIEST) as subscriber:
            for _ in range(3):
                message = await anext(subscriber)
                found.append(message.payload)
                offsets.append(message.offset)
            assert subscriber.positions == {0: 3}
            async for batch in subscriber.batches():
                assert len(batch.offsets) == len(batch.timestamps) == len(batch.keys) == len(batch)
                found += batch.values
                offsets += batch.offsets
                if len(found) >= len(values):
                    break
        assert found == values
        assert offsets == list(range(len(values)))

    engine_run(work)
