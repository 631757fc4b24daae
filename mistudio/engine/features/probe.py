"""Which features fire on a text that was just typed, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mistudio.engine.activations.positions import counted
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.models.loading import adds_bos, separator_id
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.errors import InvalidInput

MOST_TOKENS = 2048


@dataclass(frozen=True)
class Typed:
    """A text as the model reads it. `ids` [n] begins with a token that stands for no text (the
    one that texts begin with, or the one between texts), because the first position never counts;
    `texts` [n] shows each token, a character that several tokens share once, at its first."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Codes:
    """Sparse activations of all features over n tokens, those that do not count left out: entry i
    says that feature `features[i]` has activation `values[i]` on token `tokens[i]`; sorted by
    token. `counted` bool [n]: neither the first, nor special, nor of an outlying norm."""

    tokens: np.ndarray
    features: np.ndarray
    values: np.ndarray
    counted: np.ndarray


def encode_typed(tokenizer: Any, text: str) -> Typed:
    """Raises InvalidInput for an empty text, or one of more than `MOST_TOKENS` tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    if not ids:
        raise InvalidInput("There is no text", next_step="Type some words.", field="text")
    if len(ids) > MOST_TOKENS:
        raise InvalidInput(
            "This text is too long",
            f"It has {len(ids):,} tokens; {MOST_TOKENS:,} can be looked at at a time.",
            "Shorten it, or add it as a dataset and discover the features on that.",
            field="text",
        )
    first = adds_bos(tokenizer)
    first = separator_id(tokenizer) if first is None else first
    texts = [str(tokenizer.decode([first]))]
    shown = 0  # characters of the text, up to here
    for _, end in encoded["offset_mapping"]:
        texts.append(text[shown:end])
        shown = max(shown, end)
    return Typed((first, *ids), tuple(texts))


@torch.inference_mode()
def probe(
    model: HookedDecoder,
    dictionary: Dictionary,
    point: HookPoint,
    median: float,
    ids: Sequence[int],
    special_ids: Sequence[int],
) -> Codes:
    """One forward pass up to `point` over tokens `ids` [n]. `median` is the site's median norm
    (`FeatureMeta.median_norm`), so that the same positions count as in the discovery."""
    batch = torch.tensor([list(ids)], device=model.device)
    captured = model.capture(batch, (point,))
    mask = counted(batch, captured, {point: median}, special_ids)
    places = mask[0].nonzero().squeeze(1)
    found = dictionary.encode(captured[point][0, places].to(dictionary.device).float())
    return Codes(
        places[found.rows.to(places.device)].cpu().numpy(),
        found.latents.cpu().numpy(),
        found.values.float().cpu().numpy(),
        mask[0].cpu().numpy(),
    )
