"""How strongly a feature can be steered before the text breaks: measured, not guessed.

A strength in multiples of a feature's largest activation means different things for different
features: one doubles a word's probability where another already ends in repetition. Each feature
is therefore tried at several strengths on neutral prompts, and the strengths fall into zones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.models.logits import last_logits
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.steering.generation import Sampling, generate
from mistudio.engine.steering.interventions import Scope, Steering, Variant
from mistudio.engine.steering.metrics import distinct, divergences

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
PROMPTS = (
    "From my experience,",
    "The most important thing about",
    "Yesterday I went to",
    "In this article we",
)
NEW_TOKENS = 32
TEMPERATURE = 0.7

# Green: the text reads as the unsteered one does. Of all continuations of one strength together.
MOST_KL = 0.5  # nats per token
LEAST_DISTINCT = 0.85  # of the unsteered texts' distinct-2
MOST_PERPLEXITY = 3.0  # times that of the unsteered texts, under the unsteered model
# Red: it repeats itself.
BROKEN_DISTINCT = 0.70
# A strength is recommended where it keeps this part of each limit, as other prompts differ.
MARGIN = 0.8


@dataclass(frozen=True)
class Tried:
    """One strength over all prompts: `tokens` generated, mean KL in nats per token on their own
    prefixes, perplexity under the unsteered model and distinct-2, both relative to the unsteered
    continuations, and the share of tokens that are among `own` (of the unsteered ones: see
    `Calibration.own_share`)."""

    strength: float
    tokens: int
    kl: float
    perplexity_ratio: float
    distinct_ratio: float
    own_share: float

    @property
    def zone(self) -> str:
        """ "green", "amber" or "red"."""
        if self.distinct_ratio < BROKEN_DISTINCT:
            return "red"
        return "green" if self._within(1.0) else "amber"

    @property
    def is_safe(self) -> bool:
        """Whether it stays clear of every limit of the green zone."""
        return self._within(MARGIN)

    def _within(self, part: float) -> bool:
        """Whether all three keep to `part` of the way from the unsteered text to the limit."""
        return (
            self.kl <= part * MOST_KL
            and 1 - self.distinct_ratio <= part * (1 - LEAST_DISTINCT)
            and self.perplexity_ratio <= 1 + part * (MOST_PERPLEXITY - 1)
        )


@dataclass(frozen=True)
class Calibration:
    """A feature's strengths, weakest first. `recommended` is the largest up to which every one is
    safe, 0.0 where not even the smallest is; `breaks` the first that is red, None where none is.
    `own_share` is that of the unsteered continuations, NaN where no tokens were named."""

    tried: tuple[Tried, ...]
    recommended: float
    breaks: float | None
    own_share: float
    prompts: int
    new_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "zones": [row.zone for row in self.tried]}


def calibrate(
    model: HookedDecoder,
    tokenizer: Any,
    steered: Callable[[float], Variant],
    *,
    special_ids: Sequence[int],
    own: Collection[int] = (),
    strengths: Sequence[float] = STRENGTHS,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Calibration:
    """Try every strength on every prompt, all strengths of a prompt in one batch with the same
    sampling noise. `steered` gives the variant of a strength; `own` are the tokens that the
    feature promotes most. Texts do not end early, so that all have the same length.

    All strengths must have one sign: negative ones (suppression) have zones of their own.
    `progress.report` gets `tried`, the curve of the prompts so far.
    """
    strengths = sorted(strengths, key=abs)
    if not strengths or any(s * strengths[0] <= 0 for s in strengths):
        raise ValueError("strengths must be of one sign, and none 0")
    variants = [steered(strength) for strength in strengths]
    rows = [_Sums() for _ in range(len(strengths) + 1)]
    wanted = set(own)
    for number, prompt in enumerate(prompts):
        progress.check()
        ids = list(tokenizer(prompt)["input_ids"])
        made = generate(
            model,
            tokenizer,
            ids,
            variants,
            Sampling(temperature=TEMPERATURE, max_new_tokens=new_tokens, seed=seed + number),
            special_ids=special_ids,
            stop_ids=(),
            progress=_Writing(progress, number, len(prompts)),
        ).rows
        texts = [row.ids for row in made]
        found = divergences(
            model, [None, *variants], ids, texts, special_ids, progress=_Checked(progress)
        )
        for sums, text, divergence in zip(rows, texts, found, strict=True):
            sums.add(text, divergence.kl, divergence.nll, wanted)
        base = rows[0]
        tried = tuple(
            row.tried(strength, base) for strength, row in zip(strengths, rows[1:], strict=True)
        )
        progress.report(number + 1, len(prompts), phase="calibrate", tried=tried)
    return Calibration(
        tried,
        recommended_of(tried),
        next((row.strength for row in tried if row.zone == "red"), None),
        base.own / max(base.tokens, 1) if wanted else math.nan,
        len(prompts),
        new_tokens,
    )


class _Checked:
    """Hears that the work should stop, says nothing."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        pass


class _Writing(_Checked):
    """Tokens written for one prompt of several: most of what a prompt takes."""

    def __init__(self, outer: Progress, number: int, count: int) -> None:
        super().__init__(outer)
        self._number, self._count = number, count

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        share = 0.8 * done / total if total else 0.0
        self._outer.report(self._number + share, self._count, phase="calibrate")


def recommended_of(tried: Sequence[Tried]) -> float:
    """The largest strength up to which all are safe; 0.0 for none."""
    best = 0.0
    for row in tried:
        if not row.is_safe:
            break
        best = row.strength
    return best


class _Sums:
    """One row of the batch over all prompts."""

    def __init__(self) -> None:
        self.tokens = self.own = 0
        self.kl = self.nll = self.distinct = 0.0
        self.texts = 0

    def add(
        self, ids: Sequence[int], kl: Sequence[float], nll: Sequence[float], own: set[int]
    ) -> None:
        self.tokens += len(ids)
        self.own += sum(token in own for token in ids)
        self.kl += sum(kl)
        self.nll += sum(nll)
        self.distinct += distinct(ids, 2)
        self.texts += 1

    def tried(self, strength: float, base: _Sums) -> Tried:
        difference = self.nll / self.tokens - base.nll / base.tokens
        return Tried(
            strength=strength,
            tokens=self.tokens,
            kl=self.kl / self.tokens,
            perplexity_ratio=math.exp(min(difference, 700.0)),
            distinct_ratio=self.distinct / base.distinct,
            own_share=self.own / self.tokens,
        )


# -------------------------------------------------------------------- which features steer


@dataclass(frozen=True)
class OutputScore:
    """How far amplifying a feature makes its own tokens likely (Arad et al. 2025, 2505.20063):
    `score` = max over its top tokens of their probability, times (1 - best rank / vocabulary);
    `probability` and `rank` (0 is the likeliest) are those two parts."""

    score: float
    probability: float
    rank: int


SCORE_PROMPT = "From my experience,"
SCORE_STRENGTH = 10.0


@torch.inference_mode()
def output_scores(
    model: HookedDecoder,
    prompt_ids: Sequence[int],
    variants: Sequence[Variant],
    own: Sequence[Sequence[int]],
    special_ids: Sequence[int],
    batch: int = 32,
    progress: Progress = SILENT,
) -> list[OutputScore]:
    """The score of each variant (a feature at `SCORE_STRENGTH` multiples of its largest
    activation, at the prompt's last token) for its tokens `own`: one forward pass for `batch`."""
    found: list[OutputScore] = []
    for start in range(0, len(variants), batch):
        progress.check()
        some = variants[start : start + batch]
        ids = torch.tensor([list(prompt_ids)] * len(some), device=model.device)
        steering = Steering(model, some, special_ids, ids.shape[1], Scope("last"))
        steering.expect(ids, 0)
        with model.intervene(steering.edits()):
            logits = last_logits(model, ids, 1)[:, -1].float()
        probabilities = logits.softmax(-1)
        for row, tokens in enumerate(own[start : start + batch]):
            chosen = probabilities[row, torch.tensor(list(tokens), device=logits.device)]
            likeliest = float(chosen.max())
            rank = int((probabilities[row] > chosen.max()).sum())
            found.append(OutputScore(likeliest * (1 - rank / logits.shape[1]), likeliest, rank))
        progress.report(len(found), len(variants), phase="score")
    return found
