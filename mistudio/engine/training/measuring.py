"""How fast a run would go, from two seconds of it: the real model on real text up to the deepest
site, and steps of the real size from what was captured.

The steps run on an untrained dictionary in the state of the run's middle: as many latents active
as the run has on average, at a learning rate of nothing, so that it stays there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.positions import countable, counted
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.site import Site
from mistudio.engine.training.config import Plan, TrainingConfig, derive
from mistudio.engine.training.step import SiteTrainer

SECONDS = 2.0
# Of the time: the model to the deepest site, the whole model with its logits, steps, encoding.
FORWARD, WHOLE, STEP, ENCODE = 0.35, 0.15, 0.4, 0.1
BATCH_WINDOWS = 8  # of a pass, as `LiveActivations` takes them
LEAST_BATCH = 256  # tokens of the first, small step
NO_RATE = 1e-30


@dataclass(frozen=True)
class Speeds:
    """Tokens per second, as `planning.Measured` takes them. `spread`: half the distance of the
    quartiles of repeated passes and steps, relative to their median, the larger of both; `seconds`:
    what measuring took, `passes` and `steps` how many there were."""

    forward: float
    step: float
    encode: float
    whole: float
    spread: float
    seconds: float
    passes: int
    steps: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_speeds(
    model: HookedDecoder,
    text: TokenSplit,
    sites: tuple[Site, ...],
    config: TrainingConfig,
    *,
    seconds: float | None = None,
    progress: Progress = SILENT,
) -> Speeds:
    """Measure within about `seconds`, by default `SECONDS` (one pass and one step are made however
    long they take).

    Raises InvalidInput where the text has not one window of the configuration's context, and
    whatever memory running out raises.
    """
    text.require_windows(config.context, 1, "Measuring the speed")
    seconds = SECONDS if seconds is None else seconds
    began = time.perf_counter()
    meter = _Meter(model, text, sites, config, progress)
    forward = meter.passes(seconds * FORWARD)
    whole = meter.whole(seconds * WHOLE)
    step = [meter.steps(site, seconds * STEP / len(meter.kinds)) for site in meter.kinds]
    encode = meter.encodes(seconds * ENCODE)
    # Sites of one width cost the same; each of several kinds stands for its own.
    per_token = sum(
        found.per_token * sum(meter.kind(site) == meter.kind(kind) for site in sites)
        for kind, found in zip(meter.kinds, step, strict=True)
    )
    return Speeds(
        forward=1 / forward.per_token,
        step=1 / per_token,
        encode=1 / encode,
        whole=1 / whole,
        spread=max(forward.spread, *(found.spread for found in step)),
        seconds=time.perf_counter() - began,
        passes=forward.repeats,
        steps=sum(found.repeats for found in step),
    )


@dataclass(frozen=True)
class _Found:
    """Seconds per token, how far repeats were apart, and how many there were."""

    per_token: float
    spread: float
    repeats: int


class _Meter:
    """The model, its text, and what was captured so far."""

    def __init__(
        self,
        model: HookedDecoder,
        text: TokenSplit,
        sites: tuple[Site, ...],
        config: TrainingConfig,
        progress: Progress,
    ) -> None:
        self._model, self._text, self._config, self._progress = model, text, config, progress
        self._points = tuple(sorted({point for site in sites for point in site.points}))
        self._windows, self._next = text.n_windows(config.context), 0
        self._rows: dict[HookPoint, list[Tensor]] = {point: [] for point in self._points}
        self._medians: dict[HookPoint, float] = {}
        self._trainer: SiteTrainer | None = None
        self._x: Tensor | None = None
        self.kinds = list({self.kind(site): site for site in sites}.values())

    def kind(self, site: Site) -> tuple[int, int]:
        """Sites of a kind have dictionaries of the same sizes."""
        return self._model.width(site.input), self._model.width(site.output)

    # --- the model --------------------------------------------------------------------------

    def passes(self, seconds: float) -> _Found:
        """The model to the deepest site; what it gives is kept for the steps."""
        self._pass(1)  # warms up; the next says how many windows fit into the time
        each = self._timed(lambda: self._pass(1))
        windows = int(max(1, min(BATCH_WINDOWS, seconds / 3 / each)))
        times: list[float] = []
        began = time.perf_counter()
        while not times or time.perf_counter() - began < seconds:
            self._progress.check()
            times.append(self._timed(lambda: self._pass(windows)) / (windows * self._context))
        return _Found(median(times), _spread(times), len(times))

    @property
    def _context(self) -> int:
        return self._config.context

    def _pass(self, windows: int) -> None:
        """As a source does it: captured, the counted rows picked, in float32 where they learn."""
        ids = self._ids(windows)
        captured = self._model.capture(ids, self._points)
        mask = self._counted(ids, captured)
        places = mask.flatten().nonzero().squeeze(1)
        for point, values in captured.items():
            rows = values.flatten(0, 1).index_select(0, places).float()
            kept = self._rows[point]
            if sum(map(len, kept)) < self._wanted:
                kept.append(rows)

    def _counted(self, ids: Tensor, captured: Mapping[HookPoint, Tensor]) -> Tensor:
        special = self._text.meta.special_ids
        if not self._medians:
            mask = countable(ids, special)
            self._medians = {
                point: float(values[mask].float().norm(dim=-1).median())
                for point, values in captured.items()
            }
        return counted(ids, captured, self._medians, special)

    @property
    def _wanted(self) -> int:
        return self._config.batch_size or 2048

    def _ids(self, windows: int) -> Tensor:
        chosen = (self._next + np.arange(windows)) % self._windows
        self._next = int(chosen[-1]) + 1
        return self._text.batch(chosen, self._context).to(self._model.device)

    @torch.inference_mode()
    def whole(self, seconds: float) -> float:
        """Seconds per token of the whole model with its logits."""
        ids = self._ids(1)
        first = self._timed(lambda: self._logits(ids))  # warms up
        if first < 10 * seconds:
            first = self._timed(lambda: self._logits(ids))
        if first > seconds / 2:
            return first / self._context
        windows = int(max(1, min(BATCH_WINDOWS, seconds / 2 / first)))
        ids = self._ids(windows)
        return self._timed(lambda: self._logits(ids)) / (windows * self._context)

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model.model(ids, use_cache=False).logits
        return logits

    # --- the dictionary ---------------------------------------------------------------------

    def steps(self, site: Site, seconds: float) -> _Found:
        """Steps of the run's batch size. Where those are too long for the time, two smaller sizes
        say what a step costs whatever its batch, and what each token adds."""
        plan = derive(self._config, *self.kind(site))
        x, y = self._batch(site.input, plan.batch_size), None
        if site.is_transcoder:
            y = self._batch(site.output, plan.batch_size)
        trainer = _settled(plan, x, y)
        self._trainer, self._x = trainer, x

        def step(n: int) -> float:
            self._progress.check()
            rows = None if y is None else y[:n]
            return self._timed(lambda: trainer.step(x[:n], rows, measure=False))

        n = plan.batch_size
        least = min(n, LEAST_BATCH)
        step(least)  # warms up
        small = step(least)
        if small * n / least > seconds and n > 2 * least:
            larger = int(max(2 * least, min(n, n * seconds / 3 / (small * n / least))))
            large = median([step(larger), step(larger)])
            each = max(0.0, large - small) / (larger - least)
            return _Found((small + each * (n - least)) / n, 0.0, 4)
        times: list[float] = []
        began = time.perf_counter()
        while not times or time.perf_counter() - began < seconds:
            times.append(step(n) / n)
        return _Found(median(times), _spread(times), len(times))

    def _batch(self, point: HookPoint, n: int) -> Tensor:
        """Rows that were captured, again and again where there are fewer."""
        rows = torch.cat(self._rows[point])
        return rows.repeat(-(-n // len(rows)), 1)[:n]

    @torch.no_grad()
    def encodes(self, seconds: float) -> float:
        """Seconds per token of the finished dictionary, there and back."""
        assert self._trainer is not None and self._x is not None
        dictionary, x = self._trainer.dictionary(), self._x[:LEAST_BATCH]

        def encode() -> None:
            dictionary.decode(dictionary.encode(x), x)

        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 2 or time.perf_counter() - began < seconds:
            self._progress.check()
            times.append(self._timed(encode))
        return median(times) / len(x)

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        """Until the device has done what it was given."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        elif self._model.device.type == "mps":
            torch.mps.synchronize()


def _settled(plan: Plan, x: Tensor, y: Tensor | None) -> SiteTrainer:
    """A new trainer that has as many latents active as the run has on average, and stays so."""
    trainer = SiteTrainer(replace(plan, learning_rate=NO_RATE), x, plan.config.seed, y)
    share = plan.config.anneal_share
    # There `current_k` is its mean over the run.
    trainer.step_number = max(1, round(share * plan.steps * (1 - share / 2)))
    if plan.config.sparsity in ("standard", "gated", "jumprelu"):
        _thin_out(trainer, x)
    return trainer


def _thin_out(trainer: SiteTrainer, x: Tensor) -> None:
    """Let k latents be active on average, where only training brings that about: untrained, half
    of all are."""
    centre = trainer.wiring.centre
    centred = trainer.wiring.inputs(x[:LEAST_BATCH]) - (trainer.b_dec if centre is None else centre)
    pre = torch.addmm(trainer.b_enc, centred, trainer.encoder.T)
    level = pre.flatten().topk(len(pre) * trainer.plan.k, sorted=False).values.min()
    thresholds = trainer.objective.parameters.get("log_threshold")
    if thresholds is not None:
        thresholds.fill_(float(level.clamp_min(1e-6).log()))
    else:
        trainer.b_enc -= level


def _spread(times: list[float]) -> float:
    """Half the distance of the quartiles, relative to the median; 0 of fewer than four."""
    if len(times) < 4:
        return 0.0
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / 2 / middle)
