"""The state that a partition of `__groups` folds to: groups, their members, and their positions.

Every replica applies the same commands and holds the same table. A late repeat of a commit is
known by its session and number and leaves the position where it is. Positions of a transaction are
kept apart until its marker stands in this log; meanwhile nobody begins to read there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.groups.commands import (
    CommitOffsets,
    DropGroup,
    DropMember,
    GroupCommand,
    GroupMember,
    PendOffsets,
    Places,
    PutMember,
    SetTarget,
    member_from_fields,
    member_to_fields,
    places_from_fields,
    places_to_fields,
)
from aegis_cluster.errors import invariant
from aegis_cluster.ids import GroupId, ProducerId, RecordOffset, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GROUPS: Final = "groups"
OFFSETS: Final = "offsets"
PENDING: Final = "pending"
SLICE_GROUPS: Final = 50
SLICE_POSITIONS: Final = 1_000


class Committed(NamedTuple):
    """A group's position in one partition.

    log: the partition's Raft group, so that a topic that was deleted and made anew is another.
    session, number: of the commit that set it.
    """

    offset: RecordOffset
    log: GroupId
    time_ms: int
    session: str
    number: int


@dataclass(slots=True)
class Pending:
    """What one transaction will do to positions: by group and partition."""

    epoch: int
    positions: dict[tuple[str, TopicPartition], Committed] = field(default_factory=dict)


_COMMITTED: Final[Callable[[tuple[RecordOffset, GroupId, int, str, int]], Committed]] = partial(
    tuple.__new__, Committed
)
"""Without a line of Python: after a restart there may be a million of them to make."""


@dataclass(slots=True)
class Group:
    """One consumer group without its positions.

    epoch: rises with every change of members, subscriptions or followed topics. target: who should
    hold what at that epoch. partitions: of each followed topic at that epoch. first_seen: how many
    partitions a topic had when the group began to follow it; a later partition is read from its
    beginning, or messages between its creation and its assignment would be lost.
    """

    name: str
    epoch: int = 0
    members: dict[str, GroupMember] = field(default_factory=dict)
    target: dict[str, Places] = field(default_factory=dict)
    partitions: dict[str, int] = field(default_factory=dict)
    first_seen: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Group:
        return Group(
            self.name,
            self.epoch,
            dict(self.members),
            dict(self.target),
            dict(self.partitions),
            dict(self.first_seen),
        )

    @property
    def is_settled(self) -> bool:
        """Every member holds just what it should."""
        return all(
            member.epoch == self.epoch
            and not member.revoking
            and member.assigned == self.target.get(name, frozenset())
            for name, member in self.members.items()
        )

    def holders(self) -> dict[TopicPartition, str]:
        """Who holds each partition, what is being given up included."""
        found: dict[TopicPartition, str] = {}
        for name, member in self.members.items():
            for place in member.held:
                invariant(place not in found, "two members hold one partition", place=place)
                found[place] = name
        return found

    def apply(self, command: PutMember | DropMember | SetTarget) -> None:
        match command:
            case PutMember(_, member):
                self.members[member.name] = member
            case DropMember(_, name):
                self.members.pop(name, None)
                self.target.pop(name, None)
            case SetTarget(_, epoch, target, partitions, first_seen):
                invariant(epoch > self.epoch, "a group's epoch rises", have=self.epoch, got=epoch)
                self.epoch = epoch
                self.target = dict(target)
                self.partitions = dict(partitions)
                self.first_seen |= first_seen

    def is_later(self, place: TopicPartition) -> bool:
        """The partition came after the group had begun to follow its topic."""
        return place.partition >= self.first_seen.get(place.topic, place.partition + 1)


class GroupTable:
    """Groups by name."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.offsets: dict[str, dict[TopicPartition, Committed]] = {}
        self.pending: dict[ProducerId, Pending] = {}

    def apply(self, command: GroupCommand, time_ms: int) -> None:
        """Fold one committed command; time_ms: append time of its frame."""
        match command:
            case CommitOffsets():
                self._commit(command, time_ms)
            case PendOffsets():
                self._pend(command, time_ms)
            case DropGroup(name):
                self.groups.pop(name, None)
                self.offsets.pop(name, None)
                self._drop_pending(name)
            case PutMember() | DropMember() | SetTarget():
                self.group(command.group).apply(command)

    def group(self, name: str) -> Group:
        """The group, made on first use."""
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group(name)
        return group

    def _commit(self, command: CommitOffsets, time_ms: int) -> None:
        self.group(command.group)
        positions = self.offsets.setdefault(command.group, {})
        session, number = command.session, command.number
        for place, log, offset in command.positions:
            before = positions.get(place)
            if before is not None and _is_late(before, command):
                continue
            positions[place] = _COMMITTED((offset, log, time_ms, session, number))

    def _pend(self, command: PendOffsets, time_ms: int) -> None:
        self.group(command.group)
        found = self.pending.get(command.producer)
        if found is None or found.epoch < command.epoch:
            found = self.pending[command.producer] = Pending(command.epoch)
        invariant(found.epoch == command.epoch, "an older transaction moves positions")
        for place, log, offset in command.positions:
            before = found.positions.get((command.group, place))
            if before is None or not _is_late(before, command):
                found.positions[command.group, place] = Committed(
                    offset, log, time_ms, command.session, command.number
                )

    def _drop_pending(self, group: str) -> None:
        for pending in self.pending.values():
            for key in [key for key in pending.positions if key[0] == group]:
                del pending.positions[key]

    def pending_places(self, group: str) -> frozenset[TopicPartition]:
        """Where a transaction that has not ended here will perhaps move the group."""
        return frozenset(
            place
            for pending in self.pending.values()
            for name, place in pending.positions
            if name == group
        )

    def end_transaction(
        self, producer: ProducerId, epoch: int, time_ms: int, *, committed: bool
    ) -> None:
        """A marker stands in this log; epoch: the transaction's own."""
        found = self.pending.get(producer)
        if found is None or found.epoch > epoch:
            return
        del self.pending[producer]
        if not committed or found.epoch < epoch:
            return
        for (group, place), position in found.positions.items():
            positions = self.offsets.setdefault(group, {})
            positions[place] = position._replace(time_ms=time_ms)

    # ---- snapshots

    def slices(self) -> Iterator[list[Any]]:
        """The table as it is at the call, in pieces for `add`."""
        groups = [group.copy() for _, group in sorted(self.groups.items())]
        offsets = [(name, sorted(found.items())) for name, found in sorted(self.offsets.items())]
        pending = [
            (producer, one.epoch, sorted(one.positions.items()))
            for producer, one in sorted(self.pending.items())
        ]
        return _slices(groups, offsets, pending)

    def add(self, piece: list[Any]) -> None:
        """Take in one piece of a table's `slices`."""
        kind, *values = piece
        if kind == GROUPS:
            for fields in values[0]:
                group = _group_from_fields(fields)
                self.groups[group.name] = group
            return
        if kind == PENDING:
            producer, epoch, found = values
            pending = self.pending.setdefault(ProducerId(producer), Pending(epoch))
            for group, topic, partition, *committed in found:
                place = TopicPartition(topic, partition)
                pending.positions[group, place] = Committed(*committed)
            return
        name, rows = values
        positions = self.offsets.setdefault(name, {})
        for topic, partition, *committed in rows:
            positions[TopicPartition(topic, partition)] = Committed(*committed)


def _slices(
    groups: list[Group],
    offsets: list[tuple[str, list[tuple[TopicPartition, Committed]]]],
    pending: list[tuple[ProducerId, int, list[tuple[tuple[str, TopicPartition], Committed]]]],
) -> Iterator[list[Any]]:
    for start in range(0, len(groups), SLICE_GROUPS):
        yield [GROUPS, [_group_to_fields(one) for one in groups[start : start + SLICE_GROUPS]]]
    for name, rows in offsets:
        for start in range(0, len(rows), SLICE_POSITIONS):
            piece = rows[start : start + SLICE_POSITIONS]
            yield [OFFSETS, name, [[*place, *committed] for place, committed in piece]]
    for producer, epoch, found in pending:
        for start in range(0, len(found), SLICE_POSITIONS):
            part = found[start : start + SLICE_POSITIONS]
            values = [[group, *place, *committed] for (group, place), committed in part]
            yield [PENDING, producer, epoch, values]


def _is_late(before: Committed, command: CommitOffsets | PendOffsets) -> bool:
    """The same process has committed something newer since it sent this."""
    same = bool(command.session) and before.session == command.session
    return same and command.number <= before.number


def _group_to_fields(group: Group) -> list[Any]:
    return [
        group.name,
        group.epoch,
        [member_to_fields(member) for _, member in sorted(group.members.items())],
        {name: places_to_fields(held) for name, held in sorted(group.target.items())},
        dict(sorted(group.partitions.items())),
        dict(sorted(group.first_seen.items())),
    ]


def _group_from_fields(fields: list[Any]) -> Group:
    name, epoch, members, target, partitions, first_seen = fields[:6]
    found = [member_from_fields(member) for member in members]
    return Group(
        name,
        epoch,
        {member.name: member for member in found},
        {member: places_from_fields(held) for member, held in target.items()},
        dict(partitions),
        dict(first_seen),
    )
