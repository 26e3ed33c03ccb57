"""Addresses behind which nothing serves, each in another way; and every public call, to try there.

`SURFACE` is found by looking at the classes, so a call that is added and not tried fails a test.
"""

from __future__ import annotations

import contextlib
import inspect
import socket
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import zmq

from aegis_cluster import (
    DeliveryMode,
    Message,
    Offset,
    StreamingEngine,
    SubscribeConfig,
    TopicConfig,
)
from aegis_cluster.channel import Channel
from aegis_cluster.group import ConsumerGroup
from aegis_cluster.ids import TopicPartition
from aegis_cluster.producer import Producer
from aegis_cluster.subscriber import Subscriber
from aegis_cluster.wire.protocol import PROTOCOL_VERSION, Api, Hello, encode_reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    Call = Callable[[StreamingEngine, float], Awaitable[Any]]

CLASSES: Final = (StreamingEngine, Channel, Producer, Subscriber, ConsumerGroup)
LOCAL: Final = {
    "StreamingEngine.open", "StreamingEngine.connect", "StreamingEngine.close",
    "StreamingEngine.channel", "StreamingEngine.producer", "StreamingEngine.started",
    "StreamingEngine.forget", "Producer.close", "Subscriber.close", "Subscriber.pause",
    "Subscriber.resume", "Subscriber.position", "Subscriber.hand_out_again",
    "StreamingEngine.background", "StreamingEngine.deadline", "StreamingEngine.group",
    "Subscriber.begin", "Subscriber.handled", "Subscriber.stop",
    "Producer.transaction", "StreamingEngine.go_back", "StreamingEngine.persistent_subscription",
    "Subscriber.committed_within", "Subscriber.go_back_for", "Subscriber.is_committed_by",
    "Subscriber.positions_in_hand",
    "Subscriber.batches",  # waits for messages as long as there are none, like the iterator
}  # fmt: skip
"""Public names that ask nobody anything, or that end what is here."""


def surface() -> set[str]:
    """Every public method that may ask a cluster, as `Class.method`."""
    names = {
        f"{owner.__name__}.{name}"
        for owner in CLASSES
        for name, member in inspect.getmembers(owner, inspect.isfunction)
        if not name.startswith("_")
    }
    return names - LOCAL


async def _subscribed(engine: StreamingEngine, timeout: float) -> Subscriber:
    return await engine.subscribe("t", timeout=timeout).__aenter__()


async def _sent(engine: StreamingEngine, timeout: float) -> Any:
    producer = engine.producer()
    try:
        return await (await producer.send("t", Message(payload=1), timeout=timeout))
    finally:
        await producer.close()


async def _flushed(engine: StreamingEngine, timeout: float) -> Any:
    producer = engine.producer()
    try:
        await producer.send("t", Message(payload=1), timeout=timeout)
        await producer.flush(timeout=timeout)
    finally:
        await producer.close()


async def _committed(engine: StreamingEngine, timeout: float) -> Any:
    config = SubscribeConfig(group_id="g")
    subscriber = await engine.subscribe("t", config, timeout=timeout).__aenter__()
    try:
        await subscriber.commit(timeout=timeout)
    finally:
        await subscriber.close()
    return []


async def _lag(engine: StreamingEngine, timeout: float) -> Any:
    return await (await _subscribed(engine, timeout)).lag(timeout=timeout)


async def _sought(engine: StreamingEngine, timeout: float) -> Any:
    return await (await _subscribed(engine, timeout)).seek(0, Offset.LATEST, timeout=timeout)


async def _committed_within(engine: StreamingEngine, timeout: float) -> Any:
    config = SubscribeConfig(group_id="g", delivery_mode=DeliveryMode.EXACTLY_ONCE)
    subscriber = await engine.subscribe("t", config, timeout=timeout).__aenter__()
    try:
        place = TopicPartition("t", 0)
        await subscriber.commit_within((1, 0), {place: 0}, engine.deadline(timeout))
    finally:
        await subscriber.close()
    return []


async def _batch_polled(engine: StreamingEngine, timeout: float) -> Any:
    return await engine.subscribe("t", timeout=timeout).poll_batch(timeout=timeout) or []


async def _polled(engine: StreamingEngine, timeout: float) -> Any:
    return await engine.subscribe("t", timeout=timeout).poll(timeout=timeout)


async def _all(found: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in found]


def _now() -> datetime:
    return datetime.now(UTC)


_MESSAGE: Final = Message(payload=1)
CALLS: Final[dict[str, Call]] = {
    "StreamingEngine.create_topic": lambda e, s: e.create_topic("new", timeout=s),
    "StreamingEngine.alter_topic": lambda e, s: e.alter_topic(
        "t", TopicConfig(retention="1d"), timeout=s
    ),
    "StreamingEngine.delete_topic": lambda e, s: e.delete_topic("t", timeout=s),
    "StreamingEngine.list_topics": lambda e, s: e.list_topics(timeout=s),
    "StreamingEngine.describe_topic": lambda e, s: e.describe_topic("t", timeout=s),
    "StreamingEngine.offsets": lambda e, s: e.offsets("t", timeout=s),
    "StreamingEngine.stats": lambda e, s: e.stats(timeout=s),
    "StreamingEngine.publish": lambda e, s: e.publish("t", _MESSAGE, timeout=s),
    "StreamingEngine.publish_many": lambda e, s: e.publish_many("t", [1, 2], timeout=s),
    "StreamingEngine.publish_to_many": lambda e, s: e.publish_to_many(
        ["t", "u"], _MESSAGE, timeout=s
    ),
    "StreamingEngine.history": lambda e, s: e.history("t", 1, timeout=s),
    "StreamingEngine.history_after": lambda e, s: _all(
        aiter(e.history_after("t", _now(), timeout=s))
    ),
    "StreamingEngine.subscribe": _subscribed,
    "StreamingEngine.list_subscriptions": lambda e, s: e.list_subscriptions(timeout=s),
    "StreamingEngine.list_transactions": lambda e, s: e.list_transactions(timeout=s),
    "StreamingEngine.describe_transaction": lambda e, s: e.describe_transaction("x", timeout=s),
    "StreamingEngine.abort_transaction": lambda e, s: e.abort_transaction("x", timeout=s),
    "Channel.publish": lambda e, s: e.channel("t").publish(_MESSAGE, timeout=s),
    "Channel.publish_many": lambda e, s: e.channel("t").publish_many([1], timeout=s),
    "Channel.subscribe": lambda e, s: e.channel("t").subscribe(timeout=s).__aenter__(),
    "Channel.history": lambda e, s: e.channel("t").history(1, timeout=s),
    "Channel.history_after": lambda e, s: e.channel("t").history_after(_now(), timeout=s),
    "Channel.offsets": lambda e, s: e.channel("t").offsets(timeout=s),
    "Channel.alter": lambda e, s: e.channel("t").alter(TopicConfig(retention="1d"), timeout=s),
    "Channel.describe": lambda e, s: e.channel("t").describe(timeout=s),
    "Producer.send": _sent,
    "Producer.flush": _flushed,
    "Producer.publish": lambda e, s: e.publish("t", _MESSAGE, timeout=s),
    "Producer.publish_many": lambda e, s: e.publish_many("t", [1], timeout=s),
    "StreamingEngine.list_groups": lambda e, s: e.list_groups(timeout=s),
    "ConsumerGroup.describe": lambda e, s: e.group("g").describe(timeout=s),
    "ConsumerGroup.positions": lambda e, s: e.group("g").positions(timeout=s),
    "ConsumerGroup.lag": lambda e, s: e.group("g").lag(timeout=s),
    "ConsumerGroup.reset": lambda e, s: e.group("g").reset(Offset.EARLIEST, "t", timeout=s),
    "ConsumerGroup.delete": lambda e, s: e.group("g").delete(timeout=s),
    "Subscriber.commit": _committed,
    "Subscriber.lag": _lag,
    "Subscriber.seek": _sought,
    "Subscriber.poll": _polled,
    "Subscriber.poll_batch": _batch_polled,
    "Subscriber.commit_within": _committed_within,
}  # fmt: skip


# ---- ways to be dead


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """Nothing listens there, and never has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def _tcp(says: bytes) -> Iterator[str]:
    """Accepts whoever comes, says something at once, and nothing more."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
        guests: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    guest, _ = server.accept()
                    guests.append(guest)
                    guest.sendall(says)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for guest in guests:
            guest.close()


def silent() -> contextlib.AbstractContextManager[str]:
    """As a stopped process looks: the kernel accepts, and nobody is there."""
    return _tcp(b"")


def garbage() -> contextlib.AbstractContextManager[str]:
    return _tcp(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(range(256)))


@contextlib.contextmanager
def _zmq(answer: Callable[[bytes], list[bytes] | None]) -> Iterator[str]:
    """A ROUTER that answers as it likes, or not at all."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    ends = threading.Event()

    def serve() -> None:
        while not ends.is_set():
            if router.poll(20):
                origin, first, *_ = router.recv_multipart()
                reply = answer(first)
                if reply is not None:
                    router.send_multipart([origin, *reply])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"tcp://127.0.0.1:{port}"
    ends.set()
    thread.join(5)
    router.close()
    context.term()


def mute() -> contextlib.AbstractContextManager[str]:
    """Speaks ZeroMQ, and answers nothing, not even a greeting."""
    return _zmq(lambda _: None)


def babbling() -> contextlib.AbstractContextManager[str]:
    """Answers every request, the greeting included, with garbage."""
    return _zmq(lambda _: [b"\xc1garbage", b"\xff" * 9])


def greets_and_babbles() -> contextlib.AbstractContextManager[str]:
    """Greets as a node does, and answers everything after that with garbage."""
    hello = Hello(PROTOCOL_VERSION, "peer", "c", 1, "one", "boot", 0)
    greeting = [bytes(part) for part in encode_reply(Api.HELLO, hello.to_fields(), correlation=0)]
    return _zmq(lambda first: greeting if first[1:2] == b"\x00" else [b"\x93\x01\x02\x03"])


DEATHS: Final = (nobody, silent, garbage, mute, babbling, greets_and_babbles)
