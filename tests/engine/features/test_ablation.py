"""Ablation against passes written out with a plain PyTorch hook."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mistudio.engine.features import ablation as module
from mistudio.engine.features.ablation import ablate, random_direction
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Cancelled, Silent
from mistudio.engine.sae.activation import JumpReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import Incompatible, InvalidInput

LAYER = 2
POINT = HookPoint("resid_post", LAYER)
SPECIAL = [0, 5]
NEVER = 7


@pytest.fixture(scope="module")
def ids(tokens):
    found = tokens.train.windows(np.arange(6) * 3, 40).clone()
    found[1, 9] = 5
    return found


@pytest.fixture(scope="module")
def norms(tiny, ids):
    """Medians that leave every position in but those far out."""
    points = [HookPoint(site, LAYER) for site in ("resid_post", "mlp_in", "mlp_out", "attn_out")]
    points += [HookPoint("resid_pre", LAYER), HookPoint("resid_post", 3), HookPoint("resid_pre", 0)]
    return {p: float(x.norm(dim=-1).median()) for p, x in tiny.capture(ids, points).items()}


@pytest.fixture(scope="module")
def sae(tiny, ids):
    """Eight random latents of the residual stream, active on a tenth of the tokens, unlike one
    another in their decoder's norm; the last never fires."""
    return made(tiny.capture(ids, [POINT])[POINT])


def made(x: torch.Tensor) -> Dictionary:
    g = torch.Generator().manual_seed(1)
    rows = x[:, 1:].reshape(-1, x.shape[-1])
    encoder = torch.randn(8, x.shape[-1], generator=g) / x.shape[-1] ** 0.5
    decoder = torch.randn(8, x.shape[-1], generator=g) / x.shape[-1] ** 0.5
    threshold = (rows @ encoder.T).quantile(0.9, dim=0).clamp_min(0.01)
    threshold[NEVER] = 1e9
    return Dictionary(
        encoder, torch.zeros(8), decoder, torch.zeros(x.shape[-1]), JumpReLU(threshold)
    )


def run(tiny, sae, ids, norms, feature=3, site=None, **options):
    options = {"special_ids": SPECIAL, "controls": 2, "seed": 11, "batch": 4, **options}
    site = site or Site.at(POINT)
    return ablate(tiny, sae, site, feature, ids, medians=norms, **options)


def activations_by_hand(tiny, sae, ids, median, feature):
    """[n, seq]: the latent's activation at the positions that count."""
    seen = []
    handle = tiny.model.model.layers[LAYER].register_forward_hook(
        lambda _m, _a, out: seen.append(out.detach())
    )
    tiny.model(ids)
    handle.remove()
    x = seen[0]
    pre = x @ sae.encoder[feature]
    active = (pre > sae.activation.threshold[feature]) & (x.norm(dim=-1) <= 10 * median)
    active[:, 0] = False
    active &= ~torch.isin(ids, torch.tensor(SPECIAL))
    return pre * active


def passes_by_hand(tiny, ids, delta):
    """Log-probabilities [n, seq, vocab] with delta added behind the layer."""
    handle = tiny.model.model.layers[LAYER].register_forward_hook(lambda _m, _a, out: out + delta)
    with torch.no_grad():
        found = tiny.model(ids).logits.log_softmax(-1)
    handle.remove()
    return found


def measures_by_hand(clean, changed, ids):
    """(delta CE, KL, changed) of every prediction, [n, seq - 1] each."""
    target = ids[:, 1:, None]
    p, q = clean[:, :-1], changed[:, :-1]
    ce = (p.gather(2, target) - q.gather(2, target))[..., 0]
    return ce, (p.exp() * (p - q)).sum(-1), (p.argmax(-1) != q.argmax(-1)).float()


@pytest.mark.parametrize(("mode", "mean"), [("zero", None), ("mean", 0.35)])
def test_effects_equal_passes_written_out_by_hand(tiny, sae, ids, norms, mode, mean):
    feature = 3
    found = run(tiny, sae, ids, norms, feature, mode=mode, mean_activation=mean)
    f = activations_by_hand(tiny, sae, ids, norms[POINT], feature)
    assert int((f > 0).sum()) > 10
    amount = torch.where(f > 0, f - (mean or 0.0), f)[..., None]
    clean = passes_by_hand(tiny, ids, 0.0)
    direction = sae.decoder[feature]
    own = measures_by_hand(clean, passes_by_hand(tiny, ids, -amount * direction), ids)
    scored = torch.ones(len(ids), 39, dtype=torch.bool)
    scored[:, 0] = False
    scored &= ~torch.isin(ids[:, :-1], torch.tensor(SPECIAL))
    scored &= ~torch.isin(ids[:, 1:], torch.tensor(SPECIAL))
    norm = tiny.capture(ids, [POINT])[POINT].norm(dim=-1)
    scored &= (norm <= 10 * norms[POINT])[:, :-1]
    active = scored & (f[:, :-1] > 0)
    following = scored & ~active & ((f > 0).cumsum(1) > 0)[:, :-1]

    assert np.allclose(found.per_token.activations, f, atol=1e-4)
    others = [
        measures_by_hand(
            clean, passes_by_hand(tiny, ids, -amount * random_direction(direction, 11 + i)), ids
        )
        for i in range(2)
    ]
    for where, group in ((active, found.active), (following, found.following)):
        assert group.feature.tokens == int(where.sum())
        assert group.feature.contexts == int(where.any(1).sum())
        for i, name in enumerate(("delta_ce", "kl", "changed")):
            assert getattr(group.feature, name).mean == pytest.approx(
                float(own[i][where].mean()), abs=2e-5
            )
            control = float(torch.stack([o[i][where].mean() for o in others]).mean())
            assert getattr(group.control, name).mean == pytest.approx(control, abs=2e-5)
        assert group.above == sum(own[1][where].mean() > o[1][where].mean() for o in others)
        assert group.excess_kl.mean == pytest.approx(
            group.feature.kl.mean - group.control.kl.mean, abs=1e-6
        )
        for effect in (group.feature.delta_ce, group.feature.kl, group.excess_ce):
            assert effect.low <= effect.mean <= effect.high
    assert found.active.feature.kl.mean > 1e-4
    assert found.everywhere.tokens == int(scored.sum())
    assert found.everywhere.kl.mean == pytest.approx(float(own[1][scored].mean()), abs=2e-5)
    assert np.allclose(found.per_token.kl[:, :-1][scored], own[1][scored], atol=1e-4)
    assert np.allclose(found.per_token.delta_ce[:, :-1][scored], own[0][scored], atol=1e-4)
    changed = passes_by_hand(tiny, ids, -amount * direction)
    loss = -clean[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    assert np.allclose(found.per_token.ce[:, :-1][scored], loss[scored], atol=1e-4)
    for name, passes in (("before", clean), ("after", changed)):
        likely = passes[:, :-1].argmax(-1).int().masked_fill(~scored, -1)
        assert np.array_equal(getattr(found.per_token, name)[:, :-1], likely)
    for effect, where in ((found.active.feature, active), (found.following.control, following)):
        assert effect.ce == pytest.approx(float(loss[where].mean()), abs=2e-5)
    assert np.isnan(found.per_token.kl[:, -1]).all()
    assert np.isnan(found.per_token.kl[:, :-1][~scored]).all()

    shift = (changed - clean)[:, :-1][active].mean(0)
    assert [i for i, _ in found.raised] == shift.topk(10).indices.tolist()
    assert [i for i, _ in found.lowered] == shift.topk(10, largest=False).indices.tolist()
    assert found.raised[0][1] == pytest.approx(float(shift.max()), abs=1e-4)


def test_the_interval_is_that_of_drawing_whole_contexts_again(tiny, sae, ids, norms):
    found = run(tiny, sae, ids, norms)
    kl = found.per_token.kl
    where = found.per_token.activations > 0
    where &= ~np.isnan(kl)
    generator = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        drawn = generator.integers(0, len(ids), len(ids))
        n = where[drawn].sum()
        if n:
            means.append(kl[drawn][where[drawn]].sum() / n)
    low, high = np.percentile(means, [2.5, 97.5])
    width = high - low
    assert found.active.feature.kl.low == pytest.approx(low, abs=0.1 * width)
    assert found.active.feature.kl.high == pytest.approx(high, abs=0.1 * width)


def test_ablating_a_latent_that_never_fires_changes_nothing_exactly(tiny, sae, ids, norms):
    for mode in ("zero", "mean"):
        found = run(tiny, sae, ids, norms, NEVER, mode=mode, mean_activation=0.0)
        assert found.active is None
        assert found.following is None
        assert found.everywhere.tokens > 150
        for effect in (found.everywhere.delta_ce, found.everywhere.kl, found.everywhere.changed):
            assert (effect.mean, effect.low, effect.high) == (0.0, 0.0, 0.0)
        assert found.raised == found.lowered == ()


def test_what_stands_before_the_first_active_position_does_not_change(tiny, sae, ids, norms):
    found = run(tiny, sae, ids, norms)
    tokens = found.per_token
    before = (tokens.activations > 0).cumsum(1) == 0
    scored = ~np.isnan(tokens.kl)
    assert (before & scored).sum() > 5
    assert np.abs(tokens.kl[before & scored]).max() < 1e-6
    assert not np.isin(ids.numpy(), SPECIAL)[tokens.activations > 0].any()
    assert (tokens.activations[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("name", "layer", "resumed"),
    [("resid_pre", 2, 2), ("resid_post", 2, 3), ("resid_post", 3, 3), ("attn_out", 2, 2)],
)
def test_running_only_the_layers_behind_changes_no_number(
    tiny, ids, norms, monkeypatch, name, layer, resumed
):
    point = HookPoint(name, layer)
    sae = made(tiny.capture(ids, [point])[point])
    short = run(tiny, sae, ids, norms, 1, Site.at(point))
    assert short.resumed_at == resumed
    # A model whose passes cannot be shortened: told by its logits.
    honest = module._Passes.changed

    def spoilt(self, delta):
        logits = honest(self, delta)
        return logits + 1 if self._short and not delta.any() else logits

    monkeypatch.setattr(module._Passes, "changed", spoilt)
    full = run(tiny, sae, ids, norms, 1, Site.at(point))
    assert full.resumed_at == 0
    assert full.active == short.active
    assert np.array_equal(full.per_token.kl, short.per_token.kl, equal_nan=True)


def test_a_transcoder_reads_the_mlps_input_and_is_ablated_at_its_output(tiny, ids, norms):
    site = Site.across_mlp(HookPoint("mlp_in", LAYER))
    sae = made(tiny.capture(ids, [site.input])[site.input])
    found = run(tiny, sae, ids, norms, 2, site)
    x = tiny.capture(ids, [site.input])[site.input]
    pre = x @ sae.encoder[2]
    f = torch.from_numpy(found.per_token.activations)
    assert int((f > 0).sum()) > 10
    assert torch.allclose(f[f > 0], pre[f > 0], atol=1e-4)
    mlp = tiny.model.model.layers[LAYER].mlp
    handle = mlp.register_forward_hook(lambda _m, _a, out: out - f[..., None] * sae.decoder[2])
    with torch.no_grad():
        changed = tiny.model(ids).logits.log_softmax(-1)
    handle.remove()
    with torch.no_grad():
        clean = tiny.model(ids).logits.log_softmax(-1)
    kl = measures_by_hand(clean, changed, ids)[1].numpy()
    scored = ~np.isnan(found.per_token.kl[:, :-1])
    assert np.allclose(found.per_token.kl[:, :-1][scored], kl[scored], atol=1e-4)


def test_units_of_the_dictionary_do_not_matter(tiny, sae, ids, norms):
    """The same function in training units and folded: the same contribution is taken away."""
    scaled = replace(
        sae,
        encoder=sae.encoder / 4.0,
        decoder=sae.decoder * 4.0,
        b_dec=sae.b_dec,
        scale=4.0,
        centre=torch.zeros(128),
    )
    a, b = run(tiny, sae, ids, norms), run(tiny, scaled, ids, norms)
    assert a.active.feature.kl.mean == pytest.approx(b.active.feature.kl.mean, rel=1e-3)
    assert a.active.feature.kl.mean > 1e-4


def test_what_is_taken_away_is_the_latents_part_of_the_reconstruction(tiny, sae, ids, norms):
    """Also where decoding multiplies by the token's own spread."""
    for norm in ("none", "centre", "layer_norm"):
        kind = replace(sae, activation=TopK(3), norm=norm)
        x = tiny.capture(ids, [POINT])[POINT]
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        f, amounts = module._amounts(kind, 4, x, mask, 0.0)
        rows = x.flatten(0, 1)
        codes = kind.encode(rows)
        without = codes.with_values(torch.where(codes.latents == 4, 0.0, codes.values))
        part = kind.decode(codes, rows) - kind.decode(without, rows)
        assert int((f > 0).sum()) > 5
        got = amounts.flatten()[:, None] * module._direction(kind, 4)
        assert torch.allclose(got, part, atol=1e-4)


def test_the_control_has_the_same_norm(sae):
    like = 3.0 * sae.decoder[0]
    first, again, other = (random_direction(like, s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.norm()) == pytest.approx(float(like.norm()), rel=1e-5)


def test_stopping_leaves_the_model_as_it_was(tiny, sae, ids, norms):
    class Stop(Silent):
        steps = 0

        def check(self) -> None:
            self.steps += 1
            if self.steps == 3:
                raise Cancelled

    with torch.no_grad():
        before = tiny.model(ids).logits
        with pytest.raises(Cancelled):
            run(tiny, sae, ids, norms, progress=Stop())
        assert torch.equal(tiny.model(ids).logits, before)
    assert all("forward" not in vars(block) for block in tiny.model.model.layers)


def test_what_cannot_be_ablated_is_refused(tiny, sae, ids, norms):
    with pytest.raises(InvalidInput, match="0 to 7"):
        run(tiny, sae, ids, norms, 8)
    with pytest.raises(InvalidInput, match="not one"):
        run(tiny, sae, ids, norms, mode="resample")
    with pytest.raises(InvalidInput, match="mean"):
        run(tiny, sae, ids, norms, mode="mean")
    with pytest.raises(InvalidInput, match="Nothing to ablate"):
        run(tiny, sae, ids[:0], norms)
    with pytest.raises(Incompatible):
        run(tiny, replace(sae, decoder=sae.decoder[:, :64]), ids, norms)
