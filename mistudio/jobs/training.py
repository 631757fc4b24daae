"""The training job: from a model and text to one dictionary per hook point."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mistudio
from mistudio import device
from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.datasets import tokenize
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import check_layers, loaded_model, parse_points, precision_of
from mistudio.jobs.stages import Stage, Within
from mistudio.library.library import Library
from mistudio.library.records import Extraction, Model, Tokenization, Training

if TYPE_CHECKING:
    from mistudio.engine.activations.source import ActivationSource
    from mistudio.engine.models.hooks import HookedDecoder, HookPoint
    from mistudio.engine.sae.loss import LossRecovered
    from mistudio.engine.sae.site import Site
    from mistudio.engine.training.run import TrainedRun, TrainedSite

TRAIN_PARTS = {
    "prepare": (0.0, 0.05),
    "train": (0.05, 0.85),
    "calibrate": (0.85, 0.93),
    "judge": (0.93, 1.0),
}


@dataclass(frozen=True)
class Train:
    """One dictionary per hook point learns from a dataset through a model.

    `extraction_id` names stored activations to learn from; without it they are streamed from the
    model. `config` holds fields of `TrainingConfig`; what is missing has its default.
    """

    model_id: int
    dataset_id: int
    hook_points: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    extraction_id: int | None = None
    name: str = ""
    loss_tokens: int = 8192

    kind: ClassVar[str] = "train"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("tokenize", 3),
        Phase("load model", 5),
        Phase("train", 100),
        Phase("evaluate", 25),
    )

    def title(self, library: Library) -> str:
        model = library.models.get(self.model_id)
        dataset = library.datasets.get(self.dataset_id)
        layers = ", ".join(map(str, layers_of(self.hook_points)))
        return f"Train on {model.name} + {dataset.name}, layer {layers}"

    def run(self, context: JobContext) -> dict[str, Any]:
        library, work = context.library, context.work_folder
        check_layers(library, self.model_id, self.hook_points)
        tokens = tokenize(library, work, self.dataset_id, self.model_id, Stage(context, "tokenize"))
        record = train(library, work, self, tokens, context, {})
        return {"training_id": record.id, "status": record.status}


def train(
    library: Library,
    work: Path,
    job: Train,
    tokenization: Tokenization,
    context: JobContext,
    stages: Mapping[str, Progress],
) -> Training:
    """Train, judge, save, commit. `stages` may bring the caller's own progress for `train` and
    `evaluate`."""
    from mistudio.engine.training import run as engine
    from mistudio.engine.training.config import parse

    began = time.monotonic()
    config = parse(job.config)
    points = parse_points(job.hook_points)
    model = loaded_model(library, job.model_id, stages.get("load") or Stage(context, "load model"))
    for point in points:
        model.check_point(point)
    source = _source(library, job, model, tokenization, points, config.context)
    stage = stages.get("train") or Stage(context, "train", TRAIN_PARTS)
    trained = engine.train(
        source,
        config,
        progress=stage,
        record=context.record,
        wants_finish=context.wants_finish,
    )
    stage = stages.get("evaluate") or Stage(context, "evaluate")
    losses = _losses(library, model, tokenization, source, trained, job, config.context, stage)
    folder = work / "training"
    metrics = {
        site: _save_site(library, folder, model, job, result, site, losses[site], source)
        for site, result in trained.sites.items()
    }
    history = work / "metrics.jsonl"
    if history.exists():
        shutil.copy(history, folder / "metrics.jsonl")
    record = _run_record(library, job, model, tokenization, trained, metrics, source)
    (folder / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return _commit(
        library,
        folder,
        job,
        tokenization,
        trained,
        record,
        metrics,
        context.job_id,
        time.monotonic() - began,
    )


def _source(
    library: Library,
    job: Train,
    model: HookedDecoder,
    tokenization: Tokenization,
    points: tuple[HookPoint, ...],
    context: int,
) -> ActivationSource:
    from mistudio.engine.activations.source import LiveActivations
    from mistudio.engine.activations.store import StoredActivations
    from mistudio.engine.datasets.tokens import TokenStore

    if job.extraction_id is None:
        store = TokenStore(library.path(tokenization.folder))
        return LiveActivations(model, store, points, context)
    extraction: Extraction = library.extractions.get(job.extraction_id)
    if extraction.model_id != job.model_id or extraction.tokenization_id != tokenization.id:
        raise InvalidInput(
            "These activations belong to another model or dataset",
            f"Extraction {extraction.id} was made from other inputs.",
            "Choose activations of this model and dataset, or stream them.",
            field="extraction_id",
        )
    missing = [point.name for point in points if point.name not in extraction.hook_points]
    if missing:
        raise InvalidInput(
            "These activations lack a layer",
            f"{', '.join(missing)} is not among {', '.join(extraction.hook_points)}.",
            "Extract that layer too, or stream from the model.",
            field="layers",
        )
    return StoredActivations(library.path(extraction.folder)).select(points)


def _losses(
    library: Library,
    model: HookedDecoder,
    tokenization: Tokenization,
    source: ActivationSource,
    trained: TrainedRun,
    job: Train,
    context: int,
    progress: Progress,
) -> dict[Site, LossRecovered]:
    """Cross-entropy with each dictionary spliced into the model, on held-out text."""
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.sae.loss import loss_recovered

    heldout = TokenStore(library.path(tokenization.folder)).heldout
    found = {}
    for number, (site, result) in enumerate(trained.sites.items()):
        share = Within(progress, number, len(trained.sites))
        found[site] = loss_recovered(
            model,
            heldout,
            site,
            result.dictionary.to(model.device),
            source.medians,
            context=context,
            max_tokens=job.loss_tokens,
            progress=share,
        )
    return found


def _save_site(
    library: Library,
    folder: Path,
    model: HookedDecoder,
    job: Train,
    result: TrainedSite,
    site: Site,
    loss: LossRecovered,
    source: ActivationSource,
) -> dict[str, Any]:
    from mistudio.engine.sae.files import save_sae

    metrics = {
        **result.quality.as_dict(),
        **{
            f"loss_{name}" if name == "tokens" else name: value
            for name, value in loss.as_dict().items()
        },
        "median_norm": source.medians[site.input],
        "train_fvu": result.train_fvu,
        "calibration_tokens": result.calibration_tokens,
        "revived": result.revived,
        "learning_rate": result.plan.learning_rate,
        "batch_size": result.plan.batch_size,
        "steps": result.plan.steps,
        "dead_window": result.plan.dead_window,
    }
    record = library.models.get(job.model_id)
    save_sae(
        result.dictionary,
        folder / site.name,
        site=site,
        model_name=public_name(record),
        hf_hook_name=model.module_path(site.input),
        context=result.plan.config.context,
        training_architecture=result.plan.config.sparsity,
        frequencies=result.frequencies,
        record={
            "metrics": metrics,
            "plan": result.plan.as_dict(),
            "model": {
                "name": record.name,
                "origin": record.origin,
                "provenance": record.provenance,
            },
        },
        version=mistudio.__version__,
    )
    return {
        **metrics,
        "d_in": result.dictionary.d_in,
        "d_sae": result.dictionary.d_sae,
        "k": result.plan.k,
        "architecture": result.dictionary.activation.name,
    }


def _run_record(
    library: Library,
    job: Train,
    model: HookedDecoder,
    tokenization: Tokenization,
    trained: TrainedRun,
    metrics: dict[Site, dict[str, Any]],
    source: ActivationSource,
) -> dict[str, Any]:
    """Everything that says how the run came about, kept beside the SAEs."""
    dataset = library.datasets.get(job.dataset_id)
    record = library.models.get(job.model_id)
    return {
        "job": asdict(job),
        "model": {
            "name": record.name,
            "origin": record.origin,
            "provenance": record.provenance,
            "precision": precision_of(model),
        },
        "dataset": {"name": dataset.name, "provenance": dataset.provenance},
        "tokenizer_hash": tokenization.tokenizer_hash,
        "source": "stored activations" if job.extraction_id is not None else "streamed",
        "dropped": asdict(source.dropped),
        "tokens": trained.tokens,
        "tokens_per_second": trained.tokens_per_second,
        "training_seconds": trained.seconds,
        "stopped": trained.stopped,
        "sites": {site.name: row for site, row in metrics.items()},
        "versions": device.versions(),
        "device": device.current().name,
    }


def _commit(
    library: Library,
    folder: Path,
    job: Train,
    tokenization: Tokenization,
    trained: TrainedRun,
    record: dict[str, Any],
    metrics: dict[Site, dict[str, Any]],
    job_id: int,
    seconds: float,
) -> Training:
    name = job.name or _default_name(library, job)
    target = library.new_folder("trainings", name)
    with library.commit(folder, target):
        training_id = library.trainings.add(
            name=name,
            model_id=job.model_id,
            dataset_id=job.dataset_id,
            tokenization_id=tokenization.id,
            extraction_id=job.extraction_id,
            job_id=job_id,
            status="stopped" if trained.stopped else "completed",
            config=job.config,
            record=record,
            folder=target,
            seconds=seconds,
        )
        for site, row in metrics.items():
            library.saes.add(
                training_id=training_id,
                model_id=job.model_id,
                hook_point=site.name,
                layer=site.layer,
                folder=f"{target}/{site.name}",
                architecture=row["architecture"],
                d_in=row["d_in"],
                d_sae=row["d_sae"],
                k=row["k"],
                metrics=row,
            )
    return library.trainings.get(training_id)


def public_name(model: Model) -> str:
    """The name that other libraries know a model by: its Hub id where it has one."""
    from mistudio.engine.models.sample import HUB_REPO

    return {"sample": HUB_REPO, "hub": model.origin}.get(model.source, model.name)


def layers_of(names: list[str]) -> list[int]:
    """The layers in hook points' names (`blocks.3.hook_resid_post`), for a title: needs no torch,
    so that the window may ask. Names that are none are left to `parse_points` to refuse."""
    parts = [name.split(".") for name in names]
    return sorted({int(part[1]) for part in parts if len(part) > 2 and part[1].isdigit()})


def _default_name(library: Library, job: Train) -> str:
    layers = "-".join(map(str, layers_of(job.hook_points)))
    return f"{library.models.get(job.model_id).name} layer {layers} {time.strftime('%H%M')}"
