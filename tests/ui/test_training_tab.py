"""The Training tab: a form made from the engine's table, and trainings that really run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QWidget

from mistudio import formatting
from mistudio.engine.training.config import TrainingConfig, derive, option, parse
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Extraction, Model
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.services import Services
from mistudio.ui.training import presenter as presenter_module
from mistudio.ui.training.charts import CHARTS
from mistudio.ui.training.form import (
    ADVANCED,
    ENCODERS,
    ESSENTIAL,
    LATER,
    NAMES,
    SITES,
    Form,
    check,
    default_text,
    memory,
    point_name,
    point_parts,
    rough,
    sae_parameters,
)
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.training.presenter import TRAINING_KINDS, engine_imported, import_engine
from mistudio.ui.widgets import ToastArea

from .checks import cut_off, nameless, too_small
from .screens import shot
from .small_jobs import Count

SIZES = [(1280, 720), (1920, 1080)]
LONG = 120_000  # ms: this machine may be busy


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
    import torch

    torch.set_num_threads(2)
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
    facts = {"context_length": 512, **summary}
    return Model(1, "tiny", "local", "", "models/tiny", "fp32", 4, d_model, 10_000, 1, facts, {},
                 "2026-01-01T00:00:00+00:00")  # fmt: skip


def a_dataset() -> Dataset:
    return Dataset(
        1, "text", "local", "", "datasets/text", 1, 1, 1, {}, "2026-01-01T00:00:00+00:00"
    )


def a_form(**changes: Any) -> Form:
    values: dict[str, Any] = {"dataset": a_dataset(), "model": a_model(), "layers": (1,)}
    return Form(**(values | changes))


def an_extraction(points: list[str], context: int = 64) -> Extraction:
    return Extraction(1, 1, 1, points, {"context": context}, "activations/x", 1000, 1000, {},
                      "2026-01-01T00:00:00+00:00")  # fmt: skip


# --- the form: what is wrong, what is derived -----------------------------------------------------


def test_kinds_and_names_are_those_of_the_engine() -> None:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.jobs.kinds import KINDS

    assert set(TRAINING_KINDS) <= set(KINDS)
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
        ("batch_size", "1e999", "It takes a number."),
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
    assert "do not hold Layer 1" in found.errors["extraction"]


def test_stored_activations_bring_their_context_length() -> None:
    stored = an_extraction([point_name("resid_post", 1)], context=64)
    found = check(a_form(extraction=stored, values={"context": "256"}))
    assert found.config["context"] == 64 and found.blocker == ""


def test_estimates_are_plain_arithmetic() -> None:
    model, plan = a_model(), derive(TrainingConfig(), 64)
    parameters = 2 * 64 * 512 + 512 + 64
    assert sae_parameters(64, 512) == parameters
    batch = 4 * 2048 * (512 + 4 * 64)
    assert memory(model, plan, 2) == 4 * 10_000 + 16 * parameters * 2 + batch
    summary = check(a_form(), corpus_tokens=1_000_000, speed=10_000).summary
    assert "512 latents on 64 dimensions" in summary and "976 steps" in summary
    assert "2.0 passes over the text" in summary and "about 3 min 20 s" in summary
    assert formatting.size(rough(4 * parameters)) + " on disk" in summary


def test_form_shows_every_field_of_the_table(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    fields = page.configuration.fields
    assert list(fields) == list(NAMES) == [*ESSENTIAL, *ADVANCED]
    for name, entry in fields.items():
        assert entry.editor.accessibleName() == option(name)["label"]
        assert option(name)["help"] in entry.editor.toolTip()


def test_fields_left_open_show_what_they_become(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    fill(page, tokens="20,000", expansion="2")
    plan = derive(parse({"tokens": 20_000, "expansion": 2.0}), 128)
    fields = page.configuration.fields
    assert fields["learning_rate"].editor.placeholderText() == "auto: 3e-3"
    assert plan.learning_rate == 3e-3
    shown = fields["batch_size"].editor.placeholderText()
    assert shown == f"auto: {formatting.count(plan.batch_size)}"
    shown = fields["dead_window"].editor.placeholderText()
    assert shown == f"auto: {formatting.count(plan.dead_window)}"
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


def test_encoders_of_a_later_version_say_so(qtbot: Any, trained: Services) -> None:
    model = open_page(qtbot, trained).configuration.encoder.model()
    states = [(model.item(i).isEnabled(), model.item(i).toolTip()) for i in range(len(ENCODERS))]
    assert states[0][0] and all(state == (False, LATER) for state in states[1:])


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
    fill(page, tokens="44,000", learning_rate="1e-3", expansion="6")
    page.configuration.fields["auxk"].set_value(False)
    page.configuration.layers.set_selected([0, 3])
    page.configuration.site.set_value("mlp_out")
    state = json.loads(json.dumps(page.save_state()))
    other = open_page(qtbot, trained)
    other.restore_state(state)
    assert other.configuration.form() == page.configuration.form()
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
    assert card.source.count() == 2
    card.source.setCurrentIndex(1)
    assert card.form().points == [point_name("mlp_out", 1)]
    assert card.check.config["context"] == 32 and card.check.blocker == ""
    assert not card.fields["context"].editor.isEnabled()


# --- training -------------------------------------------------------------------------------------


def small(page: TrainingPage, tokens: str, layers: tuple[int, ...] = (2,)) -> None:
    fill(page, tokens=tokens, expansion="2", k="8", context="64", batch_size="128")
    page.configuration.layers.set_selected(layers)
    assert page.configuration.check.blocker == ""


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

    qtbot.waitUntil(lambda: card.charts is not None and card.charts.n_rows >= 8, timeout=LONG)
    assert card._title.text() == "tiny-llama-0.9m + intros" and card.badge.text() == "Training"
    assert card.tiles["loss"].value != "—" and card.tiles["tokens_per_second"].value != "—"
    first_charts = card.charts

    qtbot.mouseClick(card.pause, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: card.job.status == "paused", timeout=LONG)
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
    qtbot.waitUntil(lambda: len(trained.jobs.metrics(job_id)) > rows + 4, timeout=LONG)

    # the whole history, in one curve for each site, in the very same charts
    qtbot.waitUntil(lambda: card.charts.n_rows == len(trained.jobs.metrics(job_id)), timeout=LONG)
    assert card.charts is first_charts
    shown = card.charts.n_rows
    metrics = trained.jobs.metrics(job_id)[:shown]
    for name in record.params["hook_points"]:
        for key, _, _ in CHARTS:
            expected = [(row["step"], row[key]) for row in metrics if row["site"] == name]
            assert card.charts.charts[key].points(name)[: len(expected)] == expected
    assert "Step       1  L1  loss" in card.charts.log.toPlainText()

    qtbot.waitUntil(card.stop.isEnabled, timeout=LONG)
    qtbot.mouseClick(card.stop, Qt.MouseButton.LeftButton)
    assert card.badge.text() == "Finishing…"
    qtbot.waitUntil(lambda: trained_library.jobs.get(job_id).status == "finished", timeout=LONG)
    qtbot.waitUntil(lambda: page.job_cards() == [], timeout=LONG)
    run = trained_library.trainings.all()[0]
    assert run.status == "stopped" and run.job_id == job_id
    done = page._runs[run.id]
    assert done.badge.text() == "Stopped" and len(done.tiles) == 2
    for sae in trained_library.saes.of_training(run.id):
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
    qtbot.waitUntil(lambda: done.charts is not None, timeout=LONG)
    file = trained_library.path(run.folder) / "metrics.jsonl"
    rows_on_disk = [json.loads(line) for line in file.read_text().splitlines()]
    assert done.charts.n_rows == len(rows_on_disk) == len(trained.jobs.metrics(job_id))


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
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1, timeout=LONG)
    assert page.configuration.start.text() == "Start Training" and engine_imported()
    trained.jobs.cancel(page.job_cards()[0].job.id)
    qtbot.waitUntil(lambda: trained.jobs.running() == [], timeout=LONG)


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
    qtbot.waitUntil(card.cancel.isVisible, timeout=5000)
    inside = page.column_page.viewport().rect()
    qtbot.waitUntil(
        lambda: inside.contains(card.mapTo(page.column_page.viewport(), card.rect().topLeft()))
    )
    card.cancel.click()
    qtbot.waitUntil(lambda: card.job.status == "cancelled", timeout=5000)
    assert card.retry.isVisible() and not card.cancel.isVisible()
    card.retry.click()
    qtbot.waitUntil(lambda: [c.job.status for c in page.job_cards()] == ["queued"], timeout=5000)
    again = page.job_cards()[0].job
    assert again.id != card.job.id and again.params == card.job.params
    trained.jobs.cancel(again.id)
    for job_id in trained.jobs.running():
        trained.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: trained.jobs.running() == [], timeout=5000)


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
    assert card.badge.text() == "Failed" and card.retry.isVisible()
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
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1, timeout=5000)
    assert page.run_cards() == [card] and card.tiles[1][0] is tile
    trained_library.jobs.move(job_id, ("queued",), "cancelled")
    qtbot.waitUntil(lambda: page.job_cards()[0].badge.text() == "Cancelled", timeout=5000)


# --- what can be done with a run ------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_run_shows_what_was_measured(
    qtbot: Any, trained: Services, size: tuple[int, int]
) -> None:
    page = open_page(qtbot, trained, size)
    shot(page, f"training_form-{size[0]}x{size[1]}")
    (card,) = page.run_cards()
    card.history.set_expanded(True)
    qtbot.waitUntil(lambda: card.charts is not None, timeout=LONG)
    bar = page.column_page.verticalScrollBar()
    bar.setValue(bar.maximum())
    shot(page, f"training_done-{size[0]}x{size[1]}")
    page.configuration.advanced.set_expanded(True)
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_discover_queues_a_pass_for_every_sae_without_features(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    (card,) = page.run_cards()
    assert not card.discover.isVisible() and card.explore.isVisible()
    card.explore.click()
    assert trained.navigate.places == [("features", {"sae_id": 1})]
    trained_library.discard("feature_runs", 1)
    qtbot.waitUntil(card.discover.isVisible, timeout=5000)
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    card.discover.click()
    (job,) = [job for job in trained.jobs.active() if job.kind == "discover"]
    assert job.params["sae_id"] == 1
    qtbot.waitUntil(card.discovery.isVisible, timeout=5000)
    assert not card.discover.isEnabled()
    trained.jobs.cancel(job.id)
    trained.jobs.cancel(trained.jobs.running()[0])
    qtbot.waitUntil(lambda: trained.jobs.running() == [], timeout=5000)


def test_export_writes_the_saes_into_a_new_folder(
    qtbot: Any, trained: Services, trained_library: Library, answer_dialogs: Any, tmp_path: Path
) -> None:
    page = open_page(qtbot, trained)
    answer_dialogs("QFileDialog.getExistingDirectory", str(tmp_path))
    page.run_cards()[0].export.click()
    job = trained_library.jobs.all("kind = 'export'")[0]
    qtbot.waitUntil(lambda: trained_library.jobs.get(job.id).status == "finished", timeout=LONG)
    target = Path(job.params["folder"])
    assert target.parent == tmp_path
    assert (target / point_name("resid_post", 2) / "cfg.json").exists()
    qtbot.waitUntil(lambda: trained.jobs.running() == [], timeout=5000)


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
    qtbot.waitUntil(lambda: page.run_cards() == [], timeout=5000)


def test_a_run_in_use_is_not_deleted(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    trained_library.jobs.submit("discover", "Discover something", "compute", {"sae_id": 1})
    page.run_cards()[0].delete.click()
    assert trained_library.trainings.count() == 1
    assert "Discover something" in trained.toasts.toasts[-1].message
