"""Steps with windows over event time.

The idea: a window is an entry of an agenda, due when the watermark has passed its end plus grace;
then its result leaves, once. An incremental aggregate keeps one small state in that entry.
Otherwise the values lie in the store one by one, in event-time order, and are read when the result
is due; windows that overlap share them.

The rule it protects: which records a window holds does not depend on the order in which they came,
as long as none is later than the grace allows.
"""

from __future__ import annotations

from inspect import isawaitable, iscoroutinefunction
from typing import TYPE_CHECKING, Any

from aegis_cluster.stream.aggregates import Aggregator
from aegis_cluster.stream.codec import pack, unpack
from aegis_cluster.stream.columns import Columns
from aegis_cluster.stream.errors import WindowTooLarge
from aegis_cluster.stream.state import (
    NO_TIME,
    TIME_BYTES,
    Agenda,
    Cached,
    key_bytes,
    prefix_of,
    split_key,
    time_bytes,
    time_of,
)
from aegis_cluster.stream.steps import Step
from aegis_cluster.stream.windows import Hopping, Session, Sliding, Tumbling, Window, span_ms

if TYPE_CHECKING:
    from aegis_cluster.stream.steps import Context
    from aegis_cluster.stream.topology import Node


class Values:
    """The values of a step, one entry each: user's key, event time, and where it came from."""

    def __init__(self, context: Context, node: int, tag: bytes) -> None:
        self._context = context
        self._prefix = prefix_of(node, tag)
        self._origin = -1
        self._number = 0

    def place(self, time: int, origin: int) -> bytes:
        """A name for one more value, in event-time order, then in order of arrival."""
        self._number = self._number + 1 if origin == self._origin else 0
        self._origin = origin
        return time_bytes(time) + time_bytes(origin) + self._number.to_bytes(4, "big")

    def put(self, key: bytes, place: bytes, value: Any) -> None:
        """Add one. Raises `UnsupportedPayload`."""
        self._context.state.put(self._prefix + key + place, pack(value))

    def get(self, key: bytes, place: bytes) -> Any:
        """One of them, None if it is gone."""
        data = self._context.state.get(self._prefix + key + place)
        return None if data is None else unpack(data)

    def delete(self, key: bytes, place: bytes) -> None:
        """Forget one."""
        self._context.state.delete(self._prefix + key + place)

    def between(
        self, key: bytes, first: int, last: int, limit: int | None = None
    ) -> list[tuple[bytes, Any]]:
        """(place, value) of all from `first` to `last`, both included, in order."""
        before = self._prefix + key
        low, high = before + time_bytes(first), before + time_bytes(last + 1)
        size = len(before)
        found = self._context.state.scan(low, high, limit)
        return [(name[size:], unpack(data)) for name, data in found]

    def forget(self, key: bytes, first: int, last: int) -> None:
        """Delete all of these."""
        before = self._prefix + key
        low, high = before + time_bytes(first), before + time_bytes(last + 1)
        for name, _ in self._context.state.scan(low, high):
            self._context.state.delete(name)


class WindowingStep(Step):
    """What all kinds have in common: lateness, results, and when they are due."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        spec = node.spec
        self.adds_delay = spec.grace_ms
        self._grace: int = spec.grace_ms
        self._limit: int = spec.limit
        self._aggregate = spec.aggregate
        self._mark = NO_TIME
        self._values = Values(context, node.number, b"v")
        self._out = Columns.empty()
        self._late = Columns.empty()
        self._early = Columns.empty()
        self._early_ms: int | None = spec.early_ms
        self._early_at = NO_TIME
        self._touched: dict[bytes, Any] | None = None if spec.early_ms is None else {}
        """Keys by name of which results so far are to be sent; after a crash those that come."""

    async def process(self, batch: Columns, index: int) -> None:
        """Take records of input `index`."""
        rows = zip(batch.keys, batch.values, batch.times, batch.marks, batch.origins, strict=True)
        for key, value, time, mark, origin in rows:
            if mark > self._mark:
                if mark >= self._next_due():
                    await self._advance(mark, origin)
                else:
                    self._mark = mark
            if self._touched is not None and mark >= self._early_at:
                self._tell_early(mark, origin)
            try:
                is_late = not self._add(key, value, time, origin)
            except Exception as error:  # noqa: BLE001 - aggregates and keys are the user's
                self.context.failed(self.node, origin, error)
                continue
            if is_late:
                self._late.add(key, value, time, mark, origin)
            elif self._touched is not None:
                self._touched[key_bytes(key)] = key
        await self._hand_on()

    async def finish(self, mark: int) -> None:
        """Event time has come to `mark`."""
        if mark > self._mark:
            await self._advance(mark, self.context.origin)
            if self._touched is not None and mark >= self._early_at:
                self._tell_early(mark, self.context.origin)
            await self._hand_on()

    def _tell_early(self, mark: int, origin: int) -> None:
        """Results so far of all that has changed, at multiples of the interval."""
        every, touched = self._early_ms or 1, self._touched or {}
        self._early_at = mark - mark % every + every
        for _, key in sorted(touched.items()):
            for start, end, result in self._open_of(key):
                self._early.add(key, result, mark, mark, origin, (start, end))
        touched.clear()

    def _open_of(self, key: Any) -> list[tuple[int, int, Any]]:
        """(start, end, result so far) of each open window of a key."""
        raise NotImplementedError

    def query(self, key: Any) -> dict[int, Any]:
        """By start in milliseconds: the result so far of each open window."""
        return {start: result for start, _, result in self._open_of(key)}

    async def _hand_on(self) -> None:
        out, late, early = self._out, self._late, self._early
        self._out, self._late = Columns.empty(), Columns.empty()
        if len(early):
            self._early = Columns.empty()
            await self.emit(early, 2)
        await self.emit(out)
        if len(late):
            self.context.came_late(self.node, len(late))
            await self.emit(late, 1)

    def _next_due(self) -> int:
        """Before this time there is nothing to send and nothing to forget."""
        raise NotImplementedError

    def _add(self, key: Any, value: Any, time: int, origin: int) -> bool:
        """False: it is late."""
        raise NotImplementedError

    async def _advance(self, mark: int, origin: int) -> None:
        """Send what is due. Results leave under the watermark of before: what comes next in the
        topology has to take them before its own time goes on."""
        raise NotImplementedError

    async def _close(self, key: Any, values: list[Any], start: int, end: int, origin: int) -> None:
        """The result of a window whose values are kept."""
        aggregate = self._aggregate
        try:
            if isinstance(aggregate, Aggregator):
                state = aggregate.initial()
                for value in values:
                    state = aggregate.add(state, value)
                result = aggregate.result(state)
            else:
                result = aggregate(Window(values, key, start, end))
                if isawaitable(result):
                    result = await result
        except Exception as error:  # noqa: BLE001 - whatever the user's function raises
            self.context.failed(self.node, origin, error, (key, start, end))
            return
        self._send(key, result, start, end, origin)

    def _so_far(self, key: Any, name: bytes, first: int, last: int, end: int) -> Any:
        """What a window that keeps its values would give now; of an async function how many values
        there are."""
        values = [value for _, value in self._values.between(name, first, last)]
        aggregate = self._aggregate
        if isinstance(aggregate, Aggregator):
            state = aggregate.initial()
            for value in values:
                state = aggregate.add(state, value)
            return aggregate.result(state)
        if iscoroutinefunction(aggregate):
            return len(values)
        return aggregate(Window(values, key, first, end))

    def _send(self, key: Any, result: Any, start: int, end: int, origin: int) -> None:
        self._out.add(key, result, end - 1, self._mark - self._grace, origin, (start, end))

    def _too_large(self, key: Any) -> WindowTooLarge:
        return WindowTooLarge(
            f"A window of {self.node.name} has more than {self._limit} values of key {key!r:.80}:"
            " use an incremental aggregate such as Count(), smaller windows, or a larger limit="
            " of window().",
            limit=self._limit,
        )


class AlignedStep(WindowingStep):
    """Tumbling, hopping and sliding windows: a record's time says which windows it is in."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        kind: Tumbling | Hopping | Sliding = node.spec.window
        self._size = self._every = span_ms(kind.size, "window size")
        if isinstance(kind, Hopping):
            self._every = span_ms(kind.every, "every")
        self._slides = isinstance(kind, Sliding)
        is_incremental = isinstance(self._aggregate, Aggregator) and not self._slides
        self._incremental: Aggregator | None = self._aggregate if is_incremental else None
        self._open = Agenda(context.state, node.number, b"w")
        """By end plus grace and key: the aggregate's state, or how many values were added."""
        self._passing = Agenda(context.state, node.number, b"p")
        """Of sliding windows: when no later one can hold a key's values of a time any more."""

    def _next_due(self) -> int:
        due = self._open.next_due
        return min(due, self._passing.next_due) if self._slides else due

    def _ends(self, time: int) -> range:
        """Ends of the windows that a time is in, the last one first."""
        if self._slides:
            return range(time + 1, time, -1)
        last = time - time % self._every + self._size
        return range(last, time, -self._every)

    def _add(self, key: Any, value: Any, time: int, origin: int) -> bool:
        first_open = self._mark - self._grace + 1
        if self._incremental is not None and self._every == self._size:  # one window; the usual
            end = time - time % self._size + self._size
            if end < first_open:
                return False
            self._count_in(end + self._grace, key, key_bytes(key), value)
            return True
        name: bytes | None = None
        for end in self._ends(time):
            if end < first_open:
                break
            if name is None:
                name = key_bytes(key)
            self._count_in(end + self._grace, key, name, value)
        if name is None:
            return False
        if self._incremental is None:
            self._values.put(name, self._values.place(time, origin), value)
            if self._slides:
                self._passing.put(time + self._size + self._grace, name, time)
        return True

    def _count_in(self, due: int, key: Any, name: bytes, value: Any) -> None:
        one = self._open.at(due)
        state = self._open.get_from(one, due, name)
        aggregate = self._incremental
        if aggregate is not None:
            if state is None:
                state = aggregate.initial()
            one.fresh[name] = aggregate.add(state, value)
            return
        count = (state or 0) + 1
        if count > self._limit:
            raise self._too_large(key)
        one.fresh[name] = count

    async def _advance(self, mark: int, origin: int) -> None:
        for due, name, state in self._open.take_until(mark):
            key, _ = split_key(name)
            end = due - self._grace
            await self._close_aligned(key, name, state, end, origin)
        for _, name, time in self._passing.take_until(mark):
            self._values.forget(name, time, time)
        self._mark = mark

    async def _close_aligned(
        self, key: Any, name: bytes, state: Any, end: int, origin: int
    ) -> None:
        start = end - self._size
        if self._incremental is not None:
            try:
                result = self._incremental.result(state)
            except Exception as error:  # noqa: BLE001 - an aggregate may be the user's
                self.context.failed(self.node, origin, error, (key, start, end))
                return
            self._send(key, result, start, end, origin)
            return
        found = self._values.between(name, start, end - 1, self._limit + 1)
        if len(found) > self._limit:
            self.context.failed(self.node, origin, self._too_large(key), (key, start, end))
        else:
            await self._close(key, [value for _, value in found], start, end, origin)
        if not self._slides:
            self._values.forget(name, start, start + self._every - 1)

    def flush(self) -> None:
        """Write cached state to the store."""
        self._open.flush()
        self._passing.flush()

    def _open_of(self, key: Any) -> list[tuple[int, int, Any]]:
        name = key_bytes(key)
        found: list[tuple[int, int, Any]] = []
        for due in self._open.dues:
            state = self._open.get(due, name)
            if state is not None:
                end = due - self._grace
                start = end - self._size
                if self._incremental is not None:
                    result = self._incremental.result(state)
                else:
                    result = self._so_far(key, name, start, end - 1, end)
                found.append((start, end, result))
        return found


class SessionStep(WindowingStep):
    """Session windows: records that lie no further apart than the gap."""

    def __init__(self, node: Node, context: Context) -> None:
        super().__init__(node, context)
        self._gap: int = span_ms(node.spec.window.gap, "gap")
        self._sessions = Cached(context.state, node.number, b"s")
        """By key: [first time, last time, number of values] of each open session, in order."""
        self._ends = Agenda(context.state, node.number, b"e")
        """By end plus grace: key and first time."""

    def _next_due(self) -> int:
        return self._ends.next_due

    def _due(self, last: int) -> int:
        return last + self._gap + 1 + self._grace

    def _add(self, key: Any, value: Any, time: int, origin: int) -> bool:
        name = key_bytes(key)
        sessions: list[list[int]] = self._sessions.get(name) or []
        near = [s for s in sessions if s[0] - self._gap <= time <= s[1] + self._gap]
        first = min([time, *(session[0] for session in near)])
        last = max([time, *(session[1] for session in near)])
        count = 1 + sum(session[2] for session in near)
        if self._due(last) <= self._mark:
            return False
        if count > self._limit:
            raise self._too_large(key)
        self._values.put(name, self._values.place(time, origin), value)
        for session in near:
            self._ends.delete(self._due(session[1]), name + time_bytes(session[0]))
        self._ends.put(self._due(last), name + time_bytes(first), True)
        others = [session for session in sessions if session not in near]
        self._sessions.put(name, sorted([*others, [first, last, count]]))
        return True

    async def _advance(self, mark: int, origin: int) -> None:
        for due, rest, _ in self._ends.take_until(mark):
            name, first = rest[:-TIME_BYTES], time_of(rest[-TIME_BYTES:])
            key, _ = split_key(name)
            last = due - self._gap - 1 - self._grace
            values = [value for _, value in self._values.between(name, first, last)]
            await self._close(key, values, first, last + self._gap, origin)
            self._values.forget(name, first, last)
            left = [s for s in self._sessions.get(name) or [] if s[0] != first]
            if left:
                self._sessions.put(name, left)
            else:
                self._sessions.delete(name)
        self._mark = mark

    def _send(self, key: Any, result: Any, start: int, end: int, origin: int) -> None:
        # The end of a session is its last record's time plus the gap, that moment included.
        self._out.add(key, result, end, self._mark - self._grace, origin, (start, end))

    def flush(self) -> None:
        """Write cached state to the store."""
        self._sessions.flush()
        self._ends.flush()

    def _open_of(self, key: Any) -> list[tuple[int, int, Any]]:
        name = key_bytes(key)
        return [
            (first, last + self._gap, self._so_far(key, name, first, last, last + self._gap))
            for first, last, _ in self._sessions.get(name) or []
        ]


def window_step(node: Node, context: Context) -> WindowingStep:
    """The step for a node with windows."""
    if isinstance(node.spec.window, Session):
        return SessionStep(node, context)
    return AlignedStep(node, context)
