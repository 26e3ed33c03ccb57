"""The outcome of a batch, for which many may wait.

The idea: everybody who waits has a future of their own, so that one who is cancelled cancels no
other. It is settled together with the batch's; `asyncio.shield`, which does the same, takes another
turn of the event loop, which a single message feels.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

NO_OFFSET: Final = -1
"""Of a batch whose answer nobody waits for."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a batch stands."""

    partition: int
    base_offset: int
    count: int
    time_ms: int

    def offset_at(self, place: int) -> int:
        """Of the record at that place of the batch."""
        return NO_OFFSET if self.base_offset == NO_OFFSET else self.base_offset + place


class StoredFuture(asyncio.Future[Stored]):
    """Of a batch; whoever may be cancelled awaits a `waiter` of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._waiters: list[asyncio.Future[Stored]] = []

    def waiter(self) -> asyncio.Future[Stored]:
        """For one who awaits it at once."""
        if self.done():
            return self
        waiter: asyncio.Future[Stored] = self.get_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def set_result(self, result: Stored, /) -> None:
        super().set_result(result)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(result)

    def set_exception(self, exception: type[BaseException] | BaseException, /) -> None:
        super().set_exception(exception)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(exception)
