"""Every entry of the table of hyper-parameters changes something in a run: a new one without an
effect that can be observed fails here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.training.config import TrainingConfig, parse
from mistudio.engine.training.run import Saving, TrainedRun, train
from mistudio.engine.training.step import SiteTrainer
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Train
from mistudio.jobs.models import loaded_model
from mistudio.library.library import Library

POINT = HookPoint("resid_post", 1)
# 20 steps with all that a run has: latents that die and come back, warm-up, decay, annealing.
BASE = {
    "steps": 20, "batch_size": 128, "expansion": 2.0, "k": 3, "context": 64, "dead_window": 1000,
    "anneal_share": 0.3, "autosave_minutes": 0.0, "learning_rate": 3e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A run: what it gave, its rows of metrics, after which steps it was saved, and how many rows
    it ever encoded at once."""

    result: TrainedRun
    rows: list[dict[str, Any]]
    saved: list[int]
    most_rows: int

    @property
    def site(self) -> Any:
        return next(iter(self.result.sites.values()))

    @property
    def weights(self) -> Tensor:
        dictionary = self.site.dictionary
        return torch.cat([dictionary.W_enc.flatten(), dictionary.W_dec.flatten()])

    @property
    def skip(self) -> Tensor:
        return self.site.dictionary.skip


def rates(outcome: Outcome) -> list[float]:
    return [row["learning_rate"] for row in outcome.rows]


@dataclass(frozen=True)
class Effect:
    """`value`: what the option is changed to; `seen`: what is compared; `beside`: what else must be
    chosen; `wanted`: what must be seen after the change, where that can be told."""

    value: Any
    seen: Callable[[Outcome], Any]
    beside: tuple[tuple[str, Any], ...] = ()
    wanted: Any = None


SKIPPING = (("wiring", "skip_sae"),)
EFFECTS = {
    "sparsity": Effect("topk", lambda o: o.site.dictionary.activation.name, wanted="topk"),
    "wiring": Effect("skip_sae", lambda o: o.skip is not None, wanted=True),
    "skip": Effect("fixed", lambda o: int(torch.linalg.matrix_rank(o.skip)), SKIPPING, 128),
    "skip_rank": Effect(5, lambda o: int(torch.linalg.matrix_rank(o.skip)), SKIPPING, 5),
    "skip_share": Effect(
        0.5,
        lambda o: round(float(o.skip.diagonal().mean()), 4),
        (*SKIPPING, ("skip", "fixed")),
        0.5,
    ),
    "expansion": Effect(3.0, lambda o: o.site.dictionary.d_sae, wanted=384),
    "k": Effect(6, lambda o: round(o.site.quality.l0), wanted=6),
    "tokens": Effect(1280, lambda o: o.result.tokens, (("steps", None),), 1280),
    "width": Effect(200, lambda o: o.site.dictionary.d_sae, wanted=200),
    "steps": Effect(12, lambda o: o.rows[-1]["step"] + 1, wanted=12),
    "batch_size": Effect(256, lambda o: o.rows[0]["tokens"], wanted=256),
    "learning_rate": Effect(1e-3, lambda o: max(rates(o)), wanted=1e-3),
    "l1_coefficient": Effect(
        0.5, lambda o: o.rows[-1]["coefficient"], (("sparsity", "standard"),), 0.5
    ),
    "optimizer": Effect("sgd", lambda o: o.weights.tolist()),
    "weight_decay": Effect(0.9, lambda o: o.weights.tolist(), (("optimizer", "adamw"),)),
    "schedule": Effect("cosine", lambda o: rates(o)[8]),
    "warmup_share": Effect(0.5, lambda o: rates(o)[4], wanted=1.5e-3),
    "decay_share": Effect(0.0, lambda o: rates(o)[-1], wanted=3e-3),
    "anneal_share": Effect(0.0, lambda o: o.rows[0]["l0"] > 2 * 3, wanted=False),
    "auxk": Effect(False, lambda o: o.weights.tolist(), (("revive", False),)),
    "revive": Effect(False, lambda o: o.site.revived > 0, wanted=False),
    "mixed_precision": Effect(True, lambda o: o.weights.tolist()),
    "gradient_accumulation": Effect(4, lambda o: o.most_rows < 128, wanted=True),
    "dead_window": Effect(50_000, lambda o: max(row["dead"] for row in o.rows) > 0, wanted=False),
    "autosave_steps": Effect(5, lambda o: o.saved, wanted=[5, 10, 15, 20]),
    "autosave_minutes": Effect(1e-6, lambda o: len(o.saved), wanted=20),
    "seed": Effect(1, lambda o: o.weights.tolist()),
}
# The windows are cut before the engine trains: a job shows it.
IN_JOBS = {"context"}
NAMES = [entry.name for entry in fields(TrainingConfig)]


@pytest.fixture(scope="module")
def source(built: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredActivations:
    library = Library(built)
    folder = tmp_path_factory.mktemp("activations")
    store = TokenStore(library.path(library.tokenizations.all()[0].folder))
    extract(loaded_model(library, 1), store, (POINT,), folder, max_tokens=6_000, context=64)
    library.close()
    return StoredActivations(folder)


@pytest.fixture(scope="module")
def outcomes(
    source: StoredActivations, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[dict[str, Any]], Outcome]]:
    """Runs by their options; one of each."""
    known: dict[str, Outcome] = {}

    def outcome(options: dict[str, Any]) -> Outcome:
        key = repr(sorted(options.items()))
        if key not in known:
            known[key] = _run(source, options, tmp_path_factory.mktemp("checkpoints"))
        return known[key]

    yield outcome


def _run(source: StoredActivations, options: dict[str, Any], folder: Path) -> Outcome:
    rows: list[dict[str, Any]] = []
    saved: list[int] = []
    encoded: list[int] = []
    whole = SiteTrainer._pre_activations

    def watched(trainer: SiteTrainer, centred: Tensor, encoder: Tensor) -> Tensor:
        encoded.append(len(centred))
        return whole(trainer, centred, encoder)

    saving = Saving(folder, saved=lambda checkpoint: saved.append(checkpoint.step))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteTrainer, "_pre_activations", watched)
        result = train(source, parse(options), record=rows.append, saving=saving)
    return Outcome(result, rows, saved, max(encoded))


def test_every_option_has_an_effect_to_look_for() -> None:
    assert set(EFFECTS) | IN_JOBS == set(NAMES)


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_changes_what_it_says(
    name: str, outcomes: Callable[[dict[str, Any]], Outcome]
) -> None:
    effect = EFFECTS[name]
    before = {**BASE, **dict(effect.beside)}
    if name == "tokens":
        before["tokens"] = 2560
    changed = {**before, name: effect.value}
    assert parse(before) != parse(changed)
    assert replace(parse(changed), **{name: getattr(parse(before), name)}) == parse(before)
    seen, after = effect.seen(outcomes(before)), effect.seen(outcomes(changed))
    assert seen != after
    if effect.wanted is not None:
        assert after == (
            pytest.approx(effect.wanted, rel=1e-6)
            if isinstance(effect.wanted, float)
            else effect.wanted
        )


def test_the_context_cuts_the_windows_that_are_read(library: Library) -> None:
    """One position of every window is left out: twice as short windows lose twice as many."""
    lost = {}
    for context in (32, 64):
        config = {**BASE, "context": context, "steps": 8}
        job = Train(1, 1, [POINT.name], config, loss_tokens=256)
        row = run_job(library, job, submit(library, job))
        assert row.status == "finished", row.error
        dropped = library.trainings.get(row.result["training_id"]).record["dropped"]
        lost[context] = dropped["special"] / (dropped["special"] + dropped["kept"])
    assert lost[32] == pytest.approx(2 * lost[64], rel=0.2)
