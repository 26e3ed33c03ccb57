"""All transactional clients of one run, and the trouble that they have.

The rule it protects: all chance comes from a generator of its own, so that runs without
transactions stay what they were.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError
from aegis_cluster.ids import GROUPS_TOPIC, TRANSACTIONS_TOPIC, TopicPartition
from aegis_cluster.testing.history import History
from aegis_cluster.testing.scheduler import MS, SECOND
from aegis_cluster.testing.sessions import CLIENT_HOSTS, RETRY_US, Producer, Session, Topic
from aegis_cluster.testing.transactions.auditor import Auditor, LastReader
from aegis_cluster.testing.transactions.client import Client
from aegis_cluster.testing.transactions.history import Position, TransactionHistory
from aegis_cluster.testing.transactions.worker import (
    ACCOUNTS,
    BALANCES,
    GROUP,
    ORDERS,
    RESULTS,
    Teller,
    Worker,
)
from aegis_cluster.wire.protocol import Api

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.testing.network import Network
    from aegis_cluster.testing.plan import TransactionLoad
    from aegis_cluster.testing.scheduler import Scheduler
    from aegis_cluster.testing.transactions.client import Work
    from aegis_cluster.wire.protocol import Reply

LIVES_MAX: Final = 12
"""Processes of one transactional id, one after the other."""
SETTLE_US: Final = 5 * SECOND
"""After its time-out, a transaction that nobody ends is to be gone within so long."""
LATEST_US: Final = 70 * SECOND
"""Packets that are repeated come within so long."""


class TopicMaker(Session):
    """Makes several topics, those of the cluster's own too, and learns where they are."""

    def __init__(
        self, *, topics: dict[str, Topic], wanted: dict[str, tuple[int, str]], **rest: Any
    ) -> None:
        """wanted: partitions and clean-up of each topic that is not the cluster's own."""
        super().__init__(**rest)
        self._found = topics
        self._wanted = wanted
        self._left = sorted(topics)
        self._later(0, self._make)

    @property
    def done(self) -> bool:
        return all(topic.groups for topic in self._found.values())

    def _make(self) -> None:
        name = self._left[0]
        if name not in self._wanted:
            self._ask(self._any_node(), Api.INTERNAL_TOPIC, [name], self._made)
            return
        partitions, cleanup = self._wanted[name]
        settings = ["topic", None, None, cleanup, "none", 1_000_000]
        fields = [name, partitions, min(3, self._nodes), settings, "token"]
        self._ask(self._any_node(), Api.CREATE_TOPIC, fields, self._made)

    def _made(self, result: Reply | AegisError) -> None:
        if isinstance(result, AegisError):
            self._later(RETRY_US, self._make)
            return
        self._left.pop(0)
        if self._left:
            self._make()
        else:
            self._learn()

    def _learn(self) -> None:
        fields = [0, sorted(self._found)]
        self._ask(self._any_node(), Api.METADATA, fields, self._learned)

    def _learned(self, result: Reply | AegisError) -> None:
        if not isinstance(result, AegisError):
            for topic in self._found.values():
                topic.learn(result.fields)
        if not self.done:
            self._later(RETRY_US, self._learn)


class _Watcher(Client):
    """Asks for the group's positions, again and again: they must not go back."""

    def __init__(self, *, record: TransactionHistory, **rest: Any) -> None:
        super().__init__(**rest)
        self.positions: dict[TopicPartition, int] = {}
        self.ends: dict[TopicPartition, int] = {}
        self._record = record
        self.begin(self._watch())
        for place in self.places(ORDERS):
            self.begin(self._watch_end(place))

    def _watch_end(self, place: TopicPartition) -> Work[None]:
        group = self.topics[place.topic].groups[place.partition]
        while True:
            result = yield from self.ask(place, Api.LIST_OFFSETS, [[group]], within_us=SECOND)
            if not isinstance(result, AegisError):
                self.ends[place] = result.fields[0][0][2]
            yield from self.sleep(200 * MS)

    def _watch(self) -> Work[None]:
        home = self.home_of(GROUPS_TOPIC, GROUP)
        while True:
            asked_us = self.now_us
            fields = [GROUP, [list(place) for place in self.places(ORDERS)], False]
            result = yield from self.ask(home, Api.GROUP_OFFSETS, fields, within_us=SECOND)
            if not isinstance(result, AegisError):
                for topic, number, offset, _ in result.fields[0]:
                    place = TopicPartition(topic, number)
                    self.positions[place] = max(0, offset)
                    now_us = self.now_us
                    one = Position(place, max(0, offset), asked_us, now_us, stable=False)
                    self._record.positions.append(one)
            yield from self.sleep(200 * MS)


class TransactionRun:
    """Transactions beside the other load of a simulation."""

    def __init__(
        self,
        load: TransactionLoad,
        rng: random.Random,
        *,
        scheduler: Scheduler,
        network: Network,
        session: Callable[[], dict[str, Any]],
    ) -> None:
        """session: what any client is made with; each call is another client."""
        self.load = load
        self.record = TransactionHistory()
        self.orders = History()
        """Of the input, as its producer has seen it."""
        self.topics = {
            name: Topic(name)
            for name in (GROUPS_TOPIC, TRANSACTIONS_TOPIC, ORDERS, RESULTS, ACCOUNTS, BALANCES)
        }
        self.last_reader: LastReader | None = None
        self.repeated_requests = 0
        self._rng = rng
        self._scheduler = scheduler
        self._network = network
        self._session = session
        self._numbers = itertools.count(1)
        self._movers: list[Worker | Teller] = []
        """All that ever were."""
        self._now: dict[str, Worker | Teller] = {}
        """By transactional id, the newest."""
        self._lives: dict[str, int] = {}
        self._active = False
        self._producer: Producer | None = None
        self._watcher: _Watcher | None = None
        self._auditor: Auditor | None = None
        self._maker: TopicMaker | None = None

    # ---- beginning

    def make_topics(self) -> None:
        load = self.load
        wanted = {
            ORDERS: (load.inputs, "delete"),
            RESULTS: (2, "delete"),
            ACCOUNTS: (load.accounts, "delete"),
            BALANCES: (1, "compact"),
        }
        self._maker = TopicMaker(topics=self.topics, wanted=wanted, **self._rest())

    def topics_made(self) -> bool:
        return self._maker is not None and self._maker.done

    def _rest(self) -> dict[str, Any]:
        return {**self._session(), "rng": random.Random(self._rng.getrandbits(64))}

    def _client(self) -> dict[str, Any]:
        return {**self._rest(), "topics": self.topics}

    def _mover(self) -> dict[str, Any]:
        made = self._client()
        self._network.repeat_requests_of(CLIENT_HOSTS + made["number"])
        return {
            **made,
            "record": self.record,
            "numbers": self._numbers,
            "timeout_ms": self.load.timeout_ms,
            "aborted": self.load.aborted,
        }

    def _places(self, *topics: str) -> list[TopicPartition]:
        return [
            TopicPartition(topic, number)
            for topic in topics
            for number in range(len(self.topics[topic].groups))
        ]

    def begin(self) -> None:
        """Clients begin to work."""
        load, record = self.load, self.record
        self._active = True
        record.lists = set(self._places(ACCOUNTS))
        record.compacted = set(self._places(BALANCES))
        record.one_writer_at_a_time = load.inputs == 1 and not load.tellers
        for number in range(load.workers):
            self._new_life(f"worker-{number}")
        for number in range(load.tellers):
            self._new_life(f"teller-{number}")
        rest = {**self._rest(), "history": self.orders, "topic": self.topics[ORDERS]}
        self._producer = Producer(deadline_s=3.0, **rest)
        places = self._places(RESULTS, ACCOUNTS)
        self._auditor = Auditor(places=places, record=record, **self._client())
        self._watcher = _Watcher(record=record, **self._client())
        self._scheduler.after(0, self._send_order)
        self._scheduler.after(SECOND // 2, self._make_trouble)

    def _new_life(self, name: str) -> None:
        self._lives[name] = self._lives.get(name, 0) + 1
        made: Worker | Teller
        if name.startswith("worker"):
            load = self.load
            own = {"think_us": load.think_us, "balance_bytes": load.balance_bytes}
            made = Worker(name=name, **own, **self._mover())
        else:
            made = Teller(name=name, **self._mover())
        self._movers.append(made)
        self._now[name] = made

    def _send_order(self) -> None:
        if self._active and self._producer is not None:
            partition = self._rng.randrange(self.load.inputs)
            self._producer.publish(partition, self._rng.choice((1, 1, 3)))
            self._scheduler.after(self._rng.randrange(50 * MS, 250 * MS), self._send_order)

    # ---- trouble

    def _make_trouble(self) -> None:
        """A process stands still, ends, or is replaced while it goes on (a zombie)."""
        if not self._active:
            return
        name = self._rng.choice(sorted(self._now))
        victim = self._now[name]
        kind = self._rng.choice(self.load.troubles)
        if "freeze" in kind or "frozen" in kind:
            victim.freeze(self._rng.choice((300, 1_200, 3_000)) * MS)
        if kind == "crash":
            victim.close()
        if kind not in ("freeze",) and self._lives[name] < LIVES_MAX:
            self._new_life(name)
        pause_us = int(self._rng.expovariate(1 / self.load.trouble_every_us)) + MS
        self._scheduler.after(pause_us, self._make_trouble)

    # ---- the end

    def stop_trouble(self) -> None:
        """No new orders; tellers end, workers go on until all is handled."""
        self._active = False
        for name, one in sorted(self._now.items()):
            if isinstance(one, Teller):
                one.stopping = True
            elif one.closed:
                self._new_life(name)
        for one in self._movers:
            one.hurries = True

    def is_drained(self) -> bool:
        """Every order was handled, and its position is committed."""
        if self._watcher is None or self._producer is None:
            return False
        if any(queue.waiting or queue.in_flight for queue in self._producer.queues):
            return False
        at, ends = self._watcher.positions, self._watcher.ends
        return len(ends) == self.load.inputs and all(
            at.get(place, 0) >= end for place, end in ends.items()
        )

    def stop(self) -> None:
        """Everybody stops at the next occasion."""
        for one in self._movers:
            one.stopping = True

    def has_stopped(self) -> bool:
        return all(one.closed for one in self._movers)

    def go(self) -> None:
        """All clients leave the cluster in peace."""
        for one in (*self._movers, self._watcher, self._auditor, self._producer):
            if one is not None:
                one.close()

    def read_back(self) -> None:
        """Nothing may be open for longer than its time-out from now on; read all of it."""
        self.last_reader = LastReader(
            places=self._places(RESULTS, ACCOUNTS, BALANCES),
            inputs=self._places(ORDERS),
            record=self.record,
            settle_us=self.load.timeout_ms * MS + SETTLE_US,
            **self._client(),
        )

    def is_read(self) -> bool:
        return self.last_reader is not None and not self.last_reader.left

    def hanging(self) -> list[str]:
        """Why something could not be read."""
        reader = self.last_reader
        return [] if reader is None else [text for _, text in sorted(reader.hanging.items())]
