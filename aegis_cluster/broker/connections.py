"""Which client came over which connection of a listener, to notice when one closes.

The idea: ZeroMQ says of a connection that it has closed, by descriptor, and names every connection
anew, so a client whose descriptor has closed is gone for good. Descriptors are used again, and what
a client has sent is read after its end as well; so before a descriptor gets another client all that
was said of closings is heard first.

Whether a router still has somebody to send to says little: it hears of an end later than we do.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import zmq

from aegis_cluster.read_ahead import ReadAhead
from aegis_cluster.wire.protocol import Api, encode_reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.broker.readiness import Readiness

NOBODY_ASKED: Final = 2**62
"""Correlation of a reply that every client ignores."""
PAST_S: Final = 10.0
"""Longer than what a client has sent waits to be read."""


class Connections:
    """Of one listener."""

    def __init__(
        self, socket: zmq.Socket[bytes], readiness: Readiness, *, encrypted: bool, told: bool
    ) -> None:
        """told: it is asked who has `gone`, at once; the others are only kept in bounds."""
        self._socket = socket
        self._readiness = readiness
        self._told = told
        self._origins: dict[int, bytes] = {}
        self._news: list[bytes] = []
        self._past: dict[bytes, float] = {}
        """Who has gone, until when more of theirs may still be read."""
        self._read_ahead = ReadAhead(socket, encrypted=encrypted, now_s=time.monotonic())
        self.monitor = self._read_ahead.monitor
        if told:
            readiness.register(self.monitor)

    def heard(self, frames: Sequence[zmq.Frame]) -> bool:
        """A whole message, its sender first. False: of a connection that was cut; to be dropped."""
        descriptor = self._read_ahead.heard(frames)
        if self._told and descriptor is not None:
            self._came_over(descriptor, frames[0].bytes)
        return not self._read_ahead.is_cut(frames)

    @property
    def has_news(self) -> bool:
        """Somebody may be gone, though the monitor has no more to say."""
        return bool(self._news) or self._read_ahead.has_closed

    def gone(self) -> list[bytes]:
        """Clients whose connection has closed since the last call, and those who had gone before
        and of whom more was heard since."""
        self._look()
        now_s = time.monotonic()
        while self._past and now_s >= next(iter(self._past.values())):
            del self._past[next(iter(self._past))]
        news, self._news = self._news, []
        return news

    def _came_over(self, descriptor: int, origin: bytes) -> None:
        if self._origins.get(descriptor) == origin:
            return
        self._look()
        before = self._origins.get(descriptor)
        if (
            origin in self._past
            or not self._read_ahead.is_open(descriptor)
            or (before is not None and self._is_there(before))
        ):
            self._leaves(origin)
            return
        if before is not None:
            self._leaves(before)
        self._origins[descriptor] = origin

    def _look(self) -> None:
        for descriptor in self._read_ahead.closed():
            origin = self._origins.pop(descriptor, None)
            if origin is not None:
                self._leaves(origin)

    def _leaves(self, origin: bytes) -> None:
        self._news.append(origin)
        self._past.pop(origin, None)  # the order is that of time
        self._past[origin] = time.monotonic() + PAST_S

    def _is_there(self, origin: bytes) -> bool:
        self._readiness.used(self._socket)
        probe = encode_reply(Api.HELLO, correlation=NOBODY_ASKED)
        try:
            self._socket.send_multipart([origin, *probe], zmq.DONTWAIT)
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def cut(self) -> list[str]:
        """Cut connections that send faster than they are read; a sentence about each."""
        return self._read_ahead.look(time.monotonic(), keep_closed=self._told)

    def close(self) -> None:
        if self._told:
            self._readiness.unregister(self.monitor)
        self._read_ahead.close()
