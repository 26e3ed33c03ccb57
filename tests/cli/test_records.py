"""Files become rows, or a sentence with the number of the line that does not read."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.cli.records import (
    LINE_BYTES_MAX,
    BadInput,
    KeyField,
    Row,
    Source,
    format_of,
    open_source,
    read_rows,
)

if TYPE_CHECKING:
    from pathlib import Path


def rows(content: bytes, kind: str) -> list[tuple[int, Any]]:
    return [tuple(row) for row in read_rows(Source(io.BytesIO(content), "test", None), kind)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flights.csv", "csv"),
        ("flights.CSV.GZ", "csv"),
        ("a/b.jsonl", "jsonl"),
        ("b.ndjson.gz", "jsonl"),
        ("notes.txt", "lines"),
        ("v1.2", "lines"),
        ("archive.gz", "lines"),
        ("-", "lines"),
    ],
)
def test_the_name_tells_the_format(name: str, expected: str) -> None:
    assert format_of(name) == expected


class TestCsv:
    def test_values_stay_text(self) -> None:
        content = b"id,amount,note\n1,99.90,\n2,1e3,NA\n"
        assert rows(content, "csv") == [
            (2, {"id": "1", "amount": "99.90", "note": ""}),
            (3, {"id": "2", "amount": "1e3", "note": "NA"}),
        ]

    def test_quotes_lines_within_fields_and_blank_lines(self) -> None:
        content = b'a,b\r\n"x, y","two\r\nlines"\r\n\r\n"say ""hi""",z\r\n'
        assert rows(content, "csv") == [
            (2, {"a": "x, y", "b": "two\r\nlines"}),
            (5, {"a": 'say "hi"', "b": "z"}),
        ]

    def test_a_byte_order_mark_is_no_part_of_a_name(self) -> None:
        assert rows(b"\xef\xbb\xbfa\n1\n", "csv") == [(2, {"a": "1"})]

    def test_the_last_line_needs_no_end(self) -> None:
        assert rows(b"a\n1", "csv") == [(2, {"a": "1"})]

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"a,b\n"])
    def test_no_rows(self, content: bytes) -> None:
        assert rows(content, "csv") == []

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"a,b\n1,2\n1\n", "line 3: has 1 fields, the header has 2"),
            (b"a,b\n1,2,3\n", "line 2: has 3 fields, the header has 2"),
            (b'a,b\n1,"x\ny\n', "line 2: is not CSV: unexpected end of data"),
            (b'a,b\n1,"x"y\n', "line 2: is not CSV"),
            (b"a,a\n", "line 1: the header names 'a' twice"),
            (b"a,,b\n", "line 1: the header has no name for column 2"),
            (b"a,b\n1,\xff\n", "line 2: is not UTF-8: byte 3 is wrong"),
            (b"a,b\n1,2\r3,4\n", "line 2: "),
        ],
    )
    def test_what_does_not_read(self, content: bytes, says: str) -> None:
        with pytest.raises(BadInput) as caught:
            rows(content, "csv")
        assert str(caught.value).startswith(says)

    def test_rows_before_the_bad_one_come_out(self) -> None:
        source = Source(io.BytesIO(b"a,b\n1,2\n3\n"), "test", None)
        reader = read_rows(source, "csv")
        assert next(reader) == Row(2, {"a": "1", "b": "2"})
        with pytest.raises(BadInput):
            next(reader)

    @given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2)))
    def test_what_the_csv_module_writes_reads_back(self, fields: list[list[str]]) -> None:
        import csv

        text = io.StringIO(newline="")
        writer = csv.writer(text, quoting=csv.QUOTE_ALL)
        writer.writerows([["first", "second"], *fields])
        content = text.getvalue().encode()
        expected = [{"first": first, "second": second} for first, second in fields]
        assert [value for _line, value in rows(content, "csv")] == expected


class TestJsonLines:
    def test_values_of_any_kind(self) -> None:
        content = b'{"a": 1}\n\n[1, null]\n"x"\r\n 7 \n'
        assert rows(content, "jsonl") == [(1, {"a": 1}), (3, [1, None]), (4, "x"), (5, 7)]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b'{"a": 1}\n{"a": \n', "line 2: is not JSON: Expecting value"),
            (b'{"a": NaN}\n', "line 1: is not JSON: NaN is no JSON value"),
            (b"{} {}\n", "line 1: is not JSON: Extra data"),
            (b"[" * 100_000 + b"\n", "line 1: is nested too deeply"),
            (b'"\xff"\n', "line 1: is not UTF-8"),
        ],
    )
    def test_what_does_not_read(self, content: bytes, says: str) -> None:
        with pytest.raises(BadInput) as caught:
            rows(content, "jsonl")
        assert str(caught.value).startswith(says)


class TestLines:
    def test_ends_are_taken_off_and_nothing_else(self) -> None:
        assert rows(b"one\r\n two \n\nlast", "lines") == [
            (1, "one"),
            (2, " two "),
            (3, ""),
            (4, "last"),
        ]

    def test_a_line_longer_than_any_message(self) -> None:
        with pytest.raises(BadInput, match="line 2: is longer than"):
            rows(b"short\n" + b"x" * (LINE_BYTES_MAX + 1) + b"\n", "lines")


class TestSources:
    def test_a_gzipped_file_is_known_by_its_bytes(self, tmp_path: Path) -> None:
        file = tmp_path / "flights.csv"
        file.write_bytes(gzip.compress(b"a\n1\n"))
        with open_source(str(file)) as source:
            assert [row.value for row in read_rows(source, "csv")] == [{"a": "1"}]
            assert source.position == source.size == file.stat().st_size

    def test_a_cut_gzip_stream_is_no_end(self, tmp_path: Path) -> None:
        file = tmp_path / "cut.gz"
        lines = b"".join(b"%d\n" % (number * 7919 % 65_537) for number in range(50_000))
        file.write_bytes(gzip.compress(lines)[:-5_000])
        with open_source(str(file)) as source, pytest.raises(BadInput, match="damaged or cut"):
            list(read_rows(source, "lines"))

    def test_a_damaged_gzip_stream(self, tmp_path: Path) -> None:
        file = tmp_path / "damaged.gz"
        content = bytearray(gzip.compress(os.urandom(100_000)))
        content[50_000] ^= 0xFF
        file.write_bytes(content)
        with open_source(str(file)) as source, pytest.raises(BadInput):
            list(read_rows(source, "lines"))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        missing = str(tmp_path / "none.csv")
        with (
            pytest.raises(BadInput, match="cannot be opened: No such"),
            open_source(missing),
        ):
            pass

    def test_a_pipe_hands_out_rows_as_they_come(self) -> None:
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as incoming, os.fdopen(writing, "wb", 0) as outgoing:
            outgoing.write(b"one\n")
            source = Source(incoming, "pipe", None)
            reader = read_rows(source, "lines")
            got: list[Any] = []
            thread = threading.Thread(target=lambda: got.append(next(reader).value))
            thread.start()
            thread.join(10)
            assert got == ["one"]


class TestKeys:
    def key(self, value: object, *none_values: str) -> str | None:
        return KeyField("k", none_values).of(Row(7, value))

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"k": "N14228"}, "N14228"),
            ({"k": 17}, "17"),
            ({"k": ""}, None),
            ({"k": None}, None),
            ({"k": "NA"}, None),
            ({"k": " "}, " "),
        ],
    )
    def test_keys(self, value: object, expected: str | None) -> None:
        assert self.key(value, "NA") == expected

    def test_without_a_field_there_is_no_key(self) -> None:
        assert KeyField(None).of(Row(1, "text")) is None

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ("text", "line 7: is no object"),
            ({"a": 1, "b": 2}, "line 7: has no field 'k' for the key; its fields: a, b"),
            ({"k": 1.5}, "line 7: the key 1.5 is neither"),
            ({"k": True}, "line 7: the key true is neither"),
            ({"k": {}}, "line 7: the key {} is neither"),
        ],
    )
    def test_what_is_no_key(self, value: object, says: str) -> None:
        with pytest.raises(BadInput) as caught:
            self.key(value)
        assert str(caught.value).startswith(says)


@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl", "lines"]))
def test_any_bytes_read_or_are_refused(content: bytes, kind: str) -> None:
    with contextlib.suppress(BadInput):
        for _line, value in rows(content, kind):
            json.dumps(value)
