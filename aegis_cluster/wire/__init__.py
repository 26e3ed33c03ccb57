"""Bytes in, values out: every format and message, with its version; knows no file and no socket.

What comes in are bytes that nobody vouches for. Out come values, or one typed error: CorruptRecord
for what was stored, InvalidBatch or MessageTooLarge for what a client wants to store, PeerViolation
for what a peer or client said. Memory is bounded on any input, and golden files prove that old
bytes still read.

Frames and headers (`frame`, `layout`, `crc`) are all that storage and the data path need; records,
their compression and payloads (`batch`, `records`, `compression`, `payload`) are for clients.
"""
