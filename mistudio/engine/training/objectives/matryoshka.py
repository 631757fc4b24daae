"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries in one.

The first m/16, m/8, m/4, m/2 and m latents must each reconstruct alone, so that general features
come first and wide dictionaries do not split them away.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mistudio.engine.sae.dictionary import Codes, weighted_rows
from mistudio.engine.training.config import Plan
from mistudio.engine.training.objectives.base import Backward, Entries, Weights
from mistudio.engine.training.objectives.topk import BatchTopKObjective
from mistudio.engine.training.sparse import ByLatent, entry_dots

LEVELS = 5


def widths(d_sae: int) -> list[int]:
    """The nested widths, ascending, the last one d_sae."""
    return sorted({max(1, d_sae >> halvings) for halvings in range(LEVELS)})


class MatryoshkaObjective(BatchTopKObjective):
    """Loss: the mean over the nested widths of each one's squared error."""

    def __init__(self, plan: Plan, weights: Weights, sample: Tensor) -> None:
        super().__init__(plan, weights, sample)
        self._bounds = [0, *widths(plan.d_sae)]

    def backward(
        self, weights: Weights, entries: Entries, centred: Tensor, target: Tensor, factor: float
    ) -> Backward:
        groups = [_between(entries.codes, a, b) for a, b in _pairs(self._bounds)]
        decoders = [weights.decoder[a:b] for a, b in _pairs(self._bounds)]
        errors = []
        reached = weights.b_dec - target
        for group, decoder in zip(groups, decoders, strict=True):
            reached = reached + weighted_rows(decoder, group)
            errors.append(reached)
        # A latent of group j enters the reconstructions of all widths from j on.
        share = factor / len(groups)
        g = torch.zeros_like(target)
        pieces: list[dict[str, Tensor]] = []
        for group, decoder, error in zip(
            reversed(groups), reversed(decoders), reversed(errors), strict=True
        ):
            g = g + share * error
            by_latent = ByLatent(group)
            d_pre = entry_dots(group, g, decoder)
            pieces.append(
                {
                    "encoder": by_latent.rows(centred, d_pre),
                    "b_enc": by_latent.sum(d_pre),
                    "decoder": by_latent.rows(g, group.values),
                }
            )
        gradients = {
            name: torch.cat([piece[name] for piece in reversed(pieces)]) for name in pieces[0]
        }
        gradients["b_dec"] = g.sum(0)
        gradients["centre"] = -(gradients["b_enc"] @ weights.encoder)
        # The whole dictionary's error is the one that is reported; the narrower ones are the rest
        # of the loss.
        whole = errors[-1].square().sum()
        narrow = torch.stack([error.square().sum() for error in errors]).mean() - whole
        return Backward(errors[-1], g, gradients, narrow * (factor / 2))


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(bounds))


def _between(codes: Codes, start: int, stop: int) -> Codes:
    chosen = (codes.latents >= start) & (codes.latents < stop)
    return Codes(
        codes.rows[chosen],
        codes.latents[chosen] - start,
        codes.values[chosen],
        codes.n_rows,
        stop - start,
    )
