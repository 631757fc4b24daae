"""Zones of strength: what they say is what generating and measuring one by one gives."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.logits import last_logits
from mistudio.engine.sae.site import Site
from mistudio.engine.steering import calibration as module
from mistudio.engine.steering.calibration import (
    LEAST_DISTINCT,
    MOST_KL,
    Tried,
    calibrate,
    output_scores,
    recommended_of,
    safe_of,
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
    # A token of a prompt is among those that are never steered.
    special = [*SPECIAL, tiny_tokenizer(PROMPTS[0])["input_ids"][1]]
    own = {5, 9, 30, 41, 17, 260, 13, 15}
    found = calibrate(
        tiny, tiny_tokenizer, steered, special_ids=special, own=own, strengths=(1.0, 0.2),
        prompts=PROMPTS, new_tokens=10, seed=3,
    )  # fmt: skip
    assert [row.strength for row in found.tried] == [0.2, 1.0]
    for row in found.tried:
        kl, nll, base_nll, diverse, base_diverse, mine = [], [], [], [], [], []
        means = []
        after, before = [], []
        for number, prompt in enumerate(PROMPTS):
            ids = tiny_tokenizer(prompt)["input_ids"]
            sampling = Sampling(temperature=0.7, max_new_tokens=10, seed=3 + number)
            made = generate(
                tiny, tiny_tokenizer, ids, [steered(row.strength)], sampling,
                special_ids=special, stop_ids=(),
            ).rows  # fmt: skip
            effect = steering_effect(
                tiny, steered(row.strength), ids, made[0].ids, made[1].ids, "", "", special
            )
            kl += effect.kl_by_token
            means.append(effect.kl_per_token)
            nll.append(math.log(effect.perplexity))
            base_nll.append(math.log(effect.perplexity_unsteered))
            diverse.append(distinct(made[1].ids, 2))
            base_diverse.append(distinct(made[0].ids, 2))
            mine += [token in own for token in made[1].ids]
            whole = torch.tensor([[*ids, *made[1].ids]])
            for found_there, variant in ((before, None), (after, steered(row.strength))):
                steering = Steering(tiny, [variant], special, len(ids))
                steering.expect(whole, 0)
                with tiny.intervene(steering.edits()):
                    logits = tiny.model(whole).logits[0, len(ids) - 1 : -1].detach()
                found_there += [float(p[list(own)].sum()) for p in logits.softmax(-1)]
        assert row.tokens == len(kl) == 20
        assert row.kl == pytest.approx(sum(kl) / 20, rel=1e-3)
        assert row.kl_worst == pytest.approx(max(means), rel=1e-3)
        ratio = math.exp(sum(nll) / 2 - sum(base_nll) / 2)
        assert row.perplexity_ratio == pytest.approx(ratio, rel=1e-3)
        assert row.distinct_ratio == pytest.approx(sum(diverse) / sum(base_diverse))
        assert row.own_share == pytest.approx(sum(mine) / 20)
        assert row.own_probability == pytest.approx(sum(after) / 20, rel=1e-3)
        assert row.own_probability_unsteered == pytest.approx(sum(before) / 20, rel=1e-3)


@pytest.mark.parametrize("most_rows", [2, 3, 7])
def test_where_memory_is_short_the_same_is_found_in_parts(
    tiny, tiny_tokenizer, steered, monkeypatch, most_rows
):
    def run():
        return calibrate(
            tiny, tiny_tokenizer, steered, special_ids=SPECIAL, own={5, 9},
            strengths=(0.2, 0.5, 1.0), prompts=PROMPTS, new_tokens=4,
        )  # fmt: skip

    def short(model, ids, *rest):
        if len(ids) > most_rows:
            raise RuntimeError("CUDA out of memory")
        return last_logits(model, ids, *rest)

    whole = run()
    monkeypatch.setattr(module, "last_logits", short)
    if most_rows < 3:  # an unsteered text, a steered one, and the model that reads along
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        return
    for row, expected in zip(run().tried, whole.tried, strict=True):
        assert asdict(row) == pytest.approx(asdict(expected), rel=1e-3)


def test_a_change_that_does_not_reach_the_logits_is_an_error(
    tiny, tiny_tokenizer, steered, monkeypatch
):
    monkeypatch.setattr(Steering, "edits", lambda self: {})
    with pytest.raises(RuntimeError, match="changed nothing"):
        calibrate(
            tiny, tiny_tokenizer, steered, special_ids=SPECIAL, strengths=(1.0,),
            prompts=PROMPTS, new_tokens=2,
        )  # fmt: skip


def test_too_much_breaks_the_text_and_is_not_recommended(tiny, tiny_tokenizer, steered):
    found = calibrate(
        tiny, tiny_tokenizer, steered, special_ids=SPECIAL, strengths=(0.02, 0.05, 8.0, 30.0),
        prompts=PROMPTS, new_tokens=16,
    )  # fmt: skip
    assert found.tried[0].zone == "green"
    assert found.tried[-1].zone != "green"
    assert 0.02 <= found.recommended < 8.0
    assert math.isnan(found.own_share)
    assert found.safe == found.recommended  # without tokens of its own, nothing more is asked
    assert [row.kl for row in found.tried[:3]] == sorted(row.kl for row in found.tried[:3])


def row(
    strength: float,
    kl: float = 0.1,
    distinct_ratio: float = 1.0,
    ppl: float = 1.2,
    own: tuple[float, float] = (math.nan, math.nan),
    worst: float | None = None,
) -> Tried:
    return Tried(strength, 100, kl, kl if worst is None else worst, ppl, distinct_ratio, 0.0, *own)


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
    assert recommended_of([row(0.5), row(1.0, worst=MOST_KL + 0.01)]) == 0.5  # not on every prompt


def test_what_does_not_move_the_features_own_tokens_is_safe_but_not_recommended():
    more, same, less = (0.12, 0.1), (0.104, 0.1), (0.05, 0.1)
    rising = [
        row(0.5, own=same),
        row(1.0, own=more),
        row(2.0, own=(0.095, 0.1)),
        row(3.0, kl=0.9, own=more),
    ]
    assert (recommended_of(rising), safe_of(rising)) == (1.0, 2.0)
    assert recommended_of([row(0.5, own=less), row(1.0, own=same)]) == 0.0
    falling = [row(-0.5, own=less), row(-1.0, own=same), row(-2.0, own=more)]
    assert (recommended_of(falling), safe_of(falling)) == (-0.5, -2.0)


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        # Of features whose own tokens became rarer after other prompts.
        ((0.98, 0.98, 0.99, 1.06, 0.96), 0.0),
        ((1.01, 1.02, 1.01, 1.13, 1.06, 0.64, 1.06), 0.0),
        ((0.98, 1.03, 1.09, 0.97, 0.78), 0.0),
        # And of some whose became likelier.
        ((1.0, 1.01, 1.04, 1.05, 1.06, 1.22, 1.36), 0.7),
        ((1.09, 0.97, 1.14, 1.26, 1.23, 1.04), 0.5),
    ],
)
def test_one_rise_among_many_strengths_is_chance(rises, expected: float):
    tried = [row(0.1 * i, own=(0.1 * rise, 0.1)) for i, rise in enumerate(rises, 1)]
    assert recommended_of(tried) == pytest.approx(expected)
    assert safe_of(tried) == pytest.approx(0.1 * len(rises))


def test_tokens_without_any_probability_are_no_error():
    assert recommended_of([row(1.0, own=(0.1, 0.0))]) == 1.0
    assert recommended_of([row(1.0, own=(0.0, 0.0))]) == 0.0


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
