"""Whatever anybody sends, to any listener, the shard lives on and serves the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_cluster.broker import peer_api
from aegis_cluster.broker.transport import Listener
from aegis_cluster.ids import LogIndex, Member, NodeId, Term
from aegis_cluster.limits import REQUEST_PARTS_MAX
from aegis_cluster.raft.codec import message_to_fields
from aegis_cluster.raft.messages import AppendReply, AppendRequest, Heartbeat
from aegis_cluster.wire.codes import Code
from aegis_cluster.wire.protocol import Api, encode_request
from tests.broker.harness import Client, Cluster, batch, hello

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import SearchStrategy

    from aegis_cluster.wire.protocol import Part, Reply

SERVER_APIS = [api for api in Api if api is not Api.STEP_DOWN]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=True)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.integers(0, 3)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner)
)
"""Anything that msgpack can carry."""


def near(shape: Any) -> SearchStrategy[Any]:
    """Values shaped like this one, some of their leaves replaced by anything."""
    if isinstance(shape, list):
        whole = st.tuples(*(near(item) for item in shape)).map(list)
        cut = whole.flatmap(lambda items: st.integers(0, len(items)).map(lambda n: items[:n]))
        return st.one_of(whole, whole, cut, values)
    return st.one_of(st.just(shape), st.just(shape), values)


SHAPES: dict[Api, list[Any]] = {
    Api.HELLO: hello().to_fields(),
    Api.METADATA: [0, ["t", "u"]],
    Api.CREATE_TOPIC: ["t", 1, 1, ["topic", None, None, "delete", "none", 1_000], "token"],
    Api.ALTER_TOPIC: ["t", 2, {"retention_ms": 1}],
    Api.DELETE_TOPIC: ["t"],
    Api.INIT_PRODUCER: [],
    Api.PRODUCE: [[[1, "t", 0]]],
    Api.FETCH: [0, [[1, 0, 1_000]]],
    Api.LIST_OFFSETS: [[1]],
    Api.STATUS: [],
    Api.CLUSTER_VIEW: [],
    Api.LEASE: ["acquire", "job", "holder", 0, 5_000],
    Api.REGISTER_NODE: [[1, "incarnation-1", "node-1", "127.0.0.1", 7100, 1, "boot"]],
    Api.PRODUCER_IDS: [],
    Api.COPY_LOG: [1, 1],
    Api.COPY_SNAPSHOT: [1, 0, 0, False],
    Api.DISK_STATE: [True, 100],
    Api.INTERNAL_TOPIC: ["__groups"],
    Api.GROUP_BEAT: ["g", "m", "s", False, ["t"], 10_000, "here", 0, {"t": [0]}],
    Api.GROUP_LEAVE: ["g", "m", "s"],
    Api.GROUP_COMMIT: ["g", "m", "s", 1, 1, [["t", 0, 1]]],
    Api.GROUP_OFFSETS: ["g", [["t", 0]]],
    Api.GROUP_DESCRIBE: ["g"],
    Api.GROUP_LIST: [0],
    Api.GROUP_DELETE: ["g"],
    Api.EVENT_APPEND: [[[1, [["s", -2, bytes(16), None]]]]],
    Api.EVENT_READ: [1, "s", None, 10, False, 1_000],
    Api.FEED_FENCE: [1, 1, "writer"],
    Api.FEED_APPEND: [1, 1, "writer", 1, 1, None],
    Api.FEED_READ: [1],
    Api.SUBSCRIPTION_OPEN: ["t", "s", "look", "token", None, [[1, 0]], False],
    Api.SUBSCRIPTION_POLL: ["t", "s", "token", "c", "here", 1, 1, [0]],
    Api.SUBSCRIPTION_REPORT: ["t", "s", "token", "c", 1, 0, 1, [[0, 1]], None],
    Api.SUBSCRIPTION_SETTLE: ["t", "s", "token", "c", [["ack", 1, 0, 1, 1, 0, ""]]],
    Api.SUBSCRIPTION_BURY: ["t", "n", "k", "c", 1, 0, [[1, 0, 1]]],
    Api.SUBSCRIPTION_LEAVE: ["t", "s", "token", "c"],
    Api.SUBSCRIPTION_DESCRIBE: ["t", "s"],
    Api.SUBSCRIPTION_LIST: [0],
    Api.SUBSCRIPTION_PARKED: ["t", "s", 0, 0, 10],
    Api.SUBSCRIPTION_REPLAY: ["t", "s", [[1, 0]]],
    Api.SUBSCRIPTION_DELETE: ["t", "s"],
    Api.SUBSCRIPTION_RESET: ["t", "n", "k", [[1, 0]]],
    Api.TRANSACTION_INIT: ["x", 10_000, "here", "token", [1, 0]],
    Api.TRANSACTION_JOIN: ["x", 1, 0, [["t", 0]], 0],
    Api.TRANSACTION_END: ["x", 1, 0, True],
    Api.TRANSACTION_DESCRIBE: ["x"],
    Api.TRANSACTION_LIST: [0, "", 10],
    Api.TRANSACTION_ABORT: ["x", 1, 0],
    Api.WRITE_MARKERS: [[[1, 1, 1, True, 1]]],
    Api.VERIFY_TRANSACTION: ["x", 1, 0, 1],
    Api.RAFT: [[[1, -1, [1, 1, 0]], [1, 0, [2, 1, 0, 0, 0, [[1, 1, 0, 10]]]]]],
}


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """One node, so that it leads whatever anybody says."""
    found = Cluster(1)
    found.registered()
    found.topic(replicas=1)
    assert Client(found, found.elect()).ask(Api.INTERNAL_TOPIC, ["__groups"]).code == 0
    assert Client(found, found.elect()).ask(Api.INTERNAL_TOPIC, ["__transactions"]).code == 0
    assert Client(found, found.elect()).ask(Api.INTERNAL_TOPIC, ["__subscriptions"]).code == 0
    return found


def assert_serves(cluster: Cluster) -> None:
    """It answers an honest client, and holds nothing back for others."""
    cluster.tick(2)
    host = cluster.elect()
    info = host.alive.table.topics.get("t") or cluster.topic(replicas=1)
    client = Client(cluster, cluster.elect(info.partitions[0].group))
    client.stored(info.partitions[0].group, batch(b"honest"))
    assert client.ask(Api.STATUS).code == 0
    assert client.ask(Api.METADATA, [0, None]).code == 0
    clients = host.alive.clients
    assert (clients.in_flight_bytes, clients.reading_bytes, clients.question_bytes) == (0, 0, 0)


def receive(cluster: Cluster, listener: Listener, origin: bytes, message: list[bytes]) -> None:
    shard = cluster.host(1).alive
    if listener is Listener.PEERS:
        shard.peer_request(origin, message)
    else:
        shard.client_request(listener, origin, message)


@settings(max_examples=60, deadline=None)
@given(
    listener=st.sampled_from(list(Listener)),
    message=st.lists(st.binary(max_size=80), max_size=4),
)
def test_any_bytes(cluster: Cluster, listener: Listener, message: list[bytes]) -> None:
    receive(cluster, listener, b"stranger", message)
    assert_serves(cluster)


@pytest.mark.slow
@pytest.mark.timeout(90)  # all of it is computing, so a busy machine stretches it
@settings(max_examples=100, deadline=None)  # `./tools/fuzz --live` goes on for longer
@given(data=st.data(), listener=st.sampled_from(list(Listener)), api=st.sampled_from(SERVER_APIS))
def test_any_fields_after_an_honest_greeting(
    cluster: Cluster, data: st.DataObject, listener: Listener, api: Api
) -> None:
    peers = listener is Listener.PEERS
    greeting = hello(role="peer", node=9, incarnation="nine") if peers else hello()
    greet = encode_request(Api.HELLO, greeting.to_fields(), correlation=1, ms_left=100)
    receive(cluster, listener, b"guest", [bytes(part) for part in greet])
    fields = data.draw(near(SHAPES[api]), label="fields")
    if not isinstance(fields, list):
        fields = [fields]
    parts = data.draw(st.lists(st.binary(max_size=90) | st.just(batch(b"x")), max_size=3))
    message = encode_request(api, fields, parts, correlation=2, ms_left=100)
    receive(cluster, listener, b"guest", [bytes(part) for part in message])
    assert_serves(cluster)


def test_a_message_of_too_many_or_too_large_parts(cluster: Cluster) -> None:
    for listener in Listener:
        receive(cluster, listener, b"stranger", [b"\x90"] * (REQUEST_PARTS_MAX + 2))
        receive(cluster, listener, b"stranger", [b"\xc6" + b"\xff" * (1 << 20) + b"x"])
    assert_serves(cluster)


def test_raft_messages_of_a_stranger_change_nothing(cluster: Cluster) -> None:
    term = cluster.host(1).partition(0).replica.term
    later = Term(term + 7)
    nothing = LogIndex(0)
    for message in (
        Heartbeat(later, nothing, 0, quiet=False),
        AppendRequest(later, nothing, Term(0), nothing, nothing, nothing),
    ):
        raft = [[0, -1, message_to_fields(message)]]
        request = encode_request(Api.RAFT, [raft], correlation=0, ms_left=100)
        receive(cluster, Listener.PEERS, b"ungreeted", [bytes(part) for part in request])
    assert cluster.host(1).partition(0).replica.term == term
    assert_serves(cluster)


# ---- peers


class Peer(Client):
    """Somebody on the peers listener."""

    def __init__(self, cluster: Cluster, node: int = 1) -> None:
        super().__init__(cluster, cluster.host(node), Listener.PEERS, greet=False)

    def raw(self, message: Sequence[Part]) -> None:
        self.host.alive.peer_request(self.origin, message)

    def greet(self, **who: Any) -> Reply:
        return self.ask(Api.HELLO, hello(**{"role": "peer", **who}).to_fields())


def test_a_peer_of_another_cluster_or_protocol_is_refused(cluster: Cluster) -> None:
    assert Peer(cluster).greet(cluster_id="another", node=2).code == Code.WRONG_CLUSTER
    assert Peer(cluster).greet(cluster_id="", node=2).code == Code.WRONG_CLUSTER
    assert Peer(cluster).greet(version=2, node=2).code == Code.UNSUPPORTED_VERSION


def test_a_peer_is_not_heard_before_its_greeting(cluster: Cluster) -> None:
    assert Peer(cluster).ask(Api.PRODUCER_IDS).code == Code.NOT_READY


def test_a_client_on_the_peers_listener_gets_no_answer(cluster: Cluster) -> None:
    peer = Peer(cluster)
    number = peer.send(Api.HELLO, hello().to_fields())
    cluster.tick(2)
    assert peer.reply(number) is None
    assert peer.ask(Api.PRODUCER_IDS).code == Code.NOT_READY


def test_a_stranger_in_a_shard_s_name_costs_that_shard_nothing(cluster: Cluster) -> None:
    """A restarted process opens a new connection; its old one is dead and says nothing more."""
    first, second = Peer(cluster), Peer(cluster)
    assert first.greet(node=2, incarnation="two").code == 0
    assert second.greet(node=2, incarnation="stranger").code == 0
    assert first.ask(Api.PRODUCER_IDS).code == 0
    assert second.ask(Api.PRODUCER_IDS).code == 0


def test_a_flood_of_greetings_costs_a_peer_at_work_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_api, "PEERS_MAX", 4)
    peer = Peer(cluster)
    peer.greet(node=2, incarnation="two")
    for node in range(3, 13):
        assert Peer(cluster).greet(node=node, incarnation="nobody").code == 0
        assert peer.ask(Api.PRODUCER_IDS).code == 0
    assert len(cluster.host(1).alive.peer_api._peers) <= 4


def test_a_broken_message_costs_a_peer_its_standing(cluster: Cluster) -> None:
    peer = Peer(cluster)
    peer.greet(node=2, incarnation="two")
    before = cluster.host(1).alive.complaints.count
    peer.raw([b"junk"])
    assert cluster.host(1).alive.complaints.count == before + 1
    assert peer.ask(Api.PRODUCER_IDS).code == Code.NOT_READY


def test_a_wiped_node_does_not_vote_under_its_old_name() -> None:
    """KIP-853's directory id: its votes, and what it claims to hold, count for nobody."""
    cluster = Cluster()
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    cluster.isolate(leader.key.node)
    client = Client(cluster, leader)
    number = client.produce(placed.group, batch(b"a"))
    cluster.settle()
    replica = leader.partition(placed.group).replica
    peer = Peer(cluster, leader.key.node)
    wiped = next(n for n in (1, 2, 3) if n != leader.key.node)
    peer.greet(node=wiped, incarnation="wiped")
    reply = AppendReply(replica.term, replica.log.last_index, LogIndex(0))
    peer.send(Api.RAFT, [[[placed.group, -1, message_to_fields(reply)]]])
    cluster.settle()
    assert client.reply(number) is None
    peer.greet(node=wiped, incarnation=cluster.member(NodeId(wiped)).incarnation)
    peer.send(Api.RAFT, [[[placed.group, -1, message_to_fields(reply)]]])
    cluster.settle()
    assert isinstance(client.outcome(number), tuple), "so it was the incarnation that counted"


@pytest.mark.parametrize("group", ["metadata", "topic"])
def test_who_says_that_it_leads_beside_the_leader_is_not_followed(group: str) -> None:
    """Found by strangers' fire on real nodes: a shard ended because of two leaders in one term."""
    cluster = Cluster()
    cluster.registered()
    number = 0 if group == "metadata" else cluster.topic().partitions[0].group
    leader = cluster.elect(number)
    term = leader.partition(number).replica.term
    for host in cluster.hosts.values():
        peer = Peer(cluster, host.key.node)
        peer.greet(node=3, incarnation="stranger")
        for message in (
            Heartbeat(term, LogIndex(1_000), 0, quiet=False),
            AppendRequest(term, LogIndex(1), Term(1), LogIndex(1), LogIndex(1), LogIndex(0)),
        ):
            before = host.alive.complaints.count
            peer.send(Api.RAFT, [[[number, -1, message_to_fields(message)]]])
            assert host.alive.complaints.count == before + 1
            peer.greet(node=3, incarnation="stranger")
        replica = host.partition(number).replica
        assert replica.leader == leader.alive.context.me
        assert not replica.damaged
    cluster.tick(10)
    assert cluster.elect(number) is leader
    assert leader.partition(number).replica.term == term


def test_a_member_is_followed_where_a_stranger_was() -> None:
    cluster = Cluster()
    follower = cluster.host(2)
    peer = Peer(cluster, 2)
    peer.greet(node=3, incarnation="stranger")
    term = Term(follower.partition(0).replica.term + 1)
    beat = Heartbeat(term, LogIndex(0), 0, quiet=False)
    peer.send(Api.RAFT, [[[0, -1, message_to_fields(beat)]]])
    replica = follower.partition(0).replica
    assert replica.leader == Member(NodeId(3), "stranger")
    honest = cluster.member(NodeId(1))
    replica.receive(honest, beat)
    assert replica.leader == honest
