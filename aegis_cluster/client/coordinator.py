"""Calls to a group's coordinator: whoever leads the group's partition of `__groups`.

The coordinators of the cluster's other own topics are called in the same way.

The idea: the coordinator is found like any partition's leader, and every call is harmless to repeat
(a heartbeat says what is, a commit carries a number), so what was not answered is asked again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.cluster import ClusterClient, Pause, index_of
from aegis_cluster.errors import (
    AegisError,
    InvalidTopic,
    NotLeader,
    OutcomeUnknown,
    RequestTimeout,
    Unavailable,
    UnsupportedVersion,
)
from aegis_cluster.ids import GROUPS_TOPIC, TopicPartition
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import (
    Api,
    Reply,
    take_bool,
    take_int,
    take_list,
    take_map,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aegis_cluster.wire.descriptions import TopicInfo

CONNECT_S: Final = 0.5
ASK_S: Final = 3.0
"""How long a coordinator may take over anything but a heartbeat."""
NO_POSITION: Final = -1
FROM_BEGINNING: Final = -2


class GroupPosition(NamedTuple):
    """offset: next to be read; see `NO_POSITION` and `FROM_BEGINNING`. time_ms: of its commit."""

    place: TopicPartition
    offset: int
    time_ms: int


class MemberState(NamedTuple):
    """One member as its coordinator has it. ms_left: of its session, unless it is heard before."""

    name: str
    client: str
    static: bool
    epoch: int
    topics: tuple[str, ...]
    assigned: frozenset[TopicPartition]
    revoking: frozenset[TopicPartition]
    target: frozenset[TopicPartition]
    ms_left: int
    connected: bool


class GroupState(NamedTuple):
    epoch: int
    settled: bool
    coordinator: int
    members: tuple[MemberState, ...]


class ListedGroup(NamedTuple):
    name: str
    members: int
    settled: bool


async def internal_topic(
    cluster: ClusterClient, deadline: float, name: str = GROUPS_TOPIC
) -> TopicInfo:
    """One of the cluster's own topics, made if it is not there. Raises `RequestTimeout`."""
    info = cluster.metadata.topics.get(name)
    if info is not None:
        return info
    reply, _ = await cluster.ask_controller(Api.INTERNAL_TOPIC, [name], deadline)
    await cluster.refresh([name], deadline, index_of(reply))
    return cluster.metadata.topic(name)


async def ask_coordinator(
    cluster: ClusterClient,
    group: str,
    api: Api,
    fields: Sequence[Any],
    deadline: float,
    *,
    ask_s: float = ASK_S,
) -> Reply:
    """Ask until somebody answers. Raises the coordinator's refusal; `RequestTimeout` when nothing
    was sent in time, `OutcomeUnknown` when something was."""
    place = await place_of_group(cluster, group, deadline)
    number = place.partition
    return await ask_partition(cluster, number, api, [group, *fields], deadline, ask_s=ask_s)


async def place_of_group(cluster: ClusterClient, group: str, deadline: float) -> TopicPartition:
    """The log that holds the group. Raises `RequestTimeout`."""
    info = await internal_topic(cluster, deadline)
    return TopicPartition(GROUPS_TOPIC, partition_for(group.encode(), len(info.partitions)))


async def ask_partition(
    cluster: ClusterClient,
    number: int,
    api: Api,
    fields: Sequence[Any],
    deadline: float,
    *,
    ask_s: float = ASK_S,
    topic: str = GROUPS_TOPIC,
) -> Reply:
    """Ask the leader of one partition of `__groups`, or of another of the cluster's own topics.
    Raises as `ask_coordinator` does."""
    pause = Pause(deadline)
    failure: AegisError = Unavailable("No coordinator is known.")
    unanswered = False
    while True:
        info = await internal_topic(cluster, deadline, topic)
        log = info.partitions[number].group
        address = cluster.metadata.address_of(info, number)
        try:
            if address is None:
                raise Unavailable("The cluster's nodes are not known yet.")
            link = cluster.link(address.control)
            await link.ready(min(deadline, cluster.now() + CONNECT_S))
            until = min(deadline, cluster.now() + ask_s)
            return await link.request(api, fields, deadline=until)
        except NotLeader as error:
            cluster.metadata.note_leader(log, error.details.get("leader"))
            failure = error
        except AegisError as error:
            if not error.retriable and not isinstance(error, OutcomeUnknown):
                raise
            unanswered = unanswered or isinstance(error, OutcomeUnknown)
            failure = error
            if not isinstance(error, Unavailable) or address is not None:
                cluster.metadata.forget_leader(log)
        if cluster.now() >= deadline:
            break
        await pause.wait()
        await _look_again(cluster, deadline, topic)
    if unanswered:
        raise OutcomeUnknown(f"The coordinator did not answer in time: {failure}")
    raise RequestTimeout(f"No coordinator could be reached in time: {failure}")


async def _look_again(cluster: ClusterClient, deadline: float, topic: str) -> None:
    """Who leads by now; nobody may know for a moment."""
    try:
        await cluster.refresh([topic], min(deadline, cluster.now() + CONNECT_S))
    except (Unavailable, InvalidTopic, UnsupportedVersion):
        return


async def positions_of(
    cluster: ClusterClient,
    group: str,
    places: Iterable[TopicPartition] | None,
    deadline: float,
    *,
    stable: bool = False,
) -> dict[TopicPartition, GroupPosition]:
    """Committed positions, of these partitions or of all that have one (read index).

    stable: wait for transactions that may still move one of them (KIP-447); whoever begins to read
    there has to.
    """
    asked = None if places is None else [list(place) for place in sorted(places)]
    fields = [asked, stable]
    reply = await ask_coordinator(cluster, group, Api.GROUP_OFFSETS, fields, deadline)
    rows = take_list(reply.fields, 0, "positions")
    found = {}
    for slot in range(len(rows)):
        row = take_list(rows, slot, "position")
        place = TopicPartition(take_str(row, 0, "topic"), take_int(row, 1, "partition"))
        offset = take_int(row, 2, "offset", low=FROM_BEGINNING)
        found[place] = GroupPosition(place, offset, take_int(row, 3, "time_ms"))
    return found


async def commit_positions(
    cluster: ClusterClient,
    group: str,
    positions: Mapping[TopicPartition, int],
    deadline: float,
    *,
    member: str = "",
    session: str = "",
    epoch: int = 0,
    number: int = 0,
    producer: Sequence[int] = (),
) -> None:
    """Set positions, as a member or, without a name, while the group has no members.

    producer: id and epoch of the one in whose transaction they are set; at once without.
    Raises `MemberFenced`, `ProducerFenced`, `GroupNotEmpty`, `TopicNotFound`, `RequestTimeout`,
    `OutcomeUnknown`.
    """
    rows = [[*place, offset] for place, offset in sorted(positions.items())]
    fields = [member, session, epoch, number, rows, *producer]
    await ask_coordinator(cluster, group, Api.GROUP_COMMIT, fields, deadline)


async def describe_group(cluster: ClusterClient, group: str, deadline: float) -> GroupState:
    """Raise `GroupNotFound`, `RequestTimeout`."""
    reply = await ask_coordinator(cluster, group, Api.GROUP_DESCRIBE, [], deadline)
    rows = take_list(reply.fields, 3, "members")
    return GroupState(
        take_int(reply.fields, 0, "epoch"),
        take_bool(reply.fields, 1, "settled"),
        take_int(reply.fields, 2, "coordinator"),
        tuple(_member_from(take_list(rows, slot, "member")) for slot in range(len(rows))),
    )


async def list_groups(cluster: ClusterClient, deadline: float) -> list[ListedGroup]:
    """All groups of the cluster, by name."""
    info = await internal_topic(cluster, deadline)
    found = []
    for number in range(len(info.partitions)):
        reply = await ask_partition(cluster, number, Api.GROUP_LIST, [number], deadline)
        rows = take_list(reply.fields, 0, "groups")
        for slot in range(len(rows)):
            row = take_list(rows, slot, "group")
            name, members = take_str(row, 0, "name"), take_int(row, 1, "members")
            found.append(ListedGroup(name, members, take_bool(row, 2, "settled")))
    return sorted(found)


async def delete_group(cluster: ClusterClient, group: str, deadline: float) -> None:
    """Raise `GroupNotFound`, `GroupNotEmpty`."""
    await ask_coordinator(cluster, group, Api.GROUP_DELETE, [], deadline)


def places_from(values: Mapping[str, Any]) -> frozenset[TopicPartition]:
    """Partition numbers by topic, as they come in replies. Raises `PeerViolation`."""
    return frozenset(
        TopicPartition(topic, take_int(numbers, slot, "partition"))
        for topic, numbers in values.items()
        if isinstance(numbers, list)
        for slot in range(len(numbers))
    )


def places_to(places: Iterable[TopicPartition]) -> dict[str, list[int]]:
    """Partition numbers by topic, in order."""
    by_topic: defaultdict[str, list[int]] = defaultdict(list)
    for topic, partition in sorted(places):
        by_topic[topic].append(partition)
    return dict(by_topic)


def _member_from(row: Sequence[Any]) -> MemberState:
    topics = take_list(row, 4, "topics")
    return MemberState(
        take_str(row, 0, "name"),
        take_str(row, 1, "client"),
        take_bool(row, 2, "static"),
        take_int(row, 3, "epoch"),
        tuple(take_str(topics, slot, "topic") for slot in range(len(topics))),
        places_from(take_map(row, 5, "assigned")),
        places_from(take_map(row, 6, "revoking")),
        places_from(take_map(row, 7, "target")),
        take_int(row, 8, "ms_left"),
        take_bool(row, 9, "connected"),
    )
