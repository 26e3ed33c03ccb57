"""The produce request: batches in, one answer for each of them once its index is committed.

request fields:  [[group, topic, partition], ...], and one batch per entry as a raw part; then
                 perhaps how much has to be known before the answer, see `Acks`, and the
                 transactional id whose transaction they belong to
reply fields:    [[code, base_offset, time_ms] or [code, message, details], ...] in the same order

The broker never decodes a record; it checks what it trusts (`check_client_batch`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError, InvalidTopic, MessageTooLarge, NotLeader, PeerViolation
from aegis_cluster.ids import GroupId, RecordOffset
from aegis_cluster.limits import (
    BATCH_BYTES_MAX,
    REQUEST_PARTS_MAX,
    TRANSACTIONAL_ID_CHARS_MAX,
)
from aegis_cluster.wire.batch import BATCH_HEADER_BYTES, BatchHeader, check_client_batch
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT
from aegis_cluster.wire.protocol import (
    Acks,
    Part,
    Request,
    is_none,
    take_int,
    take_list,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aegis_cluster.broker.partition import Partition

    Admit = Callable[[Partition, BatchHeader, Callable[[AegisError | None], None]], None]

RECORD_OVERHEAD_BYTES: Final = 4_096
"""What key, headers and framing of one record may add to the largest message."""


class ProduceCall:
    """One request; `reply` is called once, when every batch has its answer.

    size: bytes of it that are counted as in flight; `give_back` hears of all of them, in pieces.
    """

    def __init__(
        self,
        count: int,
        size: int,
        *,
        reply: Callable[[ProduceCall], None],
        give_back: Callable[[int], None],
    ) -> None:
        self.give_back = give_back
        self._size = size
        self.results: list[list[Any]] = [[] for _ in range(count)]
        self._open = count
        self._reply = reply

    def settle(self, slot: int, result: list[Any]) -> None:
        """Note one batch's answer."""
        self.results[slot] = result
        self._open -= 1
        if self._open == 0:
            self.give_back(self._size)
            self._reply(self)

    def hold(self, size: int) -> None:
        """Keep so many bytes counted beyond the answer, until `give_back` hears of them."""
        self._size -= size


class _Commit:
    """Waits for one index on behalf of one batch; says `error` instead of success if it has one.

    own: this request appended the frame itself, so losing it leaves the outcome unknown; a repeat
    or a refusal that rested on an uncommitted frame has appended nothing.
    """

    __slots__ = ("_call", "_not_leader", "_own", "_result", "_slot")

    def __init__(
        self,
        call: ProduceCall,
        slot: int,
        result: list[Any],
        *,
        own: bool,
        not_leader: Callable[[], NotLeader],
    ) -> None:
        self._call = call
        self._slot = slot
        self._result = result
        self._own = own
        self._not_leader = not_leader

    def committed(self) -> None:
        self._call.settle(self._slot, self._result)

    def lost(self, error: AegisError) -> None:
        self._call.settle(self._slot, refusal(error if self._own else self._not_leader()))


class _Hold:
    """Keeps a batch counted as in flight until it is committed or lost."""

    __slots__ = ("_call", "_size")

    def __init__(self, call: ProduceCall, size: int) -> None:
        call.hold(size)
        self._call = call
        self._size = size

    def committed(self) -> None:
        self._call.give_back(self._size)

    def lost(self, _: AegisError) -> None:
        self._call.give_back(self._size)


def accepted(offset: RecordOffset, time_ms: int) -> list[Any]:
    return [0, offset, time_ms]


def refusal(error: AegisError) -> list[Any]:
    code, fields = error_to_reply(error)
    return [int(code), *fields]


def parse(request: Request) -> list[tuple[GroupId, Part]]:
    """The groups and batches of a request. Raises `PeerViolation`."""
    items = take_list(request.fields, 0, "batches", items_max=REQUEST_PARTS_MAX)
    if len(items) != len(request.parts) or not items:
        raise PeerViolation("A produce request needs one raw part for each batch it names.")
    return [
        (GroupId(take_int(item if isinstance(item, list) else [], 0, "group")), part)
        for item, part in zip(items, request.parts, strict=True)
    ]


def parse_acks(request: Request) -> Acks:
    """What the client waits for; a majority where it does not say. Raises `PeerViolation`."""
    if len(request.fields) < 2:
        return Acks.QUORUM
    number = take_int(request.fields, 1, "acks")
    try:
        return Acks(number)
    except ValueError:
        raise PeerViolation("A produce request asks for unknown acks.", have=number) from None


def parse_transactional_id(request: Request) -> str | None:
    """Whose transaction the batches belong to, if any. Raises `PeerViolation`."""
    if len(request.fields) < 3 or is_none(request.fields, 2, "transactional_id"):
        return None
    return take_str(request.fields, 2, "transactional_id", chars_max=TRANSACTIONAL_ID_CHARS_MAX)


def produce(
    call: ProduceCall,
    batches: list[tuple[GroupId, Part]],
    partitions: Mapping[GroupId, Partition],
    max_message_bytes: Callable[[GroupId], int],
    acks: Acks = Acks.QUORUM,
    admit: Admit | None = None,
) -> None:
    """Give every batch to its partition, in order; answers come as they are known.

    admit: says when a batch of a transaction may be judged, or why not.
    """
    for slot, (group, part) in enumerate(batches):
        try:
            partition = partitions.get(group)
            if partition is None:
                raise NotLeader("This shard has no replica of the partition; ask for metadata.")
            if partition.is_internal:
                raise InvalidTopic(
                    f"{partition.name.topic} is the cluster's own; nobody else writes."
                )
            batch = bytes(part)
            header = check_batch(batch, max_message_bytes(group))
            if header.attributes & TRANSACTIONAL_BIT and admit is not None:
                go = partial(_place_later, call, slot, partition, batch, header, acks)
                admit(partition, header, go)
            else:
                _place(call, slot, partition, batch, header, acks)
        except PeerViolation:
            raise
        except AegisError as error:
            call.settle(slot, refusal(error))


def _place_later(
    call: ProduceCall,
    slot: int,
    partition: Partition,
    batch: bytes,
    header: BatchHeader,
    acks: Acks,
    error: AegisError | None,
) -> None:
    """error: why the batch is not wanted, from whoever was asked."""
    try:
        if error is not None:
            raise error
        _place(call, slot, partition, batch, header, acks)
    except AegisError as reason:
        call.settle(slot, refusal(reason))


def check_batch(batch: bytes, max_message_bytes: int) -> BatchHeader:
    """What must hold of a client's batch before it may enter a log."""
    if len(batch) > BATCH_BYTES_MAX:
        raise MessageTooLarge(
            f"A batch of {len(batch)} bytes is over the limit of {BATCH_BYTES_MAX}.",
            have=len(batch),
            at_most=BATCH_BYTES_MAX,
        )
    header = check_client_batch(batch)
    single = header.last_offset_delta == 0
    allowed = max_message_bytes + BATCH_HEADER_BYTES + RECORD_OVERHEAD_BYTES
    if single and len(batch) > allowed:
        raise MessageTooLarge(
            f"A message of about {len(batch)} bytes is over the topic's limit of"
            f" {max_message_bytes}.",
            have=len(batch),
            at_most=max_message_bytes,
        )
    return header


def _place(
    call: ProduceCall,
    slot: int,
    partition: Partition,
    batch: bytes,
    header: BatchHeader,
    acks: Acks,
) -> None:
    if not partition.serving:
        raise partition.unable()
    decision = partition.state.producers.decide(header)
    if decision.error is not None:
        result, index, own = refusal(decision.error), decision.wait_for, False
    elif decision.known is not None:
        known = decision.known
        result, index, own = accepted(known.offset, known.time_ms), decision.wait_for, False
    else:
        placed = partition.append(batch, header)
        result, index, own = accepted(placed.base_offset, placed.time_ms), placed.index, True
    waiter = _Commit(call, slot, result, own=own, not_leader=partition.not_leader)
    if own and acks is not Acks.QUORUM:
        # The answer comes before the commit, and the bytes stay here until then.
        partition.wait_for(index, _Hold(call, len(batch)))
    if own and acks is Acks.NONE:
        call.settle(slot, result)
    elif own and acks is Acks.LEADER:
        partition.wait_for_own_disk(index, waiter)
    else:
        partition.wait_for(index, waiter)
