"""A thread with an event loop and links of its own, for what must go on while handlers work.

The rule it protects: a handler that blocks its event loop for minutes is a slow handler and not a
dead member: heartbeats leave from here.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from aegis_cluster.errors import Misuse

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aegis_cluster.client.cluster import ClusterClient

T = TypeVar("T")


class Background:
    """Started on first use; `close` ends it, its tasks and its links."""

    def __init__(self, make_cluster: Callable[[], ClusterClient]) -> None:
        self._make_cluster = make_cluster
        self._loop = asyncio.new_event_loop()
        self._cluster: ClusterClient | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="aegis-heartbeats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._cluster is not None:
            await self._cluster.close()

    @property
    def cluster(self) -> ClusterClient:
        """The links of this thread; to be used in it only."""
        if self._cluster is None:
            self._cluster = self._make_cluster()
        return self._cluster

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Run something there; the future belongs to the caller's loop."""
        if self._closed:
            work.close()
            raise Misuse("The engine is closed.")
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called there, soon; in silence once closed."""
        if not self._closed:
            self._loop.call_soon_threadsafe(function)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
