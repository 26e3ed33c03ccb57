"""The way of a marker from the coordinator to the log that it ends a transaction in.

Sending: to whoever leads that log, over the links between shards; a call that is not answered, or
answered by one who does not lead, is made again by whoever asked for it. Receiving: the leader
appends the marker, unless it stands there, and answers once it is committed. Both may happen any
number of times.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker import produce
from aegis_cluster.broker.links import Call
from aegis_cluster.broker.transactions.leaders import Leaders
from aegis_cluster.errors import AegisError, NotLeader, PeerViolation
from aegis_cluster.ids import GroupId, ProducerId
from aegis_cluster.limits import MARKERS_PER_CALL_MAX
from aegis_cluster.wire.batch import batch_header
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.event_frames import encode_committed
from aegis_cluster.wire.markers import Marker, encode_marker
from aegis_cluster.wire.protocol import Api, Reply, take_bool, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transactions.commands import Participant
    from aegis_cluster.broker.transport import PeerKey

    Done = Callable[[Reply | AegisError], None]

CALL_MS: Final = 2_000


class Errand(NamedTuple):
    """One marker to be written to one log; `done` hears whether it stands there, committed."""

    participant: Participant
    marker: Marker
    done: Callable[[bool], None]


class MarkerSender:
    """One per shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._leaders = Leaders(shard)

    def send(self, errands: Iterable[Errand]) -> None:
        """Try each of them once."""
        by_shard: defaultdict[PeerKey, list[Errand]] = defaultdict(list)
        for errand in errands:
            key = self._leaders.of(errand.participant.log)
            if key is None:
                errand.done(self._is_gone(errand.participant))
            else:
                by_shard[key].append(errand)
        for key, found in by_shard.items():
            for start in range(0, len(found), MARKERS_PER_CALL_MAX):
                self._call(key, found[start : start + MARKERS_PER_CALL_MAX])

    def _is_gone(self, participant: Participant) -> bool:
        """The log's topic was deleted, and its open transactions with it. A log that this node has
        never heard of is none of those: its metadata may lag."""
        table = self._shard.table
        return participant.log < table.next_group and table.partition_of(participant.log) is None

    def _call(self, key: PeerKey, errands: list[Errand]) -> None:
        shard = self._shard
        rows = [[errand.participant.log, *errand.marker] for errand in errands]

        def done(reply: Reply | AegisError) -> None:
            self._answered(errands, reply)

        if self._leaders.is_here(key):
            write_markers(shard, [rows], done)
            return
        shard.ensure_link(key)
        call = Call(shard.now_ms + CALL_MS, done)
        shard.links.call(key, Api.WRITE_MARKERS, [rows], now_ms=shard.now_ms, call=call)

    def _answered(self, errands: list[Errand], reply: Reply | AegisError) -> None:
        for slot, errand in enumerate(errands):
            errand.done(self._take(errand.participant.log, slot, reply))

    def _take(self, log: GroupId, slot: int, reply: Reply | AegisError) -> bool:
        """Whether this marker is known to stand there."""
        try:
            if isinstance(reply, AegisError):
                raise reply
            result = take_list(take_list(reply.fields, 0, "results"), slot, "result")
            code = take_int(result, 0, "code")
            if code == 0:
                return True
            error = error_from_reply(code, result[1:])
        except AegisError as failure:
            error = failure
        self._leaders.failed(log, error)
        return False


# ---- at the leader of the log


def write_markers(shard: Shard, fields: Sequence[Any], done: Done) -> None:
    """[[log, producer id, epoch, committed, coordinator's term], ...] -> [[code, …] each]."""
    rows = take_list(fields, 0, "markers", items_max=MARKERS_PER_CALL_MAX)
    call = _Writing(len(rows), done)
    for slot in range(len(rows)):
        row = take_list(rows, slot, "marker")
        log = GroupId(take_int(row, 0, "log"))
        marker = Marker(
            take_int(row, 1, "producer_id"),
            take_int(row, 2, "producer_epoch", high=2**15 - 1),
            take_bool(row, 3, "committed"),
            take_int(row, 4, "coordinator_term") % 2**31,
        )
        try:
            _write(call, slot, shard.manager.partitions.get(log), marker)
        except AegisError as error:
            call.settle(slot, produce.refusal(error))


def _write(call: _Writing, slot: int, partition: Partition | None, marker: Marker) -> None:
    if partition is None:
        raise NotLeader("This shard has no replica of the log.")
    if not partition.serving:
        raise partition.unable()
    index = partition.state.producers.decide_marker(marker)
    if index is None:
        batch = encode_marker(marker, partition.now())
        annotation = _annotation_of(partition, marker)
        index = partition.append(batch, batch_header(batch), annotation).index
    partition.wait_for(index, _Written(call, slot))


def _annotation_of(partition: Partition, marker: Marker) -> bytes:
    """Where the events stand that the marker commits, for those who read this log alone."""
    prepared = partition.state.events.prepared_by(ProducerId(marker.producer_id))
    return b"" if prepared is None or not marker.committed else encode_committed(prepared.index)


class _Writing:
    """One call; answered when every marker is committed or refused."""

    def __init__(self, count: int, done: Done) -> None:
        if not count:
            raise PeerViolation("A call to write markers needs one at least.")
        self._results: list[list[Any]] = [[] for _ in range(count)]
        self._open = count
        self._done = done

    def settle(self, slot: int, result: list[Any]) -> None:
        self._results[slot] = result
        self._open -= 1
        if self._open == 0:
            self._done(Reply(0, 0, 0, 0, [self._results], []))


class _Written:
    __slots__ = ("_call", "_slot")

    def __init__(self, call: _Writing, slot: int) -> None:
        self._call = call
        self._slot = slot

    def committed(self) -> None:
        self._call.settle(self._slot, [0])

    def lost(self, error: AegisError) -> None:
        self._call.settle(self._slot, produce.refusal(error))
