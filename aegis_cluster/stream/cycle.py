"""What tasks have done since the last commit, turned into messages.

The rule it protects: within a partition, what a task sends stands before the watermark that comes
after it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.client.producer import RECORD_OVERHEAD_BYTES, Columns, row_bytes
from aegis_cluster.errors import AegisError, MessageTooLarge
from aegis_cluster.message import Message, from_ms, now_ms, to_row
from aegis_cluster.stream.changelog import record_key
from aegis_cluster.stream.codec import pack, unpack
from aegis_cluster.stream.outgoing import dead_message, result_columns, result_message
from aegis_cluster.stream.task import packed_mark, packed_record
from aegis_cluster.stream.topology import Repartition

if TYPE_CHECKING:
    from aegis_cluster.stream.layout import Layout
    from aegis_cluster.stream.task import Dead, Records, Sent, Task


class Outgoing(NamedTuple):
    """Messages, or encoded records, for one topic; partition None: by the keys."""

    topic: str
    partition: int | None
    messages: list[Message]
    records: Columns | None


class Cycle:
    """Everything between two commits. Collects, in the order in which it has to be sent."""

    def __init__(self, layout: Layout, dead_letter_topic: str) -> None:
        self._layout = layout
        self._dead_topic = dead_letter_topic
        self._messages: defaultdict[str, list[Message]] = defaultdict(list)
        self._results_in: defaultdict[str, list[Columns]] = defaultdict(list)
        self._keyed: defaultdict[str, tuple[list[bytes], list[bytes]]] = defaultdict(
            lambda: ([], [])
        )
        self._marks: dict[tuple[str, str], int] = {}
        self._changes: list[Outgoing] = []
        self.records = 0
        """Records that were processed."""

    def add(self, task: Task, records: Records | None) -> None:
        """What a task has done just now. records: what it was given, for dead letters.

        Raises `ProcessingFailed` for what cannot be sent.
        """
        taken = task.take()
        for sent in taken.sent:
            if isinstance(sent.node.spec, Repartition):
                self._repartition(task, sent)
            else:
                self._results(task, sent)
        for number, mark in taken.marks.items():
            topic = self._layout.topology.repartition_topic(self._layout.topology.nodes[number])
            self._marks[topic, task.name] = mark
        for dead in [*taken.dead, *task.take().dead]:
            self._messages[self._dead_topic].append(_dead(task, dead, records))

    def _repartition(self, task: Task, sent: Sent) -> None:
        batch = sent.batch
        values, keys = self._keyed[self._layout.topology.repartition_topic(sent.node)]
        rows = zip(batch.keys, batch.values, batch.times, batch.origins, strict=True)
        for key, value, time, origin in rows:
            try:
                packed = packed_record(sent.output, key, value, time)
                name = record_key(pack(key))
            except AegisError as error:
                task.failed(sent.node, origin, error)
                continue
            values.append(packed)
            keys.append(name)

    def _results(self, task: Task, sent: Sent) -> None:
        topic = sent.node.spec.topic
        limit = self._layout.message_bytes[topic]
        columns = result_columns(sent.batch)
        is_small = columns is not None and columns.largest <= limit
        if columns is not None and is_small and not self._messages[topic]:
            self._results_in[topic].append(columns)
            return
        batch = sent.batch
        messages = self._messages[topic]
        windows = batch.windows or [None] * len(batch)
        rows = zip(batch.keys, batch.values, batch.times, windows, batch.origins, strict=True)
        for key, value, time, window, origin in rows:
            try:
                message = result_message(key, value, time, window)
                size = row_bytes(to_row(message, 0)) - RECORD_OVERHEAD_BYTES
                if size > limit:
                    raise MessageTooLarge(
                        f"A result of {size} bytes is over the limit of {topic}: {limit}.",
                        have=size,
                        at_most=limit,
                    )
                messages.append(message)
            except AegisError as error:
                task.failed(sent.node, origin, error)

    def save(self, task: Task, changelog: str) -> None:
        """The task's state as it is now, for the changelog. Raises `UnsupportedPayload`."""
        changes = task.save()
        if changes:
            keys = list(map(record_key, changes))
            records = Columns(now_ms(), keys, list(changes.values()), [])
            self._changes.append(Outgoing(changelog, task.partition, [], records))

    def outgoing(self) -> list[Outgoing]:
        """All of it, in order."""
        found = [
            Outgoing(topic, None, [], columns)
            for topic, parts in self._results_in.items()
            for columns in parts
        ]
        found += [
            Outgoing(topic, None, rows, None) for topic, rows in self._messages.items() if rows
        ]
        now = now_ms()
        found += [
            Outgoing(topic, None, [], Columns(now, keys, values, []))
            for topic, (values, keys) in self._keyed.items()
            if values
        ]
        for (topic, writer), mark in self._marks.items():
            packed = packed_mark(writer, mark)
            found += [
                Outgoing(topic, partition, [], Columns(now, [b""], [packed], []))
                for partition in range(self._layout.partitions[topic])
            ]
        return found + self._changes


def _dead(task: Task, dead: Dead, records: Records | None) -> Message:
    original = Message()
    if records is not None and dead.window is None:
        place = records.offsets.index(dead.offset)
        time = from_ms(max(0, records.timestamps[place]))
        key, value = records.keys[place], records.values[place]
        if task.is_behind_repartition:
            _, key, value, _ = unpack(value)
        original = Message(key, value, timestamp=time)
    return dead_message(dead, task.topic, task.partition, original)
