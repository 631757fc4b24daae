"""SAEDashboard's batch files, which Neuronpedia is fed from: format A.

    {model}_{set}_{hook}_{d_sae}[_{suffix}]/batch-{n}.json     at most 128 features each
                                            run_settings.json
                                            skipped_indexes.json   selected ones that never fired

Key names and shapes are those of SAEDashboard 0.8 and later (`NeuronpediaDashboardFeature.to_dict`
and what its exporter reads). What the numbers are here:

- `activations`: top examples (`bin_min` and `bin_contains` -1, `bin_max` the maximum), then, of
  whole windows, samples of each tenth of the activations (SAEDashboard cuts [0, max] in intervals
  of equal width, and counts zeros to the lowest). `bin_contains` is a tenth of the density.
  Position 0 of a whole window is left out, as there.
- `freq_hist_*`: rebinned from a histogram of 4 bins an octave and the deciles, total kept.
- `neg_*`, `pos_*`, `logits_hist_*`: final norm folded in and centred, where SAEDashboard uses the
  raw unembedding.
- `neuron_alignment_*`: the largest components of the decoder row, as there.
- `correlated_neurons_*`, `correlated_features_*`: empty, as they need all activations at once;
  likewise `decoder_weights_dist`, which only attention outputs have. `tokens_{n}.pt` is not
  written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistudio.engine.features.exports.material import KNOWN, TOP, Context, Feature, Material
from mistudio.engine.features.store import Histogram
from mistudio.engine.progress import SILENT, Progress

BATCH = 128
BINS = 50
ROWS = 10  # logit tokens of each side
ALIGNED = 3
DECIMALS = 5
_ZERO = "0.0, "


@dataclass(frozen=True)
class Naming:
    """How Neuronpedia will call it: `set_name` is the source set, `suffix` tells several
    dictionaries of one set and layer apart. `vectors`: decoder rows go along."""

    set_name: str
    suffix: str = ""
    vectors: bool = False


def write(material: Material, folder: Path, naming: Naming, progress: Progress = SILENT) -> Path:
    """Write the batch files into a folder of their own below `folder`, which is returned."""
    origin = material.origin
    parts = [origin.model, naming.set_name, origin.hook_point, str(len(material.store))]
    target = folder / safe("_".join([*parts, naming.suffix] if naming.suffix else parts))
    target.mkdir(parents=True)
    skipped: list[int] = []
    batch, file = 0, None
    written = 0
    try:
        for feature in material.each(KNOWN):
            progress.check()
            if not feature.alive:
                skipped.append(feature.index)
            else:
                if written % BATCH == 0:
                    if file is not None:
                        file.write("]}\n")
                        file.close()
                    file = (target / f"batch-{batch}.json").open("w", encoding="utf-8")
                    file.write(f'{_head(material, naming)[:-1]}, "features": [')
                    batch += 1
                else:
                    assert file is not None
                    file.write(",\n")
                file.write(feature_json(feature, material, naming.vectors))
                written += 1
            progress.report(written + len(skipped), len(material), phase="write")
        if file is not None:
            file.write("]}\n")
    finally:
        if file is not None:
            file.close()
    _settings(material, naming, target)
    record = {
        "model_id": origin.model,
        "layer": str(origin.layer),
        "sae_set": naming.set_name,
        "log_sparsity": 0,
        "skipped_indexes": skipped,
    }
    (target / "skipped_indexes.json").write_text(json.dumps(record), encoding="utf-8")
    return target


def _head(material: Material, naming: Naming) -> str:
    return json.dumps(
        {
            "model_id": material.origin.model,
            "layer": material.origin.layer,
            "sae_set": naming.set_name,
            "sae_id_suffix": naming.suffix or None,
        }
    )


def _settings(material: Material, naming: Naming, target: Path) -> None:
    """What SAEDashboard would have been asked for, and where the numbers come from."""
    meta = material.store.meta
    settings = {
        "sae_set": naming.set_name,
        "np_set_name": naming.set_name,
        "np_sae_id_suffix": naming.suffix or None,
        "model_id": material.origin.model,
        "layer": material.origin.layer,
        "huggingface_dataset_path": material.origin.dataset,
        "n_prompts_total": meta.contexts,
        "n_tokens_in_prompt": meta.context,
        "n_features_at_a_time": BATCH,
        "top_acts_group_size": meta.top_k,
        "n_quantiles": 10 if material.whole is not None else 0,
        "quantile_group_size": material.per_decile if material.whole is not None else 0,
        "written_by": f"miStudio {material.origin.version}".strip(),
        "provenance": meta.provenance,
        "exclusions": meta.exclusions,
    }
    (target / "run_settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def safe(name: str) -> str:
    """A name as a file's: other characters become hyphens."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "unnamed"


# --- one feature ----------------------------------------------------------------------------------


def feature_json(feature: Feature, material: Material, vectors: bool) -> str:
    fields = {"feature_index": feature.index, **dashboard(feature, material)}
    meta = material.store.meta
    fields |= {
        "n_prompts_total": meta.contexts,
        "n_tokens_in_prompt": meta.context,
        "dataset": clean(material.origin.dataset),
        "vector": vector(feature) if vectors else [],
    }
    rows = ", ".join(
        f'{{"bin_min": {row.bin_min!r}, "bin_max": {row.bin_max!r}, "bin_contains": '
        f'{row.bin_contains!r}, "tokens": {row.tokens}, "values": {row.values}, '
        f'"qualifying_token_index": {row.qualifying}}}'
        for row in rows_of(feature)
    )
    return f'{json.dumps(fields)[:-1]}, "activations": [{rows}]}}'


def dashboard(feature: Feature, material: Material) -> dict[str, Any]:
    """What formats A and B share of a feature, under the names that both have."""
    values, heights = bars_of(feature)
    found: dict[str, Any] = _alignment(feature)
    for name in ("correlated_neurons", "correlated_features"):
        found |= {f"{name}_indices": [], f"{name}_l1": [], f"{name}_pearson": []}
    for name, weighed in (("neg", feature.suppressed), ("pos", feature.promoted)):
        found[f"{name}_str"] = [clean(token.text) for token in weighed[:ROWS]]
        found[f"{name}_values"] = rounded([token.logit for token in weighed[:ROWS]])
    found["frac_nonzero"] = feature.number("n_active") / max(material.store.meta.tokens, 1)
    found["freq_hist_data_bar_values"] = rounded(values)
    found["freq_hist_data_bar_heights"] = heights
    centres, counts = _logit_bins(feature)
    found["logits_hist_data_bar_heights"] = counts
    found["logits_hist_data_bar_values"] = rounded(centres)
    found["decoder_weights_dist"] = []
    return found


def vector(feature: Feature) -> list[float]:
    return [] if feature.direction is None else rounded(feature.direction)


def _alignment(feature: Feature) -> dict[str, Any]:
    """The largest components of the decoder row, each with its share of the row's L1 norm."""
    if feature.direction is None:
        return {f"neuron_alignment_{name}": [] for name in ("indices", "values", "l1")}
    row = feature.direction.astype(np.float64)
    order = np.argpartition(-row, min(ALIGNED, len(row) - 1))[:ALIGNED]
    order = order[np.argsort(-row[order], kind="stable")]
    length = max(float(np.abs(row).sum()), 1e-12)
    return {
        "neuron_alignment_indices": order.tolist(),
        "neuron_alignment_values": rounded(row[order]),
        "neuron_alignment_l1": rounded(np.abs(row[order]) / length),
    }


def bars_of(feature: Feature) -> tuple[np.ndarray, list[int]]:
    """`linear_bins` of a feature's activations, with its deciles and 99th percentile."""
    edges = feature.decile_edges
    known = [(edge, place / (len(edges) - 1)) for place, edge in enumerate(edges)][1:-1]
    known.append((feature.number("p99_activation"), 0.99))
    return linear_bins(feature.histogram, edges[0], edges[-1], known)


def linear_bins(
    histogram: Histogram,
    low: float,
    high: float,
    quantiles: Sequence[tuple[float, float]] = (),
    bins: int = BINS,
) -> tuple[np.ndarray, list[int]]:
    """(centres [bins], counts): the histogram over bins of equal width from `low` to `high`, the
    weakest and strongest activation; between the edges of the original and the `quantiles`
    (activation, share below), activations are taken to be spread evenly. Counts are whole and sum
    to all of them; empty for a feature without any."""
    total = int(histogram.counts.sum())
    if total == 0 or not np.isfinite([low, high]).all():
        return np.empty(0), []
    edges = np.linspace(low, high, bins + 1)
    below = np.concatenate([[0], np.cumsum(histogram.counts)])
    more = np.array([(at, share * total) for at, share in quantiles if at == at]).reshape(-1, 2)
    knots = np.clip(np.concatenate([histogram.edges, more[:, 0]]), low, high)
    order = np.argsort(knots, kind="stable")
    reached = np.maximum.accumulate(np.concatenate([below, more[:, 1]])[order])
    upto = np.interp(edges, knots[order], reached)
    upto[0], upto[-1] = 0, total
    counts = np.diff(np.round(upto)).astype(np.int64)
    # What the shares of bins cannot know: the ends are activations that there were.
    for end, others in ((-1, slice(None, None, -1)), (0, slice(None))):
        if counts[end] == 0 and total > 1:
            counts[others][np.flatnonzero(counts[others])[0]] -= 1
            counts[end] = 1
    return (edges[1:] + edges[:-1]) / 2, [int(count) for count in counts]


def _logit_bins(feature: Feature) -> tuple[np.ndarray, list[int]]:
    if feature.logits is None:
        return np.empty(0), []
    edges = np.linspace(feature.logits.low, feature.logits.high, len(feature.logits.counts) + 1)
    return (edges[1:] + edges[:-1]) / 2, [int(count) for count in feature.logits.counts]


# --- its contexts ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """One example. `tokens` and `values` are JSON lists of equal length."""

    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: str
    values: str
    qualifying: int
    largest: float
    smallest: float
    largest_at: int


def maximum_of(feature: Feature) -> float:
    """Rounded as its examples are: from the 32-bit number, not from its decimal form."""
    return round(float(np.float32(feature.number("max_activation"))), DECIMALS)


def rows_of(feature: Feature) -> Iterator[Row]:
    """A feature's examples in both formats' terms: those whose activations are known."""
    maximum = maximum_of(feature)
    share = round(feature.number("density") / 10, DECIMALS)
    edges = [round(edge, DECIMALS) for edge in feature.decile_edges]
    for context in feature.contexts:
        if not context.known:
            continue
        skip = _leading(context)
        n = len(context.ids) - skip
        numbers = [round(number, DECIMALS) for number in context.numbers]
        parts, upto = [], 0
        for place, number in zip(context.places, numbers, strict=True):
            parts.append(_ZERO * (place - skip - upto) + repr(number))
            upto = place - skip + 1
        values = ", ".join(parts) + (", 0.0" if parts else "0.0") * (n - upto)
        if context.group == TOP:
            bounds = (-1.0, maximum, -1.0)
        else:
            bounds = (edges[context.decile], edges[context.decile + 1], share)
        largest = max(numbers)
        yield Row(
            *bounds,
            _tokens_json(context.texts, skip),
            f"[{values}]",
            context.peak - skip,
            largest,
            0.0 if len(numbers) < n else min(numbers),
            context.places[numbers.index(largest)] - skip,
        )


def _leading(context: Context) -> int:
    """Position 0 never counts: where the context begins with it, it is left out."""
    return 1 if context.position == context.peak else 0


@lru_cache(maxsize=4096)
def _tokens_json(texts: tuple[str, ...], skip: int) -> str:
    return json.dumps([clean(text) for text in texts[skip:]])


def rounded(values: Any) -> list[float]:
    found: list[float] = np.round(np.asarray(values, np.float64), DECIMALS).tolist()
    return found


def clean(text: str) -> str:
    """Databases hold no NUL, and no half of a surrogate pair."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode()
