"""What a model is made of, told from config.json and the names and shapes of its tensors alone.

For models that bring their own program: describing them must not run it. What only the program
knows (where positions come in, which norm it is) is told where config.json says it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any

from mistudio.engine.models.architecture import Architecture, Block, Matrix
from mistudio.engine.models.loading import TensorInfo, is_parameter, plain_names
from mistudio.errors import CorruptFile, UnsupportedModel

_IN_BLOCK = re.compile(r"(.*?)\.?\b(\d+)\.(.+)")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight")
_UNKNOWN = "not told before it runs"


def describe_from_headers(
    raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Architecture:
    """Raises `CorruptFile` where configuration and tensors contradict each other,
    `UnsupportedModel` where no decoder blocks are seen in the names."""
    told = plain_names(raw)
    shapes = {name: info.shape for name, info in tensors.items() if is_parameter(name, info)}
    blocks = _blocks(shapes, told.get("num_hidden_layers"))
    inside = {name for block in blocks for name in block}
    embedding, head = _ends(shapes.keys() - inside, shapes, told)
    vocabulary, d_model = shapes[embedding]
    for key, found in (("vocab_size", vocabulary), ("hidden_size", d_model)):
        asked = told.get(key)
        if asked is not None and asked != found:
            raise CorruptFile(
                "The model's weights do not fit its configuration",
                f"config.json asks for {key} {asked:,}, its embedding {embedding} is "
                f"{vocabulary:,} x {d_model:,}.",
                "Download the model again.",
            )
    heads = int(told.get("num_attention_heads") or 0)
    d_mlp = _d_mlp(blocks[0], shapes, told, d_model)
    context = told.get("max_position_embeddings")
    counted = Counter(
        shapes[name] for name in inside if len(shapes[name]) == 2 and name.endswith(".weight")
    )
    names = raw.get("architectures")
    return Architecture(
        architecture=str(names[0]) if isinstance(names, list) and names else "its own",
        model_type=str(raw.get("model_type")),
        n_layers=len(blocks),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=int(told.get("num_key_value_heads") or heads),
        head_dim=int(told.get("head_dim") or (d_model // heads if heads else 0)),
        d_mlp=d_mlp,
        gated_mlp=sum(
            sorted(shapes[name]) == sorted((d_model, d_mlp))
            for name in blocks[-1]
            if not _is_attention(name)
        )
        >= 3,
        activation=str(told.get("hidden_act") or told.get("activation_function") or ""),
        experts=int(told.get("num_local_experts") or told.get("num_experts") or 0),
        norm="RMSNorm"
        if "rms_norm_eps" in told
        else "LayerNorm"
        if "layer_norm_eps" in told or "layer_norm_epsilon" in told
        else _UNKNOWN,
        positions="rotary"
        if any(told.get(k) for k in ("rope_theta", "rope_parameters", "rope_scaling"))
        else _UNKNOWN,
        context_length=int(context) if isinstance(context, int) else None,
        vocab_size=vocabulary,
        tied_embeddings=head is None,
        parameters=sum(prod(shape) for shape in shapes.values()),
        embedding_parameters=prod(shapes[embedding]),
        head_parameters=prod(shapes[head]) if head else 0,
        blocks=tuple(_block(index, block, shapes) for index, block in enumerate(blocks)),
        matrices=tuple(Matrix(out, into, count) for (out, into), count in sorted(counted.items())),
    )


def _blocks(shapes: Mapping[str, tuple[int, ...]], wanted: Any) -> list[list[str]]:
    """The names of each block's tensors: the numbered group that holds the most numbers."""
    groups: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in shapes:
        if match := _IN_BLOCK.fullmatch(name):
            groups[match[1]][int(match[2])].append(name)
    if not groups:
        raise UnsupportedModel(
            "The model has no layers that can be seen",
            "The names of its tensors are not numbered by layer.",
            "Choose a model that transformers supports itself.",
        )
    largest = max(
        groups.values(), key=lambda group: sum(prod(shapes[n]) for ns in group.values() for n in ns)
    )
    if sorted(largest) != list(range(len(largest))) or wanted not in (None, len(largest)):
        raise CorruptFile(
            "The model's weights do not fit its configuration",
            f"config.json asks for {wanted} layers; the files hold "
            f"{len(largest):,} (numbered up to {max(largest):,}).",
            "Download the model again.",
        )
    return [sorted(largest[index]) for index in range(len(largest))]


def _ends(
    outside: Any, shapes: Mapping[str, tuple[int, ...]], told: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The embedding and the output matrix; the latter None where it is the embedding itself."""
    flat = [name for name in sorted(outside) if len(shapes[name]) == 2]
    head = next((name for name in flat if name.endswith(_HEADS)), None)
    tables = [name for name in flat if name != head]
    fitting = [name for name in tables if shapes[name][0] == told.get("vocab_size")]
    if not tables:
        raise UnsupportedModel(
            "The model has no embedding that can be seen",
            "No matrix outside its layers has a row for each token.",
            "Choose a model that transformers supports itself.",
        )
    return max(fitting or tables, key=lambda name: prod(shapes[name])), head


def _d_mlp(
    block: list[str], shapes: Mapping[str, tuple[int, ...]], told: Mapping[str, Any], d_model: int
) -> int:
    for key in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(told.get(key), int) and told[key]:
            return int(told[key])
    sizes = [max(shapes[n]) for n in block if len(shapes[n]) == 2 and not _is_attention(n)]
    return max(sizes, default=4 * d_model)


def _is_attention(name: str) -> bool:
    return "attn" in name.lower() or "attention" in name.lower()


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or re.search(r"\bln", name.lower()) is not None


def _block(index: int, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Block:
    norms = [n for n in names if _is_norm(n) and len(shapes[n]) < 2]
    attention = [n for n in names if _is_attention(n) and n not in norms]
    whole = sum(prod(shapes[n]) for n in names)
    of_norms = sum(prod(shapes[n]) for n in norms)
    of_attention = sum(prod(shapes[n]) for n in attention)
    return Block(index, "block", whole, of_attention, whole - of_attention - of_norms, of_norms)
