"""The reader's own memory: what is fetched ahead is bounded, and decoded a little at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aegis_cluster.client import fetcher as fetcher_module
from aegis_cluster.client.fetcher import BUFFER_BYTES_MAX
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.limits import FRAME_BYTES_MAX, KIB, MIB
from aegis_cluster.message import Offset
from aegis_cluster.subscribe_config import SubscribeConfig
from aegis_cluster.wire.batch import decode_columns, encode_batch
from aegis_cluster.wire.protocol import Api, Request
from tests.client.fake_node import TIME_MS, FakeNode, fake_node, run, topic_info, until

if TYPE_CHECKING:
    import pytest

EARLIEST = SubscribeConfig(start=Offset.EARLIEST)


def test_compressed_batches_are_decoded_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch of 4 MB may hold a thousand batches that decompress to a megabyte each."""
    decoded = []

    def counting(batch: Any) -> Any:
        decoded.append(len(batch))
        return decode_columns(batch)

    monkeypatch.setattr(fetcher_module, "decode_columns", counting)

    async def test() -> None:
        async with fake_node(topic_info()) as node:
            rows: list[Any] = [(TIME_MS, None, b"\x00" * MIB, [])]
            for _ in range(40):
                node.append(1, encode_batch(rows, compression="zstd"))
            async with (
                StreamingEngine.connect(node.endpoint) as engine,
                engine.subscribe("t", EARLIEST) as subscriber,
            ):
                assert (await anext(subscriber)).offset == 0
                assert 1 <= len(decoded) < 10
                for offset in range(1, 40):
                    assert (await anext(subscriber)).offset == offset
        assert len(decoded) == 40

    run(test())


def test_many_partitions_fetched_apart_share_one_buffer() -> None:
    """Each may be fetched by a request of its own, and none of them is read."""
    count = 100

    async def test() -> None:
        asked = 0
        under_way = 0
        most = 0
        async with fake_node(topic_info(partitions=count)) as node:
            gate = asyncio.Event()

            async def fetch(request: Request) -> Any:
                nonlocal asked, under_way, most
                items = request.fields[1]
                if len(items) > 1:  # the first one: let partitions come home one by one
                    return [[[0, 0, 0] for _ in items]], [b"" for _ in items]
                budget = sum(item[2] for item in items)
                under_way += budget
                most = max(most, under_way)
                asked += 1
                await gate.wait()
                under_way -= budget
                return await FakeNode.fetch(node, request)

            node.answers[Api.FETCH] = fetch
            async with (
                StreamingEngine.connect(node.endpoint) as engine,
                engine.subscribe("t", EARLIEST) as subscriber,
            ):
                fetcher = subscriber._reader()
                for place in subscriber.assignment:
                    fetcher.hold(place, held=True)
                await until(lambda: fetcher._asked == 0, 5)
                for number, place in enumerate(subscriber.assignment):
                    fetcher.hold(place, held=False)
                    await until(lambda wanted=number + 1: asked == wanted, 5)  # type: ignore[misc]
                gate.set()
            assert most <= BUFFER_BYTES_MAX + count * 64 * KIB + FRAME_BYTES_MAX

    run(test())
