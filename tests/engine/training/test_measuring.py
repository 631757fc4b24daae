"""Two seconds of a run tell how fast it goes: what is measured is the work of just this run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Cancelled, Silent
from mistudio.engine.training import measuring
from mistudio.engine.training.config import derive, option, parse
from mistudio.engine.training.measuring import measure_speeds
from mistudio.engine.training.run import sites_of
from mistudio.engine.training.step import SiteTrainer
from mistudio.errors import InvalidInput

SHORT = 0.1  # seconds
KINDS = [
    *({"sparsity": sparsity} for sparsity in option("sparsity")["choices"]),
    *({"wiring": wiring} for wiring in option("wiring")["choices"]),
]


def speeds(tiny: Any, tokens: Any, layers: tuple[int, ...] = (1,), **options: Any) -> Any:
    config = parse({"k": 8, "expansion": 2, "batch_size": 256, "context": 64, **options})
    site = "mlp_in" if "transcoder" in config.wiring else "resid_post"
    sites = sites_of(tuple(HookPoint(site, layer) for layer in layers), config)
    return measure_speeds(tiny, tokens.train, sites, config, seconds=SHORT)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(options.values()))
def test_every_kind_of_run_can_be_measured(options: dict[str, Any], tiny: Any, tokens: Any) -> None:
    found = speeds(tiny, tokens, **options)
    for value in (found.forward, found.step, found.encode, found.whole):
        assert math.isfinite(value) and value > 0
    assert found.passes >= 1 and found.steps >= 1 and found.seconds > 0


@pytest.mark.parametrize("sparsity", option("sparsity")["choices"])
def test_steps_have_as_many_latents_active_as_the_run_has(
    sparsity: str, tiny: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of all latents are active in an untrained ReLU: its steps would take far longer."""
    active: list[float] = []
    step = SiteTrainer.step

    def watched(self: SiteTrainer, *rows: Any, measure: bool = True) -> Any:
        metrics = step(self, *rows, measure=True)
        assert metrics is not None
        active.append(metrics.l0)
        return metrics

    monkeypatch.setattr(SiteTrainer, "step", watched)
    speeds(tiny, tokens, sparsity=sparsity, expansion=4, steps=1000)
    mean = 8 + 0.05 * (32 - 8) / 2  # k, four times as many at first, falling over a twentieth
    assert active[-1] == pytest.approx(mean, rel=0.3)


def test_steps_are_of_the_runs_size(
    tiny: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    step = SiteTrainer.step

    def watched(self: SiteTrainer, x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((len(x), self.plan.d_sae))
        return step(self, x, *rest, **options)

    monkeypatch.setattr(SiteTrainer, "step", watched)
    speeds(tiny, tokens, batch_size=512, width=320)
    assert seen[-1] == (512, 320)
    seen.clear()
    # Too long for the time: two smaller sizes tell what it would take.
    monkeypatch.setattr(measuring, "STEP", 1e-9)
    found = speeds(tiny, tokens, batch_size=65_536)
    assert max(n for n, _ in seen) <= 1024 and found.step > 0


def test_more_sites_share_a_pass_and_take_a_step_each(tiny: Any, tokens: Any) -> None:
    config = parse({"k": 8, "expansion": 2, "batch_size": 256, "context": 64})
    one = sites_of((HookPoint("resid_post", 1),), config)
    three = sites_of(tuple(HookPoint("resid_post", layer) for layer in (0, 1, 2)), config)
    meter = measuring._Meter(tiny, tokens.train, three, config, Silent())
    assert len(meter.kinds) == 1  # one stands for all of its size
    alone = measure_speeds(tiny, tokens.train, one, config, seconds=SHORT)
    together = measure_speeds(tiny, tokens.train, three, config, seconds=SHORT)
    assert together.step < alone.step


def test_nothing_of_the_model_is_changed(tiny: Any, tokens: Any) -> None:
    ids = tokens.heldout.windows([0], 64)
    with torch.no_grad():
        before = tiny.model(ids).logits
        speeds(tiny, tokens)
        assert torch.equal(tiny.model(ids).logits, before)


def test_it_stops_when_it_is_told(tiny: Any, tokens: Any) -> None:
    class Stops(Silent):
        def check(self) -> None:
            raise Cancelled

    config = parse({"k": 8, "expansion": 2, "batch_size": 256, "context": 64})
    sites = sites_of((HookPoint("resid_post", 1),), config)
    with pytest.raises(Cancelled):
        measure_speeds(tiny, tokens.train, sites, config, seconds=60, progress=Stops())


def test_a_text_without_a_window_is_refused(tiny: Any, tokens: Any) -> None:
    config = parse({"context": 8192})
    sites = sites_of((HookPoint("resid_post", 1),), config)
    with pytest.raises(InvalidInput):
        measure_speeds(tiny, tokens.heldout, sites, config)


def test_a_plan_of_the_settled_trainer_is_that_of_the_run() -> None:
    plan = derive(parse({"k": 8, "expansion": 2}), 64)
    x = torch.randn(512, 64)
    trainer = measuring._settled(plan, x, None)
    before = {name: value.clone() for name, value in trainer.parameters().items()}
    trainer.step(x, measure=False)
    for name, value in trainer.parameters().items():  # it stays where it is
        assert torch.allclose(value, before[name], atol=1e-6), name
