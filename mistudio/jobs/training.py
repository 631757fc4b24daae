"""The training job: from a model and text to one dictionary per hook point."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mistudio
from mistudio import device
from mistudio.engine.progress import Progress, RolledBack
from mistudio.engine.training import distributed
from mistudio.errors import NotFound, is_out_of_memory
from mistudio.formatting import size
from mistudio.jobs import assist
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext, MetricLog, read_metrics
from mistudio.jobs.models import (
    check_layers,
    loaded_model,
    parse_points,
    unload_model,
)
from mistudio.jobs.run_records import run_record
from mistudio.jobs.sources import Origin, Text, choose, in_turns, open_source
from mistudio.jobs.stages import Stage, Within
from mistudio.jobs.tokenizing import text_for
from mistudio.library.library import Library
from mistudio.library.records import Model, Tokenization, Training
from mistudio.library.table import now

if TYPE_CHECKING:
    from mistudio.engine.activations.source import ActivationSource
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.sae.loss import LossRecovered
    from mistudio.engine.sae.site import Site
    from mistudio.engine.training.checkpoints import Checkpoint
    from mistudio.engine.training.planning import RunPlan
    from mistudio.engine.training.run import Saving, TrainedRun, TrainedSite

TRAIN_PARTS = {
    "prepare": (0.0, 0.05),
    "train": (0.05, 0.85),
    "calibrate": (0.85, 0.93),
    "judge": (0.93, 1.0),
}


EVENTS = "events.jsonl"  # beside the checkpoints


@dataclass(frozen=True)
class Train:
    """One dictionary per hook point learns from a dataset through a model.

    `hook_points` are what is read; a transcoder's output follows from its input. `extraction_id`
    names stored activations to learn from; without it `source` says how they come from the model
    (`jobs/sources.py`). `tokenization_id` names one of the dataset's tokenisations; without it the
    packed one is read. `config` holds fields of `TrainingConfig`; what is missing has its default.
    """

    model_id: int
    dataset_id: int
    hook_points: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    extraction_id: int | None = None
    name: str = ""
    loss_tokens: int = 8192
    source: str = "auto"
    tokenization_id: int | None = None

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
        tokens = text_for(
            library,
            work,
            self.dataset_id,
            self.model_id,
            Stage(context, "tokenize"),
            self.tokenization_id,
        )
        keep = library.checkpoint_folder(context.job_id)
        record = train(library, work, self, tokens, context, {}, keep)
        return {"training_id": record.id, "status": record.status}


def train(
    library: Library,
    work: Path,
    job: Train,
    tokenization: Tokenization,
    context: JobContext,
    stages: Mapping[str, Progress],
    keep: Path | None = None,
) -> Training:
    """Train, judge, save, commit. `stages` may bring the caller's own progress for `train` and
    `evaluate`. In `keep` lies what the training needs to go on where it was interrupted; what is
    there already it goes on from."""
    began = time.monotonic()
    learning = _Learning(library, job, tokenization, context, stages, keep)
    while True:
        try:
            trained = learning.run()
            source = learning.source
            stage = stages.get("evaluate") or Stage(context, "evaluate")
            model = loaded_model(library, job.model_id)
            losses = _losses(library, model, tokenization, source, trained, job, stage)
            break
        except RolledBack:
            pass  # the error holds what the training held: it must be gone first
        learning.roll_back()
    folder = work / "training"
    shutil.rmtree(folder, ignore_errors=True)
    metrics = {
        site: _save_site(library, folder, model, job, result, site, losses[site], source)
        for site, result in trained.sites.items()
    }
    if context.metrics:
        shutil.copy(context.metrics.path, folder / "metrics.jsonl")
    record = run_record(
        library, job, model, tokenization, trained, metrics, source, learning.origin
    )
    name = job.name or _default_name(library, job)
    seconds = learning.seconds_before + time.monotonic() - began
    record |= {
        "name": name,
        "wall_seconds": seconds,
        "notes": [*learning.notes, *trained.notes],
        "events": learning.events,
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / "run.json").write_text(text, encoding="utf-8")
    return _commit(
        library, folder, name, job, tokenization, record, metrics, context.job_id, seconds
    )


class _Learning:
    """The training itself: it goes on where it was, and takes another road where memory is short.

    After `run`, `source` is where the activations came from last, `notes` what the engine does
    not know.
    """

    def __init__(
        self,
        library: Library,
        job: Train,
        tokenization: Tokenization,
        context: JobContext,
        stages: Mapping[str, Progress],
        keep: Path | None,
    ) -> None:
        from mistudio.engine.training.config import derive, parse
        from mistudio.engine.training.run import sites_of

        self._library, self._job, self._context, self._keep = library, job, context, keep
        self._stages = stages
        self._config = parse(job.config)
        sites = sites_of(parse_points(job.hook_points), self._config)
        plan = derive(self._config, library.models.get(job.model_id).d_model)
        self._text = Text(
            library,
            job.model_id,
            tokenization,
            tuple(sorted({point for site in sites for point in site.points})),
            self._config.context,
            plan.steps * plan.batch_size,
        )
        self.source: ActivationSource
        self._inputs = tuple(site.input for site in sites)
        self.origin = choose(self._text, job.source, job.extraction_id)
        self.notes: list[str] = []
        self.seconds_before = 0.0
        self._begun = False

    def run(self) -> TrainedRun:
        reached = self._reached()
        found = self._found()
        if found:
            self.origin = Origin(**found.run["about"]["origin"])
            if not self._begun:
                self.seconds_before = found.run["seconds"]
                self._remember("went on", step=found.step, from_step=max(reached, found.step))
        self._begun = True
        if not found and self._job.source == "auto" and self.origin.kind == "stream" and self._keep:
            self._foresee()
        try:
            return self._train(found)
        except Exception as exc:
            # Only beside a model is there anything to be won, and only for one process.
            beside = self.origin.kind == "stream" and distributed.current().size == 1
            if not beside or self._keep is None or not is_out_of_memory(exc):
                raise
        # Outside of the handler: the error holds what the training held.
        unload_model()
        self.origin = in_turns(self._text, "extract", or_less=True)
        self._tell(
            "Out of memory with the model beside the training: activations are now stored first, "
            "then trained on."
        )
        found = self._found()
        return self._train(found, new_stream=found is not None)

    def roll_back(self) -> None:
        """Back to the checkpoint that the user chose, as if what came after had never been; the
        next `run` begins there, paused."""
        from mistudio.engine.training import checkpoints

        context = self._context
        step = context.control.accept_roll_back()
        if step is None or self._keep is None:
            return
        context.library.jobs.move(context.job_id, ("running",), "paused")
        reached = self._reached()
        try:
            checkpoints.rewind(self._keep, step)
        except NotFound as exc:  # it was deleted meanwhile
            self._tell(f"{exc.title}: {exc.what} The newest one is used.")
            return
        self._remember("rolled back", step=step, from_step=max(reached, step))

    def _reached(self) -> int:
        """How many steps had been done, as far as the metrics tell."""
        rows = read_metrics(self._keep / "metrics.jsonl") if self._keep else []
        return rows[-1]["step"] + 1 if rows else 0

    @property
    def events(self) -> list[dict[str, Any]]:
        """When the training was gone on with or rolled back."""
        return read_metrics(self._keep / EVENTS) if self._keep else []

    def _remember(self, event: str, **more: Any) -> None:
        assert self._keep is not None
        with (self._keep / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "at": now(), **more}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _foresee(self) -> None:
        """Take turns from the start where model and training cannot fit together. (On most
        systems main memory does not run out with an error: the process is killed.)"""
        from mistudio.jobs.plans import planned

        def plan(source: str) -> RunPlan | None:
            return planned(self._library, self._job.model_id, self._inputs, self._config, source)

        beside, apart = plan("stream"), plan("extract")
        if beside is None or apart is None or beside.fits or not apart.fits:
            return
        self.origin = in_turns(self._text, "extract", or_less=True)
        self._tell(
            f"The model and its training would need {size(beside.memory)} together, and "
            f"{size(beside.machine.memory_free)} are free: activations are stored first, then "
            "trained on."
        )

    def _found(self) -> Checkpoint | None:
        """The newest whole checkpoint; the metrics of what was learnt after it are dropped."""
        from mistudio.engine.training import checkpoints

        if self._keep is None:
            return None
        found, notes = checkpoints.newest(self._keep)
        for note in notes:
            self._tell(note)
        if found:
            self._tell(f"Going on from step {found.step:,}.", keep=False)
        self._keep.mkdir(parents=True, exist_ok=True)
        before = found.step if found else 0
        history = self._keep / "metrics.jsonl"
        if self._context.metrics:
            self._context.metrics.close()
        rows = [row for row in read_metrics(history) if row["step"] < before]
        self._context.metrics = MetricLog(history, rows)
        return found

    def _saving(self) -> Saving | None:
        from mistudio.engine.training.run import Saving

        if self._keep is None:
            return None
        about = {
            "origin": self.origin.as_dict(),
            "job": asdict(self._job),
            "tokenizer_hash": self._text.tokenization.tokenizer_hash,
            "versions": device.versions(),
        }
        return Saving(
            self._keep,
            self._context.wants_save,
            lambda: self._context.control.auto_save,
            self._on_saved,
            self._on_save_failed,
            self._on_ready,
            about,
        )

    def _on_saved(self, checkpoint: Checkpoint) -> None:
        if self._context.metrics:
            self._context.metrics.flush()
        if checkpoint.kept:
            self._context.report_save(checkpoint.step, checkpoint.bytes)
        self._library.note_change("jobs", self._context.job_id)

    def _on_save_failed(self, why: str, wanted: bool) -> None:
        if wanted:
            self._context.report_save(0, 0, why)

    def _on_ready(self) -> None:
        """Where it was rolled back to it waits for the user, who may have resumed it already."""
        control = self._context.control
        control.arrive()
        if not control.paused:
            self._library.jobs.move(self._context.job_id, ("paused",), "running")

    def _tell(self, text: str, keep: bool = True) -> None:
        if keep:
            self.notes.append(text)
        self._context.tell(text)

    def _train(self, found: Checkpoint | None, new_stream: bool = False) -> TrainedRun:
        from mistudio.engine.training import run as engine

        context, loading = self._context, self._stages.get("load")
        if not self.origin.takes_turns:
            loading = loading or Stage(context, "load model")
        stage = self._stages.get("train") or Stage(context, "train", TRAIN_PARTS)
        extraction_id, config = self._job.extraction_id, asdict(self._config)
        world = assist.call(self._text, self.origin, extraction_id, config, found, new_stream)
        self.source = open_source(
            self._text,
            self.origin,
            extraction_id,
            self._keep or context.work_folder,
            stage if self.origin.takes_turns or loading is None else loading,
        )
        return engine.train(
            self.source,
            self._config,
            heldout_tokens=len(self._text.store.heldout),
            progress=stage,
            record=context.record,
            wants_finish=context.wants_finish,
            saving=self._saving(),
            resume=found,
            new_stream=new_stream,
            world=world,
        )


def _losses(
    library: Library,
    model: HookedDecoder,
    tokenization: Tokenization,
    source: ActivationSource,
    trained: TrainedRun,
    job: Train,
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
            context=result.plan.config.context,
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
        hf_hook_name_out=model.module_path(site.output),
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


def _commit(
    library: Library,
    folder: Path,
    name: str,
    job: Train,
    tokenization: Tokenization,
    record: dict[str, Any],
    metrics: dict[Site, dict[str, Any]],
    job_id: int,
    seconds: float,
) -> Training:
    from mistudio.engine.training.config import parse

    target = library.new_folder("trainings", name)
    with library.commit(folder, target):
        training_id = library.trainings.add(
            name=name,
            model_id=job.model_id,
            dataset_id=job.dataset_id,
            tokenization_id=tokenization.id,
            extraction_id=job.extraction_id,
            job_id=job_id,
            status=record["status"],
            config=job.config,
            record=record,
            folder=target,
            seconds=seconds,
        )
        for site, row in metrics.items():
            library.saes.add(
                training_id=training_id,
                model_id=job.model_id,
                hook_point=site.input.name,
                hook_point_out=site.output.name,
                wiring=parse(job.config).wiring,
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
