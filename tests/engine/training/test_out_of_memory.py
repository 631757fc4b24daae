"""Memory runs out, really: the run goes on with smaller parts and gives the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistudio.engine.training import step as steps
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.finish import in_parts
from mistudio.engine.training.step import SiteTrainer
from mistudio.errors import explain, is_out_of_memory

# Trains a wide dictionary twice: with all the memory there is, and with so little more than it has
# begun with that batches must be split. Writes what both gave.
SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from mistudio.engine.activations.store import StoredActivations
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.run import train

torch.set_num_threads(1)
stored, out = Path(sys.argv[1]), Path(sys.argv[2])
config = TrainingConfig(
    steps=3, batch_size=2048, width=4096, k=16, context=64, sparsity=sys.argv[3], dead_window=5000
)

def taken():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def limit(size):
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

def run(name, extra):
    rows = []
    result = train(source, config, record=rows.append, heldout_tokens=1024)
    (site,) = result.sites.values()
    d = site.dictionary
    tensors = {"encoder": d.encoder, "decoder": d.decoder, "b_enc": d.b_enc, "b_dec": d.b_dec}
    save_file(tensors, out / f"{name}.safetensors")
    record = {"notes": result.notes, "fvu": site.quality.fvu, "l0": site.quality.l0, "rows": rows}
    (out / f"{name}.json").write_text(json.dumps({**record, "extra": extra}))
    return result.notes

source = StoredActivations(stored)
# A first small run brings everything into memory that stays there; the limited run is the first
# that needs room for whole batches.
train(source, TrainingConfig(steps=2, batch_size=64, width=128, k=4, context=64))
begun = taken()
for extra in (120, 100, 85, 72, 61, 52, 44, 38, 33, 29):
    limit(begun + extra * 2**20)
    if run("limited", extra):
        break
limit(resource.RLIM_INFINITY)
run("free", None)
"""


@pytest.fixture(scope="module")
def stored(tiny, tokens, tmp_path_factory) -> Path:
    from mistudio.engine.activations.store import extract
    from mistudio.engine.models.hooks import HookPoint

    folder = tmp_path_factory.mktemp("activations")
    points = (HookPoint("resid_post", 1),)
    extract(tiny, tokens, points, folder, max_tokens=30_000, context=64)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("sparsity", ["batchtopk", "gated"])
def test_a_run_short_of_memory_goes_on_in_parts_and_gives_the_same(
    stored: Path, tmp_path: Path, sparsity: str
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(stored), str(tmp_path), sparsity],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=Path(__file__).parents[3],
        # every further arena of the allocator reserves address space, which is what is limited
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert child.returncode == 0, child.stderr
    limited, free = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("limited", "free")
    )
    assert free["notes"] == []
    assert "Out of memory: the batch is now worked through in " in limited["notes"][0]
    assert limited["fvu"] == pytest.approx(free["fvu"], rel=1e-3)
    assert limited["l0"] == pytest.approx(free["l0"], rel=1e-3)
    for a, b in zip(limited["rows"], free["rows"], strict=True):
        assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("limited", "free"))
    for name, value in theirs.items():
        difference = (ours[name] - value).norm() / value.norm()
        assert float(difference) < 1e-3, name


def test_finishing_takes_fewer_rows_where_memory_runs_out() -> None:
    seen: list[int] = []

    def compute(part: slice) -> list[int]:
        seen.append(part.stop - part.start)
        if part.stop - part.start > 150:
            raise MemoryError
        return list(range(part.start, part.stop))

    found = [row for _, rows in in_parts(compute, 1000, 600) for row in rows]
    assert found == list(range(1000))  # every row once, in order
    assert seen[:4] == [600, 300, 150, 150]
    with pytest.raises(MemoryError):
        list(in_parts(lambda part: compute(slice(0, 999)), 1000, 600))
    with pytest.raises(RuntimeError, match="a bug"):
        list(in_parts(_bug, 1000, 600))


def _bug(part: slice) -> None:
    raise RuntimeError("a bug")


def test_parts_are_halved_down_to_64_rows() -> None:
    plan = derive(TrainingConfig(steps=10, batch_size=512, k=4, gradient_accumulation=2), 24)
    trainer = SiteTrainer(plan, torch.randn(256, 24), 0)
    parts = [trainer.parts]
    while trainer.split():
        parts.append(trainer.parts)
    assert parts == [2, 4, 8]


def test_parts_hold_less_than_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Watched(SiteTrainer):
        def _entries(self, *args):
            for rows, entries in super()._entries(*args):
                held.append(rows.stop - rows.start)
                yield rows, entries

    plan = derive(TrainingConfig(steps=10, batch_size=512, k=4), 24)
    trainer = Watched(plan, torch.randn(1024, 24), 0)
    trainer.step(torch.randn(512, 24))
    for _ in range(3):
        trainer.split()
    trainer.step(torch.randn(512, 24))
    assert held == [512] + 8 * [64]


def test_a_reinitialisation_that_runs_out_of_memory_can_be_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainingConfig(steps=100, batch_size=256, expansion=4, k=4, dead_window=1000)
    plan = derive(config, 24)
    batches = [torch.randn(256, 24, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    smooth, bumpy = (SiteTrainer(plan, batches[0], 0) for _ in range(2))
    for batch in batches[:10]:
        smooth.step(batch)
        bumpy.step(batch)
    for trainer in (smooth, bumpy):
        trainer.encoder[:20] = 0
        trainer.b_enc[:20] = -100
        trainer.tokens_since_fired[:20] = 5000
    smooth.step(batches[10])
    assert smooth.revived >= 20
    before = bumpy.state()

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(steps, "_directions", fail)
        with pytest.raises(MemoryError):
            bumpy.step(batches[10])
    for name, value in bumpy.state().items():
        assert torch.equal(before[name], value), name
    bumpy.step(batches[10])
    for name, value in smooth.state().items():
        assert torch.equal(value, bumpy.state()[name]), name


def test_every_kind_of_failed_allocation_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    known = [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 6.53 GB)"),
    ]
    for exc in known:
        assert is_out_of_memory(exc), exc
        assert explain(exc).title == "Out of memory"
    for exc in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError(1)):
        assert not is_out_of_memory(exc)
