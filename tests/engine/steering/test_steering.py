"""Steering: nothing where it must not act, the same with and without a cache, measured rightly."""

from __future__ import annotations

import math

import pytest
import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.steering.generation import Sampling, draw, encode_prompt, generate
from mistudio.engine.steering.interventions import (
    FeatureEdit,
    Scope,
    Steering,
    adding,
    steering_vector,
)
from mistudio.engine.steering.metrics import (
    distinct,
    first_difference,
    steering_effect,
    word_cosine,
    word_jaccard,
)
from mistudio.errors import InvalidInput

POINT = HookPoint("resid_post", 2)
SPECIAL = [0, 1]


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer):
    return encode_prompt(tiny_tokenizer, "The government of the", False)


@pytest.fixture(scope="module")
def vector(tiny, prompt):
    g = torch.Generator().manual_seed(2)
    norm = tiny.capture(torch.tensor([prompt]), [POINT])[POINT][0, 1:].norm(dim=1).median()
    v = torch.randn(128, generator=g)
    return v / v.norm() * norm


def run(tiny, tokenizer, prompt, vectors, **options):
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 0.0, **options})
    variants = [adding(POINT, vector) for vector in vectors]
    return generate(tiny, tokenizer, prompt, variants, sampling, special_ids=SPECIAL, stop_ids={0})


def test_unsteered_row_equals_the_models_own_generation(tiny, tiny_tokenizer, prompt, vector):
    made = run(tiny, tiny_tokenizer, prompt, vector[None])
    ids = torch.tensor([prompt])
    for _ in range(12):
        ids = torch.cat([ids, tiny.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert made.rows[0].ids == ids[0, len(prompt) :].tolist()
    assert made.rows[1].ids != made.rows[0].ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_zero_gives_identical_tokens(tiny, tiny_tokenizer, prompt, temperature):
    made = run(tiny, tiny_tokenizer, prompt, torch.zeros(2, 128), temperature=temperature)
    assert made.rows[0].ids == made.rows[1].ids == made.rows[2].ids


def test_rows_in_one_batch_equal_separate_runs(tiny, tiny_tokenizer, prompt, vector):
    for temperature in (0.0, 0.8):
        together = run(
            tiny,
            tiny_tokenizer,
            prompt,
            torch.stack([vector, -vector]),
            temperature=temperature,
            seed=5,
        )
        for row, v in enumerate((vector, -vector), start=1):
            alone = run(tiny, tiny_tokenizer, prompt, v[None], temperature=temperature, seed=5)
            assert alone.rows[1].ids == together.rows[row].ids


def test_cached_generation_equals_full_recomputation(tiny, tiny_tokenizer, prompt, vector):
    made = run(tiny, tiny_tokenizer, prompt, vector[None]).rows[1].ids
    ids = torch.tensor([prompt])
    steering = Steering(tiny, [adding(POINT, vector)], SPECIAL, len(prompt))
    for _ in range(12):
        steering.expect(ids, 0)
        with tiny.intervene(steering.edits()):
            ids = torch.cat([ids, tiny.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert made == ids[0, len(prompt) :].tolist()


def test_position_zero_and_special_tokens_are_never_touched(tiny, vector):
    steering = Steering(tiny, [None, adding(POINT, vector)], SPECIAL, 4)
    edit = steering.edits()[POINT]
    ids = torch.tensor([[5, 1, 7, 8], [5, 1, 7, 8]])
    x = torch.randn(2, 4, 128)
    steering.expect(ids, 0)
    out = edit(x)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1, :2], x[1, :2])
    assert torch.allclose(out[1, 2:], x[1, 2:] + vector)
    steering.expect(ids[:, :1], 4)  # a later pass with a cache: its first token is position 4
    assert torch.allclose(edit(x[:, :1])[1, 0], x[1, 0] + vector)


def test_an_edit_that_does_not_reach_the_logits_is_an_error(
    tiny, tiny_tokenizer, prompt, vector, monkeypatch
):
    monkeypatch.setattr(Steering, "_delta", lambda self, point, x: torch.zeros_like(x))
    with pytest.raises(RuntimeError, match="changed nothing"):
        run(tiny, tiny_tokenizer, prompt, vector[None])


def test_tokens_that_nothing_reads_any_more_are_refused_in_words(
    tiny, tiny_tokenizer, prompt, vector
):
    def chosen(point, *positions):
        return generate(
            tiny, tiny_tokenizer, prompt, [adding(point, vector)], Sampling(max_new_tokens=2),
            special_ids=SPECIAL, stop_ids={0}, scope=Scope("chosen", positions),
        )  # fmt: skip

    last = HookPoint("resid_post", tiny.n_layers - 1)
    with pytest.raises(InvalidInput, match="cannot change the text"):
        chosen(last, 1, 2)
    chosen(last, 1, len(prompt) - 1)
    chosen(HookPoint("resid_pre", tiny.n_layers - 1), 1)


def test_stopping_leaves_no_hook_behind(tiny, tiny_tokenizer, prompt, vector):
    from mistudio.engine.progress import Cancelled, Silent

    class Stop(Silent):
        steps = 0

        def check(self) -> None:
            self.steps += 1
            if self.steps == 4:
                raise Cancelled

    ids = torch.tensor([prompt])
    before = tiny.model(ids).logits
    with pytest.raises(Cancelled):
        generate(
            tiny,
            tiny_tokenizer,
            prompt,
            [adding(POINT, vector)],
            Sampling(),
            special_ids=SPECIAL,
            stop_ids=set(),
            progress=Stop(),
        )
    assert torch.equal(tiny.model(ids).logits, before)


def test_shared_noise_and_seed(tiny, tiny_tokenizer, prompt, vector):
    first = run(tiny, tiny_tokenizer, prompt, vector[None], temperature=1.0, seed=1)
    again = run(tiny, tiny_tokenizer, prompt, vector[None], temperature=1.0, seed=1)
    other = run(tiny, tiny_tokenizer, prompt, vector[None], temperature=1.0, seed=2)
    assert first.rows == again.rows
    assert first.rows[0].ids != other.rows[0].ids


def test_drawing_follows_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    noise = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(logits, Sampling(temperature=1.0), noise) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, logits.softmax(1)[0], atol=0.03)
    kept = torch.cat(
        [draw(logits, Sampling(temperature=1.0, top_p=0.7), noise) for _ in range(500)]
    )
    assert set(kept.tolist()) == {0, 3}  # 0.64 + 0.24 reach 0.7


def test_features_add_once_whatever_their_order():
    decoder = torch.randn(6, 16)
    d = Dictionary(decoder, torch.zeros(6), decoder, torch.zeros(16), JumpReLU(torch.zeros(6)))
    edits = [FeatureEdit(2, 1.5, 4.0), FeatureEdit(5, -1.0, 2.0)]
    want = 6.0 * decoder[2] - 2.0 * decoder[5]
    assert torch.allclose(steering_vector(d, edits), want, atol=1e-6)
    assert torch.allclose(steering_vector(d, edits[::-1]), want, atol=1e-6)
    with pytest.raises(InvalidInput, match="0 to 5"):
        steering_vector(d, [FeatureEdit(6, 1.0, 1.0)])
    with pytest.raises(InvalidInput, match="never fired"):
        steering_vector(d, [FeatureEdit(1, 1.0, 0.0)])


def test_kl_and_perplexity_equal_a_plain_computation(tiny, prompt, vector):
    unsteered, steered = [30, 41, 52, 63], [30, 99, 120]
    found = steering_effect(
        tiny, adding(POINT, vector), prompt, unsteered, steered, "a b", "a c", SPECIAL
    )
    ids = torch.tensor([prompt + steered])
    base = tiny.model(ids).logits[0].log_softmax(-1)
    steering = Steering(tiny, [adding(POINT, vector)], SPECIAL, len(prompt))
    steering.expect(ids, 0)
    with tiny.intervene(steering.edits()):
        changed = tiny.model(ids).logits[0].log_softmax(-1)
    places = [len(prompt) - 1 + i for i in range(3)]
    kl = [float((changed[p].exp() * (changed[p] - base[p])).sum()) for p in places]
    assert found.kl_by_token == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert found.kl_per_token == pytest.approx(sum(kl) / 3, rel=1e-3)
    assert min(found.kl_by_token) > 0
    nll = -sum(float(base[p, t]) for p, t in zip(places, steered, strict=True)) / 3
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-3)
    other = tiny.model(torch.tensor([prompt + unsteered])).logits[0].log_softmax(-1)
    nll_u = -sum(float(other[len(prompt) - 1 + i, t]) for i, t in enumerate(unsteered)) / 4
    assert found.perplexity_ratio == pytest.approx(math.exp(nll - nll_u), rel=1e-3)
    assert found.first_difference == 1


def test_no_steering_has_no_effect(tiny, prompt):
    found = steering_effect(
        tiny, adding(POINT, torch.zeros(128)), prompt, [30, 41], [30, 41], "x y", "x y", SPECIAL
    )
    assert found.kl_per_token == pytest.approx(0.0, abs=1e-7)
    assert found.perplexity_ratio == pytest.approx(1.0, rel=1e-5)
    assert found.first_difference is None
    assert found.similarity == pytest.approx(1.0)


def test_text_measures():
    assert word_jaccard("the cat sat", "The dog sat!") == pytest.approx(2 / 4)
    assert word_cosine("a a b", "a b b") == pytest.approx(4 / 5)
    assert word_cosine("", "") == 1.0
    assert word_cosine("a", "") == 0.0
    assert distinct([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert math.isnan(distinct([1], 2))
    assert first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 3.0), ("top_p", 0.0), ("max_new_tokens", 0)]
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InvalidInput) as caught:
        Sampling(**{field: value}).check()
    assert caught.value.field == field


def test_empty_prompt_is_refused(tiny_tokenizer):
    with pytest.raises(InvalidInput, match="empty"):
        encode_prompt(tiny_tokenizer, "  ", False)
