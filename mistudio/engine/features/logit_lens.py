"""Which tokens a latent's direction promotes and suppresses through the unembedding alone.

The direct path only: what later blocks make of the direction is not in it. `ablation` measures
that with forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.errors import UnsupportedModel

BINS = 50
GAP = 10  # tokens whose mean logit is compared with all others'
# Logits are held for at most this many (direction, token) pairs at a time: 32 MB in float32.
CELLS = 8 * 1024**2


@dataclass(frozen=True)
class LogitLens:
    """Logits of n directions over the vocabulary, each centred on its own mean.

    `ids` int32 and `values` float32 [n, 2, top]: side 0 the most promoted tokens, strongest
    first, side 1 the most suppressed. `histogram` int32 [n, bins] counts tokens in bins of equal
    width from `low` to `high` [n], the smallest and largest logit (the last bin holds `high`).
    `std`, `skew` and `kurtosis` (3 for a normal distribution) are moments over all tokens of the
    vocabulary, `top_gap` = (mean of the ten largest) / std: Bloom & Lin's "Understanding SAE
    features with the logit lens". A direction of zeros has std 0 and NaN for what is divided
    by it.
    """

    ids: Tensor
    values: Tensor
    histogram: Tensor
    low: Tensor
    high: Tensor
    std: Tensor
    skew: Tensor
    kurtosis: Tensor
    top_gap: Tensor


@dataclass(frozen=True)
class ExampleLogits:
    """What one activation adds to the logits at one token.

    `ids` int32 and `values` float32 [2, top] as in `LogitLens`, in logits at this token;
    `values` hold the final norm's division at this token's `rms`.
    """

    ids: Tensor
    values: Tensor
    rms: float


def logit_lens(
    model: HookedDecoder, directions: Tensor, top: int = 10, progress: Progress = SILENT
) -> tuple[Tensor, Tensor]:
    """Top and bottom tokens of each direction [n, d_model]: `ids` and `values` of `LogitLens`."""
    ids, values = [], []
    for logits in _Unembedding(model).chunks(directions, progress):
        chosen, sizes = _extremes(logits, top)
        ids.append(chosen)
        values.append(sizes)
    return torch.cat(ids), torch.cat(values)


@torch.inference_mode()
def full_logit_lens(
    model: HookedDecoder,
    directions: Tensor,
    top: int = 20,
    bins: int = BINS,
    progress: Progress = SILENT,
) -> LogitLens:
    """Tokens, histogram and moments of directions [n, d_model] that are written to the residual
    stream (`written_directions`).

    The final norm's gain is folded in (Gemma's is 1 + weight) and, for LayerNorm, the direction
    is centred: `l = (d * gain) @ W_U`, less its mean over the vocabulary, which a softmax does not
    see. Scale is relative, as the final norm divides by the size of the stream at each token;
    `example_logits` gives it for one.
    """
    parts = [
        (*_extremes(logits, top), *_histogram(logits, bins), *_moments(logits))
        for logits in _Unembedding(model).chunks(directions, progress)
    ]
    return LogitLens(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.inference_mode()
def example_logits(
    model: HookedDecoder,
    direction: Tensor,
    activation: float,
    residual: Tensor,
    top: int = 10,
) -> ExampleLogits:
    """What `activation * direction` adds to the logits at the token whose final residual (the
    last layer's `resid_post`, before the final norm) is `residual` [d_model].

    `activation * l / rms(residual)`, the norm's division held at its value at this token: the
    direct logit attribution. Soft caps and factors on the logits are left out, as in
    `HookedDecoder.unembedding_weight`.
    """
    unembedding = _Unembedding(model)
    rms = unembedding.rms(residual)
    logits = unembedding.logits(direction[None]) * (activation / rms)
    ids, values = _extremes(logits, top)
    return ExampleLogits(ids[0], values[0], rms)


def written_directions(dictionary: Dictionary, output: HookPoint) -> Tensor:
    """What each latent adds to the residual stream per unit of activation, float32 [d_sae, d].

    At `resid_pre`, `resid_post`, `attn_out` and `mlp_out` what a dictionary decodes is in or is
    added to the stream; a transcoder writes at its output. Raises `UnsupportedModel` for a
    dictionary that reconstructs the MLP's input, which reaches the stream only through the MLP.
    """
    if output.site == "mlp_in":
        raise UnsupportedModel(
            "The logit lens does not fit this SAE",
            f"It reconstructs {output.name}, which enters the MLP and is not added to the "
            "residual stream.",
            "Its ablation shows what it does to the model's predictions.",
        )
    out_scale = dictionary.scale if dictionary.out_scale is None else dictionary.out_scale
    return dictionary.decoder.float() / out_scale


class _Unembedding:
    """The final norm's gain and the unembedding as one linear map."""

    def __init__(self, model: HookedDecoder) -> None:
        self._norm = model.final_norm()
        gain, self._centred = model.final_norm_gain()
        self._weight = model.unembedding_weight().float()
        self._gain = gain.to(self._weight.device)

    @torch.inference_mode()
    def logits(self, directions: Tensor) -> Tensor:
        """float32 [n, vocab], centred."""
        d = directions.float().to(self._weight.device)
        if self._centred:
            d = d - d.mean(1, keepdim=True)
        logits = (d * self._gain) @ self._weight.T
        return logits - logits.mean(1, keepdim=True)

    def chunks(self, directions: Tensor, progress: Progress) -> Iterator[Tensor]:
        """`logits` of a few directions at a time."""
        step = max(1, CELLS // len(self._weight))
        for start in range(0, len(directions), step):
            progress.check()
            yield self.logits(directions[start : start + step])
            done = min(start + step, len(directions))
            progress.report(done, len(directions), phase="logit lens")

    def rms(self, residual: Tensor) -> float:
        """What the final norm divides this vector by, its epsilon included.

        From the odd part of what the module does, gain * x / rms, which is free of its bias.
        """
        x = residual.float().to(self._weight.device)
        if self._norm is None:
            return 1.0
        parameter = next(self._norm.parameters(), x)
        given = residual.to(parameter.device, parameter.dtype)
        odd = ((self._norm(given[None]) - self._norm(-given[None]))[0] / 2).float().to(x.device)
        if self._centred:
            x = x - x.mean()
        scaled = x * self._gain
        return float((scaled @ scaled) / (scaled @ odd))


def _extremes(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    high, low = logits.topk(top, dim=1), logits.topk(top, dim=1, largest=False)
    ids = torch.stack([high.indices, low.indices], 1).int().cpu()
    return ids, torch.stack([high.values, low.values], 1).cpu()


def _histogram(logits: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts [n, bins], low [n], high [n])."""
    low, high = logits.aminmax(dim=1)
    width = ((high - low) / bins).clamp_min(torch.finfo(torch.float32).tiny)
    places = ((logits - low[:, None]) / width[:, None]).long().clamp_(0, bins - 1)
    places += torch.arange(len(logits), device=logits.device)[:, None] * bins
    counts = torch.bincount(places.flatten(), minlength=len(logits) * bins)
    return counts.reshape(len(logits), bins).int().cpu(), low.cpu(), high.cpu()


def _moments(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(std, skew, kurtosis, top gap), [n] each, of centred logits."""
    square = logits * logits
    std = square.mean(1).sqrt()
    scaled = torch.where(std > 0, std, torch.full_like(std, torch.nan))
    skew = (square * logits).mean(1) / scaled**3
    kurtosis = (square * square).mean(1) / scaled**4
    gap = logits.topk(min(GAP, logits.shape[1]), dim=1).values.mean(1) / scaled
    return std.cpu(), skew.cpu(), kurtosis.cpu(), gap.cpu()
