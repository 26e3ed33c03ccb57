"""What a shard asks of whoever carries its messages: ZeroMQ in a process, a queue in a simulation.

The idea: a `Shard` decides and a `Transport` moves bytes. Every call returns at once; nothing is
retried below, so every link is lossy and the state machines above expect that.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.ids import NodeId, ShardId
    from aegis_cluster.storage.compaction_job import CompactionJob, CompactionResult
    from aegis_cluster.wire.protocol import Part

T = TypeVar("T")


class PeerKey(NamedTuple):
    """One shard of one node, as an address to send to."""

    node: NodeId
    shard: ShardId


class Listener(StrEnum):
    """The sockets that a shard binds; apart, so that data never delays heartbeats."""

    PEERS = "peers"
    CONTROL = "control"
    DATA = "data"


class Transport(Protocol):
    """Fire and forget; False = it did not leave and never will."""

    def open_peer(self, key: PeerKey, endpoint: str) -> None: ...

    def close_peer(self, key: PeerKey) -> None: ...

    def send_peer(self, key: PeerKey, message: Sequence[Part]) -> bool: ...

    def reply(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> bool: ...

    def unsent(self, listener: Listener, origin: bytes) -> int:
        """Bytes of answers to one connection that have not left this process."""

    def unsent_to(self, key: PeerKey) -> int:
        """Bytes to a peer that have not left this process."""

    @property
    def unsent_total(self) -> int:
        """Bytes of answers to all connections that have not left this process, nearly."""

    def read_later(self, job: Callable[[], T], done: Callable[[T], None]) -> None:
        """Run a blocking read elsewhere and hand back its result as one more input."""

    def compact_later(
        self, job: CompactionJob, done: Callable[[CompactionResult | None], None]
    ) -> None:
        """Have one pass of compaction made elsewhere; None: it gave up, another time."""
