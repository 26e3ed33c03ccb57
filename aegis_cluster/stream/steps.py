"""Steps of a task that keep nothing: each takes columns and hands columns on.

A step is an operator at work. `process` takes a batch of one of its inputs; `finish` says that the
batch is over and how far event time has come. Steps are finished in the order of the topology.
"""

from __future__ import annotations

from inspect import isawaitable, iscoroutinefunction
from itertools import compress
from typing import TYPE_CHECKING, Any, Final, Protocol

from aegis_cluster.errors import Misuse
from aegis_cluster.stream.by_column import as_columns, from_columns
from aegis_cluster.stream.columns import Columns, joined
from aegis_cluster.stream.pool import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.stream.state import TaskState
    from aegis_cluster.stream.topology import Node

    FailedWindow = tuple[Any, int, int]
    """Key, start and end."""

_FAILED: Final = object()


class Context(Protocol):
    """What a step knows of its task."""

    state: TaskState

    @property
    def origin(self) -> int:
        """Offset of the last record that was read."""

    def failed(
        self, node: Node, origin: int, error: Exception, window: FailedWindow | None = None
    ) -> None:
        """A step failed at the record of this origin, or at a window. Raises `ProcessingFailed`
        to stop."""

    def came_late(self, node: Node, count: int) -> None:
        """Records came after their window's result."""

    def send(self, node: Node, output: int, batch: Columns) -> None:
        """Records leave the task."""


class Step:
    """One operator in one task."""

    adds_delay = 0
    """How far its results may lie behind its own watermark, milliseconds."""

    def __init__(self, node: Node, context: Context) -> None:
        self.node = node
        self.context = context
        self.next: dict[int, list[tuple[Step, int]]] = {}
        """By output: the steps that it feeds, and as which of their inputs."""
        self.delay = 0
        """How far its watermark lies behind the task's."""
        self.shifts: list[int] = []
        """By input: how far its marks lie before this step's."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        raise NotImplementedError

    async def finish(self, mark: int) -> None:
        """All of a batch is here; event time has come to `mark` for this step."""

    def flush(self) -> None:
        """Write cached state to the store."""

    def query(self, key: Any) -> Any:
        """What it keeps for a key; None where it keeps nothing."""
        return None

    async def emit(self, batch: Columns, output: int = 0) -> None:
        """Hand records on."""
        if not len(batch):
            return
        for step, index in self.next.get(output, ()):
            shift = step.shifts[index]
            if shift:
                late = [mark - shift for mark in batch.marks]
                await step.process(
                    Columns(
                        batch.keys, batch.values, batch.times, late, batch.origins, batch.windows
                    ),
                    index,
                )
            else:
                await step.process(batch, index)


class Root(Step):
    """Where a task begins."""

    async def process(self, batch: Columns, index: int) -> None:
        """Output `index` is one of a repartition topic's."""
        await self.emit(batch, index)


class Caller:
    """Calls a user's function for each record, plain or async, and deals with what it raises."""

    def __init__(self, step: Step, function: Callable[..., Any], *, with_key: bool = False) -> None:
        self._step = step
        self._function: Callable[[Any], Any] = function
        self._with_key = with_key
        self._is_async: bool | None = True if iscoroutinefunction(function) else None
        if with_key:
            self._function = lambda pair: function(*pair)

    async def over(self, batch: Columns) -> tuple[Columns, list[Any]]:
        """The records at which it did not fail, and what it returned for them."""
        values = batch.values
        items: Sequence[Any] = (
            list(zip(batch.keys, values, strict=True)) if self._with_key else values
        )
        results: list[Any] = []
        has_failed = False
        while len(results) < len(items):
            try:
                await self._go_on(items, results)
            except Exception as error:  # noqa: BLE001 - whatever the user's function raises
                self._step.context.failed(self._step.node, batch.origins[len(results)], error)
                results.append(_FAILED)
                has_failed = True
        if not has_failed:
            return batch, results
        good = [result is not _FAILED for result in results]
        return batch.chosen(good), list(compress(results, good))

    async def _go_on(self, items: Sequence[Any], results: list[Any]) -> None:
        """Add results until the end, or until it raises."""
        add, function = results.append, self._function
        at = len(results)
        if self._is_async is None:
            first = function(items[at])
            self._is_async = isawaitable(first)
            add(await first if self._is_async else first)
            at += 1
        rest = items[at:] if at else items
        if self._is_async:
            for item in rest:
                add(await function(item))
        else:
            for item in rest:
                add(function(item))


class _Calling(Step):
    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        with_key = getattr(node.spec, "with_key", False)
        self._caller = Caller(self, node.spec.function, with_key=with_key)


class FilterStep(_Calling):
    """Keeps what the function says yes to."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        batch, wanted = await self._caller.over(batch)
        await self.emit(batch.chosen(wanted))


class MapStep(_Calling):
    """Other values."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        batch, values = await self._caller.over(batch)
        await self.emit(batch.with_values(values))


class PeekStep(_Calling):
    """Looks on; also a sink that is a function."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        batch, _ = await self._caller.over(batch)
        await self.emit(batch)


class KeyByStep(_Calling):
    """Other keys."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        batch, keys = await self._caller.over(batch)
        await self.emit(batch.with_keys(keys))


class FlatMapStep(_Calling):
    """Any number of values for each."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        batch, found = await self._caller.over(batch)
        places: list[int] = []
        values: list[Any] = []
        for place, some in enumerate(found):
            try:
                new = list(some)
            except Exception as error:  # noqa: BLE001 - a user's generator runs here
                self.context.failed(self.node, batch.origins[place], error)
                continue
            values += new
            places += [place] * len(new)
        await self.emit(batch.taken(places).with_values(values))


class MapBatchesStep(Step):
    """Other values, a whole batch at a time."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`; a failure concerns all of them."""
        spec = self.node.spec
        try:
            made = spec.function(as_columns(batch.values, spec.columns))
            found = from_columns(await made if isawaitable(made) else made, spec.columns)
            values = list(found)
            if len(values) != len(batch):
                raise Misuse(
                    f"The function of {self.node.name} returned {len(values)} values for"
                    f" {len(batch)}; map_batches needs one for each."
                )
        except Exception as error:  # noqa: BLE001 - whatever the user's function raises
            for origin in dict.fromkeys(batch.origins):
                self.context.failed(self.node, origin, error)
            return
        await self.emit(batch.with_values(values))


class WriteRowsStep(Step):
    """A sink that is a database."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`; a failure concerns all of them."""
        target = self.node.spec.target
        try:
            await target.write(list(map(target.row, batch.keys, batch.values)))
        except Exception as error:  # noqa: BLE001 - whatever the database raises
            for origin in dict.fromkeys(batch.origins):
                self.context.failed(self.node, origin, error)


class PooledMapStep(Step):
    """Other values, made in other processes."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        spec = self.node.spec
        good: list[bool] = []
        values: list[Any] = []
        for origin, (value, error) in zip(
            batch.origins,
            await mapped(spec.function, batch.values, spec.processes),
            strict=True,
        ):
            good.append(error is None)
            if error is None:
                values.append(value)
            else:
                self.context.failed(self.node, origin, error)
        await self.emit(batch.chosen(good).with_values(values))


class BranchStep(Step):
    """To the output of the first condition that holds."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._callers = [Caller(self, condition) for condition in node.spec.conditions]

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        for output, caller in enumerate(self._callers):
            batch, found = await caller.over(batch)
            await self.emit(batch.chosen(found), output)
            batch = batch.chosen(not one for one in found)
        await self.emit(batch, len(self._callers))


class GatheringStep(Step):
    """Has several inputs: waits for all of a batch and takes it in the order in which it was
    read."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._parts: list[tuple[int, Columns]] = []

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        self._parts.append((index, batch))

    def take(self) -> tuple[Columns, list[int]]:
        """All records, and of which input each is."""
        parts = sorted(self._parts, key=lambda part: part[0])
        self._parts = []
        if not parts:
            return Columns.empty(), []
        numbered = [batch.with_values([(i, v) for v in batch.values]) for i, batch in parts]
        whole = joined(numbered)
        sides = [side for side, _ in whole.values]
        return whole.with_values([value for _, value in whole.values]), sides


class MergeStep(GatheringStep):
    """Several streams as one."""

    async def finish(self, mark: int) -> None:
        """All of a batch is here."""
        whole, _ = self.take()
        await self.emit(whole)


class SendStep(Step):
    """Records leave the task, to a topic."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        self.context.send(self.node, index, batch)
