"""A steering as a file for others: llama.cpp, Neuronpedia, anything that reads tensors, Python."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.errors import Incompatible, InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.stages import Stage
from mistudio.jobs.steering import Recipe, Steer, stop_ids
from mistudio.library.library import Library
from mistudio.library.records import Model

if TYPE_CHECKING:
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.steering.interventions import Variant

# By format: how its file name ends.
SUFFIXES = {
    "gguf": ".gguf",
    "neuronpedia": ".json",
    "safetensors": ".safetensors",
    "python": ".py",
}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SCOPES = {
    "all": "the prompt's tokens and the generated ones",
    "generated": "the generated tokens alone",
    "from_last": "the tokens from the prompt's last one on",
    "last": "the prompt's last token alone",
    "chosen": "chosen tokens of the prompt",
}
NOT_FIRST = "The first position and special tokens were left as they are."


@dataclass(frozen=True)
class ExportVector:
    """Write what a steering adds to the model to the file `path`, in one of `SUFFIXES`' formats;
    what was at that place is replaced. `request` are the fields of a `jobs/steering.Steer`, as a
    generation keeps them; its strengths are multiplied by `scale`.

    "python" writes a program that repeats the generation without miStudio, whatever it does to the
    features, and what it needs of the dictionaries beside it (`NAME.py.safetensors`). The other
    formats hold vectors: refused is what is more than adding, and where the format has no place for
    it. The result has `files`, and `notes`, sentences on where the file says less than was done
    here."""

    request: dict[str, Any]
    path: str
    format: str = "gguf"
    scale: float = 1.0

    kind: ClassVar[str] = "export_vector"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("export", 1))

    def title(self, library: Library) -> str:
        return f"Export a steering vector to {Path(self.path).name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        library = context.library
        path = _checked(self)
        job = _steer(self.request)
        sae = library.saes.get(job.sae_id)
        record = library.models.get(sae.model_id)
        if self.format == "python" and record.provenance.get("code"):
            raise Incompatible(
                "This model brings its own program",
                "A Python program would have to run that without asking.",
                "Export the vectors alone, or the preset.",
            )
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        context.report(0, 1, phase="export")
        done = _write(library, job, self, path, model, record)
        notes = list(done.notes)
        if len(job.scales) > 1:
            notes.append(f"Of the strengths side by side it holds × {self.scale:g}.")
        return {"files": [str(file) for file in done.files], "notes": notes}


@dataclass(frozen=True)
class _Written:
    """The files, and what their user must know, as sentences."""

    files: list[Path]
    notes: tuple[str, ...] = ()


def _checked(job: ExportVector) -> Path:
    if job.format not in SUFFIXES:
        raise InvalidInput(
            "No such format",
            f"“{job.format}” was asked for.",
            f"Choose one of {', '.join(SUFFIXES)}.",
            field="format",
        )
    path = Path(job.path).expanduser()
    if not path.is_absolute() or not path.parent.is_dir() or path.is_dir():
        raise InvalidInput(
            "The file cannot be written there",
            f"{path} is a folder." if path.is_dir() else f"There is no folder {path.parent}.",
            "Choose a file in a folder that exists.",
            field="path",
        )
    return path


def _steer(request: dict[str, Any]) -> Steer:
    from mistudio.jobs.kinds import job_from_row

    try:
        job = job_from_row("steer", {"prompt": "", **request})
    except TypeError as exc:
        raise InvalidInput(
            "This is not a steering", "It names no SAE or no features.", "Choose a generation."
        ) from exc
    assert isinstance(job, Steer)
    return job


def _write(
    library: Library,
    job: Steer,
    asked: ExportVector,
    path: Path,
    model: HookedDecoder,
    record: Model,
) -> _Written:
    from mistudio.engine.steering import exports

    recipe = Recipe(library, job, model)
    variant = recipe.at(asked.scale).variant
    if variant.is_neutral:
        raise Incompatible(
            "This steering adds nothing",
            "Every strength leaves the text as it is.",
            "Choose a strength first.",
        )
    about = _about(library, job, asked.scale, record)
    if asked.format == "python":
        return _write_program(job, recipe, variant, path, model, record, about)
    if asked.format == "safetensors":
        exports.write_tensors(path, variant, about)
        return _Written([path], (f"Steered were {_SCOPES.get(job.scope, job.scope)}.", NOT_FIRST))
    if job.scope != "all":
        raise Incompatible(
            "The file cannot say where to steer",
            "Such a vector acts at every token; this steering acts at some alone.",
            "Steer prompt and generated tokens, or export a Python program.",
        )
    if asked.format == "gguf":
        model_type = str(model.model.config.model_type)
        exports.write_control_vector(path, variant, model_type, about)
        how = f"Use it with --control-vector {path.name}."
    else:
        name = (record.origin if record.source == "hub" else record.name).rpartition("/")[2].lower()
        exports.write_neuronpedia_vector(path, variant, name, about["features"], model.n_layers)
        how = f"Check that Neuronpedia calls the model “{name}”."
    return _Written([path], (how, exports.EVERY_POSITION, *_cost(job, recipe, variant, model)))


def _cost(job: Steer, recipe: Recipe, variant: Variant, model: HookedDecoder) -> list[str]:
    """How much that matters for this prompt, as a sentence; none without a prompt."""
    from mistudio.engine.steering import exports
    from mistudio.engine.steering.generation import encode_prompt

    if not job.prompt.strip():
        return []
    tokenizer, special = recipe.tokenizer()
    prompt_ids = encode_prompt(tokenizer, job.prompt, job.chat)
    cost = exports.cost_of_every_position(model, variant, prompt_ids, special)
    if cost is None:
        return []
    return [
        f"For this prompt that changes the next token's probabilities by {cost[0]:.2g} nats a "
        f"token (KL); the steering itself changes them by {cost[1]:.2g}."
    ]


def _write_program(
    job: Steer,
    recipe: Recipe,
    variant: Variant,
    path: Path,
    model: HookedDecoder,
    record: Model,
    about: dict[str, str],
) -> _Written:
    from mistudio.engine.steering import exports
    from mistudio.engine.steering.generation import Sampling, encode_prompt
    from mistudio.engine.steering.interventions import Scope

    precision = precision_of(model)
    if precision not in _DTYPES:
        raise Incompatible(
            "A quantised model cannot be repeated by a short program",
            f"The model is loaded in {precision.upper()}.",
            "Load it unquantised, or export the vectors alone.",
        )
    hub = record.source == "hub"
    sampling = Sampling(
        job.temperature, job.top_p, job.max_new_tokens, job.seed, job.top_k, job.repetition_penalty
    )
    sampling.check()
    tokenizer, special = recipe.tokenizer()
    prompt_ids = encode_prompt(tokenizer, job.prompt, job.chat)
    scope = Scope(job.scope, tuple(job.positions))
    scope.check(len(prompt_ids))
    # A name of its own: `steering.safetensors` may be the user's.
    beside = path.with_name(f"{path.name}.safetensors")
    program = exports.python_program(
        variant,
        model=record.origin if hub else str(recipe.model_path),
        revision=str(record.provenance.get("revision", "")) if hub else "",
        module_paths=model.module_path,
        prompt_ids=prompt_ids,
        special_ids=special,
        stop_ids=stop_ids(model, tokenizer),
        sampling=sampling,
        scope=scope,
        vectors=beside.name,
        precision=_DTYPES[precision],
    )
    exports.save_tensors(beside, program.tensors, about)
    exports.save_text(path, program.text)
    notes = [f"{path.name} reads {beside.name}: keep them together."]
    if not hub:
        notes.append("It reads the model from this library's folder.")
    if model.device.type != "cpu":
        notes.append("It runs on the processor, where rounding can change a word.")
    elif precision != "fp32" and (len(job.scales) > 1 or job.control):
        notes.append(f"It writes two texts at a time: in {precision} rounding can change a word.")
    return _Written([path, beside], tuple(notes))


def _about(library: Library, job: Steer, scale: float, record: Model) -> dict[str, str]:
    """What the vectors are, as texts for a file's metadata."""
    chosen = [(job.sae_id, *entry) for entry in job.features]
    chosen += [tuple(entry) for entry in job.others]
    names = []
    for sae_id, feature, strength, *method in chosen:
        sae = library.saes.get(int(sae_id))
        way = f" {method[0]}" if method and method[0] != "add" else ""
        times = f"{way} x {float(strength) * scale:g}"
        names.append(f"#{int(feature)} of {sae.hook_point_out}{times}")
    return {
        "format": "mistudio-steering-1",
        "model": record.origin if record.source == "hub" else record.name,
        "revision": str(record.provenance.get("revision", "")),
        "features": ", ".join(names),
        "layers": json.dumps(list(job.layers)),
        "scope": job.scope,
        "positions": f"Steered were {_SCOPES.get(job.scope, job.scope)}. {NOT_FIRST}",
    }
