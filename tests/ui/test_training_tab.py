"""The Training tab: a form made from the engine's table, and trainings that really run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QLabel, QWidget

from mistudio import formatting
from mistudio.device import Device
from mistudio.engine.models.loading import ModelSummary
from mistudio.engine.training.config import TrainingConfig, derive, option, parse
from mistudio.engine.training.cost import model_shape
from mistudio.engine.training.footprint import Machine, PlannedSite, RunShape
from mistudio.engine.training.planning import Measured, plan_run
from mistudio.engine.training.verdict import lights
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Extraction, Model
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.services import Services
from mistudio.ui.steering.presenter import sources as steering_sources
from mistudio.ui.training import presenter as presenter_module
from mistudio.ui.training.charts import CHARTS
from mistudio.ui.training.configuration import ACROSS_HELP
from mistudio.ui.training.estimate import PORTION, Computer, Corpus, Pace, rough
from mistudio.ui.training.fields import Remark
from mistudio.ui.training.form import (
    ACROSS_MLP,
    ADVANCED,
    CHOICE_NAMES,
    ENCODER_NAMES,
    ESSENTIAL,
    NAMES,
    SITES,
    SPARSITY_NAMES,
    TRANSCODERS,
    Form,
    applies,
    check,
    default_text,
    encoder_title,
    groups,
    point_name,
    point_parts,
    point_title,
)
from mistudio.ui.training.form import SOURCES as TRAINING_SOURCES
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.training.presenter import (
    TRAINING_KINDS,
    Found,
    engine_imported,
    import_engine,
)
from mistudio.ui.widgets import ToastArea

from .checks import cut_off, nameless, too_small
from .screens import shot
from .small_jobs import Count

SIZES = [(1280, 720), (1920, 1080)]
ROOT = Path(__file__).resolve().parents[2]
GB = 1024**3


class Journey:
    """Where the page asked the window to go."""

    def __init__(self) -> None:
        self.places: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, tab_name: str, **context: Any) -> None:
        self.places.append((tab_name, context))


def make_services(qtbot: Any, library: Library) -> Iterator[Services]:
    window = QWidget()
    window.resize(1280, 720)
    qtbot.addWidget(window)
    changes = ChangeNotifier(library)
    jobs = JobManager(library, changes)
    background = Background(library)
    yield Services(
        library=library,
        jobs=jobs,
        changes=changes,
        background=background,
        settings=Settings(),
        toasts=ToastArea(window, seconds=0.2),
        navigate=Journey(),
    )
    assert background.wait(60)
    assert jobs.shutdown(seconds=60)
    changes.close()


@pytest.fixture
def empty(qtbot: Any, themed: QApplication, library: Library) -> Iterator[Services]:
    yield from make_services(qtbot, library)


@pytest.fixture
def trained(qtbot: Any, themed: QApplication, trained_library: Library) -> Iterator[Services]:
    yield from make_services(qtbot, trained_library)


def open_page(qtbot: Any, services: Services, size: tuple[int, int] = SIZES[0]) -> TrainingPage:
    page = TrainingPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    return page


def fill(page: TrainingPage, **values: str) -> None:
    for name, value in values.items():
        page.configuration.fields[name].set_value(value)
    page.configuration._recheck.flush()


def a_model(d_model: int = 64, **summary: Any) -> Model:
    facts = {
        "architecture": "TinyForCausalLM", "model_type": "tiny", "n_layers": 4, "d_model": d_model,
        "n_heads": 4, "n_kv_heads": 4, "d_mlp": 4 * d_model, "vocab_size": 500,
        "context_length": 512, "tied_embeddings": True, "parameters": 250_000,
        "bytes_on_disk": 1, "dtypes": ["F32"], **summary,
    }  # fmt: skip
    return Model(1, "tiny", "local", "", "models/tiny", "fp32", 4, d_model, facts["parameters"], 1,
                 facts, {}, "2026-01-01T00:00:00+00:00")  # fmt: skip


def a_dataset() -> Dataset:
    return Dataset(
        1, "text", "local", "", "datasets/text", 1, 1, 1, {}, "2026-01-01T00:00:00+00:00", {}, {}
    )


def a_form(**changes: Any) -> Form:
    values: dict[str, Any] = {"dataset": a_dataset(), "model": a_model(), "layers": (1,)}
    return Form(**(values | changes))


def a_computer(free: int = 8 * GB, disk: int = 100 * GB, no_8bit: str = "") -> Computer:
    return Computer(Machine(16 * GB, free, disk), "fp32", no_8bit)


def an_extraction(points: list[str], context: int = 64) -> Extraction:
    return Extraction(1, 1, 1, points, {"context": context}, "activations/x", 1000, 1000, {},
                      "2026-01-01T00:00:00+00:00")  # fmt: skip


# --- the form: what is wrong, what is derived -----------------------------------------------------


def test_kinds_and_names_are_those_of_the_engine() -> None:
    from mistudio.engine.models.hooks import SITES as ENGINE_SITES
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.jobs import sources
    from mistudio.jobs.kinds import KINDS

    assert set(TRAINING_KINDS) <= set(KINDS)
    assert {"stream", *TRAINING_SOURCES} == set(sources.SOURCES)
    assert sources.PHASE_TOKENS == PORTION
    assert set(SITES) == set(ENGINE_SITES)
    assert set(option("wiring")["choices"]) == set(ENCODER_NAMES)
    assert set(option("sparsity")["choices"]) <= set(SPARSITY_NAMES)
    for site in SITES:
        assert point_name(site, 7) == HookPoint(site, 7).name
        assert point_parts(HookPoint(site, 7).name) == (site, 7)


def test_defaults_of_the_form_give_the_default_configuration() -> None:
    found = check(a_form(values={name: default_text(name) for name in NAMES}))
    assert found.errors == {} and found.blocker == ""
    assert parse(found.config) == TrainingConfig() and found.plan == derive(TrainingConfig(), 64)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("tokens", "12", "Training tokens must be between 1000 and 1e+11; it is 12."),
        ("k", "0", "Target L0 must be between 1 and 4096; it is 0."),
        ("k", "", "Target L0 needs a value: 1 to 4,096."),
        ("learning_rate", "fast", "It takes a number."),
        ("learning_rate", "nan", "must be between"),
        ("batch_size", "1e999", "It takes a whole number."),
        ("k", "600", "600 of 512 latents would be active on every token."),
        ("context", "4,096", "tiny reads at most 512 tokens at once."),
    ],
)
def test_a_wrong_value_is_told_in_a_plain_sentence(name: str, text: str, sentence: str) -> None:
    found = check(a_form(values={name: text}))
    assert sentence in found.errors[name]
    assert found.blocker and found.plan is None


def test_numbers_are_read_as_people_write_them() -> None:
    found = check(a_form(values={"tokens": " 3,000,000 ", "learning_rate": "2e-4"}))
    assert (found.config["tokens"], found.config["learning_rate"]) == (3_000_000, 2e-4)


def test_what_is_missing_is_said_one_by_one() -> None:
    assert check(Form()).blocker == "Choose a dataset to learn from."
    assert check(Form(dataset=a_dataset())).blocker == "Choose a model."
    assert check(a_form(layers=())).blocker == "Choose at least one layer."


def test_stored_activations_must_hold_the_chosen_layers() -> None:
    stored = an_extraction([point_name("resid_post", 2)])
    assert check(a_form(extraction=stored, layers=(2,))).blocker == ""
    found = check(a_form(extraction=stored, layers=(1, 2)))
    assert "lack Residual stream after block (layer 1)" in found.errors["extraction"]
    assert found.blocker == found.errors["extraction"]


@pytest.mark.parametrize("wiring", TRANSCODERS)
def test_stored_activations_of_a_transcoder_hold_both_ends(wiring: str) -> None:
    ends = [point_name("mlp_in", 1), point_name("mlp_out", 1)]
    form = a_form(extraction=an_extraction(ends), values={"wiring": wiring})
    assert form.points == ends[:1] and check(form).blocker == ""
    for held, lacking in ((ends[:1], "MLP output"), (ends[1:], "MLP input")):
        found = check(a_form(extraction=an_extraction(held), values={"wiring": wiring}))
        assert f"lack {lacking} (layer 1)" in found.blocker
        assert "both ends of the MLP" in found.blocker and "Stream from the model" in found.blocker


def test_stored_activations_bring_their_context_length() -> None:
    stored = an_extraction([point_name("resid_post", 1)], context=64)
    found = check(a_form(extraction=stored, values={"context": "256"}))
    assert found.config["context"] == 64 and found.blocker == ""


# --- which fields, and what is submitted ----------------------------------------------------------

KINDS_OF_ENCODER = [
    (sparsity, wiring)
    for sparsity in option("sparsity")["choices"]
    for wiring in option("wiring")["choices"]
]


@pytest.mark.parametrize(("sparsity", "wiring"), KINDS_OF_ENCODER)
def test_every_sparsity_goes_with_every_wiring(sparsity: str, wiring: str) -> None:
    """What is submitted is what was chosen, its defaults written out, and nothing that has no
    part in it."""
    found = check(a_form(values={"sparsity": sparsity, "wiring": wiring}))
    assert found.blocker == "" and found.plan is not None
    assert parse(found.config) == parse({"sparsity": sparsity, "wiring": wiring})
    for name in NAMES:
        used = all(
            found.config.get(other, option(other)["default"]) in wanted
            for other, wanted in option(name).get("only", {}).items()
        )
        assert (name in found.shown) == used
        assert (name in found.config) == (used and option(name)["default"] is not None)


def test_a_field_that_does_not_apply_is_neither_judged_nor_submitted() -> None:
    values: dict[str, str | bool] = {"sparsity": "topk", "l1_coefficient": "many"}
    found = check(a_form(values=values))
    assert found.errors == {} and "l1_coefficient" not in found.config
    found = check(a_form(values=values | {"sparsity": "jumprelu"}))
    assert list(found.errors) == ["l1_coefficient"] and found.blocker


def test_where_one_field_decides_the_other_has_no_say() -> None:
    found = check(a_form(values={"width": "1,000", "expansion": "lots", "steps": "300",
                                 "batch_size": "128"}))  # fmt: skip
    assert found.errors == {} and found.fixed == {"expansion", "tokens"}
    assert not {"expansion", "tokens"} & set(found.config)
    assert found.plan == derive(parse({"width": 1000, "steps": 300, "batch_size": 128}), 64)
    assert found.notes["expansion"] == "“Dictionary size” decides: 1,000 latents"
    assert found.notes["tokens"] == "“Steps” decides: 38,400 tokens"


def test_a_factor_is_read_with_or_without_its_sign() -> None:
    for text in ("6", "6x", "6 ×", "6.0X"):
        assert check(a_form(values={"expansion": text})).config["expansion"] == 6


def test_an_optimiser_that_cannot_run_here_is_refused() -> None:
    form = a_form(values={"optimizer": "adam8bit"})
    why = "8-bit Adam needs an NVIDIA GPU, and this computer has none. Choose Adam."
    assert why in check(form, computer=a_computer(no_8bit=why)).blocker
    assert check(form, computer=a_computer()).blocker == ""
    assert check(a_form(), computer=a_computer(no_8bit=why)).blocker == ""


def test_every_advanced_field_has_its_section_and_every_choice_its_name() -> None:
    placed = [name for _, names in groups() for name in names]
    assert sorted(placed) == sorted(ADVANCED) and "More" not in dict(groups())
    for name in NAMES:
        if "choices" in option(name):
            assert set(option(name)["choices"]) <= set(CHOICE_NAMES[name])


def test_an_encoder_is_called_by_its_sparsity_and_wiring() -> None:
    assert encoder_title("batchtopk") == encoder_title("batchtopk", "sae") == "BatchTopK SAE"
    assert encoder_title("standard", "skip_sae") == "ReLU + L1 Skip SAE"
    assert encoder_title("topk", "transcoder") == "TopK Transcoder SAE"
    assert encoder_title("gated", "skip_transcoder") == "Gated Skip Transcoder SAE"
    assert point_title(point_name("mlp_in", 3)) == "Layer 3 • MLP input"
    assert point_title(point_name("mlp_in", 3), "transcoder") == f"Layer 3 • {ACROSS_MLP}"


# --- what it would need ---------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", ["sae", "transcoder"])
@pytest.mark.parametrize("source", ["stream", "extract", "hybrid", "stored"])
def test_the_estimate_is_the_engines_plan(wiring: str, source: str) -> None:
    site = "mlp_in" if wiring == "transcoder" else "resid_pre"
    points = [point_name(place, layer) for place in (site, "mlp_out") for layer in (1, 2)]
    corpus = 1_500_000  # less than the run reads, more than a portion
    form = a_form(layers=(1, 2), site="resid_pre", values={"wiring": wiring},
                  source="auto" if source in ("stream", "stored") else source,
                  extraction=an_extraction(points, context=128) if source == "stored" else None,
                  )  # fmt: skip
    pace = Pace("earlier run", Measured(overall=10_000), None, 10_000)
    found = check(form, Corpus(corpus, 40_000), lambda plan: pace, a_computer())
    summary = ModelSummary(**a_model().summary)
    plan = derive(parse({"wiring": wiring}), 64)
    sites = tuple(PlannedSite(layer, site, plan) for layer in (1, 2))
    kept = {"extract": corpus, "hybrid": PORTION}
    shape = RunShape(model_shape(summary, 4), sites, stored_tokens=kept.get(source),
                     source="extract" if source in kept else source,
                     heldout_tokens=40_000)  # fmt: skip
    run = plan_run(shape, a_computer().machine)
    assert found.estimate.needs == (
        f"About {formatting.size(rough(run.memory))} of memory (8 GB free) • "
        f"{formatting.size(rough(run.disk))} of disk (100 GB free)"
    )
    assert found.estimate.time == "About 3 min 20 s ± 30 s"
    assert "512 latents on 64 dimensions at each of 2 layers" in found.estimate.work
    assert f"{plan.steps} steps of" in found.estimate.work
    assert "1.3 passes over the text" in found.estimate.work
    assert found.estimate.advice == ()


def test_what_does_not_fit_comes_with_advice() -> None:
    form = a_form(layers=(0, 1, 2, 3), values={"expansion": "256"})
    computer = a_computer(free=300 * 1024**2, disk=GB // 1024)
    found = check(form, computer=computer)
    text = " ".join(found.estimate.advice)
    assert "Four layers need" in text and "at a time" in text and "of disk" in text
    assert found.blocker == "" and "of disk" in found.doubt  # for whoever knows better


def test_a_model_that_says_too_little_has_no_figures() -> None:
    form = a_form()
    form.model.summary.pop("d_mlp")  # as a row of an older version
    found = check(form, computer=a_computer())
    assert found.estimate.needs == "" and found.estimate.work and found.blocker == ""


# --- the form on the screen -----------------------------------------------------------------------


def test_form_has_every_field_of_the_table(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    fields = page.configuration.fields
    assert sorted(fields) == sorted(NAMES) == sorted([*ESSENTIAL, *ADVANCED])
    for name, entry in fields.items():
        assert entry.editor.accessibleName() == option(name)["label"]
        assert option(name)["help"] in entry.editor.toolTip()
        if "choices" in option(name):
            texts = [entry.editor.itemText(i) for i in range(entry.editor.count())]
            assert texts == [CHOICE_NAMES[name][value] for value in option(name)["choices"]]
    assert "ghost_gradients" not in fields
    for name in ("auxk", "revive"):
        assert "ghost gradients" in fields[name].editor.toolTip()


def test_fields_left_open_show_what_they_become(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    fill(page, tokens="20,000", expansion="2x")
    plan = derive(parse({"tokens": 20_000, "expansion": 2.0}), 128)
    fields = page.configuration.fields
    shown = {name: entry.editor.placeholderText() for name, entry in fields.items()
             if option(name)["default"] is None}  # fmt: skip
    count = formatting.count
    assert float(shown["learning_rate"].removeprefix("auto: ")) == pytest.approx(
        plan.learning_rate, rel=0.05
    )
    assert shown["batch_size"] == f"auto: {count(plan.batch_size)}"
    assert shown["dead_window"] == f"auto: {count(plan.dead_window)}"
    assert shown["steps"] == f"auto: {count(plan.steps)}"
    assert shown["width"] == f"auto: {count(plan.d_sae)}"
    assert shown["l1_coefficient"] == "auto: steered to target"
    assert fields["expansion"].helper.text() == "256 latents"
    fill(page, warmup_share="2")  # an error elsewhere takes nothing away
    assert fields["width"].editor.placeholderText() == shown["width"]
    assert fields["expansion"].helper.text() == "256 latents"


def test_a_wrong_value_stands_beside_its_field_and_stops_start(
    qtbot: Any, trained: Services
) -> None:
    page = open_page(qtbot, trained)
    card = page.configuration
    assert card.start.isEnabled()
    fill(page, warmup_share="0.9")
    assert card.advanced.expanded  # the field is where the error can be seen
    assert (
        "Warm-up must be between 0 and 0.5; it is 0.9." in card.fields["warmup_share"].error.text()
    )
    assert not card.start.isEnabled()
    assert card.reason.text() == card.start.toolTip() == card.check.blocker != ""
    fill(page, warmup_share="0.05")
    assert card.start.isEnabled() and not card.fields["warmup_share"].error.isVisible()


# Qt's offscreen platform says so for every list that opens.
LISTS_OPEN = pytest.mark.qt_log_ignore("does not support grabbing the keyboard", extend=True)


def pick(qtbot: Any, combo: Any, text: str) -> None:
    """Open the list with the mouse and click on an entry, as a person does."""
    interval = QApplication.doubleClickInterval()
    QApplication.setDoubleClickInterval(1)  # a click within it, after the list opened, is ignored
    qtbot.mouseClick(combo, Qt.MouseButton.LeftButton)
    view = combo.view()
    qtbot.waitUntil(view.isVisible)
    index = combo.model().index(combo.findText(text), 0)
    view.scrollTo(index)
    place = view.visualRect(index).center()
    qtbot.mouseMove(view.viewport(), place)
    qtbot.wait(10)
    qtbot.mouseClick(view.viewport(), Qt.MouseButton.LeftButton, pos=place)
    qtbot.waitUntil(lambda: not view.isVisible())
    QApplication.setDoubleClickInterval(interval)
    assert combo.currentText() == text


def visible_fields(page: TrainingPage) -> set[str]:
    return {name for name, entry in page.configuration.fields.items() if entry.isVisible()}


@LISTS_OPEN
def test_only_fields_that_apply_are_shown(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained, (1280, 1600))
    card = page.configuration
    qtbot.mouseClick(card.advanced.button, Qt.MouseButton.LeftButton)
    plain = {name for name in NAMES if applies(name, {})}
    assert visible_fields(page) == plain and "l1_coefficient" not in plain
    pick(qtbot, card.fields["sparsity"].editor, "JumpReLU")
    assert visible_fields(page) == plain | {"l1_coefficient"}
    pick(qtbot, card.fields["wiring"].editor, "Skip Autoencoder")
    assert visible_fields(page) == plain | {"l1_coefficient", "skip", "skip_rank"}
    pick(qtbot, card.fields["skip"].editor, "Fixed share")
    assert visible_fields(page) == plain | {"l1_coefficient", "skip", "skip_share"}
    pick(qtbot, card.fields["optimizer"].editor, "AdamW")
    assert "weight_decay" in visible_fields(page)
    pick(qtbot, card.fields["sparsity"].editor, "TopK")
    pick(qtbot, card.fields["wiring"].editor, "Sparse Autoencoder")
    assert visible_fields(page) == plain | {"weight_decay"}
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_sparsity_and_wiring_are_independent(qtbot: Any, trained: Services) -> None:
    """By keys alone: one combo never moves the other."""
    page = open_page(qtbot, trained)
    card = page.configuration
    sparsity, wiring = card.fields["sparsity"].editor, card.fields["wiring"].editor
    assert wiring.value == option("wiring")["default"]
    for _ in option("wiring")["choices"]:
        sparsity.setFocus()
        qtbot.keyClick(sparsity, Qt.Key.Key_Home)
        for chosen in option("sparsity")["choices"]:
            assert sparsity.value == chosen and card.check.config["sparsity"] == chosen
            assert card.check.config["wiring"] == wiring.value and card.check.blocker == ""
            qtbot.keyClick(sparsity, Qt.Key.Key_Down)
        wiring.setFocus()
        qtbot.keyClick(wiring, Qt.Key.Key_Down)
        assert sparsity.value == option("sparsity")["choices"][-1]
    assert wiring.value == option("wiring")["choices"][-1]


@LISTS_OPEN
def test_a_transcoder_has_its_place_and_gives_the_other_back(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    card = page.configuration
    pick(qtbot, card.site, "MLP output")
    for name in ("Transcoder", "Skip Transcoder"):
        pick(qtbot, card.fields["wiring"].editor, name)
        assert card.site.currentText() == ACROSS_MLP and not card.site.isEnabled()
        assert card.site.count() == 1 and card._site_row.helper.text() == ACROSS_HELP
        assert card.form().points == [point_name("mlp_in", 2)] and card.check.blocker == ""
    other = open_page(qtbot, trained)
    other.restore_state(json.loads(json.dumps(page.save_state())))
    assert other.configuration.form() == card.form()
    for shown in (card, other.configuration):
        assert shown.site.currentText() == ACROSS_MLP
        shown.fields["wiring"].set_value("skip_sae")
        assert shown.site.currentText() == "MLP output" and shown.site.isEnabled()
        assert shown.site.count() == len(SITES) and not shown._site_row.helper.isVisible()
        assert shown.form().points == [point_name("mlp_out", 2)]


def test_stored_activations_take_a_transcoder_to_the_layers_whose_both_ends_they_hold(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    held = [point_name("mlp_in", 0), point_name("mlp_in", 3), point_name("mlp_out", 3)]
    trained_library.extractions.add(
        model_id=1, tokenization_id=trained_library.tokenizations.all()[0].id, hook_points=held,
        settings={"context": 32}, folder="activations/none", tokens=4000, bytes=1024,
        statistics={},
    )  # fmt: skip
    card = open_page(qtbot, trained).configuration
    card.fields["wiring"].set_value("transcoder")
    card.source.setCurrentIndex(len(TRAINING_SOURCES))
    assert card.form().layers == (3,) and card.check.blocker == ""
    card.layers.set_selected([0, 3])
    assert "lack MLP output (layer 0)" in card._source_row.error.text()
    assert not card.start.isEnabled() and card.start.toolTip() == card.check.blocker


def test_a_field_that_another_decides_is_shut(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained, (1280, 1600))
    card = page.configuration
    card.advanced.set_expanded(True)
    width = card.fields["width"].editor
    qtbot.keyClicks(width, "500")
    qtbot.waitUntil(lambda: not card.fields["expansion"].editor.isEnabled())
    assert card.fields["expansion"].helper.text() == "“Dictionary size” decides: 500 latents"
    assert card.check.plan.d_sae == 500
    qtbot.mouseClick(card.reset, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(card.fields["expansion"].editor.isEnabled)
    assert card.check.plan == derive(TrainingConfig(), 128)


def test_tab_goes_as_the_eye_does(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained, (1280, 1700))
    card = page.configuration
    card.advanced.set_expanded(True)
    card.fields["sparsity"].set_value("jumprelu")
    page.activateWindow()
    card.dataset.setFocus()
    qtbot.waitUntil(card.dataset.hasFocus)
    places, walked = [], []
    while (widget := QApplication.focusWidget()) is not card.start:
        assert widget is not None and widget not in walked
        walked.append(widget)
        row = widget.mapTo(card, widget.rect().center())
        if isinstance(widget.parentWidget(), Remark):  # a mend follows what it mends
            assert widget.parentWidget().parentWidget() is walked[-2].parentWidget()
        else:
            places.append((widget.accessibleName() or widget.text(), row.x(), row.y()))
        qtbot.keyClick(widget, Qt.Key.Key_Tab)
    assert {entry.editor for entry in card.fields.values() if entry.isVisible()} <= set(walked)
    assert set(card.layers.buttons) <= set(walked)
    for (before, x0, y0), (after, x1, y1) in pairwise(places):
        to_the_right = x1 > x0 and abs(y1 - y0) <= 45  # a heading's buttons stand a little higher
        assert to_the_right or y1 > y0, f"{before} -> {after}"


def test_the_summary_is_that_of_the_computer(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    card = page.configuration
    found = card.check.estimate
    assert card._work.text() == found.work and "latents on 128 dimensions" in found.work
    assert card._needs.text() == found.needs and " of memory (" in found.needs
    assert "memory: " in card._summary.toolTip() and "disk: " in card._summary.toolTip()
    assert not card._advice_row.isVisible()
    wide = dataclasses.replace(page.presenter.computer(None),
                               machine=Machine(16 * GB, 1, 100 * GB))  # fmt: skip
    page.presenter.computer = lambda model: wide  # type: ignore[method-assign]
    card.refresh_check()
    assert card._advice_row.isVisible() and "are free" in card._advice.text()


def test_the_device_is_looked_at_in_the_background(qtbot: Any, trained: Services) -> None:
    """8-bit Adam is offered until torch has said that there is no NVIDIA GPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU")
    page = open_page(qtbot, trained)
    editor = page.configuration.fields["optimizer"].editor
    item = editor.model().item(option("optimizer")["choices"].index("adam8bit"))
    qtbot.waitUntil(lambda: not item.isEnabled())
    assert "needs an NVIDIA GPU" in item.toolTip()


def test_a_gpu_has_memory_of_its_own(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    page.presenter._on_computer_found(Found(Device("cuda", "A card", 12 * GB, 10 * GB), ""))
    machine = page.presenter.computer(a_model()).machine
    assert (machine.memory_total, machine.memory_free) == (12 * GB, 10 * GB)
    assert machine.host_free and machine.disk_free
    needs = page.configuration.check.estimate.needs
    assert "of GPU memory (10 GB free) • " in needs and "of main memory (" in needs


def test_the_form_imports_no_torch() -> None:
    """Its first paint would wait for seconds."""
    code = "import sys, mistudio.ui.training.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_layers_are_those_of_the_model(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    grid = page.configuration.layers
    assert grid.n_layers == 4 and grid.selected() == [2]
    grid.clear_all.click()
    assert not page.configuration.start.isEnabled()
    grid.select_all.click()
    assert page.configuration.form().points == [point_name("resid_post", i) for i in range(4)]


def test_an_empty_library_leads_to_the_other_tabs(qtbot: Any, empty: Services) -> None:
    page = open_page(qtbot, empty)
    card = page.configuration
    assert card.dataset.currentText() == "No datasets yet" and not card.start.isEnabled()
    card.add_dataset.click()
    card.add_model.click()
    assert [place for place, _ in empty.navigate.places] == ["datasets", "models"]
    assert page._empty.isVisible()
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_the_form_comes_back(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    fill(page, tokens="44,000", learning_rate="1e-3", expansion="6", sparsity="gated",
         l1_coefficient="0.5", optimizer="adamw")  # fmt: skip
    page.configuration.fields["auxk"].set_value(False)
    page.configuration.layers.set_selected([0, 3])
    page.configuration.site.set_value("mlp_out")
    page.configuration.source.set_value("hybrid")
    state = json.loads(json.dumps(page.save_state()))
    other = open_page(qtbot, trained)
    other.restore_state(state)
    assert other.configuration.form() == page.configuration.form()
    assert other.configuration.form().source == "hybrid"
    other.restore_state({})
    other.restore_state({"layers": "x", "values": {"tokens": 3, "nonsense": "1"}, "model": 99})


def test_a_stored_extraction_takes_the_form_to_its_layers(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    tokenization = trained_library.tokenizations.all()[0]
    trained_library.extractions.add(
        model_id=1, tokenization_id=tokenization.id, hook_points=[point_name("mlp_out", 1)],
        settings={"context": 32}, folder="activations/none", tokens=4000, bytes=1024,
        statistics={},
    )  # fmt: skip
    page = open_page(qtbot, trained)
    card = page.configuration
    assert card.source.count() == len(TRAINING_SOURCES) + 1
    card.source.setCurrentIndex(len(TRAINING_SOURCES))
    assert card.form().points == [point_name("mlp_out", 1)]
    assert card.check.config["context"] == 32 and card.check.blocker == ""
    assert not card.fields["context"].editor.isEnabled()


# --- training -------------------------------------------------------------------------------------


def small(page: TrainingPage, tokens: str, layers: tuple[int, ...] = (2,)) -> None:
    fill(page, tokens=tokens, expansion="2", k="8", context="64", batch_size="128")
    page.configuration.layers.set_selected(layers)
    assert page.configuration.check.blocker == ""


def test_what_is_started_is_what_was_chosen(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    """The job's row: where the dictionaries read, and every value that has a part in the run."""
    import_engine()
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    page = open_page(qtbot, trained)
    small(page, "1,000", (1, 3))
    fill(page, sparsity="standard", wiring="skip_transcoder", l1_coefficient="2")
    page.configuration.source.set_value("extract")
    qtbot.mouseClick(page.configuration.start, Qt.MouseButton.LeftButton)
    (card,) = page.job_cards()
    params = trained_library.jobs.get(card.job.id).params
    assert params["hook_points"] == [point_name("mlp_in", layer) for layer in (1, 3)]
    assert params["source"] == "extract" and params["extraction_id"] is None
    wanted = {"sparsity": "standard", "wiring": "skip_transcoder", "l1_coefficient": 2.0,
              "tokens": 1_000, "expansion": 2.0, "k": 8, "context": 64,
              "batch_size": 128}  # fmt: skip
    assert parse(params["config"]) == parse(wanted)
    written_out = {name for name in NAMES
                   if applies(name, wanted) and option(name)["default"] is not None}  # fmt: skip
    assert set(params["config"]) == written_out | set(wanted)
    about = card._about.text()
    assert about.startswith(f"ReLU + L1 Skip Transcoder SAE • Layers 1, 3 • {ACROSS_MLP} • Queued")
    for job_id in (card.job.id, *trained.jobs.running()):
        trained.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


@pytest.mark.slow
def test_a_training_from_start_to_its_card(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    """Start, pause, resume, stop: through the real buttons, over two layers."""
    import_engine()
    page = open_page(qtbot, trained)
    small(page, "2,000,000", (1, 2))
    qtbot.mouseClick(page.configuration.start, Qt.MouseButton.LeftButton)
    (card,) = page.job_cards()
    job_id = card.job.id
    record = trained_library.jobs.get(job_id)
    assert record.kind == "train"
    assert record.params["hook_points"] == [point_name("resid_post", layer) for layer in (1, 2)]
    wanted = {"tokens": 2_000_000, "expansion": 2.0, "k": 8, "context": 64, "batch_size": 128}
    assert parse(record.params["config"]) == parse(wanted)
    assert record.params["extraction_id"] is None

    qtbot.waitUntil(lambda: card.charts is not None and card.charts.n_rows >= 8)
    assert card._title.text() == "tiny-llama-0.9m + intros" and card.badge.text() == "Training"
    assert card.tiles["loss"].value != "—" and card.tiles["tokens_per_second"].value != "—"
    first_charts = card.charts

    qtbot.mouseClick(card.pause, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: card.job.status == "paused")
    assert card.resume.isVisible() and not card.pause.isVisible()
    rows = len(trained.jobs.metrics(job_id))
    qtbot.wait(700)
    assert len(trained.jobs.metrics(job_id)) == rows  # it stands still
    page.resize(1280, 1400)
    for size in SIZES:
        page.resize(*size)
        page.column_page.ensureWidgetVisible(card, 0, 0)
        page.column_page.verticalScrollBar().setValue(
            card.mapTo(page.column_page.widget(), card.rect().topLeft()).y() - 24
        )
        shot(page, f"training_running-{size[0]}x{size[1]}")
    qtbot.mouseClick(card.resume, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(trained.jobs.metrics(job_id)) > rows + 4)

    # the whole history, in one curve for each site, in the very same charts
    qtbot.waitUntil(lambda: card.charts.n_rows == len(trained.jobs.metrics(job_id)))
    assert card.charts is first_charts
    qtbot.waitUntil(lambda: len(card.charts.charts) == len(CHARTS)
                    and not card.charts._waiting and not card.charts._rows)  # fmt: skip
    shown = card.charts.n_rows
    metrics = trained.jobs.metrics(job_id)[:shown]
    for name in record.params["hook_points"]:
        for key, _, _ in CHARTS:
            if key == "explained_variance":
                continue
            expected = [(row["step"], row[key]) for row in metrics if row["site"] == name]
            assert card.charts.charts[key].points(name)[: len(expected)] == expected
    assert "] Step 1, layer 1: loss=" in card.charts.log.toPlainText()

    qtbot.waitUntil(card.stop.isEnabled)
    qtbot.mouseClick(card.stop, Qt.MouseButton.LeftButton)
    assert card.badge.text() == "Finishing…"
    qtbot.waitUntil(lambda: trained_library.jobs.get(job_id).status == "finished")
    qtbot.waitUntil(lambda: page.job_cards() == [])
    run = trained_library.trainings.all()[0]
    assert run.status == "stopped" and run.job_id == job_id
    done = page._runs[run.id]
    assert done.badge.text() == "Stopped" and done.layers is not None
    for sae in trained_library.saes.of_training(run.id):
        done.choose(sae.id)
        values = [tile.value for tile in done.tiles[sae.id]]
        assert values == [
            formatting.percent(sae.metrics["explained_variance"]),
            formatting.number(sae.metrics["fvu"], 3),
            formatting.number(sae.metrics["l0"], 1),
            formatting.percent(sae.metrics["dead_share"]),
            formatting.percent(sae.metrics["ce_loss_score"]),
            formatting.number(sae.metrics["ce_increase"], 3),
        ]
        assert formatting.count(sae.metrics["tokens"]) in done.tiles[sae.id][3].toolTip()
        assert formatting.count(sae.metrics["loss_tokens"]) in done.tiles[sae.id][5].toolTip()

    # and afterwards the same history from the run's file
    done.history.set_expanded(True)
    qtbot.waitUntil(lambda: done.charts is not None)
    file = trained_library.path(run.folder) / "metrics.jsonl"
    rows_on_disk = [json.loads(line) for line in file.read_text().splitlines()]
    assert done.charts.n_rows == len(rows_on_disk) == len(trained.jobs.metrics(job_id))


@pytest.mark.slow
def test_an_interrupted_training_goes_on_from_its_card(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    import_engine()
    page = open_page(qtbot, trained)
    small(page, "2,000,000")
    qtbot.mouseClick(page.configuration.start, Qt.MouseButton.LeftButton)
    (card,) = page.job_cards()
    job_id = card.job.id
    qtbot.waitUntil(lambda: len(trained.jobs.metrics(job_id)) >= 4)
    thread = trained.jobs._thread(job_id)
    assert thread is not None
    thread.control.interrupt()  # as the window does when it is closed
    qtbot.waitUntil(lambda: card.job.status == "interrupted")
    before = trained.jobs.metrics(job_id)[-1]["step"]
    assert card.go_on.isVisible() and card.retry.isVisible()
    assert "Go On continues there" in card._hint.text()

    qtbot.mouseClick(card.go_on, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: [c.job.status for c in page.job_cards()] == ["running"])
    (card,) = page.job_cards()
    assert card.job.id == job_id and not card.go_on.isVisible()
    newest = lambda: (trained.jobs.metrics(job_id) or [{"step": 0}])[-1]["step"]  # noqa: E731
    qtbot.waitUntil(lambda: newest() > before)
    steps = [row["step"] for row in trained.jobs.metrics(job_id)]
    assert steps == sorted(set(steps)), "no step is made twice"
    qtbot.waitUntil(card.stop.isEnabled)
    qtbot.mouseClick(card.stop, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: trained_library.jobs.get(job_id).status == "finished")


@pytest.mark.slow
def test_a_transcoder_is_trained_from_the_form(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    import_engine()
    page = open_page(qtbot, trained)
    small(page, "6,000")
    fill(page, sparsity="jumprelu", wiring="skip_transcoder")
    qtbot.mouseClick(page.configuration.start, Qt.MouseButton.LeftButton)
    job_id = page.job_cards()[0].job.id
    active = ("queued", "running")
    qtbot.waitUntil(lambda: trained_library.jobs.get(job_id).status not in active)
    record = trained_library.jobs.get(job_id)
    assert record.status == "finished", record.error
    (sae,) = trained_library.saes.of_training(record.result["training_id"])
    assert sae.hook_point == point_name("mlp_in", 2)
    assert (sae.hook_point_out, sae.wiring) == (point_name("mlp_out", 2), "skip_transcoder")
    qtbot.waitUntil(lambda: sae.training_id in page._runs)
    card = page._runs[sae.training_id]
    assert f"Layer 2 • {ACROSS_MLP}" in [label.text() for label in card.findChildren(QLabel)]


def test_a_cold_engine_is_imported_in_the_background(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's title needs torch, whose import takes seconds: the window does not wait for it."""
    monkeypatch.setattr(presenter_module, "engine_imported", lambda: False)
    page = open_page(qtbot, trained)
    small(page, "1,000")
    page.configuration.start.click()
    assert page.job_cards() == [] and not page.configuration.start.isEnabled()
    assert page.configuration.start.text() == "Loading the engine…"
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1)
    assert page.configuration.start.text() == "Start Training" and engine_imported()
    trained.jobs.cancel(page.job_cards()[0].job.id)
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


def test_a_queued_training_can_be_cancelled_and_retried(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    import_engine()
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    page = open_page(qtbot, trained)
    small(page, "1,000")
    page.configuration.start.click()
    (card,) = page.job_cards()
    assert card.badge.text() == "Queued"
    qtbot.waitUntil(card.cancel.isVisible)
    inside = page.column_page.viewport().rect()
    qtbot.waitUntil(
        lambda: inside.contains(card.mapTo(page.column_page.viewport(), card.rect().topLeft()))
    )
    card.cancel.click()
    qtbot.waitUntil(lambda: card.job.status == "cancelled")
    assert card.retry.isVisible() and not card.cancel.isVisible()
    card.retry.click()
    qtbot.waitUntil(lambda: [c.job.status for c in page.job_cards()] == ["queued"])
    again = page.job_cards()[0].job
    assert again.id != card.job.id and again.params == card.job.params
    trained.jobs.cancel(again.id)
    for job_id in trained.jobs.running():
        trained.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


def test_a_failed_training_says_why_and_can_be_put_away(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    params = {"model_id": 1, "dataset_id": 1, "hook_points": [point_name("resid_post", 2)],
              "config": {}}  # fmt: skip
    job_id = trained_library.jobs.submit("train", "Train on tiny", "compute", params)
    error = {"title": "Too little text", "what": "It has 3 windows.", "next_step": "Add text."}
    trained_library.jobs.move(job_id, ("queued",), "failed", error=error)
    page = open_page(qtbot, trained)
    (card,) = page.job_cards()
    assert card.badge.text() == "Error" and card.retry.isVisible()
    panel = card._error.itemAt(0).widget()
    assert "Too little text" in panel.accessibleName() and "Add text." in panel.accessibleName()
    state = json.loads(json.dumps(page.save_state() | {"dismissed": [job_id]}))
    card.dismiss.click()
    assert page.job_cards() == []
    other = open_page(qtbot, trained)
    other.restore_state(state)
    assert other.job_cards() == []  # stays away at the next start


def test_cards_are_kept_while_nothing_of_theirs_changes(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    (card,) = page.run_cards()
    tile = card.tiles[1][0]
    job_id = trained_library.jobs.submit("train", "Another", "compute", {})
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1)
    assert page.run_cards() == [card] and card.tiles[1][0] is tile
    trained_library.jobs.move(job_id, ("queued",), "cancelled")
    qtbot.waitUntil(lambda: page.job_cards()[0].badge.text() == "Cancelled")


# --- what can be done with a run ------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_run_shows_what_was_measured(
    qtbot: Any, trained: Services, size: tuple[int, int]
) -> None:
    page = open_page(qtbot, trained, size)
    shot(page, f"training_form-{size[0]}x{size[1]}")
    (card,) = page.run_cards()
    card.history.set_expanded(True)
    qtbot.waitUntil(lambda: card.charts is not None)
    bar = page.column_page.verticalScrollBar()
    bar.setValue(bar.maximum())
    shot(page, f"training_done-{size[0]}x{size[1]}")
    page.configuration.advanced.set_expanded(True)
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_a_run_has_its_quality_lights(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    (card,) = page.run_cards()
    (sae,) = trained.library.saes.all()
    found = {light.name: light for light in lights(sae.metrics, sae.k, card.run.training.config)}
    shown = card.lights[sae.id]
    assert set(shown.badges) == set(found) and len(found) == 4
    for name, badge in shown.badges.items():
        assert badge.text().endswith(f"{name}: {found[name].level}")
    poor = [light for light in found.values() if light.level != "good"]
    assert poor, "a minute's training is not good"
    assert [line.text() for line in shown.lines] == [f"{p.why} {p.remedy}" for p in poor]


def test_a_failing_run_says_so_on_its_card(qtbot: Any, trained: Services) -> None:
    import_engine()
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    page = open_page(qtbot, trained)
    small(page, "100,000")
    page.configuration.start.click()
    (card,) = page.job_cards()
    site = card.job.params["hook_points"][0]
    row = {"site": site, "loss": 2.0, "fvu": 2.0, "l0": 8.0, "dead": 0, "learning_rate": 1e-3}
    card._watch([row | {"step": step} for step in range(10, 100, 10)])
    assert card.warning.isHidden()
    card._watch([row | {"step": step} for step in range(100, 400, 10)])
    assert not card.warning.isHidden() and "worse than the mean" in card.warning.text
    card._watch([row | {"step": 500 + step, "fvu": 0.3} for step in range(5)])
    assert card.warning.isHidden()
    for job_id in (card.job.id, *trained.jobs.running()):
        trained.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


@pytest.mark.parametrize(
    ("config", "encoder", "place"),
    [
        ({}, "BatchTopK SAE", "MLP input"),
        ({"sparsity": "topk", "of_a_later_version": 1}, "TopK SAE", "MLP input"),
        ({"sparsity": "jumprelu", "wiring": "skip_sae"}, "JumpReLU Skip SAE", "MLP input"),
        ({"wiring": "transcoder"}, "BatchTopK Transcoder SAE", ACROSS_MLP),
    ],
)
def test_runs_of_every_configuration_have_their_names(
    qtbot: Any,
    trained: Services,
    trained_library: Library,
    config: dict[str, Any],
    encoder: str,
    place: str,
) -> None:
    """Also of one that an older version wrote, in the cards and where SAEs are chosen."""
    trained_library.trainings.update(1, config=config)
    trained_library.saes.update(1, hook_point=point_name("mlp_in", 2))
    card = open_page(qtbot, trained).run_cards()[0]
    texts = [label.text() for label in card.findChildren(QLabel)]
    assert f"Layer 2 • {place}" in texts
    assert any(f" • {encoder} • " in text for text in texts)
    (choice,) = FeaturesPresenter(trained).choices()
    assert choice.title.startswith(f"{encoder} • tiny-llama-0.9m • intros • Started ")
    assert choice.site == f"Layer 2 • {place}"
    (source,) = steering_sources(trained_library)
    assert source.menu_text.startswith(f"{encoder} • tiny-llama-0.9m • intros • Started ")


def test_discover_queues_a_pass_for_every_sae_without_features(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    (card,) = page.run_cards()
    assert not card.discover.isVisible() and card.explore.isVisible()
    card.explore.click()
    assert trained.navigate.places == [("features", {"sae_id": 1})]
    trained_library.discard("feature_runs", 1)
    qtbot.waitUntil(card.discover.isVisible)
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    card.discover.click()
    (job,) = [job for job in trained.jobs.active() if job.kind == "discover"]
    assert job.params["sae_id"] == 1
    qtbot.waitUntil(card.discovery.isVisible)
    assert not card.discover.isEnabled()
    trained.jobs.cancel(job.id)
    trained.jobs.cancel(trained.jobs.running()[0])
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


def test_export_writes_the_saes_into_a_new_folder(
    qtbot: Any, trained: Services, trained_library: Library, answer_dialogs: Any, tmp_path: Path
) -> None:
    page = open_page(qtbot, trained)
    answer_dialogs("QFileDialog.getExistingDirectory", str(tmp_path))
    page.run_cards()[0].export.click()
    job = trained_library.jobs.all("kind = 'export'")[0]
    qtbot.waitUntil(lambda: trained_library.jobs.get(job.id).status == "finished")
    target = Path(job.params["folder"])
    assert target.parent == tmp_path
    assert (target / point_name("resid_post", 2) / "cfg.json").exists()
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


def test_delete_asks_and_takes_the_features_along(
    qtbot: Any, trained: Services, trained_library: Library, answer_dialogs: Any
) -> None:
    from PySide6.QtWidgets import QDialog

    page = open_page(qtbot, trained)
    (card,) = page.run_cards()
    folders = [trained_library.path(trained_library.trainings.get(1).folder),
               trained_library.path(trained_library.feature_runs.get(1).folder)]  # fmt: skip
    answer_dialogs("ConfirmDialog.exec", QDialog.DialogCode.Rejected)
    card.delete.click()
    assert trained_library.trainings.count() == 1
    answer_dialogs("ConfirmDialog.exec", QDialog.DialogCode.Accepted)
    card.delete.click()
    assert trained_library.trainings.count() == trained_library.feature_runs.count() == 0
    assert not any(folder.exists() for folder in folders)
    qtbot.waitUntil(lambda: page.run_cards() == [])


def test_a_run_in_use_is_not_deleted(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    trained_library.jobs.submit("discover", "Discover something", "compute", {"sae_id": 1})
    page.run_cards()[0].delete.click()
    assert trained_library.trainings.count() == 1
    assert "Discover something" in trained.toasts.toasts[-1].message
