"""What is refused before a model is kept, and what quantising costs."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.engine.models.checks import check_tokenizer, check_weights, verify
from mistudio.engine.models.loading import (
    header_length,
    load_model,
    load_tokenizer,
    parse_safetensors_header,
    read_safetensors_header,
)
from mistudio.engine.models.quality import DocumentLosses, compare, document_losses, judge
from mistudio.engine.progress import Cancelled
from mistudio.errors import CorruptFile, Incompatible, InvalidInput

from . import tiny_models as tiny

SAMPLE = Path(__file__).parents[3] / "resources" / "sample" / "wikipedia_vital_intros.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    folder: Path, dtype: torch.dtype, value: float
) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    check_weights(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        CorruptFile, match=r"1 numbers of the tensor model\.layers\.1\.mlp\.up_proj"
    ):
        check_weights(folder)


def test_masks_of_old_files_may_be_infinite_and_the_largest_numbers_are_finite(
    folder: Path,
) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.attn.masked_bias"] = torch.tensor(-math.inf)
    tensors["model.norm.weight"][0] = torch.finfo(torch.float32).max
    save_file(tensors, path, {"format": "pt"})
    check_weights(folder)


def test_files_are_summed_as_they_lie_there_and_compared_with_what_was_promised(
    folder: Path,
) -> None:
    (found,) = check_weights(folder)
    data = (folder / "model.safetensors").read_bytes()
    assert (found.bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    verify(folder, {found.name: (found.bytes, found.sha256)}, (found,))
    verify(folder, {found.name: (found.bytes, "")}, (found,))
    for promised in ((found.bytes + 1, ""), (found.bytes, "0" * 64)):
        with pytest.raises(CorruptFile, match="expected"):
            verify(folder, {found.name: promised}, (found,))


def test_checking_weights_can_be_stopped(folder: Path) -> None:
    class Stop:
        def check(self) -> None:
            raise Cancelled

        def report(self, *_args: object, **_metrics: object) -> None:
            pass

    with pytest.raises(Cancelled):
        check_weights(folder, Stop())


def test_tokenizers_of_another_model_are_refused_and_spare_markers_are_not(folder: Path) -> None:
    size = len(load_tokenizer(folder))
    check_tokenizer(folder, size)
    with pytest.raises(Incompatible, match="1 beyond them"):
        check_tokenizer(folder, size - 1)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    marker = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": size, "content": "<image>", "special": True, **marker})
    path.write_text(json.dumps(content))
    assert len(load_tokenizer(folder)) == size + 1
    check_tokenizer(folder, size)


# --- headers --------------------------------------------------------------------------------------


def whole(header: object, body: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def entry(
    shape: list[object], first: object, last: object, dtype: str = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "data",
    [
        whole(b"[" * 200_000),
        whole(b'{"a":' * 100_000),
        whole({"a": entry([2, 2], 0, 8)}, 8),
        whole({"a": entry([-2, -2], 0, 16)}, 16),
        whole({"a": entry([1 << 62, 4], 0, 16)}, 16),
        whole({"a": entry([True], 0, 4)}, 4),
        whole({"a": entry([4.0], 0, 16)}, 16),
        whole({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4),
        whole({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12),
        whole({"a": entry([1] * 40, 0, 4)}, 4),
        whole({"a": entry([1], "0", 4)}, 4),
        whole({"a": None}),
        whole([1]),
        struct.pack("<Q", 1 << 63) + b"{}",
    ],
    ids=lambda data: data[8:40].decode(errors="replace"),
)
def test_headers_that_are_no_headers_are_refused_in_words(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile):
        parse_safetensors_header(data, len(data), "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFile):
        read_safetensors_header(path)


def test_a_file_elsewhere_is_described_by_its_first_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    first = data[: header_length(data[:8])]
    assert len(first) < len(data) / 2
    assert parse_safetensors_header(first, len(data), path.name) == read_safetensors_header(path)


# --- quality --------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat, the dog ate the hat " * n for n in (2, 4, 6, 3)]


def test_losses_are_those_of_each_document_alone(folder: Path) -> None:
    decoder, tokenizer = load_model(folder, "fp32"), load_tokenizer(folder)
    found = document_losses(decoder, tokenizer, [*TEXTS, "the"], context=40)
    assert len(found.losses) == 4 and found.tokens[0] < found.tokens[2] == 40
    ids = [2, *tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"][:40]]
    with torch.inference_mode():
        logits = decoder.model(torch.tensor([ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    assert found.losses[2] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(InvalidInput):
        document_losses(decoder, tokenizer, ["the"])


def test_delta_and_its_error_are_what_the_formulas_say() -> None:
    reference = DocumentLosses("fp32", (20.0, 40.0, 30.0), (10, 20, 10))
    quantised = DocumentLosses("q4", (21.0, 44.0, 31.0), (10, 20, 10))
    found = compare(quantised, reference, 100)
    assert found.delta == pytest.approx(6 / 40)
    gaps = [1 - 0.15 * 10, 4 - 0.15 * 20, 1 - 0.15 * 10]
    assert found.error == pytest.approx(math.sqrt(sum(g * g for g in gaps)) / 40)
    assert (found.tokens, found.documents, found.verdict) == (40, 3, "usable")
    assert json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="same documents"):
        compare(DocumentLosses("q4", (1.0,), (3,)), reference, 100)


@pytest.mark.parametrize(
    ("delta", "verdict"),
    [(-0.01, "faithful"), (0.04, "faithful"), (0.1, "usable"), (0.5, "degraded"), (3, "destroyed")],
)
def test_verdicts_follow_the_thresholds(delta: float, verdict: str) -> None:
    assert judge(delta, 2.8 + delta, 2.8, 10.8) == verdict


def test_a_model_that_guesses_is_destroyed_and_one_that_never_knew_is_unreadable() -> None:
    assert judge(0.9, 10.9, 10.0, 10.8) == "destroyed"
    assert judge(math.nan, math.nan, 2.8, 10.8) == "destroyed"
    assert judge(0.0, 11.0, 11.0, 10.8) == "unreadable"
    assert judge(0.0, math.nan, math.nan, 10.8) == "unreadable"


def test_quantised_models_of_the_tests_are_told_from_their_originals(
    tiny_folder: Path, tiny_tokenizer: object
) -> None:
    with SAMPLE.open(encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(12)]
    losses = {
        precision: document_losses(load_model(tiny_folder, precision), tiny_tokenizer, texts)  # type: ignore[arg-type]
        for precision in ("fp32", "q8", "q4", "q2")
    }
    delta = {
        precision: compare(found, losses["fp32"], 1024).delta for precision, found in losses.items()
    }
    assert abs(delta["q8"]) < 0.02 and abs(delta["q4"]) < 0.1
    assert delta["q2"] > 3 * abs(delta["q4"])
