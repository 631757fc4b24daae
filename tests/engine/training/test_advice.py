"""Advice: what is likely to end badly is said with the value that mends it, and that value is then
left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.training.advice import (
    L1_AWAY,
    L1_DEADLY,
    USUAL_L1,
    Advice,
    advise,
    advise_memory,
    mend_of,
    spread,
    usual_l1,
)
from mistudio.engine.training.config import Plan, TrainingConfig, derive, option, parse
from mistudio.engine.training.cost import GPT2_SMALL
from mistudio.engine.training.footprint import Machine, PlannedSite, RunShape
from mistudio.engine.training.objectives.base import Coefficient
from mistudio.engine.training.planning import plan_run
from mistudio.engine.training.step import SiteTrainer

GB = 1024**3


def a_plan(d: int = 576, **options: Any) -> Plan:
    return derive(parse(options), d)


def about(field: str, corpus: int | None = None, d: int = 576, **options: Any) -> Advice | None:
    return next((a for a in advise(a_plan(d, **options), corpus) if a.field == field), None)


def mended(advice: Advice, options: dict[str, Any]) -> dict[str, Any]:
    assert advice.mend is not None
    return {**options, advice.mend.field: advice.mend.value}


def test_defaults_need_no_advice() -> None:
    for d in (128, 576, 768, 2048, 4096):
        for sparsity in option("sparsity")["choices"]:
            assert advise(a_plan(d, sparsity=sparsity)) == []


# field -> (options, corpus, words): what ends badly.
BAD: list[tuple[str, dict[str, Any], int | None, str]] = [
    ("l1_coefficient", {"sparsity": "standard", "l1_coefficient": 50.0}, None, "latents dead"),
    ("l1_coefficient", {"sparsity": "jumprelu", "l1_coefficient": 3.0}, None, "far fewer than 32"),
    ("l1_coefficient", {"sparsity": "gated", "l1_coefficient": 0.1}, None, "far more than 32"),
    ("learning_rate", {"learning_rate": 0.05}, None, "17 times"),
    ("learning_rate", {"learning_rate": 1e-4}, None, "1/30 of"),
    ("decay_share", {"warmup_share": 0.4, "decay_share": 0.8}, None, "never reaches its peak"),
    ("k", {"k": 600}, None, "not sparse"),
    ("k", {"k": 1}, None, "1 active latent per token"),
    ("tokens", {"tokens": 20_000}, None, "would fire about 139 times"),
    ("steps", {"steps": 20}, None, "tokens are few"),
    ("tokens", {}, 100_000, "would be read 20 times"),
    ("steps", {"steps": 1000}, 100_000, "would be read 20 times"),
    ("expansion", {"expansion": 256.0}, 100_000, "lets about 25,600 fire"),
    ("width", {"width": 150_000}, 100_000, "lets about 25,600 fire"),
    ("context", {"context": 1024}, 8_000, "too few windows of 1,024"),
    ("dead_window", {"dead_window": 2_000_000}, None, "never found"),
    ("dead_window", {"dead_window": 4_000}, None, "batches of 2,048"),
    ("dead_window", {"dead_window": 10_000, "expansion": 256.0, "tokens": 20_000_000}, None,
     "fires once in 4,608 tokens"),
    ("gradient_accumulation", {"gradient_accumulation": 64}, None, "no memory is saved"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "options", "corpus", "words"), BAD)
def test_what_ends_badly_is_said_and_its_mend_is_left_alone(
    field: str, options: dict[str, Any], corpus: int | None, words: str
) -> None:
    advice = about(field, corpus, **options)
    assert advice is not None and words in advice.sentence
    assert advice.mend is not None and advice.mend.label.startswith("Use ")
    after = mended(advice, options)
    parse(after)  # taken
    assert about(field, corpus, **after) is None


def test_mends_that_follow_one_another_come_to_an_end() -> None:
    """A large dictionary on a short text: neither more tokens nor fewer would do."""
    options: dict[str, Any] = {"expansion": 256.0}
    for _ in range(5):
        found = advise(a_plan(**options), 200_000)
        if not found:
            break
        options = mended(found[0], options)
    assert advise(a_plan(**options), 200_000) == []


# -------------------------------------------------------------------- the price of activity


@pytest.mark.parametrize("sparsity", USUAL_L1)
def test_the_usual_price_is_about_what_the_steering_finds(
    sparsity: str, tiny: Any, tokens: Any
) -> None:
    """On the tiny model's activations: within a factor of 2.5 of what a short run is steered to."""
    trainer = _trained(_rows(tiny, tokens), sparsity, None)
    coefficient: Coefficient = trainer.objective.coefficient
    usual = usual_l1(sparsity, 128, 16)
    assert usual is not None
    assert 0.4 < coefficient.value / usual < 2.5


def test_prices_that_are_advised_against_do_what_is_said(tiny: Any, tokens: Any) -> None:
    rows = _rows(tiny, tokens)
    usual = usual_l1("standard", 128, 16)
    assert usual is not None
    assert _l0(_trained(rows, "standard", 1.5 * L1_AWAY * usual), rows) < 16 / 2
    assert _l0(_trained(rows, "standard", 2 * L1_DEADLY * usual), rows) < 16 / 5
    assert _l0(_trained(rows, "standard", usual / L1_AWAY), rows) > 16 * 2


def _rows(tiny: Any, tokens: Any) -> torch.Tensor:
    point = HookPoint("resid_post", 2)
    with LiveActivations(tiny, tokens, (point,), 64).batches(16_384, 0) as stream:
        return next(stream)[point]


def _trained(rows: torch.Tensor, sparsity: str, price: float | None) -> SiteTrainer:
    options = {"sparsity": sparsity, "k": 16, "expansion": 4, "steps": 150, "batch_size": 256,
               "l1_coefficient": price}  # fmt: skip
    plan = derive(parse({k: v for k, v in options.items() if v is not None}), 128)
    trainer = SiteTrainer(plan, rows[:4096], 0)
    numbers = torch.Generator().manual_seed(0)
    for _ in range(plan.steps):
        trainer.step(rows[torch.randint(len(rows), (256,), generator=numbers)], measure=False)
    return trainer


def _l0(trainer: SiteTrainer, rows: torch.Tensor) -> float:
    return len(trainer.dictionary().encode(rows[:2048]).values) / 2048


# -------------------------------------------------------------------- memory


def a_run(layers: int, d_sae: int = 6144, **options: Any) -> RunShape:
    plan = replace(derive(parse({"width": d_sae, **options}), 768), d_sae=d_sae)
    return RunShape(GPT2_SMALL, tuple(PlannedSite(n, "resid_post", plan) for n in range(layers)))


def test_layers_that_fit_need_no_advice() -> None:
    plan = plan_run(a_run(3), Machine(16 * GB, 12 * GB, 100 * GB))
    assert advise_memory(plan, range(3)) == []


def test_as_many_layers_are_kept_as_fit_spread_over_the_chosen() -> None:
    machine = Machine(16 * GB, 2 * GB, 100 * GB)
    plan = plan_run(a_run(12), machine)
    (advice,) = advise_memory(plan, range(12))
    assert advice.field == "layers" and advice.mend is not None
    kept = advice.mend.value
    assert "With 12 layers " in advice.sentence and "2.0 GB are free" in advice.sentence
    assert f"at most {len(kept)} layers fit" in advice.sentence
    assert kept[0] == 0 and kept[-1] == 11 and len(set(kept)) == plan.layers
    assert plan_run(a_run(len(kept)), machine).fits
    assert not plan_run(a_run(len(kept) + 1), machine).fits


def test_layers_are_spread_evenly() -> None:
    assert spread(range(12), 4) == (0, 4, 7, 11)
    assert spread((3, 5, 9), 1) == (5,)
    assert spread((3, 5), 2) == (3, 5)


def test_where_no_dictionary_fits_the_largest_that_does_is_named() -> None:
    machine = Machine(16 * GB, 3 * GB, 100 * GB)
    plan = plan_run(a_run(1, 2**18), machine)
    (advice,) = advise_memory(plan, range(1), (4, 8, 16, 32, 64))
    assert advice.field == "width" and advice.mend is not None
    width = advice.mend.value
    assert plan_run(a_run(1, width), machine).fits
    assert not plan_run(a_run(1, 2 * width), machine).fits


# -------------------------------------------------------------------- refused values


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("k", "0", 1),
        ("k", "2.4", 2),
        ("tokens", "12", 1000),
        ("learning_rate", "7", 0.1),
        ("learning_rate", "nan", None),
        ("batch_size", "1e999", None),
        ("warmup_share", "0.9", 0.5),
        ("seed", "-3", 0),
        ("seed", "one", 0),
        ("auxk", "maybe", True),
        ("sparsity", "most", "batchtopk"),
    ],
)
def test_a_refused_value_is_mended_by_the_nearest_that_is_taken(
    name: str, value: str, mend: Any
) -> None:
    found = mend_of(name, value, TrainingConfig(), 576)
    assert found is not None and found.value == mend
    if mend is not None:
        assert getattr(parse({name: mend}), name) == mend
