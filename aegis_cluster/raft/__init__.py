"""Consensus as a plain object: messages and ticks in, effects out; no socket, clock or file.

In go ticks, messages of other members, proposals and news of links; out come `Effects`: what to
write, what to send, how far the log is committed. The room never does I/O, never reads a clock,
and never sees the bytes of an entry: the shell keeps those by (index, term).
"""

from aegis_cluster.raft.config import RaftConfig
from aegis_cluster.raft.core import Role
from aegis_cluster.raft.effects import Effects, HardState, SnapshotInstall, SnapshotNeed
from aegis_cluster.raft.log import RaftLog
from aegis_cluster.raft.membership import Membership, MembershipHistory
from aegis_cluster.raft.messages import (
    KIND_MEMBERSHIP,
    KIND_NOOP,
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Entry,
    Envelope,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVoteReply,
    PreVoteRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from aegis_cluster.raft.replica import Replica

__all__ = [
    "KIND_MEMBERSHIP",
    "KIND_NOOP",
    "AppendRefusal",
    "AppendReply",
    "AppendRequest",
    "Effects",
    "Entry",
    "Envelope",
    "HardState",
    "Heartbeat",
    "HeartbeatReply",
    "InstallSnapshot",
    "Membership",
    "MembershipHistory",
    "Message",
    "PreVoteReply",
    "PreVoteRequest",
    "RaftConfig",
    "RaftLog",
    "Replica",
    "Role",
    "SnapshotInstall",
    "SnapshotNeed",
    "TimeoutNow",
    "VoteReply",
    "VoteRequest",
]
