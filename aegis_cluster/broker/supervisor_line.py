"""A shard's line to its supervisor: questions about the cluster view and leases, passed on.

The idea: the shard knows nothing of the view. What a client asks goes as it came to the supervisor,
which hosts the view, over a socket that this process inherited; the answer goes back to the client.

The rule it protects: a supervisor that is paused or gone delays nobody but those who asked it:
sends never wait, and every question has a deadline.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import AegisError, OutcomeUnknown, PeerViolation, Throttled, Unavailable
from aegis_cluster.limits import (
    VIEW_ANSWER_BYTES_MAX,
    VIEW_OP_BYTES_MAX,
    VIEW_REQUESTS_WAITING_MAX,
)
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.protocol import decode_reply, encode_request

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from aegis_cluster.wire.protocol import Api

    Answer = Callable[[list[Any] | AegisError], None]

ANSWER_MS_MAX: Final = 3_000
"""Longer than the supervisor's own wait for the view."""


class _Asked(NamedTuple):
    deadline_ms: int
    answer: Answer


class SupervisorLine:
    """Owned by the shard's loop: `drain` when its descriptor is readable, `expire` now and then."""

    def __init__(self, line: socket.socket) -> None:
        line.setblocking(False)
        self._line = line
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self.is_open = True

    def fileno(self) -> int:
        return self._line.fileno()

    def ask(
        self, api: Api, fields: Sequence[Any], *, now_ms: int, wait_ms: int, answer: Answer
    ) -> None:
        """Have the supervisor answer: with a reply's fields, or with an error.

        Raises Throttled, Unavailable or PeerViolation: nothing was asked.
        """
        if len(self._asked) >= VIEW_REQUESTS_WAITING_MAX:
            raise Throttled("Too many questions wait here for the cluster view; ask another node.")
        number = next(self._numbers)
        wait_ms = min(wait_ms, ANSWER_MS_MAX)
        (part,) = encode_request(api, fields, correlation=number, ms_left=wait_ms)
        if len(part) > VIEW_OP_BYTES_MAX:
            raise PeerViolation("A question to the cluster view is too large.", have=len(part))
        try:
            self._line.send(part)
        except OSError as error:
            raise Unavailable(
                f"The supervisor of this node takes no questions: {error}."
            ) from error
        self._asked[number] = _Asked(now_ms + wait_ms, answer)

    def drain(self) -> None:
        """Hand out the answers that have come."""
        while self.is_open:
            try:
                packet = self._line.recv(VIEW_ANSWER_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if packet:
                self._received(packet)
            else:
                self.is_open = False

    def _received(self, packet: bytes) -> None:
        reply = decode_reply([packet])
        asked = self._asked.pop(reply.correlation, None)
        if asked is not None:
            fields = reply.fields
            asked.answer(error_from_reply(reply.code, fields) if reply.code else fields)

    def expire(self, now_ms: int) -> None:
        """Answer those whose time has passed."""
        for number, asked in list(self._asked.items()):
            if asked.deadline_ms <= now_ms:
                del self._asked[number]
                asked.answer(OutcomeUnknown("The supervisor of this node did not answer in time."))
