"""Two processes learn what one learns, stop where one stops, and end when one of them ends.

The processes run this very file. Trainers are compared in float64, where rounding leaves nothing to
hide behind; whole runs as they are, in float32.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistudio.engine.activations.hybrid import HybridActivations
from mistudio.engine.activations.source import LiveActivations
from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import load_model
from mistudio.engine.progress import Interrupted, Silent
from mistudio.engine.training import checkpoints, distributed
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.distributed import World
from mistudio.engine.training.run import Saving, TrainedRun, train
from mistudio.engine.training.step import SiteTrainer
from mistudio.errors import InvalidInput, ProcessLost

ROOT = Path(__file__).parents[3]
POINTS = (HookPoint("mlp_in", 1), HookPoint("mlp_out", 1))
SPARSITIES = ("batchtopk", "topk", "jumprelu")
# 40 steps with all that a run has: warm-up and decay, annealing, latents that die and come back
SMALL = TrainingConfig(
    steps=40,
    batch_size=128,
    expansion=2,
    k=3,
    context=64,
    dead_window=1000,
    anneal_share=0.3,
    autosave_minutes=0,
)
STREAMED = replace(SMALL, steps=12)
ALL = ("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated")
WIRINGS = ("sae", "skip_transcoder")
# Norms of differences against norms of weights.
EXACT = 1e-10  # in float64, after 12 steps
# In float32, after 40 steps: 2e-5, and 1e-3 where an entry at its threshold came to lie on the
# other side of it. One process gets the same when it works through its batches in two parts.
ROUNDING = 5e-3
SECONDS = 120  # until a test gives up on processes that hang


# --- what the processes do ------------------------------------------------------------------------


class QuitsAfter(Silent):
    """The application quits when so many steps are done."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, -1

    def check(self) -> None:
        if self.done >= self.steps:
            raise Interrupted

    def report(self, done, total=None, phase=None, **metrics) -> None:
        self.done = done if phase == "train" else -1


def stored(folder: Path) -> StoredActivations:
    return StoredActivations(folder / "activations").select(POINTS[:1])


def streamed(folder: Path) -> LiveActivations:
    told = json.loads((folder / "streamed.json").read_text())
    model = load_model(Path(told["model"]), "fp32")
    # Fills of 70 windows: nine forward passes, of which the second process runs four.
    return LiveActivations(model, TokenStore(Path(told["tokens"])), POINTS[:1], 64, 8, 70 * 64)


def write(path: Path, result: TrainedRun, rows: list[dict[str, Any]]) -> None:
    """What the first process has of a run."""
    (site,) = result.sites.values()
    tensors = {"frequencies": site.frequencies.float()}
    for part in (site.dictionary, site.dictionary.activation):
        tensors |= {n: t.contiguous() for n, t in vars(part).items() if isinstance(t, Tensor)}
    save_file(tensors, path.with_suffix(".safetensors"))
    about = {
        "steps": [row["step"] for row in rows],
        "dead": [row["dead"] for row in rows],
        "loss": [row["loss"] for row in rows],
        "fvu": site.quality.fvu,
        "revived": site.revived,
        "calibration": site.calibration_tokens,
        "tokens": result.tokens,
        "stopped": result.stopped,
    }
    path.with_suffix(".json").write_text(json.dumps(about))


def learn(folder: Path, out: Path, world: World, **options: Any) -> None:
    """All runs that are compared."""
    for sparsity in SPARSITIES:
        run(stored(folder), out / sparsity, replace(SMALL, sparsity=sparsity, **options), world)
    run(streamed(folder), out / "streamed", replace(STREAMED, **options), world)


def run(source: Any, out: Path, config: TrainingConfig, world: World, **options: Any) -> TrainedRun:
    rows: list[dict[str, Any]] = []
    result = train(source, config, record=rows.append, world=world, **options)
    assert bool(result.sites) == bool(rows) == (world.rank == 0)
    if world.rank == 0:
        write(out, result, rows)
    return result


def trainers(out: Path, world: World) -> None:
    """Trainers without a run around them, in float64, and what each process then holds: after
    steps with and without AuxK, and one that revives dead latents."""
    torch.set_default_dtype(torch.float64)
    config = replace(SMALL, expansion=4, k=4)
    own = distributed.own_rows(world, 128)
    for sparsity in ALL:
        for wiring in WIRINGS:
            plan = derive(replace(config, sparsity=sparsity, wiring=wiring), 24, 24)
            numbers = torch.Generator().manual_seed(5)
            data = torch.randn(14, 2, 128, 24, generator=numbers)
            y = None if wiring == "sae" else data[:, 1]
            trainer = SiteTrainer(plan, data[12, 0], 0, None if y is None else y[12], world)
            trainer.encoder[:20], trainer.b_enc[:20] = 0, -100
            trainer.tokens_since_fired[:20] = 5000
            for step in range(12):
                trainer.step(data[step, 0][own], None if y is None else y[step][own])
            assert trainer.revived == 20
            save_file(trainer.state(), out / f"{sparsity}-{wiring}-{world.rank}.safetensors")
    torch.set_default_dtype(torch.float32)


def wishes(folder: Path, out: Path, world: World) -> None:
    """Only the first process is asked; all of them stop at the same step."""
    first = world.rank == 0
    asked = 0

    def enough() -> bool:
        nonlocal asked
        asked += 1
        return first and asked == 7

    stopped = run(stored(folder), out / "stopped", SMALL, world, wants_finish=enough)
    (out / f"stopped-{world.rank}").write_text(str(stopped.tokens))
    saving = Saving(out / "checkpoints")
    with pytest.raises(Interrupted):
        progress = QuitsAfter(15 if first else 3)
        train(stored(folder), SMALL, progress=progress, saving=saving, world=world)
    world.told(None)  # until the checkpoint is written
    checkpoint, _ = checkpoints.newest(out / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 15
    run(stored(folder), out / "resumed", SMALL, world, resume=checkpoint)


def loses_one(folder: Path, out: Path, world: World, how: str) -> None:
    """The second process ends in the midst of the run; what the first one is told."""

    class Fails(StoredActivations):
        reads = 0

        def read(self, split, rows):
            Fails.reads += split == "train"
            if world.rank == 1 and Fails.reads == 30:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise MemoryError
            return super().read(split, rows)

    source = Fails(folder / "activations").select(POINTS[:1])
    try:
        train(source, SMALL, saving=Saving(out / how), world=world)
    except ProcessLost as exc:
        (out / f"{how}.txt").write_text(str(exc))
    except MemoryError:
        assert world.fail("It has no memory left.")


def main(task: str, folder: Path, out: Path) -> None:
    world = distributed.from_environment()
    torch.set_num_threads(1)
    if task == "learn":
        trainers(out, world)
        learn(folder, out, world)
        wishes(folder, out, world)
    loses_one(folder, out, world, "killed" if task == "killed" else "fails")


# --- what comes of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny, tiny_folder, tokens, tmp_path_factory) -> Path:
    made: Path = tmp_path_factory.mktemp("two")
    (made / "activations").mkdir()
    extract(tiny, tokens, POINTS, made / "activations", max_tokens=12_000, context=64)
    told = {"model": str(tiny_folder), "tokens": str(Path(tokens.train._ids.filename).parent)}
    (made / "streamed.json").write_text(json.dumps(told))
    return made


def environment(**more: str) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if sys.platform != "linux":
        del told["GLOO_SOCKET_IFNAME"]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {**os.environ, **ours, **told, **more}


def two(task: str, folder: Path, out: Path) -> tuple[list[int], str]:
    """Two processes as a launcher starts them, but nobody who ends them; their exit codes and
    what they wrote to stderr."""
    shared = environment(WORLD_SIZE="2")
    with ExitStack() as stack:
        said = stack.enter_context((out / "said").open("w+"))
        started = []
        for rank in ("0", "1"):
            process = subprocess.Popen(
                [sys.executable, __file__, task, str(folder), str(out)],
                env={**shared, "RANK": rank, "LOCAL_RANK": rank},
                stderr=said,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        codes = [process.wait(timeout=SECONDS) for process in started]
        return codes, (out / "said").read_text()


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("alone")
    learn(folder, out, distributed.ALONE)
    return out


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("together")
    codes, said = two("learn", folder, out)
    assert codes == [0, 0], said
    assert said == ""
    return out


def differences(one: Path, other: Path) -> dict[str, float]:
    expected, found = load_file(one), load_file(other)
    assert expected.keys() == found.keys()
    return {
        name: float((value.double() - found[name]).norm() / value.double().norm().clamp_min(1e-30))
        for name, value in expected.items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    worst = differences(one.with_suffix(".safetensors"), other.with_suffix(".safetensors"))
    assert max(worst.values()) < ROUNDING, worst
    expected = json.loads(one.with_suffix(".json").read_text())
    found = json.loads(other.with_suffix(".json").read_text())
    for name in ("steps", "calibration", "tokens", "stopped"):
        assert expected[name] == found[name], name
    for name in ("loss", "fvu"):
        assert found[name] == pytest.approx(expected[name], rel=ROUNDING), name
    for name in ("dead", "revived"):
        assert found[name] == pytest.approx(expected[name], abs=1), name


@pytest.mark.parametrize("name", [*SPARSITIES, "streamed"])
def test_two_processes_learn_what_one_learns(alone, together, name) -> None:
    assert_same_run(alone / name, together / name)


def test_the_runs_had_dead_latents_that_came_back(alone) -> None:
    for name in ("batchtopk", "topk"):
        about = json.loads((alone / f"{name}.json").read_text())
        assert about["revived"] > 0
        assert max(about["dead"]) > 0


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("trained")
    trainers(out, distributed.ALONE)
    return out


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("sparsity", ALL)
def test_a_step_of_two_processes_is_a_step_of_one(
    trained_alone, together, sparsity, wiring
) -> None:
    name = f"{sparsity}-{wiring}"
    worst = differences(trained_alone / f"{name}-0.safetensors", together / f"{name}-0.safetensors")
    assert max(worst.values()) < EXACT, worst
    first, second = (load_file(together / f"{name}-{rank}.safetensors") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_both_processes_stop_when_the_first_one_is_told(together) -> None:
    assert [(together / f"stopped-{rank}").read_text() for rank in range(2)] == [str(7 * 128)] * 2
    assert json.loads((together / "stopped.json").read_text())["stopped"]


def test_an_interrupted_run_goes_on_with_as_many_processes(alone, together) -> None:
    worst = differences(alone / "batchtopk.safetensors", together / "resumed.safetensors")
    assert max(worst.values()) < ROUNDING, worst


def test_and_with_fewer(alone, together, folder, tmp_path) -> None:
    (checkpoint,) = (c for c in checkpoints.listing(together / "checkpoints") if c.step == 15)
    run(stored(folder), tmp_path / "resumed", SMALL, distributed.ALONE, resume=checkpoint)
    worst = differences(alone / "batchtopk.safetensors", tmp_path / "resumed.safetensors")
    assert max(worst.values()) < ROUNDING, worst


def assert_kept(folder: Path) -> None:
    checkpoint, _ = checkpoints.newest(folder)
    assert checkpoint is not None and 0 < checkpoint.step < SMALL.steps


def test_one_that_cannot_go_on_tells_the_first_one_why(together) -> None:
    lost = (together / "fails.txt").read_text()
    assert lost.startswith("Another process of this run has ended.")
    assert "Process 1: It has no memory left." in lost
    assert_kept(together / "fails")


def test_where_one_is_killed_the_other_ends_too(folder, tmp_path) -> None:
    codes, said = two("killed", folder, tmp_path)
    assert codes == [0, -signal.SIGKILL]
    assert said == ""
    assert "It did not say why" in (tmp_path / "killed.txt").read_text()
    assert_kept(tmp_path / "killed")


# --- what needs no other process ------------------------------------------------------------------


class OneOf:
    """A process that cannot talk."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_without_a_launcher_a_process_is_alone(monkeypatch) -> None:
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert distributed.from_environment() is distributed.ALONE
    monkeypatch.setenv("RANK", "3")  # set by other software too
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.from_environment() is distributed.ALONE
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert distributed.from_environment() is distributed.ALONE


SHARED = [(2, 128, True), (2, 136, False), (3, 128, False), (3, 96, True)]


@pytest.mark.parametrize(("size", "batch", "good"), SHARED)
def test_a_batch_that_cannot_be_divided_is_refused(folder, size, batch, good) -> None:
    world: Any = OneOf(1, size)
    if good:
        distributed.check_batch(world, batch)
        return
    with pytest.raises(InvalidInput, match=f"multiple of {8 * size}, such as"):
        train(stored(folder), replace(SMALL, batch_size=batch), world=world)


def test_shares_make_up_the_batch(folder) -> None:
    with stored(folder).batches(96, 3) as stream:
        whole = [next(stream)[POINTS[0]] for _ in range(3)]
        state = stream.state()
    for size in (2, 3):
        shares = [stored(folder).batches(96, 3, world=OneOf(r, size)) for r in range(size)]
        for batch in whole:
            parts = [next(share)[POINTS[0]] for share in shares]
            assert torch.equal(torch.cat(parts), batch)
        for share in shares:  # where they are does not depend on how many there are
            assert share.state() == state
            share.close()


def test_the_rows_that_set_thresholds_do_not_depend_on_the_number_of_processes() -> None:
    for batch in (128, 256, 512, 2048):
        for d_sae in (48, 2**16):
            config = replace(SMALL, batch_size=batch, width=d_sae, k=4)
            trainer = SiteTrainer(derive(config, 8), torch.randn(64, 8), 0)
            rows = torch.arange(batch)
            seen = trainer._stride(batch, distributed.ALONE)
            for size in (2, 4):
                each = batch // size
                assert trainer._stride(each, OneOf(0, size)) == seen
                assert torch.equal(
                    torch.cat([part[::seen] for part in rows.split(each)]), rows[::seen]
                )


def test_turns_with_the_model_are_for_one_process(tiny, tokens, tmp_path) -> None:
    source = HybridActivations(lambda: tiny, tokens, POINTS[:1], 64, tmp_path, 2000)
    with pytest.raises(InvalidInput, match="take turns"):
        source.batches(128, 0, world=OneOf(0, 2))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
