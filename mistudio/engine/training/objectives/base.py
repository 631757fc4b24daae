"""The frame of all objectives, and the plain reconstruction loss that most of them keep.

The loss of a batch of n tokens is

    L = 1/n sum_i (||error_i||^2 + penalty_i) / variance,   error = z @ W_dec + b_dec - target

in training units (inputs of norm sqrt(d) on average), with decoder rows of norm 1. Scaling a
latent's decoder row against its encoder changes neither the reconstruction nor a penalty that is
weighted by decoder norms (Anthropic, April 2024): the unit norm only fixes which of these equal
dictionaries is meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.sae.activation import Activation
from mistudio.engine.sae.dictionary import Codes, weighted_rows
from mistudio.engine.training.config import Plan
from mistudio.engine.training.distributed import World
from mistudio.engine.training.optimizers import learning_rate
from mistudio.engine.training.sparse import ByLatent, entry_dots


@dataclass(frozen=True)
class Weights:
    """encoder [d_sae, d_in], b_enc [d_sae], decoder [d_sae, d_out], b_dec [d_out]."""

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Entries:
    """The entries of a part of a batch that matter for its loss, sorted by row.

    `codes.values` are the latents' activations, 0 where an entry matters without being active;
    `pre` [nnz] are its pre-activations.
    """

    codes: Codes
    pre: Tensor

    @property
    def active(self) -> int:
        return int((self.codes.values > 0).sum())

    @classmethod
    def joined(cls, parts: list[Entries]) -> Entries:
        """Parts that follow one another in the batch, as one."""
        if len(parts) == 1:
            return parts[0]
        rows, start = [], 0
        for part in parts:
            rows.append(part.codes.rows + start)
            start += part.codes.n_rows
        codes = Codes(
            torch.cat(rows),
            torch.cat([part.codes.latents for part in parts]),
            torch.cat([part.codes.values for part in parts]),
            start,
            parts[0].codes.d_sae,
        )
        return cls(codes, torch.cat([part.pre for part in parts]))


@dataclass(frozen=True)
class Backward:
    """One part of a batch, worked through.

    `error` [n, d_out]; `g` [n, d_out] is the gradient of what was reconstructed (the same as
    `error * factor` only where one reconstruction counts); `gradients` by parameter name, with
    "centre" [d_in] for what is subtracted from the input; `penalty` is the part's share of the
    loss beside the squared error.
    """

    error: Tensor
    g: Tensor
    gradients: dict[str, Tensor]
    penalty: Tensor | float = 0.0


class Objective:
    """Subclasses choose entries (`select`), price them and differentiate (`backward`)."""

    def __init__(self, plan: Plan, weights: Weights, sample: Tensor) -> None:
        """`sample` [n, d_in]: centred inputs of the first batches, to start thresholds from."""
        self.plan = plan

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is learnt beside the weights."""
        return {}

    def stride(self, tokens: int) -> int:
        """`begin` wants to see every how-manyth row of a batch of `tokens` rows; 0 for none."""
        return 0

    def begin(self, pre: Tensor, k: float, step: int, world: World) -> None:
        """Look at these rows [n, d_sae] of a batch before anything is selected from it. Nothing
        lasts before `follow`: a step that failed may begin again."""

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, latents) of the entries of `pre` [n, d_sae] that matter, sorted by row."""
        raise NotImplementedError

    def matters(self, latents: Tensor, pre: Tensor) -> Tensor:
        """Which entries [nnz] that were selected in half precision matter, by their exact
        pre-activations; bool [nnz]."""
        return pre > 0

    def activate(self, latents: Tensor, pre: Tensor) -> Tensor:
        """The activations of selected entries, [nnz], from their pre-activations."""
        return pre.clamp_min(0.0)

    def backward(
        self, weights: Weights, entries: Entries, centred: Tensor, target: Tensor, factor: float
    ) -> Backward:
        """Gradients of a part; `factor` is 2 / (tokens in the whole batch * variance)."""
        codes = entries.codes
        error = weighted_rows(weights.decoder, codes) + weights.b_dec - target
        g = error * factor
        d_pre = entry_dots(codes, g, weights.decoder)
        by_latent = ByLatent(codes)
        return Backward(error, g, plain_gradients(by_latent, weights, codes, centred, g, d_pre))

    def follow(self, l0: float, k: float, step: int) -> None:
        """After a step: the batch's L0, over all processes, against its target."""

    def activation(self, weights: Weights) -> Activation:
        """How the finished dictionary acts (in training units)."""
        raise NotImplementedError

    def firing_level(self, latents: Tensor, faintest: Tensor) -> Tensor:
        """The pre-activations [n] above which these latents [n] fire on tokens whose faintest
        active latents have the values `faintest` [n]."""
        return torch.zeros_like(faintest)

    def restart(self, latents: Tensor) -> None:
        """Take back what was learnt about these latents beside the weights."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        pass


def plain_gradients(
    by_latent: ByLatent,
    weights: Weights,
    codes: Codes,
    centred: Tensor,
    g: Tensor,
    d_pre: Tensor,
) -> dict[str, Tensor]:
    """Gradients from dL/d(reconstruction) `g` [n, d_out] and dL/d(pre) `d_pre` [nnz]."""
    d_bias = by_latent.sum(d_pre)
    return {
        "encoder": by_latent.rows(centred, d_pre),
        "b_enc": d_bias,
        "decoder": by_latent.rows(g, codes.values),
        "b_dec": g.sum(0),
        "centre": -(d_bias @ weights.encoder),
    }


class Coefficient:
    """The weight of a sparsity penalty: the user's number, or steered so that L0 meets its target.

    Given numbers rise linearly over the first 5 % of the run (Anthropic, April 2024). Without one,
    the logarithm moves by up to `GAIN` * learning rate a step (and far enough over the run where
    that is low), pushed by how far L0 is off and by where it is heading. L0 follows a price with
    delay, and the slower the lower the rate: pushed by the distance alone it falls far below the
    target, where latents die, and swings. Documented coefficients are of little use in short runs:
    the same number gives another L0 on every model, site and width.
    """

    GAIN = 8.0
    FASTEST = 0.05  # a step, however high the rate
    REACH = 8.0  # over the run, however low the rate
    DISTANCE, TREND = 2.0, 8.0  # of log(L0 / target), and of log(L0 / its running mean)
    MEMORY = 0.015  # of the running mean, in sums of learning rates: 5 steps at 3e-3

    def __init__(self, plan: Plan, start: float) -> None:
        self._plan = plan
        self._given = plan.config.l1_coefficient
        self._warmup = max(1, round(0.05 * plan.steps))
        self._log = math.log(start)
        self._mean = 0.0  # of log(L0)
        self._step = 0

    @property
    def value(self) -> float:
        if self._given is not None:
            return self._given * min(1.0, (self._step + 1) / self._warmup)
        return math.exp(self._log)

    def follow(self, l0: float, k: float, step: int) -> None:
        first, self._step = self._step == 0, step + 1
        if self._given is not None:
            return
        rate, level = learning_rate(self._plan, step), math.log(max(l0, 1e-2))
        if first:
            self._mean = level
        push = self.DISTANCE * (level - math.log(k)) + self.TREND * (level - self._mean)
        self._mean += min(1.0, rate / self.MEMORY) * (level - self._mean)
        most = min(self.FASTEST, max(self.GAIN * rate, self.REACH / self._plan.steps))
        self._log += most * max(-1.0, min(1.0, push))

    def state(self) -> dict[str, Tensor]:
        numbers = [self._log, self._mean, self._step]
        return {"coefficient": torch.tensor(numbers, dtype=torch.float64)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._log, self._mean, step = tensors["coefficient"].tolist()
        self._step = int(step)
