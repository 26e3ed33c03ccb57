"""Ends a shard process the moment its supervisor is gone, however that one ended.

The idea: the kernel is told to send SIGKILL when the parent dies (PR_SET_PDEATHSIG), so not even a
supervisor that was killed with -9 leaves orphans that hold ports and files: no handler of ours has
to run for it.

The rule it protects: at most one process ever writes a shard's files.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_POLL_SECONDS: Final = 0.2


def die_with_parent(parent: int) -> None:
    """Die with the process `parent`, which started us; leave SIGINT to it.

    The kernel watches the *thread* that started us, so a supervisor starts shards from its main
    thread only. A Ctrl-C reaches the whole process group; the supervisor alone answers it, and
    then stops its shards in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        _ask_kernel()
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="orphans").start()
    # The parent may have died before the kernel knew what to do about it.
    if os.getppid() != parent:
        os._exit(1)


def _ask_kernel() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _watch(parent: int) -> None:
    """Where the kernel has no such service: look for a new parent, which is what orphans get."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
