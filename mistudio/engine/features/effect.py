"""How much a feature, turned up, raises the tokens it promotes: the output score."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.store import FeatureStore
from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.files import SavedSae


@torch.inference_mode()
def output_scores(
    model: HookedDecoder,
    saved: SavedSae,
    store: FeatureStore,
    features: np.ndarray,
    prompt_ids: list[int],
    strength: float = 2.0,
    batch: int = 16,
    progress: Progress = SILENT,
) -> np.ndarray:
    """S_out = max_t p(t) * (1 - rank(t) / vocab) over the feature's promoted tokens t, when the
    feature is added at the prompt's last token at `strength` times its largest activation.

    After Arad et al. 2025 (arXiv 2505.20063), who use ten times and the top 20 tokens; two times is
    what stays readable, and the store's promoted tokens count. Float64 [len(features)].
    """
    scores = np.zeros(len(features))
    largest = np.asarray(store.columns["max_activation"])
    for start in range(0, len(features), batch):
        progress.check()
        chosen = features[start : start + batch]
        ids = torch.tensor([prompt_ids] * len(chosen), device=model.device)
        vectors = saved.dictionary.decoder[torch.as_tensor(chosen)].to(model.device)
        coefficient = torch.as_tensor(largest[chosen] * strength, device=model.device)

        def add(x: Tensor, delta: Tensor = vectors * coefficient[:, None]) -> Tensor:
            out = x.clone()
            out[:, -1] = (x[:, -1].float() + delta).to(x.dtype)
            return out

        with model.intervene({saved.hook_point: add}):
            logits = model.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        for row, feature in enumerate(chosen):
            tokens = torch.tensor([t for t, _ in store.promoted(int(feature))])
            p = logits[row].softmax(0)[tokens]
            ranks = (logits[row][None, :] > logits[row][tokens][:, None]).sum(1)
            scores[start + row] = float(p.max() * (1 - ranks.min() / logits.shape[1]))
        progress.report(start + len(chosen), len(features), phase="choose")
    return scores


def best_steering_feature(
    saved: SavedSae,
    store: FeatureStore,
    tokens: TokenSplit,
    model: HookedDecoder,
    tokenizer: Any,
    prompt_ids: list[int],
    progress: Progress = SILENT,
) -> int:
    """Of the features that promote what they fire on, the one whose output score rises most.

    Candidates: the 48 features, among those that fire on 0.01 % to 2 % of tokens, with the most
    promoted words that also stand in their own top examples. The rise is the output score less
    the score without steering, as frequent words are likely anyway.
    """
    density = np.asarray(store.columns["density"])
    eligible = np.flatnonzero((density > 1e-4) & (density < 2e-2))
    if not len(eligible):
        eligible = np.flatnonzero(density > 0)
    echoes = np.asarray([_echo(store, tokens, tokenizer, int(i)) for i in eligible])
    candidates = eligible[np.argsort(-echoes, kind="stable")][:48]
    still = output_scores(model, saved, store, candidates, prompt_ids, 0.0, progress=progress)
    moved = output_scores(model, saved, store, candidates, prompt_ids, progress=progress)
    return int(candidates[(moved - still).argmax()])


def _echo(store: FeatureStore, tokens: TokenSplit, tokenizer: Any, feature: int) -> int:
    """How many of the promoted tokens are words of the feature's own top examples."""
    promoted = [tokenizer.decode([token]) for token, _ in store.promoted(feature)]
    wanted = {piece.strip().lower() for piece in promoted if piece.startswith(" ")}
    wanted = {word for word in wanted if len(word) >= 3 and word.isalpha()}
    if not wanted:
        return 0
    found: set[str] = set()
    for example in store.examples(feature, tokens, 8):
        near = example.ids[max(0, example.peak - 6) : example.peak + 7]
        found.update(re.findall(r"[a-z]+", tokenizer.decode(near).lower()))
    return len(wanted & found)
