"""Which client came over which connection of a listener, to notice when one closes.

A closed connection is known by its descriptor, and descriptors are used again; so whoever seems to
be gone is asked for once more: a router says of a message whether it has anyone to take it.
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
        self._replaced: list[bytes] = []
        self._read_ahead = ReadAhead(socket, encrypted=encrypted, now_s=time.monotonic())
        self.monitor = self._read_ahead.monitor
        if told:
            readiness.register(self.monitor)

    def heard(self, frames: Sequence[zmq.Frame]) -> bool:
        """A whole message, its sender first. False: of a connection that was cut; to be dropped."""
        descriptor = self._read_ahead.heard(frames)
        if descriptor is None:
            return not self._read_ahead.is_cut(frames)
        if self._told:
            origin = frames[0].bytes
            before = self._origins.get(descriptor)
            if before != origin:
                self._origins[descriptor] = origin
                if before is not None:
                    self._replaced.append(before)
        return not self._read_ahead.is_cut(frames)

    @property
    def has_news(self) -> bool:
        """Somebody may be gone, though the monitor has no more to say."""
        return self._read_ahead.has_closed

    def gone(self) -> list[bytes]:
        """Clients whose connection has closed since the last call."""
        closed, self._replaced = self._replaced, []
        for descriptor in self._read_ahead.closed():
            origin = self._origins.pop(descriptor, None)
            if origin is not None:
                closed.append(origin)
        return [origin for origin in closed if not self._is_there(origin)]

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
