"""For devices that cannot hold the model and a dictionary in training at once: they take turns.

A phase loads the model, stores the activations of the next windows, frees the model, and gives
batches from what it stored. On disk there is one phase at a time, and the held-out activations.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mistudio.engine import garbage
from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.activations.store import StoredActivations, write_activations
from mistudio.engine.activations.stream import (
    PHASE,
    WINDOW_ORDER,
    Batch,
    BatchStream,
    Dropped,
    State,
    generator,
    number,
    pack,
    require,
)
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.training.distributed import ALONE, World
from mistudio.errors import CorruptFile, InvalidInput

KEY = "key.json"
HELDOUT = 65_536
MIN_WINDOWS = 8


class HybridActivations:
    """An `ActivationSource` that holds a model only while it stores activations.

    `load_model` must give a model that nobody else keeps: it is freed by dropping it. `folder`
    belongs to one run; what it holds is used again when that run is resumed, and is made again
    where it is gone. Where a phase holds the whole text, there is only one.
    """

    def __init__(
        self,
        load_model: Callable[[], HookedDecoder],
        store: TokenStore,
        points: tuple[HookPoint, ...],
        context: int,
        folder: Path,
        phase_tokens: int,
        *,
        epochs_per_phase: int = 1,
        heldout_tokens: int = HELDOUT,
        batch_windows: int = 8,
        device: torch.device | str = "cpu",
        progress: Progress = SILENT,
    ) -> None:
        """Loads the model once, for the medians and the held-out activations, unless `folder` has
        them. A phase stores about `phase_tokens` tokens, which are given `epochs_per_phase` times;
        `device` is where batches go."""
        store.train.require_windows(context, MIN_WINDOWS, "Training")
        store.heldout.require_windows(context, 2, "Judging the result")
        self.points = points
        self.epochs_per_phase = epochs_per_phase
        self.n_windows = store.train.n_windows(context)
        self.phase_windows = min(max(phase_tokens // context, MIN_WINDOWS), self.n_windows)
        self._load_model, self._store, self._folder = load_model, store, folder
        self.context, self._batch_windows = context, batch_windows
        self._device = torch.device(device)
        self._furthest = Dropped()
        self.medians: dict[HookPoint, float] = {}
        wanted = -(-heldout_tokens // (context - 1))
        heldout = np.arange(min(wanted, store.heldout.n_windows(context)))
        self._heldout = self._stored(
            "heldout", {"train": heldout[:0], "heldout": heldout}, {}, 0, progress
        )
        self.medians = self._heldout.medians

    @property
    def dropped(self) -> Dropped:
        return self._furthest

    @property
    def single(self) -> bool:
        """Whether one phase holds the whole text, so that the model is needed no more after it."""
        return self.phase_windows == self.n_windows

    def width(self, point: HookPoint) -> int:
        return self._heldout.width(point)

    def batches(
        self,
        batch_size: int,
        seed: int,
        progress: Progress = SILENT,
        state: State | None = None,
        world: World = ALONE,
    ) -> BatchStream:
        """For one process only. Raises InvalidInput otherwise."""
        if world.size > 1:
            raise InvalidInput(
                "Model and training cannot take turns in several processes",
                "Where they do, one process uses the device at a time.",
                "Store the activations first, or stream them.",
            )
        return _HybridStream(self, batch_size, seed, progress, state)

    def heldout(self, batch_size: int, limit: int, progress: Progress = SILENT) -> Iterator[Batch]:
        return self._heldout.heldout(batch_size, limit, progress)

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def phase(self, seed: int, phase: int, progress: Progress) -> StoredActivations:
        """The activations of one phase: those in the folder, or else extracted now."""
        windows = self._windows(seed, phase)
        return self._stored(
            "phase",
            {"train": windows, "heldout": windows[:0]},
            {"seed": seed, "phase": phase},
            int(generator(seed, PHASE, phase).integers(2**32)),
            progress,
        )

    def note(self, counts: Dropped) -> None:
        self._furthest = max(self._furthest, counts, key=lambda dropped: dropped.seen)

    def _windows(self, seed: int, phase: int) -> np.ndarray:
        """The phase's windows: the next ones of one random order after another."""
        first, wanted = phase * self.phase_windows, self.phase_windows
        found: list[np.ndarray] = []
        while wanted:
            epoch, place = divmod(first, self.n_windows)
            order = generator(seed, WINDOW_ORDER, epoch).permutation(self.n_windows)
            found.append(order[place : place + wanted])
            first += len(found[-1])
            wanted -= len(found[-1])
        return np.concatenate(found)

    def _stored(
        self,
        name: str,
        orders: dict[str, np.ndarray],
        key: dict[str, int],
        seed: int,
        progress: Progress,
    ) -> StoredActivations:
        folder = self._folder / name
        whole_key = key | self._key(orders)
        found = self._open(folder, whole_key)
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # before, so that two phases never need room
        part = self._folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            self._extract(part, orders, seed, progress)
            (part / KEY).write_text(json.dumps(whole_key), encoding="utf-8")
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return StoredActivations(folder, self._device)

    def _open(self, folder: Path, key: dict[str, Any]) -> StoredActivations | None:
        """What is in the folder already, if it is whole and what is wanted."""
        try:
            if json.loads((folder / KEY).read_text(encoding="utf-8")) != key:
                return None
            return StoredActivations(folder, self._device)
        except (FileNotFoundError, ValueError, CorruptFile):
            return None

    def _key(self, orders: dict[str, np.ndarray]) -> dict[str, Any]:
        meta = self._store.train.meta
        return {
            "points": [point.name for point in self.points],
            "context": self.context,
            "windows": self.n_windows,
            "taken": {split: len(order) for split, order in orders.items()},
            "tokenizer": meta.tokenizer_hash,
            "documents": meta.documents_sha256,
        }

    def _extract(
        self,
        folder: Path,
        orders: dict[str, np.ndarray],
        seed: int,
        progress: Progress,
    ) -> None:
        """Load the model, store, and free it: nothing here outlives the call but the files."""
        model = self._load_model()
        decoder, network = weakref.ref(model), weakref.ref(model.model)
        try:
            train = self._store.train
            medians = self.medians or calibrate_medians(model, train, self.points, self.context)
            write_activations(
                model,
                self._store,
                medians,
                folder,
                orders,
                context=self.context,
                batch_windows=self._batch_windows,
                precision="",
                seed=seed,
                progress=_Extracting(progress),
            )
        finally:
            del model
            if decoder() is not None or network() is not None:
                garbage.collect()  # something in it refers in a circle
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _Extracting:
    """Progress of an extraction in the midst of other work: a phase of its own."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self._outer.report(done, total, phase="extract")


class _HybridStream(BatchStream):
    """Phase after phase. A phase ends with the batch that gives its last row; what that batch
    lacks is taken from the phase's first rows again, so that no row is lost."""

    def __init__(
        self,
        source: HybridActivations,
        batch_size: int,
        seed: int,
        progress: Progress,
        state: State | None,
    ) -> None:
        self._source: HybridActivations | None = source
        self._batch_size, self._seed, self._progress = batch_size, seed, progress
        self._fixed = pack(
            seed=seed,
            windows=source.n_windows,
            context=source.context,
            phase_windows=source.phase_windows,
            epochs_per_phase=source.epochs_per_phase,
        )
        self._phase, self._before = 0, Dropped()
        self._inner: BatchStream | None = None
        self._within: State | None = None  # the place in the phase, where it is not at its start
        self._rows = 0
        self._counts = Dropped()
        if state is not None:
            self._resume(state)

    def _resume(self, state: State) -> None:
        require(state, "seed", self._seed, "the seed")
        for name, what in (
            ("windows", "the number of windows"),
            ("context", "the context length"),
            ("phase_windows", "the number of windows of a phase"),
            ("epochs_per_phase", "the number of rounds over a phase"),
        ):
            require(state, name, int(self._fixed[name]), what)
        self._phase = number(state, "phase")
        self._before = Dropped(
            number(state, "special"), number(state, "outliers"), number(state, "kept")
        )
        if "phase.place" in state:
            prefix = "phase."
            self._within = {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if name.startswith(prefix)
            }

    def __next__(self) -> Batch:
        if self._source is None:
            raise StopIteration
        self._progress.check()
        if self._inner is None:
            self._begin(self._source)
        assert self._inner is not None
        batch = next(self._inner)
        self._within = self._inner.state()
        if self._ended(self._source):
            self._before += self._counts
            self._phase += 1
            self._inner = self._within = None
        return batch

    def _begin(self, source: HybridActivations) -> None:
        stored = source.phase(self._seed, self._phase, self._progress)
        seed = int(generator(self._seed, PHASE, self._phase).integers(2**32))
        self._inner = stored.batches(self._batch_size, seed, self._progress, self._within)
        self._rows, self._counts = stored.meta.tokens["train"], stored.dropped
        source.note(self._before + self._counts)

    def _ended(self, source: HybridActivations) -> bool:
        assert self._within is not None
        given = int(self._within["epoch"]) * self._rows + int(self._within["place"])
        return not source.single and given >= source.epochs_per_phase * self._rows

    def state(self) -> State:
        numbers = pack(
            phase=self._phase,
            special=self._before.special,
            outliers=self._before.outliers,
            kept=self._before.kept,
        )
        within = {f"phase.{name}": value for name, value in (self._within or {}).items()}
        return self._fixed | numbers | within

    def close(self) -> None:
        self._source = self._inner = None
