"""ReLU with an L1 penalty (Anthropic, "Update on training SAEs", April 2024)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mistudio.engine.sae.activation import Activation, ReLU
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


class ReLUObjective(Objective):
    """penalty_i = coefficient * sum_j z_ij (decoder rows have norm 1)."""

    def __init__(self, plan: Plan, weights: Weights, sample: Tensor) -> None:
        super().__init__(plan, weights, sample)
        self.coefficient = Coefficient(plan, start=1.0)

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        rows, latents = (pre > 0).nonzero(as_tuple=True)
        return rows, latents

    def backward(
        self, weights: Weights, entries: Entries, centred: Tensor, target: Tensor, factor: float
    ) -> Backward:
        codes = entries.codes
        error = weighted_rows(weights.decoder, codes) + weights.b_dec - target
        g = error * factor
        price = self.coefficient.value * factor / 2
        d_pre = entry_dots(codes, g, weights.decoder) + price
        gradients = plain_gradients(ByLatent(codes), weights, codes, centred, g, d_pre)
        return Backward(error, g, gradients, codes.values.sum() * price)

    def follow(self, l0: float, k: float, step: int) -> None:
        self.coefficient.follow(l0, k, step)

    def activation(self, weights: Weights) -> Activation:
        return ReLU()

    def state(self) -> dict[str, Tensor]:
        return self.coefficient.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.coefficient.load_state(tensors)
