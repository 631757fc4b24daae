"""How well a dictionary reconstructs: definitions in one place, each tested against a plain
computation.

All statistics are over tokens that count (`engine/activations/positions.py`). What a dictionary
costs the model is in `loss.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.sae.dictionary import Codes, Dictionary
from mistudio.errors import InvalidInput

# Temporaries of a batch are made for at most this many values at a time: 4 MB each.
CHUNK_CELLS = 1024**2
DENSE_SHARE = 0.1
# Quarters of a decade; a millionth is one firing in as many tokens as are ever judged.
DENSITY_EDGES = tuple(step / 4 for step in range(-24, 1))


@dataclass(frozen=True)
class Density:
    """How often latents fire: `counts[i]` latents have a log10 frequency (share of tokens) from
    `log10_edges[i]` to below `log10_edges[i + 1]`; what lies under the first edge is in the first
    bin, a frequency of 1 in the last. `never_fired` latents are in none: they have no log."""

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    never_fired: int


@dataclass(frozen=True)
class ReconstructionQuality:
    """Over `tokens` tokens, of targets y (the input itself in an autoencoder), their
    reconstructions y^ and latent activations z in the dictionary's own unit.

    With V = E||y||^2 - ||E y||^2:
    l0 = mean #(z != 0); l1 = mean sum |z|; mse = E||y - y^||^2 (summed over channels);
    explained_variance = 1 - mse / V; fvu = mse / V; cosine = mean cos(y, y^), 0 where y^ is 0;
    l2_ratio = mean ||y^|| / ||y||; reconstruction_bias = E||y^||^2 / E[y . y^] (1 is unbiased,
    below 1 shrunk; arXiv 2404.16014, equation 10).

    Only to compare with published numbers, never to judge by:
    explained_variance_legacy = mean (1 - ||y - y^||^2 / ||y - mean of its batch||^2), a mean of
    ratios that depends on the batches (SAELens' field of that name; SAEBench's paper);
    explained_variance_about_zero = 1 - mse / (E||y||^2 - (mean of y_ij^2)^2), which SAELens 6.18
    and SAEBench 0.6 call explained variance: nearly relative to zero, not to the mean.

    fvu_p50, fvu_p90, fvu_p99: quantiles over tokens of ||y - y^||^2 / V, whose mean is fvu; read
    from bins 1.1 % wide, so exact to 0.6 %.
    fvu_of_skip = mse / V', where V' is the V of what the skip leaves to the latents (y less the
    output without any latent), so that a dead dictionary gets 1 and not what its skip passes on;
    None without a skip.

    dead_share = share of latents that fired on none of `dead_share_window` tokens; dense_share =
    share that fired on more than 10 % of tokens; density: all of them. NaN is what cannot be
    said, as the explained variance of a constant.
    """

    tokens: int
    explained_variance: float
    fvu: float
    l0: float
    dead_share: float
    dense_share: float
    cosine: float
    l1: float
    mse: float
    explained_variance_legacy: float
    explained_variance_about_zero: float
    l2_ratio: float
    reconstruction_bias: float
    fvu_p50: float
    fvu_p90: float
    fvu_p99: float
    fvu_of_skip: float | None
    dead_share_window: int
    density: Density

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: what is not finite becomes None."""
        return plain(asdict(self))


class ReconstructionMeter:
    """Streams batches of any size; memory of the dictionary's width.

    Products are taken in float32, a row at a time, and added up in float64; variances are
    combined from each batch's own (Chan, Golub, LeVeque 1983), so that a mean far larger than
    the spread, as residual streams have, costs no digits.
    """

    def __init__(self, d_out: int, d_sae: int) -> None:
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self._target = _Spread(d_out)
        self._without_skip = _Spread(d_out)
        self._errors = _LogHistogram()
        self._error = 0.0
        self._target_square = 0.0
        self._square = 0.0
        self._dot = 0.0
        self._cosine = 0.0
        self._l2_ratio = _MeanRatio()
        self._legacy = _MeanRatio()
        self._active = 0
        self._l1 = 0.0

    def add(
        self,
        target: Tensor,
        reconstruction: Tensor,
        codes: Codes,
        skip_only: Tensor | None = None,
    ) -> None:
        """`target`, `reconstruction` and `skip_only` (what is reconstructed with no latent
        active, where there is a skip) are raw activations [n, d_out]; `codes` of the same rows.
        Give `skip_only` with every batch or with none."""
        if not len(target):
            return
        self.tokens += len(target)
        self._active += len(codes.values)
        self._l1 += float(codes.values.abs().sum())
        self.fired += torch.bincount(codes.latents, minlength=codes.d_sae).cpu()
        mean = target.mean(0, dtype=torch.float32)
        deviations: list[float] = []
        step = max(1, CHUNK_CELLS // target.shape[1])
        for y, y_hat in zip(target.split(step), reconstruction.split(step), strict=True):
            deviations.append(self._add_rows(y.float(), y_hat.float(), mean))
        self._target.add(len(target), mean, sum(deviations))
        if skip_only is not None:
            self._add_left_to_latents(target, skip_only, step)

    def _add_rows(self, y: Tensor, y_hat: Tensor, mean: Tensor) -> float:
        """The sums over rows; returns the rows' summed square distance to `mean`."""
        rows = torch.stack(
            [_squares(y - y_hat), _squares(y - mean), _squares(y), _squares(y_hat), _dots(y, y_hat)]
        )
        # One transfer, and float64 on the CPU: Apple's GPUs have none.
        error, deviation, square, square_hat, dot = rows.cpu().double()
        norms = (square * square_hat).sqrt()
        self._errors.add(error)
        self._error += float(error.sum())
        self._target_square += float(square.sum())
        self._square += float(square_hat.sum())
        self._dot += float(dot.sum())
        self._cosine += float((dot / norms.clamp_min(torch.finfo(torch.float64).tiny)).sum())
        self._l2_ratio.add(square_hat.sqrt(), square.sqrt())
        self._legacy.add(deviation - error, deviation)
        return float(deviation.sum())

    def _add_left_to_latents(self, target: Tensor, skip_only: Tensor, step: int) -> None:
        mean = target.mean(0, dtype=torch.float32) - skip_only.mean(0, dtype=torch.float32)
        total = sum(
            float(_squares(y.float() - s.float() - mean).cpu().double().sum())
            for y, s in zip(target.split(step), skip_only.split(step), strict=True)
        )
        self._without_skip.add(len(target), mean, total)

    def result(self) -> ReconstructionQuality:
        """Raises InvalidInput where not one token was added."""
        n = self.tokens
        if not n:
            raise InvalidInput(
                "Nothing to judge by",
                "Not one held-out token counts: they are all special tokens or outliers.",
                "Add more text to the dataset.",
            )
        width = len(self._target.mean)
        second_moment = self._target_square / n
        fvu = ratio(self._error, self._target.total)
        about_zero = second_moment - (second_moment / width) ** 2
        p50, p90, p99 = (
            ratio(self._errors.quantile(share), self._target.total / n)
            for share in (0.5, 0.9, 0.99)
        )
        skipped = self._without_skip.count
        if skipped not in (0, n):
            raise ValueError("skip_only was given with some batches and not with others")
        return ReconstructionQuality(
            tokens=n,
            explained_variance=1.0 - fvu,
            fvu=fvu,
            l0=self._active / n,
            dead_share=float((self.fired == 0).double().mean()),
            dense_share=float((self.fired > DENSE_SHARE * n).double().mean()),
            cosine=self._cosine / n,
            l1=self._l1 / n,
            mse=self._error / n,
            explained_variance_legacy=self._legacy.mean,
            explained_variance_about_zero=1.0 - ratio(self._error / n, about_zero),
            l2_ratio=self._l2_ratio.mean,
            reconstruction_bias=ratio(self._square, self._dot),
            fvu_p50=p50,
            fvu_p90=p90,
            fvu_p99=p99,
            fvu_of_skip=ratio(self._error, self._without_skip.total) if skipped else None,
            dead_share_window=n,
            density=density(self.fired, n),
        )


@torch.no_grad()
def evaluate(
    dictionary: Dictionary, batches: Iterable[tuple[Tensor, Tensor]], d_out: int
) -> ReconstructionMeter:
    """`dictionary` on (input [n, d_in], target [n, d_out]) pairs of raw activations, which are
    the same tensor in an autoencoder; every wiring."""
    meter = ReconstructionMeter(d_out, dictionary.d_sae)
    for x, y in batches:
        x, y = x.to(dictionary.device), y.to(dictionary.device)
        codes = dictionary.encode(x)
        skip_only = None if dictionary.skip is None else without_latents(dictionary, x)
        meter.add(y, dictionary.decode(codes, x), codes, skip_only)
    return meter


def without_latents(dictionary: Dictionary, x: Tensor) -> Tensor:
    """What `dictionary` makes of raw inputs [n, d_in] when no latent fires, [n, d_out]: its skip
    and its bias."""
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    silent = Codes(none, none, dictionary.decoder.new_empty(0), len(x), dictionary.d_sae)
    return dictionary.decode(silent, x)


def density(fired: Tensor, tokens: int) -> Density:
    """The histogram of `fired` [d_sae], the tokens each latent fired on out of `tokens`."""
    alive = fired[fired > 0].double()
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    bins = torch.bucketize((alive / tokens).log10(), edges, right=True) - 1
    counts = torch.bincount(bins.clamp(0, len(edges) - 2), minlength=len(edges) - 1)
    return Density(DENSITY_EDGES, tuple(counts.tolist()), len(fired) - len(alive))


def ratio(numerator: float, denominator: float) -> float:
    """NaN where it has no value."""
    return numerator / denominator if denominator else math.nan


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same without NaN and infinity, which are None: strict JSON."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


class _Spread:
    """Mean and summed square distance to it, combined from batches without cancellation."""

    def __init__(self, d: int) -> None:
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self.total = 0.0

    def add(self, count: int, mean: Tensor, total: float) -> None:
        """A batch of `count` rows at a summed square distance of `total` to their `mean` [d]."""
        gap = mean.cpu().double() - self.mean
        together = self.count + count
        self.total += total + float(_squares(gap)) * self.count * count / together
        self.mean += gap * (count / together)
        self.count = together


class _MeanRatio:
    """Mean of ratios over the tokens where there is one (a batch of one token has no spread)."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, numerators: Tensor, denominators: Tensor) -> None:
        kept = denominators > 0
        self._sum += float((numerators[kept] / denominators[kept]).sum())
        self._count += int(kept.sum())

    @property
    def mean(self) -> float:
        return ratio(self._sum, self._count)


class _LogHistogram:
    """Values >= 0 in bins of 1/64 octave (1.1 %) from 2^-64 to 2^64, 64 KB. The outermost bins
    stand for 0 and for infinity, and NaN is in the latter: a diverged dictionary is no error."""

    PER_OCTAVE = 64
    LOWEST = -64

    def __init__(self) -> None:
        self._counts = torch.zeros(-2 * self.LOWEST * self.PER_OCTAVE, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        top = len(self._counts) - 1
        places = (values.log2() - self.LOWEST) * self.PER_OCTAVE
        bins = places.clamp(0, top).nan_to_num(nan=top).long()
        self._counts += torch.bincount(bins, minlength=len(self._counts))

    def quantile(self, share: float) -> float:
        """The value that `share` of all values do not exceed: the geometric middle of its bin."""
        reached = self._counts.cumsum(0)
        rank = max(1, math.ceil(share * int(reached[-1])))
        place = int(torch.searchsorted(reached, rank))
        if place in (0, len(reached) - 1):
            return math.inf if place else 0.0
        return 2.0 ** ((place + 0.5) / self.PER_OCTAVE + self.LOWEST)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
