"""Each test gets `store_run`: an embedded engine's event store, handed to an async function."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import StreamingEngine
from aegis_cluster.event import EventStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Run = Callable[[Callable[[EventStore], Awaitable[Any]]], Any]


_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def engine_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, one after the other: each opens what the others have left."""
    return tmp_path_factory.mktemp("events") / "data"


@pytest.fixture
def store_run(engine_directory: Path) -> Run:
    """May be called again: it opens what the last call left, on a topic of the test's own."""
    topic = f"events-{next(_NUMBERS)}"

    def run(work: Callable[[EventStore], Awaitable[Any]]) -> Any:
        async def opened() -> Any:
            engine = StreamingEngine.open(engine_directory, request_timeout=10)
            async with asyncio.timeout(30), engine:
                return await work(EventStore(engine, topic, partitions=2))

        return asyncio.run(opened())

    return run
