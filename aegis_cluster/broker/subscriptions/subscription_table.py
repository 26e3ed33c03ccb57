"""The state that a partition of `__subscriptions` folds to.

Of every topic's partition (*log*): the position below which all is settled, ranges that are
settled ahead of it, what was handed out and is not settled (with its delivery count), and what is
parked. Messages whose dead letters are written in a transaction stay open until its marker stands
in this log. Every replica applies the same commands and holds the same table; a coordinator applies
them to a copy as well, ahead of their commit, and decides on that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.subscriptions.commands import (
    Bury,
    Configure,
    Create,
    Drop,
    Handed,
    HandOut,
    Key,
    Letter,
    Replay,
    Reset,
    Rules,
    Run,
    Settle,
    SubscriptionCommand,
)
from aegis_cluster.broker.subscriptions.ranges import Ranges
from aegis_cluster.errors import invariant
from aegis_cluster.ids import GroupId, ProducerId
from aegis_cluster.limits import SUBSCRIPTION_SESSIONS_KEPT

if TYPE_CHECKING:
    from collections.abc import Iterator

SUBSCRIPTION: Final = "subscription"
OPEN: Final = "open"
PARKED: Final = "parked"
AHEAD: Final = "ahead"
BURIALS: Final = "burials"
SLICE_ROWS: Final = 1_000


class Delivery(NamedTuple):
    """A message that was handed out and is not settled.

    count: how often it was handed out; it never falls. spared: how many of these do not count as
    tries. at_ms: not to be handed out before (wall clock); 0 while a consumer may hold it.
    key: hash of its key, where keys matter.
    """

    count: int  # type: ignore[assignment] # hides tuple.count
    spared: int = 0
    at_ms: int = 0
    key: int | None = None

    @property
    def tries(self) -> int:
        return self.count - self.spared


FIRST: Final = Delivery(1)
"""Of every message that is handed out for the first time where keys do not matter."""


class Parked(NamedTuple):
    count: int  # type: ignore[assignment] # hides tuple.count
    reason: str
    time_ms: int
    key: int | None


class Settled(NamedTuple):
    """A consumer's last request that settled something, and what of it was refused."""

    number: int
    refused: tuple[Run, ...]


@dataclass(slots=True)
class Burial:
    """What one transaction settles if it is committed: delivery counts by log and offset."""

    epoch: int
    letters: dict[tuple[GroupId, int], int] = field(default_factory=dict)


@dataclass(slots=True)
class Progress:
    """One log. position: all below it is settled, but for what is open because it was replayed."""

    position: int = 0
    ahead: Ranges = field(default_factory=Ranges)
    open: dict[int, Delivery] = field(default_factory=dict)
    parked: dict[int, Parked] = field(default_factory=dict)

    def copy(self) -> Progress:
        return Progress(self.position, self.ahead.copy(), dict(self.open), dict(self.parked))

    def is_settled(self, offset: int) -> bool:
        """Acknowledged, parked or passed over, and not open again."""
        return (offset < self.position or offset in self.ahead) and offset not in self.open

    @property
    def seen_end(self) -> int:
        """No offset from here on was ever handed out or settled."""
        return max(self.position, self.ahead.end, max(self.open, default=-1) + 1)

    def hand_out(self, run: Handed) -> None:
        opened = self.open
        offsets = range(run.first, run.end)
        is_fresh = opened.keys().isdisjoint(offsets)
        if is_fresh:
            self._check_unsettled(run)
        if is_fresh and run.keys is None:
            opened.update(dict.fromkeys(offsets, FIRST))
            return
        for place, offset in enumerate(offsets):
            known = opened.get(offset)
            if known is not None:
                opened[offset] = known._replace(count=known.count + 1, at_ms=0)
            else:
                invariant(not self.is_settled(offset), "a settled message is out", at=offset)
                key = None if run.keys is None else run.keys[place]
                opened[offset] = FIRST if key is None else Delivery(1, key=key)

    def _check_unsettled(self, run: Handed) -> None:
        is_new = run.first >= self.position and not self.ahead.overlaps(run.first, run.end)
        invariant(is_new, "a settled message is handed out", log=run.log, at=run.first)

    def finish(self, first: int, end: int) -> None:
        """These are done with: a few, or millions that retention has dropped."""
        opened = self.open
        if end - first <= len(opened):
            for offset in range(first, end):
                opened.pop(offset, None)
        else:
            for offset in [offset for offset in opened if first <= offset < end]:
                del opened[offset]
        if end > self.position:
            self.ahead.add(max(first, self.position), end)
            self.position = self.ahead.take_prefix(self.position)


class Subscription:
    """One subscription; see `commands.Create` for the values that it begins with."""

    __slots__ = ("burials", "key", "progress", "rules", "settled", "token")

    def __init__(self, key: Key, token: str, rules: Rules) -> None:
        self.key = key
        self.token = token
        self.rules = rules
        self.burials: dict[ProducerId, Burial] = {}
        """Transactions that write its dead letters and have not ended here."""
        self.progress: dict[GroupId, Progress] = {}
        self.settled: dict[str, Settled] = {}
        """By session, the longest unheard first."""

    def copy(self) -> Subscription:
        made = Subscription(self.key, self.token, self.rules)
        made.burials = {
            producer: Burial(one.epoch, dict(one.letters)) for producer, one in self.burials.items()
        }
        made.progress = {log: progress.copy() for log, progress in self.progress.items()}
        made.settled = dict(self.settled)
        return made

    def of(self, log: GroupId) -> Progress:
        """A log's progress, begun at offset 0 when nothing is known of it: it is a new one."""
        found = self.progress.get(log)
        if found is None:
            found = self.progress[log] = Progress()
        return found

    @property
    def unsettled(self) -> int:
        """How many messages were handed out and are not settled."""
        return sum(len(progress.open) for progress in self.progress.values())

    @property
    def parked(self) -> int:
        """How many messages are parked."""
        return sum(len(progress.parked) for progress in self.progress.values())

    def is_buried_by(self, log: GroupId, offset: int) -> tuple[ProducerId, int] | None:
        """Producer and epoch of the transaction that writes its dead letter, if one does."""
        for producer, one in self.burials.items():
            if (log, offset) in one.letters:
                return producer, one.epoch
        return None

    # ---- commands

    def apply(
        self, command: Configure | Reset | HandOut | Settle | Bury | Replay, time_ms: int
    ) -> None:
        """Fold one command; time_ms: append time of its frame."""
        match command:
            case Configure(_, rules):
                self.rules = rules
            case Reset(_, token, starts):
                self._reset(token, starts)
            case HandOut(_, runs):
                for run in runs:
                    self.of(run.log).hand_out(run)
            case Settle():
                self._settle(command, time_ms)
            case Bury(_, producer, epoch, letters):
                self._bury(producer, epoch, letters)
            case Replay(_, at_ms, messages):
                for log, offset in messages:
                    self._replay(log, offset, at_ms)

    def _settle(self, command: Settle, time_ms: int) -> None:
        for log, first, end in command.done:
            self.of(log).finish(first, end)
        for log, offset, at_ms, spared in command.later:
            opened = self.of(log).open
            known = opened.get(offset)
            if known is not None:
                opened[offset] = known._replace(at_ms=at_ms, spared=known.spared + spared)
        for log, offset, reason in command.parked:
            progress = self.of(log)
            known = progress.open.get(offset)
            if known is not None:
                progress.parked[offset] = Parked(known.count, reason, time_ms, known.key)
                progress.finish(offset, offset + 1)
        if command.session:
            self.settled.pop(command.session, None)
            self.settled[command.session] = Settled(command.number, command.refused)
            while len(self.settled) > SUBSCRIPTION_SESSIONS_KEPT:
                del self.settled[next(iter(self.settled))]

    def _reset(self, token: str, starts: tuple[tuple[GroupId, int], ...]) -> None:
        self.token = token
        self.burials.clear()
        self.settled.clear()
        self.progress.clear()
        for log, offset in starts:
            self.of(log).position = offset

    def _bury(self, producer: ProducerId, epoch: int, letters: tuple[Letter, ...]) -> None:
        found = self.burials.get(producer)
        if found is None or found.epoch < epoch:
            found = self.burials[producer] = Burial(epoch)
        if found.epoch > epoch:
            return  # of no client that keeps to the protocol: an older transaction has ended here
        found.letters.update({(log, offset): count for log, offset, count in letters})

    def end_burial(self, producer: ProducerId, epoch: int, *, committed: bool) -> None:
        """The transaction's marker stands in this log; epoch: the transaction's own."""
        found = self.burials.get(producer)
        if found is None or found.epoch > epoch:
            return
        del self.burials[producer]
        if not committed or found.epoch < epoch:
            return
        for (log, offset), count in found.letters.items():
            progress = self.of(log)
            known = progress.open.get(offset)
            if known is not None and known.count == count:
                progress.finish(offset, offset + 1)

    def _replay(self, log: GroupId, offset: int, at_ms: int) -> None:
        progress = self.of(log)
        known = progress.parked.pop(offset, None)
        if known is not None:
            progress.open[offset] = Delivery(known.count, known.count, at_ms, known.key)


class SubscriptionTable:
    """Subscriptions by topic and name."""

    def __init__(self) -> None:
        self.subscriptions: dict[Key, Subscription] = {}
        self._buried_by: dict[ProducerId, Key] = {}
        """Whose dead letters a producer writes."""

    def apply(self, command: SubscriptionCommand, time_ms: int) -> None:
        """Fold one committed command; time_ms: append time of its frame."""
        match command:
            case Create():
                self.subscriptions[command.key] = created(command)
            case Drop(key):
                self.subscriptions.pop(key, None)
            case _:
                found = self.subscriptions.get(command.key)
                if found is not None:
                    found.apply(command, time_ms)
                    if isinstance(command, Bury):
                        self._buried_by[command.producer] = command.key

    def end_transaction(self, producer: ProducerId, epoch: int, *, committed: bool) -> Key | None:
        """A marker stands in this log; epoch: the transaction's own. Returns whose dead letters it
        was about, if it was about any."""
        key = self._buried_by.get(producer)
        found = None if key is None else self.subscriptions.get(key)
        if found is not None:
            found.end_burial(producer, epoch, committed=committed)
        if found is None or producer not in found.burials:
            self._buried_by.pop(producer, None)
        return key

    # ---- snapshots

    def slices(self) -> Iterator[list[Any]]:
        """The table as it is at the call, in pieces for `add`."""
        return _slices([one.copy() for _, one in sorted(self.subscriptions.items())])

    def add(self, piece: list[Any]) -> None:
        """Take in one piece of a table's `slices`."""
        kind, key, *values = piece
        if kind == SUBSCRIPTION:
            self.subscriptions[Key(*key)] = _from_fields(Key(*key), values)
            return
        log, rows = values
        if kind == BURIALS:
            self._add_burials(Key(*key), ProducerId(log), rows)
            return
        progress = self.subscriptions[Key(*key)].of(GroupId(log))
        if kind == AHEAD:
            for first, end in rows:
                progress.ahead.add(first, end)
        elif kind == OPEN:
            for offset, *delivery in rows:
                progress.open[offset] = Delivery(*delivery)
        else:
            for offset, *parked in rows:
                progress.parked[offset] = Parked(*parked)

    def _add_burials(self, key: Key, producer: ProducerId, rows: list[Any]) -> None:
        self._buried_by[producer] = key
        burials = self.subscriptions[key].burials
        for epoch, log, offset, count in rows:
            found = burials.setdefault(producer, Burial(epoch))
            found.letters[GroupId(log), offset] = count


def created(command: Create) -> Subscription:
    made = Subscription(command.key, command.token, command.rules)
    for log, offset in command.starts:
        made.of(log).position = offset
    return made


def _slices(subscriptions: list[Subscription]) -> Iterator[list[Any]]:
    for one in subscriptions:
        yield [SUBSCRIPTION, one.key, *_to_fields(one)]
        for log, progress in sorted(one.progress.items()):
            opened = [[offset, *found] for offset, found in sorted(progress.open.items())]
            parked = [[offset, *found] for offset, found in sorted(progress.parked.items())]
            ahead = [list(found) for found in progress.ahead]
            for kind, rows in ((AHEAD, ahead), (OPEN, opened), (PARKED, parked)):
                for start in range(0, len(rows), SLICE_ROWS):
                    yield [kind, one.key, log, rows[start : start + SLICE_ROWS]]
        for producer, burial in sorted(one.burials.items()):
            letters = [[burial.epoch, *at, n] for at, n in sorted(burial.letters.items())]
            for start in range(0, len(letters), SLICE_ROWS):
                yield [BURIALS, one.key, producer, letters[start : start + SLICE_ROWS]]


def _to_fields(one: Subscription) -> list[Any]:
    return [
        one.token,
        one.rules,
        [[log, progress.position] for log, progress in sorted(one.progress.items())],
        [[session, *found] for session, found in one.settled.items()],
    ]


def _from_fields(key: Key, fields: list[Any]) -> Subscription:
    token, rules, positions, settled = fields[:4]
    made = Subscription(key, token, Rules(*rules))
    for log, position in positions:
        made.of(GroupId(log)).position = position
    for session, number, refused in settled:
        made.settled[session] = Settled(number, tuple(Run(*run) for run in refused))
    return made
