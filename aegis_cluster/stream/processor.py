"""Building a topology: `StreamProcessor`, and the streams, windows and tables that it hands out.

Each call adds a node and returns what comes out of it; nothing runs before `start()`. A wrong
argument is refused here, where it was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import ConfigError, Misuse
from aegis_cluster.limits import STREAM_WINDOW_VALUES_MAX
from aegis_cluster.stream import describe
from aegis_cluster.stream import topology as spec
from aegis_cluster.stream.aggregates import Aggregator, Reduce, aggregator_of
from aegis_cluster.stream.by_column import check_form
from aegis_cluster.stream.database import DatabaseSink
from aegis_cluster.stream.event_time import time_reader
from aegis_cluster.stream.launch import start
from aegis_cluster.stream.pool import check_pooled
from aegis_cluster.stream.settings import ProcessorSettings
from aegis_cluster.stream.topology import Node, Port, SpecialTopic, Topology
from aegis_cluster.stream.windows import span_ms, window_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.stream.changelog import Progress
    from aegis_cluster.stream.event_time import ProcessingTime
    from aegis_cluster.stream.running import Running
    from aegis_cluster.stream.windows import WindowKind

    Timestamp = str | Callable[[Any], Any] | ProcessingTime | None

NO_GRACE: Final = timedelta(0)
_NAME_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class StreamProcessor:
    """An application that reads topics and writes others; processes with the same
    `application_id` share its work.

    engine: where it runs; None for one that is only described, or tested with
    `aegis_cluster.testing.TopologyTestDriver`. settings: see `ProcessorSettings`, whose fields are
    taken as keywords here.
    """

    def __init__(
        self, engine: StreamingEngine | None, application_id: str, **settings: Any
    ) -> None:
        if not isinstance(application_id, str):
            raise ConfigError(
                f"application_id = {application_id!r}; give a name, as text.", key="application_id"
            )
        if not (engine is None or isinstance(getattr(engine, "is_embedded", None), bool)):
            raise Misuse(
                f"StreamProcessor({engine!r:.60}, …): give a StreamingEngine, or None for a"
                " processor that is only described or tested."
            )
        if not application_id or not _NAME_CHARS.issuperset(application_id):
            raise ConfigError(
                f"application_id = {application_id!r}; it names topics, so letters, digits, '.',"
                " '_' and '-' are allowed.",
                key="application_id",
            )
        self.engine = engine
        self.application_id = application_id
        self.settings = ProcessorSettings.of(settings)
        self._nodes: list[Node] = []

    @property
    def topology(self) -> Topology:
        """What was built so far, as a value. Raises `Misuse` when there is no source."""
        if not self._nodes:
            raise Misuse("This processor has no source yet; begin with processor.source(topic).")
        return Topology(self.application_id, tuple(self._nodes))

    @property
    def dead_letter_topic(self) -> str:
        """Where records go at which a step failed, with `on_error="dead_letter"`."""
        return self.settings.dead_letter or f"{self.application_id}.dead"

    def source(
        self,
        topics: str | Sequence[str] | SpecialTopic,
        timestamp: Timestamp = None,
        *,
        name: str | None = None,
    ) -> Stream:
        """The records of one topic or several; or `changes("shop", "users")` of a database, or
        `events("account-*")` of an event store.

        timestamp: where event time comes from: a field's name, or a function of the value, giving
        seconds since 1970, an aware `datetime` or its ISO 8601 text; None: the message's own
        timestamp; `PROCESSING_TIME`: the clock. Raises `ConfigError`.
        """
        if isinstance(topics, SpecialTopic):
            time_reader(timestamp)
            made = spec.Source((topics.topic,), timestamp, topics)
            special = self._add("source", made, (), name)
            return Stream(self, special, frozenset((topics.topic,)), is_rekeyed=False)
        found = (topics,) if isinstance(topics, str) else tuple(topics)
        if not found or not all(isinstance(topic, str) and topic for topic in found):
            raise ConfigError(f"source({topics!r}): name a topic, or several.", key="source")
        time_reader(timestamp)
        port = self._add("source", spec.Source(found, timestamp), (), name)
        return Stream(self, port, frozenset(found), is_rekeyed=False)

    def table(
        self,
        topic: str,
        timestamp: Timestamp = None,
        *,
        ttl: timedelta | None = None,
        name: str | None = None,
    ) -> Table:
        """A topic as a table: the latest value of each key; None deletes it. ttl: see
        `to_table`."""
        return self.source(topic, timestamp).to_table(ttl=ttl, name=name)

    def describe(self, style: str = "text") -> str:
        """The topology as text, or as a diagram for Mermaid (`style="mermaid"`)."""
        return describe.described(self.topology, style)

    async def start(
        self,
        engine: StreamingEngine | None = None,
        *,
        on_restore: Callable[[str, Progress], None] | None = None,
    ) -> Running:
        """Join the group of the application and work, until `stop`.

        engine: where, if not on the processor's own. on_restore: hears, now and then, how far the
        state of a task (its name) is rebuilt from its changelog, here before this returns too.

        Raises `TopicNotFound` for a source or sink that does not exist, `TopologyChanged` where
        the state was written by another topology, `ConfigError`, `RequestTimeout`, `Misuse`
        without an engine.
        """
        chosen = self.engine if engine is None else engine
        if chosen is None:
            raise Misuse("This processor has no engine: StreamProcessor(engine, application_id).")
        return await start(self, chosen, on_restore)

    def _add(self, kind: str, what: Any, inputs: tuple[Port, ...], name: str | None) -> Port:
        number = len(self._nodes)
        chosen = name or f"{kind}-{number}"
        if not _NAME_CHARS.issuperset(chosen):
            raise ConfigError(
                f"name = {chosen!r}: it is part of topic names, so letters, digits, '.', '_' and"
                " '-' are allowed.",
                key="name",
            )
        if any(node.name == chosen for node in self._nodes):
            raise ConfigError(f"Two steps are named {chosen!r}; choose another name.", key="name")
        self._nodes.append(Node(number, chosen, what, inputs))
        return Port(number)

    def _function(self, what: str, function: object) -> None:
        if not callable(function):
            raise ConfigError(f"{what}({function!r}): give a function.", key=what)


@dataclass(frozen=True)
class Stream:
    """Records with key, value and event time, as one output of a step; each call adds a step.

    Functions may be plain or async; they are given the value.
    """

    processor: StreamProcessor
    port: Port
    sources: frozenset[str]
    """Topics that its records are read from, since the last repartition."""
    is_rekeyed: bool
    """Records of one key may lie in several partitions."""

    # ---- one record after the other

    def filter(self, function: Callable[[Any], Any], *, name: str | None = None) -> Stream:
        """Only the values for which the function is true."""
        return self._step("filter", spec.Filter(self._callable("filter", function)), name)

    def map(
        self,
        function: Callable[..., Any],
        *,
        with_key: bool = False,
        processes: int | None = None,
        name: str | None = None,
    ) -> Stream:
        """What the function makes of each value; with_key: it is given key and value.

        processes: for functions that take long: it is called in so many processes beside this
        one, so it is a function of a module, and given the value only. Raises `ConfigError`.
        """
        if processes is not None:
            check_pooled(self._callable("map", function), processes)
            if with_key:
                raise ConfigError("map(processes=…) gives the value only.", key="with_key")
            return self._step("map", spec.PooledMap(function, processes), name)
        return self._step("map", spec.Map(self._callable("map", function), with_key), name)

    def flat_map(
        self, function: Callable[[Any], Iterable[Any]], *, name: str | None = None
    ) -> Stream:
        """The values, any number, that the function makes of each."""
        return self._step("flat_map", spec.FlatMap(self._callable("flat_map", function)), name)

    def peek(
        self, function: Callable[..., Any], *, with_key: bool = False, name: str | None = None
    ) -> Stream:
        """The same records; the function sees each."""
        return self._step("peek", spec.Peek(self._callable("peek", function), with_key), name)

    def map_batches(
        self,
        function: Callable[[Any], Any],
        *,
        columns: str = "list",
        name: str | None = None,
    ) -> Stream:
        """For speed: the function is given the values of a whole batch, and returns as many.

        columns: as what: `"list"` of values, `"dict"` of lists by field, or `"arrow"`: a
        `pyarrow.Table`, where pyarrow is installed; it returns the same kind. Raises
        `ConfigError`.
        """
        check_form(columns)
        made = spec.MapBatches(self._callable("map_batches", function), columns)
        return self._step("map_batches", made, name)

    def key_by(self, key: str | Callable[[Any], Any], *, name: str | None = None) -> Stream:
        """Other keys: a field's name, or a function of the value.

        A key is text, bytes, a number, a tuple of these, or None. Before the next step that keeps
        state the records go through a repartition topic, so that equal keys meet.
        """
        function = _field_reader(key) if isinstance(key, str) else self._callable("key_by", key)
        port = self.processor._add("key_by", spec.KeyBy(function), (self.port,), name)
        return Stream(self.processor, port, self.sources, is_rekeyed=True)

    def branch(self, *conditions: Callable[[Any], Any], name: str | None = None) -> list[Stream]:
        """One stream for each condition, with the values that satisfy it and none before it, and a
        last one with the rest."""
        if not conditions:
            raise ConfigError("branch() needs a condition at least.", key="branch")
        for condition in conditions:
            self._callable("branch", condition)
        port = self.processor._add("branch", spec.Branch(conditions), (self.port,), name)
        return [self._at(Port(port.node, output)) for output in range(len(conditions) + 1)]

    def merge(self, *others: Stream, name: str | None = None) -> Stream:
        """The records of several streams as one."""
        streams = (self, *others)
        self._same_processor(others)
        ports = tuple(stream.port for stream in streams)
        port = self.processor._add("merge", spec.Merge(), ports, name)
        sources = frozenset().union(*(stream.sources for stream in streams))
        is_rekeyed = any(stream.is_rekeyed for stream in streams)
        return Stream(self.processor, port, sources, is_rekeyed=is_rekeyed)

    # ---- state

    def window(
        self,
        size: timedelta | WindowKind,
        grace: timedelta = NO_GRACE,
        *,
        limit: int = STREAM_WINDOW_VALUES_MAX,
    ) -> WindowedStream:
        """Windows of each key over event time; a `timedelta` means tumbling ones.

        A window's result is sent once, when the event-time watermark has passed its end plus
        `grace`; what comes later is in the `late` stream. limit: values that one window may hold
        where they are kept one by one; more are `WindowTooLarge`. Raises `ConfigError`.
        """
        kind = window_kind(size)
        grace_ms = span_ms(grace, "grace", least=0)
        if limit < 1:
            raise ConfigError(f"limit = {limit}; allowed: 1 or more.", key="limit")
        return WindowedStream(self, kind, grace_ms, limit)

    def aggregate(
        self,
        aggregate: Aggregator | type[Aggregator] | Mapping[str, Any],
        *,
        ttl: timedelta | None = None,
        name: str | None = None,
    ) -> Stream:
        """Without a window: for each record the aggregate of all values of its key so far.

        ttl: a key is forgotten that had no record for so long, in event time.
        """
        found = aggregator_of(aggregate)
        if not isinstance(found, Aggregator):
            raise ConfigError(
                "Without a window() the values have no end, so aggregate() takes an aggregate such"
                " as Count(), not a function of all values.",
                key="aggregate",
            )
        made = spec.RunningAggregate(found, _ttl_ms(ttl))
        return self._together()._step("aggregate", made, name)

    def to_table(self, *, ttl: timedelta | None = None, name: str | None = None) -> Table:
        """The latest value of each key as a table; None deletes it.

        ttl: so does event time, so long after the key's latest record.
        """
        stream = self._together()._step("table", spec.TableOf(_ttl_ms(ttl)), name)
        return Table(stream)

    def join(
        self,
        other: Stream | Table,
        function: Callable[[Any, Any], Any],
        *,
        within: timedelta | None = None,
        grace: timedelta = NO_GRACE,
        how: str = "inner",
        name: str | None = None,
        limit: int = STREAM_WINDOW_VALUES_MAX,
    ) -> Stream:
        """Records of equal key put together by `function(mine, other's)`.

        With a stream: all pairs that lie no further apart than `within`; a record that found none
        is given once with None on the other side when its time is over, if `how` is `"left"` (mine
        only) or `"outer"`. With a table: each of my records with the table's value at that moment;
        `how="left"`: with None where there is none. limit: records of one key and side that may
        be waiting.
        """
        self._callable("join", function)
        if isinstance(other, Table):
            return self._with_table(other, function, within, how, name)
        self._same_processor((other,))
        if within is None:
            raise ConfigError(
                "A join of two streams needs within=: how far apart two records may lie.",
                key="within",
            )
        _one_of("how", how, ("inner", "left", "outer"))
        within_ms = span_ms(within, "within", least=0)
        grace_ms = span_ms(grace, "grace", least=0)
        made = spec.StreamJoin(within_ms, grace_ms, function, how, limit)
        left, right = _brought_together(self, other)
        port = self.processor._add("join", made, (left.port, right.port), name)
        return left._at(port)

    def _with_table(
        self,
        table: Table,
        function: Callable[[Any, Any], Any],
        within: timedelta | None,
        how: str,
        name: str | None,
    ) -> Stream:
        if within is not None:
            raise ConfigError("A join with a table takes no within=.", key="within")
        _one_of("how", how, ("inner", "left"))
        self._same_processor((table.changes,))
        left, right = _brought_together(self, table.changes)
        made = spec.TableLookup(function, how)
        port = self.processor._add("lookup", made, (left.port, right.port), name)
        return left._at(port)

    # ---- ends

    def sink(
        self,
        target: str | Callable[..., Any] | DatabaseSink,
        *,
        with_key: bool = False,
        name: str | None = None,
    ) -> StreamProcessor:
        """Where the records go: a topic, which exists, a `DatabaseSink`, or a function, which is
        called with each value (with_key: key and value). Functions and databases get records
        again after a crash. Returns the processor, to be started."""
        made: Any
        if isinstance(target, str) and target:
            made = spec.Sink(target)
        elif isinstance(target, DatabaseSink):
            made = spec.WriteRows(target)
        elif callable(target):
            made = spec.Peek(target, with_key, is_sink=True)
        else:
            raise ConfigError(
                f"sink({target!r}): name a topic, or give a function or a DatabaseSink.", key="sink"
            )
        self.processor._add("sink", made, (self.port,), name)
        return self.processor

    # ---- inside

    def _step(self, kind: str, made: Any, name: str | None) -> Stream:
        return self._at(self.processor._add(kind, made, (self.port,), name))

    def _at(self, port: Port) -> Stream:
        return Stream(self.processor, port, self.sources, is_rekeyed=self.is_rekeyed)

    def _together(self) -> Stream:
        """With the records of a key in one task."""
        if not self.is_rekeyed and len(self.sources) == 1:
            return self
        (stream,) = _repartitioned(self)
        return stream

    def _callable(self, what: str, function: Any) -> Any:
        self.processor._function(what, function)
        return function

    def _same_processor(self, others: Iterable[Stream]) -> None:
        if any(other.processor is not self.processor for other in others):
            raise Misuse("These streams belong to different processors; use one processor.source.")


@dataclass(frozen=True)
class WindowedStream:
    """A stream in windows; `aggregate` says what becomes of them."""

    stream: Stream
    kind: WindowKind
    grace_ms: int
    limit: int

    def aggregate(
        self,
        aggregate: Any,
        *,
        late: Callable[[Stream], object] | None = None,
        early: Callable[[Stream], object] | None = None,
        every: timedelta | None = None,
        name: str | None = None,
    ) -> Stream:
        """One result for each window of each key: what a function makes of the window's values (a
        `Window`, in event-time order), or an incremental aggregate: `Count()`, `Sum("amount")`,
        `Avg`, `Min`, `Max`, an `Aggregator` of your own, or a dict of them.

        late: called with the stream of records that came after their window's result, for example
        `late=lambda stream: stream.sink("late")`; without it they are counted and dropped. early,
        every: called with the stream of results so far, of the windows that have changed, each
        time event time has gone on by `every`. The results' event time is the last millisecond of
        their window. Raises `ConfigError`.
        """
        if (early is None) != (every is None):
            raise ConfigError(
                "Results so far need both: early=, where they go, and every=, how often.",
                key="early",
            )
        early_ms = None if every is None else span_ms(every, "every")
        found = aggregator_of(aggregate)
        made = spec.WindowAggregate(self.kind, self.grace_ms, found, self.limit, early_ms)
        results = self.stream._together()._step("window", made, name)
        if late is not None:
            late(results._at(Port(results.port.node, 1)))
        if early is not None:
            early(results._at(Port(results.port.node, 2)))
        return results

    def reduce(
        self,
        combine: Callable[[Any, Any], Any],
        *,
        late: Callable[[Stream], object] | None = None,
        name: str | None = None,
    ) -> Stream:
        """One result for each window of each key: `combine(so far, value)`, from its first value
        on."""
        self.stream._callable("reduce", combine)
        return self.aggregate(Reduce(combine), late=late, name=name)


@dataclass(frozen=True)
class Table:
    """The latest value of each key. `changes` is the stream of what changes in it."""

    changes: Stream

    def join(
        self,
        other: Table,
        function: Callable[[Any, Any], Any],
        *,
        how: str = "inner",
        name: str | None = None,
    ) -> Table:
        """Two tables as one: `function(mine, other's)` for each key that both have (`"left"`: that
        mine has, `"outer"`: that one has, with None for what is missing)."""
        self.changes._callable("join", function)
        _one_of("how", how, ("inner", "left", "outer"))
        self.changes._same_processor((other.changes,))
        left, right = _brought_together(self.changes, other.changes)
        made = spec.TableJoin(function, how)
        processor = self.changes.processor
        port = processor._add("join", made, (left.port, right.port), name)
        return Table(left._at(port))

    def sink(
        self,
        target: str | Callable[..., Any] | DatabaseSink,
        *,
        with_key: bool = False,
        name: str | None = None,
    ) -> StreamProcessor:
        """Where its changes go; a deleted key's value is None."""
        return self.changes.sink(target, with_key=with_key, name=name)


def _repartitioned(*streams: Stream) -> list[Stream]:
    """The same streams through one topic, with equal keys in one partition."""
    processor = streams[0].processor
    ports = tuple(stream.port for stream in streams)
    port = processor._add("keys", spec.Repartition(), ports, None)
    topic = f"{processor.application_id}.{processor._nodes[port.node].name}.repartition"
    return [
        Stream(processor, Port(port.node, output), frozenset({topic}), is_rekeyed=False)
        for output in range(len(streams))
    ]


def _brought_together(left: Stream, right: Stream) -> list[Stream]:
    """Both in the same tasks: a task reads one partition only, so two topics become one."""
    if len(left.sources | right.sources) == 1 and not (left.is_rekeyed or right.is_rekeyed):
        return [left, right]
    return _repartitioned(left, right)


def _field_reader(name: str) -> Callable[[Any], Any]:
    return lambda value: value[name]


def _ttl_ms(ttl: timedelta | None) -> int | None:
    return None if ttl is None else span_ms(ttl, "ttl")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} = {value!r}; allowed: {', '.join(map(repr, allowed))}.", key=key)
