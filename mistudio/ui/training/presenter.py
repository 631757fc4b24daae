"""What the Training tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from PySide6.QtCore import QObject, Signal

from mistudio.device import Device
from mistudio.engine.training import checkpoints
from mistudio.engine.training.config import Plan, derive, parse
from mistudio.engine.training.cost import DeviceSpeed, probe_device
from mistudio.engine.training.footprint import Machine
from mistudio.engine.training.planning import Measured
from mistudio.errors import InvalidInput, UserError
from mistudio.jobs.job import take_up
from mistudio.jobs.speed import KIND as MEASURE
from mistudio.jobs.speed import Measure, earlier, forget_old, key_of, speed_key
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Dataset, Extraction, Model, Sae, Training
from mistudio.ui.pauses import set_imports_aside
from mistudio.ui.services import Services
from mistudio.ui.training.estimate import RUN_SOURCES, Computer, Corpus, Pace
from mistudio.ui.training.form import Check, Form, check

log = logging.getLogger(__name__)

# Kinds of jobs that train. Written out, since mistudio.jobs.kinds is slow to import.
TRAINING_KINDS = ("train", "demo")
ENDED_BADLY = ("failed", "interrupted", "cancelled")
CHEAP_SHARE = 0.125  # of the free memory; a model up to here is loaded to measure it unasked
# How a run's record names where its activations came from (`mistudio.jobs.training.ORIGINS`).
SOURCE_RECORDS = {
    "stored": "stored activations",
    "stream": "streamed",
    "extract": "stored for this run",
    "hybrid": "stored for this run, in portions",
}
_device_speed: list[DeviceSpeed] = []  # of this process' device, once it was looked at
GPU_SECONDS = 15.0  # between two looks at a GPU's free memory


@dataclass(frozen=True)
class Found:
    """What torch knows of this computer: its device, and why 8-bit optimisers cannot run on it
    ("" where they can)."""

    device: Device
    no_8bit: str


@dataclass(frozen=True)
class Run:
    """A finished training with its SAEs, and which of them have features."""

    training: Training
    saes: tuple[Sae, ...]
    model: str
    dataset: str
    discovered: frozenset[int]
    discovering: int | None

    @property
    def title(self) -> str:
        return f"{self.model} + {self.dataset}"


class TrainingPresenter(QObject):
    """The form's choices, the jobs that train, the runs that ended, and what can be done."""

    choices_changed = Signal()
    """Datasets, models or stored activations changed."""
    computer_changed = Signal()
    """What trainings run on is known now, or its free memory changed."""
    list_changed = Signal()
    """Jobs, runs or discoveries changed."""
    starting_changed = Signal(bool)
    """A job waits for the engine to be imported."""
    submitted = Signal(int)
    measuring_changed = Signal()
    """A measurement of the speed began, went on or ended; or another pace is known."""

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self._waiting: deque[Callable[[], int]] = deque()
        self._found: Found | None = None
        self._asking, self._asked = False, 0.0
        self._paces: dict[str, Pace | None] = {}
        self._measuring: tuple[int, dict[str, Any]] | None = None  # the job, and what it is for
        self._to_measure: tuple[Measure, dict[str, Any]] | None = None  # once the engine is there
        self._measuring_failed = ""
        self._probing = False
        services.jobs.job_finished.connect(self._on_job_finished)
        services.changes.changed.connect(self._on_changes_changed)

    # --- the form -------------------------------------------------------------------------------

    def datasets(self) -> list[Dataset]:
        return self._services.library.datasets.all()

    def models(self) -> list[Model]:
        return self._services.library.models.all()

    def extractions(self, model: Model | None, dataset: Dataset | None) -> list[Extraction]:
        """Stored activations of this model over this dataset, newest first."""
        if model is None or dataset is None:
            return []
        library = self._services.library
        stores = {record.id for record in library.tokenizations.of_dataset(dataset.id)}
        return [
            record
            for record in library.extractions.of_model(model.id)
            if record.tokenization_id in stores
        ]

    def check(self, form: Form) -> Check:
        self._look_at_computer()
        corpus = Corpus()
        if form.model and form.dataset:
            corpus = self._corpus(form.model, form.dataset)
        computer = self.computer(form.model)

        def pace_of(plan: Plan) -> Pace | None:
            return self._pace(form, plan, computer)

        return check(form, corpus, pace_of, computer)

    def _corpus(self, model: Model, dataset: Dataset) -> Corpus:
        for record in self._services.library.tokenizations.of_dataset(dataset.id):
            if record.statistics.get("tokenizer") == model.name:
                parts = record.statistics.get("split_tokens", {})
                return Corpus(parts.get("train", record.tokens), parts.get("heldout"))
        return Corpus()

    # --- how fast it would go -------------------------------------------------------------------

    def _pace(self, form: Form, plan: Plan, computer: Computer) -> Pace | None:
        """Of the newest measurement or earlier run of these sizes; both stay known, so that going
        back to old settings loses nothing."""
        if form.model is None or not form.layers:
            return None
        key = speed_key(form.model.id, form.points, plan)
        source = "stored" if form.extraction else RUN_SOURCES[form.source]
        place = json.dumps([key, source, computer.precision], sort_keys=True)
        if place not in self._paces:
            self._paces[place] = self._known_pace(key, source, form.model, computer.precision)
        return self._paces[place]

    def _known_pace(
        self, key: dict[str, Any], source: str, model: Model, precision: str
    ) -> Pace | None:
        library = self._services.library
        found = earlier(library, key)
        if found and precision not in (found["precision"], "auto") and model.precision != "auto":
            found = None
        names = ("forward", "step", "encode", "whole")
        measured = Measured(**{name: found[name] for name in names}) if found else Measured()
        at = _seconds(found["measured_at"]) if found else 0.0
        for run in library.trainings.all("model_id = ?", (model.id,)):
            job, speed = run.record.get("job", {}), run.record.get("tokens_per_second")
            if not speed or key_of(library, job) != key or _seconds(run.created_at) < at:
                continue
            if run.record.get("source") == SOURCE_RECORDS[source]:
                known = replace(measured, overall=speed)
                return Pace("earlier run", known, None, speed, at=_seconds(run.created_at))
        if found is None:
            return Pace("computed", device=_device_speed[0]) if _device_speed else None
        passes = 0.0 if source == "stored" else 1 / found["forward"]
        speed = 1 / (passes + 1 / found["step"])
        return Pace("measured", measured, None, speed, found["spread"], at)

    @property
    def measuring(self) -> bool:
        return self._measuring is not None or self._to_measure is not None

    @property
    def measuring_failed(self) -> str:
        """Why the last measurement gave nothing; "" where it did, or was stopped."""
        return self._measuring_failed

    @property
    def device_is_free(self) -> bool:
        """No job uses the device, in this window or beside it."""
        return not self.starting and not any(
            job.lane == "compute" for job in self._services.jobs.active()
        )

    def measurable(self, form: Form, found: Check) -> bool:
        """Whether a measurement would tell anything now."""
        run = found.estimate.run
        fits = run is not None and (run.fits or not found.doubt)
        return not found.blocker and found.plan is not None and fits and self.device_is_free

    def is_cheap(self, form: Form) -> bool:
        """Whether the model is loaded already, or so small that nobody minds."""
        if form.model is None:
            return False
        if engine_imported():
            loaded = sys.modules["mistudio.jobs.loaded"].loaded_models()
            if any(entry.model_id == form.model.id for entry in loaded):
                return True
        free = self.computer(form.model).machine.memory_free
        return form.model.parameters * 4 <= CHEAP_SHARE * free

    def measure(self, form: Form) -> None:
        """Queue a measurement of what the form describes; the one before it is stopped."""
        found = self.check(form)
        if not self.measurable(form, found):
            return
        assert form.model and form.dataset and found.plan
        model_id, dataset_id, points = form.model.id, form.dataset.id, form.points
        config, key = found.config, speed_key(model_id, points, found.plan)
        self.stop_measuring()
        self._to_measure = (Measure(model_id, dataset_id, points, config), key)
        self.measuring_changed.emit()
        if engine_imported():
            self._on_ready_to_measure()
        else:  # Start stays free meanwhile
            self._services.background.run(
                import_engine, self._on_ready_to_measure, self._on_engine_failed
            )

    def _on_ready_to_measure(self, _: object = None) -> None:
        """Unless something else was wanted while the engine was imported."""
        wanted, self._to_measure = self._to_measure, None
        if wanted is None or not self.device_is_free:
            self.measuring_changed.emit()
            return
        try:
            self._measuring, self._measuring_failed = (
                (self._services.jobs.submit(wanted[0]), wanted[1]),
                "",
            )
        except UserError as exc:
            self._measuring_failed = exc.what
        self.measuring_changed.emit()

    def look_at_speed(self) -> None:
        """Learn in the background what the device does in a second, once per process, so that a
        time can be computed where nothing of these sizes has run."""
        if _device_speed or self._probing or not self.device_is_free:
            return
        self._probing = True
        self._services.background.run(probe_speed, self._on_probed, self._on_not_probed)

    def _on_probed(self, speed: DeviceSpeed) -> None:
        self._probing = False
        _device_speed[:] = [speed]
        self._paces.clear()
        self.measuring_changed.emit()

    def _on_not_probed(self, error: Exception) -> None:
        """Times are then told where they were measured."""
        self._probing = False
        log.warning("The device's speed could not be measured", exc_info=error)

    def stop_measuring(self, unless: Form | None = None) -> None:
        """Stop what is measured, unless it is for just this form."""
        if not self.measuring:
            return
        key = (self._measuring or self._to_measure or (0, None))[1]
        plan = self.check(unless).plan if unless is not None and unless.model else None
        if plan and unless and unless.model:
            same = speed_key(unless.model.id, unless.points, plan) == key
            if same:
                return
        stopped, self._measuring, self._to_measure = self._measuring, None, None
        if stopped is not None:
            self._services.jobs.cancel(stopped[0])
        self.measuring_changed.emit()

    def _on_job_finished(self, job_id: int, status: str) -> None:
        library = self._services.library
        record = library.jobs.find(job_id)
        if record is None or record.kind != MEASURE:
            return
        if self._measuring and self._measuring[0] == job_id:
            self._measuring = None
            self._measuring_failed = record.error.get("what", "") if status == "failed" else ""
        forget_old(library)
        self._paces.clear()
        self.measuring_changed.emit()

    # --- the computer ---------------------------------------------------------------------------

    @property
    def no_8bit(self) -> str:
        """Why 8-bit optimisers cannot run here, as far as is known."""
        return self._found.no_8bit if self._found else ""

    def computer(self, model: Model | None) -> Computer:
        """What is free now, and in what precision the model is loaded. Until torch is there the
        computer counts as a CPU: what a GPU has only torch can tell, and the window does not wait
        for it."""
        memory = psutil.virtual_memory()
        found, host = self._found, None
        total, free = memory.total, memory.available
        if found and found.device.kind == "cuda":
            total, free, host = found.device.memory, found.device.free, memory.available
        disk = shutil.disk_usage(self._services.library.root).free
        machine = Machine(total, free, disk, host, ready=engine_imported())
        return Computer(machine, self._precision(model), self.no_8bit)

    def _precision(self, model: Model | None) -> str:
        """Of the weights. What "auto" becomes on a CPU is measured when a model is loaded: until
        a run has recorded it, the larger one counts. On a GPU it is a half precision."""
        if model is None or model.precision != "auto":
            return model.precision if model else "fp32"
        if self._found and self._found.device.kind != "cpu":
            return "fp16"
        for training in self._services.library.trainings.all("model_id = ?", (model.id,)):
            return str(training.record.get("model", {}).get("precision") or "fp32")
        return "fp32"

    def _look_at_computer(self) -> None:
        """Ask torch in the background, once it is imported; a GPU's free memory now and then."""
        now = time.monotonic()
        if self._found and (self._found.device.kind != "cuda" or now - self._asked < GPU_SECONDS):
            return
        if self._asking or "torch" not in sys.modules:
            return
        self._asking, self._asked = True, now
        self._services.background.run(find_computer, self._on_computer_found, self._on_not_found)

    def _on_computer_found(self, found: Found) -> None:
        self._asking = False
        changed, self._found = found != self._found, found
        if changed:
            self.computer_changed.emit()

    def _on_not_found(self, error: Exception) -> None:
        """The form goes on without; whatever is wrong with torch is told where it is needed."""
        log.warning("The device could not be looked at", exc_info=error)

    # --- the list -------------------------------------------------------------------------------

    def jobs(self) -> list[JobRecord]:
        """Training jobs that have not become a run: active, failed, interrupted, cancelled."""
        marks = ", ".join("?" for _ in TRAINING_KINDS)
        return self._services.library.jobs.all(
            f"kind IN ({marks}) AND status != 'finished'", TRAINING_KINDS
        )

    def runs(self) -> list[Run]:
        library = self._services.library
        models = {record.id: record.name for record in library.models.all()}
        datasets = {record.id: record.name for record in library.datasets.all()}
        discovered = {row["sae_id"] for row in library.rows("SELECT sae_id FROM feature_runs")}
        discovering = {
            job.params.get("sae_id"): job.id
            for job in self._services.jobs.active()
            if job.kind == "discover"
        }
        saes: dict[int, list[Sae]] = {}
        for sae in library.saes.all("training_id IS NOT NULL"):
            saes.setdefault(sae.training_id or 0, []).append(sae)
        runs = []
        for training in library.trainings.all():
            own = tuple(sorted(saes.get(training.id, []), key=lambda sae: (sae.layer, sae.id)))
            jobs = [discovering[sae.id] for sae in own if sae.id in discovering]
            runs.append(
                Run(
                    training,
                    own,
                    models.get(training.model_id, "deleted model"),
                    datasets.get(training.dataset_id, "deleted dataset"),
                    frozenset(sae.id for sae in own if sae.id in discovered),
                    min(jobs) if jobs else None,
                )
            )
        return runs

    def job_title(self, job: JobRecord) -> str:
        library = self._services.library
        model = library.models.find(job.params.get("model_id") or 0)
        dataset = library.datasets.find(job.params.get("dataset_id") or 0)
        return f"{model.name} + {dataset.name}" if model and dataset else job.title

    def job_plan(self, job: JobRecord) -> Plan | None:
        """What `derive` makes of a job for one site; None where its model is gone."""
        model = self._services.library.models.find(job.params.get("model_id") or 0)
        try:
            return derive(parse(job.params.get("config", {})), model.d_model) if model else None
        except UserError:
            return None

    def job_latents(self, job: JobRecord) -> int | None:
        """Latents of one site of a job."""
        plan = self.job_plan(job)
        return plan.d_sae if plan else None

    def read_history(
        self, training: Training, then: Callable[[Any], None], or_else: Callable[[Any], None]
    ) -> None:
        """Read a run's metric rows in the background; a run without a file has none."""
        path = self._services.library.path(training.folder) / "metrics.jsonl"
        self._services.background.run(lambda: read_metrics(path), then, or_else)

    # --- commands -------------------------------------------------------------------------------

    def start(self, form: Form, anyway: bool = False) -> None:
        """Queue the training that the form describes. InvalidInput where it cannot start or,
        unless `anyway`, where it does not fit."""
        found = self.check(form)
        if found.blocker:
            raise InvalidInput("The training cannot start", found.blocker)
        if found.doubt and not anyway:
            raise InvalidInput("The training does not fit", found.doubt)
        self.stop_measuring()  # the training waits in the same lane until it has ended
        assert form.model and form.dataset
        model_id, dataset_id = form.model.id, form.dataset.id
        points, config = form.points, found.config
        extraction_id = form.extraction.id if form.extraction else None
        source = form.source

        def submit() -> int:
            from mistudio.jobs.kinds import Train

            return self._services.jobs.submit(
                Train(model_id, dataset_id, points, config, extraction_id, source=source)
            )

        self._submit(submit)

    def retry(self, job: JobRecord) -> None:
        self._submit(lambda: self._services.jobs.retry(job))

    def go_on(self, job: JobRecord) -> None:
        self._submit(lambda: self._services.jobs.go_on(job))

    def discover(self, run: Run) -> None:
        """Queue a discovery pass for every SAE of the run that has none."""
        from mistudio.jobs.kinds import Discover

        for sae in run.saes:
            if sae.id not in run.discovered:
                self._services.jobs.submit(Discover(sae.id))

    def export(self, training: Training, parent: Path) -> Path:
        """Queue the export into a new folder inside `parent`; returns that folder."""
        from mistudio.jobs.kinds import Export

        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in training.name).strip("-.")
        target = parent / (slug or f"run-{training.id}")
        number = 2
        while target.exists():
            target = parent / f"{slug}-{number}"
            number += 1
        self._services.jobs.submit(Export(training.id, str(target)))
        return target

    def delete_refusal(self, training: Training) -> str:
        """Why a run cannot be deleted now; empty where it can."""
        saes = {sae.id for sae in self._services.library.saes.of_training(training.id)}
        users = [
            job.title
            for job in self._services.jobs.active()
            if job.params.get("training_id") == training.id or job.params.get("sae_id") in saes
        ]
        return f"A job uses it: {', '.join(users)}. Wait for it or cancel it." if users else ""

    def delete(self, training: Training) -> None:
        """Move a run, its SAEs and their features to the trash."""
        if refusal := self.delete_refusal(training):
            raise InvalidInput("This run is in use", refusal)
        self._services.library.discard("trainings", training.id)

    # --- checkpoints: files of unknown size, read in the background -----------------------------

    def read_checkpoints(
        self, job_id: int, then: Callable[[Any], None], or_else: Callable[[Any], None]
    ) -> None:
        """`then` gets a job's checkpoints, newest first."""
        folder = self._services.library.checkpoint_folder(job_id)
        self._services.background.run(lambda: checkpoints.listing(folder), then, or_else)

    def pick_checkpoint(
        self, job_id: int, step: int, then: Callable[[Any], None], or_else: Callable[[Any], None]
    ) -> None:
        """`then` gets the checkpoint where every byte of it is as it was written."""
        folder = self._services.library.checkpoint_folder(job_id)
        self._services.background.run(lambda: checkpoints.pick(folder, step), then, or_else)

    def delete_checkpoint(
        self, job_id: int, step: int, then: Callable[[Any], None], or_else: Callable[[Any], None]
    ) -> None:
        """`then` gets the step."""
        folder = self._services.library.checkpoint_folder(job_id)

        def delete() -> int:
            checkpoints.delete(folder, step)
            return step

        self._services.background.run(delete, then, or_else)

    def take_up(
        self, job_id: int, step: int, then: Callable[[Any], None], or_else: Callable[[Any], None]
    ) -> None:
        """An ended training will go on from this checkpoint; later ones are deleted. `then` gets
        its row and hands it to `take_over`."""
        library = self._services.library
        self._services.background.run(lambda: take_up(library, job_id, step), then, or_else)

    def take_over(self, record: JobRecord) -> None:
        self._submit(lambda: self._services.jobs.take_over(record))

    def save_record(
        self,
        training_id: int,
        path: Path,
        to_print: bool,
        then: Callable[[Any], None],
        or_else: Callable[[Any], None],
    ) -> None:
        """Write a run's record, as JSON or to print; `then` gets the path."""
        library = self._services.library

        def save() -> Path:
            from mistudio.jobs.run_records import save_record  # imports torch

            return save_record(library, training_id, path, to_print)

        self._services.background.run(save, then, or_else)

    # --- submitting without a pause of the window -----------------------------------------------

    @property
    def starting(self) -> bool:
        return bool(self._waiting)

    def _submit(self, submit: Callable[[], int]) -> None:
        """A training job's title needs the engine, whose first import takes seconds: it is done
        in the background, and the job is queued when it is there."""
        if engine_imported():
            self._run(submit)
            return
        self._waiting.append(submit)
        self.starting_changed.emit(True)
        self._services.background.run(
            import_engine, self._on_engine_imported, self._on_engine_failed
        )

    def _run(self, submit: Callable[[], int]) -> None:
        try:
            self.submitted.emit(submit())
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_engine_imported(self, _: object) -> None:
        while self._waiting:
            self._run(self._waiting.popleft())
        self.starting_changed.emit(False)

    def _on_engine_failed(self, error: Exception) -> None:
        self._waiting.clear()
        self.stop_measuring()
        self.starting_changed.emit(False)
        self._services.toasts.error(
            "The engine cannot be loaded",
            f"{type(error).__name__}: {error} Run `mistudio doctor` to see what is missing.",
        )

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("trainings", "models"):
            self._paces.clear()
            self.measuring_changed.emit()
        if table in ("datasets", "models", "extractions", "tokenizations"):
            self.choices_changed.emit()
        if table in ("jobs", "trainings", "saes", "feature_runs", "models", "datasets"):
            self.list_changed.emit()


def _seconds(at: str | None) -> float:
    """A record's time as `time.time` has it; 0 where there is none."""
    return datetime.fromisoformat(at).timestamp() if at else 0.0


def probe_speed() -> DeviceSpeed:
    """Imports torch and takes most of a second: for the background."""
    from mistudio import device

    return probe_device(device.current().kind)


def find_computer() -> Found:
    """Imports torch: for the background."""
    from mistudio import device

    found = device.current()
    no_8bit = ""
    if found.kind != "cuda":
        no_8bit = "8-bit Adam needs an NVIDIA GPU, and this computer has none. Choose Adam."
    elif find_spec("bitsandbytes") is None:
        no_8bit = "8-bit Adam needs the package bitsandbytes (pip install bitsandbytes)."
    return Found(found, no_8bit)


def engine_imported() -> bool:
    """Whether the engine is there as a whole (another thread may be half through importing it)."""
    hooks = sys.modules.get("mistudio.engine.models.hooks")
    return hasattr(hooks, "HookedDecoder") and "mistudio.jobs.kinds" in sys.modules


def import_engine() -> None:
    import mistudio.engine.models.hooks
    import mistudio.jobs.kinds  # noqa: F401

    set_imports_aside()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
