"""What can go wrong in a processor, besides what the cluster refuses."""

from __future__ import annotations

from aegis_cluster.errors import AegisError, Refused


class ProcessingFailed(AegisError):
    """A step of a processor failed at a record, and its processor stops at errors.

    `details` tell the step, topic, partition and offset; `__cause__` is what was raised. The
    record is not processed: a restart begins with it again.
    """


class WindowTooLarge(Refused):
    """One window of one key has more values than its limit."""


class TopologyChanged(Refused):
    """The state of the application was written by another topology."""
