"""What a collection of texts is like: one pass in flat memory, and a sample for what costs more.

Every figure says what it counts, in which unit and over how many documents (`FIGURES`). What needs
a tokenizer is counted when the dataset is tokenised (`token_writer.token_statistics`).
"""

from __future__ import annotations

import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.datasets.characters import CLASSES, count_classes
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.encoding import batches, utf8
from mistudio.engine.datasets.lengths import Lengths
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput

VERSION = 1
SAMPLE_DOCUMENTS = 3000
SAMPLE_CHARACTERS = 8000  # of each sampled document
SHORT = 50  # characters
PARTITIONS = 64
SHINGLE = 5  # words, or characters where words are not separated
SHINGLES = 1000  # of a document at most
NEAR = 0.8  # Jaccard similarity of shingles
PERMUTATIONS = 128
LANGUAGE_DOCUMENTS = 1000
LANGUAGE_CHARACTERS = 1000
BOILERPLATE_LINE = 20  # characters at least
BOILERPLATE_SHARE = 0.02
SPLITS_SHOWN = 50

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# UTF-8 that was read as Latin-1 or Windows-1252, and what could not be read at all.
_MOJIBAKE = re.compile(
    "\u00c3[\u0080-\u00bf\u2018-\u203a]|\u00e2\u20ac|\u00c2[\u00a0-\u00bf]|\ufffd"
)
_WORDS = re.compile(r"\w+")

ALL = "all documents"
SAMPLED = f"a random sample of at most {SAMPLE_DOCUMENTS:,} documents, " + (
    f"the first {SAMPLE_CHARACTERS:,} characters of each"
)


@dataclass(frozen=True)
class Figure:
    """What one entry of the statistics means."""

    title: str
    unit: str
    sample: str
    definition: str


FIGURES: dict[str, Figure] = {
    "documents": Figure("Documents", "documents", ALL, "Texts with at least one character."),
    "characters": Figure("Characters", "characters", ALL, "Unicode code points in all texts."),
    "bytes": Figure("Size of the text", "bytes", ALL, "The texts in UTF-8, without titles."),
    "splits": Figure(
        "Splits", "documents", ALL, "How many documents the source assigns to each split."
    ),
    "conversations": Figure(
        "Conversations", "documents", ALL, "Documents that are chats with roles."
    ),
    "lengths": Figure(
        "Length of documents",
        "characters",
        ALL,
        "Smallest, largest, mean and quantiles (exact below 65,536 characters, else within 1 %).",
    ),
    "longest_share": Figure(
        "Share of the longest document",
        "share of all characters",
        ALL,
        "Characters of the longest document, divided by the characters of all.",
    ),
    "short_documents": Figure(
        "Very short documents", "documents", ALL, f"Documents of fewer than {SHORT} characters."
    ),
    "duplicates": Figure(
        "Exact duplicates",
        "documents",
        ALL,
        "`copies` are documents whose text stood before in the same words and characters; "
        "`repeated` is how many texts occur more than once. Texts are compared by a 64-bit hash.",
    ),
    "near_duplicates": Figure(
        "Near duplicates",
        "documents",
        SAMPLED,
        f"Documents that share at least {NEAR:.0%} of their runs of {SHINGLE} words (Jaccard, "
        f"estimated by MinHash with {PERMUTATIONS} permutations) with another, different one of "
        "the sample. Where the sample is not everything, a near copy is often outside it: the "
        "share is then a lower bound.",
    ),
    "languages": Figure(
        "Languages",
        "share of documents",
        f"at most {LANGUAGE_DOCUMENTS:,} documents of the sample, the first "
        f"{LANGUAGE_CHARACTERS:,} characters of each",
        "The most likely language of each document by py3langid (97 languages). Short texts are "
        "often taken for the wrong one.",
    ),
    "classes": Figure(
        "Kinds of characters",
        "characters",
        ALL,
        "Letters by script, other characters by their Unicode category. Emoji are the symbols in "
        "U+2600 to U+27BF and U+1F000 to U+1FAFF.",
    ),
    "control_documents": Figure(
        "Documents with control characters",
        "documents",
        ALL,
        "Documents with a control character (Unicode Cc) other than tab and line breaks.",
    ),
    "mojibake_documents": Figure(
        "Documents with garbled characters",
        "documents",
        ALL,
        "Documents with the traces of text read in the wrong encoding, such as \u201c\u00e2\u20ac"
        "\u201d or \u201c\u00c3\u00a9\u201d, or with the replacement character.",
    ),
    "boilerplate": Figure(
        "Repeated lines",
        "documents",
        SAMPLED,
        f"Lines of at least {BOILERPLATE_LINE} characters that stand in at least "
        f"{BOILERPLATE_SHARE:.0%} of the sampled documents (and in 5 at least), with the number "
        "of documents they stand in.",
    ),
}

TOKEN_FIGURES: dict[str, Figure] = {
    "tokens": Figure("Tokens", "tokens", ALL, "Tokens of all documents, separators not counted."),
    "unique_tokens": Figure(
        "Different tokens", "token ids", ALL, "How many ids of the vocabulary occur."
    ),
    "coverage": Figure(
        "Vocabulary coverage",
        "share of token ids",
        ALL,
        "Ids that occur, divided by all ids of the vocabulary; special tokens apart.",
    ),
    "once": Figure("Tokens that occur once", "token ids", ALL, "Ids that occur exactly once."),
    "half_of_text": Figure(
        "Half of the text",
        "token ids",
        ALL,
        "How many of the most frequent ids make up half of all tokens.",
    ),
    "zipf": Figure(
        "Frequency by rank",
        "occurrences",
        ALL,
        "How often the id of each rank occurs, at ranks spaced evenly on a logarithmic axis.",
    ),
    "length_median": Figure(
        "Tokens in a document",
        "tokens",
        ALL,
        "The middle document's length after the cut of long ones, if any; `length_mean` and "
        "`length_histogram` are of the same lengths.",
    ),
    "split_tokens": Figure(
        "Tokens to learn from and to judge by",
        "tokens",
        ALL,
        "Tokens of the documents in each part, with the separators between them when packed.",
    ),
}


def text_statistics(
    documents: Iterable[Document],
    work: Path,
    progress: Progress = SILENT,
    total: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything in `FIGURES`, as plain data, with `version`, `sample` and `seconds`.

    `work` is a folder for hashes (16 bytes a document), emptied in the end; `total` is how many
    documents there are, where that is known. Raises InvalidInput where there are none.
    """
    began = time.monotonic()
    counted = _Counted(work, random.Random(seed))
    try:
        for batch in batches(documents, progress.check):
            counted.add(batch)
            progress.report(counted.documents, total, "Reading", characters=counted.characters)
        if not counted.documents:
            raise InvalidInput("No text found", "The dataset has no documents.")
        duplicates = counted.digests.summary(progress)
    finally:
        counted.digests.remove()
    sample = [text for _, text in sorted(counted.sample)]
    near = near_duplicates(sample, progress)
    return {
        "version": VERSION,
        "sample": len(sample),
        **counted.summary(),
        "duplicates": duplicates,
        "near_duplicates": near,
        "languages": languages(sample, progress),
        "boilerplate": boilerplate(sample),
        "seconds": time.monotonic() - began,
    }


class _Counted:
    """What is counted over all documents, and the sample that is drawn on the way."""

    def __init__(self, work: Path, chance: random.Random) -> None:
        self.documents = self.characters = self.bytes = 0
        self.digests = _Digests(work)
        self.sample: list[tuple[int, str]] = []
        self._chance = chance
        self._lengths = Lengths()
        self._classes = np.zeros(len(CLASSES), np.int64)
        self._splits: Counter[str] = Counter()
        self._conversations = self._control = self._mojibake = 0

    def add(self, batch: list[Document]) -> None:
        texts = [document.text for document in batch]
        data = [utf8(text) for text in texts]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        for i, (document, encoded) in enumerate(zip(batch, data, strict=True)):
            self._draw(self.documents + i, document.text)
            if document.split in self._splits or len(self._splits) < SPLITS_SHOWN:
                self._splits[document.split] += 1
            self._conversations += bool(document.messages)
            self._control += _CONTROL.search(document.text) is not None
            if len(encoded) > len(document.text):  # not ASCII
                self._mojibake += _MOJIBAKE.search(document.text) is not None
        self.digests.add(data, self.documents)
        self._classes += count_classes("".join(texts))
        self._lengths.add(lengths)
        self.documents += len(batch)
        self.characters += int(lengths.sum())
        self.bytes += sum(map(len, data))

    def _draw(self, number: int, text: str) -> None:
        """Reservoir sampling: every document is in the sample with the same chance."""
        if number < SAMPLE_DOCUMENTS:
            self.sample.append((number, text[:SAMPLE_CHARACTERS]))
        elif (place := self._chance.randrange(number + 1)) < SAMPLE_DOCUMENTS:
            self.sample[place] = (number, text[:SAMPLE_CHARACTERS])

    def summary(self) -> dict[str, Any]:
        lengths = self._lengths
        shown = {name: n for name, n in self._splits.items() if name}
        return {
            "documents": self.documents,
            "characters": self.characters,
            "bytes": self.bytes,
            "splits": shown,
            "conversations": self._conversations,
            "lengths": {
                "min": lengths.smallest,
                "p5": lengths.quantile(0.05),
                "median": lengths.median(),
                "mean": lengths.total / lengths.count,
                "p95": lengths.quantile(0.95),
                "max": lengths.largest,
                "bars": [list(bar) for bar in lengths.bars()],
            },
            "longest_share": lengths.largest / max(1, self.characters),
            "short_documents": lengths.count - lengths.at_least(SHORT),
            "classes": [
                [name, int(n)] for name, n in zip(CLASSES, self._classes, strict=True) if n
            ],
            "control_documents": self._control,
            "mojibake_documents": self._mojibake,
        }


# --- exact duplicates -----------------------------------------------------------------------------

_RECORD = np.dtype([("digest", "<u8"), ("number", "<i8")])


class _Digests:
    """Hashes of all texts in files by their first bits: each is small enough to be sorted."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._paths = [work / f"digests-{i:02d}" for i in range(PARTITIONS)]
        self._files = [path.open("wb") for path in self._paths]

    def add(self, data: list[bytes], first: int) -> None:
        digests = b"".join([blake2b(text, digest_size=8).digest() for text in data])
        rows = np.empty(len(data), _RECORD)
        rows["digest"] = np.frombuffer(digests, "<u8")
        rows["number"] = np.arange(first, first + len(data))
        places = rows["digest"] % PARTITIONS
        for place in np.unique(places):
            self._files[place].write(rows[places == place].tobytes())

    def summary(self, progress: Progress) -> dict[str, Any]:
        """`largest` are [how often, the number of the first document] of the commonest texts."""
        distinct = total = repeated = 0
        largest: list[list[int]] = []
        for i, (path, file) in enumerate(zip(self._paths, self._files, strict=True)):
            progress.check()
            progress.report(i, PARTITIONS, "Looking for duplicates")
            file.close()
            rows = np.fromfile(path, _RECORD)
            _, first, counts = np.unique(rows["digest"], return_index=True, return_counts=True)
            distinct += len(counts)
            total += len(rows)
            repeated += int((counts > 1).sum())
            for group in np.argsort(-counts, kind="stable")[:5]:
                if counts[group] > 1:
                    largest.append([int(counts[group]), int(rows["number"][first[group]])])
        largest.sort(key=lambda group: (-group[0], group[1]))
        return {"copies": total - distinct, "repeated": repeated, "largest": largest[:5]}

    def remove(self) -> None:
        for path, file in zip(self._paths, self._files, strict=True):
            file.close()
            path.unlink(missing_ok=True)


# --- on a sample ---------------------------------------------------------------------------------


def near_duplicates(sample: list[str], progress: Progress = SILENT) -> dict[str, Any]:
    """{"sample", "documents", "examples": [[similarity, beginning, beginning], …]}; exact copies
    within the sample count once."""
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

    texts = list(dict.fromkeys(sample))
    index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    hashes: list[Any] = []
    near: set[int] = set()
    pairs: list[tuple[float, int, int]] = []
    for i, text in enumerate(texts):
        progress.check()
        progress.report(i, len(texts), "Comparing documents")
        found = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        shingles = _shingles(text)
        hashes.append(found)
        if not shingles:
            continue
        found.update_batch(shingles)
        for other in index.query(found):
            similarity = float(found.jaccard(hashes[other]))
            if similarity >= NEAR:
                near |= {i, other}
                pairs.append((similarity, other, i))
        index.insert(i, found)
        if len(pairs) > 1000:
            pairs = sorted(pairs, reverse=True)[:10]
    best = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:3]
    return {
        "sample": len(texts),
        "documents": len(near),
        "examples": [[round(s, 3), texts[a][:200], texts[b][:200]] for s, a, b in best],
    }


def _shingles(text: str) -> list[bytes]:
    """Different runs of words in lower case; of characters where text has few separate words."""
    units: list[str] = _WORDS.findall(text.lower())
    joint = " "
    if len(units) < 2 * SHINGLE or sum(map(len, units)) > 15 * len(units):
        units, joint = list("".join(units)), ""
    n = max(1, len(units) - SHINGLE + 1) if units else 0
    runs = dict.fromkeys(joint.join(units[i : i + SHINGLE]) for i in range(min(n, SHINGLES)))
    return [utf8(run) for run in runs]


def languages(sample: list[str], progress: Progress = SILENT) -> dict[str, Any]:
    """{"sample", "shares": [[ISO 639 code, share], …]}, the commonest first."""
    import py3langid  # type: ignore[import-untyped]

    step = max(1, len(sample) // LANGUAGE_DOCUMENTS)
    chosen = sample[::step][:LANGUAGE_DOCUMENTS]
    found: Counter[str] = Counter()
    for i, text in enumerate(chosen):
        progress.check()
        progress.report(i, len(chosen), "Recognising languages")
        found[str(py3langid.classify(text[:LANGUAGE_CHARACTERS])[0])] += 1
    shares = [[code, n / len(chosen)] for code, n in found.most_common(20)]
    return {"sample": len(chosen), "shares": shares}


def boilerplate(sample: list[str]) -> dict[str, Any]:
    """{"sample", "lines": [[line, documents it stands in], …]}, the commonest first."""
    found: Counter[str] = Counter()
    for text in sample:
        lines = {line.strip() for line in text.splitlines()}
        found.update(line for line in lines if len(line) >= BOILERPLATE_LINE)
    least = max(5, BOILERPLATE_SHARE * len(sample))
    common = [[line[:200], n] for line, n in found.most_common(5) if n >= least]
    return {"sample": len(sample), "lines": common}


# --- in plain words ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warning:
    """A sentence about the quality of a dataset; `serious` ones stand in the way of training."""

    title: str
    text: str
    serious: bool = False


FEW_TOKENS = 1_000_000
USABLE_TOKENS = 100_000


def warnings(text: Mapping[str, Any], tokens: Mapping[str, Any] | None = None) -> list[Warning]:
    """What to know before training, from `text_statistics` and, where the dataset is tokenised,
    a tokenisation's statistics."""
    found = [*_about_text(text), *_about_tokens(text, tokens or {})]
    return sorted(found, key=lambda warning: not warning.serious)


def _about_text(text: Mapping[str, Any]) -> Iterable[Warning]:
    documents = max(1, text["documents"])
    copies = text["duplicates"]["copies"] / documents
    if copies >= 0.05:
        yield Warning(
            "Many exact duplicates",
            f"{copies:.0%} of the documents are copies of another. Features learn repeated text by "
            "heart; a dataset without the copies teaches more in the same time.",
            copies >= 0.5,
        )
    near = text["near_duplicates"]
    share = near["documents"] / max(1, near["sample"])
    if share >= 0.1:
        yield Warning(
            "Many near duplicates",
            f"{share:.0%} of {near['sample']:,} sampled documents have a near copy among the "
            "others, such as one page with another date.",
        )
    if text["boilerplate"]["lines"]:
        line, n = text["boilerplate"]["lines"][0]
        yield Warning(
            "Repeated lines",
            f"The line “{line[:60]}” stands in {n:,} of "
            f"{text['boilerplate']['sample']:,} sampled documents. Such lines are often menus or "
            "licence texts.",
        )
    if text["longest_share"] >= 0.5 and documents > 1:
        yield Warning(
            "Mostly one very long document",
            f"One document holds {text['longest_share']:.0%} of all characters. It falls whole on "
            "one side of the held-out split.",
            text["longest_share"] >= 0.9,
        )
    if documents == 1:
        yield Warning(
            "Only one document",
            "All text is one document, so that nothing can be held out to judge the result. Split "
            "it into documents, for example one per chapter.",
            True,
        )
    for key, title, what in (
        ("control_documents", "Control characters", "control characters, as in damaged files"),
        ("mojibake_documents", "Garbled characters", "characters read in the wrong encoding"),
    ):
        if text[key] / documents >= 0.01:
            yield Warning(
                title,
                f"{text[key]:,} of {documents:,} documents have {what}. Add the dataset again "
                "from its source, or with another encoding.",
            )
    if text["short_documents"] / documents >= 0.5:
        yield Warning(
            "Very short documents",
            f"{text['short_documents'] / documents:.0%} of the documents have fewer than {SHORT} "
            "characters. Packing puts many of them in one window; padding would be mostly empty.",
        )


def _about_tokens(text: Mapping[str, Any], tokens: Mapping[str, Any]) -> Iterable[Warning]:
    n = tokens.get("tokens")
    if n is None:
        if text["characters"] < USABLE_TOKENS * 2:
            yield Warning(
                "Little text",
                f"{text['characters']:,} characters are at most some {text['characters'] // 3:,} "
                "tokens: a dictionary needs hundreds of thousands to learn.",
                True,
            )
        return
    if n < FEW_TOKENS:
        yield Warning(
            "Few tokens for training",
            f"{n:,} tokens. Dictionaries are usually trained on millions; on so few they see each "
            "token several times and find coarser features.",
            n < USABLE_TOKENS,
        )
    if tokens.get("coverage", 1.0) < 0.1:
        yield Warning(
            "Little of the vocabulary occurs",
            f"Only {tokens['coverage']:.1%} of the tokenizer's vocabulary occurs in this text. "
            "Features for other subjects and languages cannot be found with it.",
        )
    per_token = text["characters"] / max(1, n)
    if n and not tokens.get("truncated") and not 1.5 <= per_token <= 8:
        yield Warning(
            "The tokenizer does not fit the text",
            f"A token stands for {per_token:.1f} characters; 3 to 5 are usual for English. The "
            "model may not know this language or kind of text.",
        )
