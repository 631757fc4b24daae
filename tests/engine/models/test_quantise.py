"""Quantised models: how close, how large, and that hooks and generation work on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mistudio.engine.models import methods
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import load_model
from mistudio.engine.models.methods import bitsandbytes, method_of, still_holds
from mistudio.engine.models.quantise import (
    SCHEMES,
    QuantisedLinear,
    TwoBitLinear,
    parameter_count,
    precision_of,
    require_backend,
    stored_bytes,
)
from mistudio.errors import Incompatible

from . import tiny_models as tiny

ARCHITECTURES = ("llama", "gpt2", "neox_parallel", "gemma2", "qwen3", "phi", "opt", "bloom")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_of(weight: torch.Tensor, precision: str) -> QuantisedLinear:
    layer = SCHEMES[precision](*weight.shape, None)
    layer.fill(weight)
    return layer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("precision", "missed"), [("q8", 0.008), ("q4", 0.11), ("q2", 0.40)])
@pytest.mark.parametrize("shape", [(96, 128), (32, 48), (64, 80), (33, 64), (1000, 192)], ids=str)
def test_error_of_normal_weights_is_what_the_bits_allow(
    precision: str, missed: float, shape: tuple[int, int]
) -> None:
    weight = normal(*shape)
    error = (layer_of(weight, precision).dense(torch.float32) - weight).norm() / weight.norm()
    assert missed / 2 < error < missed


def test_8_and_4_bits_are_those_of_bitsandbytes_to_the_bit() -> None:
    weight, x = normal(700, 1024), normal(3, 5, 1024, seed=1).requires_grad_()
    library = bitsandbytes()
    state = library.MatmulLtState()  # in training, so that it does not round activations on a CPU
    state.has_fp16_weights = False
    state.CB, state.SCB, _ = library.functional.int8_vectorwise_quant(weight.half())
    codes, nf4 = library.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    for precision, theirs in (
        ("q8", lambda: library.matmul(x, state.CB, state=state)),
        ("q4", lambda: library.matmul_4bit(x, codes, quant_state=nf4)),
    ):
        layer = layer_of(weight, precision)
        found = []
        for product in (lambda layer=layer: layer(x), theirs):
            x.grad = None
            y = product()
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_blocks_run_on_over_rows_and_pieces() -> None:
    weight = normal(4000, 80)  # quantised in two pieces
    codes, state = bitsandbytes().functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = layer_of(weight, "q4")
    assert torch.equal(layer.packed["weight"], codes)
    assert torch.equal(layer.packed["scale"], state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 128), (32, 48)], ids=str)
def test_products_and_gradients_are_those_of_the_weights(
    precision: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    layer = layer_of(normal(*shape), precision)
    layer.bias = torch.nn.Parameter(normal(shape[0], seed=3).to(dtype), requires_grad=False)
    x = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    weight = layer.dense(torch.float32)
    expected = x.detach().float() @ weight.T + layer.bias.float()
    near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    assert (y.detach().float() - expected).norm() < near * expected.norm()
    slope = weight.sum(0).expand(2, 5, -1)
    assert (x.grad.float() - slope).norm() < near * slope.norm()


@pytest.mark.parametrize("precision", SCHEMES)
def test_what_a_token_gives_does_not_hang_on_its_neighbours(precision: str) -> None:
    layer = layer_of(normal(48, 64), precision)
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    with_outlier = torch.cat((x, 100 * x.flip(1)))
    torch.testing.assert_close(layer(with_outlier)[:1], layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", SCHEMES)
def test_gpt2s_matrices_the_other_way_round_are_the_same(precision: str) -> None:
    weight = normal(320, 1024)
    turned = SCHEMES[precision](320, 1024, None, transposed=True)
    turned.fill(weight.T.contiguous())
    for name, values in layer_of(weight, precision).packed.items():
        assert torch.equal(turned.packed[name], values)


@pytest.mark.parametrize("precision", SCHEMES)
def test_no_copy_of_the_weights_is_kept_for_the_backward_pass(precision: str) -> None:
    layer = layer_of(normal(64, 64), precision)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(1, 64, requires_grad=True)).sum().backward()
    assert not [tensor for tensor in kept if tensor.numel() == 64 * 64]


@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-6])
def test_equal_weights_stay_what_they_are(precision: str, value: float) -> None:
    weight = torch.full((16, 32), value)
    torch.testing.assert_close(
        layer_of(weight, precision).dense(torch.float32), weight, rtol=1e-3, atol=1e-6
    )


def test_a_row_of_zeros_stays_zero_and_one_large_weight_stays_finite() -> None:
    weight = normal(16, 64)
    weight[2] = 0
    weight[3, 5] = 900.0
    for precision in SCHEMES:
        back = layer_of(weight, precision).dense(torch.float32)
        assert back.isfinite().all()
        if precision != "q2":
            assert abs(float(back[3, 5]) - 900) < 1 and not back[2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_beyond_what_the_scales_hold_are_refused(value: float) -> None:
    weight = normal(16, 64)
    weight[1, 1] = value
    for precision in SCHEMES:
        if precision == "q4" and value == 1e5:  # whose magnitudes are fp32
            assert layer_of(weight, precision).dense(torch.float32)[1, 1] == value
            continue
        if precision == "q2" and value == 1e5:  # whose scales fit the range to fp16
            continue
        with pytest.raises(Incompatible, match=f"{precision.upper()} cannot hold"):
            layer_of(weight, precision)


@pytest.mark.parametrize("precision", SCHEMES)
def test_bytes_are_those_of_the_stored_tensors(precision: str) -> None:
    layer = layer_of(normal(48, 96), precision)
    taken = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert taken == stored_bytes(precision, 48, 96)
    assert taken == {"q8": 48 * 100, "q4": 48 * 96 * 9 // 16, "q2": 48 * 96 * 3 // 8}[precision]
    assert parameter_count(layer) == 48 * 96


def test_no_precision_is_called_by_fewer_bits_than_its_codes_have() -> None:
    for name in SCHEMES:
        dense = layer_of(normal(32, 64), name).dense(torch.float32)
        groups = dense.reshape(32, -1).T if name == "q2" else dense.reshape(-1, 64)
        assert max(len(row.unique()) for row in groups) <= 2 ** int(name[1:])


def test_matrices_without_groups_stay_unquantised() -> None:
    assert stored_bytes("q4", 30, 7) is None and stored_bytes("q2", 30, 7) is None
    assert stored_bytes("q8", 30, 7) == 30 * 7 + 30 * 4
    assert TwoBitLinear.group_of(32, 48) == 32


# --- the library ----------------------------------------------------------------------------------

_IMPORTS = """
import json, sys
import torch
from mistudio.engine.models import hf, hooks, loading, memory, quantise, methods
from mistudio.engine.models.loading import load_model
from pathlib import Path
compiler, found = torch.compile, {}
for precision in ("fp32", "q2", "q4"):
    load_model(Path(sys.argv[1]), precision)
    found[precision] = "bitsandbytes" in sys.modules
found["compiler"] = torch.compile is compiler
print(json.dumps(found))
"""


def test_the_library_comes_only_when_needed_without_a_word_and_without_kernels_from_the_hub(
    tmp_path: Path,
) -> None:
    folder = tiny.save_model(tmp_path / "tiny")
    installed = tmp_path / "site" / "kernels"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text(
        "def get_kernel(*args, **kwargs):\n    raise SystemExit('asked the Hub')\n"
    )
    root = Path(methods.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _IMPORTS, str(folder)],
        capture_output=True,
        text=True,
        env={**_environment(), "PYTHONPATH": f"{root}:{installed.parent}"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"fp32": False, "q2": False, "q4": True, "compiler": True}


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def test_kernels_are_out_of_reach_while_the_library_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = type(sys)("kernels")
    monkeypatch.setitem(sys.modules, "kernels", there)
    with methods._quiet_and_alone(), pytest.raises(ImportError):
        import kernels  # noqa: F401
    assert sys.modules["kernels"] is there


def test_without_the_library_8_and_4_bits_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(methods, "_found", None)
    monkeypatch.setattr(methods, "_reason", "")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder = tiny.save_model(tmp_path / "tiny")
    for precision in ("q8", "q4"):
        with pytest.raises(Incompatible, match="bitsandbytes") as refusal:
            load_model(folder, precision)  # type: ignore[arg-type]
        assert "halted" in refusal.value.what and "Choose" in refusal.value.next_step
    assert precision_of(load_model(folder, "q2").model) == "q2"


def test_records_name_the_method_and_older_ones_hold_only_where_it_is_the_same() -> None:
    assert method_of("bf16") == ""
    assert method_of("q4").startswith("nf4, blocks of 64 (bitsandbytes 0.")
    assert still_holds({"method": "nf4, blocks of 64 (bitsandbytes 0.1)"}, "q4")
    assert still_holds({}, "q2") and not still_holds({}, "q4") and not still_holds({}, "q8")
    assert not still_holds({"method": method_of("q8")}, "q4")


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


def test_devices_that_cannot_run_it_are_refused_with_their_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacking(*_args: object, **_kwargs: object) -> torch.Tensor:
        raise NotImplementedError("shift is not there")

    monkeypatch.setattr("mistudio.engine.models.quantise._unpack", lacking)
    with pytest.raises(Incompatible, match="shift is not there"):
        require_backend("q2", "cpu")
    monkeypatch.setattr(SCHEMES["q8"], "dense", lambda layer, dtype: torch.zeros(64, 64))
    with pytest.raises(Incompatible, match="come out wrong"):
        require_backend("q8", "cpu")
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
