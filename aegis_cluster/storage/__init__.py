"""The files of a shard: segments, journal, checkpoints and recovery; knows nothing of Raft."""
