"""A shard's questions to its supervisor: answered, refused, late, or with nobody to ask."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker.supervisor_line import ANSWER_MS_MAX, SupervisorLine
from aegis_cluster.errors import (
    AegisError,
    LeaseHeld,
    OutcomeUnknown,
    PeerViolation,
    Throttled,
    Unavailable,
)
from aegis_cluster.limits import VIEW_REQUESTS_WAITING_MAX
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.protocol import Api, decode_request, encode_reply

if TYPE_CHECKING:
    from collections.abc import Iterator


class Line:
    """Both ends: the shard's, and the supervisor's socket."""

    def __init__(self) -> None:
        self.supervisor, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.supervisor.settimeout(5)
        self.shard = SupervisorLine(theirs)
        self.answers: list[list[Any] | AegisError] = []

    def ask(self, *fields: Any, now_ms: int = 0, wait_ms: int = 1_000) -> None:
        self.shard.ask(
            Api.LEASE, fields, now_ms=now_ms, wait_ms=wait_ms, answer=self.answers.append
        )

    def asked(self) -> Any:
        return decode_request([self.supervisor.recv(100_000)])

    def close(self) -> None:
        self.supervisor.close()
        self.shard._line.close()


def fill(line: Line) -> None:
    for _ in range(1_000):
        line.ask("x" * 30_000)


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def test_answers_find_their_questions_in_any_order(line: Line) -> None:
    line.ask("first")
    line.ask("second")
    first, second = line.asked(), line.asked()
    assert (first.fields, second.fields) == (["first"], ["second"])
    error = LeaseHeld("held", holder="b")
    code, fields = error_to_reply(error)
    (refusal,) = encode_reply(Api.LEASE, fields, correlation=second.correlation, code=code)
    (reply,) = encode_reply(Api.LEASE, ["granted"], correlation=first.correlation)
    line.supervisor.send(refusal)
    line.supervisor.send(reply)
    line.shard.drain()
    refused, granted = line.answers
    assert isinstance(refused, LeaseHeld)
    assert refused.details == {"holder": "b"}
    assert granted == ["granted"]


def test_a_supervisor_that_is_paused_delays_nobody_for_long(line: Line) -> None:
    line.ask("a", now_ms=100, wait_ms=60_000)
    request = line.asked()
    line.shard.drain()
    line.shard.expire(100 + ANSWER_MS_MAX - 1)
    assert line.answers == []
    line.shard.expire(100 + ANSWER_MS_MAX)
    (answer,) = line.answers
    assert isinstance(answer, OutcomeUnknown)
    (late,) = encode_reply(Api.LEASE, ["granted"], correlation=request.correlation)
    line.supervisor.send(late)
    line.shard.drain()
    assert len(line.answers) == 1


def test_questions_have_a_limit_in_number_and_size(line: Line) -> None:
    with pytest.raises(PeerViolation, match="too large"):
        line.ask("x" * 40_000)
    for _ in range(VIEW_REQUESTS_WAITING_MAX):
        line.ask("a")
    with pytest.raises(Throttled):
        line.ask("one more")


def test_a_full_line_refuses_at_once() -> None:
    line = Line()
    try:
        with pytest.raises((Unavailable, Throttled)):
            fill(line)
    finally:
        line.close()


def test_a_supervisor_that_is_gone_is_noticed(line: Line) -> None:
    line.ask("a")
    line.supervisor.close()
    line.shard.drain()
    assert not line.shard.is_open
    with pytest.raises(Unavailable):
        line.ask("b")
    line.shard.expire(5_000)
    assert isinstance(line.answers[0], OutcomeUnknown)
