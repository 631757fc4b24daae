"""Weights at 8, 4 and 2 bits, quantised layer by layer while a file is read.

All three are affine: a group of 32 weights shares a scale and a zero of 16 bits, as in llama.cpp's
Q4_1 and Q2_K, and both are fitted by least squares. At 8 and 4 bits a group is neighbours along the
input; at 2 bits it is weights of one input channel, which keeps channels of outliers apart. No
example text is needed. Counted with scales and zeros a weight takes 9, 5 and 3 bits.

Only the matrices of the decoder blocks are quantised: embeddings, the output layer, norms, biases
and fused experts keep the precision that the model computes in. Products are computed from weights
that are widened again for the moment of the product, so every device that runs PyTorch runs them,
hooks see ordinary tensors and gradients pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mistudio.engine.models.hf import (
    Conv1D,
    ConversionOps,
    HfQuantizer,
    QuantizationConfigMixin,
    register_quantization_config,
    register_quantizer,
)
from mistudio.engine.models.hooks import _find_blocks as find_blocks
from mistudio.errors import Incompatible, InvalidInput

_CHUNK = 1 << 16  # weights that are fitted at a time: what a core keeps beside it
_METHOD = "mistudio"
_SHARES, _ROUNDS = (1.0, 0.8), 2  # ranges that least squares start from, and its rounds


@dataclass(frozen=True)
class Scheme:
    """How the weights of one precision are kept: codes of `bits` bits in groups of `group`, each
    with a scale and a zero of 16 bits. `along` "input": a group is neighbours in a row of the
    matrix; "output": weights of one column, out / group rows apart."""

    precision: str
    bits: int
    group: int
    along: str

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 32 / self.group


SCHEMES = {
    "q8": Scheme("q8", 8, 32, "input"),
    "q4": Scheme("q4", 4, 32, "input"),
    "q2": Scheme("q2", 2, 32, "output"),
}


def require_backend(precision: str, device: str) -> None:
    """Raise `Incompatible` with the reason where `device` cannot run quantised weights: its
    PyTorch lacks what unpacking them takes. Tried on eight numbers."""
    if precision not in SCHEMES:
        return
    try:
        packed = torch.full((1, 8), 0b11011000, dtype=torch.uint8, device=device)
        values = _unpack(packed, SCHEMES[precision].bits, torch.float16)
        nn.functional.linear(values.float(), values.float())
    except (RuntimeError, NotImplementedError, TypeError) as exc:
        raise Incompatible(
            f"{precision.upper()} does not run on this device",
            f"PyTorch on {device} says: {' '.join(str(exc).split())[:200]}",
            "Choose FP32, BF16 or FP16.",
        ) from exc


# -------------------------------------------------------------------- sizes


def group_of(scheme: Scheme, out_features: int, in_features: int) -> int | None:
    """The group for a matrix of this shape: the largest that divides it, at most the scheme's;
    None where there is none of at least 8, and the matrix stays as it is."""
    group = scheme.group
    while group >= 8:
        if out_features * in_features % group == 0:
            return group
        group //= 2
    return None


def stored_bytes(scheme: Scheme, out_features: int, in_features: int) -> int | None:
    """Bytes of a quantised matrix: codes, scales and zeros; None where it is not quantised."""
    group = group_of(scheme, out_features, in_features)
    if group is None:
        return None
    weights = out_features * in_features
    return weights * scheme.bits // 8 + weights // group * 4


def quantisable(model: nn.Module, n_layers: int | None) -> Iterator[tuple[str, int, int]]:
    """(path, out, in) of the matrices in the decoder blocks that can be quantised."""
    inside = {id(m) for block in find_blocks(model, n_layers) for m in block.modules()}
    for path, module in model.named_modules():
        if id(module) in inside and (shape := _shape(module)):
            yield path, *shape


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer; GPT-2's keep theirs the other way round."""
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return None


# -------------------------------------------------------------------- the layer


class QuantisedLinear(nn.Module):
    """y = x W^T + bias, with W [out, in] kept as codes: W = (codes - zero) * scale by group.

    `weight` [groups, group * bits / 8] holds several codes to a byte, `scale` and `zero` [groups]
    are fp16. All three are parameters without gradient.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter

    def __init__(
        self,
        out_features: int,
        in_features: int,
        scheme: Scheme,
        bias: nn.Parameter | None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        group = group_of(scheme, out_features, in_features)
        if group is None:
            raise InvalidInput(
                "This matrix cannot be quantised", f"{out_features} x {in_features} has no groups."
            )
        self.out_features, self.in_features = out_features, in_features
        self.scheme, self.group, self.transposed = scheme, group, transposed
        groups = out_features * in_features // group
        with torch.device("meta"):
            codes = torch.empty(groups, group * scheme.bits // 8, dtype=torch.uint8)
            values = torch.empty(groups, dtype=torch.float16)
        self._take(codes, values, values)
        self.bias = bias

    def _take(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.zero = nn.Parameter(zero, requires_grad=False)

    def fill(self, weight: Tensor) -> None:
        """Quantise `weight`, [out, in] or, where the layer was GPT-2's kind, [in, out]."""
        self._take(*quantise(weight.T if self.transposed else weight, self.scheme, self.group))

    @property
    def packed(self) -> dict[str, nn.Parameter]:
        """The parameters that stand for the matrix, by name."""
        return {"weight": self.weight, "scale": self.scale, "zero": self.zero}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`."""
        # In fp32 on a CPU, which has no fp16 arithmetic of its own; bf16 cannot hold 8-bit codes
        # minus a fractional zero.
        wide = torch.float32 if self.weight.device.type == "cpu" else torch.float16
        values = _unpack(self.weight, self.scheme.bits, wide)
        values.sub_(self.zero.to(wide)[:, None]).mul_(self.scale.to(wide)[:, None])
        if self.scheme.along == "output":
            values = values.T
        return values.reshape(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.scheme.bits}, group={self.group}"
        )


def quantise(weight: Tensor, scheme: Scheme, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed codes, scale, zero) of `weight` [out, in]; see `QuantisedLinear`."""
    top = 2**scheme.bits - 1
    parts = []
    along_input = scheme.along == "input"
    groups = weight.detach().reshape((-1, group) if along_input else (group, -1))
    for some in (groups if along_input else groups.T).split(max(1, _CHUNK // group)):
        values = some.float().contiguous()
        scale, zero = (numbers.half() for numbers in _fit(values, top))
        codes = values / scale.float()[:, None] + zero.float()[:, None]
        codes = codes.round_().clamp_(0, top).to(torch.uint8)
        parts.append((_pack(codes, scheme.bits), scale, zero))
    packed, scale, zero = (torch.cat([part[i] for part in parts]) for i in range(3))
    return packed, scale, zero


def _fit(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) [groups] of `values` [groups, group] for a small squared error: codes for the
    whole range and for narrower ones, then the line through (code, weight) by least squares, in
    turn; the best by group. Scales and zeros fit fp16."""
    least, most = values.amin(1), values.amax(1)
    spread = most - least
    # Equal weights have no range: a scale of 1, and the weight is in the zero.
    widest = torch.where(spread <= 1e-4, 1.0, (spread / top).clamp_min(5e-5))
    widest = torch.maximum(widest, torch.maximum(least.abs(), most.abs()) / 3e4)
    middle, mean = (least + most) / 2, values.mean(1)
    best_scale, best_zero = widest, -least / widest
    if top == 255:  # an even cut is as good as can be
        return best_scale, best_zero
    best = torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scale = widest * share
        zero = (top / 2 - middle / scale).clamp_(-3e4, 3e4)
        zero = torch.where(spread <= 1e-4, best_zero, zero)
        for _ in range(_ROUNDS):
            codes = (values / scale[:, None] + zero[:, None]).round_().clamp_(0, top)
            error = (values - (codes - zero[:, None]) * scale[:, None]).square_().sum(1)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            centre = codes.mean(1)
            codes -= centre[:, None]
            slope = (codes * (values - mean[:, None])).sum(1)
            slope /= codes.square().sum(1).clamp_min_(1e-9)
            scale = torch.where(slope > widest / 16, slope, scale)
            zero = (centre - mean / scale).clamp_(-3e4, 3e4)
    return best_scale, best_zero


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Several codes of a group to a byte, the first in the highest bits."""
    parts = codes.chunk(8 // bits, 1)
    packed = parts[0].clone()
    for part in parts[1:]:
        packed <<= bits
        packed |= part
    return packed


def _unpack(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Codes [groups, group] in `dtype`; the inverse of `_pack`."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed.to(dtype)
    groups, width = packed.shape
    values = torch.empty(groups, width * per_byte, dtype=dtype, device=packed.device)
    for index in range(per_byte):
        codes = packed >> (bits * (per_byte - 1 - index))
        if index:
            codes.bitwise_and_(2**bits - 1)
        values.narrow(1, index * width, width).copy_(codes)
    return values


def parameter_count(module: nn.Module) -> int:
    """Numbers that the module's weights stand for, however many bits each takes; shared ones
    once."""
    packed = [m for m in module.modules() if isinstance(m, QuantisedLinear)]
    inner = {id(p) for m in packed for p in m.packed.values()}
    rest = sum(p.numel() for p in module.parameters() if id(p) not in inner)
    return rest + sum(m.out_features * m.in_features for m in packed)


def precision_of(module: nn.Module) -> str:
    """ "fp32", "bf16", "fp16", "q8", "q4" or "q2"."""
    for part in module.modules():
        if isinstance(part, QuantisedLinear):
            return part.scheme.precision
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


# -------------------------------------------------------------------- while transformers loads


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):
    def __init__(self, precision: str, device: str = "cpu", **_kwargs: Any) -> None:
        self.quant_method: Any = _METHOD
        self.precision, self.device = precision, device
        # transformers only says that something failed.
        self.failures: list[Exception] = []

    def __deepcopy__(self, memo: object) -> _Config:
        return self  # transformers works on a copy; what failed must come back to us


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """transformers reads tensors one after another and hands over those of our layers."""

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        config: Any = model.config.get_text_config()
        ours: Any = self.quantization_config
        scheme = SCHEMES[ours.precision]
        for path, out_features, in_features in list(
            quantisable(model, getattr(config, "num_hidden_layers", None))
        ):
            if group_of(scheme, out_features, in_features) is None:
                continue
            before: Any = model.get_submodule(path)
            layer = QuantisedLinear(
                out_features, in_features, scheme, before.bias, isinstance(before, Conv1D)
            )
            layer.requires_grad_(False)
            model.set_submodule(path, layer)

    def param_needs_quantization(self, model: Any, param_name: str, **_kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantisedLinear)

    def get_quantize_ops(self) -> _Fill:
        ours: Any = self.quantization_config
        return _Fill(ours)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


class _Fill(ConversionOps):
    """Quantises one tensor into its layer, on the device that the model will be on."""

    def __init__(self, config: _Config) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        value = next(iter(input_dict.values()))
        weight: Tensor = value[0] if isinstance(value, list) else value
        path = full_layer_name.rpartition(".")[0]
        layer: QuantisedLinear = model.get_submodule(path)
        expected = (layer.out_features, layer.in_features)
        if tuple(weight.T.shape if layer.transposed else weight.shape) != expected:
            self.config.failures.append(SizeMismatch(f"size mismatch for {full_layer_name}"))
            raise self.config.failures[-1]
        try:
            layer.fill(weight.to(self.config.device))
        except Exception as exc:
            self.config.failures.append(exc)
            raise
        layer._is_hf_initialized = True  # type: ignore[assignment]
        for name, value in layer.packed.items():
            value._is_hf_initialized = True  # type: ignore[attr-defined]
            if missing_keys is not None:
                missing_keys.discard(f"{path}.{name}")
        return {}


class SizeMismatch(RuntimeError):
    """A tensor of the file does not have the shape that the configuration asks for."""


def loading_config(precision: str, device: str) -> Any:
    """What `from_pretrained` takes as `quantization_config`, or None for plain precisions."""
    return _Config(precision, device) if precision in SCHEMES else None
