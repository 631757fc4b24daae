"""Looking at a text that was just typed: not a job, for it answers at once or not at all."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mistudio.errors import Busy
from mistudio.jobs.job import device_turn
from mistudio.jobs.loaded import loaded_model
from mistudio.library.library import Library


@dataclass(frozen=True)
class Probe:
    """Which features of an SAE fire on which tokens of a text; see `engine/features/probe`.

    `pieces` [n] is each token's text, `counted` bool [n]; entry i of `tokens`, `features` and
    `values` is one activation. `loaded` says whether the model had to be loaded first.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    counted: np.ndarray
    tokens: np.ndarray
    features: np.ndarray
    values: np.ndarray
    seconds: float
    loaded: bool

    def of(self, feature: int) -> np.ndarray:
        """float32 [n]: one feature's activations, 0 where it is not active."""
        found = np.zeros(len(self.counted), np.float32)
        mine = self.features == feature
        found[self.tokens[mine]] = self.values[mine]
        return found


def probe(library: Library, sae_id: int, text: str) -> Probe:
    """Run a text through the model and the SAE, now; seconds where the model is not loaded yet,
    else tens of milliseconds. For background threads.

    Raises `Busy` while a job computes, InvalidInput for no text or too long a one.
    """
    from mistudio.engine.features import probe as engine
    from mistudio.engine.models.loading import special_ids
    from mistudio.jobs.loaded import loaded_models, sae_of, tokenizer_of

    sae = library.saes.get(sae_id)
    there = next((e for e in loaded_models() if e.model_id == sae.model_id), None)
    tokenizer = tokenizer_of(library, sae.model_id, there.decoder if there else None)
    typed = engine.encode_typed(tokenizer, text)
    if not device_turn.acquire(timeout=0.5):
        raise Busy(
            "The model is in use",
            "A job is computing with it; its tokens and yours must not mix.",
            "Try again when it is done, or stop it.",
        )
    try:
        began = time.monotonic()
        model = loaded_model(library, sae.model_id)
        saved = sae_of(library, sae_id, model)
        found = engine.probe(
            model,
            saved.dictionary,
            saved.site.input,
            _median(library, sae_id),
            typed.ids,
            sorted(special_ids(tokenizer)),
        )
    finally:
        device_turn.release()
    return Probe(
        typed.ids,
        typed.texts,
        found.counted,
        found.tokens,
        found.features,
        found.values,
        time.monotonic() - began,
        there is None,
    )


def _median(library: Library, sae_id: int) -> float:
    """The site's median norm as the newest discovery measured it; without one, no token counts
    as an outlier."""
    from mistudio.engine.features.store import FeatureStore

    run = library.feature_runs.newest_of_sae(sae_id)
    if run is None:
        return float("inf")
    return FeatureStore(library.path(run.folder)).meta.median_norm or float("inf")
