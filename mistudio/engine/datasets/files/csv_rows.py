"""Rows of tables as text: CSV (separated by commas, semicolons or tabs) and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from mistudio.engine.datasets.files.lines import TOO_LARGE, lines
from mistudio.engine.datasets.files.opening import Reading
from mistudio.engine.datasets.files.options import MAX_ROW
from mistudio.engine.datasets.files.rows import Row


def csv_rows(reading: Reading) -> Iterator[Row]:
    """Rows as dictionaries by the heading, with the line that each begins at."""
    table, feed = _table(reading)
    heading = _heading(reading, table, feed)
    while heading and (cells := _next_row(reading, table, feed)) is not None:
        if cells:
            yield feed.began, dict(zip(heading, cells, strict=False))


def csv_heading(reading: Reading) -> list[str]:
    """The names of the columns, which the first line with anything in it gives."""
    return _heading(reading, *_table(reading))


def _table(reading: Reading) -> tuple[Iterator[list[str]], _Feed]:
    csv.field_size_limit(MAX_ROW)
    feed = _Feed(reading)
    return csv.reader(feed, delimiter=feed.delimiter, strict=True), feed


def _heading(reading: Reading, table: Iterator[list[str]], feed: _Feed) -> list[str]:
    heading: list[str] | None = []
    while heading == []:
        heading = _next_row(reading, table, feed)
    return heading or []


def _next_row(reading: Reading, table: Iterator[list[str]], feed: _Feed) -> list[str] | None:
    """The next row that can be read; None at the end. Bad ones are rejected on the way."""
    while True:
        feed.begin()
        try:
            return next(table, None)
        except csv.Error as exc:
            lines_lost = feed.number - feed.began
            reach = f" (the row reaches to line {feed.number})" if lines_lost > 0 else ""
            reading.reject(feed.began, f"{exc}{reach}.", "The table cannot be read")
        except _TooLarge:
            reading.reject(feed.began, TOO_LARGE, "A row is too large")


class _TooLarge(Exception):
    pass


class _Feed:
    """The lines of the file for the parser; knows where a row begins and how large it grows."""

    def __init__(self, reading: Reading) -> None:
        self._lines = lines(reading, MAX_ROW)
        self._first = next(self._lines, (1, ""))
        self.delimiter = _delimiter(reading, self._first[1])
        self.number = 0
        self.began = 1
        self._size = 0

    def begin(self) -> None:
        self.began = 0
        self._size = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        number, line = self._first if self.number == 0 else next(self._lines)
        if not line:
            raise StopIteration
        self.number = number
        self.began = self.began or number
        self._size += len(line)
        if self._size >= MAX_ROW:  # a longer line comes in pieces of this size
            self._skip_rest(line)
            raise _TooLarge
        return line

    def _skip_rest(self, line: str) -> None:
        """To the end of a line that came in pieces."""
        while not line.endswith(("\n", "\r")):
            _, line = next(self._lines, (0, "\n"))


def _delimiter(reading: Reading, heading: str) -> str:
    """Tabs in TSV; in CSV what separates the heading, which in many countries is a semicolon."""
    if reading.file.format == ".tsv":
        return "\t"
    counts = {delimiter: heading.count(delimiter) for delimiter in ",;\t"}
    return max(counts, key=lambda delimiter: counts[delimiter]) if any(counts.values()) else ","
