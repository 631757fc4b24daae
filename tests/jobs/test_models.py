"""Models brought in whole or not at all; one owner of the memory; quantised models judged."""

from __future__ import annotations

import gc
import json
import math
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from journeys import road
from safetensors.torch import load_file, save_file

from mistudio.jobs import loaded
from mistudio.jobs.control import Control
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import AddModel, CheckQuality
from mistudio.jobs.loaded import (
    kept_with,
    loaded_bytes,
    loaded_model,
    loaded_models,
    tokenizer_of,
    unload_model,
)
from mistudio.library.library import Library


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    unload_model()
    yield
    unload_model()


def ended(library: Library, job: Any) -> Any:
    return run_job(library, job, submit(library, job), Control())


def added(library: Library, precision: str = "fp32", source: Path = road.MODEL) -> int:
    record = ended(library, AddModel(str(source), precision))
    assert record.status == "finished", record.error
    return int(record.result["model_id"])


# --- bringing in ----------------------------------------------------------------------------------


def _nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, {"format": "pt"})


def _bomb(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 10**9}))


def _deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def _tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzzz"] = 5000
    path.write_text(json.dumps(content))


def _header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"{" * 200_000)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nan, "not finite"),
        (_bomb, "num_hidden_layers is 1,000,000,000"),
        (_deep, "nested too deeply"),
        (_tokenizer, "does not match|beyond them"),
        (_header, "header"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_damaged_is_refused_in_words_and_nothing_is_left(
    empty: Library, tmp_path: Path, damage: Any, words: str
) -> None:
    import re

    source = tmp_path / "source"
    shutil.copytree(road.MODEL, source)
    damage(source)
    record = ended(empty, AddModel(str(source)))
    assert record.status == "failed"
    assert re.search(words, f"{record.error['title']} {record.error['what']}")
    assert not record.error.get("traceback")
    assert empty.models.all() == []
    assert not list((empty.root / "models").glob("*/*"))


def test_a_models_record_says_what_its_files_were(empty: Library) -> None:
    import hashlib

    model = empty.models.get(added(empty))
    data = (road.MODEL / "model.safetensors").read_bytes()
    (weights,) = model.provenance["weights"]
    assert weights["bytes"] == len(data)
    assert weights["sha256"] == hashlib.sha256(data).hexdigest()


def test_files_that_are_no_models_are_refused(empty: Library, tmp_path: Path) -> None:
    for name, content in (("a.txt", b"hello"), ("b.gguf", b"hello")):
        path = tmp_path / name
        path.write_bytes(content)
        record = ended(empty, AddModel(str(path)))
        assert record.status == "failed" and not record.error.get("traceback")
        assert name in record.error["what"]
    assert empty.models.all() == []


# --- one owner of the memory ----------------------------------------------------------------------


def test_what_is_kept_with_a_model_is_read_once_and_goes_with_it(empty: Library) -> None:
    first, second = added(empty), added(empty, "bf16")
    one, two = loaded_model(empty, first), loaded_model(empty, second)
    tokenizer = weakref.ref(tokenizer_of(empty, first, one))
    assert tokenizer() is tokenizer_of(empty, first, one)
    assert tokenizer() is not tokenizer_of(empty, second, two)
    made: list[str] = []
    for name in ("a", "b", "a", "c", "a", "b"):  # of a kind the last two stay
        kept_with(one, ("letter", name), lambda name=name: made.append(name))
    assert made == ["a", "b", "c", "b"]
    unload_model(first)
    del one
    gc.collect()
    assert tokenizer() is None


def test_models_are_loaded_once_shown_and_unloaded_on_demand(empty: Library) -> None:
    first, second = added(empty), added(empty, "bf16")
    one, two = loaded_model(empty, first), loaded_model(empty, second)
    assert loaded_model(empty, first) is one and loaded_model(empty, second) is two
    loaded_model(empty, first)
    assert [entry.model_id for entry in loaded_models()] == [first, second]
    size = 857_216
    assert {entry.precision: entry.bytes for entry in loaded_models()} == {
        "fp32": 4 * size,
        "bf16": 2 * size,
    }
    assert loaded_bytes() == 6 * size
    unload_model(first)
    assert [entry.model_id for entry in loaded_models()] == [second]
    unload_model()
    assert loaded_models() == [] and loaded_bytes() == 0


def test_what_was_least_recently_asked_for_makes_room(
    empty: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [added(empty, precision) for precision in ("fp32", "bf16", "fp16")]
    here = loaded.device.current()

    def free(*_args: object) -> Any:  # room for two models
        return type(here)(
            "cpu", "test", 1 << 40, 40_000_000 if len(loaded_models()) < 2 else 1_000_000
        )

    monkeypatch.setattr(loaded.device, "current", free)
    for model_id in (ids[0], ids[1], ids[0], ids[2]):
        loaded_model(empty, model_id)
    assert [entry.model_id for entry in loaded_models()] == [ids[2], ids[0]]


def test_a_model_that_does_not_fit_is_refused_with_the_figures(
    empty: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mistudio.errors import OutOfMemory

    model_id = added(empty)
    here = loaded.device.current()
    monkeypatch.setattr(
        loaded.device, "current", lambda *_: type(here)("cpu", "test", 1 << 40, 2_500_000)
    )
    with pytest.raises(OutOfMemory, match=r"FP32 it needs 4\.2 MB.*2\.4 MB are free.*Choose"):
        loaded_model(empty, model_id)
    assert loaded_models() == []


def test_two_who_ask_at_once_get_the_same_model(empty: Library) -> None:
    model_id = added(empty)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(loaded_model(empty, model_id)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] is found[1] is found[2]


# --- quantised ------------------------------------------------------------------------------------


def test_the_first_load_of_a_quantised_model_records_what_it_costs(empty: Library) -> None:
    model_id = added(empty, "q4")
    decoder = loaded_model(empty, model_id)
    found = empty.models.get(model_id).provenance["quality"]["q4"]
    assert found["verdict"] in ("faithful", "usable") and found["tokens"] > 1000
    assert 0 < found["error"] < 0.1 and abs(found["delta"]) < 0.2
    assert empty.models.get(model_id).provenance["weights"]
    unload_model()
    empty.models.update(model_id, provenance={"quality": {"q4": {**found, "sentence": "kept"}}})
    assert loaded_model(empty, model_id) is not decoder
    assert empty.models.get(model_id).provenance["quality"]["q4"]["sentence"] == "kept"
    assert found["method"].startswith("nf4, blocks of 64 (bitsandbytes ")
    unload_model()
    former = {**found, "sentence": "of another method"}
    del former["method"]
    empty.models.update(model_id, provenance={"quality": {"q4": former}})
    loaded_model(empty, model_id)
    assert empty.models.get(model_id).provenance["quality"]["q4"] == found


def test_checking_again_measures_again_and_plain_models_are_refused(empty: Library) -> None:
    model_id = added(empty, "q2")
    record = ended(empty, CheckQuality(model_id))
    assert record.status == "finished", record.error
    first = record.result["quality"]
    assert first["delta"] > 5 * first["error"] > 0 and first["verdict"] != "faithful"
    again = ended(empty, CheckQuality(model_id)).result["quality"]
    assert again == first
    plain = ended(empty, CheckQuality(added(empty)))
    assert plain.status == "failed" and "not quantised" in plain.error["title"]


def test_activations_and_training_plans_of_a_quantised_model(empty: Library) -> None:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.training.config import TrainingConfig
    from mistudio.jobs.plans import planned

    ids = {precision: added(empty, precision) for precision in ("fp32", "q4")}
    point = HookPoint("resid_post", 2)
    plans = {
        precision: planned(empty, model_id, (point,), TrainingConfig(), "stream")
        for precision, model_id in ids.items()
    }
    weights = {precision: plan.run.model.bytes for precision, plan in plans.items() if plan}
    decoder = loaded_model(empty, ids["q4"])
    taken = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    assert weights["q4"] == taken < weights["fp32"] / 1.5
    found = decoder.capture(torch.arange(64).reshape(1, 64), [point])[point]
    true = loaded_model(empty, ids["fp32"]).capture(torch.arange(64).reshape(1, 64), [point])[point]
    assert (found.float() - true).norm() < 0.3 * true.norm()
