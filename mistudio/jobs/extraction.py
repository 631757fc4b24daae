"""The job that stores a model's activations, its plan, and what it keeps to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

from mistudio import device
from mistudio.engine.progress import Progress
from mistudio.errors import OutOfMemory
from mistudio.formatting import count, duration, size
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import check_layers, loaded_model, parse_points, precision_of
from mistudio.jobs.stages import Stage
from mistudio.jobs.tokenizing import text_for
from mistudio.library.library import Library
from mistudio.library.records import Extraction, Tokenization

if TYPE_CHECKING:
    from mistudio.engine.activations.plan import ExtractionPlan
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.models.hooks import HookedDecoder

KEPT = "extraction"  # in the job's checkpoint folder: the shards that are finished


@dataclass(frozen=True)
class Extract:
    """Activations of a model at some hook points are stored on disk.

    `max_samples` keeps to the dataset's first documents, `max_tokens` to so many tokens of them;
    None: all. `storage` is "fp16" or "bf16". `tokenization_id` names one of the dataset's
    tokenisations; without it the packed one is read. With `plan_only` the job ends with the plan.

    Run again after it was interrupted or failed, under its own number, it goes on with the shards
    that it has.
    """

    model_id: int
    dataset_id: int
    hook_points: list[str]
    max_tokens: int | None = 500_000
    context: int = 128
    batch_windows: int = 8
    seed: int = 0
    tokenization_id: int | None = None
    max_samples: int | None = None
    storage: str = "fp16"
    plan_only: bool = False

    kind: ClassVar[str] = "extract"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("tokenize", 3),
        Phase("load model", 5),
        Phase("measure", 2),
        Phase("extract", 100),
    )

    def title(self, library: Library) -> str:
        model = library.models.get(self.model_id)
        what = "Plan an extraction" if self.plan_only else "Extract activations"
        return f"{what} of {model.name} ({len(self.hook_points)} sites)"

    def run(self, context: JobContext) -> dict[str, Any]:
        library = context.library
        check_layers(library, self.model_id, self.hook_points)
        tokens = text_for(
            library,
            context.work_folder,
            self.dataset_id,
            self.model_id,
            Stage(context, "tokenize"),
            self.tokenization_id,
        )
        model = loaded_model(library, self.model_id, Stage(context, "load model"))
        plan = measure(library, model, self, tokens, Stage(context, "measure"))
        context.report(0, 1, note="Plan: " + "; ".join(describe(plan)) + ".")
        if self.plan_only:
            return {"plan": plan.as_dict()}
        # Beside the checkpoints of trainings: it outlives the process until the job is finished,
        # cancelled or put away.
        kept = library.checkpoint_folder(context.job_id)
        stage = Stage(context, "extract")
        record = extract(library, kept, model, self, tokens, stage, plan)
        return {
            "extraction_id": record.id,
            "tokens": record.tokens,
            "bytes": record.bytes,
            "plan": plan.as_dict(),
        }


def measure(
    library: Library,
    model: HookedDecoder,
    job: Extract,
    tokenization: Tokenization,
    progress: Progress,
) -> ExtractionPlan:
    """What the extraction will take, with the time of a batch that is really run.

    Raises InvalidInput where there is too little text, DiskFull and OutOfMemory where there is
    too little room.
    """
    from mistudio.engine.activations.extraction import check_storage, choose_windows
    from mistudio.engine.activations.plan import measured_plan
    from mistudio.engine.training.cost import shape_of_decoder

    check_storage(job.storage)
    points = parse_points(job.hook_points)
    for point in points:
        model.check_point(point)
    store = _store(library, tokenization)
    orders = choose_windows(store, job.context, job.max_tokens, job.max_samples, job.seed)
    plan = measured_plan(
        model,
        store,
        points,
        orders,
        shape_of_decoder(model),
        context=job.context,
        batch_windows=job.batch_windows,
        storage=job.storage,
        progress=progress,
    )
    library.require_space(plan.disk, "Storing these activations")
    _require_memory(plan)
    return plan


def _require_memory(plan: ExtractionPlan) -> None:
    """What comes on top of the loaded model must be free. The buffers lie in main memory."""
    parts = dict(plan.memory)
    host = parts.pop("rows to be written")
    on_device = parts["forward pass"] + parts["captured"]
    here = device.current()
    apart = here.kind == "cuda"
    free = psutil.virtual_memory().available
    for needed, have, where in (
        (host if apart else host + on_device, free, "memory"),
        (on_device if apart else 0, here.free, f"memory of the {here.name}"),
    ):
        if needed > have:
            raise OutOfMemory(
                "Not enough memory",
                f"Beside the loaded model this extraction needs {size(needed)} of {where}; "
                f"{size(have)} are free.",
                "Choose a smaller batch size or fewer layers, or close other programs.",
            )


def describe(plan: ExtractionPlan) -> list[str]:
    """The plan in short lines, for a dialog or the command line."""
    lines = [
        f"{count(plan.tokens)} tokens in {count(plan.batches)} batches",
        f"disk at most {size(plan.disk)}",
        f"memory {size(plan.memory_bytes)}",
    ]
    if plan.seconds is not None:
        speed = plan.tokens / max(plan.seconds, 1e-9)
        lines.append(f"about {duration(plan.seconds)} ({count(round(speed))} tokens/s, measured)")
    return lines


def extract(
    library: Library,
    work: Path,
    model: HookedDecoder,
    job: Extract,
    tokenization: Tokenization,
    progress: Progress,
    plan: ExtractionPlan | None = None,
) -> Extraction:
    """Store activations and their record. Needs the disk space up front; goes on with what
    `work` holds of the same extraction."""
    from mistudio.engine.activations import store as activations
    from mistudio.engine.activations.extraction import choose_windows

    points = parse_points(job.hook_points)
    for point in points:
        model.check_point(point)
    store = _store(library, tokenization)
    orders = choose_windows(store, job.context, job.max_tokens, job.max_samples, job.seed)
    folder = work / KEPT
    folder.mkdir(parents=True, exist_ok=True)
    n_tokens = sum(map(len, orders.values())) * job.context
    needed = activations.estimate_bytes(n_tokens, [model.width(point) for point in points])
    library.require_space(max(0, needed - _bytes(folder)), "Storing these activations")
    meta = activations.extract(
        model,
        store,
        points,
        folder,
        max_tokens=job.max_tokens,
        max_samples=job.max_samples,
        context=job.context,
        batch_windows=job.batch_windows,
        precision=precision_of(model),
        storage=job.storage,
        seed=job.seed,
        progress=progress,
    )
    record = library.models.get(job.model_id)
    target = library.new_folder("activations", record.name)
    with library.commit(folder, target):
        extraction_id = library.extractions.add(
            model_id=job.model_id,
            tokenization_id=tokenization.id,
            hook_points=list(meta.points),
            settings={**asdict(job), "precision": meta.precision},
            folder=target,
            tokens=sum(meta.tokens.values()),
            bytes=_bytes(library.path(target)),
            statistics=_statistics(meta, plan),
        )
    return library.extractions.get(extraction_id)


def _statistics(meta: Any, plan: ExtractionPlan | None) -> dict[str, Any]:
    found: Mapping[str, Any] = {
        "sites": meta.statistics,
        "tokens": meta.tokens,
        "medians": meta.medians,
        "dropped_special": meta.dropped_special,
        "dropped_outliers": meta.dropped_outliers,
        "scales": meta.scales,
        "storage": meta.storage,
    }
    return {**found, "plan": plan.as_dict()} if plan is not None else dict(found)


def _store(library: Library, tokenization: Tokenization) -> TokenStore:
    from mistudio.engine.datasets.tokens import TokenStore

    return TokenStore(library.path(tokenization.folder))


def _bytes(folder: Path) -> int:
    """Of all files, the mark apart that a committed folder carries until its row is there."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    return sum(file.stat().st_size for file in files)
