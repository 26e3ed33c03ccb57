"""With the whole cluster dead every public call returns in time, and life goes on after it."""

from __future__ import annotations

import asyncio
import signal
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.errors import OutcomeUnknown, Refused
from aegis_cluster.node.free_ports import free_base_port
from tests.cli.test_real_cluster import Directory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from aegis_cluster import Subscriber

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)]

TIMEOUT_S = 0.5
SLACK_S = 1.0
"""Beyond the deadline, on a machine that does other things too."""

CALLS: dict[str, Callable[[StreamingEngine, Subscriber], Awaitable[Any]]] = {
    "create_topic": lambda e, _: e.create_topic("new", timeout=TIMEOUT_S),
    "delete_topic": lambda e, _: e.delete_topic("t", timeout=TIMEOUT_S),
    "list_topics": lambda e, _: e.list_topics(timeout=TIMEOUT_S),
    "describe_topic": lambda e, _: e.describe_topic("t", timeout=TIMEOUT_S),
    "offsets": lambda e, _: e.offsets("t", timeout=TIMEOUT_S),
    "stats": lambda e, _: e.stats(timeout=TIMEOUT_S),
    "publish": lambda e, _: e.publish("t", Message(payload=1), timeout=TIMEOUT_S),
    "publish_many": lambda e, _: e.publish_many("t", [1, 2], timeout=TIMEOUT_S),
    "publish_to_many": lambda e, _: e.publish_to_many(
        ["t", "u"], Message(payload=1), timeout=TIMEOUT_S
    ),
    "history": lambda e, _: e.history("t", 1, timeout=TIMEOUT_S),
    "history_after": lambda e, _: e.history_after("t", datetime.now(UTC), timeout=TIMEOUT_S),
    "subscribe": lambda e, _: e.subscribe("t", timeout=TIMEOUT_S).__aenter__(),
    "lag": lambda _, s: s.lag(timeout=TIMEOUT_S),
    "seek": lambda _, s: s.seek(0, Offset.LATEST, timeout=TIMEOUT_S),
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Directory]:
    directory = Directory(tmp_path, free_base_port())
    directory.up()
    yield directory
    directory.run("cluster", "down")


async def stopped_for_a_while(
    cluster: Directory, engine: StreamingEngine, subscriber: Subscriber
) -> None:
    """Every process stands still: connections stay, and what is sent may be done much later."""
    processes = [p for number in (1, 2, 3) for p in cluster.processes(f"node-{number}")]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        for name, call in CALLS.items():
            if name == "delete_topic":
                continue  # it would be done once they go on
            start = time.monotonic()
            with pytest.raises((Refused, OutcomeUnknown)):
                await call(engine, subscriber)
            assert time.monotonic() - start < TIMEOUT_S + SLACK_S, name
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
    await engine.publish("t", Message(payload="between"), timeout=30)


def test_every_call_ends_in_time_and_goes_on_when_the_cluster_is_back(cluster: Directory) -> None:
    address = f"tcp://127.0.0.1:{cluster.base_port + 101}"

    async def work() -> None:
        async with StreamingEngine.connect(address, request_timeout=30) as engine:
            for name in ("t", "u"):
                await engine.create_topic(name, TopicConfig(partitions=2))
            await engine.publish("t", Message(payload="before"))
            config = SubscribeConfig(start=Offset.EARLIEST)
            async with engine.subscribe("t", config) as subscriber:
                assert (await anext(subscriber)).payload == "before"
                await stopped_for_a_while(cluster, engine, subscriber)
                for number in (1, 2, 3):
                    await asyncio.to_thread(cluster.run, "cluster", "kill", f"node-{number}")
                for name, call in CALLS.items():
                    start = time.monotonic()
                    with pytest.raises((Refused, OutcomeUnknown)):
                        await call(engine, subscriber)
                    assert time.monotonic() - start < TIMEOUT_S + SLACK_S, name
                await asyncio.wait_for(subscriber.poll(timeout=0.2), SLACK_S)
                await asyncio.to_thread(cluster.up)
                await engine.publish("t", Message(payload="after"))
                last = None
                while last != "after":  # unknown outcomes may have happened: their messages too
                    last = (await anext(subscriber)).payload

    asyncio.run(work())
