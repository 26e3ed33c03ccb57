"""What the log of `__groups` holds: results of decisions, never questions.

One frame holds the commands of one decision, one record each, so that they are applied together.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import GroupId, ProducerId, RecordOffset, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PLACES_SHARED: Final = 65_536
COMMAND_VERSION: Final = 1

Places = frozenset[TopicPartition]


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One member as the coordinator has it.

    session: what one process drew when it joined; it tells a live process from an older one of
    the same name. epoch: the group's epoch whose assignment the member has reached. version: rises
    with every change of this value, so that the coordinator knows what the member has seen.
    assigned: what it may read. revoking: what it was told to give up and has not given up yet;
    nobody else gets these before it has. topics: names and patterns, as subscribed.
    """

    name: str
    session: str
    static: bool
    epoch: int
    version: int
    topics: tuple[str, ...]
    session_timeout_ms: int
    client: str
    assigned: Places = frozenset()
    revoking: Places = frozenset()

    @property
    def held(self) -> Places:
        return self.assigned | self.revoking


@dataclass(frozen=True, slots=True)
class PutMember:
    group: str
    member: GroupMember


@dataclass(frozen=True, slots=True)
class DropMember:
    group: str
    name: str


@dataclass(frozen=True, slots=True)
class SetTarget:
    """Who should hold what from this epoch on.

    partitions: how many each followed topic had when this was decided. first_seen: of topics that
    are followed for the first time, how many of these partitions were there before.
    """

    group: str
    epoch: int
    target: Mapping[str, Places]
    partitions: Mapping[str, int]
    first_seen: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CommitOffsets:
    """Positions of a group: next offset to be read.

    positions: (place, Raft group of that partition, offset). session, number: of the member's
    process and its commits, by which a late repeat is known; "" for an administrator's.
    """

    group: str
    session: str
    number: int
    positions: tuple[tuple[TopicPartition, GroupId, RecordOffset], ...]


@dataclass(frozen=True, slots=True)
class PendOffsets:
    """Positions that become the group's if the transaction of this producer and epoch is committed;
    see `CommitOffsets`."""

    group: str
    session: str
    number: int
    producer: ProducerId
    epoch: int
    positions: tuple[tuple[TopicPartition, GroupId, RecordOffset], ...]


@dataclass(frozen=True, slots=True)
class DropGroup:
    group: str


GroupCommand = PutMember | DropMember | SetTarget | CommitOffsets | PendOffsets | DropGroup


def encode_command(command: GroupCommand) -> bytes:
    """The value of one record in `__groups`."""
    match command:
        case PutMember(group, member):
            body: list[Any] = ["put_member", group, member_to_fields(member)]
        case DropMember(group, name):
            body = ["drop_member", group, name]
        case SetTarget(group, epoch, target, partitions, first_seen):
            places = {name: places_to_fields(held) for name, held in sorted(target.items())}
            counts = dict(sorted(partitions.items())), dict(sorted(first_seen.items()))
            body = ["set_target", group, epoch, places, *counts]
        case CommitOffsets(group, session, number, positions):
            body = ["commit_offsets", group, session, number, positions_to_fields(positions)]
        case PendOffsets(group, session, number, producer, epoch, positions):
            rows = positions_to_fields(positions)
            body = ["pend_offsets", group, session, number, producer, epoch, rows]
        case DropGroup(group):
            body = ["drop_group", group]
    return bytes(msgpack.packb([COMMAND_VERSION, *body]))


def decode_command(value: bytes) -> GroupCommand:
    """Raise `CorruptRecord` when the value is no command that this version knows."""
    try:
        version, kind, *body = msgpack.unpackb(value, strict_map_key=True)
        if version > COMMAND_VERSION:
            raise CorruptRecord(
                f"A command of a consumer group has version {version}; this program reads up to"
                f" {COMMAND_VERSION}. Run a newer aegis-cluster."
            )
        return _decode(kind, body)
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise CorruptRecord(f"A record of `__groups` is no command: {error}.") from error


def _decode(kind: str, body: list[Any]) -> GroupCommand:
    match kind, body:
        case "put_member", [str(group), list(fields)]:
            return PutMember(group, member_from_fields(fields))
        case "drop_member", [str(group), str(name)]:
            return DropMember(group, name)
        case "set_target", [str(group), int(epoch), dict(places), dict(counts), dict(first)]:
            target = {name: places_from_fields(held) for name, held in places.items()}
            return SetTarget(group, epoch, target, counts, first)
        case "commit_offsets", [str(group), str(session), int(number), list(rows)]:
            return CommitOffsets(group, session, number, positions_from_fields(rows))
        case "pend_offsets", [
            str(group),
            str(session),
            int(number),
            int(producer),
            int(epoch),
            list(rows),
        ]:
            positions = positions_from_fields(rows)
            return PendOffsets(group, session, number, ProducerId(producer), epoch, positions)
        case "drop_group", [str(group)]:
            return DropGroup(group)
    raise CorruptRecord(f"The group command {kind!r} is unknown to this version.")


def positions_to_fields(
    positions: Iterable[tuple[TopicPartition, GroupId, RecordOffset]],
) -> list[list[Any]]:
    return [[*place, log, offset] for place, log, offset in positions]


def positions_from_fields(
    rows: Iterable[list[Any]],
) -> tuple[tuple[TopicPartition, GroupId, RecordOffset], ...]:
    # One object for each partition, however many groups have a position in it: a million positions
    # take half the time to fold, and a third less memory.
    return tuple(
        [(place_of(topic, partition), log, offset) for topic, partition, log, offset in rows]
    )


@lru_cache(maxsize=PLACES_SHARED)
def place_of(topic: str, partition: int) -> TopicPartition:
    """The one object that stands for this partition wherever many positions do."""
    return TopicPartition(topic, partition)


def places_to_fields(places: Iterable[TopicPartition]) -> dict[str, list[int]]:
    """Partition numbers by topic, in order."""
    by_topic: defaultdict[str, list[int]] = defaultdict(list)
    for topic, partition in sorted(places):
        by_topic[topic].append(partition)
    return dict(by_topic)


def places_from_fields(by_topic: Mapping[str, Iterable[int]]) -> Places:
    return frozenset(
        TopicPartition(topic, number) for topic, numbers in by_topic.items() for number in numbers
    )


def member_to_fields(member: GroupMember) -> list[Any]:
    return [
        member.name,
        member.session,
        member.static,
        member.epoch,
        member.version,
        list(member.topics),
        member.session_timeout_ms,
        member.client,
        places_to_fields(member.assigned),
        places_to_fields(member.revoking),
    ]


def member_from_fields(fields: list[Any]) -> GroupMember:
    name, session, static, epoch, version, topics, timeout_ms, client, *held = fields[:10]
    assigned, revoking = held
    return GroupMember(
        name,
        session,
        static,
        epoch,
        version,
        tuple(topics),
        timeout_ms,
        client,
        places_from_fields(assigned),
        places_from_fields(revoking),
    )
