"""Processors at work in an embedded engine: start, share, restart, stop at errors."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig, TopicConfig
from aegis_cluster.errors import ConfigError, Misuse, TopicNotFound
from aegis_cluster.message import from_ms
from aegis_cluster.stream import (
    Count,
    ProcessingFailed,
    StreamProcessor,
    TopologyChanged,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from aegis_cluster.stream.running import Running

    Run = Callable[[Callable[[StreamingEngine], Awaitable[Any]]], Any]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
PATIENCE_S = 60.0
MINUTE = timedelta(minutes=1)
SOON = timedelta(seconds=1)
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture
def run(directory: Path) -> Run:
    def runs(work: Callable[[StreamingEngine], Awaitable[Any]]) -> Any:
        async def opened() -> Any:
            async with asyncio.timeout(80), StreamingEngine.open(directory / "data") as engine:
                return await work(engine)

        return asyncio.run(opened())

    return runs


@pytest.fixture
def name() -> str:
    """Of topics and applications that no other test uses."""
    return f"s{next(_NUMBERS)}"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions of code that knows no event
            await asyncio.sleep(0.01)


async def read(engine: StreamingEngine, topic: str, count: int) -> list[Any]:
    """The first messages of a topic."""
    found: list[Any] = []
    config = SubscribeConfig(start=Offset.EARLIEST)
    async with asyncio.timeout(PATIENCE_S), engine.subscribe(topic, config) as subscriber:
        while len(found) < count:
            found += await subscriber.poll(timeout=1)
    return found


async def fill(engine: StreamingEngine, topic: str, count: int, partitions: int = 1) -> None:
    """One record a second, of 7 keys."""
    await engine.create_topic(topic, TopicConfig(partitions=partitions))
    await engine.publish_many(
        topic,
        [
            Message(f"k{number % 7}", {"n": number, "t": number}, timestamp=from_ms(number * 1000))
            for number in range(count)
        ],
    )


def counts_of(messages: list[Any]) -> dict[tuple[Any, str], int]:
    """By key and window; a result that came twice fails."""
    found: dict[tuple[Any, str], int] = {}
    for message in messages:
        place = message.key, str(message.headers["window-start"])
        assert place not in found, "a window's result is sent once"
        found[place] = message.payload
    return found


def plain_counts(count: int) -> dict[tuple[Any, str], int]:
    found: dict[tuple[Any, str], int] = {}
    for number in range(count):
        start = from_ms(number // 60 * 60_000).isoformat()
        place = f"k{number % 7}", start
        found[place] = found.get(place, 0) + 1
    return found


def test_the_example_of_the_guide(run: Run, directory: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic("raw-events")
        await engine.create_topic("purchase-metrics")
        processor = StreamProcessor(
            engine, application_id="purchase-metrics", state_dir=directory / "state"
        )
        running = await (
            processor.source("raw-events")
            .filter(lambda e: e["type"] == "purchase")
            .map(
                lambda e: {
                    "customer": e["customer_id"],
                    "amount": e["total"],
                    "timestamp": e["created_at"],
                }
            )
            .window(timedelta(minutes=5))
            .aggregate(
                lambda window: {
                    "total_purchases": len(window),
                    "total_amount": sum(e["amount"] for e in window),
                }
            )
            .sink("purchase-metrics")
            .start()
        )
        rows = [("purchase", 10, 0), ("visit", 0, 1), ("purchase", 5, 299), ("purchase", 1, 300)]
        for kind, total, time in rows:
            event = {"type": kind, "customer_id": "anna", "total": total, "created_at": time}
            await engine.publish(
                "raw-events", Message("anna", event, timestamp=from_ms(time * 1000))
            )
        (result,) = await read(engine, "purchase-metrics", 1)
        assert result.payload == {"total_purchases": 2, "total_amount": 15}
        assert result.key == "anna"
        await running.stop()

    run(work)


def counting(engine: StreamingEngine, name: str, state_dir: Path) -> StreamProcessor:
    processor = StreamProcessor(engine, f"{name}-app", state_dir=state_dir, idle_timeout=SOON)
    counted = processor.source(f"{name}-in").key_by(lambda v: f"k{v['n'] % 7}")
    return counted.window(MINUTE, grace=MINUTE).aggregate(Count()).sink(f"{name}-out")


def test_two_workers_share_and_one_leaves(run: Run, name: str, directory: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, f"{name}-in", 300, partitions=2)
        await engine.create_topic(f"{name}-out")
        one = await counting(engine, name, directory / name / "one").start()
        two = await counting(engine, name, directory / name / "two").start()
        await until(lambda: len(one.stats.tasks) == len(two.stats.tasks) == 2)
        assert not set(one.stats.tasks) & set(two.stats.tasks)
        await two.stop()
        await until(lambda: len(one.stats.tasks) == 4)
        await engine.publish_many(
            f"{name}-in",
            [Message(f"k{n}", {"n": n}, timestamp=from_ms(n * 1000)) for n in range(300, 600)],
        )
        # The partitions end at times of their own; the later one goes for both.
        wanted = {w: n for w, n in plain_counts(600).items() if w[1] < from_ms(480_000).isoformat()}
        assert counts_of(await read(engine, f"{name}-out", len(wanted))) == wanted
        assert await one.query("k3")
        await one.stop()

    run(work)


def test_every_process_tells_what_all_have_and_copies_what_others_have(
    run: Run, name: str, directory: Path
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(f"{name}-in", TopicConfig(partitions=2))
        keys = [f"k{number}" for number in range(20)]
        await engine.publish_many(f"{name}-in", [1] * 20, keys=keys)

        async def begun(worker: str) -> Running:
            processor = StreamProcessor(
                engine, f"{name}-app", state_dir=directory / name / worker, standby_replicas=1
            )
            counted = processor.source(f"{name}-in").aggregate(Count(), name="n")
            return await counted.sink(lambda _: None).start()

        async with await begun("one") as one:
            async with await begun("two") as two:
                await until(lambda: len(one.stats.tasks) == len(two.stats.tasks) == 1)
                while len((await one.range())["n"]) < 20:  # noqa: ASYNC110 - it is asked, not told
                    await asyncio.sleep(0.01)
                for worker in (one, two):
                    assert {key: await worker.query(key) for key in keys} == {
                        key: {"n": 1} for key in keys
                    }
                    found = await worker.range("k1", "k19")
                    assert found == {
                        "n": dict.fromkeys(sorted(k for k in keys if k <= "k19")[1:], 1)
                    }
                await until(lambda: one.standbys == two.stats.tasks)
                await until(lambda: two.standbys == one.stats.tasks)
            await until(lambda: len(one.stats.tasks) == 2)
            assert len((await one.range())["n"]) == 20

    run(work)


def test_a_partition_that_is_idle_follows_those_of_other_workers(
    run: Run, name: str, directory: Path
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, f"{name}-in", 60, partitions=2)
        await engine.create_topic(f"{name}-out")

        async def begun(worker: str) -> Running:
            processor = StreamProcessor(
                engine, f"{name}-app", state_dir=directory / name / worker, idle_timeout=SOON
            )
            counted = processor.source(f"{name}-in").window(MINUTE).aggregate(Count())
            return await counted.sink(f"{name}-out").start()

        async with await begun("one") as one, await begun("two") as two:
            await until(lambda: len(one.stats.tasks) == len(two.stats.tasks) == 1)
            await engine.publish(f"{name}-in", Message("k0", {"n": 0}, timestamp=from_ms(10**6)))
            found = counts_of(await read(engine, f"{name}-out", 7))
            assert found == plain_counts(60)

    run(work)


@pytest.mark.parametrize("keeps_files", [True, False])
def test_a_restart_goes_on_where_it_was(
    run: Run, name: str, directory: Path, keeps_files: bool
) -> None:
    state_dir = directory / name

    async def work(engine: StreamingEngine) -> None:
        await fill(engine, f"{name}-in", 90)
        await engine.create_topic(f"{name}-out")
        running = await counting(engine, name, state_dir).start()
        await until(lambda: running.stats.processed >= 180)
        await running.stop()
        if not keeps_files:
            shutil.rmtree(state_dir)
        running = await counting(engine, name, state_dir).start()
        await engine.publish(f"{name}-in", Message("k", {"n": 0}, timestamp=from_ms(10**7)))
        found = counts_of(await read(engine, f"{name}-out", 14))
        assert found == plain_counts(90)
        await running.stop()

    run(work)


def test_a_record_that_fails_stops_it_and_is_there_again_after_a_restart(
    run: Run, name: str, directory: Path
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, f"{name}-in", 5)

        def made(on_error: str) -> StreamProcessor:
            processor = StreamProcessor(
                engine, f"{name}-app", state_dir=directory / name, on_error=on_error
            )
            return (
                processor.source(f"{name}-in").map(lambda v: 6 // (v["n"] - 2)).sink(f"{name}-out")
            )

        with pytest.raises(TopicNotFound, match=f"writes to topic '{name}-out', which does not"):
            await made("stop").start()
        await engine.create_topic(f"{name}-out")
        for _ in range(2):
            running = await made("stop").start()
            with pytest.raises(ProcessingFailed, match=f"offset 2 of {name}-in/0: ZeroDivision"):
                await running.wait()
            with pytest.raises(ProcessingFailed):
                await running.stop()
        async with await made("dead_letter").start() as running:
            found = [m.payload for m in await read(engine, f"{name}-out", 4)]
            assert found == [-3, -6, 6, 3]
            (dead,) = await read(engine, f"{name}-app.dead", 1)
            assert dead.payload == {"n": 2, "t": 2}
            assert dead.headers["error"].startswith("ZeroDivisionError")
            assert running.stats.failed == 1

    run(work)


def test_what_cannot_be_started_says_so(run: Run, name: str, directory: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        def made(size: timedelta) -> StreamProcessor:
            processor = StreamProcessor(engine, f"{name}-app", state_dir=directory / name)
            return processor.source(f"{name}-in").window(size).aggregate(len).sink(print)

        with pytest.raises(TopicNotFound, match="reads topic"):
            await made(MINUTE).start()
        await fill(engine, f"{name}-in", 3)
        running = await made(MINUTE).start()
        await until(lambda: running.stats.processed == 3)
        await running.stop()
        with pytest.raises(TopologyChanged, match=r"another application_id"):
            await made(2 * MINUTE).start()
        await engine.alter_topic(f"{name}-in", partitions=2)
        with pytest.raises(ConfigError, match="had 1 partitions"):
            await made(MINUTE).start()
        with pytest.raises(Misuse, match="no engine"):
            await StreamProcessor(None, "x").source("in").sink("out").start()

    run(work)


def test_pause_and_resume(run: Run, name: str, directory: Path) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, f"{name}-in", 3)
        seen: list[int] = []
        processor = StreamProcessor(engine, f"{name}-app", state_dir=directory / name)
        running: Running = (
            await processor.source(f"{name}-in").map(lambda v: v["n"]).sink(seen.append).start()
        )
        await until(lambda: seen == [0, 1, 2])
        await running.pause()
        await engine.publish(f"{name}-in", Message(payload={"n": 3}))
        await asyncio.sleep(0.3)
        assert seen == [0, 1, 2]
        running.resume()
        await until(lambda: seen == [0, 1, 2, 3])
        await running.stop()

    run(work)


def test_a_result_that_is_too_large_for_its_sink_is_left_out_or_told(
    run: Run, name: str, directory: Path
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(f"{name}-in")
        await engine.create_topic(f"{name}-out", TopicConfig(max_message_size="1KB"))
        await engine.publish_many(f"{name}-in", [5, 5_000, 7])

        def app(on_error: str) -> StreamProcessor:
            state_dir = directory / name / on_error
            made = StreamProcessor(
                engine, f"{name}-{on_error}", on_error=on_error, state_dir=state_dir
            )
            return made.source(f"{name}-in").map(lambda n: "x" * n).sink(f"{name}-out")

        async with await app("skip").start() as running:
            found = await read(engine, f"{name}-out", 2)
            assert [len(message.payload) for message in found] == [5, 7]
            assert running.stats.failed == 1
        with pytest.raises(ProcessingFailed, match=r"offset 1 .* bytes is over the limit"):
            await (await app("stop").start()).wait()

    run(work)
