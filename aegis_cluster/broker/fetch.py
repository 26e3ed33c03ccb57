"""The fetch request: whole stored frames below the high watermark, or a wait for them.

request fields:  [wait_ms, [[group, offset, bytes_max], ...], isolation]; see `Isolation`, which is
                 COMMITTED where it is left out
reply fields:    [[code, high_watermark, log_start, last_stable, aborted, aborted_to] or
                 [code, message, details], ...] and one raw part per entry, in the same order; empty
                 where there is nothing new

aborted: [[producer, first, last], ...], whose records a reader of committed ones leaves out. It is
complete up to offset `aborted_to`: what the part holds from there on has to be fetched again.

A fetch needs no quorum: what is committed stays committed. One question does: whether an offset
above our high watermark exists. A leader that others have replaced without its knowing would deny
what clients have read elsewhere, so it makes sure that it still leads before it says no. Hot frames
come from memory, the rest is read in a helper thread.

Nothing is read for a client whose earlier answers fill its share (`Clients.room`): its fetches
*starve* until some of these have left, or their time is over.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.produce import refusal
from aegis_cluster.errors import AegisError, Corruption, NotLeader, PeerViolation
from aegis_cluster.ids import GroupId, LogIndex, RecordOffset
from aegis_cluster.limits import (
    FETCH_BYTES_MAX,
    FETCH_WAIT_MS_MAX,
    FETCHES_PER_TURN,
    FRAME_BYTES_MAX,
    REQUEST_PARTS_MAX,
)
from aegis_cluster.wire.protocol import Isolation, Part, Request, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aegis_cluster.broker.clients import Client, Clients
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.transport import Transport
    from aegis_cluster.storage.types import ReadResult


CONFIRM_MS: Final = 1_000
"""A leader that may be one no longer has so long to find out, however short the client's wait."""


class FetchItem(NamedTuple):
    group: GroupId
    offset: RecordOffset
    bytes_max: int


@dataclass(slots=True, eq=False)
class FetchCall:
    """One request that waits; `reply` gets result fields and parts, once."""

    client: Client
    items: list[FetchItem]
    deadline_ms: int
    strict: bool
    reply: Callable[[list[list[Any]], list[Part]], None]
    committed: bool = True
    """Only what is committed, as far as transactions go."""
    done: bool = False
    number: int = 0
    asked: set[GroupId] = field(default_factory=set)
    """Partitions that make sure that they still lead before they deny the offset."""
    confirmed: set[GroupId] = field(default_factory=set)
    """Those that have."""


class _Confirmation:
    """Looks at a fetch again once its partition is known to have led after the fetch came."""

    def __init__(self, fetches: Fetches, call: FetchCall, group: GroupId) -> None:
        self._fetches = fetches
        self._call = call
        self._group = group

    def committed(self) -> None:
        self._call.confirmed.add(self._group)
        self._fetches.look_again(self._call)

    def lost(self, _: AegisError) -> None:
        self._fetches.look_again(self._call)


class _Found(NamedTuple):
    """What one partition has for one item; `read` must still be done when data is None."""

    fields: list[Any]
    data: bytes | None
    first: LogIndex = LogIndex(0)
    last: LogIndex = LogIndex(0)
    bytes_max: int = 0


def parse_isolation(request: Request) -> Isolation:
    """What the reader wants to see. Raises `PeerViolation`."""
    if len(request.fields) < 3:
        return Isolation.COMMITTED
    number = take_int(request.fields, 2, "isolation")
    try:
        return Isolation(number)
    except ValueError:
        raise PeerViolation("A fetch asks for unknown isolation.", have=number) from None


def parse(request: Request) -> tuple[int, list[FetchItem]]:
    """How long to wait, and for what. Raises `PeerViolation`."""
    wait_ms = min(take_int(request.fields, 0, "wait_ms"), FETCH_WAIT_MS_MAX, request.ms_left)
    items = []
    for item in take_list(request.fields, 1, "partitions", items_max=REQUEST_PARTS_MAX):
        if not isinstance(item, list):
            raise PeerViolation("A fetch names partitions as [group, offset, bytes_max].")
        group = GroupId(take_int(item, 0, "group"))
        offset = RecordOffset(take_int(item, 1, "offset"))
        bytes_max = take_int(item, 2, "bytes_max", high=FETCH_BYTES_MAX)
        items.append(FetchItem(group, offset, bytes_max))
    if not items:
        raise PeerViolation("A fetch must name at least one partition.")
    return wait_ms, items


class Fetches:
    """Fetches that wait for data, by the partitions that can wake them."""

    def __init__(
        self, partitions: Mapping[GroupId, Partition], clients: Clients, transport: Transport
    ) -> None:
        self._partitions = partitions
        self._clients = clients
        self._transport = transport
        self._starving: dict[Client, None] = {}
        self._woken: dict[int, FetchCall] = {}
        """By number; there is news for them."""
        self._by_group: defaultdict[GroupId, dict[int, FetchCall]] = defaultdict(dict)
        self._deadlines: list[tuple[int, int, FetchCall]] = []
        self._count = 0

    def start(self, call: FetchCall, now_ms: int) -> None:
        """Answer at once where something is known, else wait for it or for the deadline."""
        if self._try(call) or call.done:
            return
        if call.asked:
            call.deadline_ms = max(call.deadline_ms, now_ms + CONFIRM_MS)
        if call.deadline_ms <= now_ms:
            self._answer_empty(call)
            return
        self._count += 1
        call.number = self._count
        for item in call.items:
            self._by_group[item.group][call.number] = call
        heapq.heappush(self._deadlines, (call.deadline_ms, call.number, call))
        if self._clients.room(call.client) <= 0:
            self._starve(call)

    def wake(self, group: GroupId) -> None:
        """The partition has moved on, or has another role: look at its fetches again, soon."""
        waiting = self._by_group.get(group)
        if waiting:
            self._woken.update(waiting)

    def turn(self) -> None:
        """Look at fetches for which there is news; so many, so that heartbeats are not late."""
        for _ in range(min(len(self._woken), FETCHES_PER_TURN)):
            number = next(iter(self._woken))
            call = self._woken.pop(number)
            if number not in call.client.starved and (call.done or self._try(call)):
                self._forget(call)

    @property
    def has_more_to_do(self) -> bool:
        return bool(self._woken)

    def expire(self, now_ms: int) -> None:
        """Answer, empty-handed, the fetches whose time has come."""
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, _, call = heapq.heappop(self._deadlines)
            self._forget(call)
            if not call.done:
                self._answer_empty(call)

    def feed(self) -> None:
        """Some answers may have left: go on with the fetches that waited for that, in turn."""
        for client in list(self._starving):
            while client.starved and self._clients.room(client) > 0:
                call = client.starved.pop(next(iter(client.starved)))
                if call.done or self._try(call):
                    self._forget(call)
            if not client.starved:
                self._starving.pop(client, None)

    def _starve(self, call: FetchCall) -> None:
        call.client.starved[call.number] = call
        self._starving[call.client] = None

    def _forget(self, call: FetchCall) -> None:
        call.client.starved.pop(call.number, None)
        self._woken.pop(call.number, None)
        for item in call.items:
            waiting = self._by_group.get(item.group)
            if waiting is not None:
                waiting.pop(call.number, None)
                if not waiting:
                    del self._by_group[item.group]

    def _try(self, call: FetchCall) -> bool:
        """Answer the call if any of its partitions has data or an error, and its client room."""
        budget = min(FETCH_BYTES_MAX, self._clients.room(call.client))
        if budget <= 0:
            if call.number:
                self._starve(call)
            return False
        found: list[_Found] = []
        ready = False
        for item in call.items:
            answer = self._look(call, item, min(item.bytes_max, budget))
            ready |= answer.fields[0] != 0 or answer.data != b""
            budget -= len(answer.data) if answer.data is not None else item.bytes_max
            budget = max(budget, 0)
            found.append(answer)
        if ready:
            self._answer(call, found)
        return ready

    def look_again(self, call: FetchCall) -> None:
        """Something that this call alone waited for is known."""
        if not call.done:
            self._try(call)

    def _look(self, call: FetchCall, item: FetchItem, bytes_max: int) -> _Found:
        try:
            partition = self._partitions.get(item.group)
            if partition is None:
                raise NotLeader("This shard has no replica of the partition; ask for metadata.")
            if call.strict and not partition.serving:
                raise partition.unable()
            if not self._makes_sure(call, item, partition):
                partition.check_fetch(item.offset)
            return self._find(partition, item, bytes_max, committed=call.committed)
        except AegisError as error:
            return _Found(refusal(error), b"")

    def _find(
        self, partition: Partition, item: FetchItem, bytes_max: int, *, committed: bool
    ) -> _Found:
        end = partition.readable_end(committed=committed)
        fields: list[Any] = [0, partition.high_watermark, partition.log_start_offset, end]
        if item.offset >= end or bytes_max == 0:
            return _Found([*fields, [], end], b"")
        if committed:
            fields += partition.state.producers.aborted_from(item.offset, end)
        last = partition.applied
        try:
            first = partition.log.index_of_offset(item.offset)
            if end < partition.high_watermark:
                last = LogIndex(partition.log.index_of_offset(end) - 1)
        except Corruption as error:
            raise _damaged(partition, error) from error
        hot = partition.log.read_cached(first, last, bytes_max)
        return _Found(fields, hot.data if hot else None, first, last, bytes_max)

    def _makes_sure(self, call: FetchCall, item: FetchItem, partition: Partition) -> bool:
        """Whether a leader has to find out if it still leads before it denies an offset."""
        is_beyond = item.offset > partition.high_watermark
        if not call.strict or not is_beyond or item.group in call.confirmed:
            return False
        if item.group not in call.asked:
            call.asked.add(item.group)
            partition.wait_for_read(_Confirmation(self, call, item.group))
        return True

    def _answer(self, call: FetchCall, found: list[_Found]) -> None:
        call.done = True
        cold = [slot for slot, answer in enumerate(found) if answer.data is None]
        if not cold:
            call.reply([f.fields for f in found], [f.data or b"" for f in found])
            return
        partitions = {slot: self._partitions[call.items[slot].group] for slot in cold}
        logs = {slot: partition.log for slot, partition in partitions.items()}
        budget = sum(found[slot].bytes_max for slot in cold)
        # A read gives one frame at least, whatever its budget.
        size = max(budget, FRAME_BYTES_MAX)
        self._clients.set_aside(call.client, size)

        def read() -> dict[int, ReadResult | AegisError]:
            results: dict[int, ReadResult | AegisError] = {}
            left = budget
            for slot in cold:
                answer = found[slot]
                if left <= 0:
                    break  # a frame was larger than its part: the next fetch brings the others
                try:
                    room = min(answer.bytes_max, left)
                    result = logs[slot].read_range(answer.first, answer.last, room)
                except AegisError as error:
                    results[slot] = error
                else:
                    results[slot] = result
                    left -= len(result.data)
            return results

        def done(results: dict[int, ReadResult | AegisError]) -> None:
            self._clients.set_aside(call.client, -size)
            fields = [f.fields for f in found]
            parts: list[Part] = [f.data or b"" for f in found]
            for slot, result in results.items():
                if isinstance(result, Corruption):
                    fields[slot] = refusal(_damaged(partitions[slot], result))
                elif isinstance(result, AegisError):
                    fields[slot] = refusal(result)
                else:
                    parts[slot] = result.data
            call.reply(fields, parts)
            self.feed()

        self._transport.read_later(read, done)

    def _answer_empty(self, call: FetchCall) -> None:
        found = [self._look(call, item, 0) for item in call.items]
        call.done = True
        call.reply([f.fields for f in found], [b"" for _ in found])


def _damaged(partition: Partition, error: Corruption) -> AegisError:
    """What a reader hears of damage: another replica will lead soon, unless there is none."""
    partition.damage_met(error)
    return error if partition.is_alone else partition.not_leader()
