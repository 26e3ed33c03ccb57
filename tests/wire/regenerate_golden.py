"""Write the golden files of the wire: `python -m tests.wire.regenerate_golden [--rewrite]`.

Files that exist are left alone, since they stand for bytes on users' disks; `--rewrite` is for a
format that was never released, and its diff is reviewed.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from aegis_cluster.errors import NotLeader
from aegis_cluster.wire.batch import encode_batch, stamp
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.frame import FrameKind
from aegis_cluster.wire.partitioner import murmur2, partition_for
from aegis_cluster.wire.payload import encode_key, encode_payload
from aegis_cluster.wire.protocol import Api, Hello, encode_reply, encode_request
from tests.wire.golden import GOLDEN
from tests.wire.samples import COMPRESSIONS, ROWS, log_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.wire.payload import Payload
    from aegis_cluster.wire.protocol import Part

GOLDEN_GROUP = 42
GOLDEN_KINDS = [
    FrameKind.NOOP,
    FrameKind.DATA,
    FrameKind.MEMBERSHIP,
    FrameKind.LOG_START,
    FrameKind.DATA,
]
GOLDEN_HELLO = Hello(1, "peer", "c1f2", 2, "inc-7", "boot-9", 1)
GOLDEN_PAYLOADS: list[Payload] = [
    None,
    b"\x00\xff",
    "",
    "grüße",
    True,
    0,
    -1.5,
    [],
    {"id": "123", "amount": 99.99, "tags": ["a", None, False], "deep": {"ü": 2**70}},
]
GOLDEN_KEYS: list[str | bytes | None] = [None, "", "order-123", "ключ", b"", b"order-123", b"\xff"]
GOLDEN_PARTITIONED = [b"", b"a", b"ab", b"abc", b"abcd", b"order-123", b"\xff" * 9, b"k" * 200]


def parts_as_text(parts: Sequence[Part]) -> str:
    """The parts of a message, one line of hex each."""
    return "".join(f"{bytes(part).hex()}\n" for part in parts)


def messages() -> dict[str, list[Part]]:
    """One message of every kind."""
    code, fields = error_to_reply(NotLeader("another node leads", leader=3, term=9))
    return {
        "request-v1": encode_request(
            Api.PRODUCE, ["orders", 3, None, True, b"\x01"], [b"part"], correlation=7, ms_left=900
        ),
        "reply-v1": encode_reply(Api.PRODUCE, [[3, 100], {"k": -1}], [b"", b"x"], correlation=7),
        "reply-error-v1": encode_reply(Api.PRODUCE, fields, correlation=8, code=code),
        "hello-v1": encode_request(
            Api.HELLO, GOLDEN_HELLO.to_fields(), correlation=1, ms_left=2_000
        ),
    }


def golden_files() -> dict[str, bytes]:
    """Name and content of every golden file of the wire."""
    files = {"frames-v1.bin": b"".join(log_of(GOLDEN_GROUP, GOLDEN_KINDS))}
    for name in COMPRESSIONS:
        batch = encode_batch(
            ROWS, producer_id=77, producer_epoch=2, base_sequence=5, compression=name
        )
        files[f"batch-v2-{name}.bin"] = stamp(batch, 1_000, 3)
    for name, parts in messages().items():
        files[f"{name}.hex"] = parts_as_text(parts).encode()
    files["partitioner-v1.json"] = _json([_vector(key) for key in GOLDEN_PARTITIONED])
    files["payloads-v1.json"] = _json(
        [_encoded(encode_payload(value)) for value in GOLDEN_PAYLOADS]
    )
    files["keys-v1.json"] = _json([_encoded(encode_key(key)) for key in GOLDEN_KEYS])
    return files


def _vector(key: bytes) -> dict[str, object]:
    partitions = {str(count): partition_for(key, count) for count in (1, 3, 8, 100, 10_000)}
    return {"key": key.hex(), "murmur2": murmur2(key), "partitions": partitions}


def _encoded(encoded: tuple[bytes | None, list[tuple[str, bytes | None]]]) -> dict[str, object]:
    data, headers = encoded
    return {
        "bytes": None if data is None else data.hex(),
        "headers": [[name, None if value is None else value.hex()] for name, value in headers],
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def main(arguments: Sequence[str]) -> int:
    """Write what is missing; report what is there and differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewrite", action="store_true", help="replace files that exist")
    rewrite = parser.parse_args(arguments).rewrite
    GOLDEN.mkdir(parents=True, exist_ok=True)
    kept = []
    for name, content in golden_files().items():
        path = GOLDEN / name
        if path.exists() and not rewrite:
            if path.read_bytes() != content:
                kept.append(name)
            continue
        path.write_bytes(content)
    if kept:
        sys.stderr.write(f"kept, though they would differ now: {', '.join(kept)}\n")
    return 1 if kept else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
