"""The same classes for code that blocks: scripts, notebooks, threads.

The idea: an engine of `aegis_cluster` runs on an event loop in a thread of its own, and every call
here hands over to it and waits. What a call does, takes and raises is said there; each line below
only names it, so the two cannot differ.

    from aegis_cluster.sync import StreamingEngine

    with StreamingEngine.open("./data") as engine:
        engine.create_topic("orders", exist_ok=True)
        engine.publish("orders", Message(payload={"id": 1}))

An engine may be used from several threads at a time; one subscriber from one thread at a time.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from aegis_cluster import (
    cdc,
    channel,
    engine,
    event,
    group,
    message,
    persistent,
    producer,
    subscriber,
    transaction,
)
from aegis_cluster.errors import Misuse

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from aegis_cluster.config import StreamingConfig
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.keys import ClientKeys
    from aegis_cluster.message import Receipt
    from aegis_cluster.subscriber import MessageBatch

Inner = TypeVar("Inner")
P = ParamSpec("P")
T = TypeVar("T")
_Method = Callable[Concatenate[Any, P], T]


class _Portal:
    """An event loop in a thread, and the way into it; shared by an engine and what it makes."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="aegis-sync", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it there and wait for its end; a wait that is interrupted cancels it.

        Raises `Misuse` after `close`, and on the loop's own thread, which would wait for itself.
        """
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            work.close()
            raise Misuse("The engine is closed, or called from a callback of its own loop.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread; what still waits there is cancelled."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


class _Blocking(Generic[Inner]):
    """An object that lives on the loop, seen from outside."""

    def __init__(self, portal: _Portal, inner: Inner) -> None:
        self._portal = portal
        self._inner = inner


def _blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> _Method[P, T]:
    """A coroutine method, as one that waits for its result."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._portal.run(method(self._inner, *args, **kwargs))

    return call


def _plain(method: Callable[Concatenate[Any, P], T]) -> _Method[P, T]:
    """A plain method, run on the loop that owns the object."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._portal.run(_called(lambda: method(self._inner, *args, **kwargs)))

    return call


def _listed(method: Callable[Concatenate[Any, P], Any]) -> _Method[P, list[ReceivedMessage]]:
    """A method that returns a `History`, as one that returns the list."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: P.args, **kwargs: P.kwargs) -> list[ReceivedMessage]:
        return self._portal.run(_awaited(lambda: method(self._inner, *args, **kwargs)))

    return call


def _made(
    kind: Callable[[_Portal, Any], T], method: Callable[Concatenate[Any, P], Any]
) -> _Method[P, T]:
    """A method that makes an object, as one that makes the blocking twin of it."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        inner = self._portal.run(_called(lambda: method(self._inner, *args, **kwargs)))
        return kind(self._portal, inner)

    return call


async def _called(work: Callable[[], T]) -> T:
    return work()


async def _awaited(work: Callable[[], Any]) -> Any:
    return await work()


async def _receipt(pending: producer.Pending) -> Receipt:
    return await pending


async def _next(steps: Any) -> Any:
    return await anext(steps, None)


class Pending:
    """A message on its way, see `aegis_cluster.Pending`."""

    def __init__(self, portal: _Portal, pending: producer.Pending) -> None:
        self._portal = portal
        self._pending = pending

    @property
    def done(self) -> bool:
        """Whether its outcome is known."""
        return self._pending.done

    def result(self) -> Receipt:
        """Wait for its receipt. Raises `Refused` or `OutcomeUnknown`."""
        return self._portal.run(_receipt(self._pending))


def _sent(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, producer.Pending]],
) -> _Method[P, Pending]:
    """A method that sends, as one whose `Pending` has `result()` instead of `await`."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: P.args, **kwargs: P.kwargs) -> Pending:
        return Pending(self._portal, self._portal.run(method(self._inner, *args, **kwargs)))

    return call


class Transaction(_Blocking[transaction.Transaction]):
    """See `aegis_cluster.Transaction`: a block that commits at its end, and aborts when it is left
    with an exception."""

    send = _sent(transaction.Transaction.send)
    send_many = _blocking(transaction.Transaction.send_many)
    outcome = _blocking(transaction.Transaction.outcome)

    def send_offsets(
        self, subscriber: Subscriber, *, unmoved: bool = False, timeout: float | None = None
    ) -> None:
        """As `aegis_cluster.Transaction.send_offsets`."""
        inner: Any = getattr(subscriber, "_inner", subscriber)
        self._portal.run(self._inner.send_offsets(inner, unmoved=unmoved, timeout=timeout))

    def __enter__(self) -> Self:
        self._portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.run(self._inner.__aexit__(kind, error, trace))


class Producer(_Blocking[producer.Producer]):
    """See `aegis_cluster.Producer`."""

    flush = _blocking(producer.Producer.flush)
    close = _blocking(producer.Producer.close)
    send = _sent(producer.Producer.send)

    def transaction(self, *subscribers: Subscriber) -> Transaction:
        """As `aegis_cluster.Producer.transaction`. Name the subscribers whose messages it handles:
        each call here is a task of its own, so nothing else tells which they are."""
        inner = [subscriber._inner for subscriber in subscribers]
        return Transaction(
            self._portal,
            self._portal.run(_called(lambda: self._inner.transaction(*inner))),
        )

    def __enter__(self) -> Self:
        self._portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.run(self._inner.__aexit__(kind, error, trace))


class ReceivedMessage(message.ReceivedMessage):
    """See `aegis_cluster.ReceivedMessage`."""

    __slots__ = ("_inner", "_portal")

    def __init__(self, portal: _Portal, inner: message.ReceivedMessage) -> None:
        super().__init__(
            inner._key,
            inner._payload,
            inner._headers,
            None,
            inner._topic,
            inner._partition,
            inner._offset,
            inner._source,
            inner._time_ms,
        )
        self._portal = portal
        self._inner = inner

    def ack(self) -> None:  # type: ignore[override]  # the same promise, kept before it returns
        """As `aegis_cluster.ReceivedMessage.ack`."""
        self._portal.run(self._inner.ack())

    def nack(self, delay: float | None = None) -> None:  # type: ignore[override]
        """As `aegis_cluster.ReceivedMessage.nack`."""
        self._portal.run(self._inner.nack(delay))


Places = Callable[[list["TopicPartition"]], object]
"""A callback that is told of partitions."""


def _in_thread(callback: Places | None) -> Places | None:
    """For a callback that may block, and call its subscriber: beside the loop, not on it."""
    if callback is None:
        return None
    return lambda places: asyncio.to_thread(callback, places)


class Subscriber(_Blocking[subscriber.Subscriber]):
    """See `aegis_cluster.Subscriber`; a step of the iterator blocks until there is a message.

    `on_assigned` and `on_revoked` are called on a thread of their own.
    """

    _on_assigned: Places | None = None
    _on_revoked: Places | None = None

    poll_batch = _blocking(subscriber.Subscriber.poll_batch)
    lag = _blocking(subscriber.Subscriber.lag)
    seek = _blocking(subscriber.Subscriber.seek)
    commit = _blocking(subscriber.Subscriber.commit)
    close = _blocking(subscriber.Subscriber.close)
    pause = _plain(subscriber.Subscriber.pause)
    resume = _plain(subscriber.Subscriber.resume)
    position = _plain(subscriber.Subscriber.position)

    @property
    def assignment(self) -> list[Any]:
        """As `aegis_cluster.Subscriber.assignment`."""
        return self._portal.run(_called(lambda: self._inner.assignment))

    @property
    def positions(self) -> dict[int, int]:
        """As `aegis_cluster.Subscriber.positions`."""
        return self._portal.run(_called(lambda: self._inner.positions))

    @property
    def on_assigned(self) -> Places | None:
        """As `aegis_cluster.Subscriber.on_assigned`."""
        return self._on_assigned

    @on_assigned.setter
    def on_assigned(self, callback: Places | None) -> None:
        self._on_assigned = callback
        self._inner.on_assigned = _in_thread(callback)

    @property
    def on_revoked(self) -> Places | None:
        """As `aegis_cluster.Subscriber.on_revoked`."""
        return self._on_revoked

    @on_revoked.setter
    def on_revoked(self, callback: Places | None) -> None:
        self._on_revoked = callback
        self._inner.on_revoked = _in_thread(callback)

    def poll(
        self, max_records: int | None = None, timeout: float | None = None
    ) -> list[ReceivedMessage]:
        """As `aegis_cluster.Subscriber.poll`."""
        found = self._portal.run(self._inner.poll(max_records, timeout))
        return [ReceivedMessage(self._portal, one) for one in found]

    def ack(self, message: ReceivedMessage) -> None:
        """As `message.ack()`."""
        message.ack()

    def nack(self, message: ReceivedMessage, delay: float | None = None) -> None:
        """As `message.nack(delay)`."""
        message.nack(delay)

    def batches(self) -> Iterator[MessageBatch]:
        """As `aegis_cluster.Subscriber.batches`."""
        steps = self._inner.batches()
        while (batch := self._portal.run(_next(steps))) is not None:
            yield batch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ReceivedMessage:
        found: message.ReceivedMessage | None = self._portal.run(_next(self._inner))
        if found is None:
            raise StopIteration
        return ReceivedMessage(self._portal, found)

    def __enter__(self) -> Self:
        self._portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.run(self._inner.__aexit__(kind, error, trace))


class LeasedMessage(persistent.LeasedMessage):
    """See `aegis_cluster.LeasedMessage`."""

    __slots__ = ("_inner", "_portal")

    def __init__(self, portal: _Portal, inner: persistent.LeasedMessage) -> None:
        super().__init__(inner, inner._lease, inner._subscription)
        self._portal = portal
        self._inner = inner

    def ack(self, *, timeout: float | None = None) -> None:  # type: ignore[override]
        """As `aegis_cluster.LeasedMessage.ack`."""
        self._portal.run(self._inner.ack(timeout=timeout))

    def nack(  # type: ignore[override]
        self, delay: float | None = None, *, timeout: float | None = None
    ) -> None:
        """As `aegis_cluster.LeasedMessage.nack`."""
        self._portal.run(self._inner.nack(delay, timeout=timeout))

    def park(  # type: ignore[override]
        self, reason: str = "", *, timeout: float | None = None
    ) -> None:
        """As `aegis_cluster.LeasedMessage.park`."""
        self._portal.run(self._inner.park(reason, timeout=timeout))

    def extend(self, *, timeout: float | None = None) -> None:  # type: ignore[override]
        """As `aegis_cluster.LeasedMessage.extend`."""
        self._portal.run(self._inner.extend(timeout=timeout))


class PersistentSubscription(_Blocking[persistent.PersistentSubscription]):
    """See `aegis_cluster.PersistentSubscription`; a step of the iterator blocks until there is a
    message."""

    ack = _blocking(persistent.PersistentSubscription.ack)
    nack = _blocking(persistent.PersistentSubscription.nack)
    park = _blocking(persistent.PersistentSubscription.park)
    extend = _blocking(persistent.PersistentSubscription.extend)
    describe = _blocking(persistent.PersistentSubscription.describe)
    lag = _blocking(persistent.PersistentSubscription.lag)
    parked = _blocking(persistent.PersistentSubscription.parked)
    replay_parked = _blocking(persistent.PersistentSubscription.replay_parked)
    reset = _blocking(persistent.PersistentSubscription.reset)
    update = _blocking(persistent.PersistentSubscription.update)
    delete = _blocking(persistent.PersistentSubscription.delete)
    close = _blocking(persistent.PersistentSubscription.close)

    @property
    def topic(self) -> str:
        """Whose messages it hands out."""
        return self._inner.topic

    @property
    def name(self) -> str:
        """The subscription's name."""
        return self._inner.name

    def __iter__(self) -> Self:
        return self

    def poll(self, max_records: int = 500, timeout: float | None = 1.0) -> list[LeasedMessage]:
        """As `aegis_cluster.PersistentSubscription.poll`."""
        found = self._portal.run(self._inner.poll(max_records, timeout))
        return [LeasedMessage(self._portal, one) for one in found]

    def __next__(self) -> LeasedMessage:
        found: persistent.LeasedMessage | None = self._portal.run(_next(self._inner))
        if found is None:
            raise StopIteration
        return LeasedMessage(self._portal, found)

    def __enter__(self) -> Self:
        self._portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.run(self._inner.__aexit__(kind, error, trace))


class ConsumerGroup(_Blocking[group.ConsumerGroup]):
    """See `aegis_cluster.ConsumerGroup`."""

    describe = _blocking(group.ConsumerGroup.describe)
    positions = _blocking(group.ConsumerGroup.positions)
    lag = _blocking(group.ConsumerGroup.lag)
    reset = _blocking(group.ConsumerGroup.reset)
    delete = _blocking(group.ConsumerGroup.delete)

    @property
    def name(self) -> str:
        """The group's name."""
        return self._inner.name


class Channel(_Blocking[channel.Channel]):
    """See `aegis_cluster.Channel`."""

    publish = _blocking(channel.Channel.publish)
    publish_many = _blocking(channel.Channel.publish_many)
    offsets = _blocking(channel.Channel.offsets)
    alter = _blocking(channel.Channel.alter)
    describe = _blocking(channel.Channel.describe)
    history = _listed(channel.Channel.history)
    history_after = _listed(channel.Channel.history_after)
    subscribe = _made(Subscriber, channel.Channel.subscribe)

    @property
    def topic(self) -> str:
        """The topic that the calls are bound to."""
        return self._inner.topic


class StreamingEngine(_Blocking[engine.StreamingEngine]):
    """See `aegis_cluster.StreamingEngine`; a context manager with a thread of its own."""

    create_topic = _blocking(engine.StreamingEngine.create_topic)
    alter_topic = _blocking(engine.StreamingEngine.alter_topic)
    delete_topic = _blocking(engine.StreamingEngine.delete_topic)
    list_topics = _blocking(engine.StreamingEngine.list_topics)
    describe_topic = _blocking(engine.StreamingEngine.describe_topic)
    offsets = _blocking(engine.StreamingEngine.offsets)
    stats = _blocking(engine.StreamingEngine.stats)
    publish = _blocking(engine.StreamingEngine.publish)
    publish_many = _blocking(engine.StreamingEngine.publish_many)
    publish_to_many = _blocking(engine.StreamingEngine.publish_to_many)
    history = _listed(engine.StreamingEngine.history)
    history_after = _listed(engine.StreamingEngine.history_after)
    producer = _made(Producer, engine.StreamingEngine.producer)
    subscribe = _made(Subscriber, engine.StreamingEngine.subscribe)
    group = _made(ConsumerGroup, engine.StreamingEngine.group)
    list_groups = _blocking(engine.StreamingEngine.list_groups)
    list_transactions = _blocking(engine.StreamingEngine.list_transactions)
    describe_transaction = _blocking(engine.StreamingEngine.describe_transaction)
    abort_transaction = _blocking(engine.StreamingEngine.abort_transaction)
    persistent_subscription = _made(
        PersistentSubscription, engine.StreamingEngine.persistent_subscription
    )
    list_subscriptions = _blocking(engine.StreamingEngine.list_subscriptions)
    channel = _made(Channel, engine.StreamingEngine.channel)

    def __init__(self, inner: engine.StreamingEngine) -> None:
        super().__init__(_NO_PORTAL, inner)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        durability: str = "fsync",
        request_timeout: float | None = None,
        config: StreamingConfig | None = None,
    ) -> StreamingEngine:
        """As `aegis_cluster.StreamingEngine.open`."""
        return cls(
            engine.StreamingEngine.open(
                path, durability=durability, request_timeout=request_timeout, config=config
            )
        )

    @classmethod
    def connect(
        cls,
        bootstrap: str,
        *,
        request_timeout: float | None = None,
        config: StreamingConfig | None = None,
        keys: ClientKeys | None = None,
    ) -> StreamingEngine:
        """As `aegis_cluster.StreamingEngine.connect`."""
        return cls(
            engine.StreamingEngine.connect(
                bootstrap, request_timeout=request_timeout, config=config, keys=keys
            )
        )

    def __enter__(self) -> Self:
        self._portal = _Portal()
        try:
            self._portal.run(self._inner.__aenter__())
        except BaseException:
            self._portal.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all links, and the thread."""
        if self._portal is _NO_PORTAL:
            return
        portal, self._portal = self._portal, _NO_PORTAL
        try:
            portal.run(self._inner.close())
        finally:
            portal.close()


class EventSubscription(_Blocking[event.EventSubscription]):
    """See `aegis_cluster.event.EventSubscription`; a step blocks until there is an event."""

    next = _blocking(event.EventSubscription.next)
    poll = _blocking(event.EventSubscription.poll)
    close = _blocking(event.EventSubscription.close)

    @property
    def position(self) -> event.Position:
        """As `aegis_cluster.event.EventSubscription.position`."""
        return self._inner.position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> event.Event:
        found: event.Event | None = self._portal.run(_next(self._inner))
        if found is None:
            raise StopIteration
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class LeasedEvent(event.LeasedEvent):
    """See `aegis_cluster.event.LeasedEvent`."""

    __slots__ = ("_inner", "_portal")
    _inner: event.LeasedEvent
    _portal: _Portal

    @classmethod
    def on(cls, portal: _Portal, inner: event.LeasedEvent) -> Self:
        """The twin of an event that a consumer was handed."""
        leased = cls.of(inner, inner._message)
        leased._inner, leased._portal = inner, portal
        return leased

    def ack(self, *, timeout: float | None = None) -> None:  # type: ignore[override]
        """As `aegis_cluster.event.LeasedEvent.ack`."""
        self._portal.run(self._inner.ack(timeout=timeout))

    def nack(  # type: ignore[override]
        self, delay: float | None = None, *, timeout: float | None = None
    ) -> None:
        """As `aegis_cluster.event.LeasedEvent.nack`."""
        self._portal.run(self._inner.nack(delay, timeout=timeout))

    def park(  # type: ignore[override]
        self, reason: str = "", *, timeout: float | None = None
    ) -> None:
        """As `aegis_cluster.event.LeasedEvent.park`."""
        self._portal.run(self._inner.park(reason, timeout=timeout))

    def extend(self, *, timeout: float | None = None) -> None:  # type: ignore[override]
        """As `aegis_cluster.event.LeasedEvent.extend`."""
        self._portal.run(self._inner.extend(timeout=timeout))


class EventConsumer(_Blocking[event.EventConsumer]):
    """See `aegis_cluster.event.EventConsumer`; a step of the iterator blocks until there is an
    event."""

    ack = _blocking(event.EventConsumer.ack)
    close = _blocking(event.EventConsumer.close)

    @property
    def subscription(self) -> PersistentSubscription:
        """As `aegis_cluster.event.EventConsumer.subscription`."""
        return PersistentSubscription(self._portal, self._inner.subscription)

    def poll(self, max_events: int = 500, timeout: float | None = 1.0) -> list[LeasedEvent]:
        """As `aegis_cluster.event.EventConsumer.poll`."""
        found = self._portal.run(self._inner.poll(max_events, timeout))
        return [LeasedEvent.on(self._portal, one) for one in found]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> LeasedEvent:
        found: event.LeasedEvent | None = self._portal.run(_next(self._inner))
        if found is None:
            raise StopIteration
        return LeasedEvent.on(self._portal, found)

    def __enter__(self) -> Self:
        self._portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.run(self._inner.__aexit__(kind, error, trace))


class EventStore(_Blocking[event.EventStore]):
    """See `aegis_cluster.event.EventStore`; stands on an engine of this module that is open."""

    append = _blocking(event.EventStore.append)
    append_many = _blocking(event.EventStore.append_many)
    load = _blocking(event.EventStore.load)
    describe = _blocking(event.EventStore.describe)
    delete = _blocking(event.EventStore.delete)
    configure = _blocking(event.EventStore.configure)
    load_aggregate = _blocking(event.EventStore.load_aggregate)
    save = _blocking(event.EventStore.save)
    snapshot = _blocking(event.EventStore.snapshot)
    partition_of = _blocking(event.EventStore.partition_of)
    subscribe = _made(EventSubscription, event.EventStore.subscribe)
    persistent_subscription = _made(EventConsumer, event.EventStore.persistent_subscription)

    def __init__(self, engine: StreamingEngine, topic: str = event.TOPIC, **options: Any) -> None:
        """As `aegis_cluster.event.EventStore`."""
        super().__init__(engine._portal, event.EventStore(engine._inner, topic, **options))


class ProjectionRunner(_Blocking[event.ProjectionRunner]):
    """See `aegis_cluster.event.ProjectionRunner`; `run` blocks until the engine is closed."""

    catch_up = _blocking(event.ProjectionRunner.catch_up)
    run = _blocking(event.ProjectionRunner.run)
    rebuild = _blocking(event.ProjectionRunner.rebuild)
    query = _plain(event.ProjectionRunner.query)
    state = _plain(event.ProjectionRunner.state)
    states = _plain(event.ProjectionRunner.states)

    def __init__(
        self, store: EventStore, projection: event.Projection, target: str | Path | event.Target
    ) -> None:
        """As `aegis_cluster.event.ProjectionRunner`."""
        super().__init__(store._portal, event.ProjectionRunner(store._inner, projection, target))

    @property
    def position(self) -> event.Position:
        """As `aegis_cluster.event.ProjectionRunner.position`."""
        return self._inner.position

    @property
    def applied(self) -> int:
        """As `aegis_cluster.event.ProjectionRunner.applied`."""
        return self._inner.applied

    def __enter__(self) -> Self:
        self._portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.run(self._inner.__aexit__(kind, error, trace))


async def _entered(inner: Any) -> Any:
    return await inner.__aenter__()


class ChangeSubscription(_Blocking[cdc.ChangeSubscription]):
    """See `aegis_cluster.cdc.ChangeSubscription`; a step blocks until there is a change."""

    close = _blocking(cdc.ChangeSubscription.close)

    def ack(self, change: cdc.ChangeEvent | cdc.ChangeTransaction) -> None:
        """As `change.ack()`, or `transaction.ack()`."""
        self._portal.run(change.ack())

    def transactions(self) -> Iterator[cdc.ChangeTransaction]:
        """As `aegis_cluster.cdc.ChangeSubscription.transactions`."""
        steps = self._inner.transactions()
        while (found := self._portal.run(_next(steps))) is not None:
            yield found

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> cdc.ChangeEvent:
        found: cdc.ChangeEvent | None = self._portal.run(_next(self._inner))
        if found is None:
            raise StopIteration
        return found

    def __enter__(self) -> Self:
        self._portal.run(_entered(self._inner))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Mirror(_Blocking[cdc.Mirror]):
    """See `aegis_cluster.cdc.Mirror`; it works beside the program from entering to leaving."""

    caught_up = _blocking(cdc.Mirror.caught_up)
    stopped = _blocking(cdc.Mirror.stopped)
    close = _blocking(cdc.Mirror.close)

    @property
    def applied(self) -> int:
        """As `aegis_cluster.cdc.Mirror.applied`."""
        return self._inner.applied

    def __enter__(self) -> Self:
        self._portal.run(_entered(self._inner))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class OutboxRouter(_Blocking[cdc.OutboxRouter]):
    """See `aegis_cluster.cdc.OutboxRouter`; it works beside the program."""

    stopped = _blocking(cdc.OutboxRouter.stopped)
    close = _blocking(cdc.OutboxRouter.close)

    @property
    def published(self) -> int:
        """As `aegis_cluster.cdc.OutboxRouter.published`."""
        return self._inner.published

    def __enter__(self) -> Self:
        self._portal.run(_entered(self._inner))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class CDCEngine(_Blocking[cdc.CDCEngine]):
    """See `aegis_cluster.cdc.CDCEngine`; stands on an engine of this module that is open."""

    snapshot = _blocking(cdc.CDCEngine.snapshot)
    stopped = _blocking(cdc.CDCEngine.stopped)
    close = _blocking(cdc.CDCEngine.close)
    subscribe = _made(ChangeSubscription, cdc.CDCEngine.subscribe)
    apply_to = _made(Mirror, cdc.CDCEngine.apply_to)
    outbox = _made(OutboxRouter, cdc.CDCEngine.outbox)

    def __init__(self, engine: StreamingEngine, source: Any, **options: Any) -> None:
        """As `aegis_cluster.cdc.CDCEngine`."""
        super().__init__(engine._portal, cdc.CDCEngine(engine._inner, source, **options))

    @property
    def feed(self) -> str:
        """As `aegis_cluster.cdc.CDCEngine.feed`."""
        return self._inner.feed

    @property
    def state(self) -> cdc.ConnectorState | None:
        """As `aegis_cluster.cdc.CDCEngine.state`."""
        return self._inner.state

    def progress(self) -> cdc.SnapshotProgress | None:
        """As `aegis_cluster.cdc.CDCEngine.progress`."""
        return self._inner.progress()

    def __enter__(self) -> Self:
        self._portal.run(_entered(self._inner))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _NoPortal(_Portal):
    """Of an engine that is not open."""

    def __init__(self) -> None:
        """No thread."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        work.close()
        raise Misuse("The engine is not open; use 'with StreamingEngine.open(…)' or 'connect'.")

    def close(self) -> None:
        """Nothing to end."""


_NO_PORTAL = _NoPortal()
