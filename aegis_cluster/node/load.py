"""What a node's processes and its disk are busy with, as psutil sees it.

The idea: cheap enough for once a second (a few reads of /proc), and without a failure of its own: a
process that has just ended, or a disk that does not answer, simply has no figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from pathlib import Path


class LoadProbe:
    """Keeps what is needed to tell processor use between two calls; one thread calls it.

    directory: the node's data; its disk is the one that matters.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[int, psutil.Process] = {}
        psutil.cpu_percent(None)

    def machine(self) -> dict[str, Any]:
        """Of the whole machine: processors in percent of all, memory and the data's disk in bytes.

        What cannot be told is left out.
        """
        memory = psutil.virtual_memory()
        found: dict[str, Any] = {
            "cpu_percent": psutil.cpu_percent(None),
            "memory_bytes": memory.total,
            "memory_free_bytes": memory.available,
        }
        try:
            disk = psutil.disk_usage(str(self._directory))
        except OSError:
            return found
        return found | {"disk_bytes": disk.total, "disk_free_bytes": disk.free}

    def process(self, pid: int) -> dict[str, Any]:
        """Of one process: percent of one processor since the last call, and its memory in bytes.

        Empty when it has ended.
        """
        try:
            process = self._processes.get(pid)
            if process is None:
                process = self._processes[pid] = psutil.Process(pid)
            with process.oneshot():
                cpu_percent = process.cpu_percent(None)
                return {"cpu_percent": cpu_percent, "memory_bytes": process.memory_info().rss}
        except psutil.Error:
            return {}

    def forget(self, pid: int) -> None:
        """That process has ended; its number may come round again."""
        self._processes.pop(pid, None)
