"""Optimisers against torch's own, schedules as numbers, and going on from a saved state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.optimizers import (
    FACTORS,
    decay_begins,
    forget,
    learning_rate,
    restore,
)
from mistudio.engine.training.step import SiteTrainer
from mistudio.errors import InvalidInput

SPARSITIES = ("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated")
WIRINGS = {
    "sae": {"wiring": "sae"},
    "skip_sae, directions": {"wiring": "skip_sae", "skip": "principal", "skip_rank": 3},
    "skip_sae, share": {"wiring": "skip_sae", "skip": "fixed", "skip_share": 0.3},
    "transcoder": {"wiring": "transcoder"},
    "skip_transcoder": {"wiring": "skip_transcoder"},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def planned(**options):
    values = {"width": 48, "k": 4, "batch_size": 64, "steps": 40, **options}
    transcoder = values.get("wiring", "sae") in ("transcoder", "skip_transcoder")
    return derive(TrainingConfig(**values), 12, 10 if transcoder else None)


def batch(plan, seed: int, n: int = 64) -> tuple[Tensor, Tensor | None]:
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=numbers) * torch.linspace(0.5, 2, 12) + 1
    transcoder = plan.config.wiring in ("transcoder", "skip_transcoder")
    return x, torch.relu(x[:, :10]) + 0.1 if transcoder else None


def trainer_of(plan, seed: int = 0, of: int = 1000) -> SiteTrainer:
    x, y = batch(plan, of, 256)
    return SiteTrainer(plan, x, seed, y)


# --- the moves ------------------------------------------------------------------------------------


def plain_adam(p: Tensor, g: Tensor, memory: dict, rate: float, decay: float) -> Tensor:
    """Kingma and Ba 2015; Loshchilov and Hutter 2019 where `decay` > 0."""
    memory["t"] = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g * g
    m, v = memory["m"] / (1 - 0.9 ** memory["t"]), memory["v"] / (1 - 0.99 ** memory["t"])
    return p - rate * decay * p - rate * m / (v.sqrt() + 1e-8)


def plain_sgd(p: Tensor, g: Tensor, memory: dict, rate: float, decay: float) -> Tensor:
    memory["m"] = 0.9 * memory.get("m", 0) + g
    return p - rate * memory["m"]


@pytest.mark.parametrize("sparsity", ["jumprelu", "gated"])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weights_move_as_the_optimisers_formulas_say(name, sparsity):
    plan = planned(
        optimizer=name, weight_decay=0.7, sparsity=sparsity, wiring="skip_transcoder", revive=False
    )
    trainer = trainer_of(plan)
    formula = plain_sgd if name == "sgd" else plain_adam
    mine = {key: value.double() for key, value in trainer.parameters().items()}
    memory: dict[str, dict] = {key: {} for key in mine}
    caught: dict[str, Tensor] = {}

    def catch(*_: object) -> None:
        caught.update({key: p.grad.double() for key, p in trainer.parameters().items()})

    trainer._optimizer.register_step_pre_hook(catch)
    for number in range(12):
        rate = learning_rate(plan, number)
        trainer.step(*batch(plan, number))
        for key, gradient in caught.items():
            # Logarithms and skips do not shrink, decoders have norm 1 all the same.
            shrinks = name == "adamw" and key in ("encoder", "b_enc", "b_dec", "b_mag")
            mine[key] = formula(
                mine[key], gradient, memory[key], rate * FACTORS.get(key, 1.0), 0.7 * shrinks
            )
        mine["decoder"] /= mine["decoder"].norm(dim=1, keepdim=True)
        for key, value in trainer.parameters().items():
            assert torch.allclose(value.double(), mine[key], rtol=1e-4, atol=1e-6), (number, key)


@pytest.mark.parametrize(("name", "own"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_torchs_own_optimiser_goes_the_same_way(name, own):
    plan = planned(optimizer=name, sparsity="topk", weight_decay=0.0, revive=False)
    trainer = trainer_of(plan)
    mine = {key: value.clone() for key, value in trainer.parameters().items()}
    options = {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.99)}
    if name == "adamw":
        options["weight_decay"] = 0.0
    other = getattr(torch.optim, own)(list(mine.values()), lr=1.0, foreach=False, **options)

    def catch(*_: object) -> None:
        for key, p in trainer.parameters().items():
            mine[key].grad = p.grad.clone()

    trainer._optimizer.register_step_pre_hook(catch)
    before = mine["encoder"].clone()
    for number in range(12):
        trainer.step(*batch(plan, number))
        (group,) = other.param_groups
        for key, parameter in mine.items():
            group["params"] = [parameter]
            group["lr"] = learning_rate(plan, number) * FACTORS.get(key, 1.0)
            other.step()
        mine["decoder"] /= mine["decoder"].norm(dim=1, keepdim=True)
    for key, value in trainer.parameters().items():
        assert torch.allclose(value, mine[key], rtol=1e-4, atol=1e-6), key
    assert not torch.allclose(before, mine["encoder"], atol=1e-4)


def test_gradients_longer_than_1_are_clipped():
    plan = planned(revive=False)
    trainer = trainer_of(plan)
    norms = []

    def catch(*_: object) -> None:
        norms.append(
            math.sqrt(sum(float(p.grad.norm()) ** 2 for p in trainer.parameters().values()))
        )

    trainer._optimizer.register_step_pre_hook(catch)
    trainer.step(batch(plan, 0)[0])
    trainer.step(batch(plan, 0)[0] * 100)
    assert norms[0] < 1 - 1e-3
    assert norms[1] == pytest.approx(1, rel=1e-4)


def test_8_bit_adam_needs_a_gpu():
    plan = planned(optimizer="adam8bit")
    with pytest.raises(InvalidInput, match="8-bit Adam needs an NVIDIA GPU") as caught:
        trainer_of(plan)
    assert caught.value.field == "optimizer"
    assert "cpu" in caught.value.what
    assert caught.value.next_step


def test_8_bit_moments_are_forgotten_as_zeros_of_their_table():
    """bitsandbytes keeps places in a table of 256 numbers; place 0 is the most negative one."""
    parameter = torch.zeros(6, 4)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    tables = {"qmap1": torch.arange(-127, 128) / 127, "qmap2": torch.linspace(0, 1, 256)}
    moments = {
        "step": torch.tensor(7),
        "state1": torch.randint(0, 255, (6, 4), dtype=torch.uint8),
        "state2": torch.randint(1, 255, (6, 4), dtype=torch.uint8),
        "absmax1": torch.ones(1),
        "absmax2": torch.ones(1),
        **tables,
    }
    restore(optimizer, parameter, moments)
    state = optimizer.state[parameter]
    assert type(state["step"]) is int
    assert state["step"] == 7
    forget(optimizer, parameter, torch.tensor([1, 4]))
    for number in ("1", "2"):
        values = state["qmap" + number][state["state" + number].long()]
        assert float(values[[1, 4]].abs().max()) == 0
        kept = [0, 2, 3, 5]
        assert torch.equal(state["state" + number][kept], moments["state" + number][kept])


# --- schedules ------------------------------------------------------------------------------------


def rates(**options) -> list[float]:
    values = {
        "learning_rate": 1e-2,
        "steps": 100,
        "warmup_share": 0.1,
        "decay_share": 0.2,
        **options,
    }
    plan = planned(**values)
    return [learning_rate(plan, step) / 1e-2 for step in range(101)]


def test_the_rate_rises_over_the_warm_up():
    found = rates()
    assert found[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert rates(warmup_share=0.0)[0] == 1
    assert rates(warmup_share=0.5)[24] == pytest.approx(0.5)


def test_the_rate_falls_to_nothing_over_the_decay():
    found = rates()
    assert found[10:81] == [1.0] * 71
    assert found[80:] == pytest.approx([1 - step / 20 for step in range(21)])
    assert found[100] == 0
    assert decay_begins(planned(steps=100, decay_share=0.2)) == 80
    assert decay_begins(planned(steps=100, decay_share=0.0)) == 100
    assert rates(decay_share=0.0)[99] == 1
    # From the first step on: the smaller of rise and fall.
    whole = rates(decay_share=1.0)
    assert whole[4] == pytest.approx(0.5)
    assert whole[50] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("schedule", "at_half", "at_end"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.55, 0.1),
        ("cosine", 0.5, 0.0),
        ("exponential", math.sqrt(0.1), 0.1),
    ],
)
def test_schedules_run_from_the_warm_up_to_the_end(schedule, at_half, at_end):
    found = rates(schedule=schedule, decay_share=0.0)
    assert found[9] == 1
    assert found[10] == pytest.approx(1, abs=0.03)
    assert found[55] == pytest.approx(at_half)
    assert found[100] == pytest.approx(at_end)
    # With a decay: never above either of the two.
    with_decay = rates(schedule=schedule)
    for step in range(10, 101):
        assert with_decay[step] == pytest.approx(min(found[step], (100 - step) / 20))


def test_the_rate_of_a_step_is_the_one_its_optimiser_uses():
    plan = planned(schedule="cosine", optimizer="sgd", steps=20)
    trainer = trainer_of(plan)
    for number in range(20):
        metrics = trainer.step(*batch(plan, number))
        assert metrics.learning_rate == learning_rate(plan, number)
        names = list(trainer.parameters())
        for name, group in zip(names, trainer._optimizer.param_groups, strict=True):
            assert group["lr"] == learning_rate(plan, number) * FACTORS.get(name, 1.0)


# --- going on -------------------------------------------------------------------------------------


def assert_goes_on(**options) -> None:
    """A run of 40 steps, and one that is put down after 17 of them and taken up by a trainer that
    was built on other data with another seed: equal bit for bit."""
    plan = planned(dead_window=1000, **options)
    whole = trainer_of(plan)
    for number in range(40):
        if number == 17:
            saved = whole.state()
        whole.step(*batch(plan, number))
    for other in (
        trainer_of(plan, seed=7, of=2000),
        SiteTrainer.resumed(plan, saved, torch.device("cpu")),
    ):
        other.load_state(saved)
        for name, value in saved.items():
            assert torch.equal(value, other.state()[name]), name
        for number in range(17, 40):
            other.step(*batch(plan, number))
        ends = whole.state(), other.state()
        assert ends[0].keys() == ends[1].keys()
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), name
    assert not torch.equal(saved["encoder"], ends[0]["encoder"])


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_resumed_trainer_goes_on_bit_for_bit(sparsity, wiring):
    for optimizer in ("adam", "adamw", "sgd"):
        assert_goes_on(sparsity=sparsity, optimizer=optimizer, **WIRINGS[wiring])


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": True},
        {"gradient_accumulation": 3},
        {"sparsity": "standard", "l1_coefficient": 2.0},
        {"schedule": "cosine", "warmup_share": 0.5, "anneal_share": 0.9},
    ],
)
def test_a_resumed_trainer_goes_on_whatever_its_options(options):
    assert_goes_on(**options)


def test_a_state_is_a_copy():
    plan = planned()
    trainer = trainer_of(plan)
    trainer.step(*batch(plan, 0))
    saved = trainer.state()
    before = {name: value.clone() for name, value in saved.items()}
    trainer.step(*batch(plan, 1))
    other = trainer_of(plan, seed=3)
    other.load_state(saved)
    other.step(*batch(plan, 2))
    for name, value in saved.items():
        assert torch.equal(value, before[name]), name
