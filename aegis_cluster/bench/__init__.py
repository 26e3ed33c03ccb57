"""The benchmark: three nodes on this machine, beside what the machine itself can do.

What goes in: which scenarios, how long, how often. What comes out: one figure a scenario (median of
its runs, smallest and largest), each also as a share of a limit of this machine that was measured
in the same run; as a table, JSON and a plot.

It stands on what users have: the engine, and the nodes of one directory. It must never measure
something that a program of theirs could not do, and never report records that cannot be read back.
"""
