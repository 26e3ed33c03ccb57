"""What the log of `__subscriptions` holds: results of decisions, never questions.

One frame holds the commands of one decision, one record each, so that they are applied together.
A *log* is the Raft group of one partition of the topic: a topic that was deleted and made anew has
other ones, so no offset is ever taken for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster.errors import CorruptRecord

if TYPE_CHECKING:
    from aegis_cluster.ids import GroupId, ProducerId

COMMAND_VERSION: Final = 1
ROUND_ROBIN: Final = "round_robin"
PINNED: Final = "pinned"
STRATEGIES: Final = (ROUND_ROBIN, PINNED)


class Key(NamedTuple):
    """Which subscription."""

    topic: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} of {self.topic}"


class Rules(NamedTuple):
    """How a subscription hands out; the same for all of its consumers.

    max_deliveries: tries of one message; 0: without end. dead_letter: the topic for those that
    used up their tries; "": they are parked. ordered: messages of one key one after the other.
    """

    ack_timeout_ms: int
    max_deliveries: int
    dead_letter: str
    strategy: str
    ordered: bool

    @property
    def keyed(self) -> bool:
        """The order of hand-outs depends on keys."""
        return self.ordered or self.strategy == PINNED


class Run(NamedTuple):
    """Offsets [first, end) of one log."""

    log: GroupId
    first: int
    end: int


class Handed(NamedTuple):
    """A run that is handed out. keys: a hash of each message's key, None where it has none; the
    whole None where keys do not matter."""

    log: GroupId
    first: int
    end: int
    keys: tuple[int | None, ...] | None = None


class Later(NamedTuple):
    """A message that is to be handed out again, not before the time (wall clock, milliseconds).

    spared: 1 where the try before does not count against it.
    """

    log: GroupId
    offset: int
    at_ms: int
    spared: int


class Park(NamedTuple):
    log: GroupId
    offset: int
    reason: str


class Letter(NamedTuple):
    """A message whose dead letter is being written; count: of its last hand-out."""

    log: GroupId
    offset: int
    count: int  # type: ignore[assignment] # hides tuple.count


@dataclass(frozen=True, slots=True)
class Create:
    """token: tells this subscription from an earlier one of its name. starts: (log, first offset)
    of the topic's partitions."""

    key: Key
    token: str
    rules: Rules
    starts: tuple[tuple[GroupId, int], ...]


@dataclass(frozen=True, slots=True)
class Configure:
    key: Key
    rules: Rules


@dataclass(frozen=True, slots=True)
class Reset:
    """Begin anew at other positions: what was handed out, settled and parked is forgotten.

    token: the subscription's from now on, so that nothing handed out before can settle anything.
    """

    key: Key
    token: str
    starts: tuple[tuple[GroupId, int], ...]


@dataclass(frozen=True, slots=True)
class Drop:
    key: Key


@dataclass(frozen=True, slots=True)
class HandOut:
    key: Key
    runs: tuple[Handed, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """What became of messages. session, number: of the request, "" for the coordinator's own;
    refused: what that request asked for in vain, so that a repeat gets the same answer."""

    key: Key
    session: str = ""
    number: int = 0
    done: tuple[Run, ...] = ()
    later: tuple[Later, ...] = ()
    parked: tuple[Park, ...] = ()
    refused: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class Bury:
    """These messages are settled if the transaction of this producer and epoch is committed; their
    dead letters are written in it."""

    key: Key
    producer: ProducerId
    epoch: int
    letters: tuple[Letter, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """Parked messages are to be handed out again. at_ms: wall clock."""

    key: Key
    at_ms: int
    messages: tuple[tuple[GroupId, int], ...]


SubscriptionCommand = Create | Configure | Reset | Drop | HandOut | Settle | Bury | Replay


def encode_command(command: SubscriptionCommand) -> bytes:
    """The value of one record in `__subscriptions`."""
    match command:
        case Create(key, token, rules, starts):
            body: list[Any] = ["create", key, token, rules, starts]
        case Configure(key, rules):
            body = ["configure", key, rules]
        case Reset(key, token, starts):
            body = ["reset", key, token, starts]
        case Drop(key):
            body = ["drop", key]
        case HandOut(key, runs):
            body = ["hand_out", key, runs]
        case Settle(key, session, number, done, later, parked, refused):
            body = ["settle", key, session, number, done, later, parked, refused]
        case Bury(key, producer, epoch, letters):
            body = ["bury", key, producer, epoch, letters]
        case Replay(key, at_ms, messages):
            body = ["replay", key, at_ms, messages]
    return bytes(msgpack.packb([COMMAND_VERSION, *body]))


def decode_command(value: bytes) -> SubscriptionCommand:
    """Raise `CorruptRecord` when the value is no command that this version knows."""
    try:
        version, kind, key, *body = msgpack.unpackb(value, use_list=False)
        if version > COMMAND_VERSION:
            raise CorruptRecord(
                f"A command of a subscription has version {version}; this program reads up to"
                f" {COMMAND_VERSION}. Run a newer aegis-cluster."
            )
        return _decode(kind, Key(*key), body)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptRecord(f"A record of `__subscriptions` is no command: {error}.") from error


def _decode(kind: str, key: Key, body: list[Any]) -> SubscriptionCommand:
    match kind, body:
        case "create", [token, rules, starts]:
            return Create(key, token, Rules(*rules), starts)
        case "configure", [rules]:
            return Configure(key, Rules(*rules))
        case "reset", [token, starts]:
            return Reset(key, token, starts)
        case "drop", []:
            return Drop(key)
        case "hand_out", [runs]:
            return HandOut(key, tuple(Handed(*run) for run in runs))
        case "settle", [session, number, done, later, parked, refused]:
            return Settle(
                key,
                session,
                number,
                tuple(Run(*run) for run in done),
                tuple(Later(*one) for one in later),
                tuple(Park(*one) for one in parked),
                tuple(Run(*run) for run in refused),
            )
        case "bury", [producer, epoch, letters]:
            return Bury(key, producer, epoch, tuple(Letter(*one) for one in letters))
        case "replay", [at_ms, messages]:
            return Replay(key, at_ms, messages)
    raise CorruptRecord(f"The subscription command {kind!r} is unknown to this version.")
