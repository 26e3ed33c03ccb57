"""What other shards may ask of this one: greeting, Raft, registration, producer ids, metadata.

The rule it protects: nothing is believed of a connection before its hello, and a Raft message
counts as coming from the incarnation that said hello on that connection.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker import fetch, repair
from aegis_cluster.broker.clients import Client
from aegis_cluster.broker.transport import Listener
from aegis_cluster.cluster import controller
from aegis_cluster.cluster.metadata import GrantProducerIds
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    NotReady,
    PeerViolation,
    StorageFailed,
    WrongCluster,
)
from aegis_cluster.ids import (
    INTERNAL_TOPICS,
    METADATA_GROUP,
    GroupId,
    LogIndex,
    Member,
    NodeId,
)
from aegis_cluster.raft.codec import message_from_fields
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.descriptions import node_from_fields
from aegis_cluster.wire.protocol import (
    Api,
    Hello,
    Part,
    Reply,
    Request,
    check_protocol,
    check_version,
    decode_request,
    encode_reply,
    take_bool,
    take_int,
    take_list,
    take_part,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transport import Transport
    from aegis_cluster.cluster.metadata import Command

    Done = Callable[[Reply | AegisError], None]

PEERS_MAX: Final = 4_096
"""Connections that have greeted; the one that was silent longest goes first. It is never the one
of a peer at work, whatever a stranger invents: that one speaks at every heartbeat."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Peer:
    hello: Hello
    client: Client
    """What it has under way here is counted as of any client."""


class PeerApi:
    """The peers listener of one shard."""

    def __init__(self, shard: Shard, transport: Transport) -> None:
        self._shard = shard
        self._transport = transport
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()

    def handle(self, origin: bytes, message: Sequence[Part]) -> None:
        """One message of a peer; a broken one costs its sender the connection's standing."""
        try:
            request = decode_request(message)
        except PeerViolation as error:
            self._violated(origin, error)
            return
        try:
            self._dispatch(origin, request)
        except PeerViolation as error:
            self._violated(origin, error)
        except StorageFailed:
            raise  # no answer to a peer: it ends the process
        except AegisError as error:
            self._refuse(origin, request, error)

    def _violated(self, origin: bytes, error: PeerViolation) -> None:
        known = self._peers.pop(origin, None)
        node = known.hello.node if known else "?"
        self._shard.complaints.say("Dropped a link (from node %s): %s", node, error)

    def _dispatch(self, origin: bytes, request: Request) -> None:
        api = check_version(request)
        if api is Api.HELLO:
            self._hello(origin, request)
            return
        peer = self._peers.get(origin)
        if peer is None:
            raise NotReady("Say hello first: this process does not know the link.")
        self._peers.move_to_end(origin)
        match api:
            case Api.RAFT:
                self._raft(peer.hello, request)
            case Api.REGISTER_NODE:
                self.register_node(request.fields, self._answer(origin, request))
            case Api.PRODUCER_IDS:
                self.grant_producer_ids(self._answer(origin, request))
            case Api.FETCH:
                self._fetch(origin, peer.client, request)
            case Api.WRITE_MARKERS:
                self._shard.transactions.write_markers(
                    request.fields, self._answer(origin, request)
                )
            case Api.VERIFY_TRANSACTION:
                self._shard.transactions.verify(request.fields, self._answer(origin, request))
            case Api.COPY_LOG:
                self._shard.clients.check_room(peer.client)
                self._copy_log(origin, request)
            case Api.DISK_STATE:
                self._shard.peer_disks.heard(peer.hello, request.fields)
                self._reply(origin, request, [])
            case Api.COPY_SNAPSHOT:
                self._shard.clients.check_room(peer.client)
                self._copy_snapshot(origin, request)
            case _:
                raise PeerViolation(f"Api {api.name} is not for the peers listener.")

    def _hello(self, origin: bytes, request: Request) -> None:
        hello = Hello.from_fields(request.fields)
        check_protocol(hello)
        if hello.role != "peer":
            raise PeerViolation("Clients use the control and data listeners.")
        if hello.cluster_id != self._shard.context.cluster_id:
            raise WrongCluster(
                f"This node belongs to cluster {self._shard.context.cluster_id}, the caller to"
                f" {hello.cluster_id}. Check the peers in the node files.",
            )
        known = self._peers.get(origin)
        client = known.client if known else Client(Listener.PEERS, origin)
        self._peers[origin] = _Peer(hello, client)
        if len(self._peers) > PEERS_MAX:
            self._peers.popitem(last=False)
        self._reply(origin, request, self._shard.context.hello.to_fields())

    # ---- Raft

    def _raft(self, peer: Hello, request: Request) -> None:
        sender = Member(NodeId(peer.node), peer.incarnation)
        for item in take_list(request.fields, 0, "messages"):
            if not isinstance(item, list):
                raise PeerViolation("A Raft message travels as [group, part, fields].")
            group = GroupId(take_int(item, 0, "group"))
            part = take_int(item, 1, "part", low=-1)
            frames = None if part < 0 else memoryview(take_part(request.parts, part, "frames"))
            partition = self._shard.manager.partitions.get(group)
            if partition is None and group == METADATA_GROUP:
                partition = self._shard.join_metadata(sender)
            if partition is not None and not self._knows(sender, partition):
                self._shard.complaints.say(
                    "Ignored a Raft message for %s: its sender, node %s, is no member and not"
                    " registered.",
                    partition.name,
                    sender.node,
                )
            elif partition is not None:
                partition.receive(
                    sender, message_from_fields(take_list(item, 2, "message")), frames
                )
                self._shard.manager.due(partition)

    def _knows(self, sender: Member, partition: Partition) -> bool:
        """Whether the sender may be a member. Who was made one of `__cluster/0` meanwhile is
        learned from it alone, so there everybody may.
        """
        registered = self._shard.table.nodes.get(sender.node)
        return (
            (registered is not None and registered.incarnation == sender.incarnation)
            or partition.group == METADATA_GROUP
            or sender in partition.replica.membership.members
        )

    # ---- the controller's calls

    def register_node(self, fields: Sequence[Any], done: Done) -> None:
        """Put a node into the metadata; `done` hears when that is committed."""
        info = node_from_fields(take_list(fields, 0, "node"))

        def answer(result: Command | AegisError | None, index: LogIndex) -> None:
            done(result if isinstance(result, AegisError) else _reply([index]))

        self._controller().submit(lambda table: controller.register_node(table, info), answer)
        for name in INTERNAL_TOPICS:  # this may be the node that they have waited for
            self._controller().submit(
                lambda table, name=name: controller.widen_internal_topic(table, name), _ignore
            )

    def grant_producer_ids(self, done: Done) -> None:
        """Give away a block of producer ids; `done` hears [first, count] once committed."""

        def answer(result: Command | AegisError | None, _: LogIndex) -> None:
            if isinstance(result, GrantProducerIds):
                done(_reply([result.first, result.count]))
            elif isinstance(result, AegisError):
                done(result)

        self._controller().submit(controller.grant_producer_ids, answer)

    def _controller(self) -> Any:
        frontend = self._shard.controller
        if frontend is None:
            raise NotLeader("This shard holds no replica of the cluster's metadata.")
        return frontend

    # ---- metadata for shards without a replica of it

    def _fetch(self, origin: bytes, client: Client, request: Request) -> None:
        wait_ms, items = fetch.parse(request)
        self._shard.freshness.tick()
        if not self._shard.freshness.is_fresh:
            raise NotReady("This shard has not caught up with the metadata since it started.")
        clients = self._shard.clients
        clients.take_fetch(client, len(items))

        def reply(results: list[list[Any]], parts: list[Part]) -> None:
            clients.give_back_fetch(client, len(items))
            self._reply(origin, request, [results], parts)

        deadline_ms = self._shard.now_ms + wait_ms
        call = fetch.FetchCall(client, items, deadline_ms, strict=False, reply=reply)
        self._shard.fetches.start(call, self._shard.now_ms)

    # ---- rebuilding a damaged replica

    def _copy_log(self, origin: bytes, request: Request) -> None:
        """[group, first index] -> committed frames."""
        group = GroupId(take_int(request.fields, 0, "group"))
        first = LogIndex(take_int(request.fields, 1, "first", low=1))
        partition = self._shard.manager.partitions.get(group)
        if partition is None:
            raise NotLeader("This shard has no replica of the partition.")
        repair.answer_frames(partition, first, self._parts_answer(origin, request), self._shard)

    def _copy_snapshot(self, origin: bytes, request: Request) -> None:
        """See `snapshot_transfer`."""
        group = GroupId(take_int(request.fields, 0, "group"))
        capture = take_int(request.fields, 1, "capture")
        piece = take_int(request.fields, 2, "piece")
        confirm = take_bool(request.fields, 3, "confirm")
        answer = self._parts_answer(origin, request)
        self._shard.snapshot_server.ask(group, capture, piece, answer, confirm=confirm)

    def _parts_answer(
        self, origin: bytes, request: Request
    ) -> Callable[[list[Any], list[Part]], None]:
        def answer(fields: list[Any], parts: list[Part]) -> None:
            self._reply(origin, request, fields, parts)

        return answer

    # ---- answers

    def _answer(self, origin: bytes, request: Request) -> Done:
        def done(result: Reply | AegisError) -> None:
            if isinstance(result, AegisError):
                self._refuse(origin, request, result)
            else:
                self._reply(origin, request, result.fields)

        return done

    def _reply(
        self, origin: bytes, request: Request, fields: Sequence[Any], parts: Sequence[Part] = ()
    ) -> None:
        message = encode_reply(request.api, fields, parts, correlation=request.correlation)
        self._transport.reply(Listener.PEERS, origin, message)

    def _refuse(self, origin: bytes, request: Request, error: AegisError) -> None:
        code, fields = error_to_reply(error)
        message = encode_reply(request.api, fields, correlation=request.correlation, code=code)
        self._transport.reply(Listener.PEERS, origin, message)


def _reply(fields: Sequence[Any]) -> Reply:
    """The answer to a call that never left this process."""
    return Reply(0, 0, 0, 0, list(fields), [])


def _ignore(_result: Command | AegisError | None, _index: LogIndex) -> None:
    """Whoever registers next brings it about, if this did not."""
