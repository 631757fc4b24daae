"""Scores of chosen features that the rule is not: by the model's own activations, and by a person
who looks for the intruder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.features import open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

if TYPE_CHECKING:
    from mistudio.engine.features.embedding_score import Tried
    from mistudio.engine.features.store import FeatureStore

MOST_FEATURES = 1000
COMPARED = 6  # features at least whose contexts each is tried on, for the null


@dataclass(frozen=True)
class ScoreFeatures:
    """How well the model's own activations tell where each of `features` is active (the embedding
    scorer: weak evidence), kept in `library.feature_scores`; earlier ones are replaced."""

    feature_run_id: int
    features: list[int]
    seed: int = 0

    kind: ClassVar[str] = "score_features"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("score", 60))

    def title(self, library: Library) -> str:
        return f"Score {named(self.features)} by their contexts' activations"

    def run(self, context: JobContext) -> dict[str, Any]:
        library = context.library
        run = library.feature_runs.get(self.feature_run_id)
        check_features(self.features, run)
        model_id = library.saes.get(run.sae_id).model_id
        model = loaded_model(library, model_id, Stage(context, "load model"))
        scored = _by_embedding(library, run, self, model, Stage(context, "score", None))
        return {"feature_run_id": run.id, "scored": scored, "features": len(self.features)}


def named(features: Sequence[int]) -> str:
    return f"feature #{features[0]}" if len(features) == 1 else f"{len(features)} features"


def check_features(features: Sequence[int], run: FeatureRun) -> None:
    """Refuse what a job cannot do before it begins."""
    if not 1 <= len(features) <= MOST_FEATURES:
        raise InvalidInput(
            "Too many features at a time" if features else "No feature chosen",
            f"{len(features):,} are chosen; between 1 and {MOST_FEATURES:,} can be.",
            "Choose others in the table.",
            field="features",
        )
    wrong = [feature for feature in features if not 0 <= feature < run.n_features]
    if wrong:
        raise InvalidInput(
            "There is no such feature",
            f"#{wrong[0]}; this SAE has {run.n_features:,}.",
            field="features",
        )


def _by_embedding(
    library: Library, run: FeatureRun, job: ScoreFeatures, model: Any, progress: Progress
) -> int:
    from mistudio.engine.features.embedding_score import embed, embedding_scores
    from mistudio.engine.features.excerpts import excerpts
    from mistudio.engine.sae.files import load_sae

    store, tokens = open_features(library, run)
    point = load_sae(library.path(library.saes.get(run.sae_id).folder)).site.input
    chosen = [*job.features, *partners(store, job.features, job.seed)]
    found = {feature: excerpts(store, tokens, feature) for feature in chosen}
    embedded = {}
    for number, feature in enumerate(chosen):
        progress.report(number, len(chosen))
        embedded[feature] = embed(model, point, found[feature], progress)
    scores = embedding_scores(found, embedded, job.seed)
    precision = precision_of(model)
    with library.transaction():
        for feature in job.features:
            if feature in scores:
                write_score(
                    library,
                    run.sae_id,
                    feature,
                    "embedding",
                    scores[feature],
                    {"hook_point": point.name, "precision": precision},
                )
    return sum(feature in scores for feature in job.features)


def partners(store: FeatureStore, features: Sequence[int], seed: int) -> list[int]:
    """Other scored features, drawn by lot, so that there are enough to take a null from."""
    missing = COMPARED - len(features)
    if missing <= 0:
        return []
    usable = store.columns.get("score_contexts", store.columns["n_contexts"])
    others = np.setdiff1d(np.flatnonzero(np.asarray(usable) > 0), features)
    draw = np.random.default_rng(seed)
    return [int(f) for f in draw.permutation(others)[:missing]]


def write_score(
    library: Library,
    sae_id: int,
    feature: int,
    scorer: str,
    found: Tried,
    details: dict[str, Any],
) -> None:
    library.feature_scores.write(
        sae_id,
        feature,
        scorer,
        accuracy=found.accuracy,
        low=found.low,
        high=found.high,
        active=found.active,
        inactive=found.inactive,
        details={
            "chance": 0.5,
            "null": found.null,
            "nulls": found.nulls,
            "auroc": found.auroc,
            **details,
        },
    )


# --- a person -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlindTrial:
    """Five excerpts as text, in the order in which they are shown; the feature is active in all
    but number `intruder`. `decile`: of which tenth of its activations the four are."""

    texts: tuple[str, ...]
    intruder: int
    decile: int


def blind_trials(library: Library, run: FeatureRun, feature: int, seed: int) -> list[BlindTrial]:
    """What a person is shown of a feature. Reads files: not for the window's thread. InvalidInput
    where its examples are too few."""
    from mistudio.engine.features.excerpts import excerpts, pieces
    from mistudio.engine.features.intruder import trials
    from mistudio.engine.models.loading import load_tokenizer

    store, tokens = open_features(library, run)
    model = library.models.get(library.saes.get(run.sae_id).model_id)
    tokenizer = load_tokenizer(library.path(model.folder))

    def text(ids: np.ndarray) -> str:
        return " ".join("".join(pieces(tokenizer, ids)).split())

    return [
        BlindTrial(tuple(text(e.ids) for e in trial.excerpts), trial.intruder, trial.decile)
        for trial in trials(excerpts(store, tokens, feature), seed)
    ]


@dataclass(frozen=True)
class BlindResult:
    """How many of `trials` intruders were found; `low`, `high`: exact 95 % interval; `by_chance`:
    how probable as many or more are by guessing; `score`: 0 at chance, 1 where all were found."""

    right: int
    trials: int
    accuracy: float
    low: float
    high: float
    by_chance: float
    score: float


def keep_blind(
    library: Library,
    sae_id: int,
    feature: int,
    trials: Sequence[BlindTrial],
    answers: Sequence[int],
    seed: int,
) -> BlindResult:
    """Judge a whole test (`answers`: which excerpt was taken for the intruder, of each trial) and
    keep it; an earlier one of the same feature is replaced."""
    from mistudio.engine.features.intruder import CHANCE, judged
    from mistudio.engine.features.score import score_of

    if len(answers) != len(trials):
        raise ValueError(f"{len(answers)} answers to {len(trials)} trials")
    right = sum(a == trial.intruder for a, trial in zip(answers, trials, strict=True))
    found = judged(right, len(trials))
    result = BlindResult(
        right,
        found.trials,
        found.accuracy,
        found.low,
        found.high,
        found.by_chance,
        score_of(found.accuracy, CHANCE),
    )
    library.feature_scores.write(
        sae_id,
        feature,
        "human",
        accuracy=found.accuracy,
        low=found.low,
        high=found.high,
        active=4 * found.trials,
        inactive=found.trials,
        details={
            "chance": CHANCE,
            **asdict(result),
            "seed": seed,
            "answers": [
                {"decile": trial.decile, "intruder": trial.intruder, "answer": int(answer)}
                for trial, answer in zip(trials, answers, strict=True)
            ],
        },
    )
    return result
