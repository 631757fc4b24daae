"""Packed files, Parquet and Arrow."""

from __future__ import annotations

import gzip
import io
import random
import struct
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hostile import ANY, file, gz, zst

TEXTS = [
    f"Document number {i} has some words of its own: {random.Random(i).random()}"
    for i in range(300)
]
PLAIN = "\n".join(f'{{"text": "{text}"}}' for text in TEXTS).encode() + b"\n"

# --- gzip and zstd --------------------------------------------------------------------------------

for suffix, pack in {".gz": gz, ".zst": zst}.items():
    packed = pack(PLAIN)
    name = f"a.jsonl{suffix}"
    file(name, packed, TEXTS, of="whole")
    for share in (0.1, 0.4, 0.7, 0.95):
        file(name, packed[: int(len(packed) * share)], name, of=f"cut at {share}")
    file(name, packed[:-1], name, of="last byte missing")
    file(name, packed + packed, 600, of="twice")
    file(name, packed + b"not packed at all", name, of="something behind")
    file(name, packed[:4], name, of="beginning only")
    file(name, PLAIN, name, of="not packed")
    file(name, pack(b""), "No text found", of="nothing inside")
    file(name, pack(packed), "not a text file", of="packed twice")
    for seed in range(3):
        spoilt = bytearray(packed)
        spoilt[random.Random(seed).randrange(20, len(packed))] ^= 0x55
        file(name, bytes(spoilt), name, of=f"byte {seed} spoilt")
    file(
        f"a.txt{suffix}",
        pack("größe, naïve".encode("utf-16")),
        ["größe, naïve"],
        of="UTF-16 inside",
    )
    file(f"a.csv{suffix}", pack(b"id,text\n1,a\n2,b\n"), ["a", "b"])
    file(f"a{suffix}", packed, "says what is inside", of="no kind")
    bomb = pack(b"0" * (24 * 1024**2))
    file(f"bomb.jsonl{suffix}", bomb, "larger than", "far too much")
    file(f"bomb.txt{suffix}", pack((b"word " * 200 + b"\n\n") * 24_000), "far too much")
file("a.txt", gz(b"text"), "is packed, whatever its name", of="packed, not said")
file("wrong.jsonl.gz", zst(PLAIN), "wrong.jsonl.gz")
file("wrong.jsonl.zst", gz(PLAIN), "wrong.jsonl.zst")
# A frame that wants 2 GB of window, as `zstd --long=31` makes it.
file("window.txt.zst", b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00a", "window.txt.zst")
file("skippable.txt.zst", struct.pack("<II", 0x184D2A50, 4) + b"note" + zst(b"text"), ANY)
LIAR = bytearray(zstandard.ZstdCompressor().compress(b"hello words " * 100))
LIAR[5] ^= 0xFF  # the size that its header tells
file("liar.txt.zst", bytes(LIAR), ANY)
NAMED = io.BytesIO()
with gzip.GzipFile("../../etc/passwd", "wb", fileobj=NAMED) as inner:
    inner.write(b"text with a name that leads elsewhere")
file("named.txt.gz", NAMED.getvalue(), ["text with a name that leads elsewhere"])
file("archive.zip", b"PK\x03\x04", "Unpack it")
file("archive.tar", b"x" * 600, "Unpack it")

# --- Parquet and Arrow ----------------------------------------------------------------------------


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def arrow(table: pa.Table, stream: bool = False, **options: Any) -> bytes:
    out = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=100)
    return out.getvalue()


@cache
def kinds() -> dict[str, bytes]:
    table = pa.table({"id": list(range(300)), "text": TEXTS})
    return {
        "a.parquet": parquet(table, row_group_size=100),
        "file.arrow": arrow(table),
        "stream.arrow": arrow(table, stream=True),
        "packed.arrow": arrow(table, compression="zstd"),
    }


for name, whole in kinds().items():
    file(name, whole, TEXTS, of="whole")
    for share in (0.02, 0.3, 0.6, 0.9):
        cut = whole[: int(len(whole) * share)]
        # A stream that was cut between two of its batches looks whole.
        file(name, cut, ANY if "stream" in name else name, of=f"cut at {share}")
    for seed in range(4):
        spoilt = bytearray(whole)
        place = random.Random(seed).randrange(8, len(whole))
        spoilt[place : place + 8] = b"\xff" * 8
        file(name, bytes(spoilt), ANY, of=f"spoilt {seed}")
    file(name, b"\0" * 500, name, of="zeros")
    file(name, b"this is not a table at all, but text", name, of="text")
    file(f"{name}.gz", gz(whole), TEXTS)
    file(f"{name}.zst", zst(whole)[:-30], f"{name}.zst", of="cut")
file("length.parquet", b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1", "length.parquet")
file("length.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\0" * 90, "length.arrow")
file("feather.feather", b"FEA1" + b"\0" * 90, "old kind")
file("parquet.arrow", kinds()["a.parquet"], TEXTS, of="Parquet, called Arrow")
file("arrow.parquet", kinds()["file.arrow"], "arrow.parquet", of="Arrow, called Parquet")

TABLES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "no rows": ({"text": pa.array([], pa.string())}, "No text found", "No text found"),
    "no columns": ({}, ANY, ANY),
    "numbers": ({"a": [1, 2]}, "none holds text", "none holds text"),
    "nulls": ({"text": pa.array([None, None], pa.string())}, "none holds text", "none holds text"),
    "null among texts": ({"text": ["a", None, "b"]}, "row 2", ["a", "b"]),
    "blank": ({"text": [" ", ""]}, "No text found", "No text found"),
    "bytes": ({"text": [b"a", b"\xc3\xa9"]}, ["a", "é"], ["a", "é"]),
    "bytes that are none": ({"text": [b"a", b"\xff", b"c"]}, "row 2", ["a", "c"]),
    "large strings": ({"text": pa.array(["a"], pa.large_string())}, ["a"], ["a"]),
    "string views": ({"text": pa.array(["a", "b"], pa.string_view())}, ANY, ANY),
    "categories": ({"text": pa.array(["a", "a"]).dictionary_encode()}, ["a", "a"], ["a", "a"]),
    "lists": ({"text": [["a"], ["b"]]}, "none holds text", "none holds text"),
    "structs": ({"text": [{"x": "a"}]}, "none holds text", "none holds text"),
    "maps": ({"text": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}, ANY, ANY),
    "messages": ({"messages": [[{"role": "user", "content": "hi"}]]}, ["User: hi"], ["User: hi"]),
    "NaN": ({"x": [float("nan")], "text": ["a"]}, ["a"], ["a"]),
    "decimals": ({"x": pa.array([None], pa.decimal128(38, 5)), "text": ["a"]}, ["a"], ["a"]),
    "giant cell": ({"text": ["a", "z" * (17 * 1024**2), "b"]}, "row 2: it is larger", ["a", "b"]),
}  # fmt: skip
for name, (columns, refusing, skipping) in TABLES.items():
    made = pa.table(columns)
    file("t.parquet", parquet(made), refusing, skipping, of=name)
    file("t.arrow", arrow(made), refusing, skipping, of=name)
WIDE = pa.table({f"c{i}": [i] for i in range(2000)} | {"text": ["a"]})
file("wide.parquet", parquet(WIDE), ["a"])
# Ten megabytes that stand in every one of 2,000 rows: 20 GB of text in a small file.
BOMB = pa.table(
    {"text": pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 10_000_000])}
)
file("dictionary.parquet", parquet(BOMB, compression="zstd"), "far too much")
file("dictionary.arrow", arrow(BOMB, compression="zstd"), "far too much")
