"""Consensus as a plain object: messages and ticks in, effects out; no socket, clock or file."""
