"""A process with a worker and its node is killed again and again: every record counts once."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.message import from_ms
from tests.integration.test_readme import ROOT
from tests.stream.counting import counting

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(170)]
PART = 5_000
"""So many records are there anew for each worker that is killed, so that it has work."""
KILLS = 2
COUNT = PART * KILLS
SEED = random.Random().randrange(2**32)


def _work_and_die(directory: Path, rest_s: float) -> None:
    arguments = [sys.executable, "-m", "tests.stream.counting", str(directory)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"works\n"
            time.sleep(rest_s)
        finally:
            process.kill()


async def _create_topics(directory: Path) -> None:
    async with StreamingEngine.open(directory / "data") as engine:
        for topic in ("in", "out", "copies"):
            await engine.create_topic(topic, TopicConfig(partitions=2))


async def _fill(directory: Path, numbers: list[int], rng: random.Random) -> None:
    for at in range(0, len(numbers), 500):  # out of order, within 500 seconds
        part = numbers[at : at + 500]
        rng.shuffle(part)
        numbers[at : at + 500] = part
    async with StreamingEngine.open(directory / "data") as engine:
        await engine.publish_many("in", [Message(f"k{n % 7}", {"n": n, "t": n}) for n in numbers])


async def _all(engine: StreamingEngine, topic: str, count: int) -> list[Any]:
    found: list[Any] = []
    config = SubscribeConfig(start=Offset.EARLIEST)
    async with asyncio.timeout(60), engine.subscribe(topic, config) as subscriber:
        while len(found) < count or await _lag(subscriber):
            found += await subscriber.poll(timeout=0.5)
    return found


async def _lag(subscriber: Any) -> int:
    return sum((await subscriber.lag()).values())


def test_kill_9_of_a_worker_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"SEED {SEED}")  # noqa: T201 - it replays the test

    async def finish() -> None:
        async with StreamingEngine.open(tmp_path / "data") as engine:
            running = await counting(engine, tmp_path).start()
            await engine.publish("in", Message("k", {"n": 0, "t": 10**7}))
            copies = await _all(engine, "copies", COUNT + 1)
            assert Counter(m.payload for m in copies) == Counter([*range(COUNT), 0])
            expected = Counter((n % 5, n // 60) for n in range(COUNT))
            results = await _all(engine, "out", len(expected))
            found = {(int(str(m.key)), str(m.headers["window-start"])): m.payload for m in results}
            assert len(found) == len(results), "a window's result is sent once"
            assert found == {
                (key, from_ms(minute * 60_000).isoformat()): count
                for (key, minute), count in expected.items()
            }
            await running.stop()

    asyncio.run(_create_topics(tmp_path))
    for kill in range(KILLS):
        asyncio.run(_fill(tmp_path, list(range(kill * PART, (kill + 1) * PART)), rng))
        _work_and_die(tmp_path, rng.uniform(0.1, 0.8))
    asyncio.run(finish())
