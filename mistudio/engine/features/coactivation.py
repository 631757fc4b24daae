"""Which latents fire together, and whose directions are alike: all pairs, in bounded memory.

Over N tokens, with n_i the tokens on which latent i is active and n_ij those on which both are:

    phi     = (N n_ij - n_i n_j) / sqrt(n_i n_j (N - n_i) (N - n_j))
    jaccard = n_ij / (n_i + n_j - n_ij)
    pearson = (N sum ab - sum a sum b) / sqrt((N sum a^2 - (sum a)^2) (N sum b^2 - (sum b)^2))

phi is the correlation of firing, pearson that of the activations, zeros included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array, vstack
from scipy.spatial.distance import squareform
from torch import Tensor

from mistudio.engine.activations.source import capture_windows
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Codes, Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import InvalidInput

METRICS = ("phi", "jaccard", "pearson", "cosine")
TOP = 20
MIN_PAIRS = 10
LARGEST_MATRIX = 200
# Pairs looked at together: at most 32 MB for each of a handful of float64 tables.
CELLS = 4 * 1024**2


@dataclass(frozen=True)
class Neighbours:
    """The `k` most alike latents of each of n, most alike first.

    `index` int32 [n, k], -1 where there are fewer; `value` float32 [n, k], NaN there; `together`
    int32 [n, k], tokens on which both fire (0 for cosine, which is of directions).
    """

    metric: str
    index: np.ndarray
    value: np.ndarray
    together: np.ndarray


@dataclass(frozen=True)
class CoActivation:
    """Neighbours by each of three measures, over the same `tokens` tokens; pairs that fire
    together on fewer than `min_pairs` of them are left out. `fired` int64 [n] is n_i."""

    phi: Neighbours
    jaccard: Neighbours
    pearson: Neighbours
    tokens: int
    min_pairs: int
    fired: np.ndarray


@dataclass(frozen=True)
class PairMatrix:
    """`values` float32 [n, n] of the selected `features`, NaN where a latent never fired;
    `together` int64 [n, n]; `order` lists rows so that alike ones stand side by side (average
    linkage on 1 - value, leaves ordered optimally)."""

    metric: str
    features: tuple[int, ...]
    values: np.ndarray
    together: np.ndarray
    order: tuple[int, ...]
    tokens: int


def sample_codes(
    model: HookedDecoder,
    tokens: TokenSplit,
    dictionaries: Mapping[Site, Dictionary],
    medians: Mapping[HookPoint, float],
    context: int,
    *,
    max_tokens: int = 200_000,
    batch_windows: int = 8,
    progress: Progress = SILENT,
) -> dict[Site, csr_array]:
    """Activations float32 [tokens, d_sae] of each dictionary on windows spread over `tokens`.

    Row i is the same token in all of them, so that latents of different layers can be compared;
    a position counts where it counts at every site. At most `max_tokens` positions are read.
    """
    tokens.require_windows(context, 1, "Comparing features")
    available = tokens.n_windows(context)
    wanted = max(1, min(available, max_tokens // context))
    order = np.unique(np.linspace(0, available - 1, wanted).astype(np.int64))
    points = tuple({point for site in dictionaries for point in site.points})
    parts: dict[Site, list[csr_array]] = {site: [] for site in dictionaries}
    done = 0
    for batch in capture_windows(
        model, tokens, points, medians, order, context, batch_windows, progress
    ):
        for site, dictionary in dictionaries.items():
            rows = batch.captured[site.input][batch.mask].float().to(dictionary.device)
            parts[site].append(as_csr(dictionary.encode(rows)))
        done += len(batch.windows)
        progress.report(done, len(order), phase="sample")
    return {site: csr_array(vstack(chunks, format="csr")) for site, chunks in parts.items()}


def as_csr(codes: Codes) -> csr_array:
    """float32 [n_rows, d_sae]"""
    return csr_array(
        (
            codes.values.float().cpu().numpy(),
            codes.latents.cpu().numpy().astype(np.int32),
            codes.offsets.cpu().numpy().astype(np.int64),
        ),
        shape=(codes.n_rows, codes.d_sae),
    )


def co_activation(
    a: csr_array,
    b: csr_array | None = None,
    *,
    top: int = TOP,
    min_pairs: int = MIN_PAIRS,
    progress: Progress = SILENT,
) -> CoActivation:
    """Neighbours of every latent of `a` [tokens, n] among those of `b` [tokens, m], the latents
    of another layer on the same tokens; among those of `a` itself, each other one, without it.

    All pairs are counted, some rows of the table of pairs at a time (`CELLS`).
    """
    left = _Sums.of(a)
    right = left if b is None else _Sums.of(b)
    if left.tokens != right.tokens:
        raise ValueError(f"{left.tokens} and {right.tokens} rows are not the same tokens")
    kinds = ("phi", "jaccard", "pearson")
    found: dict[str, list[tuple[np.ndarray, ...]]] = {kind: [] for kind in kinds}
    step = max(1, CELLS // max(right.n, 1))
    for start in range(0, left.n, step):
        progress.check()
        stop = min(start + step, left.n)
        row, other, together, products = _pairs(left, right, start, stop)
        enough = together >= min_pairs
        if b is None:
            enough &= row + start != other
        row, other = row[enough], other[enough]
        together, products = together[enough], products[enough]
        for kind in kinds:
            values = _measure(kind, together, products, left.at(row + start), right.at(other))
            found[kind].append(_best(row, other, values, together, stop - start, top))
        progress.report(stop, left.n, phase="pairs")
    return CoActivation(
        **{kind: _joined(kind, parts) for kind, parts in found.items()},
        tokens=left.tokens,
        min_pairs=min_pairs,
        fired=left.fired.astype(np.int64),
    )


def decoder_neighbours(
    decoder: Tensor,
    other: Tensor | None = None,
    *,
    top: int = TOP,
    progress: Progress = SILENT,
) -> Neighbours:
    """The directions most alike each row of `decoder` [n, d] by cosine: among the other rows, or
    among those of `other` [m, d]. Rows of zeros have and are no neighbours."""
    left = _unit(decoder)
    right = left if other is None else _unit(other)
    empty = ~right.any(dim=1)
    step = max(1, CELLS // max(len(right), 1))
    parts = []
    for start in range(0, len(left), step):
        progress.check()
        rows = left[start : start + step]
        cosines = rows @ right.T
        cosines[:, empty] = -torch.inf
        cosines[~rows.any(dim=1)] = -torch.inf
        if other is None:
            own = torch.arange(len(rows), device=rows.device)
            cosines[own, own + start] = -torch.inf
        parts.append(_best_of_table(cosines.cpu().numpy(), top))
        progress.report(start + len(rows), len(left), phase="directions")
    return _joined("cosine", parts)


def pair_matrix(
    metric: str,
    features: Sequence[int],
    codes: csr_array,
    decoder: Tensor | None = None,
) -> PairMatrix:
    """All pairs of up to 200 selected features, by a measure of `codes` [tokens, d_sae] or, for
    "cosine", of the rows of `decoder` [d_sae, d]. Raises InvalidInput for too many, too few or
    an unknown measure."""
    chosen = np.asarray(list(dict.fromkeys(features)), dtype=np.int64)
    if not 2 <= len(chosen) <= LARGEST_MATRIX:
        raise InvalidInput(
            "The number of features does not fit a matrix",
            f"{len(chosen)} different features were selected.",
            f"Select from 2 to {LARGEST_MATRIX}.",
        )
    if metric not in METRICS:
        raise InvalidInput(
            "Unknown measure", f'"{metric}" is not one.', f"Choose one of {', '.join(METRICS)}."
        )
    sums = _Sums.of(csr_array(codes[:, chosen]))
    n = len(chosen)
    row, other, count, products = _pairs(sums, sums, 0, n)
    together = np.zeros((n, n), np.int64)
    together[row, other] = count
    if metric == "cosine":
        if decoder is None:
            raise ValueError("cosine is of directions: it needs the decoder")
        unit = _unit(decoder[torch.from_numpy(chosen)])
        values = (unit @ unit.T).cpu().numpy().astype(np.float64)
    else:
        values = np.zeros((n, n))
        values[row, other] = products  # a pair that never fires together has a product of 0
        places = np.indices((n, n)).reshape(2, -1)
        values = _measure(
            metric, together.ravel(), values.ravel(), sums.at(places[0]), sums.at(places[1])
        ).reshape(n, n)
    return PairMatrix(
        metric,
        tuple(int(i) for i in chosen),
        values.astype(np.float32),
        together,
        _order(values),
        sums.tokens,
    )


@dataclass(frozen=True)
class _Moments:
    """Sums over `tokens` tokens for each member of a list of latents, float64 [k]."""

    tokens: int
    fired: np.ndarray
    total: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True)
class _Sums:
    """A table of activations, by latent and by token, and sums over tokens, float64 [n]."""

    tokens: int
    active: csr_array  # [n, tokens] int32 ones
    values: csr_array  # [n, tokens] float64
    active_by_token: csr_array
    values_by_token: csr_array
    fired: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @property
    def n(self) -> int:
        return len(self.fired)

    @classmethod
    def of(cls, codes: csr_array) -> _Sums:
        by_token = csr_array(codes, dtype=np.float64)
        values = csr_array(by_token.T.tocsr())
        active = _ones(values)
        return cls(
            codes.shape[0],
            active,
            values,
            _ones(by_token),
            by_token,
            np.diff(values.indptr).astype(np.float64),
            np.asarray(values.sum(axis=1)),
            np.asarray(values.multiply(values).sum(axis=1)),
        )

    def at(self, latents: np.ndarray) -> _Moments:
        return _Moments(
            self.tokens, self.fired[latents], self.total[latents], self.squares[latents]
        )


def _ones(table: csr_array) -> csr_array:
    """Of the same structure."""
    return csr_array((np.ones(table.nnz, np.int32), table.indices, table.indptr), shape=table.shape)


def _pairs(
    left: _Sums, right: _Sums, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, other, tokens on which both fire, sum of the activations' products) [k]: the pairs
    of latents from `start` to `stop` that fire together at all, sorted by row, which counts from
    `start`."""
    together = left.active[start:stop] @ right.active_by_token
    products = left.values[start:stop] @ right.values_by_token
    # Activations are positive, so both products have the same entries, made in the same order.
    if not np.array_equal(together.indices, products.indices):
        together.sort_indices()
        products.sort_indices()
    row = np.repeat(np.arange(stop - start), np.diff(together.indptr))
    return row, together.indices.astype(np.int64), together.data, products.data


def _measure(
    kind: str, together: np.ndarray, products: np.ndarray, left: _Moments, right: _Moments
) -> np.ndarray:
    """float64 [k]; NaN where one of a pair never fires, or always does (phi), or never varies
    (pearson)."""
    n = float(left.tokens)
    a, b = left.fired, right.fired
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "jaccard":
            return np.where((a > 0) & (b > 0), together / (a + b - together), np.nan)
        if kind == "phi":
            return (n * together - a * b) / np.sqrt(a * (n - a)) / np.sqrt(b * (n - b))
        spread_a = n * left.squares - left.total**2
        spread_b = n * right.squares - right.total**2
        shared = n * products - left.total * right.total
        return shared / np.sqrt(spread_a) / np.sqrt(spread_b)


def _best(
    row: np.ndarray, other: np.ndarray, values: np.ndarray, together: np.ndarray, n: int, top: int
) -> tuple[np.ndarray, ...]:
    """(index, value, together) [n, top] of the largest values of each row; what is not finite is
    no neighbour. Of equal values the smaller index comes first."""
    known = np.isfinite(values)
    row, other, values, together = row[known], other[known], values[known], together[known]
    order = np.lexsort((other, -values, row))
    first = np.searchsorted(row, np.arange(n))
    rank = np.arange(len(order)) - first[row]  # `row` is sorted, so it is its own sorted self
    order, rank, row = order[rank < top], rank[rank < top], row[rank < top]
    index = np.full((n, top), -1, np.int32)
    chosen = np.full((n, top), np.nan, np.float32)
    count = np.zeros((n, top), np.int32)
    index[row, rank], chosen[row, rank] = other[order], values[order]
    count[row, rank] = together[order]
    return index, chosen, count


def _best_of_table(values: np.ndarray, top: int) -> tuple[np.ndarray, ...]:
    """`_best` of a full table [n, m], -inf for what is no neighbour; nothing fires in it."""
    width = min(top, values.shape[1])
    column = torch.from_numpy(values).topk(width, dim=1).indices.numpy()
    row = np.repeat(np.arange(len(values)), width)
    column = column.ravel()
    nothing = np.zeros(len(row), np.int32)
    return _best(row, column, values[row, column], nothing, len(values), top)


def _joined(metric: str, parts: list[tuple[np.ndarray, ...]]) -> Neighbours:
    index, value, together = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Neighbours(metric, index, value, together)


def _unit(directions: Tensor) -> Tensor:
    rows = directions.float()
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms.clamp_min(1e-30), torch.zeros_like(rows))


def _order(values: np.ndarray) -> tuple[int, ...]:
    distance = 1.0 - np.where(np.isfinite(values), values, 0.0)
    distance = np.maximum((distance + distance.T) / 2, 0.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return tuple(int(i) for i in leaves_list(tree))
