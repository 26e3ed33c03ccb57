"""Requests are cut out of ZeroMQ's bytes, however these come, and arrive once more."""

from __future__ import annotations

import pytest
import zmq

from aegis_cluster.wire.protocol import PROTOCOL_VERSION, Api, Hello, decode_request, encode_request
from chaos.processes import links as module
from chaos.processes.links import Links
from chaos.processes.repeating import Tape


def frame(body: bytes, *, more: bool = False, command: bool = False) -> bytes:
    flags = more * 1 | command * 4
    if len(body) > 255:
        return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


def message(parts: list[bytes]) -> bytes:
    last = len(parts) - 1
    return b"".join(frame(part, more=place < last) for place, part in enumerate(parts))


def request(api: Api, *fields: object) -> list[bytes]:
    parts = [b"x" * 300] if api is Api.PRODUCE else []
    found = encode_request(api, list(fields), parts, correlation=7, ms_left=1_000)
    return [bytes(part) for part in found]


def hello() -> list[bytes]:
    said = Hello(PROTOCOL_VERSION, "client", "", 0, "", "here", 0)
    return [bytes(p) for p in encode_request(Api.HELLO, said.to_fields(), correlation=0, ms_left=9)]


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)
READY = frame(b"\x05READY", command=True)
PING = frame(b"\x04PING", command=True)


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_whole_requests_come_out(step: int) -> None:
    produce, join = request(Api.PRODUCE, [], 1, "x"), request(Api.TRANSACTION_JOIN, "x")
    dull = [request(Api.FETCH, 0, []), request(Api.PRODUCE, [], 1, None)]
    sent = [message(hello()), *map(message, dull), PING, message(produce)]
    data = b"".join([GREETING, READY, *sent, message(join)])
    tape = Tape()
    found: list[bytes] = []
    for start in range(0, len(data), step):
        found += tape.feed(data[start : start + step])
    assert found == [message(produce), message(join)]
    assert (tape.greeting, tape.handshake, tape.hello) == (GREETING, READY, message(hello()))


def test_what_is_no_zeromq_is_left_alone() -> None:
    tape = Tape()
    assert tape.feed(b"GET / HTTP/1.1\r\n" + bytes(100)) == []
    assert tape.feed(bytes(1_000)) == []


def test_a_request_arrives_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a proxy, at a socket of ZeroMQ, from another origin."""
    monkeypatch.setattr(module, "DELAY_S", (0.1, 0.1))
    links = Links(0)
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        (detour,) = links.detours("a", {"b": [("127.0.0.1", port)]}).values()
        links.repeat([("a", "b")], 1.0)
        dealer.connect(detour)
        dealer.send_multipart(hello())
        dealer.send_multipart(request(Api.TRANSACTION_END, "x", 1, 1, True))
        router.setsockopt(zmq.RCVTIMEO, 10_000)
        got = [router.recv_multipart() for _ in range(4)]
    finally:
        links.close()
        context.destroy(linger=0)
    apis = [(origin, decode_request(parts).api) for origin, *parts in got]
    first, later = apis[0][0], apis[2][0]
    assert first != later
    assert apis == [(o, api) for o in (first, later) for api in (Api.HELLO, Api.TRANSACTION_END)]
