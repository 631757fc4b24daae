"""What is compared, as plain data from the library: runs, trainings under way, imported SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistudio.engine.training.compare import Setting, effective
from mistudio.engine.training.config import Plan, derive, option, parse
from mistudio.errors import UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.records import Model, Sae, Training
from mistudio.ui.training.charts import site_label
from mistudio.ui.training.estimate import rate
from mistudio.ui.training.form import (
    NAMES,
    OPEN,
    choice_text,
    point_title,
    times,
    written,
)

# What is no hyper-parameter and yet tells runs apart.
FACTS = {
    "model": ("Model", "The language model whose activations are learnt."),
    "weights": ("Version of the model", "The revision on the Hub, or a hash of the weights."),
    "precision": ("Precision of the model", "In what numbers the model was run."),
    "dataset": ("Dataset", "The text that was learnt from."),
    "tokenisation": ("Tokenisation", "Which token store of the dataset was read."),
    "sites": ("Layers and sites", "Where in the model the dictionaries read."),
    "source": ("Activations", "How the activations came from the model."),
    "stopped": ("Ended", "Whether it was trained to its end or stopped and kept."),
    "processes": ("Processes", "How many computed together."),
    "device": ("Device", "What it was trained on."),
}


@dataclass(frozen=True)
class Subject:
    """One dictionary. `site` names its curve; `conditions` are what `unfair` looks at, `told` the
    same in words."""

    name: str
    site: str
    metrics: Mapping[str, Any]
    conditions: Mapping[str, Any]
    told: Mapping[str, str]


@dataclass(frozen=True)
class Compared:
    """A run, a training under way, or an imported SAE. `history` is the file of its metric rows
    (None: there is none), `job_id` that of a training under way; `latents` by site."""

    key: tuple[str, int]
    name: str
    settings: Mapping[str, Setting]
    subjects: tuple[Subject, ...]
    history: Path | None = None
    job_id: int | None = None
    latents: Mapping[str, int] = field(default_factory=dict)


def gather(library: Library, keys: Sequence[tuple[str, int]]) -> list[Compared]:
    """`keys`: ("run" | "job" | "sae", number of the row); what is gone is left out."""
    makers = {"run": _of_run, "job": _of_job, "sae": _of_imported}
    taken: set[str] = set()
    found = []
    for kind, number in keys:
        if (one := makers[kind](library, number, taken)) is not None:
            found.append(one)
    return found


def _free(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    taken.add(free)
    return free


# --- a run ----------------------------------------------------------------------------------------


def _of_run(library: Library, number: int, taken: set[str]) -> Compared | None:
    training = library.trainings.find(number)
    if training is None:
        return None
    saes = library.saes.of_training(number)
    name = _free(training.name, taken)
    model = library.models.find(training.model_id)
    plan = _plan(training.config, model, training.record.get("sites", {}))
    facts = _run_facts(library, training, model, saes)
    common, told = _run_conditions(library, training, model, plan)
    several = len(saes) > 1
    return Compared(
        key=("run", number),
        name=name,
        settings={**facts, **_settings(training.config, plan)},
        subjects=tuple(_subject(name, sae, common, told, several) for sae in saes),
        history=library.path(training.folder) / "metrics.jsonl",
        latents={sae.hook_point: sae.d_sae for sae in saes},
    )


def _plan(
    config: Mapping[str, Any], model: Model | None, sites: Mapping[str, Mapping[str, Any]]
) -> Plan | None:
    """What was derived: as recorded where it was, since a later version may derive otherwise."""
    recorded = next(iter(sites.values()), {})
    width = recorded.get("d_in") or (model.d_model if model else None)
    if not width:
        return None
    try:
        plan = derive(parse(dict(config)), width)
    except UserError:
        return None
    names = ("d_sae", "learning_rate", "batch_size", "steps", "dead_window")
    kept = {name: recorded[name] for name in names if recorded.get(name)}
    return Plan(**{**{f: getattr(plan, f) for f in Plan.__dataclass_fields__}, **kept})


def _settings(config: Mapping[str, Any], plan: Plan | None) -> dict[str, Setting]:
    try:
        return effective(config, plan)
    except UserError:  # of another version: what it says is shown as it is
        return {name: Setting(value) for name, value in config.items() if name in NAMES}


def _run_facts(
    library: Library, training: Training, model: Model | None, saes: Sequence[Sae]
) -> dict[str, Setting]:
    record = training.record
    dataset = library.datasets.find(training.dataset_id)
    wiring = str(training.config.get("wiring", "sae"))
    values = {
        "model": model.name if model else _inside(record, "model", "name"),
        "weights": _weights_text(_inside(record, "model", "provenance")),
        "precision": str(_inside(record, "model", "precision") or "").upper(),
        "dataset": dataset.name if dataset else _inside(record, "dataset", "name"),
        "tokenisation": _layout(library, training.tokenization_id),
        "sites": ", ".join(point_title(sae.hook_point, wiring) for sae in saes),
        "source": record.get("source"),
        "stopped": "Stopped and kept" if training.status == "stopped" else "Trained to its end",
        "processes": record.get("processes"),
        "device": record.get("device"),
    }
    facts = {name: Setting(value) for name, value in values.items() if value}
    versions = record.get("versions") or {}
    return {**facts, **{f"version {name}": Setting(value) for name, value in versions.items()}}


def _inside(record: Mapping[str, Any], *names: str) -> Any:
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _layout(library: Library, tokenization_id: int) -> str:
    found = library.tokenizations.find(tokenization_id)
    if found is None:
        return f"no. {tokenization_id}"
    layout = found.statistics.get("layout")
    return f"no. {found.id}: {layout}" if layout else f"no. {found.id}"


def _weights_text(provenance: Any) -> str:
    """The revision, else the first hash of the weights."""
    if not isinstance(provenance, Mapping):
        return ""
    if revision := provenance.get("revision"):
        return str(revision)[:12]
    for file in provenance.get("weights") or ():
        if isinstance(file, Mapping) and file.get("sha256"):
            return f"{str(file['sha256'])[:12]} (SHA-256)"
    return ""


def _weights_key(model: Model | None, fallback: object) -> Any:
    """What tells models apart: their weights, where their hashes are known (the same model may
    stand in the library twice), else the row."""
    files = model.provenance.get("weights") if model else None
    hashes = [f.get("sha256") for f in files or () if isinstance(f, Mapping)]
    return sorted(map(str, hashes)) if hashes and all(hashes) else fallback


def _run_conditions(
    library: Library, training: Training, model: Model | None, plan: Plan | None
) -> tuple[dict[str, Any], dict[str, str]]:
    dataset = library.datasets.find(training.dataset_id)
    context = plan.config.context if plan else training.config.get("context")
    precision = _inside(training.record, "model", "precision")
    conditions = {
        "model": _weights_key(model, training.model_id),
        "precision": precision,
        "dataset": training.dataset_id,
        "tokenisation": training.tokenization_id,
        "context": context,
    }
    told = {
        "model": model.name if model else "a deleted model",
        "precision": str(precision).upper(),
        "dataset": dataset.name if dataset else "a deleted dataset",
        "tokenisation": _layout(library, training.tokenization_id),
        "context": f"{context} tokens",
    }
    return conditions, told


def _subject(
    name: str, sae: Sae, common: Mapping[str, Any], told: Mapping[str, str], several: bool
) -> Subject:
    label = site_label(sae.hook_point)
    more = {
        "reads": sae.hook_point,
        "writes": sae.hook_point_out,
        "tokens": sae.metrics.get("tokens"),
        "loss_tokens": sae.metrics.get("loss_tokens"),
    }
    words = {key: f"{v:,}" if isinstance(v, int) else str(v) for key, v in more.items()}
    words |= {key: point_title(str(more[key])) for key in ("reads", "writes")}
    return Subject(
        name=f"{name} • {label}" if several else name,
        site=sae.hook_point,
        metrics=sae.metrics,
        conditions={**common, **more},
        told={**told, **words},
    )


# --- a training under way -------------------------------------------------------------------------


def _of_job(library: Library, number: int, taken: set[str]) -> Compared | None:
    job = library.jobs.find(number)
    if job is None:
        return None
    params = job.params
    model = library.models.find(params.get("model_id") or 0)
    dataset = library.datasets.find(params.get("dataset_id") or 0)
    config = params.get("config") or {}
    plan = _plan(config, model, {})
    points = [str(name) for name in params.get("hook_points") or ()]
    wiring = str(config.get("wiring", "sae"))
    name = _free(_job_name(job, model), taken)
    facts = {
        "model": model.name if model else None,
        "weights": _weights_text(model.provenance) if model else None,
        "dataset": dataset.name if dataset else None,
        "sites": ", ".join(point_title(point, wiring) for point in points),
    }
    conditions = {"model": _weights_key(model, model.id if model else None),
                  "dataset": dataset.id if dataset else None,
                  "context": plan.config.context if plan else None}  # fmt: skip
    told = {"model": str(facts["model"]), "dataset": str(facts["dataset"]),
            "context": f"{conditions['context']} tokens"}  # fmt: skip
    subjects = tuple(
        Subject(
            f"{name} • {site_label(point)}" if len(points) > 1 else name,
            point,
            {},
            {**conditions, "reads": point},
            {**told, "reads": point_title(point)},
        )
        for point in points
    )
    return Compared(
        key=("job", number),
        name=name,
        settings={**{k: Setting(v) for k, v in facts.items() if v}, **_settings(config, plan)},
        subjects=subjects,
        job_id=number,
        latents=dict.fromkeys(points, plan.d_sae if plan else 0),
    )


def _job_name(job: JobRecord, model: Model | None) -> str:
    status = "in training" if job.active else job.status
    return job.params.get("name") or f"{model.name if model else job.title} ({status})"


# --- an imported SAE ------------------------------------------------------------------------------


def _of_imported(library: Library, number: int, taken: set[str]) -> Compared | None:
    sae = library.saes.find(number)
    if sae is None:
        return None
    model = library.models.find(sae.model_id)
    name = _free(sae.name or sae.hook_point, taken)
    measured = sae.metrics.get("measured") or {}
    facts = {
        "model": model.name if model else None,
        "weights": _weights_text(model.provenance) if model else None,
        "sites": point_title(sae.hook_point, sae.wiring),
        "sparsity": sae.architecture,
        "wiring": sae.wiring,
        "width": sae.d_sae,
        "k": f"{sae.k:g}" if sae.k else None,
    }
    if sae.k and float(sae.k).is_integer():
        facts["k"] = int(sae.k)
    conditions = {
        "model": _weights_key(model, sae.model_id),
        "precision": measured.get("precision"),
        "dataset": measured.get("dataset_id"),
        "tokenisation": measured.get("tokenization_id"),
        "context": measured.get("context"),
    }
    tokenization = measured.get("tokenization_id")
    told = {
        "model": model.name if model else "a deleted model",
        "precision": str(measured.get("precision")).upper(),
        "dataset": str(measured.get("dataset")),
        "tokenisation": _layout(library, tokenization) if tokenization else "",
        "context": f"{measured.get('context')} tokens",
    }
    return Compared(
        key=("sae", number),
        name=name,
        settings={key: Setting(value) for key, value in facts.items() if value},
        subjects=(_subject(name, sae, conditions, told, several=False),),
    )


# --- settings in words ----------------------------------------------------------------------------


def setting_label(name: str) -> tuple[str, str]:
    """(label, help) of a hyper-parameter or a fact."""
    if name in FACTS:
        return FACTS[name]
    if name in NAMES:
        return option(name)["label"], option(name)["help"]
    return name.replace("version ", "Version of ", 1), "The package that was installed."


def setting_text(name: str, setting: Setting | None) -> str:
    """`auto: 3.3e-4`, `512 tokens`, `on`, `not used`; an em dash where it is not told."""
    if setting is None:
        return "—"
    if not setting.used:
        return "not used"
    if setting.value is None:
        return OPEN.get(name, "auto") if setting.auto else "—"
    text = _value_text(name, setting.value)
    unit = option(name).get("unit", "") if name in NAMES else ""
    text = f"{text} {unit}" if unit else text
    return f"auto: {text}" if setting.auto else text


def _value_text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "learning_rate" and isinstance(value, float):
        return rate(value)
    if name in NAMES and "choices" in option(name):
        return choice_text(name, value)
    if name == "expansion" and isinstance(value, int | float):
        return times(value)
    if name == "seed":
        return str(value)
    return written(value)
