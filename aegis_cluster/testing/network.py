"""A network in memory: connections that lose, delay, repeat and reorder, hosts cut off from others.

The idea: it has ZeroMQ's shape as far as a shard or a client can see it. Whoever dials has a
connection of its own, hears when it is up and when it broke, and throws it away then; whoever is
dialled knows an origin and can reply to it. Below that, everything may go wrong: a cut swallows
messages of one direction in silence, and breaks connections only after a while; a process that
ends resets its connections at once, a machine that dies resets nothing.

The rule it protects: all chance comes from the one generator that was handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from aegis_cluster.testing.scheduler import MS, SECOND, Runaway

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from aegis_cluster.broker.transport import Listener
    from aegis_cluster.testing.scheduler import Scheduler
    from aegis_cluster.wire.protocol import Part

RECONNECT_US: Final = 50 * MS
RECONNECT_US_MAX: Final = 500 * MS
MESSAGES_PER_SECOND_MAX: Final = 20_000
"""Sent, of virtual time; the busiest of healthy runs come to a tenth of it."""
UNDER_WAY_BYTES_MAX: Final = 64 * 1024 * 1024
"""Sent and not yet there; healthy runs have less than 1 MiB."""


class Port(NamedTuple):
    """Where a process can be reached: its machine, and which of its shards (clients have one)."""

    machine: int
    shard: int = 0


class Sink(Protocol):
    """The side that dialled."""

    def connected(self) -> None: ...

    def lost(self) -> None: ...

    def received(self, message: Sequence[Part]) -> None: ...


class Host(Protocol):
    """The side that is dialled: one shard process of one node."""

    @property
    def accepts(self) -> bool:
        """Whether its process is up and running (a paused one shakes no hands)."""

    @property
    def boot(self) -> int:
        """Number of the process's start; connections end with it."""

    def requested(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> None: ...


@dataclass(slots=True)
class NetworkFaults:
    """What the network does to messages; shares between 0 and 1, times in microseconds."""

    latency_us: int = 200
    jitter_us: int = 300
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    """Share of messages that others may overtake, up to `late_us` later."""
    late_us: int = 200 * MS
    slow: float = 0.0
    """Share of messages that take up to `slow_us` longer."""
    slow_us: int = 300 * MS


@dataclass(slots=True)
class Repeats:
    """Requests of some clients come once more, late, over a connection of their own.

    It has a generator of its own, so that runs without it stay what they were.
    """

    rng: random.Random
    share: float
    shortest_us: int = 1 * SECOND
    longest_us: int = 60 * SECOND
    machines: set[int] = field(default_factory=set)
    """Whose requests; asked for membership only."""
    until_us: int = 0
    """When the last of them arrives."""
    count: int = 0


@dataclass(slots=True, eq=False)
class Connection:
    """One attempt after the other until it stands, then alive until it breaks."""

    network: Network
    source: Port
    target: Port
    listener: Listener
    sink: Sink
    origin: bytes
    repeats: bool = True
    """Messages may arrive twice. Not for clients: a refusal says that *this* request was not
    carried out, so a request that TCP brings once must not come again."""
    boot: int = 0
    up: bool = False
    closed: bool = False
    arrivals: list[int] = field(default_factory=lambda: [0, 0])
    """Latest planned arrival: at the target, at the source."""
    greeted: list[bool] = field(default_factory=lambda: [False, False])
    """A connection that has just been made loses no greeting: TCP would have broken it."""
    greeting: list[bytes] = field(default_factory=list)
    """What it began with, where requests may be repeated."""

    def send(self, message: Sequence[Part]) -> bool:
        """False = it did not leave and never will."""
        if not self.up or self.closed:
            return False
        self.network.carry(self, message, to_target=True)
        return True

    def close(self) -> None:
        """Forget it, and everything that is on its way back."""
        self.closed = True
        self.up = False
        self.network.forget(self)


class Network:
    """Hosts by port, and the connections between them."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self.faults = NetworkFaults()
        self.repeats: Repeats | None = None
        self.cuts: set[tuple[int, int]] = set()
        """(from, to) pairs of machines that nothing passes; asked for membership only."""
        self.messages = 0
        self.bytes_under_way = 0
        self._second_ends_us = SECOND
        self._this_second = 0
        self._scheduler = scheduler
        self._rng = rng
        self._hosts: dict[Port, Host] = {}
        self._connections: dict[bytes, Connection] = {}
        self._count = 0

    def add(self, port: Port, host: Host) -> None:
        """Put a host on the network, so that others can dial it."""
        self._hosts[port] = host

    # ---- connections

    def dial(
        self, source: Port, target: Port, listener: Listener, sink: Sink, *, repeats: bool = True
    ) -> Connection:
        """Begin to connect; `sink` hears of it."""
        self._count += 1
        origin = b"%d-%d" % (source.machine, self._count)
        connection = Connection(self, source, target, listener, sink, origin, repeats)
        self._scheduler.after(self._latency(), self._attempt, connection, RECONNECT_US)
        return connection

    def _attempt(self, connection: Connection, pause_us: int) -> None:
        if connection.closed:
            return
        host = self._hosts.get(connection.target)
        if host is not None and host.accepts and self._open_both_ways(connection):
            connection.up = True
            connection.boot = host.boot
            self._connections[connection.origin] = connection
            connection.sink.connected()
            return
        self._scheduler.after(
            pause_us, self._attempt, connection, min(2 * pause_us, RECONNECT_US_MAX)
        )

    def _open_both_ways(self, connection: Connection) -> bool:
        there = (connection.source.machine, connection.target.machine)
        return there not in self.cuts and there[::-1] not in self.cuts

    def forget(self, connection: Connection) -> None:
        self._connections.pop(connection.origin, None)

    def reply(self, origin: bytes, boot: int, message: Sequence[Part]) -> bool:
        """Answer whoever asked, if the connection it came on still stands."""
        connection = self._connections.get(origin)
        if connection is None or connection.boot != boot:
            return False
        self.carry(connection, message, to_target=False)
        return True

    def process_ended(self, port: Port, *, silent: bool, notice_us: int) -> None:
        """All connections of a process end; with a reset, or only after a while."""
        for connection in list(self._connections.values()):
            if connection.source == port:
                connection.close()
            elif connection.target == port:
                delay_us = notice_us if silent else self._latency()
                self._scheduler.after(delay_us, self.break_up, connection)

    def break_up(self, connection: Connection) -> None:
        """The side that dialled finds its connection broken."""
        if not connection.closed:
            connection.close()
            connection.sink.lost()

    def cut(self, pairs: Sequence[tuple[int, int]], *, break_after_us: int | None) -> None:
        """Let nothing pass from each first to each second host, until `mend`."""
        self.cuts.update(pairs)
        if break_after_us is not None:
            self._scheduler.after(break_after_us, self._break_cut)

    def _break_cut(self) -> None:
        for connection in list(self._connections.values()):
            if not self._open_both_ways(connection):
                self.break_up(connection)

    def mend(self) -> None:
        """Everybody reaches everybody again."""
        self.cuts.clear()

    def reset_some(self, share: float) -> None:
        """Break connections for no reason."""
        for connection in list(self._connections.values()):
            if self._rng.random() < share:
                self.break_up(connection)

    # ---- messages

    def carry(self, connection: Connection, message: Sequence[Part], *, to_target: bool) -> None:
        """Bring one message over, or lose it, or bring it twice."""
        self._watch_for_storms()
        faults = self.faults
        way = 0 if to_target else 1
        is_greeting, connection.greeted[way] = not connection.greeted[way], True
        if faults.loss and not is_greeting and self._rng.random() < faults.loss:
            return
        repeats = connection.repeats and faults.duplication
        copies = 2 if repeats and self._rng.random() < faults.duplication else 1
        parts = [bytes(part) for part in message]
        if to_target and self.repeats is not None:
            self._maybe_repeat(self.repeats, connection, parts, is_greeting=is_greeting)
        for _ in range(copies):
            self.bytes_under_way += sum(map(len, parts))
            delay_us = self._arrival(connection, way) - self._scheduler.now_us
            self._scheduler.after(delay_us, self._arrive, connection, parts, to_target)

    def _maybe_repeat(
        self, repeats: Repeats, connection: Connection, parts: list[bytes], *, is_greeting: bool
    ) -> None:
        """Keep a copy of a client's request, to be delivered after a second or a minute."""
        if connection.source.machine not in repeats.machines:
            return
        if is_greeting:
            connection.greeting = parts
        elif repeats.rng.random() < repeats.share:
            span = repeats.longest_us - repeats.shortest_us
            delay_us = repeats.shortest_us + int(span * repeats.rng.random() ** 4)
            repeats.until_us = max(repeats.until_us, self._scheduler.now_us + delay_us)
            messages = (connection.greeting, parts)
            self._scheduler.after(
                delay_us, self._repeat, repeats, connection.target, connection.listener, messages
            )

    def _repeat(
        self,
        repeats: Repeats,
        target: Port,
        listener: Listener,
        messages: Sequence[Sequence[bytes]],
    ) -> None:
        host = self._hosts[target]
        if not host.accepts:
            return
        self._count += 1
        for message in messages:
            self._scheduler.note(message)
            host.requested(listener, b"late-%d" % self._count, message)
        repeats.count += 1

    def repeat_requests_of(self, machine: int) -> None:
        """Let requests of this machine be repeated, if there are repeats in this run."""
        if self.repeats is not None:
            self.repeats.machines.add(machine)

    def _watch_for_storms(self) -> None:
        """A storm of messages ends the run."""
        now_us = self._scheduler.now_us
        if now_us >= self._second_ends_us:
            self._second_ends_us = now_us + SECOND
            self._this_second = 0
        self._this_second += 1
        if self._this_second > MESSAGES_PER_SECOND_MAX:
            raise Runaway(
                f"more than {MESSAGES_PER_SECOND_MAX} messages in a second, at {now_us} us"
            )
        if self.bytes_under_way > UNDER_WAY_BYTES_MAX:
            raise Runaway(f"more than {UNDER_WAY_BYTES_MAX} bytes are under way, at {now_us} us")

    def _arrival(self, connection: Connection, way: int) -> int:
        """When it gets there: after all before it, unless it overtakes."""
        faults = self.faults
        time_us = self._scheduler.now_us + self._latency()
        if faults.slow and self._rng.random() < faults.slow:
            time_us += self._rng.randrange(faults.slow_us)
        if faults.reordering and self._rng.random() < faults.reordering:
            return time_us + int(self._rng.random() ** 2 * faults.late_us)
        connection.arrivals[way] = time_us = max(time_us, connection.arrivals[way])
        return time_us

    def _latency(self) -> int:
        return self.faults.latency_us + int(self._rng.random() * self.faults.jitter_us)

    def _arrive(self, connection: Connection, message: list[bytes], to_target: bool) -> None:
        self.bytes_under_way -= sum(map(len, message))
        way = (connection.source.machine, connection.target.machine)
        if connection.closed or (way if to_target else way[::-1]) in self.cuts:
            return
        self.messages += 1
        self._scheduler.note(message)
        if not to_target:
            connection.sink.received(message)
            return
        host = self._hosts[connection.target]
        if host.boot == connection.boot:
            host.requested(connection.listener, connection.origin, message)
