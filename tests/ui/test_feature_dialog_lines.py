"""Text as the dialog shows it: whole characters, cut around a peak."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mistudio.ui.features.dialog.reading import Line, joined

TEXT = "née 😀 ok"
BYTES = [bytes([b]) for b in TEXT.encode()]


def decode(ids: Sequence[int]) -> str:
    return b"".join(BYTES[i] for i in ids).decode("utf-8", errors="replace")


def spans(ids: Sequence[int]) -> tuple[list[str], list[int]]:
    return joined(ids, lambda i: decode([i]), decode)


def test_a_character_of_several_tokens_is_one_span() -> None:
    texts, starts = spans(range(len(BYTES)))
    assert texts == list(TEXT)
    assert [b - a for a, b in zip(starts, [*starts[1:], len(BYTES)], strict=True)] == [
        len(character.encode()) for character in TEXT
    ]


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_character_that_is_cut_off_stays_broken_and_alone(cut: int) -> None:
    emoji = TEXT.encode().index("😀".encode())
    texts, starts = spans(range(emoji + cut, len(BYTES)))
    assert texts[: 4 - cut] == ["\ufffd"] * (4 - cut) and "".join(texts[4 - cut :]) == " ok"
    texts, starts = spans(range(emoji + cut))
    assert "".join(texts).rstrip("\ufffd") == "née " and len(starts) == len(texts)


def line(peak: int) -> Line:
    """Ten spans of a token each, but the fourth, which has three."""
    texts = tuple("abcdefghij")
    widths = [1, 1, 1, 3, 1, 1, 1, 1, 1, 1]
    places = tuple(sum(widths[:i]) for i in range(11))
    ids = tuple(tuple(range(places[i], places[i + 1])) for i in range(10))
    return Line(texts, ids, (0.0,) * 10, places, peak)


@pytest.mark.parametrize(
    ("peak", "zoom", "shown"),
    [
        (5, 1, "efg"),
        (5, 3, "efghi"),  # the three tokens of d do not fit into three to the left
        (5, 4, "defghij"),
        (0, 2, "abc"),
        (9, 2, "hij"),
        (3, 1, "cde"),
        (-1, 1, "efg"),  # no peak: around the middle
        (5, 0, "abcdefghij"),
    ],
)
def test_zoom_counts_tokens_not_characters(peak: int, zoom: int, shown: str) -> None:
    assert line(peak).text(zoom) == shown


def test_the_peak_is_marked_in_what_is_copied() -> None:
    assert line(5).text(1, mark=True) == "e«f»g"
    assert line(-1).text(1, mark=True) == "efg"
