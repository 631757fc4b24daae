"""A steering taken elsewhere: as a control vector of llama.cpp, as tensors, as a vector of
Neuronpedia, as a Python program.

Only what adds fixed vectors can leave as vectors. The program repeats every intervention: it takes
along what it needs of the dictionaries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.sae.activation import Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.steering.generation import Sampling
from mistudio.engine.steering.interventions import (
    READS_ACTIVATION,
    Scope,
    SiteSteering,
    Steering,
    Variant,
    steering_vector,
)
from mistudio.errors import Incompatible

# What such a file cannot say; in its metadata and to the user.
EVERY_POSITION = (
    "It is added at every position. miStudio leaves the first position and special tokens as they "
    "are, so the texts can differ, the more the stronger the steering."
)
MEASURED_TOKENS = 128
NEURONPEDIA_WIDEST = 24_576  # numbers in a vector that its API takes
# Sites that are the input of a module; the others are outputs.
INPUTS = ("resid_pre", "mlp_in")


def added_vectors(variant: Variant) -> dict[HookPoint, Tensor]:
    """What a variant adds at each hook point, float32 [d] on the CPU. Raises Incompatible where it
    does something else than adding."""
    others = sorted({e.method for site in variant.sites for e in site.edits if e.method != "add"})
    if variant.keep_norm:
        others.append("keep norm")
    if others or variant.control is not None:
        raise Incompatible(
            "This steering is more than a vector",
            f"It uses {', '.join(others) or 'a random control'}, which depends on the text.",
            "Choose “add” for every feature, or export a Python program or the preset instead.",
        )
    found: dict[HookPoint, Tensor] = {}
    for site in variant.sites:
        vector = _vector_of(site).float().cpu()
        point = site.site.output
        found[point] = found[point] + vector if point in found else vector
    return {point: vector for point, vector in found.items() if bool(vector.any())}


def _vector_of(site: SiteSteering) -> Tensor:
    """What is added whatever the activation; a zero where nothing is."""
    total: Tensor | None = site.vector
    plain = [edit for edit in site.edits if edit.method == "add"]
    if plain:
        assert site.dictionary is not None
        vector = site.gain * steering_vector(site.dictionary, plain)
        total = vector if total is None else total.to(vector.device) + vector
    return torch.zeros(1) if total is None else total


@torch.inference_mode()
def cost_of_every_position(
    model: HookedDecoder, variant: Variant, prompt_ids: Sequence[int], special_ids: Sequence[int]
) -> tuple[float, float] | None:
    """What it costs to add at every position, as others do: (KL of that, KL of the unsteered model)
    from steering as here, in nats a token, means over the prompt's first 128 tokens without
    position 0. None for a prompt of one token."""
    ids = torch.tensor([list(prompt_ids)[:MEASURED_TOKENS]], device=model.device)
    if ids.shape[1] < 2:
        return None
    vectors = {p: v.to(model.device) for p, v in added_vectors(variant).items()}

    def adder(vector: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: (x.float() + vector).to(x.dtype)

    def logs() -> Tensor:
        logits: Tensor = model.model(ids).logits
        return logits[0, 1:].float().log_softmax(1)

    unsteered = logs()
    with model.intervene({point: adder(vector) for point, vector in vectors.items()}):
        everywhere = logs()
    steering = Steering(model, [variant], special_ids, ids.shape[1])
    steering.expect(ids, 0)
    with model.intervene(steering.edits()):
        here = logs()
    distances = [((here.exp() * (here - other)).sum(1)).mean() for other in (everywhere, unsteered)]
    return float(distances[0]), float(distances[1])


# --- vectors --------------------------------------------------------------------------------------


def write_control_vector(
    path: Path, variant: Variant, model_type: str, about: Mapping[str, str] | None = None
) -> None:
    """A GGUF file for llama.cpp's `--control-vector` (arch "controlvector", as its own
    cvector-generator and repeng write it; `controlvector.layer_count` is the number of directions).

    `direction.N` is added to the output of block N, counted from 0. llama.cpp has none for block 0
    and refuses a file with one (`common_control_vector_load_one`; `llama_adapter_cvec`). The stream
    before block N is that after block N - 1. `about` goes into the metadata under `mistudio.`, and
    `general.description` says where llama.cpp steers otherwise. Raises Incompatible where a vector
    is not in the residual stream after such a block.
    """
    import gguf

    directions: dict[int, Tensor] = {}
    unfit = []
    for point, vector in added_vectors(variant).items():
        block = _block_before(point)
        if block is None or block < 1:
            unfit.append(point.name)
        else:
            directions[block] = directions.get(block, 0) + vector
    if unfit or not directions:
        raise Incompatible(
            "llama.cpp has no place for this steering",
            f"It adds at {', '.join(unfit)}." if unfit else "It adds nothing.",
            "Control vectors act on the residual stream after block 1 and later ones, counted "
            "from 0. Export safetensors or a Python program instead.",
        )

    def write(part: Path) -> None:
        writer = gguf.GGUFWriter(part, "controlvector")
        try:
            writer.add_string("controlvector.model_hint", model_type)
            writer.add_uint32("controlvector.layer_count", len(directions))
            writer.add_description(EVERY_POSITION)
            for name, text in (about or {}).items():
                writer.add_string(f"mistudio.{name}", text)
            for block in sorted(directions):
                writer.add_tensor(f"direction.{block}", directions[block].numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    _put(path, write)


def _block_before(point: HookPoint) -> int | None:
    """The block whose output the point is; None where it is none's."""
    if point.site == "resid_pre":
        return point.layer - 1
    return point.layer if point.site == "resid_post" else None


def write_tensors(path: Path, variant: Variant, about: Mapping[str, str]) -> None:
    """A safetensors file: one float32 [d] tensor by hook point name; `about` as its metadata."""
    save_tensors(path, {point.name: v for point, v in added_vectors(variant).items()}, about)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """A safetensors file, complete or not at all."""
    from safetensors.torch import save_file

    _put(path, lambda part: save_file(dict(tensors), part, metadata=dict(about)))


def write_neuronpedia_vector(
    path: Path, variant: Variant, model_id: str, label: str, n_layers: int
) -> None:
    """What Neuronpedia's `POST /api/vector/new` takes. Its only hook type is the residual stream
    before a block, which is that after the block before; strength 1 adds what was added here.

    Raises Incompatible where that is not one vector at such a place.
    """
    vectors = added_vectors(variant)
    if len(vectors) != 1:
        raise Incompatible(
            "Neuronpedia's vectors act at one place",
            f"This steering adds at {len(vectors)} places.",
            "Export it as safetensors, or steer one layer.",
        )
    ((point, vector),) = vectors.items()
    before = _block_before(point)
    if before is None or before + 1 >= n_layers or len(vector) > NEURONPEDIA_WIDEST:
        raise Incompatible(
            "Neuronpedia has no place for this vector",
            f"It is added at {point.name}. Neuronpedia's vectors of at most "
            f"{NEURONPEDIA_WIDEST:,} numbers act on the residual stream before a block.",
            "Export it as safetensors, or steer the stream after another block.",
        )
    found = {
        "modelId": model_id,
        "layerNumber": before + 1,
        "hookType": "hook_resid_pre",
        "vector": vector.tolist(),
        "vectorDefaultSteerStrength": 1.0,
        "vectorLabel": label,
    }
    save_text(path, json.dumps(found))


def save_text(path: Path, text: str) -> None:
    """A UTF-8 file, complete or not at all."""
    _put(path, lambda part: part.write_text(text, encoding="utf-8"))


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the target, flush, rename: a failure leaves what was there."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- a program ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """`text` reads `tensors` from the safetensors file that it names, which lies beside it."""

    text: str
    tensors: dict[str, Tensor]


def python_program(
    variant: Variant,
    *,
    model: str,
    module_paths: Callable[[HookPoint], str],
    prompt_ids: Sequence[int],
    special_ids: Sequence[int],
    stop_ids: Collection[int],
    sampling: Sampling,
    scope: Scope | None = None,
    revision: str = "",
    vectors: str = "steering.safetensors",
    precision: str = "float32",
) -> Program:
    """A Python program that continues the prompt as the unsteered row and this steered one did, and
    prints both texts, with torch, transformers and safetensors alone. `module_paths` gives the
    module that carries a hook point.

    Raises Incompatible for a random control.
    """
    if variant.control is not None:
        raise Incompatible(
            "The random control cannot be exported",
            "Its direction is drawn while the text is written.",
            "Export the steering itself.",
        )
    points, tensors = _points_of(variant, module_paths)
    values: dict[str, Any] = {
        "MODEL": model,
        "REVISION": revision or None,
        "DTYPE": precision,
        "VECTORS": vectors,
        "POINTS": points,
        "KEEP_NORM": variant.keep_norm,
        "PROMPT": list(prompt_ids),
        "NEVER": sorted(special_ids),
        "STOP": sorted(stop_ids),
        "SCOPE": scope.kind if scope else "all",
        "CHOSEN": list(scope.positions) if scope else [],
        "TEMPERATURE": sampling.temperature,
        "TOP_K": sampling.top_k,
        "TOP_P": sampling.top_p,
        "PENALTY": sampling.repetition_penalty,
        "NEW_TOKENS": sampling.max_new_tokens,
        "SEED": sampling.seed,
    }
    head = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    edits = any(entry["edits"] for entry in points)
    text = _PROGRAM.replace("# CHANGES\n", _EDITED if edits else _ADDED)
    return Program(text.replace("# VALUES", head), tensors)


def _points_of(
    variant: Variant, path: Callable[[HookPoint], str]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """By output point: its module, what is added there and what else is done, as plain values, and
    the tensors that those name."""
    found: dict[HookPoint, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for number, site in enumerate(variant.sites):
        point = site.site.output
        entry = found.setdefault(point, {"name": point.name, **_place(point, path), "edits": []})
        vector = _vector_of(site).float().cpu()
        if bool(vector.any()):
            before = tensors.get(point.name)
            tensors[point.name] = vector if before is None else before + vector
        if any(edit.method != "add" for edit in site.edits):
            entry["edits"].append(_edits_of(str(number), site, tensors, path))
    points = [found[point] for point in sorted(found)]
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return [entry for entry in points if entry["edits"] or entry["name"] in plain], plain


def _place(point: HookPoint, path: Callable[[HookPoint], str]) -> dict[str, Any]:
    return {"path": path(point), "input": point.site in INPUTS}


def _edits_of(
    key: str, site: SiteSteering, tensors: dict[str, Tensor], path: Callable[[HookPoint], str]
) -> dict[str, Any]:
    """A site's edits that are more than adding, and their part of the dictionary."""
    assert site.dictionary is not None
    edits = [edit for edit in site.edits if edit.method != "add"]
    chosen = torch.tensor([e.feature for e in edits], device=site.dictionary.device)
    tensors[f"{key}.rows"] = (site.gain * site.dictionary.decoder[chosen].float()).cpu()
    found: dict[str, Any] = {
        "key": key,
        "does": [(edit.method, edit.strength, edit.coefficient) for edit in edits],
    }
    if any(edit.method in READS_ACTIVATION for edit in edits):
        found |= _encoder_of(key, site.dictionary, chosen, tensors)
        found["gain"] = site.gain
        if site.site.is_transcoder:
            found["reads"] = _place(site.site.input, path)
    return found


def _encoder_of(
    key: str, dictionary: Dictionary, chosen: Tensor, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """What `Dictionary.activations` needs: of the chosen latents alone, of all for TopK."""
    activation = dictionary.activation
    k = activation.k if isinstance(activation, TopK) else 0
    alone = not k
    encoder = dictionary.encoder[chosen] if alone else dictionary.encoder
    bias = dictionary.b_enc[chosen] if alone else dictionary.b_enc
    centre = dictionary.b_dec if dictionary.centre is None else dictionary.centre
    kept = {"encoder": encoder, "bias": bias, "centre": centre}
    match activation:
        case JumpReLU():
            kept["threshold"] = activation.threshold[chosen]
        case Gated():
            kept |= {"gain": activation.gain[chosen], "offset": activation.offset[chosen]}
        case TopK() | ReLU():
            pass
        case _:
            raise Incompatible(
                "This SAE's activation function has no place in a short program",
                f"It is called {activation.name}.",
                "Choose “add”, or export the SAE itself.",
            )
    tensors |= {f"{key}.{name}": value.float().cpu() for name, value in kept.items()}
    return {
        "k": k,
        "latents": [] if alone else chosen.tolist(),
        "norm": dictionary.norm,
        "scale": dictionary.scale,
    }


# Kept apart from the engine on purpose: it must run where miStudio is not installed. It writes the
# unsteered row too: in half precision a batch of two rounds otherwise than one row alone.
_PROGRAM = '''"""Steered text without miStudio: pip install torch transformers safetensors"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# VALUES

tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, revision=REVISION, dtype=getattr(torch, DTYPE)
).eval()
vectors = load_file(Path(__file__).with_name(VECTORS))
mask = None  # bool [tokens]: which tokens of this pass are steered


def hook(path, at_input, change):
    def before(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(module, args, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module = model.get_submodule(path)
    if at_input:
        module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        module.register_forward_hook(after)


# CHANGES
def steer(point):
    def change(hidden):
        unsteered, plain = hidden.reshape(2, -1, hidden.shape[-1])  # [tokens, d] each
        x = plain.float()
        changed = x + delta(point, x) * mask[:, None]
        if KEEP_NORM:
            changed = changed * (x.norm(dim=1) / changed.norm(dim=1).clamp_min(1e-12))[:, None]
        changed = torch.where(mask[:, None], changed.to(plain.dtype), plain)
        return torch.stack([unsteered, changed]).reshape(hidden.shape)

    return change


for point in POINTS:
    hook(point["path"], point["input"], steer(point))
# Half precision is slow, and rounds otherwise, where the last position is a slice.
model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))


def draw(logits, noise):
    """A token for each row of logits [2, vocabulary]; both rows share the noise."""
    if TEMPERATURE == 0:
        return logits.argmax(1)
    scaled = logits / TEMPERATURE
    if 0 < TOP_K < scaled.shape[1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(TOP_K).values[:, -1:], -math.inf)
    if TOP_P < 1:
        probabilities, order = scaled.softmax(1).sort(1, descending=True)
        beyond = probabilities.cumsum(1) - probabilities >= TOP_P
        scaled = scaled.masked_fill(beyond.gather(1, order.argsort(1)), -math.inf)
    uniform = torch.rand(logits.shape[1], generator=noise, dtype=torch.float64)
    gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
    return (scaled + gumbel.to(scaled)).argmax(1)


def steered(fed, first):
    """Which of the tokens [n], the first of them at an absolute position, are steered."""
    places = torch.arange(first, first + len(fed))
    scope = {
        "all": places > 0,
        "generated": places >= len(PROMPT),
        "from_last": places >= len(PROMPT) - 1,
        "last": places == len(PROMPT) - 1,
        "chosen": torch.isin(places, torch.tensor(CHOSEN, dtype=torch.long)),
    }[SCOPE]
    # Position 0 and special tokens never are.
    return ~torch.isin(fed, torch.tensor(NEVER, dtype=torch.long)) & scope & (places > 0)


noise = torch.Generator().manual_seed(SEED)
made, ended = ([], []), [False, False]  # of the unsteered row and of the steered one
fed, cache, position = torch.tensor([PROMPT, PROMPT]), None, 0
with torch.inference_mode():
    for step in range(NEW_TOKENS):
        mask = steered(fed[1], position)
        position += fed.shape[1]
        out = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits = out.logits[:, -1].float()
        if PENALTY != 1.0:
            for row, tokens in enumerate(made):
                seen = torch.tensor(sorted({*PROMPT, *tokens}))
                values = logits[row, seen]
                logits[row, seen] = torch.where(values > 0, values / PENALTY, values * PENALTY)
        chosen = draw(logits, noise)
        for row, token in enumerate(chosen.tolist()):
            ended[row] = ended[row] or token in STOP
            if not ended[row]:
                made[row].append(token)
        fed = chosen[:, None]
        if all(ended):
            break
for name, tokens in zip(("Unsteered", "Steered"), made, strict=True):
    print(f"--- {name}", tokenizer.decode(tokens), sep=chr(10))
'''

_ADDED = """def delta(point, x):
    return vectors[point["name"]]


"""

_EDITED = '''def activations(site, x):
    """How much the features are active, [tokens, n], for what their dictionary reads."""
    part = {name: vectors[f"{site['key']}.{name}"] for name in ("encoder", "bias", "centre")}
    if site["norm"] != "none":
        x = x - x.mean(dim=1, keepdim=True)
    if site["norm"] == "layer_norm":
        x = x / (x.std(dim=1, keepdim=True) + 1e-5)
    pre = torch.addmm(part["bias"], x * site["scale"] - part["centre"], part["encoder"].T)
    if site["k"]:
        values, latents = pre.topk(site["k"], dim=1)
        return torch.zeros_like(pre).scatter(1, latents, values.clamp_min(0))[:, site["latents"]]
    threshold = vectors.get(f"{site['key']}.threshold", torch.zeros(()))
    found = pre
    if f"{site['key']}.gain" in vectors:
        found = torch.addcmul(vectors[f"{site['key']}.offset"], pre, vectors[f"{site['key']}.gain"])
    active = (pre > threshold) & (pre > 0) & (found > 0)
    return torch.where(active, found, 0.0)


def amount(what, active, along, norm):
    """How often a feature's direction is added, [tokens]."""
    method, strength, coefficient = what
    if method == "clamp":
        return coefficient - active
    if method == "clamp_min":
        return (coefficient - active).clamp_min(0)
    if method == "scale":
        return (strength - 1) * active
    if method == "ablate":
        return -active
    if method == "orthogonal":
        return (strength - 1) * along / norm
    return (along.clamp_max(coefficient * norm) - along) / norm  # cap


def delta(point, x):
    total = torch.zeros_like(x)
    if point["name"] in vectors:
        total = total + vectors[point["name"]]
    for site in point["edits"]:
        rows = vectors[f"{site['key']}.rows"]
        norms = rows.norm(dim=1).clamp_min(1e-12)
        along = (x @ rows.T) / norms
        active = torch.zeros_like(along)
        if "norm" in site:
            active = activations(site, read.get(site["key"], x))
        amounts = [
            amount(what, active[:, i], along[:, i], norms[i])
            for i, what in enumerate(site["does"])
        ]
        if site.get("norm") == "layer_norm":  # decoding gives a token its own deviation back
            size = read.get(site["key"], x).std(dim=1) / site["gain"]
            amounts = [
                part * size if what[0] in ("clamp", "clamp_min", "scale", "ablate") else part
                for part, what in zip(amounts, site["does"], strict=True)
            ]
        total = total + torch.stack(amounts, dim=1) @ rows
    return total


read = {}  # what a dictionary reads elsewhere than where it steers


def remember(key):
    def keep(hidden):
        read[key] = hidden.reshape(2, -1, hidden.shape[-1])[1].float()
        return hidden

    return keep


for point in POINTS:
    for site in point["edits"]:
        if "reads" in site:
            hook(site["reads"]["path"], site["reads"]["input"], remember(site["key"]))


'''
