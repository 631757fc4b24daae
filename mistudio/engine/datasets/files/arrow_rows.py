"""Rows of Parquet and Arrow files, a part at a time and only the columns that are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.files.lines import TOO_LARGE
from mistudio.engine.datasets.files.opening import (
    Reading,
    damaged,
    open_seekable,
    require_ratio,
)
from mistudio.engine.datasets.files.options import MAX_ROW
from mistudio.engine.datasets.files.rows import (
    GUESS_ROWS,
    choose_column,
    no_such_column,
    row_document,
)
from mistudio.errors import CorruptFile, InvalidInput

MOST_ROWS = 1024  # in memory at a time; fewer where they are large
NESTED_ROWS = 32  # conversations cannot be looked up in a dictionary, so they count as large
LABELS = ("title", "topic")
# A text may stand once in a file and in a million rows. In row groups up to this size texts are
# looked up, so that it is in memory once; larger ones would be in memory as a whole that way.
DICTIONARY_FITS = 64 * 1024**2

Batches = Callable[[list[str], int], Iterator[Any]]  # columns, most rows -> record batches


def arrow_documents(reading: Reading) -> Iterator[Document]:
    """The documents of a Parquet file, an Arrow file or an Arrow stream."""
    with open_seekable(reading) as stream, _errors_in_words(reading):
        schema, batches = _opened(reading, stream)
        column = _column(reading, schema, batches)
        reading.column = column
        if column is None:
            return
        needed = [column, *(name for name in LABELS if name in schema.names and name != column)]
        number = size = 0
        for batch in batches(needed, MOST_ROWS):
            reading.at(min(stream.tell(), reading.file.size))
            for row in _rows(batch, needed):
                number += 1
                size += _size(row[column])
                require_ratio(reading.file.name, reading.file.size, size)
                if document := _document(reading, number, row, column):
                    yield document


def arrow_columns(reading: Reading) -> list[str]:
    with open_seekable(reading) as stream, _errors_in_words(reading):
        return list(_opened(reading, stream)[0].names)


def _opened(reading: Reading, stream: BinaryIO) -> tuple[Any, Batches]:
    """The schema, and how to get its rows."""
    magic = stream.read(6)
    stream.seek(0)
    if magic.startswith(b"FEA1"):
        raise InvalidInput(
            "This Feather file is of the old kind",
            f"{reading.file.name} has version 1 of the format.",
            "Save it as Parquet.",
        )
    if reading.file.format == ".parquet" or magic.startswith(b"PAR1"):
        return _parquet(stream)
    return _ipc_file(stream) if magic == b"ARROW1" else _ipc_stream(stream)


# --- the two formats ------------------------------------------------------------------------------


def _parquet(stream: BinaryIO) -> tuple[Any, Batches]:
    """Row group by row group, pages as they come."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(pa.PythonFile(stream, mode="r")).schema_arrow

    def opened(as_dictionary: list[str]) -> Any:
        stream.seek(0)
        return pq.ParquetFile(
            pa.PythonFile(stream, mode="r"),
            read_dictionary=as_dictionary,
            buffer_size=1 << 20,  # else a whole column of a row group is read at once
        )

    def batches(columns: list[str], most: int) -> Iterator[Any]:
        kinds = [schema.field(schema.names.index(name)).type for name in columns]
        texts = [name for name, kind in zip(columns, kinds, strict=True) if _is_text(kind)]
        most = most if len(texts) == len(columns) else min(most, NESTED_ROWS)
        plain, looked_up = opened([]), opened(texts)
        for index in range(plain.num_row_groups):
            group = plain.metadata.row_group(index)
            how: dict[str, Any] = {"row_groups": [index], "use_threads": False}
            rows = max(1, min(most, MAX_ROW // _average(group)))
            file = looked_up
            if group.total_byte_size > DICTIONARY_FITS and texts:
                first = next(looked_up.iter_batches(1, columns=texts, **how), None)
                rows = max(1, min(rows, DICTIONARY_FITS // _longest(first)))
                file = plain
            yield from file.iter_batches(rows, columns=columns, **how)

    return schema, batches


def _average(group: Any) -> int:
    """Bytes of a row, at least 1."""
    return max(1, int(group.total_byte_size / max(group.num_rows, 1)))


def _longest(batch: Any) -> int:
    """Bytes of the longest text in the dictionaries of a batch, at least 1."""
    import pyarrow.compute as pc

    lengths = [pc.max(pc.binary_length(array.dictionary)).as_py() for array in batch or ()]
    return max([1, *(length or 0 for length in lengths)])


def _ipc_file(stream: BinaryIO) -> tuple[Any, Batches]:
    import pyarrow as pa

    schema = pa.ipc.open_file(pa.PythonFile(stream, mode="r")).schema

    def batches(columns: list[str], most: int) -> Iterator[Any]:
        stream.seek(0)
        reader = pa.ipc.open_file(pa.PythonFile(stream, mode="r"), options=_only(schema, columns))
        for index in range(reader.num_record_batches):
            yield from _slices(reader.get_batch(index), most)

    return schema, batches


def _ipc_stream(stream: BinaryIO) -> tuple[Any, Batches]:
    import pyarrow as pa

    schema = pa.ipc.open_stream(pa.PythonFile(stream, mode="r")).schema

    def batches(columns: list[str], most: int) -> Iterator[Any]:
        stream.seek(0)
        reader = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"), options=_only(schema, columns))
        for batch in reader:
            yield from _slices(batch, most)

    return schema, batches


def _only(schema: Any, columns: list[str]) -> Any:
    import pyarrow as pa

    fields = sorted(schema.names.index(name) for name in columns)
    return pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)


def _slices(batch: Any, most: int) -> Iterator[Any]:
    for start in range(0, batch.num_rows, most):
        yield batch.slice(start, most)


# --- columns and cells ----------------------------------------------------------------------------


def _column(reading: Reading, schema: Any, batches: Batches) -> str | None:
    """The column to read; None where there are no rows."""
    wanted = reading.options.text_column
    if wanted is not None:
        if wanted not in schema.names:
            raise no_such_column(reading.file.name, wanted, list(schema.names))
        return wanted
    candidates = [field.name for field in schema if _may_hold_text(field.type)]
    rows: list[dict[str, object]] = []
    for batch in batches(list(dict.fromkeys(candidates)), GUESS_ROWS) if candidates else ():
        for row in _rows(batch, candidates):
            rows.append({**dict.fromkeys(schema.names), **row})
        if len(rows) >= GUESS_ROWS:
            break
    if candidates and not rows:
        return None
    return choose_column(reading, rows or [dict.fromkeys(schema.names)])


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind))


def _may_hold_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _may_hold_text(kind.value_type)
    return _is_text(kind) or bool(
        types.is_large_binary(kind)
        or types.is_string_view(kind)
        or types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_struct(kind)
    )


def _rows(batch: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    columns = {name: _cells(batch.column(batch.schema.names.index(name))) for name in names}
    for _ in range(batch.num_rows):
        yield {name: next(cells) for name, cells in columns.items()}


def _cells(array: Any) -> Iterator[object]:
    """Python values; bytes that are UTF-8 as text."""
    import pyarrow.types as types

    if types.is_dictionary(array.type):
        yield from _looked_up(array)
    elif array.nbytes > MAX_ROW or types.is_binary(array.type) or not _decodes(array):
        for scalar in array:
            yield _value(scalar)
    else:
        yield from array.to_pylist()


def _looked_up(array: Any) -> Iterator[object]:
    """Values of a dictionary array: one that stands in many rows is made once."""
    made: dict[int, object] = {}
    size = 0
    for place in array.indices.to_pylist():
        if place is not None and place not in made:
            value = _value(array.dictionary[place])
            size += _size(value)
            if size > MAX_ROW:  # so many long ones are not kept
                made, size = {}, 0
            made[place] = value
        yield None if place is None else made[place]


def _decodes(array: Any) -> bool:
    """Whether all texts are UTF-8, which damaged files may promise and not keep."""
    import pyarrow as pa

    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _value(scalar: Any) -> object:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | bytes | list) else 0


def _document(
    reading: Reading, number: int, row: dict[str, object], column: str
) -> Document | None:
    if _size(row[column]) > MAX_ROW:
        reading.reject(number, TOO_LARGE, "A row is too large")
        return None
    if isinstance(row[column], bytes):
        reading.reject(number, f"column {column!r} holds bytes that are no UTF-8 text.")
        return None
    return row_document(reading, number, row, column)


@contextmanager
def _errors_in_words(reading: Reading) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowNotImplementedError as exc:
        raise InvalidInput(
            "The file uses something that cannot be read here",
            f"{reading.file.name}: {_first_line(exc)}.",
            "Save it again without it, as plain Parquet or JSON lines.",
        ) from exc
    except (MemoryError, OverflowError) as exc:
        raise CorruptFile(
            "The file asks for more memory than there is",
            f"{reading.file.name}: {_first_line(exc)}.",
            "It may be damaged; else write it again in smaller row groups.",
        ) from exc
    except pa.ArrowException as exc:
        raise damaged(reading.file, exc) from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or ["no details"])[0].rstrip(".")[:300]
