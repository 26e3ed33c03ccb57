"""What other libraries need to stand on Aegis Cluster; each module needs the library it is for.

`eventsourcing`: a persistence module for the library of that name (extra `eventsourcing`).

Nothing here may be imported by the rest of the package.
"""
