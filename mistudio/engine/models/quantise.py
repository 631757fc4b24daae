"""Weights at 8, 4 and 2 bits, quantised layer by layer while a file is read.

Q8 is bitsandbytes' vector-wise 8 bits of LLM.int8 (Dettmers et al. 2022): a row of the matrix is
int8 times its largest magnitude. Q4 is bitsandbytes' nf4 (Dettmers et al. 2023): 64 neighbours
share their largest magnitude, in fp32, and a code picks one of 16 quantiles of a normal
distribution. Magnitudes are not quantised in turn ("double"): that saves 0.4 bits of 4.5.

Activations keep the precision that the model computes in. bitsandbytes' own 8-bit product would
round them too, apart from the channels where any token of the batch is beyond 6: what a token
gives would depend on its neighbours in the batch and on tokens that come after it. On SmolLM2-135M
that moved single tokens' activations by up to a tenth at the 15th layer, and cost 0.024 nats per
token where int8 weights alone cost nothing that can be measured. So Q8 multiplies with widened
weights, as bitsandbytes itself does on a CPU in training.

Q2 is our own, since no library brings a 2-bit method that can be depended on. hqq comes as source
only, whose setup compiles while it is merely looked at, and has transformers import PyTorch's
compiler at every start; quanto's 2 bits left SmolLM2-135M worse than guessing (15.4 nats per token;
10.8 is guessing) and torchao keeps 2-bit values in 8 bits. Here 32 weights of one input channel,
which keeps channels of outliers apart, share a scale and a zero of 16 bits, as in llama.cpp's Q2_K,
fitted by least squares: 8.6 nats per token where HQQ gives 11.0.

No example text is needed. Counted with scales a weight takes 8, 4.5 and 3 bits. Only the matrices
of the decoder blocks are quantised: embeddings, the output layer, norms, biases and fused experts
keep the precision that the model computes in. Hooks see ordinary tensors, gradients pass through to
the inputs, and fp32, bf16 and fp16 all work.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, ClassVar

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
from mistudio.engine.models.methods import bitsandbytes
from mistudio.errors import Incompatible

_METHOD = "mistudio"
_CHUNK = 1 << 18  # weights that are quantised at a time


def require_backend(precision: str, device: str) -> None:
    """Raise `Incompatible` with the reason where `device` cannot run quantised weights. Tried on a
    small matrix."""
    if precision not in SCHEMES:
        return
    try:
        layer = SCHEMES[precision](64, 64, None)
        layer.fill(torch.eye(64, device=device))
        given = torch.ones(2, 64, device=device)
        if not torch.allclose(layer(given).float(), given, atol=1e-3):
            raise RuntimeError("products of quantised weights come out wrong")
    except Incompatible:
        raise
    except Exception as exc:  # whatever a device's kernels fail with
        raise Incompatible(
            f"{precision.upper()} does not run on this device",
            f"On {device}: {' '.join(str(exc).split())[:200]}",
            "Choose FP32, BF16 or FP16.",
        ) from exc


# -------------------------------------------------------------------- which matrices


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


def stored_bytes(precision: str, out_features: int, in_features: int) -> int | None:
    """Bytes of a quantised matrix with its scales; None where it stays as it is."""
    return SCHEMES[precision].stored_bytes(out_features, in_features)


# -------------------------------------------------------------------- the layers


class QuantisedLinear(nn.Module):
    """y = x W^T + bias, with W [out, in] kept in few bits.

    What stands for W are parameters without gradient, `packed`. Until `fill` they hold no numbers.
    """

    precision: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = ("weight", "scale")

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: nn.Parameter | None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.transposed = transposed
        self._take(*(torch.empty(0, device="meta") for _ in self.names))
        self.bias = bias

    @staticmethod
    def stored_bytes(out_features: int, in_features: int) -> int | None:
        """Bytes of `packed` for a matrix of this shape; None where it cannot be quantised."""
        raise NotImplementedError

    def quantise(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What stands for `weight` [out, in], in the order of `names`."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`."""
        raise NotImplementedError

    def fill(self, weight: Tensor) -> None:
        """Quantise `weight`, [out, in] or, where the layer was GPT-2's kind, [in, out]. Raises
        `Incompatible` where it holds numbers that its bits cannot scale."""
        packed = self.quantise(weight.detach().T if self.transposed else weight.detach())
        if not all(values.isfinite().all() for values in packed[1:]):
            raise Incompatible(
                f"{self.precision.upper()} cannot hold this model",
                "Some of its weights are no numbers, or beyond the 65,504 that 16 bits hold.",
                "Choose FP32 or BF16.",
            )
        self._take(*packed)

    def _take(self, *values: Tensor) -> None:
        for name, value in zip(self.names, values, strict=True):
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    @property
    def packed(self) -> dict[str, nn.Parameter]:
        """The parameters that stand for the matrix, by name."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """x W^T + bias. The backward pass widens W once more, so that a model under gradients never
    holds all of its matrices widened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        return grad @ ctx.layer.dense(grad.dtype), None, None


class Int8Linear(QuantisedLinear):
    """`weight` int8 [out, in] and `scale` [out] fp32: W = weight * scale / 127, rowwise."""

    precision = "q8"
    weight: nn.Parameter
    scale: nn.Parameter

    @staticmethod
    def stored_bytes(out_features: int, in_features: int) -> int | None:
        return out_features * in_features + 4 * out_features

    def quantise(self, weight: Tensor) -> tuple[Tensor, ...]:
        vectors = bitsandbytes().functional.int8_vectorwise_quant
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        step = max(1, _CHUNK // self.in_features)
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            # In fp16, as bitsandbytes takes them: 11 bits where 8 remain.
            codes[rows], scale[rows], _ = vectors(weight[rows].to(torch.float16).contiguous())
        return codes, scale

    def dense(self, dtype: torch.dtype) -> Tensor:
        # The numbers of bitsandbytes' `MatMul8bitFp`; some rows at a time, because on a CPU a
        # product of mixed types first copies both sides to fp32.
        values = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        scale = self.scale[:, None].mul(1.0 / 127.0)
        step = len(values)
        if values.device.type == "cpu":
            step = max(1, _CHUNK // self.in_features)
        for first in range(0, len(values), step):
            rows = slice(first, first + step)
            torch.mul(self.weight[rows], scale[rows], out=values[rows])
        return values


class Nf4Linear(QuantisedLinear):
    """`weight` uint8 [out * in / 2, 1] holds two codes to a byte, `scale` [blocks] is fp32; blocks
    run on from row to row."""

    precision = "q4"
    block: ClassVar[int] = 64
    weight: nn.Parameter
    scale: nn.Parameter

    @staticmethod
    def stored_bytes(out_features: int, in_features: int) -> int | None:
        weights = out_features * in_features
        return None if weights % Nf4Linear.block else weights // 2 + weights // Nf4Linear.block * 4

    def quantise(self, weight: Tensor) -> tuple[Tensor, ...]:
        functional = bitsandbytes().functional
        weights, block = weight.numel(), self.block
        codes = torch.empty(weights // 2, 1, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(weights // block, dtype=torch.float32, device=weight.device)
        # So many rows at a time that blocks stay whole.
        rows = block // gcd(block, self.in_features)
        step = rows * max(1, _CHUNK // (self.in_features * rows))
        for first in range(0, len(weight), step):
            some = weight[first : first + step].contiguous()
            packed, state = functional.quantize_4bit(some, blocksize=block, quant_type="nf4")
            start = first * self.in_features
            codes[start // 2 : start // 2 + len(packed)] = packed
            scale[start // block : start // block + len(state.absmax)] = state.absmax
        return codes, scale

    def dense(self, dtype: torch.dtype) -> Tensor:
        # A row to a block: bitsandbytes 0.50.2 widens rows that blocks do not divide wrongly on
        # CPUs with AVX-512 (16 divides them, 64 does not).
        state = self._state(dtype, (len(self.scale), self.block))
        values: Tensor = bitsandbytes().functional.dequantize_4bit(self.weight, state)
        return values.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_features % self.block:
            return super().forward(x)
        state = self._state(x.dtype, (self.out_features, self.in_features))
        y: Tensor = bitsandbytes().matmul_4bit(x, self.weight, quant_state=state, bias=self.bias)
        return y

    def _state(self, dtype: torch.dtype, shape: tuple[int, int]) -> Any:
        return bitsandbytes().functional.QuantState(
            absmax=self.scale,
            shape=torch.Size(shape),
            blocksize=self.block,
            quant_type="nf4",
            dtype=dtype,
        )


class TwoBitLinear(QuantisedLinear):
    """W = (codes - zero) * scale by group: `weight` uint8 [groups, group / 4] holds four codes to a
    byte, `scale` and `zero` [groups] are fp16. A group is weights of one column, out / group rows
    apart."""

    precision = "q2"
    names = ("weight", "scale", "zero")
    weight: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter

    @staticmethod
    def group_of(out_features: int, in_features: int) -> int | None:
        """The largest group that divides the matrix, at most 32; None where it is below 8."""
        weights = out_features * in_features
        return next((group for group in (32, 16, 8) if weights % group == 0), None)

    @staticmethod
    def stored_bytes(out_features: int, in_features: int) -> int | None:
        group = TwoBitLinear.group_of(out_features, in_features)
        weights = out_features * in_features
        return None if group is None else weights // 4 + weights // group * 4

    def quantise(self, weight: Tensor) -> tuple[Tensor, ...]:
        group = self.group_of(self.out_features, self.in_features)
        if group is None:
            raise ValueError(f"{self.out_features} x {self.in_features} has no groups")
        parts = []
        for some in weight.reshape(group, -1).T.split(max(1, _CHUNK // 4 // group)):
            values = some.float().contiguous()
            scale, zero = (numbers.half() for numbers in _fit(values))
            codes = values / scale.float()[:, None] + zero.float()[:, None]
            parts.append((_pack(codes.round_().clamp_(0, _TOP).to(torch.uint8)), scale, zero))
        return tuple(torch.cat([part[i] for part in parts]) for i in range(3))

    def dense(self, dtype: torch.dtype) -> Tensor:
        # In fp32 on a CPU, which has no fp16 arithmetic of its own.
        wide = torch.float32 if self.weight.device.type == "cpu" else torch.float16
        values = _unpack(self.weight, wide)
        values.sub_(self.zero.to(wide)[:, None]).mul_(self.scale.to(wide)[:, None])
        return values.T.reshape(self.out_features, self.in_features).to(dtype)


SCHEMES: dict[str, type[QuantisedLinear]] = {
    layer.precision: layer for layer in (Int8Linear, Nf4Linear, TwoBitLinear)
}


# -------------------------------------------------------------------- two bits

_TOP = 3  # the largest code
_SHARES, _ROUNDS = (1.0, 0.8), 2  # ranges that least squares start from, and its rounds


def _fit(values: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) [groups] of `values` [groups, group] for a small squared error: codes for the
    whole range and for narrower ones, then the line through (code, weight) by least squares, in
    turn; the best by group. Scales and zeros fit fp16."""
    least, most = values.amin(1), values.amax(1)
    spread = most - least
    # Equal weights have no range: a scale of 1, and the weight is in the zero.
    widest = torch.where(spread <= 1e-4, 1.0, (spread / _TOP).clamp_min(5e-5))
    widest = torch.maximum(widest, torch.maximum(least.abs(), most.abs()) / 3e4)
    middle, mean = (least + most) / 2, values.mean(1)
    best_scale, best_zero = widest, -least / widest
    best = torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scale = widest * share
        zero = (_TOP / 2 - middle / scale).clamp_(-3e4, 3e4)
        zero = torch.where(spread <= 1e-4, best_zero, zero)
        for _ in range(_ROUNDS):
            codes = (values / scale[:, None] + zero[:, None]).round_().clamp_(0, _TOP)
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


def _pack(codes: Tensor) -> Tensor:
    """Four codes of a group to a byte, the first in the highest bits."""
    parts = codes.chunk(4, 1)
    packed = parts[0].clone()
    for part in parts[1:]:
        packed <<= 2
        packed |= part
    return packed


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [groups, group] in `dtype`; the inverse of `_pack`."""
    groups, width = packed.shape
    values = torch.empty(groups, width * 4, dtype=dtype, device=packed.device)
    for index in range(4):
        codes = packed >> (2 * (3 - index))
        if index:
            codes.bitwise_and_(_TOP)
        values.narrow(1, index * width, width).copy_(codes)
    return values


# -------------------------------------------------------------------- what a module is


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
            return part.precision
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
        layers = SCHEMES[ours.precision]
        for path, out_features, in_features in list(
            quantisable(model, getattr(config, "num_hidden_layers", None))
        ):
            if layers.stored_bytes(out_features, in_features) is None:
                continue
            before: Any = model.get_submodule(path)
            layer = layers(out_features, in_features, before.bias, isinstance(before, Conv1D))
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
