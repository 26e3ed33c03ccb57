"""One member's heartbeats: what it reads goes out, what it should read comes back.

Runs in the background thread. One heartbeat is under way at a time; the coordinator keeps it until
there is news, so a change of assignment arrives at once. Whenever what the member reads has
changed, the one under way is given up and the next one says so. Only the answer to the newest one
counts, so nothing that comes late can bring back what was given up.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.client.coordinator import ask_coordinator, places_from, places_to
from aegis_cluster.errors import AegisError, MemberFenced, OutcomeUnknown
from aegis_cluster.wire.protocol import Api, take_int, take_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.client.background import Background
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.wire.protocol import Reply

BEAT_SHARE: Final = 2 / 3
"""A heartbeat may take so much of the session time-out; the coordinator keeps it for half of it."""
LEAVE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """Who joins which group. static: the name outlives the process, and so does its assignment."""

    group: str
    name: str
    static: bool
    topics: tuple[str, ...]
    session_timeout_ms: int


@dataclass(frozen=True, slots=True)
class Assigned:
    """The coordinator's present word. epoch: to commit with; session: the one that joined."""

    session: str
    epoch: int
    version: int
    places: frozenset[TopicPartition]


News = Assigned | AegisError
"""`MemberFenced`: join again once nothing is read any more; other errors: the end."""


class GroupSession:
    """Used from the subscriber's event loop; `on_news` is called there."""

    def __init__(
        self, background: Background, config: MemberConfig, on_news: Callable[[News], None]
    ) -> None:
        self.config = config
        self._background = background
        self._loop = asyncio.get_running_loop()
        self._on_news = on_news
        self._client = f"{socket.gethostname()}:{os.getpid()}"[:255]
        self._session = ""
        self._owned: frozenset[TopicPartition] = frozenset()
        self._version = 0
        self._heard = 0
        self._changed: asyncio.Event | None = None
        self._running: asyncio.Future[None] | None = None

    def join(self) -> None:
        """Begin, or begin anew after `MemberFenced`, as a process that reads nothing yet."""
        if self._running is not None:
            self._running.cancel()
        self._session, self._version, self._heard = uuid.uuid4().hex, 0, 0
        self._owned = frozenset()
        self._running = self._background.spawn(self._run())

    def reads(self, places: frozenset[TopicPartition], version: int) -> None:
        """What the member reads, or is about to read, by this version of the coordinator's word.

        The coordinator hears of it at once. What is left out is given up.
        """
        self._owned, self._version = places, version
        self._background.call(self._wake)

    async def leave(self) -> None:
        """Say goodbye; a coordinator that does not hear it notices the silence."""
        if self._running is None:
            return
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        self._running = None
        await asyncio.gather(self._background.spawn(self._leave()), return_exceptions=True)

    # ---- in the background thread

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def _run(self) -> None:
        self._changed = asyncio.Event()
        while True:
            self._changed.clear()
            reply = await self._ask_unless_changed(self._changed)
            if isinstance(reply, AegisError):
                self._tell(reply)
                return
            if reply is not None:
                self._take(reply)
            if self._heard != self._version:
                await self._until_followed(self._changed)

    async def _ask_unless_changed(self, changed: asyncio.Event) -> Reply | AegisError | None:
        """The answer to one heartbeat; None when it was given up, or nobody answered."""
        ask = asyncio.ensure_future(self._beat())
        wait = asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait({ask, wait}, return_when=asyncio.FIRST_COMPLETED)
            if not ask.done():
                return None
            return ask.result()
        except OutcomeUnknown:
            return None
        except AegisError as error:
            return None if error.retriable else error
        finally:
            for task in (ask, wait):
                task.cancel()
            await asyncio.gather(ask, wait, return_exceptions=True)

    async def _until_followed(self, changed: asyncio.Event) -> None:
        """News is answered at once until the member follows it, so there is no use in asking on;
        but a member that takes its time says that it lives."""
        try:
            async with asyncio.timeout(self.config.session_timeout_ms / 3_000):
                await changed.wait()
        except TimeoutError:
            return

    async def _beat(self) -> Reply:
        config, cluster = self.config, self._background.cluster
        beat_s = config.session_timeout_ms * BEAT_SHARE / 1000
        fields = [
            config.name,
            self._session,
            config.static,
            list(config.topics),
            config.session_timeout_ms,
            self._client,
            self._version,
            places_to(self._owned),
        ]
        deadline = cluster.deadline(beat_s)
        return await ask_coordinator(
            cluster, config.group, Api.GROUP_BEAT, fields, deadline, ask_s=beat_s
        )

    def _take(self, reply: Reply) -> None:
        version = take_int(reply.fields, 1, "version")
        if version == self._heard:
            return
        self._heard = version
        places = places_from(take_map(reply.fields, 2, "assigned"))
        epoch = take_int(reply.fields, 0, "epoch")
        self._tell(Assigned(self._session, epoch, version, places))

    def _tell(self, news: News) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_news, news)

    async def _leave(self) -> None:
        cluster = self._background.cluster
        fields = [self.config.name, self._session]
        deadline = cluster.deadline(LEAVE_S)
        try:
            await ask_coordinator(
                cluster, self.config.group, Api.GROUP_LEAVE, fields, deadline, ask_s=LEAVE_S
            )
        except MemberFenced:
            return
