"""Who holds which message now, and until when: what a coordinator knows beyond the table.

Pure, in memory alone. It decides on the coordinator's copy of the subscription (`state`), which
runs ahead of the commit; commands change that copy, and this object follows. A new coordinator
begins with the table: whatever is open there may still be in some consumer's hands, so it stays
locked for one `ack_timeout`; acknowledgements of it are taken as ever, because the delivery count
tells one hand-out from the next.

    reported ──► ready ──► held by a consumer ──► settled
                   ▲             │ lock ran out, or nack
                   └─────────────┤ tries are left
                                 └ no try left ──► parked, or to be written as a dead letter

A dead letter is written by one consumer, in a transaction; when that is committed, the message is
settled (`buried`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.subscriptions.commands import Handed, Later, Park, Run
from aegis_cluster.broker.subscriptions.lanes import queue_for
from aegis_cluster.limits import (
    SUBSCRIPTION_BURIALS_MAX,
    SUBSCRIPTION_PARKED_MAX,
    SUBSCRIPTION_UNSETTLED_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.broker.subscriptions.subscription_table import Delivery, Subscription
    from aegis_cluster.ids import GroupId

NO_ROOM_MS: Final = 10_000
"""A message that should be parked, and finds no room there, is handed out again after so long."""
BURIAL_MS: Final = 30_000
"""A consumer may take so long over dead letters, or its `ack_timeout` if that is longer."""
BURY_AGAIN_MS: Final = 1_000
"""After an attempt that came to nothing."""
NOBODY: Final = ""
"""Holds what an earlier coordinator handed out: this one does not know to whom."""


@dataclass(slots=True, eq=False)
class Lease:
    """One hand-out to one consumer. burial: to write dead letters, not to handle messages."""

    consumer: str
    deadline_ms: int
    burial: bool = False


class Dispatcher:
    """now_ms: the coordinator's own clock; wall_ms: the one in frames."""

    def __init__(self, state: Subscription, *, now_ms: int, wall_ms: int, locked_until_ms: int):
        self.state = state
        self._ready = queue_for(state.rules)
        self._scanned: dict[GroupId, int] = {}
        self._seen_end: dict[GroupId, int] = {}
        self._leases: dict[GroupId, dict[int, Lease]] = {}
        self._deadlines: list[tuple[int, int, GroupId, range, Lease]] = []
        self._delayed: list[tuple[int, GroupId, int]] = []
        self._graves: dict[tuple[GroupId, int], None] = {}
        """To be written as dead letters, in this order."""
        self._burying = 0
        self._pushed = 0
        for log, progress in sorted(state.progress.items()):
            for offset, delivery in sorted(progress.open.items()):
                self._take_up(log, offset, delivery, now_ms, wall_ms, locked_until_ms)

    def _take_up(
        self,
        log: GroupId,
        offset: int,
        delivery: Delivery,
        now_ms: int,
        wall_ms: int,
        locked_until_ms: int,
    ) -> None:
        self._ready.hold(log, offset, delivery.key)
        is_used_up = bool(delivery.at_ms) and self._is_used_up(delivery)
        is_buried = self.state.is_buried_by(log, offset) is not None
        if is_buried or (is_used_up and self.state.rules.dead_letter):
            self._graves[log, offset] = None
        elif is_used_up:
            self._lock(log, range(offset, offset + 1), Lease(NOBODY, now_ms))
        elif delivery.at_ms:
            due_ms = now_ms + max(0, delivery.at_ms - wall_ms)
            heappush(self._delayed, (due_ms, log, offset))
        else:
            self._lock(log, range(offset, offset + 1), Lease(NOBODY, locked_until_ms))

    # ---- what there is

    def scan_from(self, log: GroupId) -> int:
        """The next offset of a log to be told of."""
        return self._scanned.setdefault(log, self.state.of(log).position)

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def held(self) -> int:
        """How many consumers hold, as far as is known."""
        return sum(map(len, self._leases.values()))

    @property
    def delayed(self) -> int:
        return len(self._delayed)

    @property
    def to_bury(self) -> int:
        return len(self._graves) + self._burying

    def held_by(self, consumer: str) -> int:
        return sum(
            lease.consumer == consumer for held in self._leases.values() for lease in held.values()
        )

    def reported(
        self,
        log: GroupId,
        first: int,
        end: int,
        runs: Iterable[tuple[int, int]],
        keys: Sequence[int | None] | None,
    ) -> list[Run]:
        """Between the offsets first and end, a log holds just these runs of messages.

        Returns the gaps: nobody will ever handle them, so they are to be settled, but for what is
        open in them. That was handed out before it was gone, and whoever holds it, or gets it next,
        finds out and settles it. A report that does not continue the last one is ignored.
        """
        if first != self.scan_from(log):
            return []
        progress = self.state.of(log)
        fresh_from = self._seen_end.setdefault(log, progress.seen_end)
        gaps: list[Run] = []
        place = first
        number = 0
        for start, stop in runs:
            if start > place:
                gaps.append(Run(log, place, start))
            mine = None if keys is None else keys[number : number + stop - start]
            if start >= fresh_from:
                self._ready.add(log, start, stop, mine)
            else:
                self._add_unseen(log, start, stop, mine)
            number += stop - start
            place = stop
        if place < end:
            gaps.append(Run(log, place, end))
        self._scanned[log] = end
        is_fresh = first >= fresh_from
        return gaps if is_fresh else _without(gaps, [o for o in progress.open if first <= o < end])

    def _add_unseen(
        self, log: GroupId, start: int, stop: int, keys: Sequence[int | None] | None
    ) -> None:
        """Of a stretch that an earlier coordinator has seen, what was never handed out."""
        progress = self.state.of(log)
        for place, offset in enumerate(range(start, stop)):
            if offset not in progress.open and not progress.is_settled(offset):
                key = None if keys is None else (keys[place],)
                self._ready.add(log, offset, offset + 1, key)

    def consumers_are(self, names: Iterable[str]) -> None:
        self._ready.consumers_are(names)

    def replayed(self, log: GroupId, offset: int) -> None:
        """A parked message is open again; the command has been applied."""
        key = self.state.of(log).open[offset].key
        self._ready.hold(log, offset, key)
        self._ready.again(log, offset, key)

    # ---- handing out

    def take(self, consumer: str, count: int, now_ms: int) -> list[Handed]:
        """Up to so many messages for a consumer, locked from now on; `HandOut` must follow."""
        room = SUBSCRIPTION_UNSETTLED_MAX - self.state.unsettled
        runs = self._ready.take(consumer, max(0, min(count, room)))
        if runs:
            lease = Lease(consumer, now_ms + self.state.rules.ack_timeout_ms)
            for run in runs:
                self._lock(run.log, range(run.first, run.end), lease)
        return runs

    def take_burials(self, consumer: str, now_ms: int) -> list[tuple[GroupId, int, Delivery]]:
        """Dead letters for a consumer to write; one consumer at a time does.

        Some of them may be a part of an earlier consumer's transaction: that one ends before this
        consumer's begins, because both are of the same transactional id.
        """
        if self._burying or not self._graves:
            return []
        deadline_ms = now_ms + max(BURIAL_MS, self.state.rules.ack_timeout_ms)
        lease = Lease(consumer, deadline_ms, burial=True)
        chosen = list(islice(self._graves, SUBSCRIPTION_BURIALS_MAX))
        for log, offset in chosen:
            del self._graves[log, offset]
            self._lock(log, range(offset, offset + 1), lease)
        self._burying = len(chosen)
        return [(log, offset, self.state.of(log).open[offset]) for log, offset in chosen]

    def burial_of(self, log: GroupId, offset: int, consumer: str) -> Delivery | None:
        """The dead letter that this consumer is to write; None when it is not."""
        lease = self._leases.get(log, {}).get(offset)
        if lease is None or not lease.burial or lease.consumer != consumer:
            return None
        return self.state.of(log).open.get(offset)

    # ---- settling

    def holds(self, log: GroupId, offset: int, count: int) -> bool:
        """Whether the hand-out that made this count is still good."""
        if offset not in self._leases.get(log, ()):
            return False
        return self.state.of(log).open[offset].count == count

    def is_burial(self, log: GroupId, offset: int) -> bool:
        """Whoever holds it is to write its dead letter, not to handle it."""
        return self._leases[log][offset].burial

    def buried(self, log: GroupId, offset: int) -> None:
        """The transaction with its dead letter is committed; that it is settled follows."""
        key = self.state.of(log).open[offset].key
        if offset in self._leases.get(log, ()):
            self._unlock(log, offset)
        self._graves.pop((log, offset), None)
        self._ready.free(log, offset, key)

    def not_buried(self, log: GroupId, offset: int, now_ms: int) -> None:
        """Its dead letter could not be written; somebody tries again, after a moment."""
        if self._leases.get(log, {}).get(offset) is not None:
            lease = Lease(NOBODY, now_ms + BURY_AGAIN_MS, burial=True)
            self._lock(log, range(offset, offset + 1), lease)

    def settled(self, log: GroupId, offset: int) -> None:
        """A held message is acknowledged, buried or parked. The command follows."""
        key = self.state.of(log).open[offset].key
        self._unlock(log, offset)
        self._ready.free(log, offset, key)

    def failed(
        self, log: GroupId, offset: int, *, spared: bool, delay_ms: int, now_ms: int, wall_ms: int
    ) -> Later | Park:
        """A held message was not handled: what is to be written down of that.

        spared: it does not count as a try.
        """
        delivery = self.state.of(log).open[offset]
        self._unlock(log, offset)
        if not spared and self._is_used_up(delivery):
            return self._give_up(log, offset, delivery, now_ms) or Later(log, offset, wall_ms, 0)
        if delay_ms:
            heappush(self._delayed, (now_ms + delay_ms, log, offset))
        else:
            self._ready.again(log, offset, delivery.key)
        return Later(log, offset, wall_ms + delay_ms, int(spared))

    def extend(self, log: GroupId, offset: int, now_ms: int) -> None:
        """The holder needs more time."""
        old = self._leases[log][offset]
        until_ms = now_ms + self.state.rules.ack_timeout_ms
        self._lock(log, range(offset, offset + 1), Lease(old.consumer, until_ms))

    # ---- time

    def expire(self, now_ms: int) -> list[Park]:
        """Let locks end and delays pass; returns what is to be parked by it."""
        while self._delayed and self._delayed[0][0] <= now_ms:
            _, log, offset = heappop(self._delayed)
            self._ready.again(log, offset, self.state.of(log).open[offset].key)
        parked: list[Park] = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, _, log, offsets, lease = heappop(self._deadlines)
            held = self._leases.get(log, {})
            for offset in offsets:
                if held.get(offset) is lease:
                    self._lost(log, offset, lease, parked, now_ms)
        return parked

    def gone(self, consumer: str, now_ms: int) -> list[Park]:
        """A consumer is no more: what it held is ready at once, but for what stands in an order:
        a consumer that only seems to be gone may still work on that."""
        parked: list[Park] = []
        for log, held in self._leases.items():
            for offset, lease in [one for one in held.items() if one[1].consumer == consumer]:
                if lease.burial or not self.state.rules.ordered:
                    self._lost(log, offset, lease, parked, now_ms)
        return parked

    def _lost(
        self, log: GroupId, offset: int, lease: Lease, parked: list[Park], now_ms: int
    ) -> None:
        delivery = self.state.of(log).open[offset]
        self._unlock(log, offset)
        if lease.burial:
            self._graves[log, offset] = None
        elif self._is_used_up(delivery):
            found = self._give_up(log, offset, delivery, now_ms)
            if found is not None:
                parked.append(found)
        else:
            self._ready.again(log, offset, delivery.key)

    # ---- inside

    def _is_used_up(self, delivery: Delivery) -> bool:
        limit = self.state.rules.max_deliveries
        return bool(limit) and delivery.tries >= limit

    def _give_up(self, log: GroupId, offset: int, delivery: Delivery, now_ms: int) -> Park | None:
        """What is to be parked; None: it is to be buried, or waits for room among the parked."""
        if self.state.rules.dead_letter:
            self._graves[log, offset] = None
            return None
        if self.state.parked >= SUBSCRIPTION_PARKED_MAX:
            heappush(self._delayed, (now_ms + NO_ROOM_MS, log, offset))
            return None
        self._ready.free(log, offset, delivery.key)
        return Park(log, offset, f"it was delivered {delivery.tries} times and never acknowledged")

    def _lock(self, log: GroupId, offsets: range, lease: Lease) -> None:
        self._leases.setdefault(log, {}).update(dict.fromkeys(offsets, lease))
        self._pushed += 1
        heappush(self._deadlines, (lease.deadline_ms, self._pushed, log, offsets, lease))

    def _unlock(self, log: GroupId, offset: int) -> None:
        lease = self._leases[log].pop(offset)
        if lease.burial and self._burying:
            self._burying -= 1


def _without(runs: Iterable[Run], offsets: Iterable[int]) -> list[Run]:
    """What is left of some runs of one log."""
    ordered = sorted(offsets)
    left: list[Run] = []
    for log, first, end in runs:
        place = first
        for offset in ordered[bisect_left(ordered, first) : bisect_left(ordered, end)]:
            if offset > place:
                left.append(Run(log, place, offset))
            place = offset + 1
        if place < end:
            left.append(Run(log, place, end))
    return left
