"""Which client came over which connection of a listener, to notice when one closes.

A closed connection is known by its descriptor, and descriptors are used again; so whoever seems to
be gone is asked for once more: a router says of a message whether it has anyone to take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from aegis_cluster.broker.readiness import has_input
from aegis_cluster.wire.protocol import Api, encode_reply

if TYPE_CHECKING:
    from aegis_cluster.broker.readiness import Readiness

NOBODY_ASKED: Final = 2**62
"""Correlation of a reply that every client ignores."""


class Connections:
    """Of one listener."""

    def __init__(self, socket: zmq.Socket[bytes], readiness: Readiness) -> None:
        self._socket = socket
        self._readiness = readiness
        self._origins: dict[int, bytes] = {}
        self._replaced: list[bytes] = []
        self.monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.monitor.set(zmq.LINGER, 0)
        readiness.register(self.monitor)

    def heard(self, frame: zmq.Frame) -> None:
        """The first frame of a message, which names its sender."""
        try:
            descriptor, origin = int(frame.get(zmq.SRCFD)), frame.bytes
        except zmq.ZMQError:
            return  # its connection is gone already
        before = self._origins.get(descriptor)
        if before != origin:
            self._origins[descriptor] = origin
            if before is not None:
                self._replaced.append(before)

    def gone(self) -> list[bytes]:
        closed, self._replaced = self._replaced, []
        while has_input(self.monitor):
            descriptor = recv_monitor_message(self.monitor)["value"]
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

    def close(self) -> None:
        self._readiness.unregister(self.monitor)
        self._socket.disable_monitor()
        self.monitor.close(0)
