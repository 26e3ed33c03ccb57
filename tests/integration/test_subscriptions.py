"""Competing consumers in processes of their own are killed, and so is their coordinator's node."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aegis_cluster import PersistentConfig, TopicConfig
from tests.integration.cluster import RunningCluster, cluster, run
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

CONSUMER = """
import asyncio, sys, time
from aegis_cluster import LockLost, OutcomeUnknown, StreamingEngine

async def main(bootstrap, log):
    async with StreamingEngine.connect(bootstrap) as engine:
        async with engine.persistent_subscription("numbers", "work") as subscription:
            with open(log, "a", buffering=1) as file:
                def note(what, message):
                    count = message.delivery_count
                    file.write(f"{time.monotonic()} {what} {message.payload} {count}\\n")

                async def handle(message):
                    note("got", message)
                    try:
                        if message.payload % 40 == 0:
                            await message.nack()
                        else:
                            await message.ack()
                            note("acked", message)
                    except OutcomeUnknown:
                        note("unsure", message)
                    except LockLost:
                        pass

                while True:
                    await asyncio.gather(*map(handle, await subscription.poll(20)))
                    await asyncio.sleep(0.05)

asyncio.run(main(*sys.argv[1:]))
"""
COUNT = 800
AT_ONCE = 20
"""As many are in a consumer's hands at most."""
POISON = set(range(0, COUNT, 40))


class Line(NamedTuple):
    time_s: float
    what: str
    payload: int
    deliveries: int


def lines(files: list[Path]) -> list[Line]:
    """What all consumers have written, in the order of this machine's clock."""
    found = []
    for file in files:
        if file.exists():
            for line in file.read_text().split("\n")[:-1]:
                time_s, what, payload, deliveries = line.split()
                found.append(Line(float(time_s), what, int(payload), int(deliveries)))
    return sorted(found)


def test_kills_lose_nothing_and_bring_nothing_back(tmp_path: Path) -> None:
    files = [tmp_path / f"consumer-{number}" for number in range(4)]
    processes: list[subprocess.Popen[bytes]] = []

    def start(nodes: RunningCluster, file: Path) -> None:
        arguments = [sys.executable, "-c", CONSUMER, nodes.bootstrap, str(file)]
        processes.append(subprocess.Popen(arguments))

    def acked() -> set[int]:
        return {line.payload for line in lines(files) if line.what == "acked"}

    def all_are_accounted_for() -> bool:
        """Who is killed between an acknowledgement and the note of it has got the message; whoever
        is not told what has become of it says so."""
        seen = lines(files)
        unsure = {line.payload for line in seen if line.what == "unsure"}
        killed = {line.payload for line in lines(files[:2]) if line.what == "got"}
        unsaid = set(range(COUNT)) - POISON - acked() - unsure
        return unsaid <= killed and len(unsaid) <= 2 * AT_ONCE

    async def test(nodes: RunningCluster) -> None:
        async with nodes.engine() as engine:
            await engine.create_topic("numbers", TopicConfig(partitions=2))
            config = PersistentConfig(
                ack_timeout="3s", max_deliveries=8, dead_letter="numbers.dead", max_in_flight=40
            )
            async with engine.persistent_subscription("numbers", "work", config):
                pass  # the subscription exists
            await engine.publish_many("numbers", range(COUNT), keys=map(str, range(COUNT)))
            subscription = engine.persistent_subscription("numbers", "work")
            for file in files[:3]:
                start(nodes, file)
            await asyncio.to_thread(wait_until, lambda: len(acked()) > 50, "work goes on", 60)
            processes[0].kill()
            await asyncio.to_thread(wait_until, lambda: len(acked()) > 150, "work goes on", 60)
            name = (await subscription.describe()).coordinator
            nodes.run("cluster", "kill", name)
            processes[1].kill()
            start(nodes, files[3])
            async with asyncio.timeout(60):
                while any((await subscription.lag()).values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            await asyncio.to_thread(wait_until, all_are_accounted_for, "all is handled")
            nodes.up()
            letters = await engine.history("numbers.dead", COUNT)
            assert sorted(letter.payload for letter in letters) == sorted(POISON)

        shown = json.loads(nodes.run("subscription", "describe", "numbers", "work", "--json"))
        assert (shown["unsettled"], shown["parked"], shown["max_deliveries"]) == (0, 0, 8)
        assert "work" in nodes.run("subscription", "list", "--topic", "numbers")
        assert nodes.run("subscription", "replay", "numbers", "work").strip() == "replayed 0"
        assert json.loads(nodes.run("subscription", "parked", "numbers", "work", "--json")) == []
        nodes.run("subscription", "reset", "numbers", "work", "--to", "earliest", code=1)
        for process in processes:
            process.kill()
            process.wait()
        await asyncio.to_thread(wait_until, lambda: not consumers(nodes), "nobody is in it", 40)
        moved = nodes.run("subscription", "reset", "numbers", "work", "--to", "earliest", "--json")
        assert [one["offset"] for one in json.loads(moved)] == [0, 0]
        shown = json.loads(nodes.run("subscription", "describe", "numbers", "work", "--json"))
        assert sum(one["lag"] for one in shown["partitions"]) == COUNT
        nodes.run("subscription", "delete", "numbers", "work")
        nodes.run("subscription", "describe", "numbers", "work", code=1)

    try:
        with cluster(tmp_path / "cluster") as nodes:
            run(test(nodes), 170)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    judge(lines(files))


def consumers(nodes: RunningCluster) -> int:
    shown = json.loads(nodes.run("subscription", "describe", "numbers", "work", "--json"))
    return len(shown["consumers"])


def judge(history: list[Line]) -> None:
    """Nothing that was acknowledged was handed out later, and counts rose with each hand-out."""
    acked_at = {line.payload: line.time_s for line in history if line.what == "acked"}
    counts: defaultdict[int, list[int]] = defaultdict(list)
    for line in history:
        if line.what == "got":
            counts[line.payload].append(line.deliveries)
            late = line.payload in acked_at and line.time_s > acked_at[line.payload]
            assert not late, f"{line} came after it was acknowledged"
    for payload, seen in counts.items():
        assert seen == sorted(set(seen)), f"{payload} was handed out as {seen}"
    assert set(counts) == set(range(COUNT))
