"""Encoding and decoding are what their formulas say; folding changes nothing; files round-trip."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae import dictionary as module
from mistudio.engine.sae.activation import Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import load_sae, save_sae
from mistudio.engine.sae.site import Site
from mistudio.errors import CorruptFile, NotFound

D, M = 12, 40


def make(activation=None, scale=0.7):
    g = torch.Generator().manual_seed(0)
    decoder = torch.randn(M, D, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    threshold = 0.5 + torch.rand(M, generator=g)
    return Dictionary(
        torch.randn(M, D, generator=g),
        0.1 * torch.randn(M, generator=g),
        decoder,
        torch.randn(D, generator=g),
        activation or JumpReLU(threshold),
        scale,
    )


def by_hand(d, x):
    pre = (x * d.scale - d.b_dec) @ d.W_enc + d.b_enc
    if isinstance(d.activation, TopK):
        kth = pre.topk(d.activation.k, dim=1).values[:, -1:]
        z = pre * (pre >= kth) * (pre > 0)
    else:
        z = pre * (pre > d.activation.threshold)
    return z, (z @ d.W_dec + d.b_dec) / d.scale


@pytest.mark.parametrize("activation", [None, TopK(5)])
def test_encode_and_decode_are_the_formulas(activation):
    d, x = make(activation), torch.randn(50, D)
    z, x_hat = by_hand(d, x)
    codes = d.encode(x)
    assert torch.allclose(codes.dense(), z, atol=1e-5)
    assert torch.allclose(d.decode(codes), x_hat, atol=1e-5)
    assert codes.l0 == pytest.approx(float((z > 0).sum(1).float().mean()))


def test_chunked_encoding_equals_whole(monkeypatch):
    d, x = make(), torch.randn(57, D)
    whole = d.encode(x).dense()
    monkeypatch.setattr(module, "CHUNK_CELLS", 10 * M)
    assert torch.allclose(d.encode(x).dense(), whole, atol=1e-6)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize(
    "activation",
    [None, TopK(5), ReLU(), Gated(torch.rand(M) + 0.5, torch.randn(M) * 0.1)],
    ids=["jumprelu", "topk", "relu", "gated"],
)
def test_activations_of_some_latents_are_those_of_all(activation, norm):
    d, x = replace(make(activation), norm=norm), torch.randn(50, D)
    some = torch.tensor([7, 0, M - 1, 7])
    expected = d.encode(x).dense()[:, some]
    assert torch.allclose(d.activations(x, some), expected, atol=1e-5)
    assert (expected > 0).any()


def test_topk_is_never_more_than_k():
    codes = make(TopK(3)).encode(torch.randn(100, D))
    assert int(torch.bincount(codes.rows).max()) == 3


def test_folding_keeps_the_function():
    d, x = make(), torch.randn(30, D)
    folded = d.folded()
    assert folded.scale == 1.0
    assert torch.allclose(folded.encode(x).dense(), d.encode(x).dense(), atol=1e-5)
    assert torch.allclose(folded.reconstruct(x), d.reconstruct(x), atol=1e-5)


def test_unit_decoder_keeps_the_reconstruction():
    d = make().folded()
    unit = d.with_unit_decoder()
    x = torch.randn(30, D)
    assert torch.allclose(unit.decoder.norm(dim=1), torch.ones(M), atol=1e-5)
    assert torch.allclose(unit.reconstruct(x), d.reconstruct(x), atol=1e-4)


@pytest.mark.parametrize("activation", [None, TopK(5)])
def test_saved_dictionary_reads_back_as_the_same_function(tmp_path, activation):
    d, x = make(activation), torch.randn(30, D)
    save_sae(d, tmp_path / "sae", site=Site.at(HookPoint("resid_post", 3)), model_name="m")
    saved = load_sae(tmp_path / "sae")
    assert saved.hook_point == HookPoint("resid_post", 3)
    assert torch.allclose(saved.dictionary.reconstruct(x), d.reconstruct(x), atol=1e-4)


def test_the_folder_is_what_saelens_reads(tmp_path):
    save_sae(
        make(),
        tmp_path,
        site=Site.at(HookPoint("resid_post", 3)),
        model_name="gpt2",
        frequencies=torch.full((M,), 0.01),
    )
    config = json.loads((tmp_path / "cfg.json").read_text())
    for key in ("architecture", "d_in", "d_sae", "dtype", "normalize_activations"):
        assert key in config
    assert config["architecture"] == "jumprelu"
    assert config["normalize_activations"] == "none"
    assert config["apply_b_dec_to_input"] is True
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config["metadata"]["sae_lens_version"] >= "6.0.0"
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (D, M),
        "b_enc": (M,),
        "W_dec": (M, D),
        "b_dec": (D,),
        "threshold": (M,),
    }
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert torch.allclose(sparsity, torch.full((M,), -2.0))


def test_a_bias_not_applied_to_the_input_is_honoured(tmp_path):
    save_sae(make(), tmp_path, site=Site.at(HookPoint("resid_post", 0)), model_name="m")
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["apply_b_dec_to_input"] = False
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    t = load_file(tmp_path / "sae_weights.safetensors")
    x = torch.randn(20, D)
    pre = x @ t["W_enc"] + t["b_enc"]
    want = pre * (pre > t["threshold"])
    assert torch.allclose(load_sae(tmp_path).dictionary.encode(x).dense(), want, atol=1e-4)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(NotFound):
        load_sae(tmp_path)
    save_sae(make(), tmp_path, site=Site.at(HookPoint("resid_post", 0)), model_name="m")
    weights = tmp_path / "sae_weights.safetensors"
    good = load_file(weights)
    save_file({**good, "W_dec": good["W_dec"][:-1].contiguous()}, weights)
    with pytest.raises(CorruptFile, match="W_dec"):
        load_sae(tmp_path)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(CorruptFile):
        load_sae(tmp_path)
