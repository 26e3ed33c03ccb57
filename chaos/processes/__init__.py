"""Chaos on real processes: what the simulator cannot model, because it is not simulated.

In goes a seed, out comes a directory with a history and a verdict: `schedule` draws what happens
when, `cluster` runs real nodes, `links` stands between all of them, `faults` does what the
schedule says, `client` runs `workloads` and writes down what it saw (`recording`), and `checks`
judges that history and nothing else. `run` puts these together; `soak` does it for hours;
`failover` measures how long writes stand still.

The rule it protects: a history never says more than a client could know. Nothing in the product
knows of this room: nodes run the product's own code, with other addresses to connect to, a slower
disk or a planted mistake put under it by `injection`.
"""
