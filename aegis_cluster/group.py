"""A consumer group seen from outside: who is in it, how far it has come, and moving it.

Positions can be moved only while nobody is in the group: a member would go on from its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster import arguments
from aegis_cluster.client import coordinator
from aegis_cluster.client.moments import offsets_at
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import GroupNotEmpty, Misuse, OffsetOutOfRange
from aegis_cluster.ids import NodeId, TopicPartition
from aegis_cluster.message import Offset

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aegis_cluster.client.offsets import FoundOffsets
    from aegis_cluster.engine import StreamingEngine


@dataclass(frozen=True, slots=True)
class MemberDescription:
    """One member. static: its name outlives its process. revoking: what it is giving up.

    silent_until_ms: it counts as dead unless it is heard within so many milliseconds.
    """

    member_id: str
    client: str
    static: bool
    epoch: int
    topics: tuple[str, ...]
    assigned: tuple[TopicPartition, ...]
    revoking: tuple[TopicPartition, ...]
    target: tuple[TopicPartition, ...]
    silent_until_ms: int
    connected: bool


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """state: `"empty"`, `"stable"` or `"rebalancing"`; coordinator: name of its node."""

    name: str
    state: str
    epoch: int
    coordinator: str
    members: tuple[MemberDescription, ...]
    positions: Mapping[TopicPartition, int]


@dataclass(frozen=True, slots=True)
class GroupListing:
    """One line of `engine.list_groups()`."""

    name: str
    state: str
    members: int


class ConsumerGroup:
    """Made by `engine.group(name)`; nothing is asked until a call is made."""

    def __init__(self, engine: StreamingEngine, name: str) -> None:
        self._engine = engine
        self.name = name

    async def describe(self, *, timeout: float | None = None) -> GroupDescription:
        """Members, their partitions and the committed positions, as of now (read index).

        Raises `GroupNotFound`, `RequestTimeout`.
        """
        cluster, deadline = self._engine.cluster, self._engine.deadline(timeout)
        state = await coordinator.describe_group(cluster, self.name, deadline)
        found = await coordinator.positions_of(cluster, self.name, None, deadline)
        node = cluster.metadata.nodes.get(NodeId(state.coordinator))
        return GroupDescription(
            self.name,
            _state(len(state.members), settled=state.settled),
            state.epoch,
            node.name if node else f"node {state.coordinator}",
            tuple(_member(one) for one in state.members),
            {place: one.offset for place, one in sorted(found.items())},
        )

    async def positions(self, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """The next offset to be read of each partition that the group has a position in.

        Raises `GroupNotFound`, `RequestTimeout`.
        """
        return dict((await self.describe(timeout=timeout)).positions)

    async def lag(self, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """How many offsets each of these partitions has beyond the group's position, as of now.

        Raises `GroupNotFound`, `RequestTimeout`.
        """
        cluster, deadline = self._engine.cluster, self._engine.deadline(timeout)
        positions = await self.positions(timeout=timeout)
        lag = {}
        for topic in sorted({place.topic for place in positions}):
            for number, offsets in (await list_offsets(cluster, topic, deadline)).items():
                place = TopicPartition(topic, number)
                if place in positions:
                    lag[place] = max(0, offsets.high_watermark - positions[place])
        return lag

    async def reset(
        self,
        to: Offset,
        topics: str | Sequence[str] | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[TopicPartition, int]:
        """Move the group's positions while it has no members; returns the new ones.

        to: EARLIEST, LATEST, `Offset.at(n)` or `Offset.at_time(t)`, in every partition. topics:
        None: all that the group has positions in. Raises `GroupNotFound`, `GroupNotEmpty`,
        `TopicNotFound`, `OffsetOutOfRange` for an offset that a partition does not hold; nothing
        is changed then.
        """
        hint = "give Offset.EARLIEST, Offset.LATEST, Offset.at(n) or Offset.at_time(t)"
        arguments.instance(to, Offset, "to", hint)
        if topics is not None and not isinstance(topics, str):
            hint = "give a topic's name or a list of names"
            topics = [arguments.name(one) for one in arguments.many(topics, "topics", hint)]
        cluster, deadline = self._engine.cluster, self._engine.deadline(timeout)
        found = await self.describe(timeout=timeout)
        if found.members:
            raise GroupNotEmpty(
                f"Group {self.name} has {len(found.members)} members, and only those may move its"
                " positions. Stop them first.",
                group=self.name,
                members=len(found.members),
            )
        names = [topics] if isinstance(topics, str) else topics
        wanted = sorted({place.topic for place in found.positions} if names is None else set(names))
        if not wanted:
            raise Misuse(f"Group {self.name} has no positions yet; name the topics to set some.")
        positions: dict[TopicPartition, int] = {}
        for topic in wanted:
            ends = await offsets_at(cluster, topic, deadline, time_ms=to.time_ms)
            for number, offsets in ends.items():
                place = TopicPartition(topic, number)
                positions[place] = resolved(to, place, offsets)
        await coordinator.commit_positions(cluster, self.name, positions, deadline)
        return positions

    async def delete(self, *, timeout: float | None = None) -> None:
        """Forget the group and its positions. Raises `GroupNotFound`, `GroupNotEmpty`."""
        deadline = self._engine.deadline(timeout)
        await coordinator.delete_group(self._engine.cluster, self.name, deadline)


async def list_groups(engine: StreamingEngine, deadline: float) -> list[GroupListing]:
    """All groups, by name."""
    return [
        GroupListing(one.name, _state(one.members, settled=one.settled), one.members)
        for one in await coordinator.list_groups(engine.cluster, deadline)
    ]


def _state(members: int, *, settled: bool) -> str:
    if not members:
        return "empty"
    return "stable" if settled else "rebalancing"


def resolved(to: Offset, place: TopicPartition, offsets: FoundOffsets) -> int:
    """The offset that this means in a partition. Raises `OffsetOutOfRange`."""
    at = to.resolve(
        log_start=offsets.log_start,
        high_watermark=offsets.last_stable_offset,
        at_time=offsets.at_time,
    )
    if offsets.log_start <= at <= offsets.high_watermark:
        return at
    raise OffsetOutOfRange(
        f"{place} holds offsets {offsets.log_start} to {offsets.high_watermark}, so nothing can"
        f" go on from {at}.",
        have=at,
        log_start=offsets.log_start,
        high_watermark=offsets.high_watermark,
    )


def _member(one: coordinator.MemberState) -> MemberDescription:
    return MemberDescription(
        member_id=one.name,
        client=one.client,
        static=one.static,
        epoch=one.epoch,
        topics=one.topics,
        assigned=tuple(sorted(one.assigned)),
        revoking=tuple(sorted(one.revoking)),
        target=tuple(sorted(one.target)),
        silent_until_ms=one.ms_left,
        connected=one.connected,
    )
