"""What discovery adds to the forward pass and the SAE's encoding, and the memory it takes.

For every chunk of text the three are timed one after the other in one process, so that a busy
machine disturbs them alike; processor time is printed beside the clock. MISTUDIO_SAMPLE_MODEL names
a model folder; without it only the tests' tiny model is measured, whose passes are so short that
they say little. The dictionary is random, TopK with 32 of 24,576 latents, in the middle layer.

The peak memory of 65,536 features over 1,000,000 invented tokens is measured in a process of its
own (`--memory`: a minute or two) and printed beside the plan.

BENCH_TOKENS is how many tokens are taken of each model, BENCH_MEMORY_TOKENS how many invented.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mistudio.engine.datasets.sources import read_documents  # noqa: E402
from mistudio.engine.datasets.token_writer import write_token_store  # noqa: E402
from mistudio.engine.datasets.tokens import TokenStore  # noqa: E402
from mistudio.engine.features.accumulators import (  # noqa: E402
    POOL,
    Collector,
    Rows,
    Size,
)
from mistudio.engine.features.discovery import Options, plan, pool_of  # noqa: E402
from mistudio.engine.features.passing import LivePassage, choose_windows  # noqa: E402
from mistudio.engine.features.summary import Examined, finished, same_tokens  # noqa: E402
from mistudio.engine.models import loading  # noqa: E402
from mistudio.engine.models.hooks import HookPoint  # noqa: E402
from mistudio.engine.progress import SILENT  # noqa: E402
from mistudio.engine.sae.activation import TopK  # noqa: E402
from mistudio.engine.sae.dictionary import Codes, Dictionary  # noqa: E402

TINY = ROOT / "tests" / "data" / "tiny-llama-0.9m"
CORPUS = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
CONTEXT, LATENTS, ACTIVE = 128, 24_576, 32
TOKENS = int(os.environ.get("BENCH_TOKENS", "32768"))
MEMORY_TOKENS = int(os.environ.get("BENCH_MEMORY_TOKENS", "1000000"))
MB = 1024**2


def token_store(model: Path, folder: Path) -> TokenStore:
    tokenizer = loading.load_tokenizer(model)
    write_token_store(
        list(islice(read_documents(CORPUS), 1500)),
        tokenizer,
        folder,
        bos_id=loading.adds_bos(tokenizer),
        separator_id=loading.separator_id(tokenizer),
        special_ids=sorted(loading.special_ids(tokenizer)),
        tokenizer_hash="benchmark",
    )
    return TokenStore(folder)


def dictionary(d: int, latents: int, k: int) -> Dictionary:
    g = torch.Generator().manual_seed(0)
    encoder = torch.randn(latents, d, generator=g)
    encoder /= encoder.norm(dim=1, keepdim=True)
    return Dictionary(encoder, torch.zeros(latents), encoder.clone(), torch.zeros(d), TopK(k))


class Clock:
    """Seconds by part: on the wall, and of the processor in all threads."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, part: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.wall[part] = self.wall.get(part, 0.0) + wall - self._wall
        self.cpu[part] = self.cpu.get(part, 0.0) + cpu - self._cpu
        self._wall, self._cpu = wall, cpu


@torch.inference_mode()
def timed(model_folder: Path, folder: Path) -> None:
    store = token_store(model_folder, folder / model_folder.name)
    tokenizer = loading.load_tokenizer(model_folder)
    model = loading.load_model(model_folder, "fp32")
    point = HookPoint("resid_post", model.n_layers // 2)
    sae = dictionary(model.width(point), LATENTS, ACTIVE)
    windows = choose_windows(store.train, CONTEXT, TOKENS)
    passage = LivePassage(model, store.train, (point,), windows, CONTEXT)
    pool = pool_of(passage.windows, 0)
    vocabulary = max(len(tokenizer), store.meta.vocab_size)
    collector = Collector(Size(LATENTS, CONTEXT, 20, 24, len(pool), vocabulary), pool=pool)
    chunks = iter(passage.chunks(0, SILENT))
    sae.encode(next(chunks)[point].activations)  # warm, and not counted
    clock = Clock()
    while True:
        chunk = next(chunks, None)
        clock.lap("forward")
        if chunk is None:
            break
        site = chunk[point]
        codes = sae.encode(site.activations.float())
        clock.lap("encode")
        collector.add(codes, site.rows)
        clock.lap("discovery")
    examined = Examined(
        sae, passage.medians[point], store.train, same_tokens(tokenizer, vocabulary)
    )
    clock = report(model_folder.name, clock, collector)
    finished(collector, examined)
    clock.lap("finishing")
    print(
        f"  once, at the end (however much text): {clock.wall['finishing']:.1f} s "
        f"({clock.cpu['finishing']:.1f} s of processor), the logit lens apart"
    )


def report(name: str, clock: Clock, collector: Collector) -> Clock:
    tokens = collector.totals.tokens
    print(f"{name}: {tokens:,} tokens, {LATENTS:,} latents, {ACTIVE} active a token")
    for kind, spent in (("clock", clock.wall), ("processor", clock.cpu)):
        without = spent["forward"] + spent["encode"]
        parts = ", ".join(f"{part} {1e6 * s / tokens:,.0f}" for part, s in spent.items())
        added = spent["discovery"] / without
        print(f"  {kind}: {parts} us a token; discovery adds {100 * added:.1f} %")
    return Clock()


def synthetic(latents: int, active: int, tokens: int) -> Iterator[tuple[Codes, Rows]]:
    """Codes of a stream in which latents differ in how often they fire as trained ones do."""
    g = np.random.default_rng(0)
    chunk = 16 * CONTEXT
    for start in range(0, tokens - chunk + 1, chunk):
        row = np.repeat(np.arange(chunk), active)
        # Log-uniform ranks, so that some fire on a tenth of the tokens, most on few.
        latent = (latents ** g.random(len(row))).astype(np.int64) - 1
        latent = latent * 40_503 % latents
        pairs = np.unique(row * latents + latent)
        row, latent = pairs // latents, pairs % latents
        value = np.exp(g.standard_normal(len(row))).astype(np.float32)
        place = start + np.arange(chunk)
        rows = Rows(place // CONTEXT, place % CONTEXT, g.integers(0, 49_152, chunk))
        yield (
            Codes(*map(torch.from_numpy, (row, latent, value)), chunk, latents),
            rows,
        )


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class _Text:
    """Token ids of the synthetic stream's windows, for what is read at the end."""

    def windows(self, numbers: Any, context: int) -> torch.Tensor:
        grid = np.asarray(numbers)[:, None] * context + np.arange(context)
        return torch.from_numpy(grid * 2_654_435_761 % 49_152)


def memory() -> None:
    latents, active, d = 65_536, 64, 576
    windows = -(-MEMORY_TOKENS // CONTEXT)
    planned = plan(
        [(latents, d, d)],
        context=CONTEXT,
        windows=windows,
        vocabulary=49_152,
        options=Options(),
        active=active,
    )
    before = resident()
    sae = dictionary(d, latents, active)
    pool = pool_of(np.arange(windows), 0)
    collector = Collector(Size(latents, CONTEXT, 20, 24, min(windows, POOL), 49_152), pool=pool)
    began = time.perf_counter()
    for codes, rows in synthetic(latents, active, MEMORY_TOKENS):
        collector.add(codes, rows)
    streamed = resident()
    finished(collector, Examined(sae, 1.0, _Text(), np.arange(49_152)))  # type: ignore[arg-type]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{latents:,} features x {collector.totals.tokens:,} tokens, {active} active a token, "
        f"width {d}: {(streamed - before) / MB:,.0f} MB while it streams, "
        f"{(peak - before) / MB:,.0f} MB at most (the dictionary included; planned "
        f"{planned.memory_bytes / MB:,.0f} MB), the whole process {peak / MB:,.0f} MB; "
        f"{time.perf_counter() - began:.0f} s"
    )
    for part, size in planned.memory.items():
        print(f"  planned for {part}: {size / MB:,.0f} MB")


def main() -> None:
    if "--memory" in sys.argv:
        memory()
        return
    sample = os.environ.get("MISTUDIO_SAMPLE_MODEL")
    with tempfile.TemporaryDirectory() as folder:
        for model in (TINY, *([Path(sample)] if sample else [])):
            timed(model, Path(folder))
    subprocess.run([sys.executable, __file__, "--memory"], check=True)


if __name__ == "__main__":
    main()
