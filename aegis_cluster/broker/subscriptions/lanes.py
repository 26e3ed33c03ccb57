"""In which order messages may be handed out: pure queues, one for each way.

`RunQueue`: keys do not matter; whole runs of offsets wait, so a message costs nearly nothing.
`LaneQueue`: keys matter. A message belongs to a *lane*: in ordered mode that of its key, else one
of its own. A lane hands out its lowest offset, and nothing while it has one out; so messages of one
key are never out at the same time, nor out of order. Where consumers are pinned, a lane waits in
the bucket of its key, and every bucket has one consumer.
"""

from __future__ import annotations

import hashlib
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Final, Protocol

from aegis_cluster.broker.subscriptions.commands import PINNED, Handed
from aegis_cluster.ids import GroupId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.broker.subscriptions.commands import Rules

BUCKETS: Final = 256
ANYBODY: Final = -1
"""The bucket of messages without a key."""


class ReadyQueue(Protocol):
    """Messages that may be handed out now, or once what holds them back is settled."""

    def __len__(self) -> int:
        """How many wait, ready or held back."""

    def add(self, log: GroupId, first: int, end: int, keys: Sequence[int | None] | None) -> None:
        """New ones, behind all of their log."""

    def hold(self, log: GroupId, offset: int, key: int | None) -> None:
        """One that is out already, or may not be handed out yet."""

    def again(self, log: GroupId, offset: int, key: int | None) -> None:
        """One that was out, or held, may be handed out."""

    def free(self, log: GroupId, offset: int, key: int | None) -> None:
        """One that was out, or held, is settled."""

    def take(self, consumer: str, count: int) -> list[Handed]:
        """Up to so many for this consumer; they are out now."""

    def consumers_are(self, names: Iterable[str]) -> None:
        """Who shares the messages now."""


def queue_for(rules: Rules) -> ReadyQueue:
    return LaneQueue(rules) if rules.keyed else RunQueue()


class RunQueue:
    """First come, first served; what comes again goes first."""

    def __init__(self) -> None:
        self._again: deque[tuple[GroupId, int]] = deque()
        self._runs: deque[Handed] = deque()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, log: GroupId, first: int, end: int, keys: Sequence[int | None] | None) -> None:
        self._runs.append(Handed(log, first, end))
        self._waiting += end - first

    def hold(self, log: GroupId, offset: int, key: int | None) -> None:
        """Nothing waits for anything."""

    def free(self, log: GroupId, offset: int, key: int | None) -> None:
        """Nothing waits for anything."""

    def again(self, log: GroupId, offset: int, key: int | None) -> None:
        self._again.append((log, offset))
        self._waiting += 1

    def take(self, consumer: str, count: int) -> list[Handed]:
        taken: list[Handed] = []
        left = count
        while left and self._again:
            log, offset = self._again.popleft()
            _extend(taken, log, offset)
            left -= 1
        while left and self._runs:
            run = self._runs.popleft()
            end = min(run.end, run.first + left)
            if end < run.end:
                self._runs.appendleft(Handed(run.log, end, run.end))
            taken.append(Handed(run.log, run.first, end))
            left -= end - run.first
        self._waiting -= count - left
        return taken

    def consumers_are(self, names: Iterable[str]) -> None:
        """Anybody may have anything."""


_Waiting = tuple[GroupId, int, int | None]
"""Log, offset, hash of the key."""
LaneId = tuple[int, int]
"""(-1, hash of the key) in ordered mode; else, and without a key, (log, offset)."""


@dataclass(slots=True)
class _Lane:
    """waiting: the lowest offset first. out: how many are out or held. queued: it stands
    in the queue of its bucket."""

    waiting: list[_Waiting] = field(default_factory=list)
    out: int = 0
    queued: bool = False


class LaneQueue:
    """See above; a message costs an entry of its own here."""

    def __init__(self, rules: Rules) -> None:
        self._ordered = rules.ordered
        self._pinned = rules.strategy == PINNED
        self._lanes: dict[LaneId, _Lane] = {}
        self._queues: dict[int, deque[LaneId]] = {}
        """Lanes that may hand one out, by bucket; none is empty."""
        self._consumers: tuple[str, ...] = ()
        self._owners: dict[int, str] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, log: GroupId, first: int, end: int, keys: Sequence[int | None] | None) -> None:
        for place, offset in enumerate(range(first, end)):
            self._wait(log, offset, None if keys is None else keys[place], at_front=False)

    def hold(self, log: GroupId, offset: int, key: int | None) -> None:
        self._lane(log, offset, key).out += 1

    def again(self, log: GroupId, offset: int, key: int | None) -> None:
        self._lane(log, offset, key).out -= 1
        self._wait(log, offset, key, at_front=True)

    def free(self, log: GroupId, offset: int, key: int | None) -> None:
        lane_id = self._lane_id(log, offset, key)
        lane = self._lanes[lane_id]
        lane.out -= 1
        if lane.waiting:
            self._offer(lane_id, lane, at_front=True)
        elif not lane.out:
            del self._lanes[lane_id]

    def take(self, consumer: str, count: int) -> list[Handed]:
        taken: list[_Waiting] = []
        heads = [self._head(one) for one in self._queues if self._is_for(one, consumer)]
        heapify(heads)
        while heads and len(taken) < count:
            bucket = heads[0][2]
            queue = self._queues[bucket]
            lane = self._lanes[queue.popleft()]
            lane.queued = False
            lane.out += 1
            taken.append(lane.waiting.pop(0))
            if queue:
                heapreplace(heads, self._head(bucket))
            else:
                heappop(heads)
                del self._queues[bucket]
        self._waiting -= len(taken)
        return _runs(sorted(taken))

    def consumers_are(self, names: Iterable[str]) -> None:
        consumers = tuple(sorted(names))
        if consumers != self._consumers:
            self._consumers = consumers
            self._owners.clear()

    # ---- inside

    def _head(self, bucket: int) -> tuple[GroupId, int, int]:
        """Log and offset of what a bucket hands out next: the oldest of all buckets goes first, so
        that what is handed out together lies together, and costs little."""
        log, offset, _ = self._lanes[self._queues[bucket][0]].waiting[0]
        return log, offset, bucket

    def _lane_id(self, log: GroupId, offset: int, key: int | None) -> LaneId:
        return (-1, key) if self._ordered and key is not None else (log, offset)

    def _lane(self, log: GroupId, offset: int, key: int | None) -> _Lane:
        return self._lanes.setdefault(self._lane_id(log, offset, key), _Lane())

    def _wait(self, log: GroupId, offset: int, key: int | None, *, at_front: bool) -> None:
        lane_id = self._lane_id(log, offset, key)
        lane = self._lanes.setdefault(lane_id, _Lane())
        insort(lane.waiting, (log, offset, key), key=lambda one: one[:2])
        self._waiting += 1
        self._offer(lane_id, lane, at_front=at_front)

    def _offer(self, lane_id: LaneId, lane: _Lane, *, at_front: bool) -> None:
        if lane.out or lane.queued:
            return
        lane.queued = True
        key = lane.waiting[0][2]
        bucket = key % BUCKETS if self._pinned and key is not None else ANYBODY
        queue = self._queues.setdefault(bucket, deque())
        if at_front:
            queue.appendleft(lane_id)
        else:
            queue.append(lane_id)

    def _is_for(self, bucket: int, consumer: str) -> bool:
        if bucket == ANYBODY or not self._consumers:
            return True
        owner = self._owners.get(bucket)
        if owner is None:
            # The highest draw has it (rendezvous): who comes or goes moves only its own share.
            owner = max(self._consumers, key=lambda name: draw(name, bucket))
            self._owners[bucket] = owner
        return owner == consumer


def draw(name: str, number: int) -> bytes:
    """By which one of several is chosen for a number, always the same."""
    return hashlib.blake2b(f"{number}/{name}".encode(), digest_size=8).digest()


def _extend(taken: list[Handed], log: GroupId, offset: int) -> None:
    """Add one message, to the last run where it continues that."""
    last = taken[-1] if taken else None
    if last is None or last.log != log or last.end != offset:
        taken.append(Handed(log, offset, offset + 1))
    else:
        taken[-1] = Handed(log, last.first, offset + 1)


def _runs(messages: Sequence[_Waiting]) -> list[Handed]:
    """Messages in order of log and offset, neighbours joined."""
    runs: list[Handed] = []
    start = 0
    for place, (log, offset, _) in enumerate(messages, 1):
        if place == len(messages) or messages[place][:2] != (log, offset + 1):
            keys = tuple([key for _, _, key in messages[start:place]])
            runs.append(Handed(log, messages[start][1], offset + 1, keys))
            start = place
    return runs
