"""What steering changed, measured: KL per token, perplexity, overlap, repetition."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.steering.interventions import Scope, Steering, Variant


@dataclass(frozen=True)
class SteeringEffect:
    """One steered continuation against the unsteered one, over `tokens` generated tokens.

    kl_per_token: mean over positions of KL(p_steered || p_unsteered) on the steered text's own
    prefix, nats, temperature 1; `kl_by_token` are its terms.
    perplexity: exp(mean NLL) of the continuation's tokens under the unsteered model.
    perplexity_ratio: steered over unsteered. similarity: cosine of word counts.
    word_overlap: Jaccard of word sets. distinct_2: share of bigrams that are different.
    first_difference: index of the first token that differs, None where none does.
    """

    tokens: int
    kl_per_token: float
    kl_by_token: list[float]
    perplexity: float
    perplexity_unsteered: float
    perplexity_ratio: float
    similarity: float
    word_overlap: float
    distinct_2: float
    distinct_2_unsteered: float
    first_difference: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def steering_effect(
    model: HookedDecoder,
    variant: Variant,
    prompt_ids: Sequence[int],
    unsteered_ids: Sequence[int],
    steered_ids: Sequence[int],
    unsteered_text: str,
    steered_text: str,
    special_ids: Sequence[int],
    scope: Scope | None = None,
) -> SteeringEffect:
    """Measure by two parallel forward passes; token ids are used as generated, never re-read
    from text."""
    kl: list[float] = []
    nll_steered = nll_unsteered = math.nan
    if steered_ids:
        both = torch.tensor([[*prompt_ids, *steered_ids]] * 2, device=model.device)
        steering = Steering(model, [None, variant], special_ids, len(prompt_ids), scope)
        steering.expect(both, 0)
        with model.intervene(steering.edits()):
            logits = model.model(both, use_cache=False).logits
        # Position p predicts token p + 1.
        first = len(prompt_ids) - 1
        base, steered = logits[:, first:-1].float().log_softmax(-1)
        kl = (steered.exp() * (steered - base)).sum(-1).clamp_min(0.0).tolist()
        nll_steered = _nll(base, steered_ids)
    if unsteered_ids:
        ids = torch.tensor([[*prompt_ids, *unsteered_ids]], device=model.device)
        logits = model.model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        nll_unsteered = _nll(logits.float().log_softmax(-1), unsteered_ids)
    return SteeringEffect(
        tokens=len(steered_ids),
        kl_per_token=sum(kl) / len(kl) if kl else math.nan,
        kl_by_token=kl,
        perplexity=math.exp(nll_steered),
        perplexity_unsteered=math.exp(nll_unsteered),
        perplexity_ratio=math.exp(nll_steered - nll_unsteered),
        similarity=word_cosine(unsteered_text, steered_text),
        word_overlap=word_jaccard(unsteered_text, steered_text),
        distinct_2=distinct(steered_ids, 2),
        distinct_2_unsteered=distinct(unsteered_ids, 2),
        first_difference=first_difference(unsteered_ids, steered_ids),
    )


def _nll(log_probabilities: Tensor, ids: Sequence[int]) -> float:
    chosen = torch.tensor(list(ids), device=log_probabilities.device)
    return float(-log_probabilities.gather(1, chosen[:, None]).mean())


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, apostrophes included."""
    return re.findall(r"[\w']+", text.lower())


def word_cosine(a: str, b: str) -> float:
    """Cosine of the two texts' word-count vectors; 1 for two empty texts."""
    x, y = Counter(words(a)), Counter(words(b))
    if not x and not y:
        return 1.0
    dot = sum(count * y[word] for word, count in x.items())
    norm = math.sqrt(sum(c * c for c in x.values()) * sum(c * c for c in y.values()))
    return dot / norm if norm else 0.0


def word_jaccard(a: str, b: str) -> float:
    """Shared words over all words, as sets; 1 for two empty texts."""
    x, y = set(words(a)), set(words(b))
    return len(x & y) / len(x | y) if x | y else 1.0


def distinct(ids: Sequence[int], n: int) -> float:
    """Share of n-grams that are different from each other; low means repetition. NaN if short."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token at which two sequences part; None if they are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
