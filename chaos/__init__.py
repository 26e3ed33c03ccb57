"""Ways to break the system, and what runs them; `aegis_cluster.testing` has the parts.

`soak` runs seed after seed; `scenarios` has the scripts of published failures.
"""
