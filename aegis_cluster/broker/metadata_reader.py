"""How a shard without a replica of `__cluster/0` follows it: as a consumer, never as a learner.

It keeps one long fetch open at the first shard of some node that holds a replica, folds what
comes, and asks the next node when one does not answer. Where the log no longer holds its place, it
fetches the folded state instead and goes on behind it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.broker.links import Call
from aegis_cluster.broker.metadata_stm import MetadataFold, apply_commands
from aegis_cluster.cluster.metadata_table import MetadataTable
from aegis_cluster.errors import AegisError, OffsetOutOfRange
from aegis_cluster.ids import METADATA_GROUP, RecordOffset
from aegis_cluster.limits import FETCH_BYTES_DEFAULT
from aegis_cluster.wire.batch import batch_header
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, check_frame, frame_payload, iter_frames
from aegis_cluster.wire.protocol import Api, Reply, take_int, take_list, take_part

if TYPE_CHECKING:
    from aegis_cluster.broker.links import Links
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.snapshot_transfer import Copied

WAIT_MS: Final = 2_000
GIVE_UP_MS: Final = 4_000

log = logging.getLogger(__name__)


class MetadataReader:
    """Keeps `table` as fresh as one long poll allows."""

    def __init__(self, shard: Shard, links: Links) -> None:
        self.table = MetadataTable()
        self._shard = shard
        self._links = links
        self._offset = RecordOffset(0)
        self._asking = False
        self._turn = 0

    def tick(self) -> None:
        """Have one fetch under way whenever some node can be asked."""
        if self._asking:
            return
        keys = [key for key in self._links.ups() if key.shard == 0]
        if not keys:
            return
        key = keys[self._turn % len(keys)]
        self._asking = True
        now_ms = self._shard.now_ms
        fields = [WAIT_MS, [[METADATA_GROUP, self._offset, FETCH_BYTES_DEFAULT]]]
        call = Call(now_ms + GIVE_UP_MS, self._answered)
        self._links.call(key, Api.FETCH, fields, now_ms=now_ms, call=call)

    def _answered(self, reply: Reply | AegisError) -> None:
        self._asking = False
        try:
            if isinstance(reply, AegisError):
                raise reply
            result = take_list(reply.fields, 0, "results")[0]
            if result[0] != 0:
                raise error_from_reply(result[0], result[1:])
            high_watermark = take_int(result, 1, "high_watermark")
            moved = self._fold(bytes(take_part(reply.parts, 0, "frames")))
        except OffsetOutOfRange as error:
            if self._offset < int(error.details.get("log_start", 0)):
                self._fetch_table()
            else:
                self._turn += 1  # that node is behind us
            return
        except (AegisError, IndexError, TypeError, ValueError) as error:
            log.debug("Reading the metadata failed: %s", error)
            self._turn += 1
            return
        if moved:
            self._shard.metadata_changed()
        if self._offset >= high_watermark:
            self._shard.freshness.reached()
        self.tick()

    def _fetch_table(self) -> None:
        """Our place is cut off: take over the table of a node that has it."""
        keys = [key for key in self._links.ups() if key.shard == 0]
        if not keys:
            return
        self._asking = True
        fold = MetadataFold()
        state = PartitionState(fold)

        def done(copied: Copied | AegisError) -> None:
            self._asking = False
            if isinstance(copied, AegisError):
                log.debug("Fetching the metadata failed: %s", copied)
                self._turn += 1
                return
            copied.loader.finish()
            self._take_over(fold.table, copied.package.high_watermark)

        key = keys[self._turn % len(keys)]
        self._shard.snapshot_copies.start(key, METADATA_GROUP, state.loader(), done)

    def _take_over(self, table: MetadataTable, offset: RecordOffset) -> None:
        if table.index > self.table.index:
            self.table = table
            self._offset = max(self._offset, offset)
            self._shard.metadata_changed()
        else:
            self._turn += 1  # it had nothing newer
        self.tick()

    def _fold(self, frames: bytes) -> bool:
        before = self.table.index
        for position, _ in iter_frames(frames):
            header = check_frame(METADATA_GROUP, frames, position, previous_chain=None)
            if header.kind is not FrameKind.DATA:
                continue
            payload = frame_payload(frames, header, position)
            if header.index > self.table.index:
                apply_commands(self.table, header.index, payload)
            batch = batch_header(payload)
            self._offset = RecordOffset(batch.base_offset + batch.last_offset_delta + 1)
        return self.table.index != before
