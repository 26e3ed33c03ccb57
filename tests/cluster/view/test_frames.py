"""What the library may see of what arrives: everything that it sends itself, and nothing else."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import limits
from aegis_cluster.cluster.view import frames
from aegis_cluster.cluster.view.frames import Frame
from aegis_cluster.errors import PeerViolation

COMMAND = b"\x00command"
NO_OP = b"\x01"
MEMBERSHIP = b"\x02" + msgpack.packb(["add", "9"])
CODE_VERSION = b"\x03\x01"

APPEND = {
    "type": "append_entries", "term": 3, "commit_index": 7,
    "entries": ((COMMAND, 8, 3), (NO_OP, 9, 3)), "prevLogIdx": 7, "prevLogTerm": 2,
}  # fmt: skip
SNAPSHOT = {
    "type": "append_entries",
    "term": 3,
    "commit_index": 7,
    "serialized": (b"x", True, False),
}
ACK = {"type": "next_node_idx", "next_node_idx": 9, "reset": False, "success": True}
VOTE = {"type": "request_vote", "term": 3, "last_log_index": 7, "last_log_term": 2}
VOTED = {"type": "response_vote", "term": 3}
STAND = {"type": "timeout_now", "term": 3}
APPLY = {"type": "apply_command", "command": COMMAND, "request_id": 4}
APPLIED = {"type": "apply_command_response", "request_id": 4, "log_idx": 8, "log_term": 3}
DENIED = {"type": "apply_command_response", "request_id": 4, "error": 4}


def admits(message: dict[str, Any], **facts: Any) -> bool:
    defaults: dict[str, Any] = {"term": 3, "our_term": 3, "from_voter": True, "blank": False}
    return frames.admits(message, **{**defaults, **facts})


@pytest.mark.parametrize(
    "message",
    [
        APPEND,
        {**APPEND, "entries": ()},
        {**APPEND, "prevLogIdx": None, "prevLogTerm": None},
        SNAPSHOT,
        {**SNAPSHOT, "serialized": None},
        ACK,
        VOTE,
        VOTED,
        STAND,
        APPLY,
        {"type": "apply_command", "command": COMMAND},
        APPLIED,
        DENIED,
    ],
)
def test_what_the_library_says_gets_through(message: dict[str, Any]) -> None:
    assert admits(message)
    frame = Frame("2", 5, 3, message)
    assert frames.decode(frames.encode("cluster", frame), "cluster") == frame


@pytest.mark.parametrize("message", [VOTE, VOTED, STAND])
def test_who_has_forgotten_its_votes_takes_no_part_in_elections(message: dict[str, Any]) -> None:
    assert not admits(message, blank=True)


def test_a_late_acknowledgement_is_dropped() -> None:
    assert not admits(ACK, term=2)
    assert not admits(ACK, term=4)


@pytest.mark.parametrize("message", [APPEND, SNAPSHOT, VOTE, VOTED, STAND, APPLIED, DENIED])
def test_a_node_that_only_reads_has_no_say(message: dict[str, Any]) -> None:
    assert not admits(message, from_voter=False)


def test_a_node_that_only_reads_acknowledges_and_asks() -> None:
    assert admits(ACK, from_voter=False)
    assert admits(APPLY, from_voter=False)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": "status"},
        {"type": 7},
        {"type": "append_entries"},
        {**APPEND, "term": -1},
        {**APPEND, "term": True},
        {**APPEND, "commit_index": "7"},
        {**APPEND, "entries": [(COMMAND, 8, 3)]},
        {**APPEND, "entries": ((COMMAND, 8),)},
        {**APPEND, "entries": ((COMMAND, 8, None),)},
        {**APPEND, "entries": ((b"", 8, 3),)},
        {**APPEND, "entries": ((MEMBERSHIP, 8, 3),)},
        {**APPEND, "entries": ((CODE_VERSION, 8, 3),)},
        {**APPEND, "entries": ((b"\x00" + b"x" * 2 * limits.VIEW_OP_BYTES_MAX, 8, 3),)},
        {**APPEND, "transmission": "finish", "data": b"x"},
        {**SNAPSHOT, "serialized": (b"x", 1, 0)},
        {**SNAPSHOT, "serialized": "x"},
        {**ACK, "next_node_idx": 2**70},
        {**ACK, "reset": "no"},
        {**ACK, "more": 1},
        {**VOTE, "last_log_term": None},
        {**APPLY, "command": MEMBERSHIP},
        {**APPLY, "command": CODE_VERSION},
        {**APPLY, "command": NO_OP},
        {**APPLY, "command": "text"},
        {**APPLY, "request_id": "4"},
        {"type": "apply_command_response", "request_id": 4},
    ],
)
def test_what_it_never_says_does_not(message: dict[str, Any]) -> None:
    assert not admits(message)


@pytest.mark.parametrize(
    "fields",
    [
        [frames.VERSION, "another cluster", "2", 5, 3, None],
        [frames.VERSION + 1, "cluster", "2", 5, 3, None],
        [frames.VERSION, "cluster", 2, 5, 3, None],
        [frames.VERSION, "cluster", "2", -5, 3, None],
        [frames.VERSION, "cluster", "2", 5, 3, "text"],
        [frames.VERSION, "cluster", "2", 5, 3],
        {"a": "map"},
    ],
)
def test_frames_of_strangers_are_refused(fields: Any) -> None:
    with pytest.raises(PeerViolation):
        frames.decode(msgpack.packb(fields), "cluster")


@given(st.binary(max_size=300))
def test_garbage_is_refused_and_raises_nothing_else(part: bytes) -> None:
    try:
        frame = frames.decode(part, "cluster")
    except PeerViolation:
        return
    if frame.message is not None:
        admits(frame.message)


values = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.binary(max_size=3)


@given(
    st.sampled_from([APPEND, SNAPSHOT, ACK, VOTE, VOTED, STAND, APPLY, APPLIED]),
    st.dictionaries(
        st.sampled_from(["type", "term", "entries", "serialized", "command", "reset", "x"]),
        values | st.lists(values).map(tuple),
    ),
)
def test_no_message_makes_the_decision_raise(
    message: dict[str, Any], changes: dict[str, Any]
) -> None:
    admits({**message, **changes})
