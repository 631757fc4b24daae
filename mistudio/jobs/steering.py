"""The steering job: unsteered and steered text side by side, with what changed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.loaded import kept_with, sae_of, tokenizer_of
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library

if TYPE_CHECKING:
    from torch import Tensor

    from mistudio.engine.datasets.tokens import TokenSplit
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.models.hooks import HookedDecoder, HookPoint
    from mistudio.engine.sae.files import SavedSae
    from mistudio.engine.steering.generation import Generated, Sampling
    from mistudio.engine.steering.interventions import FeatureEdit, SiteSteering, Variant
    from mistudio.engine.steering.metrics import SteeringEffect

STEER_PARTS = {"generate": (0.0, 0.9), "measure": (0.9, 1.0)}
MOST_VARIANTS = 4
OWN_TOKENS = 20


@dataclass(frozen=True)
class Steer:
    """Continue a prompt without and with features changed.

    `features`: [[feature, strength], ...] of the SAE, or [feature, strength, method]; strength in
    multiples of the feature's largest activation, "add" where no method is named (see
    `engine/steering/interventions.py`). `others` are those of further SAEs of the same model:
    [[sae_id, feature, strength, method], ...]. `scales` are the variants generated beside the
    unsteered one: each multiplies all strengths. With `layers` the sum of the added features acts
    after each of those blocks instead, at the same share of each layer's median norm, divided by
    the root of their number. `control` adds a variant of the same size in a random direction.
    """

    sae_id: int
    features: list[list[Any]]
    prompt: str
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 60
    seed: int = 0
    chat: bool = False
    scales: tuple[float, ...] = (1.0,)
    top_k: int = 0
    repetition_penalty: float = 1.0
    scope: str = "all"
    positions: tuple[int, ...] = ()
    keep_norm: bool = False
    others: tuple[list[Any], ...] = ()
    layers: tuple[int, ...] = ()
    control: bool = False

    kind: ClassVar[str] = "steer"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("generate", 20))

    def title(self, library: Library) -> str:
        names = [f"#{int(entry[0])} x {entry[1]:g}" for entry in self.features]
        names += [f"#{int(entry[1])} x {entry[2]:g}" for entry in self.others]
        return f"Steer with {', '.join(names)}"

    def run(self, context: JobContext) -> dict[str, Any]:
        sae = context.library.saes.get(self.sae_id)
        check_request(context.library, self)
        model = loaded_model(context.library, sae.model_id, Stage(context, "load model"))
        result = steer(context.library, self, model, Stage(context, "generate", STEER_PARTS))
        generation_id = context.library.generations.add(
            sae_id=self.sae_id, request=asdict(self), result=result
        )
        return {"generation_id": generation_id}


def steer(library: Library, job: Steer, model: HookedDecoder, progress: Progress) -> dict[str, Any]:
    """Generate and measure. The result is plain JSON: `unsteered`, and per scale (and for the
    control) a `variants` entry with `text`, `coefficients`, `percent_of_norm`, the effect's
    measures (`metrics.SteeringEffect`), and

        ...             those measures, None where there is no such number (a text of no tokens)
        ended           whether the text ended by itself; `unsteered_ended` of the unsteered one
        ended_early     it did, and with fewer tokens than the unsteered text
        features        what became of each steered feature: `Expressed`
        effectiveness   `metrics.effectiveness`, of the mean gain of the features; None where it
                        is not known
    """
    from mistudio.engine.steering.generation import encode_prompt

    recipe = Recipe(library, job, model)
    planned = recipe.planned()
    tokenizer, special = recipe.tokenizer()
    prompt_ids = encode_prompt(tokenizer, job.prompt, job.chat)
    began = time.monotonic()
    writing = _Clock(progress)
    generated, variants = compare(
        model, [(recipe, one) for one in planned], tokenizer, special, prompt_ids, job, writing
    )
    seconds = (writing.measuring or time.monotonic()) - began
    unsteered = generated.rows[0]
    return {
        "prompt": job.prompt,
        "prompt_pieces": [tokenizer.decode([token]) for token in prompt_ids],
        "hook_point": recipe.point.name,
        "precision": precision_of(model),
        "unsteered": unsteered.text,
        "unsteered_ids": unsteered.ids,
        "unsteered_ended": unsteered.ended,
        "unsteered_pieces": [tokenizer.decode([token]) for token in unsteered.ids],
        "variants": [
            {
                "scale": one.scale,
                "control": one.variant.control is not None,
                "pieces": [tokenizer.decode([token]) for token in found["ids"]],
                "coefficients": one.coefficients,
                "percent_of_norm": one.percent_of_norm,
                **found,
            }
            for one, found in zip(planned, variants, strict=True)
        ],
        "median_norm": recipe.median,
        "layer_norms": recipe.layer_norms,
        "together": generated.together,
        "seconds": seconds,
        "tokens_per_second": sum(len(row.ids) for row in generated.rows) / max(seconds, 1e-9),
    }


class _Clock:
    """Notes when the texts are written and measuring begins."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer
        self.measuring: float | None = None

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        if phase == "measure" and self.measuring is None:
            self.measuring = time.monotonic()
        self._outer.report(done, total, phase, **metrics)


def compare(
    model: HookedDecoder,
    planned: Sequence[tuple[Recipe, Planned]],
    tokenizer: Any,
    special: Sequence[int],
    prompt_ids: Sequence[int],
    job: Sampled,
    progress: Progress,
) -> tuple[Generated, list[dict[str, Any]]]:
    """Continue one prompt without and with each variant, in one batch with shared noise, and
    measure each against the unsteered text: the effect's measures and what `steer` names beside
    them, with `text` and `ids`."""
    from mistudio.engine.steering.generation import generate
    from mistudio.engine.steering.interventions import Scope
    from mistudio.engine.steering.metrics import steering_effect

    sampling = sampling_of(job)
    scope = Scope(job.scope, tuple(job.positions))
    generated = generate(
        model,
        tokenizer,
        prompt_ids,
        [one.variant for _, one in planned],
        sampling,
        special_ids=special,
        stop_ids=stop_ids(model, tokenizer),
        scope=scope,
        progress=progress,
    )
    unsteered, *rows = generated.rows
    variants = []
    for number, ((recipe, one), row) in enumerate(zip(planned, rows, strict=True)):
        progress.check()
        progress.report(number, len(planned), phase="measure")
        effect = steering_effect(
            model,
            one.variant,
            prompt_ids,
            unsteered.ids,
            row.ids,
            unsteered.text,
            row.text,
            special,
            scope,
        )
        (features,) = recipe.expressed(prompt_ids, [unsteered.ids, row.ids], special)
        variants.append(
            {
                "text": row.text,
                "ids": row.ids,
                **_as_json(effect),
                "ended": row.ended,
                "ended_early": row.ended and len(row.ids) < len(unsteered.ids),
                "features": [asdict(feature) for feature in features],
                "effectiveness": effectiveness_of(features, effect),
            }
        )
    return generated, variants


def sampling_of(job: Sampled) -> Sampling:
    from mistudio.engine.steering.generation import Sampling

    return Sampling(
        job.temperature, job.top_p, job.max_new_tokens, job.seed, job.top_k, job.repetition_penalty
    )


def check_request(library: Library, job: Steer) -> None:
    """Raises InvalidInput or NotFound for what cannot be done whatever the model is: before the
    minutes that loading one can take."""
    from mistudio.engine.steering.interventions import FeatureEdit

    sampling_of(job).check()
    if not job.prompt.strip():
        raise InvalidInput("The prompt is empty", next_step="Type some text.", field="prompt")
    for sae_id, feature, strength, method in chosen_of(job):
        sae = library.saes.get(sae_id)
        newest_run(library, sae_id)
        FeatureEdit(feature, strength, 1.0, method).check(sae.d_sae)
    for scale in job.scales:
        FeatureEdit(0, scale, 1.0).check(1)


def chosen_of(job: Steer) -> list[tuple[int, int, float, str]]:
    """(SAE, feature, strength, method) of each feature of a job. Raises InvalidInput where it has
    none, or too many variants."""
    if not job.features and not job.others:
        raise InvalidInput(
            "No feature chosen", next_step="Add at least one feature.", field="features"
        )
    if not 1 <= len(job.scales) <= MOST_VARIANTS:
        raise InvalidInput(
            "This number of variants cannot be made",
            f"{len(job.scales)} were asked for; at most {MOST_VARIANTS} fit beside each other.",
            "Ask for one to four.",
            field="scales",
        )
    chosen = [(job.sae_id, *entry) for entry in job.features]
    chosen += [(int(entry[0]), *entry[1:]) for entry in job.others]
    return [
        (sae_id, int(feature), float(strength), str(method[0]) if method else "add")
        for sae_id, feature, strength, *method in chosen
    ]


class Sampled(Protocol):
    """What of a job says how text is drawn and where it is steered."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def scope(self) -> str: ...
    @property
    def positions(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Planned:
    """A variant at one scale: the raw coefficients of its features, and the size of what is added
    at the first site in percent of the median norm there (None where that depends on the text)."""

    variant: Variant
    scale: float
    coefficients: list[float]
    percent_of_norm: float | None


@dataclass(frozen=True)
class Expressed:
    """Whether a text shows what a feature stands for. `reactivation`: the mean of the feature's
    activation at the text's tokens under the unsteered model, `reactivation_unsteered` the same of
    the unsteered text; `gain` is their difference in shares of `max_activation`, counted downwards
    where the feature is suppressed. `own_share`: of the text's tokens among the 20 that the feature
    promotes most (GenSucc@20), and of the unsteered text. None where there is no such number."""

    sae_id: int
    feature: int
    method: str
    max_activation: float
    reactivation: float | None
    reactivation_unsteered: float | None
    gain: float | None
    own_share: float | None
    own_share_unsteered: float | None


def effectiveness_of(features: Sequence[Expressed], effect: SteeringEffect) -> float | None:
    """`metrics.effectiveness` of the mean gain; None where a part of it is not known."""
    from mistudio.engine.steering.metrics import effectiveness

    gains = [feature.gain for feature in features if feature.gain is not None]
    if not gains:
        return None
    ratio = effect.distinct_2 / effect.distinct_2_unsteered
    return known(effectiveness(sum(gains) / len(gains), ratio, effect.perplexity_ratio))


def _as_json(effect: SteeringEffect) -> dict[str, Any]:
    return {
        name: known(value) if isinstance(value, float) else value
        for name, value in effect.as_dict().items()
    }


def known(value: float) -> float | None:
    """None for what is not a number: JSON has no word for it."""
    return value if math.isfinite(value) else None


class Recipe:
    """The variants that a job asks for, of SAEs, features and norms of this library. Raises
    InvalidInput where something it names does not exist or does not go together."""

    def __init__(self, library: Library, job: Steer, model: HookedDecoder) -> None:
        self._library, self._job, self._model = library, job, model
        self._parts: dict[int, Part] = {}
        self._norms: dict[HookPoint, float] | None = None
        for sae_id, feature, strength, method in chosen_of(job):
            part = self._parts.get(sae_id) or self._open(sae_id)
            self._parts[sae_id] = part
            part.add(feature, strength, method)
        first = next(iter(self._parts.values()))
        self.point, self.median = first.point, first.median
        self._model_id = library.saes.get(job.sae_id).model_id
        self.model_path = library.path(library.models.get(self._model_id).folder)

    @property
    def layer_norms(self) -> dict[str, float]:
        """The median norm after each of the job's `layers`, by layer; none before `planned`."""
        return {str(point.layer): norm for point, norm in (self._norms or {}).items()}

    def _open(self, sae_id: int) -> Part:
        sae = self._library.saes.get(sae_id)
        if sae.model_id != self._library.saes.get(self._job.sae_id).model_id:
            raise InvalidInput(
                "These SAEs are of different models",
                f"{sae.hook_point} belongs to another model than the first feature.",
                "Steer with SAEs of one model.",
                field="features",
            )
        return open_part(self._library, sae_id, self._model)

    def tokenizer(self) -> tuple[Any, list[int]]:
        """The model's tokenizer and the ids that are never steered."""
        from mistudio.engine.models import loading

        tokenizer = tokenizer_of(self._library, self._model_id, self._model)
        return tokenizer, sorted(loading.special_ids(tokenizer))

    def expressed(
        self, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]], special: Sequence[int]
    ) -> list[list[Expressed]]:
        """Of each text but the first, which is the unsteered one: what became of each feature."""
        found: list[list[Expressed]] = [[] for _ in texts[1:]]
        for part in self._parts.values():
            for row, features in enumerate(part.expressed(self._model, prompt_ids, texts, special)):
                found[row] += features
        return found

    def planned(self) -> list[Planned]:
        """One for each scale, and the control of the last."""
        found = [self.at(scale) for scale in self._job.scales]
        if self._job.control:
            last = found[-1]
            control = replace(last.variant, control=self._job.seed)
            found.append(replace(last, variant=control))
        return found

    def at(self, scale: float) -> Planned:
        """With every strength multiplied by `scale`."""
        from mistudio.engine.steering.interventions import Variant

        parts = list(self._parts.values())
        sites = [part.steering(scale) for part in parts]
        coefficients = [e.coefficient for site in sites for e in site.edits]
        percent = parts[0].percent(scale)
        if self._job.layers:
            sites = self._across_layers(scale)
            percent = None if percent is None else percent / len(self._job.layers) ** 0.5
        variant = Variant(tuple(sites), keep_norm=self._job.keep_norm)
        return Planned(variant, scale, coefficients, percent)

    def _across_layers(self, scale: float) -> list[SiteSteering]:
        """The summed vector after each layer, at the same share of that layer's median norm."""
        from mistudio.engine.models.hooks import HookPoint
        from mistudio.engine.sae.site import Site
        from mistudio.engine.steering.interventions import SiteSteering

        part = next(iter(self._parts.values()))
        in_stream = part.point.site in ("resid_post", "resid_pre")
        if len(self._parts) > 1 or not in_stream or not part.adds:
            raise InvalidInput(
                "One vector at several layers must be added features of one SAE",
                "Only directions in the residual stream mean the same after every block.",
                "Choose “add” and one SAE of the residual stream, or no layers.",
                field="layers",
            )
        points = [HookPoint("resid_post", layer) for layer in sorted(set(self._job.layers))]
        for point in points:
            self._model.check_point(point)
        if self._norms is None:
            context = min(128, part.context)
            self._norms = median_norms(
                self._model, part.sae_id, part.tokens, tuple(points), context
            )
        vector = part.vector(scale)
        share = 1 / (part.median * len(points) ** 0.5)
        return [
            SiteSteering(Site.at(point), vector=vector * (share * self._norms[point]))
            for point in points
        ]


def open_part(library: Library, sae_id: int, model: HookedDecoder) -> Part:
    """What steering with an SAE needs: NotFound before its features are discovered."""
    store, tokens = open_features(library, newest_run(library, sae_id))
    saved = sae_of(library, sae_id, model)
    median = _known_median(saved, store)
    if median is None:
        at, context = saved.site.output, int(saved.metadata.get("context_size", 128))
        median = median_norms(model, sae_id, tokens, (at,), context)[at]
    return Part(sae_id, saved, store, median, tokens)


class Part:
    """What is done with the features of one SAE."""

    def __init__(
        self,
        sae_id: int,
        saved: SavedSae,
        store: FeatureStore,
        median: float,
        tokens: TokenSplit,
    ) -> None:
        self.sae_id, self.store, self.dictionary = sae_id, store, saved.dictionary
        self.site, self.median, self.tokens = saved.site, median, tokens
        self.point = saved.site.output  # where decoder rows are directions
        self.context = int(saved.metadata.get("context_size", 128))
        self._largest = store.columns["max_activation"]
        self._edits: list[FeatureEdit] = []

    @property
    def adds(self) -> bool:
        return all(edit.method == "add" for edit in self._edits)

    def add(self, feature: int, strength: float, method: str) -> None:
        """Raises InvalidInput where the feature has another wish already and one of the two reads
        how active it is: clamping to two values at once means nothing."""
        others = [edit.method for edit in self._edits if edit.feature == feature]
        if others and {*others, method} != {"add"}:
            raise InvalidInput(
                "A feature is steered in two ways at once",
                f"Feature {feature} stands there with “{others[0]}” and with “{method}”.",
                "Keep one of them; only “add” can be given more than once.",
                field="features",
            )
        self._edits.append(self.edit(feature, strength, method))

    def edit(self, feature: int, strength: float, method: str) -> FeatureEdit:
        from mistudio.engine.steering.interventions import FeatureEdit

        # A feature outside the SAE gets its clear refusal from `SiteSteering.check`.
        there = 0 <= feature < len(self._largest)
        return FeatureEdit(
            feature, strength, float(self._largest[feature]) if there else 1.0, method
        )

    def steering_of(self, *edits: FeatureEdit) -> SiteSteering:
        """These edits at the SAE's site. Raises InvalidInput where they cannot be made."""
        from mistudio.engine.steering.interventions import SiteSteering

        found = SiteSteering(self.site, self.dictionary, edits, gain=self.gain)
        found.check()
        return found

    def own_tokens(self, feature: int) -> list[int]:
        """The tokens that the feature's direction promotes most; none where it writes none."""
        return [token for token, _ in self.store.promoted(feature)[:OWN_TOKENS] if token >= 0]

    def steering(self, scale: float) -> SiteSteering:
        return self.steering_of(
            *(replace(edit, strength=edit.strength * scale) for edit in self._edits)
        )

    @property
    def gain(self) -> float:
        """A decoder of normalised activations: in raw ones it is multiplied by a token's standard
        deviation, of which the median norm over sqrt(d) is the usual size."""
        if self.dictionary.norm != "layer_norm":
            return 1.0
        return float(self.median / self.dictionary.d_out**0.5)

    def vector(self, scale: float) -> Tensor:
        from mistudio.engine.steering.interventions import steering_vector

        return self.gain * steering_vector(self.dictionary, self.steering(scale).edits)

    def expressed(
        self,
        model: HookedDecoder,
        prompt_ids: Sequence[int],
        texts: Sequence[Sequence[int]],
        special: Sequence[int],
    ) -> list[list[Expressed]]:
        """Of each text but the first, the unsteered one, and each edit."""
        from mistudio.engine.steering.metrics import reactivation, share_among

        features = [edit.feature for edit in self._edits]
        means = reactivation(
            model, self.dictionary, self.site.input, features, prompt_ids, texts, special
        )
        own = [set(self.own_tokens(feature)) for feature in features]
        shares = [
            [share_among(ids, tokens) if tokens else math.nan for tokens in own] for ids in texts
        ]
        return [
            [
                Expressed(
                    self.sae_id,
                    edit.feature,
                    edit.method,
                    edit.max_activation,
                    known(mean[i]),
                    known(means[0][i]),
                    known(_gain(edit, mean[i] - means[0][i])),
                    known(share[i]),
                    known(shares[0][i]),
                )
                for i, edit in enumerate(self._edits)
            ]
            for mean, share in zip(means[1:], shares[1:], strict=True)
        ]

    def percent(self, scale: float) -> float | None:
        """Of what is added in the median norm; None where that depends on the text."""
        return (
            100.0 * float(self.vector(scale).double().norm()) / self.median if self.adds else None
        )


def _gain(edit: FeatureEdit, difference: float) -> float:
    """A difference in activation as a share of the largest, positive where the edit wants it; NaN
    for an edit that wants nothing."""
    from mistudio.engine.steering.interventions import wanted

    direction = wanted(edit)
    if not direction or edit.max_activation <= 0:
        return math.nan
    return direction * difference / edit.max_activation


def stop_ids(model: HookedDecoder, tokenizer: Any) -> set[int]:
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _known_median(saved: SavedSae, store: FeatureStore) -> float | None:
    """The median activation norm where steering acts, from the SAE's record or its discovery; None
    where what they measured is read elsewhere."""
    if saved.site.is_transcoder:
        return None
    recorded = saved.record.get("metrics", {}).get("median_norm") or store.meta.median_norm
    return float(recorded) or None


def median_norms(
    model: HookedDecoder,
    sae_id: int,
    tokens: TokenSplit,
    points: tuple[HookPoint, ...],
    context: int,
) -> dict[HookPoint, float]:
    """Of each point, on the tokens of the SAE's discovery; measured once while the model is
    loaded."""
    from mistudio.engine.activations.source import calibrate_medians

    return kept_with(
        model,
        ("norms", sae_id, points, context),
        lambda: calibrate_medians(model, tokens, points, context),
    )
