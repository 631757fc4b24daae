"""Experiments on the Steering tab: planned with the form's features, run, shown with intervals."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mistudio.jobs.experiments import write_experiment
from mistudio.jobs.job import device_turn, run_job, submit
from mistudio.jobs.kinds import Discover, ImportSae, PromptBatch, Sweep
from mistudio.library.library import Library
from mistudio.library.steering import Experiment
from mistudio.ui.services import Services
from mistudio.ui.steering.experiments import plan as plans
from mistudio.ui.steering.experiments.plan import (
    Plan,
    read_back,
    read_prompts,
    read_strengths,
)
from mistudio.ui.steering.experiments.report import RUNNING, RenameDialog, ReportCard
from mistudio.ui.steering.experiments.results import (
    curves,
    incomplete,
    lines,
    measures,
    setting,
    value_text,
    value_tip,
)
from mistudio.ui.steering.experiments.table import ResultsModel
from mistudio.ui.steering.experiments.view import ExperimentsView
from mistudio.ui.steering.page import SteeringPage
from mistudio.ui.steering.request import Chosen, Form
from mistudio.ui.steering.units import significant
from mistudio.ui.widgets import ConfirmDialog
from mistudio.ui.widgets.containers import settle_layouts

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot

FORM = Form(max_tokens=3, seed=3)


@pytest.fixture
def page(
    qtbot: Any, services_of: Callable[[Library], Services], trained_library: Library
) -> SteeringPage:
    made = SteeringPage(services_of(trained_library))
    qtbot.addWidget(made)
    made.resize(1280, 720)
    made.show()
    made.activate()
    qtbot.waitUntil(lambda: made.presenter.index is not None)
    return made


def strongest(page: SteeringPage) -> int:
    assert page.presenter.index is not None
    values = page.presenter.index.max_activations
    return values.index(max(values))


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5, 1 2;3", (0.5, 1.0, 2.0, 3.0)),
        ("-1, 1, 1.0", (-1.0, 1.0)),
        ("", None),
        ("one", None),
        ("nan", None),
        ("1000", None),
        (" ".join(map(str, range(17))), None),
    ],
)
def test_strengths_are_read_as_they_are_typed(text: str, expected: Any) -> None:
    assert read_strengths(text) == expected


def test_what_stands_in_the_way_is_said() -> None:
    one, other = Chosen(1, 5, 1.0), Chosen(2, 6, 1.0)

    def told(
        kind: str, chosen: list[Chosen], layers: tuple[int, ...] = (1, 2), form: Form = FORM
    ) -> str:
        return plans.reason(Plan(kind, ("x",), (1.0,), layers), form, chosen)

    assert told(plans.SWEEP, [one, other]) == ""
    assert told(plans.SWEEP, []) == "Add at least one feature."
    assert "one SAE" in told(plans.BY_LAYER, [one, other])
    assert "one SAE" in told(plans.STUDY, [Chosen(1, 5, 1.0, "clamp")])
    assert "two or more layers" in told(plans.STUDY, [one], (1,))
    assert "one layer" in told(plans.BY_LAYER, [one], ())
    # Features of several SAEs are studied where these act.
    clamped = Chosen(2, 6, 1.0, "clamp")
    assert told(plans.STUDY, [one, clamped], (1, 2)) == ""
    assert "SAEs of two or more layers" in told(plans.STUDY, [one, clamped], (1,))
    study = Plan(plans.STUDY, ("x",), None, (1, 2))
    job = plans.to_job(study, FORM, [one, clamped], 1)
    assert (job.layers, job.others) == ((), ([2, 6, 1.0, "clamp"],))
    assert read_back(kept(job)) is not None
    assert "prompt" in plans.reason(Plan(plans.SWEEP, (), (1.0,), ()), FORM, [one])
    assert "numbers" in plans.reason(Plan(plans.SWEEP, ("x",), None, ()), FORM, [one])
    assert "one SAE" in told(plans.SWEEP, [one, other], form=Form(layers=(1, 2)))
    assert "intervention layer" in told(plans.PROMPTS, [one], form=Form(layers=()))
    assert "tokens to steer" in told(plans.SWEEP, [one], form=Form(scope="chosen"))
    two = Plan(plans.SWEEP, ("x", "y"), (1.0,), ())
    assert "one prompt" in plans.reason(two, Form(scope="chosen", positions=(1,)), [one])
    assert read_prompts(" a \n\n b\n") == ("a", "b")


def test_jobs_carry_the_form_and_the_features() -> None:
    chosen = [Chosen(1, 5, 2.0, "clamp"), Chosen(2, 6, -1.0)]
    form = Form(top_k=7, seed=4, scales=(0.5, 1.0), control=True, layers=None, keep_norm=True)
    sweep = plans.to_job(Plan(plans.SWEEP, ("x",), (1.0, 2.0), (0,), seeds=2), form, chosen, 1)
    assert (sweep.features, sweep.others) == ([[5, 2.0, "clamp"]], ([2, 6, -1.0, "add"],))
    assert (sweep.seeds, sweep.top_k, sweep.layers, sweep.keep_norm) == ((4, 5), 7, (), True)
    batch = plans.to_job(Plan(plans.PROMPTS, ("x", "y"), None, ()), form, chosen, 2)
    assert [v["name"] for v in batch.variants] == [
        "Steered × 0.5", "Steered × 1", "Random control",
    ]  # fmt: skip
    assert batch.variants[0]["features"] == [[6, -1.0, "add"]]
    assert [v["scale"] for v in batch.variants] == [0.5, 1.0, 1.0]
    assert [v["control"] for v in batch.variants] == [False, False, True]
    assert plans.texts(Plan(plans.PROMPTS, ("x", "y"), None, (), seeds=3), form) == 18
    assert plans.texts(Plan(plans.STUDY, ("x",), None, (1, 2), seeds=1), form) == 5


def kept(job: Any, result: dict[str, Any] | None = None) -> Experiment:
    """As it is read from the library."""
    request = json.loads(json.dumps(asdict(job)))
    return Experiment(7, "Name", job.kind, request, result or {}, "2026-01-01T00:00:00Z")


@pytest.mark.parametrize("kind", [plans.SWEEP, plans.BY_LAYER, plans.PROMPTS, plans.STUDY])
def test_a_kept_experiment_gives_its_settings_back(kind: str) -> None:
    layers = (1, 3) if kind in (plans.BY_LAYER, plans.STUDY) else ()
    strengths = (0.3, 2.0) if kind in (plans.SWEEP, plans.BY_LAYER) else None
    plan = Plan(kind, ("x", "y"), strengths, layers, seeds=4)
    form = Form(
        prompt="x", top_k=5, seed=9, scope="last", max_tokens=7, keep_norm=True, chat=True,
        layers=(2, 3) if kind in (plans.SWEEP, plans.PROMPTS) else None,
        control=kind != plans.STUDY, scales=(0.3, 0.7) if kind == plans.PROMPTS else (1.0,),
    )  # fmt: skip
    chosen = [Chosen(2, 5, 2.1), Chosen(2, 6, -1.0)]
    assert read_back(kept(plans.to_job(plan, form, chosen, 2))) == (plan, form, chosen)


def test_what_the_screen_cannot_ask_for_is_not_read_back() -> None:
    def readable(job: Any) -> bool:
        return read_back(kept(job)) is not None

    assert readable(Sweep(1, [[3, 2.0, "add"]], (1.0,), prompts=("x",), seeds=(4, 5)))
    assert not readable(Sweep(1, [[3, 2.0, "add"]], (1.0,), prompts=("x",), seeds=(4, 9)))
    assert not readable(Sweep(1, [[3, 9.0, "add"]], (1.0,), prompts=("x",)))  # out of the slider
    assert not readable(Sweep(1, [[3, 2.0, "add"]], (1.0,), prompts=("x", "two\nlines")))
    variants = [{"features": [[3, n, "add"]], "name": f"{n}"} for n in (1.0, 2.0)]
    assert not readable(PromptBatch(1, variants, prompts=("x",)))


# --- results --------------------------------------------------------------------------------------


def ran(library: Library, plan: Plan, form: Form = FORM) -> Experiment:
    job = plans.to_job(plan, form, [Chosen(1, 5, 2.0)], 1)
    record = run_job(library, job, submit(library, job))
    assert record.status == "finished", record.error
    return library.experiments.get(record.result["experiment_id"])


def test_a_study_of_layers_is_read(trained_library: Library) -> None:
    found = ran(trained_library, Plan(plans.STUDY, ("The sea",), None, (1, 2), seeds=1))
    assert [line.label for line in lines(found)] == [
        "All layers", "Layer 1 alone", "Without layer 1", "Layer 2 alone", "Without layer 2",
    ]  # fmt: skip
    assert "kl_without" in measures(found)
    label, shown, names = curves(found, "kl_per_token")
    assert (
        label == "Layer"
        and names == ["L1", "L2"]
        and [c.name for c in shown] == ["Alone", "Without it"]
    )
    assert [c.x for c in shown] == [[0.0, 1.0]] * 2
    assert [c.name for c in curves(found, "kl_without")[1]] == ["Without it"]


def test_single_layers_and_lists_of_prompts_are_read(trained_library: Library) -> None:
    found = ran(trained_library, Plan(plans.BY_LAYER, ("The sea",), (1.0, 2.0), (1, 2), seeds=1))
    assert [line.label for line in lines(found)][1:3] == ["× 2 at layer 1", "× 1 at layer 2"]
    assert [c.name for c in curves(found, "kl_per_token")[1]] == ["Layer 1", "Layer 2"]
    # Of more layers than strengths, layers run along the bottom.
    found = ran(trained_library, Plan(plans.BY_LAYER, ("The sea",), (2.0,), (1, 2), seeds=1))
    _, (curve,), names = curves(found, "kl_per_token")
    assert (curve.name, curve.x, names) == ("× 2", [0.0, 1.0], ["L1", "L2"])
    form = Form(max_tokens=3, control=True)
    found = ran(trained_library, Plan(plans.PROMPTS, ("The sea", "A"), None, (), seeds=1), form)
    assert [line.label for line in lines(found)] == ["Steered × 1", "Random control"]
    _, (curve,), names = curves(found, "kl_per_token")
    assert curve.x == [0.0, 1.0] and curve.low == [None, None] and not curve.joined
    assert names == ["Steered × 1", "Random control"]


def test_a_control_has_its_own_lines_and_curve(trained_library: Library) -> None:
    form = Form(max_tokens=3, control=True, layers=(1, 2))
    found = ran(trained_library, Plan(plans.SWEEP, ("The sea",), (2.0, 1.0), (), seeds=1), form)
    labels = [line.label for line in lines(found)]
    assert labels == ["× 2", "× 1", "× 2 random", "× 1 random"]
    assert "at layers 1, 2" in setting(found) and "2 layers together" in found.name
    _, shown, _ = curves(found, "kl_per_token")
    assert [(c.name, c.x) for c in shown] == [("Features", [1.0, 2.0]), ("Random", [1.0, 2.0])]
    assert shown[0].mean != shown[1].mean


@pytest.mark.parametrize("kind", [plans.SWEEP, plans.PROMPTS, plans.STUDY])
def test_the_exported_table_is_the_one_on_the_screen(
    trained_library: Library, tmp_path: Path, kind: str
) -> None:
    found = ran(trained_library, Plan(kind, ("The sea", "A"), (1.0, 2.0), (1, 2), seeds=2))
    write_experiment(found, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    model = ResultsModel()
    model.show_experiment(found)
    assert len(written) == model.rowCount()
    for place, row in enumerate(written):
        shown = [model.data(model.index(place, c)) for c in range(1, model.columnCount())]
        percent = row["percent_of_norm"]
        assert shown[0] == (f"{significant(float(percent))} %" if percent else "—")
        for measure, text in zip(model.measures, shown[1:], strict=True):
            parts = {"mean": row[measure], **{k: row[f"{measure}_{k}"] for k in ("low", "high")}}
            value = {k: float(v) if v else None for k, v in parts.items()}
            assert text == value_text(measure, value)
    write_experiment(found, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text("utf-8"))["result"] == found.result


def test_values_carry_their_interval() -> None:
    estimate = {"mean": 0.42, "low": 0.35, "high": 0.49, "n": 3, "texts": 6}
    assert value_text("kl_per_token", estimate) == "0.420 [0.350, 0.490]"
    assert value_text("similarity", {**estimate, "low": None}) == "42.0%"
    assert value_text("similarity", None) == "—"
    tip = value_tip("kl_per_token", estimate, 2)
    assert "nats per token" in tip and "Student’s t over seeds" in tip and "0.350 to 0.490" in tip
    assert "Mean over 3 seeds of the mean over 2 prompts (6 texts)" in tip
    assert "over prompts (6 texts)" in value_tip("kl_per_token", estimate, 3)  # some are unknown
    one = {**estimate, "low": None, "high": None, "n": 1, "texts": 2}
    assert "No interval: that takes two seeds" in value_tip("perplexity_ratio", one, 2)
    assert "Geometric mean over 1 seed" in value_tip("perplexity_ratio", one, 2)
    assert "every seed gave the same" in value_tip("similarity", {**estimate, "low": 0.49}, 2)
    assert "not known" in value_tip("similarity", None, 2)


@pytest.mark.parametrize(
    ("done", "texts", "words"),
    [
        (6, 6, ""),
        (4, 4, "4 of 6 continuations (prompts × seeds) of every row; 2 of 3 seeds went"),
        (1, 1, "no seed has gone through all prompts"),
        (0, 1, "1 of 1 row went through the first continuation"),
    ],
)
def test_what_a_stopped_experiment_lacks_is_said(done: int, texts: int, words: str) -> None:
    row = {"strength": 1.0, "layer": None, "summary": {}, "texts": [{}] * texts}
    job = Sweep(1, [[3, 2.0]], (1.0,), prompts=("x", "y"), seeds=(0, 1, 2))
    told = incomplete(kept(job, {"continued": done, "rows": [row]}))
    assert words in told and bool(told) == bool(words)


# --- on the screen --------------------------------------------------------------------------------


def test_features_of_several_saes_are_studied_where_these_act(
    qtbot: Any, services_of: Callable[[Library], Services], trained_library: Library, tmp_path: Path
) -> None:
    """The same dictionary, said to be of the next layer, stands in for that of another layer."""
    first = trained_library.saes.get(1)
    shutil.copytree(trained_library.path(first.folder), tmp_path / "next")
    for file in (tmp_path / "next").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        moved = text.replace(f"blocks.{first.layer}.", f"blocks.{first.layer + 1}.")
        file.write_text(moved, encoding="utf-8")
    job: Any = ImportSae(str(tmp_path / "next"), 1)
    (other,) = run_job(trained_library, job, submit(trained_library, job)).result["sae_ids"]
    job = Discover(other, 1000, dataset_id=1)
    assert run_job(trained_library, job, submit(trained_library, job)).status == "finished"
    made = SteeringPage(services_of(trained_library))
    qtbot.addWidget(made)
    made.presenter.set_selected([Chosen(1, 5, 1.0), Chosen(other, 6, 1.0, "clamp")])
    made.configuration.prompt.setPlainText("The sea")
    planner = made.experiments.planner
    planner.kind.set_value(plans.STUDY)
    assert planner.plan().layers == (first.layer, first.layer + 1)
    assert planner.layers.isHidden() and planner.reason.text().startswith("15 steered texts")
    made.presenter.remove(other, 6)
    assert not planner.layers.isHidden()


def plan_sweep(page: SteeringPage, seeds: int, tokens: int) -> ExperimentsView:
    view = page.experiments
    page.views.setCurrentIndex(1)
    page.presenter.add(strongest(page), 1.0)
    page.configuration.prompt.setPlainText("The history of the")  # stands in for a list
    page.configuration.max_tokens.setValue(tokens)
    view.planner.strengths.setText("0.5, 2")
    view.planner.seeds.setValue(seeds)
    return view


def test_a_sweep_is_run_and_shown(
    qtbot: Any, page: SteeringPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = page.experiments
    planner, report = view.planner, view.report
    assert not view.isVisible() and page.output.isVisible()
    page.views.setCurrentIndex(1)
    assert view.isVisible() and not page.output.isVisible() and report.empty.isVisible()
    assert planner.reason.text() == "Add at least one feature." and not planner.start.isEnabled()
    page.presenter.add(strongest(page), 1.0)
    assert planner.reason.text() == "Enter at least one prompt."
    plan_sweep(page, 2, 6)
    assert planner.start.isEnabled()
    assert planner.reason.text() == "4 steered texts of up to 6 tokens"
    shot(page._page.widget(), "steering_experiment-1280")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    assert squeezed(page) == []
    with qtbot.waitSignal(page._services.jobs.job_finished):
        planner.start.click()
        assert report.stop.isVisible() and not report.repeat.isVisible()
    qtbot.waitUntil(lambda: view.shown is not None and view.shown.id != RUNNING)
    assert not report.stop.isVisible() and not report.incomplete.isVisible()
    assert [report.model.lines[i].label for i in (0, 1)] == ["× 0.5", "× 2"]
    qtbot.waitUntil(lambda: report.chart is not None)
    assert "0.5:" in report.chart.accessibleDescription()  # type: ignore[union-attr]
    assert "[" in str(report.model.data(report.model.index(0, 2)))
    report.table.selectRow(1)
    first = view.shown.result["rows"][1]["texts"][0]  # type: ignore[union-attr]
    plain = view.shown.result["unsteered"][0]["text"]  # type: ignore[union-attr]
    told = f"The history of the   (seed 0)\nUnsteered ▸{plain}\nSteered ▸{first['text']}"
    assert report.texts.toPlainText().startswith(told)
    shot(page._page.widget(), "steering_experiment-done-1280")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    view.export_to(tmp_path / "table.csv")
    qtbot.waitUntil(lambda: (tmp_path / "table.csv").exists())
    assert report.chart.csv().count("\n") == 3  # type: ignore[union-attr]
    # Settings come back, also after a restart; the plot stays at its measure.
    report.show_measure("similarity")
    saved = json.loads(json.dumps(page.save_state()))
    page.presenter.set_selected([])
    planner.strengths.setText("9")
    planner.seeds.setValue(7)
    page.configuration.max_tokens.setValue(50)
    report.settings.click()
    assert planner.reason.text() == "4 steered texts of up to 6 tokens"
    assert [c.strength for c in page.presenter.selected] == [1.0]
    other = SteeringPage(page._services)
    qtbot.addWidget(other)
    other.restore_state(saved)
    assert saved["view"] == 1
    assert other.experiments.planner.plan() == planner.plan()
    qtbot.waitUntil(lambda: other.experiments.report.measure == "similarity")
    # It is renamed, repeated and deleted.
    monkeypatch.setattr(RenameDialog, "exec", type_and_take("Far enough"))
    report.rename.click()
    qtbot.waitUntil(lambda: view.shown is not None and view.shown.name == "Far enough")
    whole = view.shown.result  # type: ignore[union-attr]
    with qtbot.waitSignal(page._services.jobs.job_finished):
        report.repeat.click()
    qtbot.waitUntil(lambda: view.shown is not None and view.shown.id == 2)
    assert view.shown.result == whole and report.which.count() == 2  # type: ignore[union-attr]
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: True))
    report.delete.click()
    qtbot.waitUntil(lambda: view.shown is not None and view.shown.id == 1)
    report.delete.click()
    qtbot.waitUntil(lambda: view.shown is None and report.empty.isVisible())


def test_nothing_moves_when_what_draws_has_been_imported(qtbot: Any, page: SteeringPage) -> None:
    view = plan_sweep(page, 1, 4)
    with qtbot.waitSignal(page._services.jobs.job_finished):
        view.planner.start.click()
    qtbot.waitUntil(lambda: view.shown is not None and view.shown.id != RUNNING)
    card = ReportCard()
    qtbot.addWidget(card)
    card.resize(1000, 900)
    card.show_measure("similarity")
    with qtbot.waitSignal(card.chart_wanted):
        card.show_experiment(view.shown)
    card.show()
    settle_layouts()
    before = card.table.y()
    card.make_chart()
    qtbot.waitUntil(lambda: card.chart is not None and card.chart.isVisible())
    settle_layouts()
    assert card.measure == "similarity"
    assert abs(card.table.y() - before) <= 1


def type_and_take(name: str) -> Callable[[RenameDialog], None]:
    def run(dialog: RenameDialog) -> None:
        dialog.name.setText(name)
        dialog.rename.click()

    return run


def test_a_table_fills_while_it_runs_and_a_stopped_one_is_kept(
    qtbot: Any, page: SteeringPage
) -> None:
    view = plan_sweep(page, 20, 100)  # far longer than this test looks at it
    view.planner.prompts.setPlainText("\n".join(["The history of the", "The sea"] * 5))
    view.planner.start.click()
    report = view.report
    qtbot.waitUntil(lambda: view.shown is not None)
    assert view.shown is not None and view.shown.id == RUNNING
    assert "of 200 continuations" in report.incomplete.text() and report.progress.isVisible()
    report.table.selectRow(1)
    qtbot.waitUntil(lambda: view.shown.result["continued"] > 2)  # type: ignore[union-attr]
    assert report.table.selectionModel().selectedRows()[0].row() == 1  # stays chosen
    assert report.texts.toPlainText().count("Steered ▸") >= 3
    shot(page._page.widget(), "steering_experiment-live-1280")  # also gives texts their room
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    with qtbot.waitSignal(page._services.jobs.job_finished) as ended:
        report.stop.click()
    assert ended.args[1] == "cancelled"
    qtbot.waitUntil(lambda: view.shown is not None and view.shown.id != RUNNING)
    assert view.shown.name.endswith("(stopped)") and 2 < view.shown.result["continued"] < 200
    assert report.incomplete.text().startswith("⚠ Stopped: ") and report.repeat.isVisible()
    assert report.note.text() == ""
    # Stopped before there is anything, nothing is kept: so it says.
    with device_turn:
        page.presenter.generate(page.form())
        report.repeat.click()
        assert "Waits for “Steer with" in report.note.text()
        report.stop.click()
        with qtbot.waitSignal(page._services.jobs.job_finished):
            page.presenter.stop()
    assert "nothing was kept" in report.note.text() and report.which.count() == 1
