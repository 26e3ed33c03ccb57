"""Memory of real processes stays bounded: nodes under clients that do not read, fast writers and
stopped peers, and the client library itself.

Bounds are on growth of resident memory, and generous: what they have to tell is a bounded pool from
a queue without end. The pools are in `limits.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from aegis_cluster import Message, TopicConfig
from aegis_cluster.errors import OutcomeUnknown, Refused
from aegis_cluster.limits import (
    MIB,
    READ_AHEAD_BYTES_TOTAL_MAX,
    SHARD_ANSWER_BYTES_MAX,
    SHARD_ANSWER_BYTES_OWN,
    SHARD_IN_FLIGHT_BYTES_MAX,
    SHARD_IN_FLIGHT_BYTES_OWN,
    TAIL_CACHE_BYTES,
)
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.protocol import PROTOCOL_VERSION, Acks, Api, Hello, encode_request
from chaos.hostile import GREETING, READY
from tests.cli.test_real_cluster import ENVIRONMENT
from tests.integration.cluster import RunningCluster, cluster, read_all, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import psutil

    from aegis_cluster import StreamingEngine

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(240)]

SLACK_BYTES = 150 * MIB
"""What allocator, interpreter and messages in the making may take beyond the pools."""
LATENCY_S_MAX = 5.0
"""Of an honest client's calls while others do not read, on a busy machine."""
FLOOD_BYTES = 90_000
FLOODED_S_MAX = 40.0
"""The same while the disk is the limit: the pool of bytes in flight has to go first."""


@pytest.fixture(scope="module")
def nodes(module_path: Path) -> Iterator[RunningCluster]:
    with cluster(module_path) as running:

        async def fill() -> None:
            async with running.engine() as engine:
                await engine.create_topic("big", TopicConfig(partitions=3))
                for _ in range(2):
                    await engine.publish_many("big", [os.urandom(900_000) for _ in range(36)])

        run(fill(), 120)
        yield running


def shards_of(nodes: RunningCluster) -> dict[str, psutil.Process]:
    return {node.name: nodes.processes(node.name)[1] for node in nodes.nodes()}


class Growth:
    """The most that each process has grown since this began."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._base = {name: process.memory_info().rss for name, process in processes.items()}
        self.most = 0

    def look(self) -> None:
        for name, process in self._processes.items():
            self.most = max(self.most, process.memory_info().rss - self._base[name])


async def honest(engine: StreamingEngine, seconds: float, look: Callable[[], None]) -> float:
    """Write for so long, one message after another; the longest wait for one."""
    longest = 0.0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        await engine.publish("big", Message(key="honest", payload=b"x"))
        longest = max(longest, time.monotonic() - began)
        look()
        await asyncio.sleep(0.02)
    return longest


# ---- clients that do not read


class NeverReads:
    """A ZMTP connection that asks and asks; its answers stay in the kernel, where there is room.

    It goes on asking, so that the other side's heartbeats see it alive.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self._socket.settimeout(5)
        self._socket.connect(address)
        self._socket.sendall(GREETING + READY)
        hello = Hello(PROTOCOL_VERSION, "client", "", 0, "", "never", 0)
        self.ask(Api.HELLO, hello.to_fields())

    def ask(self, api: Api, fields: Sequence[Any]) -> None:
        (body,) = encode_request(api, fields, correlation=1, ms_left=30_000)
        self._socket.setblocking(False)
        try:
            self._socket.sendall(b"\x02" + struct.pack(">Q", len(body)) + bytes(body))
        except OSError:
            pass  # it was shown the door, or its requests are not read either
        finally:
            self._socket.settimeout(5)

    def close(self) -> None:
        self._socket.close()


@contextmanager
def many_that_never_read(
    nodes: RunningCluster, groups: Sequence[int], *, count: int
) -> Iterator[None]:
    addresses = [
        (node.config.host, node.config.base_port + port)
        for node in nodes.nodes()
        for port in (1, 2)
    ]
    guests = [NeverReads(addresses[number % len(addresses)]) for number in range(count)]
    ends = threading.Event()

    def ask() -> None:
        items = [[group, 0, 32 * MIB] for group in groups]
        while not ends.wait(0.3):
            for guest in guests:
                for _ in range(4):
                    guest.ask(Api.FETCH, [1_000, items])
                guest.ask(Api.METADATA, [0, None])
                guest.ask(Api.STATUS, [])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join(10)
        for guest in guests:
            guest.close()


def test_clients_that_ask_for_everything_and_read_nothing(nodes: RunningCluster) -> None:
    """Without byte credits each of them would make its shard hold 32 MB a request."""

    async def test() -> None:
        async with nodes.engine() as engine:
            growth = Growth(shards_of(nodes))
            info = engine.cluster.metadata.topic("big")
            groups = [place.group for place in info.partitions]
            with many_that_never_read(nodes, groups, count=200):
                longest = await honest(engine, 8, growth.look)
                found = await asyncio.wait_for(engine.history("big", 5, timeout=20), 20)
            pools = SHARD_ANSWER_BYTES_MAX + SHARD_ANSWER_BYTES_OWN
            print(f"grew by {growth.most >> 20} MB, the slowest write {longest:.2f} s")  # noqa: T201 - the figure, when the test fails
            assert growth.most < pools + SLACK_BYTES
            assert len(found) == 5
            assert longest < LATENCY_S_MAX

    run(test(), 120)


def test_five_hundred_idle_connections(nodes: RunningCluster) -> None:
    (name, shard), *_ = shards_of(nodes).items()
    node = next(node for node in nodes.nodes() if node.name == name)
    growth = Growth({name: shard})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    greet = encode_request(
        Api.HELLO,
        Hello(PROTOCOL_VERSION, "client", "", 0, "", "idle", 0).to_fields(),
        correlation=0,
        ms_left=10_000,
    )
    idle = [context.socket(zmq.DEALER) for _ in range(500)]
    try:
        for dealer in idle:
            dealer.set(zmq.LINGER, 0)
            dealer.connect(node.config.endpoint)
            dealer.send_multipart([bytes(part) for part in greet])
        for dealer in idle:
            assert dealer.poll(30_000), "greeted back"
            dealer.recv_multipart()
        before = shard.cpu_times()
        began = time.monotonic()
        threading.Event().wait(3)
        after = shard.cpu_times()
        took = time.monotonic() - began
        share = (after.user + after.system - before.user - before.system) / took
        growth.look()
        print(f"500 idle connections: {growth.most >> 20} MB, {share:.1%} of a core")  # noqa: T201 - the figure, when the test fails
        assert growth.most < 100 * MIB
        assert share < 0.5
    finally:
        context.destroy(linger=0)


# ---- writers


def flood(endpoint: str, group: int, size: int, ends: threading.Event) -> None:
    """Produce without ever waiting for an answer."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.set(zmq.LINGER, 0)
    dealer.set(zmq.SNDHWM, 4)
    dealer.connect(endpoint)
    hello = Hello(PROTOCOL_VERSION, "client", "", 0, "", "flood", 0).to_fields()
    dealer.send_multipart(
        [bytes(p) for p in encode_request(Api.HELLO, hello, correlation=0, ms_left=1_000)]
    )
    data = encode_batch([(1, None, os.urandom(size), [])])
    number = 0
    while not ends.is_set():
        number += 1
        acks = (Acks.NONE, Acks.LEADER, Acks.QUORUM)[number % 3]
        request = encode_request(
            Api.PRODUCE, [[[group, "big", 0]], acks], [data], correlation=number, ms_left=9_000
        )
        if dealer.poll(50, zmq.POLLOUT):
            dealer.send_multipart([bytes(part) for part in request], zmq.DONTWAIT)
        while dealer.poll(0):
            dealer.recv_multipart()
    context.destroy(linger=0)


def test_a_stopped_peer_and_writers_that_wait_for_nobody(nodes: RunningCluster) -> None:
    """A follower stands still for a while, and everybody writes as fast as the machine takes it."""

    async def test() -> None:
        async with nodes.engine(60) as engine:
            leader = await nodes.leader_of("big")
            follower = next(n.name for n in nodes.nodes() if n.name != leader)
            info = engine.cluster.metadata.topic("big")
            config = next(n.config for n in nodes.nodes() if n.name == leader)
            growth = Growth({leader: shards_of(nodes)[leader]})
            ends = threading.Event()
            endpoint = f"tcp://{config.host}:{config.base_port + 2}"
            arguments = (endpoint, info.partitions[0].group, FLOOD_BYTES, ends)
            threads = [threading.Thread(target=flood, args=arguments) for _ in range(2)]
            stopped = nodes.processes(follower)
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            try:
                for thread in threads:
                    thread.start()
                longest = await honest(engine, 6, growth.look)
            finally:
                ends.set()
                for process in stopped:
                    process.send_signal(signal.SIGCONT)
                for thread in threads:
                    await asyncio.to_thread(thread.join)
            print(f"grew by {growth.most >> 20} MB, the slowest write {longest:.2f} s")  # noqa: T201 - the figure, when the test fails
            pools = SHARD_IN_FLIGHT_BYTES_MAX + SHARD_IN_FLIGHT_BYTES_OWN + TAIL_CACHE_BYTES
            assert growth.most < pools + READ_AHEAD_BYTES_TOTAL_MAX + SLACK_BYTES
            assert longest < FLOODED_S_MAX, "it waits its turn behind what is in flight"
            await asyncio.to_thread(nodes.up)

    run(test(), 150)


# ---- the client library


CLIENT = """
import asyncio, sys
import psutil
from aegis_cluster import Message, Offset, ProducerConfig, StreamingEngine, SubscribeConfig
from aegis_cluster.errors import OutcomeUnknown, Refused

address, what = sys.argv[1:]
process = psutil.Process()

async def subscribe(engine):
    async with engine.subscribe("big", SubscribeConfig(start=Offset.EARLIEST)) as subscriber:
        await anext(subscriber)
        base = process.memory_info().rss
        most = base
        for _ in range(30):
            await asyncio.sleep(0.1)
            most = max(most, process.memory_info().rss)
        print(most - base)

async def produce(engine):
    producer = engine.producer(ProducerConfig(buffer_size="8MB", request_timeout="3s"))
    await (await producer.send("big", Message(payload=b"before"), timeout=30))
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    sys.stdin.readline()
    base = process.memory_info().rss
    most = base
    sent = 0
    try:
        for _ in range(17):  # the 17th has no room, as long as none of the others has ended
            patience = 10 if sent < 16 else 2
            await producer.send("big", Message(payload=b"x" * 500_000), timeout=patience)
            sent += 1
            most = max(most, process.memory_info().rss)
    except (Refused, OutcomeUnknown) as error:
        print(most - base, sent, type(error).__name__)
    await producer.close()

async def main():
    async with StreamingEngine.connect(address, request_timeout=10) as engine:
        await {"subscribe": subscribe, "produce": produce}[what](engine)

asyncio.run(main())
"""


def start_client(nodes: RunningCluster, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, nodes.bootstrap, what],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_subscriber_that_prefetches_and_does_not_read(nodes: RunningCluster) -> None:
    with start_client(nodes, "subscribe") as client:
        out, _ = client.communicate(timeout=60)
    grown = int(out)
    print(f"grew by {grown >> 20} MB")  # noqa: T201 - the figure, when the test fails
    assert grown < 45 * MIB, "the buffer is 16 MB, and there are 65 MB to read"


def test_a_fast_producer_with_a_dead_cluster(nodes: RunningCluster) -> None:
    """`buffer_size` holds, and the sender learns by its deadline that it has no room."""
    with start_client(nodes, "produce") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        stopped = [process for node in nodes.nodes() for process in nodes.processes(node.name)]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        try:
            out, _ = client.communicate("go\n", timeout=60)
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)
    grown, sent, error = out.split()
    print(f"grew by {int(grown) >> 20} MB with {sent} messages in the buffer, then {error}")  # noqa: T201 - the figure, when the test fails
    assert error == "RequestTimeout"
    assert int(grown) < 60 * MIB
    assert 8 <= int(sent) <= 20

    async def goes_on() -> None:
        async with nodes.engine(60) as engine:
            with pytest.raises((Refused, OutcomeUnknown)):
                await engine.publish("none", Message(payload=1), timeout=5)
            await engine.publish("big", Message(payload=b"after"))
            assert (await read_all(engine, "big"))[-1] is not None

    run(goes_on(), 120)
