"""Adya's anomalies in histories of transactions over lists: G0, G1a, G1b and G1c.

The idea (Adya 1999; Elle, VLDB 2020): a transaction appends values to lists and reads whole lists.
Every value is appended once, so a list that somebody has read tells in which order its values were
appended, and whose they are. That gives two kinds of edges between transactions:

    ww  its value stands in a list right before the other's
    wr  the other one has read its value

- G0, a write cycle: a cycle of ww edges.
- G1a, an aborted read: somebody has read a value of a transaction that was aborted.
- G1b, an intermediate read: somebody has read a part of what a transaction appended to a list.
- G1c, circular information flow: a cycle of ww and wr edges with a wr edge in it.

And `incompatible-order`: two reads of one list of which neither begins the other.

The rule it protects: a transaction whose outcome is unknown counts as committed as soon as
somebody has read of it, and not before.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence


class Status(Enum):
    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


class Appended(NamedTuple):
    key: Hashable
    value: Hashable


class Observed(NamedTuple):
    """A list as it was read, from its beginning."""

    key: Hashable
    values: tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class ListTransaction:
    """name: for sentences; no two have the same."""

    name: str
    status: Status
    ops: tuple[Appended | Observed, ...]


class Anomaly(NamedTuple):
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


EDGES_TRIED: Final = 20
"""The shortest cycle through one of so many edges is told; any would do."""

Graph = dict[str, dict[str, str]]
"""From whom to whom, and why."""


def find_anomalies(
    transactions: Sequence[ListTransaction],
    orders: Mapping[Any, Sequence[Any]] | None = None,
    *,
    writers_are_ordered: bool = True,
) -> list[Anomaly]:
    """Everything that is wrong; empty: the history is one of read committed.

    orders: each list as it is in the end, where that is known; otherwise the longest read counts.
    writers_are_ordered: False where the system lets two transactions write to the same lists in
    different orders, as Kafka's model does: ww edges say nothing then, so there is no G0, and G1c
    is a cycle of wr edges. Raises `ValueError` for a value that was appended twice.
    """
    return list(_Judge(transactions, orders or {}, writers_are_ordered).judge())


class _Judge:
    def __init__(
        self,
        transactions: Sequence[ListTransaction],
        orders: Mapping[Hashable, Sequence[Hashable]],
        writers_are_ordered: bool,
    ) -> None:
        self.transactions = {one.name: one for one in transactions}
        self.writers_are_ordered = writers_are_ordered
        self.writer: dict[tuple[Hashable, Hashable], str] = {}
        self.written: defaultdict[tuple[str, Hashable], list[Hashable]] = defaultdict(list)
        """(transaction, list) -> its values, in its order."""
        for one in transactions:
            for op in one.ops:
                if isinstance(op, Appended):
                    self._note_append(one.name, op)
        self.orders = {key: list(values) for key, values in orders.items()}
        for _, op in self._reads():
            if op.key not in orders and len(op.values) > len(self.orders.get(op.key, ())):
                self.orders[op.key] = list(op.values)

    def _note_append(self, name: str, op: Appended) -> None:
        if (op.key, op.value) in self.writer:
            raise ValueError(f"{op.value!r} was appended to {op.key!r} twice.")
        self.writer[op.key, op.value] = name
        self.written[name, op.key].append(op.value)

    def _reads(self) -> Iterator[tuple[str, Observed]]:
        """Those that count: an aborted transaction's are as good, for it saw what it saw."""
        for one in self.transactions.values():
            for op in one.ops:
                if isinstance(op, Observed):
                    yield one.name, op

    def judge(self) -> Iterator[Anomaly]:
        yield from self._incompatible_orders()
        yield from self._aborted_reads()
        yield from self._intermediate_reads()
        ww = self._write_edges() if self.writers_are_ordered else {}
        for cycle in _cycles(ww):
            yield Anomaly("G0", _told(cycle, ww))
        wr = self._read_edges()
        both = _merged(ww, wr)
        for cycle in _cycles(both, through=wr):
            yield Anomaly("G1c", _told(cycle, both))

    def _incompatible_orders(self) -> Iterator[Anomaly]:
        for name, op in self._reads():
            order = self.orders.get(op.key, [])
            if list(op.values) != order[: len(op.values)]:
                yield Anomaly(
                    "incompatible-order",
                    f"{name} has read {op.key!r} as {_short(op.values)}, and it is"
                    f" {_short(order[: len(op.values) + 1])}",
                )

    def _aborted_reads(self) -> Iterator[Anomaly]:
        told = set()
        for name, op in self._reads():
            for value in op.values:
                writer = self.writer.get((op.key, value))
                if writer is None:
                    told.add((op.key, value, f"{name} has read what nobody wrote"))
                elif writer != name and self.transactions[writer].status is Status.ABORTED:
                    told.add((op.key, value, f"{name} has read of {writer}, which was aborted"))
        for key, value, text in sorted(told, key=repr):
            yield Anomaly("G1a", f"{text}: {value!r} in {key!r}")

    def _intermediate_reads(self) -> Iterator[Anomaly]:
        for name, op in self._reads():
            there = set(op.values)
            for writer in sorted({self.writer.get((op.key, v), name) for v in op.values} - {name}):
                if self.transactions[writer].status is Status.ABORTED:
                    continue  # told as G1a
                lacking = [v for v in self.written[writer, op.key] if v not in there]
                if lacking:
                    yield Anomaly(
                        "G1b",
                        f"{name} has read a part of {writer} in {op.key!r}, and not"
                        f" {_short(lacking)}",
                    )

    def _write_edges(self) -> Graph:
        graph: Graph = defaultdict(dict)
        for key, order in self.orders.items():
            before: str | None = None
            for value in order:
                writer = self.writer.get((key, value))
                if writer is None or self.transactions[writer].status is Status.ABORTED:
                    continue  # told as G1a
                if before not in (None, writer):
                    graph[str(before)].setdefault(writer, f"ww {value!r} in {key!r}")
                before = writer
        return graph

    def _read_edges(self) -> Graph:
        """From whoever appended what was read last; the others are before that one by ww, or, where
        writers are not ordered, by an edge each."""
        graph: Graph = defaultdict(dict)
        for name, op in self._reads():
            if self.transactions[name].status is Status.ABORTED:
                continue
            values = op.values[-1:] if self.writers_are_ordered else op.values
            for value in values:
                writer = self.writer.get((op.key, value))
                if writer not in (None, name):
                    graph[str(writer)].setdefault(name, f"wr {value!r} in {op.key!r}")
        return graph


def _merged(one: Graph, other: Graph) -> Graph:
    """Both; a wr edge is told before a ww edge of the same two."""
    graph: Graph = defaultdict(dict)
    for edges in (one, other):
        for source, targets in edges.items():
            graph[source].update(targets)
    return graph


def _cycles(graph: Graph, *, through: Graph | None = None) -> Iterator[list[str]]:
    """A short cycle for each group of transactions that reach each other; through: only cycles with
    one of these edges in it."""
    for part in _strong_parts(graph):
        sources = sorted(part)
        edges = [
            (source, target)
            for source in sources
            for target in (through if through is not None else graph).get(source, {})
            if target in part
        ]
        found = [_way(graph, part, target, source) for source, target in edges[:EDGES_TRIED]]
        if found:
            yield min(found, key=len)


def _way(graph: Graph, part: set[str], start: str, end: str) -> list[str]:
    """A shortest way from one to another of the same strong part."""
    before: dict[str, str] = {start: start}
    queue = deque([start])
    while end not in before:
        at = queue.popleft()
        for target in graph.get(at, {}):
            if target in part and target not in before:
                before[target] = at
                queue.append(target)
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def _strong_parts(graph: Graph) -> Iterator[set[str]]:
    """Groups of two or more that all reach each other (Tarjan 1972, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in list(graph):
        if root in index:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(list(graph.get(root, {}))))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            at, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[at])
                if low[at] == index[at]:
                    place = stack.index(at)
                    part = set(stack[place:])
                    del stack[place:]
                    on_stack -= part
                    if len(part) > 1:
                        yield part
            elif target not in index:
                index[target] = low[target] = len(index)
                stack.append(target)
                on_stack.add(target)
                work.append((target, iter(list(graph.get(target, {})))))
            elif target in on_stack:
                low[at] = min(low[at], index[target])


def _told(cycle: Sequence[str], graph: Graph) -> str:
    """The cycle in words, closed."""
    steps = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    return f"{cycle[0]}" + "".join(f" -({graph[a][b]})-> {b}" for a, b in steps)


def _short(values: Iterable[Hashable]) -> str:
    shown = list(values)
    return repr(shown if len(shown) <= 6 else ["...", *shown[-5:]])
