"""Clients as a shard sees them: who has greeted, and how much of each is under way.

The idea: whatever a client makes this process hold is counted, in four sums: bytes of produce
requests that wait for their commit, bytes of answers that have not left, partitions in fetches
that wait, and bytes of other requests that wait. All clients share one pool of each. Once some have
used it up and hold on to it, every other client still has a small share of its own.

The rule it protects: memory is bounded whatever clients do, and one client's excess is not
another's pain. Who has too much is refused (`Throttled`, certainly not done) or waits; one that
has not greeted is told so.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aegis_cluster import limits
from aegis_cluster.errors import NotReady, Throttled

if TYPE_CHECKING:
    from aegis_cluster.broker.fetch import FetchCall
    from aegis_cluster.broker.transport import Listener, Transport


@dataclass(frozen=True, slots=True)
class Share:
    """How much of something each client may hold, and all of them together."""

    client_max: int
    all_max: int
    client_own: int
    """What one that holds nothing gets even when the pool is used up …"""
    all_own: int
    """… as long as all of these together are no more."""

    def room(self, held: int, total: int) -> int:
        """How much more a client that holds so much may, when all hold `total`; 0 or less: none."""
        common = min(self.client_max - held, self.all_max - total)
        own = min(self.client_own - held, self.all_max + self.all_own - total)
        return max(common, own)


IN_FLIGHT: Final = Share(
    limits.CLIENT_IN_FLIGHT_BYTES_MAX,
    limits.SHARD_IN_FLIGHT_BYTES_MAX,
    limits.CLIENT_IN_FLIGHT_BYTES_OWN,
    limits.SHARD_IN_FLIGHT_BYTES_OWN,
)
ANSWERS: Final = Share(
    limits.CLIENT_ANSWER_BYTES_MAX,
    limits.SHARD_ANSWER_BYTES_MAX,
    limits.CLIENT_ANSWER_BYTES_OWN,
    limits.SHARD_ANSWER_BYTES_OWN,
)
FETCH_ITEMS: Final = Share(
    limits.FETCH_ITEMS_WAITING_PER_CLIENT_MAX,
    limits.FETCH_ITEMS_WAITING_MAX,
    limits.FETCH_ITEMS_WAITING_PER_CLIENT_OWN,
    limits.FETCH_ITEMS_WAITING_OWN,
)
QUESTIONS: Final = Share(
    limits.CLIENT_QUESTION_BYTES_MAX,
    limits.SHARD_QUESTION_BYTES_MAX,
    limits.CLIENT_QUESTION_BYTES_OWN,
    limits.SHARD_QUESTION_BYTES_OWN,
)


@dataclass(slots=True, eq=False)
class Client:
    """One connection to one listener, alive from its hello on."""

    listener: Listener
    origin: bytes
    greeted: bool = True
    """False after it broke the protocol, until it greets again; what it has here stays counted."""
    in_flight_bytes: int = 0
    reading_bytes: int = 0
    """Set aside for answers that are being read from disk."""
    fetches_waiting: int = 0
    items_waiting: int = 0
    question_bytes: int = 0
    starved: dict[int, FetchCall] = field(default_factory=dict)
    """Fetches, by number, that wait for earlier answers to leave."""


class Clients:
    """All connections of one shard, least recently used first."""

    def __init__(self, transport: Transport) -> None:
        self.in_flight_bytes = 0
        self.reading_bytes = 0
        self.items_waiting = 0
        self.question_bytes = 0
        self._transport = transport
        self._clients: OrderedDict[tuple[Listener, bytes], Client] = OrderedDict()

    def greet(self, listener: Listener, origin: bytes) -> None:
        """A hello was accepted; the oldest idle connection is forgotten when there are too many."""
        known = self._clients.get((listener, origin))
        if known is not None:
            known.greeted = True
            return
        self._clients[listener, origin] = Client(listener, origin)
        if len(self._clients) > limits.CONNECTIONS_MAX:
            idle = next((k for k, c in self._clients.items() if not c.in_flight_bytes), None)
            if idle is not None:
                del self._clients[idle]

    def known(self, listener: Listener, origin: bytes) -> Client:
        """Raise `NotReady` for a connection that this process has not seen a hello of."""
        client = self._clients.get((listener, origin))
        if client is None or not client.greeted:
            raise NotReady("Say hello first: this process does not know the connection.", hello=1)
        self._clients.move_to_end((listener, origin))
        return client

    def distrust(self, listener: Listener, origin: bytes) -> None:
        """It broke the protocol: whoever speaks there has to greet again."""
        client = self._clients.get((listener, origin))
        if client is not None:
            client.greeted = False

    # ---- produce requests that wait for their commit

    def take(self, client: Client, size: int) -> None:
        """Count a produce request in; one of any size may go. Raises `Throttled`."""
        room = IN_FLIGHT.room(client.in_flight_bytes, self.in_flight_bytes)
        if room < (size if client.in_flight_bytes else 1):
            raise Throttled(
                f"This client has {client.in_flight_bytes} bytes waiting for their commit here, all"
                f" clients {self.in_flight_bytes}; at most {IN_FLIGHT.client_max} and"
                f" {IN_FLIGHT.all_max} may. Wait for answers before sending more."
            )
        client.in_flight_bytes += size
        self.in_flight_bytes += size

    def give_back(self, client: Client, size: int) -> None:
        client.in_flight_bytes -= size
        self.in_flight_bytes -= size

    # ---- answers that have not left

    def room(self, client: Client) -> int:
        """How many bytes of answers may be made for a client now; 0 or less: none."""
        held = client.reading_bytes + self._transport.unsent(client.listener, client.origin)
        return ANSWERS.room(held, self.reading_bytes + self._transport.unsent_total)

    def check_room(self, client: Client) -> None:
        """Raise `Throttled` for a client that does not take the answers it has asked for."""
        if self.room(client) <= 0:
            raise Throttled(
                "Too many bytes of answers wait here for their clients, this one's among them."
                " Read them before asking for more."
            )

    def set_aside(self, client: Client, size: int) -> None:
        """Count bytes that are about to be read from disk; negative: that were."""
        client.reading_bytes += size
        self.reading_bytes += size

    # ---- fetches that wait

    def take_fetch(self, client: Client, items: int) -> None:
        """Count a fetch in. Raises `Throttled`."""
        if (
            client.fetches_waiting >= limits.FETCHES_WAITING_PER_CLIENT_MAX
            or FETCH_ITEMS.room(client.items_waiting, self.items_waiting) < items
        ):
            raise Throttled(
                f"This client has {client.fetches_waiting} fetches of {client.items_waiting}"
                f" partitions waiting here, all clients of {self.items_waiting}. Wait for answers"
                " before asking for more."
            )
        client.fetches_waiting += 1
        client.items_waiting += items
        self.items_waiting += items

    def give_back_fetch(self, client: Client, items: int) -> None:
        client.fetches_waiting -= 1
        client.items_waiting -= items
        self.items_waiting -= items

    # ---- other requests

    def take_question(self, client: Client, size: int) -> None:
        """Count a request in; one of any size may go. Raises `Throttled`."""
        room = QUESTIONS.room(client.question_bytes, self.question_bytes)
        if room < (size if client.question_bytes else 1):
            raise Throttled(
                "Too many requests wait here for their answers, this client's among them. Wait for"
                " answers before asking more, or ask another node."
            )
        client.question_bytes += size
        self.question_bytes += size

    def give_back_question(self, client: Client, size: int) -> None:
        client.question_bytes -= size
        self.question_bytes -= size
