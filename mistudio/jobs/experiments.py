"""Steering tried over many strengths, layers, prompts and seeds: experiments with intervals.

Every result in `library.experiments` is plain JSON with a table `rows`. An *estimate* is
{"mean", "low", "high", "n"}: the mean over `n` seeds of the mean over prompts, with its 95 %
interval (Student's t over seeds; None where there is one seed). A *summary* is an estimate, or None
where it is not known, for each of `MEASURES`:

    kl_per_token      nats per token, steered from unsteered predictions
    perplexity_ratio  steered over unsteered text, under the unsteered model (in logarithms)
    distinct_ratio    distinct-2, steered over unsteered
    similarity, word_overlap   as in `engine/steering/metrics.SteeringEffect`
    reactivation      mean gain of the features (`jobs/steering.Expressed.gain`)
    own_share         share of tokens that the features promote, less that of the unsteered text
    effectiveness     `engine/steering/metrics.effectiveness`
    ended_early       share of texts that ended before the unsteered one
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage, Within
from mistudio.jobs.steering import Planned, Recipe, Steer, compare, known
from mistudio.library.library import Library
from mistudio.library.steering import Experiment

if TYPE_CHECKING:
    from mistudio.engine.models.hooks import HookedDecoder

MEASURES = (
    "kl_per_token",
    "perplexity_ratio",
    "distinct_ratio",
    "similarity",
    "word_overlap",
    "reactivation",
    "own_share",
    "effectiveness",
    "ended_early",
)
MOST_TEXTS = 5000  # steered ones of one experiment
ROWS_AT_ONCE = 8  # steered rows of one batch
PARTS = {"generate": (0.0, 0.8), "measure": (0.8, 1.0)}

_PHASES = (Phase("load model", 5), Phase("generate", 100))


@dataclass(frozen=True)
class Sweep:
    """One steering at several `strengths` (each multiplies those of `features` and `others`) and,
    where `layers` are given, at each of these alone.

    Result: {"prompts", "seeds", "hook_point", "precision", "unsteered": [text],
    "rows": [{"strength", "layer" (None: where the SAE acts), "percent_of_norm", "summary",
    "texts": [text]}]}, a text being {"prompt" and "seed" (their places in the lists), "text",
    "tokens"} and, of steered ones, the measures of that text alone.
    """

    sae_id: int
    features: list[list[Any]]
    prompts: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    layers: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    name: str = ""
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 40
    top_k: int = 0
    repetition_penalty: float = 1.0
    chat: bool = False
    scope: str = "all"
    positions: tuple[int, ...] = ()
    keep_norm: bool = False
    others: tuple[list[Any], ...] = ()

    kind: ClassVar[str] = "sweep"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = _PHASES

    def title(self, library: Library) -> str:
        over = f"{len(self.strengths)} strengths"
        if self.layers:
            over += f" and {len(self.layers)} layers"
        return f"Sweep {_features_text(self)} over {over}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return _run(self, context, self._cells)

    def _cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        _check_range("strengths", len(self.strengths), 1, 64)
        cells = []
        for layer in self.layers or (None,):
            steer = _steer(self, layers=() if layer is None else (layer,))
            recipe = Recipe(library, steer, model)
            for strength in self.strengths:
                planned = recipe.at(strength)
                label = {"strength": strength, "layer": layer}
                label["percent_of_norm"] = planned.percent_of_norm
                cells.append(Cell(label, recipe, planned))
        return cells


@dataclass(frozen=True)
class PromptBatch:
    """A list of prompts, continued with every seed and by every one of `variants`: {"name",
    "features", and any of "others", "layers", "keep_norm", "control"} as in `jobs/steering.Steer`.

    Result: as of a `Sweep`, its rows being {"name", "percent_of_norm", "summary", "texts"}.
    """

    sae_id: int
    variants: list[dict[str, Any]]
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    name: str = ""
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 40
    top_k: int = 0
    repetition_penalty: float = 1.0
    chat: bool = False
    scope: str = "all"
    positions: tuple[int, ...] = ()

    kind: ClassVar[str] = "prompt_batch"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = _PHASES

    def title(self, library: Library) -> str:
        return (
            f"Continue {len(self.prompts)} prompts with {len(self.seeds)} seeds and "
            f"{len(self.variants)} {'steering' if len(self.variants) == 1 else 'steerings'}"
        )

    def run(self, context: JobContext) -> dict[str, Any]:
        return _run(self, context, self._cells)

    def _cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        _check_range("variants", len(self.variants), 1, 32)
        cells = []
        for number, values in enumerate(self.variants):
            asked = {key: value for key, value in values.items() if key in _OF_VARIANTS}
            for key in ("others", "layers"):
                asked[key] = tuple(asked.get(key, ()))
            asked.setdefault("features", [])
            recipe = Recipe(library, _steer(self, **asked), model)
            planned = recipe.planned()[-1]  # the control, where one is asked for
            label = {
                "name": str(values.get("name") or f"Steering {number + 1}"),
                "percent_of_norm": planned.percent_of_norm,
            }
            cells.append(Cell(label, recipe, planned))
        return cells


_OF_VARIANTS = ("features", "others", "layers", "keep_norm", "control")


@dataclass(frozen=True)
class LayerStudy:
    """Which layers matter: a steering at several layers (`layers`, or SAEs of several in `others`)
    beside each of them alone and all but each.

    Result: {"prompts", "seeds", "hook_point", "precision", "unsteered": [text],
    "all": {"summary", "texts"}, "rows": [{"layer", "alone": {"summary", "texts"}, "without":
    {"summary", "texts"}, "kl_without": estimate}]}; `kl_without` is how far the predictions along
    the text of all layers move where this one is left out, in nats per token.
    """

    sae_id: int
    features: list[list[Any]]
    prompts: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    others: tuple[list[Any], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    name: str = ""
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 40
    top_k: int = 0
    repetition_penalty: float = 1.0
    chat: bool = False
    scope: str = "all"
    positions: tuple[int, ...] = ()
    keep_norm: bool = False

    kind: ClassVar[str] = "layer_study"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = _PHASES

    def title(self, library: Library) -> str:
        return f"Study which layers matter for {_features_text(self)}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return _run(self, context, self._cells, _by_layer)

    def _cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        recipe = Recipe(library, _steer(self, layers=self.layers, others=self.others), model)
        whole = recipe.at(1.0)
        sites = whole.variant.sites
        layers = sorted({site.site.output.layer for site in sites})
        if len(layers) < 2:
            raise InvalidInput(
                "A study of layers needs several",
                "This steering acts at one layer.",
                "Choose two or more layers, or features of SAEs of different layers.",
                field="layers",
            )

        def only(keep: Callable[[int], bool]) -> Planned:
            kept = tuple(site for site in sites if keep(site.site.output.layer))
            return replace(whole, variant=replace(whole.variant, sites=kept), percent_of_norm=None)

        cells = [Cell({"layer": None, "part": "all"}, recipe, whole)]
        for layer in layers:
            alone, without = only(layer.__eq__), only(layer.__ne__)
            cells.append(Cell({"layer": layer, "part": "alone"}, recipe, alone))
            cells.append(Cell({"layer": layer, "part": "without"}, recipe, without))
        return cells


# --- what all of them do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One steering of an experiment and what it is called in its table."""

    label: dict[str, Any]
    recipe: Recipe
    planned: Planned


def _features_text(job: Sweep | LayerStudy) -> str:
    names = [f"#{int(entry[0])}" for entry in job.features]
    return ", ".join([*names, *(f"#{int(entry[1])}" for entry in job.others)])


def _steer(job: Any, **more: Any) -> Steer:
    """The job's steering as one generation would ask for it."""
    names = (
        "sae_id", "features", "temperature", "top_p", "max_new_tokens", "top_k",
        "repetition_penalty", "chat", "scope", "positions", "keep_norm", "others",
    )  # fmt: skip
    values = {name: getattr(job, name) for name in names if hasattr(job, name)}
    return Steer(prompt="", **{"features": [], **values, **more})


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidInput(
            "An experiment's setting is out of range",
            f"There must be {low} to {high:,} {name}; there are {value:,}.",
            field=name,
        )


def _run(
    job: Any,
    context: JobContext,
    cells_of: Callable[[Library, HookedDecoder], list[Cell]],
    finish: Callable[[_Table, Progress], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    library = context.library
    _check_range("prompts", len(job.prompts), 1, 1000)
    _check_range("seeds", len(job.seeds), 1, 100)
    sae = library.saes.get(job.sae_id)
    model = loaded_model(library, sae.model_id, Stage(context, "load model"))
    cells = cells_of(library, model)
    _check_range("texts", len(cells) * len(job.prompts) * len(job.seeds), 1, MOST_TEXTS)
    stage = Stage(context, "generate", None)
    table = _Table(job, model, cells)
    table.fill(stage)
    found = finish(table, stage) if finish else {"rows": table.rows()}
    result = {
        "prompts": list(job.prompts),
        "seeds": list(job.seeds),
        "hook_point": cells[0].recipe.point.name,
        "precision": precision_of(model),
        "unsteered": table.unsteered,
        **found,
    }
    name = " ".join(job.name.split()) or job.title(library)
    number = library.experiments.add(name=name, kind=job.kind, request=asdict(job), result=result)
    return {"experiment_id": number}


class _Table:
    """The texts of all cells, prompts and seeds, and what was measured of them."""

    def __init__(self, job: Any, model: HookedDecoder, cells: Sequence[Cell]) -> None:
        from mistudio.engine.steering.generation import encode_prompt

        self.job, self.model, self.cells = job, model, cells
        self.tokenizer, self.special = cells[0].recipe.tokenizer()
        self.prompts = [encode_prompt(self.tokenizer, p, job.chat) for p in job.prompts]
        self.unsteered: list[dict[str, Any]] = []
        self.texts: list[list[dict[str, Any]]] = [[] for _ in cells]
        self.ids: list[list[list[int]]] = [[] for _ in cells]

    def fill(self, progress: Progress) -> None:
        chunks = [
            range(start, min(start + ROWS_AT_ONCE, len(self.cells)))
            for start in range(0, len(self.cells), ROWS_AT_ONCE)
        ]
        places = [(s, p) for s in range(len(self.job.seeds)) for p in range(len(self.prompts))]
        steps = len(places) * len(chunks)
        for number, (seed, prompt) in enumerate(places):
            for part, chunk in enumerate(chunks):
                step = number * len(chunks) + part
                self._add(seed, prompt, chunk, _Parts(progress, step, steps))
            progress.report(
                (number + 1) * len(chunks), steps, phase="generate", rows=self.rows(texts=False)
            )

    def _add(self, seed: int, prompt: int, chunk: Sequence[int], progress: Progress) -> None:
        job = _steer(self.job, seed=self.job.seeds[seed])
        generated, found = compare(
            self.model,
            [(self.cells[i].recipe, self.cells[i].planned) for i in chunk],
            self.tokenizer,
            self.special,
            self.prompts[prompt],
            job,
            progress,
        )
        where = {"prompt": prompt, "seed": seed}
        if 0 in chunk:
            first = generated.rows[0]
            self.unsteered.append({**where, "text": first.text, "tokens": len(first.ids)})
        for i, one in zip(chunk, found, strict=True):
            self.ids[i].append(one["ids"])
            text = {"text": one["text"], "tokens": one["tokens"]}
            self.texts[i].append({**where, **text, **_measures(one)})

    def rows(self, texts: bool = True) -> list[dict[str, Any]]:
        return [
            {**cell.label, "summary": summary(found), **({"texts": found} if texts else {})}
            for cell, found in zip(self.cells, self.texts, strict=True)
        ]


class _Parts:
    """Writing and measuring as one step of several."""

    def __init__(self, outer: Progress, number: int, count: int) -> None:
        self._outer = Within(outer, number, count)

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        start, end = PARTS.get(phase or "generate", (0.0, 1.0))
        share = done / total if total else 0.0
        self._outer.report(start + (end - start) * share, 1.0, phase="generate")


def _measures(one: dict[str, Any]) -> dict[str, float | None]:
    """Of one steered text; None where it is not known."""
    gains = [f["gain"] for f in one["features"] if f["gain"] is not None]
    shares = [
        f["own_share"] - f["own_share_unsteered"]
        for f in one["features"]
        if f["own_share"] is not None and f["own_share_unsteered"] is not None
    ]
    unsteered = one["distinct_2_unsteered"]
    return {
        "kl_per_token": known(one["kl_per_token"]),
        "perplexity_ratio": known(one["perplexity_ratio"]),
        "distinct_ratio": known(one["distinct_2"] / unsteered) if unsteered else None,
        "similarity": known(one["similarity"]),
        "word_overlap": known(one["word_overlap"]),
        "reactivation": sum(gains) / len(gains) if gains else None,
        "own_share": sum(shares) / len(shares) if shares else None,
        "effectiveness": one["effectiveness"],
        "ended_early": float(one["ended_early"]),
    }


def summary(texts: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The estimate of each measure over the texts of one row."""
    return {name: estimate(texts, name, name == "perplexity_ratio") for name in MEASURES}


def estimate(
    texts: Sequence[dict[str, Any]], name: str, in_logs: bool = False
) -> dict[str, Any] | None:
    """Mean over seeds of the means over prompts, with Student's 95 % interval over seeds. Texts of
    which it is not known are left out; None where that is all."""
    by_seed: dict[int, list[float]] = {}
    for text in texts:
        if (value := text.get(name)) is not None:
            by_seed.setdefault(text["seed"], []).append(math.log(value) if in_logs else value)
    means = [sum(values) / len(values) for values in by_seed.values()]
    if not means:
        return None
    back: Callable[[float], float] = math.exp if in_logs else float
    mean, n = sum(means) / len(means), len(means)
    found: dict[str, Any] = {"mean": back(mean), "low": None, "high": None, "n": n}
    if n > 1:
        from scipy.stats import t

        spread = math.sqrt(sum((value - mean) ** 2 for value in means) / (n - 1) / n)
        half = float(t.ppf(0.975, n - 1)) * spread
        found |= {"low": back(mean - half), "high": back(mean + half)}
    return found


def _by_layer(table: _Table, progress: Progress) -> dict[str, Any]:
    """The table of a layer study, with how far leaving a layer out moves the predictions."""
    from mistudio.engine.steering.interventions import Scope
    from mistudio.engine.steering.metrics import divergences

    whole, *rest = table.rows()
    variant = table.cells[0].planned.variant
    scope = Scope(table.job.scope, tuple(table.job.positions))
    rows = []
    for i in range(0, len(rest), 2):
        alone, without = rest[i], rest[i + 1]
        moved = []
        for text, ids in zip(whole["texts"], table.ids[0], strict=True):
            progress.check()
            (found,) = divergences(
                table.model,
                [variant],
                table.prompts[text["prompt"]],
                [ids],
                table.special,
                scope,
                against=table.cells[i + 2].planned.variant,
            )
            kl = sum(found.kl) / len(found.kl) if found.kl else None
            moved.append({"seed": text["seed"], "kl": kl})
        rows.append(
            {
                "layer": alone["layer"],
                "alone": {"summary": alone["summary"], "texts": alone["texts"]},
                "without": {"summary": without["summary"], "texts": without["texts"]},
                "kl_without": estimate(moved, "kl"),
            }
        )
    return {"all": {"summary": whole["summary"], "texts": whole["texts"]}, "rows": rows}


# --- a file of it ---------------------------------------------------------------------------------


def write_experiment(experiment: Experiment, path: Path) -> None:
    """As JSON with everything, or (where the name ends with .csv) its table: a line for each
    steering, with mean and interval of each measure."""
    if path.suffix.lower() == ".csv":
        text = _csv(experiment)
    else:
        text = json.dumps(asdict(experiment), indent=2, ensure_ascii=False)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _csv(experiment: Experiment) -> str:
    rows = []
    for label, found in _lines(experiment):
        line = dict(label)
        for name, value in found.items():
            for part in ("mean", "low", "high", "n"):
                line[name if part == "mean" else f"{name}_{part}"] = (value or {}).get(part)
        rows.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _lines(experiment: Experiment) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    result = experiment.result
    if experiment.kind != "layer_study":
        return [
            ({k: v for k, v in row.items() if k not in ("summary", "texts")}, row["summary"])
            for row in result["rows"]
        ]
    nothing = {"kl_without": None}
    lines = [({"layer": "", "part": "all"}, {**result["all"]["summary"], **nothing})]
    for row in result["rows"]:
        for part in ("alone", "without"):
            moved = {"kl_without": row["kl_without"] if part == "without" else None}
            label = {"layer": row["layer"], "part": part}
            lines.append((label, {**row[part]["summary"], **moved}))
    return lines
