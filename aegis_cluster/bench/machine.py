"""What this machine can do at best, measured beside the scenarios: disk, loopback, codec.

The idea: a figure of ours means something only beside what the machine allows in the same minutes.
Writers and echo run in processes of their own (`probe`), as our nodes do.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import zmq

from aegis_cluster.errors import Unavailable
from aegis_cluster.limits import KIB
from aegis_cluster.wire.batch import BatchBuilder, decode_batch
from aegis_cluster.wire.crc import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WRITERS: Final = 3
VALUE_BYTES: Final = 100
BATCH_RECORDS: Final = 2_000
STREAM_BYTES: Final = 256 * KIB
PING_BYTES: Final = 100


class Limit(NamedTuple):
    """One thing that the machine does, with its unit and what it means for us."""

    name: str
    title: str
    unit: str
    value: float


LARGE_SYNC: Final = "disk, 256 KB"
SMALL_SYNC: Final = "disk, 4 KB"
STREAM: Final = "loopback"
ROUND_TRIP: Final = "round trip"
ENCODE: Final = "encode"
DECODE: Final = "decode"
CRC: Final = "crc-32c"
RECORDS_TO_DISK: Final = "disk, records"
ONE_WRITE: Final = "one write"


def measure(directory: Path, seconds: float) -> list[Limit]:
    """Every limit; takes about six times `seconds`."""
    large, _ = _three_writers(directory, STREAM_BYTES, seconds)
    small, sync_ms = _three_writers(directory, 4 * KIB, seconds)
    _, one_sync_ms = _writers(directory, 1, 4 * KIB, seconds / 2)
    with _echo() as endpoint:
        round_trip_ms = _round_trip(endpoint, seconds / 2)
        stream = _stream(endpoint, seconds / 2)
    encoded, decoded = _codec(seconds / 2)
    per_replica = large / WRITERS
    return [
        Limit(LARGE_SYNC, "three writers, append and fdatasync 256 KB, together", "MB/s", large),
        Limit(SMALL_SYNC, "three writers, append and fdatasync 4 KB, together", "MB/s", small),
        Limit("sync 4 KB", "fdatasync after 4 KB, three writers, p50", "ms", sync_ms),
        Limit(STREAM, "pyzmq over TCP, 256 KB messages, one way", "MB/s", stream),
        Limit(ROUND_TRIP, "pyzmq over TCP, 100 B there and back, p50", "ms", round_trip_ms),
        Limit(ENCODE, "records of 100 B into batches, one process", "records/s", encoded),
        Limit(DECODE, "records of 100 B out of batches, one process", "records/s", decoded),
        Limit(CRC, "CRC-32C of 256 KB", "MB/s", _checksum(seconds / 4)),
        Limit("disk/3", "what the disk takes of each of three replicas", "MB/s", per_replica),
        Limit(
            RECORDS_TO_DISK,
            "the same as records of 100 B",
            "records/s",
            per_replica * 1e6 / VALUE_BYTES,
        ),
        Limit(
            ONE_WRITE,
            "two round trips (client, follower) and one fdatasync of 4 KB",
            "ms",
            2 * round_trip_ms + one_sync_ms,
        ),
    ]


# Disk


def _three_writers(directory: Path, size: int, seconds: float) -> tuple[float, float]:
    return _writers(directory, WRITERS, size, seconds)


def _writers(directory: Path, count: int, size: int, seconds: float) -> tuple[float, float]:
    """MB/s of all together, and the median of a single write with its sync in milliseconds."""
    started = [
        _probe("write", str(directory / f"limit-{number}"), str(size), str(seconds))
        for number in range(count)
    ]
    said = [process.communicate()[0].split() for process in started]
    if any(process.returncode for process in started):
        raise Unavailable(f"The writers that measure the disk in {directory} failed.")
    return sum(float(mb_s) for mb_s, _ in said), statistics.median(float(ms) for _, ms in said)


def _probe(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aegis_cluster.bench.probe", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# Loopback


@contextlib.contextmanager
def _echo() -> Iterator[str]:
    process = _probe("echo")
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def _dealer(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    try:
        socket.connect(endpoint)
        yield socket
    finally:
        socket.close(0)
        context.term()


def _round_trip(endpoint: str, seconds: float) -> float:
    """Milliseconds, median."""
    took = []
    message = bytes(PING_BYTES)
    with _dealer(endpoint) as socket:
        end = time.perf_counter() + seconds
        while (before := time.perf_counter()) < end:
            socket.send_multipart([b"back", message])
            socket.recv_multipart()
            took.append(time.perf_counter() - before)
    return statistics.median(took) * 1000


def _stream(endpoint: str, seconds: float) -> float:
    """MB/s one way; the other end answers every 16th message, which bounds what is under way."""
    message = bytes(STREAM_BYTES)
    with _dealer(endpoint) as socket:
        start = time.perf_counter()
        sent = answered = 0
        while time.perf_counter() - start < seconds:
            while sent - answered < 64:
                sent += 1
                word = b"back" if sent % 16 == 0 else b"keep"
                socket.send_multipart([word, message], copy=False)
            socket.recv_multipart(copy=False)
            answered += 16
        took = time.perf_counter() - start
    return answered * STREAM_BYTES / took / 1e6


# Codec


def _codec(seconds: float) -> tuple[float, float]:
    """Records a second into batches, and out of them."""
    values = [random.randbytes(VALUE_BYTES) for _ in range(BATCH_RECORDS)]
    rows = [(1_700_000_000_000, None, value, ()) for value in values]
    batch = _encode(rows)
    encoding = _rate(lambda: _encode(rows), seconds / 2)
    decoding = _rate(lambda: decode_batch(batch), seconds / 2)
    return encoding * BATCH_RECORDS, decoding * BATCH_RECORDS


def _encode(rows: list[tuple[int, None, bytes, tuple[()]]]) -> bytes:
    builder = BatchBuilder()
    builder.extend(rows)
    return builder.build()


def _checksum(seconds: float) -> float:
    data = os.urandom(STREAM_BYTES)
    return _rate(lambda: crc32c(data), seconds) * STREAM_BYTES / 1e6


def _rate(work: object, seconds: float) -> float:
    """Calls a second."""
    assert callable(work)
    start, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < seconds or not calls:
        work()
        calls += 1
    return calls / took
