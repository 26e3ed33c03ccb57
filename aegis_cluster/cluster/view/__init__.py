"""The cluster view: soft state that all nodes share, and leases; hosted by each node's supervisor.

Announcements (which node and which shards run where, since when, under what load) and requests for
leases go in; the same table comes out on every node. PySyncObj replicates it, over ZeroMQ sockets
of our own, in memory only. `leases`, `table` and `frames` are pure; `replica` and `transport` stand
around the library; `view` is what a supervisor drives.

What it must never do: cost anybody data. Nothing on a safety path reads it: routing, failover and
the replicas in `status` come from shard links and Raft, and whoever acts under a lease is fenced by
the log. A view that is wrong, split or gone costs the load figures and the leases until it has
healed, which it does by itself: everybody announces again each second, and a copy that differs is
thrown away. Nothing that arrives is ever unpickled (`no_pickle`).
"""
