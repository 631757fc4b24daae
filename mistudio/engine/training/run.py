"""The run: sources of activations in, finished dictionaries out, one per site.

Several sites learn side by side from the same batches: one forward pass feeds them all. A run can
be saved between any two steps and goes on from there as if it had never been interrupted.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.engine import garbage
from mistudio.engine.activations.source import ActivationSource
from mistudio.engine.activations.stream import Batch, BatchStream, State
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT, Interrupted, Progress
from mistudio.engine.sae.metrics import evaluate, plain
from mistudio.engine.sae.site import Site
from mistudio.engine.training import checkpoints
from mistudio.engine.training.checkpoints import AutoSave, Checkpoint
from mistudio.engine.training.config import Plan, TrainingConfig, derive
from mistudio.engine.training.distributed import ALONE, World, check_batch, together
from mistudio.engine.training.finish import ALL_TOKENS, ROWS, TrainedSite, finish, fitting_rows
from mistudio.engine.training.step import SiteTrainer, StepMetrics
from mistudio.errors import (
    Incompatible,
    ProcessLost,
    TrainingDiverged,
    explain,
    is_out_of_memory,
)

SAMPLE_TOKENS = 32768  # set scale, bias and variance; trained on too
LOG_ROWS = 2000  # of metrics per site, at even steps, so that a resumed run writes the same ones
SHOW_SECONDS = 0.5
EVALUATIONS = 20
EVALUATION_TOKENS = 8192
EVALUATION_BYTES = 512 * 1024**2  # of main memory at most; they are kept from one to the next
# What may differ when a run goes on: how it is saved, not what is learnt.
FREE = ("autosave_steps", "autosave_minutes", "gradient_accumulation")

Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Saving:
    """Where a run's checkpoints go.

    `wants_save` is asked after every step; what it asks for stays until it is deleted. `auto` is
    asked too: where it gives something, that counts and not the configuration. `saved` hears of
    each checkpoint, `failed` why one could not be written and whether `wants_save` had asked for
    it. `ready` is called before the first step. `about` (JSON) is written into the checkpoints.
    """

    folder: Path
    wants_save: Callable[[], bool] = lambda: False
    auto: Callable[[], AutoSave | None] = lambda: None
    saved: Callable[[Checkpoint], None] = lambda checkpoint: None
    failed: Callable[[str, bool], None] = lambda why, wanted: None
    ready: Callable[[], None] = lambda: None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedRun:
    """What a run gives. `stopped` says that the user ended it early; `seconds` leave out pauses;
    `notes` say in sentences what went otherwise than planned. Of several processes only the first
    has `sites`."""

    sites: dict[Site, TrainedSite]
    tokens: int
    seconds: float
    tokens_per_second: float
    stopped: bool
    notes: tuple[str, ...] = ()


def train(
    source: ActivationSource,
    config: TrainingConfig,
    *,
    heldout_tokens: int = ALL_TOKENS,
    progress: Progress = SILENT,
    record: Record | None = None,
    wants_finish: Callable[[], bool] = lambda: False,
    saving: Saving | None = None,
    resume: Checkpoint | None = None,
    new_stream: bool = False,
    world: World = ALONE,
) -> TrainedRun:
    """Train, calibrate and judge one dictionary per site of `source`.

    `record` gets a row of metrics per site at even steps and at the first and last one, with
    `heldout_...` values and the `density` of firings since the last such row every 5 % of the
    steps. When `wants_finish` turns true the run ends with
    the next step and keeps what it has. Told to quit (`Interrupted`), it is saved first.

    With `resume` it goes on from a checkpoint. `new_stream` then begins the stream of activations
    anew, for a source of another kind than the checkpoint's.

    In a `world` of several processes all call this alike; only the first one's `progress`,
    `record`, `wants_finish` and `saving` count. A checkpoint does not depend on their number.

    Raises Incompatible where the checkpoint belongs to other settings, and whatever the step
    raised where memory runs out even with the smallest parts (saved first, where that can be).
    So for ProcessLost, where another process has ended.
    """
    if world.rank:
        progress, record, saving = SILENT, None, None
    run = _Run(source, config, progress, record or (lambda row: None), saving, world)
    try:
        run.begin(resume, new_stream)
        run.learn(wants_finish)
        seconds = run.seconds
        train_fvu = {site: metrics.fvu for site, metrics in run.last.items()}
        # The stream goes on: nothing that it holds is captured again.
        sites = finish(
            source, run.batches.whole(), run.trainers, train_fvu, heldout_tokens, progress, world
        )
    finally:
        run.open.close()
    speed = run.tokens / max(seconds, 1e-9)
    return TrainedRun(sites, run.tokens, seconds, speed, run.stopped, tuple(run.notes))


def sites_of(points: tuple[HookPoint, ...], config: TrainingConfig) -> tuple[Site, ...]:
    """The sites of a run that reads `points`; those of a transcoder also need its outputs.

    Raises InvalidInput where a transcoder should read anything but an MLP's input.
    """
    if config.wiring not in ("transcoder", "skip_transcoder"):
        return tuple(Site.at(point) for point in points)
    outputs = {HookPoint("mlp_out", point.layer) for point in points if point.site == "mlp_in"}
    return tuple(Site.across_mlp(point) for point in points if point not in outputs)


class _Run:
    """A run between two steps: everything that a checkpoint holds, and what it is told."""

    batches: _Batches

    def __init__(
        self,
        source: ActivationSource,
        config: TrainingConfig,
        progress: Progress,
        record: Record,
        saving: Saving | None,
        world: World,
    ) -> None:
        self._source, self._config, self._world = source, config, world
        self._progress, self._record, self._saving = progress, record, saving
        self._together = together(progress, world)  # for what all processes do in step
        self._sites = sites_of(source.points, config)
        self.trainers: dict[Site, SiteTrainer] = {}
        self.step = self.tokens = 0
        self.stopped = False
        self.last: dict[Site, StepMetrics] = {}
        self.notes: list[str] = []
        self.open = ExitStack()
        self._clock = _Clock()
        self._heldout: list[Batch] = []
        self._judged: dict[Site, dict[str, Any]] = {}  # at step `_judged_at`
        self._judged_at = 0
        self._newest: Path | None = None  # the checkpoint of this very step
        self._shown = self._saved_seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._clock.seconds

    @property
    def _plan(self) -> Plan:
        """Batch size and steps are the same for all sites."""
        return next(iter(self.trainers.values())).plan

    # --- beginning --------------------------------------------------------------------------

    def begin(self, resume: Checkpoint | None, new_stream: bool) -> None:
        self._progress.report(0, 1, phase="prepare")
        if self._saving:
            checkpoints.clean(self._saving.folder)
        if resume is None:
            self._start()
        else:
            self._go_on(resume, new_stream)
        self._shown = self._saved_seconds = self._clock.seconds
        self._clock.start()

    def _start(self) -> None:
        plans = self._plans()
        plan = next(iter(plans.values()))
        self._read_from(plan, None)
        wanted = min(SAMPLE_TOKENS, max(2048, plan.steps * plan.batch_size // 4))
        sample = self.batches.sample(wanted, self._together)
        for site in self._sites:
            x, y = _pair(sample, site)
            trainer = SiteTrainer(plans[site], x, self._config.seed, y, self._world)
            for value in trainer.parameters().values():
                self._world.copied(value)  # another device may have rounded otherwise
            self.trainers[site] = trainer
        del sample, x, y
        self._read_heldout(plan)

    def _go_on(self, checkpoint: Checkpoint, new_stream: bool) -> None:
        run = checkpoint.run
        plans, self.last = _read_run(run, self._config, self._sites)
        self._read_from(plans[self._sites[0]], None if new_stream else checkpoint.source())
        self.step, self.tokens, self.stopped = run["step"], run["tokens"], run["stopped"]
        self.notes = list(run["notes"])
        self._clock = _Clock(run["seconds"])
        device = self._read_heldout(plans[self._sites[0]])
        for site, plan in plans.items():
            state = checkpoint.site(site.name)
            self.trainers[site] = SiteTrainer.resumed(plan, state, device, self._world)
        self._newest = checkpoint.folder
        if new_stream:
            self._note("The activations now come from another source: the text begins anew")

    def _plans(self) -> dict[Site, Plan]:
        width = self._source.width
        return {
            site: derive(self._config, width(site.input), width(site.output))
            for site in self._sites
        }

    def _read_from(self, plan: Plan, state: State | None) -> None:
        seed = self._config.seed + 1
        check_batch(self._world, plan.batch_size)
        stream = self._source.batches(
            plan.batch_size, seed, self._together, state=state, world=self._world
        )
        self.batches = _Batches(self.open.enter_context(stream), self._world)

    def _read_heldout(self, plan: Plan) -> torch.device:
        """Keep the tokens that the run is judged by on its way; the device that it learns on."""
        row = 4 * sum(self._source.width(point) for point in self._source.points)
        # Of a short run no more than a share: each of 20 evaluations reads all of them.
        fitting = max(512, plan.steps * plan.batch_size // 64)
        wanted = min(EVALUATION_TOKENS, fitting, EVALUATION_BYTES // row)
        first = self._world.rank == 0
        device = torch.device("cpu")
        with self._source.exclusive():
            for batch in self._source.heldout(ROWS, wanted if first else 1, self._progress):
                device = batch[self._source.points[0]].device
                if first:
                    self._heldout.append({point: rows.cpu() for point, rows in batch.items()})
        return device

    # --- learning ---------------------------------------------------------------------------

    def learn(self, wants_finish: Callable[[], bool]) -> None:
        """Step until the end or the user's wish, then save."""
        if self._saving:
            self._progress.report(self.step, self._plan.steps, phase="train")
            self._saving.ready()
        try:
            while self.step < self._plan.steps and not self.stopped:
                self._step(wants_finish)
                self._save_if_due()
        except Interrupted:
            self._save()
            raise
        except Exception as exc:
            if is_out_of_memory(exc) or isinstance(exc, ProcessLost):
                self._save(judge=False)
            raise
        self._save()

    def _step(self, wants_finish: Callable[[], bool]) -> None:
        self._clock.wait(self._together)
        batch = next(self.batches)
        steps = self._plan.steps
        due = self._clock.seconds - self._shown > SHOW_SECONDS
        stopping, due = self._world.told([wants_finish(), due])
        last = stopping or self.step + 1 == steps
        judge = last or self.step + 1 in _evaluations(steps)
        log = judge or self.step % -(-steps // LOG_ROWS) == 0
        show = log or due
        for site in self._sites:
            metrics = self._learn_from(batch, site, show)
            if metrics is not None:
                self.last[site] = metrics
        self.step += 1
        self._newest = None
        self.tokens += len(batch[self._source.points[0]]) * self._world.size
        self.stopped = stopping and self.step < steps
        if judge:
            self._judge()
        if log:
            self._log(judge)
        self._report(steps, show)

    def _learn_from(self, batch: Batch, site: Site, measure: bool) -> StepMetrics | None:
        """One step; where memory runs out, once more with the batch in smaller parts."""
        trainer = self.trainers[site]
        while True:
            try:
                return trainer.step(*_pair(batch, site), measure=measure)
            except Exception as exc:
                alone = self._world.size == 1  # the others have gone on
                if not is_out_of_memory(exc) or not alone or not trainer.split():
                    raise
            # Outside of the handler: the error holds what the failed step held.
            _free_memory()
            where = f" at {site}" if len(self._sites) > 1 else ""
            self._note(
                f"Out of memory{where}: the batch is now worked through in {trainer.parts} parts"
            )

    def _judge(self) -> None:
        """On the held-out tokens that are kept. Takes no random numbers and moves no stream."""
        if self._judged_at == self.step or not self._heldout:
            return
        self._judged, self._judged_at = {}, self.step
        try:
            self._judged = {site: self._quality(site) for site in self._sites}
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            self._note("Out of memory: the held-out text was not judged")

    def _quality(self, site: Site) -> dict[str, Any]:
        dictionary = self.trainers[site].dictionary()
        rows = fitting_rows(self.trainers)
        pairs = (
            (x, y)
            for batch in self._heldout
            for x, y in zip(
                batch[site.input].split(rows), batch[site.output].split(rows), strict=True
            )
        )
        quality = evaluate(dictionary, pairs, dictionary.d_out).result()
        values = {
            name: getattr(quality, name) for name in ("fvu", "l0", "dead_share", "cosine", "tokens")
        }
        return plain(values)

    # --- telling ----------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.notes.append(f"Step {self.step:,}: {text}.")
        self._progress.report(self.step, self._plan.steps, phase="train", note=self.notes[-1])

    def _log(self, judge: bool) -> None:
        """A row of each site; where the held-out text was judged, also how often latents fired on
        the training tokens since that was last told."""
        for site, metrics in self.last.items():
            row = {
                "site": site.name,
                "step": self.step - 1,
                "tokens": self.tokens,
                "time": time.time(),
                **asdict(metrics),
                "tokens_per_second": self._speed,
            }
            if judge:
                judged = self._judged.get(site, {})
                row |= {f"heldout_{name}": value for name, value in judged.items()}
                found, tokens = self.trainers[site].density()
                row["density"] = {**asdict(found), "tokens": tokens}
            self._record(row)

    @property
    def _speed(self) -> float:
        return self.tokens / max(self._clock.seconds, 1e-9)

    def _report(self, steps: int, show: bool) -> None:
        if not show:
            self._progress.report(self.step, steps, phase="train")
            return
        self._shown = self._clock.seconds
        first = self.last[self._sites[0]]
        self._progress.report(
            self.step,
            steps,
            phase="train",
            loss=first.loss,
            l0=first.l0,
            dead=first.dead,
            tokens_per_second=self._speed,
        )

    # --- saving -----------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self._saving is None:
            return
        wanted = self._saving.wants_save()
        auto = self._saving.auto()
        if auto is None:
            auto = AutoSave(self._config.autosave_steps, self._config.autosave_minutes)
        by_steps = auto.steps is not None and self.step % auto.steps == 0
        passed = self._clock.seconds - self._saved_seconds
        by_time = auto.minutes > 0 and passed >= 60 * auto.minutes
        if wanted or by_steps or by_time:
            self._save(wanted=wanted)

    def _save(self, judge: bool = True, wanted: bool = False) -> None:
        """Where the disk is full the run goes on, and says so."""
        even = all(trainer.step_number == self.step for trainer in self.trainers.values())
        there = self._newest is not None and self._newest.is_dir()  # it may have been deleted
        if self._saving is None or there or not even:
            return
        self._check_finite()
        if judge:
            self._judge()
        self._saved_seconds = self._clock.seconds
        # A generator: one site's tensors at a time come to main memory.
        sites = ((site.name, trainer.own_state()) for site, trainer in self.trainers.items())
        try:
            checkpoint = checkpoints.save(
                self._saving.folder,
                self.step,
                sites,
                self.batches.state(),
                self._as_dict(),
                kept=wanted,
            )
        except OSError as exc:
            known = explain(exc)
            why = known.title if known else str(exc)
            self._note(f"This checkpoint could not be written ({why}); the run goes on")
            self._saving.failed(why, wanted)
            return
        self._newest = checkpoint.folder
        self._saving.saved(checkpoint)

    def _check_finite(self) -> None:
        for site, trainer in self.trainers.items():
            if not trainer.finite:
                raise TrainingDiverged(
                    "The training diverged",
                    f"The weights of {site} are no longer numbers at step {self.step:,}.",
                    f"Lower the learning rate (it was {trainer.plan.learning_rate:.2g}) and start "
                    "again.",
                )

    def _as_dict(self) -> dict[str, Any]:
        assert self._saving is not None
        judged = self._judged if self._judged_at == self.step else {}
        return {
            "tokens": self.tokens,
            "seconds": self._clock.seconds,
            "stopped": self.stopped,
            "seed": self._config.seed,
            "config": asdict(self._config),
            "sites": [site.name for site in self._sites],
            "plans": {site.name: trainer.plan.as_dict() for site, trainer in self.trainers.items()},
            "metrics": {site.name: asdict(metrics) for site, metrics in self.last.items()},
            "heldout": {site.name: values for site, values in judged.items()},
            "score": self._score(judged),
            "notes": self.notes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "about": dict(self._saving.about),
        }

    def _score(self, judged: Mapping[Site, Mapping[str, Any]]) -> float | None:
        """Mean held-out FVU of the sites. None while more latents are active than shall be in the
        end: that always looks better."""
        found = []
        for site, trainer in self.trainers.items():
            values, plan = judged.get(site, {}), trainer.plan
            steered = plan.config.l1_coefficient is None
            if values.get("fvu") is None or trainer.current_k() > plan.k:
                return None
            if steered and values["l0"] > 1.25 * plan.k:
                return None
            found.append(values["fvu"])
        return sum(found) / len(found)


class _Batches(Iterator[Batch]):
    """A stream's batches. The first ones serve as a sample before they are learnt from: what they
    were captured for is not captured twice."""

    def __init__(self, stream: BatchStream, world: World) -> None:
        self._stream, self._world = stream, world
        self._first: deque[tuple[Batch, State]] = deque()
        self._place: State | None = None  # after the batch last given, if it was one of the first

    def sample(self, tokens: int, progress: Progress) -> dict[HookPoint, Tensor]:
        """The rows of the batches to come, at least `tokens`."""
        self._place = self._stream.state()
        have = 0
        while have < tokens:
            progress.check()
            batch = next(self._stream)
            self._first.append((batch, self._stream.state()))
            have += len(next(iter(batch.values()))) * self._world.size
            progress.report(have, tokens, phase="prepare")
        return {
            point: torch.cat([self._world.gathered(batch[point]) for batch, _ in self._first])
            for point in self._first[0][0]
        }

    def whole(self) -> Iterator[Batch]:
        """The batches to come, with the rows of all processes."""
        for batch in self:
            yield {point: self._world.gathered(rows) for point, rows in batch.items()}

    def __next__(self) -> Batch:
        if self._first:
            batch, self._place = self._first.popleft()
            return batch
        self._place = None
        return next(self._stream)

    def state(self) -> State:
        return self._stream.state() if self._place is None else self._place


class _Clock:
    """Seconds of work: pauses do not count."""

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def wait(self, progress: Progress) -> None:
        """Whatever `check` waits is left out."""
        at = time.monotonic()
        progress.check()
        self._before -= time.monotonic() - at


def _pair(batch: Batch, site: Site) -> tuple[Tensor, Tensor | None]:
    """What a site's trainer is fed: its input, and its target where that is another point."""
    return batch[site.input], batch[site.output] if site.is_transcoder else None


def _evaluations(steps: int) -> frozenset[int]:
    """After how many steps the held-out text is judged."""
    return frozenset(round(steps * n / EVALUATIONS) for n in range(1, EVALUATIONS + 1)) - {0}


def _free_memory() -> None:
    garbage.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _read_run(
    run: Mapping[str, Any], config: TrainingConfig, sites: tuple[Site, ...]
) -> tuple[dict[Site, Plan], dict[Site, StepMetrics]]:
    """The plans and last metrics of a checkpoint's `run`. Incompatible where it was made with
    other settings, or by a version whose settings this one does not know."""
    try:
        before = TrainingConfig(**run["config"])
        plans = {
            site: Plan(**{**values, "config": TrainingConfig(**values["config"])})
            for site in sites
            if (values := run["plans"].get(site.name))
        }
        metrics = {site: StepMetrics(**run["metrics"][site.name]) for site in plans}
    except (KeyError, TypeError) as exc:
        raise Incompatible(
            "This checkpoint is of another version",
            f"It cannot be read: {exc}.",
            "Resume it with the version that began the run, or start the run again.",
        ) from exc
    wanted, found = asdict(config), asdict(before)
    for name, value in wanted.items():
        if name not in FREE and found[name] != value:
            raise Incompatible(
                "This checkpoint belongs to other settings",
                f"When it was written, {name} was {found[name]}; now it is {value}.",
                "Resume it with the settings it was started with, or start a new run.",
            )
    if [site.name for site in sites] != run["sites"]:
        raise Incompatible(
            "This checkpoint belongs to other layers",
            f"It holds {', '.join(run['sites'])}.",
            "Resume it with the layers it was started with, or start a new run.",
        )
    return plans, metrics
