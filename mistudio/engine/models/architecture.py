"""What a model is made of, from its configuration and its tree of modules without weights.

Works on a `config.json` alone, before any weight is downloaded: the tree is built on PyTorch's
meta device, which holds shapes and no numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.models.custom_code import needs_code
from mistudio.engine.models.loading import (
    QUANTISED,
    TensorInfo,
    parse_config,
    quiet_transformers,
    read_config,
    read_headers,
    refuse_foreign_code,
    refuse_other_kinds,
)
from mistudio.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    from torch import nn

FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SITES = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Block:
    """One decoder block: parameters in all, of its attention, its MLP (or experts), its norms."""

    index: int
    kind: str
    parameters: int
    attention: int
    mlp: int
    norms: int


@dataclass(frozen=True)
class Matrix:
    """`count` matrices [out, in] of the blocks that are quantised at Q8, Q4 and Q2."""

    out_features: int
    in_features: int
    count: int


@dataclass(frozen=True)
class Architecture:
    """Sizes are counts of channels, heads or tokens.

    `experts` is 0 where the MLP is one. `norm` is "RMSNorm" or "LayerNorm" (or the class's name),
    `positions` "rotary", "learned", "ALiBi" or "none found". `largest_block` counts parameters.
    """

    architecture: str
    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    gated_mlp: bool
    activation: str
    experts: int
    norm: str
    positions: str
    context_length: int | None
    vocab_size: int
    tied_embeddings: bool
    parameters: int
    embedding_parameters: int
    head_parameters: int
    blocks: tuple[Block, ...]
    matrices: tuple[Matrix, ...]

    @property
    def hook_points(self) -> tuple[tuple[str, tuple[str, str, int]], ...]:
        """(name, shape) of every site of one block, as the forward pass reaches them; the shape is
        ("batch", "tokens", channels)."""
        return tuple((site, ("batch", "tokens", self.d_model)) for site in SITES)

    @property
    def quantised_parameters(self) -> int:
        return sum(m.count * m.out_features * m.in_features for m in self.matrices)

    def weight_bytes(self, precision: str, compute: str = "bf16") -> int:
        """Of all weights at `precision`, "fp32" to "q2"; `compute` is what quantised models keep
        the rest in (`loading.compute_precision`). Shared weights count once."""
        if precision not in QUANTISED:
            return self.parameters * FLOAT_BYTES[precision]
        from mistudio.engine.models.quantise import stored_bytes

        total, rest = 0, self.parameters
        for matrix in self.matrices:
            stored = stored_bytes(precision, matrix.out_features, matrix.in_features)
            if stored is not None:
                total += matrix.count * stored
                rest -= matrix.count * matrix.out_features * matrix.in_features
        return total + rest * FLOAT_BYTES[compute]

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest matrix that is quantised, 0 where there is none."""
        return max((m.out_features * m.in_features for m in self.matrices), default=0)


def read_architecture(folder: Path) -> Architecture:
    """Of a model folder; its weights are not looked at, except the headers of a model that brings
    its own program, which is never run for this. Raises as `describe_architecture`."""
    raw = read_config(folder)
    if needs_code(raw):
        from mistudio.engine.models.from_headers import describe_from_headers

        return describe_from_headers(raw, read_headers(folder))
    return _from_config(raw)


def describe_architecture(
    config: bytes, tensors: Mapping[str, TensorInfo] | None = None
) -> Architecture:
    """Of a `config.json` as fetched. Raises `CorruptFile` or `UnsupportedModel` where no model can
    be built from it: `NeedsConsent` for one that brings its own program, unless `tensors` tells
    its names and shapes."""
    raw = parse_config(config)
    if tensors and needs_code(raw):
        from mistudio.engine.models.from_headers import describe_from_headers

        return describe_from_headers(raw, tensors)
    return _from_config(raw)


def _from_config(raw: dict[str, Any]) -> Architecture:
    import torch

    from mistudio.engine.models.hf import CONFIG_MAPPING, AutoModelForCausalLM

    refuse_foreign_code(raw)
    refuse_other_kinds(raw)
    try:
        with quiet_transformers(), torch.device("meta"):
            config: Any = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as exc:  # whatever some hundred classes raise for numbers that do not fit
        raise CorruptFile(
            "The model's configuration is damaged",
            f"No model can be built from it: {' '.join(str(exc).split())[:300]}",
            "Download the model again.",
        ) from exc
    return _describe(model, config, raw)


def _describe(model: Any, config: Any, raw: dict[str, Any]) -> Architecture:
    from mistudio.engine.models.quantise import find_blocks, quantisable

    text: Any = config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", None)
    blocks = find_blocks(model, n_layers)
    if not blocks:
        raise UnsupportedModel("The model has no layers", "Its configuration asks for none.")
    d_model = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    head_dim = getattr(text, "head_dim", None) or (d_model // heads if heads else 0)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    shapes = Counter((out, into) for _, out, into in quantisable(model, n_layers))
    context = getattr(text, "max_position_embeddings", None)
    return Architecture(
        architecture=(raw.get("architectures") or [type(model).__name__])[0],
        model_type=str(config.model_type),
        n_layers=len(blocks),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        d_mlp=_d_mlp(text, d_model),
        gated_mlp=_gated(blocks[-1], d_model, _d_mlp(text, d_model)),
        activation=_activation(text),
        experts=_experts(text),
        norm=_norm(blocks[0]),
        positions=_positions(model, text, embedding),
        context_length=None if context is None else int(context),
        vocab_size=int(embedding.weight.shape[0]),
        tied_embeddings=bool(tied),
        parameters=_count(model),
        embedding_parameters=embedding.weight.numel(),
        head_parameters=0 if tied or head is None else head.weight.numel(),
        blocks=tuple(_block(index, block) for index, block in enumerate(blocks)),
        matrices=tuple(Matrix(out, into, count) for (out, into), count in sorted(shapes.items())),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _block(index: int, block: nn.Module) -> Block:
    attentions = _outermost(block, _is_attention)
    attention = sum(map(_count, attentions))
    # Norms of queries and keys belong to the attention.
    inner = sum(_count(norm) for child in attentions for norm in _outermost(child, _is_norm))
    norms = sum(map(_count, _outermost(block, _is_norm))) - inner
    whole = _count(block)
    return Block(index, type(block).__name__, whole, attention, whole - attention - norms, norms)


def _outermost(block: nn.Module, wanted: Any) -> list[nn.Module]:
    found: list[nn.Module] = []
    paths: list[str] = []
    for path, module in block.named_modules():
        if path and wanted(module) and not any(path.startswith(outer + ".") for outer in paths):
            found.append(module)
            paths.append(path)
    return found


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _norm(block: nn.Module) -> str:
    for module in block.modules():
        if _is_norm(module):
            name = type(module).__name__
            return "RMSNorm" if "rms" in name.lower() else "LayerNorm" if "Layer" in name else name
    return "none"


def _d_mlp(text: Any, d_model: int) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if value:
            return int(value)
    return 4 * d_model  # GPT-2 and its kin leave it unsaid


def _gated(block: nn.Module, d_model: int, d_mlp: int) -> bool:
    """Two matrices (or one of twice the width, or experts' of it) lead into the MLP."""
    inside = {id(m) for a in _outermost(block, _is_attention) for m in a.modules()}
    into = 0
    for module in block.modules():
        if id(module) in inside:
            continue
        for parameter in module.parameters(recurse=False):
            shape = sorted(parameter.shape[-2:]) if parameter.ndim >= 2 else []
            if shape == sorted((d_model, 2 * d_mlp)):
                return True
            if shape == sorted((d_model, d_mlp)):
                into += 1
    return into >= 3


def _activation(text: Any) -> str:
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        if value := getattr(text, name, None):
            return str(value)
    return ""


def _experts(text: Any) -> int:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if value := getattr(text, name, None):
            return int(value)
    return 0


def _positions(model: Any, text: Any, embedding: nn.Module) -> str:
    names = [type(module).__name__.lower() for module in model.modules()]
    if any("rotary" in name for name in names):
        return "rotary"
    if any("alibi" in name for name in dir(model.base_model)) or getattr(text, "alibi", False):
        return "ALiBi"
    from torch import nn

    if any(isinstance(m, nn.Embedding) and m is not embedding for m in model.modules()):
        return "learned"
    return "rotary" if getattr(text, "rope_parameters", None) else "none found"


def parameters_of_files(tensors: dict[str, Any]) -> int:
    """Numbers in the tensors of safetensors headers (`loading.TensorInfo`), buffers included."""
    return sum(prod(info.shape) for info in tensors.values())
