"""The end of a run: thresholds that keep the trained sparsity, a judgement on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mistudio.engine.activations.source import ActivationSource
from mistudio.engine.activations.stream import Batch
from mistudio.engine.progress import Progress
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import CHUNK_CELLS, Codes, Dictionary
from mistudio.engine.sae.metrics import (
    ReconstructionMeter,
    ReconstructionQuality,
    without_latents,
)
from mistudio.engine.sae.site import Site
from mistudio.engine.training.config import Plan
from mistudio.engine.training.distributed import ALONE, World, together
from mistudio.engine.training.step import SiteTrainer
from mistudio.errors import is_out_of_memory

T = TypeVar("T")

# L0 differs from token to token by about its own size and neighbours are alike, so that so many
# tell the mean to half a percent.
CALIBRATION_TOKENS = 65_536
ALL_TOKENS = 2**62  # the whole held-out split, however long
ROWS = 2048  # of a batch
LEAST_ROWS = 64


@dataclass(frozen=True)
class TrainedSite:
    """A finished dictionary with its judgement on held-out tokens.

    `frequencies` [d_sae]: share of held-out tokens each latent fired on.
    """

    plan: Plan
    dictionary: Dictionary
    quality: ReconstructionQuality
    frequencies: Tensor
    calibration_tokens: int
    revived: int
    train_fvu: float


def finish(
    source: ActivationSource,
    batches: Iterator[Batch],
    trainers: dict[Site, SiteTrainer],
    train_fvu: Mapping[Site, float],
    heldout_tokens: int,
    progress: Progress,
    world: World = ALONE,
) -> dict[Site, TrainedSite]:
    """Calibrate on `batches` and judge what was trained; `trainers` is emptied, to free the
    optimisers. Processes calibrate side by side; the first one alone judges."""
    plans = {site: trainer.plan for site, trainer in trainers.items()}
    revived = {site: trainer.revived for site, trainer in trainers.items()}
    steps = min(trainer.step_number for trainer in trainers.values())
    rows = fitting_rows(trainers)
    dictionaries = {site: trainer.dictionary() for site, trainer in trainers.items()}
    trainers.clear()
    tokens = calibrate(batches, dictionaries, plans, steps, rows, together(progress, world))
    if world.rank:
        return {}
    for site, dictionary in dictionaries.items():
        dictionaries[site] = dictionary.folded()
    meters = judge(source, dictionaries, heldout_tokens, rows, progress)
    return {
        site: TrainedSite(
            plan=plans[site],
            dictionary=dictionary,
            quality=meters[site].result(),
            frequencies=meters[site].fired.double() / max(meters[site].tokens, 1),
            calibration_tokens=tokens.get(site, 0),
            revived=revived[site],
            train_fvu=train_fvu[site],
        )
        for site, dictionary in dictionaries.items()
    }


def fitting_rows(trainers: Mapping[Site, SiteTrainer]) -> int:
    """Rows that may be encoded at a time: where the training had to be split, so is this."""
    return max(1, ROWS // max(trainer.parts for trainer in trainers.values()))


@torch.no_grad()
def calibrate(
    batches: Iterator[Batch],
    dictionaries: dict[Site, Dictionary],
    plans: Mapping[Site, Plan],
    steps: int,
    rows: int,
    progress: Progress,
) -> dict[Site, int]:
    """Set the thresholds of those that have any so that k latents are active on average, on
    training tokens (never held-out ones); on how many, by site."""
    margins = {
        site: Margins(dictionary, plans[site].k)
        for site, dictionary in dictionaries.items()
        if isinstance(dictionary.activation, JumpReLU)
    }
    if not margins:
        return {}
    plan = next(iter(plans.values()))
    wanted = min(CALIBRATION_TOKENS, max(8192, steps * plan.batch_size))
    for batch in batches:
        progress.check()
        for site, site_margins in margins.items():
            for x in batch[site.input].split(rows):
                site_margins.add(x)
        seen = next(iter(margins.values())).tokens
        progress.report(seen, wanted, phase="calibrate")
        if seen >= wanted:
            break
    for site, site_margins in margins.items():
        dictionaries[site] = site_margins.calibrated()
    return {site: site_margins.tokens for site, site_margins in margins.items()}


class Margins:
    """How far the pre-activations of a dictionary lie above their thresholds: all thresholds are
    moved by one amount so that k latents are active on average, exact on the tokens it sees.

    SAELens exports a running average that starts at 0 and is wrong after short runs.
    """

    def __init__(self, dictionary: Dictionary, k: int) -> None:
        assert isinstance(dictionary.activation, JumpReLU)
        self._dictionary, self._k = dictionary, k
        self._thresholds = dictionary.activation.threshold
        self._floor = -0.5 * self._thresholds.mean()
        self._kept: list[Tensor] = []
        self._count = 0
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        def above_floor(part: slice) -> Tensor:
            above = self._dictionary.pre_activations(x[part]).sub_(self._thresholds)
            return above[above > self._floor].cpu()

        rows = max(1, CHUNK_CELLS // 4 // self._dictionary.d_sae)
        for _, kept in in_parts(above_floor, len(x), rows):
            self._kept.append(kept)
            self._count += len(kept)
        self.tokens += len(x)
        most = 2 * self.tokens * self._k
        if self._count > 2 * most:  # far more than can be chosen: keep the candidates few
            self._kept = [torch.cat(self._kept).topk(most, sorted=False).values]
            self._floor, self._count = self._kept[0].min().to(x.device), most

    def calibrated(self) -> Dictionary:
        values = torch.cat(self._kept)
        n = min(len(values), self.tokens * self._k)
        shift = values.topk(n, sorted=False).values.min().to(self._thresholds.device) if n else 0.0
        # The entry that decides must itself stay active.
        moved = self._thresholds + shift - 1e-6 * self._thresholds.abs()
        return replace(self._dictionary, activation=JumpReLU(moved.clamp_min(0.0)))


def in_parts(compute: Callable[[slice], T], n: int, rows: int) -> Iterator[tuple[slice, T]]:
    """`compute` of at most `rows` of n rows at a time, of half as many where memory runs out."""
    start = 0
    while start < n:
        part = slice(start, min(start + rows, n))
        try:
            found = compute(part)
        except (MemoryError, RuntimeError) as exc:
            if rows <= LEAST_ROWS or not is_out_of_memory(exc):
                raise
            rows = max(LEAST_ROWS, rows // 2)
            continue
        yield part, found
        start = part.stop


def _reconstructing(
    dictionary: Dictionary, x: Tensor
) -> Callable[[slice], tuple[Tensor, Codes, Tensor | None]]:
    """Rows of x -> reconstruction, codes, and what the skip alone gives where there is one."""

    def reconstruct(part: slice) -> tuple[Tensor, Codes, Tensor | None]:
        codes = dictionary.encode(x[part])
        skip_only = None if dictionary.skip is None else without_latents(dictionary, x[part])
        return dictionary.decode(codes, x[part]), codes, skip_only

    return reconstruct


@torch.no_grad()
def judge(
    source: ActivationSource,
    dictionaries: Mapping[Site, Dictionary],
    tokens: int,
    rows: int,
    progress: Progress,
) -> dict[Site, ReconstructionMeter]:
    """Finished dictionaries on held-out tokens, as anyone who loads them will use them."""
    meters = {
        site: ReconstructionMeter(dictionary.d_out, dictionary.d_sae)
        for site, dictionary in dictionaries.items()
    }
    seen = 0
    for batch in source.heldout(rows, tokens, progress):
        progress.check()
        for site, dictionary in dictionaries.items():
            x, target = batch[site.input], batch[site.output]
            for part, found in in_parts(_reconstructing(dictionary, x), len(x), rows):
                meters[site].add(target[part], *found)
        seen += len(x)
        progress.report(seen, tokens if tokens < ALL_TOKENS else None, phase="judge")
    return meters
