"""A steering leaves as a file: what is in it steers alike, what does not fit in is refused."""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from journeys import road
from safetensors import safe_open

from mistudio.engine.models.loading import load_tokenizer
from mistudio.engine.sae.files import load_sae
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import ExportVector, Steer
from mistudio.jobs.models import loaded_model
from mistudio.jobs.steering import Recipe, stop_ids
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

PROMPT = "The sea was"
REQUEST: dict[str, Any] = {
    "sae_id": 1,
    "features": [[3, 1.5], [5, -1.0]],
    "prompt": PROMPT,
    "max_new_tokens": 6,
    "seed": 2,
}


FEATURES = f"#3 of {road.POINT} x 1.5, #5 of {road.POINT} x -1"


def export(library: Library, path: Path, format: str, **more: Any) -> JobRecord:
    job = ExportVector({**REQUEST, **more}, str(path), format)
    return run_job(library, job, submit(library, job))


def written(library: Library, path: Path, format: str, **more: Any) -> list[Path]:
    row = export(library, path, format, **more)
    assert row.status == "finished", row.error
    return [Path(name) for name in row.result["files"]]


def vector_of(library: Library) -> torch.Tensor:
    store, _ = open_features(library, newest_run(library, 1))
    largest = store.columns["max_activation"]
    decoder = load_sae(library.path(library.saes.get(1).folder)).dictionary.decoder
    return 1.5 * float(largest[3]) * decoder[3] - float(largest[5]) * decoder[5]


def test_llama_cpps_own_package_reads_the_control_vector(library: Library, tmp_path: Path) -> None:
    """That its directions give the same logits is tested where they are written."""
    row = export(library, tmp_path / "v.gguf", "gguf", layers=(1, 3), scales=(0.5, 1.0))
    assert row.result["files"] == [str(tmp_path / "v.gguf")]
    told = " ".join(row.result["notes"])
    assert "every position" in told and "--control-vector v.gguf" in told
    assert "nats a token (KL)" in told and "it holds × 1." in told
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    assert set(found) == {"direction.1", "direction.3"}
    contents = {name: field.contents() for name, field in reader.fields.items()}
    assert contents["controlvector.model_hint"] == "llama"
    assert contents["controlvector.layer_count"] == 2
    assert contents["mistudio.features"] == FEATURES
    assert "every position" in contents["general.description"]
    model = loaded_model(library, 1)
    recipe = Recipe(library, Steer(**{**REQUEST, "layers": (1, 3)}), model)
    for site in recipe.at(1.0).variant.sites:
        torch.testing.assert_close(found[f"direction.{site.site.layer}"], site.vector)
    (path,) = written(library, tmp_path / "w.gguf", "gguf")
    (tensor,) = gguf.GGUFReader(path).tensors
    assert tensor.name == "direction.1"
    torch.testing.assert_close(torch.from_numpy(np.array(tensor.data)), vector_of(library))


def test_tensors_and_neuronpedias_file_hold_the_sum(library: Library, tmp_path: Path) -> None:
    expected = vector_of(library)
    (path,) = written(library, tmp_path / "v.safetensors", "safetensors")
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == [road.POINT]
        torch.testing.assert_close(file.get_tensor(road.POINT), expected)
        about = file.metadata()
    assert about["model"] == road.MODEL.name
    assert about["features"] == FEATURES
    assert "special tokens were left" in about["positions"]
    (path,) = written(library, tmp_path / "v.json", "neuronpedia")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["modelId"], found["layerNumber"]) == (road.MODEL.name, 2)
    assert (found["hookType"], found["vectorLabel"]) == ("hook_resid_pre", FEATURES)
    torch.testing.assert_close(torch.tensor(found["vector"]), expected)
    row = export(library, tmp_path / "v.json", "neuronpedia", prompt="")
    assert "every position" in (told := " ".join(row.result["notes"])) and "nats" not in told
    assert {p.name for p in tmp_path.glob("v.*")} == {"v.safetensors", "v.json"}


def test_the_program_holds_what_the_generation_was_made_with(
    library: Library, tmp_path: Path
) -> None:
    """That such a program writes the same text is tested where it is made."""
    more = {"scope": "chosen", "positions": (1, 2), "top_k": 50}
    (tmp_path / "steer.safetensors").write_bytes(b"the user's own")
    files = written(library, tmp_path / "steer.py", "python", **more)
    assert [file.name for file in files] == ["steer.py", "steer.py.safetensors"]
    assert (tmp_path / "steer.safetensors").read_bytes() == b"the user's own"
    held = {}
    for line in ast.parse(files[0].read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                held[line.targets[0].id] = ast.literal_eval(line.value)
    model = loaded_model(library, 1)
    tokenizer = load_tokenizer(library.path(library.models.get(1).folder))
    assert held["PROMPT"] == tokenizer(PROMPT)["input_ids"]
    assert held["POINTS"] == [
        {"name": road.POINT, "path": "model.layers.1", "input": False, "edits": []}
    ]
    assert (held["SCOPE"], held["CHOSEN"]) == ("chosen", [1, 2])
    assert (held["TOP_K"], held["SEED"], held["NEW_TOKENS"]) == (50, 2, 6)
    assert held["DTYPE"] == str(next(model.model.parameters()).dtype).removeprefix("torch.")
    assert held["STOP"] == sorted(stop_ids(model, tokenizer))
    assert held["VECTORS"] == "steer.py.safetensors"
    with safe_open(files[1], "pt") as file:
        torch.testing.assert_close(file.get_tensor(road.POINT), vector_of(library))


def test_a_program_takes_along_what_clamping_needs(library: Library, tmp_path: Path) -> None:
    features = [[3, 1.5, "clamp"], [5, 0.0, "ablate"], [7, 1.0]]
    _, beside = written(library, tmp_path / "a.py", "python", features=features, keep_norm=True)
    dictionary = load_sae(library.path(library.saes.get(1).folder)).dictionary
    with safe_open(beside, "pt") as file:
        torch.testing.assert_close(file.get_tensor("0.rows"), dictionary.decoder[[3, 5]])
        torch.testing.assert_close(file.get_tensor("0.encoder"), dictionary.encoder[[3, 5]])
        assert road.POINT in file.keys()  # noqa: SIM118
        assert "#3 of blocks.1.hook_resid_post clamp x 1.5" in file.metadata()["features"]


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("gguf", {"features": [[3, 1.0, "clamp"]]}, "more than a vector"),
        ("gguf", {"keep_norm": True}, "keep norm"),
        ("gguf", {"scope": "last"}, "cannot say where to steer"),
        ("gguf", {"layers": (0, 1)}, "no place for this steering"),
        ("neuronpedia", {"layers": (1, 2)}, "act at one place"),
        ("neuronpedia", {"features": [[3, 0.0]]}, "adds nothing"),
        ("python", {"prompt": " "}, "The prompt is empty"),
        ("python", {"temperature": 9.0}, "temperature must be between"),
        ("python", {"features": [[3, 1.0, "scale"]]}, "adds nothing"),
        ("safetensors", {"features": [[3, 1.0, "clamp"]]}, "more than a vector"),
        ("onnx", {}, "No such format"),
        ("gguf", {"features": [[999, 1.0]]}, "0 to 127"),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(
    library: Library, tmp_path: Path, format: str, change: dict, words: str
) -> None:
    before = set(tmp_path.iterdir())
    row = export(library, tmp_path / "v.out", format, **change)
    assert row.status == "failed" and "traceback" not in row.error, row.error
    assert words in " ".join(map(str, row.error.values()))
    assert set(tmp_path.iterdir()) == before


def test_a_program_never_runs_the_code_of_a_model(library: Library, tmp_path: Path) -> None:
    provenance = library.models.get(1).provenance
    library.models.update(1, provenance={**provenance, "code": {"hash": "1" * 64}})
    row = export(library, tmp_path / "a.py", "python")
    assert row.error["title"] == "This model brings its own program"
    assert not (tmp_path / "a.py").exists()


def test_a_file_in_no_folder_is_refused(library: Library, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "v.gguf", tmp_path, Path("v.gguf")):
        row = export(library, path, "gguf")
        assert "cannot be written there" in row.error["title"], row.error
