"""Says in sentences why something makes no progress, who holds what, and what to do.

In go facts, gathered in two looks a moment apart; out come findings. The rooms of this package that
decide (`partitions`, `groups`, `subscriptions`,
`transactions`) are pure: facts in, sentences out. `gather` asks
the cluster, and asks nothing that could wait for what is broken: a shard's own words are enough.

It must never say that something is well which it has not seen.
"""
