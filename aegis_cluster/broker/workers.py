"""Helper threads of a shard: what blocks on a disk happens here, and its end is one more input.

One thread syncs the journal, one does checkpoints, one reads cold frames. Results come back
through a queue and a pipe that wakes the shard's loop. What a job returns is its owner's to judge,
an error that it found on disk included; what it raises is raised again on the owner's thread, which
ends the process.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Job = Callable[[], Any]
    Done = Callable[[Any], None]


class Workers:
    """Named threads, each with a queue of its own, all reporting to one place."""

    def __init__(self, *names: str) -> None:
        self._results: queue.SimpleQueue[tuple[Done, Any, Exception | None]] = queue.SimpleQueue()
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._jobs: dict[str, queue.SimpleQueue[tuple[Job, Done] | None]] = {}
        self._threads: list[threading.Thread] = []
        for name in names:
            jobs: queue.SimpleQueue[tuple[Job, Done] | None] = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, args=(jobs,), name=name, daemon=True)
            self._jobs[name] = jobs
            self._threads.append(thread)
            thread.start()

    @property
    def fd(self) -> int:
        """Readable when there are results."""
        return self._read_fd

    def submit(self, name: str, job: Job, done: Done) -> None:
        """Run `job` on that thread; `done` gets what it returns, from `drain`."""
        self._jobs[name].put((job, done))

    def drain(self) -> None:
        """Hand over all results that have come; called on the owner's thread.

        Raises what a job raised.
        """
        try:
            os.read(self._read_fd, 4096)
        except BlockingIOError:
            return
        while True:
            try:
                done, result, error = self._results.get_nowait()
            except queue.Empty:
                return
            if error is not None:
                raise error
            done(result)
            del done, result  # see `_run`

    def close(self) -> None:
        """Let the threads finish what is queued, then end."""
        for jobs in self._jobs.values():
            jobs.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _run(self, jobs: queue.SimpleQueue[tuple[Job, Done] | None]) -> None:
        while (item := jobs.get()) is not None:
            self._do(*item)
            # A job holds the files that it worked on, and a file that is open keeps its room on
            # disk when it is deleted: nothing may remember it until the next one comes.
            del item
            self._wake()

    def _do(self, job: Job, done: Done) -> None:
        try:
            self._results.put((done, job(), None))
        except Exception as error:  # noqa: BLE001 - the owner raises it, nothing is swallowed
            self._results.put((done, None, error))

    def _wake(self) -> None:
        try:
            os.write(self._write_fd, b".")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already
