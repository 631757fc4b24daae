"""What an extraction of a model's activations would take, and starting it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject, Signal

from mistudio import formatting
from mistudio.errors import InvalidInput
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Model
from mistudio.ui.models.presenter import layer_of
from mistudio.ui.services import Services
from mistudio.ui.times import seconds_between

if TYPE_CHECKING:
    from mistudio.engine.models.architecture import Architecture
    from mistudio.jobs.extraction import Extract


@dataclass(frozen=True)
class ExtractionForm:
    """What the dialog asks for; None: no limit."""

    dataset_id: int
    hook_points: tuple[str, ...]
    max_samples: int | None = 1000
    max_tokens: int | None = None
    context: int = 128
    batch_windows: int = 32
    storage: str = "fp16"

    def job(self, model_id: int, plan_only: bool = False) -> Extract:
        from mistudio.jobs.kinds import Extract

        return Extract(
            model_id=model_id,
            dataset_id=self.dataset_id,
            hook_points=list(self.hook_points),
            max_tokens=self.max_tokens,
            max_samples=self.max_samples,
            context=self.context,
            batch_windows=self.batch_windows,
            storage=self.storage,
            plan_only=plan_only,
        )

    @property
    def work(self) -> tuple[object, ...]:
        """What the time of a batch depends on."""
        return self.dataset_id, self.hook_points, self.context, self.batch_windows, self.storage


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction would take of a model at `precision`. `exact` is False where the dataset
    has not been tokenised for the model yet: all are estimates then. `parts` are those of `memory`.
    `measured`: `seconds` come of a batch that was run, not of an earlier extraction. `refusal`
    says why it cannot start."""

    tokens: int
    exact: bool
    bytes: int
    free: int
    batches: int
    memory: int
    parts: dict[str, int]
    memory_free: int
    precision: str
    seconds: float | None = None
    measured: bool = False
    refusal: str = ""

    def timed(self, batch_seconds: float) -> ExtractionPlan:
        return replace(self, seconds=self.batches * batch_seconds, measured=True)


class ExtractPresenter(QObject):
    """The plan of an extraction of one model, its time measured, and starting it."""

    plan_ready = Signal(object)
    plan_failed = Signal(object)

    def __init__(self, services: Services, model: Model, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.model = model
        self._wanted: ExtractionForm | None = None
        self._busy = False
        self._batch_seconds: dict[tuple[object, ...], float] = {}

    def exists(self) -> bool:
        return self._services.library.models.find(self.model.id) is not None

    def datasets(self) -> list[Dataset]:
        return self._services.library.datasets.all()

    def running_job(self) -> JobRecord | None:
        """An extraction of this model that this process runs or queues."""
        for job in self._services.jobs.active():
            mine = job.kind == "extract" and job.params.get("model_id") == self.model.id
            if mine and not job.params.get("plan_only"):
                return job if self._services.jobs.owns(job.id) else None
        return None

    def plan(self, form: ExtractionForm) -> None:
        """Work the plan out in the background; `plan_ready` brings (form, plan). While one is
        worked out, only the newest of later forms is kept."""
        self._wanted = form
        if not self._busy:
            self._next_plan()

    def _next_plan(self) -> None:
        form, self._wanted = self._wanted, None
        if form is None:
            return
        self._busy = True
        library, model = self._services.library, self.model
        self._services.background.run(
            lambda: (form, plan_extraction(library, model, form)), self._on_planned, self._on_failed
        )

    def _on_planned(self, result: tuple[ExtractionForm, ExtractionPlan]) -> None:
        self._busy = False
        if self._wanted is not None:
            self._next_plan()
            return
        form, plan = result
        seconds = self._batch_seconds.get(form.work)
        self.plan_ready.emit((form, plan if seconds is None else plan.timed(seconds)))

    def _on_failed(self, error: Exception) -> None:
        self._busy = False
        if self._wanted is None:
            self.plan_failed.emit(error)
        else:
            self._next_plan()

    def measure(self, form: ExtractionForm) -> int:
        """Queue the job that runs a batch and tells its time."""
        return self._services.jobs.submit(form.job(self.model.id, plan_only=True))

    def take_measured(self, form: ExtractionForm, result: dict[str, Any]) -> None:
        """What `measure` found holds for every limit."""
        self._batch_seconds[form.work] = float(result["plan"]["batch_seconds"])

    def start(self, form: ExtractionForm) -> int:
        return self._services.jobs.submit(form.job(self.model.id))


@lru_cache(maxsize=4)
def _architecture(folder: Path) -> Architecture:
    from mistudio.engine.models.architecture import read_architecture

    return read_architecture(folder)


def plan_extraction(library: Library, model: Model, form: ExtractionForm) -> ExtractionPlan:
    """Tokens, disk, memory and time of an extraction; imports torch, so never in the window's
    thread."""
    from mistudio import device
    from mistudio.engine.activations import plan as engine
    from mistudio.engine.models.memory import plan_model, shape_of
    from mistudio.jobs.loaded import chosen_precision, loaded_models, machine

    architecture = _architecture(library.path(model.folder))
    here = machine(library)
    kind = device.current().kind
    precision = chosen_precision(library, model)
    shape = shape_of(architecture, plan_model(architecture, precision, here, device=kind))
    windows, exact, refusal = _windows(library, model, form)
    found = engine.plan_extraction(
        windows, form.context, form.batch_windows, [model.d_model] * len(form.hook_points), shape
    )
    parts = dict(found.memory)
    parts.pop("PyTorch")  # runs already
    here_free = device.current().free
    if any(entry.model_id == model.id for entry in loaded_models()):
        here_free += parts["model"]  # is counted as needed, and taken already
    memory = sum(parts.values())
    free = shutil.disk_usage(library.root).free
    if not refusal and free < found.disk * 1.1:  # as Library.require_space will judge
        refusal = (
            f"Not enough disk space: {formatting.size(found.disk)} are needed and a tenth more as "
            f"headroom, {formatting.size(free)} are free where the library lies. Choose less text "
            "or fewer layers, or free some space."
        )
    if not refusal and memory > here_free:
        refusal = (
            f"Not enough memory: {formatting.size(memory)} are needed, {formatting.size(here_free)}"
            " are free. Choose a smaller batch or fewer layers, or close other programs."
        )
    return ExtractionPlan(
        tokens=found.tokens,
        exact=exact,
        bytes=found.disk,
        free=free,
        batches=found.batches,
        memory=memory,
        parts=parts,
        memory_free=here_free,
        precision=precision,
        seconds=_seconds(library, model, form, found.tokens),
        refusal=refusal,
    )


def _windows(
    library: Library, model: Model, form: ExtractionForm
) -> tuple[dict[str, int], bool, str]:
    """Windows by split, whether they are exact, and why there are too few."""
    from mistudio.engine.activations.extraction import choose_windows
    from mistudio.engine.datasets.tokenizers import hash_tokenizer
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.jobs.tokenizing import PACKED

    dataset = library.datasets.get(form.dataset_id)
    wanted = hash_tokenizer(library.path(model.folder))
    for tokenization in library.tokenizations.of_dataset(dataset.id):
        if tokenization.tokenizer_hash == wanted and tokenization.settings == PACKED.key():
            store = TokenStore(library.path(tokenization.folder))
            try:
                orders = choose_windows(store, form.context, form.max_tokens, form.max_samples)
            except InvalidInput as exc:
                return {"train": 0, "heldout": 0}, True, f"{exc.what} {exc.next_step}".strip()
            return {split: len(order) for split, order in orders.items()}, True, ""
    bound = dataset.bytes  # a token is at least a byte
    if form.max_samples is not None and dataset.documents:
        bound = round(bound * min(1.0, form.max_samples / dataset.documents))
    if form.max_tokens is not None:
        bound = min(bound, form.max_tokens)
    return {"train": max(1, bound // form.context), "heldout": 0}, False, ""


def _seconds(library: Library, model: Model, form: ExtractionForm, tokens: int) -> float | None:
    """By the speed of this model's last extraction; a forward pass ends at the deepest layer."""
    for job in library.jobs.all("kind = 'extract' AND status = 'finished'"):
        took = seconds_between(job.started_at, job.ended_at)
        if job.params.get("model_id") != model.id or not took or not job.result.get("tokens"):
            continue
        before = 1 + max(layer_of(point) for point in job.params["hook_points"])
        now = 1 + max((layer_of(point) for point in form.hook_points), default=0)
        return took * tokens / job.result["tokens"] * now / before
    return None
