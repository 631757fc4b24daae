"""Models with a program of their own, from a folder or the Hub, into the library and loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from hub_server import HubServer
from own_models import write_own_model

from mistudio.engine.hub import access, session
from mistudio.engine.models import custom_code
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import Incompatible, UnsupportedModel
from mistudio.jobs.control import Control
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import AddModel
from mistudio.jobs.loaded import loaded_model, loaded_models, own_model, unload_model
from mistudio.jobs.models import code_of
from mistudio.library.library import Library


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    unload_model()
    yield
    unload_model()
    for name in [name for name in sys.modules if name.startswith(custom_code._PACKAGE)]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, custom_code._Finder)]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    return write_own_model(tmp_path / "own-lm", marker)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def ended(library: Library, source: object, code: dict[str, Any] | None = None) -> Any:
    job = AddModel(str(source), "fp32", code or {})
    return run_job(library, job, submit(library, job), Control())


def consent_to(source: object) -> dict[str, Any]:
    code = code_of(str(source))
    assert code is not None
    return json.loads(json.dumps(code.consent().as_dict()))


def refused(library: Library, record: Any, words: str) -> None:
    assert record.status == "failed" and not record.error.get("traceback"), record.error
    assert words in f"{record.error['title']} {record.error['what']}", record.error
    assert library.models.all() == []
    assert not list((library.root / "models").glob("*/*"))


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_refused_without_consent_and_loaded_with_it(
    empty: Library, hub: HubServer, folder: Path, marker: Path, place: str
) -> None:
    source: object = folder
    if place == "hub":
        source = "ada/own-lm"
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        files["extra.py"] = b"raise SystemExit"
        hub.add("ada/own-lm", files, "model")
    record = ended(empty, source)
    refused(empty, record, "never runs such code")
    code = consent_to(source)
    assert code["origin"] in ("ada/own-lm", f"folder {folder}") and not marker.exists()
    assert not list(empty.root.rglob("*.py"))
    record = ended(empty, source, code)
    assert record.status == "finished", record.error
    model = empty.models.get(record.result["model_id"])
    assert model.provenance["code"] == code and (model.n_layers, model.d_model) == (2, 32)
    assert sorted(p.name for p in empty.path(model.folder).glob("*.py")) == list(own_models.CODE)
    if place == "hub":
        assert code["revision"] == hub.repos[("model", "ada/own-lm")].sha
        assert hub.ranges("extra.py") == []
    decoder = loaded_model(empty, model.id)
    point = HookPoint("resid_post", 1)
    assert decoder.capture(torch.arange(8).reshape(1, 8), [point])[point].shape == (1, 8, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "own_layers.py").write_bytes(
            (f / "own_layers.py").read_bytes().replace(b"1e-5", b"1e-4")), "layers.py was changed"),
        (lambda f: (f / "new.py").write_text(""), "new.py was added"),
        (lambda f: (f / "own_layers.py").unlink(), "own_layers.py is not there"),
    ],
    ids=["changed", "added", "missing"],
)  # fmt: skip
def test_what_changed_in_the_library_is_refused_at_the_next_load(
    empty: Library, folder: Path, change: Callable[[Path], object], words: str
) -> None:
    record = ended(empty, folder, consent_to(folder))
    model_id = record.result["model_id"]
    loaded_model(empty, model_id)
    unload_model()
    change(empty.path(empty.models.get(model_id).folder))
    for load in (loaded_model, own_model):
        with pytest.raises(Incompatible, match=words):
            load(empty, model_id)
    assert loaded_models() == []


def test_what_changed_between_the_showing_and_the_adding_is_refused(
    empty: Library, folder: Path, marker: Path
) -> None:
    code = consent_to(folder)
    path = folder / "own_layers.py"
    path.write_text(path.read_text() + "\n")
    refused(empty, ended(empty, folder, code), "own_layers.py was changed")
    assert not marker.exists()


def test_the_commit_that_was_shown_is_the_one_that_is_fetched(
    empty: Library, hub: HubServer, folder: Path, marker: Path
) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.add("ada/own-lm", files, "model")
    code = consent_to("ada/own-lm")
    hub.add("ada/own-lm", {**files, "own_layers.py": files["own_layers.py"] + b"#"}, "model")
    refused(empty, ended(empty, "ada/own-lm", code), "No such revision")
    # A hub that sends other bytes under the old commit's name does not get them run.
    hub.add("ada/own-lm", files, "model")
    hub.sent["own_layers.py"] = files["own_layers.py"].replace(b"1e-5", b"1e-4")
    refused(empty, ended(empty, "ada/own-lm", code), "damaged")
    with pytest.raises(Exception, match="damaged"):
        code_of("ada/own-lm")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"own_layers.py": b"#" * 600_000}, "too long"),
        ({"own_layers.py": None}, "own_layers.py is not there"),
        ({"own_layers.py": b"from ..x import y"}, "leads out"),
        ({"own_layers.py": b"\xff"}, "not UTF-8"),
    ],
    ids=["long", "missing", "out", "bytes"],
)
def test_programs_of_the_hub_that_cannot_be_shown_are_refused_before_they_are_fetched(
    hub: HubServer, folder: Path, files: dict[str, bytes | None], words: str
) -> None:
    there = {file.name: file.read_bytes() for file in folder.iterdir()} | files
    hub.add("ada/own-lm", {k: v for k, v in there.items() if v is not None}, "model")
    with pytest.raises(UnsupportedModel, match=words):
        code_of("ada/own-lm")
    if words == "too long":
        assert hub.ranges("own_layers.py") == []


def test_code_of_another_repository_is_refused_with_the_reason(
    empty: Library, hub: HubServer, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {k: f"eve/other--{v}" for k, v in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    hub.add("ada/own-lm", {f.name: f.read_bytes() for f in folder.iterdir()}, "model")
    for source in (folder, "ada/own-lm"):
        with pytest.raises(UnsupportedModel, match="another repository \\('eve/other'\\)"):
            code_of(str(source))
    assert hub.asked("eve/other") == []


def test_a_program_that_is_not_needed_is_neither_copied_nor_run(
    empty: Library, folder: Path, tmp_path: Path, marker: Path
) -> None:
    known = tmp_path / "known"
    shutil.copytree(own_models.TOKENIZER, known)
    for name in own_models.CODE:
        shutil.copy(folder / name, known / name)
    config = json.loads((known / "config.json").read_text())
    (known / "config.json").write_text(json.dumps({**config, "auto_map": own_models.AUTO_MAP}))
    assert code_of(str(known)) is None
    record = ended(empty, known, consent_to(folder))  # a consent that this model does not need
    assert record.status == "finished", record.error
    model = empty.models.get(record.result["model_id"])
    assert "code" not in model.provenance and not list(empty.root.rglob("*.py"))
    loaded_model(empty, model.id)
    assert not marker.exists()


def test_a_program_that_does_not_work_here_is_not_kept(empty: Library, folder: Path) -> None:
    path = folder / "own_layers.py"
    path.write_text(f"{path.read_text()}\nfrom transformers import NoSuchThing\n")
    refused(empty, ended(empty, folder, consent_to(folder)), "does not work here")


def test_links_out_of_a_models_folder_are_refused(empty: Library, tmp_path: Path) -> None:
    source, secret = tmp_path / "linked", tmp_path / "secret.txt"
    shutil.copytree(own_models.TOKENIZER, source)
    secret.write_text("not for the library")
    (source / "merges.txt").symlink_to(secret)
    refused(empty, ended(empty, source), "leads out of the folder")
