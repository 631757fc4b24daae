"""Activations on the whole windows of examples, gathered in one more pass over their text.

All that is wanted of a window is taken when it comes by, for whatever features; until the pass is
over it lies in files, one a block of features, so that memory grows with neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mistudio.engine.features.exports.material import BLOCK
from mistudio.engine.features.passing import Passage
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary

RECORD = np.dtype([("feature", "<u4"), ("window", "<u4"), ("position", "<u2"), ("value", "<f4")])
HELD = 4 * 1024**2  # records in memory before they are written: 56 MB


class Wanted:
    """Which windows of which features: `windows` ascending int64, `keys` ascending int64 of
    (feature, place in `windows`)."""

    def __init__(self, store: FeatureStore, features: np.ndarray, per_decile: int) -> None:
        parts = []
        for start in range(0, len(features), BLOCK):
            block = features[start : start + BLOCK]
            top = np.array(store.top[block])
            spread = np.array(store.deciles[block])[:, :, :per_decile].reshape(len(block), -1)
            entries = np.concatenate([top, spread], axis=1)
            row, column = np.nonzero(entries["value"] > 0)
            window = entries["window"][row, column].astype(np.int64)
            parts.append(np.unique((block[row].astype(np.int64) << 32) | window))
        self.keys = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        self.windows = np.unique(self.keys & 0xFFFFFFFF)

    def among(self, features: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """Bool [n]: whether each pair is wanted."""
        if not len(self.keys):
            return np.zeros(len(features), bool)
        keys = (features.astype(np.int64) << 32) | windows.astype(np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found: np.ndarray = self.keys[place] == keys
        return found


class GatheredWindows:
    """Of every wanted window all activations of the feature; files in `folder`."""

    def __init__(self, folder: Path, features: np.ndarray, context: int) -> None:
        """`features` ascending."""
        self._folder, self._features, self._context = folder, features, context
        self._held: list[np.ndarray] = []
        self._count = 0
        self._block = lru_cache(maxsize=2)(self._read)
        folder.mkdir(parents=True, exist_ok=True)

    @torch.inference_mode()
    def gather(
        self,
        passage: Passage,
        point: HookPoint,
        dictionary: Dictionary,
        wanted: Wanted,
        progress: Progress = SILENT,
    ) -> None:
        """Pass over the text; `passage.windows` must hold all wanted ones."""
        for done, chunk in enumerate(passage.chunks(0, progress), 1):
            progress.check()
            site = chunk[point]
            if len(site.rows.windows):
                codes = dictionary.encode(site.activations.to(dictionary.device).float())
                row, latent = codes.rows.cpu().numpy(), codes.latents.cpu().numpy()
                window = site.rows.windows[row]
                chosen = wanted.among(latent, window)
                found = np.empty(int(chosen.sum()), RECORD)
                found["feature"], found["window"] = latent[chosen], window[chosen]
                found["position"] = site.rows.positions[row[chosen]]
                found["value"] = codes.values.float().cpu().numpy()[chosen]
                self._add(found)
            progress.report(done, len(passage), phase="contexts")
        self._write()

    def _add(self, records: np.ndarray) -> None:
        self._held.append(records)
        self._count += len(records)
        if self._count >= HELD:
            self._write()

    def _write(self) -> None:
        if not self._held:
            return
        records = np.concatenate(self._held)
        self._held, self._count = [], 0
        block = np.searchsorted(self._features, records["feature"]) // BLOCK
        order = np.argsort(block, kind="stable")
        records, block = records[order], block[order]
        for number in np.unique(block):
            first, last = np.searchsorted(block, [number, number + 1])
            with (self._folder / f"{number}.bin").open("ab") as file:
                records[first:last].tofile(file)

    def _read(self, number: int) -> dict[int, dict[int, tuple[list[int], list[float]]]]:
        path = self._folder / f"{number}.bin"
        found: dict[int, dict[int, tuple[list[int], list[float]]]] = {}
        if not path.exists():
            return found
        records = np.fromfile(path, RECORD)
        order = np.lexsort((records["position"], records["window"], records["feature"]))
        records = records[order]
        key = (records["feature"].astype(np.int64) << 32) | records["window"]
        edges = np.flatnonzero(np.diff(key, prepend=-1, append=-1)).tolist()
        positions, values = records["position"].tolist(), records["value"].tolist()
        features, windows = records["feature"].tolist(), records["window"].tolist()
        for first, last in pairwise(edges):
            place = found.setdefault(features[first], {})
            place[windows[first]] = (positions[first:last], values[first:last])
        return found

    def of(self, feature: int) -> Mapping[int, tuple[list[int], list[float]]]:
        number = int(np.searchsorted(self._features, feature)) // BLOCK
        return self._block(number).get(feature, {})
