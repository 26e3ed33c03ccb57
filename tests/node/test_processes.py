"""A process is only ours when number, creation time and command line agree."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from aegis_cluster.errors import Misuse
from aegis_cluster.node.processes import (
    ProcessMark,
    find,
    is_alive,
    kill,
    mark_of,
    terminate,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PARENT_OF_ONE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@contextmanager
def parent_of_one(*, own_group: bool = True) -> Iterator[tuple[ProcessMark, psutil.Process]]:
    """A process with one child, both asleep; the child's process comes second."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT_OF_ONE, "the-marker"],
        stdout=subprocess.PIPE,
        start_new_session=own_group,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        child = psutil.Process(int(lines.readline()))
    try:
        yield mark_of(process.pid, "the-marker"), child
    finally:
        process.kill()
        process.wait()
        if child.is_running():
            child.kill()


def test_this_process_knows_itself() -> None:
    mark = mark_of(os.getpid(), sys.argv[0])
    assert mark.pid == os.getpid()
    assert is_alive(mark) == (sys.argv[0] in psutil.Process().cmdline())


@pytest.mark.parametrize(
    "change",
    [{"created": 1_000.0}, {"marker": "another"}, {"pid": 2**22 - 1}],
    ids=["created", "marker", "pid"],
)
def test_one_difference_makes_it_a_stranger(change: dict[str, object]) -> None:
    with parent_of_one() as (mark, child):
        stranger = mark._replace(**change)  # type: ignore[arg-type]
        assert is_alive(mark)
        assert not is_alive(stranger)
        assert not kill(stranger, 1_000)
        assert is_alive(mark)
        assert child.is_running()


def test_a_kill_ends_the_whole_group_before_it_returns() -> None:
    with parent_of_one() as (mark, child):
        assert kill(mark, 10_000)
        assert not is_alive(mark)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert not kill(mark, 1_000)


def test_a_kill_inside_a_group_of_others_spares_the_others() -> None:
    with parent_of_one(own_group=False) as (mark, child):
        assert kill(mark, 50)
        assert not is_alive(mark)
        assert child.is_running()  # a real shard would have followed as an orphan


def test_terminate_asks_and_the_end_is_waited_for() -> None:
    with parent_of_one() as (mark, _child):
        process = find(mark)
        assert process is not None
        assert wait_for_end([process], 0) == [process]
        terminate(process)
        assert wait_for_end([process], 10_000) == []
        assert not is_alive(mark)
        terminate(process)


def test_nobody_kills_himself() -> None:
    mark = mark_of(os.getpid(), psutil.Process().cmdline()[0])
    with pytest.raises(Misuse):
        kill(mark, 0)
