"""What can be read is found whatever was done with a socket before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import zmq

from aegis_cluster.broker.readiness import Readiness

if TYPE_CHECKING:
    from collections.abc import Iterator

    Socket = zmq.Socket[bytes]

LONG_MS = 5_000


@pytest.fixture
def pair() -> Iterator[tuple[Socket, Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    one, other = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    one.bind("inproc://readiness")
    other.connect("inproc://readiness")
    yield one, other
    context.destroy(linger=0)


def wait_for(readiness: Readiness, socket: Socket) -> None:
    """Several waits may end early: something about a socket has changed, but it has no message."""
    for _ in range(20):
        if socket in readiness.wait(LONG_MS):
            return
    raise AssertionError("the message was not found")


def test_a_message_is_found_and_found_again_until_it_is_read(pair: tuple[Socket, Socket]) -> None:
    readiness = Readiness()
    readiness.register(pair[0])
    pair[1].send(b"first")
    pair[1].send(b"second")
    wait_for(readiness, pair[0])
    wait_for(readiness, pair[0])
    assert pair[0].recv() == b"first"
    wait_for(readiness, pair[0])
    assert pair[0].recv() == b"second"
    assert readiness.wait(0) == set()


def test_a_message_whose_sign_was_taken_away_by_a_send_is_found(
    pair: tuple[Socket, Socket],
) -> None:
    readiness = Readiness()
    readiness.register(pair[0])
    for number in range(50):
        pair[1].send(b"%d" % number)
        # Whatever ZeroMQ does with its signs while it sends or is asked.
        pair[0].send(b"answer")
        pair[0].get(zmq.EVENTS)
        readiness.used(pair[0])
        wait_for(readiness, pair[0])
        assert pair[0].recv() == b"%d" % number
        assert readiness.wait(0) == set()


def test_a_descriptor_is_told_as_itself_and_an_unregistered_source_is_not(
    pair: tuple[Socket, Socket],
) -> None:
    readiness = Readiness()
    read_fd, write_fd = os.pipe()
    readiness.register(read_fd)
    readiness.register(pair[0])
    os.write(write_fd, b".")
    pair[1].send(b"unread")
    wait_for(readiness, pair[0])
    assert readiness.wait(0) == {read_fd, pair[0]}
    readiness.unregister(pair[0])
    assert readiness.wait(0) == {read_fd}
    readiness.unregister(read_fd)
    assert readiness.wait(0) == set()
    os.close(read_fd)
    os.close(write_fd)
