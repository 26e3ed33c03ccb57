"""The supervisor's shell: one process per shard, its exit, its log, the signals that end the node.

The idea: `supervision` decides; this module starts processes, waits for events in one inbox and
does what it is told. One thread per shard copies its standard error into the node's log and then
waits for it to exit; both arrive in the main thread as events, in that order, so the reason of a
crash stands in the log before the crash.

The rule it protects: no orphans. Shards are started from the main thread alone and are bound to it
(`orphans`), so they end with this process in whichever way it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from typing import TYPE_CHECKING, Final, Protocol

from aegis_cluster import limits
from aegis_cluster.errors import AegisError
from aegis_cluster.node.inbox import Inbox
from aegis_cluster.node.supervision import (
    Action,
    Kill,
    Phase,
    Report,
    Start,
    StepAside,
    Supervision,
    Terminate,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from aegis_cluster.ids import ShardId
    from aegis_cluster.node.log import NodeLog

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""They end the node in order; a second one does not wait for leaders to hand over."""


SHARD_MEMORY: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * limits.MIB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * limits.MIB),
}
"""For glibc's allocator, where the environment says nothing else. Batches are a few hundred
kilobytes; with its own settings it gives such memory back to the kernel and takes it anew, page by
page, with every one of them: a tenth of a shard's processor time."""


class ShardWatch(Protocol):
    """Is told of the shards; nothing that it does may fail or wait."""

    def open_line(self, shard: ShardId, /) -> socket.socket | None:
        """A socket for the shard's process to inherit (`--supervisor-fd`), or None."""

    def started(self, shard: ShardId, pid: int, boot_id: str, /) -> None:
        """A process runs."""

    def ended(self, shard: ShardId, /) -> None:
        """It has ended."""


class Supervisor:
    """Runs the shards of one node until it is told to stop.

    command: the command line of a shard's process, from the shard and the boot id of this start.
    step_aside: asks a shard to hand over its leaders within so many seconds; called in a thread
    of its own, and raises AegisError if it cannot. watch: is told of what starts and ends.
    """

    def __init__(
        self,
        *,
        shards: int,
        command: Callable[[ShardId, str], list[str]],
        step_aside: Callable[[ShardId, float], None],
        log: NodeLog,
        watch: ShardWatch | None = None,
    ) -> None:
        self._core = Supervision(shards)
        self._command = command
        self._step_aside = step_aside
        self._log = log
        self._watch = watch
        self._processes: dict[ShardId, subprocess.Popen[bytes]] = {}
        self._inbox: Inbox[Callable[[int], None]] = Inbox()
        """What happened, to be told to the core with the time in milliseconds."""

    def run(self) -> bool:
        """Run until all shards have ended; return whether that was wished for."""
        previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        self._inbox.wake_on_signals()
        try:
            self._loop()
        finally:
            self._end_all()
            self._inbox.forget_signals()
            self._inbox.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return not self._core.failed

    def stop(self) -> None:
        """Begin to end, as on SIGTERM; from any thread or handler."""
        self._inbox.put(self._core.stop)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.stop()

    def _loop(self) -> None:
        while True:
            self._core.tick(_now_ms())
            for action in self._core.take_actions():
                self._do(action)
            if self._core.phase is Phase.ENDED:
                return
            event = self._inbox.get(self._core.due_in_ms(_now_ms()))
            if event is not None:
                event(_now_ms())

    def _do(self, action: Action) -> None:
        match action:
            case Start(shard):
                self._start(shard)
            case StepAside(shard):
                threading.Thread(
                    target=self._ask_aside, args=(shard,), daemon=True, name=f"aside-{shard}"
                ).start()
            case Terminate(shard):
                self._processes[shard].terminate()
            case Kill(shard):
                self._processes[shard].kill()
            case Report(text):
                self._log.write("supervisor", text)

    def _start(self, shard: ShardId) -> None:
        boot_id = uuid.uuid4().hex
        try:
            process = self._spawn(shard, self._command(shard, boot_id))
        except OSError as error:
            self._log.write("supervisor", f"shard {shard} cannot be started: {error}")
            self._inbox.put(lambda now_ms: self._core.exited(shard, 1, now_ms))
            return
        self._processes[shard] = process
        if self._watch is not None:
            self._watch.started(shard, process.pid, boot_id)
        self._log.write("supervisor", f"shard {shard} starts: pid {process.pid}, boot {boot_id}")
        threading.Thread(
            target=self._follow, args=(shard, process), daemon=True, name=f"follow-{shard}"
        ).start()

    def _spawn(self, shard: ShardId, command: list[str]) -> subprocess.Popen[bytes]:
        line = None if self._watch is None else self._watch.open_line(shard)
        with contextlib.closing(line) if line is not None else contextlib.nullcontext():
            inherited = () if line is None else (line.fileno(),)
            return subprocess.Popen(
                [*command, *(f"--supervisor-fd={number}" for number in inherited)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                env={**SHARD_MEMORY, **os.environ},
            )

    def _follow(self, shard: ShardId, process: subprocess.Popen[bytes]) -> None:
        """Copy what a shard says into the log, then tell that it ended. In a thread of its own."""
        assert process.stdout is not None
        with process.stdout as lines:
            while line := lines.readline(limits.NODE_LOG_LINE_BYTES_MAX):
                self._log.write(f"shard-{shard}", line.decode(errors="replace"))
        code = process.wait()
        if self._watch is not None:
            self._watch.ended(shard)
        self._inbox.put(lambda now_ms: self._core.exited(shard, code, now_ms))

    def _ask_aside(self, shard: ShardId) -> None:
        try:
            self._step_aside(shard, limits.STEP_ASIDE_MS / 1000)
        except AegisError as error:
            self._log.write("supervisor", f"shard {shard} did not step aside: {error}")
        finally:
            self._inbox.put(lambda now_ms: self._core.stepped_aside(shard, now_ms))

    def _end_all(self) -> None:
        """Whatever happened above, leave no shard behind."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
