"""ZeroMQ under a shard: its listeners, its links to peers, and who has come and gone.

The rules it protects (each was somebody's outage): one socket has one owner, this thread; nothing
blocks (`DONTWAIT`, `ROUTER_MANDATORY`); a link to a peer is one DEALER of its own, with
`IMMEDIATE` so that nothing queues for a peer that is not there, and it is thrown away when its
connection breaks, so nothing old is replayed on the next one; every limit is set before bind.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from aegis_cluster.broker.transport import Listener, PeerKey
from aegis_cluster.broker.unsent import Unsent
from aegis_cluster.errors import ConfigError, invariant
from aegis_cluster.limits import BATCH_BYTES_MAX, FETCH_BYTES_MAX, FRAME_BYTES_MAX, KIB

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from aegis_cluster.wire.protocol import Part

PART_BYTES_MAX: Final = {
    Listener.PEERS: FRAME_BYTES_MAX + FETCH_BYTES_MAX,
    Listener.CONTROL: 1024 * KIB,
    Listener.DATA: BATCH_BYTES_MAX,
}
HIGH_WATER_MESSAGES: Final = 1_000
RECONNECT_MS: Final = 50
RECONNECT_MS_MAX: Final = 500
HEARTBEAT_MS: Final = 300
HEARTBEAT_TIMEOUT_MS: Final = 1_200
"""Silent death of a process must show as a lost link, because quiet groups rely on it. ZeroMQ's own
threads answer, so a busy interpreter at the other end is not taken for a dead one."""
HANDSHAKE_MS: Final = 5_000
STALL_MS: Final = 10_000
"""A connection whose other end takes no bytes for so long is broken by the kernel, even if its
machine answers (TCP_USER_TIMEOUT); what waited for it is given back."""
COPY_BYTES: Final = 64 * KIB
"""Smaller parts are cheaper copied than counted."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _PeerSocket:
    endpoint: str
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]


class Sockets:
    """All sockets of one shard; `poll` says which have something."""

    def __init__(
        self,
        endpoints: dict[Listener, str],
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Bind the listeners. Raises `ConfigError`, naming the address, when one is taken.

        context: one that is shared with others, who end it; None: one of our own.
        """
        self._own_context = context is None
        self._context = zmq.Context() if context is None else context
        self._poller = zmq.Poller()
        self._ready: set[object] = set()
        self._listeners = {
            listener: self._bind(listener, endpoint) for listener, endpoint in endpoints.items()
        }
        self._peers: dict[PeerKey, _PeerSocket] = {}
        self._by_socket: dict[zmq.Socket[bytes], PeerKey] = {}
        self._by_monitor: dict[zmq.Socket[bytes], PeerKey] = {}
        self.unsent_answers = Unsent()
        self.unsent_to_peers = Unsent()

    def _bind(self, listener: Listener, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.set(zmq.MAXMSGSIZE, PART_BYTES_MAX[listener])
        self._limit(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise ConfigError(
                f"The address {endpoint} ({listener.value}) cannot be bound: {error}. Is another"
                " cluster running on these ports? Choose another base_port.",
                endpoint=endpoint,
            ) from error
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _limit(self, socket: zmq.Socket[bytes]) -> None:
        socket.set(zmq.SNDHWM, HIGH_WATER_MESSAGES)
        socket.set(zmq.RCVHWM, HIGH_WATER_MESSAGES)
        socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.set(zmq.TCP_MAXRT, STALL_MS)

    def address(self, listener: Listener) -> str:
        """Where a listener is bound, with the port that it was given."""
        return self._listeners[listener].get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    # ---- peers

    def open_peer(self, key: PeerKey, endpoint: str) -> None:
        """A fresh DEALER to one shard, and a monitor that tells of its connection."""
        invariant(key not in self._peers, "one socket a peer", key=key)
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        socket.set(zmq.MAXMSGSIZE, PART_BYTES_MAX[Listener.PEERS])
        self._limit(socket)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor: zmq.Socket[bytes] = socket.get_monitor_socket(events)
        monitor.set(zmq.LINGER, 0)
        socket.connect(endpoint)
        self._peers[key] = _PeerSocket(endpoint, socket, monitor)
        self._by_socket[socket] = key
        self._by_monitor[monitor] = key
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def close_peer(self, key: PeerKey) -> None:
        peer = self._peers.pop(key, None)
        if peer is None:
            return
        del self._by_socket[peer.socket], self._by_monitor[peer.monitor]
        self._poller.unregister(peer.socket)
        self._poller.unregister(peer.monitor)
        peer.socket.disable_monitor()
        peer.monitor.close(0)
        peer.socket.close(0)
        self.unsent_to_peers.forget(key)

    def renew_peer(self, key: PeerKey) -> None:
        """Throw a broken link away with all that is queued in it, and try again."""
        endpoint = self._peers[key].endpoint
        self.close_peer(key)
        self.open_peer(key, endpoint)

    def send_peer(self, key: PeerKey, message: Sequence[Part]) -> bool:
        peer = self._peers.get(key)
        return peer is not None and _send(peer.socket, message, key, self.unsent_to_peers)

    def reply(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> bool:
        socket = self._listeners[listener]
        return _send(socket, [origin, *message], (listener, origin), self.unsent_answers)

    def sweep(self, now_ms: int) -> None:
        """Find out, now and then, how much still waits for all connections."""
        self.unsent_answers.sweep(now_ms)

    # ---- inputs

    def poll(self, timeout_ms: int) -> None:
        """Wait until a socket, or what else is registered, has something."""
        self._ready = {socket for socket, _ in self._poller.poll(timeout_ms)}

    def register(self, fd: int) -> None:
        """Have `poll` wake up for a file descriptor too."""
        self._poller.register(fd, zmq.POLLIN)

    def unregister(self, fd: int) -> None:
        """Watch a file descriptor no more."""
        self._poller.unregister(fd)

    def is_ready(self, fd: int) -> bool:
        """Whether the last `poll` found something to read there."""
        return fd in self._ready

    def receive(self, listener: Listener) -> tuple[bytes, list[Part]] | None:
        """(origin, message), or None when there is none now."""
        socket = self._listeners[listener]
        message = _receive(socket) if socket in self._ready else None
        return None if message is None else (bytes(message[0]), message[1:])

    def peer_messages(self, limit: int) -> Iterator[tuple[PeerKey, list[Part]]]:
        """Replies on our own links, at most `limit` of each."""
        for socket, key in list(self._by_socket.items()):
            if socket not in self._ready:
                continue
            for _ in range(limit):
                message = None if socket.closed else _receive(socket)
                if message is None:
                    break
                yield key, message

    def link_events(self) -> Iterator[tuple[PeerKey, bool]]:
        """(link, whether it is connected now) for every change since the last call."""
        for monitor, key in list(self._by_monitor.items()):
            while monitor in self._ready and not monitor.closed and monitor.poll(0):
                event = recv_monitor_message(monitor)["event"]
                yield key, event == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def close(self) -> None:
        for key in list(self._peers):
            self.close_peer(key)
        for socket in self._listeners.values():
            socket.close(0)
        if self._own_context:
            self._context.destroy(linger=0)


def _send(
    socket: zmq.Socket[bytes], message: Sequence[Part], key: Hashable, unsent: Unsent
) -> bool:
    """Send or give up at once: the other end is gone, or its queue is full."""
    sizes = [len(part) for part in message]
    size = sum(sizes)
    parts: list[Part | zmq.Frame] = list(message)
    mark = None
    if unsent.wants_mark(key, size):
        # The last part that holds something: when it leaves, all before it have left.
        last = max(place for place, length in enumerate(sizes) if length)
        lent = zmq.Frame(message[last], track=True, copy=False, copy_threshold=0)
        parts[last], mark = lent, lent.tracker
    copy = mark is None and max(sizes) < COPY_BYTES
    try:
        socket.send_multipart(parts, zmq.DONTWAIT, copy=copy)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return False
    unsent.sent(key, size, mark)
    return True


def _receive(socket: zmq.Socket[bytes]) -> list[Part] | None:
    try:
        frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None
    return [frame.bytes if len(frame) < COPY_BYTES else frame.buffer for frame in frames]
