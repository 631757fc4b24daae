"""What an experiment found, as a table and as curves; no widgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistudio.library.steering import Experiment
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
    """A steering of the experiment: what it is called, its estimates, its texts."""

    label: str
    found: dict[str, Estimate]
    texts: list[dict[str, Any]]


@dataclass(frozen=True)
class EstimateCurve:
    """Means over `x` with their intervals (None where there is one seed only)."""

    name: str
    x: list[float]
    mean: list[float]
    low: list[float | None]
    high: list[float | None]


def about(measure: str) -> tuple[str, str, bool]:
    return MOVED_ABOUT if measure == MOVED else MEASURES[measure]


def measures(experiment: Experiment) -> list[str]:
    """Those that are known of at least one of its lines."""
    found = lines(experiment)
    names = [*MEASURES, *([MOVED] if experiment.kind == "layer_study" else [])]
    return [name for name in names if any(line.found.get(name) for line in found)]


def lines(experiment: Experiment) -> list[Line]:
    result = experiment.result
    if experiment.kind == "layer_study":
        found = [_part("All layers", result["all"])]
        for row in result["rows"]:
            found.append(_part(f"Layer {row['layer']} alone", row["alone"]))
            without = _part(f"Without layer {row['layer']}", row["without"])
            moved = {**without.found, MOVED: row.get(MOVED)}
            found.append(Line(without.label, moved, without.texts))
        return found
    return [_part(_name(row), row) for row in result["rows"]]


def _part(label: str, row: dict[str, Any]) -> Line:
    return Line(label, row["summary"], row.get("texts", []))


def _name(row: dict[str, Any]) -> str:
    if "name" in row:
        return str(row["name"])
    layer = "" if row.get("layer") is None else f" at layer {row['layer']}"
    return f"× {row['strength']:g}{layer}"


def value_text(measure: str, value: Estimate) -> str:
    """`0.42 [0.35, 0.49]`; an em dash where it is not known."""
    if value is None or value.get("mean") is None:
        return NOTHING
    write = share if about(measure)[2] else significant
    mean = write(value["mean"])
    if value.get("low") is None or value.get("high") is None:
        return mean
    return f"{mean} [{write(value['low'])}, {write(value['high'])}]"


def curves(experiment: Experiment, measure: str) -> tuple[str, list[EstimateCurve]]:
    """What runs along the bottom, and the curves over it."""
    rows = experiment.result["rows"]
    if experiment.kind == "layer_study":
        found = []
        for part, name in (("alone", "Alone"), ("without", "Without it")):
            points = [(row["layer"], _estimate(row, part, measure)) for row in rows]
            found.append(_curve(name, points))
        return "Layer", [curve for curve in found if curve.x]
    if experiment.kind == "prompt_batch":
        points = [(float(i + 1), row["summary"].get(measure)) for i, row in enumerate(rows)]
        return "Steering (line of the table)", [_curve("", points)]
    layers = list(dict.fromkeys(row.get("layer") for row in rows))
    found = [
        _curve(
            "" if layer is None else f"Layer {layer}",
            [(r["strength"], r["summary"].get(measure)) for r in rows if r.get("layer") == layer],
        )
        for layer in layers
    ]
    return "Strength (× all coefficients)", [curve for curve in found if curve.x]


def _estimate(row: dict[str, Any], part: str, measure: str) -> Estimate:
    if measure == MOVED:
        return row.get(MOVED) if part == "without" else None
    found: Estimate = row[part]["summary"].get(measure)
    return found


def _curve(name: str, points: Sequence[tuple[float, Estimate]]) -> EstimateCurve:
    known = sorted(((x, e) for x, e in points if e is not None), key=lambda point: point[0])
    return EstimateCurve(
        name,
        [float(x) for x, _ in known],
        [float(e["mean"]) for _, e in known],
        [e.get("low") for _, e in known],
        [e.get("high") for _, e in known],
    )
