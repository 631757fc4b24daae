"""Model folders: what they say of themselves, which are refused and why, how they are loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.engine.models import loading
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import (
    adds_bos,
    check_folder,
    describe,
    load_model,
    load_tokenizer,
    quiet_transformers,
    resolve_precision,
    separator_id,
    special_ids,
)
from mistudio.errors import (
    CorruptFile,
    Incompatible,
    InvalidInput,
    NotFound,
    UnsupportedModel,
    UserError,
)

from . import tiny_models as tiny

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "tiny")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Watch:
    """A progress that remembers its metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, object]] = []
        self.checks = 0

    def check(self) -> None:
        self.checks += 1

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self.metrics.append(metrics)


# --- describe -------------------------------------------------------------------------------------


def test_description_of_a_llama(folder: Path) -> None:
    summary = describe(folder)
    assert summary == loading.ModelSummary(
        architecture="LlamaForCausalLM",
        model_type="llama",
        n_layers=3,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        d_mlp=64,
        vocab_size=64,
        context_length=64,
        tied_embeddings=False,
        parameters=tiny.build("llama").num_parameters(),
        bytes_on_disk=sum(path.stat().st_size for path in folder.iterdir()),
        dtypes=("F32",),
    )


@pytest.mark.parametrize("name", sorted(tiny.BUILDERS))
def test_parameters_are_counted_as_pytorch_counts_them(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    model.save_pretrained(tmp_path)
    summary = describe(tmp_path)
    assert summary.parameters == model.num_parameters()
    assert (summary.n_layers, summary.d_model, summary.n_heads) == (3, 32, 4)
    assert summary.d_mlp == (128 if name in ("gpt2", "bloom", "falcon") else 64)


def test_tied_weights_and_buffers_in_old_files_count_no_parameters(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, {"format": "pt"})
    summary = describe(tmp_path)
    assert summary.tied_embeddings
    assert summary.parameters == model.num_parameters()


def test_sharded_weights_are_described_and_loaded_as_one(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny.save_tokenizer(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert describe(tmp_path).parameters == tiny.build("llama").num_parameters()
    check_folder(tmp_path)
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    with pytest.raises(CorruptFile, match="missing"):
        check_folder(tmp_path)


def test_mixed_types_are_all_named_the_largest_first(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    half = {k: v.half() if "norm" in k else v for k, v in tensors.items()}
    save_file(half, path, {"format": "pt"})
    assert describe(folder).dtypes == ("F32", "F16")


# --- refusals -------------------------------------------------------------------------------------


def _missing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"')


def _impossible_config(folder: Path) -> None:
    change_config(folder, hidden_size="large")


def _zero_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _truncated_in_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def _five_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x01\x00\x00\x00\x00")


def _longer(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"rest")


def _web_page(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>Not found</html>" * 9)


def _header_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"not json")


def _header_is_a_list(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"[1, 2]  ")


def _negative_offsets(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def _lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (folder / "model.safetensors").write_text(text)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _foreign_code(folder: Path) -> None:
    change_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"})


def _foreign_class(folder: Path) -> None:
    change_config(
        folder, architectures=["OwnLlama"], auto_map={"AutoModelForCausalLM": "modeling.OwnLlama"}
    )


def _unknown_type(folder: Path) -> None:
    change_config(folder, model_type="llama99")


def _classifier(folder: Path) -> None:
    change_config(folder, architectures=["LlamaForSequenceClassification"])


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


REFUSALS: list[tuple[Callable[[Path], None], type[UserError], str]] = [
    (_missing, NotFound, "not a folder"),
    (_empty, NotFound, "no files"),
    (_no_config, UnsupportedModel, r"no config\.json"),
    (_broken_config, CorruptFile, r"config\.json is not valid"),
    (_impossible_config, CorruptFile, "not a number"),
    (_zero_bytes, CorruptFile, "it is empty"),
    (_truncated, CorruptFile, "promises"),
    (_truncated_in_the_header, CorruptFile, "header would take"),
    (_five_bytes, CorruptFile, "the file has 5"),
    (_longer, CorruptFile, "promises"),
    (_web_page, CorruptFile, "header would take"),
    (_header_is_no_json, CorruptFile, "header is not valid"),
    (_header_is_a_list, CorruptFile, "header is not valid"),
    (_negative_offsets, CorruptFile, "offsets"),
    (_lfs_pointer, CorruptFile, "Git LFS"),
    (_only_pickle, UnsupportedModel, "run any code"),
    (_no_weights, UnsupportedModel, "neither model.safetensors"),
    (_foreign_code, UnsupportedModel, "never runs such code"),
    (_foreign_class, UnsupportedModel, "never runs such code"),
    (_unknown_type, UnsupportedModel, "llama99"),
    (_classifier, UnsupportedModel, "does not predict the next token"),
    (_no_tokenizer, UnsupportedModel, "tokenizer"),
]


@pytest.mark.parametrize(
    ("damage", "kind", "words"), REFUSALS, ids=[case[0].__name__ for case in REFUSALS]
)
def test_folders_that_cannot_be_loaded_are_refused_with_the_reason(
    folder: Path, damage: Callable[[Path], None], kind: type[UserError], words: str
) -> None:
    check_folder(folder)
    damage(folder)
    with pytest.raises(kind, match=words) as refusal:
        check_folder(folder)
    assert refusal.value.title and refusal.value.what and refusal.value.next_step
    with pytest.raises(kind, match=words):
        load_model(folder, "fp32")


@pytest.mark.parametrize(("builder", "word"), [(tiny.bert, "encoder"), (tiny.t5, "encoder-decod")])
def test_encoders_and_encoder_decoders_are_refused(
    tmp_path: Path, builder: Callable[[], Any], word: str
) -> None:
    builder().save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    with pytest.raises(UnsupportedModel, match=word):
        check_folder(tmp_path)


def test_code_that_transformers_has_itself_is_no_reason_to_refuse(folder: Path) -> None:
    # Phi-3 and others bring Python files that are not needed any more; they are never run.
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"})
    (folder / "modeling.py").write_text("raise SystemExit('this must not run')")
    assert load_model(folder, "fp32").n_layers == 3


def test_missing_tensors_are_refused_instead_of_random(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CorruptFile, match=r"layers\.1\.mlp\.up_proj"):
        load_model(folder, "fp32")


def test_weights_of_another_size_than_the_configuration_says_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=96)
    with pytest.raises(CorruptFile, match="do not fit"):
        load_model(folder, "fp32")


def test_pickles_beside_safetensors_are_not_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert load_model(folder, "fp32").n_layers == 3


# --- load -----------------------------------------------------------------------------------------


def test_loaded_model_computes_what_was_saved(folder: Path) -> None:
    decoder = load_model(folder, "fp32")
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        expected = tiny.build("llama")(ids).logits
        assert torch.equal(decoder.model(ids).logits, expected)
    assert not decoder.model.training
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())
    assert (decoder.architecture, decoder.device.type) == ("llama", "cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision_asked_for_is_taken_and_reported(
    folder: Path, precision: Any, dtype: torch.dtype
) -> None:
    watch = Watch()
    decoder = load_model(folder, precision, progress=watch)
    assert decoder.dtype == dtype
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {dtype}
    assert {"precision": precision} in watch.metrics and watch.checks > 0
    point = HookPoint("resid_post", 1)
    assert decoder.capture(torch.arange(3, 9)[None], [point])[point].dtype == dtype


@pytest.mark.parametrize(("speedup", "chosen"), [(1.1, "fp32"), (1.3, "bf16")])
def test_auto_takes_bf16_where_the_cpu_is_faster_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, speedup: float, chosen: str
) -> None:
    monkeypatch.setattr(loading, "_bf16_speedup", lambda: speedup)
    assert resolve_precision("auto") == chosen
    watch = Watch()
    load_model(folder, progress=watch)
    assert {"precision": chosen} in watch.metrics


def test_speed_probe_measures_this_cpu_once() -> None:
    loading._bf16_speedup.cache_clear()
    first = loading._bf16_speedup()
    assert 0.005 < first < 100
    assert loading._bf16_speedup() == first


def test_unknown_precisions_and_missing_devices_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="int3"):
        resolve_precision("int3")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Incompatible, match="cuda"):
        load_model(folder, "fp16", "cuda")


def test_loading_says_nothing_on_the_terminal(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(folder, "fp32")
    load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


# --- tokenizers -----------------------------------------------------------------------------------


def test_tokenizer_round_trip_and_broken_files(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    config = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
    assert list(load_tokenizer(folder)("the cat")) == ["input_ids", "attention_mask"]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptFile, match="transformers says"):
        load_tokenizer(folder)


def test_tokenizer_json_decides_over_the_class_that_the_configuration_names(folder: Path) -> None:
    # As in SmolLM2's files: GPT2Tokenizer knows no digit splitting.
    from tokenizers import Tokenizer, pre_tokenizers

    path = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.save(str(path))
    config = folder / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "tokenizer_class": "GPT2Tokenizer"})
    )
    loaded: Any = load_tokenizer(folder)
    assert "Digits" in str(loaded.backend_tokenizer.pre_tokenizer)


def test_bos_is_known_only_where_the_tokenizer_adds_it(folder: Path) -> None:
    from tokenizers import processors

    tokenizer: Any = load_tokenizer(folder)
    assert adds_bos(tokenizer) is None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert adds_bos(tokenizer) is None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert adds_bos(tokenizer) == 1


def test_special_ids_hold_named_and_added_special_tokens(folder: Path) -> None:
    from tokenizers import AddedToken

    tokenizer: Any = load_tokenizer(folder)
    assert special_ids(tokenizer) == {0, 1, 2}
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    turn, tool = tokenizer.convert_tokens_to_ids(["<|turn|>", "<tool>"])
    assert turn in special_ids(tokenizer) and tool not in special_ids(tokenizer)


def test_documents_are_separated_by_eos_or_by_the_end_of_text_of_pretraining(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    assert separator_id(tokenizer) == 2
    tokenizer.backend_tokenizer.add_special_tokens(["<|endoftext|>"])
    assert separator_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert separator_id(load_tokenizer(DATA / "tiny-llama-0.9m")) == 0


def test_tokenizers_without_any_end_are_refused(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(UnsupportedModel, match="separator"):
        separator_id(tokenizer)


def test_tiny_trained_model_is_a_complete_folder() -> None:
    folder = DATA / "tiny-llama-0.9m"
    check_folder(folder)
    summary = describe(folder)
    assert (summary.parameters, summary.tied_embeddings, summary.dtypes) == (857216, True, ("F16",))
    assert load_model(folder, "fp32").vocab_size == 1024


# --- the terminal ---------------------------------------------------------------------------------


def test_threads_that_load_side_by_side_stay_quiet_to_the_last() -> None:
    from mistudio.engine.models.hf import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert before[1]
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not logging.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
