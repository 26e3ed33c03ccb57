"""PySyncObj's transport over ZeroMQ: who is linked to whom, and what is let through.

The idea: voters bind one ROUTER each and write to one another through a DEALER per peer, so each
direction is one ordered stream. A node that only reads binds nothing; voters answer it through its
routing id. A link is up while frames keep coming: each side says at least a ping now and then.

With keys every link is encrypted, and the ROUTER takes nodes' keys only, as a shard's listener for
peers does.

The rules it protects: the library ignores whether a message was sent, so a send that fails must
look like a lost link, at once; and one life of a node is never taken for another, because a node
that restarts has forgotten everything (`replica`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import zmq
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from zmq.utils.monitor import recv_monitor_message

from aegis_cluster import limits
from aegis_cluster.cluster.view import frames
from aegis_cluster.cluster.view.frames import Frame
from aegis_cluster.curve import FAILED_EVENTS, Handshakes, listen_with, prepare
from aegis_cluster.doorkeeper import PEERS_DOMAIN
from aegis_cluster.errors import ConfigError, PeerViolation
from aegis_cluster.read_ahead import ReadAhead

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aegis_cluster.keys import NodeKeys

PING_S: Final = 0.25
DEAD_S: Final = 1.0
"""A link that brings nothing for so long is lost."""
_DRAIN_FRAMES: Final = 500
_READER_ID_MAX: Final = 1_000_000
_OPTIONS: Final = {
    zmq.LINGER: 0,
    zmq.SNDHWM: 200,
    zmq.RCVHWM: 0,  # see `read_ahead`, which bounds what others send
    zmq.MAXMSGSIZE: frames.FRAME_BYTES_MAX,
    zmq.HEARTBEAT_IVL: 500,
    zmq.HEARTBEAT_TIMEOUT: 1_500,
    zmq.HANDSHAKE_IVL: 5_000,
}
_ROUTER_OPTIONS: Final = {zmq.ROUTER_MANDATORY: 1, zmq.ROUTER_HANDOVER: 1}
_DEALER_OPTIONS: Final = {zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL: 50, zmq.RECONNECT_IVL_MAX: 500}


class Place(NamedTuple):
    """Where a node stands in the view.

    voters: endpoint of every voter by its node id; all nodes must name the same ones.
    listen: the endpoint to bind; "": our own among the voters.
    keys: what links are encrypted with; None: they are not.
    """

    cluster_id: str
    me: int
    voters: Mapping[int, str]
    listen: str = ""
    keys: NodeKeys | None = None

    @property
    def is_voter(self) -> bool:
        return self.me in self.voters


class Receiver(Protocol):
    """What the transport needs of the replica behind it."""

    @property
    def raftCurrentTerm(self) -> int:
        """Sent with every frame."""

    def forget(self, node: Node) -> None:
        """This node has begun a new life, with nothing in memory."""

    def hear_of_term(self, term: int) -> None:
        """Some node is in this term."""

    def bears(self, frame: Frame, *, from_voter: bool) -> bool:
        """Whether the message of a frame may be handed to the library."""

    def pysyncobj_raised(self, error: Exception) -> None:
        """Handing over a message went wrong inside the library."""


@dataclass(slots=True)
class _Link:
    """One other node.

    socket: our DEALER to a voter; None for a reader, who is answered through `routing_id`.
    """

    node: Node
    socket: zmq.Socket[bytes] | None
    routing_id: bytes = b""
    incarnation: int = 0
    heard_at: float = 0.0
    sent_at: float = 0.0
    is_up: bool = False
    handshakes: Handshakes | None = None
    monitor: zmq.Socket[bytes] | None = None
    """Tells of handshakes, where there are keys."""
    connect_at: float | None = None
    """When the socket, which failed to connect before, is to try again."""


class ZmqTransport(Transport):  # type: ignore[misc]  # the library ships no types
    """Made by the library inside the replica's constructor; one thread owns all of it."""

    def __init__(
        self,
        receiver: Receiver,
        me: Node | None,
        others: Iterable[Node],
        *,
        place: Place,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        """Raises ConfigError when our address is taken."""
        super().__init__(receiver, me, others)
        self._receiver = receiver
        self._place = place
        self._context = context
        self._incarnation = time.time_ns() // 1_000
        self._links: dict[str, _Link] = {}
        self._readers: dict[str, _Link] = {}
        self._router = (
            self._bind(place.listen or place.voters[place.me]) if place.is_voter else None
        )
        self._ahead = None if self._router is None else self._read_ahead(self._router)
        self.dropped = 0
        """Frames that were not let through, and connections that were cut."""
        for node in list(others):  # the library's own set, which changes
            self.addNode(node)

    # ---- sockets

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """All that may have something to read."""
        routers = [] if self._router is None else [self._router]
        return routers + [link.socket for link in self._links.values() if link.socket is not None]

    def _socket(self, kind: int, options: dict[zmq.SocketOption, int]) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        for option, value in (_OPTIONS | options).items():
            socket.setsockopt(option, value)
        return socket

    def _bind(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._socket(zmq.ROUTER, _ROUTER_OPTIONS)
        prepare(socket, endpoint)
        if self._place.keys is not None:
            listen_with(socket, self._place.keys.own, PEERS_DOMAIN)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise ConfigError(
                f"the address {endpoint} (cluster view) cannot be bound: {error}", endpoint=endpoint
            ) from error
        return socket

    def _read_ahead(self, router: zmq.Socket[bytes]) -> ReadAhead | None:
        endpoint = router.get_string(zmq.LAST_ENDPOINT)
        if not endpoint.startswith("tcp://"):
            return None
        return ReadAhead(router, encrypted=self._place.keys is not None, now_s=time.monotonic())

    # ---- what the library calls

    def addNode(self, node: Node) -> None:
        """Begin to write to a voter."""
        keys = self._place.keys
        link = _Link(node, None)
        link.handshakes = Handshakes(
            self._voter(link), None if keys is None else keys.links, who="this node"
        )
        self._open(link)
        self._links[node.id] = link

    def _voter(self, link: _Link) -> str:
        return self._place.voters[int(link.node.id)]

    def _open(self, link: _Link, *, wait_s: float = 0.0) -> None:
        """A fresh DEALER, connected at once or a little later."""
        socket = self._socket(zmq.DEALER, _DEALER_OPTIONS)
        socket.setsockopt(zmq.ROUTING_ID, _routing_id(str(self._place.me), self._incarnation))
        if link.handshakes is not None:
            link.handshakes.apply(socket)
        if self._place.keys is not None:
            link.monitor = socket.get_monitor_socket(FAILED_EVENTS | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        link.socket = socket
        link.connect_at = time.monotonic() + wait_s
        self._connect_when_due(link)

    def _connect_when_due(self, link: _Link) -> None:
        due = link.connect_at is not None and link.connect_at <= time.monotonic()
        if due and link.socket is not None:
            link.connect_at = None
            link.socket.connect(self._voter(link))

    def _close(self, link: _Link) -> None:
        if link.monitor is not None and link.socket is not None:
            link.socket.disable_monitor()
            link.monitor.close(0)
            link.monitor = None
        if link.socket is not None:
            link.socket.close(0)

    def _follow_handshakes(self, link: _Link) -> None:
        """A key that does not fit makes way for the next one."""
        while link.monitor is not None and link.monitor.poll(0):
            event = recv_monitor_message(link.monitor)["event"]
            if link.handshakes is None:
                continue
            if event & FAILED_EVENTS:
                link.handshakes.failed(event)
                self._close(link)
                self._down(link)
                self._open(link, wait_s=link.handshakes.rest_s)
            else:
                link.handshakes.succeeded()

    def dropNode(self, node: Node) -> None:
        """Write to a voter no more."""
        link = self._links.pop(node.id, None)
        if link is not None and link.socket is not None:
            self._close(link)
            self._down(link)

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        """Send now or lose the link."""
        link = self._links.get(node.id) or self._readers.get(node.id)
        return link is not None and link.is_up and self._send(link, message)

    def destroy(self) -> None:
        """Close everything."""
        for link in self._links.values():
            self._close(link)
        if self._ahead is not None:
            self._ahead.close()
        if self._router is not None:
            self._router.close(0)

    # ---- inputs

    def receive(self) -> None:
        """Take what has arrived, one frame after another; a bad one does not end the others."""
        for socket in self.sockets:
            for _ in range(_DRAIN_FRAMES):
                parts = self._next(socket)
                if parts is None:
                    break
                self._take(socket, parts)
        if self._ahead is not None:
            self.dropped += len(self._ahead.look(time.monotonic()))

    def _next(self, socket: zmq.Socket[bytes]) -> list[bytes] | None:
        """The next message; None when there is none now."""
        ahead = self._ahead if socket is self._router else None
        while True:
            try:
                found: list[zmq.Frame] = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return None
            if ahead is not None:
                ahead.heard(found)
                if ahead.is_cut(found):
                    continue
            return [frame.bytes for frame in found]

    def _take(self, socket: zmq.Socket[bytes], parts: list[bytes]) -> None:
        try:
            frame = frames.decode(parts[-1], self._place.cluster_id)
            link = self._link_of(frame, socket, parts[:-1])
        except PeerViolation:
            self.dropped += 1
            return
        try:
            self._hear(link, frame)
        except Exception as error:  # noqa: BLE001 - the library's, on what a peer sent
            self._receiver.pysyncobj_raised(error)

    def _link_of(self, frame: Frame, socket: zmq.Socket[bytes], origin: list[bytes]) -> _Link:
        """The link that a frame came on; PeerViolation unless it is its sender's own."""
        link = self._links.get(frame.sender)
        if socket is not self._router:
            if link is not None and link.socket is socket and not origin:
                return link
        elif origin == [_routing_id(frame.sender, frame.incarnation)]:
            if link is not None:
                return link
            return self._reader(frame, origin[0])
        raise PeerViolation("a frame of the view from a stranger", sender=frame.sender)

    def _reader(self, frame: Frame, routing_id: bytes) -> _Link:
        sender = frame.sender
        known = self._readers.get(sender)
        if known is not None and known.routing_id == routing_id:
            return known
        is_node = sender.isdecimal() and 0 < int(sender[:9]) < _READER_ID_MAX
        if not is_node or int(sender) in self._place.voters:
            raise PeerViolation("a frame of the view from a stranger", sender=sender)
        if known is not None:
            self._down(known)
        if len(self._readers) >= limits.VIEW_NODES_MAX:
            raise PeerViolation("too many nodes read the view", sender=sender)
        self._readers[sender] = _Link(Node(sender), None, routing_id, frame.incarnation)
        return self._readers[sender]

    def _hear(self, link: _Link, frame: Frame) -> None:
        now = time.monotonic()
        if frame.incarnation < link.incarnation and now - link.heard_at < DEAD_S:
            self.dropped += 1  # of an earlier life
            return
        if frame.incarnation != link.incarnation:
            self._down(link)
            self._receiver.forget(link.node)
            link.incarnation = frame.incarnation
        link.heard_at = now
        if not link.is_up and self._send(link, None):
            self._up(link)
        if link.socket is not None:
            self._receiver.hear_of_term(frame.term)
        if frame.message is None or not link.is_up:
            return
        if self._receiver.bears(frame, from_voter=link.socket is not None):
            self._onMessageReceived(link.node, frame.message)
        else:
            self.dropped += 1

    # ---- links

    def keep_links(self) -> None:
        """Give up the silent ones, and say that we live."""
        for link in list(self._links.values()):
            self._follow_handshakes(link)
            self._connect_when_due(link)
        now = time.monotonic()
        for link in [*self._links.values(), *self._readers.values()]:
            if now - link.heard_at > DEAD_S:
                self._down(link)
            if now - link.sent_at > PING_S:
                self._send(link, None)

    def _send(self, link: _Link, message: dict[str, Any] | None) -> bool:
        link.sent_at = time.monotonic()
        term = self._receiver.raftCurrentTerm
        part = frames.encode(
            self._place.cluster_id, Frame(str(self._place.me), self._incarnation, term, message)
        )
        try:
            if link.socket is not None:
                link.socket.send(part, zmq.DONTWAIT)
            elif self._router is not None:
                self._router.send_multipart([link.routing_id, part], zmq.DONTWAIT)
        except zmq.ZMQError:
            self._down(link)
            return False
        return True

    def _up(self, link: _Link) -> None:
        link.is_up = True
        if link.socket is not None:
            self._onNodeConnected(link.node)
        else:
            self._onReadonlyNodeConnected(link.node)

    def _down(self, link: _Link) -> None:
        was_up, link.is_up = link.is_up, False
        if link.socket is None and self._readers.get(link.node.id) is link:
            del self._readers[link.node.id]
        if was_up and link.socket is not None:
            self._onNodeDisconnected(link.node)
        elif was_up:
            self._onReadonlyNodeDisconnected(link.node)


def _routing_id(node: str, incarnation: int) -> bytes:
    return f"{node}#{incarnation}".encode()
