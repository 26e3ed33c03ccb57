"""Transactions of a replication slot, one after the other, as changes.

The idea: a change's position is the LSN of its transaction's commit and its place in there. What
comes whole is handed on message by message. What is *streamed*, before its end is known, goes into
a file of its own, is dropped when it is undone, and played once it has committed, a message at a
time; so a transaction of any size takes disk here, and no memory.

One change is always held back until it is known whether it is the last of its transaction.
"""

from __future__ import annotations

import struct
import tempfile
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Final

from aegis_cluster.cdc import pgoutput
from aegis_cluster.cdc.pgoutput import TOASTED
from aegis_cluster.cdc.postgres_rows import Moment, TableRows
from aegis_cluster.errors import PeerViolation

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from aegis_cluster.cdc.envelope import EncodedChange
    from aegis_cluster.cdc.pgoutput import Values
    from aegis_cluster.cdc.postgres_snapshot import Window

PREFIX: Final = "aegis"
"""Of the messages that we write into the server's log."""
REMEMBERED: Final = 100_000
"""Transactions whose numbers are kept, to compare with what a reader sees."""
_PIECE: Final = struct.Struct(">II")


class _Spool:
    """A streamed transaction: its messages, each with the subtransaction that it is of."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="aegis-cdc-")  # noqa: SIM115 - kept
        self.undone: set[int] = set()

    def add(self, subxid: int, message: bytes) -> None:
        self._file.write(_PIECE.pack(subxid, len(message)) + message)

    def messages(self) -> Generator[bytes, None, None]:
        """Those that were not undone; the file is gone afterwards."""
        with self._file as file:
            file.seek(0)
            while head := file.read(_PIECE.size):
                subxid, size = _PIECE.unpack(head)
                message = file.read(size)
                if subxid not in self.undone:
                    yield message

    def close(self) -> None:
        self._file.close()


class ChangeStream:
    """Takes messages, gives changes in `out`.

    describe: what a table's rows are made with, as of now. reached: the content and the LSN of the
    newest message of ours, once its transaction has ended. window: of a snapshot, is told of the
    changes of its table.
    """

    def __init__(self, describe: Callable[[pgoutput.Relation], TableRows]) -> None:
        self.out: list[EncodedChange] = []
        self.window: Window | None = None
        self.reached: tuple[bytes, int] | None = None
        self.end_lsn = 0
        """Behind the last commit that was handed on whole."""
        self.told: set[int] = set()
        """Tables that changes were handed on of."""
        self.given: OrderedDict[int, None] = OrderedDict()
        """Numbers of the last transactions that were handed on."""
        self._describe = describe
        self._tables: dict[int, TableRows] = {}
        self._begin: pgoutput.Begin | None = None
        self._moment = Moment(0, 0, None)
        self._place = 0
        self._held: EncodedChange | None = None
        self._message: bytes | None = None
        self._open: dict[int, _Spool] = {}
        self._piece: int | None = None
        self._replay: Generator[bytes, None, None] | None = None
        self._replay_end = 0

    @property
    def is_between(self) -> bool:
        """No transaction is half handed on."""
        return self._begin is None

    @property
    def is_replaying(self) -> bool:
        """A streamed transaction is being handed on: `replay` before the next `take`."""
        return self._replay is not None

    @property
    def commit_ms(self) -> int | None:
        """When the transaction was committed that is being handed on."""
        return None if self._begin is None else self._begin.time_ms

    @property
    def spooled(self) -> int:
        """Streamed transactions that are not at their end."""
        return len(self._open)

    def close(self) -> None:
        """Let go of all files."""
        for spool in self._open.values():
            spool.close()
        self._open.clear()
        if self._replay is not None:
            self._replay.close()

    def take(self, data: bytes) -> None:
        """One message of the slot. Raises `PeerViolation`."""
        if self._piece is None or data[:1] == b"E":
            self._handle(data)
            return
        subxid, message = pgoutput.unstreamed(data)
        self._open[self._piece].add(subxid, message)

    def replay(self) -> None:
        """One message of the streamed transaction that has committed, or its end."""
        message = None if self._replay is None else next(self._replay, None)
        if message is not None:
            self._handle(message)
            return
        self._replay = None
        self._commit(self._replay_end)

    def _handle(self, data: bytes) -> None:
        match pgoutput.decode(data):
            case pgoutput.RowInsert(relation=oid, new=new):
                self._add(oid, "c", None, new)
            case pgoutput.RowUpdate() as update:
                self._update(update)
            case pgoutput.RowDelete(relation=oid, old=old, key_only=key_only):
                self._add(oid, "d", old, None, key_only=key_only)
            case pgoutput.Begin() as begin:
                self._start(begin)
            case pgoutput.Commit(end_lsn=lsn):
                self._commit(lsn)
            case pgoutput.Relation() as relation:
                self._tables[relation.oid] = self._describe(relation)
            case pgoutput.TableTruncate(relations=relations):
                for oid in relations:
                    self._truncate(oid)
            case pgoutput.LogicalMessage(prefix=prefix, content=content):
                if prefix == PREFIX:
                    self._message = content
            case pgoutput.StreamStart(xid=xid):
                self._piece = xid
                if xid not in self._open:
                    self._open[xid] = _Spool()
            case pgoutput.StreamStop():
                self._piece = None
            case pgoutput.StreamAbort() as abort:
                self._abort(abort)
            case pgoutput.StreamCommit() as commit:
                self._start(pgoutput.Begin(commit.lsn, commit.time_ms, commit.xid))
                self._replay = self._spooled(commit.xid)
                self._replay_end = commit.end_lsn

    # ---- transactions

    def _start(self, begin: pgoutput.Begin) -> None:
        self._begin, self._place, self._message = begin, 0, None
        self._moment = Moment(begin.lsn, begin.time_ms, str(begin.xid))

    def _commit(self, end_lsn: int) -> None:
        if self._held is not None:
            self._held.mark_last()
            self.out.append(self._held)
            self._held = None
        begin, self._begin, self.end_lsn = self._begin, None, end_lsn
        if begin is None:
            return
        self.given[begin.xid] = None
        if len(self.given) > REMEMBERED:
            self.given.popitem(last=False)
        if self._message is not None:
            self.reached, self._message = (self._message, begin.lsn), None

    def _spooled(self, xid: int) -> Generator[bytes, None, None]:
        spool = self._open.pop(xid, None)
        if spool is None:
            raise PeerViolation("PostgreSQL committed a streamed transaction that it did not send.")
        return spool.messages()

    def _abort(self, abort: pgoutput.StreamAbort) -> None:
        if abort.subxid != abort.xid:
            if abort.xid in self._open:
                self._open[abort.xid].undone.add(abort.subxid)
        elif (spool := self._open.pop(abort.xid, None)) is not None:
            spool.close()

    # ---- changes

    def _table(self, oid: int) -> TableRows:
        table = self._tables.get(oid)
        if table is None or self._begin is None:
            raise PeerViolation("PostgreSQL sent a change of a table that it has not described.")
        return table

    def _next(self) -> tuple[int, int]:
        begin = self._begin
        place, self._place = self._place, self._place + 1
        return (0 if begin is None else begin.lsn), place

    def _hold(self, change: EncodedChange) -> None:
        if self._held is not None:
            self.out.append(self._held)
        self._held = change

    def _add(
        self,
        oid: int,
        op: str,
        before: Values | None,
        after: Values | None,
        *,
        key_only: bool = False,
        key: bytes | None = None,
    ) -> None:
        table = self._table(oid)
        self.told.add(oid)
        position = self._next()  # counted even if it is left out: places never depend on that
        change = table.change(op, position, self._moment, before, after, key_only=key_only, key=key)
        window = self.window
        if window is not None and window.oid == oid and self._begin is not None:
            is_whole = after is None or TOASTED not in after
            if not window.passes(change.record_key, self._begin.xid, is_whole=is_whole):
                return
        self._hold(change)

    def _update(self, update: pgoutput.RowUpdate) -> None:
        """One change, or two where the key has changed."""
        oid, old, new = update.relation, update.old, update.new
        if old is None:
            self._add(oid, "u", None, new)
            return
        for place, value in enumerate(new):
            if value is TOASTED and old[place] is not None:
                new[place] = old[place]
        table = self._table(oid)
        before, after = table.record_key(old), table.record_key(new)
        if before != after:
            self._add(oid, "d", old, None, key_only=update.key_only, key=before)
            self._add(oid, "c", None, new, key=after)
        else:
            self._add(oid, "u", None if update.key_only else old, new, key=after)

    def _truncate(self, oid: int) -> None:
        table = self._table(oid)
        change = table.truncate(self._next(), self._moment)
        window = self.window
        begin = self._begin
        mine = window is not None and window.oid == oid
        if window is None or begin is None or not mine or window.is_truncated(begin.xid):
            self._hold(change)
