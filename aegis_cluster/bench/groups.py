"""What consumer groups and persistent subscriptions cost.

- `groups`: ten thousand groups with a million positions, each committed by a request of its own;
  then all nodes stop and start. Minutes long, so only when named.
- `rebalance`: a second member comes to a group of a hundred partitions, which are written to.
- `subscription`: one client process takes messages of a persistent subscription and acknowledges
  them, many at a time; plain, in order by key, and pinned by key.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Final

from aegis_cluster.bench.data_path import SMALL, sample_of, values_of
from aegis_cluster.bench.figures import (
    FSYNC,
    PAUSE_S,
    READY_S,
    RECORDS_S,
    RSS_MB,
    SETTLED_S,
    Goal,
    Sample,
    Scenario,
    WrongCount,
)
from aegis_cluster.bench.stage import Clock, largest_shard_mb
from aegis_cluster.client import coordinator
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.ids import TopicPartition
from aegis_cluster.node.node_files import Wanted, bootstrap_of
from aegis_cluster.persistent import PersistentConfig, Strategy
from aegis_cluster.subscribe_config import SubscribeConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aegis_cluster.bench.stage import Stage
    from aegis_cluster.message import ReceivedMessage
    from aegis_cluster.persistent import PersistentSubscription
    from aegis_cluster.subscriber import Subscriber

    Run = Callable[[Stage, float], Awaitable[Sample]]

GROUPS: Final = 10_000
PARTITIONS: Final = 100
AT_ONCE: Final = 256
WAIT_S: Final = 120.0
TICK_S: Final = 0.1
"""Between two records of one partition, while a member comes."""
MESSAGES: Final = 200_000
POLL: Final = 2_000
KEYS: Final = 1_000
ACKS_AT_ONCE: Final = 3

_NUMBERS = itertools.count()


# ---- many groups


async def groups(stage: Stage, seconds: float) -> Sample:
    """Commit, stop and start; ready is when every partition of `__groups` tells of its groups."""
    topic = f"bench-groups-{next(_NUMBERS)}"
    await stage.make_topic(topic, PARTITIONS)
    with Clock(stage) as clock:
        await _commit_all(stage.engine, topic)
    figures = {RECORDS_S: GROUPS * PARTITIONS / clock.seconds, RSS_MB: largest_shard_mb(stage)}
    await asyncio.to_thread(stage.cluster.down)
    start = time.perf_counter()
    await asyncio.to_thread(stage.cluster.up, Wanted())
    found = await coordinator.list_groups(stage.engine.cluster, stage.engine.deadline(WAIT_S))
    figures[READY_S] = time.perf_counter() - start
    if len(found) < GROUPS:
        raise WrongCount(f"{GROUPS} groups were committed to, {len(found)} are there.")
    last = await stage.engine.group(_name(GROUPS - 1)).positions(timeout=WAIT_S)
    if len(last) != PARTITIONS:
        raise WrongCount(f"{PARTITIONS} positions were committed, {len(last)} are there.")
    return sample_of(clock, GROUPS * PARTITIONS, figures)


async def _commit_all(engine: StreamingEngine, topic: str) -> None:
    left = iter(itertools.product(range(PARTITIONS), range(GROUPS)))
    deadline = engine.deadline(3_600.0)
    await coordinator.internal_topic(engine.cluster, deadline)

    async def commit_some() -> None:
        for partition, number in left:
            positions = {TopicPartition(topic, partition): 0}
            name = _name(number)
            await coordinator.commit_positions(engine.cluster, name, positions, deadline)

    await asyncio.gather(*(commit_some() for _ in range(AT_ONCE)))


def _name(number: int) -> str:
    return f"bench-group-{number}"


# ---- a second member


async def rebalance(stage: Stage, seconds: float) -> Sample:
    """From the second member's start until both hold a half; and for how long, at most, the first
    one got nothing of what it keeps."""
    got: list[tuple[float, int]] = []
    config = SubscribeConfig(group_id=f"bench-rebalance-{next(_NUMBERS)}")
    async with (
        stage.topic(PARTITIONS) as topic,
        _ticking(stage, topic),
        _member(stage.engine, topic, config, lambda m: got.append(_seen(m))) as first,
    ):
        await _until(lambda: len(first.assignment) == PARTITIONS)
        await _until(lambda: len({partition for _, partition in got}) == PARTITIONS)
        with Clock(stage) as clock:
            async with StreamingEngine.connect(bootstrap_of(stage.nodes)) as engine:
                begin = time.perf_counter()
                async with _member(engine, topic, config, lambda _: None) as second:
                    half = PARTITIONS // 2
                    await _until(lambda: len(first.assignment) == len(second.assignment) == half)
                    settled_s = time.perf_counter() - begin
                    await asyncio.sleep(2 * TICK_S)
                    kept = {place.partition for place in first.assignment}
    times = [begin, *(at for at, partition in got if partition in kept and at >= begin)]
    pause_s = max(b - a for a, b in itertools.pairwise(times))
    return sample_of(clock, PARTITIONS, {SETTLED_S: settled_s, PAUSE_S: pause_s})


def _seen(message: ReceivedMessage) -> tuple[float, int]:
    return time.perf_counter(), message.partition


@contextlib.asynccontextmanager
async def _member(
    engine: StreamingEngine,
    topic: str,
    config: SubscribeConfig,
    note: Callable[[ReceivedMessage], None],
) -> AsyncIterator[Subscriber]:
    async with engine.subscribe(topic, config) as subscriber:

        async def read() -> None:
            async for message in subscriber:
                await message.ack()
                note(message)

        reading = asyncio.create_task(read())
        try:
            yield subscriber
        finally:
            reading.cancel()


@contextlib.asynccontextmanager
async def _ticking(stage: Stage, topic: str) -> AsyncIterator[None]:
    """A record to every partition, again and again."""
    payloads = [b"tick"] * PARTITIONS

    async def write() -> None:
        for number in itertools.count():
            keys = [f"{number}-{place}" for place in range(4 * PARTITIONS)]
            await stage.engine.publish_many(topic, payloads * 4, keys=keys)
            await asyncio.sleep(TICK_S)

    writing = asyncio.create_task(write())
    try:
        yield
    finally:
        writing.cancel()


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


# ---- persistent subscriptions


PLAIN: Final = PersistentConfig(max_in_flight=5 * POLL)
ORDERED: Final = PersistentConfig(max_in_flight=5 * POLL, ordered=True)
PINNED: Final = PersistentConfig(max_in_flight=5 * POLL, strategy=Strategy.PINNED)


async def _acknowledged(stage: Stage, config: PersistentConfig) -> Sample:
    values, keys = values_of(SMALL), [str(number % KEYS) for number in range(MESSAGES)]
    async with stage.topic() as topic:
        for start in range(0, MESSAGES, len(values)):
            part = keys[start : start + len(values)]
            await stage.engine.publish_many(topic, values, keys=part)
        name = f"bench-{next(_NUMBERS)}"
        async with stage.engine.persistent_subscription(topic, name, config) as one:
            with Clock(stage) as clock:
                await _take_all(one)
            if any((await one.lag()).values()):
                raise WrongCount("What was acknowledged is not settled.")
            await one.delete()
    return sample_of(clock, MESSAGES, {RECORDS_S: MESSAGES / clock.seconds})


async def _take_all(subscription: PersistentSubscription) -> None:
    left = MESSAGES
    acks: set[asyncio.Task[None]] = set()
    while left:
        messages = await subscription.poll(POLL, WAIT_S)
        left -= len(messages)
        acks.add(asyncio.create_task(subscription.ack(messages)))
        if len(acks) >= ACKS_AT_ONCE or not left:
            when = asyncio.FIRST_COMPLETED if left else asyncio.ALL_COMPLETED
            done, acks = await asyncio.wait(acks, return_when=when)
            for one in done:
                one.result()


def acknowledging(config: PersistentConfig) -> Run:
    """A run of a subscription with these rules."""

    async def run(stage: Stage, seconds: float) -> Sample:
        return await _acknowledged(stage, config)

    return run


ENOUGH: Final[dict[str, tuple[Goal, ...]]] = {FSYNC: (Goal(RECORDS_S, None, 20_000.0, 40_000.0),)}
SCENARIOS: Final = (
    Scenario(
        "groups",
        f"{GROUPS:,} groups, {GROUPS * PARTITIONS:,} commits",
        groups,
        {
            FSYNC: (
                Goal(RECORDS_S, None),
                Goal(RSS_MB, None, 400.0, 200.0),
                Goal(READY_S, None, 3.0),
            )
        },
        apart=True,
    ),
    Scenario(
        "rebalance",
        f"1 to 2 members, {PARTITIONS} partitions",
        rebalance,
        {FSYNC: (Goal(SETTLED_S, None, 1.0, 0.3), Goal(PAUSE_S, None, 0.5))},
    ),
    Scenario("subscription", "persistent subscription, acknowledged", acknowledging(PLAIN), ENOUGH),
    Scenario("subscription_ordered", "the same, in order by key", acknowledging(ORDERED), ENOUGH),
    Scenario(
        "subscription_pinned", "the same, keys pinned to consumers", acknowledging(PINNED), ENOUGH
    ),
)
