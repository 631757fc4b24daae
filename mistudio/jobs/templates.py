"""Templates and presets: their names, what they are bound to, and their way out and in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from mistudio.engine.training.config import parse
from mistudio.jobs.template_files import KINDS, VERSION, Config, Entry
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Model, Template
from mistudio.library.table import now


@dataclass(frozen=True)
class Outcome:
    """What became of an entry: `added`, `replaced`, `kept` (the same was there) or `refused`."""

    entry: Entry
    result: str
    name: str = ""


# --- names ----------------------------------------------------------------------------------------


def training_name(config: Config, at: datetime | None = None) -> str:
    """`{encoder}_{expansion}x_{steps}steps_{HHMM}`, as in `sparse_8x_10000steps_1430`."""
    plan = parse(config.get("hyperparameters", {}))
    encoder = {"sae": "sparse", "skip_sae": "skip"}.get(plan.wiring, plan.wiring)
    size = f"{plan.width}latents" if plan.width else f"{plan.expansion:g}x"
    length = f"{plan.steps}steps" if plan.steps else f"{plan.tokens}tokens"
    return f"{encoder}_{size}_{length}_{_clock(at)}"


def extraction_name(config: Config, at: datetime | None = None) -> str:
    """`{type}_layers{min}-{max}_{samples}samples_{HHMM}`."""
    kind = "-".join(config.get("sites", [])) or "none"
    amount = config.get("max_documents")
    if amount:
        size = f"{amount}samples"
    else:
        size = f"{config['max_tokens']}tokens" if config.get("max_tokens") else "all"
    return f"{kind}_{_layers_name(config.get('layers', []))}_{size}_{_clock(at)}"


def steering_name(config: Config, at: datetime | None = None) -> str:
    """`steering_{n}features_layer{N}_{HHMM}`."""
    layers = sorted(set(config.get("layers", [])))
    where = f"layer{layers[0]}" if len(layers) == 1 else _layers_name(layers)
    return f"steering_{len(config.get('features', []))}features_{where}_{_clock(at)}"


def _layers_name(layers: Sequence[int]) -> str:
    return f"layers{min(layers)}-{max(layers)}" if layers else "no-layers"


def _clock(at: datetime | None) -> str:
    return (at or datetime.now()).strftime("%H%M")


def restore(library: Library, template: Template) -> None:
    """Bring a deleted one back to where it stood, under its name or one that is free now."""
    with library.transaction():
        values = {
            field.name: getattr(template, field.name)
            for field in fields(template)
            if field.name != "id" or library.templates.find(template.id) is None
        }
        values["name"] = library.templates.free_name(template.kind, template.name)
        library.templates.add(**values)


# --- what a template is bound to ------------------------------------------------------------------


def model_reference(model: Model) -> Config:
    """What names a model in any library."""
    return {
        "name": model.name,
        "source": model.source,
        "repository": model.origin if model.source == "hub" else "",
        "revision": model.provenance.get("revision", ""),
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "sha256": weights_hash(model),
    }


def weights_hash(model: Model) -> str:
    """SHA-256 of a model's weights, of their files' hashes where they are several; empty where it
    was not taken."""
    files = model.provenance.get("weights", [])
    hashes = [str(file.get("sha256", "")) for file in files if isinstance(file, dict)]
    if not hashes or not all(hashes):
        return str(model.provenance.get("sha256", ""))
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def dataset_reference(dataset: Dataset) -> Config:
    return {
        "name": dataset.name,
        "source": dataset.source,
        "repository": dataset.origin if dataset.source == "hub" else "",
        "revision": dataset.provenance.get("revision", ""),
        "sha256": dataset.provenance.get("sha256", ""),
    }


def find_model(library: Library, reference: Config) -> tuple[Model | None, str]:
    """The model that a template means, and a sentence where it is not exactly that one."""
    if not reference:
        return None, ""
    best = _best(library.models.all(), reference, _model_likeness)
    if best is None:
        return None, f"The model {reference.get('name') or '?'} is not in this library."
    weights, own = reference.get("sha256"), weights_hash(best)
    if weights and weights == own:
        return best, ""
    wanted, has = reference.get("revision"), best.provenance.get("revision", "")
    if wanted and has and wanted != has:
        return best, f"{best.name} has another revision ({has[:8]}, not {wanted[:8]})."
    if weights and own:
        return best, f"{best.name} has other weights than the model that was saved."
    return best, ""


def model_of_other_shape(library: Library, reference: Config) -> Model | None:
    """A model that goes by the same name or repository and cannot be the one that is meant."""
    return next(
        (
            model
            for model in library.models.all()
            if _likeness(model, reference) and not _has_shape(model, reference)
        ),
        None,
    )


def find_dataset(library: Library, reference: Config) -> tuple[Dataset | None, str]:
    """The dataset that a template means, and a sentence where it is not exactly that one."""
    if not reference:
        return None, ""
    best = _best(library.datasets.all(), reference, _dataset_likeness)
    if best is None:
        return None, f"The dataset {reference.get('name') or '?'} is not in this library."
    wanted, has = reference.get("sha256"), best.provenance.get("sha256", "")
    if wanted and has and wanted != has:
        return best, f"The text of {best.name} is not the same as in the template."
    return best, ""


def _best(found: Sequence[Any], reference: Config, likeness: Callable[[Any, Config], int]) -> Any:
    scored = [(likeness(record, reference), record) for record in found]
    return max((s for s in scored if s[0]), key=lambda s: s[0], default=(0, None))[1]


def _model_likeness(model: Model, reference: Config) -> int:
    if not _has_shape(model, reference):
        return 0
    weights = reference.get("sha256")
    same_weights = bool(weights) and weights == weights_hash(model)
    return 8 * same_weights + _likeness(model, reference)


def _has_shape(model: Model, reference: Config) -> bool:
    return all(
        reference.get(name) in (None, getattr(model, name)) for name in ("d_model", "n_layers")
    )


def _dataset_likeness(dataset: Dataset, reference: Config) -> int:
    same_text = bool(reference.get("sha256")) and (
        reference["sha256"] == dataset.provenance.get("sha256")
    )
    return 8 * same_text + _likeness(dataset, reference)


def _likeness(record: Any, reference: Config) -> int:
    repository, revision = reference.get("repository"), reference.get("revision")
    same_repository = bool(repository) and record.origin == repository
    same_revision = bool(revision) and record.provenance.get("revision") == revision
    return 4 * same_repository + 2 * same_revision + (record.name == reference.get("name"))


# --- writing --------------------------------------------------------------------------------------


def export_templates(library: Library, path: Path) -> int:
    """All templates and presets as one file; returns how many."""
    document: dict[str, Any] = {"version": VERSION, "exported_at": now()}
    count = 0
    for kind, key in KINDS.items():
        templates = library.templates.of_kind(kind)
        document[key] = [_as_entry(template) for template in templates]
        count += len(templates)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def export_name(at: datetime | None = None) -> str:
    return f"miStudio-templates-{(at or datetime.now()):%Y-%m-%d}.json"


def _as_entry(template: Template) -> Config:
    return {
        "name": template.name,
        "description": template.description,
        "is_favorite": template.favourite,
        "created_at": template.created_at,
        "updated_at": template.updated_at,
        "config": template.config,
    }


# --- into the library -----------------------------------------------------------------------------


def import_templates(
    library: Library, entries: Sequence[Entry], replace: bool = False
) -> list[Outcome]:
    """Add what can be used; all or, where the library fails, nothing. A name that is taken gets a
    number behind it; with `replace` the old one gets the new content instead."""
    outcomes = []
    with library.transaction():
        for entry in entries:
            outcomes.append(_import(library, entry, replace))
    return outcomes


def _import(library: Library, entry: Entry, replace: bool) -> Outcome:
    if entry.problem or entry.config is None:
        return Outcome(entry, "refused")
    old = library.templates.named(entry.kind, entry.name)
    if old is not None:
        if old.config == entry.config and old.description == entry.description:
            return Outcome(entry, "kept", old.name)
        if replace:
            library.templates.update(
                old.id,
                description=entry.description,
                favourite=entry.favourite,
                config=entry.config,
                updated_at=now(),
            )
            return Outcome(entry, "replaced", old.name)
    record_id = library.templates.save(
        entry.kind, entry.name, entry.description, entry.config, favourite=entry.favourite
    )
    return Outcome(entry, "added", library.templates.get(record_id).name)
