"""Messages as plain lists for the wire, and back, with nothing believed.

The idea: one table gives each message type a number that never changes and the kinds of its
fields. Entries are not in it: the receiver's shell reads them again from the raw frames and adds
them with `request._replace(entries=...)`.

The rule it protects: whatever arrives, decoding gives a well-formed message or `PeerViolation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from aegis_cluster.errors import PeerViolation
from aegis_cluster.ids import Member, NodeId
from aegis_cluster.raft.membership import Membership
from aegis_cluster.raft.messages import (
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

NUMBER_MAX: Final = 2**63 - 1
"""Terms and indexes stay below this, so they fit any integer of the formats."""
INCARNATION_CHARS_MAX: Final = 64
MEMBERS_MAX: Final = 64


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= NUMBER_MAX:
        raise PeerViolation("not a number of the log", have=value)
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise PeerViolation("not a flag", have=value)
    return value


def member_to_fields(member: Member) -> list[Any]:
    """[node, incarnation]."""
    return [member.node, member.incarnation]


def member_from_fields(value: object) -> Member:
    """Raises PeerViolation."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PeerViolation("not a member", have=value)
    node, incarnation = value
    if not isinstance(incarnation, str) or len(incarnation) > INCARNATION_CHARS_MAX:
        raise PeerViolation("not an incarnation", have=incarnation)
    return Member(NodeId(_number(node)), incarnation)


def membership_to_fields(membership: Membership) -> list[Any]:
    """[voters, learners]; also the payload of a membership frame."""
    return [
        [member_to_fields(member) for member in membership.voters],
        [member_to_fields(member) for member in membership.learners],
    ]


def membership_from_fields(value: object) -> Membership:
    """Raises PeerViolation."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PeerViolation("not a membership", have=value)
    voters, learners = (_members(part) for part in value)
    everyone = voters + learners
    if not voters or len(set(everyone)) != len(everyone):
        raise PeerViolation("a membership without voters or with doubles", have=value)
    return Membership(tuple(sorted(voters)), tuple(sorted(learners)))


def _members(value: object) -> tuple[Member, ...]:
    if not isinstance(value, list | tuple) or len(value) > MEMBERS_MAX:
        raise PeerViolation("not a list of members", have=value)
    return tuple(member_from_fields(each) for each in value)


_Check = Callable[[object], Any]

# Type number -> message, how many of its fields are numbers, and the kind of the one after them, if
# there is one. Type numbers are never used again.
_LAYOUTS: Final[dict[int, tuple[type[Message], int, _Check | None]]] = {
    1: (PreVoteRequest, 4, None),
    2: (PreVoteReply, 2, _flag),
    3: (VoteRequest, 3, _flag),
    4: (VoteReply, 1, _flag),
    5: (AppendRequest, 6, None),
    6: (AppendReply, 3, None),
    7: (AppendRefusal, 4, None),
    8: (Heartbeat, 3, _flag),
    9: (HeartbeatReply, 3, _flag),
    10: (TimeoutNow, 1, None),
    11: (InstallSnapshot, 3, membership_from_fields),
}
_NUMBERS: Final = {kind: number for number, (kind, _, _) in _LAYOUTS.items()}


def message_to_fields(message: Message) -> list[Any]:
    """[type number, fields...]; an append goes without its entries."""
    number = _NUMBERS[type(message)]
    if isinstance(message, InstallSnapshot):
        return [number, *message[:3], membership_to_fields(message.membership)]
    if isinstance(message, AppendRequest):
        return [number, *message[:6]]
    return [number, *message]


def message_from_fields(fields: Sequence[object]) -> Message:
    """The message, or PeerViolation whatever `fields` holds."""
    if not isinstance(fields, list | tuple) or not fields or type(fields[0]) is not int:
        raise PeerViolation("not a Raft message", have=fields)
    layout = _LAYOUTS.get(fields[0])
    if layout is None:
        raise PeerViolation("unknown Raft message", have=fields[0])
    kind, numbers, last = layout
    values = list(fields[1:])
    want = numbers + (last is not None)
    if len(values) != want:
        raise PeerViolation("wrong number of fields", have=len(values), want=want)
    for value in values[:numbers]:  # as `_number`, for what each message has several of
        if type(value) is not int or not 0 <= value <= NUMBER_MAX:
            raise PeerViolation("not a number of the log", have=value)
    if last is not None:
        values[-1] = last(values[-1])
    message = kind(*values)
    if isinstance(message, AppendRequest) and message.last_index < message.prev_index:
        raise PeerViolation("an append that ends before it begins", have=message.last_index)
    return message
