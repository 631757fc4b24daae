"""Quantised models: how close, how large, and that hooks and generation work on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import load_model
from mistudio.engine.models.quantise import (
    SCHEMES,
    QuantisedLinear,
    group_of,
    parameter_count,
    precision_of,
    require_backend,
    stored_bytes,
)
from mistudio.errors import Incompatible

from . import tiny_models as tiny

ARCHITECTURES = ("llama", "gpt2", "neox_parallel", "gemma2", "qwen3", "phi", "opt", "bloom")


def layer_of(weight: torch.Tensor, precision: str) -> QuantisedLinear:
    layer = QuantisedLinear(*weight.shape, SCHEMES[precision], None)
    layer.fill(weight)
    return layer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("precision", "missed"), [("q8", 0.006), ("q4", 0.085), ("q2", 0.40)])
def test_error_of_normal_weights_is_what_the_bits_allow(precision: str, missed: float) -> None:
    weight = normal(96, 128)
    error = (layer_of(weight, precision).dense(torch.float32) - weight).norm() / weight.norm()
    assert missed / 2 < error < missed


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_no_further_from_the_weights_than_llama_cpp_at_the_same_bits(kind: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    weight = normal(64, 256)
    theirs = GGMLQuantizationType[kind]
    back = torch.from_numpy(dequantize(quantize(weight.numpy(), theirs), theirs))
    ours = layer_of(weight, "q4" if kind == "Q4_1" else "q8").dense(torch.float32)
    assert (ours - weight).norm() <= (back - weight).norm() * (0.97 if kind == "Q4_1" else 1.02)


def test_weights_that_were_q4_1_are_kept_exactly() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType.Q4_1
    weight = torch.from_numpy(dequantize(quantize(normal(32, 64).numpy(), kind), kind))
    back = layer_of(weight, "q4").dense(torch.float32)
    assert (back - weight).abs().max() < 2e-3 * weight.abs().max()


@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-6])
def test_equal_weights_stay_what_they_are(precision: str, value: float) -> None:
    weight = torch.full((16, 32), value)
    torch.testing.assert_close(
        layer_of(weight, precision).dense(torch.float32), weight, rtol=1e-3, atol=1e-6
    )


def test_one_large_weight_does_not_break_its_group() -> None:
    weight = normal(16, 32)
    weight[3, 5] = 900.0
    for precision in SCHEMES:
        back = layer_of(weight, precision).dense(torch.float32)
        assert back.isfinite().all()
        assert abs(float(back[3, 5]) - 900) < 10 if precision != "q2" else True


@pytest.mark.parametrize("precision", SCHEMES)
def test_bytes_are_those_of_the_stored_tensors(precision: str) -> None:
    layer = layer_of(normal(48, 96), precision)
    taken = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert taken == stored_bytes(SCHEMES[precision], 48, 96)
    assert taken == 48 * 96 * SCHEMES[precision].bits_per_weight / 8
    assert parameter_count(layer) == 48 * 96


def test_no_precision_is_called_by_fewer_bits_than_its_codes_have() -> None:
    for name, scheme in SCHEMES.items():
        assert name == f"q{scheme.bits}"
        assert int(layer_of(normal(32, 32), name).weight.max()) < 256
        dense = layer_of(normal(32, 32), name).dense(torch.float32)
        rows = dense if scheme.along == "input" else dense.reshape(32, -1).T
        assert max(len(row.unique()) for row in rows.reshape(-1, 32)) <= 2**scheme.bits


def test_matrices_without_groups_stay_unquantised() -> None:
    assert group_of(SCHEMES["q4"], 30, 7) is None
    assert group_of(SCHEMES["q4"], 32, 48) == 32
    assert stored_bytes(SCHEMES["q4"], 30, 7) is None


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantised_models_are_read_and_changed_at_every_site(name: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / name, name)
    whole, decoder = load_model(folder, "fp32"), load_model(folder, "q8")
    assert precision_of(decoder.model) == "q8" and precision_of(whole.model) == "fp32"
    ids = torch.arange(3, 35).reshape(2, 16)
    points = [
        HookPoint(site, 1) for site in ("resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_in")
    ]
    for point in points:
        assert decoder.module_path(point) == whole.module_path(point)
    near, true = decoder.capture(ids, points), whole.capture(ids, points)
    for point in points:
        assert (near[point].float() - true[point]).norm() < 0.05 * true[point].norm()
    with torch.inference_mode():
        before = decoder.model(ids).logits
        with decoder.intervene({points[1]: lambda x: x + 1.0}):
            after = decoder.model(ids).logits
    assert not torch.allclose(before, after)


def test_only_matrices_in_blocks_are_quantised(tmp_path: Path) -> None:
    decoder = load_model(tiny.save_model(tmp_path / "tiny"), "q4")
    quantised = {n for n, m in decoder.model.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(quantised) == 3 * 7 and all(".layers." in name for name in quantised)
    model = decoder.model
    for part in (model.lm_head, model.model.embed_tokens, model.model.norm):
        assert part.weight.dtype == decoder.dtype
    assert parameter_count(model) == tiny.build("llama").num_parameters()


def test_half_precision_computes_what_the_weights_say(tmp_path: Path) -> None:
    layer = layer_of(normal(64, 64), "q4")
    x = torch.randn(5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    expected = x.float() @ layer.dense(torch.float32).T
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.02)


def test_generation_and_gradients_work_at_four_bits(tmp_path: Path) -> None:
    decoder = load_model(tiny.save_model(tmp_path / "tiny"), "q4")
    out = decoder.model.generate(
        torch.tensor([[3, 4, 5]]),
        attention_mask=torch.ones(1, 3),
        max_new_tokens=4,
        do_sample=False,
    )
    assert out.shape == (1, 7)
    x = torch.randn(2, 32, requires_grad=True, dtype=decoder.dtype)
    layer = decoder.model.model.layers[0].self_attn.q_proj
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_tensors_of_another_size_are_refused_while_quantising(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from mistudio.errors import CorruptFile

    folder = tiny.save_model(tmp_path / "tiny")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros(8, 32)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CorruptFile, match="do not fit"):
        load_model(folder, "q4")
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CorruptFile, match="missing"):
        load_model(folder, "q4")


def test_devices_that_cannot_unpack_are_refused_with_their_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacking(*_args: object, **_kwargs: object) -> torch.Tensor:
        raise NotImplementedError("shift is not there")

    monkeypatch.setattr("mistudio.engine.models.quantise._unpack", lacking)
    with pytest.raises(Incompatible, match="shift is not there"):
        require_backend("q4", "cpu")
    require_backend("bf16", "cpu")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mappings")
@pytest.mark.parametrize("precision", ["bf16", "q8"])
def test_loaded_models_hold_their_file_no_more(precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny.build("llama").to(torch.bfloat16).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    decoder = load_model(folder, precision)  # type: ignore[arg-type]
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder) not in mapped
    assert decoder.n_layers == 3
