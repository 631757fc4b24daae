"""How often latents fire during training: counted by the step, told by the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.run import train
from mistudio.engine.training.step import SiteTrainer


def a_trainer(**options) -> SiteTrainer:
    options = {"expansion": 8, "k": 3, "batch_size": 128, "sparsity": "topk", **options}
    plan = derive(TrainingConfig(tokens=64_000, **options), 16)
    torch.manual_seed(0)
    return SiteTrainer(plan, torch.randn(1024, 16), seed=0)


def by_hand(trainer: SiteTrainer, x: torch.Tensor) -> np.ndarray:
    """Tokens of raw x that each latent fires on, a token at a time, with the weights as they are:
    the k largest pre-activations, where they are positive."""
    k = int(trainer.current_k())
    fired = np.zeros(trainer.plan.d_sae, dtype=int)
    for token in trainer.wiring.inputs(x) - trainer.b_dec:
        pre = (trainer.encoder @ token + trainer.b_enc).numpy()
        for latent in np.argsort(pre)[-k:]:
            fired[latent] += pre[latent] > 0
    return fired


@pytest.mark.parametrize("parts", [1, 4])
def test_density_is_that_of_the_tokens_since_it_was_last_asked(parts) -> None:
    trainer = a_trainer(anneal_share=0.0, auxk=False, gradient_accumulation=parts)
    for steps in (3, 2):
        fired = np.zeros(trainer.plan.d_sae, dtype=int)
        for _ in range(steps):
            x = torch.randn(128, 16)
            x[:, 0] *= 20  # a direction that few latents read, so that others stay silent
            fired += by_hand(trainer, x)
            trainer.step(x)
        found, tokens = trainer.density()
        assert tokens == steps * 128
        assert found.never_fired == int((fired == 0).sum()) > 0
        alive = np.log10(fired[fired > 0] / tokens)
        expected = np.histogram(np.clip(alive, -6, -1e-9), np.array(found.log10_edges))[0]
        assert found.counts == tuple(expected.tolist())
    assert trainer.density()[1] == 0


def test_the_rows_of_a_run_cover_every_token_once(tiny, tokens, tmp_path) -> None:
    rows: list[dict] = []
    config = TrainingConfig(tokens=20_000, expansion=2, k=8, batch_size=256, context=64)
    extract(tiny, tokens, (HookPoint("resid_post", 1),), tmp_path, max_tokens=30_000, context=64)
    source = StoredActivations(tmp_path)
    run = train(source, config, record=rows.append)
    for site, trained in run.sites.items():
        found = [row["density"] for row in rows if row["site"] == site.name and "density" in row]
        assert len(found) == 20
        assert sum(density["tokens"] for density in found) == run.tokens
        for density in found:
            latents = sum(density["counts"]) + density["never_fired"]
            assert latents == trained.dictionary.d_sae
