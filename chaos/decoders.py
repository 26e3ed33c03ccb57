"""Every decoder of the project, with good input to start from and what it may raise.

The idea: one table, used by hypothesis in `tests/chaos` and by `tools/fuzz` for longer. An input is
good bytes with something done to them: bits flipped, cut, spliced, numbers replaced by absurd ones,
or nothing left of them. Where a checksum guards the content, half of the inputs carry a right one,
so that what stands behind it is reached: a checksum is no proof of good intentions.

The rule it holds: a decoder accepts, or raises what its row says, within bounded time and memory.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aegis_cluster.broker.snapshots import Package, decode_package, encode_package
from aegis_cluster.cli.records import BadInput, Source, read_rows
from aegis_cluster.cluster.metadata import decode_command
from aegis_cluster.config import load_node_config, load_streaming_config, parse_duration, parse_size
from aegis_cluster.errors import ConfigError, Corruption, PeerViolation, Refused
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.node.identity import IDENTITY_NAME, read_identity
from aegis_cluster.raft.codec import message_from_fields, message_to_fields
from aegis_cluster.raft.membership import Membership
from aegis_cluster.raft.messages import AppendRequest, Heartbeat
from aegis_cluster.storage.checked_file import encode_checked
from aegis_cluster.storage.checkpoint import CheckpointState, decode_checkpoint, encode_checkpoint
from aegis_cluster.storage.journal import decode_round_header, scan_journal
from aegis_cluster.storage.manifest import MANIFEST_KIND, read_manifest
from aegis_cluster.storage.marker import MARKER_KIND, MARKER_NAME, read_marker
from aegis_cluster.storage.segment import (
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
)
from aegis_cluster.storage.snapshot import SNAPSHOT_KIND, SNAPSHOT_NAME, read_snapshot
from aegis_cluster.storage.sparse_index import load_index
from aegis_cluster.storage.types import LogPoint
from aegis_cluster.testing.disk import SimulatedDisk
from aegis_cluster.wire.batch import check_client_batch, decode_batch, encode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.crc import crc32c
from aegis_cluster.wire.descriptions import (
    node_from_fields,
    settings_from_fields,
    topic_from_fields,
)
from aegis_cluster.wire.frame import check_frame, decode_header, encode_data_frame, iter_frames
from aegis_cluster.wire.payload import decode_key, decode_payload
from aegis_cluster.wire.protocol import (
    PROTOCOL_VERSION,
    Api,
    Hello,
    decode_fields,
    decode_reply,
    decode_request,
    encode_fields,
    encode_reply,
    encode_request,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

SECONDS_MAX: Final = 10.0
"""For one input, on a machine that does other things too."""
NUMBERS: Final = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


@dataclass(frozen=True)
class Decoder:
    decode: Callable[[bytes], Any]
    may_raise: tuple[type[Exception], ...]
    samples: Sequence[bytes]
    forge: Callable[[random.Random], bytes] | None = None
    """Makes input whose checksums are right and whose content is anything."""


def try_one(name: str, rng: random.Random) -> None:
    """Give one input to one decoder. Raises what the decoder should not have."""
    decoder = DECODERS[name]
    if decoder.forge is not None and rng.random() < 0.5:
        data = decoder.forge(rng)
    else:
        data = spoil(rng, rng.choice(decoder.samples) if decoder.samples else b"")
    began = time.monotonic()
    with contextlib.suppress(*decoder.may_raise):
        decoder.decode(data)
    took = time.monotonic() - began
    if took > SECONDS_MAX:
        raise TimeoutError(f"{name} took {took:.1f} s for {len(data)} bytes: {data[:200]!r}")


# ---- inputs


def spoil(rng: random.Random, good: bytes) -> bytes:
    """Good bytes, and something done to them."""
    data = bytearray(good)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
            case 3:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS) % (1 << 8 * size)
                data[place : place + size] = number.to_bytes(size, rng.choice(("big", "little")))
            case 4:
                data[place : place + rng.choice((1, 8))] = b""
            case _:
                data = bytearray(rng.randbytes(rng.choice((0, 1, 20, 300))))
    return bytes(data)


def value(rng: random.Random, depth: int = 4) -> Any:
    """Anything that msgpack can carry."""
    if depth and rng.random() < 0.35:
        return [value(rng, depth - 1) for _ in range(rng.randrange(7))]
    scalars: tuple[Any, ...] = (
        None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, "t", "",
        "../x", "x" * 300, b"", b"\0" * 8, b"\xff" * 40, {"a": 1}, {},
    )  # fmt: skip
    return rng.choice(scalars)


def near(rng: random.Random, shape: Any) -> Any:
    """Shaped like this one, with some leaves, ends or branches replaced."""
    if rng.random() < 0.12:
        return value(rng)
    if isinstance(shape, (list, tuple)):
        items = [near(rng, item) for item in shape]
        return items[: rng.randrange(len(items) + 1)] if rng.random() < 0.06 else items
    if isinstance(shape, dict):
        return {key: near(rng, item) for key, item in shape.items() if rng.random() > 0.05}
    return shape


def packed(shape: Any) -> Callable[[random.Random], bytes]:
    return lambda rng: bytes(msgpack.packb(near(rng, shape)))


def checked(kind: str, shape: Any) -> Callable[[random.Random], bytes]:
    """A checked file of anything."""
    return lambda rng: encode_checked(
        kind=kind, version=rng.choice((1, 1, 1, 0, 2)), body=near(rng, shape)
    )


def forged_batch(rng: random.Random) -> bytes:
    """A batch whose CRC is right, whatever stands in it; compressed bombs too."""
    compression = rng.choice(("none", "gzip", "snappy", "lz4", "zstd"))
    size = rng.choice((1, 100, 10_000, 1 << 20))
    rows: list[Any] = [(1, b"key", bytes(size), [("h", b"v")])] * rng.choice((1, 3))
    good = bytearray(encode_batch(rows, compression=compression))
    good[21:] = spoil(rng, bytes(good[21:]))
    if len(good) >= 61:
        good[17:21] = crc32c(bytes(good[21:])).to_bytes(4, "big")
        good[8:12] = (len(good) - 12).to_bytes(4, "big")
    return bytes(good)


# ---- decoders that take more than bytes


def _on_disk(name: str, read: Callable[[SimulatedDisk, str], Any]) -> Callable[[bytes], Any]:
    """Put the bytes into a file of a disk in memory, and read it."""

    def decode(data: bytes) -> Any:
        disk = SimulatedDisk()
        disk.make_dir("/d")
        file = disk.open(f"/d/{name}", create=True)
        file.pwrite(data, 0)
        return read(disk, "/d")

    return decode


def _toml(load: Callable[[Path], Any], prefix: str) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        with TemporaryDirectory() as name:
            file = Path(name) / f"{prefix}.toml"
            file.write_bytes(data)
            return load(file)

    return decode


def _fields(read: Callable[[list[Any]], Any]) -> Callable[[bytes], Any]:
    return lambda data: read(decode_fields(data))


def _rows(kind: str) -> Callable[[bytes], Any]:
    return lambda data: list(read_rows(Source(io.BytesIO(data), "input", len(data)), kind))


def _all_frames(data: bytes) -> None:
    for position, _ in iter_frames(data):
        check_frame(GroupId(1), data, position, previous_chain=None)


def _text(parse: Callable[[object], Any]) -> Callable[[bytes], Any]:
    return lambda data: parse(data.decode("latin-1"))


MEMBER: Final = Member(NodeId(1), "one")
MEMBERS: Final = [[1, "one"]]
BATCHES: Final = [
    encode_batch([(1, b"k", b"value" * 20, [("h", b"v")])] * 3, compression=name)
    for name in ("none", "gzip", "snappy", "lz4", "zstd")
]
FRAME: Final = encode_data_frame(
    group=GroupId(1),
    index=LogIndex(1),
    term=Term(1),
    time_ms=1,
    previous_chain=bytes(8),
    batch=BATCHES[0],
    base_offset=RecordOffset(0),
)
NODE: Final = [1, "one", "node-1", "127.0.0.1", 7100, 1, "boot"]
SETTINGS: Final = ["topic", None, None, "delete", "none", 1_000]
PLACED: Final = [[1, MEMBERS]]
PACKAGE: Final = Package(
    LogIndex(5),
    Term(2),
    bytes(8),
    RecordOffset(9),
    LogIndex(5),
    1,
    RecordOffset(9),
    Membership((MEMBER,)),
)
NODE_TOML: Final = (
    b'[node]\nname = "node-1"\nhost = "127.0.0.1"\nbase_port = 7100\ndata = "../data/node-1"\n'
    b'shards = 1\npeers = ["127.0.0.1:7100"]\ndurability = "fsync"\ninsecure = false\n'
)
STREAMING_TOML: Final = (
    b'[streaming]\nmax_message_size = "1MB"\ndefault_retention = "7d"\n'
    b'[streaming.consumer]\nmax_poll_records = 500\nsession_timeout = "30s"\n'
)
CSV: Final = b'id,amount\na1,"5"\nb2,7\n"quo\nted",8\n'
JSONL: Final = b'{"id": "a1", "amount": 5}\n{"id": [1, {"x": null}]}\n'
WIRE: Final = (PeerViolation,)
FILE: Final = (Corruption,)

DECODERS: Final[dict[str, Decoder]] = {
    "request": Decoder(
        lambda data: decode_request([data, data]),
        WIRE,
        [bytes(encode_request(api, [0, [[1, 0, 9]]], correlation=1, ms_left=1)[0]) for api in Api],
        packed([5, 1, 1, 1, [[1, "t", 0]]]),
    ),
    "reply": Decoder(
        lambda data: decode_reply([data]),
        WIRE,
        [bytes(encode_reply(5, [[[0, 1, 2]]], correlation=1)[0])],
        packed([5, 1, 1, 0, [[0, 1, 2]]]),
    ),
    "fields": Decoder(decode_fields, WIRE, [encode_fields([1, "a", [b"b", {"c": None}]])]),
    "refusal": Decoder(
        _fields(lambda fields: error_from_reply(fields[0] if fields else 0, fields[1:])),
        WIRE,
        [encode_fields([150, "no", {"leader": 1}])],
        packed([150, "no", {"leader": 1}]),
    ),
    "hello": Decoder(
        _fields(Hello.from_fields),
        WIRE,
        [encode_fields(Hello(PROTOCOL_VERSION, "client", "c", 0, "", "b", 0).to_fields())],
        packed([1, "client", "c", 0, "", "b", 0]),
    ),
    "raft message": Decoder(
        _fields(message_from_fields),
        WIRE,
        [encode_fields(message_to_fields(Heartbeat(Term(1), LogIndex(0), 0, quiet=False)))],
        packed(
            message_to_fields(
                AppendRequest(Term(1), LogIndex(0), Term(0), LogIndex(0), LogIndex(0), LogIndex(0))
            )
        ),
    ),
    "package": Decoder(
        decode_package,
        WIRE,
        [encode_package(PACKAGE)],
        packed([*PACKAGE[:7], [MEMBERS, []]]),
    ),
    "node": Decoder(_fields(node_from_fields), WIRE, [encode_fields(NODE)], packed(NODE)),
    "settings": Decoder(
        _fields(settings_from_fields), WIRE, [encode_fields(SETTINGS)], packed(SETTINGS)
    ),
    "topic": Decoder(
        _fields(topic_from_fields),
        WIRE,
        [encode_fields(["t", SETTINGS, PLACED, "token"])],
        packed(["t", SETTINGS, PLACED, "token"]),
    ),
    "client batch": Decoder(check_client_batch, (Refused, *WIRE, *FILE), BATCHES, forged_batch),
    "batch": Decoder(decode_batch, FILE, BATCHES, forged_batch),
    "frame": Decoder(decode_header, FILE, [FRAME]),
    "frames": Decoder(_all_frames, FILE, [FRAME * 3]),
    "payload": Decoder(
        lambda data: decode_payload(data, [("aegis", b"j")]),
        FILE,
        [b'{"a": [1, 2.5, null]}', b"[" * 100 + b"]" * 100, b"9" * 5_000],
    ),
    "text": Decoder(lambda data: decode_payload(data, [("aegis", b"s")]), FILE, [b"text"]),
    "key": Decoder(lambda data: decode_key(data, []), FILE, [b"key"]),
    "metadata command": Decoder(
        decode_command,
        (*WIRE, *FILE),
        [bytes(msgpack.packb([1, "register_node", NODE]))],
        packed([1, "create_topic", ["t", SETTINGS, PLACED, "token"]]),
    ),
    "segment header": Decoder(
        decode_segment_header,
        FILE,
        [
            encode_segment_header(
                SegmentHeader(GroupId(1), LogPoint(LogIndex(4), Term(1), bytes(8), RecordOffset(3)))
            )
        ],
    ),
    "journal": Decoder(
        lambda data: (
            decode_round_header(data, 0),
            scan_journal(data, file="a", generation_min=0),
        ),
        (),
        [b"\0" * 4_096],
    ),
    "checkpoint": Decoder(
        decode_checkpoint, FILE, [encode_checkpoint(CheckpointState(1, 0, 1, 1, 1, ()))]
    ),
    "sparse index": Decoder(
        lambda data: load_index(GroupId(1), LogIndex(1), data), (), [bytes(99)]
    ),
    "manifest": Decoder(
        _on_disk("1", lambda disk, path: read_manifest(disk, f"{path}/1")),
        FILE,
        [encode_checked(kind=MANIFEST_KIND, version=1, body=[1, "t", 0, MEMBERS, False])],
        checked(MANIFEST_KIND, [1, "t", 0, MEMBERS, False]),
    ),
    "marker": Decoder(
        _on_disk(MARKER_NAME, read_marker),
        FILE,
        [encode_checked(kind=MARKER_KIND, version=1, body=[1, [[1, 2]], "why"])],
        checked(MARKER_KIND, [1, [[1, 2]], "why"]),
    ),
    "snapshot": Decoder(
        _on_disk(SNAPSHOT_NAME, lambda disk, path: read_snapshot(disk, path, GroupId(1))),
        FILE,
        [encode_checked(kind=SNAPSHOT_KIND, version=1, body=[1, [1, 1, bytes(8), 0], False, b""])],
        checked(SNAPSHOT_KIND, [1, [1, 1, bytes(8), 0], False, b"", 0]),
    ),
    "identity": Decoder(
        _on_disk(IDENTITY_NAME, read_identity),
        FILE,
        [],
        checked(
            IDENTITY_NAME,
            {"cluster": "c", "node": 1, "incarnation": "i", "founders": [[1, "n", "i"]]},
        ),
    ),
    "node file": Decoder(_toml(load_node_config, "node-1"), (ConfigError,), [NODE_TOML]),
    "aegis.toml": Decoder(
        _toml(lambda file: load_streaming_config(file, environ={}), "aegis"),
        (ConfigError,),
        [STREAMING_TOML],
    ),
    "size": Decoder(_text(parse_size), (ConfigError, ValueError), [b"1MB", b"2.5 GB"]),
    "duration": Decoder(_text(parse_duration), (ConfigError, ValueError), [b"7d", b"30s"]),
    "csv": Decoder(
        _rows("csv"), (BadInput,), [CSV, gzip.compress(CSV), CSV.decode().encode("utf-16")]
    ),
    "json lines": Decoder(
        _rows("jsonl"),
        (BadInput,),
        [JSONL, gzip.compress(JSONL), b"[" * 100_000, json.dumps("x" * 1_000).encode()],
    ),
    "lines": Decoder(
        _rows("lines"), (BadInput,), [b"a\nb\r\n", gzip.compress(b"a\nb\n"), b"a\n\xff\n"]
    ),
}
