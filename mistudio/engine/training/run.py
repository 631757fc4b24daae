"""The run: sources of activations in, finished dictionaries out, one per hook point.

Several sites learn side by side from the same batches: one forward pass feeds them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.activations.source import ActivationSource, Batch
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.metrics import ReconstructionMeter, ReconstructionQuality
from mistudio.engine.sae.site import Site
from mistudio.engine.training.config import Plan, TrainingConfig, derive
from mistudio.engine.training.step import SiteTrainer, StepMetrics

SAMPLE_TOKENS = 32768  # sets scale, bias and variance; reused for training
CALIBRATION_TOKENS = 262_144
LOG_SECONDS = 0.5

Record = Callable[[dict[str, Any]], None]


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


@dataclass(frozen=True)
class TrainedRun:
    """What a run gives. `stopped` says that the user ended it early."""

    sites: dict[Site, TrainedSite]
    tokens: int
    seconds: float
    tokens_per_second: float
    stopped: bool


def train(
    source: ActivationSource,
    config: TrainingConfig,
    *,
    heldout_tokens: int = 65536,
    progress: Progress = SILENT,
    record: Record | None = None,
    wants_finish: Callable[[], bool] = lambda: False,
) -> TrainedRun:
    """Train, calibrate and judge one dictionary per site of `source`.

    `record` gets a row of metrics per site about every half second and at the first and last
    step. When `wants_finish` turns true the run ends at the next step and keeps what it has.
    """
    trainers = _trainers(source, config, progress)
    batch_size, steps = _shape(trainers)
    batches = source.batches(batch_size, config.seed + 1, progress)
    began = time.monotonic()
    logged = 0.0
    tokens = 0
    stopped = False
    last: dict[Site, StepMetrics] = {}
    for step in range(steps):
        progress.check()
        batch = next(batches)
        now = time.monotonic()
        measure = step in (0, steps - 1) or now - logged > LOG_SECONDS
        for site, trainer in trainers.items():
            metrics = trainer.step(*_pair(batch, site), measure=measure)
            if metrics is not None:
                last[site] = metrics
        tokens += len(batch[source.points[0]])
        if measure:
            logged = now
            speed = tokens / max(time.monotonic() - began, 1e-9)
            _log(record, last, step, tokens, speed)
            progress.report(step + 1, steps, phase="train", **_headline(last, speed))
        else:
            progress.report(step + 1, steps, phase="train")
        if wants_finish():
            stopped = step + 1 < steps
            break
    seconds = time.monotonic() - began
    sites = {
        site: _finish(source, site, trainer, last[site].fvu, heldout_tokens, progress)
        for site, trainer in trainers.items()
    }
    return TrainedRun(sites, tokens, seconds, tokens / max(seconds, 1e-9), stopped)


def sites_of(points: tuple[HookPoint, ...], config: TrainingConfig) -> tuple[Site, ...]:
    """The sites of a run that reads `points`; those of a transcoder also need its outputs.

    Raises InvalidInput where a transcoder should read anything but an MLP's input.
    """
    if config.wiring not in ("transcoder", "skip_transcoder"):
        return tuple(Site.at(point) for point in points)
    outputs = {HookPoint("mlp_out", point.layer) for point in points if point.site == "mlp_in"}
    return tuple(Site.across_mlp(point) for point in points if point not in outputs)


def _trainers(
    source: ActivationSource, config: TrainingConfig, progress: Progress
) -> dict[Site, SiteTrainer]:
    sample = _sample(source, config, progress)
    trainers = {}
    for site in sites_of(source.points, config):
        plan = derive(config, source.width(site.input), source.width(site.output))
        x, y = _pair(sample, site)
        trainers[site] = SiteTrainer(plan, x, config.seed, y)
    return trainers


def _pair(batch: Batch, site: Site) -> tuple[Tensor, Tensor | None]:
    """What a site's trainer is fed: its input, and its target where that is another point."""
    return batch[site.input], batch[site.output] if site.is_transcoder else None


def _sample(
    source: ActivationSource, config: TrainingConfig, progress: Progress
) -> dict[HookPoint, Tensor]:
    """The first batches of the run's own order, so that nothing is captured twice in vain."""
    wanted = min(SAMPLE_TOKENS, max(2048, config.tokens // 4))
    parts: dict[HookPoint, list[Tensor]] = {point: [] for point in source.points}
    have = 0
    for batch in source.batches(2048, config.seed + 1, progress):
        for point in source.points:
            parts[point].append(batch[point])
        have += len(batch[source.points[0]])
        progress.report(have, wanted, phase="prepare")
        if have >= wanted:
            break
    return {point: torch.cat(rows) for point, rows in parts.items()}


def _shape(trainers: dict[Site, SiteTrainer]) -> tuple[int, int]:
    plan = next(iter(trainers.values())).plan
    return plan.batch_size, plan.steps


def _log(
    record: Record | None,
    metrics: dict[Site, StepMetrics],
    step: int,
    tokens: int,
    speed: float,
) -> None:
    if record is None:
        return
    for site, row in metrics.items():
        record(
            {
                "site": site.name,
                "step": step,
                "tokens": tokens,
                "loss": row.loss,
                "fvu": row.fvu,
                "l0": row.l0,
                "dead": row.dead,
                "learning_rate": row.learning_rate,
                "coefficient": row.coefficient,
                "tokens_per_second": speed,
            }
        )


def _headline(metrics: dict[Site, StepMetrics], speed: float) -> dict[str, Any]:
    first = next(iter(metrics.values()))
    return {"loss": first.loss, "l0": first.l0, "dead": first.dead, "tokens_per_second": speed}


def _finish(
    source: ActivationSource,
    site: Site,
    trainer: SiteTrainer,
    train_fvu: float,
    heldout_tokens: int,
    progress: Progress,
) -> TrainedSite:
    dictionary = trainer.dictionary()
    calibrated = 0
    if isinstance(dictionary.activation, JumpReLU):
        tokens = min(CALIBRATION_TOKENS, max(8192, trainer.step_number * trainer.plan.batch_size))
        batches = source.batches(2048, trainer.plan.config.seed + 2, progress)
        dictionary, calibrated = calibrated_thresholds(
            dictionary, (batch[site.input] for batch in batches), trainer.plan.k, tokens, progress
        )
    dictionary = dictionary.folded()
    meter = judge(source, site, dictionary, heldout_tokens, progress)
    return TrainedSite(
        plan=trainer.plan,
        dictionary=dictionary,
        quality=meter.result(),
        frequencies=meter.fired.double() / max(meter.tokens, 1),
        calibration_tokens=calibrated,
        revived=trainer.revived,
        train_fvu=train_fvu,
    )


@torch.no_grad()
def calibrated_thresholds(
    dictionary: Dictionary,
    inputs: Iterator[Tensor],
    k: int,
    tokens: int,
    progress: Progress = SILENT,
) -> tuple[Dictionary, int]:
    """All thresholds moved by one amount so that k latents are active on average, exact on the
    tokens it sees; and how many those were.

    SAELens exports a running average that starts at 0 and is wrong after short runs; this is a
    pass over training tokens (never held-out ones) with the weights frozen.
    """
    assert isinstance(dictionary.activation, JumpReLU)
    thresholds = dictionary.activation.threshold
    margins: list[Tensor] = []
    seen = kept = 0
    floor = -0.5 * thresholds.mean()
    for x in inputs:
        progress.check()
        above = dictionary.pre_activations(x) - thresholds
        margins.append(above[above > floor].cpu())
        seen, kept = seen + len(x), kept + len(margins[-1])
        if kept > 16 * seen * k:  # far more than can be chosen: keep the candidates few
            margins = [torch.cat(margins).topk(8 * seen * k, sorted=False).values]
            floor, kept = margins[0].min(), len(margins[0])
        progress.report(seen, tokens, phase="calibrate")
        if seen >= tokens:
            break
    values = torch.cat(margins)
    n = min(len(values), round(seen * k))
    shift = values.topk(n, sorted=False).values.min().to(thresholds.device) if n else 0.0
    # The entry that decides must itself stay active.
    moved = (thresholds + shift - 1e-6 * thresholds.abs()).clamp_min(0.0)
    return replace(dictionary, activation=JumpReLU(moved)), seen


@torch.no_grad()
def judge(
    source: ActivationSource,
    site: Site,
    dictionary: Dictionary,
    tokens: int,
    progress: Progress,
) -> ReconstructionMeter:
    """The finished dictionary on held-out tokens, as anyone who loads it will use it."""
    meter = ReconstructionMeter(source.width(site.output), dictionary.d_sae)
    for batch in source.heldout(2048, tokens, progress):
        x = batch[site.input]
        codes = dictionary.encode(x)
        meter.add(batch[site.output], dictionary.decode(codes, x), codes)
        progress.report(meter.tokens, tokens, phase="judge")
    return meter
