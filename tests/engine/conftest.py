"""One suite, two engines: embedded in this process (fast, the default) and on a cluster of three
nodes of their own processes (marked `processes`).

A test gets `engine_run`, which opens an engine, hands it to an async function and closes it, and
`topic`, a name that no other test uses.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import StreamingEngine
from aegis_cluster.node.free_ports import free_base_port
from tests.cli.test_real_cluster import Directory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from _pytest.fixtures import FixtureRequest

    Run = Callable[[Callable[[StreamingEngine], Awaitable[Any]]], Any]

_NUMBERS = itertools.count()
REQUEST_TIMEOUT_S = 10.0


@pytest.fixture(scope="session")
def embedded_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, one after the other: each opens what the others have left."""
    return tmp_path_factory.mktemp("embedded") / "data"


@pytest.fixture(scope="session")
def cluster_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base_port = free_base_port()
    directory = Directory(tmp_path_factory.mktemp("cluster"), base_port)
    directory.up()
    yield ",".join(f"tcp://127.0.0.1:{base_port + 100 * node + 1}" for node in (1, 2, 3))
    directory.run("cluster", "down")


@pytest.fixture(
    params=[
        "embedded",
        pytest.param(
            "cluster",
            marks=[pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(120)],
        ),
    ]
)
def new_engine(request: FixtureRequest) -> Callable[[], StreamingEngine]:
    """Makes an engine, not open yet; the same place each time."""
    if request.param == "embedded":
        directory: Path = request.getfixturevalue("embedded_directory")
        return lambda: StreamingEngine.open(directory, request_timeout=REQUEST_TIMEOUT_S)
    address: str = request.getfixturevalue("cluster_address")
    return lambda: StreamingEngine.connect(address, request_timeout=REQUEST_TIMEOUT_S)


@pytest.fixture
def engine_run(new_engine: Callable[[], StreamingEngine]) -> Run:
    """Runs an async function with an open engine; what it does may take half a minute."""

    def run(work: Callable[[StreamingEngine], Awaitable[Any]]) -> Any:
        async def opened() -> Any:
            async with asyncio.timeout(30), new_engine() as engine:
                return await work(engine)

        return asyncio.run(opened())

    return run


@pytest.fixture
def topic() -> str:
    return f"topic-{next(_NUMBERS)}"
