"""Writes a change feed: each frame to the leader of its partition, until it is certainly there.

The idea: the feed's leader refuses a position that it has (`broker.feed_stm`), so whatever was not
answered is simply sent again, over any number of leaders: a refusal as stale then says that it is
there. One frame of a partition is under way at a time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.cluster import ClusterClient, Pause
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    OutcomeUnknown,
    RequestTimeout,
    StalePosition,
    TopicNotFound,
    Unavailable,
)
from aegis_cluster.wire.protocol import Api, take_bytes, take_int, take_str

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.protocol import Reply

CONNECT_S: Final = 0.5
ASK_S: Final = 5.0
"""How long a leader may take before it is looked for anew; a repeat is harmless."""


class FeedPosition(NamedTuple):
    """How far one partition has come: two numbers of the source's own, compared in order, and what
    the source wanted to find again."""

    epoch: int
    writer: str
    position: tuple[int, int]
    mark: bytes


class FeedLog:
    """One feed, from the side of its connector; belongs to one event loop."""

    def __init__(self, cluster: ClusterClient, info: TopicInfo) -> None:
        self.info = info
        self._cluster = cluster
        self._epoch = 0
        self._writer = ""

    async def read(self, deadline: float) -> list[FeedPosition]:
        """Where every partition stands, as of now. Raises `RequestTimeout`, `TopicNotFound`."""
        numbers = range(len(self.info.partitions))
        asked = (self._ask(number, Api.FEED_READ, [], (), deadline) for number in numbers)
        return [_point(reply) for reply in await asyncio.gather(*asked)]

    async def fence(self, epoch: int, writer: str, deadline: float) -> list[FeedPosition]:
        """Take every partition over: nothing that an older holder still has under way comes in any
        more. Gives back where they stand. Raises `FeedFenced`, `RequestTimeout`,
        `OutcomeUnknown`."""
        self._epoch, self._writer = epoch, writer
        numbers = range(len(self.info.partitions))
        holder = [epoch, writer]
        asked = (self._ask(number, Api.FEED_FENCE, holder, (), deadline) for number in numbers)
        return [_point(reply) for reply in await asyncio.gather(*asked)]

    async def append(
        self,
        partition: int,
        position: tuple[int, int],
        batch: bytes | None,
        deadline: float,
        *,
        mark: bytes | None = None,
    ) -> None:
        """Have a batch in one partition, and with it the position; batch: None moves that alone.

        Raises `FeedFenced` (another connector has taken over), `MessageTooLarge`, `TopicNotFound`,
        `RequestTimeout`, `OutcomeUnknown`.
        """
        fields = [self._epoch, self._writer, *position, mark]
        parts = () if batch is None else (batch,)
        try:
            await self._ask(partition, Api.FEED_APPEND, fields, parts, deadline)
        except StalePosition:
            return  # only we write, and positions rise: it was an earlier try of this very frame

    async def _ask(
        self,
        number: int,
        api: Api,
        fields: Sequence[Any],
        parts: Sequence[bytes],
        deadline: float,
    ) -> Reply:
        cluster, pause = self._cluster, Pause(deadline)
        group = self.info.partitions[number].group
        failure: AegisError = Unavailable("No leader is known.")
        unanswered = False
        while True:
            address = cluster.metadata.address_of(self.info, number)
            try:
                if address is None:
                    raise Unavailable("The cluster's nodes are not known yet.")
                link = cluster.link(address.endpoint)
                await link.ready(min(deadline, cluster.now() + CONNECT_S))
                until = min(deadline, cluster.now() + ASK_S)
                return await link.request(api, [group, *fields], parts, deadline=until)
            except NotLeader as error:
                cluster.metadata.note_leader(group, error.details.get("leader"))
                failure = error
            except AegisError as error:
                if not error.retriable and not isinstance(error, OutcomeUnknown):
                    raise
                unanswered = unanswered or isinstance(error, OutcomeUnknown)
                failure = error
                cluster.metadata.forget_leader(group)
            if cluster.now() >= deadline:
                break
            await pause.wait()
            await self._look_again(deadline)
        if unanswered:
            raise OutcomeUnknown(f"The feed's leader did not answer in time: {failure}")
        raise RequestTimeout(f"No leader of the feed could be reached in time: {failure}")

    async def _look_again(self, deadline: float) -> None:
        """Who leads by now; nobody may know for a moment. Raises `TopicNotFound`."""
        cluster, name = self._cluster, self.info.name
        try:
            await cluster.refresh([name], min(deadline, cluster.now() + CONNECT_S))
        except Unavailable:
            return
        found = cluster.metadata.topics.get(name)
        if found is None or found.partitions[0].group != self.info.partitions[0].group:
            raise TopicNotFound(f"The feed {name!r} was deleted.", topic=name)


def _point(reply: Reply) -> FeedPosition:
    fields = reply.fields
    return FeedPosition(
        take_int(fields, 0, "epoch"),
        take_str(fields, 1, "writer"),
        (take_int(fields, 2, "major"), take_int(fields, 3, "minor")),
        take_bytes(fields, 4, "mark"),
    )
