"""What happened to a supervisor, from its threads and its signal handlers, one thing after another.

The idea: a pipe wakes whoever waits, also from the C handler of a signal (`signal.set_wakeup_fd`).
A plain queue does not do here: the kernel may deliver a signal to any thread, or just before the
main thread begins to wait, and Python runs its handler only once the main thread wakes up. With
`queue.SimpleQueue` every fifth pair of SIGTERM and SIGINT was seen to wait for ever.

The rule it protects: a request to stop is never slept through.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections import deque
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Inbox(Generic[Event]):
    """Anyone may put; one thread, the main one, gets."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._reader, self._writer = os.pipe()
        for descriptor in (self._reader, self._writer):
            os.set_blocking(descriptor, False)

    def close(self) -> None:
        """Give the pipe back; who puts later is not heard."""
        writer, self._writer = self._writer, -1
        os.close(writer)
        os.close(self._reader)

    def fileno(self) -> int:
        """Readable when there may be something to get."""
        return self._reader

    def put(self, event: Event) -> None:
        """Add an event; from any thread, and from a signal handler."""
        self._events.append(event)
        # Full, and the reader is awake anyway; or closed, and nobody listens any more.
        with contextlib.suppress(OSError):
            os.write(self._writer, b"\0")

    def get(self, wait_ms: int | None) -> Event | None:
        """The next event; None when none came in time, or when only a signal was handled."""
        if not self._events:
            select.select([self._reader], [], [], None if wait_ms is None else wait_ms / 1000)
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 4_096)
        return self._events.popleft() if self._events else None

    def wake_on_signals(self) -> None:
        """From now on a signal wakes `get`, whichever thread it hits. In the main thread."""
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def forget_signals(self) -> None:
        """Undo that, before the pipe is closed."""
        signal.set_wakeup_fd(-1)
