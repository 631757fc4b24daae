"""Shards: a killed extraction goes on and ends as if it had never stopped; what is stored is what
the model gave, and the figures about it are right."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mistudio.engine.activations import extraction, statistics
from mistudio.engine.activations.extraction import (
    Layout,
    choose_windows,
    extract,
    unfinished,
)
from mistudio.engine.activations.plan import measured_plan, memory_parts, plan_extraction
from mistudio.engine.activations.positions import OUTLIER_MULTIPLE
from mistudio.engine.activations.shards import STORAGE
from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.activations.statistics import SiteSums
from mistudio.engine.activations.store import StoredActivations
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Cancelled, Silent
from mistudio.engine.training.cost import shape_of_decoder
from mistudio.errors import Incompatible, InvalidInput

A, B = HookPoint("resid_post", 1), HookPoint("mlp_out", 2)
CONTEXT = 64
ASKED = {"max_tokens": 6_000, "context": CONTEXT, "batch_windows": 4}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Blocks of 16 windows, shards of two blocks."""
    monkeypatch.setattr(extraction, "WRITE_BUFFER", 16 * CONTEXT)
    monkeypatch.setattr(extraction, "MOST_SHARDS", 3)


@pytest.fixture(scope="module")
def whole(tiny, tokens, tmp_path_factory):
    """One uninterrupted extraction."""
    folder = tmp_path_factory.mktemp("whole") / "activations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "WRITE_BUFFER", 16 * CONTEXT)
        patch.setattr(extraction, "MOST_SHARDS", 3)
        extract(tiny, tokens, (A, B), folder, **ASKED)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Stops(Silent):
    """Raises at its `at`-th check."""

    def __init__(self, at: int) -> None:
        self.left = at

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Cancelled


class Counts(Silent):
    checks = 0

    def check(self) -> None:
        self.checks += 1


# --- going on -------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(2)
from mistudio.engine.activations import extraction
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import load_model
from mistudio.engine.progress import Silent

class Slow(Silent):
    def check(self):
        time.sleep(0.05)

extraction.WRITE_BUFFER, extraction.MOST_SHARDS = 16 * 64, 3
model, store, folder = sys.argv[1:]
extraction.extract(
    load_model(Path(model), "fp32"), TokenStore(Path(store)),
    (HookPoint("resid_post", 1), HookPoint("mlp_out", 2)), Path(folder),
    max_tokens=6_000, context=64, batch_windows=4, progress=Slow(),
)
"""


def test_a_killed_extraction_goes_on_and_gives_the_same_bytes(
    tiny, tiny_folder, tokens, tmp_path, whole, tmp_path_factory
):
    store = Path(tokens.train._ids.filename).parent
    folder = tmp_path / "activations"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tiny_folder), str(store), str(folder)],
        cwd=Path(__file__).parents[3],
    )
    try:
        end = time.monotonic() + 120
        while not (folder / "train" / "00000").exists():
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        time.sleep(0.1)  # into the next shard
    finally:
        child.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        child.wait()
    assert unfinished(folder) and not (folder / "meta.json").exists()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/[0-9]*[0-9]")}
    assert 0 < len(done) < 4
    counts = Counts()
    extract(tiny, tokens, (A, B), folder, **ASKED, progress=counts)
    assert contents(folder) == contents(whole)
    # Finished shards were not made again.
    assert {path: path.stat().st_mtime_ns for path in done} == done
    complete = Counts()
    extract(tiny, tokens, (A, B), tmp_path / "other", **ASKED, progress=complete)
    assert complete.checks - counts.checks == 8 * len(done)  # batches of a shard
    assert contents(tmp_path / "other") == contents(whole)


@pytest.mark.parametrize("at", [3, 13])
def test_a_stop_anywhere_leaves_whole_shards_only(tiny, tokens, tmp_path, whole, at):
    folder = tmp_path / "activations"
    with pytest.raises(Cancelled):
        extract(tiny, tokens, (A, B), folder, **ASKED, progress=Stops(at))
    assert not list(folder.rglob("*.part")) and not (folder / "meta.json").exists()
    extract(tiny, tokens, (A, B), folder, **ASKED)
    assert contents(folder) == contents(whole)


def test_what_a_power_cut_left_of_a_shard_is_made_again(tiny, tokens, tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "activations")
    (folder / "meta.json").unlink()
    file = folder / "train" / "00001" / f"{A.name}.f16"
    file.write_bytes(file.read_bytes()[:-2])
    shutil.copytree(folder / "train" / "00000", folder / "train" / "00002.part")
    (folder / "train" / "00002" / "shard.json").write_text("{")
    extract(tiny, tokens, (A, B), folder, **ASKED)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"storage": "bf16"}])
def test_shards_of_another_extraction_are_not_used(tiny, tokens, tmp_path, whole, other):
    folder = shutil.copytree(whole, tmp_path / "activations")
    extract(tiny, tokens, (A, B), folder, **(ASKED | other))
    fresh = tmp_path / "fresh"
    extract(tiny, tokens, (A, B), fresh, **(ASKED | other))
    assert contents(folder) == contents(fresh)
    assert contents(folder) != contents(whole)


def test_a_full_disk_is_an_error_and_leaves_what_was_done(tiny, tokens, tmp_path, monkeypatch):
    real = extraction.ShardWriter.append
    calls = []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(self, *arguments)

    monkeypatch.setattr(extraction.ShardWriter, "append", full)
    folder = tmp_path / "activations"
    with pytest.raises(OSError, match="No space"):
        extract(tiny, tokens, (A, B), folder, **ASKED)
    assert [path.name for path in (folder / "train").iterdir()] == ["00000"]
    assert unfinished(folder)


# --- what is stored -------------------------------------------------------------------------------


def captured(tiny, tokens, stored, split, point):
    """The model's own activations of the stored rows, [rows, d]."""
    rows = stored.rows[split]
    windows, at = np.unique(rows["window"].astype(np.int64), return_inverse=True)
    ids = tokens.split(split).windows(windows, CONTEXT)
    found = torch.cat([tiny.capture(part, [point])[point] for part in ids.split(64)])
    return found[at.tolist(), rows["position"].astype(int).tolist()]


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_read_back_is_what_was_captured_to_the_rounding(tiny, tokens, tmp_path, storage):
    folder = tmp_path / "activations"
    meta = extract(tiny, tokens, (A, B), folder, **ASKED, storage=storage)
    stored = StoredActivations(folder)
    assert len(meta.shards["train"]) == 3 and meta.storage == storage
    for point in (A, B):
        scale = meta.scales[point.name]
        assert math.log2(scale) == round(math.log2(scale))  # so that scaling rounds nothing
        for split in ("train", "heldout"):
            want = captured(tiny, tokens, stored, split, point)
            got = stored.read(split, np.arange(len(want)))[point]
            # Windows in another company in a batch differ in the last bits of fp32.
            step = 2.0**-10 if storage == "fp16" else 2.0**-7
            small = 2.0**-24 / scale if storage == "fp16" else 0.0
            assert bool(((got - want).abs() <= step * want.abs() + small + 1e-5).all())
        ids = tokens.train.windows(choose_windows(tokens, CONTEXT, 6_000)["train"][:4], CONTEXT)
        batch = tiny.capture(ids, [point])[point]  # the very first pass again
        rows = stored.rows["train"][: meta.blocks["train"][0]]
        window = int(choose_windows(tokens, CONTEXT, 6_000)["train"][2])
        here = np.flatnonzero(rows["window"] == window)
        want = batch[2][torch.from_numpy(rows["position"][here].astype(int))]
        exact = (want * scale).to(STORAGE[storage]).float() / scale
        assert torch.equal(stored.read("train", here)[point], exact)


def test_fp16_cannot_overflow(monkeypatch):
    for width in (16, 576, 16_384):
        for median in (1e-6, 0.3, 70.0, 3e4, 1e9):
            scale = extraction.scale_of("fp16", width, median)
            largest = torch.tensor(OUTLIER_MULTIPLE * median * scale)
            assert bool(largest.half().isfinite()), (width, median)
            assert 0.5 < median * scale / math.sqrt(width) < 2.0


def test_an_activation_that_is_no_number_is_refused(tiny, tokens, tmp_path):
    weight = tiny.model.get_submodule(tiny.module_path(B)).down_proj.weight
    before = weight[3, 5].item()
    try:
        with torch.no_grad():
            weight[3, 5] = float("nan")
        with pytest.raises(Incompatible, match=r"blocks\.2\.hook_mlp_out they are infinite"):
            extract(tiny, tokens, (A, B), tmp_path / "a", **ASKED)
    finally:
        with torch.no_grad():
            weight[3, 5] = before


def test_rows_know_their_token_and_document(tokens, whole):
    stored = StoredActivations(whole)
    for split in ("train", "heldout"):
        rows, text = stored.rows[split][:], tokens.split(split)
        ids = text.windows(rows["window"].astype(int), CONTEXT).numpy()
        assert np.array_equal(ids[np.arange(len(rows)), rows["position"]], rows["token"])
        for row in rows[:: len(rows) // 97]:
            window, position = int(row["window"]), int(row["position"])
            assert text.document_at(window, position, CONTEXT) == row["document"]


def test_reading_over_shards_is_reading_each(whole):
    stored = StoredActivations(whole)
    n = stored.meta.tokens["train"]
    assert len(stored.meta.shards["train"]) == 3 and sum(stored.meta.shards["train"]) == n
    flat = np.concatenate(
        [
            np.fromfile(whole / "train" / f"{i:05d}" / f"{A.name}.f16", np.float16).reshape(-1, 128)
            for i in range(3)
        ]
    )
    rows = np.random.default_rng(0).integers(0, n, 500)
    want = torch.from_numpy(flat[rows].astype(np.float32)) / stored.meta.scales[A.name]
    assert torch.equal(stored.read("train", rows)[A], want)
    places = stored.rows["train"]
    assert [tuple(places[int(i)]) for i in rows[:9]] == [tuple(p) for p in places[rows[:9]]]
    assert np.array_equal(places["position"][rows], places[rows]["position"])
    assert np.array_equal(places[5:900:7], places[np.arange(5, 900, 7)])


# --- limits ---------------------------------------------------------------------------------------


def test_a_sample_limit_keeps_to_the_first_documents(tiny, tokens, tmp_path):
    meta = extract(
        tiny, tokens, (A,), tmp_path / "a", **(ASKED | {"max_tokens": None}), max_samples=60
    )
    stored = StoredActivations(tmp_path / "a")
    found = np.concatenate([stored.rows[split]["document"] for split in ("train", "heldout")])
    assert found.max() < 60
    # All of their whole windows: what is missing is less than a window a split, and what is left
    # out everywhere.
    everything = choose_windows(tokens, CONTEXT, None)
    inside = sum(
        tokens.split(split).document_at(int(window), CONTEXT - 1, CONTEXT) < 60
        for split in ("train", "heldout")
        for window in everything[split]
    )
    read = sum(meta.tokens.values()) + meta.dropped_special + meta.dropped_outliers
    assert inside * CONTEXT - 2 * CONTEXT <= read <= inside * CONTEXT
    assert meta.limits == {"max_tokens": None, "max_samples": 60}


def test_too_few_samples_are_refused_with_numbers(tokens):
    with pytest.raises(InvalidInput, match="first 2 documents give"):
        choose_windows(tokens, CONTEXT, None, max_samples=2)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 96, 97, 10_000])
def test_shards_divide_the_windows(n):
    layout = Layout(n, CONTEXT, 4)
    assert layout.block_windows == 16 and layout.n_shards <= 3
    assert layout.shard_windows % layout.block_windows == 0
    assert [i for number in range(layout.n_shards) for i in layout.shard(number)] == list(range(n))


# --- figures --------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_rows_and_tokens(tiny, tokens, whole):
    stored = StoredActivations(whole)
    orders = choose_windows(tokens, CONTEXT, 6_000)
    ids = tokens.train.windows(orders["train"].astype(int), CONTEXT)
    special = torch.isin(ids, torch.tensor(tokens.train.meta.special_ids))
    for point in (A, B):
        rows = captured(tiny, tokens, stored, "train", point).double().numpy()
        found = stored.statistics()[point.name]
        assert found.summary["tokens"] == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.variance, rows.var(0), rtol=1e-4)
        norms = np.linalg.norm(rows, axis=1)
        assert found.summary["mean_norm"] == pytest.approx(norms.mean(), rel=1e-5)
        assert found.summary["total_variance"] == pytest.approx(rows.var(0).sum(), rel=1e-4)
        assert found.summary["largest_value"] == pytest.approx(np.abs(rows).max(), rel=1e-5)
        every = torch.cat([tiny.capture(part, [point])[point] for part in ids.split(16)])
        lengths = every.norm(dim=-1)
        np.testing.assert_allclose(found.norm_by_position, lengths.mean(0).numpy(), rtol=1e-4)
        assert (found.tokens_by_position == len(ids)).all()
        usual = ~special
        usual[:, 0] = False
        beyond = usual & (lengths > OUTLIER_MULTIPLE * stored.medians[point])
        assert found.summary["outlier_tokens"] == int(beyond.sum())
        assert found.summary["outlier_share"] == pytest.approx(float(beyond.sum() / usual.sum()))
        assert stored.meta.statistics[point.name] == found.summary
    assert set(stored.meta.definitions) >= {"mean_norm", "variance", "outlier_share"}


def test_a_dimension_that_stands_out_is_named(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 32, generator=generator)
    rows[:, 7] = rows[:, 7] * 20 + 1000  # far off-centre: a sum of squares in fp32 would be wrong
    rows[:, 9] *= 6.6
    sums = SiteSums(32, 8, torch.device("cpu"))
    mask = torch.ones(500, 8, dtype=torch.bool)
    sums.add(rows, rows.norm(dim=1).view(500, 8), mask, mask, ~mask)
    from safetensors.torch import save_file

    save_file(sums.tensors("p"), tmp_path / "a")
    save_file(SiteSums(32, 8, torch.device("cpu")).tensors("p"), tmp_path / "b")
    found = statistics.gathered([tmp_path / "b", tmp_path / "a"], {"p": 32}, 8)["p"]
    assert [i for i, _ in found.summary["outlier_dimensions"]] == [7, 9]
    assert found.summary["outlier_dimensions"][1][1] == pytest.approx(6.6, rel=0.1)
    assert found.summary["outlier_dimension_share"] == 2 / 32
    assert found.variance[7] == pytest.approx(
        float(rows[:, 7].double().var(correction=0)), rel=1e-9
    )


def test_padding_is_not_read(tmp_path):
    sums = SiteSums(4, 3, torch.device("cpu"))
    norms = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
    read = norms < 50
    sums.add(torch.ones(1, 4), norms, read, read, ~read)
    assert sums.position_norm.tolist() == [4.0, 2.0, 0.0]
    assert sums.position_n.tolist() == [2, 1, 0]


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_says_what_the_extraction_does(tiny, tokens, tmp_path, whole):
    orders = choose_windows(tokens, CONTEXT, 6_000)
    plan = measured_plan(
        tiny,
        tokens,
        (A, B),
        orders,
        shape_of_decoder(tiny),
        context=CONTEXT,
        batch_windows=4,
        storage="fp16",
    )
    meta = json.loads((whole / "meta.json").read_text())
    left_out = meta["dropped_special"] + meta["dropped_outliers"]
    rows = sum(meta["tokens"].values())
    assert plan.tokens == rows + left_out
    counts = Counts()
    extract(tiny, tokens, (A, B), tmp_path / "a", **ASKED, progress=counts)
    assert plan.batches == counts.checks
    assert plan.shards == len(list((tmp_path / "a").glob("*/[0-9]*")))
    written = sum(
        path.stat().st_size
        for name in ("*.f16", "rows.bin")
        for path in (tmp_path / "a").rglob(name)
    )
    assert written == plan.disk * rows // plan.tokens
    assert plan.seconds == pytest.approx(plan.batches * plan.batch_seconds) and plan.seconds > 0
    assert plan.memory["model"] == sum(p.numel() * 4 for p in tiny.model.parameters())


def test_memory_does_not_grow_with_the_dataset(tiny, tokens, tmp_path, monkeypatch):
    shape = shape_of_decoder(tiny)
    few, many = (
        plan_extraction({"train": n, "heldout": n}, 64, 4, [128], shape) for n in (99, 10**7)
    )
    assert few.memory == many.memory and many.disk > 10_000 * few.disk
    made = []
    real = extraction._Buffer.__init__

    def noted(self, *arguments):
        real(self, *arguments)
        made.append(sum(v.numel() * v.element_size() for v in self.values.values()))

    monkeypatch.setattr(extraction._Buffer, "__init__", noted)
    extract(tiny, tokens, (A, B), tmp_path / "a", **ASKED)
    layouts = [Layout(n, CONTEXT, 4) for n in (80, 16)]
    planned = memory_parts(layouts, [128, 128], shape)["rows to be written"]
    assert len(made) == 2 and sum(made) == planned - extraction_scratch()


def extraction_scratch() -> int:
    from mistudio.engine.activations.shards import WRITE_ROWS

    return WRITE_ROWS * 2 * 128


def test_medians_of_an_unfinished_extraction_are_kept(tiny, tokens, tmp_path, monkeypatch):
    folder = tmp_path / "activations"
    with pytest.raises(Cancelled):
        extract(tiny, tokens, (A, B), folder, **ASKED, progress=Stops(12))
    medians = json.loads((folder / "manifest.json").read_text())["medians"]
    assert medians == {
        point.name: value
        for point, value in calibrate_medians(tiny, tokens.train, (A, B), CONTEXT).items()
    }
    monkeypatch.setattr(extraction, "calibrate_medians", None)  # not needed any more
    extract(tiny, tokens, (A, B), folder, **ASKED)
