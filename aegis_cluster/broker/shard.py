"""One shard: the replicas it owns, the requests it answers, the messages it sends.

The idea: everything that happens to a shard is a call of one of its methods, and everything it
wants done leaves through its `Transport` or is asked for by its driver (`begin_round`). It holds
no socket, thread or clock of its own, so the same object runs in a process under ZeroMQ
(`loop.py`) and, many at a time, in a simulation.

One turn: inputs, then `turn(now)`, then `begin_round` when no round is being synced.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aegis_cluster.broker.addresses import AddressBook
from aegis_cluster.broker.clients import Clients
from aegis_cluster.broker.compaction import Compaction
from aegis_cluster.broker.complaints import Complaints
from aegis_cluster.broker.controller_frontend import ControllerFrontend
from aegis_cluster.broker.disk_space import DiskSpace
from aegis_cluster.broker.events.frontend import EventFrontend
from aegis_cluster.broker.fetch import Fetches
from aegis_cluster.broker.freshness import Freshness
from aegis_cluster.broker.groups.frontend import GroupFrontend
from aegis_cluster.broker.leader_balancer import LeaderBalancer
from aegis_cluster.broker.links import Links
from aegis_cluster.broker.membership_backend import MembershipBackend
from aegis_cluster.broker.metadata_reader import MetadataReader
from aegis_cluster.broker.peer_api import PeerApi
from aegis_cluster.broker.peer_disks import PeerDisks
from aegis_cluster.broker.producer_ids import ProducerIds
from aegis_cluster.broker.repair import Repairs
from aegis_cluster.broker.replica_backend import ReplicaBackend
from aegis_cluster.broker.replica_manager import ReplicaManager
from aegis_cluster.broker.requests import RequestApi
from aegis_cluster.broker.retention import Retention
from aegis_cluster.broker.scrub import Scrub
from aegis_cluster.broker.snapshot_transfer import SnapshotCopies, SnapshotServer
from aegis_cluster.broker.subscriptions.frontend import SubscriptionFrontend
from aegis_cluster.broker.transactions.frontend import TransactionFrontend
from aegis_cluster.broker.transport import Listener, PeerKey
from aegis_cluster.cluster.metadata_table import MetadataTable
from aegis_cluster.errors import AegisError, StorageFailed
from aegis_cluster.ids import (
    METADATA_GROUP,
    METADATA_TOPIC,
    METADATA_VOTERS,
    Member,
    ShardId,
    TopicPartition,
)
from aegis_cluster.limits import RAFT_TICK_MS
from aegis_cluster.raft.codec import message_to_fields

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.context import ShardContext
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.supervisor_line import SupervisorLine
    from aegis_cluster.broker.transport import Transport
    from aegis_cluster.raft import InstallSnapshot
    from aegis_cluster.raft import Message as RaftMessage
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.wire.protocol import Part

log = logging.getLogger(__name__)


class Shard:
    """Wires the rooms of one shard together and hands every input to the one it is for."""

    def __init__(
        self,
        *,
        context: ShardContext,
        store: ShardStore,
        transport: Transport,
        rng: random.Random,
        wall_ms: Callable[[], int],
        now_ms: int,
        supervisor: SupervisorLine | None = None,
    ) -> None:
        self.context = context
        self.supervisor = supervisor
        self.store = store
        self.transport = transport
        self.now_ms = now_ms
        self._next_tick_ms = now_ms + RAFT_TICK_MS
        self.addresses = AddressBook(context)
        self.links = Links(
            me=context.hello,
            transport=transport,
            on_up=self._link_up,
            on_lost=self._link_lost,
            on_refused=self._link_refused,
        )
        self.manager = ReplicaManager(
            me=context.me,
            store=store,
            rng=rng,
            wall_ms=wall_ms,
            send=self._send_raft,
            read_later=transport.read_later,
            on_advance=self._advanced,
            on_opened=self._opened,
            on_offer=self._offered,
            in_memory=context.in_memory,
        )
        self._refusals: dict[PeerKey, str] = {}
        """What was last said of each link that is refused: once is enough."""
        self.complaints = Complaints(log, lambda: self.now_ms)
        self.clients = Clients(transport)
        self.fetches = Fetches(self.manager.partitions, self.clients, transport)
        self._wall_ms = wall_ms
        self._built = False
        self.reader: MetadataReader | None = None
        self.controller: ControllerFrontend | None = None
        self.manager.recover()
        self._found_cluster()
        self.controller = self._controller()
        if not self._holds_metadata():
            self.reader = MetadataReader(self, self.links)
        self.snapshot_server = SnapshotServer(self)
        self.snapshot_copies = SnapshotCopies(self)
        self.repairs = Repairs(self)
        self.membership = MembershipBackend(self)
        self.retention = Retention(self)
        self.disk_space = DiskSpace(self)
        self.peer_disks = PeerDisks(self)
        self.scrub = Scrub(self)
        self.compaction = Compaction(self)
        self.backend = ReplicaBackend(self)
        self.balancer = LeaderBalancer(self)
        self.freshness = Freshness(self)
        self.producer_ids = ProducerIds(self)
        self.groups = GroupFrontend(self, wall_ms)
        self.events = EventFrontend(self, context.event_index)
        self.subscriptions = SubscriptionFrontend(self, wall_ms)
        self.transactions = TransactionFrontend(self)
        self.requests = RequestApi(self, transport)
        self.peer_api = PeerApi(self, transport)
        for key in self.addresses.seeds():
            self.ensure_link(key)
        self._built = True
        self.backend.reconcile()
        self.groups.metadata_changed()

    # ---- what it knows

    @property
    def table(self) -> MetadataTable:
        """The committed metadata, as far as this shard has it."""
        fold, reader = self.manager.metadata, self.reader
        if fold is None and reader is None:
            raise AssertionError("a shard reads the metadata or holds a replica of it")
        if reader is None or (fold is not None and fold.table.index > reader.table.index):
            return fold.table if fold is not None else MetadataTable()
        return reader.table

    def _holds_metadata(self) -> bool:
        """A healthy replica of `__cluster/0` is here, and as far as any copy that was read."""
        partition, fold = self.manager.partitions.get(METADATA_GROUP), self.manager.metadata
        if partition is None or fold is None or partition.replica.damaged:
            return False
        return self.reader is None or fold.table.index >= self.reader.table.index

    def _found_cluster(self) -> None:
        """Start our replica of `__cluster/0`, on a founder that has not done so yet."""
        voters = self.context.founders[:METADATA_VOTERS]
        is_founder = self.context.me in voters and self.context.shard == 0
        if is_founder and METADATA_GROUP not in self.manager.partitions:
            self.manager.create(METADATA_GROUP, TopicPartition(METADATA_TOPIC, 0), voters)

    def join_metadata(self, leader: Member) -> Partition | None:
        """A leader of `__cluster/0` writes to us: it has made this node's first shard a learner.

        The replica begins as no member; the log says when it became one.
        """
        if self.context.shard != 0 or self.context.me in self.context.founders:
            return None
        log.info("This node now holds a replica of the cluster's metadata.")
        name = TopicPartition(METADATA_TOPIC, 0)
        return self.manager.create(METADATA_GROUP, name, (leader,))

    def _controller(self) -> ControllerFrontend | None:
        partition = self.manager.partitions.get(METADATA_GROUP)
        fold = self.manager.metadata
        if partition is None or fold is None:
            return None
        return ControllerFrontend(partition, fold, self._wall_ms)

    def _opened(self, partition: Partition) -> None:
        """A replica was started, or opened anew after its repair."""
        if not self._built:
            return
        if partition.group == METADATA_GROUP:
            self.controller = self._controller()
        self.retention.prepare(partition)
        self._advanced(partition)

    def _offered(self, partition: Partition, leader: Member, offer: InstallSnapshot) -> None:
        self.snapshot_copies.offered(partition, leader, offer)

    # ---- inputs

    def peer_request(self, origin: bytes, message: Sequence[Part]) -> None:
        self.peer_api.handle(origin, message)

    def client_request(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> None:
        self.requests.handle(listener, origin, message)

    def client_gone(self, listener: Listener, origin: bytes) -> None:
        """A client's connection to a listener has closed."""
        self.groups.client_gone((listener, origin))
        self.subscriptions.client_gone((listener, origin))

    def link_connected(self, key: PeerKey) -> None:
        self.links.connected(key)

    def link_disconnected(self, key: PeerKey) -> None:
        self.links.disconnected(key)

    def link_message(self, key: PeerKey, message: Sequence[Part]) -> None:
        try:
            self.links.received(key, message)
        except StorageFailed:
            raise  # what the reply led to failed, not the reply
        except AegisError as error:
            self.complaints.say("Node %s sent something that is no reply: %s", key.node, error)

    def turn(self, now_ms: int) -> None:
        """Let time pass, move everything on that is due, and send what the turn has queued."""
        self.now_ms = now_ms
        if now_ms >= self._next_tick_ms:
            # One tick however long we stood still: the inbox was read first, and time that we
            # slept through says nothing about others.
            self._next_tick_ms = now_ms + RAFT_TICK_MS
            self._tick()
        self.backend.turn()
        self.manager.turn()
        self.manager.snapshots.turn(now_ms)
        self.requests.turn()
        self.fetches.turn()
        self.links.flush()

    @property
    def has_more_to_do(self) -> bool:
        """Whether the next turn should come at once: work was left over for the sake of others."""
        return (
            self.requests.has_more_to_do
            or self.fetches.has_more_to_do
            or self.backend.has_more_to_do
        )

    @property
    def next_tick_ms(self) -> int:
        return self._next_tick_ms

    def _tick(self) -> None:
        self.manager.tick()
        self.links.expire(self.now_ms)
        self.fetches.feed()
        self.fetches.expire(self.now_ms)
        self.requests.expire(self.now_ms)
        self.complaints.tick()
        self.producer_ids.tick()
        self.groups.tick()
        self.events.tick()
        self.subscriptions.tick()
        self.transactions.tick()
        self.backend.tick()
        self.balancer.tick()
        self.snapshot_server.tick()
        self.snapshot_copies.tick()
        self.repairs.tick()
        self.membership.tick()
        self.retention.tick()
        self.disk_space.tick()
        self.peer_disks.tick()
        self.scrub.tick()
        self.compaction.tick()
        self._read_metadata()
        self.freshness.tick()

    def _read_metadata(self) -> None:
        """Follow `__cluster/0` from outside for as long as the replica here is not good enough."""
        if self._holds_metadata():
            self.reader = None
        elif self.reader is None:
            self.reader = MetadataReader(self, self.links)
        if self.reader is not None:
            self.reader.tick()

    # ---- rounds of writes, driven from outside

    def begin_round(self) -> tuple[int, Round | None] | None:
        return self.manager.begin_round()

    def end_in_memory(self, number: int, written: Round) -> bool:
        """Whether nobody waits for the sync of this round: promises have left then, and the round
        is to be synced behind, after which `store.end_round` follows."""
        return self.manager.end_in_memory(number, written)

    def end_round(self, number: int, written: Round | None) -> None:
        self.manager.end_round(number, written)

    # ---- news from the rooms below

    def metadata_changed(self) -> None:
        """The committed table has moved on."""
        self.backend.reconcile()
        known = self.links.keys()
        for key in known:
            self.ensure_link(key)  # its address may be another one now
        self.requests.metadata_changed()
        self.groups.metadata_changed()

    def _advanced(self, partition: Partition) -> None:
        self.fetches.wake(partition.group)
        if partition.group == METADATA_GROUP:
            self.metadata_changed()

    def _send_raft(
        self, partition: Partition, recipient: Member, message: RaftMessage, frames: bytes | None
    ) -> None:
        key = self.addresses.key_of(self.table, recipient.node, partition.group)
        if key not in self.links:
            self.ensure_link(key)
        fields = message_to_fields(message)
        self.links.queue_raft(key, recipient, group=partition.group, fields=fields, frames=frames)

    def ensure_link(self, key: PeerKey) -> None:
        """Have a link there, or one on its way, if anybody has told us where that shard is."""
        endpoint = self.addresses.endpoint(self.table, key)
        if endpoint is not None:
            self.links.ensure(key, endpoint)

    def _link_up(self, key: PeerKey, member: Member) -> None:
        log.info("Linked to node %s, shard %s.", key.node, key.shard)
        for partition in self._shared_with(key, member):
            partition.replica.link_up(member)
            if partition.replica.leader is None and self.backend.prefers_us(partition):
                self.manager.campaigns.want(partition)
            self.manager.due(partition)

    def _link_lost(self, key: PeerKey, member: Member) -> None:
        log.info("Lost the link to node %s, shard %s.", key.node, key.shard)
        for partition in self._shared_with(key, member):
            if partition.replica.leader == member and self.backend.succeeds(partition, member):
                self.manager.campaigns.want_soon(partition)
            partition.replica.link_lost(member)
            self.manager.due(partition)

    def _link_refused(self, key: PeerKey, error: AegisError) -> None:
        if self._refusals.get(key) != str(error):
            self._refusals[key] = str(error)
            log.warning("Node %s, shard %s refuses us: %s", key.node, key.shard, error)

    def _shared_with(self, key: PeerKey, member: Member) -> list[Partition]:
        """Our replicas that have another one in that shard."""
        return [
            partition
            for partition in self.manager.partitions.values()
            if member in partition.replica.membership.members
            and self.addresses.key_of(self.table, member.node, partition.group) == key
        ]

    def controller_key(self) -> PeerKey | None:
        """The shard that leads `__cluster/0`, where we know it from our own replica."""
        partition = self.manager.partitions.get(METADATA_GROUP)
        leader = partition.replica.leader if partition else None
        return PeerKey(leader.node, ShardId(0)) if leader else None

    @property
    def damaged(self) -> list[dict[str, Any]]:
        """What is wrong here, in words: replicas that are damaged, disks that are full or gone."""
        return [
            *self.disk_space.report(),
            *self.peer_disks.report(),
            *self.repairs.report(),
            *self.membership.report(),
        ]

    def describe(self) -> dict[str, Any]:
        """Who this shard is, for a status answer."""
        context = self.context
        return {"node": context.me.node, "name": context.name, "shard": context.shard}
