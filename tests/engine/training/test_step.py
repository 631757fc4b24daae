"""The hand-written step against autograd, its schedules, its state, and what it can find."""

from __future__ import annotations

import math

import pytest
import torch

from mistudio.engine.sae.dictionary import Codes, weighted_rows
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.step import SiteTrainer, StepMetrics, geometric_median
from mistudio.errors import TrainingDiverged

SPARSITIES = ("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated")


def small_plan(d=24, tokens=64_000, **options):
    options = {"expansion": 4, "k": 4, "batch_size": 256, **options}
    return derive(TrainingConfig(tokens=tokens, **options), d)


def test_aux_gradients_equal_autograd():
    torch.manual_seed(1)
    plan = small_plan()
    trainer = SiteTrainer(plan, torch.randn(2048, 24) + 1, seed=0)
    trainer.tokens_since_fired[10:40] = plan.dead_window + 1
    centred, error = torch.randn(256, 24), torch.randn(256, 24)
    gradients = {name: torch.zeros_like(p) for name, p in trainer.parameters().items()}
    trainer._add_aux_gradients(gradients, error, centred)

    encoder = trainer.encoder.clone().requires_grad_()
    decoder = trainer.decoder.clone().requires_grad_()
    b_enc = trainer.b_enc.clone().requires_grad_()
    target = -error
    pre = (centred @ encoder.T + b_enc)[:, 10:40]
    values, picked = pre.topk(min(12, 30), dim=1)
    z = torch.zeros_like(pre).scatter(1, picked, values)
    spread = (target - target.mean(0)).square().sum(1).mean()
    loss = (z @ decoder[10:40] - target).square().sum(1).mean() / spread * 4 / 32
    loss.backward()
    for name, grad in (("encoder", encoder.grad), ("decoder", decoder.grad), ("b_enc", b_enc.grad)):
        assert torch.allclose(gradients[name], grad, atol=1e-6, rtol=1e-4), name
    assert float(gradients["encoder"][10:40].abs().sum()) > 0
    assert float(gradients["encoder"][:10].abs().sum()) == 0


# Exact BatchTopK finds as many here as its running threshold (0.54): on these small sums TopK is
# the better choice, on real activations it is the other way round.
@pytest.mark.parametrize(("sparsity", "found"), [("batchtopk", 0.45), ("topk", 0.8)])
def test_planted_directions_are_found(planted, sparsity, found):
    draw, directions = planted
    plan = small_plan(d=48, tokens=300_000, sparsity=sparsity, batch_size=512)
    trainer = SiteTrainer(plan, draw(8192), seed=0)
    for _ in range(plan.steps):
        metrics = trainer.step(draw(512))
    best = (directions @ trainer.decoder.T).max(1).values
    assert float((best > 0.9).float().mean()) > found
    assert metrics.fvu < 0.3
    assert abs(metrics.l0 / plan.k - 1) < 0.25


def test_active_latents_follow_the_target():
    trainer = SiteTrainer(small_plan(anneal_share=0.5), torch.randn(2048, 24), seed=0)
    assert trainer.current_k() == 16
    seen = [trainer.step(torch.randn(256, 24)).l0 for _ in range(200)]
    assert seen[0] > 12
    assert sum(seen[-20:]) / 20 == pytest.approx(4, rel=0.1)
    assert trainer.current_k() == 4


STEERED = ("standard", "gated", "jumprelu")


def trained(planted, sparsity: str, **options) -> tuple[SiteTrainer, list[StepMetrics]]:
    draw, _ = planted
    plan = small_plan(d=48, sparsity=sparsity, expansion=2, **options)
    trainer = SiteTrainer(plan, draw(2048), seed=0)
    return trainer, [trainer.step(draw(256)) for _ in range(plan.steps)]


@pytest.mark.parametrize("sparsity", STEERED)
def test_an_open_price_is_steered_to_the_target(planted, sparsity):
    trainer, seen = trained(planted, sparsity, steps=600, learning_rate=3e-3)
    tail = [metrics.l0 for metrics in seen[-30:]]
    assert sum(tail) / len(tail) == pytest.approx(4, rel=0.06)
    # It neither swings nor falls where latents die for want of any activity.
    settled = [metrics.l0 for metrics in seen[300:]]
    assert sum(abs(l0 / 4 - 1) for l0 in settled) / len(settled) < 0.2
    assert min(metrics.l0 for metrics in seen) > 1
    assert not trainer.dead.any()
    assert len({metrics.coefficient for metrics in seen}) > 500


@pytest.mark.parametrize("sparsity", STEERED)
def test_a_given_price_is_kept_after_its_warm_up(planted, sparsity):
    seen = trained(planted, sparsity, steps=100, l1_coefficient=2.0)[1]
    prices = [metrics.coefficient for metrics in seen]
    assert prices[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert set(prices[4:]) == {2.0}
    for metrics in seen:
        assert metrics.loss > metrics.fvu
    free = trained(planted, sparsity, steps=100, l1_coefficient=0.0)[1][-1]
    assert free.l0 > 2 * seen[-1].l0
    assert free.coefficient == 0


def test_decoder_rows_keep_unit_norm():
    trainer = SiteTrainer(small_plan(), torch.randn(1024, 24), seed=0)
    for _ in range(20):
        trainer.step(torch.randn(256, 24))
    assert torch.allclose(trainer.decoder.norm(dim=1), torch.ones(96), atol=1e-5)


def test_dead_latents_are_counted_in_tokens():
    plan = small_plan(dead_window=1000)
    trainer = SiteTrainer(plan, torch.randn(1024, 24), seed=0)
    trainer.encoder[5] = 0
    trainer.b_enc[5] = -100
    for _ in range(3):
        trainer.step(torch.randn(256, 24))
    assert not trainer.dead[5]  # 768 tokens: still inside the window
    trainer.step(torch.randn(256, 24))
    assert trainer.dead[5]


DEAD = slice(0, 20)


def with_dead_latents(sparsity: str, wiring: str = "sae", at: int = 10, **options) -> SiteTrainer:
    """A trainer before step `at` of 100, 20 of its 96 latents dead."""
    plan = small_plan(
        steps=100, sparsity=sparsity, wiring=wiring, dead_window=1000, anneal_share=0.0, auxk=False,
        **options,
    )  # fmt: skip
    target = torch.randn(1024, 24) if wiring == "transcoder" else None
    trainer = SiteTrainer(plan, torch.randn(1024, 24), 0, target)
    trainer.step(torch.randn(256, 24), None if target is None else torch.randn(256, 24))
    trainer.step_number = at
    trainer.encoder[DEAD] = 0
    trainer.b_enc[DEAD] = -100
    for name in trainer.objective.parameters.keys() & {"r_mag", "b_mag"}:
        trainer.objective.parameters[name][DEAD] = -1
    trainer.tokens_since_fired[DEAD] = 5000
    return trainer


@pytest.mark.parametrize("wiring", ["sae", "transcoder"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_revival_gives_dead_latents_a_token_they_fire_on(sparsity, wiring):
    trainer = with_dead_latents(sparsity, wiring)
    x = torch.randn(256, 24)
    y = None if wiring == "sae" else torch.randn(256, 24)
    longest = float(trainer.encoder[20:].norm(dim=1).mean())
    trainer._maybe_revive(x, y)
    assert trainer.revived == 20
    assert not trainer.dead.any()
    assert float(trainer.encoder[DEAD].norm(dim=1).max()) < 1.001 * longest
    assert torch.allclose(trainer.decoder[DEAD].norm(dim=1), torch.ones(20), atol=1e-5)
    for name, parameter in trainer.parameters().items():
        moments = trainer._optimizer.state[parameter]
        if name not in ("b_dec", "skip"):
            assert float(moments["exp_avg"][DEAD].abs().max()) == 0, name
        assert float(moments["exp_avg"].abs().max()) > 0, name
    # Each fires on some token of the batch, as the finished dictionary counts it.
    fired = trainer.dictionary().encode(x).dense()[:, DEAD] > 0
    assert bool(fired.any(0).all())
    # And on no more tokens than a latent that says something.
    assert float(fired.float().mean(0).max()) < 0.3
    # No two of them are the same latent.
    cosines = trainer.decoder[DEAD] @ trainer.decoder[DEAD].T - torch.eye(20)
    assert float(cosines.max()) < 0.999


def test_revival_takes_the_tokens_that_are_explained_worst():
    trainer = with_dead_latents("batchtopk", "transcoder")
    x, y = torch.randn(256, 24), torch.randn(256, 24)
    y[7] *= 100  # nearly all of the squared error
    trainer._maybe_revive(x, y)
    outlier, token = y[7] / y[7].norm(), x[7] * trainer.wiring.scale - trainer.wiring.centre
    (found,) = (trainer.decoder[DEAD] @ outlier > 0.99).nonzero()
    # It writes what its token lacked and reads what its token is.
    assert float(trainer.encoder[found] @ token / trainer.encoder[found].norm()) == pytest.approx(
        float(token.norm()), rel=1e-4
    )


def test_where_all_latents_are_dead_all_can_come_back():
    trainer = with_dead_latents("standard")
    trainer.b_enc.fill_(-100)
    trainer.tokens_since_fired.fill_(5000)
    trainer._maybe_revive(torch.randn(64, 24), None)
    assert trainer.revived == 64  # one for each token, no twins
    assert trainer.finite
    assert int(trainer.dead.sum()) == 96 - 64


@pytest.mark.parametrize(
    ("at", "options", "revived"),
    [
        (10, {}, 20),
        (11, {}, 0),
        (55, {}, 20),
        (10, {"revive": False}, 0),
        (55, {"decay_share": 0.4}, 20),
        (55, {"decay_share": 0.5}, 0),  # the rate has begun to fall
    ],
)
def test_latents_restart_at_their_points_and_not_while_the_rate_decays(at, options, revived):
    trainer = with_dead_latents("topk", at=at, **options)
    trainer.step(torch.randn(256, 24))
    assert trainer.revived == revived


def test_revived_latents_stay_alive(planted):
    draw, _ = planted
    plan = small_plan(d=48, steps=100, dead_window=1000, anneal_share=0.0, auxk=False)
    trainer = SiteTrainer(plan, draw(2048), seed=0)
    for number in range(25):
        if number == 10:
            trainer.b_enc[DEAD] = -100
            trainer.tokens_since_fired[DEAD] = 5000
        trainer.step(draw(256))
    assert trainer.revived >= 20
    assert int((trainer.tokens_since_fired[DEAD] < 1000).sum()) >= 18


def test_revival_after_divergence_says_so():
    trainer = with_dead_latents("batchtopk")
    with pytest.raises(TrainingDiverged, match="learning rate"):
        trainer.step(torch.full((256, 24), math.nan), measure=False)
    assert trainer.revived == 0


@pytest.mark.parametrize("sparsity", ["batchtopk", "topk"])
def test_restored_state_goes_on_exactly(sparsity):
    data = [torch.randn(256, 24, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    sample = torch.randn(1024, 24, generator=torch.Generator().manual_seed(99))
    plan = small_plan(tokens=256 * 30, sparsity=sparsity, dead_window=1000)
    whole = SiteTrainer(plan, sample, seed=0)
    for batch in data:
        whole.step(batch)
    first = SiteTrainer(plan, sample, seed=0)
    for batch in data[:13]:
        first.step(batch)
    second = SiteTrainer(plan, sample + 5, seed=7)
    second.load_state(first.state())
    for batch in data[13:]:
        second.step(batch)
    for name, value in whole.state().items():
        assert torch.equal(value.nan_to_num(), second.state()[name].nan_to_num()), name


def test_nan_input_is_reported_as_divergence():
    trainer = SiteTrainer(small_plan(), torch.randn(1024, 24), seed=0)
    with pytest.raises(TrainingDiverged, match="learning rate"):
        trainer.step(torch.full((256, 24), math.nan))


def test_geometric_median_minimises_distance():
    points = torch.randn(500, 3) * torch.tensor([1.0, 5.0, 1.0]) + 3
    points[:20] += 1000
    median = geometric_median(points)
    here = (points - median).norm(dim=1).sum()
    for axis in range(3):
        for step in (-0.05, 0.05):
            moved = median.clone()
            moved[axis] += step
            assert here <= (points - moved).norm(dim=1).sum() + 1e-3
    assert (median - points.mean(0)).norm() > 10  # outliers do not pull it


def test_sparse_product_equals_dense():
    z = torch.rand(32, 50) * (torch.rand(32, 50) < 0.1)
    z[7] = 0  # a row without any active latent
    rows, latents = z.nonzero(as_tuple=True)
    codes = Codes(rows, latents, z[rows, latents], 32, 50)
    table = torch.randn(50, 9)
    assert torch.allclose(weighted_rows(table, codes), z @ table, atol=1e-5)
    assert torch.equal(codes.dense(), z)
