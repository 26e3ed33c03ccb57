"""A compacted topic as a program sees it, compacted by a process of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.errors import ConfigError, InvalidTopic, KeyRequired

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

KEYS, ROUNDS = 200, 30
COUNT = KEYS * ROUNDS


def test_the_latest_of_each_key_stays_and_readers_go_over_gaps(tmp_path: Path) -> None:
    async def test() -> None:
        async with StreamingEngine.open(tmp_path / "data") as engine:
            await engine.create_topic("state", TopicConfig(cleanup="compact"))
            with pytest.raises(KeyRequired, match="state is compacted"):
                await engine.publish("state", Message(payload=1))
            with pytest.raises(KeyRequired):
                await engine.publish_many("state", [1, 2])
            for number in range(ROUNDS):
                values = [f"{number}-{key}-" + "x" * 2_000 for key in range(KEYS)]
                await engine.publish_many("state", values, keys=map(str, range(KEYS)))
            before = await engine.history("state", COUNT)
            assert len(before) == COUNT
            found = before
            async with asyncio.timeout(60):
                while len(found) >= COUNT // 2:
                    await asyncio.sleep(0.1)
                    found = await engine.history("state", COUNT)
            kept = {message.offset: message.payload for message in found}
            assert kept.items() <= {m.offset: m.payload for m in before}.items()
            assert {m.key: m.offset for m in found} == {m.key: m.offset for m in before}
            assert [m.offset for m in await engine.history("state", len(found))] == sorted(kept)
            offsets = await engine.offsets("state")
            assert (offsets[0].log_start, offsets[0].high_watermark) == (0, COUNT)

            start = SubscribeConfig(start=Offset.at(1))
            async with engine.subscribe("state", start) as subscriber:
                (first,) = await subscriber.poll(1, timeout=10)
                assert first.offset == min(kept), "offset 1 is gone: the next one there is"
            group = SubscribeConfig(group_id="g", start=Offset.EARLIEST)
            async with engine.subscribe("state", group) as subscriber:
                seen: list[int] = []
                while len(seen) < len(found):
                    for message in await subscriber.poll(1_000, timeout=10):
                        seen.append(message.offset)
                        await message.ack()
                assert seen == sorted(kept)
            assert set((await engine.group("g").lag()).values()) == {0}
            times = [one.timestamp for one in found if one.timestamp is not None]
            middle = times[len(times) // 2]
            after = await engine.history_after("state", middle)
            wanted = [one.offset for one, time in zip(found, times, strict=True) if time >= middle]
            assert [one.offset for one in after] == wanted

    asyncio.run(test())


def test_what_cannot_be_compacted_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with StreamingEngine.open(tmp_path / "data") as engine:
            with pytest.raises(InvalidTopic, match="cleanup"):
                await engine.create_topic("a", TopicConfig(cleanup="shrink"))
            with pytest.raises(InvalidTopic, match="holds events"):
                await engine.create_topic("b", TopicConfig(cleanup="compact", kind="eventstore"))
            with pytest.raises(ConfigError, match="tombstone_retention"):
                await engine.create_topic("c", TopicConfig(tombstone_retention="soon"))
            config = TopicConfig(cleanup="delete, compact", tombstone_retention="1h")
            await engine.create_topic("d", config)
            settings = (await engine.describe_topic("d")).settings
            assert (settings.cleanup, settings.tombstone_retention_ms) == (
                "compact,delete",
                3_600_000,
            )
            await engine.alter_topic("d", cleanup="delete", tombstone_retention="2h")
            settings = (await engine.describe_topic("d")).settings
            assert (settings.cleanup, settings.tombstone_retention_ms) == ("delete", 7_200_000)
            await engine.publish("d", Message(payload="needs no key any more"))

    asyncio.run(test())
