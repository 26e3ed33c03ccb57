"""What the log of `__transactions` holds: results of decisions, never questions.

One frame holds the commands of one decision, one record each, so that they are applied together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgpack

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import GroupId, ProducerId, TopicPartition

COMMAND_VERSION: Final = 1


class Identity(NamedTuple):
    """A producer as partitions know it: an epoch is one transaction at most (KIP-890)."""

    producer: ProducerId
    epoch: int


class Participant(NamedTuple):
    """A log that gets a marker. log: its Raft group, so a topic made anew is another."""

    place: TopicPartition
    log: GroupId


@dataclass(frozen=True, slots=True)
class Begin:
    """A producer has taken the transactional id over; `identity` is its own from now on.

    token: of the request, by which it is known when it comes again.
    """

    name: str
    identity: Identity
    timeout_ms: int
    client: str
    token: str


@dataclass(frozen=True, slots=True)
class Join:
    """These logs take part too; the first ones open the transaction."""

    name: str
    identity: Identity
    participants: tuple[Participant, ...]


@dataclass(frozen=True, slots=True)
class Decide:
    """The transaction of `identity` is committed, or aborted for this reason, for ever.

    follower: the producer's identity for its next one.
    """

    name: str
    identity: Identity
    committed: bool
    reason: str
    follower: Identity


@dataclass(frozen=True, slots=True)
class Finish:
    """Every log that takes part has its marker."""

    name: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody has used the transactional id for very long."""

    name: str


TransactionCommand = Begin | Join | Decide | Finish | Forget


def encode_command(command: TransactionCommand) -> bytes:
    """The value of one record in `__transactions`."""
    match command:
        case Begin(name, identity, timeout_ms, client, token):
            body: list[Any] = ["begin", name, *identity, timeout_ms, client, token]
        case Join(name, identity, participants):
            body = ["join", name, *identity, participants_to_fields(participants)]
        case Decide(name, identity, committed, reason, follower):
            body = ["decide", name, *identity, committed, reason, *follower]
        case Finish(name, identity):
            body = ["finish", name, *identity]
        case Forget(name):
            body = ["forget", name]
    return bytes(msgpack.packb([COMMAND_VERSION, *body]))


def decode_command(value: bytes) -> TransactionCommand:
    """Raise `CorruptRecord` when the value is no command that this version knows."""
    try:
        version, kind, *body = msgpack.unpackb(value, strict_map_key=True)
        if version > COMMAND_VERSION:
            raise CorruptRecord(
                f"A command of a transaction has version {version}; this program reads up to"
                f" {COMMAND_VERSION}. Run a newer aegis-cluster."
            )
        return _decode(kind, body)
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise CorruptRecord(f"A record of `__transactions` is no command: {error}.") from error


def _decode(kind: str, body: list[Any]) -> TransactionCommand:
    match kind, body:
        case "begin", [
            str(name),
            int(number),
            int(epoch),
            int(timeout_ms),
            str(client),
            str(token),
        ]:
            return Begin(name, _identity(number, epoch), timeout_ms, client, token)
        case "join", [str(name), int(number), int(epoch), list(rows)]:
            return Join(name, _identity(number, epoch), participants_from_fields(rows))
        case "decide", [str(name), int(number), int(epoch), bool(committed), str(reason), *next_]:
            follower = _identity(*next_[:2])
            return Decide(name, _identity(number, epoch), committed, reason, follower)
        case "finish", [str(name), int(number), int(epoch)]:
            return Finish(name, _identity(number, epoch))
        case "forget", [str(name)]:
            return Forget(name)
    raise CorruptRecord(f"The transaction command {kind!r} is unknown to this version.")


def _identity(number: int, epoch: int) -> Identity:
    return Identity(ProducerId(number), epoch)


def participants_to_fields(participants: tuple[Participant, ...]) -> list[list[Any]]:
    return [[*place, log] for place, log in participants]


def participants_from_fields(rows: list[Any]) -> tuple[Participant, ...]:
    return tuple(
        Participant(TopicPartition(topic, partition), GroupId(log))
        for topic, partition, log in rows
    )
