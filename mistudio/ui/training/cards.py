"""The cards of the Training tab: a job that trains (or ended badly), and a run with its SAEs."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QWidget

from mistudio import formatting
from mistudio.engine.training.verdict import Watch, lights
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Sae
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time, seconds_between
from mistudio.ui.training.charts import TrainingCharts, averages
from mistudio.ui.training.form import encoder_of, point_parts, point_title, site_text
from mistudio.ui.training.presenter import ENDED_BADLY, Run, TrainingPresenter
from mistudio.ui.training.quality import FailingNote, QualityLights
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


PRICED = ("standard", "gated", "jumprelu")  # sparsity by a price


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
        self._rows: list[dict[str, Any]] = []  # newest per site, for the tiles
        self._n_rows = 0
        self._watching: list[tuple[str, Watch]] = []
        self._stopping = False
        self._points = list(job.params.get("hook_points", []))
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
        latents = presenter.job_latents(job)
        note = f"of {formatting.count(latents)}" if latents else ""
        several = f"mean of {len(self._points)} sites" if len(self._points) > 1 else ""
        self.tiles = {
            "loss": StatTile("Loss", tooltip="Newest batch", note=several),
            "l0": StatTile("L0", role="blue", note=several,
                           tooltip="Mean number of active latents per token, newest batch"),
            "dead": StatTile("Dead latents", role="red", note=note,
                             tooltip="Latents that have not fired within the dead window"),
            "tokens_per_second": StatTile("Tokens/s", role="purple",
                                          tooltip="Mean since the training began"),
        }  # fmt: skip
        self._tiles = QWidget()
        self._tiles.setLayout(_tiles(list(self.tiles.values())))
        self.live = Collapsible("Live Metrics", expanded=True)
        self.charts: TrainingCharts | None = None
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
        self.add(head, self.progress, self.warning, self._tiles, self._error)
        self.add(self._buttons, self.live)
        self.show_job(job)

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
        status = "training" if job.status == "running" else job.status
        if self._stopping and job.active:
            self.badge.set_status("processing", "Finishing…")
        else:
            self.badge.set_status(status)
        self.setAccessibleName(f"{self._title.text()}, {status}")
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
        self._tiles.setVisible(job.status in ("running", "paused") or bool(self._n_rows))
        self.live.setVisible(self._n_rows > 0)
        self._hint.setText(_hint(job, owned, self._stopping, kept))
        if job.status == "failed" and (old.status != "failed" or self._error.count() == 0):
            clear(self._error)
            error = {**job.error, "retryable": False}  # Retry stands below
            self._error.addWidget(ErrorPanel.of_row(error))
        self.show_progress()

    def show_progress(self) -> None:
        """A tick: pull the snapshot and what was measured since the last one."""
        snapshot = self._services.jobs.snapshot(self.job.id)
        if snapshot is not None:
            self.progress.show_snapshot(snapshot)
        elif self.job.active:
            self.progress.show_fraction(self.job.fraction or None, self.job.phase)
        rows = self._services.jobs.metrics(self.job.id, self._n_rows)
        if rows:
            self._append(rows)
        can_stop = self._n_rows > 0 and not self._stopping
        if snapshot is not None and snapshot.phase != "train":
            can_stop = False
        if can_stop != self.stop.isEnabled():
            self.stop.setEnabled(can_stop)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        first = self._n_rows == 0
        self._n_rows += len(rows)
        newest = {entry["site"]: entry for entry in self._rows}
        newest.update({entry["site"]: entry for entry in rows})
        self._rows = list(newest.values())
        for key, decimals in (("loss", 4), ("l0", 1), ("dead", 0), ("tokens_per_second", 0)):
            self.tiles[key].set_value(formatting.number(averages(self._rows, key), decimals))
        self._watch(rows)
        if first:
            self.live.setVisible(True)
            self._tiles.setVisible(True)
            if self.live.expanded:
                self._make_charts()
        if self.charts is not None:
            self.charts.append(self._services.jobs.metrics(self.job.id, self.charts.n_rows))

    def _watch(self, rows: list[dict[str, Any]]) -> None:
        """Say early where a site is clearly failing."""
        found = [watch.add(r for r in rows if r["site"] == site) for site, watch in self._watches()]
        self.warning.show_warning(next(filter(None, found), None))

    def _watches(self) -> list[tuple[str, Watch]]:
        plan = self._presenter.job_plan(self.job)
        if not self._watching and plan is not None:
            priced = plan.config.sparsity in PRICED
            self._watching = [
                (name, Watch(point_title(name), plan.steps, plan.d_sae, plan.k, priced))
                for name in self._points
            ]
        return self._watching

    def _make_charts(self) -> None:
        if self.charts is None:
            self.charts = TrainingCharts(self._points)
            self.live.add(self.charts)

    def _on_live_expanded_changed(self, expanded: bool) -> None:
        if expanded and self._n_rows:
            self._make_charts()
            assert self.charts
            self.charts.append(self._services.jobs.metrics(self.job.id, self.charts.n_rows))

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


def _hint(job: JobRecord, owned: bool, stopping: bool, kept: bool) -> str:
    if stopping and job.active:
        return "The SAE is calibrated, judged and saved as it is."
    if job.status == "queued":
        return "Waits for the job before it." if owned else "Queued by another miStudio."
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
        wiring = str(training.config.get("wiring", ""))
        for sae in run.saes:
            title = Text(point_title(sae.hook_point, wiring), "label")
            size = Text(f"{formatting.count(sae.d_sae)} latents", "helper")
            tiles = self.tiles[sae.id] = quality_tiles(sae)
            block = column(8)
            block.addLayout(row(title, size, None))
            block.addLayout(_tiles(tiles))
            self.lights[sae.id] = QualityLights(lights(sae.metrics, sae.k, training.config))
            block.addWidget(self.lights[sae.id])
            self.body.addLayout(block)
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
        for button, slot in (
            (self.discover, self._on_discover_clicked),
            (self.explore, self._on_explore_clicked),
            (self.export, self._on_export_clicked),
            (self.delete, self._on_delete_clicked),
        ):
            button.clicked.connect(slot)
            button.setAccessibleName(f"{button.text()}: {run.title}")
        self.add(row(self.explore, self.discover, None, self.export, self.delete))
        self.add(self.history)
        self.show_run(run)

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
        self._reading.hide()
        self.charts = TrainingCharts([sae.hook_point for sae in self.run.saes])
        self.history.add(self.charts)
        self.charts.append(rows)

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
