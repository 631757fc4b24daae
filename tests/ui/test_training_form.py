"""The training form: what it advises and mends with one click, what it measures, what reaches the
engine, and how it looks at every size of a window."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt

from mistudio.engine.training.config import derive, option, parse
from mistudio.engine.training.footprint import Machine
from mistudio.engine.training.planning import Measured
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Model
from mistudio.ui.services import Services
from mistudio.ui.training import presenter as presenter_module
from mistudio.ui.training.estimate import Computer, Corpus, Pace, method
from mistudio.ui.training.form import (
    NAMES,
    Form,
    applies,
    check,
    mended_text,
    value_text,
)
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.training.presenter import import_engine

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot

GB = 1024**3
ROOT = Path(__file__).resolve().parents[2]
SIZES = [(1280, 720), (1920, 1080), (3440, 1440)]


def a_model(d_model: int = 64, n_layers: int = 30, context: int = 512) -> Model:
    facts = {
        "architecture": "TinyForCausalLM", "model_type": "tiny", "n_layers": n_layers,
        "d_model": d_model, "n_heads": 4, "n_kv_heads": 4, "d_mlp": 4 * d_model,
        "vocab_size": 500, "context_length": context, "tied_embeddings": True,
        "parameters": 250_000, "bytes_on_disk": 1, "dtypes": ["F32"],
    }  # fmt: skip
    return Model(1, "tiny", "local", "", "models/tiny", "fp32", n_layers, d_model, 250_000, 1,
                 facts, {}, "2026-01-01T00:00:00+00:00")  # fmt: skip


def a_form(model: Model | None = None, layers: tuple[int, ...] = (1,), **values: Any) -> Form:
    dataset = Dataset(
        1, "text", "local", "", "datasets/text", 1, 1, 1, {}, "2026-01-01T00:00:00+00:00", {}, {}
    )
    return Form(dataset, model or a_model(), layers, values=values)


def a_computer(free: float = 8 * GB, disk: float = 100 * GB) -> Computer:
    return Computer(Machine(16 * GB, int(free), int(disk)), "fp32", "")


def mended(form: Form, name: str, **known: Any) -> Form:
    """The form after the click on the mend under `name`."""
    mend = check(form, **known).mends[name]
    if mend.field == "layers":
        return dataclasses.replace(form, layers=tuple(mend.value))
    if mend.field == "source":
        return dataclasses.replace(form, source=mend.value, extraction=None)
    return dataclasses.replace(form, values={**form.values, mend.field: mended_text(mend)})


# --- mends ----------------------------------------------------------------------------------------

REFUSED = {
    "tokens": "12", "k": "0", "batch_size": "1e999", "learning_rate": "5", "context": "4,096",
    "warmup_share": "0.9", "steps": "many", "width": "7", "expansion": "1,000x", "seed": "-1",
    "gradient_accumulation": "2.5", "dead_window": "", "skip_rank": "64",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name]])
def test_a_refused_value_has_a_mend_that_is_taken(name: str) -> None:
    needed = {"wiring": "skip_sae"} if name == "skip_rank" else {}
    form = a_form(**needed, **{name: REFUSED[name]})
    found = check(form)
    assert found.errors[name] and found.blocker
    assert found.mends[name].field == name and found.mends[name].label.startswith("Use ")
    after = check(mended(form, name))
    assert after.errors == {} and after.blocker == ""


def test_mends_name_the_value_they_write() -> None:
    assert check(a_form(context="4,096")).mends["context"].label == "Use 512"  # the model's own
    assert check(a_form(k="600")).mends["k"].label == "Use 32"
    assert check(a_form(tokens="12")).mends["tokens"].label == "Use 1,000"
    assert check(a_form(learning_rate="fast")).mends["learning_rate"].label == "Use auto"
    no_8bit = dataclasses.replace(a_computer(), no_8bit="8-bit Adam needs an NVIDIA GPU.")
    found = check(a_form(optimizer="adam8bit"), computer=no_8bit)
    assert found.mends["optimizer"].label == "Use Adam"


def test_a_price_that_would_kill_latents_is_advised_against_and_taken() -> None:
    form = a_form(sparsity="standard", l1_coefficient="50", k="16")
    found = check(form)
    assert found.errors == {} and found.blocker == ""  # advice never blocks Start
    assert "L1 of 50 would leave most latents dead: use about 1" in found.advice["l1_coefficient"]
    assert found.mends["l1_coefficient"].label == "Use 1"
    assert found.config["l1_coefficient"] == 50
    assert "l1_coefficient" not in check(mended(form, "l1_coefficient")).advice
    # Nobody typed one, or nobody uses it: nothing is said.
    assert "l1_coefficient" not in check(a_form(sparsity="standard")).advice
    assert "l1_coefficient" not in check(a_form(sparsity="topk", l1_coefficient="50")).advice


def test_what_the_text_and_the_memory_say_stands_at_its_field() -> None:
    found = check(a_form(), Corpus(100_000, 10_000))
    assert "read 20 times" in found.advice["tokens"]
    form = a_form(layers=tuple(range(30)), model=a_model(1024))
    computer = a_computer(free=3 * GB)
    found = check(form, computer=computer)
    most = found.estimate.run.layers
    assert 0 < most < 30 and f"at most {most} layers fit" in found.advice["layers"]
    assert found.mends["layers"].label == f"Keep {most}"
    after = check(mended(form, "layers", computer=computer), computer=computer)
    assert "layers" not in after.advice and after.estimate.run.fits
    assert len(mended(form, "layers", computer=computer).layers) == most


def test_a_dictionary_that_does_not_fit_gets_the_largest_that_does() -> None:
    form = a_form(model=a_model(1024), expansion="256x")
    computer = a_computer(free=2 * GB)
    found = check(form, computer=computer)
    assert "do not fit into memory" in found.advice["expansion"] and found.doubt
    after = check(mended(form, "expansion", computer=computer), computer=computer)
    assert after.estimate.run.fits and after.doubt == "" and "expansion" not in after.advice
    factor = found.mends["expansion"].value
    larger = check(a_form(model=a_model(1024), expansion=f"{2 * factor:g}"), computer=computer)
    assert not larger.estimate.run.fits


def test_a_disk_that_is_too_small_is_a_doubt() -> None:
    found = check(a_form(), computer=a_computer(disk=1024**2))
    assert found.blocker == "" and "of disk and" in found.doubt


# --- on the screen --------------------------------------------------------------------------------


@pytest.fixture
def services(trained_library: Library, services_of: Any) -> Services:
    return services_of(trained_library)


def open_page(qtbot: Any, services: Services, size: tuple[int, int] = SIZES[0]) -> TrainingPage:
    page = TrainingPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    page.configuration._measure_soon.setInterval(1_000_000)  # tests say when
    return page


def fill(page: TrainingPage, **values: str) -> None:
    for name, value in values.items():
        page.configuration.fields[name].set_value(value)
    page.configuration._recheck.flush()


def click(qtbot: Any, button: Any) -> None:
    assert button.isVisible() and button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def test_one_click_mends_an_error_and_an_advice(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services, (1280, 1700))
    card = page.configuration
    fill(page, tokens="80,000", warmup_share="0.9", sparsity="gated", l1_coefficient="400")
    remark = card.fields["warmup_share"].remark
    assert card.fields["warmup_share"].error.isVisible() and not remark.text.isVisible()
    assert remark.button.text() == "Use 0.5"
    assert remark.button.accessibleName() == "Use 0.5 for Warm-up"
    click(qtbot, remark.button)
    assert card.fields["warmup_share"].value == "0.5" and not remark.isVisible()
    remark = card.fields["l1_coefficient"].remark
    assert "would leave most latents dead" in remark.text.text() and card.start.isEnabled()
    assert "would leave most" in card.fields["l1_coefficient"].editor.accessibleDescription()
    label = remark.button.text()
    click(qtbot, remark.button)
    assert card.fields["l1_coefficient"].value == label.removeprefix("Use ")
    assert not remark.isVisible()


def test_advice_on_hidden_fields_is_told_below(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, tokens="80,000", learning_rate="0.09")
    assert not card.advanced.expanded
    assert "Learning rate: This is" in card._advice.text() and card._advice_row.isVisible()
    card.advanced.set_expanded(True)
    assert "Learning rate" not in card._advice.text()


def test_too_many_layers_are_told_with_how_many_fit(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    card = page.configuration
    assert card.layers._label.text() == "Training Layers (1 of 4)"
    fill(page, expansion="64x")
    card.layers.select_all.click()
    whole = card.check.estimate.run
    computer = page.presenter.computer(None)
    free = int(0.7 * whole.memory)
    small = dataclasses.replace(computer, machine=Machine(16 * GB, free, 100 * GB))
    page.presenter.computer = lambda model: small  # type: ignore[method-assign]
    card.refresh_check()
    remark = card._layers_remark
    assert "With 4 layers" in remark.text.text() and "fit" in remark.text.text()
    click(qtbot, remark.button)
    assert f"Training Layers ({len(card.layers.selected())} of 4)" == card.layers._label.text()
    assert 0 < len(card.layers.selected()) < 4 and not remark.isVisible()


def test_what_cannot_fit_is_refused_until_someone_knows_better(
    qtbot: Any, services: Services, trained_library: Library
) -> None:
    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, tokens="1,000", k="8", context="64", batch_size="128", expansion="2")
    assert card.start.isEnabled() and not card.anyway.isVisible()
    full = dataclasses.replace(
        page.presenter.computer(None), machine=Machine(16 * GB, 8 * GB, 1024)
    )
    page.presenter.computer = lambda model: full  # type: ignore[method-assign]
    card.refresh_check()
    assert not card.start.isEnabled() and "of disk and" in card.reason.text()
    assert trained_library.jobs.all("kind = 'train' AND status != 'finished'") == []
    click(qtbot, card.anyway)
    (job,) = trained_library.jobs.all("kind = 'train' AND status != 'finished'")
    services.jobs.cancel(job.id)
    qtbot.waitUntil(lambda: services.jobs.running() == [])


# --- what it measures -----------------------------------------------------------------------------


def test_how_a_time_is_known_is_said() -> None:
    assert method(None) == ""
    pace = Pace("measured", Measured(), None, 1480.2, 0.0, at=1000.0)
    assert method(pace, now=1012.0) == "Measured 12 s ago: 1,480 tokens/s"
    assert method(dataclasses.replace(pace, basis="earlier run")).startswith("From an earlier run")
    form = a_form(tokens="2,000,000")
    pace = Pace("measured", Measured(20_000, 10_000, None, 1e6, 1e6), None, 6666.7, 0.3, 0.0)
    told = check(form, pace_of=lambda plan: pace, computer=a_computer()).estimate.time
    assert told.startswith("About 5 min") and "± 1 min" in told
    assert check(form, computer=a_computer()).estimate.time == "Time: not measured yet"


def test_a_click_measures_and_what_was_measured_is_remembered(
    qtbot: Any, services: Services, trained_library: Library
) -> None:
    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, k="8", context="64", batch_size="128", expansion="4", tokens="30,000")
    assert card.check.estimate.pace is None and card._time.text() == "Time: not measured yet"
    click(qtbot, card.measure)
    assert page.presenter.measuring and card._method.text() == "Measuring the speed…"
    assert not card.measure.isVisible()
    qtbot.waitUntil(lambda: card.check.estimate.pace is not None)
    pace = card.check.estimate.pace
    assert pace.basis == "measured" and pace.tokens_per_second > 0
    assert card._method.text().startswith("Measured ") and "tokens/s" in card._method.text()
    assert card._time.text().startswith("About ") and "±" in card._time.text()
    # What does not change the speed loses nothing; what does is not known until measured.
    fill(page, seed="7", tokens="60,000", warmup_share="0.1")
    assert card.check.estimate.pace == pace
    fill(page, expansion="2")
    assert card.check.estimate.pace != pace
    fill(page, expansion="4")
    assert card.check.estimate.pace == pace
    other = open_page(qtbot, services)  # it stays with the library, not with the page
    other.restore_state(page.save_state())
    assert other.configuration.check.estimate.pace == pace


def test_an_earlier_run_of_this_size_tells_the_time(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    fill(page, tokens="20,000", expansion="2", k="8", context="64")  # as the library's own run
    pace = page.configuration.check.estimate.pace
    assert pace is not None and pace.basis == "earlier run"
    fill(page, k="9")
    assert page.configuration.check.estimate.pace is None


def test_a_measurement_ends_where_a_training_starts(
    qtbot: Any, services: Services, trained_library: Library
) -> None:
    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, k="8", context="64", batch_size="128", expansion="4", tokens="1,000")
    click(qtbot, card.measure)
    (measuring,) = trained_library.jobs.all("kind = 'measure'")
    click(qtbot, card.start)
    assert not page.presenter.measuring
    (training,) = trained_library.jobs.all("kind = 'train' AND status = 'queued'")
    # One owner of the device: the training waits for the measurement to let go of it.
    qtbot.waitUntil(lambda: trained_library.jobs.get(training.id).status == "finished")
    assert trained_library.jobs.find(measuring.id) is None  # nothing is left of what was stopped
    qtbot.waitUntil(lambda: card.check.estimate.pace is not None)
    assert card.check.estimate.pace.basis == "earlier run"


def test_start_stays_free_while_a_measurement_waits_for_the_engine(
    qtbot: Any, services: Services, trained_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, k="8", context="64", batch_size="128", expansion="4", tokens="1,000")
    monkeypatch.setattr(presenter_module, "engine_imported", lambda: False)
    click(qtbot, card.measure)
    assert page.presenter.measuring and card.start.isEnabled()
    assert card._method.text() == "Measuring the speed…"
    click(qtbot, card.start)  # the training goes first, and nothing is measured after it
    assert not page.presenter.measuring
    qtbot.waitUntil(lambda: services.jobs.running() != [])
    qtbot.waitUntil(lambda: services.jobs.running() == [])
    assert trained_library.jobs.all("kind = 'measure'") == []


def test_nothing_is_measured_beside_other_work(qtbot: Any, services: Services) -> None:
    from .small_jobs import Count

    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, k="8", context="64", batch_size="128", expansion="4", tokens="30,000")
    job_id = services.jobs.submit(Count(to=2000))
    card.refresh_check()
    assert not card.measure.isEnabled()
    page.presenter.measure(card.form())
    card._on_idle()
    assert not page.presenter.measuring
    services.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: services.jobs.running() == [])


def test_a_pause_at_the_form_measures_what_is_cheap(
    qtbot: Any, services: Services, trained_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    asked: list[Form] = []
    monkeypatch.setattr(page.presenter, "measure", asked.append)
    card._measure_soon.setInterval(0)
    fill(page, k="8", context="64", batch_size="128", expansion="4", tokens="30,000")
    qtbot.waitUntil(lambda: len(asked) > 0)
    asked.clear()
    # Nobody waits unasked for a large model to be loaded: its time is computed.
    monkeypatch.setattr(presenter_module, "_device_speed", [])
    monkeypatch.setattr(page.presenter, "is_cheap", lambda form: False)
    card._measure_soon()
    qtbot.waitUntil(lambda: card.check.estimate.pace is not None)
    assert asked == [] and card.check.estimate.pace.basis == "computed"
    assert card._method.text() == "Computed from this device's speed"
    assert card._time.text().startswith("Roughly ") and card.measure.text() == "Measure the speed"


def test_a_form_that_changes_stops_its_measurement(
    qtbot: Any, services: Services, trained_library: Library
) -> None:
    import_engine()
    page = open_page(qtbot, services)
    card = page.configuration
    fill(page, k="8", context="64", batch_size="128", expansion="4", tokens="30,000")
    click(qtbot, card.measure)
    page.presenter.stop_measuring(unless=card.form())
    assert page.presenter.measuring  # just this form
    fill(page, expansion="8")
    page.presenter.stop_measuring(unless=card.form())
    assert not page.presenter.measuring
    qtbot.waitUntil(lambda: services.jobs.running() == [])


# --- every field reaches what is submitted --------------------------------------------------------

# Other values than the defaults, where no rule of thumb gives one.
OTHERS: dict[str, Any] = {
    "expansion": 4.0, "width": 96, "steps": 40, "batch_size": 192, "learning_rate": 2e-4,
    "l1_coefficient": 0.7, "dead_window": 5_000, "autosave_steps": 10, "context": 96,
    "skip_share": 0.4, "seed": 11,
}  # fmt: skip


def another(name: str) -> Any:
    """A value that the field takes and that is not its default."""
    limits, default = option(name), option(name)["default"]
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(default, bool):
        return not default
    if "choices" in limits:
        return next(choice for choice in limits["choices"] if choice != default)
    return type(default)(default * 2)


def needed_for(name: str) -> dict[str, Any]:
    """What must be chosen for the field to have a say."""
    found: dict[str, Any] = {}
    for other, wanted in option(name).get("only", {}).items():
        found |= {**needed_for(other), other: wanted[0]}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_the_form_reaches_the_job(name: str, qtbot: Any, services: Services) -> None:
    """Through the widget of each entry of the table: a new one is tested by being there."""
    page = open_page(qtbot, services)
    card = page.configuration
    for other, value in needed_for(name).items():
        card.fields[other].set_value(value_text(other, value))
    card.refresh_check()
    before = parse(card.check.config)
    value = another(name)
    assert value != getattr(before, name) and applies(name, dataclasses.asdict(before))
    card.fields[name].set_value(value_text(name, value))
    card._recheck.flush()
    assert card.check.errors == {} and card.check.blocker == ""
    after = parse(card.check.config)
    assert getattr(after, name) == value and type(getattr(after, name)) is type(value)
    assert dataclasses.replace(after, **{name: getattr(before, name)}) == before
    assert card.check.plan == derive(after, 128)


# --- how it looks ---------------------------------------------------------------------------------


def crowded(page: TrainingPage) -> None:
    """Everything that can stand in the form at once: all sections, errors, advice, mends."""
    card = page.configuration
    card.advanced.set_expanded(True)
    fill(page, wiring="skip_sae", sparsity="gated", l1_coefficient="4000", learning_rate="0.09",
         dead_window="1,000", optimizer="adamw", gradient_accumulation="1,000", k="2",
         warmup_share="0.9", expansion="256x")  # fmt: skip
    card.layers.select_all.click()


def advised(page: TrainingPage) -> None:
    """A model of thirty layers that do not fit, a disk that is full, a speed that is known."""
    big = dataclasses.replace(a_model(1024), id=1, name="a-model-1.5b-instruct")
    page.presenter.models = lambda: [big]  # type: ignore[method-assign]
    small = a_computer(free=3.5 * GB, disk=2 * GB)
    page.presenter.computer = lambda model: small  # type: ignore[method-assign]
    pace = Pace("measured", Measured(2_000, 1_480, None, 9_000, 1_000), None, 850, 0.2, time.time())
    page.presenter._known_pace = lambda *of: pace  # type: ignore[method-assign]
    page.configuration.refresh_choices()
    page.configuration.layers.select_all.click()
    assert page.configuration.layers._scroll.height() > 100  # four lines of eight


STATES = {"plain": lambda page: None, "crowded": crowded, "advised": advised}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("state", STATES)
def test_nothing_of_the_form_is_cut_off(
    size: tuple[int, int], state: str, qtbot: Any, services: Services
) -> None:
    page = open_page(qtbot, services, size)
    STATES[state](page)
    shot(page, f"training-form-{state}-{size[0]}x{size[1]}")
    shot(page.configuration, f"training-form-{state}-whole-{size[0]}")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    assert squeezed(page.configuration) == []


_SCALED = """
import sys
from pathlib import Path
from PySide6.QtWidgets import QApplication
app = QApplication(sys.argv)
from mistudio.ui import theme
theme.apply(app)
from PySide6.QtWidgets import QWidget
from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.services import Services
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.widgets import ToastArea
sys.path.insert(0, str(Path.cwd() / "tests"))
from ui import test_training_form as here
from ui.checks import cut_off, squeezed
from ui.screens import shot
library = Library(Path(sys.argv[1]))
window = QWidget()
changes = ChangeNotifier(library)
services = Services(library, JobManager(library, changes), changes, Background(library),
                    Settings(), ToastArea(window, seconds=0.2), lambda tab, **context: None)
page = TrainingPage(services)
page.resize(1280, 720)
page.show()
assert page.devicePixelRatio() == 2, page.devicePixelRatio()
found = []
for name, reach in here.STATES.items():
    reach(page)
    for _ in range(5):
        shot(page, f"training-form-{name}-200-percent")  # and layouts settle
    found += cut_off(page) + squeezed(page.configuration)
page.close()
services.background.wait(60)
services.jobs.shutdown(seconds=10)
print(found)
sys.exit(bool(found))
"""


def test_nothing_is_cut_off_at_200_percent(trained_library: Library) -> None:
    """The factor is read when Qt begins: a process of its own."""
    environment = {**os.environ, "QT_SCALE_FACTOR": "2", "QT_QPA_PLATFORM": "offscreen"}
    done = subprocess.run(
        [sys.executable, "-c", _SCALED, str(trained_library.root)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
