"""Who may connect: the answers to ZeroMQ's questions about keys (ZAP, RFC 27).

The idea: whoever opens a connection proves that it holds the secret of a public key; ZeroMQ then
asks here whether that key may enter through that listener. Listeners have a *domain* each: peers
enter through one, clients through the other, and no key is good for both.

The rule it protects: it fails closed. What is not understood is refused; when nobody answers,
because the shard is gone or has broken down, ZeroMQ lets nobody in (`ZAP_ENFORCE_DOMAIN`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import zmq

from aegis_cluster.keys import PublicKey, to_z85
from aegis_cluster.limits import REFUSED_KEYS_TOLD_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.keys import NodeKeys

ENDPOINT: Final = "inproc://zeromq.zap.01"
PEERS_DOMAIN: Final = "peers"
CLIENTS_DOMAIN: Final = "clients"
_VERSION: Final = b"1.0"
_KEY_BYTES: Final = 32
_HANDSHAKES_PER_TURN: Final = 64

log = logging.getLogger(__name__)


class Doorkeeper:
    """Decides about one connection after the other; says once of each key that it was refused."""

    def __init__(self, keys: NodeKeys) -> None:
        self._keys = keys
        self._told: set[tuple[str, str]] = set()

    def answer(self, request: Sequence[bytes]) -> list[bytes]:
        """[version, request id, status, text, user, metadata] for ZeroMQ."""
        number = request[1] if len(request) > 1 else b""
        name = self._admitted(request)
        if name is None:
            return [_VERSION, number, b"400", b"This key may not enter here.", b"", b""]
        return [_VERSION, number, b"200", b"OK", name.encode(), b""]

    def forget_refusals(self) -> None:
        """The lists have changed: what is refused from now on is news."""
        self._told.clear()

    def _admitted(self, request: Sequence[bytes]) -> str | None:
        """Whose key it is, None to refuse."""
        if len(request) != 7 or request[0] != _VERSION or request[5] != b"CURVE":
            return None
        domain, address, key = request[2], request[3], request[6]
        if len(key) != _KEY_BYTES:
            return None
        public = to_z85(key)
        name = self._name(domain.decode(errors="replace"), public)
        if name is None:
            self._tell(domain.decode(errors="replace"), public, address.decode(errors="replace"))
        return name

    def _name(self, domain: str, public: PublicKey) -> str | None:
        if domain == PEERS_DOMAIN:
            return self._keys.peer(public)
        if domain == CLIENTS_DOMAIN:
            return self._keys.client(public)
        return None

    def _tell(self, domain: str, public: PublicKey, address: str) -> None:
        if (domain, public) in self._told:
            return
        if len(self._told) >= REFUSED_KEYS_TOLD_MAX:
            self._told.clear()
        self._told.add((domain, public))
        elsewhere = self._keys.peer(public) or self._keys.client(public)
        whose = f", which is {elsewhere}'s and good elsewhere," if elsewhere else ""
        log.warning(
            "Refused the public key %s%s from %s: it is not among the %s this node accepts.",
            public, whose, address, domain,
        )  # fmt: skip


class Door:
    """Where ZeroMQ asks, for all listeners of one context; made before any of them is bound."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: NodeKeys) -> None:
        self._doorkeeper = Doorkeeper(keys)
        self.socket = context.socket(zmq.REP)
        """To be watched: readable when somebody wants to come in."""
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def let_in(self) -> None:
        """Answer what ZeroMQ has asked, up to a number a turn."""
        for _ in range(_HANDSHAKES_PER_TURN):
            try:
                request = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self.socket.send_multipart(self._doorkeeper.answer(request), zmq.DONTWAIT)

    def lists_changed(self) -> None:
        """What is refused from now on is news."""
        self._doorkeeper.forget_refusals()

    def close(self) -> None:
        """From now on nobody gets in."""
        self.socket.close(0)
