"""A subscriber's part in a consumer group: what it may read, and how far it has come.

The idea: the coordinator says what this member should hold. What is to go is given up first (no
more of it is handed out, handlers finish, the position is committed) and only then reported; what
comes is read from the group's position on. Nothing else stops meanwhile.

The rules it protects: only positions of handled messages are committed; nothing is read that was
given up; a member that its group has lost forgets everything and joins anew.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from aegis_cluster.client.coordinator import (
    FROM_BEGINNING,
    commit_positions,
    positions_of,
)
from aegis_cluster.client.group_session import Assigned, GroupSession
from aegis_cluster.client.moments import offsets_at
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import (
    AegisError,
    MemberFenced,
    Misuse,
    NotReady,
    OffsetOutOfRange,
    OutcomeUnknown,
    RequestTimeout,
)
from aegis_cluster.handled import Handled
from aegis_cluster.message import Offset

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    from aegis_cluster.client.background import Background
    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.group_session import MemberConfig, News
    from aegis_cluster.ids import TopicPartition

    Callback = Callable[[list[TopicPartition]], Awaitable[None]]

COMMIT_EVERY_S: Final = 0.2
"""Positions that have moved are committed so often in the background."""
IDLE_S: Final = 1.0
"""A reader that waits for messages and has some unhandled for so long will not handle them."""
RETRY_S: Final = 0.1
PENDING_S: Final = 1.0
"""Positions that a transaction may still move are waited for so long at a time; meanwhile the
coordinator may have said something new."""


class Reading(Protocol):
    """What the subscriber does on its membership's word."""

    def begin(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions too, each from its position on."""

    def stop(self, places: Iterable[TopicPartition]) -> None:
        """Hand out nothing more of these, and forget what was fetched."""

    @property
    def is_waiting(self) -> bool:
        """The program waits for a message at the moment."""


class Membership:
    """Belongs to one event loop."""

    def __init__(
        self,
        *,
        cluster: ClusterClient,
        background: Background,
        config: MemberConfig,
        start: Offset,
        keeps_positions: bool,
        in_transactions: bool = False,
        timeout: float,
        reading: Reading,
        on_assigned: Callback,
        on_revoked: Callback,
    ) -> None:
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._cluster = cluster
        self._config = config
        self._start = start
        self._keeps_positions = keeps_positions
        self._commits = keeps_positions and not in_transactions
        """Positions are committed here, and not by transactions."""
        self._in_transactions = in_transactions
        self._lost_in_hand: set[TopicPartition] = set()
        """Went to others while messages of them were in hand: no transaction may commit those."""
        self._in_hand: dict[TopicPartition, Handled] = {}
        """What a transaction's positions were taken from, to be found still there at its commit."""
        self._timeout = timeout
        self._reading = reading
        self._session = GroupSession(background, config, self._hear)
        self._news: Assigned | None = None
        self._heard = asyncio.Event()
        self._joined = asyncio.Event()
        self._progress = asyncio.Event()
        self._dirty = asyncio.Event()
        self._fenced = False
        self._failure: AegisError | None = None
        self._handled: dict[TopicPartition, Handled] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._sought: dict[TopicPartition, int] = {}
        """Where the program has sought to, and nothing has shown yet that it is there."""
        self._commit_number = 0
        self._committing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    # ---- for the subscriber

    @property
    def member_id(self) -> str:
        """By which its group knows it."""
        return self._config.name

    async def join(self, deadline: float) -> None:
        """Be a member. Raises `MemberInUse`, `Throttled`, `RequestTimeout`."""
        self._session.join()
        self._spawn(self._follow())
        if self._commits:
            self._spawn(self._commit_now_and_then())
        try:
            async with asyncio.timeout_at(deadline):
                await self._joined.wait()
        except TimeoutError:
            raise RequestTimeout(
                f"The coordinator of group {self._config.group} did not answer in time."
            ) from None
        self.check()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that broke down must not leave the reader waiting for ever."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._failure = self._failure or Misuse(f"The membership broke down: {error!r}.")
        self._joined.set()
        self._progress.set()
        self._reading.stop(sorted(self._handled))

    def check(self) -> None:
        """Raise what ended the membership for good."""
        if self._failure is not None:
            raise self._failure

    @property
    def places(self) -> frozenset[TopicPartition]:
        return frozenset(self._handled)

    def handed_out(self, place: TopicPartition, offset: int) -> None:
        handled = self._handled.get(place)
        if handled is not None and self._keeps_positions:
            handled.handed_out(offset)

    def passed(self, place: TopicPartition, offset: int) -> None:
        """A message that a filter left out."""
        handled = self._handled.get(place)
        if handled is not None and self._keeps_positions:
            handled.passed(offset)

    def handled(self, place: TopicPartition, offset: int) -> None:
        handled = self._handled.get(place)
        if handled is not None:
            handled.handled(offset)
            self._moved()

    def all_handled(self) -> None:
        """The program asks for the next message: it is done with those before."""
        for handled in self._handled.values():
            handled.all_handled()
        self._moved()

    def moved_to(self, place: TopicPartition, offset: int) -> None:
        """The program has sought elsewhere: from there a successor would go on too."""
        if place in self._handled:
            self._handled[place].restart(offset)
            self._sought[place] = offset
            self._moved()

    async def commit(
        self,
        deadline: float,
        ahead: Mapping[TopicPartition, int] | None = None,
        *,
        asked: bool = True,
    ) -> None:
        """Commit how far handlers have come, and positions that are `ahead` of that.

        asked: by the program; else a position beyond the end is left out. Raises `MemberFenced`,
        `OffsetOutOfRange`, `RequestTimeout`, `OutcomeUnknown`.
        """
        async with self._committing:
            wanted = {p: h.position for p, h in self._handled.items()} | dict(ahead or {})
            positions = {p: o for p, o in wanted.items() if self._committed.get(p) != o}
            beyond = await self._beyond_the_end(positions, deadline)
            if beyond and asked:
                raise _out_of_range(*beyond.popitem())
            positions = {p: o for p, o in positions.items() if p not in beyond}
            if positions:
                self._commit_number += 1
                await self._commit(positions, self._commit_number, deadline)
                self._committed.update(positions)

    async def _beyond_the_end(
        self, positions: Mapping[TopicPartition, int], deadline: float
    ) -> dict[TopicPartition, tuple[int, int]]:
        """Of positions that were sought: those behind all that is there, with where that ends."""
        sought = {p for p, offset in positions.items() if self._sought.get(p) == offset}
        found = {}
        for topic in sorted({place.topic for place in sought}):
            ends = await list_offsets(self._cluster, topic, deadline)
            for place in (place for place in sought if place.topic == topic):
                end = ends[place.partition].high_watermark
                if positions[place] <= end:
                    del self._sought[place]
                else:
                    found[place] = (positions[place], end)
        return found

    async def claim(self, place: TopicPartition, upto: int, deadline: float) -> None:
        """Commit a position before the messages below it are handed out (at most once).

        Raises as `commit` does.
        """
        await self.commit(deadline, {place: upto})
        if place in self._handled:
            self._handled[place].restart(upto)

    async def close(self) -> None:
        """Give everything up, commit, leave, and end; raises what `on_revoked` does, at the end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._on_revoked(sorted(self._handled))
        finally:
            await self._commit_and_leave()

    async def _commit_and_leave(self) -> None:
        if self._commits and self._news is not None:
            with suppress(AegisError):
                await self.commit(self._cluster.now() + self._timeout, asked=False)
        self._handled.clear()
        await self._session.leave()

    # ---- news of the coordinator

    def _hear(self, news: News) -> None:
        if isinstance(news, Assigned):
            self._news = news
        elif isinstance(news, MemberFenced):
            self._fenced = True
        else:
            self._failure = news
            self._joined.set()
            self._reading.stop(())
        self._heard.set()

    def _lost(self, session: str) -> None:
        """The group has gone on without this process: nothing more is handed out until it is a
        member again."""
        if self._news is not None and self._news.session == session:
            self._reading.stop(sorted(self._handled))
            self._fenced = True
            self._heard.set()

    async def _follow(self) -> None:
        """Bring what is read to what should be, again and again."""
        while self._failure is None:
            await self._heard.wait()
            self._heard.clear()
            try:
                if self._fenced:
                    await self._join_anew()
                elif self._news is not None:
                    await self._reconcile(self._news)
                    self._joined.set()
            except AegisError:
                # The cluster does not answer at the moment; the same again, soon. Where a dead
                # member's transaction has to end first, a program may go on to end it itself.
                if self._in_transactions:
                    self._joined.set()
                await asyncio.sleep(RETRY_S)
                self._heard.set()

    async def _join_anew(self) -> None:
        lost = sorted(self._handled)
        self._reading.stop(lost)
        self._note_lost(lost)
        self._handled.clear()
        self._committed.clear()
        self._news, self._fenced = None, False
        await self._on_revoked(lost)
        self._session.join()

    async def _reconcile(self, news: Assigned) -> None:
        gone, new = self.places - news.places, news.places - self.places
        # What is about to be read counts as read: else it could be given to another meanwhile.
        self._session.reads(self.places | new, news.version)
        if gone:
            await self._give_up(gone)
            self._session.reads(self.places | new, news.version)
        if new:
            await self._take(new)

    async def _give_up(self, gone: frozenset[TopicPartition]) -> None:
        self._reading.stop(gone)
        await self._until_handled(gone)
        await self._on_revoked(sorted(gone))
        self._note_lost(gone)
        if self._commits:
            with suppress(MemberFenced, OutcomeUnknown, RequestTimeout):
                # What is not committed is read again by whoever is next.
                await self.commit(self._cluster.now() + self._timeout)
        for place in gone:
            self._handled.pop(place, None)
            self._committed.pop(place, None)

    async def _until_handled(self, places: frozenset[TopicPartition]) -> None:
        """Wait for handlers that are at work, as long as they are."""
        while any(not self._handled[place].is_idle for place in places if place in self._handled):
            self._progress.clear()
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._progress.wait()
            except TimeoutError:
                if self._reading.is_waiting:
                    return

    async def _take(self, new: frozenset[TopicPartition]) -> None:
        deadline = self._cluster.now() + self._timeout
        group = self._config.group
        patience = self._cluster.now() + PENDING_S if self._in_transactions else deadline
        until = min(deadline, patience)
        await self._look_up(new, deadline)
        found = await positions_of(self._cluster, group, new, until, stable=True)
        positions = {place: one.offset for place, one in found.items() if one.offset >= 0}
        committed = dict(positions)
        later = {place for place, one in found.items() if one.offset == FROM_BEGINNING}
        positions |= await self._starts_of(set(new) - set(positions) - later, self._start, deadline)
        positions |= await self._starts_of(later, Offset.EARLIEST, deadline)
        for place, offset in positions.items():
            self._handled[place] = Handled(offset)
        # A start that depends on the moment is kept, or a restart would skip what came since.
        self._committed |= committed
        if self._in_transactions:
            await self._commit_starts({p: o for p, o in positions.items() if p not in committed})
        self._moved()
        await self._on_assigned(sorted(new))
        self._reading.begin({place: self._handled[place].position for place in positions})

    async def _look_up(self, places: Iterable[TopicPartition], deadline: float) -> None:
        """Where partitions are, also those that have just been made. Raises `NotReady` when the
        node that was asked does not know of them yet."""
        for place in places:
            info = await self._cluster.topic(place.topic, deadline)
            if place.partition >= len(info.partitions):
                await self._cluster.refresh([place.topic], deadline)
                info = await self._cluster.topic(place.topic, deadline)
            if place.partition >= len(info.partitions):
                raise NotReady(f"{place} is not known here yet.")

    async def _starts_of(
        self, places: set[TopicPartition], start: Offset, deadline: float
    ) -> dict[TopicPartition, int]:
        """What `start` means in partitions that the group has no position in."""
        found = {}
        for topic in sorted({place.topic for place in places}):
            ends = await offsets_at(self._cluster, topic, deadline, time_ms=start.time_ms)
            for place in (place for place in places if place.topic == topic):
                one = ends[place.partition]
                found[place] = start.resolve(
                    log_start=one.log_start,
                    # A transaction that is open is read whole or not at all.
                    high_watermark=one.last_stable_offset,
                    at_time=one.at_time,
                )
        return found

    # ---- in transactions

    def moved_since_commit(
        self, positions: Mapping[TopicPartition, int], *, unmoved: bool = False
    ) -> dict[TopicPartition, int]:
        """Of these positions those that are not committed, or all; and those of partitions that
        are being given up, and are not read any more, of which messages are in hand. Raises
        `MemberFenced`."""
        if self._lost_in_hand:
            place = min(self._lost_in_hand)
            raise MemberFenced(
                f"Group {self._config.group} has given {place} to another member while messages of"
                " it were in hand here; whoever has it now handles them. Abort the transaction.",
                partition=str(place),
            )
        leaving = {
            place: handled.end
            for place, handled in self._handled.items()
            if place not in positions and not handled.is_idle
        }
        found = {
            place: offset
            for place, offset in (leaving | dict(positions)).items()
            if place in self._handled and (unmoved or self._committed.get(place) != offset)
        }
        self._in_hand = {place: self._handled[place] for place in found}
        return found

    async def commit_within(
        self, producer: Sequence[int], positions: Mapping[TopicPartition, int], deadline: float
    ) -> None:
        """As a part of the transaction of this producer id and epoch. Raises as `commit` does, and
        `ProducerFenced`."""
        async with self._committing:
            beyond = await self._beyond_the_end(positions, deadline)
            if beyond:
                raise _out_of_range(*beyond.popitem())
            self._commit_number += 1
            held = {place: self._in_hand.get(place) for place in positions}
            await self._commit(positions, self._commit_number, deadline, producer, held)

    def committed_within(self, positions: Mapping[TopicPartition, int]) -> None:
        """The transaction that these were a part of is committed."""
        for place, offset in positions.items():
            if place in self._handled:
                self._committed[place] = offset
                self._handled[place].all_before(offset)
        self._progress.set()

    async def go_back(self, deadline: float) -> dict[TopicPartition, int]:
        """Where to go on in every partition after a transaction that was not committed, for all we
        know: the group's positions, once they are settled. Raises `RequestTimeout`, ….
        """
        group, places = self._config.group, self.places
        found = await positions_of(self._cluster, group, places, deadline, stable=True)
        back = {p: found[p].offset for p in self.places & places if found[p].offset >= 0}
        for place, offset in back.items():
            self._handled[place] = Handled(offset)
            self._committed[place] = offset
        self._lost_in_hand.clear()
        self._progress.set()
        return back

    def _note_lost(self, places: Iterable[TopicPartition]) -> None:
        if self._in_transactions:
            self._lost_in_hand |= {
                p for p in places if p in self._handled and not self._handled[p].is_idle
            }

    async def _commit_starts(self, positions: Mapping[TopicPartition, int]) -> None:
        """Where a group begins is kept at once: it is no message that anybody has handled."""
        if positions and self._keeps_positions:
            async with self._committing:
                self._commit_number += 1
                deadline = self._cluster.now() + self._timeout
                await self._commit(positions, self._commit_number, deadline)
                self._committed.update(positions)

    # ---- committing

    def _moved(self) -> None:
        self._dirty.set()
        self._progress.set()

    async def _commit_now_and_then(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(COMMIT_EVERY_S)
            self._dirty.clear()
            try:
                await self.commit(self._cluster.now() + self._timeout, asked=False)
            except MemberFenced:
                continue  # the heartbeat hears of it too, and begins anew
            except AegisError:
                self._dirty.set()

    async def _commit(
        self,
        positions: Mapping[TopicPartition, int],
        number: int,
        deadline: float,
        producer: Sequence[int] = (),
        held: Mapping[TopicPartition, Handled | None] | None = None,
    ) -> None:
        """held: what the positions were taken from; None: from what is held now.

        A partition may be lost and come back while a commit waits, and somebody else may have
        handled messages of it meanwhile: its position of before would take the group back.
        """
        if held is None:
            held = {place: self._handled.get(place) for place in positions}
        while True:
            for place, handled in held.items():
                if self._handled.get(place) is not handled:
                    raise MemberFenced(
                        f"Group {self._config.group} has taken {place} from this member, whether or"
                        " not it has come back since; what was not committed is handed out again.",
                        partition=str(place),
                    )
            news = self._news
            if news is None:
                raise MemberFenced(f"This member is not in group {self._config.group} any more.")
            try:
                await commit_positions(
                    self._cluster,
                    self._config.group,
                    positions,
                    deadline,
                    member=self._config.name,
                    session=news.session,
                    epoch=news.epoch,
                    number=number,
                    producer=producer,
                )
            except MemberFenced as error:
                if "partition" in error.details:
                    raise  # a member still, that has committed what it no longer holds
                if not error.details.get("stale"):
                    self._lost(news.session)
                    raise
                if self._cluster.now() >= deadline:
                    raise
                await self._newer_than(news, deadline)
            else:
                return

    async def _newer_than(self, news: Assigned, deadline: float) -> None:
        """The coordinator has moved us on, and its word is on the way."""
        while self._news is news and self._cluster.now() < deadline:
            self._progress.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(deadline, self._cluster.now() + RETRY_S)):
                    await self._progress.wait()


def _out_of_range(place: TopicPartition, found: tuple[int, int]) -> OffsetOutOfRange:
    offset, end = found
    return OffsetOutOfRange(
        f"{place} ends at {end}, so a group cannot have come to {offset} in it; nothing was"
        " committed. Seek to what is there.",
        have=offset,
        high_watermark=end,
    )
