"""Requests that are recorded on their way and sent once more, a second to a minute later.

The idea: a proxy of a run sees the bytes of one connection from a client to a node. ZeroMQ's frames
(ZMTP 3.1, RFC 37) are cut out of them; a later connection of our own says what the first one said
to introduce itself, and then one of its requests again. Encryption is off between a run's clients
and nodes, or nothing could be understood.

The rules it protects: only whole requests are repeated, and what is no ZMTP is left alone. Nor is a
batch outside of transactions: TCP brings a request once, and a plain producer relies on it. Once it
is told that a batch was refused, it may send that batch under another number.
"""

from __future__ import annotations

from typing import Final

from aegis_cluster.errors import PeerViolation
from aegis_cluster.wire.protocol import Api, decode_request

GREETING_BYTES: Final = 64
MORE, LONG, COMMAND = 1, 2, 4
"""Bits of a frame's first byte."""
DULL: Final = frozenset({Api.HELLO, Api.METADATA, Api.FETCH, Api.LIST_OFFSETS})
"""Repeating these changes nothing for anybody."""
DELAY_S: Final = (1.0, 60.0)


class Tape:
    """One connection: how it introduced itself, and its requests as they come."""

    def __init__(self) -> None:
        self.greeting = b""
        self.handshake = b""
        self.hello = b""
        """Empty until it has passed; nothing is repeated before."""
        self._waiting = b""
        self._message: list[bytes] = []
        self._raw = b""
        self._is_zmtp = True

    def feed(self, data: bytes) -> list[bytes]:
        """More bytes; returns the whole requests among them that are worth to be repeated."""
        if not self._is_zmtp:
            return []
        self._waiting += data
        if not self.greeting:
            if len(self._waiting) < GREETING_BYTES:
                return []
            if self._waiting[0] != 0xFF:
                self._is_zmtp = False
                return []
            self.greeting = self._waiting[:GREETING_BYTES]
            self._waiting = self._waiting[GREETING_BYTES:]
        return self._requests()

    def _requests(self) -> list[bytes]:
        found = []
        while (frame := self._next_frame()) is not None:
            flags, body, raw = frame
            if flags & COMMAND:
                if not self.hello:  # later ones are heartbeats
                    self.handshake += raw
                continue
            self._message.append(body)
            self._raw += raw
            if not flags & MORE:
                message, raw = self._message, self._raw
                self._message, self._raw = [], b""
                if self._is_worth(message, raw):
                    found.append(raw)
        return found

    def _next_frame(self) -> tuple[int, bytes, bytes] | None:
        data = self._waiting
        if len(data) < 2:
            return None
        flags = data[0]
        start = 9 if flags & LONG else 2
        if len(data) < start:
            return None
        end = start + int.from_bytes(data[1:start], "big")
        if len(data) < end:
            return None
        self._waiting = data[end:]
        return flags, data[start:end], data[:end]

    def _is_worth(self, message: list[bytes], raw: bytes) -> bool:
        try:
            request = decode_request(message)
        except PeerViolation:
            return False
        api = request.api
        if api == Api.HELLO and not self.hello:
            self.hello = raw
        is_plain = api == Api.PRODUCE and not any(isinstance(one, str) for one in request.fields)
        return bool(self.hello) and api not in DULL and not is_plain
