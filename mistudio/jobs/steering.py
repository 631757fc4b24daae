"""The steering job: unsteered and steered text side by side, with what changed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.datasets.tokens import TokenSplit
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.sae.files import SavedSae

STEER_PARTS = {"generate": (0.0, 0.9), "measure": (0.9, 1.0)}


@dataclass(frozen=True)
class Steer:
    """Continue a prompt without and with features added.

    `features`: [[feature, strength], ...], strength in multiples of the feature's largest
    activation. `scales` are the variants generated beside the unsteered one: each multiplies all
    strengths.
    """

    sae_id: int
    features: list[list[float]]
    prompt: str
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 60
    seed: int = 0
    chat: bool = False
    scales: tuple[float, ...] = (1.0,)

    kind: ClassVar[str] = "steer"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("generate", 20))

    def title(self, library: Library) -> str:
        names = ", ".join(f"#{int(feature)} x {strength:g}" for feature, strength in self.features)
        return f"Steer with {names}"

    def run(self, context: JobContext) -> dict[str, Any]:
        sae = context.library.saes.get(self.sae_id)
        model = loaded_model(context.library, sae.model_id, Stage(context, "load model"))
        result = steer(context.library, self, model, Stage(context, "generate", STEER_PARTS))
        generation_id = context.library.generations.add(
            sae_id=self.sae_id, request=asdict(self), result=result
        )
        return {"generation_id": generation_id}


def steer(library: Library, job: Steer, model: HookedDecoder, progress: Progress) -> dict[str, Any]:
    """Generate and measure. The result is plain JSON: `unsteered`, and per scale a `variants`
    entry with `text`, `coefficients`, `percent_of_norm` and the effect's measures."""
    import torch

    from mistudio.engine.models import loading
    from mistudio.engine.sae.files import load_sae
    from mistudio.engine.steering.generation import Sampling, encode_prompt, generate
    from mistudio.engine.steering.interventions import adding, steering_vector
    from mistudio.engine.steering.metrics import steering_effect

    if not job.features:
        raise InvalidInput(
            "No feature chosen", next_step="Add at least one feature.", field="features"
        )
    sae = library.saes.get(job.sae_id)
    store, tokens = open_features(library, newest_run(library, job.sae_id))
    saved = load_sae(library.path(sae.folder))
    point = saved.site.output  # where decoder rows are directions: what a transcoder writes to
    dictionary = saved.dictionary.to(model.device)
    edits = [_edit(store.columns["max_activation"], f, s) for f, s in job.features]
    median = _median_norm(model, tokens, saved)
    vector = steering_vector(dictionary, edits)
    if dictionary.norm == "layer_norm":
        # Its decoder speaks of normalised activations: in raw ones it is multiplied by a token's
        # standard deviation, of which the median norm over sqrt(d) is the usual size.
        vector = vector * (median / dictionary.d_out**0.5)
    vectors = torch.stack([vector * scale for scale in job.scales])
    tokenizer = loading.load_tokenizer(library.path(library.models.get(sae.model_id).folder))
    special = sorted(loading.special_ids(tokenizer))
    prompt_ids = encode_prompt(tokenizer, job.prompt, job.chat)
    sampling = Sampling(job.temperature, job.top_p, job.max_new_tokens, job.seed)
    began = time.monotonic()
    generated = generate(
        model,
        tokenizer,
        prompt_ids,
        [adding(point, vector) for vector in vectors],
        sampling,
        special_ids=special,
        stop_ids=_stop_ids(model, tokenizer),
        progress=progress,
    )
    seconds = time.monotonic() - began
    unsteered = generated.rows[0]
    variants = []
    for number, (scale, row) in enumerate(zip(job.scales, generated.rows[1:], strict=True)):
        progress.report(number, len(job.scales), phase="measure")
        effect = steering_effect(
            model,
            adding(point, vectors[number]),
            prompt_ids,
            unsteered.ids,
            row.ids,
            unsteered.text,
            row.text,
            special,
        )
        variants.append(
            {
                "scale": scale,
                "text": row.text,
                "ids": row.ids,
                "pieces": [tokenizer.decode([token]) for token in row.ids],
                "coefficients": [edit.coefficient * scale for edit in edits],
                "percent_of_norm": 100.0 * float(vectors[number].norm()) / median,
                **effect.as_dict(),
            }
        )
    return {
        "prompt": job.prompt,
        "hook_point": point.name,
        "precision": precision_of(model),
        "unsteered": unsteered.text,
        "unsteered_ids": unsteered.ids,
        "unsteered_pieces": [tokenizer.decode([token]) for token in unsteered.ids],
        "variants": variants,
        "median_norm": median,
        "seconds": seconds,
        "tokens_per_second": sum(len(row.ids) for row in generated.rows) / max(seconds, 1e-9),
    }


def _edit(max_activations: Any, feature: float, strength: float) -> Any:
    from mistudio.engine.steering.interventions import FeatureEdit

    index = int(feature)
    known = 0 <= index < len(max_activations)
    # An index outside the SAE gets its clear refusal from `steering_vector`.
    return FeatureEdit(index, float(strength), float(max_activations[index]) if known else 1.0)


def _stop_ids(model: HookedDecoder, tokenizer: Any) -> set[int]:
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _median_norm(model: HookedDecoder, tokens: TokenSplit, saved: SavedSae) -> float:
    """The median activation norm where steering acts: from the run's record, else measured."""
    from mistudio.engine.activations.source import calibrate_medians

    recorded = saved.record.get("metrics", {}).get("median_norm")  # of what the SAE reads
    if recorded and not saved.site.is_transcoder:
        return float(recorded)
    context = int(saved.metadata.get("context_size", 128))
    point = saved.site.output
    return calibrate_medians(model, tokens, (point,), context)[point]
