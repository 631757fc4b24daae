"""The jobs that find out how far features can be steered, and which of them steer at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.features import newest_run
from mistudio.jobs.job import JobContext
from mistudio.jobs.loaded import tokenizer_of
from mistudio.jobs.models import loaded_model
from mistudio.jobs.stages import Stage, Within
from mistudio.jobs.steering import Part, known, open_part
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.steering import calibration
    from mistudio.engine.steering.interventions import Variant

# Those whose strength is a multiple of the largest activation.
METHODS = ("add", "clamp", "clamp_min")
MOST_FEATURES, MOST_PROMPTS = 200, 32
SCORE_KIND = "output_score"  # of what is kept in `library.feature_analyses`


@dataclass(frozen=True)
class Calibrate:
    """Try strengths of each of `features` and keep zones, curve and recommended strength in
    `library.calibrations`, feature by feature; what was kept before is replaced.

    `prompts` are continued (neutral ones where there are none), by `max_new_tokens` each;
    `suppress` also tries negative strengths. While it runs, the metrics `feature` and `tried` (a
    list of the curve's rows over the prompts so far) tell what is found.
    """

    sae_id: int
    features: list[int]
    method: str = "add"
    prompts: tuple[str, ...] = ()
    suppress: bool = False
    max_new_tokens: int = 32
    seed: int = 0

    kind: ClassVar[str] = "calibrate"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("calibrate", 100))

    def title(self, library: Library) -> str:
        if len(self.features) == 1:
            return f"Calibrate feature #{self.features[0]}"
        return f"Calibrate {len(self.features)} features"

    def run(self, context: JobContext) -> dict[str, Any]:
        library = context.library
        _check(self)
        sae = library.saes.get(self.sae_id)
        newest_run(library, self.sae_id)  # refuse before anything is loaded
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        stage = Stage(context, "calibrate", None)
        measuring = _Measuring(library, self, model)
        found = {}
        for number, feature in enumerate(self.features):
            curve = measuring.curve(feature, Within(stage, number, len(self.features)))
            library.calibrations.write(
                self.sae_id,
                feature,
                self.method,
                site={"hook_point": sae.hook_point_out, "layer": sae.layer},
                recommended=curve["recommended"],
                s_max=curve["s_max"],
                curve=curve,
            )
            found[str(feature)] = curve["recommended"]
        return {"sae_id": self.sae_id, "method": self.method, "recommended": found}


def _check(job: Calibrate) -> None:
    if job.method not in METHODS:
        raise InvalidInput(
            "This method has no strength to calibrate",
            f"Strengths of “{job.method}” are no multiples of the feature's largest activation.",
            f"Choose one of {', '.join(METHODS)}.",
            field="method",
        )
    for value, name, low, high in (
        (len(job.features), "features", 1, MOST_FEATURES),
        (len(job.prompts), "prompts", 0, MOST_PROMPTS),
        (job.max_new_tokens, "new tokens", 4, 512),
    ):
        if not low <= value <= high:
            raise InvalidInput(
                "A calibration setting is out of range",
                f"{name} must be between {low} and {high:,}; it is {value:,}.",
                field=name.replace(" ", "_"),
            )
    if not all(prompt.strip() for prompt in job.prompts):
        raise InvalidInput("A prompt is empty", next_step="Type some text.", field="prompts")


class _Measuring:
    """The features of one job, checked all before the first is tried."""

    def __init__(self, library: Library, job: Calibrate, model: HookedDecoder) -> None:
        from mistudio.engine.models import loading
        from mistudio.engine.steering.calibration import PROMPTS

        self._job, self._model = job, model
        self._part = open_part(library, job.sae_id, model)
        self._tokenizer = tokenizer_of(library, library.saes.get(job.sae_id).model_id, model)
        self._special = sorted(loading.special_ids(self._tokenizer))
        self._prompts = job.prompts or PROMPTS
        for feature in job.features:
            self._variant(feature, 1.0)
        self._scores = dict(
            zip(
                job.features,
                output_scores_of(self._part, job.features, model, self._tokenizer, self._special),
                strict=True,
            )
        )

    def _variant(self, feature: int, strength: float) -> Variant:
        from mistudio.engine.steering.interventions import Variant

        edit = self._part.edit(feature, strength, self._job.method)
        return Variant((self._part.steering_of(edit),))

    def curve(self, feature: int, progress: Progress) -> dict[str, Any]:
        """What `library.steering.Calibration.curve` says, with `recommended` and `s_max`."""
        parts = 2 if self._job.suppress else 1
        own = self._part.own_tokens(feature)
        up = self._tried(feature, 1, own, Within(progress, 0, parts))
        down = None
        if self._job.suppress:
            down = self._tried(feature, -1, own, Within(progress, 1, parts))
        score = self._scores[feature]
        return {
            **_side(up),
            "suppress": None if down is None else _side(down),
            "own_share": known(up.own_share),
            "own_tokens": own,
            "output_score": None if score is None else asdict(score),
            "max_activation": self._part.edit(feature, 1.0, "add").max_activation,
            "percent_of_norm": self._percent(feature),
            "prompts": list(self._prompts),
            "new_tokens": self._job.max_new_tokens,
        }

    def _tried(
        self, feature: int, sign: int, own: Sequence[int], progress: Progress
    ) -> calibration.Calibration:
        from mistudio.engine.steering.calibration import STRENGTHS, calibrate

        return calibrate(
            self._model,
            self._tokenizer,
            lambda strength: self._variant(feature, strength),
            special_ids=self._special,
            own=own,
            strengths=[sign * strength for strength in STRENGTHS],
            prompts=self._prompts,
            new_tokens=self._job.max_new_tokens,
            seed=self._job.seed,
            progress=_Live(progress, feature),
        )

    def _percent(self, feature: int) -> float | None:
        if self._job.method != "add":
            return None
        part = self._part
        edit = part.edit(feature, 1.0, "add")
        norm = float(part.dictionary.decoder[feature].norm()) * part.gain
        return 100.0 * edit.coefficient * norm / part.median


def _side(found: calibration.Calibration) -> dict[str, Any]:
    return {
        "tried": [_row(row) for row in found.tried],
        "recommended": found.recommended,
        "safe": found.safe,
        "s_max": found.breaks,
    }


def _row(tried: calibration.Tried) -> dict[str, Any]:
    numbers = {name: known(value) for name, value in asdict(tried).items()}
    return {**numbers, "zone": tried.zone}


class _Live:
    """Names the feature beside what is found of it, as plain data."""

    def __init__(self, outer: Progress, feature: int) -> None:
        self._outer, self._feature = outer, feature
        self._tried: list[dict[str, Any]] = []

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: Any
    ) -> None:
        if "tried" in metrics:
            self._tried = [_row(row) for row in metrics["tried"]]
        self._outer.report(done, total, phase, feature=self._feature, tried=self._tried)


# --- which features steer -------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOutputs:
    """How well each feature steers: its output score (`engine/steering/calibration.OutputScore`),
    of `features`, or of all that fired where none are named. Kept in `library.feature_analyses`
    under "output_score": {score, probability, rank}, all at once."""

    sae_id: int
    features: tuple[int, ...] = ()

    kind: ClassVar[str] = "score_outputs"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("score", 100))

    def title(self, library: Library) -> str:
        return f"Score what features of {library.saes.get(self.sae_id).hook_point} promote"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.models import loading

        library = context.library
        sae = library.saes.get(self.sae_id)
        run = newest_run(library, self.sae_id)
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        part = open_part(library, self.sae_id, model)
        tokenizer = tokenizer_of(library, sae.model_id, model)
        special = sorted(loading.special_ids(tokenizer))
        chosen = list(self.features) or np.flatnonzero(part.store.alive).tolist()
        scores = output_scores_of(
            part, chosen, model, tokenizer, special, Stage(context, "score", None)
        )
        with library.transaction():
            for feature, score in zip(chosen, scores, strict=True):
                if score is not None:
                    library.feature_analyses.put(run.id, feature, SCORE_KIND, {}, asdict(score))
        return {"feature_run_id": run.id, "features": sum(score is not None for score in scores)}


def output_scores_of(
    part: Part,
    features: Sequence[int],
    model: HookedDecoder,
    tokenizer: Any,
    special: Sequence[int],
    progress: Progress | None = None,
) -> list[calibration.OutputScore | None]:
    """The score of each feature; None for those that promote no tokens, where the logit lens does
    not apply."""
    from mistudio.engine.progress import SILENT
    from mistudio.engine.steering.calibration import (
        SCORE_PROMPT,
        SCORE_STRENGTH,
        output_scores,
    )
    from mistudio.engine.steering.interventions import Variant

    own = [part.own_tokens(feature) for feature in features]
    scored = [i for i, tokens in enumerate(own) if tokens]
    variants = [
        Variant((part.steering_of(part.edit(features[i], SCORE_STRENGTH, "add")),)) for i in scored
    ]
    found = output_scores(
        model,
        tokenizer(SCORE_PROMPT)["input_ids"],
        variants,
        [own[i] for i in scored],
        special,
        progress=progress or SILENT,
    )
    by_place = dict(zip(scored, found, strict=True))
    return [by_place.get(i) for i in range(len(features))]
