"""Discovery: one pass over tokens that finds, for every latent, its exact top examples, how often
it fires and what it promotes. Memory does not grow with the number of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.activations.source import TokenRows
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.logit_lens import logit_lens
from mistudio.engine.features.store import EARLIER_META, FeatureMeta
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Codes, Dictionary

RADIUS = 24  # tokens kept on each side of an example's strongest token


def discover(
    rows: Iterable[TokenRows],
    dictionary: Dictionary,
    tokens: TokenSplit,
    folder: Path,
    *,
    model: HookedDecoder,
    hook_point: HookPoint,
    context: int,
    total_tokens: int,
    top_k: int = 20,
    progress: Progress = SILENT,
) -> FeatureMeta:
    """Run every latent of `dictionary` over `rows` and write a feature store.

    Top examples hold at most one position of a window (the strongest), ties going to the earlier
    window and position; each keeps the activations of `RADIUS` tokens on both sides.
    """
    totals = _Totals(dictionary.d_sae)
    top = _TopExamples(dictionary.d_sae, top_k, RADIUS, context)
    for chunk in rows:
        progress.check()
        codes = dictionary.encode(chunk.activations.to(dictionary.device))
        active = _Active.of(codes, chunk)
        totals.add(active, chunk)
        top.add(active)
        progress.report(totals.tokens, total_tokens, phase="examples", tokens=totals.tokens)
    ids, logits = logit_lens(model, dictionary.decoder, progress=progress)
    token_share, token = _top_tokens(top, tokens, context)
    meta = FeatureMeta(
        n_features=dictionary.d_sae,
        tokens=totals.tokens,
        contexts=totals.contexts,
        context=context,
        split=tokens.name,
        top_k=top_k,
        radius=RADIUS,
        hook_point=hook_point.name,
        statistics=totals.summary(),
    )
    arrays = totals.columns() | top.arrays()
    arrays |= {
        "top_token_share": token_share,
        "top_token": token,
        "logit_ids": ids.numpy(),
        "logit_values": logits.numpy(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / EARLIER_META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    return meta


class _Active:
    """The active entries of a chunk, sorted by (window, feature, position)."""

    def __init__(
        self, feature: np.ndarray, window: np.ndarray, position: np.ndarray, value: np.ndarray
    ) -> None:
        order = np.lexsort((position, feature, window))
        self.feature, self.window = feature[order], window[order]
        self.position, self.value = position[order], value[order]
        new = np.ones(len(order), bool)
        new[1:] = (self.feature[1:] != self.feature[:-1]) | (self.window[1:] != self.window[:-1])
        self.starts = np.flatnonzero(new)  # one group per (window, feature)
        self.ends = np.append(self.starts[1:], len(order))

    @classmethod
    def of(cls, codes: Codes, chunk: TokenRows) -> _Active:
        rows = codes.rows.cpu().numpy()
        return cls(
            codes.latents.cpu().numpy(),
            chunk.windows[rows],
            chunk.positions[rows],
            codes.values.float().cpu().numpy(),
        )


class _Totals:
    def __init__(self, n: int) -> None:
        self.tokens = 0
        self.contexts = 0
        self._active = np.zeros(n, np.int64)
        self._in_contexts = np.zeros(n, np.int64)
        self._sum = np.zeros(n)
        self._squares = np.zeros(n)
        self._max = np.zeros(n, np.float32)

    def add(self, active: _Active, chunk: TokenRows) -> None:
        n = len(self._active)
        value = active.value.astype(np.float64)
        self.tokens += len(chunk.windows)
        self.contexts += len(np.unique(chunk.windows))
        self._active += np.bincount(active.feature, minlength=n)
        self._in_contexts += np.bincount(active.feature[active.starts], minlength=n)
        self._sum += np.bincount(active.feature, weights=value, minlength=n)
        self._squares += np.bincount(active.feature, weights=value**2, minlength=n)
        np.maximum.at(self._max, active.feature, active.value)

    def columns(self) -> dict[str, np.ndarray]:
        fired = np.maximum(self._active, 1)
        mean = self._sum / fired
        variance = np.maximum(self._squares / fired - mean**2, 0.0)
        return {
            "density": (self._active / max(self.tokens, 1)).astype(np.float32),
            "context_density": (self._in_contexts / max(self.contexts, 1)).astype(np.float32),
            "max_activation": self._max,
            "mean_activation": mean.astype(np.float32),
            "std_activation": np.sqrt(variance).astype(np.float32),
        }

    def summary(self) -> dict[str, Any]:
        alive = self._active > 0
        return {
            "alive": int(alive.sum()),
            "l0": float(self._active.sum() / max(self.tokens, 1)),
            "median_density_alive": float(
                np.median(self._active[alive] / max(self.tokens, 1)) if alive.any() else 0.0
            ),
        }


class _TopExamples:
    """The k strongest windows of every latent, merged chunk by chunk, exactly."""

    def __init__(self, n: int, k: int, radius: int, context: int) -> None:
        self._k, self._radius, self._context = k, radius, context
        self.value = np.zeros((n, k), np.float32)
        self.window = np.zeros((n, k), np.uint32)
        self.position = np.zeros((n, k), np.uint16)
        self.span = np.zeros((n, k, 2 * radius + 1), np.float16)

    def add(self, active: _Active) -> None:
        if not len(active.starts):
            return
        peaks = self._peaks(active)
        groups = np.arange(len(peaks))
        feature, value = active.feature[peaks], active.value[peaks]
        # What cannot enter any more is dropped before the sort (ties stay in for exactness).
        kept = value >= self.value[feature, -1]
        groups, peaks, feature, value = groups[kept], peaks[kept], feature[kept], value[kept]
        if not len(peaks):
            return
        spans = self._spans(active, groups, peaks)
        self._merge(feature, value, active.window[peaks], active.position[peaks], spans)

    def _peaks(self, active: _Active) -> np.ndarray:
        """Index of the strongest entry of every group; the earliest position wins ties."""
        highest = np.maximum.reduceat(active.value, active.starts)
        is_peak = active.value == np.repeat(highest, active.ends - active.starts)
        return np.minimum.reduceat(
            np.where(is_peak, np.arange(len(active.value)), len(active.value)), active.starts
        )

    def _spans(self, active: _Active, groups: np.ndarray, peaks: np.ndarray) -> np.ndarray:
        """Activations around each peak, [n, 2 * radius + 1], zero where inactive."""
        spans = np.zeros((len(peaks), 2 * self._radius + 1), np.float16)
        sizes = active.ends[groups] - active.starts[groups]
        owner = np.repeat(np.arange(len(groups)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        entry = active.starts[groups][owner] + within
        column = active.position[entry] - active.position[peaks][owner] + self._radius
        inside = (column >= 0) & (column < spans.shape[1])
        spans[owner[inside], column[inside]] = active.value[entry[inside]]
        return spans

    def _merge(
        self,
        feature: np.ndarray,
        value: np.ndarray,
        window: np.ndarray,
        position: np.ndarray,
        spans: np.ndarray,
    ) -> None:
        touched = np.unique(feature)
        old = np.repeat(touched, self._k)
        features = np.concatenate([old, feature])
        values = np.concatenate([self.value[touched].ravel(), value])
        windows = np.concatenate([self.window[touched].ravel(), window.astype(np.uint32)])
        positions = np.concatenate([self.position[touched].ravel(), position.astype(np.uint16)])
        all_spans = np.concatenate([self.span[touched].reshape(len(old), -1), spans])
        order = np.lexsort((positions, windows, -values, features))
        sorted_features = features[order]
        first = np.searchsorted(sorted_features, touched)
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        kept = order[rank < self._k]
        shape = (len(touched), self._k)
        self.value[touched] = values[kept].reshape(shape)
        self.window[touched] = windows[kept].reshape(shape)
        self.position[touched] = positions[kept].reshape(shape)
        self.span[touched] = all_spans[kept].reshape(*shape, -1)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "top_value": self.value,
            "top_window": self.window,
            "top_position": self.position,
            "top_span": self.span,
        }


def _top_tokens(
    top: _TopExamples, tokens: TokenSplit, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most common strongest token over a latent's top examples, and its share of them."""
    n, k = top.value.shape
    share = np.zeros(n, np.float32)
    token = np.full(n, -1, np.int32)
    for start in range(0, n, 4096):
        stop = min(start + 4096, n)
        valid = top.value[start:stop] > 0
        windows, places = np.unique(top.window[start:stop][valid], return_inverse=True)
        if not len(windows):
            continue
        ids = tokens.windows(windows.astype(np.int64), context)
        peak = np.full((stop - start, k), -1, np.int64)
        peak[valid] = ids.numpy()[places, top.position[start:stop][valid]]
        for row in range(stop - start):
            seen, counts = np.unique(peak[row][valid[row]], return_counts=True)
            if len(seen):
                token[start + row] = seen[counts.argmax()]
                share[start + row] = counts.max() / counts.sum()
    return share, token
