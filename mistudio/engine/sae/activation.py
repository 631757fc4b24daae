"""Activation functions of dictionaries: which pre-activations survive, and with what value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Activation(Protocol):
    """`name` is SAELens' architecture name. A finished dictionary acts row by row."""

    @property
    def name(self) -> str: ...

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, latents, values) of the active entries of `pre` [n, d_sae], sorted by row; every
        value is > 0."""
        ...

    def rescaled(self, factors: Tensor) -> Activation | None:
        """The activation that acts on `pre * factors` [d_sae] as this one does on `pre`, with its
        values times `factors`; None where there is none."""
        ...

    def of(self, latents: Tensor) -> Activation | None:
        """The activation of these latents alone; None where the others decide which are active."""
        ...

    def to(self, device: str | torch.device) -> Activation: ...


@dataclass(frozen=True)
class TopK:
    """The k largest of every row, and only where positive (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    name: str = "topk"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, latents = pre.topk(self.k, dim=1, sorted=False)
        rows = torch.arange(len(pre), device=pre.device)[:, None].expand_as(latents)
        kept = values > 0
        return rows[kept], latents[kept], values[kept]

    def rescaled(self, factors: Tensor) -> TopK | None:
        # The order of latents must not change, so all factors must be the same.
        uniform = not factors.numel() or float(factors.max() / factors.min()) <= 1 + 1e-4
        return self if uniform else None

    def of(self, latents: Tensor) -> TopK | None:
        return None

    def to(self, device: str | torch.device) -> TopK:
        return self


@dataclass(frozen=True)
class ReLU:
    """Everything above 0."""

    name: str = "standard"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents = (pre > 0).nonzero(as_tuple=True)
        return rows, latents, pre[rows, latents]

    def rescaled(self, factors: Tensor) -> ReLU:
        return self

    def of(self, latents: Tensor) -> ReLU:
        return self

    def to(self, device: str | torch.device) -> ReLU:
        return self


@dataclass(frozen=True)
class JumpReLU:
    """Everything above its latent's threshold [d_sae] (Rajamanoharan et al. 2024, 2407.14435).

    Also how a BatchTopK dictionary is used after training: one threshold for all latents.
    """

    threshold: Tensor
    name: str = "jumprelu"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents = ((pre > self.threshold) & (pre > 0)).nonzero(as_tuple=True)
        return rows, latents, pre[rows, latents]

    def rescaled(self, factors: Tensor) -> JumpReLU:
        return JumpReLU(self.threshold * factors)

    def of(self, latents: Tensor) -> JumpReLU:
        return JumpReLU(self.threshold[latents])

    def to(self, device: str | torch.device) -> JumpReLU:
        return JumpReLU(self.threshold.to(device))


@dataclass(frozen=True)
class Gated:
    """`1[pre > 0] * ReLU(gain * pre + offset)` (Rajamanoharan et al. 2024, arXiv 2404.16014).

    With the paper's parameters, where `pre` includes the gate's bias: gain = exp(r_mag),
    offset = b_mag - exp(r_mag) * b_gate; both [d_sae].
    """

    gain: Tensor
    offset: Tensor
    name: str = "gated"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        magnitude = torch.addcmul(self.offset, pre, self.gain)
        rows, latents = ((pre > 0) & (magnitude > 0)).nonzero(as_tuple=True)
        return rows, latents, magnitude[rows, latents]

    def rescaled(self, factors: Tensor) -> Gated:
        return Gated(self.gain, self.offset * factors)

    def of(self, latents: Tensor) -> Gated:
        return Gated(self.gain[latents], self.offset[latents])

    def to(self, device: str | torch.device) -> Gated:
        return Gated(self.gain.to(device), self.offset.to(device))
