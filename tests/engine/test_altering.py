"""Altering a topic: what changes at once, who takes it up, and what is refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.errors import (
    ConfigError,
    InvalidTopic,
    MessageTooLarge,
    Misuse,
    NotEnoughReplicas,
    TopicNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import Run

EARLIEST = SubscribeConfig(start=Offset.EARLIEST)


def test_settings_change_and_the_others_stay(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(retention="1h", retention_bytes="1GB"))
        await engine.alter_topic(topic, TopicConfig(retention="2h", compression="lz4"))
        found = (await engine.describe_topic(topic)).settings
        assert (found.retention_ms, found.retention_bytes) == (7_200_000, 2**30)
        assert found.compression == "lz4"
        await engine.alter_topic(topic, retention="unlimited", retention_bytes="unlimited")
        found = (await engine.channel(topic).describe()).settings
        assert (found.retention_ms, found.retention_bytes) == (None, None)
        assert found.compression == "lz4"

    engine_run(work)


def test_a_larger_limit_holds_for_the_next_message_of_everybody(
    engine_run: Run, new_engine: Callable[[], StreamingEngine], topic: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(max_message_size="10KB"))
        large = Message(payload=bytes(100_000))
        with pytest.raises(MessageTooLarge):
            await engine.publish(topic, large)
        async with engine.producer() as producer:
            await producer.send(topic, Message(payload="small"))
            await engine.alter_topic(topic, max_message_size="200KB")
            await engine.publish(topic, large)
            await (await producer.send(topic, large))
        await engine.alter_topic(topic, max_message_size="10KB")
        with pytest.raises(MessageTooLarge):
            await engine.publish(topic, large)

    engine_run(work)


def test_more_partitions_are_written_and_read_by_those_who_are_there(
    engine_run: Run, topic: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=1))
        await engine.publish_many(topic, range(10), [str(n) for n in range(10)])
        async with engine.subscribe(topic, EARLIEST) as named, engine.subscribe(topic) as tail:
            assert len(await take(named, 10)) == 10
            await engine.alter_topic(topic, partitions=4)
            await engine.publish_many(topic, range(40), [str(n) for n in range(40)])
            assert sorted(await take(named, 40)) == list(range(40))
            assert sorted(await take(tail, 40)) == list(range(40))
            assert len(named.assignment) == 4
        offsets = await engine.offsets(topic)
        assert all(found.high_watermark > 0 for found in offsets.values())
        assert len(offsets) == 4

    engine_run(work)


async def take(subscriber: Any, count: int) -> list[Any]:
    found: list[Any] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            found += [message.payload for message in await subscriber.poll(timeout=1)]
    return found


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"partitions": 1}, InvalidTopic, "cannot have fewer"),
        ({"retention": "soon"}, ConfigError, "retention"),
        ({"cleanup": "burn"}, InvalidTopic, "cleanup"),
        ({"compression": "rar"}, InvalidTopic, "compression"),
        ({"max_message_size": "1TB"}, InvalidTopic, "max_message_size"),
        ({"replication_factor": 7}, NotEnoughReplicas, "7 replicas need 7 nodes"),
        ({"replication_factor": 8}, InvalidTopic, "8 replicas"),
        ({"config": TopicConfig(kind="cdc")}, ConfigError, "kind"),
        ({"config": TopicConfig(retention="1d"), "retention": "2d"}, Misuse, "not by both"),
        ({}, Misuse, "Nothing to alter"),
    ],
    ids=str,
)
def test_what_cannot_be_altered(
    engine_run: Run, topic: str, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=2))
        before = await engine.describe_topic(topic)
        with pytest.raises(error, match=says):
            await engine.alter_topic(topic, **changes)
        assert await engine.describe_topic(topic) == before

    engine_run(work)


def test_a_topic_that_is_not_there(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        with pytest.raises(TopicNotFound, match=topic):
            await engine.alter_topic(topic, retention="1d")

    engine_run(work)
