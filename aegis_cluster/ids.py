"""The numbers of the system, each with a type of its own, so that no two can be swapped.

The rule it protects: an index (one per frame) is never used where an offset (one per record) is
meant, and a node is never named without its incarnation where votes are counted.
"""

from __future__ import annotations

from typing import Final, NamedTuple, NewType

NodeId = NewType("NodeId", int)
"""A member of the cluster, 1-based."""

ShardId = NewType("ShardId", int)
"""One worker process of a node, 0-based."""

GroupId = NewType("GroupId", int)
"""One Raft group, handed out by the metadata and never used again, so a topic that is deleted and
made anew is another group."""

LogIndex = NewType("LogIndex", int)
"""Position of a frame in the Raft log: 1-based, one per frame of any kind."""

Term = NewType("Term", int)
"""Raft epoch of leadership; clients see the same number as *leader epoch* (KIP-101)."""

RecordOffset = NewType("RecordOffset", int)
"""Position of a record as clients see it: 0-based, dense."""

ProducerId = NewType("ProducerId", int)
"""Identity of one idempotent producer (KIP-98)."""

METADATA_GROUP: Final = GroupId(0)
"""The group of `__cluster/0`."""

METADATA_TOPIC: Final = "__cluster"
METADATA_VOTERS: Final = 3
"""Of `__cluster/0`, where there are so many nodes: the first shards of the first three."""

GROUPS_TOPIC: Final = "__groups"
"""Its partitions hold the consumer groups."""

SUBSCRIPTIONS_TOPIC: Final = "__subscriptions"
"""Its partitions hold the persistent subscriptions."""

TRANSACTIONS_TOPIC: Final = "__transactions"
"""Its partitions hold the state of transactional ids."""

TRANSACTIONAL_TOPICS: Final = (GROUPS_TOPIC, SUBSCRIPTIONS_TOPIC)
"""Those of the cluster's own that a transaction may have a part in."""

INTERNAL_TOPICS: Final = (GROUPS_TOPIC, SUBSCRIPTIONS_TOPIC, TRANSACTIONS_TOPIC)
"""Those that the controller makes on first use."""

NO_INDEX: Final = LogIndex(0)
"""Before the first frame."""


class Member(NamedTuple):
    """A voter or learner: a node *with* the incarnation of its formatted directory.

    A node whose disk was wiped comes back with another incarnation, so it is another member and
    cannot vote twice under its old name (KIP-853's directory id).
    """

    node: NodeId
    incarnation: str


class TopicPartition(NamedTuple):
    """One ordered log of a topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"
