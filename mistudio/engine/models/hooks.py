"""Hook points: the one place that knows where in a language model a tensor is read or changed.

Sites are found by structure and, where the structure does not say, by measurement on a copy of
the block; there is no list of architectures. Loading, precision and files live in `loading`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import total_ordering
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mistudio.engine.models.hf import PreTrainedModel
from mistudio.errors import InvalidInput, UnsupportedModel

SITES = ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out")

_DEPTH = {"resid_pre": 0, "attn_out": 1, "mlp_in": 2, "mlp_out": 3, "resid_post": 4}
_SUFFIX = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
_SITE = {suffix: site for site, suffix in _SUFFIX.items()}
_NAME = re.compile(r"blocks\.(\d+)\.(.+)")

Edit = Callable[[Tensor], Tensor]


@total_ordering
@dataclass(frozen=True)
class HookPoint:
    """A site in one decoder block; ordered as the forward pass reaches it.

    `resid_pre` and `resid_post` are the residual stream before and after the block, `mlp_in` is
    what enters the MLP (after its norm), `attn_out` and `mlp_out` are what the block adds to the
    stream. Names are TransformerLens': `blocks.3.hook_resid_post`.
    """

    site: str
    layer: int

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise InvalidInput(
                "Unknown hook site",
                f'"{self.site}" is not a hook site.',
                f"Choose one of {', '.join(SITES)}.",
                field="site",
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise InvalidInput(
                "Unknown layer",
                f"{self.layer!r} is not a layer number.",
                "Layers count from 0.",
                field="layer",
            )

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{_SUFFIX[self.site]}"

    @classmethod
    def parse(cls, name: str) -> HookPoint:
        """The point that `name` names; the inverse of `.name`."""
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in _SITE:
            known = ", ".join(f"blocks.0.{suffix}" for suffix in _SUFFIX.values())
            raise InvalidInput(
                "Unknown hook point", f'"{name}" is not a hook point.', f"Names look like {known}."
            )
        return cls(_SITE[match[2]], int(match[1]))

    @property
    def _key(self) -> tuple[int, int]:
        return self.layer, _DEPTH[self.site]

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, HookPoint):
            return NotImplemented
        return self._key < other._key

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Place:
    """The module that carries a site, and on which side of it the tensor lies."""

    module: nn.Module
    path: str
    is_input: bool
    width: int


@dataclass(frozen=True)
class _Branches:
    """Where a block's two additions to the residual stream and the MLP's input were found."""

    attn_out: _Place | None
    mlp_out: _Place | None
    mlp_in: _Place | None


@dataclass(frozen=True)
class _Tail:
    """What lies between the last block and the logits."""

    norm: nn.Module | None
    projections: tuple[nn.Linear, ...]
    scale: float
    head: nn.Module


@dataclass
class _Call:
    """One module's first float input and first output during a probe."""

    path: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    times: int = 1

    @property
    def depth(self) -> int:
        return self.path.count(".")


class _Stop(Exception):
    """Raised by the last hook of a capture so that nothing deeper runs."""


class HookedDecoder:
    """A Hugging Face causal language model whose hook points can be read and changed.

    Raises `UnsupportedModel` for encoders and encoder-decoders. Not thread-safe: one forward
    pass at a time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config: Any = model.config
        text_config: Any = (
            config.get_text_config() if hasattr(config, "get_text_config") else config
        )
        self.architecture: str = str(getattr(config, "model_type", "") or type(model).__name__)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                "Not a decoder-only model",
                f"{type(model).__name__} is an encoder-decoder.",
                "Choose a causal language model (Llama, GPT-2, Gemma, Qwen, Pythia, ...).",
            )
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._blocks = _find_blocks(model, getattr(text_config, "num_hidden_layers", None))
        self.n_layers = len(self._blocks)
        self.d_model = int(text_config.hidden_size)
        longest = getattr(text_config, "max_position_embeddings", None)
        self.context: int | None = int(longest) if longest else None  # tokens; None: no limit named
        embedding: Any = model.get_input_embeddings()
        self.vocab_size = int(embedding.weight.shape[0])
        self._branches: dict[int, _Branches] = {}
        self._block_inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._tail_cache: _Tail | None = None
        self._gain_cache: tuple[Tensor, bool] | None = None
        self._probing = False
        self._refuse_unless_causal()

    @property
    def device(self) -> torch.device:
        embedding: Any = self.model.get_input_embeddings()
        device: torch.device = embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    # ---------------------------------------------------------------- where

    def check_point(self, point: HookPoint) -> None:
        """Raise `InvalidInput` for layers out of range, `UnsupportedModel` for missing sites."""
        if point.layer >= self.n_layers:
            raise InvalidInput(
                "No such layer",
                f"{point.name} asks for layer {point.layer}, but the model has {self.n_layers} "
                f"layers.",
                f"Choose a layer from 0 to {self.n_layers - 1}.",
                field="layer",
            )
        self._place(point)

    def width(self, point: HookPoint) -> int:
        """Number of channels at `point`."""
        self.check_point(point)
        return self._place(point).width

    def module_path(self, point: HookPoint) -> str:
        """Dotted path of the module whose input or output `point` is, as in `named_modules`."""
        self.check_point(point)
        return self._place(point).path

    def _place(self, point: HookPoint) -> _Place:
        block = self._blocks[point.layer]
        if point.site in ("resid_pre", "resid_post"):
            return _Place(block, self._paths[id(block)], point.site == "resid_pre", self.d_model)
        if point.layer not in self._branches:
            self._branches[point.layer] = self._find_branches(point.layer)
        place: _Place | None = getattr(self._branches[point.layer], point.site)
        if place is None:
            raise UnsupportedModel(
                "This site cannot be read in this model",
                f"In {self.architecture}, no module of layer {point.layer} gives {point.site}: "
                "the block does not simply add an attention part and an MLP part to the "
                "residual stream.",
                "Use resid_pre or resid_post, which work in every model.",
            )
        return place

    # ---------------------------------------------------------------- read

    def capture(
        self,
        input_ids: Tensor,
        points: Iterable[HookPoint],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[HookPoint, Tensor]:
        """Tensors [batch, seq, width] at `points` for `input_ids` [batch, seq], in one forward.

        Nothing runs behind the deepest point. The tensors are copies in the model's dtype and
        may be used under autograd. Inside `intervene`, they are the edited ones.
        Raises `RuntimeError` where a point captured nothing.
        """
        wanted = sorted(set(points))
        if not wanted:
            raise ValueError("capture() needs at least one hook point")
        for point in wanted:
            self.check_point(point)
        batch, seq = input_ids.shape
        found: dict[HookPoint, Tensor] = {}

        def take(point: HookPoint, width: int) -> Callable[[Tensor], None]:
            def _take(tensor: Tensor) -> None:
                if point in found:
                    raise RuntimeError(f"{point.name} was reached twice in one forward pass")
                # A copy: some models add to the stream in place. Outside inference mode, because
                # an SAE that trains on the tensor must be able to save it for its backward pass.
                with torch.inference_mode(False):
                    found[point] = tensor.clone().reshape(batch, seq, width)
                if len(found) == len(wanted):
                    raise _Stop

            return _take

        handles: list[RemovableHandle] = []
        try:
            for point in wanted:
                place = self._place(point)
                handles.append(_hook(place, point.name, take(point, place.width)))
            with torch.inference_mode():
                self._forward(input_ids, attention_mask, position_ids)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = [point.name for point in wanted if point not in found]
        if missing:
            raise RuntimeError(f"no activations were captured at {', '.join(missing)}")
        return found

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        inputs: dict[str, Any] = {"input_ids": input_ids.to(self.device), "use_cache": False}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(self.device)
        if position_ids is not None:
            inputs["position_ids"] = position_ids.to(self.device)
        self.model(**inputs)

    # ---------------------------------------------------------------- change

    def intervene(self, edits: Mapping[HookPoint, Edit]) -> Intervention:
        """A context in which every forward pass replaces the tensor at each point by edit(tensor).

        An edit takes and returns [batch, seq, width]. On leaving without an exception,
        `RuntimeError` is raised where an edit was never reached.
        """
        for point in edits:
            self.check_point(point)
        return Intervention(self, edits)

    # ---------------------------------------------------------------- logit lens

    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the unembedding, or None where there is none."""
        return self._tail().norm

    def unembedding(self) -> nn.Module:
        """The module that turns the normed stream into logits."""
        return self._tail().head

    def unembedding_weight(self) -> Tensor:
        """[vocab, d_model]: logits = final_norm(resid_post of the last layer) @ this.T (+ bias).

        Projections between norm and head (OPT-350m) and constant factors before the head are
        folded in; a factor or soft cap on the logits (Cohere, Gemma 2) is not: the order of the
        tokens is the same without it.
        """
        tail = self._tail()
        head: Any = tail.head
        weight: Tensor = head.weight.detach()
        for projection in reversed(tail.projections):
            weight = weight @ projection.weight.detach()
        if tail.scale != 1.0:
            weight = weight * tail.scale
        if weight.shape[1] != self.d_model:
            raise UnsupportedModel(
                "The logit lens does not fit this model",
                f"Its output layer reads {weight.shape[1]} channels, the residual stream has "
                f"{self.d_model}.",
                "Everything but the logit lens works with it.",
            )
        return weight

    def final_norm_gain(self) -> tuple[Tensor, bool]:
        """(gain [d_model] fp32, centred): final_norm(x) = gain * x / rms(x), up to a constant bias.

        Where `centred`, x has its mean over channels removed first (LayerNorm). Measured on the
        module rather than read from its weight, since Gemma's norms multiply by 1 + weight.
        Without a final norm the gain is 1.
        """
        if self._gain_cache is None:
            norm = self._tail().norm
            if norm is None:
                self._gain_cache = torch.ones(self.d_model, device=self.device), False
            else:
                self._gain_cache = _measure_gain(norm, self.d_model, self.device)
        return self._gain_cache

    # ---------------------------------------------------------------- probes

    @contextmanager
    def _probe(self) -> Iterator[None]:
        """Measure the model as it is: interventions stand still meanwhile."""
        before, self._probing = self._probing, True
        try:
            with torch.inference_mode():
                yield
        finally:
            self._probing = before

    def _probe_ids(self, batch: int, seq: int) -> Tensor:
        # Spread over the vocabulary: its first entries are often untrained and alike.
        count = batch * seq
        ids = torch.arange(1, count + 1, device=self.device) * self.vocab_size // (count + 1)
        return ids.clamp_max(self.vocab_size - 1).reshape(batch, seq)

    def _refuse_unless_causal(self) -> None:
        # Two rows with the same first token and different ones after it: a decoder gives the
        # same first position in both. This also proves that the blocks are the ones that run.
        ids = self._probe_ids(2, 4)
        ids[1, 0] = ids[0, 0]
        seen: list[Tensor] = []

        def take(tensor: Tensor) -> None:
            seen.append(tensor)
            raise _Stop

        block = self._blocks[0]
        path = self._paths[id(block)]
        handle = _hook(_Place(block, path, False, self.d_model), path, take)
        try:
            with self._probe():
                self._forward(ids)
        except _Stop:
            pass
        finally:
            handle.remove()
        if not seen or seen[0].shape != (2, 4, self.d_model):
            shape = tuple(seen[0].shape) if seen else "nothing"
            raise UnsupportedModel(
                "The model's layers were not recognised",
                f"{path} of {type(self.model).__name__} gave {shape} where "
                f"(2, 4, {self.d_model}) was expected.",
                "Choose a causal language model with one stack of decoder layers.",
            )
        first, second = seen[0][:, 0].float()
        if (first - second).norm() > 1e-2 * first.norm():
            raise UnsupportedModel(
                "Not a decoder-only model",
                f"In {type(self.model).__name__}, tokens see those that come after them: it is "
                "an encoder.",
                "Choose a causal language model (Llama, GPT-2, Gemma, Qwen, Pythia, ...).",
            )

    def _inputs_of(self, layer: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What layer `layer` is called with for five tokens; one forward pass serves all layers."""
        if not self._block_inputs:
            found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

            def take(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
                def _take(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    found[index] = _to_float(args), _to_float(kwargs)
                    if index == self.n_layers - 1:
                        raise _Stop

                return _take

            handles = [
                block.register_forward_pre_hook(take(index), with_kwargs=True)
                for index, block in enumerate(self._blocks)
            ]
            try:
                with self._probe():
                    self._forward(self._probe_ids(1, 5))
            except _Stop:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            self._block_inputs = found
        if layer not in self._block_inputs:
            raise RuntimeError(f"layer {layer} was never called in a forward pass")
        return self._block_inputs[layer]

    def _find_branches(self, layer: int) -> _Branches:
        """Find attn_out, mlp_out and mlp_in of a block by measurement.

        The block alone is run on random input, twice, the second time with another vector at
        position 0. A module whose output at later positions changes while its input there does
        not is the one that mixes positions (attention). Then the pair of module outputs, one
        from the attention's side and one from the rest, whose sum is the block's output minus
        its input, is what the block adds: the modules themselves, or their post-norms.
        """
        args, kwargs = self._inputs_of(layer)
        block = self._blocks[layer]
        quantised = not all(p.is_floating_point() for p in block.parameters())
        if quantised:  # such weights cannot be widened: measure in place, more loosely
            probed = block
            args, kwargs = _to_dtype(args, self.dtype), _to_dtype(kwargs, self.dtype)
        else:  # in fp32, so that rounding cannot hide which modules add up
            probed = _float_copy(block)
        slot = _input_slot(args, kwargs, f"layer {layer}")
        given: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        generator = torch.Generator().manual_seed(layer)
        noise = torch.randn((2, *given.shape), generator=generator).to(given)
        x, other = noise[0], noise[1].clone()
        other[:, 1:] = x[:, 1:]
        before, self._probing = self._probing, True
        try:
            with torch.no_grad():
                calls, y = _record(probed, *_replace(args, kwargs, slot, x))
                moved, _ = _record(probed, *_replace(args, kwargs, slot, other))
        finally:
            self._probing = before
        root = self._paths[id(block)]
        tolerance = 5e-2 if quantised else 2e-3
        found = _match_branches(calls, moved, x, y, self.d_model, tolerance)

        def place(call: _Call | None, is_input: bool) -> _Place | None:
            if call is None:
                return None
            # Paths, since the recorded modules may be those of the copy.
            module = block.get_submodule(call.path)
            return _Place(module, f"{root}.{call.path}", is_input, self.d_model)

        attn_out, mlp_out, mlp_in = found
        return _Branches(place(attn_out, False), place(mlp_out, False), place(mlp_in, True))

    def _tail(self) -> _Tail:
        if self._tail_cache is None:
            with self._probe():
                self._tail_cache = self._find_tail()
        return self._tail_cache

    def _find_tail(self) -> _Tail:
        """Follow the last block's output to the output layer, by equality of tensors."""
        head: Any = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedModel(
                "The model has no output layer",
                f"{type(self.model).__name__} does not turn its activations into logits.",
                "Load the model with its language-model head.",
            )
        inside = {id(m) for block in self._blocks for m in block.modules()}
        last: list[Tensor] = []
        calls: list[_Call] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if last:
                path = self._paths[id(module)]
                calls.append(_Call(path, module, _first_float(args, kwargs), _first(output)))

        block = self._blocks[-1]
        handles = [
            m.register_forward_hook(note, with_kwargs=True)
            for m in self.model.modules()
            if id(m) not in inside
        ]
        place = _Place(block, "the last layer", False, self.d_model)
        handles.append(_hook(place, "the last layer", last.append))
        try:
            self._forward(self._probe_ids(1, 4))
        finally:
            for handle in handles:
                handle.remove()

        norm: nn.Module | None = None
        projections: list[nn.Linear] = []
        here = last[0]
        for call in calls:
            if call.module is head:
                if call.input is None or call.input.shape != here.shape:
                    break
                scale = _ratio(call.input, here)
                if scale is None:
                    break
                return _Tail(norm, tuple(projections), scale, head)
            if call.input is None or call.output is None or not _same(call.input, here):
                continue
            if _same(call.output, here):
                continue  # dropout and other identities
            if isinstance(call.module, nn.Linear) and call.module.bias is None:
                projections.append(call.module)
            elif not _has_matrix(call.module) and norm is None and not projections:
                norm = call.module
            else:
                break
            here = call.output
        raise UnsupportedModel(
            "The logit lens does not fit this model",
            f"What {type(self.model).__name__} does between its last layer and its logits is "
            "more than a norm and a linear map.",
            "Everything but the logit lens works with it.",
        )


class Intervention:
    """The context that `HookedDecoder.intervene` returns; `calls` counts each point's edits."""

    def __init__(self, decoder: HookedDecoder, edits: Mapping[HookPoint, Edit]) -> None:
        self._decoder = decoder
        self._edits = dict(edits)
        self._handles: list[RemovableHandle] = []
        self.calls: dict[HookPoint, int] = dict.fromkeys(edits, 0)

    def __enter__(self) -> Intervention:
        try:
            for point in sorted(self._edits):
                self._register(point)
        except BaseException:
            self._remove()
            raise
        return self

    def _register(self, point: HookPoint) -> None:
        place = self._decoder._place(point)
        block = self._decoder._blocks[point.layer]
        edit = self._edits[point]
        shape: list[torch.Size] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            slot = _input_slot(args, kwargs, point.name)
            shape[:] = [(args[slot] if isinstance(slot, int) else kwargs[slot]).shape]

        def change(tensor: Tensor) -> Tensor | None:
            if self._decoder._probing:
                return None
            # OPT runs its MLP on [batch * seq, d]; an edit always sees [batch, seq, d].
            rows = tensor.reshape(*shape[0][:2], place.width)
            edited = edit(rows)
            if not isinstance(edited, Tensor) or edited.shape != rows.shape:
                got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                raise RuntimeError(
                    f"the edit at {point.name} returned {got}, not a tensor {tuple(rows.shape)}"
                )
            self.calls[point] += 1
            return edited.to(tensor.dtype).reshape(tensor.shape)

        self._handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
        self._handles.append(_hook(place, point.name, change))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()
        unused = [point.name for point, count in self.calls.items() if count == 0]
        if exc_type is None and unused:
            raise RuntimeError(f"the edit at {', '.join(unused)} was never applied")

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


# -------------------------------------------------------------------- hooks


def _hook(place: _Place, name: str, use: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `use` with the tensor at `place`; where it returns a tensor, that one goes on."""

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        slot = _input_slot(args, kwargs, name)
        changed = use(args[slot] if isinstance(slot, int) else kwargs[slot])
        return None if changed is None else _replace(args, kwargs, slot, changed)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        tensor = _first(output)
        if tensor is None:
            raise RuntimeError(
                f"the module at {name} returned {type(output).__name__}, neither a tensor nor a "
                "tuple that begins with one"
            )
        changed = use(tensor)
        if changed is None:
            return None
        if isinstance(output, Tensor):
            return changed
        if hasattr(output, "_replace"):  # a named tuple takes its fields one by one
            return type(output)(changed, *output[1:])
        return type(output)([changed, *output[1:]])

    if place.is_input:
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(after)


def _input_slot(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> int | str:
    """Position or keyword of the hidden states among a module's arguments."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return index
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return key
    raise RuntimeError(f"the module at {name} was called without a tensor")


def _replace(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: int | str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(slot, int):
        return (*args[:slot], value, *args[slot + 1 :]), dict(kwargs)
    return args, {**kwargs, slot: value}


def _first(output: Any) -> Tensor | None:
    """The tensor of a module's output: itself, or the first of a tuple or list."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _first_float(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


# -------------------------------------------------------------------- structure


def _find_blocks(model: PreTrainedModel, n_layers: int | None) -> list[nn.Module]:
    """The stack of decoder blocks: the outermost module list of the configured length.

    Where several fit (a vision tower of equal depth), the one with the most parameters.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(path.startswith(outer + ".") for outer, _ in found):
            continue  # experts and the like, inside a block
        if any(True for _ in module.parameters()):
            found.append((path, module))
    fitting = [blocks for _, blocks in found if len(blocks) == n_layers]
    candidates = fitting or [blocks for _, blocks in found]
    if not candidates:
        raise UnsupportedModel(
            "The model's layers were not recognised",
            f"{type(model).__name__} has no list of layers.",
            "Choose a causal language model with one stack of decoder layers.",
        )
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in candidates]
    blocks = list(candidates[sizes.index(max(sizes))])
    if len({id(block) for block in blocks}) != len(blocks):
        raise UnsupportedModel(
            "Layers share their weights",
            f"{type(model).__name__} runs one module as several layers, so that a hook cannot "
            "tell them apart.",
            "Choose a model whose layers are separate.",
        )
    return blocks


def _float_copy(module: nn.Module) -> nn.Module:
    """An fp32 copy of `module` without hooks, whose all-zero parameters are made small noise.

    Zero weights (a fresh output projection, Gemma's norm gains) would make different modules
    give the same output; which modules add up does not depend on the values.
    """
    with torch.inference_mode(False), torch.no_grad():
        twin = copy.deepcopy(module).float()
        generator = torch.Generator().manual_seed(0)
        for parameter in twin.parameters():
            if not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(noise)
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._forward_hooks_with_kwargs.clear()
        part._forward_pre_hooks_with_kwargs.clear()
        part._forward_hooks_always_called.clear()
    return twin


def _to_float(value: Any) -> Any:
    """Copies of the tensors in `value`, those of floats as fp32, outside inference mode."""
    with torch.inference_mode(False):
        return _to_dtype(value, torch.float32)


def _to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, tuple) and not hasattr(value, "_replace"):
        return tuple(_to_dtype(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _to_dtype(item, dtype) for key, item in value.items()}
    return value


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _record(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[_Call], Tensor]:
    """Run `block`; what each module inside it took and gave, in order of completion."""
    calls: dict[str, _Call] = {}
    handles: list[RemovableHandle] = []

    def note(path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def _note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if path in calls:
                calls[path].times += 1
                return
            taken, given = _first_float(args, kwargs), _first(output)
            calls[path] = _Call(
                path,
                module,
                None if taken is None else taken.clone(),
                None if given is None else given.clone(),
            )

        return _note

    for path, module in block.named_modules():
        if path:
            handles.append(module.register_forward_hook(note(path), with_kwargs=True))
    try:
        output = _first(block(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if output is None:
        raise RuntimeError("a decoder block returned neither a tensor nor a tuple with one")
    return list(calls.values()), output


def _match_branches(
    calls: list[_Call],
    moved: list[_Call],
    x: Tensor,
    y: Tensor,
    d_model: int,
    tolerance: float,
) -> tuple[_Call | None, _Call | None, _Call | None]:
    """(attn_out, mlp_out, mlp_in) among `calls`; see `HookedDecoder._find_branches`."""
    seq = x.shape[1]
    added = (y - x).reshape(seq, d_model).float()
    mixers = _position_mixers(calls, moved, seq)

    attention: list[_Call] = []
    rest: list[_Call] = []
    for call in calls:
        inside = any(call.path == m or call.path.startswith(m + ".") for m in mixers)
        # A post-norm continues the attention's branch: it takes exactly what that gave.
        follows = not _has_matrix(call.module) and any(
            _same(call.input, earlier.output) for earlier in attention
        )
        (attention if inside or follows else rest).append(call)

    def candidates(side: list[_Call]) -> list[tuple[_Call, Tensor]]:
        shallow_first = sorted(side, key=lambda call: call.depth)
        return [
            (call, call.output.reshape(seq, d_model).float())
            for call in shallow_first
            if call.times == 1
            and call.output is not None
            and call.output.shape[-1] == d_model
            and call.output.numel() == seq * d_model
        ]

    def adds_up(*parts: Tensor) -> bool:
        smallest = min(float(part.norm()) for part in parts)
        total = torch.stack(parts).sum(0)
        return smallest > 0 and float((added - total).norm()) <= tolerance * smallest

    for attn, attn_part in candidates(attention):
        for mlp, mlp_part in candidates(rest):
            if adds_up(attn_part, mlp_part):
                return attn, mlp, _mlp_entry(mlp, rest, d_model)
    for attn, attn_part in candidates(attention):
        if adds_up(attn_part):  # a block of attention only
            return attn, None, None
    for mlp, mlp_part in candidates(rest):
        if not mixers and adds_up(mlp_part):  # a block of MLP only
            return None, mlp, _mlp_entry(mlp, rest, d_model)
    return None, None, None


def _position_mixers(calls: list[_Call], moved: list[_Call], seq: int) -> list[str]:
    """Paths of the outermost modules that carry position 0 into later positions."""
    again = {call.path: call for call in moved}
    found: list[_Call] = []
    for call in calls:
        twin = again.get(call.path)
        if twin is None:
            continue
        taken = _moved(call.input, twin.input, seq)
        given = _moved(call.output, twin.output, seq)
        if taken is not None and given is not None and taken < 1e-4 and given > 1e-3:
            found.append(call)
    depth = min((call.depth for call in found), default=0)
    return [call.path for call in found if call.depth == depth]


def _moved(a: Tensor | None, b: Tensor | None, seq: int) -> float | None:
    """Relative change of the positions after the first, or None where there are no positions."""
    if a is None or b is None or a.shape != b.shape or a.numel() % seq:
        return None
    rows, others = a.reshape(seq, -1)[1:].float(), b.reshape(seq, -1)[1:].float()
    return float((rows - others).norm() / rows.norm().clamp_min(1e-30))


def _mlp_entry(mlp: _Call, calls: list[_Call], d_model: int) -> _Call | None:
    """The module whose input is the MLP's input, walking back from the one that gave its output.

    Usually the same module; behind a post-norm or where the block holds the MLP's layers
    itself (OPT), an earlier one: each step back goes to the module that gave this one's input.
    """
    here = mlp
    matrices = 0
    while True:
        matrices += sum(p.ndim >= 2 for p in here.module.parameters())
        if here.input is None:
            return None
        if matrices >= 2 and here.input.shape[-1] == d_model:
            return here
        position = calls.index(here)
        earlier = [call for call in calls[:position] if _same(call.output, here.input)]
        if not earlier:
            return None
        here = min(earlier, key=lambda call: call.depth)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (
        a is not None
        and b is not None
        and a.numel() == b.numel()
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1), b.reshape(-1))
    )


def _ratio(a: Tensor, b: Tensor) -> float | None:
    """The constant c with a = c * b, or None."""
    if _same(a, b):
        return 1.0
    left, right = a.double().reshape(-1), b.double().reshape(-1)
    scale = float(left @ right / (right @ right).clamp_min(1e-30))
    if float((left - scale * right).norm()) <= 1e-2 * float(left.norm()) and scale != 0:
        return scale
    return None


def _measure_gain(norm: nn.Module, d_model: int, device: torch.device) -> tuple[Tensor, bool]:
    """(gain [d_model], centred) of a norm module, from what it does to eight random vectors.

    The odd part (f(x) - f(-x)) / 2 is free of bias. It equals gain * x / rms(x), with or without
    the mean removed first: the right formula gives the same gain for every x.
    """
    with torch.inference_mode(False), torch.no_grad():
        module = _plain_float_copy(norm).to(device)
        generator = torch.Generator().manual_seed(0)
        sign = torch.randint(0, 2, (8, 1, d_model), generator=generator) * 2.0 - 1.0
        # Away from zero with and without the mean of about 1, so that dividing is safe; large,
        # so that the norm's epsilon does not count.
        x = (100 * (sign * (2 + torch.rand(sign.shape, generator=generator)) + 1)).to(device)
        odd = (module(x) - module(-x)) / 2
        for centred in (False, True):
            shifted = x - x.mean(-1, keepdim=True) if centred else x
            gains = odd / (shifted / shifted.pow(2).mean(-1, keepdim=True).sqrt())
            gain = gains.mean(0)
            if float((gains - gain).norm()) <= 1e-3 * float(gains.norm()):
                return gain.reshape(d_model), centred
    raise UnsupportedModel(
        "The logit lens does not fit this model",
        f"Its final norm ({type(norm).__name__}) is neither an RMS norm nor a layer norm.",
        "Everything but the logit lens works with it.",
    )


def _plain_float_copy(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module).float()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin
