"""Every intervention against its formula, and its promises on every architecture."""

from __future__ import annotations

import pytest
import torch
from models.tiny_models import BUILDERS, seeded
from transformers import DynamicCache

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import Cancelled, Silent
from mistudio.engine.sae.activation import JumpReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.engine.steering import generation
from mistudio.engine.steering.generation import Sampling, draw, generate, penalise
from mistudio.engine.steering.interventions import (
    METHODS,
    FeatureEdit,
    Scope,
    SiteSteering,
    Steering,
    Variant,
    adding,
)
from mistudio.errors import InvalidInput

POINT = HookPoint("resid_post", 1)
WIDTH, LATENTS = 32, 24
IDS = torch.tensor([[7, 9, 11, 13, 15, 17]])


@pytest.fixture(scope="module")
def model() -> HookedDecoder:
    return HookedDecoder(seeded(BUILDERS["llama"]))


def dictionary(seed: int = 0, width: int = WIDTH, activation=None) -> Dictionary:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / width**0.5

    threshold = activation or JumpReLU(torch.full((LATENTS,), 0.1))
    encoder, decoder = random(LATENTS, width), random(LATENTS, width)
    return Dictionary(encoder, random(LATENTS), decoder, random(width), threshold)


def variant(sae: Dictionary, *edits: FeatureEdit, point: HookPoint = POINT, **more) -> Variant:
    return Variant((SiteSteering(Site.at(point), sae, tuple(edits)),), **more)


def applied(model: HookedDecoder, some: Variant, x: torch.Tensor, scope=None, special=()):
    """x [1, seq, d] as the edit leaves it."""
    steering = Steering(model, [some], special, x.shape[1], scope)
    steering.expect(IDS[:, : x.shape[1]], 0)
    return steering.edits()[POINT](x)


@pytest.fixture
def x() -> torch.Tensor:
    return 2 * torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(5))


def by_formula(method: str, x, d, f, strength: float, largest: float):
    """One token: x, d [width], f a number."""
    c, v = strength * largest, d / d.norm()
    along = float(x @ v)
    return {
        "add": lambda: x + c * d,
        "clamp": lambda: x + (c - f) * d,
        "clamp_min": lambda: x + max(0.0, c - f) * d,
        "scale": lambda: x + (strength - 1) * f * d,
        "ablate": lambda: x - f * d,
        "orthogonal": lambda: x + (strength - 1) * along * v,
        "cap": lambda: x + (min(along, c * float(d.norm())) - along) * v,
    }[method]()


@pytest.mark.parametrize("activation", [None, TopK(6)])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_its_formula(model, x, method: str, activation) -> None:
    sae = dictionary(activation=activation)
    codes = sae.encode(x[0]).dense()
    feature = int((codes[1:] > 0).sum(0).argmax())  # active at some positions
    assert int((codes[1:, feature] > 0).sum()) > 0
    out = applied(model, variant(sae, FeatureEdit(feature, 0.5, 3.0, method)), x)
    assert torch.equal(out[0, 0], x[0, 0])
    for place in range(1, 6):
        f = float(codes[place, feature])
        expected = by_formula(method, x[0, place], sae.decoder[feature], f, 0.5, 3.0)
        torch.testing.assert_close(out[0, place], expected, rtol=1e-5, atol=1e-5)


def test_clamping_is_decoding_with_another_value_and_the_error_kept(model, x) -> None:
    sae = dictionary()
    codes = sae.encode(x[0])
    dense = codes.dense()
    feature = int((dense[1:] > 0).sum(0).argmax())
    error = x[0] - sae.decode(codes)
    dense[:, feature] = 4.0
    expected = dense @ sae.decoder + sae.b_dec + error
    out = applied(model, variant(sae, FeatureEdit(feature, 2.0, 2.0, "clamp")), x)
    torch.testing.assert_close(out[0, 1:], expected[1:], rtol=0, atol=1e-4)


def test_clamping_to_what_it_is_changes_nothing(model, x) -> None:
    sae = dictionary()
    dense = sae.encode(x[0]).dense()
    feature = int(dense[3].argmax())
    edit = FeatureEdit(feature, 1.0, float(dense[3, feature]), "clamp")
    out = applied(model, variant(sae, edit), x)
    torch.testing.assert_close(out[0, 3], x[0, 3], rtol=0, atol=1e-4)


def test_features_at_one_layer_are_their_sum_whatever_the_order(model, x) -> None:
    sae = dictionary()
    edits = [
        FeatureEdit(i, s, 2.0, m)
        for i, s, m in [(3, 0.7, "add"), (5, 1.5, "clamp"), (5, 2.0, "scale"), (9, 0.0, "ablate")]
    ]
    together = applied(model, variant(sae, *edits), x) - x
    alone = sum(applied(model, variant(sae, edit), x) - x for edit in edits)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(applied(model, variant(sae, *edits[::-1]), x) - x, together)


def test_several_saes_at_one_point_all_read_the_unchanged_stream(model, x) -> None:
    first, second = dictionary(0), dictionary(1)
    parts = (
        SiteSteering(Site.at(POINT), first, (FeatureEdit(3, 1.0, 5.0),)),
        SiteSteering(Site.at(POINT), second, (FeatureEdit(4, 2.0, 2.0, "clamp"),)),
    )
    together = applied(model, Variant(parts), x) - x
    alone = sum(applied(model, Variant((part,)), x) - x for part in parts)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_norms_are_kept_where_asked(model, x) -> None:
    sae = dictionary()
    out = applied(model, variant(sae, FeatureEdit(3, 2.0, 5.0), keep_norm=True), x)
    plain = applied(model, variant(sae, FeatureEdit(3, 2.0, 5.0)), x)
    torch.testing.assert_close(out.norm(dim=2), x.norm(dim=2))
    cosine = torch.nn.functional.cosine_similarity(out, plain, dim=2)
    torch.testing.assert_close(cosine, torch.ones(1, 6))


def test_a_control_changes_as_much_in_another_direction(model, x) -> None:
    sae = dictionary()
    edits = (FeatureEdit(3, 1.0, 5.0), FeatureEdit(5, 1.5, 2.0, "clamp"))
    real = applied(model, variant(sae, *edits), x) - x
    control = applied(model, variant(sae, *edits, control=1), x) - x
    torch.testing.assert_close(control.norm(dim=2), real.norm(dim=2), rtol=1e-4, atol=1e-5)
    units = control[0, 1:] / control[0, 1:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(units, units[:1].expand_as(units), rtol=1e-4, atol=1e-5)
    assert abs(float(units[0] @ sae.decoder[3]) / float(sae.decoder[3].norm())) < 0.6
    other = applied(model, variant(sae, *edits, control=2), x) - x
    assert not torch.allclose(other, control)


@pytest.mark.parametrize(
    ("scope", "steered"),
    [
        (Scope("all"), {1, 2, 3, 5}),
        (Scope("generated"), {5}),
        (Scope("from_last"), {3, 5}),
        (Scope("last"), {3}),
        (Scope("chosen", (2, 3)), {2, 3}),
    ],
)
def test_scopes_count_from_the_prompts_beginning(model, x, scope: Scope, steered: set) -> None:
    """Four tokens of prompt; of the two that follow, the one at position 4 is special."""
    steering = Steering(model, [adding(POINT, torch.ones(WIDTH))], [15], 4, scope)
    edit = steering.edits()[POINT]
    steering.expect(IDS, 0)
    whole = (edit(x) != x).any(2)[0]
    assert set(whole.nonzero().flatten().tolist()) == steered
    found = set()
    for first, last in ((0, 4), (4, 5), (5, 6)):  # as with a cache
        steering.expect(IDS[:, first:last], first)
        changed = (edit(x[:, first:last]) != x[:, first:last]).any(2)[0]
        found |= {first + int(i) for i in changed.nonzero()}
    assert found == steered


@pytest.mark.parametrize("positions", [(), (0,), (4,), (1, 9)])
def test_tokens_that_are_not_there_cannot_be_chosen(model, positions) -> None:
    with pytest.raises(InvalidInput, match="cannot be steered"):
        Steering(model, [adding(POINT, torch.ones(WIDTH))], [], 4, Scope("chosen", positions))


# -------------------------------------------------------------------- in models


class Plain:
    """A tokenizer for models without one."""

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def made(model, variants, scope=None, together=True, progress=None, **options):
    sampling = Sampling(**{"max_new_tokens": 6, "temperature": 0.0, **options})
    return generate(
        model, Plain(), IDS[0].tolist(), variants, sampling,
        special_ids=[0, 1, 2], stop_ids=(), scope=scope, together=together,
        progress=progress or Silent(),
    )  # fmt: skip


def strong(model: HookedDecoder) -> torch.Tensor:
    x = model.capture(IDS, [POINT])[POINT]
    g = torch.Generator().manual_seed(1)
    v = torch.randn(WIDTH, generator=g)
    return 2 * v / v.norm() * x.float().norm(dim=2).median()


@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_is_steered_alike(name: str) -> None:
    """Strength 0 is token-identical; the cache changes nothing; a batch is its rows; hooks are
    gone afterwards."""
    model = HookedDecoder(seeded(BUILDERS[name]))
    before = model.model(IDS).logits
    sae = dictionary()
    vector = strong(model)
    edits = (FeatureEdit(3, 1.0, 1.0, "clamp"), FeatureEdit(5, 2.0, 1.0, "orthogonal"))
    parts = (SiteSteering(Site.at(POINT), sae, edits, vector),)
    still = variant(sae, FeatureEdit(3, 0.0, 1.0), FeatureEdit(5, 1.0, 1.0, "scale"))
    variants = [still, Variant(parts), Variant(parts, keep_norm=True)]
    rows = made(model, variants).rows
    assert rows[0].ids == rows[1].ids
    apart = made(model, variants, together=False)
    assert not apart.together and [row.ids for row in apart.rows] == [row.ids for row in rows]
    for number in (1, 2):  # without a cache, every pass from the beginning
        ids = IDS
        for step in range(6):
            steering = Steering(model, [variants[number]], [0, 1, 2], IDS.shape[1])
            steering.expect(ids, 0)
            with model.intervene(steering.edits()):
                logits = model.model(ids, use_cache=False).logits[:, -1]
            top = logits[0].detach().topk(2).values
            if float(top[0] - top[1]) > 1e-3:  # a near tie may tip either way
                assert int(logits.argmax()) == rows[number + 1].ids[step]
            ids = torch.cat([ids, torch.tensor([[rows[number + 1].ids[step]]])], dim=1)
    assert torch.equal(model.model(IDS).logits, before)


@pytest.mark.parametrize("kind", ["all", "generated", "from_last"])
def test_cached_logits_are_those_of_a_whole_pass(model, kind: str) -> None:
    some = Variant(
        (
            SiteSteering(
                Site.at(POINT), dictionary(), (FeatureEdit(3, 1.0, 4.0, "clamp"),), strong(model)
            ),
        )
    )
    steering = Steering(model, [some], [], 4, Scope(kind))
    cache = DynamicCache(config=model.model.config)
    logits = []
    for first, last in ((0, 4), (4, 5), (5, 6)):
        steering.expect(IDS[:, first:last], first)
        with model.intervene(steering.edits()):
            out = model.model(IDS[:, first:last], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    steering.expect(IDS, 0)
    with model.intervene(steering.edits()):
        whole = model.model(IDS, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-3)


def test_several_layers_are_steered_at_once(model) -> None:
    points = [HookPoint("resid_post", layer) for layer in range(3)]
    vectors = [strong(model) * s for s in (0.3, -0.4, 0.5)]
    parts = tuple(SiteSteering(Site.at(p), vector=v) for p, v in zip(points, vectors, strict=True))
    steering = Steering(model, [Variant(parts)], [], 6)
    steering.expect(IDS, 0)
    with model.intervene(steering.edits()):
        found = model.model(IDS).logits

    def add(v: torch.Tensor):
        def edit(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1], x[:, 1:] + v], dim=1)

        return edit

    with model.intervene({p: add(v) for p, v in zip(points, vectors, strict=True)}):
        expected = model.model(IDS).logits
    torch.testing.assert_close(found, expected)


def test_a_transcoder_reads_before_the_mlp_and_writes_behind_it(model) -> None:
    site = Site.across_mlp(HookPoint("mlp_in", 1))
    sae = dictionary(3)
    read = model.capture(IDS, [site.input])[site.input][0]
    dense = sae.encode(read).dense()
    feature = int((dense[1:] > 0).sum(0).argmax())
    some = Variant((SiteSteering(site, sae, (FeatureEdit(feature, 0.0, 1.0, "ablate"),)),))
    before = model.capture(IDS, [site.output])[site.output][0]
    steering = Steering(model, [some], [], 6)
    steering.expect(IDS, 0)
    with model.intervene(steering.edits()):
        after = model.capture(IDS, [site.output])[site.output][0]
    expected = before - dense[:, feature : feature + 1] * sae.decoder[feature]
    torch.testing.assert_close(after[1:], expected[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(after[0], before[0])


def test_where_memory_is_short_rows_follow_one_another(model, monkeypatch) -> None:
    vector = strong(model)
    variants = [adding(POINT, vector), adding(POINT, -vector)]
    whole = made(model, variants, temperature=0.9, seed=3)
    assert whole.together
    run = generation._Making.run

    def short(self, rows, *args):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(self, rows, *args)

    monkeypatch.setattr(generation._Making, "run", short)
    seen: list[tuple[int, int, int]] = []

    class Seen(Silent):
        def report(self, done=0, total=0, *args, texts=(), **kwargs) -> None:
            seen.append((done, total, len(texts)))

    apart = made(model, variants, temperature=0.9, seed=3, progress=Seen())
    assert not apart.together
    assert apart.rows == whole.rows
    assert [done for done, _, _ in seen] == list(range(1, 19))
    assert {(total, n) for _, total, n in seen} == {(18, 3)}


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, monkeypatch) -> None:
    def broken(self, *args):
        raise RuntimeError("something else")

    monkeypatch.setattr(generation._Making, "run", broken)
    with pytest.raises(RuntimeError, match="something else"):
        made(model, [adding(POINT, strong(model))])


def test_stop_takes_one_token_at_most(model) -> None:
    class Stop(Silent):
        steps = 0

        def check(self) -> None:
            if self.steps == 3:
                raise Cancelled

        def report(self, *args, **kwargs) -> None:
            self.steps += 1

    stop = Stop()
    with pytest.raises(Cancelled):
        made(model, [adding(POINT, strong(model))], progress=stop)
    assert stop.steps == 3


def test_a_prompt_of_one_token_is_not_mistaken_for_a_lack_of_effect(model) -> None:
    found = generate(
        model, Plain(), [7], [adding(POINT, strong(model))],
        Sampling(max_new_tokens=3, temperature=0.0), special_ids=[], stop_ids=(),
    )  # fmt: skip
    assert found.rows[0].ids[0] == found.rows[1].ids[0]  # position 0 is not steered


def test_top_k_keeps_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    noise = torch.Generator().manual_seed(0)
    some = Sampling(temperature=1.0, top_k=2)
    assert {int(draw(logits, some, noise)) for _ in range(200)} == {0, 3}


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    prompt, rows = [3, 4, 4], [[5], [6]]
    ids = torch.tensor([[*prompt, *row] for row in rows])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(penalise(logits, 1.3, prompt, rows), expected)
    assert penalise(logits, 1.0, prompt, rows) is logits


def test_what_does_not_exist_is_refused(model) -> None:
    sae = dictionary()
    for edit, words in (
        (FeatureEdit(99, 1.0, 1.0), "No such feature"),
        (FeatureEdit(1, 1.0, 1.0, "amplify"), "No such intervention"),
        (FeatureEdit(1, 1.0, 0.0, "clamp"), "never fired"),
    ):
        with pytest.raises(InvalidInput, match=words):
            Steering(model, [variant(sae, edit)], [], 4)
