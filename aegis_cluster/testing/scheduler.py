"""Virtual time: one heap of events, and a hash of everything that was delivered.

The idea: nothing happens but events, and the next one is always the earliest; events of the same
instant happen in the order in which they were planned. So a run is a function of its seed, and the
trace hash proves it: two runs of one seed that differ anywhere differ in their hashes.

The rules it protects: no clock, thread or unseeded chance reaches a simulated cluster; and a
cluster that does more and more work ends its run as `Runaway` instead of filling the memory.
"""

from __future__ import annotations

import heapq
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import invariant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MS: Final = 1_000
"""Microseconds, the unit of virtual time."""
SECOND: Final = 1_000_000

EVENTS_PER_SECOND_MAX: Final = 50_000
"""Of virtual time; the busiest of healthy runs come to a tenth of it."""
PLANNED_MAX: Final = 20_000
"""Events that wait at the same time; healthy runs have a few hundred."""

_STAMP: Final = struct.Struct("<qq")


class Runaway(Exception):
    """The run does more in a second of virtual time than any healthy one, or holds more."""


class Scheduler:
    """The only source of time in a simulation."""

    def __init__(self) -> None:
        self.now_us = 0
        self.events = 0
        """Delivered so far."""
        self._second_ends_us = SECOND
        self._this_second = 0
        self._planned = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._hash = blake2b(digest_size=12)

    def after(self, delay_us: int, call: Callable[..., None], *arguments: Any) -> None:
        """Plan a call; it cannot be taken back: whoever gets it looks whether it still cares."""
        invariant(delay_us >= 0, "time only moves on", delay=delay_us)
        self._planned += 1
        heapq.heappush(self._heap, (self.now_us + delay_us, self._planned, call, arguments))

    def note(self, parts: Iterable[bytes | memoryview]) -> None:
        """Make something that was delivered a part of the trace."""
        for part in parts:
            self._hash.update(part)

    @property
    def trace(self) -> str:
        """Hash of all events so far."""
        return self._hash.hexdigest()

    def run(self, until_us: int, done: Callable[[], bool] | None = None) -> bool:
        """Deliver events up to a time, or until `done` says so; return whether it did."""
        while self._heap and self._heap[0][0] <= until_us:
            time_us, number, call, arguments = heapq.heappop(self._heap)
            self.now_us = time_us
            self.events += 1
            self._count(time_us)
            self._hash.update(_STAMP.pack(time_us, number))
            call(*arguments)
            if done is not None and done():
                return True
        self.now_us = max(self.now_us, until_us)
        return False

    def _count(self, time_us: int) -> None:
        if time_us >= self._second_ends_us:
            self._second_ends_us = time_us + SECOND
            self._this_second = 0
        self._this_second += 1
        if self._this_second > EVENTS_PER_SECOND_MAX:
            raise Runaway(f"more than {EVENTS_PER_SECOND_MAX} events in a second, at {time_us} us")
        if len(self._heap) > PLANNED_MAX:
            raise Runaway(f"more than {PLANNED_MAX} events wait, at {time_us} us")
