"""JumpReLU with a tanh penalty (Anthropic, January 2025; Rajamanoharan et al. 2024, 2407.14435).

The original step penalty needs billions of tokens before L0 falls; tanh has a gradient wherever a
latent is active. Its coefficient is steered to the target L0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mistudio.engine.sae.activation import Activation, JumpReLU
from mistudio.engine.sae.dictionary import weighted_rows
from mistudio.engine.training.config import Plan
from mistudio.engine.training.objectives.base import (
    Backward,
    Coefficient,
    Entries,
    Objective,
    Weights,
    plain_gradients,
)
from mistudio.engine.training.sparse import ByLatent, entry_dots

SHARPNESS = 4.0  # c in tanh(c * z)
BANDWIDTH = 0.5  # width of the window in which a threshold gets gradient, as a share of it


class JumpReLUObjective(Objective):
    """z = h * 1[h > theta], penalty_i = coefficient * sum_j tanh(c * z_ij), theta = exp(t).

    Straight-through derivatives, with K = 1 within half a bandwidth of the threshold:
    dz/dtheta = -(theta / bandwidth) K and dz/dh = 1[h > theta] + (theta / bandwidth) K.
    The bandwidth is a share of theta, so that it means the same at every scale of activations;
    a constant one holds half of all entries while the encoder is small.
    """

    def __init__(self, plan: Plan, weights: Weights, sample: Tensor) -> None:
        super().__init__(plan, weights, sample)
        self.coefficient = Coefficient(plan, start=0.3)
        pre = torch.addmm(weights.b_enc, sample[:1024], weights.encoder.T)
        share = min(0.5, 4 * plan.k / plan.d_sae)
        n = max(1, round(share * pre.numel()))
        level = float(pre.flatten().topk(n, sorted=False).values.min())
        self.log_threshold = torch.full_like(weights.b_enc, max(level, 1e-3)).log()

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"log_threshold": self.log_threshold}

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold.exp()

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        rows, latents = (pre > self.threshold * (1 - BANDWIDTH / 2)).nonzero(as_tuple=True)
        return rows, latents

    def matters(self, latents: Tensor, pre: Tensor) -> Tensor:
        return pre > self.threshold[latents] * (1 - BANDWIDTH / 2)

    def activate(self, latents: Tensor, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold[latents], pre, 0.0)

    def backward(
        self, weights: Weights, entries: Entries, centred: Tensor, target: Tensor, factor: float
    ) -> Backward:
        codes, threshold = entries.codes, self.threshold
        error = weighted_rows(weights.decoder, codes) + weights.b_dec - target
        g = error * factor
        price = self.coefficient.value * factor / 2
        saturation = torch.tanh(SHARPNESS * codes.values)
        d_z = entry_dots(codes, g, weights.decoder)
        d_z += price * SHARPNESS * (1 - saturation.square())
        own = threshold[codes.latents]
        jump = ((entries.pre - own).abs() < own * (BANDWIDTH / 2)) / BANDWIDTH
        d_pre = d_z * (jump + (codes.values > 0))
        by_latent = ByLatent(codes)
        gradients = plain_gradients(by_latent, weights, codes, centred, g, d_pre)
        gradients["log_threshold"] = by_latent.sum(-jump * d_z) * threshold
        return Backward(error, g, gradients, saturation.sum() * price)

    def follow(self, l0: float, k: float, step: int) -> None:
        self.coefficient.follow(l0, k, step)

    def activation(self, weights: Weights) -> Activation:
        return JumpReLU(self.threshold)

    def firing_level(self, latents: Tensor, faintest: Tensor) -> Tensor:
        return self.threshold[latents]

    def state(self) -> dict[str, Tensor]:
        return self.coefficient.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.coefficient.load_state(tensors)
