"""Compaction in a process of its own: `python -m aegis_cluster.node.compaction_child`.

The idea: a pass decodes every record, which would hold the interpreter of a shard, and with it its
heartbeats. The job comes in on standard input, what came of it goes out on standard output, both in
msgpack; files are written aside by this process and put in their places by the shard. It runs with
the lowest priority, dies with its parent, and whatever it leaves behind is removed at the next
start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from threading import Lock
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import AegisError, CorruptLog
from aegis_cluster.node.orphans import die_with_parent
from aegis_cluster.storage.compaction import compact
from aegis_cluster.storage.compaction_job import (
    CompactionJob,
    CompactionResult,
    decode_job,
    decode_result,
    encode_job,
    encode_result,
)
from aegis_cluster.storage.disk import RealDisk

if TYPE_CHECKING:
    from aegis_cluster.storage.store import ShardStore

NICE: Final = 19
ERROR_CHARS_MAX: Final = 500

log = logging.getLogger(__name__)


class ChildCompactor:
    """Runs passes in child processes, one at a time; `stop` ends one that is under way."""

    def __init__(self) -> None:
        self._lock = Lock()
        """A leaf: it is held while a child is started or killed, and nothing is called under it."""
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __call__(self, _: ShardStore, job: CompactionJob) -> CompactionResult | None:
        """One pass; None where it gave up. Blocks."""
        with self._lock:
            if self._stopped:
                return None
            try:
                self._child = child = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            except OSError as error:  # no memory, no descriptors, no interpreter: another time
                log.warning("Compaction of group %s could not begin: %s", job.group, error)
                return None
        output, said = child.communicate(encode_job(job))
        with self._lock:
            self._child = None
        if child.returncode == 0:
            with contextlib.suppress(CorruptLog):
                return decode_result(output)
        if not self._stopped:
            why = said.decode(errors="replace").strip()[-ERROR_CHARS_MAX:]
            log.warning("Compaction of group %s gave up: %s", job.group, why)
        return None

    def stop(self) -> None:
        """No more passes; called before the threads of a shard are waited for."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()


def main(arguments: list[str]) -> int:
    """Read a job, do it, write what came of it."""
    die_with_parent(int(arguments[0]))
    os.nice(NICE)
    try:
        result = compact(RealDisk(), decode_job(sys.stdin.buffer.read()))
    except (AegisError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(encode_result(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
