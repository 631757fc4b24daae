"""How well the model's own activations tell where a feature is active: weak evidence.

Each context is run through the model by itself and becomes the mean of its activations at the
dictionary's site, the first position left out. A context counts as active where it lies nearer to
the mean of the active contexts that were fitted on than to that of the inactive ones. As the
feature is read from these very activations, a good result says that it is about something that
whole contexts have in common; it says nothing about whether a person could name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mistudio.engine.features.excerpts import Excerpt
from mistudio.engine.features.rules import balanced_accuracy
from mistudio.engine.features.score import LEAST_CONTEXTS, LEAST_TRIED, STRONGEST, interval
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress

BATCH = 16  # contexts of a forward pass
CHANCE = 0.5


@dataclass(frozen=True)
class Tried:
    """What a scorer found for one feature, on contexts that it was not fitted on. `accuracy`,
    `low` and `high` (95 %) are balanced accuracy less what the mean `null` of `nulls` pairs of one
    feature's knowledge and another's contexts exceeds 0.5 by. `active` and `inactive`: contexts
    that were tried. `auroc` is None where the scorer only says yes or no."""

    accuracy: float
    low: float
    high: float
    active: int
    inactive: int
    null: float
    nulls: int
    auroc: float | None = None


@torch.inference_mode()
def embed(
    model: HookedDecoder,
    point: HookPoint,
    excerpts: Sequence[Excerpt],
    progress: Progress = SILENT,
) -> np.ndarray:
    """float32 [n, width]: the mean activation of each excerpt at `point`, its first token left
    out; NaN where it has only one token."""
    found = np.full((len(excerpts), model.width(point)), np.nan, np.float32)
    by_length: dict[int, list[int]] = {}
    for i, excerpt in enumerate(excerpts):
        if len(excerpt.ids) > 1:
            by_length.setdefault(len(excerpt.ids), []).append(i)
    for rows in by_length.values():  # one length at a time: nothing has to be padded
        for start in range(0, len(rows), BATCH):
            progress.check()
            chosen = rows[start : start + BATCH]
            ids = torch.from_numpy(np.stack([excerpts[i].ids for i in chosen])).to(model.device)
            activations = model.capture(ids, (point,))[point][:, 1:].float()
            found[chosen] = activations.mean(1).cpu().numpy()
    return found


def embedding_scores(
    excerpts: Mapping[int, Sequence[Excerpt]], embedded: Mapping[int, np.ndarray], seed: int = 0
) -> dict[int, Tried]:
    """Of each feature that has enough contexts on both sides of the split. The null is what the
    centres of one feature get on the contexts of the others: give some more features than are
    wanted where these are few."""
    sides = {f: _Sides.of(found, embedded[f]) for f, found in excerpts.items()}
    known = {f: side for f, side in sides.items() if side is not None}
    nulls = [
        centres.accuracy(contexts)
        for f, centres in known.items()
        for other, contexts in known.items()
        if f != other
    ]
    null = float(np.mean(nulls)) if nulls else CHANCE
    excess = max(null - CHANCE, 0.0)
    found = {}
    for f, side in known.items():
        hit = side.hits(side)[None]
        low, high = interval(hit, side.active[None], ~side.active[None], seed)
        found[f] = Tried(
            side.accuracy(side) - excess,
            float(low[0]) - excess,
            float(high[0]) - excess,
            int(side.active.sum()),
            int((~side.active).sum()),
            null,
            len(nulls),
        )
    return found


@dataclass(frozen=True)
class _Sides:
    """A feature's two centres [width], and the contexts [n, width] to try."""

    on: np.ndarray
    off: np.ndarray
    tried: np.ndarray
    active: np.ndarray

    @classmethod
    def of(cls, excerpts: Sequence[Excerpt], embedded: np.ndarray) -> _Sides | None:
        usable = ~np.isnan(embedded[:, 0]) if len(embedded) else np.zeros(0, bool)
        active = np.array([e.is_active for e in excerpts], bool)
        # The strongest are fitted on only, as by every scorer.
        test = np.array([e.tried and e.kind != STRONGEST for e in excerpts], bool) & usable
        fitted = np.array([not e.tried for e in excerpts], bool) & usable
        masks = (fitted & active, fitted & ~active, test & active, test & ~active)
        if active.sum() < LEAST_CONTEXTS or min(mask.sum() for mask in masks) < LEAST_TRIED:
            return None
        means = [embedded[mask].mean(0) for mask in masks[:2]]
        return cls(means[0], means[1], embedded[test], active[test])

    def hits(self, other: _Sides) -> np.ndarray:
        """Bool: which of another's contexts lie nearer to this one's active centre."""
        middle, direction = (self.on + self.off) / 2, self.on - self.off
        return (other.tried - middle) @ direction > 0

    def accuracy(self, other: _Sides) -> float:
        """Of these centres on another's contexts."""
        hit, active = self.hits(other)[None], other.active[None]
        return float(balanced_accuracy(hit, active, ~active)[0])
