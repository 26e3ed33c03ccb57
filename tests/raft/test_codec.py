"""Every message survives the wire, and nothing else gets in."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.errors import PeerViolation
from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft import (
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVoteReply,
    PreVoteRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from aegis_cluster.raft.codec import (
    membership_from_fields,
    membership_to_fields,
    message_from_fields,
    message_to_fields,
)
from tests.raft.harness import log_of, membership

T, I = Term(7), LogIndex(3)  # noqa: E741 - one letter each keeps the table readable
GROUP = membership(1, 2, 3, learners=(4,))

# The fields of version 1, as they travel. A change here is a change of the protocol.
GOLDEN: list[tuple[Message, list[Any]]] = [
    (PreVoteRequest(T, Term(8), I, Term(6)), [1, 7, 8, 3, 6]),
    (PreVoteReply(T, Term(8), granted=True), [2, 7, 8, True]),
    (VoteRequest(T, I, Term(6), transfer=False), [3, 7, 3, 6, False]),
    (VoteReply(T, granted=False), [4, 7, False]),
    (AppendRequest(T, I, Term(6), I, LogIndex(2), LogIndex(5)), [5, 7, 3, 6, 3, 2, 5]),
    (AppendReply(T, I, LogIndex(2)), [6, 7, 3, 2]),
    (AppendRefusal(T, I, LogIndex(2), Term(1)), [7, 7, 3, 2, 1]),
    (Heartbeat(T, I, 9, quiet=False), [8, 7, 3, 9, False]),
    (HeartbeatReply(T, 9, I, quiet=True), [9, 7, 9, 3, True]),
    (TimeoutNow(T), [10, 7]),
    (
        InstallSnapshot(T, I, Term(6), GROUP),
        [11, 7, 3, 6, [[[1, "a"], [2, "a"], [3, "a"]], [[4, "a"]]]],
    ),
]


@pytest.mark.parametrize(("message", "fields"), GOLDEN)
def test_there_and_back(message: Message, fields: list[Any]) -> None:
    assert message_to_fields(message) == fields
    wired = msgpack.unpackb(msgpack.packb(fields))
    decoded = message_from_fields(wired)
    assert decoded == message
    assert type(decoded) is type(message)


def test_every_message_has_a_layout() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(Message.__args__)


def test_entries_stay_behind() -> None:
    request = AppendRequest(T, LogIndex(0), Term(0), I, I, I, log_of(1, 1, 1))
    assert message_from_fields(message_to_fields(request)) == request._replace(entries=())


def test_membership_there_and_back() -> None:
    assert membership_from_fields(membership_to_fields(GROUP)) == GROUP


@pytest.mark.parametrize(
    "fields",
    [
        [],
        None,
        {},
        ["1"],
        [True, 7],
        [99, 7],
        [10],
        [10, 7, 7],
        [10, -1],
        [10, 2**63],
        [10, 7.0],
        [4, 7, 1],
        [5, 7, 3, 6, 3, 2, 2],  # ends before it begins
        [11, 7, 3, 6, [[], []]],  # nobody votes
        [11, 7, 3, 6, [[[1, "a"], [1, "a"]], []]],
        [11, 7, 3, 6, [[[1, "a" * 65]], []]],
        [11, 7, 3, 6, [[[1]], []]],
        [11, 7, 3, 6, [[[n, "a"] for n in range(65)], []]],
    ],
)
def test_what_is_malformed_is_a_violation(fields: Any) -> None:
    with pytest.raises(PeerViolation):
        message_from_fields(fields)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@given(st.one_of(PLAIN, st.lists(st.integers(-1, 12) | st.booleans(), max_size=8)))
def test_anything_decodes_or_is_a_violation(fields: Any) -> None:
    try:
        message = message_from_fields(fields)
    except PeerViolation:
        return
    assert message_from_fields(message_to_fields(message)) == message
