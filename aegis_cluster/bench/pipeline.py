"""The price of exactly once: one pipeline with transactions, and the same one without.

Both read a topic in a group and send every message on, keyed, a thousand at a time. With
transactions a thousand are sent and committed together with the positions; without, they are
flushed, acknowledged, and the positions committed. They take turns in one run, so that whatever
else the machine does meets both.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Final

from aegis_cluster.bench.data_path import SMALL, sample_of, values_of
from aegis_cluster.bench.figures import FSYNC, RECORDS_S, Goal, Sample, Scenario, WrongCount
from aegis_cluster.bench.stage import Clock, Stage
from aegis_cluster.message import Message, Offset
from aegis_cluster.producer import ProducerConfig
from aegis_cluster.subscribe_config import DeliveryMode, SubscribeConfig

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aegis_cluster.message import ReceivedMessage
    from aegis_cluster.subscriber import Subscriber

SHARE: Final = "% of at least once"
PER_COMMIT: Final = 1_000
TURNS: Final = 3
RECORDS: Final = 400_000
SOURCE: Final = "bench-pipeline"

_NUMBERS = itertools.count()


async def fill(stage: Stage) -> None:
    """What both read, once."""
    if SOURCE in stage.kept:
        return
    await stage.make_topic(SOURCE)
    values = values_of(SMALL)
    for _ in range(RECORDS // len(values)):
        await stage.engine.publish_many(SOURCE, values, keys=map(str, range(len(values))))
    stage.kept[SOURCE] = RECORDS


async def exactly_once(stage: Stage, seconds: float) -> Sample:
    rates: dict[DeliveryMode, list[float]] = {
        DeliveryMode.AT_LEAST_ONCE: [],
        DeliveryMode.EXACTLY_ONCE: [],
    }
    count = 0
    async with stage.topic() as topic:
        with Clock(stage) as clock:
            for _ in range(TURNS):
                for mode, found in rates.items():
                    handled, took = await _pipeline(stage, topic, mode, seconds / TURNS / 2)
                    found.append(handled / took)
                    count += handled
    plain, once = (max(found) for found in rates.values())
    figures = {RECORDS_S: once, SHARE: 100 * once / plain}
    return sample_of(clock, count, figures, at_least_once=plain)


async def _pipeline(
    stage: Stage, topic: str, mode: DeliveryMode, seconds: float
) -> tuple[int, float]:
    """How many were handled, and in how many seconds."""
    number = next(_NUMBERS)
    config = SubscribeConfig(
        group_id=f"bench-pipeline-{number}",
        start=Offset.EARLIEST,
        delivery_mode=mode,
        max_poll_records=PER_COMMIT,
    )
    turn = _in_transactions if mode is DeliveryMode.EXACTLY_ONCE else _plainly
    async with stage.engine.subscribe(SOURCE, config) as subscriber:
        steps = turn(stage, subscriber, topic, f"bench-pipeline-{number}")
        await anext(steps)  # whatever is asked for once
        handled, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds and handled < RECORDS // 2:
            handled += await anext(steps)
        took = time.perf_counter() - begin
        await steps.aclose()
    if handled == 0:
        raise WrongCount("Nothing was handled in a whole run.")
    return handled, took


async def _in_transactions(
    stage: Stage, subscriber: Subscriber, topic: str, name: str
) -> AsyncGenerator[int, None]:
    async with stage.engine.producer(ProducerConfig(transactional_id=name)) as producer:
        while True:
            count = 0
            async with producer.transaction(subscriber) as tx:
                while count < PER_COMMIT:
                    for message in (messages := await subscriber.poll(PER_COMMIT - count)):
                        await tx.send(topic, _next(message))
                    count += len(messages)
                await tx.send_offsets(subscriber)
            yield count


async def _plainly(
    stage: Stage, subscriber: Subscriber, topic: str, _: str
) -> AsyncGenerator[int, None]:
    async with stage.engine.producer() as producer:
        while True:
            handled: list[ReceivedMessage] = []
            while len(handled) < PER_COMMIT:
                messages = await subscriber.poll(PER_COMMIT - len(handled))
                for message in messages:
                    await producer.send(topic, _next(message))
                handled += messages
            await producer.flush()
            for message in handled:
                await message.ack()
            await subscriber.commit()
            yield len(handled)


def _next(message: ReceivedMessage) -> Message:
    return Message(key=message.key, payload=message.payload)


SCENARIOS: Final = (
    Scenario(
        "exactly_once",
        "read, send on, commit: 1,000 a transaction",
        exactly_once,
        {FSYNC: (Goal(RECORDS_S, None), Goal(SHARE, None, 50.0, 80.0))},
        fill,
    ),
)
