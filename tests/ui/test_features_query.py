"""What the feature table shows and in which order, against plain numpy; no window but one view."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QRect, Qt
from PySide6.QtWidgets import QApplication

from mistudio.engine.features.columns import BY_NAME, TABLE, bands
from mistudio.engine.features.store import FeatureMeta
from mistudio.library.features import FeatureNote
from mistudio.ui.features import shown as columns_of
from mistudio.ui.features.by_text import RANKS, heat_of, ranking, strengths, subset_of
from mistudio.ui.features.notes import Notes
from mistudio.ui.features.painting import bars
from mistudio.ui.features.query import GIVEN, Query, Range, sorted_by
from mistudio.ui.features.reader import Columns, RowText, Snippet
from mistudio.ui.features.table import KEPT_TEXTS, FeatureTable, Subset

TOKENS = 1_000_000


def synthetic(n: int, seed: int = 0) -> Columns:
    generator = np.random.default_rng(seed)
    n_active = (generator.random(n) ** 6 * TOKENS / 2).astype(np.int64)
    n_active[generator.random(n) < 0.1] = 0
    score = generator.random(n).astype(np.float32)
    score[generator.random(n) < 0.3] = np.nan
    values = {
        "density": (n_active / TOKENS).astype(np.float32),
        "n_active": n_active,
        "band": bands(n_active, TOKENS),
        "max_activation": (generator.integers(0, 50, n) / 7).astype(np.float32),  # many are equal
        "skewness": generator.standard_normal(n).astype(np.float32),
        "top_token": np.where(n_active > 0, generator.integers(0, 50, n), -1).astype(np.int32),
        "score": score,
        "score_contexts": np.where(np.isnan(score), 0, 80).astype(np.int32),
    }
    meta = FeatureMeta(n, TOKENS, 8000, 128, "train", 20, 24, "blocks.1.hook_resid_post", format=2)
    return Columns(meta, values, generator.integers(0, 9, (n, 64), dtype=np.uint32))


@pytest.fixture(scope="module")
def columns() -> Columns:
    return synthetic(5000)


@pytest.fixture
def table(qapp: QApplication, columns: Columns) -> FeatureTable:
    made = FeatureTable()
    made.set_columns(columns)
    return made


def note(feature: int, label: str = "", starred: bool = False, hidden: bool = False) -> Any:
    return FeatureNote(1, feature, label, "", starred, hidden)


# --- order ----------------------------------------------------------------------------------------


def test_order_is_the_stable_one_of_numpy_with_no_number_last(
    table: FeatureTable, columns: Columns
) -> None:
    alive = np.flatnonzero(columns.values["density"] > 0)
    for key in columns.values:
        for descending in (True, False):
            table.set_sort(key, descending)
            values = columns.values[key].astype(np.float64)[alive]
            none = BY_NAME[key].none
            missing = np.isnan(values) | (values == (none if none is not None else np.inf))
            has, lacks = alive[~missing], alive[missing]
            order = np.argsort(-values[~missing] if descending else values[~missing], kind="stable")
            assert table.visible.dtype == np.int32
            assert np.array_equal(table.visible, np.concatenate([has[order], lacks])), key
    table.set_sort("id", True)
    assert np.array_equal(table.visible, alive[::-1])


@pytest.mark.parametrize(
    "values",
    [
        np.array([0.0, -0.0, -1.5, 3e38, -3e38, 1e-40, -1e-40, 0.0], np.float32),
        np.array([5, 0, 2**40, 5, -7, 3, 3, 0]),
        np.array([5, 0, 2**32 - 1, 5, 9, 3, 3, 0]),
        np.array([5, 0, 255, 5, 9, 3, 3, 0], np.uint8),
    ],
    ids=["signs and tiny", "beyond 32 bits", "just 32 bits", "bytes"],
)
def test_packed_keys_give_the_stable_order(values: np.ndarray) -> None:
    numbers = np.arange(10, 18, dtype=np.int32)
    plain = values.astype(np.float64)
    for descending in (False, True):
        order = np.argsort(-plain if descending else plain, kind="stable")
        assert np.array_equal(sorted_by(values, numbers, descending), numbers[order])


def test_labels_and_stars_have_an_order(table: FeatureTable) -> None:
    table.set_query(Query(alive=False, sort="label", descending=False))
    table.set_notes({4: note(4, "zebra"), 9: note(9, "Apple", True), 2: note(2, "apple pie")})
    assert table.visible[:5].tolist() == [9, 2, 4, 0, 1]
    table.set_sort("label", True)
    assert table.visible[:5].tolist() == [4, 2, 9, 0, 1]
    table.set_sort("star", True)
    assert table.visible[:3].tolist() == [9, 0, 1]


# --- filters --------------------------------------------------------------------------------------


def test_ranges_and_bands_keep_what_numpy_keeps(table: FeatureTable, columns: Columns) -> None:
    values = columns.values
    base = Query(alive=False)

    def kept(query: Query) -> set[int]:
        table.set_query(query)
        return set(table.visible.tolist())

    assert len(kept(base)) == 5000
    assert kept(Query()) == set(np.flatnonzero(values["density"] > 0).tolist())
    density = values["density"]
    ranged = base.with_range(Range("density", 0.01, 0.1))
    inside = (density >= np.float32(0.01)) & (density <= np.float32(0.1))
    assert kept(ranged) == set(np.flatnonzero(inside).tolist())
    both = ranged.with_range(Range("skewness", None, 0.0))
    assert kept(both) == set(np.flatnonzero(inside & (values["skewness"] <= 0)).tolist())
    # Whatever has no number lies in no range, not even in one that leaves nothing out.
    all_scores = base.with_range(Range("score", -1e9, 1e9))
    assert kept(all_scores) == set(np.flatnonzero(~np.isnan(values["score"])).tolist())
    few = base.with_range(Range("score_contexts", None, 90))
    assert kept(few) == set(np.flatnonzero(~np.isnan(values["score"])).tolist())
    assert kept(replace(base, bands=("dead", "rare"))) == set(
        np.flatnonzero(np.isin(values["band"], [0, 2])).tolist()
    )
    exact = float(density[17])
    assert 17 in kept(base.with_range(Range("density", exact, exact)))


def test_stars_labels_hidden_ones_and_lists(table: FeatureTable) -> None:
    table.set_query(Query(alive=False))
    table.set_notes({7: note(7, starred=True), 9: note(9, "x"), 11: note(11, "y", True, True),
                     99_999: note(99_999, "of another discovery", True)})  # fmt: skip
    assert len(table.visible) == 4999 and 11 not in table.visible  # hidden ones are not shown
    table.set_query(Query(alive=False, starred=True))
    assert table.visible.tolist() == [7]
    table.set_query(Query(alive=False, starred=True, hidden="with", sort="id", descending=False))
    assert table.visible.tolist() == [7, 11]
    table.set_query(Query(alive=False, hidden="only"))
    assert table.visible.tolist() == [11]
    table.set_query(Query(alive=False, labelled=True))
    assert table.visible.tolist() == [9]
    table.set_query(Query(alive=False, sort="id", descending=False))
    table.set_listed(3, [5, 9, 11, 70_000])
    assert table.visible.tolist() == [5, 9] and table.query.list_id == 3
    table.set_listed(0, [])
    assert len(table.visible) == 4999


def test_a_subset_keeps_its_order_until_another_is_asked_for(table: FeatureTable) -> None:
    table.set_query(Query(alive=False))
    order = np.array([40, 3, 77, 9_000, -1])
    table.show_subset(Subset(order, "Fires on this text", ranked=True))
    assert table.visible.tolist() == [40, 3, 77] and table.query.sort == GIVEN
    table.set_sort("id", False)
    assert table.visible.tolist() == [3, 40, 77]
    table.set_subset(np.array([8, 5]), "Lasso")  # not ranked: in the order of the table
    assert table.visible.tolist() == [5, 8] and table.subset is not None
    assert table.subset.title == "Lasso"
    table.set_subset(None)
    assert len(table.visible) == 5000 and table.subset is None
    table.show_subset(Subset(order, "again", ranked=True))
    table.set_subset(None)
    assert table.query.sort == "density"


def test_a_query_survives_json_and_bad_values_do_not_harm() -> None:
    query = Query(
        ranges=(Range("density", 1e-4, None), Range("score", None, 0.5)),
        bands=("rare", "dense"), alive=False, starred=True, hidden="only", list_id=4,
        search="music", fields=("label", "context"), sort="kurtosis", descending=False,
    )  # fmt: skip
    assert Query.from_dict(json.loads(json.dumps(query.to_dict()))) == query
    assert Query.from_dict({"ranges": 3, "hidden": "?", "sort": None, "bands": ["?"]}) == Query()
    assert Query.from_dict({"ranges": [{"column": "density", "low": "x"}, 7]}) == Query()
    changed = query.with_range(Range("density", 0.5, 0.6))
    assert [one.column for one in changed.ranges] == ["density", "score"]  # at its place
    assert changed.with_range(Range("density")).ranges == (Range("score", None, 0.5),)


# --- texts ----------------------------------------------------------------------------------------


def test_every_statistic_has_a_column_with_definition_unit_and_sample(columns: Columns) -> None:
    assert {column.name for column in TABLE} <= set(columns_of.ALL)
    assert len(columns_of.ALL) > 40
    for column in TABLE:
        tip = columns_of.tip(columns_of.ALL[column.name], columns.meta)
        assert column.definition in tip
        assert column.unit in tip or column.name in columns_of.TOKEN_COLUMNS
        assert ("Sample: " in tip) == bool(column.sample), column.name
    assert "of 1,000,000 tokens" in columns_of.tip(columns_of.ALL["density"], columns.meta)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("density", 0.0023, "0.23%"), ("density", 0.000012, "0.0012%"), ("density", 0.0, "0%"),
        ("n_active", 12345, "12,345"), ("band", 2, "rare"), ("score", 0.944, "94%"),
        ("score", float("nan"), "—"), ("score_contexts", 0, "—"), ("score_percentile", 99.2, "99%"),
        ("nearest_feature", -1, "—"), ("nearest_feature", 12, "#12"),
        ("kurtosis", -0.213, "-0.213"),
        ("max_activation", 21.34, "21.3"), ("skewness", 0.0, "0"), ("token_purity", 0.5, "50.0%"),
    ],
)  # fmt: skip
def test_numbers_as_people_compare_them(name: str, value: float, text: str) -> None:
    assert columns_of.written(columns_of.ALL[name], value) == text


def test_bounds_of_shares_are_typed_in_percent() -> None:
    density, strength = columns_of.ALL["density"], columns_of.ALL["max_activation"]
    for typed in ("0.01%", " 0.01 ", "0.01 %"):
        assert columns_of.bound_of(density, typed) == 0.0001
    assert columns_of.bound_of(strength, "1,000.5") == 1000.5
    assert columns_of.bound_of(density, " ") is None
    for wrong in ("much", "nan", "1..2"):
        with pytest.raises(ValueError):
            columns_of.bound_of(density, wrong)
    assert columns_of.range_text(density, 1e-4, 0.01) == "0.01% ≤ Activation Freq ≤ 1%"
    assert columns_of.range_text(strength, None, 3.0) == "Max activation ≤ 3"


def test_bars_show_the_upper_eight_octaves_and_count_the_rest_with_the_lowest() -> None:
    counts = np.zeros(64, np.uint32)
    cell = QRect(0, 0, 128, 40)
    assert bars(counts, cell) == []
    counts[63], counts[40], counts[3], counts[20] = 400, 100, 60, 40
    drawn = bars(counts, cell)
    assert [bar.left() for bar in drawn] == [0, 32, 124]
    assert [bar.height() for bar in drawn] == [20, 20, 39]  # roots: 100 of 400 is half as high
    assert all(cell.contains(bar) for bar in drawn)


# --- the model ------------------------------------------------------------------------------------


def test_a_hundred_thousand_rows_are_sorted_without_touching_one(qtbot: Any, themed: Any) -> None:
    """Sorting and filtering make one new array: no call of data() for each row, no row objects."""
    from mistudio.ui.features.view import FeatureView

    class Counted(FeatureTable):
        calls = 0

        def data(self, index: Any, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
            Counted.calls += 1
            return super().data(index, role)

    table = Counted()
    view = FeatureView(table, "emerald")
    qtbot.addWidget(view)
    table.set_columns(synthetic(100_000))
    view.resize(1200, 500)
    view.show()
    qtbot.waitExposed(view)
    QApplication.processEvents()
    Counted.calls = 0
    for key in ("max_activation", "score", "id", "density"):
        table.set_sort(key, False)
        table.set_query(table.query.with_range(Range("density", 0.001)))
    assert Counted.calls < 200
    QApplication.processEvents()
    assert Counted.calls < 2000  # what can be seen, not 700,000 cells
    table.set_query(Query())
    alive = int((table.columns.values["density"] > 0).sum())
    assert table.rowCount() == alive
    view.selectAll()
    assert np.array_equal(view.selected_features(), table.visible)


def test_a_selection_follows_its_features_into_a_new_order(qtbot: Any, table: FeatureTable) -> None:
    from mistudio.ui.features.view import FeatureView

    view = FeatureView(table, "emerald")
    qtbot.addWidget(view)
    chosen = table.visible[[3, 4, 10]]
    view.select(chosen, int(chosen[2]))
    table.set_sort("skewness", False)
    assert set(view.selected_features().tolist()) == set(chosen.tolist())
    assert view.current_feature() == chosen[2]
    table.set_query(table.query.with_range(Range("skewness", float("1e9"))))  # nothing is left
    assert len(view.selected_features()) == 0


def test_columns_can_be_dragged_to_another_place(qtbot: Any, table: FeatureTable) -> None:
    from mistudio.ui.features.view import FeatureView

    view = FeatureView(table, "emerald")
    qtbot.addWidget(view)
    table.set_wanted(["id", "label", "density", "score_low", "kurtosis", "star", "no such"])
    assert [one.name for one in table.shown] == ["id", "label", "density", "star"]
    header = view.horizontalHeader()
    header.moveSection(2, 0)
    qtbot.waitUntil(lambda: table.shown[0].name == "density")
    assert [header.visualIndex(section) for section in range(4)] == [0, 1, 2, 3]
    # Those that this discovery lacks keep their wish for another one.
    assert table.wanted == ("density", "id", "label", "star", "score_low", "kurtosis")


def test_texts_are_kept_for_some_rows_only(table: FeatureTable) -> None:
    snippet = Snippet(("a",), (1.0,), 0)
    for first in range(0, 5000, 50):
        table.add_texts([RowText(i, "d", "e", snippet) for i in range(first, first + 50)])
    assert len(table._texts) == KEPT_TEXTS
    assert table.text(4999) is not None and table.text(0) is None


def test_notes_are_searched_word_by_word() -> None:
    notes = Notes.gathered({3: FeatureNote(1, 3, "Zebra crossing", "near schools", False)}, 10)
    assert notes.containing("CROSS zebra", ("label", "note")) == [3]
    assert notes.containing("zebra schools", ("label",)) == []
    assert notes.containing("zebra schools", ("label", "note")) == [3]
    assert notes.containing(" ", ("label", "note")) == []


# --- search by text -------------------------------------------------------------------------------


def probe_of(entries: list[tuple[int, int, float]], n: int) -> Any:
    from mistudio.jobs.probing import Probe

    tokens, features, values = zip(*entries, strict=True)
    return Probe(
        tuple(range(n)),
        tuple(f"t{i}" for i in range(n)),
        np.ones(n, bool),
        np.array(tokens),
        np.array(features),
        np.array(values, np.float32),
        0.0,
        False,
    )


def test_features_of_a_text_are_ranked_by_the_formula_that_is_told(qapp: QApplication) -> None:
    columns = synthetic(4)
    columns.values["max_activation"] = np.array([10, 2, 0, 4], np.float32)
    columns.values["density"] = np.array([0.5, 0.01, 0.0, 1e-6], np.float32)
    probe = probe_of([(1, 0, 5.0), (2, 0, 4.0), (1, 1, 1.5), (3, 2, 1.0), (3, 3, 1.0)], 4)
    strongest = strengths(probe, 4)
    assert strongest.tolist() == [5.0, 1.5, 1.0, 1.0]
    # Feature 2 never fired in the discovery: what it does here is all of what is known of it.
    relative = ranking(strongest, columns, "relative")
    assert relative.tolist() == pytest.approx([0.5, 0.75, 1.0, 0.25])
    rare = ranking(strongest, columns, "rare")
    assert rare.tolist() == pytest.approx([0.5 * -np.log10(0.5), 1.5, 6.0, 1.5], rel=1e-5)
    assert subset_of(probe, columns, RANKS[0]).features.tolist() == [2, 1, 0, 3]
    assert subset_of(probe, columns, RANKS[1]).features.tolist() == [0, 1, 2, 3]
    on_token = subset_of(probe, columns, RANKS[1], token=2)
    assert on_token.features.tolist() == [0] and "t2" in on_token.title
    assert heat_of(probe, columns).tolist() == pytest.approx([0, 0.75, 0.4, 1.0])
    assert heat_of(probe, columns, 0).tolist() == pytest.approx([0, 0.5, 0.4, 0])
