"""Scenarios of the data path: writing in bulk and one by one, latency, reading, many partitions.

Every write run ends with reading back all that it wrote: a run whose count differs fails.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.bench import machine
from aegis_cluster.bench.figures import (
    FSYNC,
    MB_S,
    MEMORY,
    P50_MS,
    P99_MS,
    RECORDS_S,
    Goal,
    Sample,
    Scenario,
    WrongCount,
)
from aegis_cluster.bench.stage import NODES, Clock, Stage
from aegis_cluster.limits import KIB
from aegis_cluster.message import Message, Offset
from aegis_cluster.subscribe_config import SubscribeConfig
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

SMALL: Final = 100
LARGE: Final = KIB
POOL: Final = 20_000
"""Different values; each call of `publish_many` sends all of them (or as many KB-sized ones)."""
CALLS: Final = 2
"""`publish_many` calls under way: the next one is packed while the last one is on its way."""
READ_RECORDS: Final = 4_000_000
"""Of the topic that the read scenarios read again and again: more than a shard keeps in memory."""
MANY_PARTITIONS: Final = 300
WINDOW: Final = 16
"""Batches under way when they go round-robin over partitions."""
CHECK_SECONDS: Final = 120.0

EARLIEST: Final = SubscribeConfig(start=Offset.EARLIEST)


def values_of(size: int, count: int = POOL) -> list[bytes]:
    """Random bytes, the same in every run."""
    rng = random.Random(7)
    return [rng.randbytes(size) for _ in range(count)]


def sample_of(clock: Clock, records: int, figures: dict[str, float], **extra: float) -> Sample:
    return Sample(
        records, clock.seconds, figures, clock.client_cpu_s, clock.nodes_cpu_s, dict(extra)
    )


async def check_count(stage: Stage, topic: str, acknowledged: int) -> None:
    """Read the topic back. Raises `WrongCount` unless it holds what was acknowledged."""
    offsets = await stage.engine.offsets(topic)
    ends = {partition: one.high_watermark for partition, one in offsets.items()}
    if sum(ends.values()) != acknowledged:
        raise WrongCount(f"{acknowledged} records acknowledged, {sum(ends.values())} stored.")
    read = 0
    async with asyncio.timeout(CHECK_SECONDS):
        async with stage.engine.subscribe(topic, EARLIEST) as subscriber:
            async for batch in subscriber.batches():
                read += len(batch)
                if read >= acknowledged:
                    break
    if read != acknowledged:
        raise WrongCount(f"{acknowledged} records acknowledged, {read} read back.")


# Writing


async def _publish_for(stage: Stage, topic: str, values: Sequence[Any], seconds: float) -> int:
    """Call `publish_many` again and again; return how many records were acknowledged."""
    end = time.perf_counter() + seconds
    acknowledged = 0

    async def publish() -> None:
        nonlocal acknowledged
        while time.perf_counter() < end:
            receipts = await stage.engine.publish_many(topic, values)
            acknowledged += sum(receipt.count for receipt in receipts)

    await asyncio.gather(*(publish() for _ in range(CALLS)))
    return acknowledged


async def publish_many(stage: Stage, seconds: float) -> Sample:
    return await _publish_many(stage, seconds, values_of(SMALL))


async def publish_large(stage: Stage, seconds: float) -> Sample:
    return await _publish_many(stage, seconds, values_of(LARGE, 4_000))


async def _publish_many(stage: Stage, seconds: float, values: list[bytes]) -> Sample:
    async with stage.topic() as topic:
        await stage.engine.publish_many(topic, values)
        with Clock(stage) as clock:
            count = await _publish_for(stage, topic, values, seconds)
        await check_count(stage, topic, count + len(values))
    rate = count / clock.seconds
    return sample_of(clock, count, {RECORDS_S: rate, MB_S: rate * len(values[0]) / 1e6})


async def send_one_by_one(stage: Stage, seconds: float) -> Sample:
    """`await producer.send(…)` for every record, then one flush, which counts too."""
    messages = [Message(payload=value) for value in values_of(SMALL)]
    async with stage.topic() as topic, stage.engine.producer() as producer:
        await producer.send(topic, messages[0])
        await producer.flush()
        count = 0
        with Clock(stage) as clock:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                for message in messages[:1_000]:
                    await producer.send(topic, message)
                count += 1_000
            await producer.flush()
        await check_count(stage, topic, count + 1)
    return sample_of(clock, count, {RECORDS_S: count / clock.seconds})


async def one_at_a_time(stage: Stage, seconds: float) -> Sample:
    """The next record leaves when the last one is acknowledged."""
    took: list[float] = []
    messages = [Message(payload=value) for value in values_of(SMALL, 1_000)]
    async with stage.topic(1) as topic:
        for message in messages[:100]:
            await stage.engine.publish(topic, message)
        with Clock(stage) as clock:
            end = time.perf_counter() + seconds
            while (before := time.perf_counter()) < end:
                await stage.engine.publish(topic, messages[len(took) % len(messages)])
                took.append(time.perf_counter() - before)
        await check_count(stage, topic, len(took) + 100)
    return sample_of(clock, len(took), latencies(took))


async def many_partitions(stage: Stage, seconds: float) -> Sample:
    """Single batches of 1 KB, round-robin over 300 partitions, and the same over three.

    Syncs a second of all nodes are told for both: they must not follow the partitions.
    """
    few = await _round_robin(stage, NODES, seconds / 2)
    many = await _round_robin(stage, MANY_PARTITIONS, seconds)
    many.extra["syncs/s"] = many.extra.pop("syncs_s")
    many.extra["syncs/s, 3 partitions"] = few.extra["syncs_s"]
    many.extra["p50 ms, 3 partitions"] = few.figures[P50_MS]
    return many


async def _round_robin(stage: Stage, partitions: int, seconds: float) -> Sample:
    keys = keys_of(partitions)
    value = values_of(LARGE - 100, 1)[0]
    took: list[float] = []
    async with stage.topic(partitions) as topic:
        messages = [Message(key=key, payload=value) for key in keys]
        for start in range(0, partitions, WINDOW):
            first = messages[start : start + WINDOW]
            await asyncio.gather(*(stage.engine.publish(topic, one) for one in first))
        syncs = -await stage.syncs()
        with Clock(stage) as clock:
            end = time.perf_counter() + seconds

            async def publish(place: int) -> None:
                while (before := time.perf_counter()) < end:
                    await stage.engine.publish(topic, messages[place % partitions])
                    took.append(time.perf_counter() - before)
                    place += WINDOW

            await asyncio.gather(*(publish(place) for place in range(WINDOW)))
        syncs += await stage.syncs()
        await check_count(stage, topic, len(took) + partitions)
    rate = len(took) / clock.seconds
    figures = {**latencies(took), RECORDS_S: rate}
    return sample_of(clock, len(took), figures, syncs_s=syncs / clock.seconds, batches_s=rate)


def keys_of(partitions: int) -> list[str]:
    """One key for each partition, in their order."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < partitions:
        key = f"key-{number}"
        found.setdefault(partition_for(key.encode(), partitions), key)
        number += 1
    return [found[partition] for partition in range(partitions)]


def latencies(took: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds, of seconds."""
    if not took:
        raise WrongCount("Nothing was acknowledged in the whole run.")
    ordered = sorted(took)
    at = {P50_MS: 0.50, P99_MS: 0.99}
    return {unit: ordered[int(len(ordered) * share)] * 1000 for unit, share in at.items()}


# Reading


async def fill(stage: Stage) -> None:
    """A topic for the read scenarios, once."""
    if "read" in stage.kept:
        return
    await stage.make_topic("bench-read")
    values = values_of(SMALL)
    for _ in range(READ_RECORDS // POOL // 10):
        await stage.engine.publish_many("bench-read", values * 10)
    stage.kept["read"] = READ_RECORDS


async def read_batches(stage: Stage, seconds: float) -> Sample:
    """`subscriber.batches()`, from the beginning again and again."""
    total = 0
    with Clock(stage) as clock:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            read = 0
            async with stage.engine.subscribe("bench-read", EARLIEST) as subscriber:
                async for batch in subscriber.batches():
                    read += len(batch.values)
                    if read >= stage.kept["read"] or time.perf_counter() > end:
                        break
            total += read
    return sample_of(clock, total, {RECORDS_S: total / clock.seconds})


async def read_messages(stage: Stage, seconds: float) -> Sample:
    """`async for message in subscriber`, each message's payload looked at."""
    total = 0
    with Clock(stage) as clock:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            async with stage.engine.subscribe("bench-read", EARLIEST) as subscriber:
                total += await _step_through(subscriber, stage.kept["read"], end)
    return sample_of(clock, total, {RECORDS_S: total / clock.seconds})


async def _step_through(messages: AsyncIterator[Any], count: int, end: float) -> int:
    read = size = 0
    async for message in messages:
        size += len(message.payload)
        read += 1
        if read == count or (read % 10_000 == 0 and time.perf_counter() > end):
            break
    if size != read * SMALL:
        raise WrongCount(f"{read} messages came with {size} bytes.")
    return read


def _rate(must: float, aim: float, memory_must: float, memory_aim: float) -> dict[str, Any]:
    return {
        FSYNC: (Goal(RECORDS_S, machine.RECORDS_TO_DISK, must, aim),),
        MEMORY: (Goal(RECORDS_S, machine.ENCODE, memory_must, memory_aim),),
    }


SCENARIOS: Final = (
    Scenario(
        "publish_many",
        "publish_many, 100 B",
        publish_many,
        _rate(600_000, 1_000_000, 1_050_000, 1_500_000),
    ),
    Scenario(
        "send",
        "producer.send one by one, 100 B",
        send_one_by_one,
        {
            FSYNC: (Goal(RECORDS_S, machine.ENCODE, 200_000, 350_000),),
            MEMORY: (Goal(RECORDS_S, machine.ENCODE),),
        },
    ),
    Scenario(
        "large",
        "publish_many, 1 KB",
        publish_large,
        {
            FSYNC: (Goal(MB_S, "disk/3", 0.6, 0.8, of_limit=True),),
            MEMORY: (Goal(MB_S, "disk/3"),),
        },
    ),
    Scenario(
        "read_batches",
        "read, batches(), 100 B",
        read_batches,
        {FSYNC: (Goal(RECORDS_S, machine.DECODE, 1_500_000, 3_000_000),)},
        fill,
    ),
    Scenario(
        "read_messages",
        "read, message by message, 100 B",
        read_messages,
        {FSYNC: (Goal(RECORDS_S, machine.DECODE, 450_000, 800_000),)},
        fill,
    ),
    Scenario(
        "latency",
        "one at a time, 100 B",
        one_at_a_time,
        {
            FSYNC: (
                Goal(P50_MS, machine.ONE_WRITE, 1.2, 0.85),
                Goal(P99_MS, machine.ONE_WRITE, 5.0),
            ),
            MEMORY: (Goal(P50_MS, machine.ROUND_TRIP), Goal(P99_MS, machine.ROUND_TRIP)),
        },
    ),
    Scenario(
        "partitions",
        "300 partitions, 1 KB batches round-robin",
        many_partitions,
        {FSYNC: (Goal(P50_MS, machine.ONE_WRITE, 10.0, 5.0), Goal(P99_MS, machine.ONE_WRITE))},
    ),
)
