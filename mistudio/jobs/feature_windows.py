"""Activations and logits on a few windows of a discovery's text, from the model, now. Not a job:
it answers at once or, while a job computes, not at all. For background threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistudio.errors import Busy
from mistudio.jobs.features import open_features
from mistudio.jobs.job import device_turn
from mistudio.jobs.loaded import loaded_model, loaded_models
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun


@dataclass(frozen=True)
class WindowActivations:
    """One feature on whole windows: `values` float32 [n, context], 0 where `counted` is False."""

    values: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class LogitChange:
    """What one activation of a feature adds to the logits at its token, beside what the model's
    final norm makes of it there: (token id, logits), ten most raised and ten most lowered."""

    activation: float
    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]
    rms: float


def device_is_free(library: Library, run: FeatureRun) -> bool:
    """Whether an answer would come at once: nothing computes, and the model is loaded."""
    model_id = library.saes.get(run.sae_id).model_id
    loaded = any(entry.model_id == model_id for entry in loaded_models())
    return loaded and not device_turn.locked()


def read_windows(
    library: Library, run: FeatureRun, feature: int, windows: Sequence[int]
) -> WindowActivations:
    """Raises `Busy` while a job computes."""
    from mistudio.engine.features.live import window_activations

    with _turn():
        model, saved, store, tokens = _opened(library, run)
        values, counted = window_activations(
            model,
            saved.dictionary.to(model.device),
            saved.site.input,
            store.meta.median_norm or float("inf"),
            tokens,
            windows,
            [feature],
            store.meta.context,
        )
    return WindowActivations(values[..., 0], counted)


def logit_change(
    library: Library, run: FeatureRun, feature: int, window: int, position: int, activation: float
) -> LogitChange:
    """Of the feature's `activation` at a token of the discovery's text; see
    `engine.features.logit_lens.example_logits`. Raises `Busy` while a job computes,
    UnsupportedModel where the SAE does not write to the residual stream."""
    from mistudio.engine.features.logit_lens import example_logits, written_directions
    from mistudio.engine.models.hooks import HookPoint

    with _turn():
        model, saved, store, tokens = _opened(library, run)
        direction = written_directions(saved.dictionary, saved.site.output)[feature]
        last = HookPoint("resid_post", model.n_layers - 1)
        ids = tokens.windows([window], store.meta.context)[:, : position + 1].to(model.device)
        residual = model.capture(ids, (last,))[last][0, position]
        found = example_logits(model, direction, activation, residual)
    sides = [
        tuple(zip(ids.tolist(), values.tolist(), strict=True))
        for ids, values in zip(found.ids, found.values, strict=True)
    ]
    return LogitChange(activation, sides[0], sides[1], found.rms)


@contextmanager
def _turn() -> Iterator[None]:
    if not device_turn.acquire(timeout=0.5):
        raise Busy(
            "The model is in use",
            "A job is computing with it; its tokens and these must not mix.",
            "Try again when it is done, or stop it.",
        )
    try:
        yield
    finally:
        device_turn.release()


def _opened(library: Library, run: FeatureRun) -> tuple[Any, ...]:
    from mistudio.engine.sae.files import load_sae

    sae = library.saes.get(run.sae_id)
    store, tokens = open_features(library, run)
    return loaded_model(library, sae.model_id), load_sae(library.path(sae.folder)), store, tokens
