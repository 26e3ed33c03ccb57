"""Clients of a simulated cluster: producers, readers and askers, without asyncio and sockets.

The idea: they stand on the same parts as the real ones (`PartitionQueue`, wire messages) and react
to answers by the same rules (`client.producer`, `client.fetcher`); only waiting is different. All
that they do and see goes into the `History`.

The rule it protects: a session never says more than it knows. A request whose connection broke has
no known outcome.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.transport import Listener
from aegis_cluster.client.partition_queue import PartitionQueue, PendingBatch
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    OffsetOutOfRange,
    OutcomeUnknown,
    OutOfOrderSequence,
    Unavailable,
)
from aegis_cluster.testing.history import Gone, Outcome, Read, Watermark, Write
from aegis_cluster.testing.network import Port
from aegis_cluster.testing.scheduler import MS, SECOND
from aegis_cluster.wire.batch import BatchBuilder, decode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.protocol import (
    PROTOCOL_VERSION,
    Api,
    Hello,
    Reply,
    decode_reply,
    encode_request,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aegis_cluster.client.partition_queue import Outcome as Stored
    from aegis_cluster.ids import GroupId
    from aegis_cluster.testing.history import History
    from aegis_cluster.testing.network import Connection, Network
    from aegis_cluster.testing.scheduler import Scheduler
    from aegis_cluster.wire.protocol import Part

Answer = "Callable[[Reply | AegisError], None]"

CLIENT_HOSTS: Final = 1_000
"""Numbers of clients' hosts begin here."""
RETRY_US: Final = 60 * MS
REFRESH_US: Final = 100 * MS
"""Metadata are asked for so long after a guess was wrong, and never twice at once."""
REQUEST_US: Final = 1_000 * MS
"""A question without an answer is asked elsewhere after so long."""


@dataclass(slots=True)
class Topic:
    """What a client knows of the topic: its groups, where their replicas are, and how many shards
    each of those nodes runs."""

    name: str
    groups: list[GroupId] = field(default_factory=list)
    replicas: list[list[int]] = field(default_factory=list)
    shards: dict[int, int] = field(default_factory=dict)

    def copy(self) -> Topic:
        """For a client of its own, whose knowledge ages by itself."""
        return Topic(self.name, list(self.groups), list(self.replicas), dict(self.shards))

    def learn(self, fields: Sequence[Any]) -> bool:
        """Take a METADATA reply in; whether the topic was in it."""
        self.shards = {info[0]: info[5] for info in fields[3]}
        for found, *_ in fields[4]:
            if found[0] == self.name:
                self.groups = [group for group, _ in found[2]]
                self.replicas = [[node for node, _ in members] for _, members in found[2]]
                return True
        return False


class ClientLink:
    """`client.link` without asyncio: hello first, then requests, each with its callback."""

    def __init__(
        self, network: Network, host: int, target: Port, changed: Callable[[], None]
    ) -> None:
        self.ready = False
        self._network = network
        self._host = host
        self._target = target
        self._changed = changed
        self._numbers = itertools.count(1)
        self._pending: dict[int, Callable[[Reply | AegisError], None]] = {}
        self._connection = self._dial()

    def _dial(self) -> Connection:
        source = Port(self._host)
        return self._network.dial(source, self._target, Listener.DATA, self, repeats=False)

    def connected(self) -> None:
        hello = Hello(PROTOCOL_VERSION, "client", "", 0, "", f"client-{self._host}", 0)
        self._connection.send(
            encode_request(Api.HELLO, hello.to_fields(), correlation=0, ms_left=5_000)
        )

    def lost(self) -> None:
        self.ready = False
        pending, self._pending = self._pending, {}
        self._connection = self._dial()
        for answer in pending.values():
            answer(OutcomeUnknown("The connection broke before an answer."))
        self._changed()

    def received(self, message: Sequence[Part]) -> None:
        reply = decode_reply(message)
        if reply.correlation == 0:
            self.ready = reply.code == 0
            self._changed()
            return
        answer = self._pending.pop(reply.correlation, None)
        if answer is None:
            return
        if reply.code == 0:
            answer(reply)
            return
        error = error_from_reply(reply.code, reply.fields)
        if "hello" in error.details:
            self.connected()
        answer(error)

    def send(
        self,
        api: Api,
        fields: Sequence[Any],
        parts: Sequence[Part],
        answer: Callable[[Reply | AegisError], None],
        *,
        ms_left: int = 1_000,
    ) -> int | None:
        """Ask; None when nothing was sent."""
        if not self.ready:
            return None
        number = next(self._numbers)
        message = encode_request(api, fields, parts, correlation=number, ms_left=ms_left)
        if not self._connection.send(message):
            return None
        self._pending[number] = answer
        return number

    def forget(self, number: int) -> None:
        """Nobody waits for that answer any more."""
        self._pending.pop(number, None)

    def close(self) -> None:
        self._connection.close()
        self._pending.clear()


class Session:
    """A client's host: its links, its guesses who leads, and questions with a time-out."""

    def __init__(
        self,
        *,
        number: int,
        scheduler: Scheduler,
        network: Network,
        rng: random.Random,
        nodes: int,
        history: History,
        topic: Topic,
    ) -> None:
        self.number = number
        self.closed = False
        self._scheduler = scheduler
        self._rng = rng
        self._history = history
        self._topic = topic.copy()
        self._leaders: dict[int, int] = {}
        self._refreshing = False
        self._network = network
        self._nodes = nodes
        self._links: dict[Port, ClientLink] = {}
        for node in range(1, nodes + 1):
            self._link(Port(node))

    def _link(self, port: Port) -> ClientLink:
        """The link to one shard; the first time, it is still about to be made."""
        link = self._links.get(port)
        if link is None:
            host = CLIENT_HOSTS + self.number
            link = self._links[port] = ClientLink(self._network, host, port, self._look)
        return link

    def close(self) -> None:
        """The client's process ends."""
        self.closed = True
        for link in self._links.values():
            link.close()

    def _look(self) -> None:
        """A link changed; sessions that wait for one override this."""

    def _later(self, delay_us: int, call: Callable[..., None], *arguments: Any) -> None:
        def run() -> None:
            if not self.closed:
                call(*arguments)

        self._scheduler.after(delay_us, run)

    @property
    def _now(self) -> float:
        return self._scheduler.now_us / SECOND

    def _leader(self, partition: int) -> int:
        """Who leads, as far as we know; any replica where we don't."""
        known = self._leaders.get(partition)
        if known is None:
            known = self._leaders[partition] = self._rng.choice(self._topic.replicas[partition])
        return known

    def _port(self, partition: int) -> Port:
        """The shard that holds the replica of whoever we believe to lead."""
        node = self._leader(partition)
        return Port(node, self._topic.groups[partition] % self._topic.shards.get(node, 1))

    def _note(self, partition: int, error: AegisError) -> None:
        """Learn from a refusal who leads, or forget our guess."""
        hint = error.details.get("leader") if isinstance(error, NotLeader) else None
        if isinstance(hint, int) and 1 <= hint <= self._nodes:
            self._leaders[partition] = hint
        else:
            self._forget(partition)

    def _forget(self, partition: int) -> None:
        """Guess anew next time, and ask where replicas are now."""
        self._leaders.pop(partition, None)
        if not self._refreshing:
            self._refreshing = True
            self._later(REFRESH_US, self._refresh)

    def _refresh(self) -> None:
        self._ask(self._any_node(), Api.METADATA, [0, [self._topic.name], True], self._refreshed)

    def _refreshed(self, result: Reply | AegisError) -> None:
        self._refreshing = False
        if not isinstance(result, AegisError):
            self._topic.learn(result.fields)

    def _ask(
        self,
        port: Port,
        api: Api,
        fields: Sequence[Any],
        answer: Callable[[Reply | AegisError], None],
        *,
        parts: Sequence[Part] = (),
        wait_us: int = REQUEST_US,
    ) -> None:
        """Ask one shard; `answer` hears exactly once, of a time-out too."""
        link = self._link(port)
        heard = False

        def once(result: Reply | AegisError) -> None:
            nonlocal heard
            if not heard and not self.closed:
                heard = True
                answer(result)

        number = link.send(api, fields, parts, once, ms_left=wait_us // MS)
        if number is None:
            self._later(RETRY_US, once, Unavailable("There is no connection."))
            return

        def late() -> None:
            link.forget(number)
            once(OutcomeUnknown("No answer came in time."))

        self._later(wait_us, late)

    def _any_node(self) -> Port:
        return Port(self._rng.randint(1, self._nodes))


class Admin(Session):
    """Creates the topic and learns its groups."""

    def __init__(
        self,
        *,
        partitions: int,
        replicas: int,
        retention: tuple[int | None, int | None],
        topic: Topic,
        **rest: Any,
    ) -> None:
        """retention: milliseconds and bytes; None: without a bound."""
        super().__init__(topic=topic, **rest)
        self._retention = retention
        self.done = False
        self._found = topic
        self._partitions = partitions
        self._replicas = replicas
        self._later(100 * MS, self._create)

    def _create(self) -> None:
        settings = ["topic", *self._retention, "delete", "none", 1_000_000]
        fields = [self._topic.name, self._partitions, self._replicas, settings, "token"]
        self._ask(self._any_node(), Api.CREATE_TOPIC, fields, self._created)

    def _created(self, result: Reply | AegisError) -> None:
        if isinstance(result, AegisError):
            self._later(RETRY_US, self._create)
            return
        self._learn()

    def _learn(self) -> None:
        self._ask(self._any_node(), Api.METADATA, [0, [self._topic.name]], self._learned)

    def _learned(self, result: Reply | AegisError) -> None:
        if isinstance(result, AegisError) or not self._found.learn(result.fields):
            self._later(RETRY_US, self._learn)
            return
        self.done = True


class Producer(Session):
    """An idempotent producer: batches in sequence, retries, epochs (KIP-98, KIP-360)."""

    def __init__(self, *, deadline_s: float, **rest: Any) -> None:
        super().__init__(**rest)
        self.queues = [PartitionQueue() for _ in self._topic.groups]
        self._deadline_s = deadline_s
        self._values = itertools.count()
        self._has_id = False
        self._pumping = False
        self._later(0, self._get_id)

    def _get_id(self) -> None:
        self._ask(self._any_node(), Api.INIT_PRODUCER, [], self._got_id)

    def _got_id(self, result: Reply | AegisError) -> None:
        if isinstance(result, AegisError):
            self._later(RETRY_US, self._get_id)
            return
        self._use_id(result.fields[0])

    def _use_id(self, producer_id: int) -> None:
        for queue in self.queues:
            queue.producer_id = producer_id
        self._has_id = True
        self._pump()

    def publish(self, partition: int, count: int, size: int = 0) -> Write:
        """Hand in one batch of `count` records."""
        values = tuple(
            b"%d.%d.%d" % (self.number, partition, next(self._values)) + bytes(size)
            for _ in range(count)
        )
        write = Write(self.number, partition, values, self._scheduler.now_us)
        self._history.writes.append(write)
        builder = BatchBuilder()
        builder.extend((self._scheduler.now_us // MS, None, value, ()) for value in values)

        def done(result: Stored | AegisError) -> None:
            _end(write, result, self._scheduler.now_us)

        batch = PendingBatch(builder, self._now + self._deadline_s, done, count=count, size=1)
        self.queues[partition].add(batch)
        self._pump()
        return write

    def _look(self) -> None:
        self._pump()

    def _pump(self) -> None:
        if self.closed:
            return
        busy = False
        for partition, queue in enumerate(self.queues):
            queue.expire(self._now)
            while self._has_id and queue.can_send(self._now) and self._is_linked(partition):
                batch = queue.take()
                if batch is not None:
                    self._send(partition, batch)
            busy |= bool(queue.waiting or queue.in_flight)
        if busy and not self._pumping:
            self._pumping = True
            self._later(RETRY_US, self._pump_again)

    def _pump_again(self) -> None:
        self._pumping = False
        self._pump()

    def _is_linked(self, partition: int) -> bool:
        """Whether there is a link to where it should go; if not, another guess comes next time."""
        if self._link(self._port(partition)).ready:
            return True
        self._forget(partition)
        return False

    def _send(self, partition: int, batch: PendingBatch) -> None:
        items = [[self._topic.groups[partition], self._topic.name, partition]]

        def answer(result: Reply | AegisError) -> None:
            if not self.closed:
                self._answered(partition, batch, result)

        link = self._link(self._port(partition))
        sent = link.send(Api.PRODUCE, [items], [batch.data], answer, ms_left=30_000)
        if sent is None:
            self._answered(partition, batch, Unavailable("Nothing was sent."))

    def _answered(self, partition: int, batch: PendingBatch, result: Reply | AegisError) -> None:
        if isinstance(result, AegisError):
            self._failed(partition, batch, result)
        else:
            code, *rest = result.fields[0][0]
            if code == 0:
                self.queues[partition].acknowledged(batch, (rest[0], rest[1]))
            else:
                self._failed(partition, batch, error_from_reply(code, rest))
        self._pump()

    def _failed(self, partition: int, batch: PendingBatch, error: AegisError) -> None:
        """By the rules of `client.producer`."""
        self._note(partition, error)
        queue = self.queues[partition]
        is_unknown = isinstance(error, OutcomeUnknown)
        if isinstance(error, OutOfOrderSequence) or not (error.retriable or is_unknown):
            queue.refused(batch, error)
        else:
            at = self._now + RETRY_US / SECOND
            queue.retry(batch, unanswered=is_unknown, at=at)


def _end(write: Write, result: Stored | AegisError, now_us: int) -> None:
    write.ended_us = now_us
    if not isinstance(result, AegisError):
        write.outcome, write.base_offset = Outcome.OK, result[0]
        return
    is_unknown = isinstance(result, OutcomeUnknown)
    write.outcome = Outcome.UNKNOWN if is_unknown else Outcome.REFUSED
    write.reason = str(result)


class Reader(Session):
    """Reads every partition from its beginning on, one fetch at a time."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.positions = [0 for _ in self._topic.groups]
        for partition in range(len(self._topic.groups)):
            self._later(0, self._fetch, partition)

    def _fetch(self, partition: int) -> None:
        if self._rng.random() < 0.05:
            self._leaders.pop(partition, None)  # old metadata: whoever it names may answer
        wait_ms = self._rng.choice((0, 50, 500))
        size = self._rng.choice((1, 200, 100_000))
        fields = [wait_ms, [[self._topic.groups[partition], self.positions[partition], size]]]
        asked_us = self._scheduler.now_us

        def answer(result: Reply | AegisError) -> None:
            self._fetched(partition, result, asked_us)

        self._ask(self._port(partition), Api.FETCH, fields, answer)

    def _fetched(self, partition: int, result: Reply | AegisError, asked_us: int) -> None:
        if not isinstance(result, AegisError):
            code, *rest = result.fields[0][0]
            if code == 0:
                self._take(partition, rest[0], result.parts[0], asked_us)
                self._later(self._rng.randrange(5 * MS, 40 * MS), self._fetch, partition)
                return
            result = error_from_reply(code, rest)
        if isinstance(result, OffsetOutOfRange):
            self._out_of_range(partition, result)
        self._note(partition, result)
        self._later(RETRY_US, self._fetch, partition)

    def _out_of_range(self, partition: int, error: OffsetOutOfRange) -> None:
        """Go on where the log begins now, as a client with `start=Offset.EARLIEST` does."""
        offset, start = self.positions[partition], int(error.details.get("log_start", 0))
        if start > offset:
            self._history.gone.append(Gone(self.number, partition, offset, start))
            self.positions[partition] = start
        else:
            self._history.denied.append(
                f"reader {self.number}, partition {partition}: {error} ({self._leader(partition)}"
                f" at {self._scheduler.now_us} us)"
            )

    def _take(self, partition: int, high: int, frames: Part, asked_us: int) -> None:
        now_us = self._scheduler.now_us
        for offset, value in records_of(frames):
            if offset >= self.positions[partition]:
                self._history.reads.append(Read(self.number, partition, offset, value, now_us))
                self.positions[partition] = offset + 1
        self._history.watermarks.append(
            Watermark(self.number, partition, high, asked_us, now_us, linearizable=False)
        )


def records_of(frames: Part) -> list[tuple[int, bytes]]:
    """(offset, value) of every record in a run of frames; CRCs are checked on the way."""
    found: list[tuple[int, bytes]] = []
    for position, header in iter_frames(frames):
        if header.kind is FrameKind.DATA:
            records = decode_batch(bytes(frame_payload(frames, header, position)))
            found += [(record.offset, record.value or b"") for record in records]
    return found


class Asker(Session):
    """Asks for end offsets, again and again: answers must be as fresh as the question."""

    def __init__(self, *, every_us: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.ends: dict[int, int] = {}
        self._every_us = every_us
        for partition in range(len(self._topic.groups)):
            self._later(0, self._question, partition)

    def _question(self, partition: int) -> None:
        asked_us = self._scheduler.now_us

        def answer(result: Reply | AegisError) -> None:
            self._answered(partition, result, asked_us)

        fields = [[self._topic.groups[partition]]]
        if self._rng.random() < 0.2:
            self._leaders.pop(partition, None)
        self._ask(self._port(partition), Api.LIST_OFFSETS, fields, answer)

    def _answered(self, partition: int, result: Reply | AegisError, asked_us: int) -> None:
        if not isinstance(result, AegisError):
            code, *rest = result.fields[0][0]
            if code == 0:
                mark = Watermark(
                    self.number,
                    partition,
                    rest[1],
                    asked_us,
                    self._scheduler.now_us,
                    linearizable=True,
                    start=rest[0],
                )
                self._history.watermarks.append(mark)
                self.ends[partition] = rest[1]
                self._later(self._every_us, self._question, partition)
                return
            result = error_from_reply(code, rest)
        self._note(partition, result)
        self._later(RETRY_US, self._question, partition)
