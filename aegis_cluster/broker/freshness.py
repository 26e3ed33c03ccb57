"""Whether this shard's metadata is as new, since the process started, as what was committed before.

A process that has just started knows an old state of `__cluster/0`: what it had written down. Until
it has once caught up with a controller it must not tell anybody that a topic does not exist: a
client that is new too has no index to ask for. Once it has caught up it stays fresh; from then on
it lags by a heartbeat at most while it is connected, and clients name the index they must see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.errors import AegisError
from aegis_cluster.ids import METADATA_GROUP, RecordOffset
from aegis_cluster.wire.protocol import Api, Reply, take_int, take_list

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard

CALL_MS: Final = 1_000


class Freshness:
    """One per shard; becomes true once and stays so until the process ends."""

    def __init__(self, shard: Shard) -> None:
        self.is_fresh = False
        self._shard = shard
        self._asking = False
        self._needed: RecordOffset | None = None
        """The controller's high watermark, as of a moment after our start."""

    def tick(self) -> None:
        """Look whether we have caught up; ask the controller how far that is."""
        if self.is_fresh:
            return
        partition = self._shard.manager.partitions.get(METADATA_GROUP)
        if self._shard.reader is not None or partition is None:
            return  # the reader says so itself, see `reached`
        if partition.serving:
            self.reached()
        elif self._needed is None:
            self._ask(partition)
        elif partition.high_watermark >= self._needed:
            self.reached()

    def reached(self) -> None:
        """We have caught up; requests that waited for it can be answered."""
        if not self.is_fresh:
            self.is_fresh = True
            self._shard.requests.metadata_changed()

    def _ask(self, partition: Partition) -> None:
        key = self._shard.controller_key()
        if self._asking or key is None or not self._shard.links.is_up(key):
            return
        self._asking = True
        now_ms = self._shard.now_ms
        fields = [0, [[METADATA_GROUP, partition.high_watermark, 0]]]
        call = Call(now_ms + CALL_MS, self._answered)
        self._shard.links.call(key, Api.FETCH, fields, now_ms=now_ms, call=call)

    def _answered(self, reply: Reply | AegisError) -> None:
        self._asking = False
        if isinstance(reply, AegisError):
            return
        try:
            result = take_list(take_list(reply.fields, 0, "results"), 0, "result")
            if take_int(result, 0, "code") == 0:
                self._needed = RecordOffset(take_int(result, 1, "high_watermark"))
        except AegisError:
            return  # asked again with the next tick
