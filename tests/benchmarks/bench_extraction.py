"""Extraction to disk against the bare forward pass to the same depth, its memory and its time
against the plan.

Blocks of both alternate in one process, so that a busy machine disturbs both alike; every block of
the extraction is a whole one, with its start and the last flushing to the disk, which no pass
hides: a quarter of a second, a twentieth of a block of 8 passes. MISTUDIO_SAMPLE_MODEL names a
model folder; without it the tests' tiny model is measured, whose passes are so short that they say
little. `--memory JSON` is one memory measurement, for a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mistudio.engine.activations import extraction  # noqa: E402
from mistudio.engine.activations.extraction import write_activations  # noqa: E402
from mistudio.engine.activations.plan import ExtractionPlan, measured_plan  # noqa: E402
from mistudio.engine.activations.source import calibrate_medians  # noqa: E402
from mistudio.engine.datasets.documents import Document  # noqa: E402
from mistudio.engine.datasets.sources import read_documents  # noqa: E402
from mistudio.engine.datasets.token_writer import write_token_store  # noqa: E402
from mistudio.engine.datasets.tokens import TokenStore  # noqa: E402
from mistudio.engine.models import loading  # noqa: E402
from mistudio.engine.models.hooks import HookedDecoder, HookPoint  # noqa: E402
from mistudio.engine.progress import SILENT  # noqa: E402
from mistudio.engine.training.cost import shape_of_decoder  # noqa: E402

TINY = ROOT / "tests" / "data" / "tiny-llama-0.9m"
CORPUS = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
CONTEXT, BATCH = 128, 8
PASSES = int(os.environ.get("BENCH_PASSES", "32"))  # of a block
BLOCKS = int(os.environ.get("BENCH_BLOCKS", "3"))
OWN_PASSES = 96  # three blocks of the store
MB = 1024**2


def model_folder() -> Path:
    return Path(os.environ.get("MISTUDIO_SAMPLE_MODEL") or TINY)


def token_store(folder: Path) -> TokenStore:
    from itertools import islice

    tokenizer = loading.load_tokenizer(model_folder())
    documents: list[Document] = list(islice(read_documents(CORPUS), 1500))
    write_token_store(
        documents,
        tokenizer,
        folder,
        bos_id=loading.adds_bos(tokenizer),
        separator_id=loading.separator_id(tokenizer),
        special_ids=sorted(loading.special_ids(tokenizer)),
        tokenizer_hash="benchmark",
    )
    return TokenStore(folder)


def sites(decoder: HookedDecoder) -> list[tuple[str, tuple[HookPoint, ...]]]:
    layers = [[10], [0, 10, 20, 29]] if decoder.n_layers == 30 else [[1], [0, 1, 2, 3]]
    found = [
        (f"resid_post {','.join(map(str, some))}", tuple(HookPoint("resid_post", i) for i in some))
        for some in layers
    ]
    middle = layers[0][0]
    four = tuple(HookPoint(s, middle) for s in ("attn_out", "mlp_in", "mlp_out", "resid_post"))
    return [*found, (f"four sites of layer {middle}", four)]


class Watch:
    """Seconds since it was made: on the wall, and of the processor in all threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


Seconds = tuple[float, float]


def bare(
    decoder: HookedDecoder, store: TokenStore, deepest: HookPoint, order: np.ndarray
) -> Seconds:
    """The forward passes alone, to the same depth: an exception ends each there."""

    class Enough(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Enough

    block = decoder.model.get_submodule(decoder.module_path(HookPoint("resid_post", deepest.layer)))
    handle = block.register_forward_hook(stop)
    watch = Watch()
    for start in range(0, len(order), BATCH):
        ids = store.train.batch(order[start : start + BATCH], CONTEXT)
        try:
            with torch.inference_mode():
                decoder.model(input_ids=ids.to(decoder.device), use_cache=False)
        except Enough:
            pass
    if decoder.device.type == "cuda":
        torch.cuda.synchronize()
    handle.remove()
    return watch.read()


def stored(
    decoder: HookedDecoder,
    store: TokenStore,
    medians: dict[HookPoint, float],
    order: np.ndarray,
    folder: Path,
) -> Seconds:
    """A whole extraction of these windows, until all is flushed to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    watch = Watch()
    write_activations(
        decoder,
        store,
        medians,
        folder,
        {"train": order, "heldout": order[:0]},
        context=CONTEXT,
        batch_windows=BATCH,
        precision="",
        seed=0,
        progress=SILENT,
    )
    return watch.read()


class Replayed:
    """A decoder whose forward pass takes no time but a copy of what it once gave: what is left of
    an extraction is its own work."""

    def __init__(self, decoder: HookedDecoder) -> None:
        self._decoder = decoder
        self._given: dict[int, dict[HookPoint, torch.Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def capture(self, ids: torch.Tensor, points: Any) -> dict[HookPoint, torch.Tensor]:
        if len(ids) not in self._given:
            self._given[len(ids)] = self._decoder.capture(ids, points)
        return {point: values.clone() for point, values in self._given[len(ids)].items()}


def throughput(decoder: HookedDecoder, store: TokenStore, folder: Path) -> None:
    print(
        f"extraction of {PASSES} passes of {BATCH} x {CONTEXT} tokens against the bare forward "
        f"pass to the same depth, median of {BLOCKS} alternations\n"
        "share: of the bare pass's speed, by the clock and by processor time; own work: all but "
        f"the model's pass (which is replayed), a pass over {OWN_PASSES} passes with their "
        "flushing, and what share that leaves of the bare pass's speed\n"
        f"{'sites':<24} {'bare tok/s':>11} {'stored tok/s':>13} {'share':>7} {'of CPU':>7} "
        f"{'plan/real':>9} {'own work':>9} {'leaves':>7}"
    )
    order = np.arange(PASSES * BATCH, dtype=np.uint32)
    for name, points in sites(decoder):
        medians = calibrate_medians(decoder, store.train, points, CONTEXT)
        stored(decoder, store, medians, order[:BATCH], folder)  # warm
        plan = planned(decoder, store, points, order)
        both: list[tuple[Seconds, Seconds]] = []
        for turn in range(BLOCKS):  # who is first changes
            if turn % 2:
                after = stored(decoder, store, medians, order, folder)
                both.append((bare(decoder, store, max(points), order), after))
            else:
                first = bare(decoder, store, max(points), order)
                both.append((first, stored(decoder, store, medians, order, folder)))
        n = len(order) * CONTEXT
        shares = [statistics.median(b[i] / s[i] for b, s in both) for i in (0, 1)]
        seconds = [statistics.median(pair[i][0] for pair in both) for i in (0, 1)]
        replayed: Any = Replayed(decoder)
        long = np.arange(OWN_PASSES * BATCH, dtype=np.uint32)
        own = [stored(replayed, store, medians, long, folder)[0] for _ in range(BLOCKS)]
        each = statistics.median(own[1:]) / OWN_PASSES
        least = min(pair[0][0] for pair in both) / PASSES
        print(
            f"{name:<24} {n / seconds[0]:>11,.0f} {n / seconds[1]:>13,.0f} {shares[0]:>7.1%} "
            f"{shares[1]:>7.1%} {(plan.seconds or 0.0) / seconds[1]:>9.2f} "
            f"{1000 * each:>6.1f} ms {least / (least + each):>7.1%}",
            flush=True,
        )


def planned(
    decoder: HookedDecoder, store: TokenStore, points: tuple[HookPoint, ...], order: np.ndarray
) -> ExtractionPlan:
    return measured_plan(
        decoder,
        store,
        points,
        {"train": order, "heldout": order[:0]},
        shape_of_decoder(decoder),
        context=CONTEXT,
        batch_windows=BATCH,
        storage="fp16",
    )


# -------------------------------------------------------------------- memory


def resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def memory(asked: dict[str, Any]) -> None:
    """Peak of a whole extraction in this process, after the model is loaded, and its plan."""
    import ctypes

    extraction.WRITE_BUFFER = asked["buffer"]
    decoder = loading.load_model(model_folder(), asked["precision"])
    store = TokenStore(Path(asked["store"]))
    points = tuple(HookPoint.parse(name) for name in asked["points"])
    order = np.arange(asked["passes"] * BATCH, dtype=np.uint32)
    medians = calibrate_medians(decoder, store.train, points, CONTEXT)
    plan = planned(decoder, store, points, order)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    stored(decoder, store, medians, order, Path(asked["folder"]))
    print(json.dumps({"peak": resident("VmHWM"), "plan": plan.memory_bytes, "parts": plan.memory}))


def memories(decoder: HookedDecoder, store_folder: Path, folder: Path) -> None:
    cases = [(name, points, 12) for name, points in sites(decoder)]
    cases.insert(1, (cases[0][0], cases[0][1], 36))  # three times the text
    print(
        f"\nmemory in MB at the fullest moment\n{'sites':<24} {'tokens':>8} {'plan':>7} {'peak':>7}"
    )
    for name, points, passes in cases:
        asked = {
            "precision": "fp32",
            "store": str(store_folder),
            "points": [point.name for point in points],
            "passes": passes,
            "buffer": 4096,
            "folder": str(folder),
        }
        command = [sys.executable, __file__, "--memory", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:<24} {passes * BATCH * CONTEXT:>8,} {found['plan'] / MB:>7,.0f} "
            f"{found['peak'] / MB:>7,.0f}  {found['plan'] / found['peak'] - 1:+.1%}",
            flush=True,
        )


def main() -> None:
    if "--memory" in sys.argv:
        memory(json.loads(sys.argv[sys.argv.index("--memory") + 1]))
        return
    torch.set_num_threads(min(2, torch.get_num_threads()))
    decoder = loading.load_model(model_folder(), "fp32")
    parameters = sum(p.numel() for p in decoder.model.parameters())
    print(f"model of {parameters / 1e6:.0f} million parameters, fp32, {decoder.device.type}")
    with tempfile.TemporaryDirectory() as work:
        store = token_store(Path(work) / "tokens")
        if "--only-memory" not in sys.argv:
            throughput(decoder, store, Path(work) / "activations")
        if sys.platform == "linux" and decoder.device.type == "cpu":
            memories(decoder, Path(work) / "tokens", Path(work) / "activations")


if __name__ == "__main__":
    main()
