"""One engine for all that a process does with one place, for libraries that block.

A directory can be open once, and a library may make many objects that use it; so they share an
engine, which is closed with the last of them. A process may end without that: what was acknowledged
is on disk, and nobody holds a lock any more.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from aegis_cluster.engine import StreamingEngine
from aegis_cluster.errors import Misuse
from aegis_cluster.event import EventStore

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

T = TypeVar("T")

_engines: dict[tuple[str, str], SharedEngine] = {}
_lock = threading.Lock()


class SharedEngine:
    """An engine on an event loop of its own; made by `shared_engine`, given back by `release`."""

    def __init__(self, place: tuple[str, str]) -> None:
        self._place = place
        self.users = 0
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        bootstrap, directory = place
        self._engine = (
            StreamingEngine.connect(bootstrap) if bootstrap else StreamingEngine.open(directory)
        )
        self._stores: dict[str, EventStore] = {}
        try:
            self.run(self._engine.__aenter__())
        except BaseException:
            self._end_loop()
            raise

    def store(self, topic: str) -> EventStore:
        """The event store on a topic of one partition."""
        with _lock:
            if topic not in self._stores:
                self._stores[topic] = EventStore(self._engine, topic, partitions=1)
            return self._stores[topic]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on the loop and wait for its end."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Do it on the loop. Raises `Misuse` after the end, and in a forked process."""
        if not self._thread.is_alive() or self._pid != os.getpid():
            work.close()
            raise Misuse("This engine is closed, or belongs to the process that was forked.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def release(self) -> None:
        """One user less; without users it is closed."""
        with _lock:
            self.users -= 1
            if self.users > 0:
                return
            _engines.pop(self._place, None)
        self.close()

    def close(self) -> None:
        if self._thread.is_alive() and self._pid == os.getpid():
            self.run(self._engine.close())
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def shared_engine(bootstrap: str | None, directory: str) -> SharedEngine:
    """The engine of a cluster, or of a directory; opened if nobody has it open here. Raises as
    `StreamingEngine.open` and `connect` do."""
    place = (bootstrap, "") if bootstrap else ("", os.path.abspath(directory))
    with _lock:
        found = _engines.get(place)
        if found is None:
            found = _engines[place] = SharedEngine(place)
        found.users += 1
        return found
