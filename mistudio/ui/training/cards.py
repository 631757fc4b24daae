"""The cards of the Training tab: a job that trains (or ended badly), and a run with its SAEs."""

from __future__ import annotations

import time
from typing import Any

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QWidget

from mistudio import formatting
from mistudio.engine.training.config import Plan
from mistudio.engine.training.verdict import Light, Watch, lights
from mistudio.jobs.control import Snapshot
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Sae
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time, seconds_between
from mistudio.ui.training.charts import TrainingCharts, load_charts
from mistudio.ui.training.checkpoints import CheckpointSection
from mistudio.ui.training.form import encoder_of, point_parts, point_title, site_text
from mistudio.ui.training.history import (
    History,
    Throughput,
    averages,
    colours,
    history,
    layer_label,
)
from mistudio.ui.training.layers import Field, Layer, LayerTable
from mistudio.ui.training.presenter import ENDED_BADLY, Run, TrainingPresenter
from mistudio.ui.training.quality import FailingNote, QualityLights
from mistudio.ui.training.queue import QueueNote
from mistudio.ui.training.record import RecordButton
from mistudio.ui.training.usage import DeviceUse, Usage
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Collapsible,
    ElidedLabel,
    ErrorPanel,
    IconButton,
    ProgressRow,
    StatTile,
    Text,
    clear,
    column,
    picture,
    row,
)

STOP_HELP = (
    "Ends the training at the next step and keeps the SAE as it is then: it is calibrated, judged "
    "and saved. To throw it away, cancel the job in the job list (Ctrl+J)."
)
SHOW_SECONDS = 0.5  # between two changes of the numbers: nobody reads much faster
ROWS_AT_ONCE = 500  # more are taken apart in the background

PRICED = ("standard", "gated", "jumprelu")  # sparsity by a price

# Definitions: engine/training/step.py (StepMetrics), run.py (held-out values).
LOSS_NOW = (
    "What the training lowers, on the newest batch{batch}: squared error over the variance of a "
    "calibration sample, and the price of sparsity where there is one. No unit; 0 is perfect."
)
EXPLAINED_NOW = "1 − FVU of the newest batch{batch}: the share of the variance reconstructed."
L0_NOW = "Mean number of active latents per token, on the newest batch{batch}.{target}"
DEAD_NOW = (
    "Share of the latents that have fired on none of the last {window} tokens (the dead window)."
)
HELDOUT_NOW = (
    "Fraction of variance unexplained on held-out text, measured every 5 % of the steps on up to "
    "8,192 tokens. It is what counts: the training never sees that text."
)
SPEED_NOW = (
    "Tokens of activations learnt from per second, over the last {seconds:.0f} seconds; all layers "
    "learn from the same tokens. Pauses are left out."
)


class JobCard(Card):
    """One training job that has not become a run."""

    retry_wanted = Signal(int)
    go_on_wanted = Signal(int)
    dismissed = Signal(int)

    def __init__(
        self,
        services: Services,
        presenter: TrainingPresenter,
        job: JobRecord,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent=parent)
        self._services, self._presenter = services, presenter
        self.job = job
        self._points = list(job.params.get("hook_points", []))
        self._plan: Plan | None = presenter.job_plan(job)
        self._forget_rows()
        self._stopping = False
        self._title = ElidedLabel(presenter.job_title(job), "card")
        self._about = ElidedLabel("", "helper")
        self.badge = Badge(job.status)
        self.dismiss = IconButton("x", "Remove from this list", size=18)
        self.dismiss.clicked.connect(self._on_dismiss_clicked)
        texts = column(4)
        texts.addWidget(self._title)
        texts.addWidget(self._about)
        self._icon = picture("activity", tokens.EMERALD, 24)
        head = row(self._icon, texts, self.badge, self.dismiss, spacing=14)
        head.setStretch(1, 1)
        self.progress = ProgressRow("Training Progress")
        self.layers = self._make_layers()
        self.tiles = self._make_tiles()
        self._tiles = QWidget()
        self._tiles.setLayout(_tiles(list(self.tiles.values())))
        self._use = DeviceUse(services.background, self)
        self._use.changed.connect(self._on_use_changed)
        self.live = Collapsible("Live Metrics", expanded=True)
        self._preparing = Text("Preparing the charts…", "helper")
        self.live.add(self._preparing)
        self.charts: TrainingCharts | None = None
        self._loading = self._taking = False
        self.live.expanded_changed.connect(self._on_live_expanded_changed)
        self._error = column(0)
        self.warning = FailingNote()
        self.pause = Button("Pause", "warning", "pause")
        self.resume = Button("Resume", "primary", "play")
        self.stop = Button("Stop and Keep", "danger", "circle-stop", STOP_HELP)
        self.cancel = Button("Cancel", "secondary", "x")
        self.go_on = Button("Go On", "primary", "play", "From the newest checkpoint that it kept")
        self.retry = Button("Retry", "info", "rotate-ccw", "The same training from its beginning")
        self._hint = Text("", "helper", wrap=True)
        for button, slot in (
            (self.pause, self._on_pause_clicked),
            (self.resume, self._on_resume_clicked),
            (self.stop, self._on_stop_clicked),
            (self.cancel, self._on_cancel_clicked),
            (self.go_on, self._on_go_on_clicked),
            (self.retry, self._on_retry_clicked),
        ):
            button.clicked.connect(slot)
            button.setAccessibleName(f"{button.text()}: {self._title.text()}")
        self._buttons = QWidget()
        buttons = (self.pause, self.resume, self.stop, self.cancel, self.go_on, self.retry)
        line = row(*buttons, self._hint)
        line.setStretch(len(buttons), 1)
        self._buttons.setLayout(line)
        self.queue = QueueNote(services, job.id, self._title.text())
        self.checkpoints = CheckpointSection(services, presenter, job)
        self._generation = services.jobs.generation(job.id)
        self.add(head, self.progress, self.warning)
        if self.layers is not None:
            self.add(self.layers)
        self.add(self._tiles, self._error, self.queue, self._buttons, self.checkpoints, self.live)
        self.show_job(job)

    def _forget_rows(self) -> None:
        """Nothing has been measured, as far as this card knows."""
        self._n_rows = self._n_notes = 0
        self._newest: dict[str, dict[str, Any]] = {}  # the newest row of each site
        self._judged: dict[str, dict[str, Any]] = {}  # the newest with held-out values
        self._throughput = Throughput()
        self._watching: list[tuple[str, Watch]] = []
        self._shown_at = 0.0
        self._stale = False

    def _make_layers(self) -> LayerTable | None:
        """All layers at a glance, where there are several."""
        if len(self._points) < 2:
            return None
        batch, target, window = self._facts()
        fields = (
            Field("loss", "Loss", LOSS_NOW.format(batch=batch)),
            Field("explained_variance", "Expl. variance", EXPLAINED_NOW.format(batch=batch)),
            Field("l0", "L0", L0_NOW.format(batch=batch, target=target)),
            Field("dead", "Dead share", DEAD_NOW.format(window=window)),
            Field("heldout_fvu", "Held-out FVU", HELDOUT_NOW),
        )
        table = LayerTable(layer_rows(self._points), fields, "Layers of this training")
        table.chosen.connect(self._on_layer_chosen)
        return table

    def _make_tiles(self) -> dict[str, StatTile]:
        batch, target, window = self._facts()
        loss, explained = LOSS_NOW.format(batch=batch), EXPLAINED_NOW.format(batch=batch)
        l0, dead = L0_NOW.format(batch=batch, target=target), DEAD_NOW.format(window=window)
        return {
            "loss": StatTile("Loss", tooltip=_rich(loss)),
            "explained_variance": StatTile("Explained variance", tooltip=_rich(explained)),
            "l0": StatTile("L0", role="blue", tooltip=_rich(l0)),
            "dead": StatTile("Dead share", role="red", tooltip=_rich(dead)),
            "tokens_per_second": StatTile(
                "Tokens/s", role="purple", tooltip=_rich(SPEED_NOW.format(seconds=15))
            ),
            "use": StatTile("Device use", role="purple", tooltip="Not measured yet"),
        }

    def _facts(self) -> tuple[str, str, str]:
        """Batch size, target and dead window in words."""
        plan = self._plan
        if plan is None:
            return "", "", "—"
        batch = f" of {formatting.count(plan.batch_size)} tokens"
        return batch, f" The target is {plan.k:g}.", formatting.count(plan.dead_window)

    # --- showing --------------------------------------------------------------------------------

    def show_job(self, job: JobRecord) -> None:
        """The job's row changed."""
        old, self.job = self.job, job
        owned = self._services.jobs.owns(job.id)
        started = job.started_at or job.created_at
        about = []
        if self._points:
            config = job.params.get("config", {})
            layers = ", ".join(str(point_parts(name)[1]) for name in self._points)
            plural = "Layers" if len(self._points) > 1 else "Layer"
            about = [
                encoder_of(config),
                f"{plural} {layers}",
                site_text(self._points[0], str(config.get("wiring", ""))),
            ]
        word = "Started" if job.started_at else "Queued"
        self._about.setText(" • ".join([*filter(None, about), f"{word} {clock_time(started)}"]))
        self._show_badge()
        ended = job.status in ENDED_BADLY
        self.progress.setVisible(job.status in ("running", "paused"))
        self.pause.setVisible(owned and job.status == "running" and not self._stopping)
        self.resume.setVisible(owned and job.status == "paused")
        self.stop.setVisible(owned and job.status in ("running", "paused"))
        self.cancel.setVisible(owned and job.status == "queued")
        kept = self._services.jobs.can_go_on(job)
        self.go_on.setVisible(kept)
        self.retry.setVisible(ended)
        self.dismiss.setVisible(ended)
        self._show_parts()
        self._hint.setText(_hint(job, owned, self._stopping, kept))
        if job.status == "failed" and (old.status != "failed" or self._error.count() == 0):
            clear(self._error)
            error = {**job.error, "retryable": False}  # Retry stands below
            self._error.addWidget(ErrorPanel.of_row(error))
        self.checkpoints.show_job(job)
        if not job.active:
            self.tiles["use"].set_value("—")
        self._shown_at = 0.0
        self.show_progress()

    def _show_parts(self) -> None:
        """What there is something to be seen in."""
        measured = self._n_rows > 0
        shown = measured or self.job.status in ("running", "paused")
        self._tiles.setVisible(shown)
        if self.layers is not None:
            self.layers.setVisible(shown)
        self.live.setVisible(measured)
        if self.charts is not None:
            self.charts.set_live(self.job.status == "running")

    def _show_badge(self) -> None:
        """The status machine of a training; what the job's row does not tell comes from its
        measurements: before the first it is being initialised, after the last it is finished."""
        status = {"running": "training", "failed": "error"}.get(self.job.status, self.job.status)
        text = status.capitalize()
        if self.job.status == "running" and not self._n_rows:
            status, text = "initializing", "Initializing"
        elif self.job.active and (self._stopping or self._is_over()):
            status, text = "processing", "Finishing…"
        if (status, text) != (self.badge.status, self.badge.text()):
            self.badge.set_status(status, text)
            self.setAccessibleName(f"{self._title.text()}, {text}")

    def _is_over(self) -> bool:
        """Whether the last step was made: what follows is the evaluation."""
        snapshot = self._services.jobs.snapshot(self.job.id)
        return bool(self._n_rows) and snapshot is not None and snapshot.phase == "evaluate"

    def show_progress(self) -> None:
        """A tick: now and then, pull the snapshot and what was measured since the last one."""
        now = time.monotonic()
        if now - self._shown_at < SHOW_SECONDS:
            return
        self._shown_at = now
        generation = self._services.jobs.generation(self.job.id)
        if generation != self._generation:
            self._generation = generation
            self._begin_anew()
        # Before the rows: what a note is about is in the log above it.
        snapshot = self._services.jobs.snapshot(self.job.id)
        rows = self._services.jobs.metrics(self.job.id, self._n_rows)
        if rows:
            self._append(rows)
        self.checkpoints.show_progress()
        if self._stale:
            self._show_values()
        self._show_badge()
        self._show_place()
        self._show_notes(snapshot)
        if self.job.status in ("running", "paused"):
            self._use.tick()
        can_stop = self._n_rows > 0 and not self._stopping
        if snapshot is not None and snapshot.phase != "train":
            can_stop = False
        if can_stop != self.stop.isEnabled():
            self.stop.setEnabled(can_stop)

    def _show_place(self) -> None:
        """How far it is. While it trains, what remains follows from the measured throughput; how
        long the evaluation after it takes, nobody has measured yet."""
        snapshot, plan = self._services.jobs.snapshot(self.job.id), self._plan
        if snapshot is None:
            if self.job.active:
                self.progress.show_fraction(self.job.fraction or None, self.job.phase)
            return
        newest = next(iter(self._newest.values()), None)
        trains = snapshot.phase == "train" and snapshot.metrics.get("detail") == "train"
        if newest is None or plan is None or not trains:
            self.progress.show_snapshot(snapshot)
            return
        step, steps = formatting.count(newest["step"] + 1), formatting.count(plan.steps)
        self.progress.show_fraction(
            snapshot.fraction,
            f"Training, step {step} of {steps}",
            snapshot.elapsed,
            self._throughput.remaining(plan.steps * plan.batch_size),
            "of training",
        )

    def _show_notes(self, snapshot: Snapshot | None) -> None:
        """What the training told in sentences, in the log, after the rows before it."""
        if self.charts is None or self._taking or snapshot is None:
            return
        if len(snapshot.notes) > self._n_notes:
            self.charts.add_notes(snapshot.notes[self._n_notes :])
            self._n_notes = len(snapshot.notes)

    def _begin_anew(self) -> None:
        """It was taken back to a checkpoint: what was measured after it is shown no more."""
        notes = self._n_notes
        self._forget_rows()
        self.warning.show_warning(None)
        if self.charts is not None:
            self._n_notes = notes  # the log of before goes with its charts, its notes stay told
            self.charts.hide()
            self.charts.deleteLater()
            self.charts = None
            self._preparing.show()
        self._loading = self._taking = False

    def _append(self, rows: list[dict[str, Any]]) -> None:
        first = self._n_rows == 0
        self._n_rows += len(rows)
        for entry in rows:
            self._newest[entry["site"]] = entry
            if "heldout_fvu" in entry:
                self._judged[entry["site"]] = entry
            self._throughput.add(entry)
        self._stale = True
        self._watch(rows)
        if first:
            self._show_parts()
            if self.live.expanded:
                self._make_charts()
        self._feed()

    # --- numbers --------------------------------------------------------------------------------

    def _show_values(self) -> None:
        """The numbers of the layer that is looked at, and of all in the table."""
        self._stale = False
        chosen = self.layers.key if self.layers is not None else None
        every = list(self._newest.values())
        rows = [entry for entry in every if chosen is None or entry["site"] == chosen]
        texts = self._texts(rows)
        for key in ("loss", "explained_variance", "l0", "dead"):
            self.tiles[key].set_value(texts[key], self._note(key, rows))
        help = _rich(SPEED_NOW.format(seconds=max(self._throughput.window, 1)))
        speed = formatting.number(self._throughput.rate, 0)
        self.tiles["tokens_per_second"].set_value(speed, "all layers at once", help)
        if self.layers is None:
            return
        self.layers.rows.show(None, self._texts(every), self._lights(list(self._judged)))
        for site, entry in self._newest.items():
            if site in self._points:
                self.layers.rows.show(site, self._texts([entry]), self._lights([site]))

    def _texts(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """What the newest row of a site says, or the mean over several."""
        dead, latents = averages(rows, "dead"), self._plan.d_sae if self._plan else None
        fvu = averages(rows, "fvu")
        judged = [self._judged[entry["site"]] for entry in rows if entry["site"] in self._judged]
        return {
            "loss": formatting.number(averages(rows, "loss"), 4),
            "explained_variance": formatting.percent(None if fvu is None else 1.0 - fvu),
            "l0": formatting.number(averages(rows, "l0"), 1),
            "dead": formatting.percent(dead / latents if latents and dead is not None else None),
            "heldout_fvu": formatting.number(averages(judged, "heldout_fvu"), 3),
        }

    def _note(self, key: str, rows: list[dict[str, Any]]) -> str:
        if key == "dead" and self._plan is not None:
            dead = formatting.number(averages(rows, "dead"), 0)
            return f"{dead} of {formatting.count(self._plan.d_sae)}"
        if key == "l0" and self._plan is not None:
            return f"target {self._plan.k:g}"
        if len(rows) > 1:
            return f"mean of {len(rows)} layers"
        several = len(self._points) > 1
        return f"{layer_label(rows[0]['site'])}, newest batch" if several else "newest batch"

    def _lights(self, sites: list[str]) -> list[Light]:
        """Of the newest held-out values; what the loss costs is only known at the end."""
        found: list[Light] = []
        for site in sites:
            entry = self._judged.get(site)
            if entry is not None and self._plan is not None:
                keys = ("fvu", "l0", "dead_share")
                metrics = {key: entry.get(f"heldout_{key}") for key in keys}
                found += lights(metrics, self._plan.k, self.job.params.get("config", {}))
        return found

    def _watch(self, rows: list[dict[str, Any]]) -> None:
        """Say early where a site is clearly failing."""
        found = [watch.add(r for r in rows if r["site"] == site) for site, watch in self._watches()]
        self.warning.show_warning(next(filter(None, found), None))

    def _watches(self) -> list[tuple[str, Watch]]:
        plan = self._plan
        if not self._watching and plan is not None:
            priced = plan.config.sparsity in PRICED
            self._watching = [
                (name, Watch(point_title(name), plan.steps, plan.d_sae, plan.k, priced))
                for name in self._points
            ]
        return self._watching

    # --- charts ---------------------------------------------------------------------------------

    def _make_charts(self) -> None:
        """What draws is imported first, in the background: it takes a third of a second."""
        if self.charts is None and not self._loading:
            self._loading = True
            self._services.background.run(load_charts, self._on_charts_loaded)

    def _on_charts_loaded(self, _: object) -> None:
        self._loading = False
        if self.charts is not None:
            return
        latents = self._plan.d_sae if self._plan else None
        self.charts = TrainingCharts(self._points, latents, self.job.status == "running")
        self._preparing.hide()
        self.live.add(self.charts)
        if self.layers is not None:
            self.charts.choose(self.layers.key)
        self._feed()

    def _feed(self) -> None:
        """Give the charts what they do not have yet; a long history through a thread."""
        if self.charts is None or self._taking:
            return
        rows = self._services.jobs.metrics(self.job.id, self.charts.n_rows)
        if len(rows) < ROWS_AT_ONCE:
            self.charts.append(rows)
            return
        self._taking = True
        several, latents = len(self._points) > 1, self._plan.d_sae if self._plan else None
        generation = self._generation

        def take_apart() -> tuple[int, History]:
            return generation, history(rows, several, latents)

        self._services.background.run(take_apart, self._on_history_taken)

    def _on_history_taken(self, found: tuple[int, History]) -> None:
        generation, new = found
        if generation != self._generation:  # of before it was taken back
            return
        self._taking = False
        if self.charts is not None:
            self.charts.take(new)
            self._feed()

    def _on_live_expanded_changed(self, expanded: bool) -> None:
        if expanded and self._n_rows:
            self._make_charts()

    def _on_layer_chosen(self, key: Any) -> None:
        if self.charts is not None:
            self.charts.choose(key)
        self._show_values()

    def _on_use_changed(self, usage: Usage) -> None:
        if not self.job.active:  # it ended while this was measured
            return
        share = formatting.percent(usage.share, 0)
        self.tiles["use"].set_value(share, usage.label, _rich(usage.help))

    # --- commands -------------------------------------------------------------------------------

    def _on_pause_clicked(self, checked: bool = False) -> None:
        self._services.jobs.pause(self.job.id)

    def _on_resume_clicked(self, checked: bool = False) -> None:
        self._services.jobs.resume(self.job.id)

    def _on_stop_clicked(self, checked: bool = False) -> None:
        self._stopping = True
        self._services.jobs.finish_early(self.job.id)
        self.show_job(self.job)

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self._services.jobs.cancel(self.job.id)

    def _on_go_on_clicked(self, checked: bool = False) -> None:
        self.go_on_wanted.emit(self.job.id)

    def _on_retry_clicked(self, checked: bool = False) -> None:
        self.retry_wanted.emit(self.job.id)

    def _on_dismiss_clicked(self, checked: bool = False) -> None:
        self.dismissed.emit(self.job.id)


def layer_rows(points: list[str]) -> list[Layer]:
    """All layers together, then each in the colour of its curves."""
    own = zip(points, colours(len(points)), strict=True)
    return [
        Layer(None, f"All {len(points)} layers"),
        *(Layer(point, layer_label(point), colour) for point, colour in own),
    ]


def _rich(text: str) -> str:
    """A tooltip that wraps."""
    return f"<qt>{text}</qt>"


def _hint(job: JobRecord, owned: bool, stopping: bool, kept: bool) -> str:
    if stopping and job.active:
        return "The SAE is calibrated, judged and saved as it is."
    if job.status == "queued":
        return "" if owned else "Queued by another miStudio."
    if kept:
        return "It kept a checkpoint: Go On continues there, Retry begins from the start."
    if job.status == "interrupted":
        return "miStudio ended before a checkpoint was kept. A retry begins from the start."
    if job.status in ENDED_BADLY and job.ended_at:
        took = seconds_between(job.started_at, job.ended_at)
        spent = f" after {formatting.duration(took)}" if took is not None else ""
        return f"Ended {clock_time(job.ended_at)}{spent}."
    return "" if owned else "Runs in another miStudio."


# --- a run ----------------------------------------------------------------------------------------

# Definitions: engine/sae/metrics.py (ReconstructionQuality), loss.py (LossRecovered).
EXPLAINED = (
    "1 − E‖x − x̂‖² / (E‖x‖² − ‖E x‖²): the share of the activations' variance that the SAE "
    "reconstructs. Measured on {tokens} held-out tokens."
)
FVU = "Fraction of variance unexplained: 1 − explained variance. On {tokens} held-out tokens."
L0 = "Mean number of active latents per token, on {tokens} held-out tokens. The target was {k}."
DEAD = "Share of latents that fired on none of {tokens} held-out tokens."
SCORE = (
    "(CE zero − CE SAE) / (CE zero − CE clean): how much of the next-token loss that is lost when "
    "the site is set to zero comes back with the SAE in its place. Cross-entropy in nats: clean "
    "{ce_clean}, with the SAE {ce_sae}, zero {ce_zero}. Over {loss_tokens} held-out predictions."
)
INCREASE = (
    "CE SAE − CE clean in nats: what the SAE costs the model. It tells SAEs apart better than the "
    "share recovered, which zero ablation flatters. Over {loss_tokens} held-out predictions."
)


def quality_tiles(sae: Sae) -> list[StatTile]:
    """What was measured of one SAE; an em dash where something was not."""
    metrics = sae.metrics
    facts = {
        "tokens": formatting.count(metrics.get("tokens") or 0),
        "loss_tokens": formatting.count(metrics.get("loss_tokens") or 0),
        "k": f"{sae.k:g}",
        **{
            key: formatting.number(metrics.get(key), 3) for key in ("ce_clean", "ce_sae", "ce_zero")
        },
    }
    values = (
        ("Explained variance", formatting.percent(metrics.get("explained_variance")), "emerald",
         EXPLAINED, ""),
        ("FVU", formatting.number(metrics.get("fvu"), 3), "blue", FVU, ""),
        ("L0", formatting.number(metrics.get("l0"), 1), "blue", L0, f"target {sae.k:g}"),
        ("Dead share", formatting.percent(metrics.get("dead_share")), "red", DEAD,
         f"of {formatting.short_count(sae.d_sae)} latents"),
        ("CE loss recovered", formatting.percent(metrics.get("ce_loss_score")), "emerald", SCORE,
         ""),
        ("CE increase", formatting.number(metrics.get("ce_increase"), 3), "purple", INCREASE,
         "nats"),
    )  # fmt: skip
    return [
        StatTile(label, value, role, f"<qt>{tip.format(**facts)}</qt>", note or " ")
        for label, value, role, tip, note in values
    ]


QUALITY_FIELDS = (
    Field("explained_variance", "Expl. variance", "Share of the variance of held-out activations "
          "that the SAE reconstructs"),
    Field("fvu", "FVU", "Fraction of variance unexplained: 1 − explained variance, on held-out "
          "text"),
    Field("l0", "L0", "Mean number of active latents per token, on held-out text"),
    Field("dead_share", "Dead share", "Share of latents that fired on no held-out token"),
    Field("ce_loss_score", "CE recovered", "How much of the next-token loss that is lost when the "
          "site is set to zero comes back with the SAE in its place"),
)  # fmt: skip


def quality_texts(saes: list[Sae]) -> dict[str, str]:
    """What was measured of one SAE, or the mean over several, for the table."""

    def mean(key: str) -> float | None:
        values = [sae.metrics[key] for sae in saes if sae.metrics.get(key) is not None]
        return sum(values) / len(values) if values else None

    return {
        "explained_variance": formatting.percent(mean("explained_variance")),
        "fvu": formatting.number(mean("fvu"), 3),
        "l0": formatting.number(mean("l0"), 1),
        "dead_share": formatting.percent(mean("dead_share")),
        "ce_loss_score": formatting.percent(mean("ce_loss_score")),
    }


class RunCard(Card):
    """A run that gave SAEs: what they are worth, and what can be done with them."""

    discover_wanted = Signal(int)
    explore_wanted = Signal(int)
    export_wanted = Signal(int)
    delete_wanted = Signal(int)

    def __init__(
        self,
        services: Services,
        presenter: TrainingPresenter,
        run: Run,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent=parent)
        self._services, self._presenter = services, presenter
        self.run = run
        training = run.training
        texts = column(4)
        texts.addWidget(ElidedLabel(run.title, "card"))
        tokens_seen = training.record.get("tokens")
        about = [
            training.name,  # two runs of one model and dataset are told apart by it
            encoder_of(training.config),
            f"{formatting.short_count(tokens_seen)} tokens" if tokens_seen else "",
            f"took {formatting.duration(training.seconds)}",
            f"Finished {clock_time(training.created_at)}",
        ]
        texts.addWidget(ElidedLabel(" • ".join(filter(None, about)), "helper"))
        self.badge = Badge(training.status)
        if training.status == "stopped":
            self.badge.setToolTip("Stopped before its end; the SAE was kept as it was then.")
        head = row(picture("circle-check", tokens.EMERALD, 24), texts, self.badge, spacing=14)
        head.setStretch(1, 1)
        self.add(head)
        self.tiles: dict[int, list[StatTile]] = {}
        self.lights: dict[int, QualityLights] = {}
        self._blocks: dict[int, QWidget] = {}  # of the layers that were looked at
        self._detail = column(0)
        self.layers = self._make_layers()
        if self.layers is not None:
            self.add(self.layers)
        elif run.saes:
            self._show_block(run.saes[0])
        self.body.addLayout(self._detail)
        self.discovery = ProgressRow("Discovering features")
        self.add(self.discovery)
        self.history = Collapsible("Training History")
        self.history.expanded_changed.connect(self._on_history_expanded_changed)
        self.charts: TrainingCharts | None = None
        self._reading = Text("", "helper", wrap=True)
        self._reading.hide()
        self.history.add(self._reading)
        self.discover = Button("Discover Features", "primary", "zap")
        self.explore = Button("Explore Features", "primary", "microscope")
        self.export = Button("Export…", "secondary", "download",
                             "Write the SAEs to a folder in SAELens' format")  # fmt: skip
        self.delete = Button("Delete", "secondary", "trash-2")
        self.record = RecordButton(services, presenter, training, run.title)
        for button, slot in (
            (self.discover, self._on_discover_clicked),
            (self.explore, self._on_explore_clicked),
            (self.export, self._on_export_clicked),
            (self.delete, self._on_delete_clicked),
        ):
            button.clicked.connect(slot)
            button.setAccessibleName(f"{button.text()}: {run.title}")
        self.add(row(self.explore, self.discover, None, self.record, self.export, self.delete))
        self.add(self.history)
        self.show_run(run)

    # --- its layers -----------------------------------------------------------------------------

    def _make_layers(self) -> LayerTable | None:
        """All layers at a glance, where there are several."""
        saes = self.run.saes
        if len(saes) < 2:
            return None
        table = LayerTable(
            layer_rows([sae.hook_point for sae in saes]), QUALITY_FIELDS, "Layers of this run"
        )
        every: list[Light] = []
        for sae in saes:
            found = lights(sae.metrics, sae.k, self.run.training.config)
            every += found
            table.rows.show(sae.hook_point, quality_texts([sae]), found)
        table.rows.show(None, quality_texts(list(saes)), every)
        table.chosen.connect(self._on_layer_chosen)
        return table

    def choose(self, sae_id: int) -> None:
        """Look at one layer."""
        if self.layers is not None:
            self.layers.choose(next(s.hook_point for s in self.run.saes if s.id == sae_id))

    def _show_block(self, sae: Sae) -> None:
        """The tiles and lights of a layer, made when it is first looked at."""
        if sae.id not in self._blocks:
            wiring = str(self.run.training.config.get("wiring", ""))
            title = Text(point_title(sae.hook_point, wiring), "label")
            size = Text(f"{formatting.count(sae.d_sae)} latents", "helper")
            tiles = self.tiles[sae.id] = quality_tiles(sae)
            found = QualityLights(lights(sae.metrics, sae.k, self.run.training.config))
            self.lights[sae.id] = found
            block = self._blocks[sae.id] = QWidget()
            layout = column(8)
            layout.addLayout(row(title, size, None))
            layout.addLayout(_tiles(tiles))
            layout.addWidget(found)
            block.setLayout(layout)
            self._detail.addWidget(block)
        for sae_id, block in self._blocks.items():
            block.setVisible(sae_id == sae.id)

    def _on_layer_chosen(self, key: Any) -> None:
        sae = next((sae for sae in self.run.saes if sae.hook_point == key), None)
        if sae is not None:
            self._show_block(sae)
        else:
            for block in self._blocks.values():
                block.hide()
        if self.charts is not None:
            self.charts.choose(key)

    # --- what changes ---------------------------------------------------------------------------

    def show_run(self, run: Run) -> None:
        """Something changed beside the run itself: features were found, or are being looked for."""
        self.run = run
        missing = [sae for sae in run.saes if sae.id not in run.discovered]
        busy = run.discovering is not None
        self.discovery.setVisible(busy)
        self.discover.setVisible(bool(missing))
        self.discover.setEnabled(not busy)
        self.discover.setToolTip("A discovery is under way" if busy else "")
        self.discover.set_variant("primary" if len(missing) == len(run.saes) else "secondary")
        self.explore.setVisible(bool(run.discovered))
        self.setAccessibleName(f"{run.title}, {run.training.status}")
        self.show_progress()

    def show_progress(self) -> None:
        if self.run.discovering is not None:
            self.discovery.show_snapshot(self._services.jobs.snapshot(self.run.discovering))

    def _on_history_expanded_changed(self, expanded: bool) -> None:
        if expanded and self.charts is None:
            self._reading.setText("Reading…")
            self._reading.show()
            self._presenter.read_history(
                self.run.training, self._on_history_read, self._on_history_failed
            )

    def _on_history_read(self, rows: list[dict[str, Any]]) -> None:
        if self.charts is not None:
            return
        if not rows:
            self._reading.setText("This run has no recorded history.")
            return
        several, latents = len(self.run.saes) > 1, self._latents()

        def prepare() -> History:
            load_charts()
            return history(rows, several, latents)

        self._services.background.run(prepare, self._on_history_ready, self._on_history_failed)

    def _on_history_ready(self, found: History) -> None:
        if self.charts is not None:
            return
        self._reading.hide()
        saes = self.run.saes
        self.charts = TrainingCharts([sae.hook_point for sae in saes], self._latents())
        self.history.add(self.charts)
        self.charts.take(found)
        self.charts.add_notes(self.run.training.record.get("notes", []), now=False)
        for sae in saes:
            if density := sae.metrics.get("density"):
                final = {**density, "tokens": sae.metrics["tokens"]}
                self.charts.show_density(sae.hook_point, final)
        if self.layers is not None:
            self.charts.choose(self.layers.key)

    def _latents(self) -> int | None:
        return self.run.saes[0].d_sae if self.run.saes else None

    def _on_history_failed(self, error: Exception) -> None:
        self._reading.setText(f"The history cannot be read: {error}")

    def _on_discover_clicked(self, checked: bool = False) -> None:
        self.discover_wanted.emit(self.run.training.id)

    def _on_explore_clicked(self, checked: bool = False) -> None:
        self.explore_wanted.emit(self.run.training.id)

    def _on_export_clicked(self, checked: bool = False) -> None:
        self.export_wanted.emit(self.run.training.id)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.run.training.id)


def _tiles(tiles: list[StatTile]) -> QGridLayout:
    grid = QGridLayout()
    grid.setContentsMargins(0, 0, 0, 0)
    grid.setSpacing(12)
    for place, tile in enumerate(tiles):
        grid.addWidget(tile, 0, place)
        grid.setColumnStretch(place, 1)
        grid.setAlignment(tile, Qt.AlignmentFlag(0))
    return grid
