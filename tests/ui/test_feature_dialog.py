"""The dialog of one feature: its tabs show what the store, the model and the library say."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QWidget
from shiboken6 import isValid

from mistudio import formatting
from mistudio.engine.datasets.documents import Documents
from mistudio.engine.features import together
from mistudio.engine.features.live import window_activations
from mistudio.engine.sae.files import load_sae
from mistudio.jobs.ablation import KIND, ablation_params
from mistudio.jobs.features import open_features
from mistudio.jobs.job import device_turn, run_job, submit
from mistudio.jobs.kinds import Ablate, CoActivate
from mistudio.jobs.models import loaded_model
from mistudio.jobs.probing import probe
from mistudio.library.library import Library
from mistudio.ui.features.dialog import ablation as ablation_tab
from mistudio.ui.features.dialog import correlations as correlations_tab
from mistudio.ui.features.dialog.dialog import FeatureDialog
from mistudio.ui.features.dialog.examples import SILENT, TENTHS, TOP
from mistudio.ui.features.dialog.job_panel import estimate
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.services import Services

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot

SIZES = [(1280, 720), (1920, 1080)]
TAB = {"examples": 0, "lens": 1, "correlations": 2, "ablation": 3, "notes": 4}
MEASURED = 6  # features whose ablation is kept


@pytest.fixture(scope="module")
def analysed_folder(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained library with co-activation and a few ablations. Never open it."""
    folder = tmp_path_factory.mktemp("analysed") / "library"
    shutil.copytree(trained_folder, folder)
    library = Library(folder)
    number = library.feature_runs.all()[0].id
    for job in (CoActivate(number, 3000), Ablate(number, often(library)[:MEASURED], contexts=8,
                                                  controls=1)):  # fmt: skip
        record = run_job(library, job, submit(library, job))
        assert record.status == "finished", record.error
    library.close()
    return folder


@pytest.fixture
def library(analysed_folder: Path, tmp_path: Path) -> Iterator[Library]:
    shutil.copytree(analysed_folder, tmp_path / "analysed")
    opened = Library(tmp_path / "analysed")
    yield opened
    opened.close()


Opened = Callable[..., FeatureDialog]


@pytest.fixture
def opened(
    qtbot: Any, library: Library, services_of: Callable[[Library], Services]
) -> Iterator[Opened]:
    """`opened(feature, "lens", (1280, 720))`: the dialog with one tab, read."""
    services = services_of(library)
    window = QWidget()
    qtbot.addWidget(window)
    presenter = FeaturesPresenter(services, window)
    presenter.choose(presenter.choices()[0])
    made: list[FeatureDialog] = []

    def open_(
        feature: int, tab: str = "examples", size: tuple[int, int] = SIZES[0]
    ) -> FeatureDialog:
        qtbot.waitUntil(lambda: presenter.reader is not None)
        window.resize(*size)
        dialog = FeatureDialog(services, presenter, feature, window)
        made.append(dialog)
        dialog.show()
        examples = dialog.tabs.widget(0)
        qtbot.waitUntil(lambda: settled(examples))
        dialog.tabs.setCurrentIndex(TAB[tab])
        return dialog

    yield open_
    assert services.background.wait(30)
    for dialog in made:
        if isValid(dialog):
            dialog.close()


def settled(examples: Any) -> bool:
    """All examples that are to come have come, and the side stands."""
    wanted = min(20, examples.dialog.reading.store.n_examples(examples.feature))
    return examples.own is not None and len(examples.views) == wanted


def often(library: Library) -> list[int]:
    """Features, the most often active first."""
    store, _ = open_features(library, library.feature_runs.all()[0])
    return [int(i) for i in np.argsort(-np.asarray(store.columns["n_active"]), kind="stable")]


def store_of(library: Library) -> Any:
    return open_features(library, library.feature_runs.all()[0])


def wait(qtbot: Any, condition: Callable[[], bool]) -> None:
    qtbot.waitUntil(condition)


# --- examples -------------------------------------------------------------------------------------


def test_examples_are_those_of_the_store(opened: Opened, library: Library) -> None:
    feature = often(library)[3]
    dialog = opened(feature)
    store, tokens = store_of(library)
    documents = Documents(library.path(library.datasets.get(1).folder))
    expected = store.examples(feature, tokens)
    views = dialog.tabs.widget(0).views
    assert len(views) == len(expected) == store.n_examples(feature)
    context = store.meta.context
    for view, example in zip(views, expected, strict=True):
        line = view.example.line
        ids = tokens.windows([example.window], context)[0].tolist()
        assert [i for span in line.ids for i in span] == ids  # whole windows
        place = line.places[line.peak]
        assert place <= example.position < line.places[line.peak + 1]
        assert line.activations[line.peak] == pytest.approx(example.activation)
        known = [a for a in line.activations if a == a]
        assert max(known) == pytest.approx(example.activation)
        assert len(known) <= len(example.ids)  # the others are said to be unknown
        number = tokens.document_at(example.window, example.position, context)
        assert view.source.text() == f"Source: {documents[number].title}"
        assert formatting.number(example.activation, 3) in view.strength.text()


def test_zoom_shows_so_many_tokens_on_each_side(opened: Opened, library: Library) -> None:
    tab = opened(often(library)[0]).tabs.widget(0)
    for zoom in (5, 16, 0):
        tab.zoom.set_value(zoom)
        for view in tab.views:
            line, peak = view.example.line, view.example.line.peak
            first, last = line.around(zoom)
            assert view.strip._tokens == list(line.texts[first:last])
            if zoom:
                assert line.places[first] >= line.places[peak] - zoom
                assert line.places[last] <= line.places[peak + 1] + zoom
                whole = first == 0 or line.places[peak] - line.places[first - 1] > zoom
                assert whole and (last == len(line.texts) or
                                  line.places[last + 1] > line.places[peak + 1] + zoom)  # fmt: skip
            else:
                assert (first, last) == (0, len(line.texts))


def test_activations_that_are_not_stored_come_from_the_model(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    feature = often(library)[2]
    tab = opened(feature).tabs.widget(0)
    tab.zoom.set_value(0)
    view = next(v for v in tab.views if any(a != a for a in v.example.line.activations))
    unknown = next(i for i, a in enumerate(view.example.line.activations) if a != a)
    assert "not stored" in view.strip.describe(unknown)
    tab.measure.click()
    wait(qtbot, lambda: all(v.example.whole for v in tab.views))
    store, tokens = store_of(library)
    saved = load_sae(library.path(library.saes.get(1).folder))
    windows = [v.example.window for v in tab.views]
    values, _ = window_activations(
        loaded_model(library, 1), saved.dictionary, saved.site.input, store.meta.median_norm,
        tokens, windows, [feature], store.meta.context,
    )  # fmt: skip
    for one, expected in zip(tab.views, values[..., 0], strict=True):
        line = one.example.line
        spans = zip(line.places, line.places[1:], strict=False)
        assert line.activations == pytest.approx([expected[a:b].max() for a, b in spans])
    assert f"{view.example.line.activations[unknown]:.4f}" in view.strip.describe(unknown)
    assert not tab.measure.isVisible()


def test_tenths_and_silent_contexts_are_those_of_the_store(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    feature = often(library)[0]
    tab = opened(feature).tabs.widget(0)
    store, _ = store_of(library)
    with device_turn:  # a job computes: heat cannot be read, the text can
        tab.group.set_value(TENTHS)
        wait(qtbot, lambda: len(tab._sections) == 10)
    tenths = store.decile_examples(feature)[::-1]
    for section, tenth in zip(tab._sections, tenths, strict=True):
        shown = [(e.window, e.position, e.activation) for e in section.examples]
        assert shown == [(o.window, o.position, o.activation) for o in tenth[: len(shown)]]
        for example in section.examples:
            assert example.line.activations[example.line.peak] == pytest.approx(example.activation)
    edges = store.decile_edges(feature)
    assert formatting.number(float(edges[10]), 3) in tab._sections[0].title
    tab.group.set_value(SILENT)
    wait(qtbot, lambda: len(tab._sections) == 2)
    hard, random = tab._sections
    places = [(e.window, e.position) for e in hard.examples]
    assert places == store.hard_negatives(feature)[: len(places)]
    windows = [e.window for e in random.examples]
    assert windows == store.inactive_windows(feature)[: len(windows)]
    wait(qtbot, lambda: not tab._pending)
    assert len(tab.views) == len(places) + len(windows)
    for view in tab.views:
        assert not any(view.example.line.activations) and not view.strip._maximum < 0
        assert (view.strip._framed >= 0) == (view.example.position >= 0)
    tab.group.set_value(TOP)
    assert len(tab._sections) == 1


def test_examples_are_copied_and_tried(qtbot: Any, opened: Opened, library: Library) -> None:
    tab = opened(often(library)[1]).tabs.widget(0)
    tab.zoom.set_value(5)
    first = tab.views[0]
    first.copy()
    shown = "".join(first.strip._tokens)
    assert QApplication.clipboard().text() == shown
    tab.copy_all.click()
    rows = QApplication.clipboard().text().split("\n")
    assert len(rows) == len(tab.views) and "«" in rows[0] and first.example.source in rows[0]
    first.wants_test.emit(first.example.line.text(5))
    assert tab.own.edit.toPlainText() == shown
    tab.views[1].strip.setFocus()
    qtbot.keyClick(tab.views[1].strip, Qt.Key.Key_Down)
    assert tab.views[2].strip.hasFocus()
    qtbot.keyClick(tab.views[2].strip, Qt.Key.Key_Right)
    assert tab.views[2].strip.accessibleDescription().startswith(("Token", "Character"))


def test_numbers_beside_the_examples_are_the_stores(opened: Opened, library: Library) -> None:
    feature = often(library)[0]
    tab = opened(feature).tabs.widget(0)
    store, _ = store_of(library)
    n = int(store.columns["n_active"][feature])
    bars = tab.histogram.bars
    assert int(bars.counts.sum()) == n and len(bars.edges) == len(bars.counts) + 1
    kept = store.histogram(feature)
    assert (
        bars.counts.tolist()
        == kept.counts[kept.counts.argmax() and 0 :][
            np.flatnonzero(kept.counts)[0] : np.flatnonzero(kept.counts)[-1] + 1
        ].tolist()
    )
    rows = tab.histogram.csv().splitlines()
    assert len(rows) == len(bars.counts) + 1
    assert sum(int(row.split(",")[2]) for row in rows[1:]) == n
    common = store.token_counts(feature)
    assert [r.value.split(" ")[0] for r in tab.common.rows] == [
        formatting.count(t.count) for t in common
    ]
    assert f"{formatting.count(common[0].occurrences)} occurrences" in tab.common.rows[0].tip


def test_own_text_shows_what_the_model_says_and_the_newest_wins(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    feature, other = often(library)[:2]
    library.feature_notes.write(1, other, starred=True)
    dialog = opened(feature)
    own = dialog.tabs.widget(0).own
    text = "The river flows to the sea, and the city of Kraków 😀 lies there."
    for part in (text[:10], text[:30], text):
        own.edit.setPlainText(part)
        own._ask()  # as if each pause had been long enough
    assert own._again  # one answer is on its way, the last wish waits
    found = probe(library, 1, text)
    wait(qtbot, lambda: own.result is not None and own.result.ids == found.ids)
    values = found.of(feature)
    assert "".join(own.strip.line.texts) == text
    assert [i for ids in own.strip.line.ids for i in ids] == list(found.ids[1:])
    assert max(own.strip.line.activations) == pytest.approx(float(values.max()))
    active = int((values > 0).sum())
    told = own.status.text()
    assert (f"Fires on {active} of" if active else "Silent on all") in told
    wait(qtbot, lambda: dialog.presenter.table.note(other) is not None)
    own.all_starred.setChecked(True)
    texts = [w.text() for w in own.findChildren(QWidget) if hasattr(w, "text")]
    assert f"#{other}" in texts
    with device_turn:
        own.edit.setPlainText("While a job computes")
        own._ask()
        wait(qtbot, lambda: "A job is using the model" in own.status.text())


# --- logit lens -----------------------------------------------------------------------------------


def test_the_lens_is_the_stores(qtbot: Any, opened: Opened, library: Library) -> None:
    feature = often(library)[1]
    dialog = opened(feature, "lens")
    tab = dialog.tabs.currentWidget()
    wait(qtbot, lambda: bool(tab.promoted.rows))
    store, _ = store_of(library)
    for bars, pairs in ((tab.promoted, store.promoted(feature)),
                        (tab.suppressed, store.suppressed(feature))):  # fmt: skip
        assert len(bars.rows) == 20
        for shown, (token, value) in zip(bars.rows, pairs, strict=True):
            assert f"ID {token})" in shown.tip and f"{value:+.4f}" in shown.tip
    histogram = np.array(store.array("logit_histogram")[feature])
    assert np.array_equal(tab.histogram.bars.counts, histogram)
    low, high = store.array("logit_range")[feature]
    assert tab.histogram.bars.edges[0] == pytest.approx(low)
    assert tab.histogram.bars.edges[-1] == pytest.approx(high)
    assert tab.tiles["logit_skewness"].value == formatting.number(
        float(store.columns["logit_skewness"][feature]), 2
    )


def test_the_change_at_an_example_is_that_of_its_final_residual(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    feature = often(library)[1]
    tab = opened(feature, "lens").tabs.currentWidget()
    wait(qtbot, lambda: tab.example.count() > 2)
    tab.example.set_value(2)
    tab.compute.click()
    wait(qtbot, lambda: bool(tab.raised.rows))
    store, tokens = store_of(library)
    example = store.examples(feature, tokens)[2]
    model = loaded_model(library, 1).model
    saved = load_sae(library.path(library.saes.get(1).folder))
    ids = tokens.windows([example.window], store.meta.context)
    seen: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    hook.remove()
    x = seen[0][0, example.position]
    rms = (x.pow(2).mean() + model.config.rms_norm_eps).sqrt()
    direction = saved.dictionary.decoder[feature] * model.model.norm.weight
    logits = model.lm_head.weight @ direction
    change = ((logits - logits.mean()) * example.activation / rms).detach()
    values, order = change.topk(10)
    for shown, token, value in zip(tab.raised.rows, order.tolist(), values.tolist(), strict=True):
        assert f"ID {token})" in shown.tip
        assert float(shown.value) == pytest.approx(value, abs=2e-3)
    assert formatting.number(float(rms), 2) in tab.told.text()


# --- correlations ---------------------------------------------------------------------------------


def test_correlated_features_lead_on_and_back(qtbot: Any, opened: Opened, library: Library) -> None:
    feature = often(library)[0]
    dialog = opened(feature, "correlations")
    tab = dialog.tabs.currentWidget()
    folder = library.path(library.feature_runs.all()[0].folder)
    for measure in ("phi", "jaccard", "pearson"):
        tab.measure.set_value(measure)
        expected = together.neighbours(folder, feature, measure)
        wait(qtbot, lambda m=measure: tab._found is not None and tab._found.measure == m)
        assert [r.label.split(" ")[0] for r in tab.bars.rows] == [f"#{n.feature}" for n in expected]
        assert [float(r.value) for r in tab.bars.rows] == pytest.approx(
            [n.value for n in expected], abs=6e-4
        )
    sample = together.sample_of(folder)
    assert formatting.count(sample.tokens) in tab.note.text()
    assert formatting.count(together.fired(folder, feature)) in tab.note.text()
    other = int(tab.bars.rows[0].label.split(" ")[0][1:])
    tab.bars.setFocus()
    qtbot.keyClick(tab.bars, Qt.Key.Key_Down)
    qtbot.keyClick(tab.bars, Qt.Key.Key_Return)
    assert dialog.feature == other and dialog.back.isVisible()
    dialog.back.click()
    assert dialog.feature == feature and not dialog.back.isVisible()


def test_counting_is_offered_with_its_cost_and_shown_when_done(
    qtbot: Any, opened: Opened, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correlations_tab, "TOKENS", 2000)
    run = library.feature_runs.all()[0]
    for path in library.path(run.folder).glob("together_*"):
        path.unlink()
    dialog = opened(often(library)[0], "correlations")
    tab = dialog.tabs.currentWidget()
    directions = together.directions(library.path(run.folder), tab.feature)
    wait(qtbot, lambda: bool(tab.bars.rows) and tab.panel.isVisible())  # what there is comes first
    assert [r.label.split(" ")[0] for r in tab.bars.rows] == [f"#{n.feature}" for n in directions]
    tab.measure.set_value("phi")
    wait(qtbot, lambda: "not counted yet" in tab.note.text())
    assert tab.bars.rows == () and tab.panel.isVisible()
    assert tab.panel.estimate.text().endswith(estimate(library, run, 2000))
    assert "tokens/s of its discovery" in tab.panel.estimate.text()
    tab.panel.button.click()
    wait(qtbot, lambda: bool(tab.bars.rows))
    wait(qtbot, lambda: not tab.panel.isVisible())


# --- ablation -------------------------------------------------------------------------------------


def test_what_was_measured_is_shown(qtbot: Any, opened: Opened, library: Library) -> None:
    feature = often(library)[0]
    run = library.feature_runs.all()[0]
    params = ablation_params(contexts=8, controls=1)
    result = library.feature_analyses.get(run.id, feature, KIND, params)
    library.feature_analyses.put(run.id, feature, KIND, ablation_params(), result)
    tab = opened(feature, "ablation").tabs.currentWidget()
    wait(qtbot, lambda: tab.result is not None)
    own = result["active"]["feature"]
    assert tab.tiles["loss"].value == ablation_tab.signed(own["delta_ce"]["mean"])
    change = np.exp(own["ce"] + own["delta_ce"]["mean"]) - np.exp(own["ce"])
    assert tab.tiles["perplexity"].value == ablation_tab.signed(float(change), 2)
    assert tab.sentence.text().startswith("Removing it ")
    assert [r.tip.split("ID ")[1].split(")")[0] for r in tab.raised.rows] == [
        str(token) for token, _ in result["raised"]
    ]
    assert tab.tiles["impact"].value == "—"  # the others had other controls
    tab.mode.set_value("mean")
    wait(qtbot, lambda: tab.result is None)
    assert not tab._content.isVisible()


def test_measuring_runs_as_a_job_and_shows_its_result(
    qtbot: Any, opened: Opened, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    feature = often(library)[MEASURED]
    few = ablation_params(contexts=4, controls=1)
    monkeypatch.setattr(ablation_tab, "ablation_params", lambda mode: {**few, "mode": mode})
    tab = opened(feature, "ablation").tabs.currentWidget()
    wait(qtbot, lambda: "random directions" in tab.panel.estimate.text())
    tab.panel.button.click()
    assert tab.panel.job is not None and not tab.panel.button.isVisible()
    wait(qtbot, lambda: tab.result is not None)
    assert tab.result == library.feature_analyses.get(tab.dialog.run.id, feature, KIND, few)
    wait(qtbot, lambda: tab.panel.button.isVisible())


def effect(kl: float, delta: float = 0.1, low: float | None = 0.05) -> dict[str, Any]:
    high = None if low is None else 2 * delta - low
    figure = {"mean": delta, "low": low, "high": high}
    return {
        "feature": {"tokens": 9, "contexts": 3, "ce": 2.0, "delta_ce": figure,
                    "kl": {"mean": kl, "low": None, "high": None}, "changed": figure},
        "control": {"delta_ce": {"mean": 0.01, "low": None, "high": None}},
        "excess_ce": {"mean": 0.09, "low": low, "high": high},
    }  # fmt: skip


def result_of(kl: float, **more: Any) -> dict[str, Any]:
    return {"mode": "zero", "controls": 5, "active": effect(kl), "silent": False, **more}


def test_impact_is_the_share_of_similar_features_with_less() -> None:
    density = np.array([0.01, 0.02, 0.005, 0.5, 0.011, 0.009, 0.012, 0.0])
    kept = {i: result_of(0.1 * i) for i in range(8)}
    params = ablation_params()
    near = ablation_tab.similar(kept, 0, params, density)
    assert sorted(near) == [1, 2, 4, 5, 6]  # not itself, not ten times as often active
    assert ablation_tab.percentile(result_of(0.45), near) == pytest.approx(3 / 5)
    assert ablation_tab.percentile(result_of(0.45), {1: near[1]}) is None
    others = {**kept, 1: result_of(0.1, mode="mean")}
    assert 1 not in ablation_tab.similar(others, 0, params, density)
    assert ablation_tab.like_it(density, 0, {4}) == [5, 6, 1, 2]
    assert ablation_tab.like_it(density, 7, set()) == []


@pytest.mark.parametrize(
    ("active", "silent", "words"),
    [
        (effect(1.0), False, "raises the loss by 0.100 ± 0.050 nats on the tokens where it fires; "
         "a random direction of the same size changes it by +0.010. The model uses"),
        (effect(1.0, low=-0.2), False, "may be chance"),
        (effect(1.0, delta=-0.1, low=-0.15), False, "lowers the loss by 0.100"),
        (effect(1.0, low=None), False, "One context alone gives no interval"),
        (None, True, "changes no prediction at all (77 tokens, exactly 0)"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_was_found(active: Any, silent: bool, words: str) -> None:
    everywhere = {"tokens": 77}
    result = {"active": active, "silent": silent, "contexts": 4, "everywhere": everywhere}
    assert words in ablation_tab.sentence_of(result)


# --- notes and the head ---------------------------------------------------------------------------


def test_a_typed_label_is_kept_once_with_its_source(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    first, second = often(library)[:2]
    dialog = opened(first)
    order = dialog.presenter.table.visible.tolist()
    assert order[:2] == [first, second] and not dialog.previous.isEnabled()
    qtbot.keyClicks(dialog.label, "Mon")
    dialog._save_label.flush()
    qtbot.keyClicks(dialog.label, "ths")
    dialog.star.click()
    dialog.tabs.setCurrentIndex(TAB["notes"])
    dialog.tabs.currentWidget().note.setPlainText("also weekdays?\nand years")
    dialog.next.click()
    note = library.feature_notes.of_sae(1)[first]
    assert (note.label, note.note, note.starred) == ("Months", "also weekdays?\nand years", True)
    (label,) = library.feature_labels.of_feature(1, first)  # not one for each pause
    assert (label.text, label.source) == ("Months", "human")
    assert dialog.feature == second and dialog.label.text() == "" and not dialog.star.isChecked()
    assert second not in library.feature_notes.of_sae(1)
    dialog.previous.click()
    assert dialog.label.text() == "Months" and dialog.star.isChecked()
    dialog.hide_it.click()
    assert library.feature_notes.of_sae(1)[first].hidden
    qtbot.keyClicks(dialog.label, "!")
    dialog.close()  # what was typed last is saved too
    assert library.feature_notes.of_sae(1)[first].label == "Months!"


def test_labels_are_used_and_deleted_lists_joined_and_left(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    feature = often(library)[0]
    labels, lists = library.feature_labels, library.feature_lists
    rule = labels.add(sae_id=1, feature=feature, text="commas", source="rule", score=0.7,
                      low=0.6, high=0.8)  # fmt: skip
    labels.add(sae_id=1, feature=feature, text="lists of names", source="model", origin="tiny")
    library.feature_scores.write(1, feature, "human", accuracy=0.9, active=8, inactive=8)
    kept = lists.add(name="Punctuation")
    dialog = opened(feature, "notes")
    tab = dialog.tabs.currentWidget()
    texts = [w.text() for w in tab.findChildren(QWidget) if hasattr(w, "text")]
    assert "commas" in texts and any("0.70 (0.60–0.80)" in str(t) for t in texts)
    assert any("tiny" in str(t) for t in texts) and "Blind human test" in texts

    def button(name: str) -> Any:
        def found() -> list[QWidget]:
            widgets = tab.findChildren(QWidget)
            return [w for w in widgets if w.accessibleName() == name and w.isVisibleTo(tab)]

        wait(qtbot, lambda: len(found()) == 1)
        return found()[0]

    button("Use the label commas").click()
    wait(qtbot, lambda: dialog.label.text() == "commas")
    assert library.feature_notes.of_sae(1)[feature].label == "commas"
    button("Delete the label commas").click()
    assert [label.id for label in labels.of_feature(1, feature)] != [rule]
    wait(qtbot, lambda: dialog.description != "")
    assert dialog.label.placeholderText() == f"{dialog.description} (by rule)"
    button(f"Use the label {dialog.description}").click()
    found = labels.of_feature(1, feature)[0]
    assert (found.text, found.source) == (dialog.description, "rule")
    assert library.feature_notes.of_sae(1)[feature].label == dialog.description
    (box,) = [w for w in tab.findChildren(QWidget) if getattr(w, "text", str)() == "Punctuation"]
    box.setChecked(True)
    assert lists.of_sae(kept, 1) == [feature]
    box.setChecked(False)
    assert lists.of_sae(kept, 1) == []
    dialog.add_to_new_list("Another")
    (made,) = [one for one in lists.all() if one.name == "Another"]
    assert lists.of_sae(made.id, 1) == [feature]


def test_tiles_tell_numbers_with_their_sample_and_a_dash_where_there_is_none(
    opened: Opened, library: Library
) -> None:
    feature = often(library)[4]
    dialog = opened(feature)
    store, _ = store_of(library)
    at = {name: float(np.asarray(column)[feature]) for name, column in store.columns.items()}
    assert dialog.tiles["max_activation"].value == formatting.number(at["max_activation"], 3)
    assert dialog.tiles["contexts"].value == formatting.count(at["n_contexts"])
    assert f"{formatting.count(store.meta.tokens)} tokens" in dialog.tiles["density"].note
    values = dialog.columns.values
    for name, value in (("score", 0.72), ("score_accuracy", 0.86), ("score_low", 0.79),
                        ("score_high", 0.92), ("score_contexts", 97),
                        ("score_percentile", 99.0)):  # fmt: skip
        values[name] = np.full(len(store), value)
    dialog.show_feature(feature)
    score = dialog.tiles["score"]
    assert score.value == "72.0%" and "0.86 (0.79–0.92)" in score.note
    assert "n = 97" in score.note and "99%" in score.note
    values["score"][feature] = np.nan
    dialog.show_feature(feature)
    assert score.value == "—" and "too few" in score.note
    assert score.toolTip().startswith(dialog.why_no_score())


def test_a_feature_that_never_fired_says_so_on_every_tab(
    qtbot: Any, opened: Opened, library: Library
) -> None:
    store, _ = store_of(library)
    dead = np.flatnonzero(np.asarray(store.columns["n_active"]) == 0)
    if not len(dead):
        pytest.skip("every feature of the small SAE fired")
    dialog = opened(int(dead[0]))
    assert (dialog.tiles["density"].value, dialog.tiles["max_activation"].value) == ("0%", "—")
    said = {
        "examples": "fired on none of the",
        "correlations": "fired on none of the",
        "ablation": "It never fired: 16 contexts",
    }
    for name, number in TAB.items():
        dialog.tabs.setCurrentIndex(number)
        tab = dialog.tabs.currentWidget()

        def texts(tab: QWidget = tab) -> str:
            return " ".join(str(getattr(w, "text", str)()) for w in tab.findChildren(QWidget))

        wait(qtbot, lambda name=name, texts=texts: said.get(name, "") in texts())
        assert nameless(dialog) == []


def test_tabs_are_built_when_they_are_looked_at(opened: Opened, library: Library) -> None:
    dialog = opened(often(library)[0])
    assert [dialog.tabs.tabText(i) for i in range(dialog.tabs.count())] == [
        "Examples", "Logit Lens", "Correlations", "Ablation", "Notes",
    ]  # fmt: skip
    assert [dialog.tabs.widget(i)._is_built for i in range(5)] == [True] + 4 * [False]


@pytest.mark.parametrize("size", SIZES)
def test_every_tab_can_be_read(
    qtbot: Any, opened: Opened, library: Library, size: tuple[int, int]
) -> None:
    feature = often(library)[0]
    run = library.feature_runs.all()[0]
    kept = library.feature_analyses.get(run.id, feature, KIND, ablation_params("zero", 8, 1))
    library.feature_analyses.put(run.id, feature, KIND, ablation_params(), kept)
    library.feature_labels.write_human(1, feature, "Commas")
    dialog = opened(feature, "examples", size)
    for name, number in TAB.items():
        dialog.tabs.setCurrentIndex(number)
        assert dialog.services.background.wait(30)
        for _ in range(3):
            QApplication.processEvents()
        shot(dialog, f"feature_{name}-{size[0]}x{size[1]}")
        assert nameless(dialog) == [] and too_small(dialog) == []
        assert cut_off(dialog) == [] and squeezed(dialog) == []
