"""Errors on the wire: every class, both ways, and what this process does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import errors
from aegis_cluster.errors import AegisError, NotLeader, PeerViolation
from aegis_cluster.ids import Member, NodeId
from aegis_cluster.wire.codes import (
    CODE_OF_ERROR,
    ERROR_OF_CODE,
    Code,
    code_of,
    error_from_reply,
    error_to_reply,
)
from aegis_cluster.wire.protocol import Api, decode_reply, encode_reply
from tests.wire.samples import FIXED

if TYPE_CHECKING:
    from collections.abc import Iterator


def tree(kind: type[AegisError] = AegisError) -> Iterator[type[AegisError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize("kind", list(tree()))
def test_every_class_of_the_tree_crosses_the_wire(kind: type[AegisError]) -> None:
    code, fields = error_to_reply(kind("what happened", have=1, want="two"))
    reply = decode_reply(encode_reply(Api.PRODUCE, fields, correlation=1, code=code))
    error = error_from_reply(reply.code, reply.fields)
    assert type(error) is kind
    assert (error.message, error.details) == ("what happened", {"have": 1, "want": "two"})
    assert error.retriable is kind.retriable


def test_codes_and_classes_are_one_to_one() -> None:
    assert set(CODE_OF_ERROR) == set(tree())
    assert set(ERROR_OF_CODE) == set(Code) - {Code.OK}
    assert len(CODE_OF_ERROR) == len(ERROR_OF_CODE)


def test_codes_are_for_ever() -> None:
    """A number that was given once is never given again: add lines here, never change one."""
    assert {code.name: code.value for code in Code} == {
        "OK": 0,
        "ERROR": 1,
        "REFUSED": 100,
        "TOPIC_NOT_FOUND": 101,
        "TOPIC_EXISTS": 102,
        "GROUP_NOT_FOUND": 103,
        "INVALID_TOPIC": 104,
        "CONFIG_ERROR": 105,
        "MESSAGE_TOO_LARGE": 120,
        "INVALID_BATCH": 121,
        "UNSUPPORTED_PAYLOAD": 122,
        "KEY_REQUIRED": 123,
        "OUT_OF_ORDER_SEQUENCE": 130,
        "PRODUCER_FENCED": 131,
        "UNKNOWN_PRODUCER": 132,
        "MEMBER_FENCED": 133,
        "WRONG_EXPECTED_VERSION": 134,
        "MEMBER_IN_USE": 135,
        "GROUP_NOT_EMPTY": 136,
        "FEED_FENCED": 137,
        "STALE_POSITION": 138,
        "STREAM_DELETED": 139,
        "OFFSET_OUT_OF_RANGE": 140,
        "STREAM_HELD": 141,
        "NOT_LEADER": 150,
        "NOT_ENOUGH_REPLICAS": 151,
        "NOT_READY": 152,
        "UNAVAILABLE": 153,
        "REQUEST_TIMEOUT": 154,
        "THROTTLED": 155,
        "DISK_FULL": 156,
        "TRANSACTION_ABORTED": 160,
        "NO_OPEN_TRANSACTION": 161,
        "UNAUTHORIZED": 170,
        "UNSUPPORTED_VERSION": 171,
        "WRONG_CLUSTER": 172,
        "LEASE_HELD": 180,
        "LEASE_LOST": 181,
        "SUBSCRIPTION_NOT_FOUND": 190,
        "LOCK_LOST": 191,
        "SUBSCRIPTION_IN_USE": 192,
        "SOURCE_ERROR": 195,
        "SOURCE_UNAVAILABLE": 196,
        "OUTCOME_UNKNOWN": 300,
        "PARTLY_PUBLISHED": 301,
        "CORRUPTION": 400,
        "CORRUPT_RECORD": 401,
        "CORRUPT_LOG": 402,
        "STORAGE_FAILED": 500,
        "PEER_VIOLATION": 600,
        "MISUSE": 700,
    }


@pytest.mark.parametrize("kind", list(tree()))
def test_a_code_lies_in_the_hundreds_of_its_branch(kind: type[AegisError]) -> None:
    """What a process that does not know the code would make of it is the class's own branch."""
    unknown_neighbour = CODE_OF_ERROR[kind] // 100 * 100 + 99
    branch = type(error_from_reply(unknown_neighbour, ["?", {}]))
    if kind is not AegisError:
        assert issubclass(kind, branch)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (199, errors.Refused),
        (299, errors.Refused),
        (399, errors.OutcomeUnknown),
        (499, errors.Corruption),
        (599, errors.StorageFailed),
        (699, errors.PeerViolation),
        (799, errors.Misuse),
        (2, errors.OutcomeUnknown),
        (800, errors.OutcomeUnknown),
        (2**40, errors.OutcomeUnknown),
    ],
)
def test_an_unknown_code_still_tells_its_branch(code: int, kind: type[AegisError]) -> None:
    error = error_from_reply(code, ["from a newer node", {"have": 1}])
    assert type(error) is kind
    assert error.details == {"have": 1, "code": code}


def test_a_subclass_without_a_code_crosses_as_its_parent() -> None:
    class Special(NotLeader):
        pass

    assert code_of(Special("x")) is Code.NOT_LEADER


def test_details_that_msgpack_cannot_carry_are_shown_as_text() -> None:
    loop: list[Any] = []
    loop.append(loop)
    error = NotLeader(
        "half a pair: \ud800",
        leader=Member(NodeId(3), "inc"),
        big=2**70,
        kind=NotLeader,
        loop=loop,
        deep={1: (1, b"b", None, 1.5, True)},
    )
    code, fields = error_to_reply(error)
    received = error_from_reply(code, msgpack.unpackb(msgpack.packb(fields)))
    assert received.message == "half a pair: ?"
    assert received.details["leader"] == [3, "inc"]
    assert received.details["big"] == str(2**70)
    assert received.details["kind"] == repr(NotLeader)
    assert received.details["deep"] == {"1": [1, b"b", None, 1.5, True]}


def test_an_error_of_any_size_becomes_a_small_reply() -> None:
    details = {f"name{number}": ["x" * 10_000] * 1_000 for number in range(1_000)}
    _, fields = error_to_reply(NotLeader("m" * 100_000, **details))
    assert len(msgpack.packb(fields)) < 70 * 2**10
    assert "left_out" in fields[1]


@FIXED
@given(
    st.integers(min_value=0, max_value=1_000),
    st.lists(
        st.text(max_size=3)
        | st.integers()
        | st.dictionaries(
            st.sampled_from(["message", "self", "receipts", "a", "code"]), st.integers()
        ),
        max_size=3,
    ),
)
def test_any_reply_is_an_error_or_a_violation(code: int, fields: list[Any]) -> None:
    try:
        error = error_from_reply(code, fields)
    except PeerViolation:
        assert len(fields) < 2 or type(fields[0]) is not str or type(fields[1]) is not dict
    else:
        assert isinstance(error, AegisError)
