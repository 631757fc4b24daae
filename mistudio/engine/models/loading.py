"""Model folders: described and checked without loading, then loaded at a chosen precision.

Only local folders with safetensors weights are read, and no code that comes with a model is ever
run. Where tensors are read inside the loaded model is `hooks`' matter.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, Incompatible, InvalidInput, NotFound, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from mistudio.engine.models.hf import PreTrainedTokenizerBase
    from mistudio.engine.models.hooks import HookedDecoder

Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16")

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
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


# -------------------------------------------------------------------- headers


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of the tensors in `path`, without reading the tensors.

    Raises `CorruptFile` where the file is empty, cut off or not in the format.
    """
    size = path.stat().st_size
    if size == 0:
        raise _damaged(path, "it is empty (0 bytes)")
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise _damaged(path, "it is a Git LFS pointer, not the file it points to")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _HEADER_LIMIT):
            raise _damaged(
                path, f"its header would take {length:,} bytes, but the file has {size:,}"
            )
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        infos = {}
        end = 0
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last:
                raise ValueError(f"tensor {name} has offsets {first}, {last}")
            shape = tuple(int(n) for n in entry["shape"])
            infos[name] = TensorInfo(str(entry["dtype"]), shape, last - first)
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _damaged(path, f"its header is not valid ({exc})") from exc
    if 8 + length + end != size:
        raise _damaged(
            path, f"it has {size:,} bytes where its header promises {8 + length + end:,}"
        )
    return infos


def _damaged(path: Path, why: str) -> CorruptFile:
    return CorruptFile(
        "The model's weights are damaged", f"{path.name}: {why}.", "Download the model again."
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, in the order of their names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise _damaged(index, f"it is not a valid index ({exc})") from exc
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
    if single.exists():
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

    Raises what `check_folder` raises, except for missing tokenizer files.
    """
    raw = _read_config(folder)
    _refuse_foreign_code(raw)
    config = _load_config(folder)
    text: Any = config.get_text_config()
    tensors: dict[str, TensorInfo] = {}
    for path in _weight_files(folder):
        tensors |= read_safetensors_header(path)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    parameters = 0
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
        if _is_parameter(name, info) and not (tied and name in _OUTPUT_WEIGHTS):
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
        bytes_on_disk=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        dtypes=tuple(sorted(sizes, key=lambda dtype: -sizes[dtype])),
    )


def check_folder(folder: Path) -> None:
    """Raise `NotFound`, `CorruptFile` or `UnsupportedModel` where `load_model` would fail."""
    raw = _read_config(folder)
    _refuse_foreign_code(raw)
    _refuse_other_kinds(raw)
    _load_config(folder)
    for path in _weight_files(folder):
        read_safetensors_header(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedModel(
            "No tokenizer in this folder",
            f"None of {', '.join(_TOKENIZER_FILES)} is in {folder.name}.",
            "Download the model again with its tokenizer files.",
        )


def _read_config(folder: Path) -> dict[str, Any]:
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
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as exc:
        raise CorruptFile(
            "The model's configuration is damaged",
            f"config.json is not valid: {exc}.",
            "Download the model again.",
        ) from exc
    return config


def _refuse_foreign_code(raw: dict[str, Any]) -> None:
    """Refuse models that need Python code of their own; many bring it and do not need it."""
    from mistudio.engine.models.hf import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise UnsupportedModel(
            "The model needs its own program code",
            f'Models of type "{model_type}" run Python code that comes with the download. '
            "miStudio never runs such code: it could do anything on this computer.",
            "Choose a model that transformers supports itself.",
        )
    raise UnsupportedModel(
        "Unknown kind of model",
        f'The installed transformers does not know models of type "{model_type}".',
        "Update miStudio, or choose another model.",
    )


def _refuse_other_kinds(raw: dict[str, Any]) -> None:
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
    if raw.get("auto_map"):
        raise UnsupportedModel(
            "The model needs its own program code",
            f"{name} is Python code that comes with the download. miStudio never runs such code: "
            "it could do anything on this computer.",
            "Choose a model that transformers supports itself.",
        )
    raise UnsupportedModel(
        "Not a causal language model", f"{name} does not predict the next token.", supported
    )


def _load_config(folder: Path) -> Any:
    from mistudio.engine.models.hf import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # whatever the checks of some hundred configuration classes raise
        raise CorruptFile(
            "The model's configuration is damaged",
            f"transformers says: {' '.join(str(exc).split())[:300]}",
            "Download the model again.",
        ) from exc


def _is_parameter(name: str, info: TensorInfo) -> bool:
    """False for buffers that older files carry: causal masks and rotary frequencies."""
    if name.endswith(("masked_bias", "inv_freq")) or info.dtype == "BOOL":
        return False
    return not (name.endswith("attn.bias") and len(info.shape) == 4)


# -------------------------------------------------------------------- load


def resolve_precision(precision: Precision, device: str = "cpu") -> str:
    """ "fp32", "bf16" or "fp16": what `precision` means on `device`.

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
) -> HookedDecoder:
    """Load the causal language model in `folder`, ready to capture and intervene.

    Weights are read from safetensors only, no code of the model's is run, nothing is fetched.
    The precision taken is reported as the metric `precision`. Raises what `check_folder` raises,
    and `Incompatible` where the device is not there.
    """
    import torch

    from mistudio.engine.models.hf import AutoModelForCausalLM
    from mistudio.engine.models.hooks import HookedDecoder

    check_folder(folder)
    _check_device(device)
    chosen = resolve_precision(precision, device)
    progress.check()
    progress.report(0, 1, "Loading the model", precision=chosen)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
    try:
        with _quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ImportError as exc:  # quantised formats with libraries of their own
        raise UnsupportedModel(
            "The model needs another library",
            " ".join(str(exc).split())[:300],
            "Choose the unquantised version of the model.",
        ) from exc
    except RuntimeError as exc:
        if "size mismatch" not in str(exc) and "ignore_mismatched_sizes" not in str(exc):
            raise
        raise CorruptFile(
            "The model's weights do not fit its configuration",
            "Tensors in the file have other sizes than config.json asks for.",
            "Download the model again.",
        ) from exc
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
    decoder = HookedDecoder(model.to(device))
    progress.report(1, 1, "Loading the model", precision=chosen)
    return decoder


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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on the terminal while a model loads."""
    from mistudio.engine.models.hf import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
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
        with _quiet_transformers():
            tokenizer = reader.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as exc:
        # The tokenizers library raises bare Exception for files it cannot parse.
        if not isinstance(exc, ValueError | KeyError | TypeError | AttributeError | OSError) and (
            type(exc) is not Exception
        ):
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
