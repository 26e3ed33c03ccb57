"""What is special about embedded mode: its directory, its thread, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, TopicConfig
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.config import NodeAddress, NodeConfig
from aegis_cluster.errors import (
    ConfigError,
    InvariantBroken,
    Misuse,
    NotReady,
    OutcomeUnknown,
    Refused,
    StorageFailed,
)
from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.identity import format_nodes
from aegis_cluster.storage.disk import RealDisk
from aegis_cluster.storage.store import ShardStore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def run(work: Callable[[], Coroutine[Any, Any, Any]], seconds: float = 15) -> Any:
    async def timed() -> Any:
        async with asyncio.timeout(seconds):
            return await work()

    return asyncio.run(timed())


def opened(path: Path) -> StreamingEngine:
    return StreamingEngine.open(path, request_timeout=5)


def test_what_is_written_is_there_at_the_next_start(tmp_path: Path) -> None:
    async def write() -> None:
        async with opened(tmp_path / "a" / "data") as engine:
            await engine.create_topic("t", TopicConfig(partitions=2))
            await engine.publish_many("t", range(100))

    async def read() -> None:
        async with opened(tmp_path / "a" / "data") as engine:
            assert await engine.list_topics() == ["t"]
            assert sorted(m.payload for m in await engine.history("t", 200)) == list(range(100))
            await engine.publish("t", Message(payload=100))

    run(write)
    run(read)


def test_topics_that_were_deleted_do_not_disturb_the_next_start(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as engine:
            assert await engine.list_topics() == []
            for number in range(4):
                await engine.create_topic(f"t{number}", TopicConfig(partitions=3))
                await engine.publish(f"t{number}", Message(payload=number))
                await engine.delete_topic(f"t{number}")

    for _ in range(3):
        run(work)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as engine:
            await engine.create_topic("t", exist_ok=True)
            await engine.publish("t", Message(payload=1))

    run(work)
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run(work)
    gc.collect()  # segments are closed with the objects that hold them
    assert len(os.listdir("/proc/self/fd")) <= files
    assert [t.name for t in threading.enumerate() if "aegis" in t.name] == []


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as engine:
            with pytest.raises(NotReady, match="in use by another engine or node"):
                await opened(tmp_path).__aenter__()
            program = f"import asyncio; from aegis_cluster import *; asyncio.run(\
                StreamingEngine.open({str(tmp_path)!r}).__aenter__())"
            other = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, env=ENVIRONMENT, stderr=subprocess.PIPE
            )
            _, said = await other.communicate()
            assert b"in use by another engine or node" in said
            await engine.create_topic("t")  # the first one goes on

    run(work)


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    with pytest.raises(ConfigError, match="cannot be used"):
        run(opened(file / "data").__aenter__)


def test_a_directory_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"...")
    with pytest.raises(Exception, match=r"holiday\.jpg"):
        run(opened(tmp_path).__aenter__)
    assert (tmp_path / "holiday.jpg").exists()


def test_a_node_of_several_is_not_opened_alone(tmp_path: Path) -> None:
    peers = tuple(NodeAddress("127.0.0.1", 7000 + 100 * n) for n in (1, 2, 3))
    configs = [
        NodeConfig(f"node-{n}", peers[n - 1].base_port, tmp_path / f"{n}", peers) for n in (1, 2, 3)
    ]
    format_nodes(RealDisk(), configs, str(tmp_path / "plan"))
    with pytest.raises(ConfigError, match="cluster of several nodes"):
        run(opened(tmp_path / "2").__aenter__)


def test_an_engine_that_was_not_entered(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="not open"):
        run(opened(tmp_path).list_topics)
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_start_lets_go_of_the_directory(tmp_path: Path) -> None:
    async def work() -> None:
        task = asyncio.create_task(opened(tmp_path).__aenter__())
        await asyncio.sleep(0.01)  # somewhere in the middle; any place must do
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with opened(tmp_path) as engine:
            await engine.create_topic("t")

    run(work)


def test_two_engines_in_two_directories(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path / "a") as first, opened(tmp_path / "b") as second:
            await first.create_topic("t")
            await second.create_topic("t")
            await first.publish("t", Message(payload="first"))
            await second.publish("t", Message(payload="second"))
            assert [m.payload for m in await first.history("t", 9)] == ["first"]
            assert [m.payload for m in await second.history("t", 9)] == ["second"]

    run(work)


def test_a_client_loads_no_broker() -> None:
    program = """
import sys, aegis_cluster
aegis_cluster.StreamingEngine.connect("tcp://127.0.0.1:1")
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("aegis_cluster.")}
sys.exit(", ".join(rooms & {"broker", "node", "raft", "storage", "cluster"}) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- closing, and other loops


def test_closing_the_engine_ends_what_reads_and_sends(tmp_path: Path) -> None:
    async def work() -> None:
        engine = opened(tmp_path)
        async with engine:
            await engine.create_topic("t")
            await engine.create_topic("u")
            await engine.publish("t", Message(payload=1))
            reading = [
                asyncio.create_task(anext(engine.subscribe(topics))) for topics in ("u", "u*")
            ]
            producer = engine.producer()
            await producer.send("t", Message(payload=2))
            await producer.flush()
            history = aiter(engine.history_after("t", EPOCH))
            assert (await anext(history)).payload == 1
            waiting = await engine.subscribe("t").__aenter__()
            polling = asyncio.create_task(waiting.poll(timeout=20))
            await asyncio.sleep(0)  # it waits by now
        for task in reading:
            with pytest.raises(StopAsyncIteration):
                await task
        assert await polling == []
        with pytest.raises(Misuse):
            await producer.send("t", Message(payload=3))
        with pytest.raises(Misuse):
            await waiting.poll(timeout=5)
        with contextlib.suppress(Misuse):
            async for _ in history:
                pass
        async with engine:  # and it can be opened again
            with pytest.raises(Misuse, match="open already"):
                await engine.__aenter__()
            assert len(await engine.history("t", 5)) == 2

    run(work)


def test_closing_the_engine_ends_what_is_about_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that waits may still be asking where to begin."""

    async def work() -> None:
        asking, closed = asyncio.Event(), asyncio.Event()

        async def slowly(*given: Any, **named: Any) -> Any:
            asking.set()
            await closed.wait()
            return await list_offsets(*given, **named)

        monkeypatch.setattr("aegis_cluster.subscriber.list_offsets", slowly)
        async with opened(tmp_path) as engine:
            await engine.create_topic("t")
            stepping = asyncio.create_task(anext(engine.subscribe("t")))
            await asking.wait()
            asking.clear()
            polling = asyncio.create_task(engine.subscribe("t").poll(timeout=20))
            await asking.wait()
        closed.set()
        with pytest.raises(StopAsyncIteration):
            await stepping
        assert await polling == []

    run(work)


def test_an_engine_belongs_to_one_loop(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as engine:
            await engine.create_topic("t")
            async with engine.producer() as producer, engine.subscribe("t") as subscriber:
                message = Message(payload=1)
                calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                    engine.list_topics,
                    engine.stats,
                    lambda: engine.publish("t", message),
                    lambda: engine.publish_many("t", [1]),
                    lambda: engine.create_topic("u"),
                    lambda: engine.alter_topic("t", retention="1d"),
                    lambda: producer.send("t", message),
                    lambda: subscriber.poll(timeout=1),
                    lambda: anext(subscriber),
                    subscriber.lag,
                    lambda: subscriber.seek(0, Offset.EARLIEST),
                    lambda: engine.subscribe("t").poll(timeout=1),
                ]

                def elsewhere() -> None:
                    for call in calls:
                        with pytest.raises(Misuse, match="another event loop"):
                            asyncio.run(call())

                await asyncio.to_thread(elsewhere)
                await engine.publish("t", message)  # and it goes on here
                assert len(await subscriber.poll(timeout=5)) == 1

    run(work)


# ---- bad days


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (StorageFailed("the disk is gone"), StorageFailed),
        (InvariantBroken("two and two is five"), Refused),
    ],
)
def test_when_the_shard_breaks_down_every_call_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    raised: type[Exception],
) -> None:
    def fail(*_: object) -> None:
        raise failure

    async def work() -> None:
        async with opened(tmp_path) as engine:
            await engine.create_topic("t")
            await engine.publish("t", Message(payload=1))
            async with engine.subscribe("t") as subscriber:
                reading = asyncio.create_task(subscriber.poll(timeout=30))
                monkeypatch.setattr(ShardStore, "begin_round", fail)
                with pytest.raises((OutcomeUnknown, Refused, StorageFailed)):
                    await engine.publish("t", Message(payload=2), timeout=1)
                with pytest.raises((raised, OutcomeUnknown)):
                    await reading
            for call in (engine.list_topics, engine.stats, lambda: engine.offsets("t")):
                with pytest.raises(raised, match="has stopped"):
                    await call()
            with pytest.raises(raised, match="has stopped"):
                await engine.publish("t", Message(payload=3))
        monkeypatch.undo()
        async with opened(tmp_path) as engine:
            assert next(m.payload for m in await engine.history("t", 5)) == 1

    run(work)


WRITER = """
import asyncio, sys
from aegis_cluster import *
async def main():
    async with StreamingEngine.open(sys.argv[1]) as engine:
        await engine.create_topic("t")
        number = 0
        while True:
            await engine.publish("t", Message(payload=number))
            print(number, flush=True)
            number += 1
asyncio.run(main())
"""


def test_a_killed_process_loses_nothing_acknowledged(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        acknowledged = -1
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged == 50:
                writer.kill()
    assert acknowledged >= 50

    async def read() -> list[Any]:
        async with opened(tmp_path) as engine:
            return [m.payload for m in await engine.history("t", 10_000)]

    found = run(read)
    assert found[: acknowledged + 1] == list(range(acknowledged + 1))
    assert found == list(range(len(found)))


# ---- the same files under a node of its own


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_directory_serves_as_a_cluster_of_one_node_and_back(tmp_path: Path) -> None:
    data = tmp_path / "data"

    async def before() -> None:
        async with opened(data) as engine:
            await engine.create_topic("t", TopicConfig(partitions=2))
            await engine.publish_many("t", range(10))

    async def meanwhile() -> None:
        async with StreamingEngine.connect(f"tcp://127.0.0.1:{port + 1}") as engine:
            assert await engine.list_topics() == ["t"]
            assert sorted(m.payload for m in await engine.history("t", 99)) == list(range(10))
            await engine.publish_many("t", range(10, 20))
            await engine.create_topic("u")
            with pytest.raises(NotReady, match="in use"):
                await opened(data).__aenter__()

    async def after() -> None:
        async with opened(data) as engine:
            assert await engine.list_topics() == ["t", "u"]
            assert sorted(m.payload for m in await engine.history("t", 99)) == list(range(20))
            await engine.publish("u", Message(payload=1))

    run(before)
    port = free_base_port(nodes=1) + 100
    file = tmp_path / "node.toml"
    file.write_text(
        f'[node]\nname = "solo"\nbase_port = {port}\ndata = {json.dumps(str(data))}\n'
        f'peers = ["127.0.0.1:{port}"]\nshards = 2\n'
    )
    command = [sys.executable, "-m", "aegis_cluster.cli", "node", "run", "--config", str(file)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE) as node:
        try:
            run(meanwhile, 30)
        finally:
            node.send_signal(signal.SIGTERM)
            _, said = node.communicate(timeout=20)
    assert node.returncode == 0, said
    run(after)
