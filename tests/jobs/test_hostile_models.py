"""Broken and hostile models: each is refused in words, takes little memory and leaves nothing."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journeys import road
from safetensors.torch import load_file, save_file

from mistudio.jobs.control import Control
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import AddModel
from mistudio.library.library import Library

GROWTH = 400 * 1024**2  # bytes that the process may grow by in one refusal
Damage = Callable[[Path], object]


@pytest.fixture(scope="module", autouse=True)
def libraries_imported() -> None:
    """Their memory is not that of a refusal."""
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.checks import check_tensors, check_tokenizer

    found = read_architecture(road.MODEL)
    check_tokenizer(road.MODEL, found.vocab_size)
    check_tensors(road.MODEL, found)


def peak() -> int:
    """The most memory that this process has ever had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def refused(library: Library, source: Path, words: str) -> None:
    before = peak()
    job = AddModel(str(source), "fp32")
    record = run_job(library, job, submit(library, job), Control())
    assert record.status == "failed", "it was taken"
    said = f"{record.error['title']}. {record.error['what']}"
    assert not record.error.get("traceback"), record.error["traceback"]
    assert re.search(words, said), said
    assert record.error["next_step"] and len(said) < 1_000
    assert library.models.all() == []
    assert not list((library.root / "models").glob("*"))
    assert peak() - before < GROWTH


def copied(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    shutil.copytree(road.MODEL, source)
    return source


# --- weights --------------------------------------------------------------------------------------


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder: Path, header: object, body: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_header(change: Callable[[dict[str, Any]], object], more: bytes = b"") -> Damage:
    def damage(folder: Path) -> None:
        header, body = header_of(folder)
        change(header)
        write(folder, header, body + more)

    return damage


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


def _same_place(header: dict[str, Any]) -> None:
    names = [n for n in header if "up_proj" in n]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(100_000))


def _endless_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", (1 << 64) - 1) + path.read_bytes())


def _long_header(folder: Path) -> None:
    """As long as the safetensors library takes, and valid: two GB as Python objects."""
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    write(folder, b"{" + b",".join(b'"%07d":%s' % (n, entry.encode()) for n in range(1_000_000))
          + b"}")  # fmt: skip


def _sparse_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(1 << 40)


def _shards(folder: Path, **change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    where = {name: change.get(file, file) for file, held in files.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _missing_shard(folder: Path) -> None:
    _shards(folder)
    (folder / "model-2.safetensors").unlink()


def _broken_shard(folder: Path) -> None:
    _shards(folder)
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _half_index(folder: Path) -> None:
    _shards(folder)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())["weight_map"]
    first = {name: file for name, file in told.items() if file == "model-1.safetensors"}
    index.write_text(json.dumps({"weight_map": first}))


def _index(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def _long_index(folder: Path) -> None:
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.truncate(200 * 1024**2)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        outside = folder.parent / "outside"
        if path.exists():
            shutil.move(path, outside)
        else:
            outside.write_text("{}")
        path.symlink_to(target.replace("OUTSIDE", str(outside)))

    return damage


def _pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def _folder_for_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')


WEIGHTS: dict[str, tuple[Damage, str]] = {
    "random bytes": (_garbage, "header would take"),
    "endless header": (_endless_header, "header would take"),
    "long valid header": (_long_header, "beyond the 16,777,216 that are read"),
    "long empty header": (_sparse_header, "beyond the 16,777,216 that are read"),
    "overlapping": (with_header(_same_place), "overlap or leave gaps"),
    "a gap": (with_header(lambda h: [
        e.update(data_offsets=[x + 8 for x in e["data_offsets"]])
        for n, e in h.items() if n == EMBED]), "overlap or leave gaps"),
    "offsets backwards": (with_header(lambda h: h[UP].update(data_offsets=[9, 3])), "no range"),
    "offsets of fractions": (with_header(lambda h: h[UP].update(data_offsets=[0.5, 9])),
                             "no range"),
    "three offsets": (with_header(lambda h: h[UP].update(data_offsets=[1, 2, 3])), "not valid"),
    "no offsets": (with_header(lambda h: h[UP].pop("data_offsets")), "not valid"),
    "unknown type": (with_header(lambda h: h[UP].update(dtype="F99")), "unknown type"),
    "type of another size": (with_header(lambda h: h[UP].update(dtype="F64")),
                             "bytes that its shape needs"),
    "type that is a list": (with_header(lambda h: h[UP].update(dtype=["F16"])), "unknown type"),
    "huge shape": (with_header(lambda h: h[UP].update(shape=[1 << 61, 1 << 61])),
                   "bytes that its shape needs"),
    "shape of text": (with_header(lambda h: h[UP].update(shape=["448"])), "shape that no"),
    "a byte more": (with_header(lambda h: None, b"x"), "promises"),
    "same name for all": (lambda f: write(f, b'{"a":{"dtype":"F32","shape":[0],"data_offsets":'
                                             b'[0,0]},"a":null}'), "not valid"),
    "tensor of another shape": (with_tensors(lambda t: t.update({UP: t[UP][:5].clone()})),
                                r"up_proj\.weight is 5 x 128 instead of"),
    "transposed tensor": (with_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
                          "another shape"),
    "missing tensor": (with_tensors(lambda t: t.pop(UP)), "1 tensors are missing"),
    "wrong names": (with_tensors(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)]),
                    "tensors are missing"),
    "nearly no tensors": (with_tensors(lambda t: [t.pop(n) for n in list(t) if n != UP]),
                          "files have"),
    "nan": (with_tensors(lambda t: t[UP].view(-1)[3:4].fill_(math.nan)), "not finite"),
    "infinity": (with_tensors(lambda t: t[EMBED].view(-1)[3:4].fill_(math.inf)), "not finite"),
    "missing shard": (_missing_shard, "1 of 2 weight files are missing"),
    "broken shard": (_broken_shard, "model-2.*promises"),
    "index of half": (_half_index, "tensors are missing|files have"),
    "index out of the folder": (
        lambda f: _shards(f, **{"model-2.safetensors": "../model-2.safetensors"}),
        "outside the folder"),
    "index at the root": (_index('{"weight_map": {"a": "/etc/passwd"}}'), "outside the folder"),
    "index of numbers": (_index('{"weight_map": {"a": 5}}'), "no.* valid index"),
    "index that is a list": (_index("[]"), "no.* valid index"),
    "index of nothing": (_index('{"weight_map": {}}'), "incomplete"),
    "index of config.json": (_index('{"weight_map": {"a": "config.json"}}'), "header would take"),
    "deep index": (_index('{"weight_map":' * 100_000), "no.* valid index"),
    "long index": (_long_index, "209,715,200 bytes"),
    "pickles only": (_pickled, "run any code"),
    "weights are a link out": (_link("model.safetensors", "OUTSIDE"), "leads out"),
    "weights are a link to a device": (_link("model.safetensors", "/dev/zero"), "leads out"),
    "weights are a link to nothing": (_link("model.safetensors", "nowhere"), "leads nowhere"),
    "weights are a link to themselves": (_link("model.safetensors", "model.safetensors"),
                                         "leads nowhere"),
    "vocabulary is a link out": (_link("vocab.json", "OUTSIDE"), "leads out"),
    "config is a link out": (_link("config.json", "OUTSIDE"), "leads out"),
    "weights are a pipe": (_pipe("model.safetensors"), "neither model.safetensors"),
    "index is a pipe": (_pipe("model.safetensors.index.json"), ""),
    "config is a pipe": (_pipe("config.json"), "no config.json"),
    "tokenizer is a pipe": (_pipe("tokenizer.json"), "None of tokenizer.json"),
    "weights are a folder": (_folder_for_file, "neither model.safetensors"),
    "an adapter only": (_adapter, "neither model.safetensors"),
}  # fmt: skip
del WEIGHTS["index is a pipe"]  # it is no file, so it is not there: see below


@pytest.mark.parametrize(("damage", "words"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_broken_weights_are_refused(
    empty: Library, tmp_path: Path, damage: Damage, words: str
) -> None:
    source = copied(tmp_path)
    damage(source)
    refused(empty, source, words)


def test_what_is_no_file_is_not_waited_for_and_adapters_are_not_followed(
    empty: Library, tmp_path: Path
) -> None:
    source = copied(tmp_path)
    _pipe("model.safetensors.index.json")(source)
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')
    job = AddModel(str(source), "fp32")
    record = run_job(empty, job, submit(empty, job), Control())
    assert record.status == "finished", record.error
    folder = empty.path(empty.models.all()[0].folder)
    assert {"adapter_config.json", "model.safetensors.index.json"}.isdisjoint(os.listdir(folder))


# --- configurations -------------------------------------------------------------------------------


def configured(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def _config(text: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def _long_config(folder: Path) -> None:
    with (folder / "config.json").open("ab") as file:
        file.write(b" " * (200 * 1024**2))


_MOE = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 1000,
    "num_local_experts": 4096,
}
CONFIGS: dict[str, tuple[Damage, str]] = {
    "a billion layers": (configured(num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,0"),
    "negative layers": (configured(num_hidden_layers=-3), "num_hidden_layers is -3"),
    "no layers": (configured(num_hidden_layers=0), "layers were not rec"),
    "layers of text": (configured(num_hidden_layers="12"), "'12', not a number"),
    "layers of a list": (configured(num_hidden_layers=[10**9]), "num_hidden_layers is 1,000"),
    "layers true": (configured(num_hidden_layers=True), "not a number"),
    "half layers": (configured(num_hidden_layers=2.5), "."),
    "more layers than weights": (configured(num_hidden_layers=200), "files have|missing"),
    "fewer heads": (configured(num_attention_heads=3), "."),
    "no heads": (configured(num_attention_heads=0), "."),
    "infinite width": (configured(hidden_size=math.inf), "hidden_size is inf"),
    "no number of width": (configured(hidden_size=math.nan), "hidden_size is nan"),
    "width of 5000 digits": (_config('{"hidden_size": 1' + "0" * 5000 + "}"), "not valid"),
    "width of 4000 digits": (_config('{"hidden_size": 1' + "0" * 4000 + "}"), "beyond the"),
    "vocabulary of a billion": (configured(vocab_size=10**9), "vocab_size is 1,000,000,000"),
    "vocabulary of ten million": (configured(vocab_size=10**7), "files have"),
    "negative vocabulary": (configured(vocab_size=-1), "vocab_size is -1"),
    "smaller vocabulary": (configured(vocab_size=1000), "does not match|another shape"),
    "hidden in a part": (configured(text_config={"num_hidden_layers": 10**9}), "1,000,000,000"),
    "under another name": (configured(num_nextn_predict_layers=10**9), "num_nextn_predict_layers"),
    "layers times experts": (configured(**_MOE), "1,000 layers of 4,096 experts"),
    "a million experts": (configured(num_local_experts=10**6), "num_local_experts"),
    "other width": (configured(hidden_size=256), "."),
    "unknown kind": (configured(model_type="llama99"), "llama99"),
    "kind that is a list": (configured(model_type=["llama"]), "model_type is no text"),
    "class that is text": (configured(architectures="LlamaForCausalLM"), "no list of names"),
    "class that is a number": (configured(architectures=[5]), "no list of names"),
    "kernel from elsewhere": (configured(attn_implementation="eve/kernel"), "code from elsewhere"),
    "own program": (configured(model_type="own", auto_map={"AutoModelForCausalLM": "m.M"}),
                    "never runs such code"),
    "quantised by a library that is not here": (
        configured(quantization_config={"quant_method": "aqlm"}), "needs|cannot be loaded"),
    "activation that there is not": (configured(hidden_act="os.system"), "."),
    "rope of nonsense": (configured(rope_parameters={"rope_type": "zzz", "rope_theta": "x"}), "."),
    "not utf-8": (_config(b'{"model_type": "\xff"}'), "not valid"),
    "deep": (_config('{"a":' * 100_000), "nested too deeply"),
    "deep lists": (_config("[" * 1_000_000), "nested too deeply"),
    "a list": (_config("[]"), "not an object"),
    "empty": (_config(""), "not valid"),
    "200 MB": (_long_config, "config.json has 209,7"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), CONFIGS.values(), ids=CONFIGS.keys())
def test_broken_configurations_are_refused(
    empty: Library, tmp_path: Path, damage: Damage, words: str
) -> None:
    source = copied(tmp_path)
    damage(source)
    refused(empty, source, words)


# --- tokenizers -----------------------------------------------------------------------------------


def tokenized(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def _tokenizer(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(text)

    return damage


def _long_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(1 << 30)


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "of another model": (tokenized(lambda t: t["model"]["vocab"].update(zzz=50_000)),
                         "does not match"),
    "far beyond": (tokenized(lambda t: t["model"]["vocab"].update(zzz=1 << 40)), "cannot be read"),
    "negative ids": (tokenized(lambda t: t["model"]["vocab"].update(zzz=-1)), "cannot be read"),
    "merges of what is not there": (tokenized(lambda t: t["model"].update(merges=["qq zz"])),
                                    "cannot be read"),
    "merges into what is not there": (tokenized(lambda t: t["model"].update(merges=["~ }"])),
                                      "cannot be read"),
    "unknown kind": (tokenized(lambda t: t["model"].update(type="Zzz")), "cannot be read"),
    "cut off": (_tokenizer('{"version": "1.0", "model": {'), "cannot be read"),
    "deep": (_tokenizer('{"a":' * 100_000), "cannot be read"),
    "empty": (_tokenizer(""), "cannot be read"),
    "a gigabyte": (_long_tokenizer, "beyond the 134,217,728"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_tokenizers_that_cannot_be_this_models_are_refused(
    empty: Library, tmp_path: Path, damage: Damage, words: str
) -> None:
    source = copied(tmp_path)
    damage(source)
    refused(empty, source, words)


# --- GGUF -----------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf(entries: list[bytes], tensors: list[bytes] | None = None, version: int = 3,
         count: int | None = None, keys: int | None = None) -> bytes:  # fmt: skip
    tensors = tensors or []
    head = b"GGUF" + struct.pack(
        "<IQQ", version, len(tensors) if count is None else count,
        len(entries) if keys is None else keys,
    )  # fmt: skip
    return head + b"".join(entries) + b"".join(tensors)


def number(key: str, value: int) -> bytes:
    return entry(key, 4, struct.pack("<I", value))


def llama(**change: bytes | None) -> list[bytes]:
    """The entries of a llama file, some of them replaced or (None) left out."""
    tokens = [*(chr(n) for n in range(33, 96)), "AB"]
    found: dict[str, bytes | None] = {
        "architecture": entry("general.architecture", 8, text("llama")),
        "width": number("llama.embedding_length", 32),
        "mlp": number("llama.feed_forward_length", 64),
        "layers": number("llama.block_count", 1),
        "heads": number("llama.attention.head_count", 4),
        "context": number("llama.context_length", 64),
        "eps": entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        "kind": entry("tokenizer.ggml.model", 8, text("gpt2")),
        "tokens": entry("tokenizer.ggml.tokens", 9,
                        struct.pack("<IQ", 8, 64) + b"".join(map(text, tokens))),
        "merges": entry("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 1) + text("A B")),
    }  # fmt: skip
    return [part for part in (found | change).values() if part is not None]


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


_NESTED = struct.pack("<IQ", 9, 1) * 50_000
GGUFS: dict[str, tuple[bytes, str]] = {
    "no gguf": (b"hello there", "letters GGUF"),
    "empty": (b"", "letters GGUF"),
    "only its name": (b"GGUF", "ends early"),
    "another version": (gguf([], version=99), "version is 99"),
    "other byte order": (gguf([], version=3 << 24), "version is 50,331,648"),
    "endless tensors": (gguf(llama(), count=(1 << 64) - 1), "promises 18,446"),
    "endless entries": (gguf(llama(), keys=1 << 60), "promises 1,152"),
    "more entries than there are": (gguf(llama(), keys=99), "ends early"),
    "more tensors than there are": (gguf(llama(), count=99), "ends early"),
    "endless list": (gguf(llama(x=entry("x", 9, struct.pack("<IQ", 0, 1 << 60)))), "a list prom"),
    "long list of bytes": (
        gguf(llama(x=entry("x", 9, struct.pack("<IQ", 0, 30_000_000) + bytes(30_000_000)))),
        "a list promises 30,000,000"),
    "list beyond the end": (gguf(llama(x=entry("x", 9, struct.pack("<IQ", 12, 1_000_000)))),
                            "ends early"),
    "lists in lists": (gguf(llama(x=entry("x", 9, _NESTED))), "lists in lists"),
    "endless text": (gguf([struct.pack("<Q", 1 << 62)], keys=1), "a text promises"),
    "unknown type": (gguf(llama(x=entry("x", 77, b""))), "unknown type"),
    "a name that is no text": (gguf(llama(x=text(b"\xff\xfe") + struct.pack("<IB", 0, 1))),
                               "damaged|GGUF"),
    "the same twice": (gguf([*llama(), *llama()]), "damaged|GGUF"),
    "nine dimensions": (gguf(llama(), [tensor("a", [1] * 9)]), "9 dimensions"),
    "huge dimensions": (gguf(llama(), [tensor("token_embd.weight", [1 << 40, 1 << 40])]),
                        "not readable"),
    "a tensor beyond the end": (gguf(llama(), [tensor("token_embd.weight", [4], 0, 1 << 40)]),
                                "beyond its end"),
    "a cut tensor": (gguf(llama(), [tensor("token_embd.weight", [32, 64])]), "not readable"),
    "unknown numbers": (gguf(llama(), [tensor("token_embd.weight", [32], 200)]), "not readable"),
    "another architecture": (gguf(llama(architecture=entry("general.architecture", 8,
                                                           text("mamba")))), "mamba"),
    "no architecture": (gguf(llama(architecture=None)), "no entry general.architecture"),
    "no tokens": (gguf(llama(tokens=None)), "tokens"),
    "tokens that are a number": (gguf(llama(tokens=number("tokenizer.ggml.tokens", 5))), "."),
    "width of text": (gguf(llama(width=entry("llama.embedding_length", 8, text("wide")))), "."),
    "no heads": (gguf(llama(heads=number("llama.attention.head_count", 0))), "not readable"),
    "a billion layers": (gguf(llama(layers=number("llama.block_count", 10**9))), "."),
    "no weights": (gguf(llama()), "."),
    "merges into what is not there": (gguf(llama(merges=entry(
        "tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 1) + text("A C")))), "not readable"),
    "a token too few": (gguf(llama(types=entry(
        "tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, 3) + bytes(12)))), "not readable"),
    "a beginning beyond the end": (gguf(llama(bos=number("tokenizer.ggml.bos_token_id", 10**9))),
                                   "not readable"),
    "merges of one word": (gguf(llama(merges=entry(
        "tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 1) + text("AB")))), "."),
    "a tensor out of the folder": (
        gguf(llama(), [tensor("../../evil", [0])]) + bytes(64), "does not have|not readable|evil"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "words"), GGUFS.values(), ids=GGUFS.keys())
def test_broken_gguf_files_are_refused(
    empty: Library, tmp_path: Path, data: bytes, words: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    refused(empty, path, words)
