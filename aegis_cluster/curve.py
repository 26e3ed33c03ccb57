"""Keys on ZeroMQ sockets: CURVE at both ends of a link, and what its handshakes tell.

The idea: whoever opens a link must know the key at the other end beforehand, but a person copies
keys by name and not by address. So the opener tries the keys that it trusts, one after the other,
until one fits, and stays with that one. A key that is replaced is found in the same way.

The rule it protects: no link that leaves this machine goes without keys, unless somebody has said
so in so many words; and a handshake that fails is told as a sentence, never as a silent wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import zmq

from aegis_cluster.config import host_of, is_loopback
from aegis_cluster.keys import new_pair

if TYPE_CHECKING:
    from aegis_cluster.keys import KeyPair, LinkKeys, PublicKey

FAILED_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
LINK_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | FAILED_EVENTS
NEXT_KEY_S: Final = 0.01
REST_S: Final = 0.5
"""Before an address is tried again that none of our keys fits, or that does not accept us."""
ROUNDS_BEFORE_TOLD: Final = 2
"""A process that dies in the middle of a handshake looks like a wrong key, once."""


def needs_keys(endpoint: str) -> bool:
    """Whether what goes over a link to or at this address could be read on another machine."""
    host = host_of(endpoint)
    return host is not None and not is_loopback(host)


def prepare(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Have the socket take addresses of IP version 6 where this is one."""
    if (host_of(endpoint) or "").count(":"):
        socket.set(zmq.IPV6, 1)


def listen_with(socket: zmq.Socket[bytes], own: KeyPair, domain: str) -> None:
    """Let in only who holds a key that the domain's doorkeeper accepts; before `bind`."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, own.secret.encode())
    socket.set(zmq.ZAP_DOMAIN, domain.encode())
    # Without it ZeroMQ lets everybody in while nobody answers its questions.
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def connect_with(socket: zmq.Socket[bytes], own: KeyPair, server: PublicKey) -> None:
    """Talk only to who holds the secret of `server`; before `connect`."""
    socket.set(zmq.CURVE_PUBLICKEY, own.public.encode())
    socket.set(zmq.CURVE_SECRETKEY, own.secret.encode())
    socket.set(zmq.CURVE_SERVERKEY, server.encode())


class Handshakes:
    """The handshakes at one address: which key to try, how long to rest, what went wrong.

    who: how the opener calls itself in a sentence ("this client", "this node").
    """

    def __init__(self, endpoint: str, keys: LinkKeys | None, *, who: str) -> None:
        self.trouble: str | None = None
        """Why there is no connection, as far as the handshakes say; None: they say nothing."""
        self.rest_s = 0.0
        """How long to wait before the next try."""
        self._endpoint = endpoint
        self._keys = keys
        self._who = who
        self._next = 0
        self._failures = 0

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Set up a socket for the next try."""
        prepare(socket, self._endpoint)
        if self._keys is None:
            return
        # Who trusts nobody reaches nobody: a key whose secret is not kept fits no node.
        servers = self._keys.servers or [new_pair("nobody").public]
        connect_with(socket, self._keys.own, servers[self._next % len(servers)])

    def succeeded(self) -> None:
        """The key fits, and we are accepted."""
        self.trouble = None
        self.rest_s = 0.0
        self._failures = 0

    def failed(self, event: int) -> None:
        """A handshake failed: say why, and choose what to try next."""
        self._failures += 1
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._keys is not None:
            self.rest_s = REST_S
            self.trouble = (
                f"The node at {self._endpoint} does not accept {self._who}'s key"
                f" {self._keys.own.public} ({self._keys.own.name}). Copy {self._keys.own.name}.pub"
                " into the directory of public keys that the node's file names for"
                f" {'clients' if 'client' in self._who else 'peers'}."
            )
            return
        if self._keys is None and event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # It hung up, as a process that ends does, or a proxy; a node with keys says so.
            self.rest_s = NEXT_KEY_S
            return
        if self._keys is not None:
            self._keys.refresh()
        count = 1 if self._keys is None else max(1, len(self._keys.servers))
        self._next += 1
        self.rest_s = REST_S if self._failures % count == 0 else NEXT_KEY_S
        if self._failures >= ROUNDS_BEFORE_TOLD * count:
            self.trouble = self._mismatch(event, count)

    def _mismatch(self, event: int, count: int) -> str:
        if self._keys is None:
            return (
                f"The node at {self._endpoint} does not take links without keys, and"
                f" {self._who} has none: give it a key pair and the node's public key."
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return (
                f"The node at {self._endpoint} speaks without keys, and {self._who}, which has"
                " keys, does not: give keys to the node, or take them away here."
            )
        return (
            f"The node at {self._endpoint} holds none of the {count} keys that {self._who} trusts:"
            " its key was changed, or it is not the node that it should be. Get its .pub file anew."
        )
