"""The state that a partition of `__groups` folds to: groups, their members, and their positions.

Every replica applies the same commands and holds the same table. A late repeat of a commit is
known by its session and number and leaves the position where it is. Positions of a transaction are
kept apart until its marker stands in this log; meanwhile nobody begins to read there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

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
from aegis_cluster.broker.groups.positions import Committed, Positions, committed
from aegis_cluster.errors import invariant
from aegis_cluster.ids import ProducerId, TopicPartition
from aegis_cluster.limits import KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GROUPS: Final = "groups"
OFFSETS: Final = "offsets"
"""Positions row by row, as snapshots up to version 3 hold them."""
POSITIONS: Final = "positions"
PENDING: Final = "pending"
SLICE_GROUPS: Final = 50
SLICE_POSITIONS: Final = 1_000
SLICE_BYTES: Final = 64 * KIB
"""Of packed positions, and a group's more."""


@dataclass(slots=True)
class Pending:
    """What one transaction will do to positions: by group and partition."""

    epoch: int
    positions: dict[tuple[str, TopicPartition], Committed] = field(default_factory=dict)


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
        self._positions: dict[str, Positions] = {}
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
                self._positions.pop(name, None)
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
        rows = self._positions_to_change(command.group)
        session, number = command.session, command.number
        for place, log, offset in command.positions:
            before = rows.get(place)
            if before is not None and _is_late(before, command):
                continue
            rows[place] = committed((offset, log, time_ms, session, number))

    def positions(self, group: str) -> Mapping[TopicPartition, Committed]:
        """How far a group has come, in the partitions that it has a position in."""
        found = self._positions.get(group)
        return {} if found is None else found.rows

    def _positions_to_change(self, group: str) -> dict[TopicPartition, Committed]:
        found = self._positions.get(group)
        if found is None:
            found = self._positions[group] = Positions()
        return found.to_change()

    def _pend(self, command: PendOffsets, time_ms: int) -> None:
        self.group(command.group)
        found = self.pending.get(command.producer)
        if found is None or found.epoch < command.epoch:
            found = self.pending[command.producer] = Pending(command.epoch)
        if found.epoch > command.epoch:
            return  # of no client that keeps to the protocol: an older transaction has ended here
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
            self._positions_to_change(group)[place] = position._replace(time_ms=time_ms)

    # ---- snapshots

    def slices(self) -> Iterator[list[Any]]:
        """The table as it is at the call, in pieces for `add`."""
        groups = [group.copy() for _, group in sorted(self.groups.items())]
        positions = [(name, found.capture()) for name, found in sorted(self._positions.items())]
        pending = [
            (producer, one.epoch, sorted(one.positions.items()))
            for producer, one in sorted(self.pending.items())
        ]
        return _slices(groups, positions, pending)

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
            for group, topic, partition, *fields in found:
                place = TopicPartition(topic, partition)
                pending.positions[group, place] = Committed(*fields)
            return
        if kind == POSITIONS:
            self._positions.update({name: Positions(packed) for name, packed in values[0]})
            return
        name, old_rows = values
        rows = self._positions_to_change(name)
        for topic, partition, *fields in old_rows:
            rows[TopicPartition(topic, partition)] = Committed(*fields)


def _slices(
    groups: list[Group],
    positions: list[tuple[str, Callable[[], bytes]]],
    pending: list[tuple[ProducerId, int, list[tuple[tuple[str, TopicPartition], Committed]]]],
) -> Iterator[list[Any]]:
    for start in range(0, len(groups), SLICE_GROUPS):
        yield [GROUPS, [_group_to_fields(one) for one in groups[start : start + SLICE_GROUPS]]]
    yield from _packed_slices(positions)
    for producer, epoch, found in pending:
        for start in range(0, len(found), SLICE_POSITIONS):
            part = found[start : start + SLICE_POSITIONS]
            values = [[group, *place, *fields] for (group, place), fields in part]
            yield [PENDING, producer, epoch, values]


def _packed_slices(positions: list[tuple[str, Callable[[], bytes]]]) -> Iterator[list[Any]]:
    rows: list[list[Any]] = []
    size = 0
    for name, packed_now in positions:
        packed = packed_now()
        rows.append([name, packed])
        size += len(packed)
        if size >= SLICE_BYTES:
            yield [POSITIONS, rows]
            rows, size = [], 0
    if rows:
        yield [POSITIONS, rows]


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
