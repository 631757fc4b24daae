"""Curves cut down for the screen: nothing that stands out is lost, at any zoom."""

from __future__ import annotations

import numpy as np
import pytest

from mistudio.ui.widgets.decimation import Curve

POINTS = 100_000


def a_curve(y: np.ndarray, *sizes: int) -> Curve:
    """`y` over steps and over seconds, in pieces of these sizes, over and over."""
    curve, at = Curve(("step", "seconds")), 0
    sizes = sizes or (len(y),)
    while at < len(y):
        for size in sizes:
            part = y[at : at + size]
            steps = np.arange(at, at + len(part))
            curve.extend({"step": steps, "seconds": steps**1.5}, part)
            at += len(part)
    return curve


@pytest.mark.parametrize("spike", [1e6, -1e6])
@pytest.mark.parametrize("columns", [100, 560, 2000])
def test_a_single_point_that_stands_out_is_shown_at_any_zoom(columns: int, spike: float) -> None:
    noise = np.random.default_rng(0).normal(size=POINTS)
    for place in (0, 1, 4_095, 4_096, 31_337, 65_535, 99_998, POINTS - 1):
        y = noise.copy()
        y[place] = spike
        curve = a_curve(y, 999, 1, 5000)
        for width in (POINTS, 70_001, 20_000, 3_000, 200, 7):
            for share in (0.0, 0.31, 0.99):
                start = max(0.0, place - share * width)
                x, shown = curve.shown("step", columns, start, start + width)
                assert spike in shown and x[list(shown).index(spike)] == place
                assert len(x) <= 4 * columns + 8


def test_each_pixel_column_spans_what_its_points_span() -> None:
    """Drawn by brute force and drawn from the pyramid: the same lows and highs in every column."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=50_000).cumsum()
    curve, columns = a_curve(y, 1, 17, 1024), 300
    x, shown = curve.shown("step", columns)
    assert (np.diff(x) >= 0).all() and x[0] == 0 and x[-1] == len(y) - 1
    assert np.array_equal(shown, y[x.astype(int)])  # points that exist, where they are
    width = len(y) / columns
    for column in range(columns):
        whole = y[int(column * width) : int((column + 1) * width)]
        # A block may reach into the neighbouring column: never by more than a column's width.
        near = (x >= (column - 1) * width) & (x < (column + 2) * width)
        assert shown[near].min() <= whole.min() and shown[near].max() >= whole.max()


def test_few_points_are_shown_as_they_are() -> None:
    y = np.random.default_rng(2).normal(size=300)
    x, shown = a_curve(y).shown("step", 200)
    assert np.array_equal(x, np.arange(300)) and np.array_equal(shown, y)


def test_every_axis_is_cut_by_its_own_range() -> None:
    curve = a_curve(np.arange(1000.0))
    x, y = curve.shown("seconds", 100, 500**1.5, 510**1.5)
    assert list(y) == list(range(499, 512)) and np.array_equal(x, y**1.5)


def test_an_axis_that_falls_back_loses_nothing() -> None:
    curve = Curve(("step",))
    curve.extend({"step": [1, 2, 3]}, [1.0, 2.0, 3.0])
    curve.extend({"step": [2, 3, 4]}, [5.0, 6.0, 7.0])
    x, y = curve.shown("step", 1, 2, 2)
    assert list(x) == [1, 2, 3, 2, 3, 4] and list(y) == [1, 2, 3, 5, 6, 7]


def test_what_was_given_out_stays_as_it_was() -> None:
    curve = a_curve(np.arange(60.0))
    _, before = curve.shown("step", 100)
    curve.extend({"step": range(60, 500), "seconds": range(1000, 1440)}, [0.0] * 440)
    assert np.array_equal(before, np.arange(60.0))


def test_nothing_is_shown_of_nothing() -> None:
    x, y = Curve(("step",)).shown("step", 100)
    assert len(x) == len(y) == 0
