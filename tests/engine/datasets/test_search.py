"""Scan and index find exactly what `query.casefold() in text.casefold()` finds."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.engine.datasets import search
from mistudio.engine.datasets.documents import Document, write_documents
from mistudio.engine.datasets.search import INDEX, DocumentSearch, build_index
from mistudio.engine.progress import Cancelled, Silent

TEXTS = [
    "The quick brown fox",
    "STRASSE and Straße, the Kelvin sign K, a long ſ, İstanbul, ﬁne ﬂour",
    'quotes " and \\ and a \t tab\nand new lines\r\nnand \\n',
    "日本語のテキストと中文文本。",
    "Привет, МИР! Ελλάδα ΣΊΣΥΦΟΣ",
    "مرحبا بالعالم שלום",
    "emoji 👩‍👩‍👧 and a NUL \0 inside",
    "x" * 5000 + "needle" + "y" * 5000,
    "é decomposed, é composed, ŉ ǰ ẖ ẗ ẞ",
]
QUERIES = [
    "quick", "QUICK", "strasse", "Straße", "kelvin sign k", "long s", "i̇stanbul", "fine fl",
    '"', "\\", "\\n", "\n", "nnand", "\nn", "中文", "文", "のテ", "привет, мир", "ΣΊΣΥΦΟς",
    "مرح", "👩", "👧",
    "\0", "nul \0 in", "needle", "xneedley", "é", "é", "ʼn", "ss", "text", "title", "{", "a", "  ",
    "not there", "n" * 80, "x" * 80, "\ud83d", "\ud83d\udc69",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_segments() -> Iterator[None]:
    """An index of a few documents need not be 8 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_SEGMENT", 512)
        patch.setattr(search, "_SEGMENT_BYTES", search._BUCKETS * 512 // 8)
        yield


def matches(texts: list[str], query: str, titles: list[str] | None = None) -> list[int]:
    """What a search means. (Half a surrogate pair, which no stored text has, finds what it is
    replaced by.)"""
    wanted = query.encode("utf-16", "surrogatepass").decode("utf-16", "replace").casefold()
    both = zip(texts, titles or [""] * len(texts), strict=True)
    return [
        number
        for number, (text, title) in enumerate(both)
        if wanted in text.casefold() or wanted in title.casefold()
    ]


def stored(folder: Path, texts: list[str], titles: list[str] | None = None) -> Path:
    write_documents(
        (Document(t, n) for t, n in zip(texts, titles or [""] * len(texts), strict=True)), folder
    )
    return folder


@pytest.fixture(params=["scan", "index"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of what is found runs both ways."""
    monkeypatch.setattr(search, "SCAN_BYTES", 0 if request.param == "index" else 10**12)
    return str(request.param)


def all_found(folder: Path, query: str, way: str) -> list[int]:
    """Page by page, as the window asks."""
    if way == "index":
        build_index(folder)
    found: list[int] = []
    with DocumentSearch(folder) as documents:
        assert documents.indexed == (way == "index")
        while True:
            page = documents.find(query, found[-1] + 1 if found else 0, 2)
            found += page.indices
            if page.complete:
                return found
            assert len(page.indices) == 2


@pytest.mark.parametrize("query", QUERIES)
def test_finds_what_the_definition_finds(way: str, query: str, tmp_path: Path) -> None:
    titles = [f"Title {number} \u017f" for number in range(len(TEXTS))]
    folder = stored(tmp_path, TEXTS, titles)
    assert all_found(folder, query, way) == matches(TEXTS, query, titles)


PIECES = ["a", "S", "s", "ſ", "ß", "ẞ", "K", "k", "\u212a", "İ", "i", "\u0307", "ﬃ", "f", '"', "\\",
          "n", "\n", "\t", "\0", "中", "文", "Ж", "ж", "Σ", "ς", "👩", "\u200d", "é",
          "e", "\u0301", " ",
          "\u1e9a", "\u02be", "\u0149", "\u02bc"]  # fmt: skip
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("by_index", [False, True])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.lists(WORDS, min_size=1).map("".join), min_size=1), query=WORDS)
def test_any_text_and_any_query(by_index: bool, texts: list[str], query: str) -> None:
    texts = [text for text in texts if text.strip()] or ["a"]
    before = search.SCAN_BYTES
    search.SCAN_BYTES = 0 if by_index else 10**12
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = all_found(stored(Path(folder), texts), query, "index" if by_index else "scan")
    finally:
        search.SCAN_BYTES = before
    assert found == matches(texts, query)


def test_letters_that_hide_from_bytes_are_all_known() -> None:
    """The two lists of letters in the module, against the whole of Unicode."""
    hiding = {letter for _, letters in search._FOLD_TO_ASCII for letter in letters}
    for code in range(128, sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000:
            continue
        letter = chr(code)
        folded = letter.casefold()
        if any(ord(part) < 128 for part in folded):
            assert letter.encode().startswith(tuple(hiding)), hex(code)
        if folded != letter:
            assert not search._PLAIN.fullmatch(letter), hex(code)
            assert all(ord(part) < 128 or not search._PLAIN.match(part) for part in folded)


def test_many_chunks_and_blocks_and_segments(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(search, "_BLOCK", 64)
    monkeypatch.setattr(search, "_OVERLAP", 16)
    monkeypatch.setattr(search, "_SEGMENT", 128)
    monkeypatch.setattr(search, "_SEGMENT_BYTES", search._BUCKETS * 128 // 8)
    texts = [f"row {n} " + "word " * (n % 50) + f"mark{n % 7}" for n in range(700)]
    texts[333] = "long " * 4000 + "mark5 at the end of a long one"
    folder = stored(tmp_path, texts)
    for query in ("mark5", "row 699", "row 33", "word mark3", "at the end of", "none of it"):
        assert all_found(folder, query, way) == matches(texts, query)


def test_only_a_range_is_searched(way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, ["same"] * 40)
    if way == "index":
        build_index(folder)
    with DocumentSearch(folder) as documents:
        found = documents.find("same", 10, 100, end=13)
    assert found.indices == (10, 11, 12) and found.complete


def test_nothing_is_found_by_nothing(tmp_path: Path) -> None:
    with DocumentSearch(stored(tmp_path, ["some"])) as documents:
        assert documents.find("").indices == ()


def test_a_search_that_is_stopped_says_so(way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, ["some text"] * 10)
    if way == "index":
        build_index(folder)
    with DocumentSearch(folder) as documents:
        found = documents.find("some text", stop=lambda: True)
    assert found.stopped and not found.complete


class StopsAt(Silent):
    """Progress of a user who stops at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise Cancelled


@pytest.mark.parametrize("looks", [0, 1, 3])
def test_a_stopped_index_leaves_nothing(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "CHUNK_BYTES", 1024)
    folder = stored(tmp_path, ["some text that is long enough " * 10] * 40)
    before = sorted(folder.iterdir())
    with pytest.raises(Cancelled):
        build_index(folder, StopsAt(looks))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("spoilt", [b"", b"x" * 100, b"cut"])
def test_an_index_that_cannot_be_read_is_not_used(
    spoilt: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCAN_BYTES", 0)
    folder = stored(tmp_path, ["one", "two"])
    build_index(folder)
    whole = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(whole[:-8] if spoilt == b"cut" else spoilt)
    with DocumentSearch(folder) as documents:
        assert documents.wants_index
        assert documents.find("two").indices == (1,)
    build_index(folder)
    assert (folder / INDEX).read_bytes() == whole


def test_an_index_of_other_documents_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCAN_BYTES", 0)
    build_index(stored(tmp_path, ["one", "two"]))
    stored(tmp_path, ["one", "two", "three"])
    with DocumentSearch(tmp_path) as documents:
        assert documents.wants_index
        assert documents.find("three").indices == (2,)
