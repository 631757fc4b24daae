"""Steering where numbers, text or positions run out: refused in words, or right; never nonsense."""

from __future__ import annotations

import math

import pytest
import torch
from models.tiny_models import BUILDERS, seeded

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.calibration import calibrate
from mistudio.engine.steering.generation import (
    Generated,
    Sampling,
    check_numbers,
    encode_prompt,
    generate,
)
from mistudio.engine.steering.interventions import (
    READS_ACTIVATION,
    FeatureEdit,
    Scope,
    SiteSteering,
    Steering,
    Variant,
    adding,
)
from mistudio.engine.steering.metrics import divergences, steering_effect
from mistudio.errors import InvalidInput

POINT = HookPoint("resid_post", 1)
SPECIAL = [0, 1, 2]
PROMPT = [7, 9, 11, 13]
WIDTH = 32


class Plain:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def model_in(dtype: torch.dtype, name: str = "llama") -> HookedDecoder:
    return HookedDecoder(seeded(BUILDERS[name]).to(dtype))


@pytest.fixture(scope="module")
def model() -> HookedDecoder:
    return model_in(torch.float32)


def made(model: HookedDecoder, variant: Variant, prompt=PROMPT, scope=None, **options) -> Generated:
    sampling = Sampling(**{"max_new_tokens": 4, "temperature": 0.8} | options)
    return generate(
        model, Plain(), prompt, [variant], sampling,
        special_ids=SPECIAL, stop_ids=(), scope=scope,
    )  # fmt: skip


# --- what is added is too little, or too much -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_lost_in_rounding_is_no_broken_hook(dtype: torch.dtype) -> None:
    found = made(model_in(dtype), adding(POINT, torch.full((WIDTH,), 1e-9)))
    assert found.rows[0].ids == found.rows[1].ids


def test_a_hook_that_does_not_reach_the_logits_is_still_found(model, monkeypatch) -> None:
    monkeypatch.setattr(Steering, "_delta", lambda self, point, x: torch.zeros_like(x))
    with pytest.raises(RuntimeError, match="changed nothing"):
        made(model, adding(POINT, torch.ones(WIDTH)))


def words(text: str) -> dict[str, list[int]]:
    return {"input_ids": [5 + ord(letter) % 50 for letter in text]}


class Letters(Plain):
    def __call__(self, text: str) -> dict[str, list[int]]:
        return words(text)


def weak(strength: float) -> Variant:
    return adding(POINT, 1e-9 * strength * torch.ones(WIDTH))


def test_a_feature_too_weak_to_matter_is_calibrated(model, monkeypatch) -> None:
    def run():
        return calibrate(
            model, Letters(), weak, special_ids=SPECIAL, strengths=(1.0, 2.0),
            prompts=("sea", "land"), new_tokens=3,
        )  # fmt: skip

    assert [row.zone for row in run().tried] == ["green", "green"]
    monkeypatch.setattr(Steering, "edits", lambda self: {})
    with pytest.raises(RuntimeError, match="changed nothing"):
        run()


def test_a_change_of_a_thousandth_is_calibrated(model) -> None:
    """Its KL is that of rounding, its log probabilities are not."""
    x = model.capture(torch.tensor([PROMPT]), [POINT])[POINT][0, 1:]
    vector = torch.ones(WIDTH) / WIDTH**0.5 * x.norm(dim=1).median() * 1e-3
    found = calibrate(
        model, Letters(), lambda s: adding(POINT, s * vector), special_ids=SPECIAL,
        strengths=(0.2,), prompts=("sea",), new_tokens=3,
    )  # fmt: skip
    assert found.tried[0].kl < 1e-6


@pytest.mark.parametrize("together", [True, False])
def test_what_overflows_is_too_strong(together: bool) -> None:
    half = model_in(torch.float16)
    with pytest.raises(InvalidInput, match=r"too strong.*float16"):
        generate(
            half, Plain(), PROMPT, [adding(POINT, torch.full((WIDTH,), 1e6))],
            Sampling(max_new_tokens=2), special_ids=SPECIAL, stop_ids=(), together=together,
        )  # fmt: skip


def test_a_model_that_breaks_by_itself_is_told_apart() -> None:
    logits = torch.zeros(2, 5)
    check_numbers(logits.index_fill(1, torch.tensor([3]), -math.inf), [None, None])  # ruled out
    logits[0, 1] = math.nan
    with pytest.raises(InvalidInput, match="no numbers"):
        check_numbers(logits, [None, adding(POINT, torch.ones(WIDTH))])


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("method", ["add", "clamp", "scale", "orthogonal", "cap"])
def test_strengths_are_numbers(model, strength: float, method: str) -> None:
    variant = Variant(
        (SiteSteering(Site.at(POINT), normed(), (FeatureEdit(1, strength, 1.0, method),)),)
    )
    with pytest.raises(InvalidInput, match="strength cannot be used"):
        made(model, variant)


def test_a_perplexity_beyond_all_numbers_is_no_error() -> None:
    certain = model_in(torch.float32)
    certain.model.lm_head.weight.data *= 1e4
    variant = adding(POINT, torch.full((WIDTH,), 3.0))
    effect = steering_effect(certain, variant, PROMPT, [20, 21], [30, 31], "a", "b", SPECIAL)
    assert math.isfinite(effect.perplexity) and effect.perplexity > 1e300
    assert effect.perplexity_ratio > 0


def test_tokens_that_a_model_rules_out_have_no_part_in_the_divergence(model) -> None:
    variant = adding(POINT, torch.full((WIDTH,), 0.5))
    (before,) = divergences(model, [variant], PROMPT, [[20, 21]], SPECIAL)

    def rule_out(_module, _args, out):
        out.logits[:, :, 40] = -math.inf
        return out

    handle = model.model.register_forward_hook(rule_out)
    try:
        (found,) = divergences(model, [variant], PROMPT, [[20, 21]], SPECIAL)
    finally:
        handle.remove()
    assert all(map(math.isfinite, found.kl)) and found.kl != before.kl


# --- prompts and positions ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_text_beyond_the_models_positions_is_refused(name: str) -> None:
    small, vector = model_in(torch.float32, name), torch.linspace(-2, 1, WIDTH)
    variant = adding(POINT, vector)
    with pytest.raises(InvalidInput, match="prompt is too long"):
        made(small, variant, PROMPT * 16)
    with pytest.raises(InvalidInput, match="at most 60 new tokens"):
        made(small, variant, max_new_tokens=61)
    filled = made(small, variant, max_new_tokens=60)
    ids = filled.rows[1].ids
    effect = steering_effect(small, variant, PROMPT, filled.rows[0].ids, ids, "", "", SPECIAL)
    assert len(effect.kl_by_token) == 60
    with pytest.raises(InvalidInput, match="new tokens are too long"):
        calibrate(
            small, Letters(), lambda s: adding(POINT, s * vector),
            special_ids=SPECIAL, strengths=(1.0,), prompts=("sea",), new_tokens=62,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "scope"),
    [
        ([7], Scope("last")),
        ([7, 9, 1], Scope("last")),
        ([7, 1, 9], Scope("chosen", (1,))),
    ],
)
def test_a_scope_without_a_token_to_steer_is_refused(model, prompt, scope: Scope) -> None:
    with pytest.raises(InvalidInput, match="no token to steer"):
        made(model, adding(POINT, torch.ones(WIDTH)), prompt, scope)


def test_prompts_that_are_no_text_are_refused() -> None:
    for prompt, expected in (("\ud83d", "no readable text"), ("   ", "empty")):
        with pytest.raises(InvalidInput, match=expected):
            encode_prompt(Letters(), prompt, False)
    with pytest.raises(InvalidInput, match="no tokens"):
        encode_prompt(lambda text: {"input_ids": []}, "海", False)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_of_64_bits_can_be_used(model, seed: int) -> None:
    vector = torch.ones(WIDTH)
    control = Variant((SiteSteering(Site.at(POINT), vector=vector),), control=seed)
    made(model, control, seed=seed)
    calibrate(
        model, Letters(), lambda s: adding(POINT, s * vector), special_ids=SPECIAL,
        strengths=(1.0,), prompts=("sea", "land"), new_tokens=2, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63, 10**30])
def test_larger_seeds_are_refused(model, seed: int) -> None:
    with pytest.raises(InvalidInput, match="seed is too large"):
        made(model, adding(POINT, torch.ones(WIDTH)), seed=seed)


# --- dictionaries of normalised activations -------------------------------------------------------


def normed() -> Dictionary:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / WIDTH**0.5

    return Dictionary(
        random(24, WIDTH), random(24), random(24, WIDTH), random(WIDTH),
        JumpReLU(torch.full((24,), 0.1)), norm="layer_norm",
    )  # fmt: skip


@pytest.mark.parametrize("method", READS_ACTIVATION)
def test_a_normalised_feature_is_changed_as_decoding_would(model, method: str) -> None:
    """Every token has its own size there; the error is kept."""
    sae = normed()
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4, WIDTH, generator=g) * torch.tensor([1.0, 0.5, 3.0, 20.0])[:, None]
    codes = sae.encode(x)
    dense = codes.dense()
    feature = int((dense[1:] > 0).sum(0).argmax())
    f = dense[:, feature].clone()
    new = {"clamp": 1.5 + 0 * f, "clamp_min": f.clamp_min(1.5), "scale": 0.5 * f, "ablate": 0 * f}
    wanted = {"scale": 0.5}.get(method, 1.5)
    change = (new[method] - f)[:, None] * sae.decoder[feature]
    expected = x + change * x.std(dim=1, keepdim=True)
    dense[:, feature] = new[method]
    site = SiteSteering(Site.at(POINT), sae, (FeatureEdit(feature, wanted, 1.0, method),), gain=2.5)
    steering = Steering(model, [Variant((site,))], SPECIAL, 4)
    steering.expect(torch.tensor([PROMPT]), 0)
    out = steering.edits()[POINT](x[None])[0]
    assert float((expected - x)[1:].abs().max()) > 0.1
    torch.testing.assert_close(out[1:], expected[1:], rtol=1e-4, atol=1e-4)
    spread = x.std(dim=1, keepdim=True)
    error = x - sae.decode(codes, x)
    by_decoding = (dense @ sae.decoder + sae.b_dec) * spread + x.mean(1, keepdim=True) + error
    torch.testing.assert_close(out[1:], by_decoding[1:], rtol=1e-4, atol=1e-4)
