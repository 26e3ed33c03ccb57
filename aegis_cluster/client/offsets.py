"""Offsets of a topic's partitions as of now, asked of each leader (read index).

The rule it protects: what is returned was true at some moment after the question was asked, so a
reader that goes up to the high watermark has seen every message acknowledged before.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.cluster import ClusterClient, Pause
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    OutcomeUnknown,
    PeerViolation,
    RequestTimeout,
)
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.protocol import Api, is_none, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.client.metadata import ShardAddress
    from aegis_cluster.ids import GroupId
    from aegis_cluster.wire.descriptions import TopicInfo

TRY_S: Final = 1.0
"""How long one leader may take before another replica is asked."""


class FoundOffsets(NamedTuple):
    """Of one partition; at_time: where the batch begins that holds the first message of the time
    asked for, the high watermark where there is none; None when no time was asked for."""

    log_start: int
    high_watermark: int
    last_stable_offset: int
    at_time: int | None


async def list_offsets(
    cluster: ClusterClient, topic: str, deadline: float, *, time_ms: int | None = None
) -> dict[int, FoundOffsets]:
    """By partition. Raises `TopicNotFound`, `RequestTimeout`."""
    info = await cluster.topic(topic, deadline)
    missing = set(range(len(info.partitions)))
    found: dict[int, FoundOffsets] = {}
    pause = Pause(deadline)
    while missing:
        for address, partitions in _by_leader(cluster, info, sorted(missing)).items():
            asked = _Question(info, partitions, time_ms)
            found.update(await _ask(cluster, address, asked, deadline))
        missing -= set(found)
        if missing:
            if cluster.now() >= deadline:
                raise RequestTimeout(
                    f"Partitions {sorted(missing)} of {topic} have no leader that answers."
                )
            await pause.wait()
            await cluster.refresh([topic], deadline)
            info = cluster.metadata.topic(topic)
    return dict(sorted(found.items()))


class _Question(NamedTuple):
    info: TopicInfo
    partitions: list[int]
    time_ms: int | None

    @property
    def groups(self) -> list[GroupId]:
        return [self.info.partitions[partition].group for partition in self.partitions]


def _by_leader(
    cluster: ClusterClient, info: TopicInfo, partitions: Iterable[int]
) -> dict[ShardAddress, list[int]]:
    by_leader: dict[ShardAddress, list[int]] = defaultdict(list)
    for partition in partitions:
        address = cluster.metadata.address_of(info, partition)
        if address is not None:
            by_leader[address].append(partition)
    return by_leader


async def _ask(
    cluster: ClusterClient, address: ShardAddress, asked: _Question, deadline: float
) -> dict[int, FoundOffsets]:
    """What one shard knows; partitions that it does not lead are left out."""
    until = min(deadline, cluster.now() + TRY_S)
    fields: list[Any] = [asked.groups]
    if asked.time_ms is not None:
        fields.append(asked.time_ms)
    try:
        link = cluster.link(address.endpoint)
        await link.ready(until)
        reply = await link.request(Api.LIST_OFFSETS, fields, deadline=until)
    except AegisError as error:
        if not error.retriable and not isinstance(error, OutcomeUnknown):
            raise
        for group in asked.groups:
            cluster.metadata.forget_leader(group)
        return {}
    found = {}
    try:
        results = take_list(reply.fields, 0, "results")
        for slot, partition in enumerate(asked.partitions):
            answer = _take(cluster, asked, slot, take_list(results, slot, "result"))
            if answer is not None:
                found[partition] = answer
    except PeerViolation:
        return {}  # as good as no answer
    return found


def _take(
    cluster: ClusterClient, asked: _Question, slot: int, result: Sequence[Any]
) -> FoundOffsets | None:
    """One partition's answer, None when another replica has to be asked."""
    code = take_int(result, 0, "code")
    if code == 0:
        start, end, stable = (take_int(result, n, "offset") for n in (1, 2, 3))
        at_time = None
        if asked.time_ms is not None:
            at_time = end if is_none(result, 4, "at_time") else take_int(result, 4, "at_time")
        return FoundOffsets(start, end, stable, at_time)
    refusal = error_from_reply(code, result[1:])
    if not refusal.retriable:
        raise refusal
    if isinstance(refusal, NotLeader):
        cluster.metadata.note_leader(asked.groups[slot], refusal.details.get("leader"))
    return None
