"""What a helper thread returns is judged by its owner; what it raises ends the owner's turn."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker.workers import Workers
from aegis_cluster.errors import CorruptLog

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("read")
    yield made
    made.close()


def drain(workers: Workers) -> None:
    assert select.select([workers.fd], [], [], 10)[0], "a result comes"
    workers.drain()


def test_an_error_that_a_job_found_is_a_result(workers: Workers) -> None:
    """Damage that a read met is mended from other replicas; it once ended the shard."""
    found: list[Any] = []
    error = CorruptLog("a segment is damaged")
    workers.submit("read", lambda: error, found.append)
    drain(workers)
    assert found == [error]


def test_what_a_job_raises_is_raised_by_drain(workers: Workers) -> None:
    found: list[Any] = []

    def job() -> None:
        raise OSError("no such disk")

    workers.submit("read", job, found.append)
    with pytest.raises(OSError, match="no such disk"):
        drain(workers)
    assert not found
