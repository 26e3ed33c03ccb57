"""The event store's part of a shard: appends with expected versions, and streams read by name.

In come appends (streams, what is expected of each, one batch) and questions about a stream; out go
frames whose annotation names streams and versions, and the frames that hold a stream. `event_stm`
decides and folds, `stream_index` finds the frames of a stream, `frontend` speaks to clients.

It must never look into a batch, nor believe the index: what is read is compared with the frames.
"""
