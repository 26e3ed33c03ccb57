"""Rows read in a thread of their own, handed to an event loop in chunks.

The idea: reading a pipe blocks, and decompressing and parsing take time, so both happen beside the
loop that publishes. A chunk is what has been read by now, at least one row, so a slow pipe is
published as it comes and a file in large pieces.

The rule it protects: memory is bounded by rows read ahead; an error of the input comes out in its
place, after all rows before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

from aegis_cluster import limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aegis_cluster.cli.records import Row


class RowFeed:
    """Belongs to the event loop in which it was made."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._source = rows
        self._rows: deque[Row] = deque()
        self._room = threading.Semaphore(limits.PUBLISH_ROWS_MAX)
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None
        # A daemon: a read from a pipe that nobody writes to must not keep the program alive.
        threading.Thread(target=self._read, daemon=True, name="row-feed").start()

    async def chunks(self, rows_max: int = limits.PUBLISH_CHUNK_ROWS) -> AsyncIterator[list[Row]]:
        """Everything in order; then the input's error, if it had one."""
        while True:
            # Read before the rows are taken: what arrives later sets the event again.
            ended = self._ended
            chunk = self._take(rows_max)
            if chunk:
                yield chunk
            elif ended:
                break
            else:
                await self._changed.wait()
                self._changed.clear()
        if self._error is not None:
            raise self._error

    def _take(self, rows_max: int) -> list[Row]:
        count = min(rows_max, len(self._rows))
        chunk = [self._rows.popleft() for _ in range(count)]
        if count:
            self._room.release(count)
        return chunk

    def _read(self) -> None:
        try:
            for row in self._source:
                self._room.acquire()
                self._rows.append(row)
                if not self._changed.is_set():
                    self._wake()
        except BaseException as error:  # noqa: BLE001 - it is raised again where rows are taken
            self._error = error
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        # The loop is closed when the command failed meanwhile; then nobody waits for us.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._changed.set)
