"""ZeroMQ under a shard: its listeners, its links to peers, and who has come and gone.

The rules it protects (each was somebody's outage): one socket has one owner, this thread; nothing
blocks (`DONTWAIT`, `ROUTER_MANDATORY`); a link to a peer is one DEALER of its own, with
`IMMEDIATE` so that nothing queues for a peer that is not there, and it is thrown away when its
connection breaks, so nothing old is replayed on the next one; every limit is set before bind; and
no socket reaches beyond this machine without keys, unless the node's file says so.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from aegis_cluster.broker.connections import Connections
from aegis_cluster.broker.readiness import Readiness, Source, has_input
from aegis_cluster.broker.transport import Listener, PeerKey
from aegis_cluster.broker.unsent import Unsent
from aegis_cluster.curve import (
    FAILED_EVENTS,
    LINK_EVENTS,
    Handshakes,
    listen_with,
    needs_keys,
    prepare,
)
from aegis_cluster.doorkeeper import CLIENTS_DOMAIN, PEERS_DOMAIN, Door
from aegis_cluster.errors import ConfigError, invariant
from aegis_cluster.limits import BATCH_BYTES_MAX, FETCH_BYTES_MAX, FRAME_BYTES_MAX, KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from aegis_cluster.keys import NodeKeys, Reading
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
KEYS_READ_S: Final = 1.0
"""How often the lists of accepted keys are looked at."""
CONTROL_HEARTBEAT_TIMEOUT_MS: Final = 60_000
"""A client that sleeps keeps its connection: its session says how long it may be silent."""
DROPPED_AT_ONCE: Final = 1_000
"""Messages of a connection that was cut, in one turn."""
COPY_BYTES: Final = 64 * KIB
"""Smaller parts are cheaper copied than counted."""

# As plain numbers: to combine flags that are enums costs more than to send a part.
_NOW: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT) | int(zmq.SNDMORE)

log = logging.getLogger(__name__)


_DOMAINS: Final = {
    Listener.PEERS: PEERS_DOMAIN,
    Listener.CONTROL: CLIENTS_DOMAIN,
    Listener.DATA: CLIENTS_DOMAIN,
}


@dataclass(slots=True)
class _PeerSocket:
    endpoint: str
    handshakes: Handshakes
    socket: zmq.Socket[bytes] | None = None
    monitor: zmq.Socket[bytes] | None = None
    due: float = 0.0
    """While there is no socket: when to try again, in monotonic seconds."""
    told: str | None = None


class Sockets:
    """All sockets of one shard; `poll` says which have something."""

    def __init__(
        self,
        endpoints: dict[Listener, str],
        *,
        keys: NodeKeys | None = None,
        insecure: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Bind the listeners. Raises `ConfigError`, naming the address, when one is taken, or
        could be reached from another machine and there are no keys.

        keys: every listener and link is encrypted with them; None: none is.
        insecure: links may leave the machine without keys.
        context: one that is shared with others, who end it; None: one of our own.
        """
        self._own_context = context is None
        self._context = zmq.Context() if context is None else context
        self._keys = keys
        self._insecure = insecure
        self._readiness = Readiness()
        self._ready: set[Source] = set()
        self._endpoints = endpoints
        self._door: Door | None = None
        self._keys_due = time.monotonic() + KEYS_READ_S
        if keys is not None:
            # Before anything is bound: from the first connection on, somebody is asked.
            self._door = Door(self._context, keys)
            self._readiness.register(self._door.socket)
        self._listeners: dict[Listener, zmq.Socket[bytes]] = {}
        self._closed_listeners: set[Listener] = set()
        self._watched: dict[Listener, Connections] = {}
        self._peers: dict[PeerKey, _PeerSocket] = {}
        self._by_socket: dict[zmq.Socket[bytes], PeerKey] = {}
        self._by_monitor: dict[zmq.Socket[bytes], PeerKey] = {}
        self.unsent_answers = Unsent()
        self.unsent_to_peers = Unsent()
        try:
            for listener, endpoint in endpoints.items():
                self._listeners[listener] = self._bind(listener, endpoint)
        except ConfigError:
            self.close()
            raise

    def _bind(self, listener: Listener, endpoint: str) -> zmq.Socket[bytes]:
        if needs_keys(endpoint) and self._keys is None and not self._insecure:
            raise ConfigError(
                f"The address {endpoint} ({listener.value}) can be reached from other machines, and"
                " this node has no keys: give it some, or say `insecure = true` in its file.",
                endpoint=endpoint,
            )
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.set(zmq.MAXMSGSIZE, PART_BYTES_MAX[listener])
        self._limit(socket, endpoint)
        prepare(socket, endpoint)
        if self._keys is not None:
            listen_with(socket, self._keys.own, _DOMAINS[listener])
        if listener is Listener.CONTROL:
            socket.set(zmq.HEARTBEAT_TIMEOUT, CONTROL_HEARTBEAT_TIMEOUT_MS)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise ConfigError(
                f"The address {endpoint} ({listener.value}) cannot be bound: {error}. Is another"
                " cluster running on these ports? Choose another base_port.",
                endpoint=endpoint,
            ) from error
        self._readiness.register(socket)
        if endpoint.startswith("tcp://"):
            self._watched[listener] = Connections(
                socket,
                self._readiness,
                encrypted=self._keys is not None,
                told=listener is Listener.CONTROL,
            )
        return socket

    def _limit(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        socket.set(zmq.SNDHWM, HIGH_WATER_MESSAGES)
        # Within a process there is no connection that could break; see `read_ahead`.
        socket.set(zmq.RCVHWM, HIGH_WATER_MESSAGES if endpoint.startswith("inproc://") else 0)
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
        keys = None if self._keys is None else self._keys.links
        peer = _PeerSocket(endpoint, Handshakes(endpoint, keys, who="this node"))
        self._peers[key] = peer
        if needs_keys(endpoint) and keys is None and not self._insecure:
            log.error(
                "No link is made to %s: it leaves this machine, and there are no keys.", endpoint
            )
            peer.due = float("inf")
            return
        self._connect(key, peer)

    def _connect(self, key: PeerKey, peer: _PeerSocket) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        socket.set(zmq.MAXMSGSIZE, PART_BYTES_MAX[Listener.PEERS])
        self._limit(socket, peer.endpoint)
        peer.handshakes.apply(socket)
        monitor: zmq.Socket[bytes] = socket.get_monitor_socket(LINK_EVENTS)
        monitor.set(zmq.LINGER, 0)
        socket.connect(peer.endpoint)
        peer.socket, peer.monitor = socket, monitor
        self._by_socket[socket] = key
        self._by_monitor[monitor] = key
        self._readiness.register(socket)
        self._readiness.register(monitor)

    def _disconnect(self, key: PeerKey, peer: _PeerSocket) -> None:
        if peer.socket is None or peer.monitor is None:
            return
        del self._by_socket[peer.socket], self._by_monitor[peer.monitor]
        self._readiness.unregister(peer.socket)
        self._readiness.unregister(peer.monitor)
        peer.socket.disable_monitor()
        peer.monitor.close(0)
        peer.socket.close(0)
        peer.socket = peer.monitor = None
        self.unsent_to_peers.forget(key)

    def close_peer(self, key: PeerKey) -> None:
        peer = self._peers.pop(key, None)
        if peer is not None:
            self._disconnect(key, peer)

    def renew_peer(self, key: PeerKey) -> None:
        """Throw a broken link away with all that is queued in it, and try again."""
        peer = self._peers[key]
        self._disconnect(key, peer)
        self._connect(key, peer)

    def _handshake_failed(self, key: PeerKey, peer: _PeerSocket, event: int) -> None:
        """Throw the socket away; another one tries again, with the next key, a little later."""
        self._disconnect(key, peer)
        peer.handshakes.failed(event)
        peer.due = time.monotonic() + peer.handshakes.rest_s
        trouble = peer.handshakes.trouble
        if trouble is not None and trouble != peer.told:
            peer.told = trouble
            log.warning("%s", trouble)

    def _try_again(self) -> None:
        now = time.monotonic()
        for key, peer in self._peers.items():
            if peer.socket is None and peer.due <= now:
                self._connect(key, peer)

    def send_peer(self, key: PeerKey, message: Sequence[Part]) -> bool:
        peer = self._peers.get(key)
        if peer is None or peer.socket is None:
            return False
        self._readiness.used(peer.socket)
        return _send(peer.socket, message, key, self.unsent_to_peers)

    def reply(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> bool:
        socket = self._listeners[listener]
        if socket.closed:
            return False
        self._readiness.used(socket)
        return _send(socket, [origin, *message], (listener, origin), self.unsent_answers)

    def look_around(self, now_ms: int) -> None:
        """Now and then: how much still waits for all connections, and which links may be tried
        again after a failed handshake."""
        self.unsent_answers.sweep(now_ms)
        self._try_again()

    # ---- keys

    def keys_to_read(self) -> Callable[[], tuple[Reading | None, Reading | None]] | None:
        """What reads the lists of accepted keys, in any thread, when it is time to; else None.

        The result is for `take_keys`.
        """
        keys, now = self._keys, time.monotonic()
        if keys is None or now < self._keys_due:
            return None
        self._keys_due = now + KEYS_READ_S
        return lambda: (keys.peers.read(), keys.clients.read())

    def take_keys(self, readings: tuple[Reading | None, Reading | None]) -> list[PeerKey]:
        """Go on with new lists; return the links that were cut for it.

        Nothing in ZeroMQ ends one connection of a listener, so when a key is withdrawn the
        listener is closed and opened again: everybody comes back, but for those withdrawn.
        """
        keys, door = self._keys, self._door
        if keys is None or door is None or readings == (None, None):
            return []
        cut: list[PeerKey] = []
        for reading, known, listeners in zip(
            readings,
            (keys.peers, keys.clients),
            ((Listener.PEERS,), (Listener.CONTROL, Listener.DATA)),
            strict=True,
        ):
            if reading is None:
                continue
            for problem in reading.problems:
                log.error("%s It is ignored.", problem)
            withdrawn = known.take(reading)
            log.info("%s now holds %d keys.", known.path, len(reading.names))
            if withdrawn:
                log.warning("A key was withdrawn: all connections to %s are renewed.", known.path)
                self._close_listeners(listeners)
                cut = list(self._peers) if known is keys.peers else cut
        for key in cut:
            self.renew_peer(key)
        door.lists_changed()
        return cut

    def _close_listeners(self, listeners: Sequence[Listener]) -> None:
        for listener in listeners:
            socket = self._listeners[listener]
            if not socket.closed:
                self._readiness.unregister(socket)
                self._unwatch(listener)
                socket.close(0)
            self._closed_listeners.add(listener)

    def _unwatch(self, listener: Listener) -> None:
        watched = self._watched.pop(listener, None)
        if watched is not None:
            watched.close()

    def _open_listeners(self) -> None:
        """The port of a socket that was closed is free a moment later, not at once."""
        for listener in sorted(self._closed_listeners, key=lambda item: item.value):
            try:
                self._listeners[listener] = self._bind(listener, self._endpoints[listener])
            except ConfigError as error:
                log.warning("%s It is tried again.", error)
            else:
                self._closed_listeners.discard(listener)

    # ---- inputs

    def poll(self, timeout_ms: int) -> None:
        """Wait until a socket, or what else is registered, has something."""
        if self._closed_listeners:
            self._open_listeners()
        self._ready = self._readiness.wait(timeout_ms)
        if self._door is not None and self._door.socket in self._ready:
            self._door.let_in()

    def register(self, fd: int) -> None:
        """Have `poll` wake up for a file descriptor too."""
        self._readiness.register(fd)

    def unregister(self, fd: int) -> None:
        """Watch a file descriptor no more."""
        self._readiness.unregister(fd)

    def is_ready(self, fd: int) -> bool:
        """Whether the last `poll` found something to read there."""
        return fd in self._ready

    def receive(self, listener: Listener) -> tuple[bytes, list[Part]] | None:
        """(origin, message), or None when there is none now."""
        socket = self._listeners[listener]
        if socket not in self._ready or socket.closed:
            return None
        frames = self._receive(socket)
        if not frames:
            return None
        watched = self._watched.get(listener)
        if watched is not None and not watched.heard(frames):
            return self._after_dropped(listener)
        return frames[0].bytes, _parts(frames[1:])

    def _after_dropped(self, listener: Listener) -> tuple[bytes, list[Part]] | None:
        """The first message behind those of a connection that was cut, unless they are many."""
        socket, watched = self._listeners[listener], self._watched[listener]
        for _ in range(DROPPED_AT_ONCE):
            frames = self._receive(socket) if socket in self._ready else []
            if not frames:
                return None
            if watched.heard(frames):
                return frames[0].bytes, _parts(frames[1:])
        return None

    def _receive(self, socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
        """A message of a socket that has one, and whether it has more; [] if it has gone with its
        connection."""
        frames = []
        try:
            frame = socket.recv(_NOW, copy=False)
            frames.append(frame)
            while frame.more:
                frame = socket.recv(_NOW, copy=False)
                frames.append(frame)
        except zmq.Again:
            self._ready.discard(socket)
            return []
        if not has_input(socket):
            self._ready.discard(socket)
            self._readiness.emptied(socket)
        return frames

    def clients_gone(self) -> Iterator[tuple[Listener, bytes]]:
        """Clients of the control listener whose connection has closed since the last call."""
        watched = self._watched.get(Listener.CONTROL)
        if watched is not None and (watched.monitor in self._ready or watched.has_news):
            for origin in watched.gone():
                yield Listener.CONTROL, origin

    def cut_off(self) -> Iterator[str]:
        """Cut connections that send faster than they are read; a sentence about each."""
        for watched in self._watched.values():
            yield from watched.cut()

    def peer_messages(self, limit: int) -> Iterator[tuple[PeerKey, list[Part]]]:
        """Replies on our own links, at most `limit` of each."""
        for socket, key in list(self._by_socket.items()):
            for _ in range(limit):
                if socket.closed or socket not in self._ready:
                    break
                frames = self._receive(socket)
                if frames:
                    yield key, _parts(frames)

    def link_events(self) -> Iterator[tuple[PeerKey, bool]]:
        """(link, whether it is connected now) for every change since the last call."""
        for monitor, key in list(self._by_monitor.items()):
            while monitor in self._ready and not monitor.closed and has_input(monitor):
                event = recv_monitor_message(monitor)["event"]
                if event & FAILED_EVENTS:
                    self._handshake_failed(key, self._peers[key], event)
                    continue
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._peers[key].handshakes.succeeded()
                    self._peers[key].told = None
                yield key, event == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def close(self) -> None:
        for key in list(self._peers):
            self.close_peer(key)
        for listener in list(self._watched):
            self._unwatch(listener)
        for socket in self._listeners.values():
            socket.close(0)
        if self._door is not None:
            self._door.close()
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
        for part in parts[:-1]:
            socket.send(part, _MORE, copy)
        socket.send(parts[-1], _NOW, copy)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return False
    unsent.sent(key, size, mark)
    return True


def _parts(frames: list[zmq.Frame]) -> list[Part]:
    return [frame.bytes if len(frame) < COPY_BYTES else frame.buffer for frame in frames]
