"""The demo: three nodes, real flights, a leader killed with -9 halfway, and nothing lost.

What it shows is judged by comparing what was read back with the file: every row once, and the
rows of each aircraft in the order of the file. Exit code 0 means that all of it holds.

The idea: it uses what a user has (the engine, and the functions behind `aegis cluster …`). File
and topic are each read into a ledger of their own, which keeps a short digest of every row under
its key; the two ledgers must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.cli.connection import cluster_status
from aegis_cluster.cli.records import BadInput, KeyField, Row, format_of, open_source, read_rows
from aegis_cluster.errors import AegisError, ConfigError
from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.local import LocalCluster
from aegis_cluster.node.node_files import Wanted, bootstrap_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "flights-sample.csv.gz"
TOPIC = "flights"
NODES = 3
PARTITIONS = 6
CHUNK_ROWS = 500
KEY = KeyField("tailnum", ["NA"])
CALL_SECONDS = 30.0
CATCH_UP_SECONDS = 60.0


class ComparisonFailed(Exception):
    """What was read back is not what was in the file."""


def say(text: str) -> None:
    """One line for whoever watches."""
    print(text, flush=True)


# What is compared


@dataclass
class Ledger:
    """Digests of rows: in their order for each key, as a multiset for rows without a key."""

    by_key: dict[str, list[bytes]] = field(default_factory=dict)
    without_key: Counter[bytes] = field(default_factory=Counter)
    rows: int = 0

    def add(self, key: str | None, value: Any) -> None:
        """Write down one row."""
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        self.rows += 1
        if key is None:
            self.without_key[digest] += 1
        else:
            self.by_key.setdefault(key, []).append(digest)

    def all_rows(self) -> Counter[bytes]:
        """Every row of any key, with how often it is there."""
        counted = Counter(self.without_key)
        for digests in self.by_key.values():
            counted.update(digests)
        return counted


def compare(file: Ledger, read: Ledger) -> None:
    """Raise ComparisonFailed, in plain words, unless both hold the same."""
    in_file, in_topic = file.all_rows(), read.all_rows()
    lost = (in_file - in_topic).total()
    extra = (in_topic - in_file).total()
    moved = [key for key, digests in file.by_key.items() if read.by_key.get(key) != digests]
    if lost or extra:
        raise ComparisonFailed(
            f"{lost:,} rows of the file are missing and {extra:,} rows are there too often"
        )
    if moved:
        raise ComparisonFailed(
            f"the rows of {len(moved):,} aircraft are not in the order of the file, "
            f"for example those of {moved[0]}"
        )
    if file != read:
        raise ComparisonFailed("rows came back under other keys")


# The cluster


@contextmanager
def running_cluster(directory: Path) -> Iterator[tuple[LocalCluster, str]]:
    """Three nodes in `directory` and their address; stopped however the block ends."""
    cluster = LocalCluster(directory, probe=cluster_status, tell=lambda _text: None)
    try:
        nodes = cluster.up(Wanted(nodes=NODES, base_port=free_base_port(NODES)))
        yield cluster, bootstrap_of(nodes)
    finally:
        ignore_signals()  # a second Ctrl-C must not leave nodes behind
        # Stopped before all node files were written: then nothing was started either.
        with suppress(ConfigError):
            cluster.down()


def leaders(view: dict[str, Any]) -> dict[int, str | None]:
    """The leader of every partition of the topic."""
    (topic,) = (topic for topic in view["topics"] if topic["name"] == TOPIC)
    return {partition["partition"]: partition["leader"] for partition in topic["partitions"]}


async def wait_until_in_sync(bootstrap: str) -> float:
    """Wait until every replica has everything; return the seconds it took."""
    started = time.monotonic()
    while True:
        view = await asyncio.to_thread(cluster_status, bootstrap, CALL_SECONDS)
        (topic,) = (topic for topic in view["topics"] if topic["name"] == TOPIC)
        if all(len(part["in_sync"]) == len(part["replicas"]) for part in topic["partitions"]):
            return time.monotonic() - started
        if time.monotonic() - started > CATCH_UP_SECONDS:
            raise ComparisonFailed("the restarted node did not catch up")
        await asyncio.sleep(0.1)


# The steps


@dataclass
class Published:
    """What publishing showed."""

    rows: int = 0
    seconds: float = 0.0
    killed: str = ""
    partition: int = 0
    standstill: float = 0.0
    """The longest time without an acknowledgement once the leader was killed."""


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of the file, one at a time."""
    with open_source(str(file)) as source:
        yield from read_rows(source, format_of(str(file)))


def ledger_of(file: Path) -> Ledger:
    """What the topic must hold in the end."""
    ledger = Ledger()
    for row in rows_of(file):
        ledger.add(KEY.of(row), row.value)
    return ledger


async def publish_and_kill(
    engine: StreamingEngine, cluster: LocalCluster, bootstrap: str, file: Path, total: int
) -> Published:
    """Publish the whole file in its order; kill a leader when half of it is acknowledged."""
    result = Published()
    per_partition: Counter[int] = Counter()
    rows = rows_of(file)
    kill: asyncio.Task[Any] | None = None
    started = last = time.monotonic()
    while chunk := list(islice(rows, CHUNK_ROWS)):
        if kill is None and result.rows >= total // 2:
            result.partition, result.killed = await busiest_leader(bootstrap, per_partition)
            say(
                f"  Half of the rows are in. kill -9 for {result.killed}, the leader of "
                f"{TOPIC}/{result.partition}, while publishing goes on."
            )
            last = time.monotonic()
            kill = asyncio.create_task(asyncio.to_thread(cluster.kill, result.killed))
        messages = [Message(key=KEY.of(row), payload=row.value) for row in chunk]
        receipts = await engine.publish_many(TOPIC, messages, timeout=CALL_SECONDS)
        now = time.monotonic()
        if kill is not None:
            result.standstill = max(result.standstill, now - last)
        last = now
        for receipt in receipts:
            per_partition[receipt.partition] += receipt.count
            result.rows += receipt.count
    result.seconds = time.monotonic() - started
    if kill is not None:
        await kill
    return result


async def busiest_leader(bootstrap: str, per_partition: Counter[int]) -> tuple[int, str]:
    """The partition with the most rows so far that has a leader, and that leader."""
    view = await asyncio.to_thread(cluster_status, bootstrap, CALL_SECONDS)
    by_partition = leaders(view)
    for partition, _rows in per_partition.most_common():
        leader = by_partition[partition]
        if leader is not None:
            return partition, leader
    raise ComparisonFailed("no partition has a leader, although nothing was killed yet")


async def read_back(engine: StreamingEngine) -> Ledger:
    """Everything that is in the topic, from its start to its end as it is now."""
    ledger = Ledger()
    ends = {
        partition: found.high_watermark
        for partition, found in (await engine.offsets(TOPIC, timeout=CALL_SECONDS)).items()
    }
    config = SubscribeConfig(start=Offset.EARLIEST)
    silent_since = time.monotonic()
    async with engine.subscribe(TOPIC, config, timeout=CALL_SECONDS) as subscriber:
        while any(subscriber.positions[partition] < end for partition, end in ends.items()):
            messages = await subscriber.poll(5_000, 0.5)
            for message in messages:
                assert not isinstance(message.key, bytes)
                ledger.add(message.key, message.payload)
            if messages:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > CALL_SECONDS:
                raise ComparisonFailed(f"reading stopped after {ledger.rows:,} rows")
    return ledger


async def show(cluster: LocalCluster, bootstrap: str, file: Path, wanted: Ledger) -> None:
    """All steps, from the topic to the comparison."""
    async with StreamingEngine.connect(bootstrap) as engine:
        config = TopicConfig(partitions=PARTITIONS, replication_factor=NODES)
        await engine.create_topic(TOPIC, config, timeout=CALL_SECONDS)
        say(f"Topic {TOPIC}: {PARTITIONS} partitions, each on all {NODES} nodes.")

        say(f"Publishing {wanted.rows:,} flights, keyed by tail number …")
        published = await publish_and_kill(engine, cluster, bootstrap, file, wanted.rows)
        rate = published.rows / published.seconds
        say(
            f"  {published.rows:,} rows acknowledged in {published.seconds:.1f} s "
            f"({rate:,.0f} rows/s, the failover included)."
        )
        say(f"  Writes stood still for {published.standstill:.2f} s, then two nodes went on.")

        started = time.monotonic()
        await asyncio.to_thread(cluster.restart, published.killed)
        seconds = time.monotonic() - started
        caught_up = await wait_until_in_sync(bootstrap)
        say(
            f"{published.killed} is restarted: it served after {seconds:.1f} s and had caught up "
            f"{caught_up:.1f} s later."
        )

        started = time.monotonic()
        read = await read_back(engine)
        seconds = time.monotonic() - started
        say(f"Read {read.rows:,} rows back in {seconds:.1f} s ({read.rows / seconds:,.0f} rows/s).")
    compare(wanted, read)
    say(
        f"Compared with the file: nothing lost, nothing twice, and the rows of each of "
        f"{len(read.by_key):,} aircraft in their order "
        f"({read.without_key.total():,} rows have no usable tail number)."
    )


# Beginning and end


def stop_on_signals() -> None:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does, with everything cleaned up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def ignore_signals() -> None:
    """From here on we are cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def working_directory(wanted: Path | None) -> Iterator[Path]:
    """The directory that was asked for, which stays, or a temporary one, which does not."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise ConfigError(f"{wanted} is not empty; the demo wants a directory of its own")
        yield wanted
        return
    directory = Path(tempfile.mkdtemp(prefix="aegis-demo-"))
    try:
        yield directory
    finally:
        ignore_signals()
        shutil.rmtree(directory)


def run(data: Path, wanted: Path | None) -> None:
    """The whole demo; raises when anything is not as it should be."""
    started = time.monotonic()
    expected = ledger_of(data)
    with working_directory(wanted) as directory:
        say(f"Starting {NODES} nodes in {directory} …")
        with running_cluster(directory) as (cluster, bootstrap):
            say(f"They serve at {bootstrap} ({time.monotonic() - started:.1f} s).")
            asyncio.run(show(cluster, bootstrap, data, expected))
    say(f"All nodes are stopped. The demo took {time.monotonic() - started:.1f} s.")


def main() -> int:
    """Parse options, run, and turn what went wrong into plain words."""
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=SAMPLE,
        help="a CSV file of flights, also .gz (default: the sample in tests/data)",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=None,
        help="an empty directory for the nodes, kept (default: a temporary one, removed)",
    )
    options = parser.parse_args()
    stop_on_signals()
    try:
        run(options.data, options.dir)
    except KeyboardInterrupt:
        say("demo: stopped before its end; its nodes are stopped too.")
        return 130
    except (AegisError, BadInput, ComparisonFailed) as error:
        say(f"demo: FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
