"""Durable subscriptions: competing consumers of single events, with places kept on the server.

The idea: a persistent subscription of the topic hands out messages and keeps what is settled; what
an event is, its version included, is read from the log where the message says that it stands. Keys
are names of streams, so in an order by key the events of a stream come one after the other, in the
order of their versions, and different streams do not wait for each other.

The rule it protects: what `ack()` has returned for is not handed out again; an event that nobody
asked for is settled by whoever meets it, and never shown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Self

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.event.model import Event
from aegis_cluster.persistent import PersistentConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from aegis_cluster.event.store import EventStore
    from aegis_cluster.event.subscription import Filter
    from aegis_cluster.persistent import LeasedMessage, PersistentSubscription

READ_EVENTS: Final = 500
"""Read at one time around an event that was handed out."""


class LeasedEvent(Event):
    """An event that this consumer may handle until its lock ends; see `LeasedMessage`."""

    __slots__ = ("_message",)
    _message: LeasedMessage

    @classmethod
    def of(cls, event: Event, message: LeasedMessage) -> Self:
        """That event, with the lease of its message."""
        leased = cls.__new__(cls)
        for name in Event.__slots__:
            setattr(leased, name, getattr(event, name))
        leased._message = message
        return leased

    @property
    def delivery_count(self) -> int:
        """How often it was handed out, this time included."""
        return self._message.delivery_count

    async def ack(self, *, timeout: float | None = None) -> None:
        """It is handled, and never handed out again. Raises `LockLost`, as all of these do."""
        await self._message.ack(timeout=timeout)

    async def nack(self, delay: float | None = None, *, timeout: float | None = None) -> None:
        """It was not handled: hand it out again, not before `delay` seconds."""
        await self._message.nack(delay, timeout=timeout)

    async def park(self, reason: str = "", *, timeout: float | None = None) -> None:
        """Put it aside, for a person to look at."""
        await self._message.park(reason, timeout=timeout)

    async def extend(self, *, timeout: float | None = None) -> None:
        """Keep it for another `ack_timeout` from now on."""
        await self._message.extend(timeout=timeout)


class EventConsumer:
    """Made by `EventStore.persistent_subscription`: an async context manager and iterator, one of
    the consumers of its subscription.

    subscription: what it stands on, for `describe`, `parked`, `replay_parked`, `delete`.
    """

    def __init__(
        self, store: EventStore, name: str, chosen: Filter, config: PersistentConfig | None
    ) -> None:
        if config is None:
            config = PersistentConfig(ordered=True)
        self.subscription: PersistentSubscription = store.engine.persistent_subscription(
            store.topic, name, config
        )
        self._store = store
        self._filter = chosen
        self._read: dict[int, dict[int, Event]] = {}
        """By partition and offset, what was read last."""

    async def __aenter__(self) -> Self:
        await self._store.info()  # makes the topic where it is not there
        await self.subscription.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LeasedEvent:
        """The next event; waits for it. Ends when the consumer or the engine is closed."""
        while True:
            message = await anext(self.subscription)
            for event in await self._wanted([message]):
                return event

    async def poll(self, max_events: int = 500, timeout: float | None = 1.0) -> list[LeasedEvent]:
        """The next events, as many as there are now but no more than `max_events`; waits for the
        first one. An empty list: none that was asked for came within `timeout` seconds."""
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            left = None if end is None else max(0.0, end - loop.time())
            messages = await self.subscription.poll(max_events, left)
            events = await self._wanted(messages)
            if events or not messages:
                return events

    async def ack(self, events: Sequence[LeasedEvent], *, timeout: float | None = None) -> None:
        """All of these are handled; one call for thousands. Raises `LockLost`."""
        await self.subscription.ack([event._message for event in events], timeout=timeout)

    async def close(self) -> None:
        """End this consumer: others get what it has not settled. The subscription stays."""
        await self.subscription.close()

    async def _wanted(self, messages: Sequence[LeasedMessage]) -> list[LeasedEvent]:
        """The events of these messages; those that nobody asked for are settled, and those that
        were hidden and have left the log since the message was read."""
        events, others = [], []
        types = self._filter.types
        for message in messages:
            event = await self._event_at(message.partition, message.offset)
            if (
                event is not None
                and self._filter.wants_stream(event.aggregate_id or "")
                and (types is None or event.event_type in types)
            ):
                events.append(LeasedEvent.of(event, message))
            else:
                others.append(message)
        if others:
            await self.subscription.ack(others)
        return events

    async def _event_at(self, partition: int, offset: int) -> Event | None:
        """None: it is gone, for something later is there."""
        found = self._read.get(partition, {}).get(offset)
        if found is None:
            read = await self._store.scan(partition, offset, READ_EVENTS)
            self._read[partition] = {event.offset or 0: event for event in read}
            found = self._read[partition].get(offset)
        if found is None and not self._read[partition]:
            raise CorruptRecord(
                f"There is no event at offset {offset} of {self._store.topic}/{partition}.",
                partition=partition,
                offset=offset,
            )
        return found
