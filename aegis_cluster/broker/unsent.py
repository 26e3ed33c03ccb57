"""Bytes that ZeroMQ still holds for each connection: what was sent and has not left the process.

The idea: ZeroMQ's own limits count messages, not bytes (D3), and say nothing of what waits. But it
tells when it lets go of a buffer that it was lent. So every so many bytes one part of a message is
lent instead of copied, as a mark; a connection is in order, so once a mark is let go everything
before it has left too. Nobody at the other end has to cooperate, and nobody can lie.

The rule it protects: what waits for a reader that does not read is known in bytes, so that those
who make answers can stop making them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from aegis_cluster.limits import CONNECTIONS_MAX, UNMARKED_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Hashable

SWEEP_MS: Final = 20


class Mark(Protocol):
    """Of a buffer that was lent."""

    @property
    def done(self) -> bool: ...


@dataclass(slots=True)
class _Connection:
    marked: deque[tuple[int, Mark]] = field(default_factory=deque)
    """(bytes up to this mark since the one before, mark), oldest first."""
    marked_bytes: int = 0
    unmarked_bytes: int = 0
    """Sent since the last mark; not counted, and never more than `UNMARKED_BYTES_MAX`."""


class Unsent:
    """Of all connections of one process."""

    def __init__(self) -> None:
        self.total = 0
        """Bytes, as of the last look at each connection."""
        self._connections: OrderedDict[Hashable, _Connection] = OrderedDict()
        self._swept_ms = 0

    def wants_mark(self, key: Hashable, size: int) -> bool:
        """Whether the next message, of so many bytes, has to be marked."""
        connection = self._connections.get(key)
        unmarked = 0 if connection is None else connection.unmarked_bytes
        return unmarked + size > UNMARKED_BYTES_MAX

    def sent(self, key: Hashable, size: int, mark: Mark | None) -> None:
        """Count a message that ZeroMQ has taken."""
        connection = self._connections.get(key)
        if connection is None:
            connection = self._connections[key] = _Connection()
            self._forget_idle()
        if mark is None:
            connection.unmarked_bytes += size
            return
        size += connection.unmarked_bytes
        connection.unmarked_bytes = 0
        connection.marked.append((size, mark))
        connection.marked_bytes += size
        self.total += size

    def of(self, key: Hashable) -> int:
        """Bytes that wait for one connection now."""
        connection = self._connections.get(key)
        return 0 if connection is None else self._settle(connection)

    def sweep(self, now_ms: int) -> None:
        """Look at every connection, now and then."""
        if self.total and now_ms - self._swept_ms >= SWEEP_MS:
            self._swept_ms = now_ms
            for connection in self._connections.values():
                if connection.marked:
                    self._settle(connection)

    def forget(self, key: Hashable) -> None:
        """The connection was closed here, and all that waited for it is gone."""
        connection = self._connections.pop(key, None)
        if connection is not None:
            self.total -= connection.marked_bytes

    def _settle(self, connection: _Connection) -> int:
        marked = connection.marked
        while marked and marked[0][1].done:
            size, _ = marked.popleft()
            connection.marked_bytes -= size
            self.total -= size
        return connection.marked_bytes

    def _forget_idle(self) -> None:
        """Nobody tells when a client goes, so the oldest for whom nothing waits make room."""
        if len(self._connections) <= CONNECTIONS_MAX:
            return
        idle = next((k for k, c in self._connections.items() if not self._settle(c)), None)
        if idle is not None:
            del self._connections[idle]
