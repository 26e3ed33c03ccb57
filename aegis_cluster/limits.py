"""Every limit of the system, and the relations between them, checked at import.

The rule it protects: every queue, retry, cache, message and batch has a bound, so memory is
bounded whatever others do. Bytes unless the name says otherwise.
"""

from __future__ import annotations

from typing import Final

from aegis_cluster.errors import invariant

KIB: Final = 1024
MIB: Final = 1024 * 1024

# Records, batches and topics
MESSAGE_BYTES_DEFAULT: Final = 1 * MIB
MESSAGE_BYTES_MAX: Final = 8 * MIB
BATCH_BYTES_DEFAULT: Final = 256 * KIB
BULK_BATCH_BYTES: Final = 1 * MIB
"""Of records that come many at once: nobody waits for a batch to fill (decision 0070)."""
BATCH_BYTES_MAX: Final = MESSAGE_BYTES_MAX + 64 * KIB
"""A batch holds at least one record of the largest size, and its header."""
BATCH_RECORDS_MAX: Final = 100_000
RECORD_HEADERS_MAX: Final = 1_000
TOPIC_NAME_CHARS_MAX: Final = 249
TOPIC_PARTITIONS_MAX: Final = 10_000
REPLICATION_FACTOR_MAX: Final = 7
PAYLOAD_DEPTH_MAX: Final = 64

# Frames and requests
ANNOTATION_BYTES_MAX: Final = 60 * KIB
FRAME_BYTES_MAX: Final = BATCH_BYTES_MAX + ANNOTATION_BYTES_MAX + KIB
CONTROL_PART_BYTES_MAX: Final = 4 * MIB
"""The msgpack part of one request or reply; also a whole metadata answer."""
REQUEST_PARTS_MAX: Final = 1_024
REQUEST_BYTES_MAX: Final = 64 * MIB
FETCH_BYTES_DEFAULT: Final = 4 * MIB
FETCH_BYTES_MAX: Final = 32 * MIB
FETCH_WAIT_MS_MAX: Final = 30_000

# Idempotent producers
PRODUCER_WINDOW_BATCHES: Final = 16
"""Batches in flight, and remembered for repeats, per producer and partition."""
PRODUCERS_PER_PARTITION_MAX: Final = 10_000
PRODUCER_ID_BLOCK: Final = 1_000

# Change feeds
FEED_MARK_BYTES_MAX: Final = 16 * KIB
"""What a source may want to find again beside its position; it stands in every frame's note."""

# Transactions
TRANSACTIONAL_ID_CHARS_MAX: Final = 255
TRANSACTION_TIMEOUT_MS_DEFAULT: Final = 60_000
TRANSACTION_TIMEOUT_MS_MIN: Final = 1_000
TRANSACTION_TIMEOUT_MS_MAX: Final = 15 * 60_000
TRANSACTION_PARTICIPANTS_MAX: Final = 10_000
"""Partitions of one transaction, those of groups included."""
TRANSACTIONAL_ID_EXPIRY_MS: Final = 7 * 24 * 3_600_000
"""An id that nobody has used for so long is forgotten, with what became of its transactions."""
MARKERS_PER_CALL_MAX: Final = 1_000
OPEN_TRANSACTIONS_PER_PARTITION_MAX: Final = 1_000
ABORTED_PER_FETCH_MAX: Final = 1_000
"""Aborted ranges that the answer to one fetch tells of, for each partition."""

# Consumer groups
INTERNAL_PARTITIONS: Final = 8
"""Of each internal topic but `__cluster`; never changed."""
GROUP_NAME_CHARS_MAX: Final = 255
GROUP_MEMBERS_MAX: Final = 1_000
GROUP_TOPICS_MAX: Final = 1_000
"""Names and patterns that one member follows."""
GROUP_COMMIT_POSITIONS_MAX: Final = 10_000
SESSION_TIMEOUT_MS_MIN: Final = 1_000
SESSION_TIMEOUT_MS_MAX: Final = 3_600_000
REBALANCE_TIMEOUT_MS: Final = 5 * 60_000
"""A member that does not give up what it was told to for so long is taken out of its group."""

# The event store
STREAM_NAME_CHARS_MAX: Final = 255
EVENTS_PER_APPEND_MAX: Final = 3_000
"""Their ids stand in the annotation of one frame."""
STREAMS_PER_APPEND_MAX: Final = 100
STREAMS_PER_PARTITION_MAX: Final = 2_000_000
"""Names, and how far each is, are kept in memory by every replica."""
EVENT_IDS_REMEMBERED: Final = 65_536
"""Of each partition: a repeat of one of the newest events is known as such, whatever was expected
of its stream."""
EVENT_READ_BYTES_MAX: Final = 4 * MIB
"""Frames of one stream in one answer; the client asks for the rest."""
EVENT_READS_WAITING_MAX: Final = 1_000
"""Of one shard, for its index to have what they ask for."""

# Persistent subscriptions
ACK_TIMEOUT_MS_MIN: Final = 100
ACK_TIMEOUT_MS_MAX: Final = 12 * 3_600_000
SUBSCRIPTION_IN_FLIGHT_MAX: Final = 10_000
"""Messages that one consumer may hold, and settle in one request."""
SUBSCRIPTION_UNSETTLED_MAX: Final = 100_000
"""Messages of one subscription that were handed out and are not settled."""
SUBSCRIPTION_PARKED_MAX: Final = 100_000
SUBSCRIPTION_READY_MAX: Final = 20_000
"""Messages that a coordinator knows of ahead of their hand-out; nearly, by one report more for each
partition."""
SUBSCRIPTION_REPORT_OFFSETS_MAX: Final = 4_096
SUBSCRIPTION_CONSUMERS_MAX: Final = 1_000
SUBSCRIPTION_SESSIONS_KEPT: Final = 1_000
"""Consumers whose last settling request is remembered, for its repeat."""
SUBSCRIPTION_BURIALS_MAX: Final = 500
"""Dead letters that are written in one transaction."""

# What ZeroMQ may hold of others' connections before it is taken
READ_AHEAD_BYTES_MAX: Final = 128 * MIB
"""Of one connection; a client has some requests of 4 MiB under way for each of its producers."""
READ_AHEAD_BYTES_TOTAL_MAX: Final = 256 * MIB
"""Of one listener; beyond it, the connection with the most is cut."""
READ_AHEAD_LOOK_MS: Final = 20

# A shard
CONNECTIONS_MAX: Final = 10_000
"""Clients that one shard remembers; the longest idle ones have to greet again."""
UNMARKED_BYTES_MAX: Final = 32 * KIB
"""Answers to each connection that may wait unseen by the counts below."""

# What clients make a shard hold. Each sum has a limit for one client, one for all, a share that
# every client has of its own once the others have used that up, and a limit for these together.
CLIENT_IN_FLIGHT_BYTES_MAX: Final = 32 * MIB
"""Produce bytes that wait for their commit; also how long a write may wait behind others'. One
request of any size may go if it is its client's only one."""
SHARD_IN_FLIGHT_BYTES_MAX: Final = 128 * MIB
CLIENT_IN_FLIGHT_BYTES_OWN: Final = 1 * MIB
SHARD_IN_FLIGHT_BYTES_OWN: Final = 64 * MIB
CLIENT_ANSWER_BYTES_MAX: Final = 32 * MIB
"""Answers that are being read from disk or have not left the process."""
SHARD_ANSWER_BYTES_MAX: Final = 128 * MIB
CLIENT_ANSWER_BYTES_OWN: Final = 256 * KIB
SHARD_ANSWER_BYTES_OWN: Final = 128 * MIB
FETCH_ITEMS_WAITING_PER_CLIENT_MAX: Final = 16_384
"""Partitions in fetches that wait."""
FETCH_ITEMS_WAITING_MAX: Final = 131_072
FETCH_ITEMS_WAITING_PER_CLIENT_OWN: Final = 64
FETCH_ITEMS_WAITING_OWN: Final = 65_536
FETCHES_WAITING_PER_CLIENT_MAX: Final = 256
CLIENT_QUESTION_BYTES_MAX: Final = 1 * MIB
"""Requests other than produce and fetch that wait for their answer, as they stand in memory."""
SHARD_QUESTION_BYTES_MAX: Final = 32 * MIB
CLIENT_QUESTION_BYTES_OWN: Final = 64 * KIB
SHARD_QUESTION_BYTES_OWN: Final = 64 * MIB
SHARD_DRAIN_BYTES: Final = 16 * MIB
SHARD_DRAIN_MESSAGES: Final = 512
SHARD_DRAIN_MS: Final = 20
"""For the messages of one socket of clients in one turn, whatever they ask for."""
FETCHES_PER_TURN: Final = 256
"""Fetches that one turn looks at again because there is news; the others have the next turn."""
LOOK_UPS_PER_TURN: Final = 64
"""Offsets of a time, each of which reads a stretch of a file."""
REQUESTS_WAITING_MAX: Final = 4_096
"""Of all clients of one shard together, for metadata or for a producer id."""
REQUEST_WAIT_MS_MAX: Final = 60_000
LINK_QUEUE_BYTES_MAX: Final = 64 * MIB
TAIL_CACHE_BYTES: Final = 128 * MIB
"""Recent frames of all partitions of one shard, kept in memory."""

# Raft
RAFT_TICK_MS: Final = 50
RAFT_HEARTBEAT_TICKS: Final = 2
RAFT_ELECTION_TICKS_MIN: Final = 10
RAFT_ELECTION_TICKS_MAX: Final = 20
RAFT_APPEND_BYTES_MAX: Final = 4 * MIB
RAFT_IN_FLIGHT_APPENDS_MAX: Final = 64
RAFT_IN_FLIGHT_BYTES_MAX: Final = 16 * MIB

# Storage
SEGMENT_BYTES_MAX: Final = 128 * MIB
JOURNAL_BYTES: Final = 64 * MIB
PAGE_CACHE_BYTES_DEFAULT: Final = 16 * MIB
PAGE_CACHE_STEP_BYTES: Final = 4 * MIB
"""Given back at a time: a log gives nothing back before it has so much more than it keeps."""
INDEX_INTERVAL_BYTES: Final = 64 * KIB
CHECKPOINT_INTERVAL_MS: Final = 1_000
RESERVE_BYTES: Final = 16 * MIB
SCRUB_BYTES_PER_READ: Final = 1 * MIB
SCRUB_EVERY_MS: Final = 500
COMPACTION_KEYS_MAX: Final = 500_000
"""Keys that one pass of compaction remembers, at about 200 bytes; the next pass goes on."""
TOMBSTONE_RETENTION_MS_DEFAULT: Final = 24 * 3_600_000
"""Stored frames are proved again at 2 MiB a second at most, by each shard."""
SNAPSHOT_CAPTURES_MAX: Final = 16
"""States of one shard that others are fetching, each as it was when they began."""
SYNC_BEHIND_MS: Final = 100
"""With `durability = "memory"`: from one sync to the next, so about what a power cut may take."""
ROUNDS_BEHIND_MAX: Final = 128
"""Rounds of writes that may wait for it."""

# A node and its supervisor
SHARDS_PER_NODE_MAX: Final = 32
NODES_LOCAL_MAX: Final = 32
"""Nodes that `cluster up` starts on one machine."""
RESTART_BACKOFF_MS_MIN: Final = 100
RESTART_BACKOFF_MS_MAX: Final = 5_000
RESTART_CALM_MS: Final = 30_000
"""A shard that lived this long starts its back-off anew."""
RESTART_CONFIG_TRIES_MAX: Final = 10
"""Restarts in a row of a shard that says its settings or ports are wrong."""
STEP_ASIDE_MS: Final = 3_000
"""For leaders to hand over before their shard is told to end."""
SHARD_STOP_MS: Final = 5_000
"""For a shard to end by itself once told, before it is killed."""
NODE_STOP_MS: Final = 12_000
"""For a whole node to end by itself, before it is killed."""
NODE_LOG_BYTES_MAX: Final = 8 * MIB
"""One file of a node's log; the one before it is kept."""
NODE_LOG_LINE_BYTES_MAX: Final = 16 * KIB
NODE_LOG_QUEUE_LINES: Final = 4_096

# The cluster view and its leases
VIEW_OP_BYTES_MAX: Final = 32 * KIB
"""One command of the view's log; what is larger travels in pieces, which the library mishandles."""
VIEW_SNAPSHOT_BYTES_MAX: Final = 16 * MIB
VIEW_NODES_MAX: Final = 256
VIEW_REQUESTS_WAITING_MAX: Final = 64
"""Commands that one node has waiting for the view's log."""
VIEW_ANSWER_BYTES_MAX: Final = 128 * KIB
"""What a supervisor tells one of its shards at once: one packet of a socket pair."""
LEASES_MAX: Final = 1_000
LEASE_TTL_MS_MIN: Final = 5_000
LEASE_TTL_MS_MAX: Final = 300_000
LEASE_HOLDER_SHARE: Final = 0.9
"""Of the time a lease was asked for, on the holder's own clock, after which the holder stops."""

# Keys
KEY_FILE_BYTES_MAX: Final = 4 * KIB
KEYS_PER_LIST_MAX: Final = 10_000
"""Clients that one node accepts by name; further files are told and ignored."""
REFUSED_KEYS_TOLD_MAX: Final = 1_000
"""Keys whose refusal is remembered, so that each is logged once and not at every try."""

# A client
CLIENT_BUFFER_BYTES_DEFAULT: Final = 64 * MIB
REQUEST_TIMEOUT_MS_DEFAULT: Final = 30_000
LINKS_PER_CLIENT_MAX: Final = 4_096

# Stream processing
STREAM_WINDOW_VALUES_MAX: Final = 1_000_000
"""Values of one window of one key that are kept one by one, unless the window says otherwise."""
STREAM_CACHE_ENTRIES_MAX: Final = 100_000
"""Decoded values of one step of one task that are kept in memory besides those that changed."""
STREAM_KEYS_REMEMBERED: Final = 65_536
"""Of a process, as bytes."""
STREAM_STORE_ROWS_WAITING: Final = 20_000
"""Rows of one task that wait to be written to its file."""
STREAM_STORE_BYTES_CACHED: Final = 16 * MIB
"""Pages of one task's file that SQLite keeps in memory."""
STREAM_RESTORE_ROWS: Final = 200_000
"""Of a changelog that are read before they are written to a task's file."""
STREAM_CYCLE_RECORDS_MAX: Final = 20_000
"""Records that are processed between two commits."""

# The command line
PUBLISH_ROWS_MAX: Final = 4_000
"""Rows that `aegis publish` has read and not yet published."""
PUBLISH_CHUNK_ROWS: Final = 2_000
"""Rows of one `publish_many`; the next ones are read meanwhile."""

invariant(
    2 * OPEN_TRANSACTIONS_PER_PARTITION_MAX <= PRODUCERS_PER_PARTITION_MAX,
    "a producer with an open transaction is never forgotten",
)
invariant(MESSAGE_BYTES_DEFAULT <= MESSAGE_BYTES_MAX, "the default message fits the largest")
invariant(MESSAGE_BYTES_MAX < BATCH_BYTES_MAX < FRAME_BYTES_MAX, "message < batch < frame")
invariant(FRAME_BYTES_MAX <= FETCH_BYTES_MAX, "a fetch can carry the largest frame")
invariant(FRAME_BYTES_MAX <= RAFT_IN_FLIGHT_BYTES_MAX, "the largest frame can be replicated")
invariant(FETCH_BYTES_MAX <= REQUEST_BYTES_MAX, "a fetch's answer fits a message")
invariant(FETCH_BYTES_MAX <= CLIENT_ANSWER_BYTES_MAX, "one answer fits a client's share")
invariant(REQUEST_BYTES_MAX < READ_AHEAD_BYTES_MAX, "the largest request is never cut")
invariant(REQUEST_BYTES_MAX <= SHARD_IN_FLIGHT_BYTES_OWN, "the largest request finds room")
invariant(
    TOPIC_PARTITIONS_MAX <= FETCH_ITEMS_WAITING_PER_CLIENT_MAX,
    "a client may wait for a whole topic",
)
invariant(
    2 * SHARD_DRAIN_MS < RAFT_TICK_MS * RAFT_HEARTBEAT_TICKS,
    "draining the clients' sockets leaves time for a heartbeat",
)
for _client, _all, _own, _all_own in (
    (
        CLIENT_IN_FLIGHT_BYTES_MAX,
        SHARD_IN_FLIGHT_BYTES_MAX,
        CLIENT_IN_FLIGHT_BYTES_OWN,
        SHARD_IN_FLIGHT_BYTES_OWN,
    ),
    (
        CLIENT_ANSWER_BYTES_MAX,
        SHARD_ANSWER_BYTES_MAX,
        CLIENT_ANSWER_BYTES_OWN,
        SHARD_ANSWER_BYTES_OWN,
    ),
    (
        FETCH_ITEMS_WAITING_PER_CLIENT_MAX,
        FETCH_ITEMS_WAITING_MAX,
        FETCH_ITEMS_WAITING_PER_CLIENT_OWN,
        FETCH_ITEMS_WAITING_OWN,
    ),
    (
        CLIENT_QUESTION_BYTES_MAX,
        SHARD_QUESTION_BYTES_MAX,
        CLIENT_QUESTION_BYTES_OWN,
        SHARD_QUESTION_BYTES_OWN,
    ),
):
    invariant(2 * _client <= _all, "one client leaves room for others")
    invariant(_own <= _client, "a client's own share is a part of what it may have")
    invariant(50 * _own <= _all_own, "many clients find their own share")
invariant(UNMARKED_BYTES_MAX * CONNECTIONS_MAX <= 512 * MIB, "what is not counted is small")
invariant(FEED_MARK_BYTES_MAX + KIB < ANNOTATION_BYTES_MAX, "a feed's position fits a frame")
invariant(
    16 * EVENTS_PER_APPEND_MAX < ANNOTATION_BYTES_MAX, "an append's event ids fit an annotation"
)
invariant(FRAME_BYTES_MAX < JOURNAL_BYTES, "the largest frame fits the journal")
invariant(FRAME_BYTES_MAX < SEGMENT_BYTES_MAX, "the largest frame fits a segment")
invariant(
    RAFT_HEARTBEAT_TICKS * 3 <= RAFT_ELECTION_TICKS_MIN,
    "two heartbeats may be lost",
)
invariant(RAFT_ELECTION_TICKS_MIN < RAFT_ELECTION_TICKS_MAX, "elections need spread")
invariant(RESTART_BACKOFF_MS_MIN < RESTART_BACKOFF_MS_MAX < RESTART_CALM_MS, "back-off can end")
invariant(STEP_ASIDE_MS + SHARD_STOP_MS < NODE_STOP_MS, "a node is killed after its shards")
