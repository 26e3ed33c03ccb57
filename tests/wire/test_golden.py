"""Old bytes still read, and what we write today is what we wrote then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.errors import NotLeader
from aegis_cluster.ids import GroupId
from aegis_cluster.wire.batch import batch_header, decode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import CHAIN_START, check_frame, frame_annotation, iter_frames
from aegis_cluster.wire.payload import decode_key, decode_payload
from aegis_cluster.wire.protocol import Api, Hello, decode_reply, decode_request
from tests.wire import regenerate_golden as golden
from tests.wire.golden import GOLDEN
from tests.wire.samples import COMPRESSIONS, ROWS, both_codecs, rows_of

if TYPE_CHECKING:
    from pathlib import Path

# A newer compressor may choose other bytes for the same records; those only have to be read.
STABLE = [
    name
    for name in golden.golden_files()
    if not name.startswith("batch-v2-") or name == "batch-v2-none.bin"
]


@pytest.mark.parametrize("name", STABLE)
def test_what_is_written_today_is_what_was_written_then(name: str) -> None:
    assert golden.golden_files()[name] == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("codec", both_codecs(), ids=lambda codec: codec.name)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_old_batches_read(codec: Any, compression: str) -> None:
    batch = (GOLDEN / f"batch-v2-{compression}.bin").read_bytes()
    header = batch_header(batch)
    assert (header.base_offset, header.leader_epoch, header.producer_id) == (1_000, 3, 77)
    assert header.codec == COMPRESSIONS.index(compression)
    records = decode_batch(batch, codec=codec)
    assert rows_of(records) == ROWS
    assert records[-1].offset == 1_000 + len(ROWS) - 1


def test_old_frames_read() -> None:
    run = (GOLDEN / "frames-v1.bin").read_bytes()
    chain, kinds = CHAIN_START, []
    for position, found in iter_frames(run):
        header = check_frame(GroupId(golden.GOLDEN_GROUP), run, position, previous_chain=chain)
        assert header == found
        assert bytes(frame_annotation(run, header, position)) in {b"", b"\x81\xa1a\x01"}
        kinds.append(header.kind)
        chain = header.chain
    assert kinds == golden.GOLDEN_KINDS


def parts_of(name: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in (GOLDEN / f"{name}.hex").read_text().split("\n")[:-1]]


def test_old_requests_read() -> None:
    request = decode_request(parts_of("request-v1"))
    fields = ["orders", 3, None, True, b"\x01"]
    assert request == (Api.PRODUCE, 1, 7, 900, fields, [b"part"])


def test_old_replies_read() -> None:
    assert decode_reply(parts_of("reply-v1")) == (
        Api.PRODUCE,
        1,
        7,
        0,
        [[3, 100], {"k": -1}],
        [b"", b"x"],
    )


def test_old_error_replies_read() -> None:
    reply = decode_reply(parts_of("reply-error-v1"))
    error = error_from_reply(reply.code, reply.fields)
    assert type(error) is NotLeader
    assert error.details == {"leader": 3, "term": 9}


def test_an_old_hello_reads() -> None:
    request = decode_request(parts_of("hello-v1"))
    assert request.api == Api.HELLO
    assert Hello.from_fields(request.fields) == golden.GOLDEN_HELLO


def decoded_from(entry: Any, decode: Any) -> Any:
    headers = [(name, value and bytes.fromhex(value)) for name, value in entry["headers"]]
    data = None if entry["bytes"] is None else bytes.fromhex(entry["bytes"])
    return decode(data, headers)


def test_old_payloads_and_keys_read() -> None:
    payloads = json.loads((GOLDEN / "payloads-v1.json").read_text())
    assert [decoded_from(entry, decode_payload) for entry in payloads] == golden.GOLDEN_PAYLOADS
    keys = json.loads((GOLDEN / "keys-v1.json").read_text())
    assert [decoded_from(entry, decode_key) for entry in keys] == golden.GOLDEN_KEYS


def test_regenerating_refuses_to_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "GOLDEN", tmp_path)
    assert golden.main([]) == 0
    (tmp_path / "hello-v1.hex").write_text("old")
    assert golden.main([]) == 1
    assert (tmp_path / "hello-v1.hex").read_text() == "old"
    assert "hello-v1.hex" in capsys.readouterr().err
    assert golden.main(["--rewrite"]) == 0
    assert (tmp_path / "hello-v1.hex").read_bytes() == (GOLDEN / "hello-v1.hex").read_bytes()
