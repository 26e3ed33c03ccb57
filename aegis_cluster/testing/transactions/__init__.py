"""Transactions under the simulator: clients that use them, what they did and saw, and verdicts.

In goes a plan's `TransactionLoad`; out come a `TransactionHistory` and sentences about what is
wrong with it.

- `client`: a simulated client whose work is a generator, so that it reads from top to bottom.
  `transactional`: one with a transactional id. `member`: its place in a consumer group.
- `worker`: reads orders, moves money, writes results and the group's positions, all in one
  transaction. `teller`: moves money without a group. `auditor`: reads what is committed.
- `load`: all of these together, and the trouble that they have.
- `history`: plain data. `checks`: verdicts over it. `anomalies`: Adya's over lists.

What the verdicts must never do: know how the cluster works. They judge histories of the simulator
and of real processes alike.
"""
