"""Aegis Cluster: topics, replicated by Raft, that survive `kill -9`."""
