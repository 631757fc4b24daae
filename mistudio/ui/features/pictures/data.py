"""What pictures are made of, read and computed away from the GUI thread: plain functions whose
results nobody changes any more. Nothing heavy is imported before they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mistudio import formatting
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

if TYPE_CHECKING:
    from mistudio.engine.features.coactivation import PairMatrix
    from mistudio.engine.features.code_sample import CodeSample
    from mistudio.engine.features.maps import FeatureMap

MOST_PAIRS = 200  # features of a heatmap
MOST_ROWS, MOST_WINDOWS = 100, 500  # of the activation matrix
SNIPPET = 12  # tokens on each side of the strongest one
METRICS = (("phi", "Phi (firing)"), ("jaccard", "Jaccard (firing)"),
           ("pearson", "Pearson (activation)"), ("cosine", "Decoder cosine"))  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """What there is of one discovery. `provenance` says of what pictures of it are."""

    run: FeatureRun
    provenance: str
    maps: tuple[FeatureMap, ...]
    sample: CodeSample | None


@dataclass(frozen=True)
class Matrix:
    """Features by windows: `values` float32 [rows, columns], each row as shares of the feature's
    maximum over the whole text, NaN where it has none; `peaks` the activations themselves;
    `places` int32, where in the window, -1 where inactive. In the order to be shown. `candidates`
    counts the windows of the sample in which any of the features is active."""

    features: tuple[int, ...]
    windows: tuple[int, ...]
    values: np.ndarray = field(repr=False)
    peaks: np.ndarray = field(repr=False)
    places: np.ndarray = field(repr=False)
    candidates: int
    sampled: int
    tokens: int


def read(library: Library, run: FeatureRun) -> Opened:
    from mistudio.engine.features.code_sample import load_sample
    from mistudio.engine.features.maps import kept_maps

    folder = library.path(run.folder)
    return Opened(run, provenance(library, run), tuple(kept_maps(folder)), load_sample(folder))


def provenance(library: Library, run: FeatureRun) -> str:
    """`SAE ... • Model ... • Dataset ... • features of 500,000 tokens • discovered 2026-11-23`."""
    from mistudio.jobs.saes import sae_title

    sae = library.saes.get(run.sae_id)
    model = library.models.find(sae.model_id)
    tokenization = library.tokenizations.find(run.tokenization_id)
    dataset = library.datasets.find(tokenization.dataset_id) if tokenization else None
    return " • ".join(
        [
            f"SAE {sae_title(library, sae)} ({formatting.count(sae.d_sae)} latents)",
            f"model {model.name if model else 'deleted'}",
            f"dataset {dataset.name if dataset else 'deleted'}",
            f"features discovered on {formatting.count(run.tokens)} tokens, {run.created_at[:10]}",
        ]
    )


def pairs(
    library: Library,
    run: FeatureRun,
    sample: CodeSample | None,
    metric: str,
    features: Sequence[int],
) -> PairMatrix:
    """How alike features are. The cosine is of directions and needs no sample."""
    if metric != "cosine":
        assert sample is not None
        return sample.pairs(metric, features)
    from mistudio.engine.features.code_sample import EMPTY

    sample = sample if sample is not None else EMPTY
    chosen = list(dict.fromkeys(features))
    return sample.pairs(metric, chosen, _directions(library, run, chosen))


def _directions(library: Library, run: FeatureRun, features: Sequence[int]) -> np.ndarray:
    from mistudio.engine.sae.files import load_sae

    sae = library.saes.get(run.sae_id)
    decoder = load_sae(library.path(sae.folder)).dictionary.decoder
    return decoder[list(features)].float().cpu().numpy()


def matrix(sample: CodeSample, maxima: np.ndarray, features: Sequence[int]) -> Matrix:
    """Of windows in which at least one of the features is active: all, or as many as can be shown,
    spread evenly. `maxima` [n_features] are the features' strongest activations of all."""
    from mistudio.engine.features.clustering import side_by_side

    chosen = np.array(list(dict.fromkeys(features))[:MOST_ROWS], np.int64)
    peaks, places = sample.strongest(chosen)
    active = np.flatnonzero((peaks > 0).any(axis=0))
    kept = active
    if len(active) > MOST_WINDOWS:
        kept = active[np.linspace(0, len(active) - 1, MOST_WINDOWS).astype(np.int64)]
    peaks, places = peaks[:, kept], places[:, kept]
    most = np.asarray(maxima, np.float64)[chosen]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.minimum(peaks / most[:, None], 1.0).astype(np.float32)
    values[~(most > 0)] = np.nan
    rows = side_by_side(values)
    columns = side_by_side(np.nan_to_num(values).T) if len(kept) else np.empty(0, np.int64)
    table = np.ix_(rows, columns)
    return Matrix(
        tuple(chosen[rows].tolist()),
        tuple(np.asarray(sample.windows)[kept][columns].tolist()),
        values[table],
        peaks[table],
        places[table],
        len(active),
        len(sample.windows),
        sample.tokens,
    )


def snippet(reader: Any, window: int, position: int) -> str:
    """The text around a token of a window, that token in brackets."""
    context = reader.store.meta.context
    ids = reader.tokens.windows([window], context)[0].tolist()
    here = max(position, 0)
    first, last = max(here - SNIPPET, 0), min(here + SNIPPET + 1, len(ids))

    def text(part: list[int]) -> str:
        return str(reader.tokenizer.decode(part)).replace("\n", "↵")

    if position < 0:
        return f"{text(ids[: 2 * SNIPPET]).strip()}…"
    before, after = text(ids[first:here]), text(ids[here + 1 : last])
    return f"…{before}⟦{text(ids[here : here + 1])}⟧{after}…"
