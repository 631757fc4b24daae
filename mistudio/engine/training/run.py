"""The run: sources of activations in, finished dictionaries out, one per hook point.

Several sites learn side by side from the same batches: one forward pass feeds them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.activations.source import ActivationSource
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.metrics import ReconstructionMeter, ReconstructionQuality
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

    sites: dict[HookPoint, TrainedSite]
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
    last: dict[HookPoint, StepMetrics] = {}
    for step in range(steps):
        progress.check()
        batch = next(batches)
        now = time.monotonic()
        measure = step in (0, steps - 1) or now - logged > LOG_SECONDS
        for point, trainer in trainers.items():
            metrics = trainer.step(batch[point], measure=measure)
            if metrics is not None:
                last[point] = metrics
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
        point: _finish(source, point, trainer, last[point].fvu, heldout_tokens, progress)
        for point, trainer in trainers.items()
    }
    return TrainedRun(sites, tokens, seconds, tokens / max(seconds, 1e-9), stopped)


def _trainers(
    source: ActivationSource, config: TrainingConfig, progress: Progress
) -> dict[HookPoint, SiteTrainer]:
    sample = _sample(source, config, progress)
    return {
        point: SiteTrainer(derive(config, source.width(point)), sample[point], config.seed)
        for point in source.points
    }


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


def _shape(trainers: dict[HookPoint, SiteTrainer]) -> tuple[int, int]:
    plan = next(iter(trainers.values())).plan
    return plan.batch_size, plan.steps


def _log(
    record: Record | None,
    metrics: dict[HookPoint, StepMetrics],
    step: int,
    tokens: int,
    speed: float,
) -> None:
    if record is None:
        return
    for point, row in metrics.items():
        record(
            {
                "site": point.name,
                "step": step,
                "tokens": tokens,
                "loss": row.loss,
                "fvu": row.fvu,
                "l0": row.l0,
                "dead": row.dead,
                "learning_rate": row.learning_rate,
                "tokens_per_second": speed,
            }
        )


def _headline(metrics: dict[HookPoint, StepMetrics], speed: float) -> dict[str, Any]:
    first = next(iter(metrics.values()))
    return {"loss": first.loss, "l0": first.l0, "dead": first.dead, "tokens_per_second": speed}


def _finish(
    source: ActivationSource,
    point: HookPoint,
    trainer: SiteTrainer,
    train_fvu: float,
    heldout_tokens: int,
    progress: Progress,
) -> TrainedSite:
    dictionary = trainer.dictionary()
    calibrated = 0
    if isinstance(dictionary.activation, JumpReLU):
        dictionary, calibrated = calibrate_threshold(source, point, dictionary, trainer, progress)
    dictionary = dictionary.folded()
    meter = judge(source, point, dictionary, heldout_tokens, progress)
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
def calibrate_threshold(
    source: ActivationSource,
    point: HookPoint,
    dictionary: Dictionary,
    trainer: SiteTrainer,
    progress: Progress,
) -> tuple[Dictionary, int]:
    """One threshold so that k latents are active on average, exact on the tokens it sees.

    SAELens exports a running average that starts at 0 and is wrong after short runs; this is a
    pass over training tokens (never held-out ones) with the weights frozen.
    """
    running = trainer.threshold or 0.0
    wanted = min(CALIBRATION_TOKENS, max(8192, trainer.step_number * trainer.plan.batch_size))
    candidates: list[Tensor] = []
    seen = 0
    for batch in source.batches(2048, trainer.plan.config.seed + 2, progress):
        progress.check()
        pre = dictionary.pre_activations(batch[point])
        candidates.append(pre[pre > 0.5 * running].cpu())
        seen += len(pre)
        progress.report(seen, wanted, phase="calibrate")
        if seen >= wanted:
            break
    values = torch.cat(candidates)
    n = min(len(values), round(seen * trainer.plan.k))
    threshold = float(values.topk(n, sorted=False).values.min()) if n else 0.0
    calibrated = JumpReLU(torch.full_like(dictionary.b_enc, max(threshold, 0.0)))
    return (
        Dictionary(
            dictionary.encoder,
            dictionary.b_enc,
            dictionary.decoder,
            dictionary.b_dec,
            calibrated,
            dictionary.scale,
        ),
        seen,
    )


@torch.no_grad()
def judge(
    source: ActivationSource,
    point: HookPoint,
    dictionary: Dictionary,
    tokens: int,
    progress: Progress,
) -> ReconstructionMeter:
    """The finished dictionary on held-out tokens, as anyone who loads it will use it."""
    meter = ReconstructionMeter(source.width(point), dictionary.d_sae)
    for batch in source.heldout(2048, tokens, progress):
        codes = dictionary.encode(batch[point])
        meter.add(batch[point], dictionary.decode(codes), codes)
        progress.report(meter.tokens, tokens, phase="judge")
    return meter
