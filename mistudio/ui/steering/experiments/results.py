"""What an experiment found, as a table and as curves; no widgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistudio import formatting
from mistudio.jobs import experiments
from mistudio.library.steering import Experiment
from mistudio.ui.steering.experiments.plan import steering_of
from mistudio.ui.steering.request import SCOPES, features_text
from mistudio.ui.steering.units import NOTHING, share, significant

Estimate = dict[str, Any] | None

# Name, unit or reading, whether it is a share.
MEASURES: dict[str, tuple[str, str, bool]] = {
    "kl_per_token": ("KL Divergence", "nats per token, steered from unsteered predictions", False),
    "perplexity_ratio": (
        "Perplexity ratio",
        "steered over unsteered text, under the unsteered model",
        False,
    ),
    "distinct_ratio": ("Distinct-2 ratio", "distinct bigrams, steered over unsteered", False),
    "similarity": ("Similarity", "cosine of word counts with the unsteered text", True),
    "word_overlap": ("Word Overlap", "shared words of all words (Jaccard)", True),
    "reactivation": (
        "Re-activation",
        "gain of the features when the text is read unsteered, of their maximum",
        True,
    ),
    "own_share": (
        "Own tokens",
        "share of tokens that the features promote, more than in the unsteered text",
        True,
    ),
    "effectiveness": (
        "Effectiveness",
        "harmonic mean of re-activation, distinct-2 and 3 ÷ perplexity ratio, 0 to 1",
        False,
    ),
    "ended_early": ("Ended early", "texts that ended before the unsteered one", True),
}
MOVED = "kl_without"
MOVED_ABOUT = (
    "KL without it",
    "nats per token that the predictions move where this layer is left out",
    False,
)


@dataclass(frozen=True)
class Line:
    """A steering of the experiment: what it is called, what it adds in percent of the layer's
    median norm (None where that has no number), its estimates, its texts."""

    label: str
    percent: float | None
    found: dict[str, Estimate]
    texts: list[dict[str, Any]]


@dataclass(frozen=True)
class EstimateCurve:
    """Means over `x` with their intervals (None where there is one seed only); `joined` where there
    is something between its points that a line can tell."""

    name: str
    x: list[float]
    mean: list[float]
    low: list[float | None]
    high: list[float | None]
    joined: bool = True


def about(measure: str) -> tuple[str, str, bool]:
    return MOVED_ABOUT if measure == MOVED else MEASURES[measure]


def measures(experiment: Experiment) -> list[str]:
    """Those that are known of at least one of its lines."""
    found = lines(experiment)
    names = [*MEASURES, *([MOVED] if experiment.kind == "layer_study" else [])]
    return [name for name in names if any(line.found.get(name) for line in found)]


def lines(experiment: Experiment) -> list[Line]:
    return [
        Line(_name(label), label["percent_of_norm"], found, texts)
        for label, texts, found in experiments.lines(experiment)
    ]


def _name(label: dict[str, Any]) -> str:
    if "name" in label:
        return str(label["name"])
    layer = label["layer"]
    if "part" in label:
        return {
            "all": "All layers",
            "alone": f"Layer {layer} alone",
            "without": f"Without layer {layer}",
        }[label["part"]]
    random = " random" if label.get("control") else ""
    return f"× {label['strength']:g}{random}" + ("" if layer is None else f" at layer {layer}")


# --- in words -------------------------------------------------------------------------------------


def value_text(measure: str, value: Estimate) -> str:
    """`0.42 [0.35, 0.49]`; an em dash where it is not known."""
    if value is None or value.get("mean") is None:
        return NOTHING
    mean = _written(measure, value["mean"])
    if value.get("low") is None or value.get("high") is None:
        return mean
    return f"{mean} [{_written(measure, value['low'])}, {_written(measure, value['high'])}]"


def _written(measure: str, value: float) -> str:
    return share(value) if about(measure)[2] else significant(value)


def value_tip(measure: str, value: Estimate, prompts: int) -> str:
    """What the number is, of how many texts, and how sure."""
    name, unit, _ = about(measure)
    if value is None:
        return f"{name} ({unit}): not known of these texts"
    seeds, texts = value["n"], value.get("texts")
    told = [f"{name}: {_written(measure, value['mean'])} ({unit})"]
    whole = texts is None or texts == seeds * prompts
    of = _many(prompts, "prompt") if whole else "prompts"
    told.append(f"{_mean(measure)} over {_many(seeds, 'seed')} of the mean over {of}")
    if texts is not None:
        told[-1] += f" ({_many(texts, 'text')})"
    if value.get("low") is None:
        told.append("No interval: that takes two seeds or more")
    elif value["low"] == value["high"]:
        told.append("No width to its interval: every seed gave the same")
    else:
        low, high = _written(measure, value["low"]), _written(measure, value["high"])
        told.append(f"95 % interval {low} to {high}: Student’s t over seeds, for these prompts")
    return "\n".join(told)


def column_tip(measure: str) -> str:
    name, unit, _ = about(measure)
    return (
        f"{name}: {unit}\n{_mean(measure)} over seeds of the mean over prompts, with its 95 % "
        "interval (Student’s t over seeds)"
    )


def _mean(measure: str) -> str:
    return "Geometric mean" if measure == "perplexity_ratio" else "Mean"


def _many(n: int, noun: str) -> str:
    return f"{formatting.count(n)} {noun}{'' if n == 1 else 's'}"


def setting(experiment: Experiment) -> str:
    """`#5 × +1 • 2 prompts × 3 seeds • temperature 0.7 • …`."""
    request, result = experiment.request, experiment.result
    seeds = request["seeds"]
    drawn = f"temperature {request['temperature']:g}"
    if request["temperature"]:
        drawn += f", seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
    parts = [
        features_text(steering_of(experiment)),
        f"{_many(len(request['prompts']), 'prompt')} × {_many(len(seeds), 'seed')}",
        drawn,
        f"up to {_many(request['max_new_tokens'], 'token')}",
        *_where(steering_of(experiment)),
    ]
    if "hook_point" in result:
        parts += [result["hook_point"], result["precision"]]
    return " • ".join(parts)


def _where(request: Mapping[str, Any]) -> list[str]:
    """What is other than usual about where and how it is steered."""
    told = []
    if request.get("layers") and request.get("together", True):
        told.append(f"at layers {', '.join(map(str, request['layers']))}")
    if request.get("keep_norm"):
        told.append("norm kept")
    if request.get("scope", "all") != "all":
        told.append(dict(SCOPES).get(request["scope"], request["scope"]).lower())
    return told


def progress(experiment: Experiment) -> tuple[int, int]:
    """How many continuations (of a prompt with a seed) all steerings went through, of how many."""
    whole = len(experiment.request["prompts"]) * len(experiment.request["seeds"])
    return int(experiment.result.get("continued", whole)), whole


def incomplete(experiment: Experiment) -> str:
    """What a stopped experiment (or one that runs) lacks; empty where it is whole."""
    done, whole = progress(experiment)
    if done == whole:
        return ""
    rows = lines(experiment)
    if done == 0:
        through = sum(bool(line.texts) for line in rows)
        return f"{through} of {_many(len(rows), 'row')} went through the first continuation"
    prompts = len(experiment.request["prompts"])
    told = f"{done} of {_many(whole, 'continuation')} (prompts × seeds) of every row"
    if prompts == 1:
        return told
    seeds, of = done // prompts, len(experiment.request["seeds"])
    if seeds == 0:
        return f"{told}; no seed has gone through all prompts, so what there is counts"
    return f"{told}; {seeds} of {_many(of, 'seed')} went through all prompts and count"


def told_texts(experiment: Experiment, line: Line, most: int) -> str:
    """The texts of a line, each below the unsteered one of its prompt and seed."""
    result = experiment.result
    plain = {(text["prompt"], text["seed"]): text["text"] for text in result["unsteered"]}
    told = []
    for text in line.texts[:most]:
        place = text["prompt"], text["seed"]
        prompt, seed = result["prompts"][place[0]], result["seeds"][place[1]]
        told.append(
            f"{prompt}   (seed {seed})\n"
            f"Unsteered ▸{plain.get(place, NOTHING)}\nSteered ▸{text['text']}"
        )
    hidden = len(line.texts) - len(told)
    if hidden > 0:
        told.append(f"{formatting.count(hidden)} more: Export as JSON has all.")
    return "\n\n".join(told)


# --- curves ---------------------------------------------------------------------------------------


def curves(experiment: Experiment, measure: str) -> tuple[str, list[EstimateCurve], list[str]]:
    """What runs along the bottom, the curves over it, and the names of its points where these are
    no strengths: from 0 on."""
    rows = experiment.result["rows"]
    if experiment.kind == "layer_study":
        found = []
        for part, name in (("alone", "Alone"), ("without", "Without it")):
            found.append(_curve(name, [_estimate(row, part, measure) for row in rows]))
        return "Layer", _with_points(found), [f"L{row['layer']}" for row in rows]
    if experiment.kind == "prompt_batch":
        curve = replace(_curve("", [row["summary"].get(measure) for row in rows]), joined=False)
        return "Steering", _with_points([curve]), [row["name"] for row in rows]
    return _of_sweep(rows, measure)


def _of_sweep(
    rows: list[dict[str, Any]], measure: str
) -> tuple[str, list[EstimateCurve], list[str]]:
    """Strengths along the bottom; layers, where there are more of these: few curves can be told
    apart."""
    layers = list(dict.fromkeys(row.get("layer") for row in rows))
    strengths = sorted({row["strength"] for row in rows})
    by_layer = len(layers) > len(strengths)
    curves: dict[tuple[Any, bool], list[tuple[float, Estimate]]] = {}
    for row in rows:
        layer, strength, control = row.get("layer"), row["strength"], bool(row.get("control"))
        place = float(layers.index(layer)) if by_layer else strength
        points = curves.setdefault((strength if by_layer else layer, control), [])
        points.append((place, row["summary"].get(measure)))
    found = []
    for (key, control), points in curves.items():
        points.sort(key=lambda point: point[0])
        name = f"× {key:g}" if by_layer else "" if key is None else f"Layer {key}"
        if control:
            name = f"{name} random".strip().capitalize()
        elif not name and len(curves) > 1:
            name = "Features"
        found.append(_curve(name, [e for _, e in points], [x for x, _ in points]))
    if by_layer:
        return "Layer", _with_points(found), [f"L{layer}" for layer in layers]
    return "Strength (× all coefficients)", _with_points(found), []


def _with_points(found: Sequence[EstimateCurve]) -> list[EstimateCurve]:
    return [curve for curve in found if curve.x]


def _estimate(row: dict[str, Any], part: str, measure: str) -> Estimate:
    if measure == MOVED:
        return row.get(MOVED) if part == "without" else None
    found: Estimate = row[part]["summary"].get(measure)
    return found


def _curve(
    name: str, estimates: Sequence[Estimate], x: Sequence[float] | None = None
) -> EstimateCurve:
    places = x or range(len(estimates))
    known = [(place, e) for place, e in zip(places, estimates, strict=True) if e is not None]
    return EstimateCurve(
        name,
        [float(x) for x, _ in known],
        [float(e["mean"]) for _, e in known],
        [e.get("low") for _, e in known],
        [e.get("high") for _, e in known],
    )
