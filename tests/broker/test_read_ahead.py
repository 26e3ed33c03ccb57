"""Whoever sends faster than a shard reads, or never ends a message: memory stays bounded, the
process lives on, and everybody else is served."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import zmq

from aegis_cluster import read_ahead
from aegis_cluster.broker.sockets import Sockets
from aegis_cluster.broker.transport import Listener
from aegis_cluster.curve import connect_with
from aegis_cluster.keys import KeyList, NodeKeys, new_pair, write_public
from aegis_cluster.limits import KIB, MIB
from chaos.hostile import greet
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BOUND = 4 * MIB


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sockets]:
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES_MAX", BOUND)
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES_TOTAL_MAX", 2 * BOUND)
    sockets = Sockets({Listener.DATA: "tcp://127.0.0.1:*"})
    yield sockets
    sockets.close()


def stranger(shard: Sockets) -> socket.socket:
    host, port = shard.address(Listener.DATA).removeprefix("tcp://").split(":")
    raw = socket.create_connection((host, int(port)), 5)
    greet(raw)
    return raw


def flood(raw: socket.socket, chunk: bytes, ends: threading.Event) -> None:
    raw.settimeout(0.1)
    left = chunk
    while not ends.is_set():
        try:
            left = left[raw.send(left) :] or chunk
        except TimeoutError:
            continue
        except OSError:
            return  # it was shown the door


def turn(shard: Sockets, limit: int = 512) -> tuple[list[bytes], list[str]]:
    """What a shard's loop does: last parts of the messages it took, and who was cut off."""
    shard.poll(5)
    taken = []
    for _ in range(limit):
        received = shard.receive(Listener.DATA)
        if received is None:
            break
        taken.append(bytes(received[1][-1]))
    return taken, list(shard.cut_off())


ENDLESS = b"\x03" + struct.pack(">Q", 60_000) + bytes(60_000)
"""A part of a message with more to come."""
TINY = b"\x00\x01x" * 20_000


@pytest.mark.parametrize("chunk", [ENDLESS, TINY], ids=["a message without end", "tiny messages"])
def test_who_goes_too_far_ahead_is_cut_and_others_are_served(shard: Sockets, chunk: bytes) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    honest = context.socket(zmq.DEALER)
    honest.connect(shard.address(Listener.DATA))
    before = psutil.Process().memory_info().rss
    most = before
    ends = threading.Event()
    raw = stranger(shard)
    thread = threading.Thread(target=flood, args=(raw, chunk, ends))
    thread.start()
    told: list[str] = []
    try:
        until = time.monotonic() + 10
        while not told and time.monotonic() < until:
            told += turn(shard, limit=64)[1]
            most = max(most, psutil.Process().memory_info().rss)
        assert told, "it was cut off"
        assert "was cut" in told[0]
        heard: list[bytes] = []
        honest.send(b"honest")

        def answered() -> bool:
            taken, _ = turn(shard)
            heard.extend(taken)
            return b"honest" in heard

        wait_until(answered, "who sends what it should is heard")
        assert heard.count(b"x") < 20_000, "what waited of the one that was cut is dropped"
        assert most - before < 50 * BOUND
    finally:
        ends.set()
        thread.join()
        raw.close()
        context.destroy(linger=0)


def test_a_burst_below_the_bound_is_delivered_whole(shard: Sockets) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.connect(shard.address(Listener.DATA))
    try:
        for _ in range(3):  # more in sum than the bound
            for number in range(30):
                client.send_multipart([b"%d" % number, bytes(100 * KIB)])
            count = 0

            def arrived() -> bool:
                nonlocal count
                taken, told = turn(shard, limit=5)
                assert told == []
                count += len(taken)
                return count == 30

            wait_until(arrived, "every message of the burst")
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("keys", [False, True], ids=["plain", "with keys"])
def test_what_was_taken_is_counted_to_the_byte(tmp_path: Path, *, keys: bool) -> None:
    """Otherwise a connection that has lived for long would be cut for nothing."""
    one, two = new_pair("one"), new_pair("two")
    for accepted in ("peers", "clients"):
        (tmp_path / accepted).mkdir()
    write_public(two, tmp_path / "clients" / "two.pub")
    lists = (KeyList(tmp_path / "peers"), KeyList(tmp_path / "clients"))
    shard = Sockets(
        {Listener.DATA: "tcp://127.0.0.1:*"},
        keys=NodeKeys(one, peers=lists[0], clients=lists[1]) if keys else None,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.set(zmq.SNDHWM, 0)
    if keys:
        connect_with(client, two, one.public)
    client.connect(shard.address(Listener.DATA))
    messages = [[bytes(size % 300), bytes(size * 37 % 70_000)] for size in range(2_000)]
    try:
        count = 0

        def arrived() -> bool:
            nonlocal count
            count += len(turn(shard)[0])
            return count == len(messages)

        for message in messages:
            client.send_multipart(message)
        wait_until(arrived, "all messages", seconds=20)
        (connection,) = shard._watched[Listener.DATA]._read_ahead._connections.values()
        info = connection.handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        received = struct.unpack_from("=Q", info, 128)[0]
        assert 0 <= received - connection.taken < 4 * KIB, "the greeting, and some heartbeats"
    finally:
        context.destroy(linger=0)
        shard.close()


BREAKS = """
import socket, struct, sys, time
from aegis_cluster.broker.sockets import HEARTBEAT_MS, Sockets
from aegis_cluster.broker.transport import Listener
from chaos.hostile import greet

shard = Sockets({Listener.DATA: "tcp://127.0.0.1:*"})
host, port = shard.address(Listener.DATA).removeprefix("tcp://").split(":")
raw = socket.create_connection((host, int(port)), 5)
greet(raw)
ping = bytes((4, 7)) + bytes((4,)) + b"PING" + bytes(2)
raw.sendall((bytes((0, 5)) + b"hello") * 2_000 + ((bytes((0, 5)) + b"hello") * 20 + ping) * 100)
time.sleep(0.3)  # it is read ahead; nothing tells when
raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
raw.close()
time.sleep(2 * HEARTBEAT_MS / 1_000)
count = 0
until = time.monotonic() + 10
while count < 4_000 and time.monotonic() < until:
    shard.poll(20)
    while shard.receive(Listener.DATA) is not None:
        count += 1
shard.close()
print("alive", count)
"""


def test_a_connection_that_breaks_with_much_unread_does_not_end_the_process() -> None:
    """libzmq 4.3.5 aborts (`!_io_error`) at a heartbeat or a ping, had it stopped reading."""
    done = subprocess.run(
        [sys.executable, "-c", BREAKS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alive 4000\n"), done.stderr
