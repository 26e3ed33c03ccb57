"""Erasing what events say of a person, without changing any log: their key is destroyed.

The idea (crypto-shredding): the data of an event that is about a *subject* is encrypted with a key
of that subject, which stands in a file beside the log. Once the key is gone nobody can read that
data any more, in no replica, backup or snapshot of the log; versions and positions stay.

The rule it protects: a key that is destroyed never comes back under its subject's name.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import CorruptRecord, Misuse, Refused

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

NONCE_BYTES: Final = 12
KEY_BITS: Final = 256


class SubjectErased(Refused):
    """The subject's key was destroyed: nothing more is kept about it under that name."""


class Erased:
    """Stands for data that cannot be read: its subject's key was destroyed, or the store that reads
    it has no keys of subjects."""

    def get(self, _name: str, default: Any = None) -> Any:
        """As of a mapping without any entry, for `apply` methods that ask for fields."""
        return default

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "ERASED"


ERASED: Final = Erased()


class SubjectKeys:
    """Keys of subjects in a SQLite file, which belongs in as few backups as possible.

    Needs the extra `crypto` (`pip install aegis-cluster[crypto]`). May be used from any thread.
    """

    def __init__(self, path: str | Path) -> None:
        """Raise `Misuse` where the package `cryptography` is not installed."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise Misuse(
                "Keys of subjects need the package cryptography: pip install aegis-cluster[crypto]."
            ) from None
        self._cipher = AESGCM
        self._lock = threading.Lock()
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        os.close(descriptor)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS subject_key (subject TEXT PRIMARY KEY, secret BLOB)"
        )

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def destroy(self, subject: str) -> None:
        """Erase a subject: its key is overwritten, and none is made under that name again."""
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO subject_key VALUES (?, NULL)", (subject,))

    def encrypt(self, subject: str, event_id: UUID, data: bytes) -> bytes:
        """Under the subject's key, which is made when there is none. Raises `SubjectErased`."""
        key = self._key(subject, make=True)
        if key is None:
            raise SubjectErased(
                f"The key of subject {subject!r} was destroyed; nothing more is stored about it.",
                subject=subject,
            )
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed: bytes = self._cipher(key).encrypt(nonce, data, _bound_to(subject, event_id))
        return nonce + sealed

    def decrypt(self, subject: str, event_id: UUID, data: bytes) -> bytes | None:
        """What was encrypted; None once the key is gone. Raises `CorruptRecord`."""
        key = self._key(subject, make=False)
        if key is None:
            return None
        nonce, sealed = data[:NONCE_BYTES], data[NONCE_BYTES:]
        try:
            plain: bytes = self._cipher(key).decrypt(nonce, sealed, _bound_to(subject, event_id))
        except Exception as error:
            raise CorruptRecord(
                f"The data of event {event_id} does not fit the key of subject {subject!r}."
            ) from error
        return plain

    def _key(self, subject: str, *, make: bool) -> bytes | None:
        with self._lock:
            if make:
                self._db.execute(
                    "INSERT OR IGNORE INTO subject_key VALUES (?, ?)",
                    (subject, self._cipher.generate_key(KEY_BITS)),
                )
            row = self._db.execute(
                "SELECT secret FROM subject_key WHERE subject = ?", (subject,)
            ).fetchone()
            return None if row is None else row[0]


def _bound_to(subject: str, event_id: UUID) -> bytes:
    """Sealed data counts for this event and subject alone."""
    return event_id.bytes + subject.encode()
