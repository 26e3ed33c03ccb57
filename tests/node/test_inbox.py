"""The supervisor's inbox: in order, from threads and signal handlers, and never slept through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.node.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

TWO_SIGNALS = """
import os, signal, threading
from aegis_cluster.node.inbox import Inbox
inbox = Inbox()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _frame: inbox.put(number))
inbox.wake_on_signals()
reading, _ = os.pipe()
threading.Thread(target=os.read, args=(reading, 1), daemon=True).start()
print("ready", flush=True)
left = {signal.SIGTERM, signal.SIGINT}
while left:
    left.discard(inbox.get(None))
"""


@pytest.fixture
def inbox() -> Iterator[Inbox[int]]:
    inbox: Inbox[int] = Inbox()
    yield inbox
    inbox.close()


def test_events_come_in_order(inbox: Inbox[int]) -> None:
    for number in range(100_000):
        inbox.put(number)
    assert [inbox.get(None) for _ in range(100_000)] == list(range(100_000))


def test_nothing_comes_in_time(inbox: Inbox[int]) -> None:
    assert inbox.get(0) is None
    assert inbox.get(1) is None


def test_another_thread_wakes_the_one_that_waits(inbox: Inbox[int]) -> None:
    threading.Timer(0.02, inbox.put, [7]).start()
    assert inbox.get(10_000) == 7


def test_putting_into_a_closed_inbox_is_no_failure() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.close()
    inbox.put(1)


@pytest.mark.processes
@pytest.mark.slow
def test_two_signals_at_once_are_both_heard() -> None:
    """Whichever threads the kernel picks for them."""
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", TWO_SIGNALS], stdout=subprocess.PIPE, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(5) == 0
