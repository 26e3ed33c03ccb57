"""Transactions: writes to several partitions, and positions of groups, all of them or none.

The state of each transactional id is folded over one partition of the internal topic
`__transactions`; that partition's leader is its coordinator. In come the requests of producers, out
go markers to every log that takes part: partitions of topics, and of `__groups` for positions.

- `commands`: what the log holds. `transaction_table`: the state that it folds to, the same on every
  replica. `transaction_stm`: that table plus what the coordinator has appended ahead of the
  commit.
- `decisions`: pure: what a request, or time, leads to.
- `transaction_coordinator`: requests and time to commands, and decided transactions to their
  markers; `markers`: the way of a marker to its partition; `frontend`: the shard's side of it all.

What it must never do: send a marker before the decision that it carries is durable, decide twice,
or let a producer go on that a newer one has replaced.
"""
