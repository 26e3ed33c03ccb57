"""Consumers are killed at every step of their cycle, and so are leaders and coordinators: each
delivery mode means what it says."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import StreamingEngine, TopicConfig
from aegis_cluster.errors import NoOpenTransaction
from aegis_cluster.node.free_ports import free_base_port
from tests.cli.test_real_cluster import Directory
from tests.integration.exactly_once_worker import POLL
from tests.integration.test_readme import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

PATIENCE_S = 90.0
COUNT = 150
PLAIN_STEPS = ("polled", "before handling", "handled", "acknowledged", "committed")
TRANSACTION_STEPS = ("polled", "sent", "stored", "positions sent", "committed")


class Place:
    """A cluster of three, and workers beside it."""

    def __init__(self, directory: Directory, base_port: int) -> None:
        self.directory = directory
        self.address = ",".join(
            f"tcp://127.0.0.1:{base_port + 100 * node + 1}" for node in (1, 2, 3)
        )
        self.workers: list[subprocess.Popen[str]] = []

    def start(self, mode: str, topic: str, name: str, step: str = "") -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.integration.exactly_once_worker"),
                *(self.address, mode, topic, name, step),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.workers.append(worker)
        return worker

    def fill(self, topic: str, count: int, partitions: int) -> None:
        async def work() -> None:
            async with StreamingEngine.connect(self.address) as engine:
                for name in (topic, f"{topic}-out"):
                    await engine.create_topic(name, TopicConfig(partitions=partitions))
                keys = map(str, range(count))
                await engine.publish_many(topic, range(count), keys=keys)

        asyncio.run(work())

    def out(self, topic: str) -> Counter[Any]:
        """How often each message was handed on, as readers of committed records see it."""

        async def work() -> Counter[Any]:
            async with StreamingEngine.connect(self.address) as engine:
                return Counter(m.payload for m in await engine.history(f"{topic}-out", 100_000))

        return asyncio.run(work())

    def node_of(self, *, leads: bool) -> str:
        """Name of the node that leads a partition of the output, or coordinates a worker."""
        if leads:
            topics = {one["name"]: one for one in self.directory.status()["topics"]}
            return str(topics["pipeline-out"]["partitions"][0]["leader"])

        async def work() -> int:
            async with StreamingEngine.connect(self.address) as engine:
                return (await engine.describe_transaction("one")).coordinator

        return f"node-{asyncio.run(work())}"

    def wait_until_known(self, transactional_id: str) -> None:
        """Until a worker of that id has begun, so that a coordinator can be named for it."""

        async def work() -> None:
            async with StreamingEngine.connect(self.address) as engine, asyncio.timeout(PATIENCE_S):
                while True:
                    with contextlib.suppress(NoOpenTransaction):
                        await engine.describe_transaction(transactional_id)
                        return
                    await asyncio.sleep(0.05)

        asyncio.run(work())


@pytest.fixture(scope="module")
def place(module_path: Path) -> Iterator[Place]:
    base_port = free_base_port()
    directory = Directory(module_path, base_port)
    directory.up()
    found = Place(directory, base_port)
    yield found
    for worker in found.workers:
        if worker.poll() is None:
            worker.kill()
        worker.communicate()
    directory.run("cluster", "down")


def die_at_every_step(place: Place, mode: str, steps: tuple[str, ...]) -> list[int]:
    """One process after the other, each killed one step later, and one that comes to the end; what
    they have printed."""
    place.fill(mode, COUNT, partitions=1)
    printed = ""
    for step in (*steps, ""):
        worker = place.start(mode, mode, f"worker-of-{mode}", step)
        out, errors = worker.communicate(timeout=PATIENCE_S)
        assert worker.returncode == (-9 if step else 0), f"{mode}, {step}: {errors}"
        printed += out
    return list(map(int, printed.split()))


def test_every_mode_means_what_it_says_wherever_the_consumer_dies(place: Place) -> None:
    with ThreadPoolExecutor() as at_once:
        most = at_once.submit(die_at_every_step, place, "at_most_once", PLAIN_STEPS)
        least = at_once.submit(die_at_every_step, place, "at_least_once", PLAIN_STEPS)
        once = at_once.submit(die_at_every_step, place, "exactly_once", TRANSACTION_STEPS)
    handled = Counter(most.result())
    assert max(handled.values()) == 1
    assert len(handled) >= COUNT - POLL * len(PLAIN_STEPS), "what was not in hand is not lost"
    handled = Counter(least.result())
    assert sorted(handled) == list(range(COUNT))
    assert handled.total() > COUNT, "some was handled, and not committed when it died"
    assert once.result() == []
    assert place.out("exactly_once") == Counter(range(COUNT))


def test_two_workers_killed_at_any_moment_and_nodes_too(place: Place) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)  # noqa: T201
    rng = random.Random(seed)
    place.fill("pipeline", 1_000, partitions=3)
    workers = {name: place.start("exactly_once", "pipeline", name) for name in ("one", "two")}
    place.wait_until_known("one")
    for round_ in range(4):
        time.sleep(rng.uniform(0.3, 1.0))  # the moment is the point
        name = rng.choice(sorted(workers))
        workers[name].kill()
        workers[name].communicate()
        if round_ in (1, 2):
            place.directory.run("cluster", "kill", place.node_of(leads=round_ == 1))
            place.directory.run("cluster", "up")
        workers[name] = place.start("exactly_once", "pipeline", name)
    for worker in workers.values():
        _, errors = worker.communicate(timeout=PATIENCE_S)
        assert worker.returncode == 0, errors
    assert place.out("pipeline") == Counter(range(1_000))
