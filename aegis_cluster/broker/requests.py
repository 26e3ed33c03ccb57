"""What clients may ask of a shard, and how each request becomes a call of the room it is for.

Control and data listeners take the same requests; they are two sockets so that a flood of data
never delays a question about the cluster. Every request ends in exactly one reply, or in none when
the client has gone.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker import feeds, fetch, produce, status
from aegis_cluster.broker.groups.frontend import GROUP_APIS
from aegis_cluster.broker.subscriptions.frontend import SUBSCRIPTION_APIS
from aegis_cluster.broker.transactions.frontend import TRANSACTION_APIS
from aegis_cluster.cluster import controller
from aegis_cluster.errors import (
    AegisError,
    Corruption,
    InvalidTopic,
    NotLeader,
    NotReady,
    PeerViolation,
    StorageFailed,
    Throttled,
    WrongCluster,
)
from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.limits import (
    KIB,
    LOOK_UPS_PER_TURN,
    REQUEST_WAIT_MS_MAX,
    REQUESTS_WAITING_MAX,
)
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.descriptions import (
    TopicSettings,
    node_to_fields,
    settings_from_fields,
    settings_with,
    topic_to_fields,
)
from aegis_cluster.wire.protocol import (
    Api,
    Hello,
    Isolation,
    Part,
    Request,
    check_protocol,
    check_version,
    decode_request,
    encode_reply,
    is_none,
    take_bool,
    take_int,
    take_list,
    take_map,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.clients import Client
    from aegis_cluster.broker.controller_frontend import ControllerFrontend
    from aegis_cluster.broker.groups.frontend import GroupFrontend
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.subscriptions.frontend import SubscriptionFrontend
    from aegis_cluster.broker.transport import Listener, Transport
    from aegis_cluster.cluster.metadata import Command, CreateTopic
    from aegis_cluster.cluster.metadata_table import MetadataTable
    from aegis_cluster.ids import ProducerId

STEP_DOWN_MS: Final = 3_000
QUESTION_BYTES: Final = 1 * KIB
"""What a waiting request takes at least."""
QUESTION_GROWTH: Final = 8
"""How many times the bytes of its message the fields of a request may take, nearly."""

log = logging.getLogger(__name__)


class Exchange:
    """One request of one client, and the way back."""

    def __init__(
        self,
        listener: Listener,
        origin: bytes,
        request: Request,
        transport: Transport,
        *,
        size: int,
    ) -> None:
        self.listener = listener
        self.origin = origin
        self.request = request
        self.size = size
        self.on_answer: Callable[[], None] | None = None
        """Called once, before the answer leaves."""
        self._transport = transport

    def reply(self, fields: Sequence[Any], parts: Sequence[Part] = ()) -> None:
        self._send(encode_reply(self.request.api, fields, parts, correlation=self._number))

    def refuse(self, error: AegisError) -> None:
        code, fields = error_to_reply(error)
        self._send(encode_reply(self.request.api, fields, correlation=self._number, code=code))

    @property
    def _number(self) -> int:
        return self.request.correlation

    def _send(self, message: list[Part]) -> None:
        if self.on_answer is not None:
            self.on_answer()
            self.on_answer = None
        self._transport.reply(self.listener, self.origin, message)


class RequestApi:
    """Both client listeners of one shard."""

    def __init__(self, shard: Shard, transport: Transport) -> None:
        self._shard = shard
        self._transport = transport
        self._awaiting_metadata: list[tuple[int, LogIndex, Exchange]] = []
        self._stepping_down: list[tuple[int, Exchange]] = []
        self._look_ups: deque[_OffsetsWaiter] = deque()

    # ---- inputs

    def handle(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> None:
        """One message of a client: answered with a reply, or with the reason why there is none."""
        try:
            request = decode_request(message)
        except PeerViolation as error:
            self._violated(listener, origin, error)
            return
        exchange = Exchange(listener, origin, request, self._transport, size=len(message[0]))
        try:
            self._dispatch(exchange)
        except PeerViolation as error:
            self._violated(listener, origin, error)
            exchange.refuse(error)
        except StorageFailed:
            raise  # no answer to a client: it ends the process
        except AegisError as error:
            exchange.refuse(error)

    def turn(self) -> None:
        """Do what takes long; so much of it, so that heartbeats are not late."""
        for _ in range(min(len(self._look_ups), LOOK_UPS_PER_TURN)):
            self._look_ups.popleft().look_up()

    @property
    def has_more_to_do(self) -> bool:
        return bool(self._look_ups)

    def holds(self, partition: Partition) -> bool:
        """Whether a replica that was found a while ago still is here."""
        return self._shard.manager.partitions.get(partition.group) is partition

    def look_up_later(self, waiter: _OffsetsWaiter) -> None:
        """The offset of a time, in one of the next turns."""
        self._look_ups.append(waiter)

    def expire(self, now_ms: int) -> None:
        """Answer those who have waited as long as they wanted to."""
        late = [e for deadline_ms, _, e in self._awaiting_metadata if deadline_ms <= now_ms]
        self._awaiting_metadata = [w for w in self._awaiting_metadata if w[0] > now_ms]
        for exchange in late:
            exchange.refuse(NotReady("This node has not caught up with the cluster's metadata."))
        self._finish_step_downs(now_ms)
        if self._shard.supervisor is not None:
            self._shard.supervisor.expire(now_ms)

    def metadata_changed(self) -> None:
        """Answer those who waited for this state of the metadata."""
        if not self._shard.freshness.is_fresh:
            return
        index = self._shard.table.index
        ready = [e for _, wanted, e in self._awaiting_metadata if wanted <= index]
        self._awaiting_metadata = [w for w in self._awaiting_metadata if w[1] > index]
        for exchange in ready:
            self._reply_metadata(exchange)

    def _violated(self, listener: Listener, origin: bytes, error: PeerViolation) -> None:
        self._shard.clients.distrust(listener, origin)
        self._shard.complaints.say("A client broke the protocol: %s", error)

    def _dispatch(self, exchange: Exchange) -> None:
        api = check_version(exchange.request)
        if api is Api.HELLO:
            self._hello(exchange)
            return
        client = self._shard.clients.known(exchange.listener, exchange.origin)
        if api not in (Api.PRODUCE, Api.FETCH, Api.FEED_APPEND, Api.EVENT_APPEND):
            # These have credits of their own.
            self._take_question(exchange, client)
        match api:
            case Api.PRODUCE:
                self._produce(exchange, client)
            case Api.FETCH:
                self._fetch(exchange, client)
            case Api.METADATA:
                self._metadata(exchange)
            case Api.LIST_OFFSETS:
                self._list_offsets(exchange)
            case Api.INIT_PRODUCER:
                self._init_producer(exchange)
            case Api.CREATE_TOPIC:
                self._create_topic(exchange)
            case Api.ALTER_TOPIC:
                self._alter_topic(exchange)
            case Api.DELETE_TOPIC:
                self._delete_topic(exchange)
            case Api.STATUS:
                exchange.reply(status.shard_status(self._shard))
            case Api.STEP_DOWN:
                self._step_down(exchange)
            case Api.CLUSTER_VIEW | Api.LEASE:
                self._ask_supervisor(exchange, api)
            case Api.INTERNAL_TOPIC:
                self._internal_topic(exchange)
            case api if api in feeds.FEED_APIS:
                self._feed(api, exchange, client)
            case Api.EVENT_APPEND | Api.EVENT_READ:
                self._shard.events.handle(api, exchange, client)
            case api if api in GROUP_APIS:
                self._coordinate(self._shard.groups, api, exchange)
            case api if api in SUBSCRIPTION_APIS:
                self._coordinate(self._shard.subscriptions, api, exchange)
            case api if api in TRANSACTION_APIS:
                request = exchange.request
                self._shard.transactions.handle(
                    api, request.fields, exchange, ms_left=request.ms_left
                )
            case _:
                raise PeerViolation(f"Api {api.name} is not for clients.")

    def _take_question(self, exchange: Exchange, client: Client) -> None:
        """Count in what is neither produce nor fetch, until its answer. Raises `Throttled`."""
        clients = self._shard.clients
        clients.check_room(client)
        size = QUESTION_BYTES + QUESTION_GROWTH * exchange.size
        clients.take_question(client, size)
        exchange.on_answer = lambda: clients.give_back_question(client, size)

    def _coordinate(
        self, frontend: GroupFrontend | SubscriptionFrontend, api: Api, exchange: Exchange
    ) -> None:
        frontend.handle(
            api,
            exchange.request.fields,
            exchange,
            origin=(exchange.listener, exchange.origin),
            ms_left=exchange.request.ms_left,
        )

    def _hello(self, exchange: Exchange) -> None:
        hello = Hello.from_fields(exchange.request.fields)
        check_protocol(hello)
        context = self._shard.context
        if hello.cluster_id not in ("", context.cluster_id):
            raise WrongCluster(
                f"This node belongs to cluster {context.cluster_id}, not to {hello.cluster_id}."
                " Check the addresses that the client connects to.",
            )
        self._shard.clients.greet(exchange.listener, exchange.origin)
        exchange.reply(context.hello.to_fields())

    # ---- data

    def _produce(self, exchange: Exchange, client: Client) -> None:
        batches = produce.parse(exchange.request)
        acks = produce.parse_acks(exchange.request)
        name = produce.parse_transactional_id(exchange.request)
        size = sum(len(part) for part in exchange.request.parts)
        clients = self._shard.clients
        clients.take(client, size)

        call = produce.ProduceCall(
            len(batches),
            size,
            reply=lambda call: exchange.reply([call.results]),
            give_back=lambda part: clients.give_back(client, part),
        )
        partitions = self._shard.manager.partitions
        admission = self._shard.transactions.admission
        produce.produce(
            call,
            batches,
            partitions,
            self._max_message_bytes,
            acks,
            lambda partition, header, go: admission.admit(partition, header, name, go),
        )

    def _max_message_bytes(self, group: GroupId) -> int:
        """Of a topic that takes batches of any client."""
        settings = self._settings_of(group)
        if settings.kind == feeds.FEED_KIND:
            raise InvalidTopic("This topic is a change feed; only its connector writes to it.")
        if settings.holds_events:
            raise InvalidTopic(
                "This topic is an event store: append to its streams with"
                " aegis_cluster.event.EventStore instead of publishing."
            )
        return settings.max_message_bytes

    def _settings_of(self, group: GroupId) -> TopicSettings:
        found = self._shard.table.partition_of(group)
        if found is None:
            raise NotLeader("No topic (any more) has this partition; ask for metadata.")
        return found[0].settings

    def _feed(self, api: Api, exchange: Exchange, client: Client) -> None:
        if api is Api.FEED_APPEND:
            size = sum(len(part) for part in exchange.request.parts)
            clients = self._shard.clients
            clients.take(client, size)
            exchange.on_answer = lambda: clients.give_back(client, size)
        answer = feeds.Answer(exchange.reply, exchange.refuse)
        partitions = self._shard.manager.partitions
        feeds.handle(api, exchange.request, answer, partitions, self._settings_of)

    def _fetch(self, exchange: Exchange, client: Client) -> None:
        wait_ms, items = fetch.parse(exchange.request)
        committed = fetch.parse_isolation(exchange.request) is Isolation.COMMITTED
        clients = self._shard.clients
        clients.take_fetch(client, len(items))

        def reply(results: list[list[Any]], parts: list[Part]) -> None:
            clients.give_back_fetch(client, len(items))
            exchange.reply([results], parts)

        deadline_ms = self._shard.now_ms + wait_ms
        call = fetch.FetchCall(
            client, items, deadline_ms, strict=True, reply=reply, committed=committed
        )
        self._shard.fetches.start(call, self._shard.now_ms)

    def _list_offsets(self, exchange: Exchange) -> None:
        """[[group, ...]] -> [[code, log_start, high_watermark, last_stable] or error, ...].

        A time in milliseconds may follow the groups; each answer then also has the offset of the
        first batch that holds a message of that time or later, None where there is none.
        """
        fields = exchange.request.fields
        asked = take_list(fields, 0, "groups")
        groups = [GroupId(take_int(asked, place, "group")) for place in range(len(asked))]
        timed = len(fields) > 1 and not is_none(fields, 1, "time_ms")
        time_ms = take_int(fields, 1, "time_ms") if timed else None
        _OffsetsCall(groups, self._shard, exchange, time_ms)

    def _deadline_ms(self, exchange: Exchange) -> int:
        return self._shard.now_ms + min(exchange.request.ms_left, REQUEST_WAIT_MS_MAX)

    def _init_producer(self, exchange: Exchange) -> None:
        def done(result: ProducerId | AegisError) -> None:
            if isinstance(result, AegisError):
                exchange.refuse(result)
            else:
                exchange.reply([result, 0])

        deadline_ms = self._deadline_ms(exchange)
        self._shard.producer_ids.take(deadline_ms, done)

    # ---- metadata and topics

    def _metadata(self, exchange: Exchange) -> None:
        """[least index, topic names or None, whether stale is fine] -> see `_reply_metadata`."""
        wanted = LogIndex(take_int(exchange.request.fields, 0, "least_index"))
        fields = exchange.request.fields
        stale_ok = len(fields) > 2 and take_bool(fields, 2, "stale_ok")
        if wanted <= self._shard.table.index and (stale_ok or self._shard.freshness.is_fresh):
            self._reply_metadata(exchange)
            return
        if len(self._awaiting_metadata) >= REQUESTS_WAITING_MAX:
            raise Throttled("Too many requests wait here for newer metadata; ask another node.")
        deadline_ms = self._deadline_ms(exchange)
        self._awaiting_metadata.append((deadline_ms, wanted, exchange))

    def _reply_metadata(self, exchange: Exchange) -> None:
        """[cluster id, index, controller node, [node, ...], [[topic, [leader, ...]], ...]].

        Leaders are node ids, 0 where this shard does not know.
        """
        table = self._shard.table
        if not is_none(exchange.request.fields, 1, "topics"):
            asked = take_list(exchange.request.fields, 1, "topics")
            wanted = [take_str(asked, place, "topic") for place in range(len(asked))]
            names = [name for name in wanted if name in table.topics]
        else:
            names = sorted(table.topics)
        key = self._shard.controller_key()
        exchange.reply(
            [
                self._shard.context.cluster_id,
                table.index,
                key.node if key else 0,
                [node_to_fields(info) for _, info in sorted(table.nodes.items())],
                [self._topic_fields(table, name) for name in names],
            ]
        )

    def _topic_fields(self, table: MetadataTable, name: str) -> list[Any]:
        info = table.topics[name]
        leaders = [self._leader_of(partition.group) for partition in info.partitions]
        return [topic_to_fields(info), leaders]

    def _leader_of(self, group: GroupId) -> int:
        partition = self._shard.manager.partitions.get(group)
        leader = partition.replica.leader if partition else None
        return leader.node if leader else 0

    def _create_topic(self, exchange: Exchange) -> None:
        """[name, partitions, replicas, settings, token] -> [index].

        The token is the caller's: a repeat of a call that was already carried out is recognised by
        it and succeeds again.
        """
        fields = exchange.request.fields
        name = take_str(fields, 0, "name")
        partitions = None if is_none(fields, 1, "partitions") else take_int(fields, 1, "partitions")
        replicas = None if is_none(fields, 2, "replicas") else take_int(fields, 2, "replicas")
        settings: TopicSettings = settings_from_fields(take_list(fields, 3, "settings"))
        token = take_str(fields, 4, "token", chars_max=64)

        def decide(table: MetadataTable) -> CreateTopic | None:
            existing = table.topics.get(name)
            if existing is not None and token and existing.token == token:
                return None
            return controller.create_topic(
                table,
                name=name,
                partitions=partitions,
                replicas=replicas,
                settings=settings,
                token=token,
            )

        self._frontend().submit(decide, self._command_answer(exchange))

    def _alter_topic(self, exchange: Exchange) -> None:
        """[name, partitions or None, {setting: value, ...}, replicas or None] -> [index].

        The last one may be missing.
        """
        fields = exchange.request.fields
        name = take_str(fields, 0, "name")
        partitions = None if is_none(fields, 1, "partitions") else take_int(fields, 1, "partitions")
        changes = take_map(fields, 2, "settings")
        has_replicas = len(fields) > 3 and not is_none(fields, 3, "replicas")
        replicas = take_int(fields, 3, "replicas") if has_replicas else None
        settings_with(TopicSettings(), changes)  # a stranger's words are checked before they wait
        self._frontend().submit(
            lambda table: controller.alter_topic(
                table, name=name, partitions=partitions, changes=changes, replicas=replicas
            ),
            self._command_answer(exchange),
        )

    def _delete_topic(self, exchange: Exchange) -> None:
        """[name] -> [index]."""
        name = take_str(exchange.request.fields, 0, "name")
        self._frontend().submit(
            lambda table: controller.delete_topic(table, name), self._command_answer(exchange)
        )

    def _internal_topic(self, exchange: Exchange) -> None:
        """[name] -> [index]: have one of the cluster's own topics made, unless it is there."""
        name = take_str(exchange.request.fields, 0, "name")
        founders = len(self._shard.context.founders)
        self._frontend().submit(
            lambda table: controller.internal_topic(table, name, founders),
            self._command_answer(exchange),
        )

    def _frontend(self) -> ControllerFrontend:
        frontend = self._shard.controller
        if frontend is None:
            raise NotLeader("This shard is not the controller.", leader=None)
        return frontend

    def _command_answer(
        self, exchange: Exchange
    ) -> Callable[[Command | AegisError | None, LogIndex], None]:
        def answer(result: Command | AegisError | None, index: LogIndex) -> None:
            if isinstance(result, AegisError):
                exchange.refuse(result)
            else:
                exchange.reply([index])

        return answer

    # ---- what the supervisor knows

    def _ask_supervisor(self, exchange: Exchange, api: Api) -> None:
        """Pass on a question about the cluster view or a lease (`node.view_host` answers it)."""
        supervisor = self._shard.supervisor
        if supervisor is None:
            raise NotReady("This node runs without a supervisor, so it has no cluster view.")

        def answer(result: list[Any] | AegisError) -> None:
            if isinstance(result, AegisError):
                exchange.refuse(result)
            else:
                exchange.reply(result)

        request = exchange.request
        supervisor.ask(
            api,
            request.fields,
            now_ms=self._shard.now_ms,
            wait_ms=request.ms_left,
            answer=answer,
        )

    # ---- stepping aside

    def _step_down(self, exchange: Exchange) -> None:
        """Hand every leadership to another replica; answers [how many are left] when done."""
        deadline_ms = self._shard.now_ms + min(exchange.request.ms_left, STEP_DOWN_MS)
        self._stepping_down.append((deadline_ms, exchange))
        for partition in self._leading_with_others():
            partition.step_aside()

    def _finish_step_downs(self, now_ms: int) -> None:
        if not self._stepping_down:
            return
        left = self._leading_with_others()
        waiting = []
        for deadline_ms, exchange in self._stepping_down:
            if left and deadline_ms > now_ms:
                waiting.append((deadline_ms, exchange))
            else:
                exchange.reply([len(left)])
        self._stepping_down = waiting
        if waiting:
            for partition in left:
                partition.step_aside()

    def _leading_with_others(self) -> list[Partition]:
        return [
            partition
            for partition in self._shard.manager.partitions.values()
            if partition.leads and len(partition.replica.membership.voters) > 1
        ]


class _OffsetsCall:
    """Offsets of several partitions, each as of a moment after the request came (read index)."""

    def __init__(
        self, groups: list[GroupId], shard: Shard, exchange: Exchange, time_ms: int | None
    ) -> None:
        self._exchange = exchange
        self._results: list[list[Any]] = [[] for _ in groups]
        self._open = len(groups)
        if not groups:
            exchange.reply([[]])
        for slot, group in enumerate(groups):
            partition = shard.manager.partitions.get(group)
            if partition is None:
                self.settle(slot, produce.refusal(NotLeader("This shard has no replica of it.")))
                continue
            waiter = _OffsetsWaiter(self, slot, partition, shard.requests, time_ms)
            try:
                partition.wait_for_read(waiter)
            except AegisError as error:
                waiter.lost(error)

    def settle(self, slot: int, result: list[Any]) -> None:
        self._results[slot] = result
        self._open -= 1
        if self._open == 0:
            self._exchange.reply([self._results])


class _OffsetsWaiter:
    def __init__(
        self,
        call: _OffsetsCall,
        slot: int,
        partition: Partition,
        requests: RequestApi,
        time_ms: int | None,
    ) -> None:
        self._call = call
        self._slot = slot
        self._partition = partition
        self._requests = requests
        self._time_ms = time_ms

    def committed(self) -> None:
        if self._time_ms is None:
            self._call.settle(self._slot, self._result())
        else:
            self._requests.look_up_later(self)

    def look_up(self) -> None:
        """Add the offset of the time. The index leads to one short stretch of a file, so this is
        read on the shard's own thread. What is not committed may still vanish, and is left out."""
        partition = self._partition
        if not self._requests.holds(partition):
            self.lost(NotLeader("This shard has no replica of the partition any more."))
            return
        try:
            found = partition.log.offset_of_time(self._time_ms or 0)
        except Corruption as error:
            partition.damage_met(error)
            self.lost(error if partition.is_alone else partition.not_leader())
            return
        is_committed = found is not None and found < partition.high_watermark
        self._call.settle(self._slot, [*self._result(), found if is_committed else None])

    def _result(self) -> list[Any]:
        partition = self._partition
        stable = partition.readable_end(committed=True)
        return [0, partition.log_start_offset, partition.high_watermark, stable]

    def lost(self, error: AegisError) -> None:
        self._call.settle(self._slot, produce.refusal(error))
