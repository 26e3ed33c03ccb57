"""How much ZeroMQ has read of each connection ahead of its listener; one with too much is cut.

The idea: the kernel says how many bytes have come over a connection (TCP_INFO), and the frames that
the listener has taken say how many of them have come out. What lies between is what ZeroMQ holds:
messages that wait, and parts of messages that are not whole yet. A connection that goes over its
bound is shut down, and what still waits of it is dropped.

The rule it protects: memory is bounded in bytes whatever anybody sends, and nobody can end the
process. ZeroMQ's own bound does neither: it counts messages, never those of endlessly many parts,
and libzmq 4.3.5 aborts (`!_io_error`) when a connection breaks whose input it has stopped, at the
next heartbeat or ping. So every socket that hears strangers has RCVHWM 0, and a `ReadAhead`.
"""

from __future__ import annotations

import socket as sockets
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from aegis_cluster.limits import (
    READ_AHEAD_BYTES_MAX,
    READ_AHEAD_BYTES_TOTAL_MAX,
    READ_AHEAD_LOOK_MS,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_TCP_INFO_BYTES: Final = 136
_BYTES_RECEIVED: Final = struct.Struct("=128xQ")
"""`tcpi_bytes_received` of `struct tcp_info` (linux/tcp.h, since Linux 4.1)."""
_SHORT_FRAME: Final = 255
_SHORT_HEADER_BYTES: Final = 2
_LONG_HEADER_BYTES: Final = 9
_CURVE_BYTES: Final = 33
"""What CURVE adds to a frame: command name, nonce, authenticator, flags (RFC 26)."""
_GREETING_BYTES: Final = 4_096
_HEARTBEATS_BYTES_PER_S: Final = 512
"""Pings and pongs come over a connection and are never taken; at most so much of them."""
_PART_OVERHEAD_BYTES: Final = 100
"""What a part takes in memory beside its bytes; it counts where parts are small and many."""
_MANY_PARTS: Final = 256
_DROP_S: Final = 10.0
"""ZeroMQ names every connection anew, so nobody who comes back is mistaken for one that was cut."""


@dataclass(slots=True)
class _Connection:
    handle: sockets.socket
    """Borrowed from ZeroMQ, which closes it; ours is detached before."""
    peer: Any
    looked_s: float
    received: int = 0
    """As of that look."""
    taken: int = 0
    heartbeats: int = _GREETING_BYTES
    """What has come and is never taken, at most."""
    parts: int = 0
    part_bytes: int = 0
    """Of what was taken since the last look."""
    frame: zmq.Frame | None = None
    """Names its sender."""
    ahead: int = 0
    """Bytes in memory, as of the last look."""


class ReadAhead:
    """Of one ROUTER that is bound to a `tcp://` address; used by the thread that owns it."""

    def __init__(self, router: zmq.Socket[bytes], *, encrypted: bool, now_s: float) -> None:
        self._router = router
        self._frame_bytes = _CURVE_BYTES if encrypted else 0
        self._connections: dict[int, _Connection] = {}
        self._cut: dict[bytes, float] = {}
        """Senders whose messages are dropped, and until when; their connections are gone before."""
        self._closed: list[int] = []
        self._now_s = now_s
        self._look_due_s = now_s
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        self.monitor: zmq.Socket[bytes] = router.get_monitor_socket(events)
        self.monitor.set(zmq.LINGER, 0)

    # ---- what comes and goes

    def closed(self) -> list[int]:
        """Descriptors of connections that have closed since the last call."""
        self._follow()
        closed, self._closed = self._closed, []
        return closed

    @property
    def has_closed(self) -> bool:
        """Some have been seen to close since `closed` was called."""
        return bool(self._closed)

    def is_open(self, descriptor: int) -> bool:
        """It is not known to have closed."""
        return descriptor in self._connections

    def _follow(self) -> None:
        while int(self.monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(self.monitor)
            descriptor = event["value"]
            self._forget(descriptor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._begin(descriptor)
            else:
                self._closed.append(descriptor)

    def _begin(self, descriptor: int) -> None:
        try:
            handle = sockets.socket(fileno=descriptor)
        except OSError:
            return  # closed already
        try:
            peer = handle.getpeername()
        except OSError:
            handle.detach()
            return
        self._connections[descriptor] = _Connection(handle, peer, self._now_s)

    def _forget(self, descriptor: int) -> None:
        connection = self._connections.pop(descriptor, None)
        if connection is not None:
            connection.handle.detach()

    # ---- what is taken

    def heard(self, frames: Sequence[zmq.Frame]) -> int | None:
        """A whole message was taken, its sender first. Over which connection: its descriptor, or
        None when ZeroMQ does not say."""
        try:
            descriptor = int(frames[0].get(zmq.SRCFD))
        except zmq.ZMQError:
            return None
        if descriptor not in self._connections:
            self._follow()
        connection = self._connections.get(descriptor)
        if connection is not None:
            self._count(connection, frames)
        return descriptor

    def _count(self, connection: _Connection, frames: Sequence[zmq.Frame]) -> None:
        connection.frame = frames[0]
        size = 0
        for frame in frames[1:]:
            length = len(frame) + self._frame_bytes
            size += length + (_SHORT_HEADER_BYTES if length <= _SHORT_FRAME else _LONG_HEADER_BYTES)
        connection.taken += size
        connection.parts += len(frames) - 1
        connection.part_bytes += size

    def is_cut(self, frames: Sequence[zmq.Frame]) -> bool:
        """Whether the message came over a connection that was cut."""
        return bool(self._cut) and frames[0].bytes in self._cut

    # ---- what lies between

    def look(self, now_s: float, *, keep_closed: bool = False) -> list[str]:
        """Cut those that are too far ahead; a sentence about each. To be called often.

        keep_closed: somebody asks for those that have `closed`.
        """
        self._now_s = now_s
        if now_s < self._look_due_s:
            return []
        self._follow()
        if not keep_closed:
            self._closed.clear()
        self._cut = {origin: until for origin, until in self._cut.items() if now_s < until}
        # Many connections are looked at less often: a look costs about a microsecond for each.
        self._look_due_s = now_s + max(READ_AHEAD_LOOK_MS, len(self._connections) / 4) / 1_000
        total = 0
        for descriptor, connection in list(self._connections.items()):
            if self._measure(connection, now_s):
                total += connection.ahead
            else:
                self._forget(descriptor)
        found = [c for c in self._connections.values() if c.ahead > READ_AHEAD_BYTES_MAX]
        if not found and total > READ_AHEAD_BYTES_TOTAL_MAX:
            found = [max(self._connections.values(), key=lambda c: c.ahead)]
        return [said for connection in found if (said := self._shut(connection)) is not None]

    def _measure(self, connection: _Connection, now_s: float) -> bool:
        """Whether the connection is still there."""
        try:
            info = connection.handle.getsockopt(
                sockets.IPPROTO_TCP, sockets.TCP_INFO, _TCP_INFO_BYTES
            )
        except OSError:
            return False
        if len(info) < _TCP_INFO_BYTES:
            return True  # a kernel that does not count
        (received,) = _BYTES_RECEIVED.unpack_from(info)
        possible = int((now_s - connection.looked_s) * _HEARTBEATS_BYTES_PER_S)
        connection.heartbeats += max(0, min(received - connection.received, possible))
        connection.looked_s, connection.received = now_s, received
        ahead = max(0, received - connection.taken - connection.heartbeats)
        if ahead == 0 and connection.parts:
            # A message was taken, so no more than this is left of one that is not whole.
            connection.taken, connection.heartbeats = received, 0
        if connection.parts >= _MANY_PARTS:
            ahead += ahead * connection.parts * _PART_OVERHEAD_BYTES // connection.part_bytes
        connection.ahead = ahead
        connection.parts = connection.part_bytes = 0
        return True

    def _shut(self, connection: _Connection) -> str | None:
        ahead, connection.ahead = connection.ahead, 0
        try:
            if connection.handle.getpeername() != connection.peer:
                return None  # its number is another's by now
            connection.handle.shutdown(sockets.SHUT_RDWR)
        except OSError:
            return None
        if connection.frame is not None:
            self._cut[connection.frame.bytes] = self._now_s + _DROP_S
        host, port = connection.peer[:2]
        return (
            f"The connection from {host}:{port} was cut: {ahead >> 20} MB came over it faster than"
            " they could be taken, or never became a whole message."
        )

    def close(self) -> None:
        """Before the router is closed."""
        for descriptor in list(self._connections):
            self._forget(descriptor)
        self._router.disable_monitor()
        self.monitor.close(0)
