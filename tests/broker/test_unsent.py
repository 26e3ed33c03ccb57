"""What waits for readers is known in bytes, from ZeroMQ itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import zmq

from aegis_cluster.broker import unsent as unsent_module
from aegis_cluster.broker.sockets import Sockets
from aegis_cluster.broker.transport import Listener
from aegis_cluster.broker.unsent import Unsent
from aegis_cluster.limits import KIB, MIB, UNMARKED_BYTES_MAX
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Flag:
    done: bool = False


def test_bytes_count_until_a_later_mark_is_let_go() -> None:
    unsent, first, second = Unsent(), Flag(), Flag()
    unsent.sent("a", 10, None)
    unsent.sent("a", 90, first)
    unsent.sent("b", 1_000, second)
    assert (unsent.of("a"), unsent.of("b"), unsent.total) == (100, 1_000, 1_100)
    first.done = True
    assert (unsent.of("a"), unsent.total) == (0, 1_000)
    second.done = True
    unsent.sweep(1_000)
    assert unsent.total == 0


def test_small_messages_are_marked_now_and_then() -> None:
    unsent = Unsent()
    assert not unsent.wants_mark("a", 100)
    unsent.sent("a", UNMARKED_BYTES_MAX - 100, None)
    assert not unsent.wants_mark("a", 100)
    assert unsent.wants_mark("a", 101)
    assert not unsent.wants_mark("b", 101)


def test_what_a_closed_connection_held_is_given_back() -> None:
    unsent = Unsent()
    unsent.sent("a", 100, Flag())
    unsent.forget("a")
    assert unsent.total == 0


def test_connections_for_which_nothing_waits_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsent_module, "CONNECTIONS_MAX", 2)
    unsent = Unsent()
    unsent.sent("slow", 100, Flag())
    for number in range(10):
        unsent.sent(number, 100, None)
    assert unsent.of("slow") == 100
    assert not unsent.wants_mark(0, UNMARKED_BYTES_MAX), "forgotten"


# ---- real sockets


@pytest.fixture(params=["tcp", "inproc"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Sockets, zmq.Socket[bytes]]]:
    """A shard's data listener, and a client that reads no more than one message ahead."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    is_tcp = request.param == "tcp"
    endpoint = "tcp://127.0.0.1:*" if is_tcp else "inproc://data"
    sockets = Sockets({Listener.DATA: endpoint}, context=context)
    client = context.socket(zmq.DEALER)
    client.set(zmq.LINGER, 0)
    client.set(zmq.RCVHWM, 1)
    client.connect(sockets.address(Listener.DATA))
    yield sockets, client
    client.close()
    sockets.close()
    context.term()


def greeted(sockets: Sockets, client: zmq.Socket[bytes]) -> bytes:
    client.send(b"hi")
    found: list[bytes] = []

    def heard() -> bool:
        sockets.poll(10)
        received = sockets.receive(Listener.DATA)
        found.extend([] if received is None else [received[0]])
        return bool(found)

    wait_until(heard, "the client's first message", seconds=5)
    return found[0]


def waits(sockets: Sockets, origin: bytes) -> int:
    sockets.poll(1)  # also lets ZeroMQ do its housekeeping
    return sockets.unsent_answers.of((Listener.DATA, origin))


@pytest.mark.parametrize("size", [100, 20 * KIB, MIB])
def test_what_a_client_has_not_read_is_counted_and_reading_gives_it_back(
    pair: tuple[Sockets, zmq.Socket[bytes]], size: int
) -> None:
    sockets, client = pair
    origin = greeted(sockets, client)
    total = 30 * MIB if size == MIB else 500 * size
    sent = 0
    while sent < total:
        assert sockets.reply(Listener.DATA, origin, [b"answer", bytes(size)])
        sent += size + 6
    if size == MIB:  # more than the kernel takes for a connection
        assert waits(sockets, origin) > MIB
    read = 0
    while read < sent:
        assert client.poll(5_000)
        read += sum(map(len, client.recv_multipart()))
    wait_until(lambda: waits(sockets, origin) == 0, "everything has left", seconds=5)


def test_a_client_that_goes_gives_all_of_it_back(
    pair: tuple[Sockets, zmq.Socket[bytes]],
) -> None:
    sockets, client = pair
    origin = greeted(sockets, client)
    for _ in range(30):
        sockets.reply(Listener.DATA, origin, [b"answer", bytes(MIB)])
    assert waits(sockets, origin)
    client.close()
    wait_until(lambda: waits(sockets, origin) == 0, "nothing waits for nobody", seconds=5)
    assert not sockets.reply(Listener.DATA, origin, [b"answer"])
