"""The event store with a million events in a hundred thousand streams.

One run of it all, in this order: the streams are filled by appends of 5 events, 64 in flight;
streams of 10 events are loaded, one after the other; everything is read by a subscription; a node
is killed, and started again with all these streams. It runs once, on nodes of its own, and only
when named.

The rule it protects: what is loaded and caught up with is counted and compared with what was
acknowledged, and a node counts as ready when leaders say that it holds what is committed.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import TYPE_CHECKING, Final

from aegis_cluster.bench.figures import (
    FSYNC,
    P50_MS,
    P99_MS,
    READY_S,
    Goal,
    Sample,
    Scenario,
    WrongCount,
)
from aegis_cluster.bench.scale import until_ready
from aegis_cluster.bench.stage import Clock, node_cpu_s
from aegis_cluster.event import Event, EventStore
from aegis_cluster.node.node_files import Wanted

if TYPE_CHECKING:
    from aegis_cluster.bench.stage import Stage

APPENDS_S: Final = "appends/s"
EVENTS_S: Final = "events/s caught up"
STREAMS: Final = 100_000
STREAMS_PER_S: Final = 10_000
"""In runs of less than ten seconds, which are a look and no figure, there are fewer."""
PER_APPEND: Final = 5
APPENDS_PER_STREAM: Final = 2
IN_FLIGHT: Final = 64
TIMEOUT_S: Final = 60.0
SEED: Final = 20_130_101


async def events(stage: Stage, seconds: float) -> Sample:
    """All of it; loads go on for so long."""
    store, streams = EventStore(stage.engine), min(STREAMS, int(seconds * STREAMS_PER_S))
    await store.info()
    figures: dict[str, float] = {}
    with Clock(stage) as clock:
        await _fill(store, streams)
    appends = streams * APPENDS_PER_STREAM
    figures[APPENDS_S] = appends / clock.seconds
    took = await _load(store, streams, seconds)
    figures[P50_MS] = statistics.median(took) * 1000
    figures[P99_MS] = sorted(took)[len(took) * 99 // 100] * 1000
    with Clock(stage) as reading:
        count = await _catch_up(store, streams)
    figures[EVENTS_S] = count / reading.seconds
    figures[READY_S] = await _restart(stage)
    extra = {
        "streams": float(streams),
        "client µs an event caught up": reading.client_cpu_s / count * 1e6,
        "processor s of the node, to ready": node_cpu_s(stage.nodes[-1]),
    }
    cpu = (clock.client_cpu_s, clock.nodes_cpu_s)
    return Sample(appends, clock.seconds, figures, *cpu, extra=extra)


def _name(number: int) -> str:
    return f"account-{number}"


async def _fill(store: EventStore, streams: int) -> None:
    """Every stream's first append comes before any second one; the order is a random one."""
    rng = random.Random(SEED)
    for first in range(APPENDS_PER_STREAM):
        numbers = list(range(streams))
        rng.shuffle(numbers)
        await _append_to(store, numbers, first * PER_APPEND - 1)


async def _append_to(store: EventStore, numbers: list[int], expected: int) -> None:
    left = iter(numbers)

    async def work() -> None:
        for number in left:
            made = [
                Event("MoneyDeposited", {"account": number, "amount": amount, "currency": "EUR"})
                for amount in range(PER_APPEND)
            ]
            await store.append(_name(number), made, expected_version=expected, timeout=TIMEOUT_S)

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


async def _load(store: EventStore, streams: int, seconds: float) -> list[float]:
    rng, took = random.Random(SEED), []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        found = await store.load(_name(rng.randrange(streams)))
        took.append(time.perf_counter() - begin)
        if len(found) != PER_APPEND * APPENDS_PER_STREAM:
            raise WrongCount(f"A stream of 10 events was loaded with {len(found)}.")
    return took


async def _catch_up(store: EventStore, streams: int) -> int:
    """How many events were read and decoded."""
    count = 0
    async for _ in store.subscribe("*", live=False):
        count += 1
    if count != streams * PER_APPEND * APPENDS_PER_STREAM:
        raise WrongCount(f"{count} events were read, and others appended.")
    return count


async def _restart(stage: Stage) -> float:
    """Seconds from the start of a node that was killed until it holds what is committed."""
    await asyncio.to_thread(stage.cluster.kill, stage.nodes[-1].name)
    begin = time.perf_counter()
    await asyncio.to_thread(stage.cluster.up, Wanted())
    await until_ready(stage.nodes)
    return time.perf_counter() - begin


SCENARIOS: Final = (
    Scenario(
        "events",
        f"event store, {STREAMS * PER_APPEND * APPENDS_PER_STREAM:,} events in {STREAMS:,} streams",
        events,
        {
            FSYNC: (
                Goal(APPENDS_S, None, 3_000.0, 6_000.0),
                Goal(P50_MS, None, 2.0),
                Goal(P99_MS, None),
                Goal(EVENTS_S, None, 120_000.0),
                Goal(READY_S, None, 5.0),
            ),
        },
        apart=True,
    ),
)
