"""TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, 2412.06410)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mistudio.engine.sae.activation import Activation, JumpReLU, TopK
from mistudio.engine.training.config import Plan
from mistudio.engine.training.distributed import World
from mistudio.engine.training.objectives.base import Objective, Weights

THRESHOLD_MEMORY = 0.9
SETTLING_STEPS = 10  # the threshold follows every batch exactly before it is averaged


class TopKObjective(Objective):
    """The same number of latents for every token."""

    _k = 0

    def begin(self, pre: Tensor, k: float, step: int, world: World) -> None:
        self._k = round(k)

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        return TopK(self._k).select(pre)[:2]

    def activation(self, weights: Weights) -> Activation:
        return TopK(self.plan.k)

    def firing_level(self, latents: Tensor, faintest: Tensor) -> Tensor:
        return faintest


class BatchTopKObjective(Objective):
    """The same number of latents for every batch, as many for a token as it needs.

    The exact threshold of a batch is its (batch * k)-th largest pre-activation. A flat top-k over
    the batch costs more than the encoder, so an eighth of the rows estimates it and an average
    over steps smooths it.
    """

    def __init__(self, plan: Plan, weights: Weights, sample: Tensor) -> None:
        super().__init__(plan, weights, sample)
        self.threshold: Tensor | None = None  # scalar
        self._last: Tensor | None = None  # of the last whole step

    def stride(self, tokens: int) -> int:
        # 8, or for small batches 4, 2 or 1: it divides the parts of a batch that processes share.
        return 2 ** min(3, max(1, tokens // 64).bit_length() - 1)

    def begin(self, pre: Tensor, k: float, step: int, world: World) -> None:
        n = max(1, round(len(pre) * world.size * k))
        largest = pre.flatten().topk(min(n, pre.numel()), sorted=False).values.float()
        here = world.gathered(largest).topk(n, sorted=False).values.min().clamp_min(0.0)
        if self._last is None or step < SETTLING_STEPS:
            self.threshold = here
        else:
            self.threshold = THRESHOLD_MEMORY * self._last + (1 - THRESHOLD_MEMORY) * here

    def follow(self, l0: float, k: float, step: int) -> None:
        self._last = self.threshold

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        assert self.threshold is not None
        rows, latents = (pre > self.threshold.to(pre.dtype)).nonzero(as_tuple=True)
        return rows, latents

    def activation(self, weights: Weights) -> Activation:
        level = 0.0 if self.threshold is None else float(self.threshold)
        return JumpReLU(torch.full_like(weights.b_enc, level))

    def firing_level(self, latents: Tensor, faintest: Tensor) -> Tensor:
        level = 0.0 if self.threshold is None else float(self.threshold)
        return torch.full_like(faintest, level)

    def state(self) -> dict[str, Tensor]:
        return {} if self._last is None else {"threshold": self._last.clone()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._last = tensors["threshold"].clone() if "threshold" in tensors else None
        self.threshold = self._last
