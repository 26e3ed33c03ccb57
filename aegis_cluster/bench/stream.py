"""Stream processing: filter and map, a keyed count in windows, and a state that is restored.

Records are JSON-like, of about 200 bytes. A processor with one worker reads a topic of them to its
end, exactly once, first on an embedded engine, then on the three nodes; what it wrote is counted.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.bench.data_path import sample_of
from aegis_cluster.bench.figures import FSYNC, Goal, Sample, Scenario, WrongCount
from aegis_cluster.bench.stage import Clock, Stage
from aegis_cluster.client.producer import Columns
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.ids import TopicPartition
from aegis_cluster.producer import ProducerConfig
from aegis_cluster.stream import Count, StreamProcessor
from aegis_cluster.stream.changelog import record_key, restore
from aegis_cluster.stream.codec import pack
from aegis_cluster.stream.sqlite_store import SqliteStore
from aegis_cluster.stream.state import key_bytes, prefix_of
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[[StreamProcessor], StreamProcessor]

MAP: Final = "embedded filter+map records/s"
COUNT: Final = "embedded count records/s"
MAP_CLUSTER: Final = "filter+map records/s"
COUNT_CLUSTER: Final = "count records/s"
RESTORE: Final = "keys restored/s"
RECORDS: Final = 400_000
CUSTOMERS: Final = 10_000
KEYS: Final = 1_000_000
CHUNK: Final = 20_000
SOURCE: Final = "bench-stream"
OUT: Final = "bench-stream-out"
LIMIT_S: Final = 300.0


def record(number: int) -> dict[str, Any]:
    """About 200 bytes as JSON."""
    return {
        "id": f"event-{number:012d}",
        "type": "purchase" if number % 2 else "view",
        "customer_id": f"customer-{number * 7919 % CUSTOMERS:08d}",
        "total": number % 10_000 / 100,
        "created_at": 1_700_000_000 + number / 1_000,
        "note": "x" * 72,
    }


def filter_and_map(processor: StreamProcessor) -> StreamProcessor:
    """What API.md shows: half of the records are purchases."""
    return (
        processor.source(SOURCE)
        .filter(lambda e: e["type"] == "purchase")
        .map(lambda e: {"customer": e["customer_id"], "amount": e["total"], "at": e["created_at"]})
        .sink(OUT)
    )


def count_by_key(processor: StreamProcessor) -> StreamProcessor:
    """Records of each customer and minute."""
    source = processor.source(SOURCE, timestamp="created_at")
    return source.window(timedelta(minutes=1)).aggregate(Count()).sink(OUT)


async def fill(engine: StreamingEngine, replicas: int) -> None:
    """Topics, and what is to be processed."""
    for name in (SOURCE, OUT):
        await engine.create_topic(name, TopicConfig(replication_factor=replicas), exist_ok=True)
    if (await engine.offsets(SOURCE))[0].high_watermark:
        return
    for start in range(0, RECORDS, CHUNK):
        records = [record(number) for number in range(start, start + CHUNK)]
        await engine.publish_many(SOURCE, records, keys=[r["customer_id"] for r in records])


async def processed(engine: StreamingEngine, name: str, build: Build, place: Path) -> float:
    """Records a second. Raises `WrongCount` when not all of them were processed."""
    processor = build(StreamProcessor(engine, name, state_dir=place))
    begin = time.perf_counter()
    async with asyncio.timeout(LIMIT_S), await processor.start() as running:
        while running.stats.processed < RECORDS:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)
    took = time.perf_counter() - begin
    lag = sum((await (engine.group(name)).lag()).values())
    if lag:
        raise WrongCount(f"{lag} of {RECORDS} records were not processed.")
    return RECORDS / took


async def restored(engine: StreamingEngine, place: Path) -> float:
    """Keys a second, of a state of a million."""
    topic = "bench-stream-changelog"
    await engine.create_topic(topic, TopicConfig(cleanup="compact"))
    before = prefix_of(1, b"a")
    async with engine.producer(ProducerConfig(transactional_id=topic)) as producer:
        for start in range(0, KEYS, CHUNK):
            numbers = [number * 7919 % KEYS for number in range(start, start + CHUNK)]
            keys = [record_key(before + key_bytes(f"customer-{number:08d}")) for number in numbers]
            async with producer.transaction() as tx:
                values = [pack([number]) for number in numbers]
                await tx.send_encoded(topic, Columns(0, keys, values, []))
    store = SqliteStore(place / "restored.sqlite", "bench")
    begin = time.perf_counter()
    await restore(engine.cluster, TopicPartition(topic, 0), store, lambda _: None, LIMIT_S)
    took = time.perf_counter() - begin
    found = len(store.scan(b"", b"\xff"))
    store.close()
    if found != KEYS:
        raise WrongCount(f"{KEYS} keys were written, {found} restored.")
    return KEYS / took


async def stream(stage: Stage, seconds: float) -> Sample:
    """All of it once; how long that takes says nothing about `seconds`."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="aegis-bench-stream-") as name:
        place = Path(name)
        with Clock(stage) as clock:
            async with StreamingEngine.open(place / "data") as engine:
                await fill(engine, 1)
                figures[MAP] = await processed(engine, "map", filter_and_map, place)
                figures[COUNT] = await processed(engine, "count", count_by_key, place)
                figures[RESTORE] = await restored(engine, place)
            await fill(stage.engine, 3)
            figures[MAP_CLUSTER] = await processed(stage.engine, "map", filter_and_map, place)
            figures[COUNT_CLUSTER] = await processed(stage.engine, "count", count_by_key, place)
        peer = await asyncio.to_thread(_bytewax)
    return sample_of(clock, 4 * RECORDS, figures, **peer)


def _bytewax() -> dict[str, float]:
    """The same two in Bytewax, in memory and without a log, where it is installed: records/s."""
    try:
        from aegis_cluster.bench import bytewax_peer
    except ImportError:
        return {}
    return bytewax_peer.rates([record(number) for number in range(RECORDS)])


SCENARIOS: Final = (
    Scenario(
        "stream",
        "stream processing, 200 B records, exactly once",
        stream,
        {
            FSYNC: (
                Goal(MAP, None, 100_000.0),
                Goal(COUNT, None, 50_000.0),
                Goal(MAP_CLUSTER, None, 50_000.0),
                Goal(COUNT_CLUSTER, None, 25_000.0),
                Goal(RESTORE, None, 200_000.0),
            )
        },
        apart=True,
    ),
)
