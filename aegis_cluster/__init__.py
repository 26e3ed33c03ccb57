"""Aegis Cluster: topics, replicated by Raft, that survive `kill -9`.

What users import stands here; everything below is the machine. It is imported on first use (PEP
562): a command, or a node's supervisor, loads no more than it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aegis_cluster.channel import Channel
    from aegis_cluster.engine import EngineStats, StreamingEngine
    from aegis_cluster.errors import AegisError, LockLost, OutcomeUnknown, Refused, Unauthorized
    from aegis_cluster.filters import EventFilter
    from aegis_cluster.group import (
        ConsumerGroup,
        GroupDescription,
        GroupListing,
        MemberDescription,
    )
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.keys import ClientKeys
    from aegis_cluster.message import (
        BatchReceipt,
        Message,
        Offset,
        PartitionOffsets,
        Receipt,
        ReceivedMessage,
    )
    from aegis_cluster.persistent import (
        LeasedMessage,
        ParkedMessage,
        PersistentConfig,
        PersistentSubscription,
        Strategy,
        SubscriptionDescription,
        SubscriptionListing,
    )
    from aegis_cluster.producer import Pending, Producer, ProducerConfig
    from aegis_cluster.subscribe_config import AckMode, DeliveryMode, SubscribeConfig
    from aegis_cluster.subscriber import MessageBatch, Subscriber
    from aegis_cluster.topics import TopicConfig, TopicDescription
    from aegis_cluster.transaction import Transaction, TransactionOutcome
    from aegis_cluster.transactional_ids import (
        PastOutcome,
        TransactionDescription,
        TransactionListing,
    )

__all__ = [
    "AckMode",
    "AegisError",
    "BatchReceipt",
    "Channel",
    "ClientKeys",
    "ConsumerGroup",
    "DeliveryMode",
    "EngineStats",
    "EventFilter",
    "GroupDescription",
    "GroupListing",
    "LeasedMessage",
    "LockLost",
    "MemberDescription",
    "Message",
    "MessageBatch",
    "Offset",
    "OutcomeUnknown",
    "ParkedMessage",
    "PartitionOffsets",
    "PastOutcome",
    "Pending",
    "PersistentConfig",
    "PersistentSubscription",
    "Producer",
    "ProducerConfig",
    "Receipt",
    "ReceivedMessage",
    "Refused",
    "Strategy",
    "StreamingEngine",
    "SubscribeConfig",
    "Subscriber",
    "SubscriptionDescription",
    "SubscriptionListing",
    "TopicConfig",
    "TopicDescription",
    "TopicPartition",
    "Transaction",
    "TransactionDescription",
    "TransactionListing",
    "TransactionOutcome",
    "Unauthorized",
]

_PLACES = {
    "AckMode": "aegis_cluster.subscribe_config",
    "AegisError": "aegis_cluster.errors",
    "BatchReceipt": "aegis_cluster.message",
    "Channel": "aegis_cluster.channel",
    "ClientKeys": "aegis_cluster.keys",
    "ConsumerGroup": "aegis_cluster.group",
    "DeliveryMode": "aegis_cluster.subscribe_config",
    "EngineStats": "aegis_cluster.engine",
    "EventFilter": "aegis_cluster.filters",
    "GroupDescription": "aegis_cluster.group",
    "GroupListing": "aegis_cluster.group",
    "LeasedMessage": "aegis_cluster.persistent",
    "LockLost": "aegis_cluster.errors",
    "MemberDescription": "aegis_cluster.group",
    "Message": "aegis_cluster.message",
    "MessageBatch": "aegis_cluster.subscriber",
    "Offset": "aegis_cluster.message",
    "OutcomeUnknown": "aegis_cluster.errors",
    "ParkedMessage": "aegis_cluster.persistent",
    "PartitionOffsets": "aegis_cluster.message",
    "PastOutcome": "aegis_cluster.transactional_ids",
    "Pending": "aegis_cluster.producer",
    "PersistentConfig": "aegis_cluster.persistent",
    "PersistentSubscription": "aegis_cluster.persistent",
    "Producer": "aegis_cluster.producer",
    "ProducerConfig": "aegis_cluster.producer",
    "Receipt": "aegis_cluster.message",
    "ReceivedMessage": "aegis_cluster.message",
    "Refused": "aegis_cluster.errors",
    "Strategy": "aegis_cluster.persistent",
    "StreamingEngine": "aegis_cluster.engine",
    "SubscribeConfig": "aegis_cluster.subscribe_config",
    "Subscriber": "aegis_cluster.subscriber",
    "SubscriptionDescription": "aegis_cluster.persistent",
    "SubscriptionListing": "aegis_cluster.persistent",
    "TopicConfig": "aegis_cluster.topics",
    "TopicDescription": "aegis_cluster.topics",
    "TopicPartition": "aegis_cluster.ids",
    "Transaction": "aegis_cluster.transaction",
    "TransactionDescription": "aegis_cluster.transactional_ids",
    "TransactionListing": "aegis_cluster.transactional_ids",
    "TransactionOutcome": "aegis_cluster.transaction",
    "Unauthorized": "aegis_cluster.errors",
}


def __getattr__(name: str) -> Any:
    module = _PLACES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
