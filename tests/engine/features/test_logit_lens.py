"""The logit lens against dense computations, and against really adding to the final residual."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf

from mistudio.engine.features import logit_lens as module
from mistudio.engine.features.logit_lens import (
    example_logits,
    full_logit_lens,
    logit_lens,
    written_directions,
)
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.errors import UnsupportedModel

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(kind: str) -> HookedDecoder:
    """A tiny random model with noise on every parameter: no gain or bias at rest."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if kind == "gemma2":
            config = hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)
            model = hf.Gemma2ForCausalLM(config)
        elif kind == "gpt2":
            model = hf.GPT2LMHeadModel(
                hf.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64)
            )
        else:
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return HookedDecoder(model.eval())


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def decoder(request):
    return built(request.param)


@pytest.fixture(scope="module")
def directions():
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(4))


def dense(decoder: HookedDecoder, directions: torch.Tensor) -> np.ndarray:
    """The lens written out from each architecture's own parameters, in fp64."""
    model = decoder.model
    d = directions.double()
    if model.config.model_type == "gpt2":
        gain = model.transformer.ln_f.weight.double()
        d = d - d.mean(1, keepdim=True)
    elif model.config.model_type == "gemma2":
        gain = 1 + model.model.norm.weight.double()
    else:
        gain = model.model.norm.weight.double()
    logits = (d * gain) @ model.lm_head.weight.double().T
    return (logits - logits.mean(1, keepdim=True)).detach().numpy()


def test_tops_histograms_and_moments_equal_a_dense_computation(decoder, directions, monkeypatch):
    monkeypatch.setattr(module, "CELLS", 2 * 90)  # two directions at a time
    lens = full_logit_lens(decoder, directions, top=6)
    want = dense(decoder, directions)
    for i, row in enumerate(want):
        order = np.argsort(row)
        assert lens.ids[i, 0].tolist() == order[::-1][:6].tolist()
        assert lens.ids[i, 1].tolist() == order[:6].tolist()
        assert lens.values[i, 0].numpy() == pytest.approx(row[order[::-1][:6]], rel=1e-4)
        assert lens.values[i, 1].numpy() == pytest.approx(row[order[:6]], rel=1e-4)
        assert float(lens.std[i]) == pytest.approx(row.std(), rel=1e-4)
        assert float(lens.skew[i]) == pytest.approx((row**3).mean() / row.std() ** 3, abs=1e-4)
        assert float(lens.kurtosis[i]) == pytest.approx((row**4).mean() / row.std() ** 4, rel=1e-4)
        assert float(lens.top_gap[i]) == pytest.approx(
            np.sort(row)[-10:].mean() / row.std(), rel=1e-4
        )
        assert float(lens.low[i]) == pytest.approx(row.min(), rel=1e-4)
        assert float(lens.high[i]) == pytest.approx(row.max(), rel=1e-4)
        counts = np.histogram(row, bins=50)[0]
        assert lens.histogram.shape == (7, 50)
        assert int(lens.histogram[i].sum()) == 90
        # Rounding may carry a logit that lies on an edge over to the next bin.
        assert np.abs(np.cumsum(counts) - np.cumsum(lens.histogram[i].numpy())).max() <= 1


def test_short_form_gives_the_same_tokens(decoder, directions):
    ids, values = logit_lens(decoder, directions, top=6)
    lens = full_logit_lens(decoder, directions, top=6)
    assert torch.equal(ids, lens.ids)
    assert torch.equal(values, lens.values)


def test_a_direction_of_zeros_has_no_shape(decoder):
    lens = full_logit_lens(decoder, torch.zeros(1, 32), top=3)
    assert float(lens.std[0]) == 0
    assert lens.skew.isnan().all() and lens.kurtosis.isnan().all() and lens.top_gap.isnan().all()
    assert int(lens.histogram.sum()) == 90


def final_logits(decoder: HookedDecoder, x: torch.Tensor) -> torch.Tensor:
    """float64 [n, vocab]: what the model itself makes of final residuals [n, d]."""
    norm, head = decoder.final_norm(), decoder.unembedding()
    return head(norm(x)).double()


def test_example_logits_equal_adding_a_step_to_the_final_residual(decoder, directions):
    ids = torch.tensor([[3, 17, 50, 22, 81, 9]])
    point = HookPoint("resid_post", 1)
    x = decoder.capture(ids, [point])[point][0, 4]
    decoder.model.double()  # so that a small step is not lost in rounding
    try:
        x = x.double()
        d = directions[2].double()
        if decoder.final_norm_gain()[1]:
            x_centred, d_centred = x - x.mean(), d - d.mean()
        else:
            x_centred, d_centred = x, d
        # Without its part along the stream, a step does not change what the norm divides by.
        d = d - (d_centred @ x_centred) / (x_centred @ x_centred) * x
        eps = 3e-3  # norms reckon in float32 whatever the model's precision
        with torch.no_grad():
            step = final_logits(decoder, (x + eps * d)[None])
            step = (step - final_logits(decoder, (x - eps * d)[None])) / 2
        found = example_logits(decoder, d, 3.0, x, top=90)
    finally:
        decoder.model.float()
    want = (step[0] - step[0].mean()) / eps * 3.0
    assert float(want.abs().max()) > 0.1
    for side in (0, 1):
        got = want[found.ids[side].long()].numpy()
        assert found.values[side].numpy() == pytest.approx(got, rel=2e-3, abs=2e-3)
    centred = x - x.mean() if decoder.final_norm_gain()[1] else x
    assert found.rms == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-2)


def test_what_is_added_through_a_branch_moves_the_logits_as_predicted(decoder):
    """An MLP's output of the last layer is in the final residual as it is."""
    ids = torch.tensor([[3, 17, 50, 22, 81, 9]])
    out, last = HookPoint("mlp_out", 1), HookPoint("resid_post", 1)
    d = torch.randn(32, generator=torch.Generator().manual_seed(9))
    before = decoder.capture(ids, [last])[last]
    with decoder.intervene({out: lambda y: y + d}):
        after = decoder.capture(ids, [last])[last]
    assert torch.allclose(after - before, d.expand_as(before), atol=1e-4)


def test_directions_are_in_raw_units_and_only_where_the_stream_is_written():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 32, generator=g)
    sae = Dictionary(
        w, torch.zeros(5), w, torch.zeros(32), JumpReLU(torch.zeros(5)), 2.0, out_scale=4.0
    )
    for site in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        assert torch.allclose(written_directions(sae, HookPoint(site, 1)), w / 4.0)
    # Folding changes nothing about what is written per unit of activation.
    folded = written_directions(sae.folded(), HookPoint("mlp_out", 1))
    assert torch.allclose(folded, w / 4.0)
    with pytest.raises(UnsupportedModel, match=r"mlp\.hook_in"):
        written_directions(sae, HookPoint("mlp_in", 1))
