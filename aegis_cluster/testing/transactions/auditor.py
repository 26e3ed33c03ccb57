"""Readers: one that follows while everything goes on, and one that reads all of it in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError
from aegis_cluster.testing.scheduler import MS, SECOND
from aegis_cluster.testing.transactions.client import Client
from aegis_cluster.testing.transactions.history import Round, Seen
from aegis_cluster.wire.protocol import Api

if TYPE_CHECKING:
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.testing.transactions.client import Work
    from aegis_cluster.testing.transactions.history import TransactionHistory

ROUND_US: Final = 250 * MS


class Auditor(Client):
    """Reads committed records of several places, each on its own, and notes now and then how far it
    has come everywhere."""

    def __init__(
        self, *, places: list[TopicPartition], record: TransactionHistory, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.positions = dict.fromkeys(places, 0)
        self._record = record
        for place in places:
            self.begin(self._follow(place))
        self.begin(self._note_rounds())

    def _follow(self, place: TopicPartition) -> Work[None]:
        while True:
            found = yield from self.fetch(
                place,
                self.positions[place],
                wait_ms=self._rng.choice((0, 50, 400)),
                bytes_max=self._rng.choice((1, 500, 100_000)),
            )
            if not isinstance(found, AegisError):
                for offset, key, value in found.rows:
                    self._record.seen.append(Seen(self.number, place, offset, key, value))
                self.positions[place] = found.position
            yield from self.sleep(self._rng.randrange(10 * MS, 60 * MS))

    def _note_rounds(self) -> Work[None]:
        while True:
            self._record.rounds.append(Round(self.number, dict(self.positions)))
            yield from self.sleep(ROUND_US)


class LastReader(Client):
    """Waits until nothing is open any more, then reads every place to its end."""

    def __init__(
        self,
        *,
        places: list[TopicPartition],
        inputs: list[TopicPartition],
        record: TransactionHistory,
        settle_us: int,
        **rest: Any,
    ) -> None:
        """settle_us: within so long every transaction must have ended."""
        super().__init__(**rest)
        self.left = {*places, *inputs}
        """Places that are not read yet."""
        self.hanging: dict[TopicPartition, str] = {}
        self._inputs = set(inputs)
        self._record = record
        self._settled_by_us = self.now_us + settle_us
        for place in (*places, *inputs):
            self.begin(self._read(place))

    def _read(self, place: TopicPartition) -> Work[None]:
        group = self.topics[place.topic].groups[place.partition]
        while True:
            result = yield from self.ask(place, Api.LIST_OFFSETS, [[group]], within_us=20 * SECOND)
            if not isinstance(result, AegisError):
                _, start, high, stable = result.fields[0][0][:4]
                if stable == high:
                    break
                if self.now_us >= self._settled_by_us:
                    self.hanging[place] = f"{place} is stable up to {stable}, and ends at {high}"
            yield from self.sleep(100 * MS)
        self.hanging.pop(place, None)
        found = yield from self.read_all(place, start, high, within_us=20 * SECOND)
        if isinstance(found, AegisError):
            self.hanging[place] = str(found)
            return
        if place in self._inputs:
            self._record.inputs[place] = found.rows
        else:
            self._record.final[place] = found.rows
        self.left.discard(place)
