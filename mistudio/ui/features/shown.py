"""The columns of the feature table: how each is called, aligned and written, and what its tooltip
says. Statistics come from `engine/features/columns.py`; a few columns are the table's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mistudio import formatting
from mistudio.engine.features.columns import BANDS, TABLE, Column
from mistudio.engine.features.store import FeatureMeta

ID, LABEL, CONTEXT, HISTOGRAM, STAR, SUBSET = (
    "id", "label", "context", "histogram", "star", "subset",
)  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {
    "Feature": (ID, LABEL, CONTEXT, HISTOGRAM, STAR),
    "Interpretability": (
        "score", "score_accuracy", "score_low", "score_high", "score_percentile", "score_contexts",
    ),
    "How often": (
        "density", "n_active", "context_density", "n_contexts", "band", "active_share",
        "burst_length",
    ),
    "How strongly": (
        "max_activation", "p99_activation", "median_activation", "mean_activation",
        "std_activation", "skewness", "kurtosis", "relative_norm",
    ),
    "On which tokens": (
        "top_token", "top_token_share", "common_token", "common_token_share", "token_recall",
        "token_purity", "token_entropy", "n_examples", "n_decile_examples",
    ),
    "What it promotes": (
        "logit_std", "logit_skewness", "logit_kurtosis", "logit_top_gap", "input_score",
    ),
    "Its direction": ("encoder_cosine", "nearest_cosine", "nearest_feature"),
}  # fmt: skip
OTHER = "Other"

DEFAULT = (ID, LABEL, CONTEXT, "density", "score", HISTOGRAM, STAR)


@dataclass(frozen=True)
class Shown:
    """A column of the table. `title` is in its header and in filters. `percent`: a share, written
    and typed as a percentage. `sortable` and `ranged`: whether it has an order, and a range that
    can be filtered by."""

    name: str
    title: str
    group: str
    definition: str
    sample: str = ""
    unit: str = ""
    width: int = 132
    right: bool = True
    percent: bool = False
    tone: str = ""
    sortable: bool = True
    ranged: bool = True


_OWN = (
    Shown(ID, "ID", "Feature", "The number of the feature: its row in the decoder.", width=88,
          right=False, ranged=False),
    Shown(LABEL, "Label", "Feature", "Your label; or, in italics, what the examples share, "
          "described by rule.", width=240, right=False, ranged=False),
    Shown(CONTEXT, "Example Context", "Feature", "The text around its strongest activation; the "
          "stronger the token, the stronger its colour.", width=320, right=False,
          sortable=False, ranged=False),
    Shown(HISTOGRAM, "Activations", "Feature", "How often it takes which activation: logarithmic "
          "from 1/256 of its maximum (left; weaker ones are counted there) to the maximum "
          "(right), four bars to a doubling. Heights are square roots of counts.",
          sample="n_active", width=128, right=False, sortable=False, ranged=False),
    Shown(STAR, "Starred", "Feature", "Stars that you gave.", width=52, right=False,
          ranged=False),
)  # fmt: skip

_TITLES = {"density": "Activation Freq", "band": "Band", "n_decile_examples": "Decile examples"}
_TONES = {"density": "emerald", "score": "blue", "max_activation": "purple"}
_WIDTHS = {"score": 142, "density": 142}
TOKEN_COLUMNS = {"top_token", "common_token"}  # token ids, shown as their texts
SCORE_PARTS = {"score_accuracy", "score_low", "score_high", "score_contexts"}


def _of(column: Column, group: str) -> Shown:
    word = column.name in TOKEN_COLUMNS
    return Shown(
        column.name,
        _TITLES.get(column.name, column.label),
        group,
        column.definition,
        column.sample,
        column.unit,
        width=_WIDTHS.get(column.name, 140),
        right=not word and column.name != "band",
        percent=column.unit.startswith("share") or column.name == "score",
        tone=_TONES.get(column.name, ""),
        ranged=not word and column.name not in ("band", "nearest_feature"),
    )


def _all() -> dict[str, Shown]:
    groups = {name: group for group, names in GROUPS.items() for name in names}
    found = {one.name: one for one in _OWN}
    found |= {column.name: _of(column, groups.get(column.name, OTHER)) for column in TABLE}
    order = [name for names in GROUPS.values() for name in names]
    order += [name for name in found if name not in groups]
    return {name: found[name] for name in order if name in found}


ALL = _all()


def available(names: Iterable[str], has_histograms: bool) -> list[Shown]:
    """The columns that can be shown of a discovery whose statistics have these names."""
    there = set(names) | {ID, LABEL, CONTEXT, STAR} | ({HISTOGRAM} if has_histograms else set())
    return [one for one in ALL.values() if one.name in there]


def sample_text(shown: Shown, meta: FeatureMeta | None) -> str:
    """`of 1,204,512 tokens`, or which column counts them; "" where there is nothing to count."""
    if not shown.sample or meta is None:
        return ""
    total = getattr(meta, shown.sample, None)
    if isinstance(total, int):
        what = "features" if shown.sample == "n_features" else shown.sample
        return f"of {formatting.count(total)} {what}"
    other = ALL.get(shown.sample)
    return f"each feature's own number is in the column “{other.title}”" if other else ""


def tip(shown: Shown, meta: FeatureMeta | None) -> str:
    """Definition, unit and sample size."""
    unit = f"Unit: {shown.unit}{', in %' if shown.percent else ''}."
    unit = unit if shown.unit and shown.name not in TOKEN_COLUMNS else ""
    sample = sample_text(shown, meta)
    return "\n".join(filter(None, (shown.definition, unit, f"Sample: {sample}." if sample else "")))


def written(shown: Shown, value: float) -> str:
    """A number of a column as the table writes it."""
    if value != value:
        return "—"
    return _writer(shown)(value)


def _writer(shown: Shown) -> Callable[[float], str]:
    if shown.name == "band":
        return lambda value: BANDS[int(value)]
    if shown.name == "nearest_feature":
        return lambda value: "—" if value < 0 else f"#{int(value)}"
    if shown.name == "score":
        return lambda value: formatting.percent(value, 0)
    if shown.name == "score_contexts":
        return lambda value: formatting.count(value) if value else "—"
    if shown.name in ("density", "context_density"):
        return frequency
    if shown.percent:
        return lambda value: formatting.percent(value, 1)
    if shown.unit == "%":
        return lambda value: formatting.percent(value / 100, 0)
    if shown.unit in ("tokens", "contexts", "examples") and shown.name != "burst_length":
        return formatting.count
    return significant


def frequency(share: float) -> str:
    """A density as people compare it: `0.23%`, and `0.0012%` where two decimals would say 0."""
    if share <= 0:
        return "0%"
    if share < 0.0001:
        return formatting.percent(share, 4)
    return formatting.percent(share, 2)


def significant(value: float) -> str:
    """Three digits where they tell something: `0.00213`, `0.213`, `2.13`, `21.3`, `2,130`."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.001:
        return f"{value:.2g}"
    decimals = 4 if size < 0.01 else 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return formatting.number(value, decimals)


def range_text(shown: Shown, low: float | None, high: float | None) -> str:
    """`0.01% ≤ Activation Freq ≤ 1%`"""
    parts = [shown.title]
    if low is not None:
        parts.insert(0, f"{bound_text(shown, low)} ≤")
    if high is not None:
        parts.append(f"≤ {bound_text(shown, high)}")
    return " ".join(parts)


def bound_text(shown: Shown, value: float) -> str:
    """A bound as it was typed: no digit that was not."""
    return f"{value * 100:.10g}%" if shown.percent else f"{value:.10g}"


def bound_of(shown: Shown, text: str) -> float | None:
    """What was typed as a bound: `0.01%` or `0.01` of a share is 0.0001. None where it is empty.

    Raises ValueError where it is no number.
    """
    text = text.strip().removesuffix("%").strip().replace(",", "")
    if not text:
        return None
    value = float(text)
    if value != value:
        raise ValueError(text)
    return float(f"{value / 100:.10g}") if shown.percent else value


def score_tip(values: Mapping[str, float]) -> str:
    """The interval behind an interpretability score; "" where there is none."""
    if not set(values) >= SCORE_PARTS:
        return ""
    accuracy, n = values["score_accuracy"], values["score_contexts"]
    low, high = values["score_low"], values["score_high"]
    if not n or accuracy != accuracy:
        return "No score: too few contexts activate it, or hardly any does not."
    return (
        f"A rule tells active from inactive contexts with balanced accuracy {accuracy:.2f} "
        f"(95 % interval {low:.2f} to {high:.2f}, {formatting.count(n)} held-out contexts)."
    )
