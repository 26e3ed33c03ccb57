"""Who was connected, and is gone: everybody is told of, however the ends fall together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import zmq

from aegis_cluster.broker.connections import Connections
from aegis_cluster.broker.readiness import Readiness
from aegis_cluster.read_ahead import ReadAhead
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENTS = 20


class Listener:
    """A router, who has been heard there, and who was said to be gone."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self.connections = Connections(self._router, Readiness(), encrypted=False, told=True)
        self.heard: set[bytes] = set()
        self.descriptors: set[int] = set()
        self.gone: list[bytes] = []

    def client(self, linger_ms: int = 0) -> zmq.Socket[bytes]:
        made = self._context.socket(zmq.DEALER)
        made.set(zmq.LINGER, linger_ms)
        made.connect(f"tcp://127.0.0.1:{self._port}")
        made.send(b"hello")
        return made

    def hear(self) -> None:
        while self._router.poll(0):
            frames = self._router.recv_multipart(copy=False)
            self.descriptors.add(int(frames[0].get(zmq.SRCFD)))
            assert self.connections.heard(frames)
            self.heard.add(frames[0].bytes)

    def ask(self) -> None:
        """At the first sign, as a shard's loop does."""
        if self.connections.monitor.poll(1) or self.connections.has_news:
            self.gone.extend(self.connections.gone())

    def until_heard(self, count: int) -> None:
        def heard() -> bool:
            self.hear()
            self.ask()
            return len(self.heard) >= count

        wait_until(heard, f"{count} are heard")

    def until_gone(self, count: int) -> None:
        def gone() -> bool:
            self.hear()
            self.ask()
            return len(set(self.gone)) >= count

        wait_until(gone, f"{count} are told of")

    def close(self) -> None:
        self.connections.close()
        self._context.destroy(0)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def test_every_end_is_told_once(listener: Listener) -> None:
    """ZeroMQ says that a connection has closed before its router knows. When the router was asked
    then, every sixth end was lost, and a dead member kept its partitions for 30 seconds."""
    for count in range(CLIENTS, 11 * CLIENTS, CLIENTS):
        clients = [listener.client() for _ in range(CLIENTS)]
        listener.until_heard(count)
        for client in clients:
            client.close()
        listener.until_gone(count)
    assert set(listener.gone) == listener.heard
    assert len(listener.gone) == len(listener.heard)


def test_who_stays_is_not_told_of(listener: Listener) -> None:
    """Others come and go at once, and their descriptors are used again."""
    stays = listener.client()
    listener.until_heard(1)
    (name,) = listener.heard
    for _ in range(100):
        listener.client(linger_ms=-1).close()
        stays.send(b"still here")
    listener.until_heard(101)
    listener.until_gone(100)
    assert name not in listener.gone
    stays.close()
    listener.until_gone(101)
    assert name in listener.gone


def test_who_is_heard_after_its_end_is_told_of_again(listener: Listener) -> None:
    """Its last word may have begun something that ends with its connection."""
    client = listener.client(linger_ms=-1)
    listener.until_heard(1)
    client.send(b"last word")
    client.close()
    wait_until(lambda: bool(listener.connections.monitor.poll(1)), "its end is seen")
    listener.ask()
    assert listener.gone == list(listener.heard)
    listener.hear()
    assert listener.connections.has_news
    listener.ask()
    assert listener.gone == list(listener.heard) * 2


def test_of_two_on_one_descriptor_who_can_be_reached_stays(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody sent whose end was never noted is read after the descriptor's next client."""
    stays = listener.client()
    listener.until_heard(1)
    (name,) = listener.heard
    (descriptor,) = listener.descriptors
    other = listener.client()
    monkeypatch.setattr(ReadAhead, "heard", lambda *_: descriptor)
    listener.until_heard(2)
    listener.until_gone(1)
    assert set(listener.gone) == listener.heard - {name}
    for client in (stays, other):
        client.close()
