"""What a dictionary costs the model: next-token loss with its reconstruction spliced in.

All statistics are over tokens that count (`engine/activations/positions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.activations.positions import counted
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary

Replacement = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossRecovered:
    """Next-token cross-entropy in nats, over `tokens` predictions made at counted positions.

    `ce_sae`: activations at counted positions replaced by their reconstruction; `ce_zero`: by
    zero; `ce_mean`: by their mean. ce_loss_score = (ce_zero - ce_sae) / (ce_zero - ce_clean).
    Zero ablation flatters a residual-stream SAE, so `ce_increase` (ce_sae - ce_clean) is the
    number that tells SAEs apart.
    """

    tokens: int
    ce_clean: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    ce_increase: float
    ce_loss_score: float
    ce_loss_score_mean: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def loss_recovered(
    model: HookedDecoder,
    tokens: TokenSplit,
    point: HookPoint,
    dictionary: Dictionary,
    median: float,
    *,
    context: int = 128,
    max_tokens: int = 8192,
    batch_windows: int = 8,
    progress: Progress = SILENT,
) -> LossRecovered:
    """Splice the dictionary into the model on evenly spread windows of `tokens`."""
    available = tokens.n_windows(context)
    n_windows = max(1, min(available, max_tokens // context))
    chosen = torch.linspace(0, available - 1, n_windows).long().unique().numpy()
    mean = _mean_activation(model, tokens, point, median, chosen[:batch_windows], context)
    sums = {"clean": 0.0, "sae": 0.0, "zero": 0.0, "mean": 0.0}
    predictions = 0
    for start in range(0, len(chosen), batch_windows):
        ids = tokens.windows(chosen[start : start + batch_windows], context).to(model.device)
        special = tokens.meta.special_ids
        mask = torch.zeros_like(ids, dtype=torch.bool)
        replacements: dict[str, Replacement] = {
            "clean": lambda x: x,
            "sae": dictionary.reconstruct,
            "zero": torch.zeros_like,
            "mean": mean.expand_as,
        }
        for name, replacement in replacements.items():
            progress.check()
            splice = _Splice(point, ids, median, special, replacement)
            with model.intervene({point: splice}):
                logits = model.model(ids, use_cache=False).logits
            mask = splice.mask
            sums[name] += _cross_entropy(logits, ids, mask)
        predictions += int(mask[:, :-1].sum())
        progress.report(start + len(ids), len(chosen))
    ce = {name: total / max(predictions, 1) for name, total in sums.items()}
    return LossRecovered(
        tokens=predictions,
        ce_clean=ce["clean"],
        ce_sae=ce["sae"],
        ce_zero=ce["zero"],
        ce_mean=ce["mean"],
        ce_increase=ce["sae"] - ce["clean"],
        ce_loss_score=_recovered(ce["zero"], ce["sae"], ce["clean"]),
        ce_loss_score_mean=_recovered(ce["mean"], ce["sae"], ce["clean"]),
    )


class _Splice:
    """Replaces the activations at the positions that count, and remembers which those were."""

    def __init__(
        self,
        point: HookPoint,
        ids: Tensor,
        median: float,
        special_ids: Sequence[int],
        replacement: Replacement,
    ) -> None:
        self._point, self._ids, self._median = point, ids, median
        self._special, self._replacement = special_ids, replacement
        self.mask = torch.zeros_like(ids, dtype=torch.bool)

    def __call__(self, x: Tensor) -> Tensor:
        self.mask = counted(self._ids, {self._point: x}, {self._point: self._median}, self._special)
        out = x.clone()
        out[self.mask] = self._replacement(x[self.mask]).to(x.dtype)
        return out


def _recovered(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


def _mean_activation(
    model: HookedDecoder,
    tokens: TokenSplit,
    point: HookPoint,
    median: float,
    windows: Any,
    context: int,
) -> Tensor:
    ids = tokens.windows(windows, context).to(model.device)
    x = model.capture(ids, [point])[point]
    mask = counted(ids, {point: x}, {point: median}, tokens.meta.special_ids)
    return x[mask].float().mean(0)


def _cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Summed nats of the predictions made at `mask` positions (the last one predicts nothing)."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return float(losses[mask[:, :-1].flatten()].double().sum())
