"""Producer ids for this shard's clients, out of blocks that the controller grants.

A block belongs to one process for ever; what is left of it when the process ends is lost, so no
id is ever given twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.errors import AegisError, NotReady, Throttled
from aegis_cluster.ids import ProducerId, ShardId
from aegis_cluster.limits import REQUESTS_WAITING_MAX
from aegis_cluster.wire.protocol import Api, Reply, take_int

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.broker.shard import Shard

CALL_MS: Final = 2_000


class ProducerIds:
    """`take` answers from the block at hand, or once a new one has come."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._next = 0
        self._end = 0
        self._asking = False
        self._turn = 0
        self._waiting: list[tuple[int, Callable[[ProducerId | AegisError], None]]] = []

    def take(self, deadline_ms: int, done: Callable[[ProducerId | AegisError], None]) -> None:
        """Give one id to `done`, or `NotReady` when none could be had in time."""
        if len(self._waiting) >= REQUESTS_WAITING_MAX:
            done(Throttled("Too many clients wait here for a producer id; ask another node."))
            return
        self._waiting.append((deadline_ms, done))
        self._serve()

    def tick(self) -> None:
        """Let waiting callers go whose time is over; ask again for the others."""
        now_ms = self._shard.now_ms
        late = [done for deadline_ms, done in self._waiting if deadline_ms <= now_ms]
        self._waiting = [waiting for waiting in self._waiting if waiting[0] > now_ms]
        for done in late:
            done(NotReady("No producer id could be had in time: the cluster has no controller."))
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._next < self._end:
            _, done = self._waiting.pop(0)
            self._next += 1
            done(ProducerId(self._next - 1))
        if self._waiting and not self._asking:
            self._ask()

    def _ask(self) -> None:
        shard = self._shard
        key = shard.controller_key()
        if key is None:
            keys = [key for key in shard.links.ups() if key.shard == 0]
            if not keys:
                return
            key = keys[self._turn % len(keys)]
        self._asking = True
        if key.node == shard.context.me.node and shard.context.shard == ShardId(0):
            shard.peer_api.grant_producer_ids(self._granted)
            return
        call = Call(shard.now_ms + CALL_MS, self._granted)
        shard.links.call(key, Api.PRODUCER_IDS, [], now_ms=shard.now_ms, call=call)

    def _granted(self, reply: Reply | AegisError) -> None:
        self._asking = False
        if isinstance(reply, AegisError):
            self._turn += 1  # once for each failure: twice would leave out every other of two
            return
        try:
            first = take_int(reply.fields, 0, "first")
            count = take_int(reply.fields, 1, "count", low=1)
        except AegisError:
            return
        self._next, self._end = first, first + count
        self._serve()
