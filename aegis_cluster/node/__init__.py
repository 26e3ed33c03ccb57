"""One node: its identity, its settings and the supervisor of its shard processes.

In: a node's file (`nodes/node-1.toml`) and its data directory. Out: shard processes that run as
long as the node does, a log of what happened to them, and the commands that start and stop nodes
on this machine. It never touches a partition's files or a socket of a shard, and it forgets
nothing that decides who may vote: identity lies in a checked file, fsynced before anything runs.
"""
