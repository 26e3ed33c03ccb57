"""A shard process without a shard: says one line, then does what its first argument names."""

from __future__ import annotations

import os
import signal
import sys
import threading

from aegis_cluster.node.orphans import die_with_parent


def main() -> None:
    """`MODE PARENT`"""
    mode, parent = sys.argv[1], int(sys.argv[2])
    die_with_parent(parent)
    ended = threading.Event()
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
    sys.stderr.write(f"{mode} {os.getpid()}\n")
    sys.stderr.flush()
    if mode.isdecimal():
        sys.exit(int(mode))
    ended.wait()


if __name__ == "__main__":
    main()
