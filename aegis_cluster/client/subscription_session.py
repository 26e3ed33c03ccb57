"""One consumer of a persistent subscription: what it reads ahead, polls for, and settles.

Three things go on beside each other: a *poll* is always under way at the coordinator and brings
messages; where the coordinator says so, the consumer is the *scout* of some partitions, reads them
and reports which messages there are; and acknowledgements leave together, whatever has gathered
while the last ones were under way. Used from one event loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.lease_reader import LeaseReader
from aegis_cluster.client.subscription_calls import pack_keys
from aegis_cluster.errors import (
    AegisError,
    LockLost,
    OffsetOutOfRange,
    OutcomeUnknown,
    SubscriptionNotFound,
)
from aegis_cluster.ids import GroupId, TopicPartition
from aegis_cluster.limits import SUBSCRIPTION_IN_FLIGHT_MAX, SUBSCRIPTION_REPORT_OFFSETS_MAX
from aegis_cluster.wire.protocol import Api, take_bool, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from aegis_cluster.client.subscription_calls import Opened, SubscriptionCalls
    from aegis_cluster.wire.protocol import Reply
    from aegis_cluster.wire.records import Record, RecordColumns

POLL_S: Final = 3.0
"""A poll may take so long; the coordinator keeps it for half of it."""
PATIENCE_S: Final = 60.0
"""A call in the background that nobody answers for so long ends the session."""
ROOM_S: Final = 0.05
BEAT_S: Final = 1.0
"""A consumer that holds all it may says so often that it lives."""
SHOW_SHARE: Final = 0.5
"""Of `ack_timeout`: what waited here for so long is given back, and not shown with little time
left."""
LEAVE_S: Final = 2.0


class Lease(NamedTuple):
    """One message for this consumer. count: of its hand-outs, this one included."""

    log: GroupId
    offset: int
    count: int  # type: ignore[assignment] # hides tuple.count


class Burial(NamedTuple):
    """A message to be written to the dead letter topic."""

    lease: Lease
    record: Record | None


@dataclass(slots=True, eq=False)
class _Wanted:
    """Messages that are to be settled in one way, and who waits for it."""

    kind: str
    leases: Sequence[Lease]
    delay_ms: int
    reason: str
    counted: bool
    """They are among those that the consumer holds; dead letters to be written are not."""
    deadline: float
    future: asyncio.Future[None]


class SubscriptionSession:
    """`start`, then `next`, until `close`. bury: writes dead letters; see `client.burials`."""

    def __init__(
        self,
        calls: SubscriptionCalls,
        opened: Opened,
        *,
        max_in_flight: int,
        skip_lost: bool,
        make: Callable[[int, Lease, Record], Any],
        bury: Callable[[SubscriptionSession, list[Burial]], Coroutine[Any, Any, None]],
    ) -> None:
        """make: a message from partition, lease and record."""
        self.calls = calls
        self.opened = opened
        self.name = uuid.uuid4().hex
        self.reader = LeaseReader(calls.cluster, calls.topic)
        self.client = f"{socket.gethostname()}:{os.getpid()}"[:255]
        self._max_in_flight = max_in_flight
        self._skip_lost = skip_lost
        self._make = make
        self._bury = bury
        self._loop = asyncio.get_running_loop()
        self._ready: deque[tuple[float, Lease, Any]] = deque()
        """Messages to hand out, each with the time after which it is not shown any more."""
        self._holds = 0
        """Messages that are ready here or were handed out and are not settled."""
        self._wanted: deque[_Wanted] = deque()
        self._under_way: list[_Wanted] = []
        """Those that the request under way is about."""
        self._sweep_at: asyncio.TimerHandle | None = None
        """When the next deadline of all these is looked at: one timer for any number."""
        self._settles = 0
        self._scouting: tuple[int, ...] = ()
        self._failure: AegisError | None = None
        self._closed = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._to_settle = asyncio.Event()
        self._duties = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        for work in (self._poll(), self._scout(), self._settle()):
            self._spawn(work)

    # ---- for callers

    async def next(self, count: int, deadline: float | None) -> list[Any]:
        """Up to so many messages, none when the deadline passes first, or after `close`.

        Raises what ended the session: `SubscriptionNotFound`, `TopicNotFound`,
        `OffsetOutOfRange`, `Corruption`.
        """
        while True:
            found = self._take(count)
            if found or self._closed:
                return found
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return []

    def settle(
        self,
        kind: str,
        leases: Sequence[Lease],
        deadline: float,
        *,
        delay_ms: int = 0,
        reason: str = "",
        counted: bool = True,
    ) -> asyncio.Future[None]:
        """The future ends when it is durable; with `LockLost` when any of them is no longer ours
        to settle (the others are settled), with `OutcomeUnknown` when nobody answers in time."""
        future: asyncio.Future[None] = self._loop.create_future()
        future.add_done_callback(_seen)
        if self._failure is not None or self._closed:
            future.set_exception(self._failure or _closed())
            return future
        self._wanted.append(_Wanted(kind, leases, delay_ms, reason, counted, deadline, future))
        if self._sweep_at is None or deadline < self._sweep_at.when():
            self._sweep_next(deadline)
        self._to_settle.set()
        return future

    def settle_soon(
        self, kind: str, leases: Sequence[Lease], *, reason: str = "", counted: bool = True
    ) -> None:
        """As `settle`, for what nobody waits for."""
        deadline = self._loop.time() + PATIENCE_S
        self.settle(kind, leases, deadline, reason=reason, counted=counted)

    async def close(self) -> None:
        """Give back what was not handed out, and say goodbye."""
        if self._closed:
            return
        if self._failure is None:
            await self._say_goodbye()
        self._closed = True
        self._news.set()
        if self._sweep_at is not None:
            self._sweep_at.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._give_up(_closed())

    async def _say_goodbye(self) -> None:
        left = [lease for _, lease, _ in self._ready]
        self._ready.clear()
        deadline = self._loop.time() + LEAVE_S
        if left:
            self.settle_soon("release", left)
        self._closed = True
        self._news.set()
        pending = [wanted.future for wanted in (*self._under_way, *self._wanted)]
        if pending:
            await asyncio.wait(pending, timeout=LEAVE_S)
        try:
            fields = [self.opened.token, self.name]
            await self.calls.ask(Api.SUBSCRIPTION_LEAVE, fields, deadline)
        except AegisError:
            return  # a coordinator that does not hear it notices the closed connection

    # ---- handing out

    def _take(self, count: int) -> list[Any]:
        now = self._loop.time()
        found: list[Any] = []
        stale: list[Lease] = []
        while self._ready and len(found) < count:
            show_until, lease, message = self._ready.popleft()
            if show_until < now:
                stale.append(lease)
            else:
                found.append(message)
        if stale:
            self.settle_soon("release", stale)
        return found

    def _settled(self, count: int) -> None:
        self._holds -= count
        self._room.set()

    # ---- polling

    async def _poll(self) -> None:
        number = 0
        while True:
            await self._until_room()
            number += 1
            want = max(0, min(self._max_in_flight - self._holds, SUBSCRIPTION_IN_FLIGHT_MAX))
            fields = [
                self.opened.token,
                self.name,
                self.client,
                number,
                want,
                list(self._scouting),
            ]
            deadline = self._loop.time() + PATIENCE_S
            reply = await self.calls.ask(Api.SUBSCRIPTION_POLL, fields, deadline, ask_s=POLL_S)
            await self._take_reply(reply, self._loop.time())

    async def _until_room(self) -> None:
        """Do not ask for a little while much is held: many small polls would cost more."""
        least = max(1, self._max_in_flight // 4)
        try:
            async with asyncio.timeout(BEAT_S):
                while self._max_in_flight - self._holds < least:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            return

    async def _take_reply(self, reply: Reply, now: float) -> None:
        scouting = take_list(reply.fields, 0, "scouting")
        mine = tuple(take_int(scouting, slot, "partition") for slot in range(len(scouting)))
        if mine != self._scouting:
            self._scouting = mine
            self._duties.set()
        show_until = now + self.opened.rules.ack_timeout_ms / 1000 * SHOW_SHARE
        rows = take_list(reply.fields, 1, "leases")
        runs = [
            tuple(take_int(take_list(rows, slot, "run"), n, "number") for n in range(4))
            for slot in range(len(rows))
        ]
        self._holds += sum(end - first for _, first, end, _ in runs)
        for log, first, end, count in runs:
            await self._take_run(GroupId(log), first, end, count, show_until)
        burials = take_list(reply.fields, 2, "burials")
        if burials:
            leases = [
                Lease(*(take_int(take_list(burials, slot, "burial"), n, "n") for n in range(3)))  # type: ignore[arg-type]
                for slot in range(len(burials))
            ]
            self._spawn(self._read_and_bury(leases))

    async def _take_run(
        self, log: GroupId, first: int, end: int, count: int, show_until: float
    ) -> None:
        deadline = self._loop.time() + PATIENCE_S
        records = await self.reader.read(log, first, end, deadline)
        partition = self.partition_of(log)
        for record in records:
            lease = Lease(log, record.offset, count)
            self._ready.append((show_until, lease, self._make(partition, lease, record)))
        if len(records) != end - first:
            self._pass_over(log, first, end, count, records)
        self._news.set()

    def _pass_over(
        self, log: GroupId, first: int, end: int, count: int, records: Sequence[Record]
    ) -> None:
        """What retention or compaction has removed since it was reported is settled."""
        there = {record.offset for record in records}
        gone = [Lease(log, offset, count) for offset in range(first, end) if offset not in there]
        self.settle_soon("ack", gone)

    def partition_of(self, log: GroupId) -> int:
        """Its number in the topic; -1 when it is none of it any more."""
        info = self.calls.cluster.metadata.topics.get(self.calls.topic)
        placed = () if info is None else info.partitions
        return next((one.partition for one in placed if one.group == log), -1)

    async def _read_and_bury(self, leases: Sequence[Lease]) -> None:
        deadline = self._loop.time() + PATIENCE_S
        burials = []
        for lease in leases:
            found = await self.reader.read(lease.log, lease.offset, lease.offset + 1, deadline)
            burials.append(Burial(lease, found[0] if found else None))
        await self._bury(self, burials)

    # ---- reading ahead

    async def _scout(self) -> None:
        topic = self.calls.topic
        info = await self.calls.cluster.topic(topic, self._loop.time() + PATIENCE_S)
        logs: dict[int, GroupId] = {}
        reported: dict[int, int] = {}
        fetcher = Fetcher(self.calls.cluster, required=[topic])
        try:
            while True:
                wanted = set(self._scouting)
                for partition in set(reported) - wanted:
                    fetcher.remove_places([TopicPartition(topic, partition)])
                    del reported[partition]
                for partition in sorted(wanted - set(reported)):
                    if partition >= len(info.partitions):
                        await self.calls.cluster.refresh([topic], self._loop.time() + PATIENCE_S)
                        info = self.calls.cluster.metadata.topic(topic)
                    logs[partition] = info.partitions[partition].group
                    next_offset, _ = await self._report(logs[partition], 0, 0, [], b"")
                    fetcher.add(info, {partition: next_offset})
                    reported[partition] = next_offset
                if not reported:
                    self._duties.clear()
                    await self._duties.wait()
                    continue
                await self._scout_once(fetcher, logs, reported)
        finally:
            await fetcher.close()

    async def _scout_once(
        self, fetcher: Fetcher, logs: dict[int, GroupId], reported: dict[int, int]
    ) -> None:
        """Report what comes next in any of the partitions."""
        try:
            found = await fetcher.next_batches(self._loop.time() + BEAT_S)
        except OffsetOutOfRange as error:
            await self._skip(fetcher, logs, reported, error)
            return
        if found is None or found[0].partition not in reported:
            return
        place, batches = found
        log = logs[place.partition]
        self.reader.remember(log, batches)
        end = fetcher.positions[place]
        behind = await self._report_batches(log, reported[place.partition], end, batches)
        reported[place.partition] = behind
        if behind != end:
            fetcher.seek(place, behind)

    async def _skip(
        self,
        fetcher: Fetcher,
        logs: dict[int, GroupId],
        reported: dict[int, int],
        error: OffsetOutOfRange,
    ) -> None:
        """Retention was faster than the subscription: what is lost is passed over, or told."""
        log_start = error.details.get("log_start")
        place = next(
            (
                place
                for place, position in fetcher.positions.items()
                if position == error.details.get("have")
            ),
            None,
        )
        if not self._skip_lost or place is None or not isinstance(log_start, int):
            raise OffsetOutOfRange(
                f"{error} Messages that the subscription {self.calls.name} has not handled are no"
                " longer kept. Open it with lost='skip' to go on behind them.",
                **error.details,
            )
        log = logs[place.partition]
        behind, _ = await self._report(log, reported[place.partition], log_start, [], b"")
        reported[place.partition] = behind
        fetcher.seek(place, behind)

    async def _report_batches(
        self, log: GroupId, first: int, end: int, batches: Sequence[RecordColumns]
    ) -> int:
        """Report these, a part at a time; returns up to where the coordinator knows now."""
        offsets = [offset for batch in batches for offset in batch.offsets]
        keys = [key for batch in batches for key in batch.keys]
        start = 0
        while True:
            part = offsets[start : start + SUBSCRIPTION_REPORT_OFFSETS_MAX]
            is_last = start + len(part) >= len(offsets)
            stop = end if is_last else part[-1] + 1
            packed = pack_keys(keys[start : start + len(part)]) if self._keyed else None
            behind, room = await self._report(log, first, stop, _runs(part), packed)
            if behind != stop and (room or behind != first):
                return behind  # another scout was here, or keys are asked for by now
            if behind != stop:
                await asyncio.sleep(ROOM_S)
                continue
            if is_last:
                return behind
            start += len(part)
            first = behind

    @property
    def _keyed(self) -> bool:
        return self.opened.rules.keyed

    async def _report(
        self, log: GroupId, first: int, end: int, runs: list[list[int]], keys: bytes | None
    ) -> tuple[int, bool]:
        """Returns the offset to go on from, and whether there is room for more."""
        keys = keys if self._keyed else None
        fields = [self.opened.token, self.name, log, first, end, runs, keys]
        deadline = self._loop.time() + PATIENCE_S
        reply = await self.calls.ask(Api.SUBSCRIPTION_REPORT, fields, deadline)
        keyed = take_bool(reply.fields, 3, "keyed")
        if keyed != self._keyed:
            self.opened = await self.calls.look(deadline)
        return take_int(reply.fields, 0, "wanted"), take_bool(reply.fields, 2, "room")

    # ---- settling

    async def _settle(self) -> None:
        while True:
            await self._to_settle.wait()
            self._to_settle.clear()
            while self._wanted:
                await self._settle_some()

    async def _settle_some(self) -> None:
        """One request with all that has gathered, as far as it fits."""
        taken: list[_Wanted] = []
        size = 0
        while self._wanted and (
            not taken or size + len(self._wanted[0].leases) <= SUBSCRIPTION_IN_FLIGHT_MAX
        ):
            size += len(self._wanted[0].leases)
            taken.append(self._wanted.popleft())
        self._under_way = taken
        self._settles += 1
        fields = [self.opened.token, self.name, self._settles, _marks(taken)]
        try:
            deadline = self._loop.time() + PATIENCE_S
            reply = await self.calls.ask(Api.SUBSCRIPTION_SETTLE, fields, deadline)
            rows = take_list(reply.fields, 0, "refused")
            refused = {
                (log, offset)
                for log, first, end in (
                    tuple(take_int(take_list(rows, slot, "run"), n, "n") for n in range(3))
                    for slot in range(len(rows))
                )
                for offset in range(first, end)
            }
        except AegisError as error:
            self._settled(sum(_ends(wanted) for wanted in taken))
            for wanted in taken:
                if not wanted.future.done():
                    wanted.future.set_exception(error)
            if isinstance(error, SubscriptionNotFound):
                self._fail(error)
            return
        self._settled(sum(_ends(wanted) for wanted in taken))
        for wanted in taken:
            if wanted.future.done():
                continue
            lost = refused and [one for one in wanted.leases if one[:2] in refused]
            if lost:
                wanted.future.set_exception(_lock_lost(self.calls.topic, lost, wanted))
            else:
                wanted.future.set_result(None)

    def _sweep_next(self, when: float) -> None:
        if self._sweep_at is not None:
            self._sweep_at.cancel()
        self._sweep_at = self._loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        """End those whose deadline has passed."""
        self._sweep_at = None
        now = self._loop.time()
        waiting = [one for one in (*self._under_way, *self._wanted) if not one.future.done()]
        for wanted in waiting:
            if wanted.deadline <= now:
                wanted.future.set_exception(_unanswered())
        left = [one.deadline for one in waiting if one.deadline > now]
        if left:
            self._sweep_next(min(left))

    # ---- tasks

    def _fail(self, error: AegisError) -> None:
        self._failure = self._failure or error
        self._news.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that broke down must not leave the reader waiting for ever."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, AegisError):
            error = OutcomeUnknown(f"The subscription broke down: {error!r}.")
        self._fail(error)
        self._give_up(error)

    def _give_up(self, error: AegisError) -> None:
        """Nobody will settle any more what waits for it."""
        for wanted in (*self._under_way, *self._wanted):
            if not wanted.future.done():
                wanted.future.set_exception(error)
        self._wanted.clear()


def _ends(wanted: _Wanted) -> int:
    """How many messages this consumer holds no more, whatever the answer is."""
    return len(wanted.leases) if wanted.counted and wanted.kind != "extend" else 0


def _marks(taken: Iterable[_Wanted]) -> list[list[Any]]:
    """[kind, log, first, end, count, delay, reason], neighbours joined."""
    rows: list[list[Any]] = []
    for wanted in taken:
        for log, offset, count in wanted.leases:
            last = rows[-1] if rows else None
            if (
                last is not None
                and last[3] == offset
                and last[1] == log
                and last[4] == count
                and last[0] == wanted.kind
                and last[5] == wanted.delay_ms
                and last[6] == wanted.reason
            ):
                last[3] = offset + 1
            else:
                rows.append(
                    [wanted.kind, log, offset, offset + 1, count, wanted.delay_ms, wanted.reason]
                )
    return rows


def _runs(offsets: Sequence[int]) -> list[list[int]]:
    """Rising offsets as runs [first, end)."""
    if offsets and offsets[-1] - offsets[0] == len(offsets) - 1:
        return [[offsets[0], offsets[-1] + 1]]
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and runs[-1][1] == offset:
            runs[-1][1] = offset + 1
        else:
            runs.append([offset, offset + 1])
    return runs


def _lock_lost(topic: str, lost: Sequence[Lease], wanted: _Wanted) -> LockLost:
    first = lost[0]
    which = f"Offset {first.offset} of {topic}"
    if len(lost) > 1:
        which = f"{len(lost)} of {len(wanted.leases)} messages of {topic}, offset {first.offset}"
    return LockLost(
        f"{which} can no longer be settled here: the lock ran out (`ack_timeout`), or it was"
        " settled before. Nothing was changed by it; who is given the message next settles it.",
        offset=first.offset,
        delivery_count=first.count,
        lost=len(lost),
    )


def _unanswered() -> OutcomeUnknown:
    return OutcomeUnknown(
        "The subscription's coordinator did not answer in time; what was settled may count, and"
        " what does not is handed out again."
    )


def _closed() -> AegisError:
    return LockLost("The subscription is closed, and has given back what it held.")


def _seen(future: asyncio.Future[None]) -> None:
    """Who waits for it sees the exception; nobody else needs to."""
    if not future.cancelled():
        future.exception()
