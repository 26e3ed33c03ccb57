"""Clients as a shard sees them: who has greeted, and how much of each is under way.

The rule it protects: memory is bounded whatever a client does. A client that has too much waiting
is refused (`Throttled`, certainly not done) and tries again; one that has not greeted is told so.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import NotReady, Throttled
from aegis_cluster.limits import (
    CLIENT_IN_FLIGHT_BYTES_MAX,
    FETCHES_WAITING_PER_CLIENT_MAX,
    SHARD_IN_FLIGHT_BYTES_MAX,
)

if TYPE_CHECKING:
    from aegis_cluster.broker.transport import Listener

CLIENTS_MAX: Final = 10_000


@dataclass(slots=True)
class Client:
    """One connection to one listener, alive from its hello on."""

    listener: Listener
    origin: bytes
    in_flight_bytes: int = 0
    fetches_waiting: int = 0


class Clients:
    """All connections of one shard, least recently used first."""

    def __init__(self) -> None:
        self.in_flight_bytes = 0
        self._clients: OrderedDict[tuple[Listener, bytes], Client] = OrderedDict()

    def greet(self, listener: Listener, origin: bytes) -> None:
        """A hello was accepted; the oldest idle connection is forgotten when there are too many."""
        self._clients[listener, origin] = Client(listener, origin)
        if len(self._clients) > CLIENTS_MAX:
            idle = (k for k, c in self._clients.items() if not c.in_flight_bytes)
            self._clients.pop(next(idle), None)

    def known(self, listener: Listener, origin: bytes) -> Client:
        """Raise `NotReady` for a connection that this process has not seen a hello of."""
        client = self._clients.get((listener, origin))
        if client is None:
            raise NotReady("Say hello first: this process does not know the connection.", hello=1)
        self._clients.move_to_end((listener, origin))
        return client

    def gone(self, listener: Listener, origin: bytes) -> None:
        self._clients.pop((listener, origin), None)

    @property
    def has_room(self) -> bool:
        """Whether more produce requests may be read from the sockets at all."""
        return self.in_flight_bytes < SHARD_IN_FLIGHT_BYTES_MAX

    def take(self, client: Client, size: int) -> None:
        """Count a produce request in. Raises `Throttled`."""
        if client.in_flight_bytes and client.in_flight_bytes + size > CLIENT_IN_FLIGHT_BYTES_MAX:
            raise Throttled(
                f"This client has {client.in_flight_bytes} bytes waiting for their commit here; at"
                f" most {CLIENT_IN_FLIGHT_BYTES_MAX} may. Wait for answers before sending more."
            )
        client.in_flight_bytes += size
        self.in_flight_bytes += size

    def give_back(self, client: Client, size: int) -> None:
        client.in_flight_bytes -= size
        self.in_flight_bytes -= size

    def take_fetch(self, client: Client) -> None:
        """Count a fetch in. Raises `Throttled`."""
        if client.fetches_waiting >= FETCHES_WAITING_PER_CLIENT_MAX:
            raise Throttled(
                f"This client has {client.fetches_waiting} fetches waiting here, the most that may."
            )
        client.fetches_waiting += 1
