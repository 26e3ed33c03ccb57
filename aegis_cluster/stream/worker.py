"""A worker: the tasks of one process, on the partitions that its consumer group gives it.

The idea: read a batch, let its task work on it, and now and then commit everything together:
results, state and positions. Between two commits nothing is visible outside.

What is read of a partition is processed by one worker at a time: a task begins when its state is
restored, and before its partition goes the worker commits.

The rule it protects: whatever ends a worker, its successor begins where the last commit was.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import (
    AegisError,
    Corruption,
    MemberFenced,
    Misuse,
    OutcomeUnknown,
    ProducerFenced,
    TransactionAborted,
)
from aegis_cluster.ids import TopicPartition
from aegis_cluster.limits import STREAM_CYCLE_RECORDS_MAX
from aegis_cluster.message import Offset, now_ms
from aegis_cluster.producer import ProducerConfig
from aegis_cluster.stream.changelog import restore
from aegis_cluster.stream.cycle import Cycle
from aegis_cluster.stream.errors import ProcessingFailed
from aegis_cluster.stream.idle import followed
from aegis_cluster.stream.progress import Board, Standing
from aegis_cluster.stream.questions import Answer, Desk
from aegis_cluster.stream.sqlite_store import SqliteStore
from aegis_cluster.stream.standby import copied_here
from aegis_cluster.stream.state import MemoryStore
from aegis_cluster.stream.task import Task
from aegis_cluster.subscribe_config import DeliveryMode, SubscribeConfig
from aegis_cluster.transaction import TransactionOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.producer import Producer
    from aegis_cluster.stream.changelog import Progress
    from aegis_cluster.stream.launch import Place
    from aegis_cluster.stream.layout import Layout
    from aegis_cluster.stream.questions import Question
    from aegis_cluster.stream.settings import ProcessorSettings
    from aegis_cluster.subscriber import MessageBatch, Subscriber

LOG = logging.getLogger(__name__)
POLL_S: Final = 0.1
TICK_S: Final = 0.25
BUSY_RECORDS: Final = 1_000
BUSY_INTERVALS: Final = 10
"""Of `commit_interval`, from one commit to the next, while so many records come in one."""
SESSION_TIMEOUT: Final = "10s"
"""A worker that is silent for so long has lost its partitions. Heartbeats leave from a thread of
their own, so a slow function is not silence."""
SESSION_TIMEOUT_EMBEDDED: Final = "2s"
"""A coordinator that died with the worker cannot know that the worker is gone, and waits so long
for it; elsewhere a connection that closes tells it at once."""
TRANSACTION_TIMEOUT: Final = "20s"
"""A transaction lasts as long as it takes to send; what a dead worker left open ends then."""
CHECKPOINT_S: Final = 10.0
RETRY_S: Final = 0.2
RETRY_S_MAX: Final = 5.0
RESTORE_S: Final = 600.0
"""How long joining may take, with the state of the first tasks restored; what was restored until
then is kept, and the next try goes on there."""
COPY_S: Final = 2.0
"""Between two looks at state that is copied."""
STALL_S: Final = 2.0
"""A loop that was not heard for so long knows nothing about who is idle."""


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """tasks: names of those in this process. processed, late, failed: records since they began
    here. watermarks: event time by task, milliseconds since 1970; tasks that know none are left
    out. commits: of this process."""

    tasks: tuple[str, ...]
    processed: int
    late: int
    failed: int
    commits: int
    watermarks: dict[str, int]


@dataclass(slots=True, eq=False)
class _Job:
    """A task and what belongs to it. heard: when its partition last had something, in the loop's
    time; None: it has been found idle."""

    task: Task
    store: SqliteStore | None
    heard: float | None


class Worker:
    """Belongs to one event loop."""

    def __init__(
        self,
        engine: StreamingEngine,
        application_id: str,
        layout: Layout,
        settings: ProcessorSettings,
        *,
        place: Place,
        dead_letter_topic: str,
        on_restore: Callable[[str, Progress], None] | None = None,
    ) -> None:
        self.restoring: dict[str, Progress] = {}
        self._engine = engine
        self._group = application_id
        self._layout = layout
        self._settings = settings
        self._place = place
        self._dead_topic = dead_letter_topic
        self._on_restore = on_restore
        self._jobs: dict[TopicPartition, _Job] = {}
        self._board = Board(engine, layout.topology.progress_topic, place.identity)
        self._desk = Desk(engine, layout.topology.questions_topic, place.identity, self._answer)
        self._copies: set[str] = set()
        self._files = asyncio.Lock()
        """Held while state is restored: a task may come here while its state is being copied."""
        self._cycle = self._new_cycle()
        self._changed: set[TopicPartition] = set()
        self._lock = asyncio.Lock()
        """Held while tasks work or commit: partitions come and go in between."""
        self._subscriber: Subscriber | None = None
        self._producer: Producer | None = None
        self._started = asyncio.Event()
        self._stopping = False
        self._paused = False
        self._broken: AegisError | None = None
        """What went wrong while a partition left: what was done since the last commit is void."""
        self._commits = 0
        self._checkpoint_at = 0.0
        self._commit_at = 0.0
        self._last_loop = 0.0
        self._failure: BaseException | None = None
        self._main: asyncio.Task[None] | None = None

    # ---- for `Running`

    async def start(self) -> None:
        """Be in the group. Raises what ended it before."""
        self._main = asyncio.get_running_loop().create_task(self._run())
        started = asyncio.ensure_future(self._started.wait())
        await asyncio.wait({self._main, started}, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Commit, leave, end. Raises what it had ended at."""
        self._stopping = True
        await self.wait()

    async def wait(self) -> None:
        """Until the end. Raises what it ended at."""
        if self._main is not None:
            await asyncio.shield(self._main)
        if self._failure is not None:
            raise self._failure

    async def pause(self) -> None:
        """Commit, and read nothing more."""
        async with self._lock:
            self._paused = True
            if self._subscriber is not None:
                self._subscriber.pause()
            await self._commit()

    def resume(self) -> None:
        """Read on."""
        self._paused = False
        if self._subscriber is not None:
            self._subscriber.resume()

    async def ask(self, question: Question, timeout_s: float | None) -> list[Any]:
        """What the tasks of all processes have, an entry for each process. Raises
        `RequestTimeout`."""
        tasks = [_name(place) for place in self._layout.stateful_tasks]
        limit = self._engine.request_timeout if timeout_s is None else timeout_s
        return await self._desk.ask(question, tasks, limit)

    def _answer(self, question: Question) -> Answer:
        found: dict[str, Any] = {}
        for job in self._jobs.values():
            if question.kind == "key":
                (key,) = question.arguments
                found |= job.task.query(key, question.step)
                continue
            low, high = question.arguments
            for step, rows in job.task.range(low, high, question.step).items():
                found.setdefault(step, []).extend([key, value] for key, value in rows.items())
        return Answer([job.task.name for job in self._jobs.values()], found)

    @property
    def copies(self) -> tuple[str, ...]:
        """Tasks elsewhere whose state is copied here."""
        return tuple(sorted(self._copies))

    def stats(self) -> WorkerStats:
        """Numbers of this process."""
        tasks = [job.task for job in self._jobs.values()]
        return WorkerStats(
            tuple(sorted(task.name for task in tasks)),
            sum(task.processed for task in tasks),
            sum(task.late.total() for task in tasks),
            sum(task.failures.total() for task in tasks),
            self._commits,
            {task.name: mark for task in tasks if (mark := task.known_watermark) is not None},
        )

    # ---- its life

    async def _run(self) -> None:
        try:
            await self._try_again_and_again()
        finally:
            self._place.close()

    async def _try_again_and_again(self) -> None:
        pause = RETRY_S
        while not self._stopping:
            commits = self._commits
            try:
                await self._membership()
            except (ProcessingFailed, Misuse) as error:
                self._fail(error)
            except AegisError as error:
                if not _passes(error):
                    self._fail(error)
                    break
                LOG.warning("%s begins again where it last committed: %s", self._group, error)
                pause = RETRY_S if self._commits > commits else min(2 * pause, RETRY_S_MAX)
                await asyncio.sleep(pause)
            except Exception as error:  # noqa: BLE001 - the top of this task; `wait` raises it
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        LOG.error("%s has stopped: %s", self._group, error)
        self._failure = error
        self._stopping = True
        self._started.set()

    async def _membership(self) -> None:
        """Once in the group, until it stops or something goes wrong."""
        embedded = self._engine.is_embedded
        config = SubscribeConfig(
            group_id=self._group,
            start=Offset.EARLIEST,
            delivery_mode=DeliveryMode.EXACTLY_ONCE,
            session_timeout=SESSION_TIMEOUT_EMBEDDED if embedded else SESSION_TIMEOUT,
        )
        topics = self._layout.topology.task_topics
        producer = self._engine.producer(
            ProducerConfig(
                transactional_id=f"{self._group}-{self._place.identity}",
                transaction_timeout=TRANSACTION_TIMEOUT,
            )
        )
        subscriber = self._engine.subscribe(topics, config, timeout=RESTORE_S)
        subscriber.on_assigned, subscriber.on_revoked = self._assigned, self._revoked
        self._producer, self._subscriber = producer, subscriber
        beside: list[asyncio.Task[None]] = []
        try:
            await producer.__aenter__()
            await subscriber.__aenter__()
            self._last_loop = asyncio.get_running_loop().time()
            self._started.set()
            beside += map(asyncio.get_running_loop().create_task, self._beside(subscriber))
            await self._work(subscriber)
            async with self._lock:
                if self._failure is None and self._broken is None:
                    await self._commit(is_last=True)
        finally:
            for one in beside:
                one.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self._subscriber = None
            subscriber.on_revoked = None  # what is in hand was committed above, or must not be
            with suppress(AegisError):
                await subscriber.close()
            with suppress(AegisError):
                await producer.close()
            self._drop(list(self._jobs))
            self._begin_cycle()
            self._broken = None

    def _beside(self, subscriber: Subscriber) -> Iterator[Coroutine[Any, Any, None]]:
        """What goes on meanwhile."""
        if len(self._layout.sources) > 1:
            yield self._board.share(self._standings_to_tell)
        if len(self._layout.stateful_tasks) > 1:
            yield self._desk.serve()
        if self._settings.standby_replicas:
            yield self._copy(subscriber)

    async def _copy(self, subscriber: Subscriber) -> None:
        """Keep copies of state that belongs to others, until cancelled."""
        while True:
            with suppress(AegisError):  # the next round comes
                for place in await self._to_copy(subscriber):
                    async with self._files:
                        if place not in self._jobs:
                            store = await self._restored(place)
                            store.close()
                            self._copies.add(_name(place))
            await asyncio.sleep(COPY_S)

    async def _to_copy(self, subscriber: Subscriber) -> list[TopicPartition]:
        described = await self._engine.group(self._group).describe()
        members = [member.member_id for member in described.members]
        owners = {_name(p): one.member_id for one in described.members for p in one.assigned}
        places = {_name(place): place for place in self._layout.stateful_tasks}
        me, replicas = subscriber.member_id, self._settings.standby_replicas
        chosen = copied_here(places, owners, members, me, replicas)
        self._copies.intersection_update(chosen)
        return [places[name] for name in chosen]

    async def _work(self, subscriber: Subscriber) -> None:
        loop = asyncio.get_running_loop()
        tick_at = loop.time() + TICK_S
        while not self._stopping:
            async with self._lock:
                if self._broken is not None:
                    raise self._broken
                # Under the lock: what is handed out counts for the next commit, so it is processed
                # before anybody commits.
                batch = await self._next(subscriber)
                if batch is not None:
                    await self._process(batch)
                if self._is_commit_due(loop.time()):
                    await self._commit_or_go_back()
                if loop.time() >= tick_at:
                    await self._follow(subscriber)
                    tick_at = loop.time() + TICK_S
            self._last_loop = loop.time()
            await asyncio.sleep(0)  # batches that are at hand would keep the loop for themselves

    async def _next(self, subscriber: Subscriber) -> MessageBatch | None:
        try:
            return await subscriber.poll_batch(POLL_S)
        except Misuse as error:
            raise Misuse(
                "The engine was closed before its processor was stopped; what it had not committed"
                " is done again at its next start."
            ) from error
        except Corruption as error:
            await self._pass_over(subscriber, error)
            return None

    async def _pass_over(self, subscriber: Subscriber, error: Corruption) -> None:
        """A record that does not decode."""
        details = error.details
        if not {"topic", "partition", "offset"} <= details.keys():
            raise error
        place = TopicPartition(details["topic"], details["partition"])
        job = self._jobs.get(place)
        if job is not None:
            root = self._layout.topology.roots(place.topic)[0]
            job.task.failed(root, details["offset"], error)
            self._cycle.add(job.task, None)
            self._changed.add(place)
        await subscriber.seek(place, details["offset"] + 1)

    # ---- one batch

    async def _process(self, batch: MessageBatch) -> None:
        place = TopicPartition(batch.topic, batch.partition)
        job = self._jobs.get(place)
        if job is None:
            raise MemberFenced(f"Records of {place} came, whose task is not here.")
        new = _not_before(batch, job.task.position)
        if new is None:
            return
        job.heard = asyncio.get_running_loop().time()
        await job.task.process(new, now_ms())
        self._cycle.add(job.task, new)
        self._cycle.records += len(new)
        self._changed.add(place)

    def _is_commit_due(self, now: float) -> bool:
        """With much to do, larger transactions at longer intervals: a key that changes often is
        written once in each."""
        if not self._changed:
            return False
        records = self._cycle.records
        late_s = self._settings.commit_interval.total_seconds() * (BUSY_INTERVALS - 1)
        until = self._commit_at + (late_s if records >= BUSY_RECORDS else 0.0)
        return now >= until or records >= STREAM_CYCLE_RECORDS_MAX

    async def _commit(self, *, is_last: bool = False) -> None:
        """Make everything since the last commit durable."""
        now = asyncio.get_running_loop().time()
        is_due = is_last or now >= self._checkpoint_at
        changed = sorted(self._changed)
        if not changed and not is_last:
            return
        checkpoints = await self._checkpoints() if is_due else {}
        for place in changed:
            if self._jobs[place].store is not None:
                self._cycle.save(self._jobs[place].task, self._changelog(place.topic))
        is_settled_late = bool(changed) and await self._send_is_settled_late()
        for place, job in self._jobs.items():
            if job.store is not None and (place in self._changed or place in checkpoints):
                job.store.commit(checkpoints.get(place))
        self._commits += bool(changed)
        self._begin_cycle()
        self._commit_at = now + self._settings.commit_interval.total_seconds()
        if is_due:
            self._checkpoint_at = now + CHECKPOINT_S
        if is_settled_late:
            raise OutcomeUnknown("It took long to learn that the last transaction is committed.")

    async def _commit_or_go_back(self) -> None:
        """A transaction that was refused costs what was done since the last one, and nobody its
        place in the group."""
        try:
            await self._commit()
        except (TransactionAborted, MemberFenced) as error:
            LOG.info("%s goes back to its last commit: %s", self._group, error)
            self._go_back()

    def _go_back(self) -> None:
        """Every task as it was at the last commit; the subscriber hands out again what came
        since."""
        for place, job in self._jobs.items():
            if job.store is not None:
                job.store.rollback()
            job.task = self._task(place, job.store)
        self._begin_cycle()

    async def _send_is_settled_late(self) -> bool:
        """Results, state and positions in one transaction. Raises what it was refused for: then it
        is not committed. True: it is, but the subscriber does not know, and has to begin again."""
        producer, subscriber = self._producer, self._subscriber
        assert producer is not None
        assert subscriber is not None
        transaction = producer.transaction(subscriber)
        try:
            async with transaction:
                for topic, partition, messages, records in self._cycle.outgoing():
                    if records is None:
                        await transaction.send_many(topic, messages, partition=partition)
                    else:
                        await transaction.send_encoded(topic, records, partition=partition)
                self._check_hold(subscriber)
                # Also where nothing was read: idle partitions that follow others send results.
                await transaction.send_offsets(subscriber, unmoved=True)
        except OutcomeUnknown:
            if await transaction.outcome() is not TransactionOutcome.COMMITTED:
                raise
            return True
        return False

    def _check_hold(self, subscriber: Subscriber) -> None:
        """Everything that was processed has its position in the same transaction."""
        positions = subscriber.positions_in_hand(unmoved=True)
        for place in self._changed:
            if place not in positions:
                raise MemberFenced(f"{place} has gone to another member.", partition=str(place))

    async def _checkpoints(self) -> dict[TopicPartition, int]:
        """How far each changelog is now: everything in it is in the task's file already."""
        cluster = self._engine.cluster
        deadline = cluster.deadline(self._engine.request_timeout)
        found = {}
        kept = {place for place, job in self._jobs.items() if job.store is not None}
        for topic in sorted({place.topic for place in kept}):
            ends = await list_offsets(cluster, self._changelog(topic), deadline)
            for place in kept:
                if place.topic == topic:
                    found[place] = ends[place.partition].high_watermark
        return found

    def _changelog(self, topic: str) -> str:
        return self._layout.topology.changelog_topic(topic)

    def _new_cycle(self) -> Cycle:
        return Cycle(self._layout, self._dead_topic)

    def _begin_cycle(self) -> None:
        self._cycle = self._new_cycle()
        self._changed = set()

    # ---- event time

    async def _follow(self, subscriber: Subscriber) -> None:
        """Let idle partitions follow the others."""
        now = asyncio.get_running_loop().time()
        sources = set(self._layout.sources)
        mine = {p: job for p, job in self._jobs.items() if (p.topic, p.partition) in sources}
        if now - self._last_loop > STALL_S or self._paused:
            for job in mine.values():
                job.heard = now
        if not self._paused:
            for place, job in mine.items():
                if job.task.goes_by_clock:
                    await self._move_on(place, now_ms())
        await self._find_idle(subscriber, mine, now)
        standings = self._board.of_others(now) | self._standings()
        if len(standings) < len(sources):
            return  # nothing is known of some partition, and it may be the slowest
        marks = {place: standing.mark for place, standing in standings.items()}
        idle = [place for place, standing in standings.items() if standing.is_idle]
        for place, mark in followed(marks, idle).items():
            if place in mine:
                await self._move_on(place, mark)

    async def _move_on(self, place: TopicPartition, mark: int) -> None:
        """Event time has come so far in a partition, without a record. Where nothing is due, that
        is no reason to commit."""
        task = self._jobs[place].task
        await task.follow(mark)
        if task.has_done_something:
            self._cycle.add(task, None)
            self._changed.add(place)

    def _standings(self) -> dict[TopicPartition, Standing]:
        """Of the source partitions that are here."""
        sources = set(self._layout.sources)
        return {
            place: Standing(job.task.watermark, job.heard is None)
            for place, job in self._jobs.items()
            if (place.topic, place.partition) in sources
        }

    def _standings_to_tell(self) -> dict[TopicPartition, Standing]:
        """None where nobody else has a part of the work."""
        mine = self._standings()
        return mine if len(mine) < len(self._layout.sources) else {}

    async def _find_idle(
        self, subscriber: Subscriber, mine: dict[TopicPartition, _Job], now: float
    ) -> None:
        """Idle is what was read to its end and has had nothing for long."""
        quiet_s = self._settings.idle_timeout.total_seconds()
        quiet = [
            job for job in mine.values() if job.heard is not None and now - job.heard >= quiet_s
        ]
        if not quiet:
            return
        lag = await subscriber.lag()
        for job in quiet:
            place = TopicPartition(job.task.topic, job.task.partition)
            job.heard = None if lag.get(place) == 0 else now

    # ---- partitions that come and go

    async def _assigned(self, places: list[TopicPartition]) -> None:
        for place in places:
            job = await self._begun_at_last(place)
            if job is None:
                return
            async with self._lock:
                self._jobs[place] = job
        if self._paused and self._subscriber is not None:
            self._subscriber.pause()

    async def _begun_at_last(self, place: TopicPartition) -> _Job | None:
        """Tries until it succeeds: the group calls once. None when the worker ends."""
        while not self._stopping:
            try:
                return await self._begun(place)
            except AegisError as error:
                if not _passes(error):
                    self._fail(error)
                    return None
                LOG.warning("%s cannot begin with %s yet: %s", self._group, place, error)
                await asyncio.sleep(RETRY_S)
        return None

    async def _begun(self, place: TopicPartition) -> _Job:
        """A task with its state as it was last committed."""
        store: SqliteStore | None = None
        if self._layout.topology.stateful(place.topic):
            async with self._files:
                store = await self._restored(place)
        try:
            task = self._task(place, store)
        except BaseException:
            if store is not None:
                store.close()
            raise
        return _Job(task, store, asyncio.get_running_loop().time())

    def _task(self, place: TopicPartition, store: SqliteStore | None) -> Task:
        return Task(
            self._layout.topology,
            place.topic,
            place.partition,
            MemoryStore() if store is None else store,
            on_error=self._settings.on_error,
            writers=self._layout.writers(place.topic),
        )

    async def _restored(self, place: TopicPartition) -> SqliteStore:
        cluster = self._engine.cluster
        timeout = self._engine.request_timeout
        changelog = TopicPartition(self._changelog(place.topic), place.partition)
        info = await cluster.topic(changelog.topic, cluster.deadline(timeout))
        identity = f"{cluster.metadata.cluster_id} {info.partitions[place.partition].group}"
        path = self._place.path / f"{place.topic}-{place.partition}.sqlite"
        store = SqliteStore(path, identity)
        name = _name(place)

        def tell(progress: Progress) -> None:
            self.restoring[name] = progress
            if self._on_restore is not None:
                self._on_restore(name, progress)

        try:
            await restore(cluster, changelog, store, tell, timeout)
        except BaseException:
            store.close()
            raise
        finally:
            self.restoring.pop(name, None)
        return store

    async def _revoked(self, places: list[TopicPartition]) -> None:
        async with self._lock:
            if any(place in self._changed for place in places):
                try:
                    await self._commit_or_go_back()
                except AegisError as error:
                    self._broken = error  # the membership would not know what to do with it
            self._drop(places)

    def _drop(self, places: list[TopicPartition]) -> None:
        for place in places:
            job = self._jobs.pop(place, None)
            self._changed.discard(place)
            if job is not None and job.store is not None:
                job.store.close()


def _name(place: TopicPartition) -> str:
    """Of the task of a partition."""
    return f"{place.topic}/{place.partition}"


def _passes(error: AegisError) -> bool:
    """Whether another try may help."""
    return error.retriable or isinstance(
        error, MemberFenced | OutcomeUnknown | ProducerFenced | TransactionAborted
    )


def _not_before(batch: MessageBatch, position: int) -> MessageBatch | None:
    """The part of a batch that was not processed yet; None: nothing."""
    offsets = batch.offsets
    if offsets[0] >= position:
        return batch
    if offsets[-1] < position:
        return None
    at = bisect_left(offsets, position)
    return type(batch)(
        batch.topic,
        batch.partition,
        offsets[at:],
        batch.timestamps[at:],
        batch.keys[at:],
        batch.values[at:],
        batch.columns.after(at),
    )
