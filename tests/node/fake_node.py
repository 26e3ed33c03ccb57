"""`aegis node run` without a shard: takes the lock, writes its run file, and waits for its end.

A file `mode` in its data directory changes what it does: `die` says why and ends at once,
`slow` gets nowhere, `stubborn` does not listen to signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from aegis_cluster.config import load_node_config
from aegis_cluster.node.identity import lock_directory
from aegis_cluster.node.processes import mark_of
from aegis_cluster.node.run_file import remove_run_file, write_run_file
from aegis_cluster.storage.disk import RealDisk


def main() -> None:
    """`--config FILE`"""
    file = Path(sys.argv[2])
    data = load_node_config(file).data
    mode_file = data.parent / f"{data.name}.mode"
    mode = mode_file.read_text() if mode_file.exists() else ""
    if mode == "die":
        sys.stderr.write("port 7101 is in use\n")
        sys.exit(1)
    ended = threading.Event()
    if mode == "slow":
        ended.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if mode == "stubborn" else lambda *_: ended.set())
    lock = lock_directory(RealDisk(), str(data))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    write_run_file(data, mark_of(os.getpid(), str(file)), boot_id=str(child.pid))
    ended.wait()
    child.kill()
    child.wait()
    remove_run_file(data)
    lock.release()


if __name__ == "__main__":
    main()
