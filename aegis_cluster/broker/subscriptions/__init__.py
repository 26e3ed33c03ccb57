"""Persistent subscriptions: single messages of a topic, handed to competing consumers.

A subscription's state is folded over one partition of the internal topic `__subscriptions`; that
partition's leader coordinates it. In come reports of what the topic holds, polls and
acknowledgements; out go leases: which consumer may handle which message, for how long.

- `commands`: what the log holds. `ranges`, `subscription_table`: the state that it folds to (the
  same on every replica). `subscription_stm`: the fold.
- `lanes`: the order in which messages may be handed out. `dispatcher`: who holds what now, and
  until when; pure, in memory alone, made anew by each coordinator.
- `subscription_coordinator`: requests and time to commands; `frontend`: the shard's side of it.

The coordinator never reads a message: consumers tell it which offsets there are (and a hash of
each key, where the order depends on keys), and read what they are given from the topic's leaders.

What it must never do: hand out a message that was acknowledged, hand one out before its delivery
count is durable, or take an acknowledgement from a consumer whose lock is gone.
"""
