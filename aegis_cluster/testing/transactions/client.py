"""A simulated client whose work is a generator, which yields what it waits for.

So the work reads from top to bottom, and a run is a function of its seed all the same.

The rules it protects: a client that is frozen (SIGSTOP, a long collection of garbage) does nothing,
and does not know that time passes; one that is closed never goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    OffsetOutOfRange,
    OutcomeUnknown,
    RequestTimeout,
)
from aegis_cluster.ids import TopicPartition
from aegis_cluster.testing.network import Port
from aegis_cluster.testing.scheduler import MS, SECOND
from aegis_cluster.testing.sessions import Session
from aegis_cluster.wire.batch import batch_header, decode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api, Isolation, Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.ids import GroupId
    from aegis_cluster.testing.sessions import Topic
    from aegis_cluster.testing.transactions.history import Rows
    from aegis_cluster.wire.protocol import Part

T = TypeVar("T")
Wait = Callable[[Callable[[Any], None]], None]
"""Told whom to call, once, with what was waited for."""
Work = Generator[Wait, Any, T]

PAUSE_US: Final = 60 * MS
ENTRY_APIS: Final = frozenset({Api.PRODUCE, Api.FETCH, Api.LIST_OFFSETS})
"""They answer for each partition; a client here asks for one."""


class Fetched(NamedTuple):
    """rows: records that a reader hands out. position: the next offset to be read. end: how far
    such a reader may see."""

    rows: Rows
    position: int
    end: int


class Client(Session):
    """Knows several topics, and asks whoever leads a partition until it has an answer."""

    def __init__(self, *, topics: dict[str, Topic], **rest: Any) -> None:
        super().__init__(**rest)
        self.topics = {name: topic.copy() for name, topic in topics.items()}
        self._led_by: dict[GroupId, int] = {}
        self._frozen_until_us = 0

    # ---- work

    def begin(self, work: Work[Any]) -> None:
        """Let a generator run, beside others of this client."""
        self._later(0, self._go_on, work)

    def freeze(self, time_us: int) -> None:
        """Stand still for so long."""
        self._frozen_until_us = self._scheduler.now_us + time_us

    def _go_on(self, work: Work[Any], value: Any = None) -> None:
        if self.closed:
            return
        frozen_us = self._frozen_until_us - self._scheduler.now_us
        if frozen_us > 0:
            self._scheduler.after(frozen_us, self._go_on, work, value)
            return
        try:
            wait = work.send(value)
        except StopIteration:
            return
        wait(lambda found: self._go_on(work, found))

    def sleep(self, time_us: int) -> Work[None]:
        yield lambda go_on: self._later(time_us, go_on, None)

    def together(self, works: Sequence[Work[T]]) -> Work[list[T]]:
        """Let several run beside each other, and wait for all of them."""
        results: list[Any] = [None] * len(works)
        left = len(works)

        def wait(go_on: Callable[[Any], None]) -> None:
            def one(slot: int, work: Work[T]) -> Work[None]:
                nonlocal left
                results[slot] = yield from work
                left -= 1
                if not left:
                    go_on(None)

            for slot, work in enumerate(works):
                self._go_on(one(slot, work))

        yield wait
        return results

    @property
    def now_us(self) -> int:
        return self._scheduler.now_us

    # ---- questions

    def ask(
        self,
        place: TopicPartition,
        api: Api,
        fields: Sequence[Any],
        *,
        within_us: int,
        parts: Sequence[Part] = (),
        wait_us: int = SECOND,
    ) -> Work[Reply | AegisError]:
        """Ask whoever leads a partition, again and again. Returns the answer, or a refusal that no
        repeat would change (its `details["unanswered"]`: an earlier try may have been carried out);
        `OutcomeUnknown` or `RequestTimeout` when time is up."""
        deadline_us = self.now_us + within_us
        unanswered = False
        while True:
            port = self._port_of(place)
            found = yield lambda go_on, port=port: self._ask(  # type: ignore[misc]
                port, api, fields, go_on, parts=parts, wait_us=wait_us
            )
            result = _entry(found) if api in ENTRY_APIS else found
            if not isinstance(result, AegisError):
                return result
            is_unknown = isinstance(result, OutcomeUnknown)
            unanswered = unanswered or is_unknown
            if not is_unknown and not result.retriable:
                result.details["unanswered"] = unanswered
                return result
            self._learn_from(place, result)
            if self.now_us >= deadline_us:
                kind = OutcomeUnknown if unanswered else RequestTimeout
                return kind(f"No answer came in time: {result}")
            yield from self.sleep(PAUSE_US)

    def _port_of(self, place: TopicPartition) -> Port:
        topic = self.topics[place.topic]
        group = topic.groups[place.partition]
        node = self._led_by.get(group)
        if node is None:
            node = self._led_by[group] = self._rng.choice(topic.replicas[place.partition])
        return Port(node, group % topic.shards.get(node, 1))

    def _learn_from(self, place: TopicPartition, error: AegisError) -> None:
        group = self.topics[place.topic].groups[place.partition]
        hint = error.details.get("leader") if isinstance(error, NotLeader) else None
        if isinstance(hint, int) and 1 <= hint <= self._nodes:
            self._led_by[group] = hint
            return
        self._led_by.pop(group, None)
        if not self._refreshing:
            self._refreshing = True
            self._later(100 * MS, self._refresh)

    def _refresh(self) -> None:
        fields = [0, sorted(self.topics), True]
        self._ask(self._any_node(), Api.METADATA, fields, self._refreshed)

    def _refreshed(self, result: Reply | AegisError) -> None:
        self._refreshing = False
        if not isinstance(result, AegisError):
            for topic in self.topics.values():
                topic.learn(result.fields)

    def places(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(len(self.topics[topic].groups))]

    def home_of(self, topic: str, name: str) -> TopicPartition:
        """The partition of one of the cluster's own topics that holds something of this name."""
        count = len(self.topics[topic].groups)
        return TopicPartition(topic, partition_for(name.encode(), count))

    # ---- reading

    def fetch(
        self,
        place: TopicPartition,
        offset: int,
        *,
        wait_ms: int = 0,
        bytes_max: int = 100_000,
        isolation: Isolation = Isolation.COMMITTED,
        within_us: int = 5 * SECOND,
    ) -> Work[Fetched | AegisError]:
        """What a reader gets from an offset on, by the rules of `client.fetcher`."""
        group = self.topics[place.topic].groups[place.partition]
        fields = [wait_ms, [[group, offset, bytes_max]], isolation]
        result = yield from self.ask(place, Api.FETCH, fields, within_us=within_us)
        if isinstance(result, OffsetOutOfRange):
            start = int(result.details.get("log_start", 0))
            if start > offset:
                return Fetched([], start, start)
        if isinstance(result, AegisError):
            return result
        _, high, _, end, *told = result.fields[0][0]
        aborted, known_to = told or ([], high)  # readers of everything are told of no aborts
        rows, position = _visible(result.parts[0], aborted, known_to, offset)
        return Fetched(rows, position, end)

    def read_all(
        self,
        place: TopicPartition,
        offset: int,
        end: int,
        *,
        isolation: Isolation = Isolation.COMMITTED,
        within_us: int,
    ) -> Work[Fetched | AegisError]:
        """Everything from an offset up to another, which has to be readable in time."""
        deadline_us = self.now_us + within_us
        rows: Rows = []
        while offset < end:
            left_us = deadline_us - self.now_us
            if left_us <= 0:
                return RequestTimeout(f"{place} could be read up to {offset}, not {end}.")
            found = yield from self.fetch(
                place, offset, wait_ms=100, isolation=isolation, within_us=left_us
            )
            if isinstance(found, AegisError):
                return found
            rows += found.rows
            offset = found.position
        return Fetched(rows, offset, end)


def _entry(result: Reply | AegisError) -> Reply | AegisError:
    """The answer for the one partition that was asked about."""
    if isinstance(result, AegisError):
        return result
    code, *rest = result.fields[0][0]
    return result if code == 0 else error_from_reply(code, rest)


def _visible(
    frames: Part, aborted: Sequence[Sequence[int]], known_to: int, offset: int
) -> tuple[Rows, int]:
    """The records that a reader hands out, and where it goes on."""
    rows: Rows = []
    position = offset
    for place, header in iter_frames(frames):
        if header.kind is not FrameKind.DATA:
            continue
        payload = bytes(frame_payload(frames, header, place))
        batch = batch_header(payload)
        if batch.base_offset >= known_to:
            break
        hidden = batch.is_control or any(
            producer == batch.producer_id and first <= batch.base_offset <= last
            for producer, first, last in aborted
        )
        if not hidden:
            rows += [
                (record.offset, record.key, record.value or b"")
                for record in decode_batch(payload)
                if record.offset >= offset
            ]
        position = batch.base_offset + batch.last_offset_delta + 1
    return rows, max(position, offset)
