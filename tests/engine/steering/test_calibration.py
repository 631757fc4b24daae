"""Zones of strength: what they say is what generating and measuring one by one gives."""

from __future__ import annotations

import math

import pytest
import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.calibration import (
    LEAST_DISTINCT,
    MOST_KL,
    Tried,
    calibrate,
    output_scores,
    recommended_of,
)
from mistudio.engine.steering.generation import Sampling, generate
from mistudio.engine.steering.interventions import Scope, SiteSteering, Steering, Variant
from mistudio.engine.steering.metrics import distinct, steering_effect

POINT = HookPoint("resid_post", 2)
SPECIAL = [0, 1]
PROMPTS = ("The government of the", "It was the")


@pytest.fixture(scope="module")
def direction(tiny, tiny_tokenizer):
    ids = torch.tensor([tiny_tokenizer(PROMPTS[0])["input_ids"]])
    norm = tiny.capture(ids, [POINT])[POINT][0, 1:].norm(dim=1).median()
    v = torch.randn(128, generator=torch.Generator().manual_seed(2))
    return v / v.norm() * norm


@pytest.fixture(scope="module")
def steered(direction):
    return lambda s: Variant((SiteSteering(Site.at(POINT), vector=s * direction),))


def test_figures_are_those_of_each_text_measured_alone(tiny, tiny_tokenizer, steered):
    own = {5, 9, 30, 41, 17, 260, 13, 15}
    found = calibrate(
        tiny, tiny_tokenizer, steered, special_ids=SPECIAL, own=own, strengths=(1.0, 0.2),
        prompts=PROMPTS, new_tokens=10, seed=3,
    )  # fmt: skip
    assert [row.strength for row in found.tried] == [0.2, 1.0]
    for row in found.tried:
        kl, nll, base_nll, diverse, base_diverse, mine = [], [], [], [], [], []
        for number, prompt in enumerate(PROMPTS):
            ids = tiny_tokenizer(prompt)["input_ids"]
            sampling = Sampling(temperature=0.7, max_new_tokens=10, seed=3 + number)
            made = generate(
                tiny, tiny_tokenizer, ids, [steered(row.strength)], sampling,
                special_ids=SPECIAL, stop_ids=(),
            ).rows  # fmt: skip
            effect = steering_effect(
                tiny, steered(row.strength), ids, made[0].ids, made[1].ids, "", "", SPECIAL
            )
            kl += effect.kl_by_token
            nll.append(math.log(effect.perplexity))
            base_nll.append(math.log(effect.perplexity_unsteered))
            diverse.append(distinct(made[1].ids, 2))
            base_diverse.append(distinct(made[0].ids, 2))
            mine += [token in own for token in made[1].ids]
        assert row.tokens == len(kl) == 20
        assert row.kl == pytest.approx(sum(kl) / 20, rel=1e-3)
        ratio = math.exp(sum(nll) / 2 - sum(base_nll) / 2)
        assert row.perplexity_ratio == pytest.approx(ratio, rel=1e-3)
        assert row.distinct_ratio == pytest.approx(sum(diverse) / sum(base_diverse))
        assert row.own_share == pytest.approx(sum(mine) / 20)


def test_too_much_breaks_the_text_and_is_not_recommended(tiny, tiny_tokenizer, steered):
    found = calibrate(
        tiny, tiny_tokenizer, steered, special_ids=SPECIAL, strengths=(0.02, 0.05, 8.0, 30.0),
        prompts=PROMPTS, new_tokens=16,
    )  # fmt: skip
    assert found.tried[0].zone == "green"
    assert found.tried[-1].zone != "green"
    assert 0.02 <= found.recommended < 8.0
    assert math.isnan(found.own_share)
    assert [row.kl for row in found.tried[:3]] == sorted(row.kl for row in found.tried[:3])


def row(strength: float, kl: float = 0.1, distinct_ratio: float = 1.0, ppl: float = 1.2) -> Tried:
    return Tried(strength, 100, kl, ppl, distinct_ratio, 0.0)


@pytest.mark.parametrize(
    ("tried", "zone"),
    [
        (row(1.0), "green"),
        (row(1.0, kl=MOST_KL + 0.01), "amber"),
        (row(1.0, distinct_ratio=LEAST_DISTINCT - 0.01), "amber"),
        (row(1.0, ppl=3.1), "amber"),
        (row(1.0, distinct_ratio=0.69), "red"),
        (row(1.0, kl=0.01, distinct_ratio=0.5, ppl=0.4), "red"),  # repetition is likely text
    ],
)
def test_zones_follow_the_limits(tried: Tried, zone: str):
    assert tried.zone == zone


def test_nothing_beyond_a_strength_that_fails_is_recommended():
    assert recommended_of([row(0.5), row(1.0), row(2.0, kl=0.9), row(3.0)]) == 1.0
    assert recommended_of([row(0.5, kl=0.9), row(1.0)]) == 0.0
    assert recommended_of([row(-0.5), row(-1.0)]) == -1.0
    assert recommended_of([row(0.5, kl=0.45)]) == 0.0  # within the limit, without a margin


def test_strengths_of_both_signs_are_refused(tiny, tiny_tokenizer, steered):
    for strengths in ((), (1.0, -1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="sign"):
            calibrate(tiny, tiny_tokenizer, steered, special_ids=[], strengths=strengths)


def test_output_scores_are_their_formula(tiny, tiny_tokenizer, steered):
    ids = tiny_tokenizer(PROMPTS[0])["input_ids"]
    variants = [steered(s) for s in (0.5, -1.0, 2.0)]
    own = [[5, 9], [30], [41, 17, 260]]
    found = output_scores(tiny, ids, variants, own, SPECIAL, batch=2)
    for some, tokens, score in zip(variants, own, found, strict=True):
        steering = Steering(tiny, [some], SPECIAL, len(ids), Scope("last"))
        steering.expect(torch.tensor([ids]), 0)
        with tiny.intervene(steering.edits()):
            p = tiny.model(torch.tensor([ids])).logits[0, -1].detach().softmax(-1)
        order = p.argsort(descending=True).tolist()
        best_rank = min(order.index(token) for token in tokens)
        likeliest = max(float(p[token]) for token in tokens)
        assert score.rank == best_rank
        assert score.probability == pytest.approx(likeliest, rel=1e-4)
        assert score.score == pytest.approx(likeliest * (1 - best_rank / len(p)), rel=1e-4)
