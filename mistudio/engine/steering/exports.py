"""A steering taken elsewhere: as a control vector of llama.cpp, as tensors, as a Python program.

Only what adds fixed vectors to the residual stream can leave: other interventions need the SAE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.steering.generation import Sampling
from mistudio.engine.steering.interventions import (
    Scope,
    SiteSteering,
    Variant,
    steering_vector,
)
from mistudio.errors import Incompatible


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
            "Choose “add” for every feature, or export the preset instead.",
        )
    found: dict[HookPoint, Tensor] = {}
    for site in variant.sites:
        vector = _vector_of(site).float().cpu()
        point = site.site.output
        found[point] = found[point] + vector if point in found else vector
    return {point: vector for point, vector in found.items() if bool(vector.any())}


def _vector_of(site: SiteSteering) -> Tensor:
    total: Tensor | None = site.vector
    if site.edits:
        assert site.dictionary is not None
        vector = site.gain * steering_vector(site.dictionary, site.edits)
        total = vector if total is None else total.to(vector.device) + vector
    return torch.zeros(1) if total is None else total


def write_control_vector(path: Path, variant: Variant, model_type: str, n_layers: int) -> None:
    """A GGUF file for llama.cpp's `--control-vector` (arch "controlvector", as repeng writes).

    `direction.N` is added to the output of block N, N from 1 on: llama.cpp has none for block 0.
    It adds at every position, also at position 0, which miStudio leaves alone.
    Raises Incompatible where a vector is not at the output of such a block.
    """
    import gguf

    vectors = added_vectors(variant)
    unfit = [point.name for point in vectors if point.site != "resid_post" or point.layer == 0]
    if unfit or not vectors:
        raise Incompatible(
            "llama.cpp has no place for this steering",
            f"It adds at {', '.join(unfit)}." if unfit else "It adds nothing.",
            "Control vectors act on the residual stream after block 1 and later ones.",
        )
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "controlvector")
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", n_layers)
    for point in sorted(vectors):
        writer.add_tensor(f"direction.{point.layer}", vectors[point].numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _keep(part, path)


def write_tensors(path: Path, variant: Variant, about: Mapping[str, str]) -> None:
    """A safetensors file: one float32 [d] tensor by hook point name; `about` as its metadata."""
    from safetensors.torch import save_file

    vectors = {point.name: vector for point, vector in added_vectors(variant).items()}
    part = path.with_name(path.name + ".part")
    save_file(vectors, part, metadata=dict(about))
    _keep(part, path)


def write_neuronpedia_vector(path: Path, variant: Variant, model_id: str, label: str) -> None:
    """Neuronpedia's vector file, {model, hook, vector, label, strength}: one hook point."""
    vectors = added_vectors(variant)
    if len(vectors) != 1:
        raise Incompatible(
            "Neuronpedia's vectors act at one place",
            f"This steering adds at {len(vectors)} places.",
            "Export it as safetensors, or steer one layer.",
        )
    ((point, vector),) = vectors.items()
    found = {
        "modelId": model_id,
        "hookName": point.name,
        "layer": point.layer,
        "vectorLabel": label,
        "vectorDefaultSteerStrength": 1.0,
        "vector": vector.tolist(),
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    _keep(part, path)


def _keep(part: Path, path: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def python_program(
    variant: Variant,
    *,
    model: str,
    module_paths: Mapping[HookPoint, str],
    prompt_ids: Sequence[int],
    special_ids: Sequence[int],
    stop_ids: Collection[int],
    sampling: Sampling,
    scope: Scope | None = None,
    revision: str = "",
    vectors: str = "steering.safetensors",
    precision: str = "float32",
) -> str:
    """A Python program that continues the prompt as this steered row did, with torch, transformers
    and safetensors alone. It reads the vectors from the file that `write_tensors` writes."""
    points = {point.name: module_paths[point] for point in added_vectors(variant)}
    values: dict[str, Any] = {
        "MODEL": model,
        "REVISION": revision or None,
        "DTYPE": precision,
        "VECTORS": vectors,
        "MODULES": points,
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
    return _PROGRAM.replace("# VALUES", head)


# Kept apart from the engine on purpose: it must run where miStudio is not installed.
_PROGRAM = '''"""Steered text without miStudio: pip install torch transformers safetensors"""

import math

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# VALUES

tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, revision=REVISION, dtype=getattr(torch, DTYPE)
).eval()
vectors = load_file(VECTORS)
mask = None


def steer(vector):
    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed = (hidden.float() + mask[:, :, None] * vector).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


for name, path in MODULES.items():
    model.get_submodule(path).register_forward_hook(steer(vectors[name]))


def draw(logits, noise):
    if TEMPERATURE == 0:
        return int(logits.argmax())
    scaled = logits / TEMPERATURE
    if 0 < TOP_K < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(TOP_K).values[-1], -math.inf)
    if TOP_P < 1:
        probabilities, order = scaled.softmax(0).sort(descending=True)
        beyond = probabilities.cumsum(0) - probabilities >= TOP_P
        scaled = scaled.masked_fill(beyond[order.argsort()], -math.inf)
    uniform = torch.rand(len(logits), generator=noise, dtype=torch.float64)
    gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
    return int((scaled + gumbel.to(scaled)).argmax())


def steered(fed, first):
    """Which of the tokens, the first of them at an absolute position, are steered."""
    places = torch.arange(first, first + fed.shape[1])
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
made, fed, cache, position = [], torch.tensor([PROMPT]), None, 0
with torch.inference_mode():
    for step in range(NEW_TOKENS):
        mask = steered(fed, position)
        position += fed.shape[1]
        out = model(fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[0, -1].float()
        if PENALTY != 1.0:
            seen = torch.tensor(sorted({*PROMPT, *made}))
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / PENALTY, values * PENALTY)
        token = draw(logits, noise)
        if token in STOP:
            break
        made.append(token)
        fed = torch.tensor([[token]])
print(tokenizer.decode(made))
'''
