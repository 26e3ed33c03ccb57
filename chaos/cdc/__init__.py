"""Chaos for change capture: a real database under load, its connectors, and the nodes that keep the
feed, all killed at random; afterwards the feed, folded, has to be the database.

`run` puts it together: `databases` are what is captured and who writes to it, `fold` is what a
reader makes of the feed and the judge, `rogue` is a connector that believes that it has the lease.

The rule it protects: the judge reads the feed as any user would, and the tables as they are.
"""
