"""Runs a processor's topology in memory: no cluster, no clock, no files.

    driver = TopologyTestDriver(processor)
    driver.pipe("raw-events", {"type": "purchase"}, key="anna", timestamp=0)
    driver.read("purchase-metrics")     # the messages that have come out since the last read

Tasks, state and event time are those of a running processor; repartition topics lead straight back.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict, deque
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from aegis_cluster.errors import AegisError, Misuse
from aegis_cluster.message import Message, ReceivedMessage
from aegis_cluster.stream.codec import pack, unpack
from aegis_cluster.stream.event_time import milliseconds
from aegis_cluster.stream.outgoing import dead_message, result_message
from aegis_cluster.stream.state import MemoryStore
from aegis_cluster.stream.task import Task, packed_mark, packed_record
from aegis_cluster.stream.topology import PooledMap, Repartition, WriteRows
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.payload import decode_payload, encode_key, encode_payload

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable
    from datetime import datetime

    from aegis_cluster.stream.columns import Columns
    from aegis_cluster.stream.processor import StreamProcessor
    from aegis_cluster.stream.task import Dead, Sent
    from aegis_cluster.stream.topology import Node


@dataclass(frozen=True, slots=True)
class _Batch:
    offsets: list[int]
    timestamps: list[int]
    keys: list[Any]
    values: list[Any]
    columns: None = None
    """So values are taken as they were piped, also of feeds and event stores."""


class TopologyTestDriver:
    """One processor in memory; not for several threads.

    partitions: of every topic it reads; a record's key says which. It keeps `on_error` of the
    processor: `"stop"` raises `ProcessingFailed` from `pipe`, dead letters are read from their
    topic.
    """

    def __init__(self, processor: StreamProcessor, *, partitions: int = 1) -> None:
        if partitions < 1:
            raise Misuse(f"partitions = {partitions}; a topic has 1 or more.")
        self._topology = processor.topology
        self._settings = processor.settings
        self._dead_topic = processor.dead_letter_topic
        self._partitions = partitions
        self._is_async = any(map(_is_async, self._topology.nodes))
        self._stores: dict[tuple[str, int], MemoryStore] = {}
        self._tasks: dict[tuple[str, int], Task] = {}
        self._ends: dict[tuple[str, int], int] = defaultdict(int)
        self._inputs: dict[tuple[str, int], dict[int, ReceivedMessage]] = defaultdict(dict)
        self._waiting: deque[tuple[str, int, _Batch]] = deque()
        self._outputs: dict[str, list[Message]] = defaultdict(list)
        for topic in self._topology.task_topics:
            for partition in range(partitions):
                self._stores[topic, partition] = MemoryStore()
                self._tasks[topic, partition] = self._task(topic, partition)

    def _task(self, topic: str, partition: int) -> Task:
        writers = [
            f"{other}/{number}"
            for other in self._topology.upstream(topic)
            for number in range(self._partitions)
        ]
        store = self._stores[topic, partition]
        on_error = self._settings.on_error
        return Task(self._topology, topic, partition, store, on_error=on_error, writers=writers)

    # ---- records

    def pipe(
        self,
        topic: str,
        value: Any,
        *,
        key: str | bytes | None = None,
        timestamp: float | datetime | None = None,
        partition: int | None = None,
    ) -> None:
        """Publish one message to a source topic, and process all that comes of it.

        timestamp: the message's, in seconds since 1970 or as an aware `datetime`; None: 0.
        partition: None: the key's. Raises `Misuse` for a topic that is no source, and what the
        processor stops at (`ProcessingFailed`).
        """
        time = 0 if timestamp is None else milliseconds(timestamp, "timestamp")
        self._publish(topic, [(key, value, time)], partition)
        self._run()

    def pipe_many(
        self, topic: str, messages: Iterable[Message], *, partition: int | None = None
    ) -> None:
        """Publish messages to a source topic as one batch (for each partition) and process them."""
        rows = [
            (m.key, m.payload, 0 if m.timestamp is None else milliseconds(m.timestamp, "timestamp"))
            for m in messages
        ]
        self._publish(topic, rows, partition)
        self._run()

    def _publish(self, topic: str, rows: list[tuple[Any, Any, int]], partition: int | None) -> None:
        if topic not in self._topology.source_topics:
            raise Misuse(
                f"{topic!r} is no source of this topology; these are:"
                f" {', '.join(self._topology.source_topics)}."
            )
        by_partition: dict[int, _Batch] = {}
        for key, value, time in rows:
            name, _ = encode_key(key)
            chosen = 0 if name is None else partition_for(name, self._partitions)
            number = chosen if partition is None else partition
            if not 0 <= number < self._partitions:
                raise Misuse(f"partition = {number}; the driver has {self._partitions}.")
            batch = by_partition.setdefault(number, _Batch([], [], [], []))
            data, headers = encode_payload(value)
            self._append(topic, number, batch, (key, decode_payload(data, headers), time))
        for number, batch in sorted(by_partition.items()):
            self._waiting.append((topic, number, batch))

    def _append(self, topic: str, partition: int, batch: _Batch, row: tuple[Any, Any, int]) -> None:
        place = topic, partition
        offset = self._ends[place]
        self._ends[place] += 1
        key, value, time = row
        batch.offsets.append(offset)
        batch.keys.append(key)
        batch.values.append(value)
        batch.timestamps.append(time)
        self._inputs[place][offset] = ReceivedMessage(
            key, value, topic=topic, partition=partition, offset=offset, time_ms=time
        )

    def advance(self, time: float | datetime) -> None:
        """Event time has come so far in every partition of the sources, without a record."""
        mark = milliseconds(time, "time")
        for (topic, _), task in self._tasks.items():
            if topic in self._topology.source_topics:
                self._drive(task.follow(mark))
                self._collect(task)
        self._run()

    def crash(self) -> None:
        """Lose everything that is not in the state: every task is made anew from its store."""
        for place in self._tasks:
            self._tasks[place] = self._task(*place)

    # ---- what comes out

    def read(self, topic: str) -> list[Message]:
        """What has been sent to a topic since it was last read."""
        return self._outputs.pop(topic, [])

    def query(self, key: Any, step: str | None = None) -> dict[str, Any]:
        """What the steps that keep state have for a key, by step."""
        found: dict[str, Any] = {}
        for task in self._tasks.values():
            found |= task.query(key, step)
        return found

    def range(
        self, low: Any = None, high: Any = None, step: str | None = None
    ) -> dict[str, dict[Any, Any]]:
        """What tables and aggregates without windows have for keys from `low` to `high`, both
        included, by step."""
        found: dict[str, dict[Any, Any]] = {}
        for task in self._tasks.values():
            for name, rows in task.range(low, high, step).items():
                found.setdefault(name, {}).update(rows)
        return {name: dict(sorted(rows.items())) for name, rows in found.items()}

    @property
    def late(self) -> dict[str, int]:
        """How many records came too late, by step."""
        found: dict[str, int] = defaultdict(int)
        for task in self._tasks.values():
            for step, count in task.late.items():
                found[step] += count
        return dict(found)

    # ---- inside

    def _run(self) -> None:
        while self._waiting:
            topic, partition, batch = self._waiting.popleft()
            task = self._tasks[topic, partition]
            # Time goes by the message's where a topology goes by the clock.
            self._drive(task.process(batch, max(batch.timestamps, default=0)))
            self._collect(task)

    def _drive(self, work: Coroutine[Any, Any, None]) -> None:
        """To its end; without async functions nothing in it ever waits, so it needs no event loop
        and may be called within one."""
        if self._is_async:
            asyncio.run(work)
            return
        try:
            work.send(None)
        except StopIteration:
            return
        work.close()
        raise Misuse(
            "A function of this processor waits for something and is not declared with 'async def';"
            " the driver knows async functions by that."
        )

    def _collect(self, task: Task) -> None:
        taken = task.take()
        for sent in taken.sent:
            if isinstance(sent.node.spec, Repartition):
                self._loop_back(sent)
            else:
                self._outputs[sent.node.spec.topic] += self._messages(task, sent)
        for number, mark in taken.marks.items():
            topic = self._topology.repartition_topic(self._topology.nodes[number])
            for partition in range(self._partitions):
                self._feed(topic, partition, b"", packed_mark(task.name, mark))
        for dead in task.take().dead + taken.dead:
            self._outputs[self._dead_topic].append(self._dead(task, dead))
        task.save()

    def _messages(self, task: Task, sent: Sent) -> list[Message]:
        batch = sent.batch
        windows = batch.windows or [None] * len(batch)
        found = []
        rows = zip(batch.keys, batch.values, batch.times, windows, batch.origins, strict=True)
        for key, value, time, window, origin in rows:
            try:
                message = result_message(key, value, time, window)
                encode_payload(value)
            except AegisError as error:
                task.failed(sent.node, origin, error)
            else:
                found.append(message)
        return found

    def _dead(self, task: Task, dead: Dead) -> Message:
        original: Message = self._inputs[task.topic, task.partition][dead.offset]
        if task.is_behind_repartition:
            _, key, payload, _ = unpack(original.payload)
            original = Message(key, payload)
        return dead_message(dead, task.topic, task.partition, original)

    def _loop_back(self, sent: Sent) -> None:
        topic = self._topology.repartition_topic(sent.node)
        batch: Columns = sent.batch
        for key, value, time in zip(batch.keys, batch.values, batch.times, strict=True):
            name = pack(key)
            partition = partition_for(name, self._partitions)
            self._feed(topic, partition, name, packed_record(sent.output, key, value, time))

    def _feed(self, topic: str, partition: int, key: bytes, value: bytes) -> None:
        batch = _Batch([], [], [], [])
        self._append(topic, partition, batch, (key, value, 0))
        self._waiting.append((topic, partition, batch))


def _is_async(node: Node) -> bool:
    """Whether one of a node's functions is declared with `async def`."""
    values = [getattr(node.spec, field.name) for field in dataclasses.fields(node.spec)]
    found = [value for one in values for value in (one if isinstance(one, tuple) else (one,))]
    is_waiting = isinstance(node.spec, PooledMap | WriteRows)
    return is_waiting or any(map(iscoroutinefunction, found))
