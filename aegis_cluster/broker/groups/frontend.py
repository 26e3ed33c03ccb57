"""Requests about consumer groups, as they reach a shard.

    beat, leave, commit, offsets, describe, list, delete: first field: the group's name; the group's
    partition of `__groups` follows from it by murmur2, and the leader of that answers.

Every answer about a group's state rests on a round of read index or on a committed frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.coordinators import Coordinators, is_current, read
from aegis_cluster.broker.groups.commands import CommitOffsets, PendOffsets, places_to_fields
from aegis_cluster.broker.groups.coordinator import Beat
from aegis_cluster.broker.groups.group_coordinator import GroupCoordinator
from aegis_cluster.broker.groups.group_stm import GroupFold
from aegis_cluster.broker.groups.membership import Seen
from aegis_cluster.errors import GroupNotFound, NotLeader, NotReady, PeerViolation, TopicNotFound
from aegis_cluster.ids import (
    GROUPS_TOPIC,
    GroupId,
    ProducerId,
    RecordOffset,
    TopicPartition,
)
from aegis_cluster.limits import (
    GROUP_COMMIT_POSITIONS_MAX,
    GROUP_NAME_CHARS_MAX,
    GROUP_TOPICS_MAX,
    SESSION_TIMEOUT_MS_MAX,
    SESSION_TIMEOUT_MS_MIN,
    TOPIC_NAME_CHARS_MAX,
)
from aegis_cluster.wire.protocol import (
    Api,
    is_none,
    take_bool,
    take_int,
    take_list,
    take_map,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.groups.group_table import Group
    from aegis_cluster.broker.groups.positions import Committed
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard

NO_POSITION: Final = -1
"""The group has none in this partition: it starts where the member says."""
FROM_BEGINNING: Final = -2
"""None, and the partition came after the group had begun to follow its topic."""
GROUP_APIS: Final = frozenset(
    {
        Api.GROUP_BEAT,
        Api.GROUP_LEAVE,
        Api.GROUP_COMMIT,
        Api.GROUP_OFFSETS,
        Api.GROUP_DESCRIBE,
        Api.GROUP_LIST,
        Api.GROUP_DELETE,
    }
)


class GroupFrontend:
    """One per shard."""

    def __init__(self, shard: Shard, wall_ms: Callable[[], int]) -> None:
        self._shard = shard
        self._wall_ms = wall_ms
        self._coordinators = Coordinators(shard, GROUPS_TOPIC, self._make)
        self._topics: dict[str, int] = {}

    # ---- inputs

    def handle(
        self, api: Api, fields: Sequence[Any], exchange: Exchange, *, origin: object, ms_left: int
    ) -> None:
        """One request. Raises its refusal, `PeerViolation`, or answers through `exchange`."""
        if api is Api.GROUP_LIST:
            self._list(fields, exchange)
            return
        group = take_str(fields, 0, "group", chars_max=GROUP_NAME_CHARS_MAX)
        coordinator = self._coordinators.of(group)
        match api:
            case Api.GROUP_BEAT:
                beat = _beat_from(group, fields)
                coordinator.beat(
                    exchange, beat, origin=origin, wait_ms=ms_left // 2, now_ms=self._shard.now_ms
                )
            case Api.GROUP_LEAVE:
                name, session = take_str(fields, 1, "member"), take_str(fields, 2, "session")
                coordinator.leave(exchange, group, name, session)
            case Api.GROUP_COMMIT:
                self._commit(coordinator, group, fields, exchange)
            case Api.GROUP_OFFSETS:
                self._offsets(coordinator, group, fields, exchange)
            case Api.GROUP_DESCRIBE:
                self._describe(coordinator, group, exchange)
            case Api.GROUP_DELETE:
                coordinator.delete(exchange, group)
            case _:
                raise PeerViolation(f"Api {api.name} is not about groups.")

    def tick(self) -> None:
        """Begin and end coordinators with the leaderships here, and let their sessions age."""
        self._coordinators.tick()

    def metadata_changed(self) -> None:
        """Topics may have come, gone or grown."""
        topics = {
            name: len(info.partitions)
            for name, info in self._shard.table.topics.items()
            if not name.startswith("__")
        }
        if topics == self._topics:
            return
        self._topics = topics
        for coordinator in self._coordinators:
            if is_current(coordinator):
                coordinator.topics_are(topics)

    def client_gone(self, origin: object) -> None:
        """A client's connection has closed."""
        for coordinator in self._coordinators:
            coordinator.client_gone(origin, self._shard.now_ms)

    def _make(self, partition: Partition) -> GroupCoordinator:
        fold = partition.state.fold
        if not isinstance(fold, GroupFold):
            raise NotLeader(f"{partition.name} holds no groups.")
        made = GroupCoordinator(partition, fold, wall_ms=self._wall_ms, now_ms=self._shard.now_ms)
        made.topics_are(self._topics)
        return made

    # ---- positions

    def _commit(
        self, coordinator: GroupCoordinator, group: str, fields: Sequence[Any], exchange: Exchange
    ) -> None:
        """[group, member or "", session, epoch, number, [[topic, partition, offset], ...]] -> []

        With [..., producer id, its epoch]: as a part of that producer's transaction.
        """
        rows = take_list(fields, 5, "positions", items_max=GROUP_COMMIT_POSITIONS_MAX)
        positions = tuple(self._position(row) for row in rows)
        session, number = take_str(fields, 2, "session"), take_int(fields, 4, "number")
        command: CommitOffsets | PendOffsets = CommitOffsets(group, session, number, positions)
        if len(fields) > 6:
            producer = ProducerId(take_int(fields, 6, "producer_id"))
            producer_epoch = take_int(fields, 7, "producer_epoch", high=2**15 - 1)
            command = PendOffsets(group, session, number, producer, producer_epoch, positions)
        coordinator.commit(
            exchange,
            command,
            name=take_str(fields, 1, "member"),
            epoch=take_int(fields, 3, "epoch"),
        )

    def _position(self, row: Any) -> tuple[TopicPartition, GroupId, RecordOffset]:
        values = row if isinstance(row, list) else []
        place = _place_from(values)
        return place, self._log_of(place), RecordOffset(take_int(values, 2, "offset"))

    def _log_of(self, place: TopicPartition) -> GroupId:
        """The Raft group of a partition. Raises `TopicNotFound`."""
        info = self._shard.table.topics.get(place.topic)
        if info is None or place.partition >= len(info.partitions):
            raise TopicNotFound(f"There is no partition {place}.", topic=place.topic)
        return info.partitions[place.partition].group

    def _offsets(
        self, coordinator: GroupCoordinator, group: str, fields: Sequence[Any], exchange: Exchange
    ) -> None:
        """[group, [[topic, partition], ...] or None] -> [[[topic, partition, offset, time], ...]]

        None: of all partitions that the group has a position in. Offsets: see `NO_POSITION`. With
        [..., True]: not while a transaction may still move one of them (KIP-447); `NotReady` then.
        """
        stable = len(fields) > 2 and take_bool(fields, 2, "stable")
        asked = None
        if not is_none(fields, 1, "places"):
            asked = [
                _place_from(row if isinstance(row, list) else [])
                for row in take_list(fields, 1, "places")
            ]

        def answer() -> None:
            table = coordinator.fold.table
            unsettled = table.pending_places(group) if stable and table.pending else frozenset()
            if asked is not None and unsettled.intersection(asked):
                exchange.refuse(
                    NotReady(
                        f"A transaction may still move group {group} in"
                        f" {min(unsettled.intersection(asked))}; it ends by its time-out at last."
                    )
                )
                return
            exchange.reply([self._positions(coordinator.fold, group, asked)])

        read(coordinator.partition, exchange, answer)

    def _positions(
        self, fold: GroupFold, group: str, asked: list[TopicPartition] | None
    ) -> list[list[Any]]:
        committed = fold.table.positions(group)
        found = fold.table.groups.get(group)
        places = sorted(committed) if asked is None else asked
        rows: list[list[Any]] = [
            [*place, *self._position_in(committed, found, place)] for place in places
        ]
        return rows if asked is not None else [row for row in rows if row[2] >= 0]

    def _position_in(
        self,
        committed: Mapping[TopicPartition, Committed],
        group: Group | None,
        place: TopicPartition,
    ) -> tuple[int, int]:
        known = committed.get(place)
        if known is not None and not self._is_gone(known.log):
            return known.offset, known.time_ms
        if group is not None and group.is_later(place):
            return FROM_BEGINNING, 0
        return NO_POSITION, 0

    def _is_gone(self, log: GroupId) -> bool:
        """The log's topic was deleted. A log that this node has never heard of is none of those:
        its metadata may lag."""
        table = self._shard.table
        return log < table.next_group and table.partition_of(log) is None

    # ---- looking

    def _describe(self, coordinator: GroupCoordinator, group: str, exchange: Exchange) -> None:
        """[group] -> [epoch, settled, coordinator's node, [member, ...]]; see `_member_fields`."""

        def answer() -> None:
            found = coordinator.fold.table.groups.get(group)
            if found is None:
                exchange.refuse(GroupNotFound(f"There is no group {group!r}.", group=group))
                return
            members = [self._member_fields(coordinator, found, name) for name in found.members]
            node = self._shard.context.me.node
            exchange.reply([found.epoch, found.is_settled, node, sorted(members)])

        read(coordinator.partition, exchange, answer)

    def _member_fields(self, coordinator: GroupCoordinator, group: Group, name: str) -> list[Any]:
        """[name, client, static, epoch, topics, assigned, revoking, target, ms left, connected]"""
        member = group.members[name]
        session = coordinator.session_of(group.name, name)
        left_ms = 0 if session is None else max(0, session.deadline_ms - self._shard.now_ms)
        return [
            name,
            member.client,
            member.static,
            member.epoch,
            list(member.topics),
            places_to_fields(member.assigned),
            places_to_fields(member.revoking),
            places_to_fields(group.target.get(name, frozenset())),
            left_ms,
            session is not None and session.connected,
        ]

    def _list(self, fields: Sequence[Any], exchange: Exchange) -> None:
        """[partition of `__groups`] -> [[[name, members, settled], ...]]"""
        coordinator = self._coordinators.at(take_int(fields, 0, "partition"))

        def answer() -> None:
            groups = sorted(coordinator.fold.table.groups.items())
            exchange.reply([[[name, len(one.members), one.is_settled] for name, one in groups]])

        read(coordinator.partition, exchange, answer)


def _place_from(values: Sequence[Any]) -> TopicPartition:
    topic = take_str(values, 0, "topic", chars_max=TOPIC_NAME_CHARS_MAX)
    return TopicPartition(topic, take_int(values, 1, "partition"))


def _beat_from(group: str, fields: Sequence[Any]) -> Beat:
    """[group, member, session, static, topics, session time-out in ms, client, version, owned]"""
    topics = take_list(fields, 4, "topics", items_max=GROUP_TOPICS_MAX)
    owned = take_map(fields, 8, "owned")
    places = frozenset(
        TopicPartition(topic, take_int(numbers, place, "partition"))
        for topic, numbers in owned.items()
        if isinstance(numbers, list)
        for place in range(len(numbers))
    )
    return Beat(
        group=group,
        name=take_str(fields, 1, "member", chars_max=GROUP_NAME_CHARS_MAX),
        session=take_str(fields, 2, "session", chars_max=GROUP_NAME_CHARS_MAX),
        static=take_bool(fields, 3, "static"),
        topics=tuple(sorted({take_str(topics, place, "topic") for place in range(len(topics))})),
        session_timeout_ms=take_int(
            fields,
            5,
            "session_timeout_ms",
            low=SESSION_TIMEOUT_MS_MIN,
            high=SESSION_TIMEOUT_MS_MAX,
        ),
        client=take_str(fields, 6, "client", chars_max=GROUP_NAME_CHARS_MAX),
        seen=Seen(take_int(fields, 7, "version"), places),
    )
