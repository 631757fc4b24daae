"""What goes into a dictionary and what it must reconstruct, in training units.

Wiring is independent of sparsity: it sets the scales, the point that is taken off the input, the
linear skip, and with them the target of the sparse part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.engine.training.config import Plan

RIDGE = 1e-3  # of the mean input variance, for the least-squares start of a learnt skip


@dataclass
class Wiring:
    """u = scale * x is the input and out_scale * y the whole target, both of mean norm sqrt(d);
    the sparse part's target is what `skip` [d_out, d_in] leaves of it.

    `centre` [d_in] is taken off the input; None: the decoder's bias is (autoencoder).
    """

    scale: float
    out_scale: float
    centre: Tensor | None = None
    skip: Tensor | None = None
    skip_share: float = 0.0
    learns_skip: bool = False

    def inputs(self, x: Tensor) -> Tensor:
        return x * self.scale

    def targets(self, u: Tensor, y: Tensor | None) -> Tensor:
        """What the sparse part must reconstruct, [n, d_out], from scaled inputs and raw targets
        (None: the input is its own target)."""
        whole = u if y is None else y * self.out_scale
        if self.skip is not None:
            return whole - u @ self.skip.T
        if self.skip_share:
            return whole * (1.0 - self.skip_share)
        return whole

    def skip_matrix(self) -> Tensor | None:
        """The skip in training units, as a finished dictionary has it."""
        if self.skip_share:
            assert self.centre is not None
            return self.skip_share * torch.eye(len(self.centre), device=self.centre.device)
        return self.skip


def wire(plan: Plan, x: Tensor, y: Tensor | None) -> Wiring:
    """`x` [n, d_in] and, for transcoders, `y` [n, d_out]: raw activations of a first sample."""
    kind, config = plan.config.wiring, plan.config
    if (y is not None) != (kind in ("transcoder", "skip_transcoder")):
        raise ValueError(f"A target {'is needed' if y is None else 'has no place'} in {kind}")
    scale = _unit_scale(x)
    if kind == "sae":
        return Wiring(scale, scale)
    u = x * scale
    centre = u.mean(0)
    if kind == "skip_sae":
        if config.skip == "fixed":
            return Wiring(scale, scale, centre, skip_share=config.skip_share)
        return Wiring(scale, scale, centre, skip=_principal_projection(u, config.skip_rank))
    assert y is not None
    wiring = Wiring(scale, _unit_scale(y), centre)
    if kind == "skip_transcoder":
        wiring.skip = _least_squares(u, y * wiring.out_scale)
        wiring.learns_skip = True
    return wiring


def _unit_scale(x: Tensor) -> float:
    return math.sqrt(x.shape[1]) / max(float(x.norm(dim=1).mean()), 1e-12)


def _principal_projection(u: Tensor, rank: int) -> Tensor:
    """Projection onto the `rank` leading principal directions of the rows, [d, d]."""
    centred = (u - u.mean(0)).double()
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:]
    return (directions @ directions.T).to(u.dtype)


def _least_squares(u: Tensor, target: Tensor) -> Tensor:
    """The linear map that explains the target best, [d_out, d_in]; ridge for few tokens."""
    a = (u - u.mean(0)).double()
    b = (target - target.mean(0)).double()
    gram = a.T @ a
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=a.dtype, device=a.device)
    return torch.linalg.solve(gram, a.T @ b).T.to(u.dtype).contiguous()
