"""What travels between the views of two nodes, and what of it is dropped.

    frame: [version, cluster id, sender, incarnation, sender's term, message or None (a ping)]

The idea: the library believes whatever it is handed, so only what it can bear gets through:
messages of the kinds and types that it sends itself, commands that are small and of the regular
kind (no membership change, no change of version), and no pieces of big entries, which we never
make.

Pure: the decision is made from the frame and three facts about the receiver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster import limits
from aegis_cluster.errors import PeerViolation

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION: Final = 1
FRAME_BYTES_MAX: Final = 512 * limits.KIB
"""An append of the library carries 64 KiB and one more command."""
_COMMAND_BYTES_MAX: Final = limits.VIEW_OP_BYTES_MAX + limits.KIB
_REGULAR, _NO_OP = 0, 1
_NUMBER_MAX: Final = 2**63 - 1
_ENTRIES_MAX: Final = 16_384


class Frame(NamedTuple):
    """One message between two views."""

    sender: str
    incarnation: int
    """Of the sender's present life; rises from life to life."""
    term: int
    """The sender's term when it sent this."""
    message: dict[str, Any] | None
    """None: only a sign of life."""


def encode(cluster_id: str, frame: Frame) -> bytes:
    """As bytes for the socket."""
    return bytes(msgpack.packb([VERSION, cluster_id, *frame]))


def decode(part: bytes, cluster_id: str) -> Frame:
    """A frame of our cluster, or PeerViolation."""
    try:
        fields = msgpack.unpackb(
            part, use_list=False, max_array_len=_ENTRIES_MAX, max_map_len=64, max_ext_len=0
        )
        version, cluster, sender, incarnation, term, message = fields
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as cause:
        raise PeerViolation("a frame of the view is malformed", cause=str(cause)) from cause
    if version != VERSION or cluster != cluster_id:
        raise PeerViolation("a frame of another cluster or version", have=[version, cluster])
    is_message = message is None or type(message) is dict
    if type(sender) is not str or not (_numbers(incarnation, term) and is_message):
        raise PeerViolation("a frame of the view is malformed")
    return Frame(sender, incarnation, term, message)


def admits(
    message: Mapping[str, Any], *, term: int, our_term: int, from_voter: bool, blank: bool
) -> bool:
    """Whether the library may see a message.

    term: of its frame. from_voter: a node that only reads has no say. blank: we have forgotten what
    we voted for in an earlier life, so we take no part in elections yet.
    """
    kind = message.get("type")
    if not from_voter and kind not in ("next_node_idx", "apply_command"):
        return False
    match kind:
        case "append_entries":
            return _is_append(message)
        case "next_node_idx":
            # It carries no term of its own; a late one could raise a follower's match falsely.
            fields = ("next_node_idx", "reset", "success")
            return term == our_term and _is_exactly(message, fields) and _is_ack(message)
        case "request_vote":
            fields = ("term", "last_log_index", "last_log_term")
            return not blank and _has_numbers(message, fields)
        case "response_vote" | "timeout_now":
            return not blank and _has_numbers(message, ("term",))
        case "apply_command":
            optional = message.get("request_id", 0)
            return _is_command(message.get("command"), _REGULAR) and _numbers(optional)
        case "apply_command_response":
            return _has_numbers(message, ("request_id", "error")) or _has_numbers(
                message, ("request_id", "log_idx", "log_term")
            )
    return False


def _is_ack(message: Mapping[str, Any]) -> bool:
    flags = (type(message["reset"]), type(message["success"]))
    return _numbers(message["next_node_idx"]) and flags == (bool, bool)


def _is_append(message: Mapping[str, Any]) -> bool:
    if not _numbers(message.get("term"), message.get("commit_index")):
        return False
    if "serialized" in message:
        return _is_exactly(message, ("term", "commit_index", "serialized")) and _is_chunk(
            message["serialized"]
        )
    fields = ("term", "commit_index", "entries", "prevLogIdx", "prevLogTerm")
    if not _is_exactly(message, fields):  # among others, no "transmission"
        return False
    before = (message["prevLogIdx"], message["prevLogTerm"])
    return (before == (None, None) or _numbers(*before)) and _are_entries(message["entries"])


def _are_entries(entries: Any) -> bool:
    return type(entries) is tuple and all(
        type(entry) is tuple
        and len(entry) == 3
        and _is_command(entry[0], _REGULAR, _NO_OP)
        and _numbers(entry[1], entry[2])
        for entry in entries
    )


def _is_command(command: Any, *kinds: int) -> bool:
    return type(command) is bytes and 0 < len(command) <= _COMMAND_BYTES_MAX and command[0] in kinds


def _is_chunk(chunk: Any) -> bool:
    """A piece of a snapshot: bytes, whether it is the first, whether it is the last."""
    return chunk is None or (
        type(chunk) is tuple and [type(item) for item in chunk] == [bytes, bool, bool]
    )


def _is_exactly(message: Mapping[str, Any], fields: tuple[str, ...]) -> bool:
    return message.keys() == {"type", *fields}


def _has_numbers(message: Mapping[str, Any], fields: tuple[str, ...]) -> bool:
    return _is_exactly(message, fields) and _numbers(*(message[name] for name in fields))


def _numbers(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value <= _NUMBER_MAX for value in values)
