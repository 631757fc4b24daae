"""How strongly a feature can be steered before the text breaks: measured, not guessed.

A strength in multiples of a feature's largest activation means different things for different
features: one doubles a word's probability where another already ends in repetition. Each feature
is therefore tried at several strengths on neutral prompts, and the strengths fall into zones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.hf import DynamicCache
from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.models.logits import last_logits
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.steering.generation import (
    Sampling,
    check_room,
    check_seed,
    draw,
    encode_prompt,
)
from mistudio.engine.steering.interventions import Scope, Steering, Variant
from mistudio.engine.steering.metrics import distinct, share_among
from mistudio.errors import is_out_of_memory

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
PROMPTS = (
    "From my experience,",
    "The important thing is",
    "Last week I went",
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
# Other prompts differ: a strength is recommended where it keeps this part of each limit, and the
# whole KL limit on every prompt, and moves the probability of the feature's own tokens by at least
# this factor.
MARGIN = 0.75
LEAST_RISE = 1.05
ROUNDING = 1e-4  # of a log probability: no token's moved by more is no change


@dataclass(frozen=True)
class Tried:
    """One strength over all prompts.

    tokens: generated in all. kl: mean KL(steered || unsteered) on their own prefixes, nats per
    token; kl_worst: that of the prompt where it is largest. perplexity_ratio (under the unsteered
    model) and distinct_ratio (distinct-2): to the unsteered continuations. own_share: of the tokens
    that are among the feature's own (of the unsteered ones: `Calibration.own_share`).
    own_probability: the mean probability, before each of the steered text's tokens, that the model
    gives its own tokens together; own_probability_unsteered: the same without steering, on the same
    text. The last two are NaN where no tokens were named.
    """

    strength: float
    tokens: int
    kl: float
    kl_worst: float
    perplexity_ratio: float
    distinct_ratio: float
    own_share: float
    own_probability: float
    own_probability_unsteered: float

    @property
    def zone(self) -> str:
        """ "green", "amber" or "red"."""
        if self.distinct_ratio < BROKEN_DISTINCT:
            return "red"
        return "green" if self._within(1.0) else "amber"

    @property
    def is_safe(self) -> bool:
        """Whether it stays clear of every limit of the green zone."""
        return self._within(MARGIN) and self.kl_worst <= MOST_KL

    @property
    def moves_own(self) -> bool:
        """Whether it does what the feature is amplified (or suppressed) for: its own tokens become
        likelier (less likely). True where it has no tokens of its own to look at."""
        return math.isnan(self.own_rise) or self.own_rise >= LEAST_RISE

    @property
    def own_rise(self) -> float:
        """What the own tokens' probability is multiplied by, or divided by where the feature is
        suppressed; NaN where there are none."""
        after, before = (
            max(value, 1e-30) if not math.isnan(value) else value
            for value in (self.own_probability, self.own_probability_unsteered)
        )
        return after / before if self.strength > 0 else before / after

    def _within(self, part: float) -> bool:
        """Whether all three keep to `part` of the way from the unsteered text to the limit."""
        return (
            self.kl <= part * MOST_KL
            and 1 - self.distinct_ratio <= part * (1 - LEAST_DISTINCT)
            and self.perplexity_ratio <= 1 + part * (MOST_PERPLEXITY - 1)
        )


@dataclass(frozen=True)
class Calibration:
    """A feature's strengths, weakest first. `recommended` is the largest that moves the feature's
    own tokens and up to which every one is safe, 0.0 where there is none or where the safe ones
    together do not move them; `safe` the largest
    whether or not it moves them; `breaks` the first that is red, None where none is.
    `own_share` is that of the unsteered continuations, NaN where no tokens were named."""

    tried: tuple[Tried, ...]
    recommended: float
    safe: float
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
    """Try every strength on every prompt, with the same sampling noise for all strengths of a
    prompt. `steered` gives the variant of a strength; `own` are the tokens that the feature
    promotes most. Texts do not end early, so that all have the same length.

    All strengths must have one sign: negative ones (suppression) have zones of their own.
    `progress.report` gets `tried`, the curve of what is written so far. Raises RuntimeError where
    a variant changes nothing at all, though it must.
    """
    strengths = sorted(strengths, key=abs)
    if not strengths or any(s * strengths[0] <= 0 for s in strengths):
        raise ValueError("strengths must be of one sign, and none 0")
    variants = [steered(strength) for strength in strengths]
    encoded = [encode_prompt(tokenizer, prompt, False) for prompt in prompts]
    check_seed(seed)
    for ids in encoded:
        check_room(model, len(ids), new_tokens)
    trial = _Trial(model, special_ids, sorted(own), new_tokens, seed, progress)
    done: dict[int, list[_Text]] = {}

    def tell(written: dict[int, list[_Text]], share: float) -> None:
        known = [*done.values(), *written.values()]
        # A part of the strengths has no curve, nor has a text without a bigram.
        whole = all(len(texts) > len(strengths) and len(texts[0].ids) > 1 for texts in known)
        curve = {"tried": _curve(strengths, known)} if whole else {}
        at = len(done) + share * len(written)
        progress.report(at, len(prompts), phase="calibrate", **curve)

    for length in sorted({len(ids) for ids in encoded}):  # those of one length share a batch
        together = {i: ids for i, ids in enumerate(encoded) if len(ids) == length}
        for number, texts in trial.write(together, variants, tell):
            done[number] = texts
    tried = _curve(strengths, list(done.values()))
    for i, variant in enumerate(variants, 1):
        texts = [texts[i] for texts in done.values()]
        still = all(max(text.moved) < ROUNDING and not text.lost for text in texts)
        if still and variant.always_acts:
            raise RuntimeError("Steering changed nothing: its edit does not reach the logits")
    base = [texts[0] for texts in done.values()]
    return Calibration(
        tried,
        recommended_of(tried),
        safe_of(tried),
        next((row.strength for row in tried if row.zone == "red"), None),
        _share(base, set(own)) if own else math.nan,
        len(prompts),
        new_tokens,
    )


@dataclass
class _Text:
    """One continuation, by token: its ids, KL(steered || unsteered) and its negative log
    probability under the unsteered model, in nats on its own prefix, the probability of the
    feature's own tokens with and without steering, and the most that any token's log probability
    moved. `lost`: what is added is too little for the model's precision."""

    own: frozenset[int]
    ids: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    lost: bool = False


@dataclass(frozen=True)
class _Trial:
    """What all batches of one calibration have in common."""

    model: HookedDecoder
    special_ids: Sequence[int]
    own: Sequence[int]
    new_tokens: int
    seed: int
    progress: Progress

    def write(
        self,
        prompts: Mapping[int, Sequence[int]],
        variants: Sequence[Variant],
        tell: Callable[[dict[int, list[_Text]], float], None],
    ) -> Iterator[tuple[int, list[_Text]]]:
        """The texts of each prompt, the unsteered one first. In parts where memory is short, with
        the same result: the noise depends on the prompt alone."""
        try:
            written = self._write(prompts, variants, tell)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc) or len(prompts) == len(variants) == 1:
                raise
        else:
            yield from written.items()
            return
        # Outside of the handler: the error holds what the batch held.
        if len(prompts) > 1:
            for number, ids in prompts.items():
                yield from self.write({number: ids}, variants, tell)
            return
        half, (number,) = len(variants) // 2, prompts
        first, second = (
            dict(self.write(prompts, some, tell))[number]
            for some in (variants[:half], variants[half:])
        )
        yield number, [*first, *second[1:]]

    @torch.inference_mode()
    def _write(
        self,
        prompts: Mapping[int, Sequence[int]],
        variants: Sequence[Variant],
        tell: Callable[[dict[int, list[_Text]], float], None],
    ) -> dict[int, list[_Text]]:
        """All in one batch. Of each prompt: the unsteered text, the steered ones, and for each of
        these a row in which the unsteered model reads along: what it predicts there is what the
        text is measured against, at every step and without another pass."""
        n = len(variants)
        sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=self.new_tokens)
        block: list[Variant | None] = [None, *variants, *[None] * n]
        fed = torch.tensor(
            [list(ids) for ids in prompts.values() for _ in block], device=self.model.device
        )
        steering = Steering(self.model, block * len(prompts), self.special_ids, fed.shape[1])
        noise = [torch.Generator().manual_seed((self.seed + number) % 2**64) for number in prompts]
        written = {i: [_Text(frozenset(self.own)) for _ in range(n + 1)] for i in prompts}
        cache, position = DynamicCache(config=self.model.model.config), 0
        for step in range(self.new_tokens):
            self.progress.check()
            steering.expect(fed, position)
            with self.model.intervene(steering.edits()):
                logits = last_logits(self.model, fed, 1, cache)[:, -1]
            position += fed.shape[1]
            chosen = [
                self._extend(texts, part.float(), sampling, generator)
                for texts, part, generator in zip(
                    written.values(), logits.split(len(block)), noise, strict=True
                )
            ]
            fed = torch.cat([token for row in chosen for token in (row, row[1:])])[:, None]
            tell(written, (step + 1) / self.new_tokens)
        for place, texts in enumerate(written.values()):
            for row, text in enumerate(texts):
                text.lost = steering.is_lost(place * len(block) + row)
        return written

    def _extend(
        self, texts: list[_Text], logits: Tensor, sampling: Sampling, noise: torch.Generator
    ) -> Tensor:
        """One token more of each of a prompt's texts, from the logits of its rows."""
        n = len(texts)
        chosen = draw(logits[:n], sampling, noise)
        found = logits.log_softmax(-1)
        after, before = found[:n], torch.cat([found[:1], found[n:]])
        kl = (after.exp() * (after - before)).sum(-1).clamp_min(0.0)
        nll = -before.gather(1, chosen[:, None])[:, 0]
        mine = torch.tensor(self.own, dtype=torch.long, device=logits.device)
        for values, name in (
            (chosen, "ids"),
            (kl, "kl"),
            (nll, "nll"),
            (after[:, mine].exp().sum(-1), "after"),
            (before[:, mine].exp().sum(-1), "before"),
            ((after - before).abs().amax(-1), "moved"),
        ):
            for text, value in zip(texts, values.tolist(), strict=True):
                getattr(text, name).append(value)
        return chosen


def safe_of(tried: Sequence[Tried]) -> float:
    """The largest strength up to which all are safe; 0.0 for none."""
    return max((row.strength for row in _safe(tried)), key=abs, default=0.0)


def recommended_of(tried: Sequence[Tried]) -> float:
    """The largest of those that also moves the feature's own tokens; 0.0 for none, and where all of
    them together do not: one strength of many moves some tokens by chance."""
    safe = list(_safe(tried))
    if not safe or not _move_own(safe):
        return 0.0
    return max((row.strength for row in safe if row.moves_own), key=abs, default=0.0)


def _move_own(safe: Sequence[Tried]) -> bool:
    """Whether the geometric mean of what these strengths multiply the own tokens' probability by
    is at least the root of `LEAST_RISE`: weak ones move them less."""
    rises = [row.own_rise for row in safe if not math.isnan(row.own_rise)]
    return not rises or 2 * sum(map(math.log, rises)) / len(rises) >= math.log(LEAST_RISE)


def _safe(tried: Sequence[Tried]) -> Iterator[Tried]:
    return takewhile(lambda row: row.is_safe, tried)


def _curve(strengths: Sequence[float], written: Sequence[list[_Text]]) -> tuple[Tried, ...]:
    """Each strength over all prompts; `written` holds the texts of each, the unsteered first."""
    base = [texts[0] for texts in written]
    return tuple(
        _tried(strength, [texts[i] for texts in written], base)
        for i, strength in enumerate(strengths, 1)
    )


def _tried(strength: float, texts: Sequence[_Text], base: Sequence[_Text]) -> Tried:
    tokens = sum(len(text.ids) for text in texts)
    longer = sum(sum(text.nll) for text in texts) - sum(sum(text.nll) for text in base)
    diverse, usual = (sum(distinct(text.ids, 2) for text in some) for some in (texts, base))
    has_own = bool(texts[0].own)
    return Tried(
        strength=strength,
        tokens=tokens,
        kl=sum(sum(text.kl) for text in texts) / tokens,
        kl_worst=max(sum(text.kl) / len(text.kl) for text in texts),
        perplexity_ratio=math.exp(min(longer / tokens, 700.0)),
        distinct_ratio=diverse / usual,
        own_share=_share(texts, texts[0].own),
        own_probability=sum(sum(t.after) for t in texts) / tokens if has_own else math.nan,
        own_probability_unsteered=(
            sum(sum(t.before) for t in texts) / tokens if has_own else math.nan
        ),
    )


def _share(texts: Sequence[_Text], own: Collection[int]) -> float:
    return share_among([token for text in texts for token in text.ids], own)


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
