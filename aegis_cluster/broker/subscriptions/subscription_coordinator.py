"""One partition of `__subscriptions` while this shard leads it: polls, acknowledgements, and time.

The shell around `Dispatcher`: it appends what is decided, and answers once that is committed. The
rules it protects: no answer leaves that rests on something uncommitted, so a message is handed out
only once its delivery count is durable; and where the log refuses an append, what was decided is
thrown away and made anew from the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.coordinators import answer, refuse
from aegis_cluster.broker.subscriptions.commands import (
    Bury,
    Configure,
    Create,
    Drop,
    HandOut,
    Key,
    Later,
    Letter,
    Park,
    Replay,
    Reset,
    Rules,
    Run,
    Settle,
    encode_command,
)
from aegis_cluster.broker.subscriptions.dispatcher import Dispatcher
from aegis_cluster.broker.subscriptions.lanes import draw
from aegis_cluster.broker.subscriptions.subscription_table import created
from aegis_cluster.errors import (
    AegisError,
    ConfigError,
    NotReady,
    ProducerFenced,
    Refused,
    SubscriptionInUse,
    SubscriptionNotFound,
    Throttled,
)
from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex, ProducerId
from aegis_cluster.limits import (
    SUBSCRIPTION_CONSUMERS_MAX,
    SUBSCRIPTION_PARKED_MAX,
    SUBSCRIPTION_READY_MAX,
)
from aegis_cluster.wire.batch import batch_header, encode_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.subscriptions.commands import Handed, SubscriptionCommand
    from aegis_cluster.broker.subscriptions.subscription_stm import SubscriptionFold
    from aegis_cluster.broker.subscriptions.subscription_table import Subscription
    from aegis_cluster.wire.batch import Row

SILENCE_MS: Final = 10_000
"""A consumer that is not heard for so long is forgotten; its locks end by themselves."""
GONE_GRACE_MS: Final = 300
"""A consumer whose connection closed has so long to come back over another one."""
SCOUT_SILENCE_MS: Final = 2_000
"""Somebody else reads ahead in the place of a consumer that is silent for so long."""
STALL_MS: Final = 250
"""Time that this process slept through, beyond so much, is added to every lock."""

Logs = dict[GroupId, int]
"""A topic's logs, with their partition numbers."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a settle request. kind: see `SETTLE_KINDS`."""

    kind: str
    run: Run
    count: int
    delay_ms: int = 0
    reason: str = ""


ACK: Final = "ack"
NACK: Final = "nack"
RELEASE: Final = "release"
PARK: Final = "park"
EXTEND: Final = "extend"
SETTLE_KINDS: Final = frozenset({ACK, NACK, RELEASE, PARK, EXTEND})


@dataclass(frozen=True, slots=True)
class Poll:
    """One request for messages. number: of this consumer's polls, by which a repeat is known.
    scouting: partitions that it reads ahead in, as it knows."""

    consumer: str
    client: str
    number: int
    want: int
    scouting: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Consumer:
    """One consumer's process as last heard of."""

    name: str
    client: str
    heard_ms: int
    origin: object = None
    gone_ms: int | None = None
    number: int = 0
    want: int = 0
    scouting: tuple[int, ...] = ()
    exchange: Exchange | None = None
    wait_ms: int = 0
    last: list[Any] | None = None
    """The answer to poll `number`, for a repeat of it."""

    def is_attentive(self, now_ms: int) -> bool:
        if self.gone_ms is not None:
            return False
        return self.exchange is not None or now_ms - self.heard_ms < SCOUT_SILENCE_MS


@dataclass(slots=True, eq=False)
class Live:
    """A subscription that is in use: the copy that runs ahead, and who takes part.

    index: of the newest command; answers wait for its commit.
    """

    state: Subscription
    dispatcher: Dispatcher
    index: LogIndex = NO_INDEX
    consumers: dict[str, Consumer] = field(default_factory=dict)
    scouting: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Which partitions each consumer should read ahead in."""
    scouts_of: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
    """The consumers and partitions that this was decided for."""


class SubscriptionCoordinator:
    """Subscriptions of one partition, for one term of our leadership."""

    def __init__(
        self,
        partition: Partition,
        fold: SubscriptionFold,
        *,
        wall_ms: Callable[[], int],
        logs_of: Callable[[str], Logs],
        now_ms: int,
    ) -> None:
        self.partition = partition
        self.fold = fold
        self.term = partition.replica.term
        self._wall_ms = wall_ms
        self._logs_of = logs_of
        fold.on_burial_ended = self._burial_ended
        self._forgot_ms = now_ms
        """What was handed out until then may be in somebody's hands that we do not know of."""
        self._clock_ms = now_ms
        self._slept_ms = 0
        self._live: dict[Key, Live] = {}
        self._ending: dict[Key, LogIndex] = {}
        """Those that were thrown away, until all that they had appended is in the table."""

    # ---- requests

    def look(self, exchange: Exchange, key: Key) -> None:
        """Answers [token, rules] of one that is there. Raises `SubscriptionNotFound`."""
        live = self._known(key)
        self._answer(live, exchange, [live.state.token, list(live.state.rules)], own=False)

    def create(self, exchange: Exchange, command: Create, *, given: bool) -> None:
        """Have a subscription, or take the one that is there; given: its rules must be these.

        Answers [token, rules]. Refused with `ConfigError`, `SubscriptionNotFound`.
        """
        live = self._find(command.key)
        if live is None:
            self._check_settled(command.key)
            live = self._enliven(created(command))
            self._append(live, [command])
        elif given and live.state.rules != command.rules:
            self._refuse(live, exchange, _other_rules(live.state, command.rules))
            return
        state = live.state
        self._answer(live, exchange, [state.token, list(state.rules)], own=live.index > 0)

    def configure(self, exchange: Exchange, key: Key, rules: Rules) -> None:
        """Give a subscription other rules; what is under way goes on by the new ones."""
        live = self._known(key)
        self._append(live, [Configure(key, rules)])
        self._dispatch_anew(live)
        self._answer(live, exchange, [live.state.token, list(rules)], own=True)

    def reset(
        self, exchange: Exchange, key: Key, token: str, starts: Sequence[tuple[GroupId, int]]
    ) -> None:
        """Begin anew at these positions; what was handed out, settled and parked is forgotten.

        token: the subscription's from now on; the same one again is a repeat. Refused with
        `SubscriptionInUse` while it has consumers.
        """
        live = self._known(key)
        if live.state.token == token:
            self._answer(live, exchange, [], own=False)
            return
        if live.consumers:
            self._refuse(live, exchange, _in_use(live))
            return
        self._append(live, [Reset(key, token, tuple(starts))])
        self._dispatch_anew(live)
        self._answer(live, exchange, [], own=True)

    def drop(self, exchange: Exchange, key: Key) -> None:
        """Forget a subscription, its parked messages included."""
        live = self._known(key)
        self._append(live, [Drop(key)])
        self._live.pop(key)
        self._ending[key] = live.index
        for consumer in live.consumers.values():
            if consumer.exchange is not None:
                self._refuse(live, consumer.exchange, not_found(key))
        self._answer(live, exchange, [], own=True)

    def poll(
        self, exchange: Exchange, key: Key, token: str, poll: Poll, *, origin: object, wait_ms: int
    ) -> None:
        """Answered at once if there is anything to say, else when there is or after `wait_ms`."""
        live = self._known(key, token)
        consumer = self._heard(live, poll, origin)
        if consumer.exchange is not None:
            consumer.exchange.refuse(NotReady("A newer poll has taken this one's place."))
            consumer.exchange = None
        if poll.number == consumer.number and consumer.last is not None:
            self._answer(live, exchange, consumer.last, own=False)
            return
        consumer.number, consumer.last = poll.number, None
        consumer.want, consumer.scouting = poll.want, poll.scouting
        consumer.exchange, consumer.wait_ms = exchange, self._now_ms + wait_ms
        self._serve(live)
        if not poll.want and consumer.exchange is not None:
            self._reply_poll(live, consumer, [], [])

    def report(
        self,
        exchange: Exchange,
        key: Key,
        token: str,
        consumer: str,
        *,
        log: GroupId,
        first: int,
        end: int,
        runs: Sequence[tuple[int, int]],
        keys: Sequence[int | None] | None,
    ) -> None:
        """What a log holds from one offset to another. Answers [next offset to tell of, whether
        this consumer is still the one to read there, whether there is room for more, whether keys
        are to be told]."""
        live = self._known(key, token)
        known = live.consumers.get(consumer)
        partition = self._logs_of(key.topic).get(log)
        if partition is None:
            raise NotReady(f"No partition of {key.topic} known here has log {log} (yet).")
        has_room = live.dispatcher.ready < SUBSCRIPTION_READY_MAX
        if end > first and has_room and (keys is not None) == live.state.rules.keyed:
            gaps = live.dispatcher.reported(log, first, end, runs, keys)
            if gaps:
                self._append(live, [Settle(key, done=tuple(gaps))])
            self._serve(live)
        if known is not None:
            known.heard_ms = self._now_ms
        is_scout = partition in live.scouting.get(consumer, ())
        room = live.dispatcher.ready < SUBSCRIPTION_READY_MAX
        exchange.reply([live.dispatcher.scan_from(log), is_scout, room, live.state.rules.keyed])

    def settle(
        self,
        exchange: Exchange,
        key: Key,
        token: str,
        *,
        session: str,
        number: int,
        marks: Sequence[Mark],
    ) -> None:
        """Take acknowledgements and the like. Answers [[log, first, end], ...]: those that are
        refused, because their lock is gone. A repeat gets the answer that it got before."""
        live = self._known(key, token)
        known = live.consumers.get(session)
        if known is not None:
            known.heard_ms = self._now_ms
        before = live.state.settled.get(session)
        if before is not None and before.number >= number:
            refused = before.refused if before.number == number else ()
            self._answer(live, exchange, [list(refused)], own=False)
            return
        parks = sum(mark.run.end - mark.run.first for mark in marks if mark.kind == PARK)
        if parks and live.state.parked + parks > SUBSCRIPTION_PARKED_MAX:
            raise Throttled(
                f"Subscription {key} has {live.state.parked} parked messages; it may have"
                f" {SUBSCRIPTION_PARKED_MAX}. Have some replayed first."
            )
        done: list[Run] = []
        later: list[Later] = []
        parked: list[Park] = []
        refused_now: list[Run] = []
        for mark in marks:
            held = self._held(live, mark, refused_now)
            self._carry_out(live, mark, held, done, later, parked)
        if done or later or parked:
            command = Settle(
                key, session, number, tuple(done), tuple(later), tuple(parked), tuple(refused_now)
            )
            self._append(live, [command])
        self._answer(live, exchange, [refused_now], own=True)
        self._serve(live)

    def bury(self, exchange: Exchange, command: Bury, token: str, consumer: str) -> None:
        """Settle messages with the transaction in which this consumer writes their dead letters.

        Answers [[log, offset], ...]: those that it may write; the others were settled meanwhile, or
        are another's. Refused with `ProducerFenced` once that transaction has ended here.
        """
        key, producer, epoch = command.key, command.producer, command.epoch
        live = self._known(key, token)
        known, index = self.partition.state.producers.epoch_of(producer)
        if known > epoch:
            refuse(self.partition, index, exchange, _ended(key, epoch, known))
            return
        mine = [one for one in command.letters if self._may_bury(live, one, consumer, command)]
        added = [one for one in mine if live.state.is_buried_by(one.log, one.offset) is None]
        if added:
            self._append(live, [Bury(key, producer, epoch, tuple(added))])
        self._answer(live, exchange, [[[one.log, one.offset] for one in mine]], own=True)

    def _may_bury(self, live: Live, letter: Letter, consumer: str, command: Bury) -> bool:
        delivery = live.dispatcher.burial_of(letter.log, letter.offset, consumer)
        by = live.state.is_buried_by(letter.log, letter.offset)
        is_free = by is None or by == (command.producer, command.epoch)
        return delivery is not None and delivery.count == letter.count and is_free

    def leave(self, exchange: Exchange, key: Key, token: str, consumer: str) -> None:
        """A consumer ends; what it still held is ready for others."""
        live = self._known(key, token)
        self._forget(live, consumer)
        self._serve(live)
        self._answer(live, exchange, [], own=False)

    def replay(
        self,
        exchange: Exchange,
        key: Key,
        messages: Sequence[tuple[GroupId, int]] | None,
    ) -> None:
        """Have parked messages handed out again, all of them for None. Answers [how many]."""
        live = self._known(key)
        parked = {
            (log, offset)
            for log, progress in live.state.progress.items()
            for offset in progress.parked
        }
        chosen = sorted(parked if messages is None else parked & set(messages))
        if chosen:
            self._append(live, [Replay(key, self._wall_ms(), tuple(chosen))])
            for log, offset in chosen:
                live.dispatcher.replayed(log, offset)
        self._answer(live, exchange, [len(chosen)], own=True)
        self._serve(live)

    def described(self, key: Key) -> tuple[Subscription, list[list[Any]], list[int]]:
        """The committed state, [consumer, client, held, partitions read ahead, heard ms ago], and
        [ready, held, delayed, to be buried]. Raises `SubscriptionNotFound`, `NotReady`."""
        state = self.fold.table.subscriptions.get(key)
        if state is None:
            raise not_found(key)
        live = self._find(key)
        if live is None:
            return state, [], [0, 0, 0, 0]
        found = live.dispatcher
        rows: list[list[Any]] = [
            [
                one.name,
                one.client,
                found.held_by(one.name),
                list(live.scouting.get(one.name, ())),
                max(0, self._now_ms - one.heard_ms),
            ]
            for _, one in sorted(live.consumers.items())
        ]
        return state, rows, [found.ready, found.held, found.delayed, found.to_bury]

    def consumers_of(self, key: Key) -> int:
        """How many take part now."""
        live = self._live.get(key)
        return 0 if live is None else len(live.consumers)

    # ---- news

    def client_gone(self, origin: object) -> None:
        for live in self._live.values():
            for consumer in live.consumers.values():
                if consumer.origin == origin and consumer.gone_ms is None:
                    consumer.gone_ms = self._now_ms
                    if consumer.exchange is not None:
                        consumer.exchange.refuse(NotReady("The connection has closed."))
                        consumer.exchange = None

    def tick(self, now_ms: int) -> None:
        """Let locks end, delays pass and polls be answered."""
        slept_ms = now_ms - self._clock_ms - STALL_MS
        self._clock_ms = now_ms
        self._slept_ms += max(0, slept_ms)
        for key, index in list(self._ending.items()):
            if index <= self.partition.applied:
                del self._ending[key]
        for key, live in list(self._live.items()):
            try:
                self._age(live)
            except Refused:
                self._throw_away(key)

    def close(self) -> None:
        """Leadership is lost: those who wait are sent to the next coordinator."""
        self.fold.on_burial_ended = None
        for live in self._live.values():
            for consumer in live.consumers.values():
                if consumer.exchange is not None:
                    consumer.exchange.refuse(self.partition.not_leader())

    # ---- inside

    @property
    def _now_ms(self) -> int:
        """Our own clock, without what this process slept through."""
        return self._clock_ms - self._slept_ms

    def at(self, now_ms: int) -> None:
        """What time it is, before a request is taken."""
        self._clock_ms = max(self._clock_ms, now_ms)

    def _age(self, live: Live) -> None:
        parked = live.dispatcher.expire(self._now_ms)
        self._park(live, parked)
        for consumer in list(live.consumers.values()):
            is_gone = consumer.gone_ms is not None and (
                self._now_ms - consumer.gone_ms >= GONE_GRACE_MS
            )
            is_silent = consumer.exchange is None and self._now_ms - consumer.heard_ms >= SILENCE_MS
            if is_gone or is_silent:
                self._forget(live, consumer.name, release=is_gone)
        self._consumers_changed(live)
        self._serve(live)
        for consumer in live.consumers.values():
            if consumer.exchange is not None and consumer.wait_ms <= self._now_ms:
                self._reply_poll(live, consumer, [], [])
        if not live.consumers and not live.state.unsettled:
            self._throw_away(live.state.key)

    def _forget(self, live: Live, name: str, *, release: bool = True) -> None:
        consumer = live.consumers.pop(name, None)
        if consumer is not None and consumer.exchange is not None:
            consumer.exchange.refuse(NotReady("The consumer has left."))
        self._consumers_changed(live)
        if release:
            self._park(live, live.dispatcher.gone(name, self._now_ms))

    def _park(self, live: Live, parked: Sequence[Park]) -> None:
        if parked:
            self._append(live, [Settle(live.state.key, parked=tuple(parked))])

    def _burial_ended(self, key: Key, producer: ProducerId, epoch: int, committed: bool) -> None:
        """A transaction's marker was applied; called by the fold, so nothing is appended here."""
        live = self._live.get(key)
        found = None if live is None else live.state.burials.get(producer)
        if live is None or found is None or found.epoch > epoch:
            return
        for (log, offset), count in found.letters.items():
            delivery = live.state.of(log).open.get(offset)
            if delivery is None or delivery.count != count:
                continue
            if committed and found.epoch == epoch:
                live.dispatcher.buried(log, offset)
            else:
                live.dispatcher.not_buried(log, offset, self._now_ms)
        live.state.end_burial(producer, epoch, committed=committed)

    def _dispatch_anew(self, live: Live) -> None:
        live.dispatcher = Dispatcher(
            live.state,
            now_ms=self._now_ms,
            wall_ms=self._wall_ms(),
            locked_until_ms=self._now_ms + live.state.rules.ack_timeout_ms,
        )
        self._consumers_changed(live)

    def _find(self, key: Key) -> Live | None:
        """The subscription, made live when the table has it. Raises `NotReady`."""
        live = self._live.get(key)
        if live is not None:
            return live
        self._check_settled(key)
        state = self.fold.table.subscriptions.get(key)
        return None if state is None else self._enliven(state.copy())

    def _check_settled(self, key: Key) -> None:
        if key in self._ending:
            if self._ending[key] > self.partition.applied:
                raise NotReady(f"Changes of {key} are still under way.")
            del self._ending[key]

    def _enliven(self, state: Subscription) -> Live:
        timeout_ms = state.rules.ack_timeout_ms
        dispatcher = Dispatcher(
            state,
            now_ms=self._now_ms,
            wall_ms=self._wall_ms(),
            locked_until_ms=max(self._now_ms, self._forgot_ms + timeout_ms),
        )
        live = self._live[state.key] = Live(state, dispatcher)
        return live

    def _known(self, key: Key, token: str | None = None) -> Live:
        """Raises `SubscriptionNotFound`, also for one that was deleted and made anew."""
        live = self._find(key)
        if live is None or (token is not None and token != live.state.token):
            raise not_found(key)
        return live

    def _heard(self, live: Live, poll: Poll, origin: object) -> Consumer:
        consumer = live.consumers.get(poll.consumer)
        if consumer is None:
            if len(live.consumers) >= SUBSCRIPTION_CONSUMERS_MAX:
                raise Throttled(
                    f"Subscription {live.state.key} has {SUBSCRIPTION_CONSUMERS_MAX} consumers,"
                    " the most it may."
                )
            consumer = Consumer(poll.consumer, poll.client, self._now_ms)
            live.consumers[poll.consumer] = consumer
            self._consumers_changed(live)
        consumer.heard_ms, consumer.origin, consumer.gone_ms = self._now_ms, origin, None
        return consumer

    # ---- serving

    def _consumers_changed(self, live: Live) -> None:
        """Each partition has one consumer that reads ahead, drawn among those who are heard, so
        that who comes or goes moves only its own share."""
        live.dispatcher.consumers_are(live.consumers)
        heard = [one.name for one in live.consumers.values() if one.is_attentive(self._now_ms)]
        names = tuple(heard or live.consumers)
        partitions = tuple(sorted(self._logs_of(live.state.key.topic).values()))
        if live.scouts_of == (names, partitions):
            return
        live.scouts_of = names, partitions
        found: dict[str, list[int]] = {name: [] for name in names}
        if names:
            for number in partitions:
                found[max(names, key=lambda name: draw(name, number))].append(number)
        live.scouting = {name: tuple(numbers) for name, numbers in found.items()}

    def _serve(self, live: Live) -> None:
        """Answer those who wait, each with an equal share of what is ready, who waits longest
        first."""
        waiting = [one for one in live.consumers.values() if one.exchange is not None]
        if not waiting:
            return
        waiting.sort(key=lambda one: one.wait_ms)
        for place, consumer in enumerate(waiting):
            burials = live.dispatcher.take_burials(consumer.name, self._now_ms)
            share = -(-live.dispatcher.ready // (len(waiting) - place))
            runs = live.dispatcher.take(consumer.name, min(consumer.want, share), self._now_ms)
            if runs:
                self._append(live, [HandOut(live.state.key, tuple(runs))])
            if runs or burials or live.scouting.get(consumer.name, ()) != consumer.scouting:
                self._reply_poll(live, consumer, runs, burials)

    def _reply_poll(
        self,
        live: Live,
        consumer: Consumer,
        runs: Sequence[Handed],
        burials: Sequence[tuple[GroupId, int, Any]],
    ) -> None:
        """[[partition, ...] to read ahead in, [[log, first, end, count], ...] to handle,
        [[log, offset, count], ...] to write as dead letters]"""
        exchange, consumer.exchange = consumer.exchange, None
        consumer.heard_ms = self._now_ms
        if exchange is None:
            return
        fields = [
            list(live.scouting.get(consumer.name, ())),
            _by_count(live.state, runs),
            [[log, offset, delivery.count] for log, offset, delivery in burials],
        ]
        consumer.last = fields
        self._answer(live, exchange, fields, own=False)

    # ---- settling

    def _held(self, live: Live, mark: Mark, refused: list[Run]) -> list[int]:
        """Which offsets of a line have a good lock; the others are noted as refused."""
        log, first, end = mark.run
        held = [o for o in range(first, end) if live.dispatcher.holds(log, o, mark.count)]
        if live.dispatcher.to_bury:
            held = [offset for offset in held if self._may_say(live, mark.kind, log, offset)]
        if len(held) != end - first:
            kept = set(held)
            _add_runs(refused, log, [o for o in range(first, end) if o not in kept])
        return held

    def _may_say(self, live: Live, kind: str, log: GroupId, offset: int) -> bool:
        """What is to be buried is given back, or parked while no transaction settles it."""
        if not live.dispatcher.is_burial(log, offset) or kind == RELEASE:
            return True
        return kind == PARK and live.state.is_buried_by(log, offset) is None

    def _carry_out(
        self,
        live: Live,
        mark: Mark,
        held: Sequence[int],
        done: list[Run],
        later: list[Later],
        parked: list[Park],
    ) -> None:
        log, dispatcher = mark.run.log, live.dispatcher
        match mark.kind:
            case "ack":
                for offset in held:
                    dispatcher.settled(log, offset)
                _add_runs(done, log, held)
            case "extend":
                for offset in held:
                    dispatcher.extend(log, offset, self._now_ms)
            case "park":
                for offset in held:
                    dispatcher.settled(log, offset)
                    parked.append(Park(log, offset, mark.reason))
            case _:
                spared = mark.kind == RELEASE
                for offset in held:
                    if dispatcher.is_burial(log, offset):
                        dispatcher.not_buried(log, offset, self._now_ms)
                        continue
                    found = dispatcher.failed(
                        log,
                        offset,
                        spared=spared,
                        delay_ms=mark.delay_ms,
                        now_ms=self._now_ms,
                        wall_ms=self._wall_ms(),
                    )
                    if isinstance(found, Park):
                        parked.append(found)
                    else:
                        later.append(found)

    # ---- the log

    def _append(self, live: Live, commands: Sequence[SubscriptionCommand]) -> None:
        """Put commands into the log and into the copy that runs ahead. Raises `NotLeader`: then
        that copy is thrown away, with all that was decided on it."""
        now_ms = self._wall_ms()
        rows: list[Row] = [(now_ms, None, encode_command(one), []) for one in commands]
        batch = encode_batch(rows)
        try:
            placed = self.partition.append(batch, batch_header(batch))
        except AegisError:
            self._throw_away(live.state.key)
            self._forgot_ms = self._now_ms
            raise
        live.index = placed.index
        for command in commands:
            if not isinstance(command, Create | Drop):
                live.state.apply(command, placed.time_ms)

    def _throw_away(self, key: Key) -> None:
        live = self._live.pop(key, None)
        if live is None:
            return
        if live.index > self.partition.applied:
            self._ending[key] = live.index
        for consumer in live.consumers.values():
            if consumer.exchange is not None:
                consumer.exchange.refuse(NotReady("The coordinator begins anew."))

    def _answer(self, live: Live, exchange: Exchange, fields: list[Any], *, own: bool) -> None:
        answer(self.partition, live.index, exchange, fields, own=own)

    def _refuse(self, live: Live, exchange: Exchange, error: Refused) -> None:
        refuse(self.partition, live.index, exchange, error)


def not_found(key: Key) -> SubscriptionNotFound:
    return SubscriptionNotFound(
        f"Topic {key.topic!r} has no subscription {key.name!r} (any more).",
        topic=key.topic,
        subscription=key.name,
    )


def _in_use(live: Live) -> SubscriptionInUse:
    key, count = live.state.key, len(live.consumers)
    return SubscriptionInUse(
        f"Subscription {key} has {count} consumers, which hold messages or wait for some. Stop them"
        " first; one that was killed is forgotten within a second, or ten at last.",
        topic=key.topic,
        subscription=key.name,
        consumers=count,
    )


def _ended(key: Key, epoch: int, known: int) -> ProducerFenced:
    return ProducerFenced(
        f"The transaction of epoch {epoch} that writes dead letters of {key} has ended here, so it"
        " settles nothing any more.",
        have=known,
        got=epoch,
    )


def _other_rules(state: Subscription, wanted: Rules) -> ConfigError:
    names = [n for n in Rules._fields if getattr(state.rules, n) != getattr(wanted, n)]
    shown = ", ".join(
        f"{n} is {getattr(state.rules, n)!r} and not {getattr(wanted, n)!r}" for n in names
    )
    return ConfigError(
        f"Subscription {state.key} exists with other rules: {shown}. Open it without a config to"
        " take it as it is, or change it with `update`.",
        key=names[0],
    )


def _by_count(state: Subscription, runs: Iterable[Handed]) -> list[list[int]]:
    """Runs of equal delivery counts, which the consumer returns to settle them."""
    rows: list[list[int]] = []
    for log, first, end, _ in runs:
        opened = state.of(log).open
        for offset in range(first, end):
            count = opened[offset].count
            last = rows[-1] if rows else None
            if last is not None and last[0] == log and last[2] == offset and last[3] == count:
                last[2] = offset + 1
            else:
                rows.append([log, offset, offset + 1, count])
    return rows


def _add_runs(runs: list[Run], log: GroupId, offsets: Sequence[int]) -> None:
    for offset in offsets:
        last = runs[-1] if runs else None
        if last is not None and last.log == log and last.end == offset:
            runs[-1] = Run(log, last.first, offset + 1)
        else:
            runs.append(Run(log, offset, offset + 1))
