"""CRC-32C against published vectors (RFC 3720, appendix B.4)."""

from __future__ import annotations

import pytest

from aegis_cluster.wire.crc import crc32c, crc32c_extend


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_published_vectors(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def test_extending_is_the_same_as_joining() -> None:
    assert crc32c_extend(crc32c(b"1234"), b"56789") == crc32c(b"123456789")
