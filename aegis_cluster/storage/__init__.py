"""The files of a shard: segments, journal, checkpoints and recovery; knows nothing of Raft.

In go frames, truncations and hard state of many groups; out come durable indexes, reads and, after
a restart, what was durable. The room must never call anything durable before its fdatasync came
back, never cut or delete what lies at or below its own durable watermark, and never use its files
again once the disk refused a write or a sync.
"""
