"""What connectors ask of the leader of a change feed's partition.

    fence    [group, epoch, writer]                        -> point, once the fence is committed
    append   [group, epoch, writer, major, minor, mark or None] and one batch, or none to move the
             position alone                                -> [base_offset or -1, time_ms]
    read     [group]                                       -> point, as of now (read index)

    point:   [epoch, writer, major, minor, mark]

All rules are in `feed_stm`; a repeat of anything is recognised there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.produce import check_batch
from aegis_cluster.errors import AegisError, InvalidTopic, NotLeader
from aegis_cluster.ids import GroupId
from aegis_cluster.limits import FEED_MARK_BYTES_MAX
from aegis_cluster.wire.protocol import (
    IDENTITY_CHARS_MAX,
    Api,
    is_none,
    take_bytes,
    take_int,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aegis_cluster.broker.feed_stm import FeedDecision, FeedPoint
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.ids import LogIndex
    from aegis_cluster.wire.descriptions import TopicSettings
    from aegis_cluster.wire.protocol import Part, Request

FEED_APIS: Final = frozenset({Api.FEED_FENCE, Api.FEED_APPEND, Api.FEED_READ})
FEED_KIND: Final = "cdc"
NO_OFFSET: Final = -1


class Answer(NamedTuple):
    """The way back to the client; one of the two is called once."""

    reply: Callable[[Sequence[Any]], None]
    refuse: Callable[[AegisError], None]


class _Waiter:
    """Answers when an index is committed.

    own: this request appended the frame itself, so losing it leaves the outcome unknown.
    """

    def __init__(self, partition: Partition, *, own: bool, say: Callable[[], None], answer: Answer):
        self._partition = partition
        self._own = own
        self._say = say
        self._answer = answer

    def committed(self) -> None:
        self._say()

    def lost(self, error: AegisError) -> None:
        self._answer.refuse(error if self._own else self._partition.not_leader())


def handle(
    api: int,
    request: Request,
    answer: Answer,
    partitions: Mapping[GroupId, Partition],
    settings_of: Callable[[GroupId], TopicSettings],
) -> None:
    """Carry out one request. Raises a refusal, or `PeerViolation`."""
    group = GroupId(take_int(request.fields, 0, "group"))
    settings = settings_of(group)
    if settings.kind != FEED_KIND:
        raise InvalidTopic(
            f"A topic of kind {settings.kind!r} is no change feed; those are of kind 'cdc'."
        )
    partition = partitions.get(group)
    if partition is None:
        raise NotLeader("This shard has no replica of the partition; ask for metadata.")
    if not partition.serving:
        raise partition.unable()
    match api:
        case Api.FEED_FENCE:
            _fence(partition, request.fields, answer)
        case Api.FEED_APPEND:
            _append(partition, request.fields, request.parts, answer, settings.max_message_bytes)
        case _:
            partition.wait_for_read(_say_point(partition, answer, own=False))


def _fence(partition: Partition, fields: Sequence[Any], answer: Answer) -> None:
    epoch, writer = _holder(fields)
    feed = partition.state.feed
    decision = feed.decide_fence(epoch, writer)
    if decision.error is None and not decision.known:
        point = feed.fenced(epoch, writer)
        index = partition.append_position(point.encode())
        feed.appended(point, index)
        partition.wait_for(index, _say_point(partition, answer, own=True))
        return
    _settle(partition, decision, answer, lambda: answer.reply(_fields(feed.committed)))


def _append(
    partition: Partition,
    fields: Sequence[Any],
    parts: Sequence[Part],
    answer: Answer,
    max_message_bytes: int,
) -> None:
    epoch, writer = _holder(fields)
    position = (take_int(fields, 3, "major"), take_int(fields, 4, "minor"))
    mark = None
    if not is_none(fields, 5, "mark"):
        mark = take_bytes(fields, 5, "mark", bytes_max=FEED_MARK_BYTES_MAX)
    batch = bytes(parts[0]) if parts else None
    header = None if batch is None else check_batch(batch, max_message_bytes)
    feed = partition.state.feed
    decision = feed.decide(epoch, writer, position)
    if decision.error is not None:
        _settle(partition, decision, answer, lambda: None)
        return
    point = feed.moved(position, mark)
    if batch is None or header is None:
        index: LogIndex = partition.append_position(point.encode())
        result = [NO_OFFSET, partition.now()]
    else:
        placed = partition.append(batch, header, point.encode())
        index, result = placed.index, [placed.base_offset, placed.time_ms]
    feed.appended(point, index)
    say = lambda: answer.reply(result)  # noqa: E731 - one line says it
    partition.wait_for(index, _Waiter(partition, own=True, say=say, answer=answer))


def _holder(fields: Sequence[Any]) -> tuple[int, str]:
    return (
        take_int(fields, 1, "epoch"),
        take_str(fields, 2, "writer", chars_max=IDENTITY_CHARS_MAX),
    )


def _settle(
    partition: Partition, decision: FeedDecision, answer: Answer, known: Callable[[], None]
) -> None:
    """Say what was decided without a frame, once what it rests on is committed."""

    def say() -> None:
        if decision.error is not None:
            answer.refuse(decision.error)
        else:
            known()

    waiter = _Waiter(partition, own=False, say=say, answer=answer)
    partition.wait_for(decision.wait_for, waiter)


def _say_point(partition: Partition, answer: Answer, *, own: bool) -> _Waiter:
    feed = partition.state.feed
    say = lambda: answer.reply(_fields(feed.committed))  # noqa: E731 - one line says it
    return _Waiter(partition, own=own, say=say, answer=answer)


def _fields(point: FeedPoint) -> list[Any]:
    return [point.epoch, point.writer, *point.position, point.mark]
