"""Which features move the model's next words most, when they are turned up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.features.describe import Description
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.files import SavedSae


@torch.inference_mode()
def probability_rises(
    model: HookedDecoder,
    saved: SavedSae,
    store: FeatureStore,
    targets: Mapping[int, Sequence[int]],
    prompt_ids: Sequence[int],
    strength: float = 2.0,
    batch: int = 16,
    progress: Progress = SILENT,
) -> dict[int, float]:
    """For each feature, how much more likely its target tokens become as the next token.

    `targets` maps a feature to token ids; the rise is sum p_steered(t) - sum p(t) after
    `prompt_ids`, with the feature added at the last token at `strength` times its largest
    activation. One forward pass for `batch` features; row 0 of each is unsteered.
    """
    features = list(targets)
    rises: dict[int, float] = {}
    for start in range(0, len(features), batch):
        progress.check()
        chosen = features[start : start + batch]
        largest = torch.tensor([float(store.columns["max_activation"][f]) for f in chosen])
        vectors = saved.dictionary.decoder[torch.tensor(chosen)] * strength * largest[:, None]
        vectors = torch.cat([torch.zeros_like(vectors[:1]), vectors]).to(model.device)

        def add(x: Tensor, vectors: Tensor = vectors) -> Tensor:
            out = x.clone()
            out[:, -1] = (x[:, -1].float() + vectors).to(x.dtype)
            return out

        ids = torch.tensor([list(prompt_ids)] * len(vectors), device=model.device)
        with model.intervene({saved.hook_point: add}):
            logits = model.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        p = logits.float().softmax(1)
        for row, feature in enumerate(chosen, start=1):
            wanted = torch.tensor(sorted(set(targets[feature])), device=p.device)
            rises[feature] = float(p[row, wanted].sum() - p[0, wanted].sum())
        progress.report(start + len(chosen), len(features), phase="choose")
    return rises


def word_tokens(description: Description, tokenizer: Any) -> list[int]:
    """First tokens of the words that a feature's examples share, as they begin a word in text."""
    found = []
    for word in description.words:
        for form in (" " + word, " " + word.capitalize()):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if ids:
                found.append(int(ids[0]))
    return found
