"""Every hand-written gradient against autograd on the papers' formulas, written densely in float64.

The reference below shares nothing with the engine but the names of the parameters.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mistudio.engine.sae import dictionary
from mistudio.engine.training import sparse, step
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.distributed import ALONE
from mistudio.engine.training.objectives import OBJECTIVES, Entries, Weights
from mistudio.engine.training.objectives.matryoshka import widths
from mistudio.engine.training.step import AUX_EVERY, SiteTrainer, StepMetrics

SPARSITIES = ("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated")
WIRINGS = {
    "sae": {"wiring": "sae"},
    "skip_sae, directions": {"wiring": "skip_sae", "skip": "principal", "skip_rank": 3},
    "skip_sae, share": {"wiring": "skip_sae", "skip": "fixed", "skip_share": 0.3},
    "transcoder": {"wiring": "transcoder"},
    "skip_transcoder": {"wiring": "skip_transcoder"},
}
PRICE = 0.7
EXACT = 1e-9  # the promise is 1e-6; float64 leaves no more than rounding

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- the reference: the papers' formulas ----------------------------------------------------------


class JumpReLU(torch.autograd.Function):
    """h * 1[h > theta]; beside the true derivative, that of the jump of height theta, smeared out
    over a window of width `epsilon * theta` (Rajamanoharan et al. 2024, eq. 11, for theta and for
    h)."""

    @staticmethod
    def forward(ctx, h, theta, epsilon):
        ctx.save_for_backward(h, theta)
        ctx.epsilon = epsilon
        return h * (h > theta)

    @staticmethod
    def backward(ctx, upstream):
        h, theta = ctx.saved_tensors
        width = ctx.epsilon * theta
        kernel = (((h - theta) / width).abs() < 0.5).to(h.dtype)
        jump = theta / width * kernel
        return upstream * ((h > theta) + jump), (-upstream * jump).sum(0), None


def reference_latents(
    sparsity: str, p: Tensors, inputs: Tensor, k: int, threshold: Tensor | None
) -> Tensor:
    """[n, d_sae]; `inputs` have their centre taken off."""
    h = inputs @ p["encoder"].T + p["b_enc"]
    if sparsity == "topk":
        return torch.relu(h) * (h >= h.topk(k, dim=1).values[:, -1:])
    if sparsity in ("batchtopk", "matryoshka"):
        return h * (h > threshold)
    if sparsity == "jumprelu":
        return JumpReLU.apply(h, p["log_threshold"].exp(), 0.5)
    if sparsity == "gated":
        magnitude = inputs @ (p["encoder"] * p["r_mag"].exp()[:, None]).T + p["b_mag"]
        return (h > 0) * torch.relu(magnitude)
    return torch.relu(h)


def reference_loss(
    sparsity: str, p: Tensors, inputs: Tensor, target: Tensor, k: int, threshold: Tensor | None
) -> Tensor:
    """Sum over tokens of squared error and price."""

    def squared(z: Tensor, decoder: Tensor, b_dec: Tensor, target: Tensor = target) -> Tensor:
        return (z @ decoder + b_dec - target).square().sum()

    z = reference_latents(sparsity, p, inputs, k, threshold)
    loss, m = squared(z, p["decoder"], p["b_dec"]), z.shape[1]
    if sparsity == "matryoshka":
        narrow = (
            squared(z[:, :w], p["decoder"][:w], p["b_dec"])
            for w in (m // 16, m // 8, m // 4, m // 2)
        )
        return (sum(narrow) + loss) / 5
    if sparsity == "standard":
        return loss + PRICE * z.sum()
    if sparsity == "jumprelu":
        return loss + PRICE * torch.tanh(4 * z).sum()
    if sparsity == "gated":
        gate = torch.relu(inputs @ p["encoder"].T + p["b_enc"])
        # A learnt skip is part of the target here, and of the decoder in the paper's sense.
        frozen = squared(gate, p["decoder"].detach(), p["b_dec"].detach(), target.detach())
        return loss + PRICE * gate.sum() + frozen
    return loss


# --- helpers --------------------------------------------------------------------------------------


def small_plan(sparsity: str, wiring: str = "sae", **options):
    values = {
        "sparsity": sparsity,
        "width": 64,
        "k": 5,
        "batch_size": 64,
        "steps": 10,
        "anneal_share": 0.0,
        "warmup_share": 0.0,
        **WIRINGS[wiring],
        **options,
    }
    if sparsity in ("jumprelu", "standard", "gated"):
        values.setdefault("l1_coefficient", PRICE)
    d_out = 9 if "transcoder" in WIRINGS[wiring]["wiring"] else None
    return derive(TrainingConfig(**values), 12, d_out)


def set_share_of_dense(monkeypatch, path: str) -> None:
    share = {"sparse": 2.0, "dense": -1.0}[path]
    monkeypatch.setattr(dictionary, "DENSE_SHARE", share)
    monkeypatch.setattr(sparse, "DENSE_SHARE", share)


def assert_close(found: Tensor, wanted: Tensor, name: str) -> None:
    assert wanted.norm() > 0, f"nothing to compare: {name}"
    assert (found - wanted).norm() <= EXACT * wanted.norm(), name


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def leaves(tensors: Tensors) -> Tensors:
    return {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}


# --- gradients of the objectives ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("centre", ["tied", "own"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_gradients_equal_autograd_of_the_papers_formulas(monkeypatch, sparsity, centre, path):
    set_share_of_dense(monkeypatch, path)
    d_out = 12 if centre == "tied" else 9
    plan = small_plan(sparsity, "sae" if centre == "tied" else "transcoder")
    n, factor = 50, 0.013
    u, target = torch.randn(n, 12), torch.randn(n, d_out)
    weights = Weights(
        torch.randn(64, 12) / 3, torch.randn(64) / 5, unit(torch.randn(64, d_out)),
        torch.randn(d_out) / 3,
    )  # fmt: skip
    own = torch.randn(12) / 3
    centred = u - (weights.b_dec if centre == "tied" else own)
    objective = OBJECTIVES[sparsity](plan, weights, centred)
    for name, value in objective.parameters.items():
        value += torch.randn(64) / 4
        if name == "log_threshold":
            value -= 1.0  # many pre-activations on either side of it
    pre = centred @ weights.encoder.T + weights.b_enc
    objective.begin(pre, plan.k, 0, ALONE)
    rows, latents = objective.select(pre)
    values = pre[rows, latents]
    codes = dictionary.Codes(rows, latents, objective.activate(latents, values), n, 64)
    found = objective.backward(weights, Entries(codes, values), centred, target, factor)

    p = leaves({**vars(weights), **objective.parameters})
    if centre == "tied":
        shift = p["b_dec"].detach().clone().requires_grad_()  # where b_dec is taken off the input
    else:
        shift = own.clone().requires_grad_()
    level = getattr(objective, "threshold", None)
    loss = factor / 2 * reference_loss(sparsity, p, u - shift, target, plan.k, level)
    loss.backward()
    assert found.gradients.keys() == {*p, "centre"}
    for name, parameter in p.items():
        assert_close(found.gradients[name], parameter.grad, name)
    assert_close(found.gradients["centre"], shift.grad, "centre")
    assert_close(found.error.square().sum() * factor / 2 + found.penalty, loss.detach(), "loss")


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_part_in_which_nothing_is_active_still_moves_the_bias(sparsity):
    plan = small_plan(sparsity)
    weights = Weights(unit(torch.randn(64, 12)), torch.zeros(64), unit(torch.randn(64, 12)),
                      torch.randn(12))  # fmt: skip
    centred, target = torch.randn(7, 12), torch.randn(7, 12)
    objective = OBJECTIVES[sparsity](plan, weights, centred)
    nothing = torch.zeros(0, dtype=torch.int64)
    codes = dictionary.Codes(nothing, nothing, torch.zeros(0), 7, 64)
    found = objective.backward(weights, Entries(codes, torch.zeros(0)), centred, target, 0.5)
    assert_close(found.error, weights.b_dec - target, "error")
    if sparsity != "gated":
        assert float(found.penalty) == 0
    assert_close(found.gradients["b_dec"], 0.5 * (weights.b_dec - target).sum(0), "b_dec")
    assert float(found.gradients["encoder"].abs().sum()) == 0


@pytest.mark.parametrize("sparsity", ["standard", "jumprelu", "gated"])
def test_prices_are_those_that_count_decoder_norms(sparsity):
    """With z * |W_dec| in the price (Anthropic), scaling a latent changes nothing; at rows of norm
    1 the gradients differ only along the rows, and that part is taken away."""
    u, target = torch.randn(40, 12), torch.randn(40, 12)
    p = leaves({"encoder": torch.randn(64, 12) / 3, "decoder": unit(torch.randn(64, 12))})
    h = u @ p["encoder"].T - 0.3
    if sparsity == "jumprelu":
        z = JumpReLU.apply(h, torch.full((64,), 0.4), 0.5)
    else:
        z = torch.relu(h)
    norms = p["decoder"].norm(dim=1)
    price = torch.tanh(4 * z * norms) if sparsity == "jumprelu" else z * norms
    plain = torch.tanh(4 * z) if sparsity == "jumprelu" else z
    rebuilt = (z @ p["decoder"] - target).square().sum()
    by_norm = torch.autograd.grad(rebuilt + price.sum(), list(p.values()), retain_graph=True)
    without = torch.autograd.grad(rebuilt + plain.sum(), list(p.values()))
    assert_close(by_norm[0], without[0], "encoder")

    def across(gradient: Tensor) -> Tensor:
        rows = p["decoder"].detach()
        return gradient - (gradient * rows).sum(1, keepdim=True) * rows

    assert_close(across(by_norm[1]), across(without[1]), "decoder")


def test_matryoshka_widths_end_with_the_whole():
    assert widths(6144) == [384, 768, 1536, 3072, 6144]
    assert widths(8) == [1, 2, 4, 8]


# --- the whole step: what reaches the optimiser ---------------------------------------------------


def caught_gradients(trainer: SiteTrainer, x: Tensor, y: Tensor | None) -> Tensors:
    """The gradients of one step as its optimiser gets them."""
    return caught_step(trainer, x, y)[0]


def caught_step(
    trainer: SiteTrainer, x: Tensor, y: Tensor | None
) -> tuple[Tensors, StepMetrics | None]:
    """The same, and what the step measured."""
    caught: Tensors = {}

    def catch(*_: object) -> None:
        caught.update({n: p.grad.clone() for n, p in trainer.parameters().items()})

    handle = trainer._optimizer.register_step_pre_hook(catch)
    metrics = trainer.step(x, y)
    handle.remove()
    return caught, metrics


def data(plan, n: int = 64) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(n, 12) * torch.linspace(0.5, 3, 12) + 1
    if "transcoder" not in plan.config.wiring:
        return x, None
    return x, torch.relu(x @ torch.randn(12, 9, generator=torch.Generator().manual_seed(3))) + 0.5


def settled(plan) -> tuple[SiteTrainer, Tensor, Tensor | None]:
    """A trainer on its way: biases moved, thresholds spread, skip away from its start."""
    trainer = SiteTrainer(plan, *_swapped(data(plan, 512)))
    for _ in range(2):
        trainer.step(*data(plan))
    for name, value in trainer.parameters().items():
        if name != "decoder":
            value += 0.1 * torch.randn_like(value)
    return trainer, *data(plan)


def _swapped(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, int, Tensor | None]:
    return pair[0], 0, pair[1]


def reference_step(trainer: SiteTrainer, p: Tensors, x: Tensor, y: Tensor | None) -> Tensor:
    """The loss of a step, with AuxK, as a function of the parameters."""
    config, wiring = trainer.plan.config, trainer.wiring
    u = x * wiring.scale
    target = u if y is None else y * wiring.out_scale
    skip = p.get("skip", wiring.skip)
    if config.wiring == "skip_sae" and config.skip == "fixed":
        skip = config.skip_share * torch.eye(12)
    if skip is not None:
        target = target - u @ skip.T
    inputs = u - (p["b_dec"] if config.wiring == "sae" else wiring.centre)
    level = getattr(trainer.objective, "threshold", None)
    loss = reference_loss(config.sparsity, p, inputs, target, trainer.plan.k, level)
    loss = loss / (len(x) * trainer.variance)
    dead = trainer.dead.nonzero().squeeze(1)
    if len(dead) and trainer.step_number % AUX_EVERY == 0:
        z = reference_latents(config.sparsity, p, inputs, trainer.plan.k, level)
        error = (target - z @ p["decoder"] - p["b_dec"]).detach()
        h = inputs.detach() @ p["encoder"][dead].T + p["b_enc"][dead]
        kept = h >= h.topk(min(6, len(dead)), dim=1).values[:, -1:]
        estimate = (h * kept) @ p["decoder"][dead]
        spread = (error - error.mean(0)).square().sum()
        loss = loss + AUX_EVERY / 32 * (estimate - error).square().sum() / spread
    return loss


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_whole_step_hands_the_true_gradient_to_the_optimiser(sparsity, wiring):
    plan = small_plan(sparsity, wiring, dead_window=1000, revive=False)
    trainer, x, y = settled(plan)
    while trainer.step_number % AUX_EVERY:
        trainer.step(*data(plan))
    trainer.tokens_since_fired[20:40] = 5000
    before = {name: value.clone() for name, value in trainer.parameters().items()}
    if hasattr(trainer.objective, "threshold") and sparsity != "jumprelu":
        next(trainer._entries(trainer.wiring.inputs(x) - trainer._centre(), plan.k, ALONE))
    p = leaves(before)
    loss = reference_step(trainer, p, x, y)
    loss.backward()
    caught = caught_gradients(trainer, x, y)

    wanted = {name: parameter.grad for name, parameter in p.items()}
    rows = before["decoder"]
    wanted["decoder"] -= (wanted["decoder"] * rows).sum(1, keepdim=True) * rows
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    assert caught.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(caught[name], gradient / max(1.0, norm + 1e-6), name)


# --- parts of a batch -----------------------------------------------------------------------------


def step_of(sparsity: str, wiring: str, **options) -> tuple[Tensors, StepMetrics]:
    """Gradients and metrics of a step, with AuxK, that depend on nothing but the options."""
    torch.manual_seed(1)
    plan = small_plan(sparsity, wiring, dead_window=1000, revive=False, **options)
    trainer = SiteTrainer(plan, *_swapped(data(plan, 1024)))
    for _ in range(AUX_EVERY):
        trainer.step(*data(plan, 512))
    trainer.tokens_since_fired[20:40] = 5000
    return caught_step(trainer, *data(plan, 512))


def assert_same_step(one: tuple[Tensors, StepMetrics], other: tuple[Tensors, StepMetrics]) -> None:
    for name, gradient in one[0].items():
        assert_close(other[0][name], gradient, name)
    for name, value in vars(one[1]).items():
        assert vars(other[1])[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("wiring", ["sae", "skip_transcoder"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_parts_of_a_batch_add_up_to_the_batch(monkeypatch, sparsity, wiring):
    whole = step_of(sparsity, wiring)
    assert whole[1].l0 > 0
    # More than 8 parts are fewer rows than the threshold is taken from.
    for parts in (2, 5, 40):
        assert_same_step(whole, step_of(sparsity, wiring, gradient_accumulation=parts))
    monkeypatch.setattr(step, "CHUNK_CELLS", 100 * 64)
    assert_same_step(whole, step_of(sparsity, wiring))
    monkeypatch.setattr(step, "ENTRY_BUDGET", 300)
    assert_same_step(whole, step_of(sparsity, wiring))


@pytest.mark.parametrize("sparsity", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("parts", [1, 5])
def test_the_threshold_is_taken_from_all_over_a_batch(sparsity, parts):
    """Rows that lie together are often alike: here the small ones come first."""
    plan = small_plan(sparsity, gradient_accumulation=parts)
    trainer = SiteTrainer(plan, *_swapped(data(plan, 1024)))
    x = data(plan, 512)[0]
    distance = (x - x.mean(0)).norm(dim=1)
    assert trainer.step(x[distance.argsort()]).l0 == pytest.approx(plan.k, rel=0.15)


def test_a_batch_is_never_held_as_one_matrix(monkeypatch):
    """The pre-activations are the largest matrix of a step: parts bound them, and a budget bounds
    the entries that wait for their gradient."""
    sizes, held = [], []

    class Watched(SiteTrainer):
        def _pre_activations(self, *args):
            pre = super()._pre_activations(*args)
            sizes.append(pre.numel())
            return pre

        def _entries(self, *args):
            for rows, entries in super()._entries(*args):
                held.append(len(entries.pre))
                yield rows, entries

    monkeypatch.setattr(step, "CHUNK_CELLS", 100 * 64)
    monkeypatch.setattr(step, "ENTRY_BUDGET", 700)
    plan = small_plan("batchtopk")
    trainer = Watched(plan, *_swapped(data(plan, 1024)))
    trainer.step(*data(plan, 512))
    assert max(sizes) == 100 * 64
    assert sum(sizes) == 512 * 64  # nothing is computed twice
    assert len(held) > 2
    assert max(held) < 700 + 2 * 100 * plan.k


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_step_that_failed_can_be_taken_again(sparsity):
    """Memory that runs out before the weights move leaves nothing behind."""
    batches = [data(small_plan(sparsity), 512) for _ in range(16)]
    plan = small_plan(sparsity, steps=100)
    sample = _swapped(data(plan, 1024))
    smooth, bumpy = SiteTrainer(plan, *sample), SiteTrainer(plan, *sample)

    def fail(*_: object) -> None:
        raise MemoryError

    for number, batch in enumerate(batches):
        smooth.step(*batch)
        if number in (0, 12):
            handle = bumpy._optimizer.register_step_pre_hook(fail)
            before = bumpy.state()
            with pytest.raises(MemoryError):
                bumpy.step(*batch)
            handle.remove()
            assert all(parameter.grad is None for parameter in bumpy.parameters().values())
            for name, value in bumpy.state().items():
                assert torch.equal(before[name], value), name
        bumpy.step(*batch)
    for name, value in smooth.state().items():
        assert torch.equal(value, bumpy.state()[name]), name


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_mixed_precision_only_proposes_what_is_active(sparsity):
    """Selection in bfloat16 may differ for a few entries; the value of every entry is exact."""
    plan = small_plan(sparsity, mixed_precision=True, revive=False)
    trainer, x, _ = settled(plan)
    u = trainer.wiring.inputs(x)
    exact = SiteTrainer(small_plan(sparsity, revive=False), x, 0)
    exact.load_state(trainer.state())
    proposed, wanted = (
        next(one._entries(u - one._centre(), plan.k, ALONE))[1] for one in (trainer, exact)
    )
    pre = torch.addmm(trainer.b_enc, u - trainer.b_dec, trainer.encoder.T)
    codes = proposed.codes
    assert_close(proposed.pre, pre[codes.rows, codes.latents], "pre-activations")
    if sparsity == "jumprelu":
        silent = proposed.pre <= trainer.objective.threshold[codes.latents]
        assert bool((codes.values[silent] == 0).all())
    else:
        assert bool((proposed.pre > 0).all())
    ours, theirs = (
        one.codes.with_values(torch.ones_like(one.pre)).dense() > 0 for one in (proposed, wanted)
    )
    assert float((ours != theirs).sum()) < 0.03 * float(theirs.sum())
    both = ours & theirs
    assert_close(codes.dense()[both], wanted.codes.dense()[both], "values")
