"""Is a process still the one we started, and how to end it with all of its children at once.

The idea: a number alone says nothing, since process ids come round again. A process is ours when
its number, its time of creation and its command line all agree with what it wrote about itself.

The rule it protects: no signal is ever sent to a process that we did not start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Final, NamedTuple

import psutil

from aegis_cluster.errors import Misuse

CREATED_TOLERANCE_SECONDS: Final = 2.0
"""The creation time is counted from the boot time, which moves when the clock is set."""

_POLL_SECONDS: Final = 0.02


class ProcessMark(NamedTuple):
    """What tells one process of this machine from every other, before and after it."""

    pid: int
    created: float
    """Seconds since the epoch, as psutil gives it."""
    group: int
    """Its process group; equal to `pid` when it leads one, as nodes started by `up` do."""
    marker: str
    """A word of its command line that no other kind of process has: its node's file."""


def mark_of(pid: int, marker: str) -> ProcessMark:
    """The mark of a process that certainly runs: ourselves, or a child that we have not reaped."""
    return ProcessMark(pid, psutil.Process(pid).create_time(), os.getpgid(pid), marker)


def find(mark: ProcessMark) -> psutil.Process | None:
    """That very process, None when it has ended (a zombie has) or the number is another's now.

    Take it before a signal is sent: a process that is about to end has no command line any more.
    """
    try:
        process = psutil.Process(mark.pid)
        same = (
            abs(process.create_time() - mark.created) <= CREATED_TOLERANCE_SECONDS
            and mark.marker in process.cmdline()
        )
    except psutil.Error:
        # Gone, or somebody else's: either way not ours.
        return None
    return process if same and _runs(process) else None


def is_alive(mark: ProcessMark) -> bool:
    """Whether that very process still runs."""
    return find(mark) is not None


def terminate(process: psutil.Process, *, hurry: bool = False) -> None:
    """Ask a process to end itself; nothing happens when it has ended meanwhile.

    hurry: ask twice, which tells a supervisor not to wait for leaders to hand over. By another
    signal, because two of the same that are not delivered yet count as one.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
        if hurry:
            process.send_signal(signal.SIGINT)


def kill(mark: ProcessMark, timeout_ms: int) -> bool:
    """SIGKILL to the process and its children in one instant; return whether it was there.

    Returns when all of them are gone, so that their ports and files are free.
    """
    process = find(mark)
    if process is None:
        return False
    if mark.pid == os.getpid():
        raise Misuse("a process does not kill itself here", pid=mark.pid)
    family = _family(process)
    if _leads_its_group(mark):
        os.killpg(mark.group, signal.SIGKILL)
    else:
        # Started by hand inside a group of others: its shards follow it as orphans do (`orphans`).
        process.kill()
    wait_for_end(family, timeout_ms)
    return True


def wait_for_end(processes: list[psutil.Process], timeout_ms: int) -> list[psutil.Process]:
    """Wait until none of them runs; return those that still do at the deadline."""
    deadline = time.monotonic() + timeout_ms / 1000
    left = [process for process in processes if _runs(process)]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = [process for process in left if _runs(process)]
    return left


def _runs(process: psutil.Process) -> bool:
    """Not ended, and not a zombie: in a container nobody may be there to reap it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def _leads_its_group(mark: ProcessMark) -> bool:
    try:
        return mark.group == mark.pid == os.getpgid(mark.pid)
    except ProcessLookupError:
        return False
