"""A data directory of version 1 is read by every later version: by storage, and by real nodes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.engine import StreamingEngine
from aegis_cluster.ids import LogIndex, NodeId
from aegis_cluster.message import Message, from_record
from aegis_cluster.node.identity import read_identity
from aegis_cluster.storage.disk import RealDisk
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.wire.batch import decode_batch
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from tests.integration.cluster import cluster, read_all, run
from tests.integration.golden import ARCHIVE, as_rows, expected_records, unpack

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.message import ReceivedMessage
    from aegis_cluster.storage.types import RecoveredGroup


def test_the_archive_is_small_and_holds_something() -> None:
    assert ARCHIVE.stat().st_size < 300_000
    counts = {topic: len(rows) for topic, rows in expected_records().items()}
    assert counts == {"plain": 140, "zipped": 140, "single": 140, "empty": 0}


@pytest.mark.slow
def test_storage_opens_it_and_finds_every_record(tmp_path: Path) -> None:
    data = tmp_path / "data"
    unpack(ARCHIVE, data)
    expected = expected_records()
    copies: Counter[tuple[str, int]] = Counter()
    for number in (1, 2, 3):
        folder = str(data / f"node-{number}")
        identity = read_identity(RealDisk(), folder)
        assert identity is not None
        assert identity.node == NodeId(number)
        prepare_node_dir(RealDisk(), folder, 1)
        store = ShardStore(RealDisk(), folder, 0, clock_ms=lambda: 0)
        for found in store.recover():
            assert found.damage is None
            assert found.hard_state.term >= 1
            if found.topic in expected:
                rows = as_rows(_messages(found))
                assert rows == [r for r in expected[found.topic] if r[0] == found.partition]
                copies[found.topic, found.partition] += 1
        store.close()
    assert copies == {
        **{("plain", partition): 3 for partition in range(3)},
        ("zipped", 0): 3,
        ("empty", 0): 3,
        ("single", 0): 1,
        ("single", 1): 1,
    }


def _messages(found: RecoveredGroup) -> list[ReceivedMessage]:
    log = found.log
    messages: list[ReceivedMessage] = []
    index = log.first_index
    while index <= log.last_index:
        data = log.read(index, log.last_index, 1 << 20).data
        for position, header in iter_frames(data):
            index = LogIndex(header.index + 1)
            if header.kind is FrameKind.DATA:
                records = decode_batch(frame_payload(data, header, position))
                messages += [from_record(found.topic, found.partition, r) for r in records]
    return messages


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_nodes_serve_exactly_its_records(tmp_path: Path) -> None:
    path = tmp_path / "golden"
    path.mkdir()
    unpack(ARCHIVE, path / "data")
    expected = expected_records()

    async def compare(engine: StreamingEngine) -> None:
        assert await engine.list_topics() == sorted(expected)
        for topic, rows in expected.items():
            assert as_rows(await read_all(engine, topic)) == rows

    async def test(bootstrap: str) -> None:
        async with StreamingEngine.connect(bootstrap) as engine:
            await compare(engine)
            for topic, rows in expected.items():
                await engine.publish(topic, Message(payload="new"))
                assert len(await read_all(engine, topic)) == len(rows) + 1

    with cluster(path) as running:
        run(test(running.bootstrap))
