"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): a gate decides whether a latent fires,
a magnitude says how strongly, so that the L1 penalty does not shrink what is active."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mistudio.engine.sae.activation import Activation, Gated
from mistudio.engine.sae.dictionary import weighted_rows
from mistudio.engine.training.config import Plan
from mistudio.engine.training.objectives.base import (
    Backward,
    Coefficient,
    Entries,
    Objective,
    Weights,
)
from mistudio.engine.training.sparse import ByLatent, entry_dots


class GatedObjective(Objective):
    """With pi = centred @ W_enc + b_gate (b_gate is `b_enc`):

        z = 1[pi > 0] * ReLU(exp(r_mag) * (pi - b_gate) + b_mag)
        penalty_i = coefficient * sum_j ReLU(pi_ij) + ||ReLU(pi_i) W_dec + b_dec - target_i||^2

    In the second term W_dec, b_dec and a learnt skip are constants, as in the paper (SAELens lets
    them learn from it). The gate learns from the penalty alone, the magnitude from the error alone.
    """

    def __init__(self, plan: Plan, weights: Weights, sample: Tensor) -> None:
        super().__init__(plan, weights, sample)
        self.coefficient = Coefficient(plan, start=1.0)
        self.r_mag = torch.zeros_like(weights.b_enc)
        self.b_mag = torch.zeros_like(weights.b_enc)
        self._b_gate = weights.b_enc  # learnt in place, like all parameters

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"r_mag": self.r_mag, "b_mag": self.b_mag}

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        rows, latents = (pre > 0).nonzero(as_tuple=True)
        return rows, latents

    def activate(self, latents: Tensor, pre: Tensor) -> Tensor:
        inner = pre - self._b_gate[latents]
        return (self.r_mag.exp()[latents] * inner + self.b_mag[latents]).clamp_min(0.0)

    def backward(
        self, weights: Weights, entries: Entries, centred: Tensor, target: Tensor, factor: float
    ) -> Backward:
        codes, gate = entries.codes, entries.codes.with_values(entries.pre)
        error = weighted_rows(weights.decoder, codes) + weights.b_dec - target
        gate_error = weighted_rows(weights.decoder, gate) + weights.b_dec - target
        price = self.coefficient.value * factor / 2
        g = error * factor
        d_mag = entry_dots(codes, g, weights.decoder) * (codes.values > 0)
        d_gate = entry_dots(gate, gate_error * factor, weights.decoder) + price
        gain = self.r_mag.exp()[codes.latents]
        d_inner = d_mag * gain
        by_latent = ByLatent(codes)
        inner = entries.pre - weights.b_enc[codes.latents]
        gradients = {
            "encoder": by_latent.rows(centred, d_inner + d_gate),
            "b_enc": by_latent.sum(d_gate),
            "decoder": by_latent.rows(g, codes.values),
            "b_dec": g.sum(0),
            "centre": -(by_latent.sum(d_inner + d_gate) @ weights.encoder),
            "r_mag": by_latent.sum(d_inner * inner),
            "b_mag": by_latent.sum(d_mag),
        }
        penalty = entries.pre.sum() * price + gate_error.square().sum() * (factor / 2)
        return Backward(error, g, gradients, penalty)

    def follow(self, l0: float, k: float, step: int) -> None:
        self.coefficient.follow(l0, k, step)

    def restart(self, latents: Tensor) -> None:
        self.r_mag[latents] = 0.0
        self.b_mag[latents] = 0.0

    def activation(self, weights: Weights) -> Activation:
        gain = self.r_mag.exp()
        return Gated(gain, self.b_mag - gain * weights.b_enc)

    def state(self) -> dict[str, Tensor]:
        return self.coefficient.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.coefficient.load_state(tensors)
