"""CRC-32C (Castagnoli), the checksum of batches, frames and files.

The idea: one name for one checksum, so that the library behind it can be changed in one place.
The rule it protects: the checksum is the compiled one. A pure-Python CRC would be a thousand times
slower and turn a healthy shard into one that looks dead, so it is refused at import.

The library takes `bytes` and nothing else (no memoryview): callers slice once, where they must.
"""

from __future__ import annotations

from typing import Final

import google_crc32c

from aegis_cluster.errors import invariant

invariant(
    google_crc32c.implementation == "c",
    "google-crc32c runs without its compiled part; install a wheel for this platform",
    have=google_crc32c.implementation,
)

CRC_BYTES: Final = 4


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`, as an unsigned 32-bit number."""
    return int(google_crc32c.value(data))


def crc32c_extend(crc: int, data: bytes) -> int:
    """CRC-32C of what `crc` already covers, followed by `data`."""
    return int(google_crc32c.extend(crc, data))
