"""The checkpoints of a training on its card: save, go back, delete, save by itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from PySide6.QtCore import QTimer, Signal
from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.engine.training.checkpoints import KEPT, MOST, AutoSave, Checkpoint
from mistudio.errors import UserError, explain
from mistudio.library.jobs import JobRecord
from mistudio.ui.services import Services
from mistudio.ui.training.presenter import TrainingPresenter
from mistudio.ui.widgets import (
    Badge,
    Button,
    Collapsible,
    ConfirmDialog,
    IconButton,
    IntBox,
    Surface,
    Text,
    Toggle,
    column,
    debounced,
    row,
)

SHOWN = 12  # rows; Show all shows the others
NO_LOSS = "—"
SAVE_HELP = (
    "<qt>Writes everything that the training needs to come back to this step. It stays until you "
    "delete it. A paused training takes one step first: only between two steps is there something "
    "whole to save.</qt>"
)
DISK_HELP = (
    f"<qt>On the disk now. Of those that were saved by themselves the best one (lowest FVU on "
    f"held-out text) and the newest {KEPT} stay, up to {MOST} where they are small; those that you "
    "saved or loaded stay until you delete them. All of them go when the training has ended "
    "well.</qt>"
)


class CheckpointRow(Surface):
    """One checkpoint: `Step 5,000`, `Loss: 0.2345 • 12:34:56 • 48 MB`, Load and Delete."""

    load_wanted = Signal(int)
    delete_wanted = Signal(int)

    def __init__(self, checkpoint: Checkpoint, best: bool, parent: QWidget | None = None) -> None:
        super().__init__("row", padding=10, parent=parent)
        self.checkpoint, self.best = checkpoint, best
        self.title = Text(f"Step {checkpoint.step:,}", "body")
        self.about = Text(about(checkpoint), "helper")
        fvu = formatting.number(checkpoint.fvu, 3)
        self.about.setToolTip(
            "<qt>Loss of its last batch, mean of all layers; when it was saved; its size on the "
            f"disk. FVU on held-out text: {fvu}.</qt>"
        )
        texts = column(2)
        marks = row(self.title, spacing=8)
        if best:
            badge = Badge("best", "Best", "emerald")
            badge.setToolTip("The lowest FVU on held-out text so far")
            marks.addWidget(badge)
        if checkpoint.kept:
            badge = Badge("kept", "Kept", "blue")
            badge.setToolTip("You saved or loaded it: it stays until you delete it")
            marks.addWidget(badge)
        marks.addStretch(1)
        texts.addLayout(marks)
        texts.addWidget(self.about)
        self.load = Button("Load", "small", "rotate-ccw")
        self.load.setAccessibleName(f"Load the checkpoint of step {checkpoint.step:,}")
        self.delete = IconButton("trash-2", f"Delete the checkpoint of step {checkpoint.step:,}")
        self.load.clicked.connect(self._on_load_clicked)
        self.delete.clicked.connect(self._on_delete_clicked)
        line = row(texts, self.load, self.delete)
        line.setStretch(0, 1)
        self.add(line)

    def _on_load_clicked(self, checked: bool = False) -> None:
        self.load_wanted.emit(self.checkpoint.step)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.checkpoint.step)


class AutoSaveRow(QWidget):
    """Save every so many steps, every so many minutes: each with its own switch."""

    changed = Signal(object)
    """AutoSave"""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.by_steps = Toggle("Auto-save by steps")
        self.steps = IntBox(1000, 100, 10_000, 100)
        self.steps.setAccessibleName("Steps from one automatic checkpoint to the next")
        self.by_minutes = Toggle("Auto-save by minutes")
        self.minutes = IntBox(5, 1, 1440)
        self.minutes.setAccessibleName("Minutes from one automatic checkpoint to the next")
        line = row(spacing=8)
        for before, toggle, box, after in (
            ("Auto-save every", self.by_steps, self.steps, "steps"),
            ("Auto-save every", self.by_minutes, self.minutes, "minutes"),
        ):
            line.addWidget(toggle)
            line.addWidget(Text(before, "label"))
            box.setFixedWidth(box.sizeHint().width() + 16)
            line.addWidget(box)
            line.addWidget(Text(after, "label"))
            line.addSpacing(16)
        line.addStretch(1)
        self.setLayout(line)
        self._tell = debounced(self, 300, self._on_settled)
        for toggle in (self.by_steps, self.by_minutes):
            toggle.toggled.connect(self._on_changed)
        for box in (self.steps, self.minutes):
            box.valueChanged.connect(self._on_changed)
        self._quiet = self._pending = False
        self._show()

    @property
    def value(self) -> AutoSave:
        return AutoSave(
            self.steps.value() if self.by_steps.isChecked() else None,
            float(self.minutes.value()) if self.by_minutes.isChecked() else 0.0,
        )

    def set_value(self, auto: AutoSave) -> None:
        """Steps beyond the limits of the field (a template may have them) are shown as they are.
        What was just typed and not told yet stays."""
        if self._pending:
            return
        self._quiet = True
        self.by_steps.setChecked(auto.steps is not None)
        if auto.steps is not None:
            self.steps.setRange(min(100, auto.steps), max(10_000, auto.steps))
            self.steps.setValue(auto.steps)
        self.by_minutes.setChecked(auto.minutes > 0)
        if auto.minutes > 0:
            self.minutes.setValue(max(1, round(auto.minutes)))
        self._quiet = False
        self._show()

    def _show(self) -> None:
        self.steps.setEnabled(self.by_steps.isChecked())
        self.minutes.setEnabled(self.by_minutes.isChecked())

    def _on_changed(self, _: object = None) -> None:
        self._show()
        if not self._quiet:
            self._pending = True
            self._tell()

    def _on_settled(self) -> None:
        self._pending = False
        self.changed.emit(self.value)


class CheckpointSection(Collapsible):
    """Collapsible `Checkpoints (N)`, for a training that runs, pauses or ended badly."""

    def __init__(
        self,
        services: Services,
        presenter: TrainingPresenter,
        job: JobRecord,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("Checkpoints", 0, parent=parent)
        self._services, self._presenter = services, presenter
        self.job = job
        self.rows: list[CheckpointRow] = []
        self._found: list[Checkpoint] | None = None
        self._reading = self._again = False
        self._asked: int | None = None  # the report before the one that is awaited
        self._loading: int | None = None  # the step
        self._checking = False  # whether its checkpoint is whole
        self._all = False
        self.save = Button("Save Now", "primary", "save", SAVE_HELP)
        self.save.setAccessibleName("Save a checkpoint now")
        self.save.clicked.connect(self._on_save_clicked)
        self.told = Text("", "small")
        self.disk = Text("", "helper")
        self.disk.setToolTip(DISK_HELP)
        self.auto = AutoSaveRow()
        self.auto.changed.connect(self._on_auto_changed)
        self.empty = Text("No checkpoints saved yet", "helper")
        self._list = column(8)
        self.more = Button("Show all", "link")
        self.more.clicked.connect(self._on_more_clicked)
        self.add(row(self.save, self.told, None, self.disk), self.auto, self.empty, self._list)
        self.add(row(self.more, None))
        services.jobs.job_changed.connect(self._on_job_changed)
        self._read_soon = debounced(self, 50, self._read)
        self.show_job(job)
        self._read_soon()

    # --- showing --------------------------------------------------------------------------------

    def show_job(self, job: JobRecord) -> None:
        """The job's row changed."""
        self.job = job
        config = job.params.get("config", {})
        self.auto.set_value(auto_save_of(config))
        runs = self._runs
        ended = job.status in ("interrupted", "failed")
        self.setVisible(job.kind == "train" and (runs or (ended and bool(self._found))))
        self.save.setVisible(runs)
        self.show_progress()

    def show_progress(self) -> None:
        """A tick: what became of a save or a load that was asked for."""
        jobs = self._services.jobs
        snapshot = jobs.snapshot(self.job.id)
        training = snapshot is not None and snapshot.phase == "train"
        able = training and jobs.generation(self.job.id) > 0 and self._idle
        if able != self.save.isEnabled():
            self.save.setEnabled(able)
            self._show_enabled()
        report = jobs.save_report(self.job.id)
        if self._asked is not None and report is not None and report.number > self._asked:
            self._asked = None
            if report.problem:
                self._say(f"Could not be saved: {report.problem}. The training goes on.", "red")
            else:
                self._say(f"Saved at step {report.step:,} ({formatting.size(report.bytes)})")
        elif self._asked is not None and not (self._runs and training):
            self._asked = None
            self._say("")
        if self._loading is not None and not self._checking and not jobs.going_back(self.job.id):
            step, self._loading = self._loading, None
            self._say(f"Back at step {step:,}. Resume goes on from here." if self._runs else "")
            self._read_soon()  # the newer ones are gone, and the job's row may not have changed

    @property
    def _runs(self) -> bool:
        owned = self._services.jobs.owns(self.job.id)
        return owned and self.job.status in ("running", "paused")

    @property
    def _idle(self) -> bool:
        return self._asked is None and self._loading is None

    def _say(self, text: str, tone: str = "emerald") -> None:
        self.told.setText(text)
        self.told.set_tone(tone)
        self._show_enabled()

    def _show_enabled(self) -> None:
        help = "Go back to this step and pause there" if self._runs else "Go on from this step"
        for entry in self.rows:
            entry.load.setToolTip(help)
            entry.load.setEnabled(self._idle)
            entry.delete.setEnabled(self._idle)

    # --- the list -------------------------------------------------------------------------------

    def _on_job_changed(self, job_id: int) -> None:
        if job_id == self.job.id:
            self._read_soon()

    def _read(self) -> None:
        if self.job.kind != "train":
            return
        if self._reading:
            self._again = True
            return
        self._reading = True
        self._presenter.read_checkpoints(self.job.id, self._on_read, self._on_read_failed)

    def _on_read(self, found: list[Checkpoint]) -> None:
        self._reading = False
        if found != self._found:
            self._found = found
            self._show_list()
            self.show_job(self.job)
        if self._again:
            self._again = False
            self._read_soon()

    def _on_read_failed(self, error: Exception) -> None:
        self._reading = False
        self._say(f"The checkpoints cannot be read: {_words(error)}", "red")

    def _show_list(self) -> None:
        found = self._found or []
        self.set_count(len(found))
        self.empty.setVisible(not found)
        self.disk.setText(
            formatting.size(sum(c.bytes for c in found)) + " on disk" if found else ""
        )
        best = best_of(found)
        before = {_key(entry.checkpoint, entry.best): entry for entry in self.rows}
        wanted = [(c, c.step == best) for c in (found if self._all else found[:SHOWN])]
        self.rows = []
        for place, key in enumerate(wanted):
            entry = before.pop(_key(*key), None) or self._row(*key)
            if self._list.indexOf(entry) != place:
                self._list.insertWidget(place, entry)
            self.rows.append(entry)
        for entry in before.values():
            self._list.removeWidget(entry)
            entry.hide()
            entry.deleteLater()
        self.more.setVisible(len(found) > len(self.rows))
        self.more.setText(f"Show all {len(found)}")
        self._show_enabled()

    def _row(self, checkpoint: Checkpoint, best: bool) -> CheckpointRow:
        entry = CheckpointRow(checkpoint, best)
        entry.load_wanted.connect(self._on_load_wanted)
        entry.delete_wanted.connect(self._on_delete_wanted)
        return entry

    def _on_more_clicked(self, checked: bool = False) -> None:
        self._all = True
        self._show_list()

    # --- commands -------------------------------------------------------------------------------

    def _on_save_clicked(self, checked: bool = False) -> None:
        report = self._services.jobs.save_report(self.job.id)
        self._asked = report.number if report else 0
        self._say("Saving…", "blue")
        self.save.setEnabled(False)
        self._services.jobs.save_now(self.job.id)

    def _on_auto_changed(self, auto: AutoSave) -> None:
        if auto == auto_save_of(self.job.params.get("config", {})):
            return
        try:
            self._services.jobs.save_every(self.job.id, auto)
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._say(auto_text(auto))

    def _on_load_wanted(self, step: int) -> None:
        newer = [c for c in self._found or [] if c.step > step]
        lost = f" and {_count(len(newer), 'newer checkpoint')}" if newer else ""
        what = f"What was learnt after step {step:,}{lost} is discarded. "
        what += "The training pauses there." if self._runs else "The training goes on from there."
        if not ConfirmDialog.ask(self, f"Go back to step {step:,}?", what, "Load"):
            return
        self._loading, self._checking = step, True
        self._say(f"Loading step {step:,}…", "blue")
        if self._runs:
            self._presenter.pick_checkpoint(
                self.job.id, step, self._on_picked, self._on_load_failed
            )
        else:
            self._presenter.take_up(self.job.id, step, self._on_taken_up, self._on_load_failed)

    def _on_picked(self, checkpoint: Checkpoint) -> None:
        self._checking = False
        if self._runs:
            self._services.jobs.roll_back(self.job.id, checkpoint.step)
        else:  # it ended meanwhile
            self._loading = None
            self._say("The training ended before it could go back.", "yellow")

    def _on_taken_up(self, record: JobRecord) -> None:
        step, self._loading, self._checking = self._loading, None, False
        self._say(f"Goes on from step {step:,}")
        self._presenter.take_over(record)

    def _on_load_failed(self, error: Exception) -> None:
        self._loading, self._checking = None, False
        self._say(_words(error), "red")
        self._read_soon()

    def _on_delete_wanted(self, step: int) -> None:
        what = f"Step {step:,} can then not be gone back to."
        if not self._runs and len(self._found or []) == 1:
            what += " It is the last one: the training can then only begin anew."
        if ConfirmDialog.ask(self, "Delete this checkpoint?", what):
            self._presenter.delete_checkpoint(
                self.job.id, step, self._on_deleted, self._on_load_failed
            )

    def _on_deleted(self, step: int) -> None:
        self._say(f"The checkpoint of step {step:,} was deleted")
        self._read_soon()
        QTimer.singleShot(0, self, self._focus_list)

    def _focus_list(self) -> None:
        """The button that had the focus is gone: keyboards go on at the section's head."""
        self.button.setFocus()


def about(checkpoint: Checkpoint) -> str:
    """`Loss: 0.2345 • 12:34:56 • 48 MB`; an em dash for what older versions did not write."""
    at = NO_LOSS
    if checkpoint.at:
        moment = datetime.fromisoformat(checkpoint.at).astimezone()
        today = moment.date() == datetime.now().astimezone().date()
        at = f"{moment:%H:%M:%S}" if today else f"{moment.day} {moment:%b %H:%M:%S}"
    loss = formatting.number(checkpoint.loss, 4)
    return f"Loss: {loss} • {at} • {formatting.size(checkpoint.bytes)}"


def best_of(found: Sequence[Checkpoint]) -> int | None:
    """The step with the lowest score; None where fewer than two can be compared."""
    scored = [(c.score, -c.step) for c in found if c.score is not None]
    return -min(scored)[1] if len(scored) > 1 else None


def auto_save_of(config: dict[str, object]) -> AutoSave:
    """How often a job's configuration says to save; defaults where it says nothing."""
    from mistudio.engine.training.config import TrainingConfig, parse

    try:
        found = parse(dict(config))
    except UserError:  # a job that failed for its configuration
        found = TrainingConfig()
    return AutoSave(found.autosave_steps, found.autosave_minutes)


def auto_text(auto: AutoSave) -> str:
    parts = [f"every {auto.steps:,} steps"] if auto.steps else []
    if auto.minutes:
        parts.append(f"every {_count(round(auto.minutes), 'minute')}")
    return f"From now on it saves {' and '.join(parts)}" if parts else "It saves no more by itself"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _words(error: Exception) -> str:
    known = explain(error)
    return f"{known.title}: {known.what}" if known else f"{type(error).__name__}: {error}"


def _key(checkpoint: Checkpoint, best: bool) -> tuple[object, ...]:
    """What a row shows: one that shows the same stays, with the focus that it may have."""
    return checkpoint.step, checkpoint.at, checkpoint.bytes, checkpoint.kept, best
