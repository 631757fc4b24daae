"""What goes in and what must come out: scales, skips, targets, and that the finished dictionary is
the function that was trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.distributed import ALONE
from mistudio.engine.training.step import SiteTrainer
from mistudio.engine.training.wiring import RIDGE, wire

SPARSITIES = ("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated")
WIRINGS = {
    "sae": {"wiring": "sae"},
    "skip_sae, directions": {"wiring": "skip_sae", "skip": "principal", "skip_rank": 4},
    "skip_sae, share": {"wiring": "skip_sae", "skip": "fixed", "skip_share": 0.3},
    "transcoder": {"wiring": "transcoder"},
    "skip_transcoder": {"wiring": "skip_transcoder"},
}
SKIPS = [name for name in WIRINGS if "skip" in name]
D_IN, D_OUT = 16, 12


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def planned(wiring: str, d_out: int = D_OUT, **options):
    values = {"width": 64, "k": 4, "batch_size": 128, "steps": 200, "anneal_share": 0.0}
    config = TrainingConfig(**{**values, **WIRINGS[wiring], **options})
    return derive(config, D_IN, d_out if "transcoder" in config.wiring else None)


def data(plan, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Off-centre inputs with unequal directions, and for transcoders a nonlinear map of them."""
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=numbers) * torch.linspace(1, 5, D_IN) + 3
    if "transcoder" not in plan.config.wiring:
        return x, None
    weights = torch.randn(D_IN, plan.d_out, generator=torch.Generator().manual_seed(99))
    return x, 0.1 * torch.relu(x @ weights - 3) + 1


def trainer_of(plan) -> SiteTrainer:
    x, y = data(plan, 1024)
    return SiteTrainer(plan, x, 0, y)


# --- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", WIRINGS)
def test_inputs_and_targets_have_norm_sqrt_d_on_average(wiring):
    plan = planned(wiring)
    x, y = data(plan, 1000)
    wired = wire(plan, x, y)
    assert float(wired.inputs(x).norm(dim=1).mean()) == pytest.approx(math.sqrt(D_IN), rel=1e-5)
    whole = x if y is None else y
    norm = float((whole * wired.out_scale).norm(dim=1).mean())
    assert norm == pytest.approx(math.sqrt(whole.shape[1]), rel=1e-5)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_target_is_needed_exactly_where_input_and_output_differ(wiring):
    plan = planned(wiring)
    x, y = data(plan, 100)
    with pytest.raises(ValueError, match="target"):
        wire(plan, x, None if y is not None else x)


def test_the_sparse_part_gets_what_the_skip_leaves():
    for wiring in WIRINGS:
        plan = planned(wiring)
        x, y = data(plan, 500)
        wired = wire(plan, x, y)
        u = wired.inputs(x)
        whole = u if y is None else y * wired.out_scale
        skip = wired.skip_matrix()
        passed_on = torch.zeros_like(whole) if skip is None else u @ skip.T
        assert torch.allclose(wired.targets(u, y) + passed_on, whole, atol=1e-5), wiring
        assert (skip is None) == (wiring in ("sae", "transcoder"))


# --- skips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1000, 10])
def test_a_learnt_skip_starts_as_the_ridge_solution(n):
    plan = planned("skip_transcoder")
    x, y = (rows.double() for rows in data(plan, n))
    wired = wire(plan, x, y)
    a = (x * wired.scale).numpy()
    a = a - a.mean(0)
    b = (y * wired.out_scale).numpy()
    b = b - b.mean(0)
    # Ridge as ordinary least squares on d more rows.
    weight = RIDGE * (a * a).sum() / D_IN
    solution = np.linalg.lstsq(
        np.vstack([a, math.sqrt(weight) * np.eye(D_IN)]),
        np.vstack([b, np.zeros((D_IN, D_OUT))]),
        rcond=None,
    )[0]
    assert np.allclose(wired.skip.numpy(), solution.T, rtol=1e-8, atol=1e-10)
    assert wired.learns_skip
    if n > D_IN:  # and that is nearly the unpenalised one
        plain = np.linalg.lstsq(a, b, rcond=None)[0]
        assert np.abs(a @ plain - a @ solution).max() < 0.01 * np.abs(a @ plain).max()


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_a_principal_skip_is_the_leading_singular_subspace(rank):
    plan = planned("skip_sae, directions", skip_rank=rank)
    x = data(plan, 500)[0].double() @ torch.linalg.qr(torch.randn(D_IN, D_IN).double())[0]
    wired = wire(plan, x, None)
    u = (x * wired.scale).numpy()
    directions = np.linalg.svd(u - u.mean(0), full_matrices=False)[2][:rank]
    assert np.allclose(wired.skip.numpy(), directions.T @ directions, atol=1e-9)
    assert not wired.learns_skip


def test_a_fixed_share_is_that_share_of_the_input():
    plan = planned("skip_sae, share")
    x, _ = data(plan, 200)
    wired = wire(plan, x, None)
    assert torch.equal(wired.skip_matrix(), 0.3 * torch.eye(D_IN))
    assert torch.allclose(wired.targets(wired.inputs(x), None), 0.7 * wired.inputs(x))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("wiring", SKIPS)
def test_a_skip_alone_never_reaches_zero_loss(wiring, sparsity):
    """With every latent dead there is all of the sparse part's work left: loss 1, at the start and
    after training. Counted against the whole target, the skip would look like a dictionary."""
    plan = planned(wiring, sparsity=sparsity, auxk=False, revive=False, steps=40)
    trainer = trainer_of(plan)
    trainer.encoder.zero_()
    trainer.b_enc.fill_(-100)
    losses = []
    for seed in range(40):
        metrics = trainer.step(*data(plan, 128, seed))
        assert metrics.l0 == 0
        losses.append(metrics.fvu)
        assert metrics.loss >= metrics.fvu - 1e-6
    assert losses[0] == pytest.approx(1, abs=0.15)
    assert sum(losses[-10:]) / 10 == pytest.approx(1, abs=0.15)


# --- transcoders ----------------------------------------------------------------------------------


def planted_map(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """x Gaussian, y = W2 relu(W1 x - b) with hidden units that fire on a tenth of the inputs; as
    wide as x, so that only the numbers tell one from the other."""
    weights = torch.Generator().manual_seed(11)
    first = torch.randn(24, D_IN, generator=weights)
    first /= first.norm(dim=1, keepdim=True)
    second = torch.randn(24, D_IN, generator=weights)
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))
    return x, torch.relu(x @ first.T - 1.28) @ second


def fvu(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("sparsity", ["batchtopk", "gated"])
@pytest.mark.parametrize("wiring", ["transcoder", "skip_transcoder"])
def test_a_transcoder_maps_its_input_to_its_target(wiring, sparsity):
    plan = planned(
        wiring, D_IN, sparsity=sparsity, width=96, k=6, steps=400, batch_size=256,
        learning_rate=3e-3,
    )  # fmt: skip
    sample = planted_map(4096, 1)
    trainer = SiteTrainer(plan, sample[0], 0, sample[1])
    for step in range(plan.steps):
        trainer.step(*planted_map(256, 100 + step))
    x, y = planted_map(4096, 2)
    linear = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    linear_fvu = fvu((x - x.mean(0)) @ linear + y.mean(0), y)
    assert linear_fvu > 0.3  # the map is not linear
    found = fvu(trainer.dictionary().folded().reconstruct(x), y)
    assert found < 0.3 * linear_fvu
    assert fvu(trainer.dictionary().folded().reconstruct(x), x) > 0.9  # its input it does not give


# --- what was trained is what is kept -------------------------------------------------------------


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_finished_dictionary_makes_the_errors_that_were_trained_on(sparsity, wiring):
    plan = planned(wiring, sparsity=sparsity, steps=30, revive=False)
    trainer = trainer_of(plan)
    for seed in range(20):
        trainer.step(*data(plan, 100, seed))
    for name, value in trainer.parameters().items():
        if name in ("r_mag", "b_mag", "b_enc"):
            value += 0.05 * torch.randn_like(value)  # nothing may cancel
    x, y = data(plan, 100, 77)
    u = trainer.wiring.inputs(x)
    target, centred = trainer.wiring.targets(u, y), u - trainer._centre()
    ((_, entries),) = trainer._entries(centred, plan.k, ALONE)
    part = trainer.objective.backward(trainer._weights(), entries, centred, target, 0.01)

    whole = x if y is None else y
    dictionary = trainer.dictionary()
    for one in (dictionary, dictionary.folded(), dictionary.folded().with_centre_in_bias()):
        codes = one.encode(x)
        assert codes.l0 == pytest.approx(float((entries.codes.values > 0).sum()) / 100, rel=0.005)
        found = (one.decode(codes, x) - whole) * trainer.wiring.out_scale
        error = (found - part.error).norm(dim=1) / part.error.norm(dim=1)
        # An entry on the brink may fall to the other side of it by rounding.
        assert float(error.median()) < 1e-5
        assert float((error < 1e-4).float().mean()) >= 0.98
    assert dictionary.folded().scale == dictionary.folded().out_scale == 1.0
