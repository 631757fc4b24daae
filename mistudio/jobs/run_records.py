"""The record of a run: everything that says how its SAEs came about, as JSON and to be printed."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio import device
from mistudio.engine.training import distributed
from mistudio.jobs.job import read_metrics
from mistudio.jobs.run_page import DEFINITIONS, page
from mistudio.library.library import Library
from mistudio.library.records import Tokenization, Training
from mistudio.library.table import now

if TYPE_CHECKING:
    from mistudio.engine.activations.source import ActivationSource
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.sae.site import Site
    from mistudio.engine.training.run import TrainedRun
    from mistudio.jobs.sources import Origin
    from mistudio.jobs.training import Train

FORMAT, VERSION = "mistudio.run", 1

# How a record names where its activations came from.
ORIGINS = {
    "stored": "stored activations",
    "stream": "streamed",
    "extract": "stored for this run",
    "hybrid": "stored for this run, in portions",
}


def run_record(
    library: Library,
    job: Train,
    model: HookedDecoder,
    tokenization: Tokenization,
    trained: TrainedRun,
    metrics: dict[Site, dict[str, Any]],
    source: ActivationSource,
    origin: Origin,
) -> dict[str, Any]:
    """What is known when a training ends; `run_record.schema.json` describes it.

    The caller adds `name`, `notes`, `events` and `wall_seconds`.
    """
    from mistudio.engine.models.methods import method_of
    from mistudio.jobs.models import precision_of

    dataset = library.datasets.get(job.dataset_id)
    record = library.models.get(job.model_id)
    split = tokenization.statistics.get("split_tokens", {})
    return _finite(
        {
            "format": FORMAT,
            "format_version": VERSION,
            "written_at": now(),
            "status": "stopped" if trained.stopped else "completed",
            "job": asdict(job),
            "configuration": {
                "given": dict(job.config),
                "derived": {site.name: made.plan.as_dict() for site, made in trained.sites.items()},
            },
            "seed": next(iter(trained.sites.values())).plan.config.seed,
            "hook_points": [
                {
                    "site": site.name,
                    "layer": site.layer,
                    "reads": site.input.name,
                    "writes": site.output.name,
                    "module": model.module_path(site.input),
                }
                for site in metrics
            ],
            "model": {
                "name": record.name,
                "source": record.source,
                "origin": record.origin,
                "revision": str(record.provenance.get("revision", "")),
                "precision": precision_of(model),
                "quantised_by": method_of(precision_of(model)),
                "files": record.provenance.get("weights", []),
                "provenance": record.provenance,
            },
            "dataset": {
                "name": dataset.name,
                "source": dataset.source,
                "origin": dataset.origin,
                "revision": str(dataset.provenance.get("revision", "")),
                "sha256": str(dataset.provenance.get("sha256", "")),
                "documents": dataset.documents,
                "provenance": dataset.provenance,
            },
            "tokenizer_hash": tokenization.tokenizer_hash,
            "tokenization": {
                "settings": tokenization.settings,
                "tokens": tokenization.tokens,
                "train_tokens": split.get("train"),
                "heldout_tokens": split.get("heldout"),
            },
            "source": ORIGINS[origin.kind],
            "dropped": asdict(source.dropped),
            "tokens": trained.tokens,
            "tokens_per_second": trained.tokens_per_second,
            "training_seconds": trained.seconds,
            "stopped": trained.stopped,
            "processes": distributed.current().size,
            "sites": {site.name: row for site, row in metrics.items()},
            "definitions": DEFINITIONS,
            "versions": device.versions(),
            "device": device.current().name,
            "device_kind": device.current().kind,
        }
    )


def printable_page(library: Library, training: Training) -> str:
    """A run's record as a page of HTML that needs nothing else."""
    folder = library.path(training.folder)
    known = {"name": training.name, "status": training.status, "wall_seconds": training.seconds}
    return page({**known, **training.record}, read_metrics(folder / "metrics.jsonl"))


def save_record(library: Library, training_id: int, path: Path, to_print: bool) -> Path:
    """Write a run's record, as JSON or as a page to print. Whole or not at all; OSError where that
    place cannot be written."""
    training = library.trainings.get(training_id)
    if to_print:
        text = printable_page(library, training)
    else:
        text = json.dumps(training.record, indent=1, ensure_ascii=False) + "\n"
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _finite(value: Any) -> Any:
    """As JSON has it: no NaN, no tuples."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
