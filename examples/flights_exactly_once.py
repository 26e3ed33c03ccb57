"""Flights through three stages, exactly once, while worker processes are killed at random.

    aegis cluster up
    python flights_exactly_once.py tcp://127.0.0.1:7101                     some thousand flights
    python flights_exactly_once.py tcp://127.0.0.1:7101 flights.csv.gz      a file of that form

Three processes work on every stage: `clean` (of each row what is needed), `route` (keyed anew, by
carrier) and `count` (how many more of each carrier). What a stage has read, what it writes and how
far it has come are one transaction: whoever is killed at which moment, nothing counts twice or
never. In the end the sums are compared with a plain count of the file. Exit code 0: they are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import random
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from aegis_cluster import (
    AegisError,
    DeliveryMode,
    Message,
    Offset,
    ProducerConfig,
    ReceivedMessage,
    StreamingEngine,
    SubscribeConfig,
    TopicConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Stage = Callable[[list[ReceivedMessage]], Iterable[Message]]

SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "flights-sample.csv.gz"
WORKERS = 3
PARTITIONS = 6
PER_TRANSACTION = 1_000
PATIENCE_S = 300.0


# ---- the stages


def clean(messages: list[ReceivedMessage]) -> Iterator[Message]:
    """Of each row what is needed, keyed by aircraft."""
    for message in messages:
        row = message.payload
        flight = {"carrier": row["carrier"], "flown": row["dep_time"] != "NA"}
        yield Message(key=row["tailnum"], payload=flight)


def route(messages: list[ReceivedMessage]) -> Iterator[Message]:
    """Keyed by carrier, so that one partition has all flights of a carrier."""
    for message in messages:
        yield Message(key=message.payload["carrier"], payload=message.payload)


def count(messages: list[ReceivedMessage]) -> Iterator[Message]:
    """How many more flights of each carrier there are."""
    for carrier, more in Counter(message.key for message in messages).items():
        yield Message(key=carrier, payload=more)


STAGES: dict[str, Stage] = {"clean": clean, "route": route, "count": count}


def topics_of(run: str) -> list[str]:
    """What the first stage reads, and what each stage writes."""
    return [f"{run}.rows", *(f"{run}.{stage}" for stage in STAGES)]


def group_of(run: str, stage: str) -> str:
    return f"{run}-{stage}"


# ---- a worker process: a part of every stage


async def work(address: str, run: str, worker: str) -> None:
    """Until it is killed."""
    topics = topics_of(run)
    async with StreamingEngine.connect(address) as engine, asyncio.TaskGroup() as tasks:
        for (name, stage), source, sink in zip(STAGES.items(), topics, topics[1:], strict=False):
            producer = ProducerConfig(
                transactional_id=f"{group_of(run, name)}-{worker}", transaction_timeout="5s"
            )
            subscriber = SubscribeConfig(
                group_id=group_of(run, name),
                start=Offset.EARLIEST,
                delivery_mode=DeliveryMode.EXACTLY_ONCE,
                session_timeout="3s",
            )
            tasks.create_task(run_stage(engine, stage, source, sink, subscriber, producer))


async def run_stage(
    engine: StreamingEngine,
    stage: Stage,
    source: str,
    sink: str,
    reading: SubscribeConfig,
    writing: ProducerConfig,
) -> None:
    async with (
        engine.subscribe(source, reading) as subscriber,
        engine.producer(writing) as producer,
    ):
        while True:
            messages = await subscriber.poll(PER_TRANSACTION, timeout=1.0)
            if not messages:
                continue
            try:
                async with producer.transaction(subscriber) as transaction:
                    for message in stage(messages):
                        await transaction.send(sink, message)
                    await transaction.send_offsets(subscriber)
            except AegisError as error:
                # All of it happened, or nothing: the subscriber goes on from what is committed.
                print(f"{writing.transactional_id}: {error}", file=sys.stderr, flush=True)


# ---- the one who watches, and kills


class Workers:
    """Processes that are killed, and started again under the same names."""

    def __init__(self, address: str, run: str) -> None:
        self._command = (sys.executable, __file__, address, "--run", run, "--worker")
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def start_missing(self) -> None:
        for name in (str(number) for number in range(WORKERS)):
            process = self._running.get(name)
            if process is None or process.returncode is not None:
                self._running[name] = await asyncio.create_subprocess_exec(*self._command, name)

    async def kill(self, name: str) -> None:
        process = self._running[name]
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def stop(self) -> None:
        for name in list(self._running):
            await self.kill(name)


def rows_of(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", newline="") as text:
        return list(csv.DictReader(text))


async def is_done(engine: StreamingEngine, run: str) -> bool:
    """Every stage has read all that the one before has written."""
    for stage in STAGES:
        description = await engine.group(group_of(run, stage)).describe()
        lag = await engine.group(group_of(run, stage)).lag()
        if len(description.positions) < PARTITIONS or any(lag.values()):
            return False
    return True


async def publish_and_kill(
    engine: StreamingEngine,
    workers: Workers,
    run: str,
    rows: list[dict[str, str]],
    kills: int,
    rng: random.Random,
) -> None:
    """A part of the rows before each kill, so that all of them meet work."""
    topic = topics_of(run)[0]
    for number in range(kills + 1):
        part = rows[number :: kills + 1]
        await workers.start_missing()
        await engine.publish_many(topic, part, keys=[row["tailnum"] for row in part])
        if number < kills:
            await asyncio.sleep(rng.uniform(0.1, 2.0))
            await workers.kill(str(rng.randrange(WORKERS)))


async def wait_until_done(engine: StreamingEngine, workers: Workers, run: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await is_done(engine, run):
            await workers.start_missing()
            await asyncio.sleep(0.2)


async def watch(address: str, file: Path, kills: int, seed: int) -> int:
    rows = rows_of(file)
    run = f"flights-{uuid.uuid4().hex[:8]}"
    print(f"SEED {seed}, run {run}: {len(rows):,} flights, {kills} kills", flush=True)
    begin = time.monotonic()
    async with StreamingEngine.connect(address) as engine:
        for topic in topics_of(run):
            await engine.create_topic(topic, TopicConfig(partitions=PARTITIONS))
        workers = Workers(address, run)
        try:
            await publish_and_kill(engine, workers, run, rows, kills, random.Random(seed))
            await wait_until_done(engine, workers, run)
        finally:
            await workers.stop()
        found: Counter[str] = Counter()
        for message in await engine.history(topics_of(run)[-1], 10 * len(rows)):
            found[str(message.key)] += message.payload
    wanted = Counter(row["carrier"] for row in rows)
    for carrier in sorted(wanted | found):
        same = "" if wanted[carrier] == found[carrier] else "   <- differs"
        print(f"{carrier}  file {wanted[carrier]:>7,}  pipeline {found[carrier]:>7,}{same}")
    equal = wanted == found
    took = time.monotonic() - begin
    print(f"{kills} kills, {took:.0f} s: {'equal' if equal else 'NOT equal'}", flush=True)
    return 0 if equal else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", help="of the cluster, such as tcp://127.0.0.1:7101")
    parser.add_argument("file", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        asyncio.run(work(options.address, options.run, options.worker))
        return 0
    return asyncio.run(watch(options.address, options.file, options.kills, options.seed))


if __name__ == "__main__":
    sys.exit(main())
