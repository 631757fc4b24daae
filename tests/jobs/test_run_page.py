"""The printable page: whole, self-contained, and safe whatever the record holds."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from mistudio.engine.sae.loss import LossRecovered
from mistudio.engine.sae.metrics import ReconstructionQuality
from mistudio.jobs.run_page import (
    DEFINITIONS,
    POINTS,
    _ticks,
    curve,
    page,
    series,
    thinned,
)

HOSTILE = "</td><script>alert(1)</script><img src=x onerror='y'>\"&"


def a_record(name: str = "run", sites: int = 2, text: str = "plain") -> dict[str, Any]:
    measures = {
        "tokens": 2048, "loss_tokens": 512, "explained_variance": 0.75, "fvu": 0.25, "l0": 8.04,
        "dead_share": 0.0125, "ce_loss_score": 0.987, "ce_increase": 0.0531, "kl": None,
        "d_sae": 1024, "d_in": 128, "k": 8, "batch_size": 256, "architecture": "jumprelu",
    }  # fmt: skip
    names = [f"blocks.{n}.hook_resid_post{text if n else ''}" for n in range(sites)]
    return {
        "name": name,
        "status": "completed",
        "written_at": "2026-01-01T00:00:00+00:00",
        "configuration": {
            "given": {"k": 8, text: text},
            "derived": {
                site: {"config": {"k": 8, "seed": 3, "skip": text}, "steps": 24, "d_sae": 1024}
                for site in names
            },
        },
        "seed": 3,
        "hook_points": [{"reads": text, "writes": text, "module": text}],
        "model": {
            "name": text, "origin": text, "revision": text, "precision": text,
            "files": [{"name": text, "sha256": text}],
        },
        "dataset": {"name": text, "origin": text, "revision": text, "sha256": text},
        "tokenizer_hash": text,
        "tokenization": {"train_tokens": 90_000, "heldout_tokens": 10_000},
        "source": text,
        "tokens": 6144,
        "tokens_per_second": 512.3,
        "training_seconds": 12.0,
        "wall_seconds": 30.0,
        "notes": [text],
        "events": [
            {"event": "rolled back", "at": text, "step": 1000, "from_step": 5000},
            {"event": text, "at": text, "step": 3},
        ],
        "sites": {site: dict(measures) for site in names},
        "versions": {"mistudio": "1", text: text},
        "device": text,
    }  # fmt: skip


def rows_of(record: dict[str, Any], n: int = 50) -> list[dict[str, Any]]:
    return [
        {"site": site, "step": step, "loss": 2.0 / (1 + step), "fvu": 1 / (1 + step), "l0": 9.0}
        for step in range(n)
        for site in record["sites"]
    ]


class Tags(HTMLParser):
    """Every tag is closed in its order; which tags, attributes and texts there are."""

    EMPTY = ("meta", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


@pytest.mark.parametrize("sites", [1, 2, 12])
def test_a_page_is_whole_and_needs_nothing_else(sites: int) -> None:
    record = a_record(sites=sites)
    text = page(record, rows_of(record))
    tags = read(text)
    assert tags.tags.isdisjoint({"script", "img", "link", "iframe", "object", "a", "form", "base"})
    assert {"src", "href", "onload", "onerror", "style"}.isdisjoint(tags.attributes)
    assert "url(" not in text and "@import" not in text and "http:" not in text
    assert "https:" not in text
    assert "@page { size: A4" in text and "default-src 'none'" in text
    assert len(re.findall("<polyline", text)) == 3 * sites
    for figure in re.findall("<svg.*?</svg>", text):
        ElementTree.fromstring(figure)


@pytest.mark.parametrize("text", [HOSTILE, "<b>", "' onload='x", "]]>", "\u202eabc", "\ud800"])
def test_whatever_a_record_holds_is_text(text: str) -> None:
    record = a_record(name=text, text=text)
    shown = page(record, rows_of(record))
    tags = read(shown)
    plain = a_record()
    expected = read(page(plain, rows_of(plain)))
    assert tags.tags == expected.tags
    assert tags.attributes.keys() == expected.attributes.keys()
    assert any(text in data for data in tags.texts)
    assert "<script" not in shown and "<img" not in shown and "<b>" not in shown


def test_numbers_are_those_of_the_record() -> None:
    record = a_record()
    text = page(record, rows_of(record))
    for shown in ("75.00%", "25.00%", "98.70%", "1.25%", "8", "0.0531", "6,144", "12 s", "30 s",
                  "512 tokens/s", "90,000", "2,048 held-out tokens", "1,024"):  # fmt: skip
        assert shown in text, shown
    assert "taken back from step 5,000 to step 1,000" in text
    # the small print: definitions with their sample sizes
    assert "On 2,048 tokens." in text and "On 512 tokens." in text


def test_what_a_record_lacks_is_a_dash_and_never_a_number() -> None:
    text = page({}, [])
    read(text)
    assert text.count("—") > 10 and "<svg" not in text
    assert not re.search(r">0[.%<]", text)
    for odd in (None, [], "text", 5, {"model": None}, {"x": []}):
        read(page({"sites": {"a": odd}, "model": odd, "events": [odd], "notes": []}, []))


def test_every_measure_has_a_definition() -> None:
    measured = {
        *ReconstructionQuality.__dataclass_fields__,
        *LossRecovered.__dataclass_fields__,
    } - {"tokens", "density", "dead_share_window", "ce_windows", "ce_mean_tokens"}
    assert measured <= DEFINITIONS.keys()
    for entry in DEFINITIONS.values():
        assert entry["label"] and entry["definition"]
        assert entry["sample"] in ("", "tokens", "loss_tokens", "batch_size")


def test_curves_keep_their_peaks_and_ends_however_long_they_are() -> None:
    generator = random.Random(0)
    points = [(float(n), generator.random()) for n in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    points[33_333] = (33_333.0, -3.0)
    found = thinned(points)
    assert len(found) <= POINTS
    assert found == sorted(found)
    assert {points[0], points[-1], points[77_777], points[33_333]} <= set(found)
    assert thinned(points[:POINTS]) == points[:POINTS]


def test_what_is_no_number_is_not_drawn() -> None:
    rows: list[dict[str, Any]] = [
        {"site": "a", "step": 0, "loss": 1.0},
        {"site": "a", "step": 1, "loss": math.nan},
        {"site": "a", "step": 2, "loss": None},
        {"site": "b", "step": 3, "loss": 1.0},
        {"site": "a", "step": "4", "loss": 1.0},
        {"site": "a", "step": 5},
        {"site": "a", "step": 6, "loss": 2.0},
    ]
    assert series(rows, "a", "loss") == [(0.0, 1.0), (6.0, 2.0)]


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 1.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(5.0, -1.0), (5.0, 1.0)],
        [(0.0, 1e-9), (1e9, 1e9)],
        [(0.0, 3.0), (1.0, 70.0)],
    ],
)
def test_any_curve_lies_inside_of_its_frame(points: list[tuple[float, float]]) -> None:
    root = ElementTree.fromstring(curve({"site": points}, "Loss"))
    (line,) = root.iter("polyline")
    for pair in line.attrib["points"].split():
        x, y = map(float, pair.split(","))
        assert 66 <= x <= 748 and 12 <= y <= 210
    for label in root.iter("line"):
        assert 0 <= float(label.attrib["y1"]) <= 290


def test_ticks_are_round() -> None:
    assert _ticks(0, 10, False) == [0, 2, 4, 6, 8, 10]
    assert _ticks(0, 976, False) == [0, 200, 400, 600, 800]
    assert _ticks(-3.2, 1.1, True) == [-3, -2, -1, 0, 1]
    shown = [round(10**value, 6) for value in _ticks(-0.7, 1.1, True)]
    assert shown == [0.2, 0.5, 1, 2, 5, 10]
    assert len(_ticks(-300, 300, True)) < 10
    assert all(3 <= len(_ticks(0, top, False)) <= 7 for top in (0.013, 0.7, 1, 7, 23, 1e6))
