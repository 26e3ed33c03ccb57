"""One ZeroMQ DEALER on an asyncio loop: messages out, messages in, and news of the connection.

The idea: ZeroMQ's file descriptor is edge-triggered, so after every read *and every send* the
socket is asked whether more has come; a wake-up can then not be lost. A budget per turn keeps one
busy link from starving the others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from aegis_cluster.curve import FAILED_EVENTS, LINK_EVENTS
from aegis_cluster.limits import FETCH_BYTES_MAX, FRAME_BYTES_MAX, KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.curve import Handshakes
    from aegis_cluster.wire.protocol import Part

MESSAGES_PER_TURN: Final = 64
HIGH_WATER_MESSAGES: Final = 1_000
PART_BYTES_MAX: Final = FETCH_BYTES_MAX + FRAME_BYTES_MAX
RECONNECT_MS: Final = 50
RECONNECT_MS_MAX: Final = 500
HEARTBEAT_MS: Final = 250
HEARTBEAT_TIMEOUT_MS: Final = 1_000
"""A process that is stopped keeps its connections: after the sum of the two a link to it counts as
lost, and its partitions' new leaders are looked for. ZeroMQ's own threads answer, however busy the
program is."""
COPY_BYTES: Final = 64 * KIB

# As plain numbers: to combine flags that are enums costs more than to send a part.
_POLLIN: Final = int(zmq.POLLIN)
_NOW: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT) | int(zmq.SNDMORE)


class ClientSocket:
    """Owned by one event loop; used from its thread only."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        handshakes: Handshakes,
        on_message: Callable[[list[Part]], None],
        on_connected: Callable[[], None],
        on_lost: Callable[[], None],
        on_failed: Callable[[int], None],
    ) -> None:
        """on_failed: gets ZeroMQ's event when a handshake has failed; the socket is of no more use.

        handshakes: sets the socket up with keys, where there are any.
        """
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.SNDHWM, HIGH_WATER_MESSAGES),
            # Answers are as many as questions. libzmq 4.3.5 aborts the process when a connection
            # breaks whose input it has stopped at a mark; see `read_ahead`.
            (zmq.RCVHWM, HIGH_WATER_MESSAGES if endpoint.startswith("inproc://") else 0),
            (zmq.MAXMSGSIZE, PART_BYTES_MAX),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.TCP_KEEPALIVE, 1),
        ):
            self._socket.set(option, value)
        self._monitor: zmq.Socket[bytes] | None = None
        self._fds = [_descriptor(self._socket)]
        self._loop.add_reader(self._fds[0], self._readable)
        if endpoint.startswith("inproc://"):
            # Within a process there is no connection that could come and go.
            self._socket.connect(endpoint)
            self._loop.call_soon(self._greet)
            return
        handshakes.apply(self._socket)
        self._monitor = self._socket.get_monitor_socket(LINK_EVENTS)
        self._fds.append(_descriptor(self._monitor))
        self._loop.add_reader(self._fds[1], self._follow)
        self._socket.connect(endpoint)
        self._loop.call_soon(self._follow)

    @property
    def closed(self) -> bool:
        return self._socket.closed

    def send(self, message: Sequence[Part]) -> bool:
        """False: it did not leave, because there is no connection or its queue is full."""
        copy = max(map(len, message)) < COPY_BYTES
        try:
            for part in message[:-1]:
                self._socket.send(part, _MORE, copy)
            self._socket.send(message[-1], _NOW, copy)
        except zmq.Again:
            return False
        finally:
            if self._has_input():
                self._loop.call_soon(self._readable)
        return True

    def close(self) -> None:
        if self._socket.closed:
            return
        for fd in self._fds:
            self._loop.remove_reader(fd)
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
        self._socket.close(0)

    def _has_input(self) -> bool:
        """Whether a message can be received now; cheaper than to try and fail."""
        return bool(int(self._socket.get(zmq.EVENTS)) & _POLLIN)

    def _readable(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if self._socket.closed or not self._has_input():
                return
            try:
                frames = [self._socket.recv(_NOW, copy=False)]
                while frames[-1].more:
                    frames.append(self._socket.recv(_NOW, copy=False))
            except zmq.Again:
                return
            self._on_message([f.bytes if len(f) < COPY_BYTES else f.buffer for f in frames])
        self._loop.call_soon(self._readable)

    def _greet(self) -> None:
        if not self._socket.closed:
            self._on_connected()

    def _follow(self) -> None:
        """Tell of connections made and lost, after what came over them was delivered."""
        monitor = self._monitor
        while monitor is not None and not monitor.closed and monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._on_connected()
            elif event & FAILED_EVENTS:
                self._on_failed(event)
            else:
                self._readable()
                self._on_lost()


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    """What the event loop watches; readable means only that something about the socket changed."""
    return int(socket.get(zmq.FD))
