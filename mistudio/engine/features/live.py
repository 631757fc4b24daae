"""Activations of chosen features on chosen windows, from the model: what a store does not keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mistudio.engine.activations.source import capture_windows
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary

BATCH = 8  # windows of a forward pass


@torch.inference_mode()
def window_activations(
    model: HookedDecoder,
    dictionary: Dictionary,
    point: HookPoint,
    median: float,
    tokens: TokenSplit,
    windows: Sequence[int] | np.ndarray,
    features: Sequence[int] | np.ndarray,
    context: int,
    progress: Progress = SILENT,
) -> tuple[np.ndarray, np.ndarray]:
    """(activations float32 [windows, context, features], counted bool [windows, context]).

    Positions that do not count have activation 0. `median` is the site's median norm
    (`FeatureMeta.median_norm`), so that the same positions count as in the discovery.
    """
    order = np.asarray(windows, dtype=np.int64)
    chosen = torch.as_tensor(np.asarray(features, dtype=np.int64))
    place = torch.full((dictionary.d_sae,), -1, dtype=torch.int64)
    place[chosen] = torch.arange(len(chosen))
    values = np.zeros((len(order), context, len(chosen)), np.float32)
    counted = np.zeros((len(order), context), bool)
    done = 0
    for batch in capture_windows(
        model, tokens, (point,), {point: median}, order, context, BATCH, progress
    ):
        mask = batch.mask.cpu().numpy()
        rows, positions = np.nonzero(mask)
        counted[done : done + len(mask), : mask.shape[1]] = mask
        codes = dictionary.encode(batch.captured[point][batch.mask].to(dictionary.device).float())
        column = place[codes.latents.cpu()].numpy()
        wanted = column >= 0
        row = codes.rows.cpu().numpy()[wanted]
        values[done + rows[row], positions[row], column[wanted]] = (
            codes.values.float().cpu().numpy()[wanted]
        )
        done += len(mask)
    return values, counted
