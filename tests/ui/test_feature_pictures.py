"""Pictures of features: what is drawn is what is there, what is enclosed is what the table shows,
what is saved has the size that was asked for."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QPoint, QPointF, Qt
from PySide6.QtGui import QImage, QPolygonF
from PySide6.QtWidgets import QApplication

from mistudio.engine.features import maps
from mistudio.engine.features.code_sample import load_sample
from mistudio.engine.features.layout import MapSettings
from mistudio.jobs.feature_map import SampleFeatures
from mistudio.jobs.job import run_job, submit
from mistudio.library.library import Library
from mistudio.ui.features.page import FeaturesPage
from mistudio.ui.features.pictures import data, figures, open_pictures
from mistudio.ui.features.pictures.dialog import PicturesDialog
from mistudio.ui.features.pictures.map_view import MapView
from mistudio.ui.features.pictures.point_map import LASSO, RECTANGLE, PointMap, View
from mistudio.ui.features.pictures.raster import PAD, Canvas, inside
from mistudio.ui.features.pictures.sampled import HeatmapView, MatrixView
from mistudio.ui.features.pictures.scales import NONE, PAPER, SHADES, Scale, continuous
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot

# --- points ---------------------------------------------------------------------------------------


def scattered(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    numbers = np.sort(generator.choice(10 * n, n, replace=False)).astype(np.int32)
    return numbers, generator.normal(size=n), generator.normal(size=n)


@pytest.fixture
def points(qtbot: Any, themed: QApplication) -> PointMap:
    widget = PointMap()
    qtbot.addWidget(widget)
    widget.resize(500, 400)
    widget.set_points(*scattered(400))
    widget.show()
    return widget


def star(n: int, seed: int) -> list[tuple[float, float]]:
    """A lasso that crosses itself, in pixels."""
    generator = np.random.default_rng(seed)
    return [(float(x), float(y)) for x, y in generator.uniform((60, 60), (440, 340), (n, 2))]


def by_qt(widget: PointMap, path: list[tuple[float, float]]) -> set[int]:
    """Point by point, as Qt tells it."""
    polygon = QPolygonF([QPointF(x, y) for x, y in path])
    found = set()
    for i, feature in enumerate(widget.features.tolist()):
        place = widget.to_screen(float(widget._x[i]), float(widget._y[i]))
        if polygon.containsPoint(place, Qt.FillRule.OddEvenFill):
            found.add(feature)
    return found


@pytest.mark.parametrize("seed", [1, 3])
def test_a_lasso_encloses_exactly_the_points_in_it(points: PointMap, seed: int) -> None:
    path = star(3 + 4 * seed, seed)
    wanted = by_qt(points, path)
    assert points.enclose(path).tolist() == sorted(wanted) and 0 < len(wanted) < 400
    points.zoom(3.0, QPointF(120, 300))
    assert points.enclose(path).tolist() == sorted(by_qt(points, path))


def test_a_polygon_of_less_than_three_corners_encloses_nothing() -> None:
    x = y = np.array([0.5])
    assert not inside(x, y, np.array([[0.0, 0.0], [1.0, 1.0]])).any()


def drag(qtbot: Any, widget: PointMap, path: list[tuple[int, int]], keys: Any = None) -> Any:
    keys = keys or Qt.KeyboardModifier.NoModifier
    left = Qt.MouseButton.LeftButton
    with qtbot.waitSignal(widget.enclosed) as told:
        qtbot.mousePress(widget, left, keys, QPoint(*path[0]))
        for place in path[1:]:
            qtbot.mouseMove(widget, QPoint(*place))
        qtbot.mouseRelease(widget, left, keys, QPoint(*path[-1]))
    return told.args


def test_lasso_and_rectangle_are_drawn_with_the_mouse(qtbot: Any, points: PointMap) -> None:
    path = [(100, 100), (300, 90), (320, 300), (200, 350), (90, 250)]
    points.mode = LASSO
    found, way = drag(qtbot, points, path)
    assert set(found.tolist()) == by_qt(points, [(x, y) for x, y in path]) and way == "replace"
    points.mode = RECTANGLE
    found, way = drag(qtbot, points, [(150, 120), (260, 260)], Qt.KeyboardModifier.ControlModifier)
    corners = [(150, 120), (260, 120), (260, 260), (150, 260)]
    assert set(found.tolist()) == by_qt(points, corners) and way == "add"
    found, way = drag(qtbot, points, [(10, 10), (490, 390)], Qt.KeyboardModifier.AltModifier)
    assert way == "remove" and len(found) == 400


def test_a_click_opens_the_nearest_point_and_a_drag_moves_the_map(
    qtbot: Any, points: PointMap
) -> None:
    left = Qt.MouseButton.LeftButton
    alone = int(np.argmax(points._x))
    place = points.to_screen(float(points._x[alone]), float(points._y[alone])).toPoint()
    with qtbot.waitSignal(points.clicked) as told:
        qtbot.mouseClick(points, left, pos=place + QPoint(2, 1))
    assert told.args == [int(points.features[alone])]
    before = points.view
    qtbot.mousePress(points, left, pos=QPoint(200, 200))
    qtbot.mouseMove(points, QPoint(250, 170))
    qtbot.mouseRelease(points, left, pos=QPoint(250, 170))
    after = points.to_screen(before.x, before.y)
    assert (round(after.x()), round(after.y())) == (300, 170)


def test_zooming_keeps_what_is_under_the_pointer(points: PointMap) -> None:
    place = QPointF(333, 77)
    before = points.to_map(place)
    points.zoom(5.0, place)
    assert points.to_map(place) == pytest.approx(before, abs=1e-6)
    points.show_all()
    assert points.view == points._whole()


def test_keys_go_from_point_to_point(qtbot: Any, points: PointMap) -> None:
    qtbot.keyClick(points, Qt.Key.Key_Right)
    first = points.current
    assert first >= 0
    x, _ = points._screen()
    place = {int(f): float(at) for f, at in zip(points.features, x, strict=True)}
    qtbot.keyClick(points, Qt.Key.Key_Right)
    assert place[points.current] > place[first]
    with qtbot.waitSignal(points.clicked) as told:
        qtbot.keyClick(points, Qt.Key.Key_Return)
    assert told.args == [points.current]


def test_every_point_is_drawn_in_its_colour_where_it_is(points: PointMap) -> None:
    palette = np.full(256, 0xFF000000, np.uint32)
    palette[:2] = 0xFF34D399, 0xFFFACC15
    numbers = points.features
    shades = np.zeros(int(numbers.max()) + 1, np.uint8)
    rightmost = int(np.argmax(points._x))
    shades[numbers[rightmost]] = 1
    points.set_colours(shades, palette)
    picture = points.draw().picture
    assert (picture == 0xFFFACC15).any()
    at = points.to_screen(float(points._x[rightmost]), float(points._y[rightmost])).toPoint()
    assert picture[at.y(), at.x()] == 0xFFFACC15
    kept = np.ones(len(shades), bool)
    kept[numbers[rightmost]] = False
    none = np.zeros(len(shades), bool)
    points.set_marks(kept, none, none)
    assert not (points.draw().picture == 0xFFFACC15).any()


def test_points_beyond_the_edge_are_left_out_and_those_at_it_are_cut() -> None:
    canvas = Canvas(20, 10)
    canvas.clear(0)
    seen, pixels = canvas.place(np.array([-50.0, 0.0, 19.9, 400.0]), np.array([5.0, 0.0, 9.9, 5.0]))
    assert seen.tolist() == [1, 2]
    colours = np.array([7, 9], np.uint32)
    canvas.discs(pixels, colours, colours, 5.0)
    assert canvas.picture.shape == (10, 20)
    assert canvas.picture[0, 0] == 7 and canvas.picture[9, 19] == 9 and canvas.picture[0, 19] == 0
    assert canvas.pixels.shape == (10 + 2 * PAD, 20 + 2 * PAD)


# --- scales ---------------------------------------------------------------------------------------


def test_colours_of_points_can_be_seen_on_screen_and_on_paper() -> None:
    for scale in (Scale("", "points"), Scale("", "kinds"), Scale("", "steps", names=("a", "b"))):
        for paper, ground in ((False, tokens.CARD), (True, PAPER)):
            for number in set(scale.palette(paper)[:SHADES].tolist()):
                colour = f"#{number & 0xFFFFFF:06X}"
                least = 2.4 if paper else 3.0  # on paper, the light end and what has no value
                assert tokens.contrast(colour, ground) >= least, (scale.kind, paper, colour)


def test_what_has_no_value_has_a_colour_of_its_own() -> None:
    values = np.array([np.nan, 0.5, 1.0, 1000.0, 2000.0])
    scale = continuous("", values)
    assert scale.has_none and scale.log
    shades = scale.shades(values)
    assert shades[0] == NONE and (np.diff(shades[1:].astype(int)) >= 0).all()
    assert shades[-1] == SHADES - 1 and scale.clipped == (True, True)
    assert scale.ticks()[-1][1].startswith("≥") and scale.written(np.nan) == "—"
    same = continuous("", np.full(4, 3.0))
    assert len(set(same.shades(np.full(4, 3.0)).tolist())) == 1


# --- the window -----------------------------------------------------------------------------------


@pytest.fixture
def page(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> FeaturesPage:
    page = FeaturesPage(services_of(trained_library))
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    qtbot.waitUntil(lambda: page.presenter.table.columns is not None)
    return page


def library_of(page: FeaturesPage) -> Library:
    return page._services.library


def give_map(page: FeaturesPage, method: str = "umap") -> maps.FeatureMap:
    """A map of places made up, kept as a real one is."""
    library = library_of(page)
    run = library.feature_runs.all()[0]
    density = np.asarray(page.presenter.table.columns.values["density"])
    features = np.flatnonzero((density > 0) & (density <= 0.1))
    generator = np.random.default_rng(3)
    made = maps.FeatureMap(
        MapSettings(method),
        maps.places_of(
            len(density),
            features,
            generator.normal(size=(len(features), 2)),
            generator.integers(-1, 4, len(features)),
        ),
        len(features),
        int((density == 0).sum()),
        int((density > 0.1).sum()),
        0,
        0,
        1.0,
        maps.Quality(0.91, 0.4, 15, len(features)),
        2.0,
        maps.now(),
        {"umap-learn": "0.5"},
    )
    maps.save_map(library.path(run.folder), made)
    return made


def give_sample(page: FeaturesPage) -> None:
    library = library_of(page)
    job = SampleFeatures(library.feature_runs.all()[0].id, 4000)
    record = run_job(library, job, submit(library, job))
    assert record.status == "finished", record.error


def opened(qtbot: Any, page: FeaturesPage, view: str, features: list[int]) -> PicturesDialog:
    dialog = open_pictures(page, features, view)
    qtbot.addWidget(dialog)
    dialog.resize(1216, 662)
    qtbot.waitUntil(lambda: dialog.session.ready)
    return dialog


def map_of(dialog: PicturesDialog) -> MapView:
    view = dialog.view("map")
    assert isinstance(view, MapView)
    return view


SMALL, LARGE = (1216, 662), (1440, 994)  # as it opens in a window of 1280x720 and 1920x1080


def looks_right(dialog: PicturesDialog, name: str, *sizes: tuple[int, int]) -> None:
    for width, height in sizes:
        dialog.resize(width, height)
        shot(dialog, f"{name}-{width}")
        for faults in (nameless(dialog), too_small(dialog), cut_off(dialog), squeezed(dialog)):
            assert faults == []


def test_what_is_enclosed_on_the_map_is_what_the_table_shows(
    qtbot: Any, page: FeaturesPage
) -> None:
    made = give_map(page)
    view = map_of(opened(qtbot, page, "map", []))
    table = page.presenter.table
    before = table.visible.tolist()
    assert sorted(view.points.features.tolist()) == made.features.tolist()
    left = made.features[made.places["x"][made.features] < -0.5].astype(np.int32)
    view.points.enclosed.emit(left, "replace")
    assert sorted(table.visible.tolist()) == left.tolist()
    assert table.subset is not None and table.subset.title == f"Lasso: {len(left)} features"
    kept = view.points._kept
    assert set(view.points.features[kept].tolist()) == set(left.tolist())
    assert set(view.points.features[view.points._chosen].tolist()) >= set(left.tolist())
    more = np.setdiff1d(made.features, left)[:5].astype(np.int32)
    view.points.enclosed.emit(more, "add")
    view.points.enclosed.emit(left[:3], "remove")
    assert set(table.visible.tolist()) == (set(left.tolist()) | set(more.tolist())) - set(
        left[:3].tolist()
    )
    table.set_subset(None, "")  # the chip above the table is closed
    qtbot.waitUntil(lambda: len(view.chosen) == 0)
    assert table.visible.tolist() == before


def test_the_map_follows_search_stars_and_selection(qtbot: Any, page: FeaturesPage) -> None:
    made = give_map(page)
    view = map_of(opened(qtbot, page, "map", []))
    one, two, three = (int(feature) for feature in made.features[:3])
    page.presenter.star(one, True)
    qtbot.waitUntil(lambda: view.points._starred.any())
    assert view.points.features[view.points._starred].tolist() == [one]
    page.browser.view.select(np.array([two, three]), two)
    qtbot.waitUntil(lambda: view.points._chosen.any())
    assert set(view.points.features[view.points._chosen].tolist()) == {two, three}
    page.presenter.label(two, "zyzzyva")
    qtbot.waitUntil(lambda: "zyzzyva" in view.tip(two))
    page.presenter.search("zyzzy")
    qtbot.waitUntil(lambda: page.presenter.table.visible.tolist() == [two])
    qtbot.waitUntil(lambda: view.points._kept.sum() == 1)
    assert view.points.features[view.points._kept].tolist() == [two]
    view.only_shown.setChecked(False)
    assert view.points._kept.all()


def test_every_colouring_tells_number_label_and_value(qtbot: Any, page: FeaturesPage) -> None:
    made = give_map(page)
    dialog = opened(qtbot, page, "map", [])
    view = map_of(dialog)
    values = page.presenter.table.columns.values
    feature = int(made.features[0])
    choices = [view.colour.itemData(i) for i in range(view.colour.count())]
    assert choices[0] == "density" and {"band", "group", "max_activation"} <= set(choices)
    for name in choices:
        view.colour.set_value(name)
        lines = view.tip(feature).split("\n")
        assert lines[0].startswith(f"#{feature}") and len(lines) >= 2
        assert view.legend.toolTip()
    view.colour.set_value("density")
    scale = view.scale
    assert scale is not None
    wanted = scale.palette()[scale.shades(values["density"])][view.points.features]
    np.testing.assert_array_equal(view.points._palette[view.points._shades], wanted)
    for words in (f"UMAP of {made.n}", "seed 0", "Trustworthiness 0.910", "15 neighbours"):
        assert words in view.said.text()
    looks_right(dialog, "pictures-map", SMALL, LARGE)
    view.points.clicked.emit(feature)
    assert page.dialog is not None and page.dialog.feature == feature
    page.dialog.close()


def test_without_a_map_it_is_offered_made_in_the_background_and_can_be_cancelled(
    qtbot: Any, page: FeaturesPage
) -> None:
    dialog = opened(qtbot, page, "map", [])
    view = map_of(dialog)
    view.method.set_value("tsne")
    assert not view.place.shows_picture and not view.export.isEnabled()
    looks_right(dialog, "pictures-no-map", SMALL)
    view.place.wanted.emit()
    qtbot.waitUntil(lambda: view.place.progress is not None)
    (job,) = page._services.jobs.active()
    assert (job.kind, job.params["method"]) == ("map_features", "tsne")
    view.place.cancelled.emit()
    qtbot.waitUntil(lambda: view.place.progress is None)
    assert library_of(page).jobs.get(job.id).status == "cancelled"
    assert view.made is None


def test_the_heatmap_shows_what_is_measured_and_no_number_where_nothing_is(
    qtbot: Any, page: FeaturesPage
) -> None:
    give_sample(page)
    library = library_of(page)
    run = library.feature_runs.all()[0]
    sample = load_sample(library.path(run.folder))
    assert sample is not None
    counts = np.diff(sample.starts)
    silent = int(np.flatnonzero(counts == 0)[0])
    features = [*np.argsort(-counts)[:6].tolist(), silent]
    dialog = opened(qtbot, page, "correlations", features)
    view = dialog.view("correlations")
    assert isinstance(view, HeatmapView)
    for metric in ("phi", "jaccard", "pearson", "cosine"):
        view.measure.set_value(metric)
        qtbot.waitUntil(lambda m=metric: view.result is not None and view.result.metric == m)
        found, grid = view.result, view.picture.grid
        assert found is not None and grid is not None
        wanted = data.pairs(library, run, sample, metric, features)
        order = list(wanted.order)
        np.testing.assert_array_equal(grid.values, wanted.values[np.ix_(order, order)])
        shown = [found.features[i] for i in order]
        assert [name.split()[0] for name in grid.rows] == [f"#{feature}" for feature in shown]
        if metric != "cosine":
            place = shown.index(silent)
            tip = view.tip(place, (place + 1) % 7)
            assert f"— (#{silent} never fires in the sample)" in tip and "0.000" not in tip
            shades = grid.scale.shades(grid.values)
            assert (shades[place] == NONE).all()
            assert f"{sample.tokens:,} tokens" in view.method_text()
    looks_right(dialog, "pictures-heatmap", SMALL)
    view.picture.clicked.emit(1, 2)
    assert page.dialog is not None and page.dialog.feature == shown[1]
    page.dialog.close()


def test_cosines_need_no_sample_and_too_many_features_are_cut(
    qtbot: Any, page: FeaturesPage
) -> None:
    dialog = opened(qtbot, page, "correlations", list(range(250)))
    view = dialog.view("correlations")
    assert isinstance(view, HeatmapView) and not view.place.shows_picture
    assert len(view.features) == 200
    view.measure.set_value("cosine")
    qtbot.waitUntil(lambda: view.place.shows_picture)
    assert view.picture.grid is not None and view.picture.grid.values.shape == (200, 200)
    np.testing.assert_allclose(np.diag(view.picture.grid.values), 1, atol=1e-5)
    view.set_features([3])
    assert not view.place.shows_picture


def test_the_activation_matrix_tells_strength_place_and_text(
    qtbot: Any, page: FeaturesPage
) -> None:
    give_sample(page)
    library = library_of(page)
    sample = load_sample(library.path(library.feature_runs.all()[0].folder))
    assert sample is not None
    features = np.argsort(-np.diff(sample.starts))[:8].tolist()
    dialog = opened(qtbot, page, "activations", features)
    view = dialog.view("activations")
    assert isinstance(view, MatrixView)
    qtbot.waitUntil(lambda: view.place.shows_picture)
    found = view.result
    assert found is not None and sorted(found.features) == sorted(features)
    maxima = page.presenter.table.columns.values["max_activation"]
    table = sample.of(list(found.features)).toarray()
    for row, feature in enumerate(found.features):
        for column, window in enumerate(found.windows):
            w = int(np.flatnonzero(sample.windows == window)[0])
            peak = table[sample.first[w] : sample.first[w + 1], row].max(initial=0)
            share = min(peak / maxima[feature], 1)
            assert found.values[row, column] == pytest.approx(share, abs=1e-6)
    row, column = (int(i) for i in np.argwhere(found.places >= 0)[0])
    view.picture.pointed.emit(row, column)
    qtbot.waitUntil(lambda: "⟦" in view.tip(row, column))
    assert f"#{found.features[row]}" in view.tip(row, column)
    looks_right(dialog, "pictures-matrix", LARGE)


# --- saving ---------------------------------------------------------------------------------------


def test_saved_pictures_have_the_size_asked_for_and_say_what_they_are(
    qtbot: Any, page: FeaturesPage, tmp_path: Path, answer_dialogs: Any
) -> None:
    made = give_map(page)
    give_sample(page)
    dialog = opened(qtbot, page, "map", [])
    view = map_of(dialog)
    qtbot.waitUntil(lambda: view.made is not None)
    form = view.open_export()
    form.width_mm.setValue(85)
    target = tmp_path / "map"
    answer_dialogs("QFileDialog.getSaveFileName", (str(target), ""))
    with qtbot.waitSignal(form.accepted):
        form.save_button.click()
    picture = QImage(str(tmp_path / "map.png"))
    assert picture.width() == round(85 / 25.4 * 300)
    assert picture.dotsPerMeterX() == pytest.approx(300 / 0.0254, abs=1)

    figure = view.figure()
    root = ElementTree.fromstring(figures.svg(figure, 180))
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags.count("circle") + tags.count("ellipse") == made.n
    assert "image" not in tags and root.get("width", "").endswith("mm")
    words = " ".join(element.text or "" for element in root.iter())
    for part in (figure.title, "Activation Freq", "UMAP 1", "tiny-llama", "drawn by miStudio"):
        assert part in words
    raster = ElementTree.fromstring(figures.svg(view.figure(as_pixels=True), 180))
    tags = [element.tag.rpartition("}")[2] for element in raster.iter()]
    assert tags.count("image") == 1 and "circle" not in tags and "ellipse" not in tags

    for name in ("correlations", "activations"):
        dialog.show_view(name, made.features[:9].tolist())
        other = dialog.view(name)
        assert isinstance(other, HeatmapView | MatrixView)
        qtbot.waitUntil(lambda o=other: o.place.shows_picture)
        figures.save(other.figure(), tmp_path / f"{name}.png", 100)
        assert QImage(str(tmp_path / f"{name}.png")).width() == round(100 / 25.4 * 300)
        text = "".join(ElementTree.fromstring(figures.svg(other.figure(), 100)).itertext())
        assert other.title in text and f"#{other.features[0]}" in text


def test_a_picture_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, themed: Any
) -> None:
    empty = np.empty(0)
    body = figures.Points(empty, empty, np.empty(0, np.uint8), np.empty(0, bool))
    figure = figures.Figure("None", body, Scale("Nothing", "points"), ("a note",))
    (tmp_path / "there.png").mkdir()
    with pytest.raises(OSError):
        figures.save(figure, tmp_path / "there.png", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


def test_the_window_imports_nothing_heavy() -> None:
    code = (
        "import sys, mistudio.ui.features.pictures.dialog, mistudio.jobs.kinds\n"
        "heavy = {'torch', 'umap', 'sklearn', 'scipy', 'openTSNE', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_empty_map_can_be_looked_at(qtbot: Any, themed: QApplication) -> None:
    widget = PointMap()
    qtbot.addWidget(widget)
    widget.show()
    widget.set_view(View(0, 0, 2))
    qtbot.keyClick(widget, Qt.Key.Key_Right)
    assert widget.current == -1 and widget.nearest(QPointF(5, 5)) == -1
    assert widget.enclose([(0, 0), (9, 0), (9, 9)]).tolist() == []
