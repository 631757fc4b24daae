"""The run card: what it says at each status, all layers at a glance, one in detail, its log."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication

from mistudio import formatting
from mistudio.engine.training.verdict import Light, lights
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.training import usage
from mistudio.ui.training.cards import JobCard
from mistudio.ui.training.density import DensityChart, sample_text, together
from mistudio.ui.training.form import point_name
from mistudio.ui.training.history import Throughput, colours, history, log_line
from mistudio.ui.training.layers import verdict
from mistudio.ui.training.page import TrainingPage
from mistudio.ui.training.presenter import TrainingPresenter

from .checks import cut_off, nameless, too_small
from .screens import shot

SIZES = [(1280, 720), (1920, 1080), (3440, 1440)]
EDGES = [step / 4 for step in range(-24, 1)]


def a_row(site: str, step: int, **values: Any) -> dict[str, Any]:
    """What the engine records of a step: batches of 2,048 tokens at 1,000 tokens a second."""
    tokens = 2048 * (step + 1)
    return {
        "site": site, "step": step, "tokens": tokens, "time": 1_700_000_000.0 + tokens / 1000,
        "loss": 0.2 + 1 / (step + 2), "fvu": 0.2 + 1 / (step + 2), "l0": 40.0 - step % 9,
        "dead": step % 5, "learning_rate": 1e-3, "coefficient": 0.0, "tokens_per_second": 1000.0,
        **values,
    }  # fmt: skip


def judged(site: str, step: int, fvu: float = 0.2, never: int = 3) -> dict[str, Any]:
    counts = [0] * 24
    counts[10], counts[14] = 20, 105
    density = {"log10_edges": EDGES, "counts": counts, "never_fired": never, "tokens": 61_440}
    return a_row(site, step, heldout_fvu=fvu, heldout_l0=8.1, heldout_dead_share=0.002,
                 heldout_tokens=4096, density=density)  # fmt: skip


@dataclass(frozen=True)
class Records:
    """Does what a training does as far as a window can see: phases, rows, notes, an end."""

    model_id: int
    dataset_id: int
    hook_points: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 40
    fails: bool = False

    kind: ClassVar[str] = "train"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("train", 100),
                                           Phase("evaluate", 25))  # fmt: skip
    begin: ClassVar[threading.Event] = threading.Event()
    evaluate: ClassVar[threading.Event] = threading.Event()

    def title(self, library: Library) -> str:
        return "Train"

    def run(self, context: JobContext) -> dict[str, Any]:
        self._wait(context, self.begin)
        for step in range(self.steps):
            for site in self.hook_points:
                context.record(judged(site, step) if step % 10 == 9 else a_row(site, step))
            context.report(step, self.steps, "train", detail="train")
        context.tell("Step 40: the disk was nearly full.")
        self._wait(context, self.evaluate, keep=True)
        if self.fails:
            raise InvalidInput("Too little text", "It has 3 windows.", "Add text.")
        context.report(0, 1, "evaluate")
        self._wait(context, self.evaluate)
        return {}

    def _wait(self, context: JobContext, event: threading.Event, keep: bool = False) -> None:
        while not event.is_set() and not context.wants_finish():
            context.check()
            time.sleep(0.005)
        if keep:
            event.clear()


@pytest.fixture
def services(trained_library: Library, services_of: Any) -> Services:
    Records.begin.clear()
    Records.evaluate.clear()
    return services_of(trained_library)


POINTS = [point_name("resid_post", layer) for layer in range(4)]
SMALL = {"tokens": 1_228_800, "expansion": 2, "k": 8, "context": 64, "batch_size": 2048}


def begin(
    qtbot: Any, services: Services, points: list[str], size: tuple[int, int] = SIZES[0], **job: Any
) -> tuple[TrainingPage, JobCard]:
    page = TrainingPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    services.jobs.submit(Records(1, 1, points, SMALL, **job))
    qtbot.waitUntil(lambda: len(page.job_cards()) == 1 and page.job_cards()[0].job.active)
    (card,) = page.job_cards()
    qtbot.waitUntil(lambda: card.job.status == "running")
    return page, card


def drawn(qtbot: Any, card: Any) -> Any:
    """The card's charts once everything has been built and drawn."""
    qtbot.waitUntil(lambda: card.charts is not None and card.charts.density is not None)
    qtbot.waitUntil(lambda: not card.charts._turns.isActive())
    return card.charts


def end(qtbot: Any, services: Services) -> None:
    for job_id in services.jobs.running():
        services.jobs.cancel(job_id)
    qtbot.waitUntil(lambda: services.jobs.running() == [])


# --- statuses -------------------------------------------------------------------------------------


def test_the_badge_follows_a_training_through_its_statuses(qtbot: Any, services: Services) -> None:
    _, card = begin(qtbot, services, POINTS[:1])
    assert card.badge.text() == "Initializing" and card.tiles["loss"].value == "—"
    assert card.live.isHidden()
    Records.begin.set()
    qtbot.waitUntil(lambda: card.badge.text() == "Training")
    assert card.accessibleName().endswith("Training")
    card.pause.click()
    qtbot.waitUntil(lambda: card.badge.text() == "Paused")
    card.resume.click()
    qtbot.waitUntil(lambda: card.badge.text() == "Training")
    Records.evaluate.set()
    qtbot.waitUntil(lambda: card.badge.text() == "Finishing…")
    Records.evaluate.set()
    qtbot.waitUntil(lambda: services.jobs.running() == [])


@pytest.mark.parametrize(
    ("status", "word"),
    [("failed", "Error"), ("interrupted", "Interrupted"), ("cancelled", "Cancelled")],
)
def test_an_ended_training_says_how(qtbot: Any, services: Services, status: str, word: str) -> None:
    params = {"model_id": 1, "dataset_id": 1, "hook_points": POINTS[:1], "config": SMALL}
    job_id = services.library.jobs.submit("train", "Train", "compute", params)
    services.library.jobs.move(job_id, ("queued",), status, error={"title": "Broken"})
    presenter = TrainingPresenter(services)
    card = JobCard(services, presenter, services.library.jobs.get(job_id))
    qtbot.addWidget(card)
    assert card.badge.text() == word


def test_what_remains_follows_from_the_throughput(qtbot: Any, services: Services) -> None:
    Records.begin.set()
    _, card = begin(qtbot, services, POINTS[:2])
    qtbot.waitUntil(lambda: "step 40" in card.progress._phase.text())
    plan = card._plan
    left = (plan.steps - 40) * plan.batch_size / 1000  # at 1,000 tokens a second
    assert card.progress._phase.text() == f"Training, step 40 of {plan.steps}"
    expected = f"about {formatting.duration(left)} of training remaining"
    assert expected in card.progress.times_text and "elapsed" in card.progress.times_text
    assert card.tiles["tokens_per_second"].value == "1,000"
    end(qtbot, services)


def test_the_speed_is_that_of_now_and_pauses_do_not_count() -> None:
    found = Throughput()
    assert found.rate is None and found.remaining(1e6) is None
    seconds = 0.0
    for step in range(100):  # 50 slow steps, then 50 fast ones
        seconds += 2.0 if step < 50 else 1.0
        tokens = 1000 * (step + 1)
        for site in ("a", "b"):
            found.add({"site": site, "tokens": tokens, "tokens_per_second": tokens / seconds})
    assert found.rate == pytest.approx(1000.0)
    assert 15 <= found.window <= 17
    assert found.remaining(150_000) == pytest.approx(50.0)
    found.add({"tokens": 50_000, "tokens_per_second": 500.0})  # taken back to a checkpoint
    assert found.tokens == 50_000 and found.rate is None


# --- layers ---------------------------------------------------------------------------------------


def test_all_layers_at_a_glance_and_one_in_detail(qtbot: Any, services: Services) -> None:
    Records.begin.set()
    _, card = begin(qtbot, services, POINTS)
    charts = drawn(qtbot, card)
    table = card.layers
    qtbot.waitUntil(lambda: table.rows.text(POINTS[3], "heldout_fvu") == "0.200")
    newest = a_row(POINTS[0], 39)
    latents = card._plan.d_sae
    assert [table.rows.text(POINTS[2], key) for key in ("loss", "explained_variance", "dead")] == [
        formatting.number(newest["loss"], 4),
        formatting.percent(1 - newest["fvu"]),
        formatting.percent(newest["dead"] / latents),
    ]
    assert table.rows.text(None, "label") == "All 4 layers"
    assert table.rows.text(POINTS[1], "quality") == "✓ good"
    assert "mean of 4 layers" in card.tiles["loss"].accessibleName()
    assert all(charts.charts["loss"]._series[p].curve.isVisible() for p in POINTS)

    place = table.visualRect(table.model().index(2, 0)).center()
    qtbot.mouseClick(table.viewport(), Qt.MouseButton.LeftButton, pos=place)
    assert table.key == POINTS[1]
    shown = [p for p in POINTS if charts.charts["loss"]._series[p].curve.isVisible()]
    assert shown == [POINTS[1]]
    assert "Layer 1, newest batch" in card.tiles["loss"].accessibleName()
    assert charts.density.sample.text().startswith("61,440 training tokens up to step 40 • 3 of ")
    qtbot.keyClick(table, Qt.Key.Key_Up)
    qtbot.keyClick(table, Qt.Key.Key_Up)
    assert table.key is None
    assert "of 4 layers never fired" in charts.density.sample.text()
    end(qtbot, services)


def test_a_training_of_one_layer_needs_no_table(qtbot: Any, services: Services) -> None:
    _, card = begin(qtbot, services, POINTS[:1])
    assert card.layers is None
    end(qtbot, services)


def test_means_leave_out_what_is_not_a_number(qtbot: Any, services: Services) -> None:
    _, card = begin(qtbot, services, POINTS[:2])
    texts = card._texts(
        [
            a_row("a", 0, loss=1.0),
            a_row("b", 0, loss=math.nan),
        ]
    )
    assert texts["loss"] == "1.0000" and texts["heldout_fvu"] == "—"
    assert card._texts([])["explained_variance"] == "—"
    end(qtbot, services)


def test_the_worst_light_stands_for_a_layer() -> None:
    assert verdict([])[0] == "—"
    found = [Light("FVU", "good", 0.1, "fine"), Light("L0", "poor", 9.0, "far off"),
             Light("Dead share", "fair", 0.05, "some")]  # fmt: skip
    text, colour, why = verdict(found)
    assert text == "✕ poor" and colour and "L0: far off" in why


def test_twelve_layers_have_twelve_colours() -> None:
    assert len(set(colours(12))) == 12
    assert len(colours(8)) == 8


# --- charts and log -------------------------------------------------------------------------------


def test_charts_have_every_step_over_steps_tokens_and_time(qtbot: Any, services: Services) -> None:
    Records.begin.set()
    _, card = begin(qtbot, services, POINTS[:2], steps=300)
    charts = drawn(qtbot, card)
    qtbot.waitUntil(lambda: charts.n_rows == 600)
    qtbot.waitUntil(lambda: not charts._turns.isActive())
    for axis, place in (("step", lambda s: s), ("tokens", lambda s: 2048 * (s + 1)),
                        ("seconds", lambda s: 2.048 * (s + 1))):  # fmt: skip
        charts.axis.set_value(axis)
        points = charts.charts["explained_variance"].points(POINTS[1])
        assert len(points) == 300
        assert points[0][0] == pytest.approx(place(0)) and points[-1][0] == pytest.approx(
            place(299)
        )
        assert points[7][1] == pytest.approx(1 - a_row("", 7)["fvu"])
    end(qtbot, services)


def test_the_log_reads_like_one_and_can_be_copied(qtbot: Any, services: Services) -> None:
    Records.begin.set()
    _, card = begin(qtbot, services, POINTS[:2])
    charts = drawn(qtbot, card)
    qtbot.waitUntil(lambda: "Note: " in charts.log.toPlainText())
    lines = charts.log.toPlainText().splitlines()
    assert lines[0] == log_line(a_row(POINTS[0], 0), True, card._plan.d_sae)
    assert lines[0].startswith(time.strftime("[%H:%M:%S] ", time.localtime(1_700_000_002)))
    assert "Step 1, layer 0: loss=0.7000, L0=40.0, dead=0/" in lines[0]
    assert "held-out FVU=0.2000" in lines[18]
    assert lines[-1].endswith("Note: Step 40: the disk was nearly full.")
    assert charts.live.isVisible() and charts.live.text() == "Live"
    charts._on_copy_clicked()
    assert QApplication.clipboard().text() == charts.log.toPlainText()
    charts.append([a_row(POINTS[0], step) for step in range(1000)])
    qtbot.waitUntil(lambda: "Step 1,000" in charts.log.toPlainText())
    assert charts.log.blockCount() <= 400, "the widget is bounded; the file keeps everything"
    card.pause.click()
    qtbot.waitUntil(lambda: card.job.status == "paused")
    assert not charts.live.isVisible()
    end(qtbot, services)


def test_a_history_of_another_version_is_shown_as_far_as_it_goes() -> None:
    row = {"site": POINTS[0], "step": 0, "loss": 0.5}
    found = history([row], several=False)
    assert found.columns[POINTS[0]]["loss"].tolist() == [0.5]
    assert math.isnan(found.columns[POINTS[0]]["tokens"][0])
    assert found.lines == ("Step 1: loss=0.5000, L0=—, dead=—, — tokens/s",)


# --- histogram ------------------------------------------------------------------------------------


def test_the_histogram_has_every_latent_and_its_sample(themed: Any, qtbot: Any) -> None:
    chart = DensityChart()
    qtbot.addWidget(chart)
    chart.show()
    assert "No data yet" in chart.accessibleDescription()
    one = {**judged("a", 9)["density"], "step": 10}
    chart.show_density(one)
    assert list(chart._alive.opts["height"]) == one["counts"]
    assert list(chart._never.opts["height"]) == [3], "never fired: a bar of its own"
    text = "61,440 training tokens up to step 10 • 3 of 128 latents never fired"
    assert chart.sample.text() == chart.accessibleDescription() == text
    assert "never,3" in chart.csv() and nameless(chart) == []
    both = together([one, {**one, "never_fired": 4, "tokens": 100}])
    assert both["never_fired"] == 7 and sum(both["counts"]) == 250
    final = {key: value for key, value in one.items() if key != "step"}
    assert sample_text(final).startswith("61,440 held-out tokens • ")
    assert together([]) is None


def test_the_final_histogram_is_that_of_the_finished_dictionary(
    qtbot: Any, services: Services
) -> None:
    page = TrainingPage(services)
    qtbot.addWidget(page)
    page.resize(*SIZES[0])
    page.show()
    (card,) = page.run_cards()
    card.history.set_expanded(True)
    charts = drawn(qtbot, card)
    (sae,) = services.library.saes.all()
    folder = services.library.path(sae.folder)
    from safetensors.numpy import load_file

    logs = load_file(folder / "sparsity.safetensors")["sparsity"]  # log10(frequency + 1e-10)
    found = charts.density.found
    assert found["never_fired"] == int((logs < -9).sum())
    assert sum(found["counts"]) == int((logs >= -9).sum())
    assert found["tokens"] == sae.metrics["tokens"]
    below = sum(found["counts"][: EDGES.index(-2.0)])
    assert below == int(((logs >= -9) & (logs < -2 - 1e-6)).sum())


# --- the device -----------------------------------------------------------------------------------


def test_cpu_use_is_the_share_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage.device, "cores", lambda: 4)
    meter = usage.Meter()
    assert meter.measure().share is None
    began, spent = time.monotonic(), time.process_time()
    while time.monotonic() - began < 0.4:
        math.factorial(300)
    spent = time.process_time() - spent
    took = time.monotonic() - began
    found = meter.measure()
    assert found.share == pytest.approx(spent / took / 4, abs=0.03)
    assert found.label == "CPU use" and "all 4 CPU cores" in found.help


def test_the_device_is_measured_in_the_background(qtbot: Any, services: Services) -> None:
    Records.begin.set()
    _, card = begin(qtbot, services, POINTS[:1])
    assert card.tiles["use"].value == "—"
    qtbot.waitUntil(lambda: card.tiles["use"].value.endswith("%"))
    assert "CPU use" in card.tiles["use"].accessibleName()
    assert "all " in card.tiles["use"].toolTip()
    end(qtbot, services)


# --- how it looks ---------------------------------------------------------------------------------


def show_card(page: TrainingPage, card: Any, name: str) -> None:
    page.column_page.widget().layout().activate()
    top = card.mapTo(page.column_page.widget(), card.rect().topLeft()).y()
    page.column_page.verticalScrollBar().setValue(top - 16)
    shot(page, name)
    assert nameless(card) == [] and too_small(card) == [] and cut_off(card) == []


@pytest.mark.parametrize("size", SIZES)
def test_cards_can_be_read_in_every_state(
    qtbot: Any, services: Services, size: tuple[int, int]
) -> None:
    several = 12 if size[0] == 1920 else 4
    points = [point_name("resid_post", layer) for layer in range(several)]
    Records.begin.set()
    page, card = begin(qtbot, services, points, size, fails=True, steps=600)
    qtbot.waitUntil(lambda: card._n_rows == 600 * several)
    charts = drawn(qtbot, card)
    qtbot.waitUntil(lambda: charts.n_rows == 600 * several)
    drawn(qtbot, card)
    qtbot.waitUntil(lambda: card.tiles["use"].value.endswith("%"))
    kind = f"{size[0]}x{size[1]}"
    show_card(page, card, f"card_training-{kind}")
    page.column_page.verticalScrollBar().setValue(10**6)
    shot(page, f"card_training_below-{kind}")
    card.pause.click()
    qtbot.waitUntil(lambda: card.badge.text() == "Paused")
    card.layers.choose(points[1])
    show_card(page, card, f"card_paused-{kind}")
    card.resume.click()
    Records.evaluate.set()
    qtbot.waitUntil(lambda: card.job.status == "failed")
    assert card.tiles["use"].value == "—", "nothing is measured any more"
    show_card(page, card, f"card_failed-{kind}")


@pytest.mark.parametrize("size", SIZES)
def test_a_run_of_several_layers_can_be_read(
    qtbot: Any, services: Services, size: tuple[int, int]
) -> None:
    library = services.library
    (sae,) = library.saes.all()
    training = library.trainings.get(1)
    rows = [json.loads(line) for line in
            (library.path(training.folder) / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    worse = {**sae.metrics, "fvu": 0.9, "explained_variance": 0.1}
    for layer, metrics in ((0, sae.metrics), (1, worse), (3, sae.metrics)):
        library.saes.add(
            training_id=1, model_id=1, hook_point=point_name("resid_post", layer),
            hook_point_out=point_name("resid_post", layer), wiring="sae", layer=layer,
            folder=f"{sae.folder}-{layer}", architecture=sae.architecture, d_in=sae.d_in,
            d_sae=sae.d_sae, k=sae.k, metrics=metrics,
        )  # fmt: skip
        rows += [{**row, "site": point_name("resid_post", layer)} for row in rows
                 if row["site"] == sae.hook_point]  # fmt: skip
    (library.path(training.folder) / "metrics.jsonl").write_text(
        "\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: row["step"]))
    )
    page = TrainingPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    (card,) = page.run_cards()
    assert card.badge.text() == "Completed" and card.tiles == {}
    assert card.layers.rows.text(point_name("resid_post", 1), "fvu") == "0.900"
    assert card.layers.rows.text(point_name("resid_post", 1), "quality") == "✕ poor"
    mean = (3 * sae.metrics["fvu"] + 0.9) / 4
    assert card.layers.rows.text(None, "fvu") == formatting.number(mean, 3)
    card.choose(sae.id)
    assert set(card.tiles) == {sae.id} and set(card.lights[sae.id].badges) == {
        light.name for light in lights(sae.metrics, sae.k, training.config)
    }
    card.history.set_expanded(True)
    charts = drawn(qtbot, card)
    shown = [p for p, s in charts.charts["loss"]._series.items() if s.curve.isVisible()]
    assert shown == [sae.hook_point]
    card.layers.choose(None)
    assert all(block.isHidden() for block in card._blocks.values())
    card.choose(sae.id)
    drawn(qtbot, card)
    show_card(page, card, f"card_completed-{size[0]}x{size[1]}")
