"""`aegis stream`: targets, descriptions, and workers of a real node, one of which is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, Offset, SubscribeConfig, TopicConfig
from aegis_cluster.cli.app import run
from tests.integration.cluster import cluster
from tests.integration.test_readme import ROOT
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

MODULE = """
import time
from aegis_cluster.stream import Count, StreamProcessor

def slowly(value):
    time.sleep(0.0005)
    return value

def make(engine):
    processor = StreamProcessor(engine, "app", state_dir="states")
    source = processor.source("in").map(slowly)
    source.sink("copies")
    return source.key_by(lambda n: n % 3).aggregate(Count()).sink("counts")

number = 5
"""
COUNT = 4_200


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"processor_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_description(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stream", "describe", f"{module}:make"]) == 0
    assert capsys.readouterr().out.startswith("Application app\n")
    assert run(["stream", "describe", f"{module}:make", "--mermaid"]) == 0
    assert capsys.readouterr().out.startswith("flowchart LR\n")


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("{}", 'is not like "metrics:processor"'),
        ("no_such_module:make", "there is no module no_such_module"),
        ("{}:nothing", "has no nothing"),
        ("{}:number", "is int; a StreamProcessor is needed"),
    ],
)
def test_targets_that_are_none(
    module: str, target: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["stream", "run", target.format(module)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(170)
def test_workers_share_and_one_is_killed(module: str, tmp_path: Path) -> None:
    with cluster(tmp_path, nodes=1) as nodes:
        started: list[subprocess.Popen[bytes]] = []

        async def publish() -> None:
            async with nodes.engine() as engine:
                for topic in ("in", "copies", "counts"):
                    await engine.create_topic(topic, TopicConfig(partitions=2))
                messages = [Message(f"k{n}", n) for n in range(COUNT)]
                await engine.publish_many("in", messages)

        def copies() -> int:
            async def ask() -> int:
                async with nodes.engine() as engine:
                    found = await engine.offsets("copies")
                    return sum(one.last_stable_offset for one in found.values())

            return asyncio.run(ask())

        async def check() -> None:
            async with nodes.engine() as engine, asyncio.timeout(100):
                found = await _read(engine, "copies", COUNT)
                assert Counter(found) == Counter(range(COUNT))
                counted = await _read(engine, "counts", COUNT)
                assert Counter(counted) == Counter(3 * list(range(1, COUNT // 3 + 1)))

        asyncio.run(publish())
        try:
            for _ in range(2):
                arguments = ["stream", "run", f"{module}:make", "--bootstrap", nodes.bootstrap]
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "aegis_cluster.cli", *arguments],
                        cwd=tmp_path,
                        env=os.environ | {"PYTHONPATH": str(ROOT)},
                    )
                )
            wait_until(lambda: copies() > COUNT // 8, "work is under way", 60)
            started[0].kill()
            asyncio.run(check())
            started[1].send_signal(signal.SIGTERM)
            assert started[1].wait(30) == 0
        finally:
            for process in started:
                process.kill()
                process.wait()


async def _read(engine: Any, topic: str, count: int) -> list[Any]:
    found: list[Any] = []
    config = SubscribeConfig(start=Offset.EARLIEST)
    async with engine.subscribe(topic, config) as subscriber:
        while len(found) < count or sum((await subscriber.lag()).values()):
            found += [message.payload for message in await subscriber.poll(timeout=1)]
    return found
