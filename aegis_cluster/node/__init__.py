"""One node: its identity, its settings and the supervisor of its shard processes."""
