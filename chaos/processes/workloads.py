"""What clients do: producers that add unique values, readers that poll, watchers that ask for ends.

The idea (Jepsen's `set` and `queue`): every value is written once, so whoever reads the log can
tell what became of each. Each writer chooses the partition by a key made for it, so that the
history can name the partition before anything is sent.

The rule it protects: an outcome is written down as the client library gave it, three-valued;
anything but the errors it promises is an error of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aegis_cluster.engine import StreamingEngine
from aegis_cluster.errors import (
    AegisError,
    OffsetOutOfRange,
    OutcomeUnknown,
    PartlyPublished,
    Refused,
    TopicNotFound,
)
from aegis_cluster.message import Message, Offset
from aegis_cluster.producer import ProducerConfig
from aegis_cluster.subscribe_config import SubscribeConfig
from aegis_cluster.wire.partitioner import partition_for
from chaos.processes.recording import TOPIC, now_us

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable

    from aegis_cluster.message import BatchReceipt
    from aegis_cluster.subscriber import Subscriber
    from chaos.processes.recording import Recorder

TIMEOUT_S: Final = 4.0
"""Of every call: short enough that faults make some outcomes unknown."""
CONNECT_S: Final = 2.0
POLL_S: Final = 0.5
PAUSE_S: Final = 0.1
"""After a refusal, so that nobody spins."""
UNACKNOWLEDGED_MAX: Final = 16
"""Writes of one producer under way at a time."""
SENDS_PER_PRODUCER: Final = 400
"""Then it makes a new one, with a producer id of its own."""
BATCH_MAX: Final = 40


@dataclass(slots=True)
class Client:
    """One process's share of a workload."""

    name: str
    bootstrap: str
    partitions: int
    recorder: Recorder
    rng: random.Random
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """No more writes."""
    ends: asyncio.Future[dict[int, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Where readers have to get to before they end."""
    refusals_are_certain: bool = True
    """False where requests are repeated: a refusal says what became of one of them."""
    acknowledged: asyncio.Event = field(default_factory=asyncio.Event)
    """A first write was."""
    _values: int = 0
    _producers: int = 0
    _readers: int = 0
    _members: int = 0

    def value(self) -> str:
        """One that nobody else writes."""
        self._values += 1
        return f"{self.name}-{self._values}"

    def producer_name(self) -> str:
        self._producers += 1
        return f"{self.name}.p{self._producers}"

    def reader_name(self) -> str:
        self._readers += 1
        return f"{self.name}.r{self._readers}"

    def member_name(self) -> str:
        self._members += 1
        return f"{self.name}.m{self._members}"

    async def engine(self) -> StreamingEngine:
        """Connected, however long that takes."""
        while True:
            engine = StreamingEngine.connect(self.bootstrap, request_timeout=CONNECT_S)
            try:
                await engine.__aenter__()
            except Refused:
                await asyncio.sleep(PAUSE_S)
            else:
                engine.request_timeout = TIMEOUT_S
                return engine

    # ---- one write

    async def settle(self, write: str, receipt: Awaitable[object]) -> bool:
        """Write down how a write ended; return whether it was acknowledged."""
        try:
            found = await receipt
        except OutcomeUnknown as error:
            self.recorder.note("sent", id=write, outcome="unknown", reason=str(error))
        except Refused as error:
            outcome = "refused" if self.refusals_are_certain else "unknown"
            self.recorder.note("sent", id=write, outcome=outcome, reason=repr(error))
        else:
            offset = getattr(found, "offset", -1)
            self.recorder.note("sent", id=write, outcome="ok", offset=offset)
            self.acknowledged.set()
            return True
        return False

    async def publish_one(self, engine: StreamingEngine, producer: str) -> bool:
        """One value, acknowledged or not; return whether it was."""
        partition, value = self.rng.randrange(self.partitions), self.value()
        message = Message(key=key_of(partition, self.partitions), payload=value)
        write = self.recorder.send(producer, partition, value)
        return await self.settle(write, engine.publish(TOPIC, message))

    async def publish_batch(self, engine: StreamingEngine, producer: str) -> None:
        """Some values into one partition in one call, each with an outcome of its own."""
        partition = self.rng.randrange(self.partitions)
        values = [self.value() for _ in range(self.rng.randint(2, BATCH_MAX))]
        writes = [self.recorder.send(producer, partition, value) for value in values]
        key = key_of(partition, self.partitions)
        failed: set[int] = set()
        unknown: set[int] = set()
        receipts: list[BatchReceipt] = []
        try:
            receipts = await engine.publish_many(TOPIC, values, [key] * len(values))
        except PartlyPublished as error:
            failed, unknown, receipts = set(error.failed), set(error.unknown), error.receipts
        except Refused:
            failed = set(range(len(values)))
        offsets = iter([r.base_offset + n for r in receipts for n in range(r.count)])
        for place, write in enumerate(writes):
            if place in failed or place in unknown:
                outcome = "refused" if place in failed else "unknown"
                self.recorder.note("sent", id=write, outcome=outcome)
            else:
                self.recorder.note("sent", id=write, outcome="ok", offset=next(offsets))


# ---- workloads


async def add_unique_ids(client: Client, pause_s: float) -> None:
    """Many callers of `publish`, and of `publish_many`, one call after another each."""
    engine = await client.engine()

    async def add(producer: str) -> None:
        while not client.stopping.is_set():
            if client.rng.random() < 0.1:
                await client.publish_batch(engine, producer)
            elif not await client.publish_one(engine, producer):
                await asyncio.sleep(PAUSE_S)
            await asyncio.sleep(client.rng.uniform(0, 2 * pause_s))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(6):
            tasks.create_task(add(client.producer_name()))
    await engine.close()


async def enqueue(client: Client, pause_s: float) -> None:
    """One long-lived producer after another, with many writes under way."""
    engine = await client.engine()
    while not client.stopping.is_set():
        await _send_some(client, engine, pause_s)
    await engine.close()


async def _send_some(client: Client, engine: StreamingEngine, pause_s: float) -> None:
    producer = engine.producer(ProducerConfig(request_timeout=f"{TIMEOUT_S:.0f}s"))
    name = client.producer_name()
    room = asyncio.Semaphore(UNACKNOWLEDGED_MAX)

    async def settle(write: str, pending: Awaitable[object]) -> None:
        try:
            await client.settle(write, pending)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(SENDS_PER_PRODUCER):
            if client.stopping.is_set():
                break
            await room.acquire()
            partition, value = client.rng.randrange(client.partitions), client.value()
            write = client.recorder.send(name, partition, value)
            message = Message(key=key_of(partition, client.partitions), payload=value)
            try:
                pending = await producer.send(TOPIC, message)
            except Refused as error:
                client.recorder.note("sent", id=write, outcome="refused", reason=repr(error))
                room.release()
                await asyncio.sleep(PAUSE_S)
            else:
                tasks.create_task(settle(write, pending))
            await asyncio.sleep(client.rng.uniform(0, 2 * pause_s))
    await producer.close()


async def dequeue(client: Client, life_s: float) -> None:
    """Reads everything from the beginning, again and again; the last reader goes on to the end."""
    engine = await client.engine()
    loop = asyncio.get_running_loop()
    while not client.ends.done():
        reader = client.reader_name()
        config = SubscribeConfig(start=Offset.EARLIEST)
        async with Subscribed(engine, config) as subscriber:
            until = loop.time() + life_s
            while not client.ends.done() and loop.time() < until:
                await _poll(client, subscriber, reader)
            if client.ends.done():
                await _finish(client, subscriber, reader)
    await engine.close()


class Subscribed:
    """A subscriber that is started, however long that takes."""

    def __init__(
        self, engine: StreamingEngine, config: SubscribeConfig, topic: str = TOPIC
    ) -> None:
        self._engine = engine
        self._config = config
        self._topic = topic

    async def __aenter__(self) -> Subscriber:
        while True:
            self._subscriber = self._engine.subscribe(self._topic, self._config)
            try:
                return await self._subscriber.__aenter__()
            except TopicNotFound:
                raise
            except (Refused, OutcomeUnknown):
                await self._subscriber.close()
                await asyncio.sleep(PAUSE_S)

    async def __aexit__(self, *_: object) -> None:
        await self._subscriber.close()


async def _poll(client: Client, subscriber: Subscriber, reader: str) -> None:
    try:
        messages = await subscriber.poll(timeout=POLL_S)
    except (OffsetOutOfRange, TopicNotFound) as error:
        client.recorder.note("denied", what=f"reader {reader} was told: {error}")
        await asyncio.sleep(PAUSE_S)
        return
    except (Refused, OutcomeUnknown):
        await asyncio.sleep(PAUSE_S)
        return
    if messages:
        records = [(found.partition, found.offset, found.payload) for found in messages]
        client.recorder.note("polled", reader=reader, records=records)


async def _finish(client: Client, subscriber: Subscriber, reader: str) -> None:
    """Read up to the ends, or say what is missing at the deadline."""
    ends = client.ends.result()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + FINISH_S
    while any(subscriber.positions.get(p, 0) < end for p, end in ends.items()):
        if loop.time() > deadline:
            client.recorder.note("unfinished", reader=reader, positions=subscriber.positions)
            return
        await _poll(client, subscriber, reader)


FINISH_S: Final = 45.0
"""In which a reader reaches the end of a healed cluster."""


async def watch(client: Client) -> None:
    """Asks where partitions end: an answer may not be older than what was known before."""
    engine = await client.engine()
    while not client.ends.done():
        asked = now_us()
        try:
            found = await engine.offsets(TOPIC, timeout=TIMEOUT_S)
        except TopicNotFound as error:
            client.recorder.note("denied", what=f"the watcher was told: {error}")
        except (Refused, OutcomeUnknown):
            pass
        else:
            ends = {partition: one.high_watermark for partition, one in found.items()}
            client.recorder.note("offsets", asked=asked, ends=ends)
        await asyncio.sleep(client.rng.uniform(0, 2 * POLL_S))
    await engine.close()


async def guarded(client: Client, work: Awaitable[None]) -> None:
    """What the library never promised to raise is written down."""
    try:
        await work
    except AegisError as error:
        client.recorder.note("error", who=client.name, what=f"{type(error).__name__}: {error}")
        raise
    except Exception as error:
        client.recorder.note("error", who=client.name, what=repr(error))
        raise


_KEYS: dict[tuple[int, int], str] = {}


def key_of(partition: int, partitions: int) -> str:
    """A key that lands in that partition."""
    known = _KEYS.get((partition, partitions))
    if known is None:
        number = 0
        while partition_for(str(number).encode(), partitions) != partition:
            number += 1
        known = _KEYS[partition, partitions] = str(number)
    return known
