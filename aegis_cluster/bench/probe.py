"""Processes beside us that measure the machine: `python -m aegis_cluster.bench.probe …`.

write PATH BYTES SECONDS    append and fdatasync again and again; says MB/s and p50 in ms
echo                        says its address, then sends small answers to what asks for one
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import zmq


def write(path: str, size: int, seconds: float) -> None:
    """Append to a file of its own, which is removed at the end."""
    data = os.urandom(size)
    took = []
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    try:
        start = time.perf_counter()
        while (before := time.perf_counter()) < start + seconds:
            os.write(file, data)
            os.fdatasync(file)
            took.append(time.perf_counter() - before)
        total = time.perf_counter() - start
    finally:
        os.close(file)
        os.remove(path)
    mb_s = len(took) * size / total / 1e6
    sys.stdout.write(f"{mb_s} {statistics.median(took) * 1000}\n")


def echo() -> None:
    """Answer `[back, …]` with one small message; swallow everything else. Ends by being killed."""
    socket = zmq.Context().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sys.stdout.write(f"tcp://127.0.0.1:{port}\n")
    sys.stdout.flush()
    while True:
        origin, word, *_ = socket.recv_multipart(copy=False)
        if word.bytes == b"back":
            socket.send_multipart([origin.bytes, b"ok"])


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        echo()
