"""SAEs before they are imported, from the Hub, and measured as a training's own are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from journeys import road
from safetensors.torch import save, save_file

from mistudio import credentials
from mistudio.engine.hub import RemoteFile, access, session
from mistudio.engine.hub.saes import peek, sae_repository, saes_among
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import save_sae
from mistudio.engine.sae.site import Site
from mistudio.errors import NotFound
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import DownloadSae, Export, ImportSae, MeasureSae
from mistudio.jobs.sae_preview import guess_model, look, seen_on_hub
from mistudio.library.library import Library
from mistudio.library.records import Sae

D, M = 128, 64
POINT = "blocks.1.hook_resid_post"


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run_job(library, job, submit(library, job))
    assert row.status == "finished", row.error
    return row.result


def a_folder(folder: Path, d: int = D, layer: int = 1, model: str = "tiny") -> Path:
    generator = torch.Generator().manual_seed(d)
    encoder, decoder = (torch.randn(M, d, generator=generator) for _ in range(2))
    dictionary = Dictionary(encoder, torch.zeros(M), decoder, torch.zeros(d), TopK(4))
    site = Site.at(HookPoint("resid_post", layer))
    save_sae(dictionary, folder, site=site, model_name=model, unit_decoder=False)
    (folder / "mistudio.json").unlink()
    return folder


# --- looking ------------------------------------------------------------------------------------


def test_a_look_tells_what_an_import_brings(library: Library, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "theirs")
    before = road.contents(library.root)
    (seen,) = look(folder)
    assert road.contents(library.root) == before
    sae: Sae = library.saes.get(done(library, ImportSae(str(folder)))["sae_ids"][0])
    assert (seen.format, seen.reads, seen.writes, seen.layer) == ("saelens", POINT, POINT, 1)
    assert (seen.d_in, seen.d_sae, seen.architecture, seen.k) == (
        sae.d_in, sae.d_sae, sae.architecture, sae.k)  # fmt: skip
    assert seen.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert seen.problem == ""


def test_a_look_names_what_is_wrong_and_goes_on(tmp_path: Path) -> None:
    a_folder(tmp_path / "run" / "a")
    broken = a_folder(tmp_path / "run" / "b") / "sae_weights.safetensors"
    broken.write_bytes(broken.read_bytes()[:200])
    first, second = look(tmp_path / "run")
    assert first.place == "a" and first.problem == ""
    assert second.place == "b" and second.problem.startswith("The SAE's files are damaged.")


def test_a_download_cache_is_looked_into_by_its_links(tmp_path: Path) -> None:
    real = a_folder(tmp_path / "blobs")
    folder = tmp_path / "snapshot" / "layer_1"
    folder.mkdir(parents=True)
    for file in real.iterdir():
        (folder / file.name).symlink_to(file)
    plain_file = tmp_path / "blobs" / "x.npz"
    plain_file.write_bytes(b"no zip")
    (tmp_path / "snapshot" / "params.npz").symlink_to(plain_file)
    places = [(seen.place, bool(seen.problem)) for seen in look(tmp_path / "snapshot")]
    assert places == [("layer_1", False), ("params.npz", True)]


def test_a_look_can_be_stopped(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        look(a_folder(tmp_path / "one"), stop)


def test_the_model_is_guessed_by_name_then_by_shape(library: Library, tmp_path: Path) -> None:
    tiny = library.models.get(1)
    other = replace(tiny, id=2, name="other", origin="", d_model=64)
    twin = replace(tiny, id=3, name="Twin-Small", origin="")
    (seen,) = look(a_folder(tmp_path / "a", model="nobody"))
    assert guess_model([seen], [tiny, other]) == tiny
    assert guess_model([seen], [tiny, twin]) is None
    (named,) = look(a_folder(tmp_path / "b", model="ada/twin"))
    assert guess_model([named], [tiny, twin]) == twin
    assert "128 channels (nobody); other has 64" in seen.misfit(other)
    (deep,) = look(a_folder(tmp_path / "c", layer=9))
    assert "layer 9; tiny-llama-0.9m has the layers 0 to 3" in deep.misfit(tiny)
    assert "layer 7" in replace(seen, layer=None, deepest=None).misfit(tiny, 7)


# --- the Hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(access, "_provider", credentials.access_for)
    monkeypatch.setattr(credentials, "_typed", {})
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def files_of(folder: Path, inside: str) -> dict[str, bytes]:
    return {f"{inside}/{file.name}": file.read_bytes() for file in folder.iterdir()}


def test_an_sae_of_the_hub_is_seen_then_fetched_then_imported(
    library: Library, tmp_path: Path, hub: HubServer
) -> None:
    files = files_of(a_folder(tmp_path / "theirs"), "layer_1/width_64")
    files |= {"README.md": b"# SAEs", "evil.bin": b"x", "layer_2/other.npz": b"x"}
    hub.add("ada/saes", files, "model", card={"license": "mit"})
    found = sae_repository("ada/saes")
    assert [sae.place for sae in found.saes] == ["layer_1/width_64", "layer_2/other.npz"]
    sae = found.saes[0]
    weights = "layer_1/width_64/sae_weights.safetensors"
    assert sae.bytes == len(files[weights]) + len(files["layer_1/width_64/cfg.json"])
    seen = seen_on_hub(sae, peek("ada/saes", found.revision, sae))
    assert (seen.d_in, seen.d_sae, seen.reads, seen.model_name) == (D, M, POINT, "tiny")
    ends = [int(asked.rpartition("-")[2]) for asked in hub.ranges(weights)]
    assert ends and max(ends) < len(files[weights]) / 2  # the numbers were not fetched
    job = DownloadSae("ada/saes", found.revision, [f.name for f in sae.files], "width_64")
    (sae_id,) = done(library, job)["sae_ids"]
    record = library.saes.get(sae_id)
    assert (record.name, record.source, record.hook_point) == ("width_64", "imported", POINT)
    origin = record.provenance
    assert (origin["repository"], origin["revision"]) == ("ada/saes", found.revision)
    assert origin["path"] == "layer_1/width_64" and origin["licence"] == "mit"
    assert {file["name"] for file in origin["files"]} == {f.name for f in sae.files}
    assert not list((library.root / "work").iterdir())


def test_a_failed_download_leaves_the_library_as_it_was(
    library: Library, tmp_path: Path, hub: HubServer
) -> None:
    files = files_of(a_folder(tmp_path / "wide", d=64), "sae")
    hub.add("ada/saes", files, "model")
    before = road.contents(library.root)
    for names, words in (
        (sorted(files), "for activations of 64 channels (tiny); tiny-llama-0.9m has 128"),
        (["sae/none.safetensors"], "lacks sae/none.safetensors"),
        ([], "lacks the SAE"),
    ):
        job = DownloadSae("ada/saes", "", names, model_id=1)
        row = run_job(library, job, submit(library, job))
        assert row.status == "failed" and words in row.error["what"], row.error
        assert road.contents(library.root) == before


def test_saes_are_told_by_names() -> None:
    names = [
        "a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors",
        "b/sae.safetensors",  # without its cfg.json it is none
        "layers.3/cfg.json", "layers.3/sae.safetensors",
        "L/hyperparams.json", "L/checkpoints/final.safetensors",
        "layer_20/width_16k/average_l0_71/params.npz",
        "res/config.json", "res/params.safetensors",
        "t/ae.pt", "t/config.json", "t/optimizer.pt",
        "model-00001-of-2.safetensors", "plain.safetensors",
    ]  # fmt: skip
    found = {sae.place: sae for sae in saes_among([RemoteFile(name, 10) for name in names])}
    assert {place: sae.format for place, sae in found.items()} == {
        "a": "saelens", "layers.3": "sparsify", "L": "llama_scope",
        "layer_20/width_16k/average_l0_71/params.npz": "gemma_scope",
        "res/params.safetensors": "gemma_scope_2", "t": "dictionary_learning",
        "plain.safetensors": "safetensors",
    }  # fmt: skip
    assert [file.name for file in found["t"].files] == ["t/ae.pt", "t/config.json"]


def test_shapes_speak_where_the_configuration_does_not(library: Library, hub: HubServer) -> None:
    data = save({"encoder.weight": torch.zeros(M, 96), "b": torch.zeros(M)})
    files = {"h.2/sae.safetensors": data, "h.2/cfg.json": json.dumps({"k": 4}).encode()}
    hub.add("ada/odd", files, "model")
    found = sae_repository("ada/odd")
    seen = seen_on_hub(found.saes[0], peek("ada/odd", found.revision, found.saes[0]))
    assert (seen.layer, seen.d_in, seen.channels) == (2, 0, {M, 96})
    tiny = library.models.get(1)
    assert "None of its arrays has the 128 channels" in seen.misfit(tiny)
    assert seen.misfit(replace(tiny, d_model=96)) == ""


# --- measuring ----------------------------------------------------------------------------------


def test_an_imported_sae_is_measured_as_its_run_was(library: Library, tmp_path: Path) -> None:
    """Out of the library and in again, the same figures come out."""
    trained = library.saes.get(1)
    done(library, Export(trained.training_id, str(tmp_path / "out")))
    (sae_id,) = done(library, ImportSae(str(tmp_path / "out"), name="back"))["sae_ids"]
    assert library.saes.get(sae_id).metrics == {}
    training = library.trainings.get(trained.training_id or 0)
    done(library, MeasureSae(sae_id, 1, training.record["job"]["loss_tokens"]))
    found = library.saes.get(sae_id).metrics
    for name in ("tokens", "loss_tokens"):
        assert found.get(name) == trained.metrics.get(name)
    for name in ("fvu", "l0", "dead_share", "cosine", "ce_clean", "ce_sae", "ce_zero", "kl"):
        assert found[name] == pytest.approx(trained.metrics[name], rel=1e-3), name
    assert found["measured"]["tokenization_id"] == training.tokenization_id
    assert found["measured"]["precision"] == training.record["model"]["precision"]


def test_a_measurement_that_fails_leaves_the_metrics(library: Library, tmp_path: Path) -> None:
    (sae_id,) = done(library, ImportSae(str(a_folder(tmp_path / "x"))))["sae_ids"]
    job = MeasureSae(sae_id, 99)
    row = run_job(library, job, submit(library, job))
    assert row.status == "failed" and library.saes.get(sae_id).metrics == {}


def test_plain_files_are_read_by_their_own_words(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(NotFound):
        look(tmp_path)
