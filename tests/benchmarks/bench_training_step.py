"""Our training step against the same step by dense autograd: tokens per second, as a ratio.

Blocks of both alternate in one process, so that a noisy machine disturbs both alike. The dense
step is what most libraries do: a dense code matrix, autograd, Adam, unit decoder.
"""

from __future__ import annotations

import statistics
import time

import torch

from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.step import SiteTrainer

SHAPES = ((576, 8, 32, 2048), (768, 8, 32, 2048), (768, 32, 32, 2048))
BLOCKS, STEPS = 5, 4


class DenseTopK(torch.nn.Module):
    """A TopK autoencoder written with dense tensors and autograd."""

    def __init__(self, d: int, m: int, k: int) -> None:
        super().__init__()
        decoder = torch.randn(m, d)
        decoder /= decoder.norm(dim=1, keepdim=True)
        self.decoder = torch.nn.Parameter(decoder)
        self.encoder = torch.nn.Parameter(decoder.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(m))
        self.b_dec = torch.nn.Parameter(torch.zeros(d))
        self.k = k
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)

    def step(self, x: torch.Tensor) -> None:
        pre = (x - self.b_dec) @ self.encoder.T + self.b_enc
        values, latents = pre.topk(self.k, dim=1)
        z = torch.zeros_like(pre).scatter(1, latents, values.relu())
        loss = (z @ self.decoder + self.b_dec - x).square().sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.decoder /= self.decoder.norm(dim=1, keepdim=True)


def tokens_per_second(step, x: torch.Tensor) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        step(x)
    return STEPS * len(x) / (time.perf_counter() - began)


def compare(d: int, expansion: int, k: int, batch: int, sparsity: str) -> tuple[float, float]:
    x = torch.randn(batch, d) * 3
    config = TrainingConfig(
        tokens=100_000_000,
        expansion=expansion,
        k=k,
        batch_size=batch,
        sparsity=sparsity,
        anneal_share=0.0,
    )
    ours = SiteTrainer(derive(config, d), x, seed=0)
    dense = DenseTopK(d, expansion * d, k)
    for _ in range(2):
        ours.step(x, measure=False)
        dense.step(x)
    pairs = [
        (
            tokens_per_second(lambda batch: ours.step(batch, measure=False), x),
            tokens_per_second(dense.step, x),
        )
        for _ in range(BLOCKS)
    ]
    return statistics.median(p[0] for p in pairs), statistics.median(p[0] / p[1] for p in pairs)


def main() -> None:
    print(f"training step, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'d_in':>6} {'d_sae':>6} {'k':>4} {'batch':>6} {'sparsity':<10} "
        f"{'tokens/s':>9} {'x dense autograd':>17}"
    )
    for d, expansion, k, batch in SHAPES:
        for sparsity in ("batchtopk", "topk"):
            speed, ratio = compare(d, expansion, k, batch, sparsity)
            print(
                f"{d:>6} {expansion * d:>6} {k:>4} {batch:>6} {sparsity:<10} "
                f"{speed:>9,.0f} {ratio:>17.2f}"
            )


if __name__ == "__main__":
    main()
