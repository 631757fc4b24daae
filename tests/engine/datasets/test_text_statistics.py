"""Every figure about a text equals a second, plain computation of what it says it is."""

from __future__ import annotations

import random
import statistics as plain
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from mistudio.engine.datasets import statistics as text
from mistudio.engine.datasets.characters import CLASSES, classify, count_classes
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.lengths import EXACT, Lengths
from mistudio.engine.datasets.statistics import (
    FIGURES,
    TOKEN_FIGURES,
    boilerplate,
    languages,
    near_duplicates,
    text_statistics,
    warnings,
)
from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput

WORDS = ["cat", "sat", "mat", "while", "rain", "fell", "over", "quiet", "green", "birds", "sang"]


def sentence(rng: random.Random, n: int = 40) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(50)) for _ in range(n)).capitalize() + "."


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = random.Random(1)
    rows = [Document(sentence(rng, rng.randrange(5, 60)), split="train") for _ in range(120)]
    rows += [Document(row.text, split="train") for row in rows[:7]]
    rows += [Document(rows[3].text, split="test")] * 2
    rows += [
        Document("Grüße aus Köln, 你好世界 12 😀!\n\tПривет", split="test"),
        Document("caf\u00c3\u00a9 and it\u00e2\u20ac\u2122s", split="test"),
        Document("bell \x07 here", split="test", messages=(("user", "bell"),)),
        Document("word " * 5000, split="test"),
    ]
    return rows


@pytest.fixture(scope="module")
def found(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return text_statistics(documents, tmp_path_factory.mktemp("work"))


def test_counts_equal_a_plain_recount(documents: list[Document], found: dict[str, Any]) -> None:
    lengths = [len(document.text) for document in documents]
    assert found["documents"] == len(documents)
    assert found["characters"] == sum(lengths)
    assert found["bytes"] == sum(len(document.text.encode()) for document in documents)
    assert found["splits"] == dict(Counter(document.split for document in documents))
    assert found["conversations"] == 1
    assert found["longest_share"] == max(lengths) / sum(lengths)
    assert found["short_documents"] == sum(length < 50 for length in lengths)
    own = found["lengths"]
    assert (own["min"], own["max"]) == (min(lengths), max(lengths))
    assert own["median"] == plain.median(lengths)
    assert own["mean"] == pytest.approx(plain.mean(lengths))
    ordered = sorted(lengths)
    assert own["p95"] == ordered[int(np.ceil(0.95 * len(ordered))) - 1]
    assert own["p5"] == ordered[int(np.ceil(0.05 * len(ordered))) - 1]
    assert [n for *_, n in own["bars"]] == [
        sum(low <= length < high for length in lengths) for low, high, _ in own["bars"]
    ]
    assert sum(n for *_, n in own["bars"]) == len(documents)


def test_exact_duplicates_equal_a_plain_recount(
    documents: list[Document], found: dict[str, Any]
) -> None:
    counts = Counter(document.text for document in documents)
    assert found["duplicates"]["copies"] == len(documents) - len(counts) == 9
    assert found["duplicates"]["repeated"] == sum(n > 1 for n in counts.values())
    assert found["duplicates"]["largest"][0] == [4, 3]  # how often, and which comes first
    assert all(
        counts[documents[first].text] == n and documents.index(documents[first]) == first
        for n, first in found["duplicates"]["largest"]
    )


def test_no_hashes_are_left_behind(documents: list[Document], tmp_path: Path) -> None:
    text_statistics(documents, tmp_path)
    assert list(tmp_path.iterdir()) == []

    class Stop:
        def check(self) -> None:
            raise Cancelled

        def report(self, *args: object, **metrics: object) -> None: ...

    with pytest.raises(Cancelled):
        text_statistics(documents, tmp_path, Stop())
    assert list(tmp_path.iterdir()) == []


def test_damaged_text_is_found(found: dict[str, Any]) -> None:
    assert (found["control_documents"], found["mojibake_documents"]) == (1, 1)


@pytest.mark.parametrize(
    "sentence",
    [
        "Grüße, Ångström, naïve – „Zitat“",
        "Ça va? «Très bien» 50 €",
        "Â La Carte",
        "日本語 Ã",
        "Ãéã",
    ],
)
def test_good_text_is_not_taken_for_damaged(sentence: str) -> None:
    assert not text._MOJIBAKE.search(sentence)
    assert not text._CONTROL.search(sentence + "\r\n\t")


@pytest.mark.parametrize(
    ("sentence", "encoding"),
    [("café", "latin-1"), ("café", "cp1252"), ("it’s", "cp1252"), ("„Ja“", "cp1252")],
)
def test_text_read_in_the_wrong_encoding_is_found(sentence: str, encoding: str) -> None:
    assert text._MOJIBAKE.search(sentence.encode().decode(encoding, "replace"))


# --- kinds of characters --------------------------------------------------------------------------


def test_every_character_has_one_class(documents: list[Document], found: dict[str, Any]) -> None:
    assert sum(n for _, n in found["classes"]) == found["characters"]
    joined = "".join(document.text for document in documents)
    expected = Counter(classify(character) for character in joined)
    assert dict(map(tuple, found["classes"])) == expected
    assert {"Latin letters", "Cyrillic letters", "Han letters", "Emoji"} <= set(expected)


@given(st.text(max_size=80))
def test_the_table_agrees_with_the_single_look(characters: str) -> None:
    expected = Counter(classify(character) for character in characters)
    found = count_classes(characters)
    assert {CLASSES[i]: int(n) for i, n in enumerate(found) if n} == expected


PROPERTIES = {
    "Latin letters": r"\p{Script=Latin}",
    "Greek letters": r"\p{Script=Greek}",
    "Cyrillic letters": r"\p{Script=Cyrillic}",
    "Hebrew letters": r"\p{Script=Hebrew}",
    "Arabic letters": r"\p{Script=Arabic}",
    "Devanagari letters": r"\p{Script=Devanagari}",
    "Thai letters": r"\p{Script=Thai}",
    "Hangul letters": r"\p{Script=Hangul}",
    "Han letters": r"\p{Script=Han}",
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_letters_by_script_agree_with_the_unicode_script_property(name: str) -> None:
    """The regex library has the property itself; letters old enough to be known to both."""
    codes = [*range(0x3400), *range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4)]
    kinds = ("Lu", "Ll", "Lt", "Lo")  # modifier letters have no script in their names
    letters = [chr(code) for code in codes if unicodedata.category(chr(code)) in kinds]
    ours = {letter for letter in letters if classify(letter) == name}
    theirs = set(regex.findall(PROPERTIES[name], "".join(letters)))
    assert len(ours ^ theirs) <= 0.02 * len(theirs), sorted(ours ^ theirs)[:20]


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("7", "Digits"), ("٣", "Digits"), ("½", "Symbols"), ("€", "Symbols"), ("—", "Punctuation"),
        ("\u3000", "Whitespace"), ("\n", "Whitespace"), ("\0", "Control characters"),
        ("\u0301", "Combining marks"), ("👍", "Emoji"), ("☂", "Emoji"), ("ア", "Kana letters"),
        ("\ue000", "Unassigned or private"), ("\ud800", "Unassigned or private"),
    ],
)  # fmt: skip
def test_classes_of_single_characters(character: str, name: str) -> None:
    assert classify(character) == name
    assert CLASSES[int(count_classes(character).argmax())] == name


# --- on samples -----------------------------------------------------------------------------------


def jaccard(a: str, b: str) -> float:
    one, other = set(text._shingles(a)), set(text._shingles(b))
    return len(one & other) / len(one | other)


def test_near_duplicates_are_those_that_share_most_runs_of_words() -> None:
    rng = random.Random(2)
    originals = [sentence(rng, 200) for _ in range(60)]
    near = [text_.replace("The ", "A ", 1) + " Changed." for text_ in originals[:10]]
    far = [" ".join(rng.sample(text_.split(), 200)) for text_ in originals[10:20]]
    assert all(jaccard(a, b) > 0.9 for a, b in zip(originals, near, strict=False))
    assert all(jaccard(a, b) < 0.1 for a, b in zip(originals[10:], far, strict=False))
    found = near_duplicates([*originals, *near, *far, *originals[30:40]])
    assert found["documents"] == 20
    assert found["sample"] == 80  # exact copies count once
    assert all(similarity >= 0.8 for similarity, *_ in found["examples"])


def test_near_duplicates_of_text_without_spaces() -> None:
    rng = random.Random(3)
    texts = ["".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(300)) for _ in range(20)]
    assert near_duplicates(texts)["documents"] == 0
    assert near_duplicates([*texts, texts[0][:-3] + "。"])["documents"] == 2


def test_languages_of_clear_texts() -> None:
    texts = [
        "The history of the city goes back to the early middle ages, when traders settled here.",
        "Die Geschichte der Stadt reicht bis ins frühe Mittelalter zurück, als Händler kamen.",
        "L'histoire de la ville remonte au haut Moyen Âge, lorsque des marchands s'y installèrent.",
        "История города восходит к раннему средневековью, когда здесь поселились торговцы.",
    ]
    found = languages([*texts, texts[0]])
    assert found == {"sample": 5, "shares": [["en", 0.4], ["de", 0.2], ["fr", 0.2], ["ru", 0.2]]}


def test_lines_that_stand_in_many_documents() -> None:
    rng = random.Random(4)
    line = "All rights reserved. Terms of use."
    texts = [f"{sentence(rng)}\n{line if i % 10 == 0 else ''}\n{line}x{i}" for i in range(100)]
    assert boilerplate(texts) == {"sample": 100, "lines": [[line, 10]]}
    assert boilerplate(texts[:40])["lines"] == []  # four of them are too few


def test_the_sample_is_drawn_evenly_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SAMPLE_DOCUMENTS", 200)
    counted = text._Counted(tmp_path, random.Random(0))
    counted.add([Document(f"{i} " + "x" * 9000) for i in range(2000)])
    counted.digests.remove()
    numbers = [number for number, _ in counted.sample]
    assert len(set(numbers)) == 200
    assert all(len(clipped) == text.SAMPLE_CHARACTERS for _, clipped in counted.sample)
    quarters = Counter(number // 500 for number in numbers)
    assert all(30 <= quarters[i] <= 70 for i in range(4)), quarters


# --- lengths --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, EXACT - 1), min_size=1, max_size=50))
def test_quantiles_of_lengths_are_exact(values: list[int]) -> None:
    lengths = Lengths()
    half = len(values) // 2
    lengths.add(np.asarray(values[:half], np.int64))
    lengths = Lengths(lengths.state())
    lengths.add(np.asarray(values[half:], np.int64))
    assert lengths.median() == plain.median(values)
    assert (lengths.smallest, lengths.largest) == (min(values), max(values))
    assert (lengths.count, lengths.total) == (len(values), sum(values))
    assert lengths.at_least(100) == sum(value >= 100 for value in values)
    assert sum(n for *_, n in lengths.bars()) == len(values)


@given(st.lists(st.integers(EXACT, 10**9), min_size=1, max_size=20))
def test_quantiles_of_very_long_documents_are_known_to_a_percent(values: list[int]) -> None:
    lengths = Lengths()
    lengths.add(np.asarray(values))
    assert lengths.median() == pytest.approx(plain.median(values), rel=0.011)


# --- in words -------------------------------------------------------------------------------------


def test_every_figure_is_defined(found: dict[str, Any]) -> None:
    meta = {"version", "sample", "seconds"}
    assert set(found) - meta == set(FIGURES)
    for figure in (*FIGURES.values(), *TOKEN_FIGURES.values()):
        assert figure.title and figure.unit and figure.sample and figure.definition


def good() -> dict[str, Any]:
    return {
        "documents": 10_000,
        "characters": 40_000_000,
        "duplicates": {"copies": 100},
        "near_duplicates": {"sample": 3000, "documents": 30},
        "boilerplate": {"sample": 3000, "lines": []},
        "longest_share": 0.01,
        "control_documents": 0,
        "mojibake_documents": 5,
        "short_documents": 100,
    }


TOKENS = {"tokens": 10_000_000, "coverage": 0.9, "truncated": False}


def test_a_good_dataset_has_no_warnings() -> None:
    assert warnings(good(), TOKENS) == []
    assert warnings(good()) == []


@pytest.mark.parametrize(
    ("title", "change", "tokens", "serious"),
    [
        ("Many exact duplicates", {"duplicates": {"copies": 1000}}, {}, False),
        ("Many exact duplicates", {"duplicates": {"copies": 6000}}, {}, True),
        ("Many near duplicates", {"near_duplicates": {"sample": 10, "documents": 2}}, {}, False),
        ("Repeated lines", {"boilerplate": {"sample": 90, "lines": [["Menu", 9]]}}, {}, False),
        ("Mostly one very long document", {"longest_share": 0.6}, {}, False),
        ("Only one document", {"documents": 1, "longest_share": 1.0, "mojibake_documents": 0,
                               "duplicates": {"copies": 0}, "short_documents": 0}, {}, True),
        ("Control characters", {"control_documents": 200}, {}, False),
        ("Garbled characters", {"mojibake_documents": 200}, {}, False),
        ("Very short documents", {"short_documents": 6000}, {}, False),
        ("Few tokens for training", {"characters": 2_000_000}, {"tokens": 500_000}, False),
        ("Few tokens for training", {"characters": 20_000}, {"tokens": 5000}, True),
        ("Little of the vocabulary occurs", {}, {"coverage": 0.05}, False),
        ("The tokenizer does not fit the text", {}, {"tokens": 39_000_000}, False),
    ],
)  # fmt: skip
def test_each_warning_comes_when_it_should(
    title: str, change: dict[str, Any], tokens: dict[str, Any], serious: bool
) -> None:
    found = warnings({**good(), **change}, {**TOKENS, **tokens})
    assert [(warning.title, warning.serious) for warning in found] == [(title, serious)]
    assert found[0].text


def test_no_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no documents"):
        text_statistics([], tmp_path)
