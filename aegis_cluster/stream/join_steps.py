"""Steps that keep the latest value of a key, and steps that put two inputs together.

Both inputs of a join come through one topic, so they have one order. A pair of streams waits for
its other half as long as the watermark allows; a table is what has been read of it so far.
"""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from aegis_cluster.stream.columns import Columns
from aegis_cluster.stream.errors import WindowTooLarge
from aegis_cluster.stream.state import NO_TIME, Agenda, Cached, key_bytes, split_key
from aegis_cluster.stream.steps import GatheringStep, Step
from aegis_cluster.stream.window_steps import Values

if TYPE_CHECKING:
    from aegis_cluster.stream.steps import Context
    from aegis_cluster.stream.topology import Node

_LEFT, _RIGHT = 0, 1
_PLACE_BYTES = 20
"""Of a value among a key's: event time, origin, number."""


class Expiry:
    """When keys are forgotten that nothing comes for. ttl_ms: None: never."""

    def __init__(self, context: Context, node: int, ttl_ms: int | None) -> None:
        self._ttl_ms = ttl_ms
        self._dues = Cached(context.state, node, b"d")
        self._agenda = Agenda(context.state, node, b"x")

    def touch(self, name: bytes, time: int) -> None:
        """A record of this key has come; an older one than before counts for nothing."""
        if self._ttl_ms is None:
            return
        due, before = time + self._ttl_ms, self._dues.get(name)
        if before is None or before < due:
            if before is not None:
                self._agenda.delete(before, name)
            self._dues.put(name, due)
            self._agenda.put(due, name, True)

    def drop(self, name: bytes) -> None:
        """The key was deleted."""
        if self._ttl_ms is not None and (due := self._dues.get(name)) is not None:
            self._agenda.delete(due, name)
            self._dues.delete(name)

    def over(self, mark: int) -> list[tuple[int, bytes]]:
        """(due, key) of those that are forgotten now."""
        if mark < self._agenda.next_due:
            return []
        found = [(due, name) for due, name, _ in self._agenda.take_until(mark)]
        for _, name in found:
            self._dues.delete(name)
        return found

    def flush(self) -> None:
        """Write cached state to the store."""
        self._dues.flush()
        self._agenda.flush()


class TableStep(Step):
    """The latest value of each key; what comes goes on."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._latest = Cached(context.state, node.number, b"t")
        self._expiry = Expiry(context, node.number, node.spec.ttl_ms)

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        out = Columns.empty()
        rows = zip(batch.keys, batch.values, batch.times, batch.marks, batch.origins, strict=True)
        for key, value, time, mark, origin in rows:
            self._forget(mark, origin, out)
            try:
                name = key_bytes(key)
                _keep(self._latest, name, value)
            except Exception as error:  # noqa: BLE001 - keys are the user's
                self.context.failed(self.node, origin, error)
                continue
            if value is None:
                self._expiry.drop(name)
            else:
                self._expiry.touch(name, time)
            out.add(key, value, time, mark, origin)
        await self.emit(out)

    async def finish(self, mark: int) -> None:
        """Event time has come to `mark`."""
        out = Columns.empty()
        self._forget(mark, self.context.origin, out)
        await self.emit(out)

    def _forget(self, mark: int, origin: int, out: Columns) -> None:
        for due, name in self._expiry.over(mark):
            self._latest.delete(name)
            out.add(split_key(name)[0], None, due, mark, origin)

    def flush(self) -> None:
        """Write cached state to the store."""
        self._latest.flush()
        self._expiry.flush()

    def between(self, low: Any, high: Any) -> dict[Any, Any]:
        """What it has for keys from `low` to `high`, in their order."""
        return _between(self._latest, low, high)

    def query(self, key: Any) -> Any:
        """The latest value."""
        return self._latest.get(key_bytes(key))


def _between(table: Cached, low: Any, high: Any) -> dict[Any, Any]:
    """Looks at every key: their order in the store is that of their length first."""
    found = {}
    for name, value in table.items():
        key, _ = split_key(name)
        if (low is None or key >= low) and (high is None or key <= high):
            found[key] = value
    return dict(sorted(found.items()))


def _keep(table: Cached, name: bytes, value: Any) -> None:
    if value is None:
        table.delete(name)
    else:
        table.put(name, value)


class RunningAggregateStep(Step):
    """The aggregate of each key so far."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._states = Cached(context.state, node.number, b"a")
        self._expiry = Expiry(context, node.number, node.spec.ttl_ms)

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        aggregate, states = self.node.spec.aggregate, self._states
        results: list[Any] = []
        places: list[int] = []
        for place, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
            self._forget(batch.marks[place])
            try:
                name = key_bytes(key)
                found = states.get(name)
                # In a list: a state may be None, and what the store does not have is None too.
                state = aggregate.add(aggregate.initial() if found is None else found[0], value)
                result = aggregate.result(state)
            except Exception as error:  # noqa: BLE001 - aggregates may be the user's
                self.context.failed(self.node, batch.origins[place], error)
                continue
            states.put(name, [state])
            self._expiry.touch(name, batch.times[place])
            results.append(result)
            places.append(place)
        await self.emit(batch.taken(places).with_values(results))

    async def finish(self, mark: int) -> None:
        """Event time has come to `mark`."""
        self._forget(mark)

    def _forget(self, mark: int) -> None:
        for _, name in self._expiry.over(mark):
            self._states.delete(name)

    def flush(self) -> None:
        """Write cached state to the store."""
        self._states.flush()
        self._expiry.flush()

    def between(self, low: Any, high: Any) -> dict[Any, Any]:
        """The aggregates so far of keys from `low` to `high`, in their order."""
        result = self.node.spec.aggregate.result
        found = _between(self._states, low, high)
        return {key: result(state[0]) for key, state in found.items()}

    def query(self, key: Any) -> Any:
        """The aggregate so far."""
        found = self._states.get(key_bytes(key))
        return None if found is None else self.node.spec.aggregate.result(found[0])


class _PairingStep(GatheringStep):
    """Calls the user's function for two values."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._mark = NO_TIME
        self._out = Columns.empty()

    async def finish(self, mark: int) -> None:
        """All of a batch is here; event time has come to `mark`."""
        batch, sides = self.take()
        for place, side in enumerate(sides):
            await self._safely_take(batch, place, side)
        await self._advance(mark, self.context.origin)
        out, self._out = self._out, Columns.empty()
        await self.emit(out)

    async def _safely_take(self, batch: Columns, place: int, side: int) -> None:
        origin = batch.origins[place]
        await self._advance(batch.marks[place], origin)
        try:
            await self._take(batch, place, side)
        except Exception as error:  # noqa: BLE001 - joining functions and keys are the user's
            self.context.failed(self.node, origin, error)

    async def _take(self, batch: Columns, place: int, side: int) -> None:
        raise NotImplementedError

    async def _advance(self, mark: int, origin: int) -> None:
        self._mark = max(self._mark, mark)

    async def _paired(self, left: Any, right: Any) -> Any:
        found = self.node.spec.function(left, right)
        return await found if isawaitable(found) else found


class TableLookupStep(_PairingStep):
    """Each record of the left with what the table on the right has for its key."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._table = Cached(context.state, node.number, b"t")

    async def _take(self, batch: Columns, place: int, side: int) -> None:
        key, value = batch.keys[place], batch.values[place]
        name = key_bytes(key)
        if side == _RIGHT:
            _keep(self._table, name, value)
            return
        found = self._table.get(name)
        if found is not None or self.node.spec.how == "left":
            result = await self._paired(value, found)
            self._out.add(key, result, batch.times[place], batch.marks[place], batch.origins[place])

    def flush(self) -> None:
        """Write cached state to the store."""
        self._table.flush()

    def query(self, key: Any) -> Any:
        """What the table has."""
        return self._table.get(key_bytes(key))


class TableJoinStep(_PairingStep):
    """Two tables as one."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        number = node.number
        self._sides = [Cached(context.state, number, b"l"), Cached(context.state, number, b"r")]
        self._how = node.spec.how

    async def _take(self, batch: Columns, place: int, side: int) -> None:
        key = batch.keys[place]
        name = key_bytes(key)
        before = [table.get(name) for table in self._sides]
        now = list(before)
        now[side] = batch.values[place]
        result = await self._row(now) if self._has_row(now) else None
        _keep(self._sides[side], name, now[side])
        if self._has_row(now) or self._has_row(before):
            self._out.add(key, result, batch.times[place], batch.marks[place], batch.origins[place])

    def _has_row(self, values: list[Any]) -> bool:
        left, right = (value is not None for value in values)
        if self._how == "inner":
            return left and right
        return left if self._how == "left" else left or right

    async def _row(self, values: list[Any]) -> Any:
        return await self._paired(*values)

    def flush(self) -> None:
        """Write cached state to the store."""
        for table in self._sides:
            table.flush()


class StreamJoinStep(_PairingStep):
    """Pairs of two streams that lie no further apart than `within`."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        spec = node.spec
        self._within: int = spec.within_ms
        self._wait = spec.within_ms + spec.grace_ms + 1
        self.adds_delay = self._wait
        self._limit: int = spec.limit
        number = node.number
        self._sides = [Values(context, number, b"l"), Values(context, number, b"r")]
        self._ends = Agenda(context.state, number, b"e")
        """When a value has met all that it can meet: side, key, place."""
        self._tells_alone = [spec.how in ("left", "outer"), spec.how == "outer"]
        self._late = Columns.empty()

    async def finish(self, mark: int) -> None:
        """All of a batch is here; event time has come to `mark`."""
        await super().finish(mark)
        late, self._late = self._late, Columns.empty()
        if len(late):
            self.context.came_late(self.node, len(late))
            await self.emit(late, 1)

    async def _take(self, batch: Columns, place: int, side: int) -> None:
        key, value = batch.keys[place], batch.values[place]
        time, mark, origin = batch.times[place], batch.marks[place], batch.origins[place]
        due = time + self._wait
        if due <= self._mark:
            self._late.add(key, value, time, mark, origin)
            return
        name = key_bytes(key)
        other = self._sides[1 - side]
        first, last = time - self._within, time + self._within
        found = other.between(name, first, last, self._limit + 1)
        if len(found) > self._limit:
            raise WindowTooLarge(
                f"{self.node.name}: more than {self._limit} records of key {key!r:.80} wait to be"
                " joined; join less at once, or give join() a larger limit=.",
                limit=self._limit,
            )
        results = []
        for _, (theirs, _has_met) in found:
            pair = (value, theirs) if side == _LEFT else (theirs, value)
            results.append(await self._paired(*pair))
        own = self._sides[side].place(time, origin)
        self._sides[side].put(name, own, [value, bool(found)])
        self._ends.put(due, bytes([side]) + name + own, True)
        for (place_of, (theirs, has_met)), result in zip(found, results, strict=True):
            if not has_met:
                other.put(name, place_of, [theirs, True])
            pair_time = max(time, _time_in(place_of))
            self._out.add(key, result, pair_time, self._mark - self._wait, origin)

    async def _advance(self, mark: int, origin: int) -> None:
        if mark <= self._mark:
            return
        for due, rest, _ in self._ends.take_until(mark):
            side, name, own = rest[0], rest[1:-_PLACE_BYTES], rest[-_PLACE_BYTES:]
            kept = self._sides[side].get(name, own)
            self._sides[side].delete(name, own)
            if kept is not None and not kept[1] and self._tells_alone[side]:
                await self._tell_alone(side, name, kept[0], due - self._wait, origin)
        self._mark = mark

    async def _tell_alone(self, side: int, name: bytes, value: Any, time: int, origin: int) -> None:
        key, _ = split_key(name)
        pair = (value, None) if side == _LEFT else (None, value)
        try:
            result = await self._paired(*pair)
        except Exception as error:  # noqa: BLE001 - joining functions are the user's
            self.context.failed(self.node, origin, error, (key, time, time))
            return
        self._out.add(key, result, time, self._mark - self._wait, origin)

    def flush(self) -> None:
        """Write cached state to the store."""
        self._ends.flush()


def _time_in(place: bytes) -> int:
    return int.from_bytes(place[:8], "big") - 2**63
