"""Names of streams."""

from __future__ import annotations

from aegis_cluster.errors import Misuse
from aegis_cluster.limits import STREAM_NAME_CHARS_MAX
from aegis_cluster.wire.event_frames import SYSTEM_PREFIX


def check_stream(name: object) -> None:
    """Raise `Misuse` for what is no name of a stream."""
    if not isinstance(name, str) or not 1 <= len(name) <= STREAM_NAME_CHARS_MAX:
        raise Misuse(
            f"A stream's name is a text of 1 to {STREAM_NAME_CHARS_MAX} characters, not"
            f" {str(name)[:300]!r}."
        )
    if name.startswith(SYSTEM_PREFIX):
        raise Misuse(f"{name!r}: names that begin with '$' are the store's own. Use another one.")
    if name.endswith("*"):
        raise Misuse(f"{name!r}: a '*' at the end stands for many streams, so no name ends so.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Misuse(f"{name!r} is no text that UTF-8 can hold.") from None
