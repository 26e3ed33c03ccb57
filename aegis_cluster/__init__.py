"""Aegis Cluster: topics, replicated by Raft, that survive `kill -9`.

What users import stands here; everything below is the machine.
"""

from aegis_cluster.channel import Channel
from aegis_cluster.engine import EngineStats, StreamingEngine
from aegis_cluster.errors import AegisError, OutcomeUnknown, Refused, Unauthorized
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
from aegis_cluster.producer import Pending, Producer, ProducerConfig
from aegis_cluster.subscribe_config import AckMode, DeliveryMode, SubscribeConfig
from aegis_cluster.subscriber import MessageBatch, Subscriber
from aegis_cluster.topics import TopicConfig, TopicDescription

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
    "MemberDescription",
    "Message",
    "MessageBatch",
    "Offset",
    "OutcomeUnknown",
    "PartitionOffsets",
    "Pending",
    "Producer",
    "ProducerConfig",
    "Receipt",
    "ReceivedMessage",
    "Refused",
    "StreamingEngine",
    "SubscribeConfig",
    "Subscriber",
    "TopicConfig",
    "TopicDescription",
    "TopicPartition",
    "Unauthorized",
]
