"""Consumer groups: who reads which partitions, and how far each group has come.

A group's state is folded over one partition of the internal topic `__groups`; that partition's
leader is the group's coordinator. In come heartbeats and commits, out go assignments.

- `commands`: what the log holds. `group_table`: the state that it folds to (the same on every
  replica). `group_stm`: that table plus what the coordinator has appended ahead of the commit.
- `assignor`, `membership`: pure decisions (who should read what; the next step of one member).
- `coordinator`: requests and time to commands; `frontend`: the shard's side of it.

What it must never do: let two members hold one partition at a time, take a commit from a process
that no longer holds the partition, or let a committed position fall by a late request.
"""
