"""miStudio against SAELens: speed, memory, and quality at equal tokens and at equal time.

Two virtual environments, two processes, the same batches on disk. `python3 run.py bench peers`
builds both environments and runs this; options after the name:

  --full             600 steps and 3 seeds instead of 300 and 1
  --steps N --seeds N --widths 2304,4608 --corpora wikipedia,shakespeare --archs batchtopk,topk
  --rates 3e-4,1e-3,3e-3,6e-3 (SAELens searches these)  --k 32  --threads 2
  --parts speed,memory,quality (which measures)  --blocks 5 --block-steps 10 (for speed)
  --fresh            repeat what build/bench/rows/ already holds
  --folder DIR       instead of build/bench
  --device cuda      speed and memory on a GPU

Every finished run is a row of JSON that is not run again, so this can be interrupted at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE / "peers"))

import corpora  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from runs import OURS, PEER, Row, Runs, Settings, fair, say, steps_in  # noqa: E402

STEP_SHAPE = {"d": 768, "width": 6144, "batch": 2048}
LARGE_SHAPE = {"d": 768, "width": 24576, "batch": 4096}
DEAD = 1000
PARTS = ("speed", "memory", "quality")


def parse(arguments: list[str]) -> tuple[Settings, tuple[str, ...]]:
    parser = argparse.ArgumentParser(
        prog="run.py bench peers",
        usage="python3 run.py bench peers [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = {"type": lambda text: tuple(text.split(","))}
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--widths", type=_numbers(int), default=(4608,))
    parser.add_argument("--corpora", default=tuple(corpora.CORPORA), **words)
    parser.add_argument("--archs", default=("batchtopk", "topk"), **words)
    parser.add_argument("--rates", type=_numbers(float), default=(3e-4, 1e-3, 3e-3, 6e-3))
    parser.add_argument("--parts", default=PARTS, **words)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--block-steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    given = parser.parse_args(arguments)
    for name, known in (
        ("corpora", corpora.CORPORA),
        ("archs", ("batchtopk", "topk")),
        ("parts", PARTS),
    ):
        unknown = set(getattr(given, name)) - set(known)
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)} is not one of {', '.join(known)}")
    settings = Settings(
        folder=given.folder.resolve(),
        peers_python=os.environ.get("MISTUDIO_PEERS_PYTHON", "")
        or str(ROOT / ".venv-peers" / "bin" / "python"),
        steps=given.steps or (600 if given.full else 300),
        seeds=given.seeds or (3 if given.full else 1),
        widths=given.widths,
        corpora=given.corpora,
        archs=given.archs,
        rates=given.rates,
        k=given.k,
        batch=2048,
        blocks=given.blocks,
        block_steps=given.block_steps,
        threads=given.threads,
        device=given.device,
        fresh=given.fresh,
    )
    parts = tuple(part for part in given.parts if part != "quality" or given.device == "cpu")
    return settings, parts


def _numbers(kind: type):
    return lambda text: tuple(kind(part) for part in text.split(","))


def compare(runs: Runs, corpus: str, width: int, arch: str) -> report.Comparison:
    """The peer at its best of the rates, on every seed; ours at as many tokens, then at as much
    time as the peer's best run of that seed took."""
    settings = runs.settings
    cell = {"arch": arch, "corpus": corpus, "width": width}
    searched = [
        runs.quality(PEER, **cell, steps=settings.steps, seed=0, lr=lr) for lr in settings.rates
    ]
    rate = min(searched, key=lambda row: fair(row)["fvu"])["lr"]
    # It scales its inputs only on request: the best rate also with raw ones, and the highest,
    # as raw activations are several times as large.
    searched += [
        runs.quality(PEER, **cell, steps=settings.steps, seed=0, lr=lr, inputs="raw")
        for lr in sorted({rate, max(settings.rates)})
    ]
    winner = min(searched, key=lambda row: fair(row)["fvu"])
    best, ours, by_time = {}, {}, {}
    for seed in range(settings.seeds):
        best[seed] = runs.quality(
            PEER, **cell, steps=settings.steps, seed=seed, lr=winner["lr"], inputs=winner["inputs"]
        )
        ours[seed] = runs.quality(OURS, **cell, steps=settings.steps, seed=seed)
        by_time[seed] = as_long(runs, cell, seed, best[seed]["whole_seconds"], ours[seed])
    losing = [row for row in searched if row["key"] != winner["key"]]
    return report.Comparison(corpus, width, arch, losing, best, ours, by_time)


def as_long(runs: Runs, cell: dict, seed: int, seconds: float, row: Row) -> Row:
    """Ours over as many steps as fit into `seconds`; shorter once more where it took longer."""
    steps = steps_in(seconds, row)
    found = runs.quality(OURS, **cell, steps=steps, seed=seed)
    if found["whole_seconds"] > 1.02 * seconds:
        found = runs.quality(OURS, **cell, steps=steps_in(seconds, found), seed=seed)
    return found


def main(arguments: list[str]) -> int:
    settings, parts = parse(arguments)
    if not Path(settings.peers_python).exists():
        say("There is no .venv-peers: `python3 run.py bench peers` makes it.")
        return 1
    torch.set_num_threads(settings.threads)
    runs = Runs(settings)
    gates: list[report.Gate] = []
    speed: list[Row] = []
    memory: list[Row] = []
    comparisons = []
    print(
        f"miStudio {runs.version[OURS]} (torch {torch.__version__}) against SAELens "
        f"{runs.version[PEER]} (torch {runs.peer_torch}), fp32, {settings.threads} threads, "
        f"{platform.processor() or platform.machine()}\n\n{report.DEFINITIONS}"
    )
    if "speed" in parts:
        for arch in settings.archs:
            speed += [runs.speed(arch, **STEP_SHAPE, dead=dead) for dead in (0, DEAD)]
        if settings.device != "cpu":
            speed += [runs.speed(arch, **LARGE_SHAPE, dead=0) for arch in settings.archs]
        gates += report.speed_gates(speed, settings.device)
        print(f"{report.speed_table(speed)}\n", flush=True)
    if "memory" in parts and settings.device == "cpu" and sys.platform != "linux":
        print("Peak memory is not measured: the peak of a process can be reset on Linux only.\n")
    elif "memory" in parts:
        memory = [runs.memory(arch, **LARGE_SHAPE) for arch in settings.archs]
        gates += report.memory_gates(memory)
        print(f"{report.memory_table(memory)}\n", flush=True)
    if "quality" in parts:
        for corpus in settings.corpora:
            say(f"{corpus}: {corpora.CORPORA[corpus]}")
            runs.use(corpus, corpora.activations(corpus, settings.folder))
            for width in settings.widths:
                for arch in settings.archs:
                    comparisons.append(compare(runs, corpus, width, arch))
                    gates += report.quality_gates(comparisons[-1])
                    print(f"{comparisons[-1].name}, k {settings.k}")
                    print(f"{report.quality_table(comparisons[-1])}\n", flush=True)
    print(report.gate_table(gates))
    found = report.as_json(
        json.loads(json.dumps(asdict(settings), default=str)), speed, memory, comparisons, gates
    )
    settings.folder.mkdir(parents=True, exist_ok=True)
    (settings.folder / "peers.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no side stays behind
    try:
        sys.exit(main(sys.argv[1:]))
    except corpora.Unavailable as problem:
        sys.exit(str(problem))
