"""A siege: strangers attack every socket of a running cluster while one client writes and reads.

Judged afterwards: no process has ended, no replica has changed its term (so nobody was elected),
all that was acknowledged can be read, the client never waited long, memory and logs are bounded.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import psutil

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.client.admin import cluster_status
from aegis_cluster.client.cluster import ClusterClient
from aegis_cluster.config import control_endpoint, data_endpoint, peers_endpoint
from aegis_cluster.errors import AegisError
from aegis_cluster.limits import MIB
from aegis_cluster.node.log import LOG_NAME
from aegis_cluster.node.node_files import load_nodes
from aegis_cluster.node.run_file import read_run_file
from chaos.hostile import Stranger

if TYPE_CHECKING:
    from pathlib import Path

TOPIC: Final = "t"
GROWTH_BYTES_MAX: Final = 700 * MIB
"""Of one shard, over its start: the pools of `limits` (answers 256 MB, in flight 320 MB) and what
the allocator keeps."""
PAUSE_S_MAX: Final = 5.0
"""The longest that one write may take; an election alone would take one second."""
STALL_S_MAX: Final = 0.25
LOG_BYTES_A_SECOND_MAX: Final = 2_000
ATTACKS_A_SECOND: Final = 200
SHOWN: Final = 5


@dataclass
class Report:
    """What a siege did and found."""

    seconds: float = 0.0
    attacks: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    longest_write_s: float = 0.0
    violations: int = 0
    stall_s: float = 0.0
    """The longest that the machine kept this very process from running."""
    growth_bytes: int = 0
    """The most that any shard grew, at any time."""
    log_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{sum(self.attacks.values())} attacks in {self.seconds:.0f} s: {self.attacks}",
                f"{self.acknowledged} writes acknowledged and read back, the slowest in"
                f" {self.longest_write_s:.2f} s",
                f"{self.violations} violations counted; shards grew by at most"
                f" {self.growth_bytes >> 20} MB; logs by {self.log_bytes} bytes",
                *(f"PROBLEM: {problem}" for problem in self.problems),
            )
        )


class Siege:
    """Of the cluster in a directory, from one seed."""

    def __init__(self, path: Path, bootstrap: str, *, seed: int) -> None:
        self._path = path
        self._bootstrap = bootstrap
        self._seed = seed
        self._report = Report()
        self._ends = False

    def run(self, *, seconds: float) -> Report:
        """Attack for so long, then judge."""
        asyncio.run(self._run(seconds))
        return self._report

    async def _run(self, seconds: float) -> None:
        report = self._report
        async with StreamingEngine.connect(self._bootstrap, request_timeout=20) as engine:
            await engine.create_topic(TOPIC, TopicConfig(partitions=3), exist_ok=True)
            await engine.publish_many(TOPIC, [b"x" * 100_000 for _ in range(200)])
            before = await self._look()
            shards = self._shards()
            base = {process.pid: process.memory_info().rss for process in shards}
            logs = self._log_bytes()
            cluster = ClusterClient(self._bootstrap.split(","))
            await cluster.refresh(None, cluster.deadline(10))
            strangers = [
                Stranger(
                    random.Random(f"{self._seed}/{number}"),
                    self._places(),
                    cluster_id=cluster.metadata.cluster_id,
                    groups=[0, *(p.group for p in cluster.metadata.topic(TOPIC).partitions)],
                )
                for number in range(2)
            ]
            await cluster.close()
            threads = [threading.Thread(target=self._attack, args=(s,)) for s in strangers]
            start = time.monotonic()
            for thread in threads:
                thread.start()
            written: list[bytes] = []
            try:
                while time.monotonic() - start < seconds:
                    await self._write_one(engine, written)
                    self._measure(shards, base)
            finally:
                self._ends = True
                for thread in threads:
                    await asyncio.to_thread(thread.join)
                for stranger in strangers:
                    stranger.close()
            report.seconds = time.monotonic() - start
            for stranger in strangers:
                for name, count in stranger.attacks.items():
                    report.attacks[name] = report.attacks.get(name, 0) + count
            report.acknowledged = len(written)
            await self._judge(engine, written, before)
            report.log_bytes = self._log_bytes() - logs
            if report.log_bytes > LOG_BYTES_A_SECOND_MAX * (report.seconds + 10):
                report.problems.append(f"the logs grew by {report.log_bytes} bytes")

    def _attack(self, stranger: Stranger) -> None:
        while not self._ends:
            stranger.attack()
            time.sleep(1 / ATTACKS_A_SECOND)

    async def _write_one(self, engine: StreamingEngine, written: list[bytes]) -> None:
        value = b"honest-%d" % len(written)
        began = time.monotonic()
        try:
            await engine.publish(TOPIC, Message(key=f"k{len(written) % 7}", payload=value))
        except AegisError as error:
            self._report.problems.append(f"a write failed: {error!r}")
        else:
            written.append(value)
        took = time.monotonic() - began
        self._report.longest_write_s = max(self._report.longest_write_s, took)
        slept = time.monotonic()
        await asyncio.sleep(0.02)
        self._report.stall_s = max(self._report.stall_s, time.monotonic() - slept - 0.02)

    def _measure(self, shards: list[psutil.Process], base: dict[int, int]) -> None:
        for process in shards:
            try:
                grown = process.memory_info().rss - base[process.pid]
            except psutil.NoSuchProcess:
                continue  # told by `_judge`
            self._report.growth_bytes = max(self._report.growth_bytes, grown)

    async def _judge(
        self, engine: StreamingEngine, written: list[bytes], before: dict[str, Any]
    ) -> None:
        problems = self._report.problems
        after = await self._look()
        self._report.violations = sum(after["violations"].values())
        # A machine that lets nobody run for so long elects leaders by itself.
        for what in ("boots", "terms") if self._report.stall_s < STALL_S_MAX else ("boots",):
            if before[what] != after[what]:
                problems.append(f"{what} changed from {before[what]} to {after[what]}")
        if self._report.growth_bytes > GROWTH_BYTES_MAX:
            problems.append(f"a shard grew by {self._report.growth_bytes >> 20} MB")
        if self._report.longest_write_s > PAUSE_S_MAX:
            problems.append(f"a write took {self._report.longest_write_s:.1f} s")
        found: set[Any] = set()
        offsets = await engine.offsets(TOPIC)
        left = sum(place.high_watermark - place.log_start for place in offsets.values())
        config = SubscribeConfig(start=Offset.EARLIEST)
        async with engine.subscribe(TOPIC, config) as subscriber:
            while left > 0:
                messages = await subscriber.poll(timeout=20)
                if not messages:
                    problems.append(f"{left} messages cannot be read")
                    break
                left -= len(messages)
                found.update(message.payload for message in messages)
        lost = [value for value in written if value not in found]
        if lost:
            problems.append(f"{len(lost)} acknowledged messages are lost: {lost[:SHOWN]}")

    async def _look(self) -> dict[str, Any]:
        """Which processes run, and who leads what in which term."""
        async with asyncio.timeout(30):
            while True:
                view = await cluster_status(self._bootstrap, 10.0)
                places = [place for topic in view["topics"] for place in topic["partitions"]]
                if all(place["leader"] for place in places):
                    break
        shards = {
            f"{node['name']}/{shard['shard']}": shard
            for node in view["nodes"]
            for shard in node["shards"]
        }
        return {
            "boots": {name: shard.get("boot_id") for name, shard in shards.items()},
            "violations": {name: shard.get("violations", 0) for name, shard in shards.items()},
            "terms": {
                f"{topic['name']}/{place['partition']}": place["term"]
                for topic in view["topics"]
                for place in topic["partitions"]
            },
        }

    def _places(self) -> list[str]:
        """Every socket that a node binds."""
        return [
            endpoint(*node.config.address, shard)
            for node in load_nodes(self._path)
            for shard in range(node.config.shards)
            for endpoint in (control_endpoint, data_endpoint, peers_endpoint)
        ]

    def _shards(self) -> list[psutil.Process]:
        found = []
        for node in load_nodes(self._path):
            run = read_run_file(node.config.data)
            if run is not None:
                found += psutil.Process(run.mark.pid).children()
        return found

    def _log_bytes(self) -> int:
        return sum(
            file.stat().st_size
            for node in load_nodes(self._path)
            for file in node.config.data.glob(f"{LOG_NAME}*")
        )
