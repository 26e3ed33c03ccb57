"""The Raft core: clause by clause, as conversations, against slow twins, and under chance."""
