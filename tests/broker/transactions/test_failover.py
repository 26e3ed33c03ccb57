"""Coordinators and leaders die in the middle; and mistakes that would show, planted one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker.groups import coordinator as group_coordinator
from aegis_cluster.broker.partition import Partition
from aegis_cluster.broker.producer_stm import ProducerTable
from aegis_cluster.broker.transactions import markers
from aegis_cluster.broker.transactions.markers import Errand, write_markers
from aegis_cluster.broker.transactions.transaction_coordinator import TransactionCoordinator
from aegis_cluster.broker.transactions.transaction_table import Phase
from aegis_cluster.broker.transport import Listener
from aegis_cluster.errors import (
    AegisError,
    InvalidBatch,
    MemberFenced,
    NoOpenTransaction,
    NotLeader,
    ProducerFenced,
    TransactionAborted,
)
from aegis_cluster.ids import ProducerId
from aegis_cluster.wire.batch import batch_header, decode_batch, encode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT
from aegis_cluster.wire.markers import Marker
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Acks, Api, Isolation
from tests.broker.harness import WALL_MS, Client, Cluster, Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster.ids import GroupId, LogIndex

TIMEOUT_MS = 4_000
TICK_MS = 50
NAME = "x"


class Producer:
    """One transactional producer, which finds coordinators and leaders by itself."""

    def __init__(self, cluster: Cluster, *topics: int) -> None:
        self.cluster = cluster
        self.identity = (0, -1)
        self.name: str | None = NAME
        self.sequences: dict[int, int] = {}

    # ---- who is where

    @property
    def log(self) -> GroupId:
        return place(self.cluster, "__transactions", NAME)

    @property
    def coordinator(self) -> Host:
        return self.cluster.elect(self.log)

    def ask(self, api: Api, *fields: Any, host: Host | None = None) -> list[Any] | AegisError:
        """One answer; retriable refusals are tried again."""
        for _ in range(100):
            client = Client(self.cluster, host or self.coordinator, Listener.CONTROL)
            reply = client.ask(api, [NAME, *fields])
            if reply.code == 0:
                return reply.fields
            error = error_from_reply(reply.code, reply.fields)
            if not error.retriable:
                return error
            self.cluster.tick()
        raise AssertionError(f"no answer: {error}")

    # ---- what it does

    def begin(self, token: str = "first") -> None:
        answer = self.ask(Api.TRANSACTION_INIT, TIMEOUT_MS, "here", token, None)
        assert isinstance(answer, list)
        self.identity = (answer[0], answer[1])

    def join(self, *places: list[Any]) -> AegisError | None:
        answer = self.ask(Api.TRANSACTION_JOIN, *self.identity, list(places), 0)
        return answer if isinstance(answer, AegisError) else None

    def batch(self, group: int, value: bytes) -> bytes:
        sequence = self.sequences.get(group, 0)
        self.sequences[group] = sequence + 1
        number, epoch = self.identity
        return encode_batch(
            [(WALL_MS, None, value, [])],
            producer_id=number,
            producer_epoch=epoch,
            base_sequence=sequence,
            attributes=TRANSACTIONAL_BIT,
        )

    def write(self, group: int, value: bytes) -> tuple[int, int] | AegisError:
        return self.produce(group, self.batch(group, value))

    def produce(self, group: int, data: bytes) -> tuple[int, int] | AegisError:
        client = Client(self.cluster, self.cluster.elect(group), Listener.DATA)
        fields = [[[group, "t", 0]], Acks.QUORUM, self.name]
        number = client.send(Api.PRODUCE, fields, [data])
        self.cluster.until(lambda: client.reply(number) is not None, "an acknowledgement")
        outcome = client.outcome(number)
        assert outcome is not None
        return outcome

    def send_end(self, *, committed: bool = True) -> tuple[Client, int]:
        client = Client(self.cluster, self.coordinator, Listener.CONTROL)
        fields = [NAME, *self.identity, committed]
        return client, client.send(Api.TRANSACTION_END, fields)

    def end(self, *, committed: bool = True) -> tuple[bool, str] | AegisError:
        """What was decided, and why; the next identity is taken over."""
        answer = self.ask(Api.TRANSACTION_END, *self.identity, committed)
        if isinstance(answer, AegisError):
            return answer
        if answer[3] >= 0:
            self.identity, self.sequences = (answer[2], answer[3]), {}
        return answer[0], answer[1]

    @property
    def phase(self) -> Phase:
        """As committed at the coordinator."""
        fold: Any = self.coordinator.partition(self.log).state.fold
        found: Phase = fold.table.transactions[NAME].phase
        return found


def place(cluster: Cluster, topic: str, name: str) -> GroupId:
    info = cluster.elect().alive.table.topics[topic]
    return info.partitions[partition_for(name.encode(), len(info.partitions))].group


def visible(cluster: Cluster, group: int) -> list[bytes | None]:
    """What a reader of committed records sees, from the leader."""
    client = Client(cluster, cluster.elect(group), Listener.DATA)
    reply = client.ask(Api.FETCH, [0, [[group, 0, 1 << 20]], Isolation.COMMITTED])
    (result,) = reply.fields[0]
    data, aborted = bytes(reply.parts[0]), result[4]
    found: list[bytes | None] = []
    for position, header in iter_frames(data):
        if header.kind is not FrameKind.DATA:
            continue
        payload = frame_payload(data, header, position)
        batch = batch_header(payload)
        hidden = any(
            producer == batch.producer_id and first <= batch.base_offset <= last
            for producer, first, last in aborted
        )
        if not batch.is_control and not hidden:
            found += [record.value for record in decode_batch(payload)]
    return found


@pytest.fixture
def cluster() -> Cluster:
    return ready(Cluster(3))


def ready(found: Cluster) -> Cluster:
    """With a topic of two partitions, and all that transactions need."""
    found.registered()
    for topic in ("__groups", "__transactions"):
        assert Client(found, found.elect()).ask(Api.INTERNAL_TOPIC, [topic]).code == 0
    found.topic("t", partitions=2, replicas=min(3, found.nodes))
    found.settle()
    return found


def test_shards_of_one_node_reach_each_other_too() -> None:
    cluster = ready(Cluster(1, shards=3))
    producer = opened(cluster)
    assert producer.end() == (True, "")
    until_seen(cluster, b"in")


def logs(cluster: Cluster) -> list[GroupId]:
    return [one.group for one in cluster.elect().alive.table.topics["t"].partitions]


def opened(cluster: Cluster) -> Producer:
    """A producer in a transaction that has written to both partitions."""
    producer = Producer(cluster)
    producer.begin()
    assert producer.join(["t", 0], ["t", 1]) is None
    for group in logs(cluster):
        assert isinstance(producer.write(group, b"in"), tuple)
        assert visible(cluster, group) == []
    return producer


def until_seen(cluster: Cluster, *values: bytes) -> None:
    cluster.until(
        lambda: all(visible(cluster, group) == list(values) for group in logs(cluster)),
        f"{values} in both partitions",
    )


def test_both_partitions_show_it_together_or_not_at_all(cluster: Cluster) -> None:
    producer = opened(cluster)
    assert producer.end() == (True, "")
    until_seen(cluster, b"in")
    producer.join(["t", 0])
    producer.write(logs(cluster)[0], b"out")
    assert producer.end(committed=False) == (False, "by its producer")
    until_seen(cluster, b"in")
    for group in logs(cluster):
        fold = cluster.elect(group).partition(group).state.producers
        assert fold.open_transactions == {}


@pytest.mark.parametrize("committed", [True, False])
def test_a_new_coordinator_brings_what_was_decided_to_its_end(
    cluster: Cluster, committed: bool
) -> None:
    producer = opened(cluster)
    coordinator, log = producer.coordinator, producer.log
    producer.send_end(committed=committed)

    def is_decided() -> bool:
        one = fold.table.transactions[NAME]
        return bool(one.is_decided)

    fold: Any = coordinator.partition(log).state.fold
    for _ in range(400):  # one small step at a time, up to the moment of the decision
        if is_decided():
            break
        cluster.settle(turns=1)
    assert is_decided()
    cluster.kill(coordinator)
    cluster.until(lambda: producer.phase is Phase.IDLE, "its end")
    until_seen(cluster, *([b"in"] if committed else []))
    reason = "" if committed else "by its producer"
    assert producer.end(committed=not committed) == (committed, reason), "and it can be asked for"


def test_one_that_was_not_decided_is_aborted_by_its_time(cluster: Cluster) -> None:
    producer = opened(cluster)
    cluster.kill(producer.coordinator)
    cluster.tick(TIMEOUT_MS // TICK_MS - 40)
    assert producer.phase is Phase.OPEN
    cluster.until(lambda: producer.phase is Phase.IDLE, "its time-out")
    for group in logs(cluster):
        assert isinstance(producer.write(group, b"late"), ProducerFenced)
    assert isinstance(producer.join(["t", 0]), TransactionAborted)
    assert producer.end() == (False, "it was open for longer than its time-out")
    assert producer.join(["t", 0]) is None, "the producer goes on"
    until_seen(cluster)


def test_a_leaders_death_loses_nothing_of_an_open_transaction(cluster: Cluster) -> None:
    producer = opened(cluster)
    for group in logs(cluster)[:1]:
        cluster.kill(cluster.elect(group))
    for group in logs(cluster):
        assert visible(cluster, group) == []
    assert producer.end() == (True, "")
    until_seen(cluster, b"in")


def test_a_handover_that_comes_to_nothing_does_not_hold_up_the_end(cluster: Cluster) -> None:
    """While leadership is being handed over, nothing is appended; then the same one leads on."""
    producer = opened(cluster)
    coordinator, log = producer.coordinator, producer.log
    partition = coordinator.partition(log)
    leads_data = {cluster.elect(group).key.node for group in logs(cluster)}
    away = next(
        host
        for host in cluster.alive
        if host is not coordinator and host.key.node not in leads_data - {coordinator.key.node}
    )
    term = partition.replica.term
    producer.send_end()
    cluster.cut.add(frozenset((coordinator.key.node, away.key.node)))
    partition.step_aside(cluster.member(away.key.node))
    cluster.until(lambda: not partition.replica.transferring, "the end of the attempt")
    assert (partition.serving, partition.replica.term) == (True, term)
    cluster.heal()
    cluster.until(lambda: producer.phase is Phase.IDLE, "its end")
    assert partition.replica.term == term
    until_seen(cluster, b"in")


def test_a_marker_confirmed_to_an_earlier_coordinator_ends_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same node leads again, and hears late what it had asked for in its first term."""
    producer = opened(cluster)
    coordinator, log = producer.coordinator, producer.log
    late: list[Callable[[], None]] = []

    def hold(shard: Any, fields: Any, done: Any) -> None:
        late.append(lambda: write_markers(shard, fields, done))

    with monkeypatch.context() as slow:
        slow.setattr(markers, "write_markers", hold)
        producer.send_end()
        cluster.until(lambda: bool(late), "markers on their way")
        for host in (cluster.followers(log)[0], coordinator):
            cluster.hand_over(log, host)
    cluster.until(lambda: producer.phase is Phase.IDLE, "its end")
    for write_now in late:
        write_now()
    cluster.tick(5)
    assert producer.end() == (True, "")
    assert producer.join(["t", 0]) is None
    until_seen(cluster, b"in")


def test_an_operator_aborts_it_and_only_once(cluster: Cluster) -> None:
    producer = opened(cluster)
    identity = producer.identity
    assert producer.ask(Api.TRANSACTION_ABORT, *identity) == []
    until_seen(cluster)
    assert isinstance(producer.ask(Api.TRANSACTION_ABORT, *identity), NoOpenTransaction)
    described = producer.ask(Api.TRANSACTION_DESCRIBE)
    assert isinstance(described, list)
    assert described[2] == Phase.IDLE
    assert described[7][-1][2:4] == [False, "by an operator"]


def test_a_partition_takes_nothing_that_its_coordinator_does_not_know_of(cluster: Cluster) -> None:
    """B6: or it would hold readers back for ever."""
    producer = Producer(cluster)
    producer.begin()
    one, two = logs(cluster)
    assert isinstance(producer.write(one, b"before"), NoOpenTransaction)
    producer.join(["t", 0])
    assert isinstance(producer.write(two, b"elsewhere"), NoOpenTransaction)
    producer.sequences = {}
    producer.name = None
    assert isinstance(producer.write(one, b"of nobody"), InvalidBatch)
    producer.name, producer.sequences = NAME, {}
    assert isinstance(producer.write(one, b"in"), tuple)
    stranger = Producer(cluster)
    stranger.identity = (producer.identity[0] + 500, 0)
    assert isinstance(stranger.write(two, b"out"), ProducerFenced)
    assert producer.end() == (True, "")
    cluster.until(lambda: visible(cluster, one) == [b"in"], "what was committed")
    assert visible(cluster, two) == []
    for group in (one, two):
        assert cluster.elect(group).partition(group).state.producers.open_transactions == {}


def test_a_coordinator_that_has_not_heard_of_a_topic_takes_it_for_no_deleted_one(
    cluster: Cluster,
) -> None:
    """Cut off from the controller alone, a node leads `__transactions` with old metadata."""
    producer = Producer(cluster)
    producer.begin()
    controller, log = cluster.elect(), producer.log
    near, far = (host for host in cluster.alive if host is not controller)
    cluster.hand_over(log, near)
    cluster.cut.add(frozenset((controller.key.node, far.key.node)))
    (placed,) = cluster.topic("late").partitions
    assert producer.join(["late", 0]) is None
    assert isinstance(producer.write(placed.group, b"in"), tuple)
    cluster.hand_over(log, far)
    assert "late" not in far.alive.table.topics
    client, number = producer.send_end()
    cluster.until(lambda: client.reply(number) is not None, "the decision")
    cluster.heal()
    cluster.until(lambda: visible(cluster, placed.group) == [b"in"], "its marker")
    cluster.until(lambda: producer.phase is Phase.IDLE, "its end")


def test_a_batch_whose_topic_goes_while_the_coordinator_is_asked_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer(cluster)
    producer.begin()
    group = logs(cluster)[0]
    leader = cluster.elect(group)
    asked: list[Callable[[AegisError | None], None]] = []
    admission = leader.alive.transactions.admission
    monkeypatch.setattr(admission, "_ask", lambda *_: asked.append(_[-1]))
    client = Client(cluster, leader, Listener.DATA)
    fields = [[[group, "t", 0]], Acks.QUORUM, NAME]
    number = client.send(Api.PRODUCE, fields, [producer.batch(group, b"in")])
    assert Client(cluster, cluster.elect()).ask(Api.DELETE_TOPIC, ["t"]).code == 0
    cluster.until(lambda: group not in leader.alive.manager.partitions, "the topic's end")
    asked[0](None)
    cluster.tick(5)
    assert isinstance(client.outcome(number), NotLeader)
    assert leader.alive.clients.in_flight_bytes == 0


def test_packets_that_come_a_minute_late_change_nothing(cluster: Cluster) -> None:
    """B5: a produce, a join and an end of an earlier transaction, again after a later one began."""
    producer = opened(cluster)
    group = logs(cluster)[0]
    late, old = producer.batch(group, b"late"), producer.identity
    producer.end()
    producer.join(["t", 0])
    assert isinstance(producer.write(group, b"second"), tuple)
    assert isinstance(producer.produce(group, late), ProducerFenced)
    assert producer.ask(Api.TRANSACTION_END, *old, False) == [True, "", *producer.identity]
    assert isinstance(producer.ask(Api.TRANSACTION_JOIN, *old, [["t", 1]], 0), NoOpenTransaction)
    assert producer.phase is Phase.OPEN
    assert producer.end() == (True, "")
    cluster.until(lambda: visible(cluster, group) == [b"in", b"second"], "both")


# ---- checks that a planted mistake fails


def check_markers_follow_the_decision(cluster: Cluster) -> None:
    """With the followers' disks held, no decision is durable, and so nothing may be marked."""
    producer = opened(cluster)
    coordinator = producer.coordinator
    before = {
        group: cluster.elect(group).partition(group).log.end_offset for group in logs(cluster)
    }
    held = [host for host in cluster.alive if host is not coordinator]
    for host in held:
        host.hold_syncs = True
    producer.send_end()
    cluster.settle()
    ends = {group: max(end_offsets(cluster, group)) for group in before}
    for host in held:
        host.hold_syncs = False
    assert ends == before, "a marker was written before the decision was durable"


def end_offsets(cluster: Cluster, group: int) -> Iterator[int]:
    for host in cluster.alive:
        yield host.partition(group).log.end_offset


def check_every_read_stops_at_open_transactions(cluster: Cluster) -> None:
    opened(cluster)


def check_fences_outlive_their_leader(cluster: Cluster) -> None:
    producer = opened(cluster)
    group = logs(cluster)[0]
    old = producer.identity
    assert producer.end() == (True, "")
    until_seen(cluster, b"in")
    cluster.kill(cluster.elect(group))
    producer.identity, producer.sequences = old, {}
    assert isinstance(producer.write(group, b"again"), ProducerFenced), "a fence was lost"


def check_positions_are_fenced(cluster: Cluster) -> None:
    """A member that its group has lost commits within a transaction."""
    producer = Producer(cluster)
    producer.begin()
    log = place(cluster, "__groups", "g")
    client = Client(cluster, cluster.elect(log), Listener.CONTROL)
    beat = ["g", "m", "one", False, ["t"], 5_000, "here", 0, {}]
    assert client.ask(Api.GROUP_BEAT, beat, ms_left=100).code == 0
    fields = ["g", "m", "another session", 1, 1, [["t", 0, 1]], *producer.identity]
    reply = client.ask(Api.GROUP_COMMIT, fields)
    assert reply.code != 0, "a stranger's positions were taken"
    assert isinstance(error_from_reply(reply.code, reply.fields), MemberFenced)


def marker_before_the_decision(patch: pytest.MonkeyPatch) -> None:
    def after_commit(self: TransactionCoordinator, index: LogIndex, name: str) -> None:
        one = self.fold.get(name)
        assert one is not None
        number, epoch = one.identity
        marker = Marker(number, epoch + 1, one.phase is Phase.COMMITTING, 1)
        self._sender.send([Errand(part, marker, lambda _: None) for part in one.participants])

    patch.setattr(TransactionCoordinator, "_after_commit", after_commit)


def one_read_path_ignores_the_last_stable_offset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partition, "readable_end", lambda self, *, committed: self.high_watermark)


def fences_are_lost_with_the_leader(patch: pytest.MonkeyPatch) -> None:
    """The table is not folded from markers, so only the leader that wrote one knows of it."""
    right = ProducerTable.end_transaction

    def end_transaction(self: ProducerTable, marker: Marker, **place: Any) -> None:
        right(self, marker, **place)
        self._table.pop(ProducerId(marker.producer_id), None)

    patch.setattr(ProducerTable, "end_transaction", end_transaction)


def positions_are_not_fenced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(group_coordinator, "check_commit", lambda *_: None)


CHECKS: list[tuple[Callable[[Cluster], None], Callable[[pytest.MonkeyPatch], None]]] = [
    (check_markers_follow_the_decision, marker_before_the_decision),
    (check_every_read_stops_at_open_transactions, one_read_path_ignores_the_last_stable_offset),
    (check_fences_outlive_their_leader, fences_are_lost_with_the_leader),
    (check_positions_are_fenced, positions_are_not_fenced),
]


@pytest.mark.parametrize(("check", "mistake"), CHECKS, ids=[m.__name__ for _, m in CHECKS])
def test_planted_mistakes_show(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[Cluster], None],
    mistake: Callable[[pytest.MonkeyPatch], None],
) -> None:
    with monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            check(cluster)


@pytest.mark.parametrize("check", [check for check, _ in CHECKS], ids=lambda c: c.__name__)
def test_without_the_mistake_it_holds(cluster: Cluster, check: Callable[[Cluster], None]) -> None:
    check(cluster)
