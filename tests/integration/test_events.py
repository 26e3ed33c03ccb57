"""Writers race on the same streams of a real cluster while the nodes that lead them are killed:
appends that each happened at one moment explain all that they were told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import OutcomeUnknown, RequestTimeout, WrongExpectedVersion
from aegis_cluster.event import Event, EventStore, ExpectedVersion
from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.streams import Append, Look, StreamHistory, check_stream
from tests.integration.cluster import RunningCluster, cluster, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

WRITERS, READERS, KILLS = 16, 2, 2
STREAMS = [f"account-{number}" for number in range(3)]
PATIENCE_S = 40.0


@pytest.fixture(scope="module")
def nodes(module_path: Path) -> Iterator[RunningCluster]:
    with cluster(module_path) as running:
        yield running


class Race:
    """Writers and readers of a few streams, and what they were told."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.histories = {stream: StreamHistory() for stream in STREAMS}
        self.acknowledged = 0
        self.conflicts = 0
        self.news = asyncio.Event()
        self.stop = asyncio.Event()

    async def write(self, store: EventStore, number: int) -> None:
        rng = random.Random(self.seed + number)
        known = dict.fromkeys(STREAMS, -1)
        while not self.stop.is_set():
            stream = rng.choice(STREAMS)
            count = rng.randrange(1, 4)
            events = [Event("Added", {"by": number}) for _ in range(count)]
            expected = known[stream] if rng.random() < 0.9 else int(ExpectedVersion.ANY)
            told = await self.append(store, stream, events, expected)
            self.histories[stream].appends.append(told)
            if told.outcome is Outcome.OK:
                known[stream] = told.version + count - 1
                self.acknowledged += 1
                self.news.set()
            elif told.outcome is Outcome.REFUSED:
                known[stream] = told.version
                self.conflicts += 1

    async def append(
        self, store: EventStore, stream: str, events: list[Event], expected: int
    ) -> Append:
        """Sent again with the same ids where the outcome is unknown, once."""
        asked = Append(tuple(str(event.event_id) for event in events), expected, time.monotonic())
        for _ in range(2):
            try:
                done = await store.append(stream, events, expected_version=expected, timeout=5)
            except WrongExpectedVersion as error:
                answer, version = Outcome.REFUSED, error.actual
            except (OutcomeUnknown, RequestTimeout):
                continue
            else:
                answer, version = Outcome.OK, done.first_version
            return asked._replace(ended=time.monotonic(), outcome=answer, version=version)
        return asked

    async def read(self, store: EventStore, number: int) -> None:
        rng = random.Random(self.seed + WRITERS + number)
        while not self.stop.is_set():
            stream, begun = rng.choice(STREAMS), time.monotonic()
            with contextlib.suppress(RequestTimeout):
                ids = tuple(str(event.event_id) for event in await store.load(stream, timeout=5))
                self.histories[stream].looks.append(Look(ids, begun, time.monotonic()))

    async def grows(self, count: int) -> None:
        wanted = self.acknowledged + count
        async with asyncio.timeout(PATIENCE_S):
            while self.acknowledged < wanted:
                self.news.clear()
                await self.news.wait()


def test_versions_are_won_once_whatever_dies(nodes: RunningCluster) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)  # noqa: T201

    async def test() -> None:
        race = Race(seed)
        async with nodes.engine() as engine, nodes.engine() as other:
            stores = [EventStore(one, partitions=2) for one in (engine, other)]
            await stores[0].info()
            tasks = [
                *(asyncio.create_task(race.write(stores[n % 2], n)) for n in range(WRITERS)),
                *(asyncio.create_task(race.read(stores[n % 2], n)) for n in range(READERS)),
            ]
            for number in range(KILLS):
                await race.grows(200)
                victim = await nodes.leader_of(stores[0].topic, number % 2)
                await asyncio.to_thread(nodes.run, "cluster", "kill", victim)
                await race.grows(200)
                await asyncio.to_thread(nodes.up)
            race.stop.set()
            await asyncio.gather(*tasks)
            for stream, history in race.histories.items():
                events = await stores[0].load(stream)
                assert [event.version for event in events] == list(range(len(events)))
                history.final = tuple(str(event.event_id) for event in events)
                assert check_stream(history) == []
            assert race.conflicts > 100, "nobody raced"
            follow = stores[0].subscribe("account-*", live=False)
            counts = Counter([event.aggregate_id async for event in follow])
            assert counts == {name: len(one.final) for name, one in race.histories.items()}

    run(test(), seconds=150)


def test_appends_to_several_partitions_are_seen_whole_or_not_at_all(
    nodes: RunningCluster,
) -> None:
    """Transfers between accounts while leaders are killed; who has seen the one half of a transfer,
    and looks for the other one then, finds it."""
    seed = random.randrange(2**32)
    print("seed", seed)  # noqa: T201
    accounts = [f"wallet-{number}" for number in range(6)]
    stop, news, numbers = asyncio.Event(), asyncio.Event(), itertools.count()
    done: set[str] = set()
    refused: set[str] = set()

    async def transfer(store: EventStore, number: int) -> None:
        rng = random.Random(seed + number)
        known = dict.fromkeys(accounts, -1)
        while not stop.is_set():
            pair, name = rng.sample(accounts, 2), f"transfer-{next(numbers)}"
            halves = {one: Event("Moved", {"transfer": name, "pair": pair}) for one in pair}
            for _ in range(3):
                try:
                    found = await store.append_many(
                        halves, {one: known[one] for one in pair}, timeout=8
                    )
                except WrongExpectedVersion as error:
                    refused.add(name)
                    if error.details.get("stream") in known:
                        known[error.stream] = error.actual
                except (OutcomeUnknown, RequestTimeout):
                    continue  # the same ids again: known, refused, or appended now
                else:
                    done.add(name)
                    known.update({one: at.version for one, at in found.items()})
                    news.set()
                break

    async def look(store: EventStore) -> None:
        rng = random.Random(seed - 1)
        while not stop.is_set():
            one, other = rng.sample(accounts, 2)
            with contextlib.suppress(RequestTimeout):
                before = await store.load(one, timeout=8)
                after = {event.data["transfer"] for event in await store.load(other, timeout=8)}
                shared = {e.data["transfer"] for e in before if other in e.data["pair"]}
                assert shared <= after, "half of an append was seen"

    async def test() -> None:
        async with nodes.engine() as engine, nodes.engine() as other:
            stores = [EventStore(one, "wallets", partitions=3) for one in (engine, other)]
            await stores[0].info()
            tasks = [
                *(asyncio.create_task(transfer(stores[n % 2], n)) for n in range(6)),
                asyncio.create_task(look(stores[0])),
            ]
            for number in range(2):
                wanted = len(done) + 60
                async with asyncio.timeout(PATIENCE_S):
                    while len(done) < wanted:
                        news.clear()
                        await news.wait()
                if number == 0:
                    victim = await nodes.leader_of("wallets", number)
                    await asyncio.to_thread(nodes.run, "cluster", "kill", victim)
            await asyncio.to_thread(nodes.up)
            stop.set()
            await asyncio.gather(*tasks)
            halves: Counter[str] = Counter()
            for name in accounts:
                events = await stores[0].load(name)
                assert [event.version for event in events] == list(range(len(events)))
                halves.update(event.data["transfer"] for event in events)
            assert set(halves.values()) == {2}
            assert done <= set(halves)
            assert not refused & set(halves)
            follow = stores[0].subscribe("wallet-*", live=False)
            assert Counter([event.data["transfer"] async for event in follow]) == halves

    run(test(), seconds=120)


def test_append_and_load_on_the_command_line(nodes: RunningCluster) -> None:
    out = nodes.run("event", "append", "cart-1", "--type", "Opened", "--data", '{"of": "Ann"}')
    assert "versions 0 to 0" in out
    lines = "\n".join(json.dumps({"event_type": "Added", "data": {"n": n}}) for n in range(3))
    (nodes.path / "more.jsonl").write_text(lines)
    more = ("--file", "more.jsonl", "--expected-version", "0", "--json")
    done = json.loads(nodes.run("event", "append", "cart-1", *more))
    assert (done["first_version"], done["version"]) == (1, 3)
    nodes.run("event", "append", "cart-1", *more, code=1)
    found = json.loads(nodes.run("event", "load", "cart-1", "--from", "1", "--json"))
    assert [(one["version"], one["data"]) for one in found] == [(n + 1, {"n": n}) for n in range(3)]
    assert nodes.run("event", "load", "cart-1", "--backwards", "--limit", "1").startswith(
        "3\tAdded"
    )
    nodes.run("event", "append", "", "--type", "E", code=2)
    (nodes.path / "views.py").write_text(VIEWS)
    wanted = ("event", "project", "views:views", "--file", "views.sqlite")
    assert json.loads(nodes.run(*wanted, "--json")) == {"carts": 4, "kinds": 4}
    assert "carts: 0 events applied" in nodes.run(*wanted)
    assert "kinds: 4 events applied" in nodes.run(*wanted, "--rebuild")
    nodes.run("event", "project", "views:nothing", "--file", "views.sqlite", code=2)


VIEWS = """
from aegis_cluster.event import StateProjection

class Carts(StateProjection):
    name, streams = "carts", "cart-*"

    def fold(self, state, event):
        return {"events": state.get("events", 0) + 1}

class Kinds(Carts):
    name = "kinds"

    def key(self, event):
        return event.event_type

views = [Carts, Kinds()]
"""
