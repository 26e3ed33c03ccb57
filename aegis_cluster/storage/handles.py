"""A bound on open files: sealed segments of one shard that keep their handle and index at hand.

The rule it protects: a shard with thousands of segments neither runs out of descriptors nor keeps
every sparse index in memory. A segment that is pushed out forgets its handle; a reader that has
captured it keeps it until it is done, and only then is it closed.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aegis_cluster.storage.segment import Segment


class HandleCache:
    """Least recently opened goes first. Segments that still grow are not in it.

    The lock is a leaf: nothing is called under it. It is there because cold reads in helper
    threads open segments too.
    """

    def __init__(self, segments_max: int) -> None:
        self._segments_max = segments_max
        self._open: OrderedDict[int, Segment] = OrderedDict()
        self._growing: set[int] = set()
        self._lock = Lock()

    def touch(self, segment: Segment) -> None:
        """The segment has just opened a file, or is sealed and synced from now on."""
        released: list[Segment] = []
        with self._lock:
            if id(segment) in self._growing:
                return
            self._open[id(segment)] = segment
            self._open.move_to_end(id(segment))
            while len(self._open) > self._segments_max:
                released.append(self._open.popitem(last=False)[1])
        for old in released:
            old.release()

    def pin(self, segment: Segment) -> None:
        """Its handle is needed for writing: never push it out."""
        with self._lock:
            self._growing.add(id(segment))
            self._open.pop(id(segment), None)

    def unpin(self, segment: Segment) -> None:
        """It is sealed, and everything of it is synced; or it is gone."""
        with self._lock:
            self._growing.discard(id(segment))

    def forget(self, segment: Segment) -> None:
        """The segment is removed."""
        with self._lock:
            self._growing.discard(id(segment))
            self._open.pop(id(segment), None)
