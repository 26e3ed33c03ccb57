"""Reads records out of files: CSV, JSON Lines or plain lines, plain or gzipped, one at a time.

The idea: a file is a stream of lines with numbers; a format turns lines into rows; a row is what
becomes a message. Nothing is held but the row at hand, so a file of any size passes through, and
progress counts the bytes of the file as it lies on disk, compressed or not.

The rule it protects: a file is published as it is or not at all. What does not read (bad UTF-8, a
ragged row, broken JSON, a gzip stream that stops in the middle) is a sentence with the line's
number; nothing is skipped, guessed or replaced.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from aegis_cluster import limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FORMATS: Final = ("csv", "jsonl", "lines")
STANDARD_INPUT: Final = "-"

_SUFFIXES: Final = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_GZIP_MAGIC: Final = b"\x1f\x8b"
LINE_BYTES_MAX: Final = limits.MESSAGE_BYTES_MAX
"""A line becomes at most one message, so a longer one could not be published anyway."""


class BadInput(Exception):
    """The input does not read; `line` is where, 1-based, or None for the file as a whole."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what if line is None else f"line {line}: {what}")
        self.line = line


class Row(NamedTuple):
    """One record of the input."""

    line: int
    """The line it starts on, 1-based."""
    value: Any
    """A dict of texts (CSV), a JSON value (JSON Lines) or a text (plain lines)."""


class Source:
    """An open input: its bytes, unpacked, and how far it has been read."""

    def __init__(self, raw: BinaryIO | io.RawIOBase, name: str, size: int | None) -> None:
        self.name = name
        self.size = size
        """Bytes on disk; None when that is not known beforehand."""
        self._raw = _Counted(raw)
        buffered = io.BufferedReader(self._raw, 256 * limits.KIB)
        packed = buffered.peek(2)[:2] == _GZIP_MAGIC
        self.stream: io.BufferedIOBase = gzip.GzipFile(fileobj=buffered) if packed else buffered

    @property
    def position(self) -> int:
        """Bytes of the file read so far, as they lie on disk."""
        return self._raw.count


class _Counted(io.RawIOBase):
    """Counts what is read; unlike `tell`, it works for pipes."""

    def __init__(self, raw: BinaryIO | io.RawIOBase) -> None:
        super().__init__()
        self._source = raw
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # `read1`, where there is one, returns what a pipe has now and does not wait for more.
        read = getattr(self._source, "read1", self._source.read)
        chunk = read(len(buffer))
        buffer[: len(chunk)] = chunk
        self.count += len(chunk)
        return len(chunk)


@contextmanager
def open_source(name: str) -> Iterator[Source]:
    """A file, or standard input for "-"."""
    if name == STANDARD_INPUT:
        # Not `sys.stdin`: its lock would be held by a read that never ends when the program does.
        yield Source(io.FileIO(0, closefd=False), "standard input", None)
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 - closed below, after the error is named
    except OSError as error:
        raise BadInput(f"cannot be opened: {error.strerror}") from error
    with file:
        yield Source(file, name, Path(name).stat().st_size)


def format_of(name: str) -> str:
    """The format that a file's name promises; plain lines when it promises nothing."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1], "lines") if suffixes else "lines"


def read_rows(source: Source, kind: str) -> Iterator[Row]:
    """The rows of a source in order; raises BadInput at the first that does not read."""
    lines = _lines(source.stream)
    if kind == "csv":
        return _csv_rows(lines)
    if kind == "jsonl":
        return _json_rows(lines)
    return (Row(number, text.removesuffix("\n").removesuffix("\r")) for number, text in lines)


class KeyField:
    """Takes the key of a row out of one of its fields.

    An empty field means no key, and so does any of `none_values` (data sets write "NA" or "-").
    """

    def __init__(self, field: str | None, none_values: Iterable[str] = ()) -> None:
        self.field = field
        self._none_values = frozenset(none_values) | {""}

    def of(self, row: Row) -> str | None:
        """The key of this row; None for no key."""
        if self.field is None:
            return None
        if not isinstance(row.value, dict):
            raise BadInput("is no object, so it has no field for the key", row.line)
        if self.field not in row.value:
            known = ", ".join(row.value) or "none"
            raise BadInput(
                f"has no field {self.field!r} for the key; its fields: {known}", row.line
            )
        key = row.value[self.field]
        if isinstance(key, bool) or not isinstance(key, str | int | None):
            raise BadInput(
                f"the key {json.dumps(key)} is neither text nor a whole number", row.line
            )
        text = "" if key is None else str(key)
        return None if text in self._none_values else text


def _lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, str]]:
    """Decoded lines with their ends, numbered from 1; a byte order mark is no part of the first."""
    number = 0
    while True:
        try:
            raw = stream.readline(LINE_BYTES_MAX + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadInput(f"the gzip data is damaged or cut: {error}", number + 1) from error
        except OSError as error:
            raise BadInput(f"cannot be read: {error.strerror}", number + 1) from error
        if not raw:
            return
        number += 1
        if len(raw) > LINE_BYTES_MAX:
            raise BadInput(f"is longer than {LINE_BYTES_MAX} bytes", number)
        yield number, _decoded(raw, number)


def _decoded(raw: bytes, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"is not UTF-8: byte {error.start + 1} is wrong", number) from error


# CSV


class _CsvLines:
    """Feeds the csv module line by line and knows where the row at hand began."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self.first = 0
        """The first line of the row at hand; 0 before any of it was read."""

    def __iter__(self) -> Iterator[str]:
        for number, text in self._lines:
            self.first = self.first or number
            yield text


def _csv_rows(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    csv.field_size_limit(LINE_BYTES_MAX)
    feed = _CsvLines(lines)
    rows = _csv_fields(feed)
    header = next(rows, None)
    if header is None:
        return
    _check_header(header)
    names = header.value
    for line, fields in rows:
        if len(fields) != len(names):
            raise BadInput(f"has {len(fields)} fields, the header has {len(names)}", line)
        yield Row(line, dict(zip(names, fields, strict=True)))


def _csv_fields(feed: _CsvLines) -> Iterator[Row]:
    """Rows as lists of fields; blank lines are none."""
    reader = csv.reader(iter(feed), strict=True)
    while True:
        feed.first = 0
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise BadInput(f"is not CSV: {error}", feed.first) from error
        if fields is None:
            return
        if fields:
            yield Row(feed.first, fields)


def _check_header(header: Row) -> None:
    names = header.value
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"the header names {', '.join(map(repr, twice))} twice", header.line)
    if "" in names:
        raise BadInput(f"the header has no name for column {names.index('') + 1}", header.line)


# JSON Lines


def _json_rows(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for number, text in lines:
        if not text.isspace():
            yield Row(number, _json_value(text, number))


def _json_value(text: str, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadInput(f"is not JSON: {error.msg} at column {error.colno}", line) from error
    except ValueError as error:
        raise BadInput(f"is not JSON: {error}", line) from error
    except RecursionError as error:
        raise BadInput("is nested too deeply", line) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
