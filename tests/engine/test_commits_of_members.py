"""A member's commit belongs to what it held when it read, however long the commit takes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from aegis_cluster import membership as module
from aegis_cluster.client.group_session import Assigned, MemberConfig
from aegis_cluster.errors import MemberFenced
from aegis_cluster.handled import Handled
from aegis_cluster.ids import TopicPartition
from aegis_cluster.membership import Membership
from aegis_cluster.message import Offset

PLACE = TopicPartition("orders", 0)
PRODUCER = (7, 1)


class Reading:
    is_waiting = True

    def begin(self, positions: Any) -> None: ...

    def stop(self, places: Any) -> None: ...


async def nothing(_: list[TopicPartition]) -> None: ...


def member(*, in_transactions: bool) -> Membership:
    """It holds a partition, and ten messages of that have been handed out."""
    cluster: Any = SimpleNamespace(now=lambda: asyncio.get_running_loop().time())
    background: Any = SimpleNamespace()
    made = Membership(
        cluster=cluster,
        background=background,
        config=MemberConfig("bank", "one", False, ("orders",), 10_000),
        start=Offset.EARLIEST,
        keeps_positions=True,
        in_transactions=in_transactions,
        timeout=5.0,
        reading=Reading(),
        on_assigned=nothing,
        on_revoked=nothing,
    )
    made._news = Assigned("first", 1, 1, frozenset({PLACE}))
    made._handled[PLACE] = Handled(0)
    for offset in range(10):
        made.handed_out(PLACE, offset)
    return made


def comes_back(made: Membership) -> None:
    """It was lost and joined anew, and has got the same partition again; others have come to 20."""
    made._news = Assigned("second", 5, 1, frozenset({PLACE}))
    made._handled[PLACE] = Handled(20)
    made._committed[PLACE] = 20


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[TopicPartition, int]]]:
    """(session, positions) of every commit that leaves; the first session's epoch is stale."""
    found: list[tuple[str, dict[TopicPartition, int]]] = []

    async def commit_positions(
        _cluster: Any, _group: str, positions: Any, _deadline: float, **who: Any
    ) -> None:
        found.append((who["session"], dict(positions)))
        if who["session"] == "first":
            raise MemberFenced("The group is further.", stale=True)

    monkeypatch.setattr(module, "commit_positions", commit_positions)
    return found


def test_positions_of_a_transaction_are_void_once_the_partition_was_lost(
    sent: list[tuple[str, dict[TopicPartition, int]]],
) -> None:
    async def run() -> None:
        made = member(in_transactions=True)
        positions = made.moved_since_commit({PLACE: 10})
        comes_back(made)  # while the coordinator of the transaction is asked to let the group join
        with pytest.raises(MemberFenced, match="come back"):
            await made.commit_within(PRODUCER, positions, asyncio.get_running_loop().time() + 5)

    asyncio.run(run())
    assert sent == []


@pytest.mark.parametrize("commit", ["within", "plain"])
def test_a_commit_that_waits_for_news_does_not_go_on_under_another_session(
    sent: list[tuple[str, dict[TopicPartition, int]]], commit: str
) -> None:
    async def run() -> None:
        made = member(in_transactions=commit == "within")
        loop = asyncio.get_running_loop()
        if commit == "within":
            positions = made.moved_since_commit({PLACE: 10})
            work = made.commit_within(PRODUCER, positions, loop.time() + 5)
        else:
            made.all_handled()
            work = made.commit(loop.time() + 5)
        task = loop.create_task(work)
        while not sent:  # noqa: ASYNC110 - what is waited for is no event
            await asyncio.sleep(0)
        comes_back(made)
        with pytest.raises(MemberFenced, match="come back"):
            await task

    asyncio.run(run())
    assert [session for session, _ in sent] == ["first"]


def test_a_newer_epoch_of_the_same_assignment_is_taken(
    sent: list[tuple[str, dict[TopicPartition, int]]],
) -> None:
    async def run() -> None:
        made = member(in_transactions=True)
        positions = made.moved_since_commit({PLACE: 10})
        made._news = Assigned("same life, newer word", 2, 2, frozenset({PLACE}))
        await made.commit_within(PRODUCER, positions, asyncio.get_running_loop().time() + 5)

    asyncio.run(run())
    assert sent == [("same life, newer word", {PLACE: 10})]


def test_a_seek_meanwhile_is_no_loss(
    sent: list[tuple[str, dict[TopicPartition, int]]],
) -> None:
    async def run() -> None:
        made = member(in_transactions=True)
        positions = made.moved_since_commit({PLACE: 10})
        made.moved_to(PLACE, 3)
        made._news = Assigned("second", 2, 2, frozenset({PLACE}))
        await made.commit_within(PRODUCER, positions, asyncio.get_running_loop().time() + 5)

    asyncio.run(run())
    assert len(sent) == 1
