"""Model folders: described and checked without loading, then loaded at a chosen precision.

Only local folders with safetensors weights are read. Code that comes with a model is run by
`load_model` alone, where somebody has consented to exactly this code (`custom_code`). Where tensors
are read inside the loaded model is `hooks`' matter.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mistudio.engine.models import custom_code
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, Incompatible, InvalidInput, NotFound, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from mistudio.engine.models.hf import PreTrainedTokenizerBase
    from mistudio.engine.models.hooks import HookedDecoder

Precision = Literal["auto", "fp32", "bf16", "fp16", "q8", "q4", "q2"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16", "q8", "q4", "q2")
QUANTISED = ("q8", "q4", "q2")

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")  # by their ends
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
# Bytes. A model of 160 files with 90,000 tensors has 9 MB of headers in all; the safetensors
# library takes 100 MB, which as Python objects would be two GB.
_HEADER_LIMIT = 16 * 1024**2
_INDEX_LIMIT = 64 * 1024**2  # bytes; 9 MB of that model
_CONFIG_LIMIT = 16 * 1024**2  # bytes of config.json; real ones have a few thousand
# Bits of an element. Types of less than a byte appear in files that are already quantised.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# The largest of what a configuration may ask for. GPT-3 has 96 layers of 12,288 channels, and the
# largest vocabularies have 262,144 entries: all limits leave room, and building the tree of modules
# without weights stays a matter of seconds.
_LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 131_072,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "head_dim": 65_536,
    "vocab_size": 10_000_000,
    "intermediate_size": 1_048_576,
    "ffn_dim": 1_048_576,
    "n_inner": 1_048_576,
    "num_experts": 4_096,
    "num_local_experts": 4_096,
    "n_routed_experts": 4_096,
    "max_position_embeddings": 1 << 31,
}
_OUTPUT_WEIGHTS = ("lm_head.weight", "embed_out.weight")
# Separators of documents in pretraining, where the EOS of a chat model ends a turn instead.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class ModelSummary:
    """What a model folder says about itself; sizes are counts of channels, heads or tokens."""

    architecture: str
    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    vocab_size: int
    context_length: int | None
    tied_embeddings: bool
    parameters: int  # tied embeddings count once
    bytes_on_disk: int  # all files of the folder
    dtypes: tuple[str, ...]  # as safetensors names them, most bytes first


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int = 0  # behind the header, in bytes


# -------------------------------------------------------------------- headers


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of the tensors in `path`, without reading the tensors.

    Raises `CorruptFile` where the file is empty, cut off or not in the format.
    """
    if not path.is_file():  # a pipe would be waited for without end
        raise _damaged(path.name, "it is no plain file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        # The longest header there can be; what it says of itself is judged below.
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        wanted = 0 if start.startswith(b"version ") else min(length, size, _HEADER_LIMIT)
        data = start + file.read(wanted)
    return parse_safetensors_header(data, size, path.name)


def header_length(start: bytes) -> int:
    """How many bytes of a safetensors file must be read for its header, from its first eight."""
    return 8 + int(struct.unpack("<Q", start[:8])[0])


def parse_safetensors_header(data: bytes, size: int, name: str) -> dict[str, TensorInfo]:
    """The header at the start of a safetensors file of `size` bytes, of which `data` are the first
    (`header_length` of them at least): a file that is elsewhere can be described by a part of it.

    Raises `CorruptFile` where the file is empty, cut off or not in the format.
    """
    if size == 0:
        raise _damaged(name, "it is empty (0 bytes)")
    if data.startswith(b"version "):
        raise _damaged(name, "it is a Git LFS pointer, not the file it points to")
    length = header_length(data) - 8 if len(data) >= 8 else size
    if _HEADER_LIMIT < length <= size - 8:
        raise _damaged(
            name, f"its header has {length:,} bytes, beyond the {_HEADER_LIMIT:,} that are read"
        )
    if length > size - 8 or len(data) < 8 + length:
        raise _damaged(name, f"its header would take {length:,} bytes, but the file has {size:,}")
    try:
        entries: dict[str, Any] = json.loads(data[8 : 8 + length])
        entries.pop("__metadata__", None)
        infos = {key: _tensor_info(key, entry) for key, entry in entries.items()}
        ranges = sorted(entry["data_offsets"] for entry in entries.values())
        end = 0
        for first, last in ranges:
            if first != end:
                raise ValueError("its tensors overlap or leave gaps")
            end = last
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise _damaged(name, f"its header is not valid ({_short(exc)})") from exc
    if 8 + length + end != size:
        raise _damaged(
            name, f"it has {size:,} bytes where its header promises {8 + length + end:,}"
        )
    return infos


def _tensor_info(name: str, entry: dict[str, Any]) -> TensorInfo:
    first, last = entry["data_offsets"]
    if not (type(first) is int and type(last) is int and 0 <= first <= last):
        raise ValueError(f"tensor {name[:80]} has offsets that are no range of bytes")
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in shape) or len(shape) > 16:
        raise ValueError(f"tensor {name[:80]} has a shape that no tensor has")
    dtype = str(entry["dtype"])
    if dtype not in _BITS:
        raise ValueError(f"tensor {name[:80]} has numbers of an unknown type {dtype[:20]!r}")
    if (prod(shape) * _BITS[dtype] + 7) // 8 != last - first:
        raise ValueError(f"tensor {name[:80]} does not have the bytes that its shape needs")
    return TensorInfo(dtype, shape, last - first, first)


def _short(exc: BaseException) -> str:
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    return " ".join(str(exc).split())[:200]


def _damaged(name: str, why: str) -> CorruptFile:
    return CorruptFile(
        "The model's weights are damaged", f"{name}: {why}.", "Download the model again."
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, in the order of their names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if index.stat().st_size > _INDEX_LIMIT:
            raise _damaged(index.name, f"it has {index.stat().st_size:,} bytes")
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside the folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise _damaged(index.name, f"it is not a valid index ({_short(exc)})") from exc
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CorruptFile(
                "The model's weights are incomplete",
                f"{len(missing)} of {len(names)} weight files are missing"
                + (f", the first is {missing[0]}." if missing else "."),
                "Download the model again.",
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise UnsupportedModel(
            "Only pickled weights",
            f"The weights are in {pickled[0]}. Such files are Python pickles, and opening one "
            "can run any code hidden in it.",
            "Get the model's safetensors version, or convert it (the Hub's safetensors/convert "
            "space does so).",
        )
    raise UnsupportedModel(
        "No weights in this folder",
        f"{folder.name} holds neither model.safetensors nor model.safetensors.index.json.",
        "Choose the folder of a complete Hugging Face model.",
    )


# -------------------------------------------------------------------- describe and check


def describe(folder: Path) -> ModelSummary:
    """Summary of a model folder from its configuration and weight headers; loads no weights.

    Models that bring their own program are described too, without running it. Raises what
    `check_folder` raises, except for missing tokenizer files and consent.
    """
    raw = read_config(folder)
    if custom_code.needs_code(raw):
        return _describe_own(folder, raw)
    refuse_foreign_code(raw)
    config = load_config(folder)
    text: Any = config.get_text_config()
    tensors = read_headers(folder)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    parameters = 0
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
        if is_parameter(name, info) and not (tied and name in _OUTPUT_WEIGHTS):
            parameters += prod(info.shape)
    d_model = int(text.hidden_size)
    n_heads = int(getattr(text, "num_attention_heads", 0) or 0)
    d_mlp = (
        getattr(text, "intermediate_size", None)
        or getattr(text, "ffn_dim", None)
        or getattr(text, "n_inner", None)
        or 4 * d_model  # GPT-2 and its kin leave it unsaid
    )
    context = getattr(text, "max_position_embeddings", None)
    return ModelSummary(
        architecture=(raw.get("architectures") or [""])[0],
        model_type=str(config.model_type),
        n_layers=int(text.num_hidden_layers),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
        d_mlp=int(d_mlp),
        vocab_size=int(text.vocab_size),
        context_length=None if context is None else int(context),
        tied_embeddings=tied,
        parameters=parameters,
        bytes_on_disk=_bytes_of(folder),
        dtypes=tuple(sorted(sizes, key=lambda dtype: -sizes[dtype])),
    )


def _describe_own(folder: Path, raw: dict[str, Any]) -> ModelSummary:
    from mistudio.engine.models.from_headers import describe_from_headers

    tensors = read_headers(folder)
    made = describe_from_headers(raw, tensors)
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
    return ModelSummary(
        architecture=made.architecture,
        model_type=made.model_type,
        n_layers=made.n_layers,
        d_model=made.d_model,
        n_heads=made.n_heads,
        n_kv_heads=made.n_kv_heads,
        d_mlp=made.d_mlp,
        vocab_size=made.vocab_size,
        context_length=made.context_length,
        tied_embeddings=made.tied_embeddings,
        parameters=made.parameters,
        bytes_on_disk=_bytes_of(folder),
        dtypes=tuple(sorted(sizes, key=lambda dtype: -sizes[dtype])),
    )


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of all weight files of a folder."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        tensors |= read_safetensors_header(path)
    return tensors


def _bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_folder(folder: Path, own_code: bool = False) -> None:
    """Raise `NotFound`, `CorruptFile` or `UnsupportedModel` where `load_model` would fail;
    `custom_code.NeedsConsent` for a model that brings its own program, unless `own_code` says that
    somebody has consented to it."""
    raw = read_config(folder)
    for path in folder.iterdir():
        if path.suffix in MODEL_FILES:
            custom_code.check_link(folder, path)
    if not (own_code and custom_code.needs_code(raw)):
        refuse_foreign_code(raw)
        refuse_other_kinds(raw)
        load_config(folder)
    read_headers(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedModel(
            "No tokenizer in this folder",
            f"None of {', '.join(_TOKENIZER_FILES)} is in {folder.name}.",
            "Download the model again with its tokenizer files.",
        )


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise NotFound("Folder not found", f"{folder} is not a folder.", "Check the path.")
    if not any(folder.iterdir()):
        raise NotFound(
            "The folder is empty", f"{folder} holds no files.", "Choose a model's folder."
        )
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModel(
            "Not a Hugging Face model",
            f"{folder.name} has no config.json.",
            "Choose the folder of a Hugging Face model.",
        )
    if path.stat().st_size > _CONFIG_LIMIT:
        raise _bad_config(f"config.json has {path.stat().st_size:,} bytes")
    return parse_config(path.read_bytes())


def parse_config(data: bytes) -> dict[str, Any]:
    """config.json as it was read or fetched. Raises `CorruptFile` where it is no JSON object, is
    nested without end, or asks for what no model has: a billion layers would be built in memory
    before anybody noticed."""
    try:
        config = json.loads(data)
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as exc:
        raise _bad_config(f"config.json is not valid: {_short(exc)}") from exc
    _refuse_bombs(config)
    _refuse_other_types(config)
    return config


def _refuse_other_types(config: dict[str, Any]) -> None:
    """What decides which code reads the model must be plain text, and no name of a repository:
    transformers would fetch attention code (kernels) from there."""
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise _bad_config("architectures is no list of names")
    if not isinstance(config.get("model_type", ""), str | None):
        raise _bad_config("model_type is no text")
    for key, value in config.items():
        if isinstance(value, dict) and "config" in key:
            _refuse_other_types(value)
        elif key.strip("_").startswith(("attn_implementation", "experts_implementation")) and (
            "/" in str(value)
        ):
            raise UnsupportedModel(
                "The model asks for code from elsewhere",
                f"config.json asks for {str(value)[:80]!r} as its {key}: that is compiled code of "
                "another repository, which miStudio never fetches.",
                f"Take {key} out of config.json, or choose another model.",
            )


def plain_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration under Llama's names for them (`n_embd` is `hidden_size`)."""
    text = config.get("text_config")
    told = {**config, **text} if isinstance(text, dict) else dict(config)
    return told | {_KEYS[key]: value for key, value in told.items() if key in _KEYS}


def _refuse_bombs(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, dict) and "config" in key:
            _refuse_bombs(value)
        elif (limit := _limit_of(key)) is not None and value is not None:
            if isinstance(value, list):  # one for each layer
                value = max((n for n in value if isinstance(n, int)), default=0)
            exact = _KEYS.get(key, key) in _LIMITS
            if isinstance(value, bool) or not isinstance(value, int | float):
                if not exact:
                    continue  # only its name sounds like a number
                raise _bad_config(f"{key} is {str(value)[:40]!r}, not a number")
            if not (0 if exact else -1) <= value <= limit:
                raise _bad_config(
                    f"{key} is {f'{value:,}'[:40]}, beyond the {limit:,} that are read"
                )
    layers, experts = (_most(config, part) for part in ("layer", "expert"))
    if layers * experts > _MODULES:
        raise _bad_config(f"it asks for {layers:,} layers of {experts:,} experts")


def _limit_of(key: str) -> int | None:
    """What a number under this name may be at most; None where it may be anything. Names that no
    list has (`num_nextn_predict_layers`) are judged by what they count."""
    known = _LIMITS.get(_KEYS.get(key, key))
    if known is not None or not key.startswith(("n_", "num_")):
        return known
    return next((limit for part, limit in _COUNTED.items() if part in key), None)


_COUNTED = {"vocab": 10_000_000, "expert": 4_096, "head": 4_096, "layer": 1_000, "block": 100_000}
_MODULES = 100_000  # experts of all layers; the largest models have some 25,000


def _most(config: dict[str, Any], part: str) -> int:
    """The largest whole number under a name that counts such parts, at least 1."""
    found = [
        value
        for key, value in config.items()
        if part in key and _limit_of(key) and isinstance(value, int)
    ]
    return max(found, default=1)


_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}


def _bad_config(why: str) -> CorruptFile:
    return CorruptFile(
        "The model's configuration is damaged", f"{why}.", "Download the model again."
    )


def refuse_foreign_code(raw: dict[str, Any]) -> None:
    """Refuse models that need Python code of their own; many bring it and do not need it."""
    from mistudio.engine.models.hf import CONFIG_MAPPING

    if custom_code.needs_code(raw):
        raise custom_code.needs_consent(raw)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            "Unknown kind of model",
            f'The installed transformers does not know models of type "{str(model_type)[:80]}".',
            "Update miStudio, or choose another model.",
        )


def refuse_other_kinds(raw: dict[str, Any]) -> None:
    """Refuse everything but causal language models, by what transformers says of the class."""
    from mistudio.engine.models.hf import modeling_auto as auto

    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    name = (raw.get("architectures") or [None])[0]
    encoder_decoder = raw.get("is_encoder_decoder") or (
        name in set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
    )
    supported = "miStudio reads decoder-only language models (Llama, GPT-2, Gemma, Qwen, ...)."
    if encoder_decoder:
        raise UnsupportedModel(
            "Not a decoder-only model", f"{name or 'The model'} is an encoder-decoder.", supported
        )
    if name in causal or (name is None and not raw.get("auto_map")):
        return
    if name in set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
        raise UnsupportedModel("Not a decoder-only model", f"{name} is an encoder.", supported)
    raise UnsupportedModel(
        "Not a causal language model", f"{name} does not predict the next token.", supported
    )


def load_config(folder: Path) -> Any:
    """What transformers makes of config.json."""
    from mistudio.engine.models.hf import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # whatever the checks of some hundred configuration classes raise
        raise _bad_config(f"transformers says: {' '.join(str(exc).split())[:300]}") from exc


def is_parameter(name: str, info: TensorInfo) -> bool:
    """False for buffers that older files carry: causal masks and rotary frequencies."""
    if name.endswith(("masked_bias", "inv_freq")) or info.dtype == "BOOL":
        return False
    return not (name.endswith("attn.bias") and len(info.shape) == 4)


# -------------------------------------------------------------------- load


def resolve_precision(precision: Precision, device: str = "cpu") -> str:
    """What `precision` means on `device`: "fp32", "bf16", "fp16", "q8", "q4" or "q2".

    "auto" on a CPU is bf16 where its matrix product measures over 1.2x as fast as fp32, else
    fp32; on a GPU it is bf16 where the device has it, else fp16.
    """
    import torch

    if precision not in PRECISIONS:
        raise InvalidInput(
            "Unknown precision",
            f'"{precision}" is not a precision.',
            f"Choose one of {', '.join(PRECISIONS)}.",
            field="precision",
        )
    if precision != "auto":
        return precision
    if torch.device(device).type == "cpu":
        return "bf16" if _bf16_speedup() > 1.2 else "fp32"
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp16"


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as torch names them


def compute_precision(precision: str, device: str = "cpu") -> str:
    """What a model of this (resolved) precision computes in: quantised ones, in what is best on
    the device."""
    return resolve_precision("auto", device) if precision in QUANTISED else precision


@lru_cache(maxsize=1)
def _bf16_speedup() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16 (about 0.1 s)."""
    import torch

    def best(dtype: torch.dtype) -> float:
        a = torch.ones(512, 576, dtype=dtype)
        b = torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(7):  # the first ones warm up; the best is least disturbed by other work
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        return best(torch.float32) / best(torch.bfloat16)


def load_model(
    folder: Path,
    precision: Precision = "auto",
    device: str = "cpu",
    progress: Progress = SILENT,
    consent: custom_code.Consent | None = None,
) -> HookedDecoder:
    """Load the causal language model in `folder`, ready to capture and intervene.

    Weights are read from safetensors only, nothing is fetched. A program that comes with the model
    is run only where it is needed and is what `consent` was given to (`custom_code`); else it is
    refused.
    At "q8", "q4" and "q2" the matrices of the blocks are quantised one after another as they are
    read (`quantise`), so that the whole model is never there unquantised; the rest is in the
    precision that "auto" means on the device. The precision taken is reported as the metric
    `precision`. Raises what `check_folder` raises, and `Incompatible` where the device or what
    quantises is not there.
    """
    import torch

    from mistudio.engine.models.hf import AutoModelForCausalLM
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.models.quantise import loading_config, require_backend

    check_folder(folder, own_code=consent is not None)
    _check_device(device)
    chosen = resolve_precision(precision, device)
    require_backend(chosen, device)
    progress.check()
    progress.report(0, 1, "Loading the model", precision=chosen)
    dtype = getattr(torch, DTYPES[compute_precision(chosen, device)])
    quantised = loading_config(chosen, device)
    reader: Any = AutoModelForCausalLM
    more: dict[str, Any] = {"trust_remote_code": False}
    own = custom_code.needs_code(read_config(folder))
    if own and consent is not None:
        program = custom_code.load_classes(folder, consent)
        reader, more = program.model, {"config": program.config}
    with custom_code.own_words() if own else nullcontext():
        model, found = _read_model(reader, folder, dtype, quantised, more)
    missing = sorted(found["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise CorruptFile(
            "The model's weights are incomplete",
            f"{len(missing)} tensors are missing, the first is {missing[0]}.",
            "Download the model again.",
        )
    progress.check()
    model.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        _let_go_of_the_file(model, folder)
    with custom_code.own_words() if own else nullcontext():
        decoder = HookedDecoder(model.to(device))
    progress.report(1, 1, "Loading the model", precision=chosen)
    return decoder


def _read_model(
    reader: Any, folder: Path, dtype: torch.dtype, quantised: Any, more: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of missing and unexpected tensors."""
    try:
        with quiet_transformers():
            model, found = reader.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **more,
                **({"quantization_config": quantised} if quantised else {}),
            )
    except ImportError as exc:  # quantised formats with libraries of their own
        raise UnsupportedModel(
            "The model needs another library",
            " ".join(str(exc).split())[:300],
            "Choose the unquantised version of the model.",
        ) from exc
    except RuntimeError as exc:
        reason = quantised.failures[0] if quantised and quantised.failures else exc
        if "size mismatch" not in str(reason) and "ignore_mismatched_sizes" not in str(reason):
            raise reason from None
        raise CorruptFile(
            "The model's weights do not fit its configuration",
            "Tensors in the file have other sizes than config.json asks for.",
            "Download the model again.",
        ) from exc
    return model, found


def _let_go_of_the_file(model: Any, folder: Path) -> None:
    """Weights that were read at the precision they are stored in may lie in the mapped file: it
    could not be deleted on Windows, its pages would count as ours, and were it cut off the process
    would end. Copied one after another."""
    import torch

    from mistudio.engine.models.quantise import QuantisedLinear

    own = {
        id(p) for m in model.modules() if isinstance(m, QuantisedLinear) for p in m.packed.values()
    }
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    headers = map(read_safetensors_header, weight_files(folder))
    stored = {names.get(info.dtype) for header in headers for info in header.values()}
    for tensor in (*model.parameters(), *model.buffers()):
        # What was converted is ours already; a second copy would only leave a hole behind.
        if id(tensor) not in own and tensor.dtype in stored:
            tensor.data = tensor.data.clone()


def _check_device(device: str) -> None:
    import torch

    kind = torch.device(device).type
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise Incompatible(
            "The device is not there",
            f"PyTorch sees no {kind} device on this computer.",
            "Choose the CPU, or install a PyTorch build for the device.",
        )


_quieting = threading.Lock()
_quiet_blocks = 0
_spoke: tuple[int, bool] = (0, False)  # verbosity, progress bars: as the first block found them


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on the terminal while a model loads. What transformers says is
    a setting of the whole process: the last of several threads to end puts it back."""
    from mistudio.engine.models.hf import logging

    global _quiet_blocks, _spoke
    with _quieting:
        if not _quiet_blocks:
            _spoke = logging.get_verbosity(), logging.is_progress_bar_enabled()
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        _quiet_blocks += 1
    try:
        yield
    finally:
        with _quieting:
            _quiet_blocks -= 1
            if not _quiet_blocks:
                verbosity, bars = _spoke
                logging.set_verbosity(verbosity)
                if bars:
                    logging.enable_progress_bar()


# -------------------------------------------------------------------- tokenizers


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; raises `CorruptFile` where it cannot be read.

    Where there is a tokenizer.json, it alone says how text is split: transformers 5 would build
    a tokenizer from the class that tokenizer_config.json names and lose what that class does not
    know. SmolLM2's files name GPT2Tokenizer, which splits "1  2" otherwise than the model learnt.
    """
    from mistudio.engine.models.hf import AutoTokenizer, PreTrainedTokenizerFast

    whole = (folder / "tokenizer.json").is_file()
    reader: Any = PreTrainedTokenizerFast if whole else AutoTokenizer
    try:
        with quiet_transformers():
            tokenizer = reader.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except BaseException as exc:
        if not (isinstance(exc, OSError) or is_fault_of_file(exc)):
            raise
        raise CorruptFile(
            "The tokenizer cannot be read",
            f"transformers says: {' '.join(str(exc).split())[:300]}",
            "Download the model again with its tokenizer files.",
        ) from exc
    # Decoder-only models take no token types; the general class would hand them some.
    tokenizer.model_input_names = [
        name for name in tokenizer.model_input_names if name != "token_type_ids"
    ]
    return tokenizer


def is_fault_of_file(exc: BaseException) -> bool:
    """Whether libraries raise this for files that are not what they should be, rather than for what
    the user or the computer does. The tokenizers library raises bare Exception, and panics: that
    is no Exception at all and would end the thread."""
    if isinstance(
        exc,
        ArithmeticError | AttributeError | LookupError | RecursionError | TypeError | ValueError,
    ):
        return True
    return type(exc) is Exception or type(exc).__name__ == "PanicException"


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer itself puts before ordinary text, or None."""
    text = "The cat"
    ids: list[int] = list(tokenizer(text)["input_ids"])
    plain: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) > len(plain) and ids[1 : 1 + len(plain)] == plain:
        return ids[0]
    return None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that stand for no text: named special tokens and added tokens marked as special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that goes between documents: the end of a text as the model met it in pretraining.

    Chat models' EOS ends a turn; where they keep the base model's <|endoftext|>, that one. On
    packed encyclopedia text, SmolLM2-Instruct loses 2.86 nats/token with it, 2.99 with its EOS.
    """
    known = special_ids(tokenizer)
    for token in _DOCUMENT_ENDS:
        index = tokenizer.convert_tokens_to_ids(token)
        if isinstance(index, int) and index in known:
            return index
    for candidate in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if candidate is not None:
            return int(candidate)
    raise UnsupportedModel(
        "The tokenizer has no separator",
        "It names no end-of-text token, so that documents cannot be told apart.",
        "Choose another model.",
    )
