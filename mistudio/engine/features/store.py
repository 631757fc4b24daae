"""The feature store: fixed-stride arrays of one discovery pass, opened without reading them.

A table of 100,000 features sorts and filters on the columns in memory; an example is one read.
Token ids are not copied here: (window, position) leads to the token store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

META = "meta.json"
COLUMNS = (
    "density",
    "context_density",
    "max_activation",
    "mean_activation",
    "std_activation",
    "top_token_share",
    "top_token",
)


@dataclass(frozen=True)
class FeatureMeta:
    """What was passed over. `tokens` and `contexts` are the sample sizes of every statistic."""

    n_features: int
    tokens: int
    contexts: int
    context: int
    split: str
    top_k: int
    radius: int
    hook_point: str
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A top example: the tokens around its strongest one.

    `ids` and `activations` have equal length; `peak` is the index of the strongest token;
    `window` and `position` say where it stands in the token store.
    """

    window: int
    position: int
    activation: float
    ids: np.ndarray
    activations: np.ndarray
    peak: int


def write_store(folder: Path, meta: FeatureMeta, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")


class FeatureStore:
    """A finished pass. Columns are float32 [n_features] (`top_token` int32); features that never
    fired have density 0, max 0 and top_token -1."""

    def __init__(self, folder: Path) -> None:
        self.meta = FeatureMeta(**json.loads((folder / META).read_text(encoding="utf-8")))
        self._folder = folder
        self.columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        self._values = np.load(folder / "top_value.npy", mmap_mode="r")
        self._windows = np.load(folder / "top_window.npy", mmap_mode="r")
        self._positions = np.load(folder / "top_position.npy", mmap_mode="r")
        self._spans = np.load(folder / "top_span.npy", mmap_mode="r")
        self._logit_ids = np.load(folder / "logit_ids.npy", mmap_mode="r")
        self._logit_values = np.load(folder / "logit_values.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.meta.n_features

    @property
    def alive(self) -> np.ndarray:
        """Bool [n_features]: fired at least once."""
        return np.asarray(self.columns["density"]) > 0

    def n_examples(self, feature: int) -> int:
        return int((self._values[feature] > 0).sum())

    def examples(self, feature: int, tokens: Any, limit: int | None = None) -> list[Example]:
        """Top examples, strongest first. `tokens` is the `TokenSplit` that was passed over."""
        n = self.n_examples(feature)
        n = n if limit is None else min(n, limit)
        if n == 0:
            return []
        context, radius = self.meta.context, self.meta.radius
        windows = self._windows[feature, :n].astype(np.int64)
        ids = tokens.windows(windows, context).numpy()
        found = []
        for i in range(n):
            position = int(self._positions[feature, i])
            first, last = max(0, position - radius), min(context, position + radius + 1)
            span = np.asarray(self._spans[feature, i], dtype=np.float32)
            offset = first - (position - radius)
            found.append(
                Example(
                    window=int(windows[i]),
                    position=position,
                    activation=float(self._values[feature, i]),
                    ids=ids[i, first:last],
                    activations=span[offset : offset + last - first],
                    peak=position - first,
                )
            )
        return found

    def promoted(self, feature: int) -> list[tuple[int, float]]:
        """Logit lens: (token id, centred logit) of the tokens it promotes most, strongest first."""
        return self._logits(feature, 0)

    def suppressed(self, feature: int) -> list[tuple[int, float]]:
        """Logit lens: the tokens it suppresses most, strongest first."""
        return self._logits(feature, 1)

    def _logits(self, feature: int, side: int) -> list[tuple[int, float]]:
        ids, values = self._logit_ids[feature, side], self._logit_values[feature, side]
        return [(int(i), float(v)) for i, v in zip(ids, values, strict=True)]
