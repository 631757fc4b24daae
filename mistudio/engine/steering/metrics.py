"""What steering changed, measured: KL per token, perplexity, overlap, repetition."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.models.logits import last_logits
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.steering.generation import check_numbers
from mistudio.engine.steering.interventions import Scope, Steering, Variant


@dataclass(frozen=True)
class SteeringEffect:
    """One steered continuation against the unsteered one, over `tokens` generated tokens.

    kl_per_token: mean over positions of KL(p_steered || p_unsteered) on the steered text's own
    prefix, nats, temperature 1; `kl_by_token` are its terms. NaN where there is no such number: of
    no tokens, or of fewer than an n-gram has.
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
        perplexity=_exp(nll_steered),
        perplexity_unsteered=_exp(nll_unsteered),
        perplexity_ratio=_exp(nll_steered - nll_unsteered),
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
    probability under the unsteered model (or what it is held against); both in nats, on the
    continuation's own prefix."""

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
    *,
    against: Variant | None = None,
    progress: Progress = SILENT,
) -> list[Divergence]:
    """How far each variant moves the model's predictions along its continuation of the prompt:
    from the unsteered model's, or from those of the variant `against`.

    One after another: the logits of a large vocabulary are what takes memory.
    """
    found = []
    for variant, ids in zip(variants, continuations, strict=True):
        progress.check()
        rows = [against] if variant is against else [against, variant]
        found.append(_divergence(model, rows, prompt_ids, ids, special_ids, scope))
    return found


def _divergence(
    model: HookedDecoder,
    rows: Sequence[Variant | None],
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    special_ids: Sequence[int],
    scope: Scope | None,
) -> Divergence:
    if not ids:
        return Divergence([], [])
    fed = torch.tensor([[*prompt_ids, *ids]] * len(rows), device=model.device)
    steering = Steering(model, rows, special_ids, len(prompt_ids), scope)
    steering.expect(fed, 0)
    with model.intervene(steering.edits()):
        # Position p predicts token p + 1.
        kept = last_logits(model, fed, len(ids) + 1)
    check_numbers(kept[:, :-1], rows)
    chosen = torch.tensor(list(ids), device=kept.device)
    found = Divergence([], [])
    for start in range(0, len(ids), POSITIONS_AT_ONCE):
        some = slice(start, min(start + POSITIONS_AT_ONCE, len(ids)))
        logits = kept[:, some].float().log_softmax(-1)
        base, steered = logits[0], logits[-1]
        found.nll.extend((-base.gather(1, chosen[some, None])[:, 0]).tolist())
        # Tokens that a model rules out have log probability -inf, and no part in the sum.
        terms = torch.where(steered.isneginf(), 0.0, steered.exp() * (steered - base))
        found.kl.extend(terms.sum(-1).clamp_min(0.0).tolist())
    return found


POSITIONS_AT_ONCE = 64  # of 49,152 tokens in float32: 25 MB for two rows


# -------------------------------------------------------------------- does the text say it


@torch.inference_mode()
def reactivation(
    model: HookedDecoder,
    dictionary: Dictionary,
    reads: HookPoint,
    features: Sequence[int],
    prompt_ids: Sequence[int],
    continuations: Sequence[Sequence[int]],
    special_ids: Sequence[int],
) -> list[list[float]]:
    """How much each feature is active on each continuation where nothing is steered: the mean of
    its activation at the generated tokens that are not special, [continuations][features]. NaN
    where there is no such token.

    A text that expresses what a feature stands for makes the unsteered model activate it anew;
    one that only broke does not.
    """
    found = []
    chosen = torch.tensor(list(features), device=dictionary.device)
    special = set(special_ids)
    for ids in continuations:
        counted = [len(prompt_ids) + i for i, token in enumerate(ids) if token not in special]
        if not counted:
            found.append([math.nan] * len(features))
            continue
        fed = torch.tensor([[*prompt_ids, *ids]], device=model.device)
        x = model.capture(fed, [reads])[reads][0, counted].float().to(dictionary.device)
        found.append(dictionary.activations(x, chosen).mean(0).tolist())
    return found


def share_among(ids: Sequence[int], own: Collection[int]) -> float:
    """The share of the tokens that are among `own`; NaN for no tokens."""
    return sum(token in own for token in ids) / len(ids) if ids else math.nan


def effectiveness(gain: float, distinct_ratio: float, perplexity_ratio: float) -> float:
    """One number from 0 to 1 for a steered text: the harmonic mean of
    `gain`, how much more the text activates the feature, in shares of its largest activation;
    min(1, distinct-2 relative to the unsteered text's); min(1, 3 / perplexity ratio).
    0 where one of the three is 0 or less (AxBench's rule, Wu et al. 2025, 2501.17148); NaN where
    one is unknown."""
    if any(math.isnan(part) for part in (gain, distinct_ratio, perplexity_ratio)):
        return math.nan
    parts = (min(1.0, gain), min(1.0, distinct_ratio), min(1.0, 3.0 / perplexity_ratio))
    if min(parts) <= 0:
        return 0.0
    return len(parts) / sum(1 / part for part in parts)


def _exp(nats: float) -> float:
    """Within what a float holds, so that its logarithm exists too."""
    return math.exp(max(min(nats, 700.0), -700.0)) if not math.isnan(nats) else math.nan


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
