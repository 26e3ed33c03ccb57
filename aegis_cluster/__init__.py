"""Aegis Cluster: topics, replicated by Raft, that survive `kill -9`.

What users import stands here; everything below is the machine.
"""

from aegis_cluster.engine import StreamingEngine, TopicConfig, TopicDescription
from aegis_cluster.errors import AegisError, OutcomeUnknown, Refused
from aegis_cluster.message import (
    BatchReceipt,
    Message,
    Offset,
    PartitionOffsets,
    Receipt,
    ReceivedMessage,
)
from aegis_cluster.subscriber import SubscribeConfig, Subscriber

__all__ = [
    "AegisError",
    "BatchReceipt",
    "Message",
    "Offset",
    "OutcomeUnknown",
    "PartitionOffsets",
    "Receipt",
    "ReceivedMessage",
    "Refused",
    "StreamingEngine",
    "SubscribeConfig",
    "Subscriber",
    "TopicConfig",
    "TopicDescription",
]
