"""What steering promises, on every architecture and, where MISTUDIO_SAMPLE_MODEL names its folder,
on the sample model in fp32."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models.tiny_models import BUILDERS, seeded
from transformers import DynamicCache

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.models.loading import load_model
from mistudio.engine.progress import Cancelled, Silent
from mistudio.engine.sae.activation import JumpReLU
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.generation import Generated, Sampling, generate
from mistudio.engine.steering.interventions import FeatureEdit, SiteSteering, Steering, Variant

SPECIAL = [0, 1, 2]
LATENTS = 24


class Plain:
    """A tokenizer that cannot read: what was generated is never made into tokens again."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Case:
    """A model, a prompt, a dictionary at one point whose decoder rows are of the stream's size."""

    def __init__(self, model: HookedDecoder, layer: int) -> None:
        self.model = model
        self.ids = torch.tensor([[7, 9, 11, 13, 15, 17]])
        self.point = HookPoint("resid_post", layer)
        with torch.inference_mode():
            self.x = model.capture(self.ids, [self.point])[self.point][0].float()
        norm = self.x[1:].norm(dim=1).median()
        g = torch.Generator().manual_seed(0)
        d = model.d_model

        def rows() -> torch.Tensor:
            found = torch.randn(LATENTS, d, generator=g)
            return found / found.norm(dim=1, keepdim=True)

        bias = torch.full((LATENTS,), 0.02)
        threshold = JumpReLU(torch.full((LATENTS,), 1e-3))
        # Codes of about 1 for the stream's usual size, whatever that is.
        self.dictionary = Dictionary(
            rows() / norm, bias, rows() * norm * 0.5, torch.zeros(d), threshold
        )

    def variant(self, *edits: FeatureEdit) -> Variant:
        return Variant((SiteSteering(Site.at(self.point), self.dictionary, edits),))

    def logits(self, variant: Variant, special: list[int] | None = None) -> torch.Tensor:
        steering = Steering(self.model, [variant], special or [], self.ids.shape[1])
        steering.expect(self.ids, 0)
        with torch.inference_mode(), self.model.intervene(steering.edits()):
            return self.model.model(self.ids, use_cache=False).logits.float()

    def by_hand(self, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Logits where `change` [seq, d] is added behind position 0."""

        def edit(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1], x[:, 1:] + change(x[0, 1:])[None]], dim=1)

        with torch.inference_mode(), self.model.intervene({self.point: edit}):
            return self.model.model(self.ids, use_cache=False).logits.float()

    def made(self, variants: list[Variant], together: bool = True, **options: float) -> Generated:
        sampling = Sampling(**{"temperature": 0.8, "max_new_tokens": 5, "seed": 1, **options})
        return generate(
            self.model, Plain(), self.ids[0].tolist(), variants, sampling,
            special_ids=SPECIAL, stop_ids=(), together=together,
        )  # fmt: skip


STRONG = FeatureEdit(3, 1.0, 2.0)
EDITS = (STRONG, FeatureEdit(5, -0.5, 2.0), FeatureEdit(9, 1.0, 1.5, "clamp"))


def nothing_at_strength_zero(case: Case) -> None:
    still = case.variant(*(FeatureEdit(f, 0.0, 2.0) for f in (3, 5)))
    made = case.made([still, case.variant(STRONG)])
    assert made.rows[0].ids == made.rows[1].ids


def features_are_their_sum_once(case: Case) -> None:
    added = case.variant(STRONG, FeatureEdit(5, -0.5, 2.0), FeatureEdit(9, 2.0, 0.5))
    decoder = case.dictionary.decoder
    total = 2.0 * decoder[3] - decoder[5] + decoder[9]
    torch.testing.assert_close(
        case.logits(added), case.by_hand(lambda x: total), rtol=1e-4, atol=1e-3
    )


def clamping_to_what_is_there_changes_nothing(case: Case) -> None:
    """For one token: the feature is clamped there to the activation that it has."""
    dense = case.dictionary.encode(case.x).dense()
    feature = int(dense[4].argmax())
    value = float(dense[4, feature])
    assert value > 0
    scale = max(1.0, float(case.x[4].abs().max()))
    for strength in (1.0, 2.0):
        variant = case.variant(FeatureEdit(feature, strength, value, "clamp"))
        steering = Steering(case.model, [variant], [], 6)
        steering.expect(case.ids, 0)
        out = steering.edits()[case.point](case.x[None])[0, 4]
        expected = case.x[4] + (strength - 1) * value * case.dictionary.decoder[feature]
        assert float((out - expected).abs().max()) < 1e-4 * scale
        assert (float((out - case.x[4]).abs().max()) > 1e-2) == (strength > 1)


def cached_is_uncached(case: Case) -> None:
    variant = case.variant(*EDITS)
    steering = Steering(case.model, [variant], [], 4)
    cache, parts = DynamicCache(config=case.model.model.config), []
    with torch.inference_mode():
        for first, last in ((0, 4), (4, 5), (5, 6)):
            steering.expect(case.ids[:, first:last], first)
            with case.model.intervene(steering.edits()):
                out = case.model.model(
                    case.ids[:, first:last], past_key_values=cache, use_cache=True
                )
            parts.append(out.logits.float())
    torch.testing.assert_close(torch.cat(parts, 1), case.logits(variant), rtol=1e-3, atol=1e-3)


def a_batch_is_its_rows_one_by_one(case: Case) -> None:
    variants = [case.variant(*EDITS), case.variant(STRONG)]
    together, apart = case.made(variants), case.made(variants, together=False)
    assert [row.ids for row in together.rows] == [row.ids for row in apart.rows]
    plain = case.by_hand(torch.zeros_like)
    assert all(float((case.logits(v) - plain).abs().max()) > 1e-2 for v in variants)


@contextmanager
def whole(model: HookedDecoder) -> Iterator[None]:
    """No module has more hooks afterwards than before."""

    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.model.modules()
        )

    before = hooks()
    yield
    assert hooks() == before


def hooks_are_gone(case: Case) -> None:
    class Stop(Silent):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks == 3:
                raise Cancelled

    class Broken(Plain):
        def decode(self, ids: list[int]) -> str:
            raise ValueError("no text")

    variant = case.variant(*EDITS)
    with whole(case.model):
        case.made([variant])
    for tokenizer, progress, error in (
        (Plain(), Stop(), Cancelled),
        (Broken(), Silent(), ValueError),
    ):
        with whole(case.model), pytest.raises(error):
            generate(
                case.model, tokenizer, case.ids[0].tolist(), [variant], Sampling(max_new_tokens=5),
                special_ids=SPECIAL, stop_ids=(), progress=progress,
            )  # fmt: skip

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("in the middle of a pass")

    with whole(case.model), pytest.raises(ValueError), case.model.intervene({case.point: broken}):
        case.model.model(case.ids)


PROMISES = (
    nothing_at_strength_zero,
    features_are_their_sum_once,
    clamping_to_what_is_there_changes_nothing,
    cached_is_uncached,
    a_batch_is_its_rows_one_by_one,
    hooks_are_gone,
)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_promise_on_every_architecture(name: str) -> None:
    case = Case(HookedDecoder(seeded(BUILDERS[name])), 1)
    for promise in PROMISES:
        promise(case)


@pytest.fixture(scope="module")
def sample() -> Case:
    folder = os.environ.get("MISTUDIO_SAMPLE_MODEL", "")
    if not folder:
        pytest.skip("MISTUDIO_SAMPLE_MODEL does not name a folder with the sample model")
    return Case(load_model(Path(folder), "fp32", "cpu"), 10)


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_on_the_sample_model(sample: Case, promise: Callable[[Case], None]) -> None:
    promise(sample)


def test_stopping_takes_effect_within_one_token() -> None:
    case = Case(HookedDecoder(seeded(BUILDERS["llama"])), 1)
    case.made([case.variant(STRONG)], max_new_tokens=1)  # what is tried once is tried
    passes: list[int] = []
    handle = case.model.model.register_forward_hook(lambda *_: passes.append(1))

    class Stop(Silent):
        wanted = False

        def check(self) -> None:
            if self.wanted:
                raise Cancelled

        def report(self, done: float, *rest: object, **metrics: object) -> None:
            self.wanted = done >= 3  # the user has seen three tokens

    with pytest.raises(Cancelled):
        generate(
            case.model, Plain(), case.ids[0].tolist(), [case.variant(STRONG)],
            Sampling(max_new_tokens=50), special_ids=SPECIAL, stop_ids=(), progress=Stop(),
        )  # fmt: skip
    handle.remove()
    assert len(passes) == 3
