"""A node's log: what its supervisor says and what its shards write to standard error.

The idea: writers hand lines to a bounded queue and never wait; one thread writes them to
`node.log`. A full disk or a slow one costs log lines, which are counted, and never a heartbeat.

The rule it protects: the log is bounded in memory and on disk (the file and the one before it).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO, Final

from aegis_cluster import limits

if TYPE_CHECKING:
    from pathlib import Path

LOG_NAME: Final = "node.log"
OLD_LOG_NAME: Final = "node.log.1"
_CLOSE_SECONDS: Final = 2.0
_LINE_BYTES_SHOWN: Final = 400
"""Of a line, on average, when the last ones are read."""


class NodeLog:
    """Appends lines to `node.log` in a thread of its own; `close` writes what is queued."""

    def __init__(self, directory: Path, *, file_bytes_max: int = limits.NODE_LOG_BYTES_MAX) -> None:
        self.path = directory / LOG_NAME
        self._old_path = directory / OLD_LOG_NAME
        self._file_bytes_max = file_bytes_max
        self._lines: queue.Queue[bytes | None] = queue.Queue(limits.NODE_LOG_QUEUE_LINES)
        self._dropped = 0
        """Lines since the last one written that found no room, or no disk; several threads add
        to it without a lock, so it may be a little low."""
        self._writer = threading.Thread(target=self._run, daemon=True, name="node-log")
        self._writer.start()

    def write(self, source: str, text: str) -> None:
        """Add one line; never waits."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = f"{now} {source}: {text.rstrip()}\n".encode(errors="replace")
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued and end; gives up on a disk that does not answer."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_SECONDS)
        self._writer.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        file: BinaryIO | None = None
        while (line := self._lines.get()) is not None:
            try:
                file = self._room_for(file, line)
                file.write(self._with_dropped(line))
                self._dropped = 0
            except OSError:
                # Nobody is left to tell: the count goes into the next line that can be written.
                self._dropped += 1
                _close(file)
                file = None
        _close(file)

    def _with_dropped(self, line: bytes) -> bytes:
        note = f"(before this line, {self._dropped} were dropped)\n".encode()
        return note + line if self._dropped else line

    def _room_for(self, file: BinaryIO | None, line: bytes) -> BinaryIO:
        if file is None:
            file = self._open()
        if file.tell() + len(line) <= self._file_bytes_max:
            return file
        file.close()
        self.path.replace(self._old_path)
        return self._open()

    def _open(self) -> BinaryIO:
        # Unbuffered: a line is in the file when it is written, also if we are killed.
        return self.path.open("ab", buffering=0)


def _close(file: BinaryIO | None) -> None:
    with contextlib.suppress(OSError):
        if file is not None:
            file.close()


def size_of_log(directory: Path) -> int:
    """Bytes in a node's log now; 0 when there is none."""
    try:
        return (directory / LOG_NAME).stat().st_size
    except OSError:
        return 0


def last_lines(directory: Path, count: int, *, since: int = 0) -> list[str]:
    """The last lines of a node's log; empty when there is none.

    since: what lay before this position is left out, unless the log has begun anew meanwhile.
    """
    try:
        with (directory / LOG_NAME).open("rb") as file:
            end = file.seek(0, 2)
            first = since if since <= end else 0
            file.seek(max(first, end - count * _LINE_BYTES_SHOWN))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
