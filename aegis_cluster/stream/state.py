"""The state of a task: ordered bytes to bytes, and what changed since the last commit.

The idea: a `Store` is a sorted mapping that takes back what was not committed. Above it lie caches
of decoded values, written back by `flush`. Every step has a prefix of its own.

Layout of keys: node number (2 bytes), tag (1 byte), then the parts that the step chose; numbers
are big-endian and keys of users carry their length, so that order is what it looks like.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Final, Protocol

from aegis_cluster.limits import STREAM_CACHE_ENTRIES_MAX, STREAM_KEYS_REMEMBERED
from aegis_cluster.stream.codec import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

TIME_BYTES: Final = 8
_OFFSET: Final = 2**63
NO_TIME: Final = -(2**62)
"""Before every time; a watermark of which nothing is known."""
NEVER: Final = 2**62


class Store(Protocol):
    """A sorted mapping of bytes."""

    def get(self, key: bytes) -> bytes | None:
        """None where there is nothing."""

    def put(self, key: bytes, value: bytes) -> None:
        """Add or replace."""

    def delete(self, key: bytes) -> None:
        """Nothing happens where there is nothing."""

    def scan(self, low: bytes, high: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]:
        """In order of the keys, `low` included, `high` not; the first `limit` of them."""


class MemoryStore:
    """A store that forgets everything with its process."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        """None where there is nothing."""
        return self._values.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Add or replace."""
        if key not in self._values:
            insort(self._keys, key)
        self._values[key] = value

    def delete(self, key: bytes) -> None:
        """Nothing happens where there is nothing."""
        if self._values.pop(key, None) is not None:
            del self._keys[bisect_left(self._keys, key)]

    def scan(self, low: bytes, high: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]:
        """In order of the keys, `low` included, `high` not; the first `limit` of them."""
        first, last = bisect_left(self._keys, low), bisect_left(self._keys, high)
        if limit is not None:
            last = min(last, first + limit)
        return [(key, self._values[key]) for key in self._keys[first:last]]


class TaskState:
    """A store that notes what changes. changes: new values by key since the last commit, None for
    what is deleted: what goes to the changelog."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.changes: dict[bytes, bytes | None] = {}
        self.get = store.get
        self.scan = store.scan

    def put(self, key: bytes, value: bytes) -> None:
        """Add or replace."""
        self._store.put(key, value)
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        """Nothing happens where there is nothing."""
        self._store.delete(key)
        self.changes[key] = None


def prefix_of(node: int, tag: bytes) -> bytes:
    """What the keys of one kind of one step begin with."""
    return node.to_bytes(2, "big") + tag


def time_bytes(time: int) -> bytes:
    """In the order of the times, negative ones included."""
    return (time + _OFFSET).to_bytes(TIME_BYTES, "big")


def time_of(data: bytes) -> int:
    """What `time_bytes` was given."""
    return int.from_bytes(data, "big") - _OFFSET


def key_bytes(key: Any) -> bytes:
    """A user's key with its length before it, so that no key is the beginning of another."""
    return _remembered(key) if type(key) is str else _key_bytes(key)


def _key_bytes(key: Any) -> bytes:
    packed = pack(key)
    return len(packed).to_bytes(4, "big") + packed


_remembered: Final = lru_cache(STREAM_KEYS_REMEMBERED)(_key_bytes)
"""Of text only: 1, 1.0 and True are one key of a dict, and three of ours."""


def split_key(data: bytes) -> tuple[Any, bytes]:
    """The user's key, and what follows it."""
    end = 4 + int.from_bytes(data[:4], "big")
    return unpack(data[4:end]), data[end:]


def after(prefix: bytes) -> bytes:
    """The end of a scan of everything that begins with `prefix`."""
    return prefix + b"\xff" * 24


class Cached:
    """Values of one kind of one step, kept decoded while they are in use."""

    def __init__(self, state: TaskState, node: int, tag: bytes) -> None:
        self._state = state
        self.prefix = prefix_of(node, tag)
        self._fresh: dict[bytes, Any] = {}
        """Changed since the last flush."""
        self._clean: dict[bytes, Any] = {}

    def get(self, key: bytes) -> Any:
        """None where there is nothing."""
        found = self._fresh.get(key)
        if found is None:
            found = self._clean.get(key)
        if found is None:
            data = self._state.get(self.prefix + key)
            if data is None:
                return None
            found = self._clean[key] = unpack(data)
        return found

    def put(self, key: bytes, value: Any) -> None:
        """Add or replace; not None."""
        self._fresh[key] = value

    def delete(self, key: bytes) -> None:
        """Nothing happens where there is nothing."""
        self._fresh.pop(key, None)
        self._clean.pop(key, None)
        self._state.delete(self.prefix + key)

    def flush(self) -> None:
        """Write what has changed to the store. Raises `UnsupportedPayload`."""
        if len(self._clean) + len(self._fresh) > STREAM_CACHE_ENTRIES_MAX:
            self._clean.clear()
        put, prefix = self._state.put, self.prefix
        for key, value in self._fresh.items():
            put(prefix + key, pack(value))
        self._clean.update(self._fresh)
        self._fresh.clear()

    def items(self, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[bytes, Any]]:
        """In order of the keys, as stored and cached now."""
        self.flush()
        end = after(self.prefix) if high is None else self.prefix + high
        size = len(self.prefix)
        for key, data in self._state.scan(self.prefix + low, end):
            yield key[size:], unpack(data)


@dataclass(slots=True)
class Due:
    """What is due at one moment, by name. Everything in memory that `is_whole`.

    fresh: changed since the last flush. clean: as it is in the store.
    """

    fresh: dict[bytes, Any] = field(default_factory=dict)
    clean: dict[bytes, Any] = field(default_factory=dict)
    is_whole: bool = True


class Agenda:
    """Values that are due at some event time each: open windows, and timers. They are part of the
    state, so a crash forgets none."""

    def __init__(self, state: TaskState, node: int, tag: bytes) -> None:
        self._state = state
        self._prefix = prefix_of(node, tag)
        self._dues: dict[int, Due] = {}
        self.next_due = NEVER
        """The earliest time at which something is due; `NEVER`: nothing is. A plain field: it is
        looked at for each record."""
        self._order: list[int] = []
        self._changed: set[int] = set()
        self._load()

    def _load(self) -> None:
        prefix = self._prefix
        low, size = prefix, len(prefix)
        while found := self._state.scan(low, after(prefix), 1):
            due = time_of(found[0][0][size : size + TIME_BYTES])
            self._dues[due] = Due(is_whole=False)
            low = prefix + time_bytes(due + 1)
        self._order = sorted(self._dues)
        if self._order:
            self.next_due = self._order[0]

    @property
    def dues(self) -> list[int]:
        """All times at which something may be due, in order."""
        return sorted(self._dues)

    def at(self, due: int) -> Due:
        """What is due then, to be changed: put into `fresh`."""
        found = self._dues.get(due)
        if found is None:
            found = self._dues[due] = Due()
            heappush(self._order, due)
            self.next_due = self._order[0]
        self._changed.add(due)
        return found

    def get(self, due: int, name: bytes) -> Any:
        """None where there is nothing."""
        found = self._dues.get(due)
        return None if found is None else self.get_from(found, due, name)

    def get_from(self, one: Due, due: int, name: bytes) -> Any:
        """The same, of what `at` has given."""
        value = one.fresh.get(name)
        if value is None:
            value = one.clean.get(name)
            if value is None and not one.is_whole:
                data = self._state.get(self._key(due, name))
                if data is not None:
                    value = one.clean[name] = unpack(data)
        return value

    def put(self, due: int, name: bytes, value: Any) -> None:
        """Add or replace; not None."""
        self.at(due).fresh[name] = value

    def delete(self, due: int, name: bytes) -> None:
        """Nothing happens where there is nothing."""
        found = self._dues.get(due)
        if found is None:
            return
        found.fresh.pop(name, None)
        if found.clean.pop(name, None) is not None or not found.is_whole:
            self._state.delete(self._key(due, name))

    def take_until(self, time: int) -> list[tuple[int, bytes, Any]]:
        """(due, name, value) of all that is due at `time` or before, in order; it is removed."""
        taken: list[tuple[int, bytes, Any]] = []
        while self._order and self._order[0] <= time:
            due = heappop(self._order)
            one = self._dues.pop(due)
            self._changed.discard(due)
            found = self._all(due, one)
            taken += [(due, name, found[name]) for name in sorted(found)]
            stored = one.clean if one.is_whole else found
            for name in stored:
                self._state.delete(self._key(due, name))
        self.next_due = self._order[0] if self._order else NEVER
        return taken

    def _all(self, due: int, one: Due) -> dict[bytes, Any]:
        if one.is_whole:
            return one.clean | one.fresh
        low, size = self._key(due, b""), len(self._prefix) + TIME_BYTES
        rows = self._state.scan(low, after(low))
        return {key[size:]: unpack(data) for key, data in rows} | one.fresh

    def _key(self, due: int, name: bytes) -> bytes:
        return self._prefix + time_bytes(due) + name

    def flush(self) -> None:
        """Write what has changed to the store. Raises `UnsupportedPayload`."""
        put = self._state.put
        for due in sorted(self._changed):
            one = self._dues[due]
            before = self._key(due, b"")
            for name, value in one.fresh.items():
                put(before + name, pack(value))
            one.clean.update(one.fresh)
            one.fresh.clear()
        self._changed.clear()
        self._bound_memory()

    def _bound_memory(self) -> None:
        held = sum(len(one.clean) for one in self._dues.values())
        if held > STREAM_CACHE_ENTRIES_MAX:
            for one in self._dues.values():
                one.is_whole = one.is_whole and not one.clean
                one.clean = {}
