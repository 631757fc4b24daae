"""SAELens' side, run by the Python of .venv-peers: it trains as a user of SAELens would.

Takes one job as JSON on the command line and answers with one line of JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import shared
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

SAES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def make_trainer(
    job: dict[str, Any], d: int, data: Iterator[torch.Tensor], scaling: float = 1.0
) -> SAETrainer[Any, Any]:
    """As good as its options allow: warm-up and decay like ours (5 % and 20 % of the steps) and
    a dead window that fits into the run (its default, 1000 steps, never opens in a short one)."""
    sae_class, config_class = SAES[job["arch"]]
    device = job["device"]
    config = config_class(
        d_in=d,
        d_sae=job["width"],
        k=job["k"],
        device=device,
        normalize_activations="none" if scaling == 1 else "expected_average_only_in",
    )
    steps, batch = job["steps"], job["batch"]
    window = max(math.ceil(50_000 / batch), round(0.05 * steps))
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=job["lr"],
            lr_end=job["lr"] / 10,  # it asserts that this is set
            lr_warm_up_steps=max(1, round(0.05 * steps)),
            lr_decay_steps=max(1, round(0.2 * steps)),
            dead_feature_window=min(1000, window),
            device=device,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae_class(config),
        data_provider=data,
    )
    if scaling != 1:
        # What its own estimate would give, without taking 1,000 batches from the shared order.
        trainer.activation_scaler.scaling_factor = scaling
    return trainer


def train(job: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(job["seed"])
    activations = shared.open_activations(Path(job["activations"]), job["point"])
    order = Path(job["order"])
    scaling = 1.0
    if job["inputs"] == "scaled":
        scaling = math.sqrt(activations.width) / shared.mean_norm(activations, order)
    data = shared.batches(activations, order, job["batch"])
    trainer = make_trainer(job, activations.width, data, scaling)
    trainer.sae.cfg.metadata.hook_name = job["point"]
    began = time.perf_counter()
    sae = trainer.fit()
    seconds = time.perf_counter() - began
    sae.save_inference_model(job["export"])
    return {
        "seconds": seconds,
        "whole_seconds": seconds,
        "tokens_per_second": job["steps"] * job["batch"] / seconds,
        "trained_l0": float(sae.cfg.metadata.l0),
        "learning_rate": job["lr"],
        "place": job["export"],
        "version": sae_lens.__version__,
    }


def _stepper(job: dict[str, Any]) -> Callable[[], None]:
    """Whole training steps as `fit` makes them; the first call makes the trainer."""
    torch.manual_seed(0)
    pool = shared.pool(job)
    made: list[SAETrainer[Any, Any]] = []

    def step() -> None:
        if not made:
            made.append(make_trainer(job, job["d"], iter(())))
        trainer = made[0]
        trainer.n_forward_passes_since_fired[: job["dead"]] = 1e6
        trainer.maybe_reset_sparsity()
        trainer.step(pool[trainer.n_training_steps % len(pool)])
        trainer.n_training_steps += 1

    return step


def speed(job: dict[str, Any]) -> None:
    shared.take_turns(_stepper(job), job)


def memory(job: dict[str, Any]) -> dict[str, Any]:
    return shared.extra_memory(_stepper(job), job["warmup"], job["device"])


def load(job: dict[str, Any]) -> dict[str, Any]:
    """SAELens' own reading of an export: features and reconstructions of given inputs."""
    sae = sae_lens.SAE.load_from_disk(job["export"])
    x = torch.from_numpy(np.load(job["x"]))
    with torch.no_grad():
        features = sae.encode(x)
        np.save(job["y"], sae.decode(features).numpy())
    np.save(job["active"], (features != 0).sum(1).numpy())
    return {"architecture": sae.cfg.architecture(), "version": sae_lens.__version__}


if __name__ == "__main__":
    shared.serve({"train": train, "speed": speed, "memory": memory, "load": load})
