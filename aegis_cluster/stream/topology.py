"""A topology as a plain value: what a processor does, without anything that runs.

The idea: operators are nodes, and each names the outputs that feed it. What runs together is cut
at *repartition topics*: everything that reads one topic up to the next such cut is done by one
*task* for each partition of that topic. A task reads one partition and nothing else, so the order
in which it sees records is the order of a log, and a replay gives the same results.

The rule it protects: a step that keeps state reads one topic only, with the records of a key in
one partition. Where keys were changed, or several topics meet, a repartition topic comes first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from aegis_cluster.stream.aggregates import Aggregator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aegis_cluster.stream.windows import WindowKind


class Port(NamedTuple):
    """One output of a node: most have only 0."""

    node: int
    output: int = 0


class Read(NamedTuple):
    """A record of a special topic: its offset, and key, value and event time that come of it."""

    offset: int
    key: Any
    value: Any
    time_ms: int


@dataclass(frozen=True, slots=True)
class SpecialTopic:
    """A topic whose records are not what the processor is given: a feed of changes, or a store of
    events. read: what a `MessageBatch` of it holds, in order; nothing for what is left out."""

    topic: str
    read: Callable[[Any], Iterable[Read]]


@dataclass(frozen=True, slots=True)
class Source:
    """Topics; event time by `timestamp` (a field, a function, or None: the message's). reader:
    what makes values of the topics' batches, where they are no plain messages."""

    topics: tuple[str, ...]
    timestamp: Any = None
    reader: SpecialTopic | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Keeps values for which the function is true."""

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Map:
    """Another value for each; with_key: the function is given key and value."""

    function: Callable[..., Any]
    with_key: bool = False


@dataclass(frozen=True, slots=True)
class FlatMap:
    """Any number of values for each."""

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Peek:
    """Looks on; a sink that is a function is one too."""

    function: Callable[..., Any]
    with_key: bool = False
    is_sink: bool = False


@dataclass(frozen=True, slots=True)
class WriteRows:
    """A sink that is a database."""

    target: Any


@dataclass(frozen=True, slots=True)
class MapBatches:
    """Another value for each, a whole batch at a time. columns: what the function is given and
    returns: `"list"` of values, `"dict"` of lists by field, or an `"arrow"` table."""

    function: Callable[..., Any]
    columns: str = "list"


@dataclass(frozen=True, slots=True)
class PooledMap:
    """Another value for each, made by so many processes beside this one."""

    function: Callable[..., Any]
    processes: int


@dataclass(frozen=True, slots=True)
class KeyBy:
    """Another key for each."""

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Branch:
    """Output n has what satisfies condition n and none before; the last output has the rest."""

    conditions: tuple[Callable[[Any], Any], ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """Records of several streams, in the order in which their origins were read."""


@dataclass(frozen=True, slots=True)
class Repartition:
    """Through a topic of the application, so that records of one key meet in one partition.

    Each input has an output of its own with its records.
    """


@dataclass(frozen=True, slots=True)
class WindowAggregate:
    """Output 0: a result for each window of each key; output 1: records that came too late; output
    2: results so far, each time event time has gone on by `early_ms`, of what has changed.

    aggregate: an `Aggregator`, or a function of the window's values. limit: of those.
    """

    window: WindowKind
    grace_ms: int
    aggregate: Aggregator | Callable[..., Any]
    limit: int
    early_ms: int | None = None


@dataclass(frozen=True, slots=True)
class RunningAggregate:
    """Output 0: for each record the aggregate of its key so far. ttl_ms: a key is forgotten that
    has had no record for so long, in event time."""

    aggregate: Aggregator
    ttl_ms: int | None = None


@dataclass(frozen=True, slots=True)
class TableOf:
    """The latest value of each key; None deletes it. ttl_ms: so does event time, so long after the
    key's latest record."""

    ttl_ms: int | None = None


@dataclass(frozen=True, slots=True)
class StreamJoin:
    """Pairs of equal key that lie no further apart than `within_ms`. Output 1: late records."""

    within_ms: int
    grace_ms: int
    function: Callable[[Any, Any], Any]
    how: str
    limit: int


@dataclass(frozen=True, slots=True)
class TableLookup:
    """Each record of input 0 with what the table of input 1 has for its key at that moment."""

    function: Callable[[Any, Any], Any]
    how: str


@dataclass(frozen=True, slots=True)
class TableJoin:
    """Two tables as one: changes when either does."""

    function: Callable[[Any, Any], Any]
    how: str


@dataclass(frozen=True, slots=True)
class Sink:
    """A topic that results are sent to."""

    topic: str


STATEFUL = (WindowAggregate, RunningAggregate, TableOf, StreamJoin, TableLookup, TableJoin)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. number: its place in the topology; inputs: the outputs that feed it."""

    number: int
    name: str
    spec: Any
    inputs: tuple[Port, ...]

    @property
    def is_stateful(self) -> bool:
        """Whether it keeps something between records."""
        return isinstance(self.spec, STATEFUL)

    @property
    def shape(self) -> str:
        """What its state depends on, as text: another shape cannot read it."""
        spec = self.spec
        kind = type(spec).__name__
        if isinstance(spec, WindowAggregate):
            aggregate = spec.aggregate
            form = aggregate.form if isinstance(aggregate, Aggregator) else "values"
            return f"{kind} {spec.window} grace {spec.grace_ms} ms of {form}"
        if isinstance(spec, RunningAggregate):
            return f"{kind} of {spec.aggregate.form}{_until(spec.ttl_ms)}"
        if isinstance(spec, TableOf):
            return f"{kind}{_until(spec.ttl_ms)}"
        if isinstance(spec, StreamJoin):
            return f"{kind} within {spec.within_ms} ms grace {spec.grace_ms} ms {spec.how}"
        return kind


def _until(ttl_ms: int | None) -> str:
    return "" if ttl_ms is None else f", kept {ttl_ms} ms"


@dataclass(frozen=True)
class Topology:
    """All operators of an application, inputs before those that they feed."""

    application_id: str
    nodes: tuple[Node, ...]
    _feeds: dict[Port, list[Node]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        feeds: dict[Port, list[Node]] = {}
        for node in self.nodes:
            for port in node.inputs:
                feeds.setdefault(port, []).append(node)
        object.__setattr__(self, "_feeds", feeds)

    def fed_by(self, port: Port) -> list[Node]:
        """What an output goes to."""
        return self._feeds.get(port, [])

    def repartition_topic(self, node: Node) -> str:
        """The name of its topic."""
        return f"{self.application_id}.{node.name}.repartition"

    def changelog_topic(self, topic: str) -> str:
        """Where the tasks of a topic keep their state."""
        own = topic.removeprefix(f"{self.application_id}.")
        return f"{self.application_id}.{own}.changelog"

    @property
    def progress_topic(self) -> str:
        """Where processes tell each other how far event time has come."""
        return f"{self.application_id}.progress"

    @property
    def questions_topic(self) -> str:
        """Where processes ask each other about state."""
        return f"{self.application_id}.questions"

    @property
    def source_topics(self) -> list[str]:
        """What others write and this reads, in order."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node.spec, Source):
                found.update(node.spec.topics)
        return sorted(found)

    @property
    def repartitions(self) -> dict[str, Node]:
        """Repartition nodes by topic, in order of the nodes."""
        return {
            self.repartition_topic(node): node
            for node in self.nodes
            if isinstance(node.spec, Repartition)
        }

    @property
    def task_topics(self) -> list[str]:
        """All topics that tasks read."""
        return [*self.source_topics, *self.repartitions]

    @property
    def sink_topics(self) -> list[str]:
        """What this writes and others read, in order."""
        return sorted({node.spec.topic for node in self.nodes if isinstance(node.spec, Sink)})

    def roots(self, topic: str) -> list[Node]:
        """The nodes where the tasks of a topic begin."""
        repartition = self.repartitions.get(topic)
        if repartition is not None:
            return [repartition]
        return [
            node
            for node in self.nodes
            if isinstance(node.spec, Source) and topic in node.spec.topics
        ]

    def steps(self, topic: str) -> list[Node]:
        """What the tasks of a topic do, in order; a repartition node that is no root is where they
        end."""
        roots = {node.number for node in self.roots(topic)}
        reached = set(roots)
        for node in self.nodes:
            if any(
                port.node in reached and self._goes_on(port.node, roots) for port in node.inputs
            ):
                reached.add(node.number)
        return [node for node in self.nodes if node.number in reached]

    def _goes_on(self, number: int, roots: set[int]) -> bool:
        return number in roots or not isinstance(self.nodes[number].spec, Repartition)

    def stateful(self, topic: str) -> list[Node]:
        """Of these those that keep state."""
        return [node for node in self.steps(topic) if node.is_stateful]

    def shape_of(self, topic: str) -> dict[str, str]:
        """What the state of a topic's tasks was made by: node and shape by number."""
        return {str(n.number): f"{n.name}: {n.shape}" for n in self.stateful(topic)}

    def upstream(self, topic: str) -> Iterator[str]:
        """The topics whose tasks write to this repartition topic."""
        node = self.repartitions.get(topic)
        if node is None:
            return
        for other in self.task_topics:
            steps = self.steps(other)
            if node in steps and node not in self.roots(other):
                yield other
