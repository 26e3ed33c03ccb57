"""Rows read beside the loop: all of them, in order, bounded, errors in their place."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import limits
from aegis_cluster.cli.feed import RowFeed
from aegis_cluster.cli.records import BadInput, Row
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


async def collect(rows: Iterator[Row], rows_max: int = 100) -> list[list[Row]]:
    return [chunk async for chunk in RowFeed(rows).chunks(rows_max)]


def numbered(count: int) -> Iterator[Row]:
    return (Row(number, str(number)) for number in range(count))


@pytest.mark.parametrize("count", [0, 1, 100, 101, 10_000])
def test_everything_in_order_in_chunks(count: int) -> None:
    chunks = asyncio.run(collect(numbered(count)))
    assert [row for chunk in chunks for row in chunk] == list(numbered(count))
    assert all(0 < len(chunk) <= 100 for chunk in chunks)


def test_an_error_comes_after_the_rows_before_it() -> None:
    def broken() -> Iterator[Row]:
        yield from numbered(5)
        raise BadInput("is broken", 6)

    seen: list[Row] = []

    async def read() -> None:
        async for chunk in RowFeed(broken()).chunks():
            seen.extend(chunk)

    with pytest.raises(BadInput, match="line 6"):
        asyncio.run(read())
    assert seen == list(numbered(5))


def test_no_more_is_read_ahead_than_the_limit() -> None:
    read = 0

    def counted() -> Iterator[Row]:
        nonlocal read
        for row in numbered(3 * limits.PUBLISH_ROWS_MAX):
            read += 1
            yield row

    async def take_one_chunk() -> None:
        chunks = RowFeed(counted()).chunks(1)
        await anext(chunks)
        await asyncio.to_thread(
            wait_until, lambda: read > limits.PUBLISH_ROWS_MAX, "the feed reads ahead"
        )
        assert read <= limits.PUBLISH_ROWS_MAX + 2

    asyncio.run(take_one_chunk())


def test_a_row_is_handed_out_when_it_is_there() -> None:
    """A pipe that stays open does not hold back what came through it."""
    more = threading.Event()

    def slow() -> Iterator[Row]:
        yield Row(1, "first")
        more.wait(10)
        yield Row(2, "second")

    async def read() -> list[list[Row]]:
        chunks = RowFeed(slow()).chunks()
        first = await anext(chunks)
        more.set()
        return [first, *[chunk async for chunk in chunks]]

    assert asyncio.run(read()) == [[Row(1, "first")], [Row(2, "second")]]
