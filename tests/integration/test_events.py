"""Writers race on the same streams of a real cluster while the nodes that lead them are killed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import OutcomeUnknown, WrongExpectedVersion
from aegis_cluster.event import Event, EventStore
from tests.integration.cluster import RunningCluster, cluster, run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

WRITERS = 8
STREAMS = [f"account-{number}" for number in range(3)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with cluster(tmp_path_factory.mktemp("events")) as running:
        yield running


class History:
    """What the writers were told."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, dict[int, str]] = {stream: {} for stream in STREAMS}
        """By stream and version, the id of the event."""
        self.unknown: set[str] = set()
        self.refused: set[str] = set()
        self.news = asyncio.Event()
        self.conflicts: list[tuple[str, int, int]] = []
        """Stream, expected and actual version."""


def test_versions_are_won_once_whatever_dies(nodes: RunningCluster) -> None:
    history = History()
    stop = asyncio.Event()

    async def writer(store: EventStore, number: int) -> None:
        known = dict.fromkeys(STREAMS, -1)
        turn = number
        while not stop.is_set():
            turn += 1
            stream = STREAMS[turn % len(STREAMS)]
            event = Event("Added", {"by": number, "turn": turn})
            name = str(event.event_id)
            try:
                done = await store.append(stream, event, expected_version=known[stream])
            except WrongExpectedVersion as error:
                history.conflicts.append((stream, error.expected, error.actual))
                history.refused.add(name)
                known[stream] = error.actual
            except OutcomeUnknown:
                history.unknown.add(name)
            else:
                before = history.acknowledged[stream].setdefault(done.version, name)
                assert before == name, "one version was given twice"
                known[stream] = done.version
                history.news.set()

    async def test() -> None:
        async with nodes.engine() as engine, nodes.engine() as other:
            store, theirs = (EventStore(one, partitions=2) for one in (engine, other))
            await store.info()
            writers = [
                asyncio.create_task(writer((store, theirs)[number % 2], number))
                for number in range(WRITERS)
            ]
            await grows(history, 100)
            victim = await nodes.leader_of(store.topic, 0)
            await asyncio.to_thread(nodes.run, "cluster", "kill", victim)
            await grows(history, total(history) + 100)
            await asyncio.to_thread(nodes.up)
            victim = await nodes.leader_of(store.topic, 1)
            await asyncio.to_thread(nodes.run, "cluster", "kill", victim)
            await grows(history, total(history) + 100)
            stop.set()
            await asyncio.gather(*writers)
            for stream in STREAMS:
                await check(store, stream, history)
            follow = store.subscribe("account-*", live=False)
            counts = Counter([event.aggregate_id async for event in follow])
            assert counts == {s: (await store.describe(s)).version + 1 for s in STREAMS}

    run(test(), seconds=120)


def total(history: History) -> int:
    return sum(map(len, history.acknowledged.values()))


async def grows(history: History, count: int) -> None:
    async with asyncio.timeout(40):
        while total(history) < count:
            history.news.clear()
            await history.news.wait()


async def check(store: EventStore, stream: str, history: History) -> None:
    """Versions without gap, every acknowledged event once and where it was said to be, refused
    ones nowhere, and every conflict true."""
    events = await store.load(stream)
    assert [event.version for event in events] == list(range(len(events)))
    ids = [str(event.event_id) for event in events]
    assert len(set(ids)) == len(ids)
    for version, event_id in history.acknowledged[stream].items():
        assert ids[version] == event_id
    assert not history.refused & set(ids)
    assert set(ids) <= set(history.acknowledged[stream].values()) | history.unknown
    for name, expected, actual in history.conflicts:
        assert name != stream or expected < actual < len(events)


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
