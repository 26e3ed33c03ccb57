"""Several views over loopback: leaders killed and paused, all forgotten, copies that differ."""

from __future__ import annotations

import itertools
import socket
import time
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import zmq

from aegis_cluster import limits
from aegis_cluster.cluster.view import frames
from aegis_cluster.cluster.view.frames import Frame
from aegis_cluster.cluster.view.leases import GRANTED, HELD, LOST, TOKEN_REIGN_BITS
from aegis_cluster.cluster.view.replica import ELECTION_S_MAX, ViewReplica
from aegis_cluster.cluster.view.view import FAILURES_MAX
from aegis_cluster.errors import ConfigError, MessageTooLarge, NotReady
from tests.cluster.view.trio import CLUSTER_ID, Views

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

names = (f"job {number}" for number in itertools.count())


@pytest.fixture(scope="module")
def shared() -> Iterator[Views]:
    """Three voters and a node that reads along."""
    views = Views(4)
    yield views
    views.close()


@pytest.fixture
def views(shared: Views) -> Views:
    shared.make_whole()
    return shared


def test_every_node_sees_every_node(views: Views) -> None:
    for found in views.described().values():
        assert found["state"] == "up"
        assert [(each["node"], each["name"]) for each in found["nodes"]] == [
            (1, "node-1"), (2, "node-2"), (3, "node-3"), (4, "node-4"),
        ]  # fmt: skip
    roles = sorted(found["role"] for found in views.described().values())
    assert roles == ["follower", "follower", "leader", "reader"]


def test_a_node_whose_clock_is_wrong_says_so_and_so_do_all(views: Views) -> None:
    views.make_whole()
    for node, view in views.views.items():
        ahead_ms = -172_800_000 if node == 2 else 0
        view.said = {**view.said, "wall_ms": time.time_ns() // 1_000_000 + ahead_ms}
    views.until(lambda: any("2.0 days behind" in said for said in views.told), "it says so")
    for view in views.views.values():
        nodes = {each["node"]: each for each in view.described()["nodes"]}
        assert nodes[2]["clock_ahead_ms"] < -172_000_000
        assert abs(nodes[1]["clock_ahead_ms"]) < 60_000


def test_any_node_grants_leases_and_all_agree(views: Views) -> None:
    job = next(names)
    granted = views.acquire(4, job, "a")
    assert granted.kind == GRANTED
    held = views.ask(1, "acquire", job, "b", 0, 5_000)
    assert not isinstance(held, Exception)
    assert (held.kind, held.holder) == (HELD, "a")
    renewed = views.ask(2, "renew", job, "a", granted.token, 5_000)
    assert not isinstance(renewed, Exception)
    assert (renewed.kind, renewed.token) == (GRANTED, granted.token)
    released = views.ask(3, "release", job, "a", granted.token, 5_000)
    assert not isinstance(released, Exception)
    later = views.acquire(1, job, "b")
    assert later.kind == GRANTED
    assert later.token > granted.token


def test_a_lease_that_is_malformed_is_refused(views: Views) -> None:
    assert isinstance(views.ask(1, "acquire", "job", "a", 0, 10), ConfigError)


def test_a_command_that_is_too_large_is_refused(views: Views) -> None:
    command = ("node", 1, {"name": "x" * limits.VIEW_OP_BYTES_MAX})
    with pytest.raises(MessageTooLarge):
        views.replica(1).propose(command, lambda _: None)


def test_a_killed_leader_costs_nothing_that_was_known(views: Views) -> None:
    leader, job = views.leader(), next(names)
    granted = views.acquire(1 if leader != 1 else 2, job, "a", 60_000)
    views.crash(leader)
    views.until(lambda: views.leader() not in (0, leader), "another one leads")
    other = views.leader()
    found = views.described()[other]
    assert [lease[:3] for lease in found["leases"] if lease[0] == job] == [
        [job, "a", granted.token]
    ]
    views.start(leader)
    views.until(views.is_whole, "it is back")
    assert views.leader() == other  # who comes back deposes nobody
    assert views.acquire(leader, job, "b").kind == HELD


def test_a_paused_leader_is_replaced_and_follows_when_it_wakes_up(views: Views) -> None:
    leader = views.leader()
    reign = views.described()[leader]["reign"]
    views.paused.add(leader)
    views.until(lambda: views.leader() not in (0, leader), "another one leads")
    other = views.leader()
    assert views.acquire(other, next(names), "a").token >> TOKEN_REIGN_BITS > reign
    views.paused.clear()
    views.until(views.is_whole, "it has woken up")
    assert views.leader() == other


def test_a_paused_follower_deposes_nobody_when_it_wakes_up(views: Views) -> None:
    leader = views.leader()
    term = views.replica(leader).raftCurrentTerm
    views.paused.add(next(node for node in (1, 2, 3) if node != leader))
    views.turn_for(2 * ELECTION_S_MAX)
    views.paused.clear()
    views.turn_for(2 * ELECTION_S_MAX)
    assert views.leader() == leader
    assert views.replica(leader).raftCurrentTerm == term


def test_two_of_three_forget_everything_and_the_third_has_kept_it(views: Views) -> None:
    """The leader and a follower restart at once: two blanks, who could outvote the survivor."""
    leader, job = views.leader(), next(names)
    survivor, other = (node for node in (1, 2, 3) if node != leader)
    granted = views.acquire(survivor, job, "a", 60_000)
    rebuilds = views.views[survivor].rebuilds
    views.crash(leader, other)
    views.start(leader)
    views.start(other)
    views.until(views.is_whole, "all are back")
    assert views.views[survivor].rebuilds == rebuilds
    for found in views.described().values():
        assert [job, "a", granted.token] in [lease[:3] for lease in found["leases"]]


def test_all_forget_everything_and_later_tokens_are_higher(views: Views) -> None:
    job = next(names)
    before = views.acquire(1, job, "a", 60_000)
    views.crash(*views.nodes)
    views.make_whole()
    assert [name for name, *_ in views.described()[1]["leases"]] == []
    after = views.acquire(1, job, "b")
    assert after.kind == GRANTED
    assert after.token > before.token  # who still believes in the old one is told apart by the log
    assert views.ask(1, "renew", job, "a", before.token, 5_000) != before
    answer = views.ask(1, "renew", job, "a", before.token, 5_000)
    assert not isinstance(answer, Exception)
    assert answer.kind == LOST


def test_a_copy_that_differs_is_thrown_away(views: Views) -> None:
    leader = views.leader()
    follower = next(node for node in (1, 2, 3) if node != leader)
    rebuilds = views.views[follower].rebuilds
    views.replica(follower).table.apply(msgpack.packb(["node", 99, {"name": "only here"}]))
    views.until(lambda: views.views[follower].rebuilds > rebuilds, "it is noticed")
    views.until(views.is_whole, "it is built anew")
    assert all(
        {each["node"] for each in found["nodes"]} == {1, 2, 3, 4}
        for found in views.described().values()
    )
    assert any("differed from the others" in said for said in views.told)


def test_applied_entries_that_are_replaced_are_noticed(views: Views) -> None:
    """What the library neither undoes nor applies again."""
    leader = views.leader()
    replica = views.replica(next(node for node in (1, 2, 3) if node != leader))
    index = replica.raftLastApplied
    ((command, _, term),) = replica._SyncObj__getEntries(index, 1)
    replica._SyncObj__deleteEntriesFrom(index)
    replica._SyncObj__raftLog.add(command, index, term)
    replica._compare_cut()
    assert not replica.has_diverged  # the leader has only said it again
    replica._SyncObj__deleteEntriesFrom(index)
    replica._SyncObj__raftLog.add(command + b"x", index, term)
    replica._compare_cut()
    assert replica.has_diverged
    views.until(views.is_whole, "it is built anew")


def test_a_library_that_raises_takes_the_view_down_until_it_stops(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = views.leader()
    tick = ViewReplica.doTick
    broken = {leader}

    def do_tick(self: Any, wait_s: float = 0.0) -> None:
        if self._place.me in broken:
            raise RuntimeError("planted")
        tick(self, wait_s)

    monkeypatch.setattr(ViewReplica, "doTick", do_tick)
    rebuilds = views.views[leader].rebuilds
    views.until(lambda: views.views[leader].rebuilds > rebuilds, f"{FAILURES_MAX} times are enough")
    views.until(
        lambda: any(
            v.described()["role"] == "leader" for n, v in views.views.items() if n not in broken
        ),
        "another one leads",
    )
    assert views.views[leader].problem
    assert isinstance(views.ask(leader, "acquire", "job", "a", 0, 5_000), NotReady)
    broken.clear()
    views.until(views.is_whole, "all is well again")


def test_garbage_and_strangers_change_nothing(views: Views) -> None:
    leader = views.leader()
    reign = views.described()[leader]["reign"]
    endpoint = views.voters[leader]
    port = int(endpoint.rpartition(":")[2])
    vote = {"type": "request_vote", "term": 2**40, "last_log_index": 2**40, "last_log_term": 2**40}
    dropped = views.replica(leader).transport.dropped
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 500)
        stranger.setsockopt(zmq.ROUTING_ID, b"2#1")
        stranger.connect(endpoint)
        parts = [
            b"", b"\xff" * 500, b"\x80\x04\x95", msgpack.packb([1] * 20_000),
            frames.encode("another cluster", Frame("2", 1, 5, vote)),
            frames.encode(CLUSTER_ID, Frame("77", 2, 5, vote)),  # not its own routing id
            frames.encode(CLUSTER_ID, Frame("x", 1, 5, vote)),
        ]  # fmt: skip
        for part in parts:
            stranger.send(part)
        stranger.send_multipart([b"many", b"parts", b""])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\x00" * 1_000)
            views.until(
                lambda: views.replica(leader).transport.dropped >= dropped + len(parts) + 1,
                "all of it has been dropped",
            )
    views.turn_for(ELECTION_S_MAX)
    assert views.leader() == leader
    assert views.described()[leader]["reign"] == reign
    assert views.replica(leader).failures == 0


def test_a_leader_that_ends_in_order_hands_over(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = views.leader()
    # From now on nobody stands by itself: it would wait a minute.
    monkeypatch.setattr(ViewReplica, "_SyncObj__generateRaftTimeout", lambda _: 60.0)
    views.turn_for(0.5)
    views.views.pop(leader).close()
    others = [view for node, view in views.views.items() if node in (1, 2, 3)]
    views.until(
        lambda: any(v.described()["role"] == "leader" for v in others), "it has handed over"
    )


def test_two_holders_are_never_valid_at_once_when_a_leader_is_killed(views: Views) -> None:
    job, ttl_ms = next(names), limits.LEASE_TTL_MS_MIN
    asked_at = time.monotonic()
    first = views.acquire(4, job, "a", ttl_ms)
    valid_until = asked_at + limits.LEASE_HOLDER_SHARE * ttl_ms / 1000
    views.crash(views.leader())
    while (second := views.acquire(4, job, "b", ttl_ms)).kind == HELD:
        assert time.monotonic() < asked_at + 30
        views.turn_for(0.1)
    assert time.monotonic() > valid_until
    assert second.token > first.token


def test_a_taken_address_is_told_and_tried_again() -> None:
    views = Views(1)
    try:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as holder:
            holder.bind(views.voters[1])
            views.until(lambda: views.told, "it is told")
            assert views.voters[1] in views.told[0]
            assert "cannot be bound" in views.views[1].problem
        views.until(views.is_whole, "it is tried again")
    finally:
        views.close()
