"""Experiments on the Steering tab: planned with the form's features, run, shown with intervals."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistudio.jobs.job import run_job, submit
from mistudio.library.library import Library
from mistudio.library.steering import Experiment
from mistudio.ui.services import Services
from mistudio.ui.steering.experiments import plan as plans
from mistudio.ui.steering.experiments.plan import Plan, read_prompts, read_strengths
from mistudio.ui.steering.experiments.results import curves, lines, measures, value_text
from mistudio.ui.steering.page import SteeringPage
from mistudio.ui.steering.request import Chosen, Form
from mistudio.ui.widgets import ConfirmDialog

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
    qtbot.waitUntil(lambda: made.presenter.index is not None, timeout=30_000)
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

    def told(kind: str, chosen: list[Chosen], layers: tuple[int, ...] = (1, 2)) -> str:
        return plans.reason(Plan(kind, ("x",), (1.0,), layers), chosen)

    assert told(plans.SWEEP, [one, other]) == ""
    assert told(plans.SWEEP, []) == "Add at least one feature."
    assert "one SAE" in told(plans.BY_LAYER, [one, other])
    assert "one SAE" in told(plans.STUDY, [Chosen(1, 5, 1.0, "clamp")])
    assert "two or more layers" in told(plans.STUDY, [one], (1,))
    assert "one layer" in told(plans.BY_LAYER, [one], ())
    assert "prompt" in plans.reason(Plan(plans.SWEEP, (), (1.0,), ()), [one])
    assert "numbers" in plans.reason(Plan(plans.SWEEP, ("x",), None, ()), [one])
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
    assert batch.variants[0]["features"] == [[6, -0.5, "add"]]
    assert [v["control"] for v in batch.variants] == [False, False, True]
    assert plans.texts(Plan(plans.PROMPTS, ("x", "y"), None, (), seeds=3), form) == 18
    assert plans.texts(Plan(plans.STUDY, ("x",), None, (1, 2), seeds=1), form) == 5


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
    label, shown = curves(found, "kl_per_token")
    assert label == "Layer" and [c.name for c in shown] == ["Alone", "Without it"]
    assert [c.x for c in shown] == [[1.0, 2.0]] * 2
    assert [c.name for c in curves(found, "kl_without")[1]] == ["Without it"]


def test_single_layers_and_lists_of_prompts_are_read(trained_library: Library) -> None:
    found = ran(trained_library, Plan(plans.BY_LAYER, ("The sea",), (1.0, 2.0), (1, 2), seeds=1))
    assert [line.label for line in lines(found)][1:3] == ["× 2 at layer 1", "× 1 at layer 2"]
    assert [c.name for c in curves(found, "kl_per_token")[1]] == ["Layer 1", "Layer 2"]
    form = Form(max_tokens=3, control=True)
    found = ran(trained_library, Plan(plans.PROMPTS, ("The sea", "A"), None, (), seeds=1), form)
    assert [line.label for line in lines(found)] == ["Steered × 1", "Random control"]
    (curve,) = curves(found, "kl_per_token")[1]
    assert curve.x == [1.0, 2.0] and curve.low == [None, None]


def test_values_carry_their_interval() -> None:
    estimate = {"mean": 0.42, "low": 0.35, "high": 0.49, "n": 3}
    assert value_text("kl_per_token", estimate) == "0.42 [0.35, 0.49]"
    assert value_text("similarity", {**estimate, "low": None}) == "42.0%"
    assert value_text("similarity", None) == "—"


# --- on the screen --------------------------------------------------------------------------------


def test_a_sweep_is_run_and_shown(
    qtbot: Any, page: SteeringPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = page.experiments
    assert not view.isVisible() and page.output.isVisible()
    page.views.setCurrentIndex(1)
    assert view.isVisible() and not page.output.isVisible()
    assert view.reason.text() == "Add at least one feature." and not view.start.isEnabled()
    page.presenter.add(strongest(page), 1.0)
    assert view.reason.text() == "Enter at least one prompt."
    page.configuration.prompt.setPlainText("The history of the")  # stands in for a list
    assert view.start.isEnabled()
    page.configuration.max_tokens.setValue(6)
    view.strengths.setText("0.5, 2")
    view.seeds.setValue(2)
    assert view.reason.text() == "4 steered texts of up to 6 tokens"
    shot(page._page.widget(), "steering_experiment-1280")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    assert squeezed(page) == []
    with qtbot.waitSignal(page._services.jobs.job_finished, timeout=60_000):
        view.start.click()
        assert view.stop.isVisible()
    qtbot.waitUntil(lambda: view.shown is not None, timeout=10_000)
    assert not view.stop.isVisible()
    assert [view.model.lines[i].label for i in (0, 1)] == ["× 0.5", "× 2"]
    assert view.chart is not None and "0.5:" in view.chart.accessibleDescription()
    assert "[" in str(view.model.data(view.model.index(0, 1)))
    view.table.selectRow(1)
    first = view.shown.result["rows"][1]["texts"][0]  # type: ignore[union-attr]
    assert f"[seed 0] The history of the▸{first['text']}" in view.texts.toPlainText()
    shot(page._page.widget(), "steering_experiment-done-1280")
    assert first["text"] in view.texts.toPlainText()  # still there
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    view.export_to(tmp_path / "table.csv")
    qtbot.waitUntil(lambda: (tmp_path / "table.csv").exists(), timeout=5000)
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["strength"]) for row in rows] == [0.5, 2.0]
    assert view.chart.csv().count("\n") == 3
    assert page.save_state()["view"] == 1
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: True))
    view.delete.click()
    qtbot.waitUntil(lambda: view.shown is None and view.none.isVisible(), timeout=5000)
