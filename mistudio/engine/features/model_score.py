"""How well a language model tells, from a description alone, where a feature is active.

Detection: is the feature active in this text? Fuzzing: are the marked words those on which it is
active? (delphi, arXiv 2410.13928). One text a prompt, so that none tells about another. Texts are
of documents that the description was not made from; from which answer on "yes" is believed is set
on documents that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistudio.engine.features.describers import active_tokens, marked
from mistudio.engine.features.embedding_score import CHANCE, Tried
from mistudio.engine.features.excerpts import Excerpt, pieces
from mistudio.engine.features.language_models import LanguageModel, Quiet
from mistudio.engine.features.rules import balanced_accuracy
from mistudio.engine.features.score import ACTIVE, interval
from mistudio.engine.progress import SILENT, Progress

CONTEXTS = 40  # tried a feature, half of them active
LEAST = 5  # of either kind
FITTED = 10  # of either kind, for the threshold
NULL_CONTEXTS = 20  # of another feature
PAIRS = 2  # other features that each description is tried on
UNANSWERED = 0.2  # share of prompts without a usable answer from which on there is no score

DETECT = """A unit of a neural network is active on: {description}

Text: {text}

Is the unit active in this text? Answer only 1 for yes or 0 for no."""
FUZZ = """A unit of a neural network is active on: {description}

Text: {text}

Are the words between << and >> those on which the unit is active? Answer only 1 for yes or 0 \
for no."""


@dataclass(frozen=True)
class Judged:
    """Of one feature: `detection` and `fuzzing`, either None where too few contexts or too few
    usable answers were there (`unanswered` of all prompts had none). `threshold`: from which
    probability of "yes" on it is believed."""

    detection: Tried | None
    fuzzing: Tried | None
    threshold: float
    prompts: int
    unanswered: int


def model_scores(
    model: LanguageModel,
    descriptions: Mapping[int, str],
    excerpts: Mapping[int, Sequence[Excerpt]],
    tokenizer: Any,
    contexts: int = CONTEXTS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[int, Judged]:
    """Of each described feature. `excerpts` has these and, for the null, the contexts of some
    others where few are described."""
    judges = {}
    for number, feature in enumerate(descriptions):
        draw = np.random.default_rng([seed, feature])
        judge = _Judge(model, descriptions[feature], excerpts[feature], tokenizer, contexts, draw)
        judges[feature] = judge
        others = [f for f in excerpts if f != feature]
        chosen = [others[i] for i in draw.permutation(len(others))[:PAIRS]]
        judge.ask([excerpts[f] for f in chosen], progress)
        progress.report(number + 1, len(descriptions))
    nulls = [null for judge in judges.values() for null in judge.nulls]
    null = float(np.mean(nulls)) if nulls else CHANCE
    return {f: judge.judged(null, len(nulls), seed) for f, judge in judges.items()}


def needed(excerpts: Sequence[Excerpt], contexts: int, feature: int, seed: int) -> list[Excerpt]:
    """Those of a feature whose activations a score looks at (`excerpts.with_activations`)."""
    return _chosen(excerpts, contexts, np.random.default_rng([seed, feature]))[1]


def _chosen(
    excerpts: Sequence[Excerpt], contexts: int, draw: np.random.Generator
) -> tuple[list[Excerpt], list[Excerpt]]:
    """(to set the threshold on, to try)."""
    fitted = _balanced([e for e in excerpts if not e.tried], FITTED, draw)
    return fitted, _balanced(_testable(excerpts), contexts // 2, draw)


class _Judge:
    """One description, the contexts it is tried on, and what the model said of them."""

    def __init__(
        self,
        model: LanguageModel,
        description: str,
        excerpts: Sequence[Excerpt],
        tokenizer: Any,
        contexts: int,
        draw: np.random.Generator,
    ) -> None:
        self._model, self._description, self._tokenizer = model, description, tokenizer
        self._draw = draw
        self._fitted, self._tried = _chosen(excerpts, contexts, draw)
        self.nulls: list[float] = []
        self._prompts = self._unanswered = 0
        self._threshold = 0.5
        self._detected = self._fuzzed = np.empty(0)
        self._right = np.empty(0, bool)

    def ask(self, others: Sequence[Sequence[Excerpt]], progress: Progress) -> None:
        self._threshold = _threshold(self._detect(self._fitted, progress), _active(self._fitted))
        self._detected = self._detect(self._tried, progress)
        self._fuzzed, self._right = self._fuzz(progress)
        for other in others:
            strange = _balanced(_testable(other), NULL_CONTEXTS // 2, self._draw)
            if _enough(_active(strange)):
                found = self._detect(strange, progress)
                self.nulls.append(_accuracy(found, _active(strange), self._threshold))

    def judged(self, null: float, nulls: int, seed: int) -> Judged:
        detection = self._outcome(self._detected, _active(self._tried), null, nulls, seed)
        # Which words are marked is drawn anew for each text: its null is chance by construction.
        fuzzing = self._outcome(self._fuzzed, self._right, CHANCE, 0, seed, 0.5)
        return Judged(detection, fuzzing, self._threshold, self._prompts, self._unanswered)

    def _outcome(
        self,
        answers: np.ndarray,
        active: np.ndarray,
        null: float,
        nulls: int,
        seed: int,
        threshold: float | None = None,
    ) -> Tried | None:
        if not _enough(active) or np.isnan(answers).mean() > UNANSWERED:
            return None
        threshold = self._threshold if threshold is None else threshold
        hit = _hits(answers, active, threshold)[None]
        low, high = interval(hit, active[None], ~active[None], seed)
        excess = max(null - CHANCE, 0.0)
        return Tried(
            _accuracy(answers, active, threshold) - excess,
            float(low[0]) - excess,
            float(high[0]) - excess,
            int(active.sum()),
            int((~active).sum()),
            null,
            nulls,
            auroc(answers, active),
        )

    def _detect(self, excerpts: Sequence[Excerpt], progress: Progress) -> np.ndarray:
        texts = [" ".join("".join(self._pieces(e)).split()) for e in excerpts]
        return self._asked(DETECT, texts, progress)

    def _fuzz(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """(answers, bool: the right words were marked). In every other text as many words on which
        the feature is not active are marked instead; texts on which it always is are left out."""
        texts: list[str] = []
        right: list[bool] = []
        for e in (e for e in self._tried if e.is_active):
            on = active_tokens(e)
            silent = np.flatnonzero((e.activations == 0) if len(e.activations) else ~on)
            silent = silent[[bool(p.strip()) for p in np.array(self._pieces(e))[silent]]]
            n = min(int(on.sum()), len(silent))
            if not n:
                continue
            truth = len(right) % 2 == 0
            if not truth:
                on = np.zeros(len(on), bool)
                on[self._draw.choice(silent, n, replace=False)] = True
            texts.append(marked(self._pieces(e), on))
            right.append(truth)
        return self._asked(FUZZ, texts, progress), np.array(right, bool)

    def _pieces(self, excerpt: Excerpt) -> list[str]:
        return pieces(self._tokenizer, excerpt.ids)

    def _asked(self, template: str, texts: Sequence[str], progress: Progress) -> np.ndarray:
        prompts = [template.format(description=self._description, text=text) for text in texts]
        answers = self._model.yes(prompts, Quiet(progress)) if prompts else np.empty(0)
        self._prompts += len(prompts)
        self._unanswered += int(np.isnan(answers).sum())
        return answers


def _testable(excerpts: Sequence[Excerpt]) -> list[Excerpt]:
    """Those that scores are tried on: the strongest ones never are."""
    return [e for e in excerpts if e.tried and (e.kind == ACTIVE or not e.is_active)]


def _balanced(excerpts: Sequence[Excerpt], each: int, draw: np.random.Generator) -> list[Excerpt]:
    """Up to `each` active ones, of all deciles alike, and as many inactive ones."""
    order = [excerpts[i] for i in draw.permutation(len(excerpts))]
    by_decile: dict[int, list[Excerpt]] = {}
    for e in order:
        if e.is_active:
            by_decile.setdefault(e.decile, []).append(e)
    active = sorted(
        ((turn, d, e) for d, found in by_decile.items() for turn, e in enumerate(found)),
        key=lambda item: item[:2],
    )
    inactive = [e for e in order if not e.is_active]
    return [e for _, _, e in active[:each]] + inactive[:each]


def _active(excerpts: Sequence[Excerpt]) -> np.ndarray:
    return np.array([e.is_active for e in excerpts], bool)


def _enough(active: np.ndarray) -> bool:
    return min(int(active.sum()), int((~active).sum())) >= LEAST


def _hits(answers: np.ndarray, active: np.ndarray, threshold: float) -> np.ndarray:
    """Bool: taken for active. What was not answered counts as wrong."""
    return np.where(np.isnan(answers), ~active, answers > threshold)


def _accuracy(answers: np.ndarray, active: np.ndarray, threshold: float) -> float:
    hit = _hits(answers, active, threshold)[None]
    return float(balanced_accuracy(hit, active[None], ~active[None])[0])


def _threshold(answers: np.ndarray, active: np.ndarray) -> float:
    """Where yes and no are told apart best, of equally good places the one nearest to 0.5."""
    known = ~np.isnan(answers)
    answers, active = answers[known], active[known]
    if not _enough(active):
        return 0.5
    values = np.unique(answers)
    places = [0.5, *((values[1:] + values[:-1]) / 2)]
    return float(max(places, key=lambda t: (_accuracy(answers, active, t), -abs(t - 0.5))))


def auroc(answers: np.ndarray, active: np.ndarray) -> float | None:
    """How often an active context gets a higher answer than an inactive one, ties counting half;
    None where all answers are plain yes or no."""
    known = ~np.isnan(answers)
    on, off = answers[known & active], answers[known & ~active]
    if not len(on) or not len(off) or set(np.unique(answers[known])) <= {0.0, 1.0}:
        return None
    higher = (on[:, None] > off).mean() + (on[:, None] == off).mean() / 2
    return float(higher)
