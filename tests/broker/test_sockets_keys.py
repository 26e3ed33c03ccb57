"""Listeners and links with keys: who gets in, who does not, and what passes on the wire."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING

import pytest
import zmq
import zmq.utils.z85

from aegis_cluster.broker.sockets import Sockets
from aegis_cluster.broker.transport import Listener, PeerKey
from aegis_cluster.curve import connect_with
from aegis_cluster.doorkeeper import CLIENTS_DOMAIN, PEERS_DOMAIN, Doorkeeper
from aegis_cluster.errors import ConfigError
from aegis_cluster.ids import NodeId, ShardId
from aegis_cluster.keys import KeyList, KeyPair, NodeKeys, new_pair, write_public
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

PEER = PeerKey(NodeId(2), ShardId(0))
ALL = tuple(Listener)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Node:
    """The sockets of a shard in a directory of keys, turned by hand."""

    def __init__(self, directory: Path, name: str, *, keys: bool = True) -> None:
        self.directory = directory / name
        for accepted in ("peers", "clients"):
            (self.directory / accepted).mkdir(parents=True)
        self.pair = new_pair(name)
        self.keys = keys
        self.endpoints = {listener: f"tcp://127.0.0.1:{free_port()}" for listener in Listener}
        self._sockets: Sockets | None = None
        self.got: list[tuple[Listener, bytes]] = []
        self.replies: list[bytes] = []
        self.ups: list[bool] = []

    def accept(self, kind: str, pair: KeyPair) -> None:
        write_public(pair, self.directory / kind / f"{pair.name}.pub")

    def withdraw(self, kind: str, pair: KeyPair) -> None:
        (self.directory / kind / f"{pair.name}.pub").unlink()

    @property
    def sockets(self) -> Sockets:
        if self._sockets is None:
            keys = NodeKeys(
                self.pair,
                peers=KeyList(self.directory / "peers"),
                clients=KeyList(self.directory / "clients"),
            )
            self._sockets = Sockets(self.endpoints, keys=keys if self.keys else None)
        return self._sockets

    def turn(self) -> None:
        """What a shard's loop does with them; every message is answered with itself."""
        sockets = self.sockets
        sockets.poll(5)
        sockets.look_around(0)
        for listener in Listener:
            received = sockets.receive(listener)
            if received is not None:
                origin, message = received
                self.got.append((listener, bytes(message[-1])))
                sockets.reply(listener, origin, message)
        self.replies += [bytes(message[-1]) for _, message in sockets.peer_messages(10)]
        for key, is_up in list(sockets.link_events()):
            self.ups.append(is_up)
            if not is_up:
                sockets.renew_peer(key)

    def read_keys(self) -> None:
        read = self.sockets.keys_to_read()
        if read is not None:
            self.sockets.take_keys(read())

    def close(self) -> None:
        if self._sockets is not None:
            self._sockets.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    made = [Node(tmp_path, "one"), Node(tmp_path, "two")]
    yield made
    for node in made:
        node.close()


def until(
    what: str, condition: Callable[[], object], *nodes: Node, keys: Node | None = None
) -> None:
    """Let the nodes turn, and one of them look at its lists, until the condition holds."""

    def step() -> bool:
        for node in nodes:
            node.turn()
        if keys is not None:
            keys.read_keys()
        return bool(condition())

    wait_until(step, what)


def is_let_in(node: Node, listener: Listener, own: KeyPair, server: KeyPair | None = None) -> bool:
    """Whether somebody with this pair gets an answer at this listener."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.set(zmq.LINGER, 0)
    connect_with(dealer, own, (server or node.pair).public)
    monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    dealer.connect(node.endpoints[listener])
    dealer.send(b"let me in")
    try:
        until("an answer or a refusal", lambda: dealer.poll(0) or monitor.poll(0), node)
        return bool(dealer.poll(0))
    finally:
        dealer.disable_monitor()
        monitor.close(0)
        context.destroy(linger=0)


def test_peers_and_clients_enter_through_doors_of_their_own(nodes: list[Node]) -> None:
    node = nodes[0]
    peer, client, stranger = new_pair("peer"), new_pair("client"), new_pair("stranger")
    node.accept("peers", peer)
    node.accept("clients", client)
    entered = {
        pair.name: [listener for listener in ALL if is_let_in(node, listener, pair)]
        for pair in (peer, client, stranger)
    }
    assert entered == {
        "peer": [Listener.PEERS],
        "client": [Listener.CONTROL, Listener.DATA],
        "stranger": [],
    }


def test_a_refused_key_is_logged_once_and_no_secret_ever(
    nodes: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    node, stranger = nodes[0], new_pair("stranger")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert not is_let_in(node, Listener.DATA, stranger)
    told = [record.getMessage() for record in caplog.records if "Refused" in record.getMessage()]
    assert len(told) == 1
    assert stranger.public in told[0]
    assert "127.0.0.1" in told[0]
    assert stranger.secret not in caplog.text
    assert node.pair.secret not in caplog.text


def test_nobody_gets_in_while_nobody_answers_for_the_door(nodes: list[Node]) -> None:
    """ZeroMQ on its own would let everybody in who holds the node's public key."""
    node, client = nodes[0], new_pair("client")
    node.accept("clients", client)
    assert is_let_in(node, Listener.CONTROL, client)
    door = node.sockets._door
    assert door is not None
    node.sockets._readiness.unregister(door.socket)
    door.close()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.set(zmq.LINGER, 0)
    connect_with(dealer, client, node.pair.public)
    monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(node.endpoints[Listener.CONTROL])
    assert not monitor.poll(1_000)
    dealer.disable_monitor()
    monitor.close(0)
    context.destroy(linger=0)


def test_lists_are_followed_without_a_restart(nodes: list[Node]) -> None:
    node, client = nodes[0], new_pair("client")
    assert not is_let_in(node, Listener.DATA, client)
    node.accept("clients", client)
    until("the new key", lambda: is_let_in(node, Listener.DATA, client), keys=node)


def test_a_withdrawn_key_loses_the_connection_that_it_has(nodes: list[Node]) -> None:
    node, client, other = nodes[0], new_pair("client"), new_pair("other")
    for pair in (client, other):
        node.accept("clients", pair)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.set(zmq.LINGER, 0)
    connect_with(dealer, client, node.pair.public)
    dealer.connect(node.endpoints[Listener.DATA])
    dealer.send(b"1")
    until("an answer", lambda: dealer.poll(0), node)
    monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    node.withdraw("clients", client)
    try:
        until("the refusal", lambda: monitor.poll(0), node, keys=node)
        assert is_let_in(node, Listener.DATA, other)
    finally:
        dealer.disable_monitor()
        monitor.close(0)
        context.destroy(linger=0)


def linked(one: Node, two: Node, endpoint: str | None = None) -> None:
    one.sockets.open_peer(PEER, endpoint or two.endpoints[Listener.PEERS])
    until("a link", lambda: True in one.ups, one, two)


def test_nodes_link_and_find_the_key_that_fits(nodes: list[Node]) -> None:
    one, two = nodes
    for number in range(3):
        one.accept("peers", new_pair(f"other-{number}"))
    one.accept("peers", two.pair)
    two.accept("peers", one.pair)
    linked(one, two)
    assert one.sockets.send_peer(PEER, [b"vote"])
    until("a reply", lambda: one.replies, one, two)
    assert two.got == [(Listener.PEERS, b"vote")]
    assert one.replies == [b"vote"]


def test_a_node_that_is_not_accepted_says_so_and_is_linked_once_it_is(
    nodes: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = nodes
    one.accept("peers", two.pair)
    two.accept("clients", one.pair)
    one.sockets.open_peer(PEER, two.endpoints[Listener.PEERS])
    until("a sentence", lambda: "does not accept this node's key" in caplog.text, one, two)
    assert one.pair.public in caplog.text
    two.withdraw("clients", one.pair)
    two.accept("peers", one.pair)
    until("a link", lambda: one.ups, one, two, keys=two)
    assert one.ups == [True]


def test_a_node_that_others_do_not_know_is_not_believed(
    nodes: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = nodes
    one.accept("peers", new_pair("two"))
    two.accept("peers", one.pair)
    one.sockets.open_peer(PEER, two.endpoints[Listener.PEERS])
    until("a sentence", lambda: "holds none of the" in caplog.text, one, two)
    assert not one.ups
    assert not one.sockets.send_peer(PEER, [b"vote"])


class Tap:
    """A relay between two ends that keeps every byte that passes."""

    def __init__(self, target: str) -> None:
        self.seen = bytearray()
        host, port = target.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._target)
                self._sockets += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()
        except OSError:
            return

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
            one.close()


@pytest.mark.parametrize("keys", [True, False])
def test_what_passes_between_nodes_is_not_what_they_say(tmp_path: Path, keys: bool) -> None:
    """Without keys the same tap hears everything, so it would notice."""
    one, two = (Node(tmp_path, name, keys=keys) for name in ("one", "two"))
    one.accept("peers", two.pair)
    two.accept("peers", one.pair)
    two.turn()  # it listens
    tap = Tap(two.endpoints[Listener.PEERS])
    secret = b"account 4711 holds 99.99" * 50
    try:
        linked(one, two, tap.endpoint)
        assert one.sockets.send_peer(PEER, [secret])
        until("a reply", lambda: one.replies, one, two)
        assert one.replies == [secret]
        assert len(tap.seen) > 2 * len(secret), "all of it passed here"
        assert (b"account 4711" in tap.seen) is not keys
    finally:
        one.close()
        two.close()
        tap.close()


def test_no_listener_beyond_this_machine_without_keys() -> None:
    endpoints = dict.fromkeys(Listener, "tcp://0.0.0.0:1")
    with pytest.raises(ConfigError, match="this node has no keys"):
        Sockets(endpoints)


def test_no_link_beyond_this_machine_without_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(tmp_path, "one", keys=False)
    node.sockets.open_peer(PEER, "tcp://192.0.2.1:7103")
    node.turn()
    assert not node.sockets.send_peer(PEER, [b"x"])
    assert "No link is made to tcp://192.0.2.1:7103" in caplog.text
    node.sockets.close_peer(PEER)
    node.close()


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    node = Node(tmp_path, "one")
    client = new_pair("client")
    node.accept("clients", client)
    keys = NodeKeys(
        node.pair,
        peers=KeyList(node.directory / "peers"),
        clients=KeyList(node.directory / "clients"),
    )
    key = zmq.utils.z85.decode(client.public)
    good = [b"1.0", b"7", CLIENTS_DOMAIN.encode(), b"127.0.0.1", b"", b"CURVE", key]
    door = Doorkeeper(keys)
    assert door.answer(good) == [b"1.0", b"7", b"200", b"OK", b"client", b""]
    wrong: list[list[bytes]] = [
        [],
        good[:-1],
        [*good, b""],
        [b"2.0", *good[1:]],
        [*good[:2], b"", *good[3:]],
        [*good[:2], PEERS_DOMAIN.encode(), *good[3:]],
        [*good[:2], b"\xff", *good[3:]],
        [*good[:5], b"NULL", key],
        [*good[:5], b"PLAIN", key],
        [*good[:6], key[:-1]],
        [*good[:6], bytes(32)],
    ]
    for request in wrong:
        assert door.answer(request)[2] == b"400", request
