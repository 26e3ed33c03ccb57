"""Real shards of several nodes in one thread: messages, time and syncs move when a test says so.

The idea: a `Shard` decides, and everything around it is here and small: a disk in memory, a network
of queues that keeps the order of each link, a clock that a test turns, and syncs that a test may
hold back. Nothing sleeps; one seed and the same calls give the same run.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.compaction import compact_here
from aegis_cluster.broker.context import ShardContext
from aegis_cluster.broker.shard import Shard
from aegis_cluster.broker.transport import Listener, PeerKey
from aegis_cluster.config import NodeAddress
from aegis_cluster.ids import GroupId, Member, NodeId, ShardId
from aegis_cluster.limits import KIB, RAFT_TICK_MS
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.storage.types import StoreLimits
from aegis_cluster.testing.disk import SimulatedDisk
from aegis_cluster.wire.batch import decode_batch, encode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.descriptions import (
    TopicSettings,
    node_to_fields,
    settings_to_fields,
    topic_from_fields,
)
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.protocol import (
    PROTOCOL_VERSION,
    Api,
    Hello,
    Part,
    Reply,
    decode_reply,
    encode_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.errors import AegisError
    from aegis_cluster.storage.compaction_job import CompactionJob, CompactionResult
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.wire.descriptions import NodeInfo, TopicInfo
    from aegis_cluster.wire.records import Record

CLUSTER_ID: Final = "cluster-under-test"
DIRECTORY: Final = "/data"
SMALL: Final = StoreLimits(
    segment_bytes=64 * KIB,
    journal_bytes=64 * KIB,
    index_interval_bytes=KIB,
    tail_cache_bytes=256 * KIB,
    reserve_bytes=KIB,
)
WALL_MS: Final = 1_700_000_000_000


def batch(*values: bytes, producer: tuple[int, int, int] | None = None) -> bytes:
    """Records without keys; producer: id, epoch, sequence."""
    rows: list[Any] = [(WALL_MS, None, value, []) for value in values]
    if producer is None:
        return encode_batch(rows)
    number, epoch, sequence = producer
    return encode_batch(rows, producer_id=number, producer_epoch=epoch, base_sequence=sequence)


def records_of(frames: Part) -> list[Record]:
    """What stands in the data frames of a fetch's answer."""
    data = bytes(frames)
    return [
        record
        for position, header in iter_frames(data)
        if header.kind is FrameKind.DATA
        for record in decode_batch(frame_payload(data, header, position))
    ]


@dataclass
class Transport:
    """A shard's messages, handed to the cluster; its reads happen when the cluster runs them."""

    cluster: Cluster
    host: Host
    open: dict[PeerKey, int] = field(default_factory=dict)
    """Links that this shard has opened, by the number of the connection; 0 while there is none."""
    reads: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = field(default_factory=deque)
    waiting: dict[tuple[Listener, bytes], int] = field(default_factory=dict)
    """Bytes of answers that, a test says, their readers have not taken."""

    def open_peer(self, key: PeerKey, endpoint: str) -> None:
        assert endpoint.startswith("tcp://")
        self.open[key] = 0

    def close_peer(self, key: PeerKey) -> None:
        self.open.pop(key, None)

    def send_peer(self, key: PeerKey, message: Sequence[Part]) -> bool:
        number = self.open.get(key)
        if not number:
            return False
        self.cluster.post_request(self.host, key, number, [bytes(part) for part in message])
        return True

    def reply(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> bool:
        parts = [bytes(part) for part in message]
        if listener is Listener.PEERS:
            self.cluster.post_reply(self.host, origin, parts)
        else:
            self.cluster.inbox.setdefault((self.host.key, listener, origin), []).append(parts)
        return True

    def unsent(self, listener: Listener, origin: bytes) -> int:
        return self.waiting.get((listener, origin), 0)

    def unsent_to(self, key: PeerKey) -> int:
        return 0

    @property
    def unsent_total(self) -> int:
        return sum(self.waiting.values())

    def read_later(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.reads.append((job, done))

    def compact_later(
        self, job: CompactionJob, done: Callable[[CompactionResult | None], None]
    ) -> None:
        store = self.host.store
        assert store is not None
        self.read_later(lambda: compact_here(store, job), done)


@dataclass(eq=False)
class Host:
    """One shard of one node: its disk outlives it, the rest ends with a crash."""

    cluster: Cluster
    key: PeerKey
    disk: SimulatedDisk
    shards: int
    hold_syncs: bool = False
    """Rounds are written and stay unsynced until `release`."""
    shard: Shard | None = None
    store: ShardStore | None = None
    transport: Transport | None = None
    boots: int = 0
    wall_offset_ms: int = 0
    """How wrong this node's clock is; may change at any time."""
    under_way: tuple[int, Round | None] | None = None
    behind: Round | None = None
    """With durability in memory: what counts already and is not synced."""

    @property
    def alive(self) -> Shard:
        assert self.shard is not None, f"{self.key} is down"
        return self.shard

    def start(self) -> None:
        assert self.shard is None
        self.boots += 1
        cluster = self.cluster
        self.store = ShardStore(
            self.disk,
            DIRECTORY,
            self.key.shard,
            clock_ms=lambda: cluster.now_ms,
            limits=cluster.limits,
        )
        self.transport = Transport(cluster, self)
        self.under_way = None
        self.shard = Shard(
            context=self.context(),
            store=self.store,
            transport=self.transport,
            rng=random.Random(f"{cluster.seed}/{self.key}/{self.boots}"),
            wall_ms=lambda: WALL_MS + cluster.now_ms + self.wall_offset_ms,
            now_ms=cluster.now_ms,
        )

    def context(self) -> ShardContext:
        cluster = self.cluster
        return ShardContext(
            cluster_id=CLUSTER_ID,
            me=cluster.member(self.key.node),
            name=f"node-{self.key.node}",
            address=NodeAddress("127.0.0.1", 7000 + 100 * self.key.node),
            shard=self.key.shard,
            shards=self.shards,
            boot_id=f"boot-{self.key.node}-{self.boots}",
            founders=cluster.founders if self.key.node not in cluster.wiped else (),
            peers=tuple(NodeAddress("127.0.0.1", 7100 + 100 * n) for n in range(cluster.nodes)),
            in_memory=cluster.in_memory,
        )

    def partition(self, group: int) -> Partition:
        return self.alive.manager.partitions[GroupId(group)]

    def move(self) -> bool:
        """One turn of what `ShardLoop` does; False when nothing was to be done."""
        shard, transport, store = self.alive, self.transport, self.store
        assert transport is not None
        assert store is not None
        busy = bool(transport.reads)
        while transport.reads:
            job, done = transport.reads.popleft()
            done(job())
        shard.turn(self.cluster.now_ms)
        if self.under_way is None:
            busy |= self._begin_round()
        if not self.hold_syncs:
            self.release()
        if self.behind is not None and not self.cluster.sync_nothing_behind:
            store.sync(self.behind)
            store.end_round(self.behind)
            self.behind = None
        if store.checkpoint_due(self.cluster.now_ms):
            ticket = store.begin_checkpoint()
            store.sync_checkpoint(ticket)
            store.end_checkpoint(ticket)
        return busy

    def _begin_round(self) -> bool:
        """Whether there was something to write."""
        begun = self.alive.begin_round()
        if begun is None:
            return False
        number, written = begun
        if written is not None and self.alive.end_in_memory(number, written):
            self.behind = written
            self.alive.turn(self.cluster.now_ms)
        else:
            self.under_way, self.behind = begun, None
        return True

    def release(self) -> None:
        """Sync the round that is under way, if any, and tell the shard."""
        if self.under_way is None:
            return
        (number, written), self.under_way = self.under_way, None
        assert self.store is not None
        if written is not None:
            self.store.sync(written)
        self.alive.end_round(number, written)
        self.alive.turn(self.cluster.now_ms)

    def end(self) -> None:
        """The process is gone; what its disk keeps is the disk's to say."""
        self.shard = self.store = self.transport = self.under_way = self.behind = None


class Cluster:
    """Hosts, and the network between them."""

    def __init__(
        self,
        nodes: int = 3,
        *,
        shards: int = 1,
        seed: int = 1,
        limits: StoreLimits = SMALL,
        start: bool = True,
        in_memory: bool = False,
    ) -> None:
        self.in_memory = in_memory
        self.sync_nothing_behind = False
        self.nodes = nodes
        self.seed = seed
        self.limits = limits
        self.now_ms = 0
        self.hosts: dict[PeerKey, Host] = {}
        self.inbox: dict[tuple[PeerKey, Listener, bytes], list[list[bytes]]] = {}
        self.wiped: dict[NodeId, int] = {}
        """How often a node's directory was replaced by an empty one."""
        self.cut: set[frozenset[NodeId]] = set()
        """Pairs of nodes that cannot reach each other."""
        self._queue: deque[Callable[[], None]] = deque()
        self._connections: dict[int, tuple[Host, int, Host, int]] = {}
        self._count = 0
        for node in range(1, nodes + 1):
            disk = empty_disk(shards, limits)
            for number in range(shards):
                key = PeerKey(NodeId(node), ShardId(number))
                self.hosts[key] = Host(self, key, disk, shards)
        if start:
            for host in self.hosts.values():
                host.start()

    def member(self, node: NodeId) -> Member:
        wiped = self.wiped.get(node, 0)
        return Member(node, f"incarnation-{node}" + (f"-{wiped}" if wiped else ""))

    @property
    def founders(self) -> tuple[Member, ...]:
        return tuple(
            Member(NodeId(node), f"incarnation-{node}") for node in range(1, self.nodes + 1)
        )

    def host(self, node: int, shard: int = 0) -> Host:
        return self.hosts[PeerKey(NodeId(node), ShardId(shard))]

    @property
    def alive(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.shard is not None]

    # ---- the network

    def post_request(self, sender: Host, key: PeerKey, number: int, message: list[bytes]) -> None:
        def deliver() -> None:
            if self._holds(number):
                receiver = self.hosts[key]
                receiver.alive.peer_request(b"link-%d" % number, message)

        assert sender.transport is not None
        self._queue.append(deliver)

    def post_reply(self, sender: Host, origin: bytes, message: list[bytes]) -> None:
        if not origin.startswith(b"link-"):
            self.inbox.setdefault((sender.key, Listener.PEERS, origin), []).append(message)
            return  # whoever a test pretends to be
        number = int(origin.removeprefix(b"link-"))

        def deliver() -> None:
            if self._holds(number):
                caller = self._connections[number][0]
                caller.alive.link_message(sender.key, message)

        self._queue.append(deliver)

    def _holds(self, number: int) -> bool:
        """Whether both ends of a connection are still the processes that made it."""
        found = self._connections.get(number)
        if found is None:
            return False
        one, boot, other, other_boot = found
        return (
            one.shard is not None
            and other.shard is not None
            and (one.boots, other.boots) == (boot, other_boot)
        )

    def _connect(self) -> None:
        """Make connections that are wanted and possible, and break those that are not."""
        for host in self.alive:
            assert host.transport is not None
            for key, number in list(host.transport.open.items()):
                other = self.hosts.get(key)
                possible = (
                    other is not None
                    and other.shard is not None
                    and frozenset((host.key.node, key.node)) not in self.cut
                )
                if number and not (possible and self._holds(number)):
                    self._connections.pop(number, None)
                    host.transport.open[key] = 0
                    host.alive.link_disconnected(key)
                elif not number and possible:
                    assert other is not None
                    self._count += 1
                    self._connections[self._count] = (host, host.boots, other, other.boots)
                    host.transport.open[key] = self._count
                    host.alive.link_connected(key)

    # ---- running

    def settle(self, turns: int = 200) -> None:
        """Deliver and write until nothing moves; time stands still."""
        for _ in range(turns):
            self._connect()
            busy = bool(self._queue)
            for _ in range(len(self._queue)):
                self._queue.popleft()()
            for host in self.alive:
                busy |= host.move()
            if not busy and not self._queue:
                return

    def tick(self, count: int = 1) -> None:
        """Let one tick of time pass, `count` times, settling after each."""
        for _ in range(count):
            self.now_ms += RAFT_TICK_MS
            self.settle()

    def until(self, condition: Callable[[], bool], what: str, ticks: int = 400) -> None:
        """Turn time until the condition holds."""
        self.settle()
        for _ in range(ticks):
            if condition():
                return
            self.tick()
        raise AssertionError(f"waited {ticks} ticks in vain: {what}")

    # ---- faults

    def kill(self, host: Host) -> None:
        """`kill -9`: the process ends, what it wrote stays."""
        host.end()

    def power_off(self, host: Host, rng: random.Random) -> None:
        """The whole node ends: any subset of what was not synced is lost."""
        host.disk.crash(rng)
        for other in self.hosts.values():
            if other.key.node == host.key.node:
                other.end()

    def wipe(self, node: int) -> None:
        """The node ends, and its directory is formatted anew, to join; to be started by hand."""
        hosts = [host for host in self.hosts.values() if host.key.node == node]
        disk = empty_disk(hosts[0].shards, self.limits)
        for host in hosts:
            host.end()
            host.disk = disk
        self.wiped[NodeId(node)] = self.wiped.get(NodeId(node), 0) + 1

    def isolate(self, node: int) -> None:
        for other in range(1, self.nodes + 1):
            if other != node:
                self.cut.add(frozenset((NodeId(node), NodeId(other))))

    def heal(self) -> None:
        self.cut.clear()

    # ---- what is there

    def leader(self, group: int = 0) -> Host | None:
        """The host that serves the group; of two that think so, the one of the later term."""
        found = [
            host
            for host in self.alive
            if group in host.alive.manager.partitions and host.partition(group).serving
        ]
        return max(found, key=lambda host: host.partition(group).replica.term, default=None)

    def elect(self, group: int = 0) -> Host:
        """Wait for a leader that serves."""
        self.until(lambda: self.leader(group) is not None, f"group {group} has a leader")
        leader = self.leader(group)
        assert leader is not None
        return leader

    def hand_over(self, group: int, to: Host) -> None:
        """Have that host lead the group."""
        leader = self.elect(group)
        if leader is not to:
            leader.partition(group).step_aside(self.member(to.key.node))
        self.until(lambda: self.leader(group) is to, f"another leader of group {group}")

    def followers(self, group: int = 0) -> list[Host]:
        leader = self.elect(group)
        return [
            host
            for host in self.alive
            if host is not leader and group in host.alive.manager.partitions
        ]

    def registered(self) -> None:
        """Wait until all nodes stand in everybody's metadata."""
        self.until(
            lambda: all(len(host.alive.table.nodes) == self.nodes for host in self.alive),
            "all nodes are registered everywhere",
        )

    def topic(
        self,
        name: str = "t",
        *,
        partitions: int = 1,
        replicas: int = 3,
        settings: TopicSettings | None = None,
    ) -> TopicInfo:
        """Create a topic and wait for its leaders."""
        self.registered()
        client = Client(self, self.elect())
        reply = client.ask(
            Api.CREATE_TOPIC, topic_fields(name, partitions, replicas, settings=settings)
        )
        assert reply.code == 0, reply
        info = self.elect().alive.table.topics[name]
        for placed in info.partitions:
            self.elect(placed.group)
        return info


def empty_disk(shards: int, limits: StoreLimits) -> SimulatedDisk:
    """A formatted directory without data."""
    disk = SimulatedDisk()
    disk.make_dir(DIRECTORY)
    disk.sync_dir("/")
    prepare_node_dir(disk, DIRECTORY, shards, limits=limits)
    return disk


def topic_fields(
    name: str,
    partitions: int | None = 1,
    replicas: int | None = 3,
    token: str = "token",
    *,
    settings: TopicSettings | None = None,
) -> list[Any]:
    return [name, partitions, replicas, settings_to_fields(settings or TopicSettings()), token]


class Client:
    """A client's connection to one listener of one shard; it greets by itself unless told not."""

    _count = 0

    def __init__(
        self,
        cluster: Cluster,
        host: Host,
        listener: Listener = Listener.CONTROL,
        *,
        greet: bool = True,
    ) -> None:
        Client._count += 1
        self.cluster = cluster
        self.host = host
        self.listener = listener
        self.origin = b"client-%d" % Client._count
        self._correlation = 0
        if greet:
            assert self.ask(Api.HELLO, hello().to_fields()).code == 0

    def send(
        self,
        api: int,
        fields: Sequence[Any] = (),
        parts: Sequence[Part] = (),
        *,
        ms_left: int = 5_000,
        version: int = 1,
    ) -> int:
        """Hand a request to the shard; its number."""
        self._correlation += 1
        message = encode_request(
            api, fields, parts, correlation=self._correlation, ms_left=ms_left, version=version
        )
        self.raw(message)
        return self._correlation

    def raw(self, message: Sequence[Part]) -> None:
        self.host.alive.client_request(self.listener, self.origin, message)

    @property
    def replies(self) -> list[Reply]:
        found = self.cluster.inbox.get((self.host.key, self.listener, self.origin), [])
        return [decode_reply(message) for message in found]

    def reply(self, number: int) -> Reply | None:
        """The answer to that request; None as long as there is none, and never two."""
        found = [reply for reply in self.replies if reply.correlation == number]
        assert len(found) <= 1, f"request {number} was answered {len(found)} times"
        return found[0] if found else None

    def ask(
        self,
        api: int,
        fields: Sequence[Any] = (),
        parts: Sequence[Part] = (),
        *,
        ms_left: int = 5_000,
        version: int = 1,
    ) -> Reply:
        """Send and wait."""
        number = self.send(api, fields, parts, ms_left=ms_left, version=version)
        self.cluster.until(lambda: self.reply(number) is not None, f"an answer to api {api}")
        reply = self.reply(number)
        assert reply is not None
        return reply

    def refusal(
        self, api: int, fields: Sequence[Any] = (), parts: Sequence[Part] = (), **more: int
    ) -> AegisError:
        """Send, wait, and give back the error that the answer carries."""
        reply = self.ask(api, fields, parts, **more)
        assert reply.code != 0, f"not refused: {reply}"
        return error_from_reply(reply.code, reply.fields)

    # ---- data

    def produce(self, group: int, data: Part) -> int:
        return self.send(Api.PRODUCE, [[[group, "t", 0]]], [data])

    def outcome(self, number: int) -> tuple[int, int] | AegisError | None:
        """Of the only batch of a request: offset and time, its refusal, or None as yet."""
        reply = self.reply(number)
        if reply is None:
            return None
        (result,) = reply.fields[0]
        if result[0] == 0:
            return result[1], result[2]
        return error_from_reply(result[0], result[1:])

    def stored(self, group: int, data: Part) -> int:
        """Produce, wait, and give back the offset."""
        number = self.produce(group, data)
        self.cluster.until(lambda: self.reply(number) is not None, "an acknowledgement")
        outcome = self.outcome(number)
        assert isinstance(outcome, tuple), outcome
        return outcome[0]

    def read(self, group: int) -> list[bytes | None]:
        """All values of a group, from its leader; offsets are checked to be dense."""
        found: list[Record] = []
        while True:
            reply = self.ask(Api.FETCH, [0, [[group, len(found), 1 << 20]]])
            (result,) = reply.fields[0]
            assert result[0] == 0, result
            more = [r for r in records_of(reply.parts[0]) if r.offset >= len(found)]
            if not more:
                return [record.value for record in found]
            found += more
            assert [record.offset for record in found] == list(range(len(found)))


def hello(
    *,
    version: int = PROTOCOL_VERSION,
    role: str = "client",
    cluster_id: str = CLUSTER_ID,
    node: int = 0,
    incarnation: str = "",
    shard: int = 0,
) -> Hello:
    return Hello(version, role, cluster_id, node, incarnation, "boot", shard)


def metadata_of(reply: Reply) -> dict[str, TopicInfo]:
    """The topics of a METADATA answer."""
    infos = [topic_from_fields(topic) for topic, _ in reply.fields[4]]
    return {info.name: info for info in infos}


def as_fields(info: NodeInfo) -> list[Any]:
    return node_to_fields(info)
