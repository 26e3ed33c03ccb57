"""Whoever sends what nobody should: garbage, lies, absurd numbers and silence, on any socket.

The idea: one attack is one function that gets a chance (`random.Random`) and a place to attack, and
leaves connections behind at its pleasure; a stranger picks one after the other from its seed. It
knows addresses, and topics that anybody may know; it has no keys and no member's incarnation, for
with these it would not be a stranger. What it may rightly do (delete a topic, ask a shard to step
aside) it does not do: that is not an attack but an order.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

import msgpack
import zmq

from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft.codec import message_to_fields
from aegis_cluster.raft.messages import Heartbeat
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.protocol import PROTOCOL_VERSION, Api, Hello, encode_request

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    Attack = Callable[["Stranger", str], None]

APIS: Final = [api for api in Api if api is not Api.STEP_DOWN]
SOCKETS_MAX: Final = 60
"""Connections that one stranger leaves open; the oldest goes first."""
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(23, b"\0") + bytes(32)
"""ZMTP 3.0, as NULL clients say it."""
READY: Final = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
CONNECT_S: Final = 1.0


class Stranger:
    """Attacks places (`tcp://host:port`) from one seed; used by one thread."""

    def __init__(
        self, rng: random.Random, places: Sequence[str], *, cluster_id: str, groups: Sequence[int]
    ) -> None:
        self.rng = rng
        self.attacks: dict[str, int] = {}
        """How often each attack was tried."""
        self._places = list(places)
        self._cluster_id = cluster_id
        self._groups = list(groups)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._raw: list[socket.socket] = []
        self._dealers: list[tuple[str, zmq.Socket[bytes]]] = []

    def attack(self) -> None:
        """Do one thing that nobody should."""
        name = self.rng.choice(list(ATTACKS))
        self.attacks[name] = self.attacks.get(name, 0) + 1
        with contextlib.suppress(OSError, zmq.Again):
            ATTACKS[name](self, self.rng.choice(self._places))

    def close(self) -> None:
        for raw in self._raw:
            raw.close()
        self._context.destroy(linger=0)

    # ---- connections

    def raw(self, place: str) -> socket.socket:
        """A TCP connection, left open until there are too many."""
        host, _, port = place.removeprefix("tcp://").partition(":")
        raw = socket.create_connection((host, int(port)), CONNECT_S)
        raw.settimeout(CONNECT_S)
        self._raw.append(raw)
        if len(self._raw) > SOCKETS_MAX:
            self._raw.pop(0).close()
        return raw

    def dealer(self, place: str, *, greet: bool = True) -> zmq.Socket[bytes]:
        """A ZeroMQ connection, perhaps an old one; never read from unless an attack does."""
        mine = [dealer for where, dealer in self._dealers if where == place]
        if len(mine) > 3:
            return self.rng.choice(mine)
        dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVHWM, self.rng.choice((1, 100)))
        dealer.set(zmq.SNDHWM, 100)
        dealer.connect(place)
        self._dealers.append((place, dealer))
        if len(self._dealers) > SOCKETS_MAX:
            self._dealers.pop(0)[1].close(0)
        if greet:
            self.send(dealer, encode_request(Api.HELLO, self.hello(), correlation=1, ms_left=1_000))
        return dealer

    def send(self, dealer: zmq.Socket[bytes], message: Sequence[Any]) -> None:
        dealer.send_multipart([bytes(part) for part in message], zmq.DONTWAIT)

    def hello(self) -> list[Any]:
        """As a client or as a peer, of some node, in a life of its own invention."""
        role = self.rng.choice(("client", "peer"))
        node = self.rng.choice((0, 1, 2, 3, 99))
        incarnation = f"stranger-{self.rng.randrange(5)}"
        return Hello(
            PROTOCOL_VERSION, role, self._cluster_id, node, incarnation, "boot", 0
        ).to_fields()

    # ---- material

    def junk(self, size: int | None = None) -> bytes:
        return self.rng.randbytes(self.rng.choice((0, 1, 8, 60, 3_000)) if size is None else size)

    def value(self, depth: int = 3) -> Any:
        """Anything that msgpack can carry."""
        rng = self.rng
        if depth and rng.random() < 0.3:
            return [self.value(depth - 1) for _ in range(rng.randrange(5))]
        return rng.choice(
            (None, True, -1, 0, 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, float("nan"), "t",
             "x" * 300, "../../etc", b"", b"\xff" * 40, {"a": 1}, {}, rng.choice(self._groups))
        )  # fmt: skip

    def request(self, api: Api) -> list[Any]:
        """An honest request of that kind, nearly."""
        rng, group = self.rng, self.rng.choice(self._groups)
        raft = [[group, -1, message_to_fields(Heartbeat(Term(1), LogIndex(0), 0, quiet=False))]]
        shapes: dict[Api, list[Any]] = {
            Api.HELLO: self.hello(),
            Api.METADATA: [rng.choice((0, 1, 2**62)), rng.choice((None, ["t"], ["x"] * 1_000))],
            Api.CREATE_TOPIC: ["bad/name", 1, 1, ["topic", None, None, "delete", "none", 9], "tk"],
            Api.DELETE_TOPIC: ["no-such-topic"],
            Api.PRODUCE: [[[group, "t", 0]]],
            Api.FETCH: [rng.choice((0, 10, 30_000)), [[group, rng.choice((0, 2**62)), 1 << 25]]],
            Api.LIST_OFFSETS: [[group] * rng.choice((1, 500)), rng.choice((None, 0, 2**60))],
            Api.REGISTER_NODE: [[1, "stranger", "node-1", "127.0.0.1", 9, 1, "boot"], 7],
            Api.COPY_LOG: [group, rng.choice((0, 1, 2**62))],
            Api.RAFT: [raft],
        }
        if api is Api.REGISTER_NODE:
            return [self.value()]  # an honest one would be believed
        return shapes.get(api, [])

    def batch(self) -> bytes:
        """A batch that is wrong somewhere."""
        rng = self.rng
        compression = rng.choice(("none", "gzip", "lz4", "zstd"))
        rows: list[Any] = [(1, None, b"hostile", [])]
        good = bytearray(encode_batch(rows, compression=compression))
        place = rng.randrange(len(good))
        good[place] ^= 1 << rng.randrange(8)
        return bytes(good[: rng.choice((len(good), rng.randrange(len(good))))])


def greet(raw: socket.socket) -> None:
    """Shake hands as a NULL client does; what comes before the other side is ready is refused."""
    raw.sendall(GREETING + READY)
    heard = b""
    while b"READY" not in heard:
        piece = raw.recv(4_096)
        if not piece:
            raise ConnectionResetError("it was shown the door")
        heard += piece


# ---- attacks


def tcp_garbage(stranger: Stranger, place: str) -> None:
    """Bytes that are no ZMTP."""
    raw = stranger.raw(place)
    raw.sendall(stranger.junk())
    if stranger.rng.random() < 0.5:
        raw.close()


def half_open(stranger: Stranger, place: str) -> None:
    """Connect, perhaps begin to greet, and say no more."""
    stranger.raw(place).sendall(GREETING[: stranger.rng.choice((0, 1, 10, 11, 63))])


def zmtp_garbage(stranger: Stranger, place: str) -> None:
    """Greet as ZMTP does; then frames that announce too much, or are no frames."""
    rng = stranger.rng
    raw = stranger.raw(place)
    raw.sendall(GREETING)
    tail = rng.choice(
        (
            stranger.junk(),
            READY + b"\x02" + struct.pack(">Q", rng.choice((2**63, 2**40, 2**32, 2**63 - 1))),
            READY + b"\x00\x05hello",
            READY + b"\x04\xff" + stranger.junk(200),
            READY + b"\x03" + b"\xff" * 8 + stranger.junk(100),
        )
    )
    raw.sendall(tail)


def zmtp_endless(stranger: Stranger, place: str) -> None:
    """A message of many parts that never ends."""
    raw = stranger.raw(place)
    raw.sendall(GREETING + READY)
    part = b"\x03" + struct.pack(">Q", 10_000) + bytes(10_000)
    raw.sendall(part * 100)


def breaks_off(stranger: Stranger, place: str) -> None:
    """Many small messages and pings, and the connection is reset before they are read."""
    raw = stranger.raw(place)
    message = b"\x00\x05hello"
    ping = b"\x04\x07\x04PING\x00\x00"
    greet(raw)
    raw.sendall((message * 20 + ping) * stranger.rng.choice((2, 10, 60)))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def parts_of_garbage(stranger: Stranger, place: str) -> None:
    count = stranger.rng.choice((1, 2, 5, 1_100))
    greet = stranger.rng.random() < 0.5
    dealer = stranger.dealer(place, greet=greet)
    stranger.send(dealer, [stranger.junk() for _ in range(count)])


def wrong_fields(stranger: Stranger, place: str) -> None:
    """A request whose fields are anything."""
    rng = stranger.rng
    fields = [stranger.value() for _ in range(rng.randrange(6))]
    request = encode_request(rng.choice(APIS), fields, correlation=2, ms_left=1_000)
    stranger.send(stranger.dealer(place), [*request, *([stranger.junk()] * rng.randrange(3))])


def near_misses(stranger: Stranger, place: str) -> None:
    """An honest request with one thing wrong: a bit, a field, its end, its place in the order."""
    rng = stranger.rng
    api = rng.choice(APIS)
    fields = stranger.request(api)
    if fields and rng.random() < 0.5:
        fields[rng.randrange(len(fields))] = stranger.value()
    request = encode_request(
        api,
        fields,
        correlation=rng.choice((0, 1, 2**62)),
        ms_left=rng.choice((0, 100, 2**62)),
        version=rng.choice((1, 1, 1, 0, 2, 99)),
    )
    parts = [bytes(part) for part in request]
    if rng.random() < 0.4:
        flipped = bytearray(parts[0])
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        parts[0] = bytes(flipped)
    if rng.random() < 0.2:
        parts[0] = parts[0][: rng.randrange(len(parts[0]))]
    if api is Api.PRODUCE:
        parts += [stranger.batch() for _ in range(rng.choice((0, 1, 1, 2)))]
    stranger.send(stranger.dealer(place, greet=rng.random() < 0.9), parts)


def deep_and_huge(stranger: Stranger, place: str) -> None:
    """msgpack that nests, or announces more than it has."""
    rng = stranger.rng
    head = msgpack.packb([int(rng.choice(APIS)), 1, 1, 1])[1:]
    payload = rng.choice(
        (
            b"\x95" + head + b"\x91" * rng.choice((20, 5_000, 500_000)) + b"\x90",
            b"\x95" + head + b"\xdd\xff\xff\xff\xff",
            b"\x95" + head + b"\xdf\x7f\xff\xff\xff",
            b"\x95" + head + b"\xc6\xff\xff\xff\xff",
            b"\x95" + head + b"\xc9\x00\x00\x00\x01\x05x",
            b"\x95" + head + b"\xdc\x3f\xff" + b"\x90" * 0x3FFF,
        )
    )
    stranger.send(stranger.dealer(place), [payload])


def asks_and_never_reads(stranger: Stranger, place: str) -> None:
    """Everything there is, again and again; nothing is ever received."""
    dealer = stranger.dealer(place)
    for number in range(50):
        api = stranger.rng.choice((Api.FETCH, Api.METADATA, Api.STATUS, Api.LIST_OFFSETS))
        fields: list[Any] = [0, None]
        if api is Api.FETCH:
            fields = [1_000, [[group, 0, 1 << 25] for group in stranger._groups]]
        elif api is Api.LIST_OFFSETS:
            fields = [list(stranger._groups), 0]
        stranger.send(dealer, encode_request(api, fields, correlation=10 + number, ms_left=5_000))


def greets_as_everybody(stranger: Stranger, place: str) -> None:
    dealer = stranger.dealer(place, greet=False)
    for _ in range(20):
        stranger.send(dealer, encode_request(Api.HELLO, stranger.hello(), correlation=0, ms_left=1))


ATTACKS: Final[dict[str, Attack]] = {
    attack.__name__: attack
    for attack in (
        tcp_garbage,
        half_open,
        zmtp_garbage,
        zmtp_endless,
        breaks_off,
        parts_of_garbage,
        wrong_fields,
        near_misses,
        deep_and_huge,
        asks_and_never_reads,
        greets_as_everybody,
    )
}
