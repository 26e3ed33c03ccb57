"""The proxies: bytes arrive whole and in order; cuts hold them back, one way or both."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from chaos.processes.links import Conditions, Links

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT_S = 0.3
"""In which nothing may arrive."""


class Ends:
    """Both ends of one connection through a proxy, dialled by `a` at `b`."""

    def __init__(self, links: Links) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        (detour,) = links.detours("a", {"b": [("127.0.0.1", port)]}).values()
        self._port = int(detour.rpartition(":")[2])
        self.near = self.dial()
        self.far = self.accept()

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=10)

    def accept(self) -> socket.socket:
        self._listener.settimeout(10)
        found, _ = self._listener.accept()
        found.settimeout(10)
        return found

    def close(self) -> None:
        for one in (self._listener, self.near, self.far):
            one.close()


@pytest.fixture
def links() -> Iterator[Links]:
    made = Links(0)
    yield made
    made.close()


@contextmanager
def ends(links: Links) -> Iterator[Ends]:
    with closing(Ends(links)) as made:
        yield made


def nothing_comes(end: socket.socket) -> bool:
    end.settimeout(SHORT_S)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(10)
    return False


def receive(end: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := end.recv(size - len(found))):
        found += more
    return found


def test_bytes_pass_both_ways_whole_and_in_order(links: Links) -> None:
    links.set([("a", "b")], Conditions(delay_ms=1, jitter_ms=5, loss=0.01))
    data = bytes(range(256)) * 4_000
    with ends(links) as pair:
        sending = threading.Thread(target=pair.near.sendall, args=(data,))
        sending.start()
        assert receive(pair.far, len(data)) == data
        sending.join()
        pair.far.sendall(b"answer")
        assert receive(pair.near, 6) == b"answer"


def test_a_cut_one_way_holds_back_what_goes_that_way(links: Links) -> None:
    with ends(links) as pair:
        links.set([("a", "b")], Conditions(cut=True))
        pair.far.sendall(b"heard")
        assert receive(pair.near, 5) == b"heard"
        pair.near.sendall(b"late")
        assert nothing_comes(pair.far)
        links.heal()
        assert receive(pair.far, 4) == b"late"


def test_nobody_connects_through_a_cut(links: Links) -> None:
    with ends(links) as pair:
        links.set([("b", "a")], Conditions(cut=True))
        with pair.dial() as late:
            late.sendall(b"hello")
            pair._listener.settimeout(SHORT_S)
            with pytest.raises(TimeoutError):
                pair._listener.accept()
            links.heal()
            with pair.accept() as found:
                assert receive(found, 5) == b"hello"


def test_the_end_of_one_side_reaches_the_other(links: Links) -> None:
    with ends(links) as pair:
        pair.far.sendall(b"last words")
        pair.far.close()
        assert receive(pair.near, 10) == b"last words"
        assert pair.near.recv(1) == b""


def test_a_death_behind_a_cut_is_not_noticed(links: Links) -> None:
    with ends(links) as pair:
        links.set([("b", "a")], Conditions(cut=True))
        pair.far.close()
        assert nothing_comes(pair.near)
        links.heal()
        assert pair.near.recv(1) == b""


def test_a_reset_ends_connections(links: Links) -> None:
    with ends(links) as pair:
        links.reset([("a", "b")])
        with pytest.raises(ConnectionResetError):
            pair.near.recv(1)


def test_a_delay_delays(links: Links) -> None:
    with ends(links) as pair:
        links.set([("a", "b")], Conditions(delay_ms=300))
        begun = time.monotonic()
        pair.near.sendall(b"slow")
        assert receive(pair.far, 4) == b"slow"
        assert time.monotonic() - begun >= 0.25
