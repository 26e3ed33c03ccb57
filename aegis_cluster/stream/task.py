"""A task: everything that is done with one partition of one topic, as a plain object.

Records go in; what leaves, what changes in the state and what could not be processed is collected
until `take` hands it over. No clock, no socket, no chance: the same records give the same results,
wherever batches end. (It is `async` only because users' functions may be.)

The event-time watermark is the largest event time seen in the partition. Behind a repartition
topic it is the smallest of those of all tasks that write to it, which they put between their
records. `follow` moves it from outside: for a partition that is idle while others go on.

The rules it protects: everything is taken in the order of the partition; state, watermark and
position are saved together, so a task that starts from them goes on as if nothing had happened.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from aegis_cluster.errors import AegisError, UnsupportedPayload
from aegis_cluster.stream import topology as spec
from aegis_cluster.stream.codec import pack, unpack
from aegis_cluster.stream.columns import Columns
from aegis_cluster.stream.errors import ProcessingFailed, TopologyChanged
from aegis_cluster.stream.event_time import PROCESSING_TIME, time_reader
from aegis_cluster.stream.join_steps import (
    RunningAggregateStep,
    StreamJoinStep,
    TableJoinStep,
    TableLookupStep,
    TableStep,
)
from aegis_cluster.stream.state import NO_TIME, TaskState
from aegis_cluster.stream.steps import (
    BranchStep,
    FilterStep,
    FlatMapStep,
    KeyByStep,
    MapBatchesStep,
    MapStep,
    MergeStep,
    PeekStep,
    PooledMapStep,
    Root,
    SendStep,
    WriteRowsStep,
)
from aegis_cluster.stream.window_steps import window_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aegis_cluster.stream.state import Store
    from aegis_cluster.stream.steps import FailedWindow, Step
    from aegis_cluster.stream.topology import Node, Topology

SAVED: Final = b"\xff\xffsaved"
"""Where a task's own progress lies, after all keys of steps."""

_STEPS: Final[dict[type[Any], Callable[[Any, Any], Step]]] = {
    spec.Filter: FilterStep,
    spec.Map: MapStep,
    spec.FlatMap: FlatMapStep,
    spec.Peek: PeekStep,
    spec.MapBatches: MapBatchesStep,
    spec.PooledMap: PooledMapStep,
    spec.WriteRows: WriteRowsStep,
    spec.KeyBy: KeyByStep,
    spec.Branch: BranchStep,
    spec.Merge: MergeStep,
    spec.Repartition: SendStep,
    spec.Sink: SendStep,
    spec.WindowAggregate: window_step,
    spec.RunningAggregate: RunningAggregateStep,
    spec.TableOf: TableStep,
    spec.StreamJoin: StreamJoinStep,
    spec.TableLookup: TableLookupStep,
    spec.TableJoin: TableJoinStep,
}


class Records(Protocol):
    """Neighbouring records of the task's partition, as columns; a `MessageBatch` is one."""

    @property
    def offsets(self) -> list[int]:
        """Rising."""

    @property
    def timestamps(self) -> list[int]:
        """Milliseconds since 1970."""

    @property
    def keys(self) -> Sequence[Any]:
        """As they were published."""

    @property
    def values(self) -> list[Any]:
        """As they were published."""

    @property
    def columns(self) -> Any:
        """As they are stored; None where they never were."""


class Sent(NamedTuple):
    """Records for a sink's topic, or for input `output` of a repartition topic."""

    node: Node
    output: int
    batch: Columns


class Dead(NamedTuple):
    """A record, or a window (key, start, end), at which a step failed."""

    step: str
    offset: int
    error: Exception
    window: FailedWindow | None


class Taken(NamedTuple):
    """What a task has done since it was last asked. marks: new watermarks of what it writes to
    repartition topics, by node number."""

    sent: list[Sent]
    dead: list[Dead]
    marks: dict[int, int]


class Task:
    """One partition's work. Belongs to one caller at a time."""

    def __init__(
        self,
        topology: Topology,
        topic: str,
        partition: int,
        store: Store,
        *,
        on_error: str = "stop",
        writers: Iterable[str] = (),
    ) -> None:
        """writers: the names of the tasks that write to this repartition topic.

        Raises `TopologyChanged` where the state in the store is of another topology.
        """
        self.topic = topic
        self.partition = partition
        self.state = TaskState(store)
        self.position = 0
        """Offset of the next record to be processed."""
        self.watermark = NO_TIME
        """How far event time has come."""
        self.origin = -1
        self._now_ms = 0
        self.processed = 0
        self.late: Counter[str] = Counter()
        """Records that came too late, by step."""
        self.failures: Counter[str] = Counter()
        self._topology = topology
        self._on_error = on_error
        self._shape = topology.shape_of(topic)
        self._marks_told: dict[int, int] = {}
        self._sent: list[Sent] = []
        self._dead: list[Dead] = []
        self._roots = topology.roots(topic)
        self._writers: dict[str, int] = dict.fromkeys(writers, NO_TIME)
        """Watermarks of the tasks that write to this repartition topic."""
        self.is_behind_repartition = topic in topology.repartitions
        self._load()
        self._steps = self._wired()
        self._readers = [
            None if isinstance(root.spec, spec.Repartition) else time_reader(root.spec.timestamp)
            for root in self._roots
        ]

    @property
    def name(self) -> str:
        """Unique in its application."""
        return f"{self.topic}/{self.partition}"

    @property
    def known_watermark(self) -> int | None:
        """How far event time has come; None when nothing is known yet."""
        return None if self.watermark == NO_TIME else self.watermark

    # ---- records

    @property
    def goes_by_clock(self) -> bool:
        """Its time is that of processing, so its watermark is the present moment."""
        return any(
            isinstance(root.spec, spec.Source) and root.spec.timestamp is PROCESSING_TIME
            for root in self._roots
        )

    async def process(self, records: Records, now_ms: int = 0) -> None:
        """Take records of the partition, in order. now_ms: the present moment, for those that go by
        the time of processing. Raises `ProcessingFailed` to stop: what it did since the last commit
        is then void."""
        self._now_ms = now_ms
        offsets = records.offsets
        self.origin = offsets[-1]
        if self.is_behind_repartition:
            await self._process_repartitioned(records)
        else:
            before = self.watermark
            for root, reader in zip(self._roots, self._readers, strict=True):
                await self._process_source(root, reader, records, before)
        self.position = self.origin + 1
        self.processed += len(offsets)
        await self._finish()

    async def follow(self, watermark: int) -> None:
        """Event time has come so far elsewhere, and this partition does not hold it back."""
        if watermark > self.watermark:
            self.watermark = watermark
            await self._finish()

    async def _process_source(
        self, root: Node, reader: Callable[[Any], int] | None, records: Records, before: int
    ) -> None:
        keys, values, offsets = list(records.keys), records.values, records.offsets
        if root.spec.reader is not None and records.columns is not None:
            batch = self._specially(root, records)
        elif reader is None:
            by_clock = root.spec.timestamp is PROCESSING_TIME
            times = [self._now_ms] * len(offsets) if by_clock else list(records.timestamps)
            batch = Columns(keys, values, times, [], offsets)
        else:
            batch = self._timed(root, reader, Columns(keys, values, [], [], offsets))
        marks = list(accumulate(batch.times, max, initial=before))[1:]
        batch.marks = marks
        if marks:
            self.watermark = max(self.watermark, marks[-1])
            await self._steps[root.number].process(batch, 0)

    def _specially(self, root: Node, records: Records) -> Columns:
        """Of a topic whose records are no plain messages."""
        batch = Columns.empty()
        try:
            for offset, key, value, time in root.spec.reader.read(records):
                batch.add(key, value, time, 0, offset)
        except Exception as error:  # noqa: BLE001 - whatever stands in the topic
            for offset in records.offsets:
                self.failed(root, offset, error)
            return Columns.empty()
        return batch

    def _timed(self, root: Node, reader: Callable[[Any], int], batch: Columns) -> Columns:
        times: list[int] = []
        places: list[int] = []
        for place, value in enumerate(batch.values):
            try:
                times.append(reader(value))
            except Exception as error:  # noqa: BLE001 - it may be a function of the user's
                self.failed(root, batch.origins[place], error)
            else:
                places.append(place)
        if len(places) == len(batch):
            return Columns(batch.keys, batch.values, times, [], batch.origins)
        return Columns(
            [batch.keys[place] for place in places],
            [batch.values[place] for place in places],
            times,
            [],
            [batch.origins[place] for place in places],
        )

    async def _process_repartitioned(self, records: Records) -> None:
        (root,) = self._roots
        outputs = len(root.inputs)
        parts = [Columns.empty() for _ in range(outputs)]
        for value, origin in zip(records.values, records.offsets, strict=True):
            kind, *rest = unpack(value)
            if kind == MARK:
                writer, mark = rest
                if mark > self._writers.get(writer, NO_TIME):
                    self._writers[writer] = mark
                    self.watermark = max(self.watermark, min(self._writers.values()))
            else:
                key, payload, time = rest
                parts[kind].add(key, payload, time, self.watermark, origin)
        for output, batch in enumerate(parts):
            if len(batch):
                await self._steps[root.number].process(batch, output)

    async def _finish(self) -> None:
        for step in self._steps.values():
            await step.finish(self.watermark - step.delay)

    # ---- for the steps

    def failed(
        self, node: Node, origin: int, error: Exception, window: FailedWindow | None = None
    ) -> None:
        """A step failed at a record, or at a window. Raises `ProcessingFailed` to stop."""
        self.failures[node.name] += 1
        if self._on_error == "stop":
            where = f"the record at offset {origin} of {self.name}"
            if window is not None:
                where = f"the window of key {window[0]!r:.80} that begins at {window[1]} ms"
            raise ProcessingFailed(
                f"{node.name} failed at {where}: {_told(error)}. Mend the step, or choose"
                " on_error='skip' or 'dead_letter'.",
                step=node.name,
                topic=self.topic,
                partition=self.partition,
                offset=origin,
            ) from error
        if self._on_error == "dead_letter":
            self._dead.append(Dead(node.name, origin, error, window))

    def came_late(self, node: Node, count: int) -> None:
        """Records came after their window's result."""
        self.late[node.name] += count

    def send(self, node: Node, output: int, batch: Columns) -> None:
        """Records leave the task."""
        self._sent.append(Sent(node, output, batch))

    # ---- for the caller

    def take(self) -> Taken:
        """What was done since the last time."""
        marks = self._new_marks()
        self._marks_told |= marks
        taken = Taken(self._sent, self._dead, marks)
        self._sent, self._dead = [], []
        return taken

    @property
    def has_done_something(self) -> bool:
        """Whether there is anything to take or to save."""
        return bool(self._sent or self._dead or self.state.changes or self._new_marks())

    def _new_marks(self) -> dict[int, int]:
        """Watermarks that have moved, of what it writes to repartition topics, by node number."""
        found = {}
        for number, step in self._steps.items():
            is_end = isinstance(step, SendStep) and isinstance(step.node.spec, spec.Repartition)
            mark = self.watermark - step.delay
            if is_end and mark > self._marks_told.get(number, NO_TIME):
                found[number] = mark
        return found

    def save(self) -> dict[bytes, bytes | None]:
        """Write everything to the store; returns what changed there since the last time. Raises
        `UnsupportedPayload` for values that the state cannot keep."""
        for step in self._steps.values():
            try:
                step.flush()
            except UnsupportedPayload as error:
                raise UnsupportedPayload(f"{step.node.name}, in {self.name}: {error}") from error
        saved = [self.position, self.watermark, self._writers, self._shape]
        if self._shape:
            self.state.put(SAVED, pack(saved))
        changes, self.state.changes = self.state.changes, {}
        return changes

    def range(self, low: Any, high: Any, step: str | None = None) -> dict[str, dict[Any, Any]]:
        """Of each table and aggregate without windows, or of the one named: what it has for keys
        from `low` to `high`, both included; None: without an end."""
        return {
            one.node.name: one.between(low, high)
            for one in self._steps.values()
            if isinstance(one, TableStep | RunningAggregateStep) and step in (None, one.node.name)
        }

    def query(self, key: Any, step: str | None = None) -> dict[str, Any]:
        """What each step that keeps state, or the one named, has for a key."""
        return {
            one.node.name: found
            for one in self._steps.values()
            if one.node.is_stateful and step in (None, one.node.name)
            if (found := one.query(key)) not in (None, {})
        }

    # ---- building

    def _load(self) -> None:
        data = self.state.get(SAVED)
        if data is None:
            return
        position, watermark, writers, shape = unpack(data)
        if shape != self._shape:
            raise TopologyChanged(_difference(self._topology, self.topic, shape, self._shape))
        self.position, self.watermark = position, watermark
        self._writers |= writers

    def _wired(self) -> dict[int, Step]:
        roots = {root.number for root in self._roots}
        steps: dict[int, Step] = {}
        for node in self._topology.steps(self.topic):
            if node.number in roots:
                steps[node.number] = Root(node, self)
                continue
            step = steps[node.number] = _STEPS[type(node.spec)](node, self)
            inputs = [(i, port) for i, port in enumerate(node.inputs) if port.node in steps]
            delays = {i: _delay_after(steps[port.node], port.output) for i, port in inputs}
            step.delay = max(delays.values())
            step.shifts = [step.delay - delays.get(i, step.delay) for i in range(len(node.inputs))]
            for index, port in inputs:
                steps[port.node].next.setdefault(port.output, []).append((step, index))
        return steps


MARK: Final = -1
"""Kind of what a task writes to a repartition topic to say how far it has come; the others are
records, and the input they are for."""


def packed_mark(writer: str, mark: int) -> bytes:
    """A watermark between the records of a repartition topic."""
    return pack([MARK, writer, mark])


def packed_record(output: int, key: Any, value: Any, time: int) -> bytes:
    """A record of a repartition topic. Raises `UnsupportedPayload`."""
    return pack([output, key, value, time])


def _delay_after(step: Step, output: int) -> int:
    return step.delay + (step.adds_delay if output == 0 else 0)


def _told(error: Exception) -> str:
    if isinstance(error, AegisError):
        return str(error).rstrip(".")
    return f"{type(error).__name__}: {error}".rstrip(": .")


def _difference(topology: Topology, topic: str, old: dict[str, str], new: dict[str, str]) -> str:
    numbers = sorted(set(old) | set(new), key=int)
    number = next(n for n in numbers if old.get(n) != new.get(n))
    return (
        f"The state of {topology.application_id} for {topic} was written by another topology: step"
        f" {number} was {old.get(number, 'none')!r} and is {new.get(number, 'none')!r}. Put the"
        " topology back, or give the new one another application_id."
    )
