"""Steering tried over many strengths, layers, prompts and seeds: experiments with intervals.

Every steering of an experiment continues every prompt with every seed. Those (seed, prompt) pairs
are gone through one after another, seeds first, and after each the table so far is reported as the
metric `partial`: it has the shape of the result. One that is stopped is kept as far as it came.

Every result in `library.experiments` is plain JSON: {"prompts", "seeds", "hook_point",
"precision", "continued": how many of the pairs all steerings went through (fewer than there are
where it was stopped; missing in older records, which are whole), "unsteered": [text], "rows"}. A
text is {"prompt" and "seed" (their places in the lists), "text", "tokens"} and, of steered ones,
the measures of that text alone.

An *estimate* is {"mean", "low", "high", "n", "texts"}: the mean over `n` seeds of the mean over
prompts, of so many texts, with its 95 % interval (Student's t over seeds; None where there is one
seed), cut where no value can lie (`LIMITS`). It is about these prompts: seeds are the only thing
that varies. A seed that has not been through all prompts does not count, unless it is the first. A
*summary* is an estimate, or None where it is not known, for each of `MEASURES`:

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
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Cancelled, Progress
from mistudio.errors import InvalidInput, UserError
from mistudio.jobs.control import Phase
from mistudio.jobs.features import newest_run
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage, Within
from mistudio.jobs.steering import Planned, Recipe, Steer, compare, sampling_of
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
LIMITS = {
    "kl_per_token": (0.0, math.inf),
    "kl_without": (0.0, math.inf),
    "distinct_ratio": (0.0, math.inf),
    "similarity": (0.0, 1.0),
    "word_overlap": (0.0, 1.0),
    "own_share": (-1.0, 1.0),
    "effectiveness": (0.0, 1.0),
    "ended_early": (0.0, 1.0),
}
MOST_TEXTS = 5000  # steered ones of one experiment
ROWS_AT_ONCE = 8  # steered rows of one batch
PARTS = {"generate": (0.0, 0.8), "measure": (0.8, 1.0)}


@dataclass(frozen=True)
class Continuations:
    """What all experiments are asked for: `prompts`, each continued with every one of `seeds`; how
    text is drawn and where it is steered is as in `jobs/steering.Steer`."""

    sae_id: int
    _: KW_ONLY
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

    kind: ClassVar[str]
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("generate", 100))

    def title(self, library: Library) -> str:
        raise NotImplementedError

    def cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        """The steerings, in the order of the table. Raises InvalidInput where one cannot be."""
        raise NotImplementedError

    def run(self, context: JobContext) -> dict[str, Any]:
        """The experiment's number. Stopped, or where a steering turns out to be impossible, it
        raises and keeps what it has, if that is anything: the metric `experiment_id` then says
        where."""
        library = context.library
        _check_range("prompts", len(self.prompts), 1, 1000)
        _check_range("seeds", len(self.seeds), 1, 100)
        sae = library.saes.get(self.sae_id)
        self._check(library)
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        cells = self.cells(library, model)
        _check_range("texts", len(cells) * len(self.prompts) * len(self.seeds), 1, MOST_TEXTS)
        table = self._table(model, cells)
        name = " ".join(self.name.split()) or self.title(library)
        try:
            table.fill(Stage(context, "generate", None))
        except (Cancelled, UserError):
            if table.texts[0]:
                number = self._keep(library, f"{name} (stopped)", table)
                at = context.snapshot()
                context.report(at.done, at.total, experiment_id=number)
            raise
        return {"experiment_id": self._keep(library, name, table)}

    def _check(self, library: Library) -> None:
        """Refuse what needs no model to be seen, before one is loaded."""
        newest_run(library, self.sae_id)
        for seed in self.seeds:
            sampling_of(self.steer(seed=seed)).check()
        if not all(prompt.strip() for prompt in self.prompts):
            raise InvalidInput("A prompt is empty", next_step="Type some text.", field="prompts")

    def _table(self, model: HookedDecoder, cells: Sequence[Cell]) -> Table:
        return Table(self, model, cells)

    def _keep(self, library: Library, name: str, table: Table) -> int:
        result = table.found(max(table.continued, 1))
        return library.experiments.add(
            name=name, kind=self.kind, request=asdict(self), result=result
        )

    def steer(self, **more: Any) -> Steer:
        """As one generation would ask for it."""
        names = {entry.name for entry in fields(Continuations)} - {"prompts", "seeds", "name"}
        shared = {name: getattr(self, name) for name in names}
        return Steer(prompt="", **{"features": [], **shared, **more})


@dataclass(frozen=True)
class Sweep(Continuations):
    """One steering at several `strengths` (each multiplies those of `features` and `others`) and,
    where `layers` are given, at each of these alone, or at all of them (`together`). With `control`
    each strength is tried in a random direction too.

    Rows: {"strength", "layer" (that is alone, or None), "control", "percent_of_norm", "summary",
    "texts"}.
    """

    features: list[list[Any]]
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    layers: tuple[int, ...] = ()
    others: tuple[list[Any], ...] = ()
    keep_norm: bool = False
    together: bool = False
    control: bool = False

    kind: ClassVar[str] = "sweep"

    def title(self, library: Library) -> str:
        over = _counted(len(self.strengths), "strength")
        if self.layers:
            layers = _counted(len(self.layers), "layer")
            over += f" at {layers} together" if self.together else f" and {layers}"
        return f"Sweep {_features_text(self)} over {over}"

    def cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        _check_range("strengths", len(self.strengths), 1, 64)
        layers = tuple(dict.fromkeys(self.layers))
        recipe = Recipe(library, self.steer(**_steering(self), layers=layers), model)
        planned = [recipe.at(strength) for strength in self.strengths]
        found = []
        for layer in (None,) if self.together or not layers else layers:
            for control in (False, True) if self.control else (False,):
                for strength, one in zip(self.strengths, planned, strict=True):
                    label = {"strength": strength, "layer": layer, "control": control}
                    placed = one if layer is None else _at_layer(one, layer)
                    found.append(Cell(label, recipe, _random(placed) if control else placed))
        return found


@dataclass(frozen=True)
class PromptBatch(Continuations):
    """A list of prompts, continued with every seed and by every one of `variants`: {"name",
    "features", and any of "others", "layers", "keep_norm", "control" as in `jobs/steering.Steer`,
    "scale" (multiplies all strengths)}.

    Rows: {"name", "percent_of_norm", "summary", "texts"}.
    """

    variants: list[dict[str, Any]]

    kind: ClassVar[str] = "prompt_batch"

    def title(self, library: Library) -> str:
        return (
            f"Continue {_counted(len(self.prompts), 'prompt')} with "
            f"{_counted(len(self.seeds), 'seed')} and {_counted(len(self.variants), 'steering')}"
        )

    def cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        _check_range("variants", len(self.variants), 1, 32)
        recipes: dict[str, Recipe] = {}  # each holds its SAEs: those that differ in scale share one
        found = []
        for number, values in enumerate(self.variants):
            asked = {key: values[key] for key in _OF_VARIANTS if key in values}
            key = json.dumps(asked)
            if key not in recipes:
                # JSON knows no tuples
                given = {k: tuple(v) if k in ("others", "layers") else v for k, v in asked.items()}
                recipes[key] = Recipe(library, self.steer(**given), model)
            planned = recipes[key].at(float(values.get("scale", 1.0)))
            if values.get("control"):
                planned = _random(planned)
            label = {"name": str(values.get("name") or f"Steering {number + 1}")}
            found.append(Cell(label, recipes[key], planned))
        return found


_OF_VARIANTS = ("features", "others", "layers", "keep_norm")


@dataclass(frozen=True)
class LayerStudy(Continuations):
    """Which layers matter: a steering at several layers (`layers`, or SAEs of several in `others`)
    beside each of them alone and all but each.

    Beside "rows" there is "all": {"percent_of_norm", "summary", "texts"}. Rows: {"layer", "alone"
    and "without": as "all", "kl_without": estimate}; `kl_without` is how far the predictions along
    the text of all layers move where this one is left out, in nats per token.
    """

    features: list[list[Any]]
    layers: tuple[int, ...] = ()
    others: tuple[list[Any], ...] = ()
    keep_norm: bool = False

    kind: ClassVar[str] = "layer_study"

    def title(self, library: Library) -> str:
        return f"Study which layers matter for {_features_text(self)}"

    def cells(self, library: Library, model: HookedDecoder) -> list[Cell]:
        recipe = Recipe(library, self.steer(**_steering(self), layers=self.layers), model)
        whole = recipe.at(1.0)
        if not self.layers:  # each SAE's own strength at its own layer: no number for all of them
            whole = replace(whole, percent_of_norm=None)
        sites = whole.variant.sites
        layers = sorted({site.site.output.layer for site in sites})
        if len(layers) < 2:
            raise InvalidInput(
                "A study of layers needs several",
                "This steering acts at one layer.",
                "Choose two or more layers, or features of SAEs of different layers.",
                field="layers",
            )

        found = [Cell({"layer": None, "part": "all"}, recipe, whole)]
        for layer in layers:
            for part, keep in (("alone", layer.__eq__), ("without", layer.__ne__)):
                found.append(Cell({"layer": layer, "part": part}, recipe, _only(whole, keep)))
        return found

    def _table(self, model: HookedDecoder, cells: Sequence[Cell]) -> Table:
        return LayerTable(self, model, cells)


# --- what all of them do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One steering of an experiment and what it is called in its table."""

    label: dict[str, Any]
    recipe: Recipe
    planned: Planned


def _steering(job: Sweep | LayerStudy) -> dict[str, Any]:
    return {"features": job.features, "others": job.others, "keep_norm": job.keep_norm}


def _random(planned: Planned) -> Planned:
    """The same size in a random direction, which is the same for all prompts and seeds."""
    return replace(planned, variant=replace(planned.variant, control=0))


def _only(planned: Planned, keep: Callable[[int], bool]) -> Planned:
    """Without what acts at other layers."""
    sites = tuple(s for s in planned.variant.sites if keep(s.site.output.layer))
    return replace(planned, variant=replace(planned.variant, sites=sites))


def _at_layer(planned: Planned, layer: int) -> Planned:
    """As if this layer were the only one: then it is not divided by the root of their number."""
    root = len(planned.variant.sites) ** 0.5
    only = _only(planned, layer.__eq__)
    sites = tuple(
        site if site.vector is None else replace(site, vector=site.vector * root)
        for site in only.variant.sites
    )
    percent = planned.percent_of_norm
    return replace(
        only,
        variant=replace(only.variant, sites=sites),
        percent_of_norm=None if percent is None else percent * root,
    )


def _features_text(job: Sweep | LayerStudy) -> str:
    names = [f"#{int(entry[0])}" for entry in job.features]
    return ", ".join([*names, *(f"#{int(entry[1])}" for entry in job.others)])


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidInput(
            "An experiment's setting is out of range",
            f"There must be {low} to {high:,} {name}; there are {value:,}.",
            field=name,
        )


class Table:
    """The texts of all cells, prompts and seeds, and what was measured of them."""

    def __init__(self, job: Continuations, model: HookedDecoder, cells: Sequence[Cell]) -> None:
        from mistudio.engine.steering.generation import check_room, check_scope, encode_prompt
        from mistudio.engine.steering.interventions import Scope

        self.job, self.model, self.cells = job, model, cells
        self.tokenizer, self.special = cells[0].recipe.tokenizer()
        self.prompts = [encode_prompt(self.tokenizer, p, job.chat) for p in job.prompts]
        scope = Scope(job.scope, tuple(job.positions))
        for ids in self.prompts:  # all before the first is continued
            scope.check(len(ids))
            check_scope(scope, ids, self.special)
            check_room(model, len(ids), job.max_new_tokens)
        self.continued = 0
        self.unsteered: list[dict[str, Any]] = []
        self.texts: list[list[dict[str, Any]]] = [[] for _ in cells]

    def fill(self, progress: Progress) -> None:
        chunks = [
            range(start, min(start + ROWS_AT_ONCE, len(self.cells)))
            for start in range(0, len(self.cells), ROWS_AT_ONCE)
        ]
        places = [(s, p) for s in range(len(self.job.seeds)) for p in range(len(self.prompts))]
        steps = len(places) * len(chunks)
        step = 0
        for number, (seed, prompt) in enumerate(places, 1):
            for chunk in chunks:
                self._add(seed, prompt, chunk, _Parts(progress, step, steps))
                step += 1
                if chunk[-1] + 1 == len(self.cells):
                    self.continued = number
                progress.report(step, steps, phase="generate", partial=self.found())

    def found(self, most: int | None = None) -> dict[str, Any]:
        """The result so far: of each cell, at most so many texts."""
        return {
            "prompts": list(self.job.prompts),
            "seeds": list(self.job.seeds),
            "hook_point": self.cells[0].recipe.point.name,
            "precision": precision_of(self.model),
            "continued": self.continued,
            "unsteered": self.unsteered[:most],
            **self._rows(most),
        }

    def _rows(self, most: int | None) -> dict[str, Any]:
        return {"rows": [self._row(i, most) for i in range(len(self.cells))]}

    def _row(self, i: int, most: int | None) -> dict[str, Any]:
        cell, texts = self.cells[i], self.texts[i][:most]
        return {
            **cell.label,
            "percent_of_norm": cell.planned.percent_of_norm,
            "summary": summary(self._counting(texts)),
            "texts": texts,
        }

    def _counting(self, texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the seeds that have been through all prompts; all, where that is none."""
        whole = len(texts) // len(self.prompts) * len(self.prompts)
        return texts[: whole or None]

    def _add(
        self, seed: int, prompt: int, chunk: Sequence[int], progress: Progress
    ) -> list[list[int]]:
        """Continue a prompt by some of the cells; the ids of their texts."""
        generated, found = compare(
            self.model,
            [(self.cells[i].recipe, self.cells[i].planned) for i in chunk],
            self.tokenizer,
            self.special,
            self.prompts[prompt],
            self.job.steer(seed=self.job.seeds[seed]),
            progress,
        )
        where = {"prompt": prompt, "seed": seed}
        if 0 in chunk:
            first = generated.rows[0]
            self.unsteered.append({**where, "text": first.text, "tokens": len(first.ids)})
        for i, one in zip(chunk, found, strict=True):
            text = {"text": one["text"], "tokens": one["tokens"]}
            self.texts[i].append({**where, **text, **_measures(one)})
        return [one["ids"] for one in found]


class LayerTable(Table):
    """That of a layer study: it also measures how far leaving a layer out moves the predictions."""

    def __init__(self, job: Continuations, model: HookedDecoder, cells: Sequence[Cell]) -> None:
        super().__init__(job, model, cells)
        self._whole: list[int] = []  # the ids of the text of all layers, of this prompt and seed
        self._moved: list[list[dict[str, Any]]] = [[] for _ in cells]

    def _add(
        self, seed: int, prompt: int, chunk: Sequence[int], progress: Progress
    ) -> list[list[int]]:
        from mistudio.engine.steering.interventions import Scope
        from mistudio.engine.steering.metrics import divergences

        ids = super()._add(seed, prompt, chunk, progress)
        if 0 in chunk:
            self._whole = ids[0]
        scope = Scope(self.job.scope, tuple(self.job.positions))
        for i in chunk:
            if self.cells[i].label["part"] != "without":
                continue
            (found,) = divergences(
                self.model,
                [self.cells[0].planned.variant],
                self.prompts[prompt],
                [self._whole],
                self.special,
                scope,
                against=self.cells[i].planned.variant,
                progress=progress,
            )
            kl = sum(found.kl) / len(found.kl) if found.kl else None
            self._moved[i].append({"seed": seed, "kl_without": kl})
        return ids

    def _rows(self, most: int | None) -> dict[str, Any]:
        def part(i: int) -> dict[str, Any]:
            row = self._row(i, most)
            return {key: row[key] for key in ("percent_of_norm", "summary", "texts")}

        rows = [
            {
                "layer": self.cells[i].label["layer"],
                "alone": part(i),
                "without": part(i + 1),
                "kl_without": estimate(self._counting(self._moved[i + 1][:most]), "kl_without"),
            }
            for i in range(1, len(self.cells), 2)
        ]
        return {"all": part(0), "rows": rows}


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
    diverse, usual = one["distinct_2"], one["distinct_2_unsteered"]
    return {
        "kl_per_token": one["kl_per_token"],
        "perplexity_ratio": one["perplexity_ratio"],
        "distinct_ratio": None if diverse is None or not usual else diverse / usual,
        "similarity": one["similarity"],
        "word_overlap": one["word_overlap"],
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
    found["texts"] = sum(map(len, by_seed.values()))
    if n > 1:
        spread = math.sqrt(sum((value - mean) ** 2 for value in means) / (n - 1) / n)
        half = _t_quantile(n - 1) * spread
        least, most = LIMITS.get(name, (-math.inf, math.inf))
        found |= {"low": max(least, back(mean - half)), "high": min(most, back(mean + half))}
    return found


@lru_cache
def _t_quantile(degrees: int) -> float:
    """The 97.5 % point of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


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
    for label, _, found in lines(experiment):
        line = dict(label)
        for name, value in found.items():
            for part in ("mean", "low", "high", "n", "texts"):
                line[name if part == "mean" else f"{name}_{part}"] = (value or {}).get(part)
        rows.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines(
    experiment: Experiment,
) -> list[tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]]:
    """The table: of each steering what it is called by (and its percent_of_norm), its texts, and
    its estimates by measure; of a layer study with `kl_without`."""
    result = experiment.result
    if experiment.kind != "layer_study":
        return [_line(row, row, {}) for row in result["rows"]]
    found = [_line({"layer": None, "part": "all"}, result["all"], {"kl_without": None})]
    for row in result["rows"]:
        for part in ("alone", "without"):
            label = {"layer": row["layer"], "part": part}
            moved = {"kl_without": row["kl_without"] if part == "without" else None}
            found.append(_line(label, row[part], moved))
    return found


def _line(
    label: dict[str, Any], row: dict[str, Any], more: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    # In this order: kept JSON has its keys sorted.
    named: dict[str, Any] = {
        key: label[key] for key in ("name", "layer", "part", "control", "strength") if key in label
    }
    named["percent_of_norm"] = row.get("percent_of_norm")
    found = {name: row["summary"].get(name) for name in MEASURES}
    return named, row["texts"], found | more
