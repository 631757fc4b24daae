"""GGUF files of llama.cpp made ordinary model folders, quantised or not.

Takes any file of the "llama" architecture with a byte-level BPE tokenizer; others are refused with
the reason. Weights are dequantised to fp16 one after another, so that memory stays at a few hundred
MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.models.gguf_header import check_gguf_header
from mistudio.engine.models.loading import is_fault_of_file
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, NotFound, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def import_gguf(
    path: Path,
    folder: Path,
    require_space: Callable[[int, str], None],
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the model of a GGUF file into the empty `folder`; returns where it came from.

    `require_space` is asked before anything is written. Raises what `convert_gguf` raises.
    """
    if path.suffix.lower() != ".gguf":
        raise UnsupportedModel(
            "Not a model",
            f"{path.name} is neither a model's folder nor a GGUF file.",
            "Choose the folder of a Hugging Face model, or a .gguf file.",
        )
    reader = _open_gguf(path)
    numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    del reader  # it maps the file
    require_space(2 * numbers, f"Converting {path.name}")
    convert_gguf(path, folder, progress)
    return {
        "source": f"GGUF file {path.resolve()}",
        "file": path.name,
        "sha256": _sha256(path, progress),
        "converted_from": kinds,
    }


def write_gguf_config(path: Path, folder: Path) -> None:
    """Only the configuration of a GGUF file's model, so that it can be planned for before it is
    converted. Raises what `convert_gguf` raises."""
    reader = _open_gguf(path)
    with _in_words(path):
        _write_config(reader, folder)


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            progress.check()
            digest.update(chunk)
    return digest.hexdigest()


def convert_gguf(gguf: Path, folder: Path, progress: Progress = SILENT) -> None:
    """Write the GGUF file of a Llama model as a Hugging Face folder with fp16 weights.

    Weights are dequantised and written one at a time, so that memory stays at a few hundred MB.
    Raises `CorruptFile` for files that are not GGUF, `UnsupportedModel` for other architectures
    and tokenizers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress.report(0, None, "Reading the model file")
    reader = _open_gguf(gguf)
    progress.check()
    with _in_words(gguf):
        config = _write_config(reader, folder)
        progress.report(0, None, "Writing the tokenizer")
        _write_tokenizer(reader, folder)
        progress.check()
        _write_weights(reader, config, folder / "model.safetensors", progress)


def _open_gguf(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    if not path.is_file():
        raise NotFound("File not found", f"{path} does not exist.", "Check the path.")
    check_gguf_header(path)
    with _in_words(path):
        reader = GGUFReader(path)
    return reader


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Whatever the libraries raise for entries that are not what their names promise."""
    try:
        yield
    except BaseException as exc:
        if not is_fault_of_file(exc):
            raise
        raise CorruptFile(
            "The model file is damaged",
            f"{path.name} is not readable as GGUF: {' '.join(str(exc).split())[:300]}.",
            "Fetch it again.",
        ) from exc


_MISSING = object()


def _field(reader: GGUFReader, key: str, default: Any = _MISSING) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _MISSING:
        raise CorruptFile("The model file is damaged", f"It has no entry {key}.", "Fetch it again.")
    return default


def _write_config(reader: GGUFReader, folder: Path) -> dict[str, Any]:
    """config.json and generation_config.json from the file's own entries; returns the config."""
    from mistudio.engine.models.hf import GenerationConfig, LlamaConfig

    architecture = _field(reader, "general.architecture")
    scaling = _field(reader, "llama.rope.scaling.type", "none")
    if architecture != "llama" or scaling != "none":
        raise UnsupportedModel(
            "This GGUF file cannot be converted",
            f"Its architecture is {architecture} with rope scaling {scaling}.",
            "Use the model's safetensors folder instead.",
        )
    d_model = _field(reader, "llama.embedding_length")
    n_heads = _field(reader, "llama.attention.head_count")
    ids = {
        name: _field(reader, f"tokenizer.ggml.{key}_token_id", None)
        for name, key in (
            ("bos_token_id", "bos"),
            ("eos_token_id", "eos"),
            ("pad_token_id", "padding"),
        )
    }
    tensors = {tensor.name for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=d_model,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv", n_heads),
        head_dim=_field(reader, "llama.attention.key_length", d_model // n_heads),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # As short as fp32 allows: 1e-05, not 9.999999747378752e-06.
        rms_norm_eps=_short(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _short(_field(reader, "llama.rope.freq_base", 10000.0)),
        },
        tie_word_embeddings="output.weight" not in tensors,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
        **ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    written: dict[str, Any] = config.to_dict()
    return written


def _short(value: float) -> float:
    """The shortest decimal that is the same fp32 number."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """tokenizer.json and its configuration, chat template included.

    Built from the file's entries with `tokenizers` itself: what transformers makes of a GGUF
    file lacks the digit splitting that `tokenizer.ggml.pre = smollm` asks for.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    from mistudio.engine.models.hf import PreTrainedTokenizerFast

    kind = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre", "gpt-2")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitting: pre_tokenizers.PreTokenizer
    if kind == ("gpt2", "smollm"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        splitting = pre_tokenizers.Sequence([digits, byte_level])
    elif kind == ("gpt2", "gpt-2"):
        splitting = byte_level
    else:
        raise UnsupportedModel(
            "This GGUF file cannot be converted",
            f"Its tokenizer is of kind {'/'.join(kind)}.",
            "Use the model's safetensors folder instead.",
        )
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = splitting
    backend.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # llama.cpp's token types
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == control
        ]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == user_defined
        ]
    )
    named = {
        name: tokens[index]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if (index := _field(reader, f"tokenizer.ggml.{key}_token_id", None)) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=_field(reader, "llama.context_length"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template", None)
    tokenizer.save_pretrained(folder)


def _write_weights(
    reader: GGUFReader, config: dict[str, Any], path: Path, progress: Progress
) -> None:
    """Every tensor as fp16 into one safetensors file, written as it is dequantised."""
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF counts the fastest axis first
        end = start + 2 * int(tensor.n_elements)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            for rows in _dequantised(name, tensor, config):
                progress.check()
                out.write(rows.astype("<f2").tobytes())
                done += 2 * rows.size
                progress.report(done, start, "Converting the model")
        out.flush()
        os.fsync(out.fileno())


def _hf_name(name: str) -> str:
    if name in _OUTER_TENSORS:
        return _OUTER_TENSORS[name]
    parts = name.split(".")
    if (
        len(parts) == 4
        and parts[0] == "blk"
        and parts[3] == "weight"
        and parts[2] in _LAYER_TENSORS
    ):
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
    raise UnsupportedModel(
        "This GGUF file cannot be converted",
        f"It holds a tensor {name} that plain Llama models do not have.",
        "Use the model's safetensors folder instead.",
    )


def _dequantised(
    name: str, tensor: ReaderTensor, config: dict[str, Any]
) -> Iterator[NDArray[np.float32]]:
    """The rows of a tensor as fp32, some thousand at a time."""
    from gguf.quants import dequantize

    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }.get(name.split(".")[-2])
    data = tensor.data
    step = len(data) if heads or data.ndim == 1 else 4096
    for first in range(0, len(data), step):
        rows = dequantize(data[first : first + step], tensor.tensor_type)
        if heads:
            # In GGUF files of this architecture each head's rotary pairs lie side by side
            # (2i, 2i + 1); transformers wants (i, i + half).
            half = len(rows) // heads // 2
            rows = rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(len(rows), -1)
        yield rows
