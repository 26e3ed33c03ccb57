"""Nothing is ever unpickled: the library runs with pickle's readers replaced by traps."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pysyncobj.pickle as library_pickle
import pysyncobj.serializer
import pysyncobj.syncobj
import pytest
from pysyncobj import SyncObjConsumer, replicated
from pysyncobj.node import Node
from pysyncobj.syncobj import SyncObj
from pysyncobj.transport import Transport

from aegis_cluster import limits
from aegis_cluster.cluster.view import no_pickle
from aegis_cluster.cluster.view.replica import library_settings
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


class Wire:
    """Hands messages over in memory, in order."""

    def __init__(self) -> None:
        self.ends: dict[str, InMemory] = {}

    def link(self) -> None:
        for end in self.ends.values():
            for other in self.ends.values():
                if other is not end:
                    end._onNodeConnected(Node(other.me))

    def deliver(self) -> None:
        for end in self.ends.values():
            inbox, end.inbox = end.inbox, []
            for sender, message in inbox:
                end._onMessageReceived(Node(sender), message)


class InMemory(Transport):  # type: ignore[misc]  # the library ships no types
    """One end of it."""

    def __init__(self, wire: Wire, me: Node) -> None:
        super().__init__(None, me, [])
        self.wire, self.me = wire, me.id
        self.inbox: list[tuple[str, Any]] = []
        wire.ends[me.id] = self

    def send(self, node: Node, message: Any) -> bool:
        self.wire.ends[node.id].inbox.append((self.me, message))
        return True

    def addNode(self, node: Node) -> None: ...

    def dropNode(self, node: Node) -> None: ...

    def destroy(self) -> None: ...


class Memory(SyncObjConsumer):  # type: ignore[misc]  # the library ships no types
    def __init__(self) -> None:
        super().__init__()
        self.got: list[Any] = []

    @replicated  # type: ignore[untyped-decorator]
    def op(self, blob: Any) -> int:
        self.got.append(blob)
        return len(self.got)


class Pair:
    """Two replicas; membership may change here, so that this reader of pickles is met too."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.memories: list[Memory] = []
        self.replicas: list[SyncObj] = []
        for me, other in (("1", "2"), ("2", "1")):
            settings = library_settings()
            settings.dynamicMembershipChange = True
            memory = Memory()
            transport = InMemory(self.wire, Node(me))
            self.memories.append(memory)
            self.replicas.append(
                SyncObj(Node(me), [Node(other)], settings, [memory], Node, transport)
            )
        self.wire.link()

    def turn(self) -> None:
        self.wire.deliver()
        for replica in self.replicas:
            replica.doTick(0.0)

    def until(self, condition: Any, what: str) -> None:
        def turned() -> bool:
            self.turn()
            return bool(condition())

        wait_until(turned, what, 15)

    def elect(self) -> tuple[SyncObj, int]:
        self.until(lambda: any(r._isLeader() for r in self.replicas), "a leader")
        (place,) = [place for place, r in enumerate(self.replicas) if r._isLeader()]
        self.until(lambda: all(r.isReady() for r in self.replicas), "both are ready")
        return self.replicas[place], place

    def close(self) -> None:
        for replica in self.replicas:
            replica.destroy()
            notifier = replica._SyncObj__pipeNotifier
            import os

            os.close(notifier._PipeNotifier__pipeR)
            os.close(notifier._PipeNotifier__pipeW)


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reader of the standard library's pickle, trapped."""
    found: list[str] = []
    for name in ("loads", "load", "_loads", "_load"):

        def trap(*_arguments: Any, _name: str = name, **_named: Any) -> Any:
            found.append(_name)
            raise AssertionError("something was unpickled")

        monkeypatch.setattr(pickle, name, trap)
    return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.mark.slow
def test_nothing_is_unpickled(hits: list[str], pair: Pair) -> None:
    leader, place = pair.elect()
    memory, other = pair.memories[place], pair.memories[1 - place]

    results: list[Any] = []
    memory.op(b"from the leader", callback=lambda result, _: results.append(result))
    other.op(("from", "the follower"), callback=lambda result, _: results.append(result))
    pair.until(lambda: len(results) == 2, "both commands are answered")

    memory.op(b"b" * 300_000)  # a big entry, in pieces
    pair.until(lambda: all(len(m.got) == 3 for m in pair.memories), "the big entry is applied")

    done: list[Any] = []
    leader.addNodeToCluster(Node("3"), callback=lambda _, reason: done.append(reason))
    pair.until(lambda: done, "a change of members")
    assert done == [0]
    leader.removeNodeFromCluster(Node("3"), callback=lambda _, reason: done.append(reason))
    pair.until(lambda: len(done) == 2, "another one")

    # A snapshot for a follower that begins anew.
    leader.forceLogCompaction()
    pair.until(lambda: leader._getRaftLogSize() < 4, "the log is cut to a snapshot")
    follower = pair.replicas[1 - place]
    follower._SyncObj__raftLog.clear()
    follower._SyncObj__raftLog.add(b"\x01", 1, 0)
    follower._SyncObj__raftCommitIndex = follower._SyncObj__raftLastApplied = 1
    other.got = []
    pair.until(lambda: len(other.got) == 3, "the snapshot is read")
    assert tuple(other.got)[:2] == (b"from the leader", ("from", "the follower"))
    assert hits == []


@pytest.mark.slow
def test_without_the_replacement_the_trap_fires(
    hits: list[str], monkeypatch: pytest.MonkeyPatch, pair: Pair
) -> None:
    monkeypatch.setattr(pysyncobj.syncobj, "pickle", library_pickle)
    monkeypatch.setattr(pysyncobj.serializer, "pickle", library_pickle)
    _, place = pair.elect()
    pair.memories[place].op(b"command")

    def fired() -> bool:
        try:
            pair.turn()
        except AssertionError:
            return bool(hits)
        return False

    wait_until(fired, "the trap", 15)
    assert {"loads", "_loads"} <= set(hits)


def test_both_places_are_replaced() -> None:
    assert pysyncobj.syncobj.pickle is no_pickle.MsgpackForPickle
    assert pysyncobj.serializer.pickle is no_pickle.MsgpackForPickle


def test_values_come_back_as_they_were() -> None:
    value = (7, (b"blob",), {"a": (1, None, True)}, {Node("1"), Node("2")}, Node("3"), {1: 2})
    assert no_pickle.MsgpackForPickle.loads(no_pickle.MsgpackForPickle.dumps(value)) == value


def test_a_pickle_is_no_value() -> None:
    with pytest.raises(ValueError, match="extra data"):
        no_pickle.MsgpackForPickle.loads(pickle.dumps({"a": 1}, protocol=0))
    with pytest.raises(TypeError, match="replicates no object"):
        no_pickle.MsgpackForPickle.dumps(object())


def test_nested_sets_do_not_recurse() -> None:
    nested = no_pickle.MsgpackForPickle.dumps({frozenset({frozenset({1})})})
    with pytest.raises(ValueError, match="an extension of kind 2"):
        no_pickle.MsgpackForPickle.loads(nested)


def test_a_snapshot_is_read_up_to_a_limit() -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            return b"\x00" * size

    with pytest.raises(ValueError, match=str(limits.VIEW_SNAPSHOT_BYTES_MAX)):
        no_pickle.MsgpackForPickle.load(Endless())  # type: ignore[arg-type]
