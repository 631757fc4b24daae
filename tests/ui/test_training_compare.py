"""Runs beside each other in the window: chosen by their cards, drawn, tabled, judged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication

from mistudio.engine.training.compare import DRAWN
from mistudio.engine.training.config import derive, parse
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.training.compare.dialog import CompareDialog, fairness
from mistudio.ui.training.compare.gather import gather, setting_text
from mistudio.ui.training.compare.tables import BEST, metrics_table
from mistudio.ui.training.page import TrainingPage

from .checks import cut_off, nameless, too_small
from .screens import shot

D = 64
POINT = "blocks.{}.hook_resid_post"


def add_model(library: Library, name: str = "tiny", **more: Any) -> int:
    values = {"name": name, "source": "local", "origin": "", "folder": f"models/{name}",
              "precision": "fp32", "n_layers": 4, "d_model": D, "parameters": 1000, "bytes": 1,
              "summary": {}, "provenance": {}, **more}  # fmt: skip
    return library.models.add(**values)


def add_dataset(library: Library, name: str = "stories") -> int:
    return library.datasets.add(name=name, source="local", origin="", folder=f"datasets/{name}",
                                documents=1, characters=1, bytes=1, provenance={}, link={},
                                statistics={})  # fmt: skip


def add_tokens(library: Library, dataset_id: int, name: str) -> int:
    return library.tokenizations.add(dataset_id=dataset_id, tokenizer_hash="h",
                                     settings={"for": name}, folder=f"datasets/{name}",
                                     tokens=1, statistics={"layout": "packed"})  # fmt: skip


def add_run(
    library: Library,
    name: str,
    config: dict[str, Any],
    metrics: dict[int, dict[str, float]],
    model_id: int = 1,
    dataset_id: int = 1,
    tokenization_id: int = 1,
    rows: int = 300,
) -> int:
    """A run as a training leaves it; `metrics` by layer."""
    plan = derive(parse(config), D)
    sites = {
        POINT.format(layer): {
            "tokens": 54_386, "loss_tokens": 8_064, "dead_share": 0.01, "cosine": 0.9,
            "ce_loss_score": 0.97, "d_in": D, "d_sae": plan.d_sae, "steps": plan.steps,
            "batch_size": plan.batch_size, "learning_rate": plan.learning_rate, **values,
        }
        for layer, values in metrics.items()
    }  # fmt: skip
    folder = f"trainings/{name.replace(' ', '-')}"
    path = library.root / folder
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(rows):
            for layer, site in enumerate(sites):
                place = layer + 3 * (len(name) % 4)  # so that no two curves are the same
                file.write(json.dumps(a_row(step, rows, site, plan.batch_size, place)) + "\n")
    training_id = library.trainings.add(
        name=name, model_id=model_id, dataset_id=dataset_id, tokenization_id=tokenization_id,
        extraction_id=None, job_id=None, status="completed", config=config, folder=folder,
        seconds=60.0,
        record={"tokens": plan.steps * plan.batch_size, "sites": sites, "source": "streamed",
                "model": {"name": "tiny", "precision": "fp32", "provenance": {}},
                "versions": {"torch": "2.13.0"}, "device": "CPU", "processes": 1},
    )  # fmt: skip
    for layer, site in zip(metrics, sites, strict=True):
        library.saes.add(training_id=training_id, model_id=model_id, hook_point=site, layer=layer,
                         folder=f"{folder}/{site}", architecture="jumprelu", d_in=D,
                         d_sae=plan.d_sae, k=plan.k, wiring="sae",
                         metrics=sites[site])  # fmt: skip
    return training_id


def a_row(step: int, rows: int, site: str, batch: int, layer: int = 0) -> dict[str, Any]:
    done = (step + 1) / rows
    return {"site": site, "step": step, "tokens": (step + 1) * batch, "tokens_per_second": 5000.0,
            "loss": 0.3 + 0.7 / (1 + 20 * done) + 0.02 * layer, "fvu": 0.3 / done, "l0": 32.0,
            "dead": 5, "learning_rate": 1e-3,
            **({"heldout_fvu": 0.3} if step % 30 == 0 else {})}  # fmt: skip


@pytest.fixture
def runs(library: Library) -> list[int]:
    add_model(library)
    add_tokens(library, add_dataset(library), "tokens")
    return [
        add_run(library, "wide", {"expansion": 16, "seed": 1}, {1: {"fvu": 0.15, "l0": 31.5}}),
        add_run(library, "narrow", {"expansion": 8}, {1: {"fvu": 0.21, "l0": 24.2}}),
        add_run(library, "beaten", {"sparsity": "topk"}, {1: {"fvu": 0.3, "l0": 33.0}}),
    ]


@pytest.fixture
def page(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> TrainingPage:
    page = TrainingPage(services_of(library))
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    return page


def open_dialog(
    qtbot: Any,
    services: Services,
    keys: list[tuple[str, int]],
    size: tuple[int, int] = (1240, 660),
) -> CompareDialog:
    dialog = CompareDialog(services, keys)
    qtbot.addWidget(dialog)
    dialog.resize(*size)
    dialog.show()
    qtbot.waitUntil(lambda: not dialog._histories.reading)
    return dialog


def settings_of(dialog: CompareDialog) -> dict[str, tuple[str, ...]]:
    return {line.label: line.cells for line in dialog.settings.model.table.lines}


def metrics_of(dialog: CompareDialog) -> dict[str, tuple[str, ...]]:
    return {line.label.split("  ")[0]: line.cells for line in dialog.metrics.model.table.lines}


# --- choosing -----------------------------------------------------------------------------------


def test_two_or_more_are_chosen_by_boxes_keys_and_clicks(qtbot: Any, page: TrainingPage) -> None:
    assert not page.compare.isEnabled() and "two or more" in page.compare.toolTip()
    cards = {card.run.training.name: card for card in page.run_cards()}
    boxes = page.selection.boxes
    first = boxes[("run", cards["beaten"].run.training.id)]
    assert first.accessibleName() == "Compare beaten"
    first.setFocus()
    qtbot.keyClick(first, Qt.Key.Key_Space)
    assert page.compare.text() == "Compare (1)" and not page.compare.isEnabled()
    qtbot.mouseClick(cards["wide"], Qt.MouseButton.LeftButton, Qt.KeyboardModifier.ControlModifier)
    assert page.compare.text() == "Compare (2)" and page.compare.isEnabled()
    qtbot.mouseClick(cards["wide"], Qt.MouseButton.LeftButton, Qt.KeyboardModifier.ControlModifier)
    assert page.compare.text() == "Compare (1)"
    first.setChecked(False)
    first.setChecked(True)
    qtbot.mouseClick(cards["wide"], Qt.MouseButton.LeftButton, Qt.KeyboardModifier.ShiftModifier)
    assert page.compare.text() == "Compare (3)"  # the one between too
    page.resize(1280, 1500)
    shot(page, "training-chosen")
    assert nameless(page) == [] and too_small(page) == []
    qtbot.mouseClick(page.clear_selection, Qt.MouseButton.LeftButton)
    assert page.selection.keys == [] and not page.clear_selection.isVisible()


def test_a_plain_click_chooses_nothing(qtbot: Any, page: TrainingPage) -> None:
    qtbot.mouseClick(page.run_cards()[0], Qt.MouseButton.LeftButton)
    assert page.selection.keys == []


def test_a_run_that_goes_is_no_longer_chosen(
    qtbot: Any, page: TrainingPage, library: Library, runs: list[int]
) -> None:
    for number in runs:
        page.selection.boxes[("run", number)].setChecked(True)
    library.discard("trainings", runs[0])
    qtbot.waitUntil(lambda: page.compare.text() == "Compare (2)")


def test_compare_opens_a_window_beside_the_main_one(
    qtbot: Any, page: TrainingPage, runs: list[int]
) -> None:
    for number in runs[:2]:
        page.selection.boxes[("run", number)].setChecked(True)
    qtbot.mouseClick(page.compare, Qt.MouseButton.LeftButton)
    dialog = page.findChild(CompareDialog)
    assert dialog.isVisible() and not dialog.isModal()
    assert {one.name for one in dialog.compared} == {"wide", "narrow"}
    qtbot.waitUntil(lambda: not dialog._histories.reading)
    dialog.close()


# --- what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1240, 660), (1880, 990)])
def test_every_view_of_a_comparison(
    qtbot: Any,
    library: Library,
    runs: list[int],
    services_of: Callable[[Library], Services],
    size: tuple[int, int],
) -> None:
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs], size)
    for tab in range(dialog.tabs.count()):
        dialog.tabs.setCurrentIndex(tab)
        shot(dialog, f"training-compare-{tab}-{size[0]}")
        assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    assert not dialog.warning.isVisibleTo(dialog)  # the same model, text and place


def test_only_settings_that_differ_are_listed(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs])
    rate = {name: derive(parse({"expansion": e}), D).learning_rate
            for name, e in (("wide", 16), ("narrow", 8))}  # fmt: skip
    assert rate["wide"] == rate["narrow"]  # capped: does not differ, is not listed
    assert settings_of(dialog) == {
        "Sparsity": ("BatchTopK", "BatchTopK", "TopK"),
        "Expansion factor": ("16x", "8x", "8x"),
        "Dictionary size": ("auto: 1,024 latents", "auto: 512 latents", "auto: 512 latents"),
        "Seed": ("1", "0", "0"),
    }
    rows = list(csv.reader(io.StringIO(dialog.settings.csv())))
    assert rows[0] == ["Setting", "wide", "narrow", "beaten"]
    assert ["Seed", "1", "0", "0"] in rows
    qtbot.mouseClick(dialog.settings.copy, Qt.MouseButton.LeftButton)
    assert QApplication.clipboard().text() == dialog.settings.csv()


def test_the_best_is_marked_by_a_word_and_l0_never(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs])
    found = metrics_of(dialog)
    assert found["FVU"] == (f"0.150  {BEST}", "0.210", "0.300")
    assert found["L0"] == ("31.5", "24.2", "33.0")
    assert found["CE increase (nats)"] == ("—", "—", "—")
    model = dialog.metrics.model
    tip = model.data(model.index(0, 1), Qt.ItemDataRole.ToolTipRole)
    assert "54,386 held-out tokens" in tip and "variance" in tip


def test_the_best_of_each_site_is_marked(library: Library) -> None:
    add_model(library)
    add_tokens(library, add_dataset(library), "tokens")
    layers = ({1: {"fvu": 0.3, "l0": 9}, 2: {"fvu": 0.1, "l0": 9}},
              {1: {"fvu": 0.2, "l0": 9}, 2: {"fvu": 0.15, "l0": 9}})  # fmt: skip
    numbers = [add_run(library, n, {}, m) for n, m in zip("ab", layers, strict=True)]
    subjects = [s for one in gather(library, [("run", n) for n in numbers]) for s in one.subjects]
    (line,) = [one for one in metrics_table(subjects).lines if one.label.startswith("FVU")]
    assert line.marked == {1, 2}  # a's second site, b's first
    assert [BEST in cell for cell in line.cells] == [False, True, True, False]


def test_the_front_joins_what_nothing_beats(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs])
    assert dialog.pareto.front == {0, 1}
    assert "3  beaten: L0 33.0, FVU 0.300, beaten in both" in dialog.pareto.key_text
    rows = list(csv.reader(io.StringIO(dialog.pareto.csv())))[1:]
    assert [(row[1], row[-1]) for row in rows] == [
        ("wide", "True"), ("narrow", "True"), ("beaten", "False")]  # fmt: skip


def test_pictures_and_values_can_be_taken_along(
    qtbot: Any,
    library: Library,
    runs: list[int],
    services_of: Callable[[Library], Services],
    tmp_path: Path,
) -> None:
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs])
    for number, chart in enumerate((dialog.curves.chart, dialog.pareto)):
        dialog.tabs.setCurrentIndex(3 * number)
        for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            path = tmp_path / f"{number}.{ending}"
            chart.save_picture(path)
            assert path.read_bytes().startswith(start) and path.stat().st_size > 2000


# --- curves -------------------------------------------------------------------------------------


def test_curves_are_whole_and_drawn_to_their_last_point(
    qtbot: Any, library: Library, services_of: Callable[[Library], Services]
) -> None:
    add_model(library)
    add_tokens(library, add_dataset(library), "tokens")
    n = 20_011
    numbers = [add_run(library, name, {}, {1: {"fvu": 0.2, "l0": 30}}, rows=n) for name in "ab"]
    dialog = open_dialog(qtbot, services_of(library), [("run", i) for i in numbers])
    chart = dialog.curves.chart
    for _, x, y in chart.points():
        assert len(x) == len(y) == n
    for _, x, _ in chart.drawn():
        assert len(x) <= DRAWN
        assert x[0] == 512.0 or x[0] == 2048.0
        assert x[-1] == n * x[0]
    assert len(list(csv.reader(io.StringIO(chart.csv())))) == 2 * n + 1
    # Zoomed in, all points of the stretch are there.
    dialog.curves.over.set_value("step")
    chart._plot.setXRange(5000, 5100, padding=0)
    qtbot.waitUntil(lambda: len(chart.drawn()[0][1]) < 200)
    x = chart.drawn()[0][1]
    assert x[0] <= 5000 and x[-1] >= 5100 and (np.diff(x) == 1).all()
    chart.show_all()


def test_every_metric_over_every_axis(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs])
    view = dialog.curves
    for metric in range(view.drawn.count()):
        for axis in range(view.over.count()):
            view.drawn.setCurrentIndex(metric)
            view.over.setCurrentIndex(axis)
            assert len(view.chart.points()) == 3, (view.drawn.value, view.over.value)
    view.drawn.set_value("dead_share")
    assert view.chart.points()[0][2][0] == 5 / 1024
    view.over.set_value("seconds")
    assert view.chart.points()[0][1][0] == pytest.approx(2048 / 5000)
    view.chart._log.setChecked(True)
    shot(dialog, "training-compare-log")


def test_no_two_curves_look_alike(qapp: QApplication) -> None:
    from mistudio.ui.training.compare.curves import curve_pen

    looks = {
        (pen.color().name(), tuple(pen.dashPattern()))
        for run in range(8)
        for site in range(8)
        if (pen := curve_pen(run, site))
    }
    assert len(looks) == 64
    styles = [tuple(curve_pen(run, 0).dashPattern()) for run in range(len(tokens.SERIES))]
    assert len(set(styles)) == len(styles)  # told apart without their colours


def test_of_many_sites_some_are_chosen(
    qtbot: Any, library: Library, services_of: Callable[[Library], Services]
) -> None:
    add_model(library)
    add_tokens(library, add_dataset(library), "tokens")
    both = {layer: {"fvu": 0.2 + layer / 100, "l0": 30.0 + layer} for layer in range(4)}
    numbers = [add_run(library, name, {}, both) for name in ("a", "b", "c")]
    dialog = open_dialog(qtbot, services_of(library), [("run", i) for i in numbers])
    view = dialog.curves
    assert len(view.chart.points()) == 3  # of twelve, those of one site at first
    view.sites[POINT.format(2)].setChecked(True)
    assert {key.site for key, _, _ in view.chart.points()} == {POINT.format(0), POINT.format(2)}
    assert {key.name for key, _, _ in view.chart.points()} >= {"a • L0", "c • L2"}
    shot(dialog, "training-compare-sites")
    for box in view.sites.values():
        box.setChecked(False)
    assert view.chart.points() == []
    # Layers are not compared with each other.
    assert metrics_of(dialog)["FVU"].count("—") == 0 and len(metrics_of(dialog)["FVU"]) == 12
    assert "different models or hook points" in dialog.pareto.key_text
    assert not dialog.warning.isVisibleTo(dialog)  # site by site it is fair
    fewer = add_run(library, "d", {}, {1: both[1]})
    sentence, _ = fairness(gather(library, [("run", numbers[0]), ("run", fewer)]))
    assert "other hook point" in sentence


def test_a_history_that_is_gone_says_so(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    for number in runs[:2]:
        path = library.path(library.trainings.get(number).folder) / "metrics.jsonl"
        path.unlink()
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in runs[:2]])
    assert dialog.curves.chart.points() == []
    assert "None of these runs has recorded" in dialog.curves.chart.accessibleDescription()


# --- fairness -----------------------------------------------------------------------------------


def test_what_makes_a_comparison_unfair_is_said(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    other = add_model(library, "larger")
    tokens_2 = add_tokens(library, add_dataset(library, "news"), "tokens-2")
    numbers = [
        runs[0],
        add_run(library, "elsewhere", {"context": 64}, {2: {"fvu": 0.1, "l0": 30, "tokens": 99}},
                other, 2, tokens_2),
    ]  # fmt: skip
    dialog = open_dialog(qtbot, services_of(library), [("run", n) for n in numbers])
    text = dialog.warning.accessibleName()
    assert "Not all of these can be compared" in text
    for words in (
        "model (tiny, larger)",
        "dataset (stories, news)",
        "context length (128 tokens, 64 tokens)",
        "hook point (Layer 1 • Residual stream after block, Layer 2",
        "number of held-out tokens (54,386, 99)",
        "tokenisation (",
    ):
        assert f"other {words}" in text
    assert dialog.pareto.front == {0, 1}  # each the best of its own kind
    assert BEST not in "".join(metrics_of(dialog)["FVU"])
    shot(dialog, "training-compare-unfair")


def test_the_same_weights_under_two_names_are_one_model(library: Library) -> None:
    provenance = {"weights": [{"name": "model.safetensors", "sha256": "ab"}]}
    first = add_model(library, "one", provenance=provenance)
    second = add_model(library, "two", provenance=provenance)
    add_tokens(library, add_dataset(library), "tokens")
    numbers = [add_run(library, n, {}, {1: {"fvu": 0.2, "l0": 9.0}}, model)
               for n, model in (("a", first), ("b", second))]  # fmt: skip
    assert fairness(gather(library, [("run", n) for n in numbers])) == ("", [])


# --- others than runs ---------------------------------------------------------------------------


def test_imported_saes_stand_beside_runs(
    qtbot: Any, library: Library, runs: list[int], services_of: Callable[[Library], Services]
) -> None:
    def add(name: str, metrics: dict[str, Any]) -> int:
        return library.saes.add(
            training_id=None, model_id=1, hook_point=POINT.format(1), layer=1, name=name,
            folder=f"saes/{name}", architecture="topk", d_in=D, d_sae=256, k=20.0, wiring="sae",
            source="imported", provenance={"format": "saelens", "path": "/x"}, metrics=metrics,
        )  # fmt: skip

    measured = {"dataset_id": 1, "dataset": "stories", "tokenization_id": 1, "context": 128,
                "precision": "fp32"}  # fmt: skip
    good = add("theirs", {"fvu": 0.4, "l0": 20.0, "tokens": 54_386, "loss_tokens": 8_064,
                          "measured": measured})  # fmt: skip
    bare = add("unmeasured", {})
    keys = [("run", runs[0]), ("sae", good), ("sae", bare)]
    dialog = open_dialog(qtbot, services_of(library), keys)
    assert dialog.pareto.front == {0, 1}
    assert "Not measured: unmeasured" in dialog.pareto.key_text
    assert metrics_of(dialog)["FVU"] == (f"0.150  {BEST}", "0.400", "—")
    found = settings_of(dialog)
    assert found["Target L0"] == ("32", "20", "20")
    assert found["Sparsity"] == ("BatchTopK", "TopK", "TopK")
    assert "Learning rate" not in found and not dialog.warning.isVisibleTo(dialog)


def test_a_training_under_way_is_followed(
    qtbot: Any,
    library: Library,
    runs: list[int],
    services_of: Callable[[Library], Services],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = services_of(library)
    params = {"model_id": 1, "dataset_id": 1, "hook_points": [POINT.format(1)],
              "config": {"expansion": 8}, "name": "under way"}  # fmt: skip
    job_id = library.jobs.submit("train", "Train", "compute", params)
    rows = [a_row(step, 100, POINT.format(1), 512) for step in range(10)]
    monkeypatch.setattr(services.jobs, "metrics", lambda job, since=0: rows[since:])
    dialog = open_dialog(qtbot, services, [("run", runs[1]), ("job", job_id)])
    names = [key.name for key, _, _ in dialog.curves.chart.points()]
    assert names == ["narrow", "under way"]
    rows.extend(a_row(step, 100, POINT.format(1), 512) for step in range(10, 25))
    dialog._histories._looked = 0.0
    services.jobs.tick.emit()
    assert len(dialog.curves.chart.points()[1][1]) == 25
    assert metrics_of(dialog)["FVU"][1] == "—"
    library.jobs.move(job_id, ("queued",), "cancelled")


def test_settings_are_told_in_words() -> None:
    from mistudio.engine.training.compare import Setting

    assert setting_text("learning_rate", Setting(3.3e-4, auto=True)) == "auto: 3.3e-4"
    assert setting_text("dead_window", Setting(50_000)) == "50,000 tokens"
    assert setting_text("auxk", Setting(False)) == "off"
    assert setting_text("l1_coefficient", Setting(None, auto=True)) == "auto: steered to target"
    assert setting_text("skip_rank", Setting(used=False)) == "not used"
    assert setting_text("seed", None) == "—"
