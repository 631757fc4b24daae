"""The plan before a run against what really happens: seconds of a step and of a forward pass,
memory of a fresh process. Then what the same model computes for machines that nobody measured.

The probe and what it predicts alternate in one process, so that a noisy machine disturbs both
alike. MISTUDIO_SAMPLE_MODEL may name a model folder that is measured beside the tests' tiny one.
`--memory JSON` is one memory measurement, for a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import torch  # noqa: E402

from mistudio.engine.training.config import Plan, TrainingConfig, derive  # noqa: E402
from mistudio.engine.training.cost import (  # noqa: E402
    GPT2_SMALL,
    PUBLISHED,
    UTILISATION,
    DeviceSpeed,
    forward_cost,
    probe_device,
    published_speed,
    shape_of_decoder,
    step_cost,
)
from mistudio.engine.training.footprint import (  # noqa: E402
    FLOAT,
    Machine,
    PlannedSite,
    RunShape,
    site_memory,
)
from mistudio.engine.training.planning import plan_run  # noqa: E402
from mistudio.engine.training.step import SiteTrainer  # noqa: E402

TINY = ROOT / "tests" / "data" / "tiny-llama-0.9m"
# d, expansion, k, batch, sparsity
STEPS = (
    (256, 8, 32, 1024, "batchtopk"),
    (576, 8, 32, 2048, "batchtopk"),
    (768, 8, 32, 2048, "batchtopk"),
    (768, 8, 32, 2048, "topk"),
    (768, 32, 32, 2048, "batchtopk"),
    (768, 8, 64, 4096, "topk"),
    (576, 8, 32, 2048, "matryoshka"),
)
MEMORY: tuple[dict[str, Any], ...] = (
    {"d": 256, "expansion": 32, "batch_size": 4096},
    {"d": 256, "expansion": 32, "batch_size": 4096, "sparsity": "topk"},
    {"d": 768, "expansion": 8, "batch_size": 2048},
    {"d": 768, "expansion": 32, "batch_size": 4096},
    {"d": 256, "expansion": 32, "batch_size": 4096, "sparsity": "standard"},
    {"d": 256, "expansion": 32, "batch_size": 4096, "sparsity": "jumprelu"},
    {"d": 256, "expansion": 32, "batch_size": 4096, "gradient_accumulation": 8},
    {"d": 256, "expansion": 32, "batch_size": 4096, "optimizer": "sgd"},
)
BLOCKS = 5
GB = 1024**3


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(
    work: Callable[[], object], predict: Callable[[DeviceSpeed], float]
) -> tuple[float, float, float]:
    """Medians of predicted and measured seconds, and of their ratio, over alternating blocks."""
    for _ in range(2):
        work()
    pairs = []
    for _ in range(BLOCKS):
        before = predict(probe_device(device()))
        wait()
        began = time.perf_counter()
        for _ in range(2):
            work()
        wait()
        measured = (time.perf_counter() - began) / 2
        after = predict(probe_device(device()))
        pairs.append(((before + after) / 2, measured))
    return (
        statistics.median(p for p, _ in pairs),
        statistics.median(m for _, m in pairs),
        statistics.median(p / m for p, m in pairs),
    )


# -------------------------------------------------------------------- time


def bench_steps() -> None:
    print(
        f"{'d_in':>6} {'d_sae':>6} {'k':>4} {'batch':>6} {'sparsity':<11}"
        f"{'GFLOP':>8} {'MB':>7} {'predicted ms':>13} {'measured ms':>12} {'ratio':>6}"
    )
    for d, expansion, k, batch, sparsity in STEPS:
        config = TrainingConfig(
            tokens=100_000_000,
            expansion=expansion,
            k=k,
            batch_size=batch,
            sparsity=sparsity,
            anneal_share=0.0,
        )
        plan = derive(config, d)
        x = torch.randn(batch, d, device=device())
        trainer = SiteTrainer(plan, x, seed=0)
        cost = step_cost(plan)
        predicted, measured, ratio = compare(
            lambda trainer=trainer, x=x: trainer.step(x, measure=False), cost.seconds
        )
        print(
            f"{d:>6} {plan.d_sae:>6} {k:>4} {batch:>6} {sparsity:<11}{cost.flops / 1e9:>8.1f} "
            f"{cost.bytes_moved / 1e6:>7.0f} {predicted * 1e3:>13.0f} {measured * 1e3:>12.0f} "
            f"{ratio:>6.2f}"
        )


def bench_forward() -> None:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.models.loading import load_model

    print(
        f"{'model':<22} {'precision':<9} {'site':<12} {'MFLOP/token':>12} {'predicted ms':>13} "
        f"{'measured ms':>12} {'ratio':>6}"
    )
    sample = os.environ.get("MISTUDIO_SAMPLE_MODEL")
    for folder in [TINY, *([Path(sample)] if sample else [])]:
        model = load_model(folder, "auto", device())
        shape = shape_of_decoder(model)
        layer = shape.n_layers // 3 or 1
        ids = torch.randint(0, model.vocab_size, (8, 128)).to(model.device)
        point = HookPoint("resid_pre", layer)
        cost = forward_cost(shape, layer, "resid_pre")
        predicted, measured, ratio = compare(
            lambda model=model, ids=ids, point=point: model.capture(ids, [point]), cost.seconds
        )
        print(
            f"{model.architecture:<8} {shape.parameters / 1e6:>7.1f} M     "
            f"{str(model.dtype).removeprefix('torch.'):<9} resid_pre {layer:<2} "
            f"{cost.flops / ids.numel() / 1e6:>12.1f} {predicted * 1e3:>13.1f} "
            f"{measured * 1e3:>12.1f} {ratio:>6.2f}"
        )


# -------------------------------------------------------------------- memory


def bench_memory() -> None:
    print(
        f"{'d_in':>6} {'d_sae':>6} {'batch':>6} {'what else':<26} {'predicted MB':>13} "
        f"{'measured MB':>12} {'ratio':>6}"
    )
    for shape in MEMORY:
        found = fresh_process(shape)
        rest = {k: v for k, v in shape.items() if k not in ("d", "expansion", "batch_size")}
        print(
            f"{shape['d']:>6} {shape['d'] * shape['expansion']:>6} {shape['batch_size']:>6} "
            f"{', '.join(f'{k} {v}' for k, v in rest.items()):<26} "
            f"{found['predicted'] / 2**20:>13.0f} {found['measured'] / 2**20:>12.0f} "
            f"{found['predicted'] / found['measured']:>6.2f}"
        )


def fresh_process(shape: dict[str, Any]) -> dict[str, float]:
    """Predicted and measured bytes of training at `shape`, in a process that did nothing else."""
    child = subprocess.run(
        [sys.executable, __file__, "--memory", json.dumps(shape)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def measure_memory(shape: dict[str, Any]) -> dict[str, float]:
    """Bytes that the real trainer takes at its fullest beyond what torch itself had taken: of
    resident memory, or of the GPU's."""
    values = dict(shape)
    d, steps = values.pop("d"), values.pop("steps", 6)
    torch.set_num_threads(2)
    train(derive(TrainingConfig(tokens=256_000, k=8, batch_size=256, expansion=4), 64), 2)
    plan = derive(TrainingConfig(tokens=1000 * values["batch_size"], **values), d)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        train(plan, steps)
        measured = torch.cuda.max_memory_reserved() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        train(plan, steps)
        measured = status("VmHWM") - before
    memory = site_memory(plan)
    batch = FLOAT * plan.batch_size * d
    return {"predicted": memory.lasting + memory.passing + batch, "measured": measured}


def train(plan: Plan, steps: int) -> SiteTrainer:
    trainer = SiteTrainer(plan, torch.randn(2048, plan.d_in, device=device()), seed=0)
    x = torch.randn(plan.batch_size, plan.d_in, device=device())
    for step in range(steps):
        trainer.step(x, measure=step % 2 == 0)
    return trainer


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# -------------------------------------------------------------------- machines not measured


def print_published() -> None:
    """GPT-2 small, resid_pre 8, eight times as many latents, 20 million tokens, streamed."""
    print(f"{'machine':<30} {'encoder':<9}" + "".join(f"{f'at {u:.0%}':>9}" for u in UTILISATION))
    for machine in PUBLISHED:
        for mixed in (False, True):
            config = TrainingConfig(tokens=20_000_000, mixed_precision=mixed)
            run = RunShape(GPT2_SMALL, (PlannedSite(8, "resid_pre", derive(config, 768)),))
            room = Machine(memory_total=8 * GB, memory_free=6 * GB, disk_free=64 * GB)
            minutes = [
                (plan_run(run, room, published_speed(machine, share)).seconds or 0) / 60
                for share in UTILISATION
            ]
            print(
                f"{machine.name:<30} {'16 bit' if mixed else 'float32':<9}"
                + "".join(f"{m:>5.0f} min" for m in minutes)
            )
    plan = plan_run(run, room)
    print(f"memory of that run: {plan.memory / GB:.2f} GB")


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(measure_memory(json.loads(sys.argv[2]))))
        return
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    began = time.perf_counter()
    speed = probe_device(device())
    print(
        f"{speed.name}, {torch.get_num_threads()} threads, torch {torch.__version__}; probe "
        f"{time.perf_counter() - began:.1f} s: float32 {speed.gemm_flops / 1e9:,.0f} GFLOP/s, "
        f"16 bit {speed.half_flops / 1e9:,.0f}, {speed.bandwidth / 1e9:.0f} GB/s, rows by index "
        f"{speed.gather / 1e9:.0f} GB/s, {speed.launch * 1e6:.1f} us an operation"
    )
    print("\nOne training step\n")
    bench_steps()
    print("\nOne captured batch, 8 windows of 128 tokens\n")
    bench_forward()
    print("\nMemory of training, beyond torch itself, each in a fresh process\n")
    bench_memory()
    print("\nGPT-2 small, resid_pre 8, 6144 latents, 20 M tokens: computed, not measured\n")
    print_published()


if __name__ == "__main__":
    main()
