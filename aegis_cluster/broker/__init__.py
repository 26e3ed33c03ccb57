"""One shard: the replicas it owns, the requests it answers, the loop that drives both."""
