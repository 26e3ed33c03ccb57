"""`pgoutput` by hand: whole and streamed transactions, what is undone, and what is malformed."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest

from aegis_cluster.cdc import pgoutput
from aegis_cluster.cdc.envelope import EncodedChange, encode_row_key
from aegis_cluster.cdc.events import ChangeSource
from aegis_cluster.cdc.postgres_rows import Moment, TableRows, copied
from aegis_cluster.cdc.postgres_snapshot import Seen, Window
from aegis_cluster.cdc.postgres_stream import ChangeStream
from aegis_cluster.cdc.postgres_types import TypeTable
from aegis_cluster.errors import PeerViolation

INT, TEXT, NUMERIC = 23, 25, 1700


def values(*row: str | None) -> bytes:
    found = struct.pack(">H", len(row))
    for value in row:
        raw = b"" if value is None else value.encode()
        found += b"n" if value is None else b"t" + struct.pack(">I", len(raw)) + raw
    return found


def relation(oid: int = 7) -> bytes:
    columns = b"".join(
        struct.pack(">B", key) + name + b"\0" + struct.pack(">Ii", kind, -1)
        for key, name, kind in ((1, b"id", INT), (0, b"x", TEXT))
    )
    return b"R" + struct.pack(">I", oid) + b"public\0t\0d" + struct.pack(">H", 2) + columns


def begin(lsn: int, xid: int) -> bytes:
    return b"B" + struct.pack(">QqI", lsn, 0, xid)


def commit(lsn: int) -> bytes:
    return b"C" + struct.pack(">BQQq", 0, lsn, lsn + 8, 0)


def insert(*row: str | None, oid: int = 7) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + values(*row)


def streamed(xid: int, message: bytes) -> bytes:
    return message[:1] + struct.pack(">I", xid) + message[1:]


def stream_start(xid: int) -> bytes:
    return b"S" + struct.pack(">IB", xid, 1)


def stream_commit(xid: int, lsn: int) -> bytes:
    return b"c" + struct.pack(">IBQQq", xid, 0, lsn, lsn + 8, 0)


def stream_abort(xid: int, subxid: int) -> bytes:
    return b"A" + struct.pack(">II", xid, subxid)


def described(relation: pgoutput.Relation) -> TableRows:
    columns = [(column.name, column.type_oid) for column in relation.columns]
    source = ChangeSource("shop", relation.schema, relation.table, "postgresql")
    return TableRows("shop", source, columns, ("id",), frozenset({"id"}), TypeTable().converter)


def taken(*messages: bytes) -> list[EncodedChange]:
    stream = ChangeStream(described)
    for message in messages:
        stream.take(message)
        while stream.is_replaying:
            stream.replay()
    assert stream.is_between
    return stream.out


def rows(changes: list[EncodedChange]) -> list[tuple[Any, Any, bool]]:
    found = []
    for change in changes:
        value = json.loads(change.value)
        found.append((change.position, value["after"]["id"], value.get("last", False)))
    return found


def test_the_last_change_of_a_transaction_says_so() -> None:
    changes = taken(
        begin(100, 5), relation(), insert("1", "a"), insert("2", None), commit(100),
        begin(200, 6), insert("3", 'q"\\\n'), commit(200),
    )  # fmt: skip
    assert rows(changes) == [((100, 0), 1, False), ((100, 1), 2, True), ((200, 0), 3, True)]
    assert json.loads(changes[2].value)["after"]["x"] == 'q"\\\n'
    assert [change.record_key for change in changes] == [b'{"id":1}', b'{"id":2}', b'{"id":3}']


def test_streamed_transactions_come_whole_once_they_committed_and_undone_ones_never() -> None:
    changes = taken(
        stream_start(5), streamed(5, relation()), streamed(5, insert("1", "a")), b"E",
        begin(100, 9), relation(), insert("50", "between"), commit(100),
        stream_start(6), streamed(6, relation()), streamed(6, insert("7", "undone")), b"E",
        stream_start(5), streamed(55, insert("2", "undone")), streamed(5, insert("3", "c")), b"E",
        stream_abort(6, 6), stream_abort(5, 55), stream_commit(5, 200),
    )  # fmt: skip
    assert rows(changes) == [((100, 0), 50, True), ((200, 0), 1, False), ((200, 1), 3, True)]
    assert json.loads(changes[1].value)["source"]["txId"] == "5"


def test_noise_is_refused_and_nothing_else_happens() -> None:
    rng = random.Random(7)
    whole = [relation(), insert("1", "a"), begin(1, 2), stream_abort(5, 6)]
    for message in whole:
        for cut in range(1, len(message)):
            with pytest.raises(PeerViolation):
                assert pgoutput.decode(message[:cut]) is None
    for _ in range(2_000):
        noise = bytearray(rng.choice(whole))
        noise[rng.randrange(len(noise))] = rng.randrange(256)
        try:
            pgoutput.decode(bytes(noise))
        except PeerViolation:
            continue
    with pytest.raises(PeerViolation, match="not described"):
        taken(begin(1, 2), insert("1", "a"))


def test_rows_are_written_as_the_slow_way_writes_them() -> None:
    types = TypeTable()
    samples: dict[int, list[str]] = {
        16: ["t", "f"], 17: ["\\x", "\\x00ff"], 20: ["-1"], 25: ["", 'é"\\\t\x01'],
        114: ['{"a": 1}'],
        701: ["1", "0.1", "1e+20", "NaN", "-Infinity", "-0"], 1082: ["2024-02-29", "infinity"],
        1114: ["2024-01-01 00:00:00", "2024-01-01 00:00:00.5", "0044-03-15 12:00:00 BC"],
        1184: ["2024-01-01 00:00:00+00", "2024-01-01 00:00:00.123456+00", "infinity"],
        1700: ["1.50", "0", "0.0000000001", "NaN", "100000000000000000000.5"],
        2950: ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"], 1007: ["{1,NULL}"], 1083: ["24:00:00"],
    }  # fmt: skip
    source, moment = ChangeSource("shop", "public", "t", "postgresql"), Moment(1, 2, "3")
    for oid, texts in samples.items():
        table = TableRows("shop", source, [("v", oid)], ("v",), frozenset({"v"}), types.converter)
        for text in texts:
            fast = table.change("c", (1, 0), moment, None, [text.encode()])
            slow = table._slowly(
                "c", (1, 0), moment, None, [text.encode()], key_only=False, key=fast.record_key
            )
            one, other = json.loads(fast.value), json.loads(slow.value)
            assert one | {"ts_ms": 0} == other | {"ts_ms": 0}, (oid, text)
            key = {"v": types.converter(oid)(text)}
            assert fast.record_key == encode_row_key(key), (oid, text)


def test_lines_of_copy() -> None:
    assert copied(b"1\t\\N\ta\\tb\\\\n\\n\t") == [b"1", None, b"a\tb\\n\n", b""]


def test_what_a_snapshot_sees() -> None:
    seen = Seen.parse(f"{2**32 + 5}:{2**32 + 9}:{2**32 + 5},{2**32 + 7}")
    assert [seen.sees(xid) for xid in (4, 5, 6, 7, 8, 9, 2**32 - 1)] == [
        True, False, True, False, True, False, True,
    ]  # fmt: skip
    assert seen.misses([3, 7])
    assert not seen.misses([3, 6])
    window = Window(1, seen, keyless=False)
    assert window.passes(b"a", 6, is_whole=False)
    assert not window.is_newer(b"a")
    assert window.passes(b"a", 9, is_whole=True)
    assert window.is_newer(b"a")
    assert not window.is_torn
    window.passes(b"b", 9, is_whole=False)
    assert window.is_torn
    assert not Window(1, seen, keyless=True).passes(None, 6, is_whole=True)
