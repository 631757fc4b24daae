"""What steering changed, measured: KL per token, perplexity, overlap, repetition."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.steering.interventions import Scope, Steering, Variant


@dataclass(frozen=True)
class SteeringEffect:
    """One steered continuation against the unsteered one, over `tokens` generated tokens.

    kl_per_token: mean over positions of KL(p_steered || p_unsteered) on the steered text's own
    prefix, nats, temperature 1; `kl_by_token` are its terms.
    perplexity: exp(mean NLL) of the continuation's tokens under the unsteered model.
    perplexity_ratio: steered over unsteered. similarity: cosine of word counts.
    word_overlap: Jaccard of word sets. distinct_n: share of n-grams that are different;
    repetition_4: share of 4-grams that stood before. longest_run: the most times in a row that a
    token follows itself.
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
    distinct_1: float
    distinct_2: float
    distinct_2_unsteered: float
    longest_run: int
    repetition_4: float
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
    texts = [steered_ids, unsteered_ids]
    steered, unsteered = divergences(model, [variant, None], prompt_ids, texts, special_ids, scope)
    nll_steered, nll_unsteered = _mean(steered.nll), _mean(unsteered.nll)
    return SteeringEffect(
        tokens=len(steered_ids),
        kl_per_token=_mean(steered.kl),
        kl_by_token=steered.kl,
        perplexity=math.exp(nll_steered),
        perplexity_unsteered=math.exp(nll_unsteered),
        perplexity_ratio=math.exp(nll_steered - nll_unsteered),
        similarity=word_cosine(unsteered_text, steered_text),
        word_overlap=word_jaccard(unsteered_text, steered_text),
        distinct_1=distinct(steered_ids, 1),
        distinct_2=distinct(steered_ids, 2),
        distinct_2_unsteered=distinct(unsteered_ids, 2),
        longest_run=longest_run(steered_ids),
        repetition_4=1.0 - distinct(steered_ids, 4),
        first_difference=first_difference(unsteered_ids, steered_ids),
    )


@dataclass(frozen=True)
class Divergence:
    """Of one continuation, by token: KL(p_steered || p_unsteered) before it, and its negative log
    probability under the unsteered model; both in nats, on the continuation's own prefix."""

    kl: list[float]
    nll: list[float]


@torch.inference_mode()
def divergences(
    model: HookedDecoder,
    variants: Sequence[Variant | None],
    prompt_ids: Sequence[int],
    continuations: Sequence[Sequence[int]],
    special_ids: Sequence[int],
    scope: Scope | None = None,
) -> list[Divergence]:
    """How far each variant moves the model's predictions along its continuation of the prompt.

    One after another: the logits of a large vocabulary are what takes memory.
    """
    pairs = zip(variants, continuations, strict=True)
    return [_divergence(model, v, prompt_ids, ids, special_ids, scope) for v, ids in pairs]


def _divergence(
    model: HookedDecoder,
    variant: Variant | None,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    special_ids: Sequence[int],
    scope: Scope | None,
) -> Divergence:
    if not ids:
        return Divergence([], [])
    rows: list[Variant | None] = [None] if variant is None else [None, variant]
    fed = torch.tensor([[*prompt_ids, *ids]] * len(rows), device=model.device)
    steering = Steering(model, rows, special_ids, len(prompt_ids), scope)
    steering.expect(fed, 0)
    with model.intervene(steering.edits()):
        # Position p predicts token p + 1.
        out = model.model(fed, use_cache=False, logits_to_keep=len(ids) + 1)
    logits = out.logits[:, -len(ids) - 1 : -1].float().log_softmax(-1)
    base, steered = logits[0], logits[-1]
    chosen = torch.tensor(list(ids), device=base.device)
    nll = -base.gather(1, chosen[:, None])[:, 0]
    kl = (steered.exp() * (steered - base)).sum(-1).clamp_min(0.0)
    return Divergence(kl.tolist(), nll.tolist())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


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


def longest_run(ids: Sequence[int]) -> int:
    """The most times in a row that one token stands; 0 for no tokens."""
    longest = run = 0
    for before, token in zip([None, *ids], ids, strict=False):
        run = run + 1 if token == before else 1
        longest = max(longest, run)
    return longest


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token at which two sequences part; None if they are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
