"""Our side, and the only module of the benchmark that knows how the engine trains and saves.

Takes one job as JSON on the command line and answers with one line of JSON.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import shared
import torch

import mistudio.engine
from mistudio.engine.activations.stream import Batch, BatchStream, Dropped, State, pack
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.files import save_sae
from mistudio.engine.sae.formats.writing import export_sae
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.distributed import ALONE, World
from mistudio.engine.training.run import train as train_run
from mistudio.engine.training.step import SiteTrainer


class Replay:
    """An `ActivationSource` that gives the shared batches in the shared order."""

    def __init__(self, activations: shared.Activations, order: Path) -> None:
        point = HookPoint.parse(activations.point)
        self.points = (point,)
        self.medians = {point: activations.median}
        self.dropped = Dropped()
        self.dropped_outliers = 0
        self._activations, self._order = activations, order

    def width(self, point: HookPoint) -> int:
        return self._activations.width

    def batches(
        self,
        batch_size: int,
        seed: int,
        progress: Progress = SILENT,
        state: State | None = None,
        world: World = ALONE,
    ) -> BatchStream:
        """From the first batch on, whatever the seed: the file is the order."""
        if state is not None:
            raise ValueError("The benchmark's runs are not resumed")
        return _Replayed(
            self.points[0], shared.batches(self._activations, self._order, batch_size), progress
        )

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def heldout(self, batch_size: int, limit: int, progress: Progress = SILENT) -> Iterator[Batch]:
        heldout = self._activations.heldout
        n = min(limit, len(heldout))
        for start in range(0, n, batch_size):
            progress.check()
            chosen = slice(start, min(start + batch_size, n))
            yield {self.points[0]: self._activations.rows(heldout, chosen)}


class _Replayed(BatchStream):
    def __init__(
        self, point: HookPoint, batches: Iterator[torch.Tensor], progress: Progress
    ) -> None:
        self._point, self._batches, self._progress = point, batches, progress
        self._given = 0

    def __next__(self) -> Batch:
        self._progress.check()
        rows = next(self._batches)
        self._given += 1
        return {self._point: rows}

    def state(self) -> State:
        return pack(batches=self._given)


def engine_fingerprint() -> str:
    """Of the sources that decide what a training run gives: rows are repeated when they change."""
    folder = Path(mistudio.engine.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("training/*.py"), *folder.glob("sae/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def default_config(job: dict[str, Any], d: int, **more: Any) -> TrainingConfig:
    """The default template: given is only what the comparison fixes, never a learning rate."""
    return TrainingConfig(
        sparsity=job["arch"],
        expansion=job["width"] / d,
        k=job["k"],
        tokens=job["steps"] * job["batch"],
        seed=job["seed"],
        **more,
    )


def train(job: dict[str, Any]) -> dict[str, Any]:
    activations = shared.open_activations(Path(job["activations"]), job["point"])
    source = Replay(activations, Path(job["order"]))
    config = default_config(job, activations.width)
    log: list[dict[str, Any]] = []
    began = time.perf_counter()
    # Judged on little here: the benchmark's one evaluator judges the reloaded export.
    run = train_run(source, config, heldout_tokens=2048, record=log.append)
    whole = time.perf_counter() - began
    ((site, trained),) = run.sites.items()
    folder = Path(job["export"])
    save_sae(
        trained.dictionary,
        folder / "saved",
        site=site,
        model_name="SmolLM2-135M-Instruct",
        training_architecture=job["arch"],
        frequencies=trained.frequencies,
    )
    return {
        "seconds": run.seconds,
        "whole_seconds": whole,
        "tokens_per_second": run.tokens / run.seconds,
        "trained_l0": log[-1]["l0"],
        "learning_rate": trained.plan.learning_rate,
        "place": str(export_sae(folder / "saved", folder, "saelens")),
        "version": engine_fingerprint(),
    }


def _stepper(job: dict[str, Any]) -> Callable[[], None]:
    """Whole training steps in the steady state: the first tenth of a run, which has more active
    latents, is left out; the care for dead latents and the statistics of every step are on. The
    first call makes the trainer."""
    pool = shared.pool(job)
    config = default_config(job, job["d"], batch_size=job["batch"], anneal_share=0.0)
    made: list[SiteTrainer] = []

    def step() -> None:
        if not made:
            made.append(SiteTrainer(derive(config, job["d"]), pool[0], seed=0))
        trainer = made[0]
        trainer.tokens_since_fired[: job["dead"]] = 10**12
        trainer.step(pool[trainer.step_number % len(pool)], measure=True)

    return step


def speed(job: dict[str, Any]) -> None:
    shared.take_turns(_stepper(job), job)


def memory(job: dict[str, Any]) -> dict[str, Any]:
    return shared.extra_memory(_stepper(job), job["warmup"], job["device"])


if __name__ == "__main__":
    shared.serve({"train": train, "speed": speed, "memory": memory})
