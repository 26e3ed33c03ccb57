"""Consensus as a plain object: messages and ticks in, effects out; no socket, clock or file.

In go ticks, messages of other members, proposals and news of links; out come `Effects`: what to
write, what to send, how far the log is committed. The room never does I/O, never reads a clock,
and never sees the bytes of an entry: the shell keeps those by (index, term).

How a shell drives a `Replica`
------------------------------
Start. `Replica(config, me, term=, vote=, log=RaftLog(...), membership=, membership_entries=,
commit_index=, rng=random.Random(seed), damaged=)` from what storage recovered. `membership` is the
one in effect at the start of the log (manifest or snapshot), `membership_entries` are the
membership frames found in the log, committed or not. `rng` must differ between replicas.

Each round: drain the inbox into `receive(sender, message)`, call `propose`, `read_index` and so on,
call `tick()` if a tick is due (after a stall: inbox first, then *one* tick; missed ticks are not
made up), and then, while `has_effects`, take `effects = replica.take_effects()` and do them from
top to bottom:

1. Stage for the disk, in this order: `durable` (term and vote), `install` (replace log and state
   by the received snapshot), `truncate_from` (drop entries from there on), `append`. The bytes of
   an appended entry are those that the shell stored under (index, term): made at `propose`, or
   received with an AppendRequest. A KIND_NOOP entry whose bytes the shell does not have is the
   replica's own no-op: the shell makes its frame. `append` names fewer entries than came in if
   some were there already, and never leaves a gap.
2. `send`: hand to the transport now, before any fsync. Nothing in it needs the disk.
3. Sync. Several effects may be under way; one sync may cover many.
4. When the disk work of these effects *and of all earlier ones of this replica* is done: call
   `effects_done(effects)` and send `reply`, both in the order of `number`. Effects that need no
   disk (`needs_disk` is false) wait for earlier ones all the same. `effects_done` is how a leader
   counts itself and how a candidate votes for itself, so it is called for every effects, even
   with one replica; it can make new effects.
5. Apply entries up to `commit_index`, then call `applied(index)`. The index may lie beyond what
   is durable *here* (a majority of others has it): what is written down for the next start is
   `replica.commit_hint`, never `commit_index`, and `compact(upto)` goes no further either. Serve
   a read of `read_ready` once its index is applied; answer `read_failed` with NotLeader.
   `snapshots`: send a snapshot to that member by your own means; when the receiving shell has all
   of it, it passes `InstallSnapshot` to its replica. Call `snapshot_failed(member)` when a
   transfer is lost or given up; nothing else repeats it, but a lost link.

AppendRequest leaves the core as a range, `prev_index + 1 .. last_index`, with `entries=()`. The
sender's shell fills entries and bytes when it sends, that is, in the same round. It may shorten
the range to its byte budget (for recent entries the core knows the sizes and has respected
`append_bytes_max`; only for members far behind the range is long), but must not skip. A range
that storage no longer has is dropped; the core asks again. The receiver's shell reads the entries
back from the raw frames, checks them, stores the bytes by (index, term), and passes the request
with `entries` filled to `receive`. A request without entries is valid too.

Links. `link_lost(member)` when the connection to its shard breaks or is silent for too long (quiet
groups send nothing, so only the link tells that a leader died), after what came over it was passed
on; `link_up(member)` when there is a fresh one. Both are hints: wrong ones cost time, not safety.

Leading. Compare `role`, `term` and `leader` before and after a round to see changes; drop overlays
when `truncate_from` is set or the role changes. `serving` says that a leader may answer: its own
no-op is committed and applied. Graceful stop: `transfer_leadership()`, go on driving until `role`
is no longer leader or `transferring` is false. `propose` raises NotLeader (also while transferring)
or Throttled; it certainly did nothing then. If `damaged` turns true, tell the operator: the replica
found that it lost what it had acknowledged, and promises nothing until `mark_repaired()`.

A replica's `quiet` group needs no ticks; everything else wakes it by itself. One replica is driven
by one loop and never from inside one of its own calls.
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
