"""What leaves a processor, as messages: results, records that failed, repartitioned records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.producer import Columns as Records
from aegis_cluster.errors import UnsupportedPayload
from aegis_cluster.message import Message, from_ms
from aegis_cluster.wire.payload import encode_keys, encode_payloads

if TYPE_CHECKING:
    from aegis_cluster.stream.columns import Columns, WindowBounds
    from aegis_cluster.stream.task import Dead

_TIME_MS_LEAST: Final = 0
_TEXT_CHARS_MAX: Final = 1_000


def result_message(key: Any, value: Any, time: int, window: WindowBounds | None) -> Message:
    """A result for a sink's topic; headers tell the window that it is of.

    A key that is neither text, bytes nor None becomes its JSON text. Raises `UnsupportedPayload`.
    """
    return Message(message_key(key), value, _headers(window), from_ms(max(time, _TIME_MS_LEAST)))


def result_columns(batch: Columns) -> Records | None:
    """Results for a sink's topic, encoded, where they are alike: keys of text, values of one kind,
    all of one window or none. None where each has to be looked at."""
    windows = batch.windows
    if windows is not None and windows.count(windows[0]) != len(windows):
        return None
    keys, values = encode_keys(batch.keys), encode_payloads(batch.values)
    if keys is None and batch.keys.count(None) < len(batch):
        return None
    if values is None:
        return None
    headers = values[1] + _header_rows(windows[0] if windows else None)
    times = [max(time, _TIME_MS_LEAST) for time in batch.times]
    return Records(_TIME_MS_LEAST, keys, values[0], headers, times)


def _header_rows(window: WindowBounds | None) -> list[tuple[str, bytes | None]]:
    return [(name, str(text).encode()) for name, text in _headers(window).items()]


def _headers(window: WindowBounds | None) -> dict[str, str | bytes]:
    if window is None:
        return {}
    return {
        "window-start": from_ms(window[0]).isoformat(),
        "window-end": from_ms(window[1]).isoformat(),
    }


def message_key(key: Any) -> str | bytes | None:
    """As a message can carry it. Raises `UnsupportedPayload`."""
    if key is None or isinstance(key, str | bytes):
        return key
    try:
        return json.dumps(key, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as why:
        raise UnsupportedPayload(
            f"The key {key!r:.80} cannot be the key of a message: {why}. Use text, bytes, numbers"
            " or tuples of these."
        ) from why


def dead_message(dead: Dead, topic: str, partition: int, original: Any) -> Message:
    """A record that failed, with the reason in its headers.

    original: the record as it was read, None where a window failed.
    """
    headers: dict[str, str | bytes] = {
        "error": f"{type(dead.error).__name__}: {dead.error}"[:_TEXT_CHARS_MAX],
        "step": dead.step,
        "topic": topic,
        "partition": str(partition),
        "offset": str(dead.offset),
    }
    if dead.window is not None:
        key, start, end = dead.window
        return Message(message_key(key), None, headers | _headers((start, end)))
    return Message(message_key(original.key), original.payload, headers, original.timestamp)
