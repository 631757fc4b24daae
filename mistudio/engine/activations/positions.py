"""Which positions count. Position 0, special tokens and norm outliers never do, anywhere.

Position 0 is an attention sink (163 times the median norm in SmolLM2); a few other tokens carry
massive activations too. They would dominate every mean, loss and maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookPoint

OUTLIER_MULTIPLE = 10.0


def countable(ids: Tensor, special_ids: Sequence[int]) -> Tensor:
    """Bool [batch, seq]: neither position 0 nor a special token. `ids` is [batch, seq]."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    if special_ids:
        mask &= ~torch.isin(ids, torch.as_tensor(list(special_ids), device=ids.device))
    return mask


def within_norm(activations: Tensor, median: float) -> Tensor:
    """Bool [...]: the norm is at most `OUTLIER_MULTIPLE` times the site's median norm."""
    return activations.float().norm(dim=-1) <= OUTLIER_MULTIPLE * median


def counted(
    ids: Tensor,
    captured: Mapping[HookPoint, Tensor],
    medians: Mapping[HookPoint, float],
    special_ids: Sequence[int],
) -> Tensor:
    """Bool [batch, seq]: the positions that count at every captured site at once."""
    mask = countable(ids, special_ids)
    for point, activations in captured.items():
        mask &= within_norm(activations, medians[point])
    return mask
