"""Importing others' SAEs into the library, using them there, and exporting in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from journeys import road
from safetensors.torch import load_file, save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import load_sae, save_sae
from mistudio.engine.sae.site import Site
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Discover, Export, ImportSae, Steer
from mistudio.library.library import Library

D, M = 128, 64
AT = Site.at(HookPoint("resid_post", 1))
ACROSS = Site.across_mlp(HookPoint("mlp_in", 1))
FIXTURES = Path(__file__).parents[1] / "data" / "sae_fixtures"


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run_job(library, job, submit(library, job))
    assert row.status == "finished", row.error
    return row.result


def refused(library: Library, job: Any, words: str) -> None:
    """The job fails with these words and leaves the library as it was."""
    before = road.contents(library.root)
    row = run_job(library, job, submit(library, job))
    assert row.status == "failed"
    assert "traceback" not in row.error, row.error
    assert words in " ".join([row.error["title"] + ".", row.error["what"], row.error["next_step"]])
    assert row.error["next_step"]
    assert road.contents(library.root) == before


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def a_folder(folder: Path, site: Site = AT, activation: Any = None, d: int = D) -> Path:
    """A SAELens folder from elsewhere, its decoder's rows far from unit norm."""
    dictionary = Dictionary(
        3 * random(M, d, seed=1),
        0.1 * random(M, seed=2),
        5 * random(M, d, seed=3),
        random(d, seed=4),
        activation or JumpReLU(0.2 + random(M, seed=5).abs()),
        centre=torch.zeros(d) if site.is_transcoder else None,
    )
    save_sae(dictionary, folder, site=site, model_name="tiny", unit_decoder=False)
    (folder / "mistudio.json").unlink()
    return folder


def sparsify(folder: Path, hookpoint: str, transcode: bool = False, k: int = 4) -> Path:
    place = folder / hookpoint
    place.mkdir(parents=True)
    tensors = {
        "encoder.weight": random(M, D, seed=1),
        "encoder.bias": random(M, seed=2),
        "W_dec": random(M, D, seed=3),
        "b_dec": random(D, seed=4),
    }
    save_file(tensors, place / "sae.safetensors")
    config = {"num_latents": M, "k": k, "d_in": D, "transcode": transcode}
    (place / "cfg.json").write_text(json.dumps(config))
    return folder


def listing(root: Path) -> list[tuple[str, bytes]]:
    return sorted((str(p), p.read_bytes()) for p in root.rglob("*") if p.is_file())


# --- import ---------------------------------------------------------------------------------------


def test_an_imported_sae_stands_beside_the_trained_ones(library: Library, tmp_path: Path) -> None:
    source = a_folder(tmp_path / "theirs")
    before = listing(source)
    (sae_id,) = done(library, ImportSae(str(source)))["sae_ids"]
    sae = library.saes.get(sae_id)
    assert (sae.training_id, sae.model_id, sae.source) == (None, 1, "imported")
    assert (sae.name, sae.hook_point, sae.layer) == ("theirs", "blocks.1.hook_resid_post", 1)
    assert (sae.hook_point_out, sae.wiring) == (sae.hook_point, "sae")
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.k) == ("jumprelu", D, M, 0.0)
    assert sae.provenance["path"] == str(source)
    assert sae.provenance["format"] == "saelens"
    want, got = load_sae(source).dictionary, load_sae(library.path(sae.folder)).dictionary
    x = random(20, D, seed=9) * 10
    assert got.encode(x).dense().equal(want.encode(x).dense())
    assert torch.allclose(got.reconstruct(x), want.reconstruct(x), rtol=1e-5, atol=1e-5)
    assert listing(source) == before


def test_every_hookpoint_of_a_folder_becomes_one(library: Library, tmp_path: Path) -> None:
    sparsify(tmp_path / "run", "layers.2")
    sparsify(tmp_path / "run", "layers.1.mlp", transcode=True, k=7)
    ids = done(library, ImportSae(str(tmp_path / "run"), 1, "EAI"))["sae_ids"]
    first, second = map(library.saes.get, ids)
    assert first.name == "EAI blocks.1.mlp.hook_in"
    assert (first.hook_point_out, first.wiring, first.k) == (
        "blocks.1.hook_mlp_out",
        "transcoder",
        7,
    )
    assert (second.name, second.wiring) == ("EAI blocks.2.hook_resid_post", "sae")


def test_names_stay_apart(library: Library, tmp_path: Path) -> None:
    source = a_folder(tmp_path / "theirs")
    for name in ("theirs", "theirs (2)", "theirs (3)"):
        (sae_id,) = done(library, ImportSae(str(source)))["sae_ids"]
        assert library.saes.get(sae_id).name == name
    run = library.trainings.get(1).name
    (sae_id,) = done(library, ImportSae(str(source), name=run))["sae_ids"]
    assert library.saes.get(sae_id).name == f"{run} (2)"


def test_where_the_files_do_not_say_the_user_does(library: Library, tmp_path: Path) -> None:
    shutil.copytree(
        FIXTURES / "dictionary-learning-AutoEncoderTopK" / "files" / "trainer_0", tmp_path / "dl"
    )
    config = json.loads((tmp_path / "dl" / "config.json").read_text())
    config["trainer"] |= {"submodule_name": None, "layer": 2}
    (tmp_path / "dl" / "config.json").write_text(json.dumps(config))
    grown = {
        "encoder.weight": random(M, D, seed=1),
        "encoder.bias": random(M, seed=2),
        "decoder.weight": random(D, M, seed=3),
        "b_dec": random(D, seed=4),
        "k": torch.tensor(5),
        "threshold": torch.tensor(-1.0),
    }
    torch.save(grown, tmp_path / "dl" / "ae.pt")
    path = str(tmp_path / "dl")
    refused(library, ImportSae(path), "Say it with --site NAME.")
    refused(library, ImportSae(path, layer=1, site="mlp_out"), "says layer 2; layer 1 was asked")
    (sae_id,) = done(library, ImportSae(path, site="mlp_out"))["sae_ids"]
    sae = library.saes.get(sae_id)
    assert (sae.hook_point, sae.k) == ("blocks.2.hook_mlp_out", 5)
    assert isinstance(load_sae(library.path(sae.folder)).dictionary.activation, TopK)


def test_what_the_user_says_may_not_contradict_the_files(library: Library, tmp_path: Path) -> None:
    path = str(a_folder(tmp_path / "theirs"))
    refused(library, ImportSae(path, layer=2), "says layer 1; layer 2 was asked for")
    refused(library, ImportSae(path, site="mlp_out"), "says resid_post; mlp_out was asked for")
    done(library, ImportSae(path, layer=1, site="resid_post"))


def test_an_sae_of_another_model_is_refused(library: Library, tmp_path: Path) -> None:
    narrow = a_folder(tmp_path / "narrow", d=16)
    refused(library, ImportSae(str(narrow)), "for activations of 16 channels (tiny)")
    deep = a_folder(tmp_path / "deep", Site.at(HookPoint("resid_post", 9)))
    refused(library, ImportSae(str(deep)), "is for layer 9; tiny-llama-0.9m has the layers 0 to 3")


def test_a_model_must_be_there_and_known(library: Library, empty: Library, tmp_path: Path) -> None:
    path = str(a_folder(tmp_path / "theirs"))
    refused(empty, ImportSae(path), "the library has no model yet")
    refused(library, ImportSae(path, model_id=7), "No model with number 7")


def test_of_several_models_the_one_the_files_name_is_taken(
    library: Library, tmp_path: Path
) -> None:
    model = library.models.get(1)
    library.models.add(
        **{
            key: getattr(model, key)
            for key in ("source", "precision", "n_layers", "d_model", "parameters",
                        "bytes", "summary", "provenance")
        },
        name="other",
        origin="someone/other",
        folder="models/other",
    )  # fmt: skip
    source = a_folder(tmp_path / "theirs")
    refused(library, ImportSae(str(source)), "Its files name tiny; the library has 2 'other', 1")
    config = json.loads((source / "cfg.json").read_text())
    config["metadata"]["model_name"] = f"someone/{model.name.upper()}-small"
    (source / "cfg.json").write_text(json.dumps(config))
    (sae_id,) = done(library, ImportSae(str(source)))["sae_ids"]
    assert library.saes.get(sae_id).model_id == 1


def test_one_bad_sae_among_good_ones_brings_none(library: Library, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        a_folder(tmp_path / "run" / f"layer{number}", Site.at(HookPoint("resid_post", number)))
    weights = tmp_path / "run" / "layer3" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(library, ImportSae(str(tmp_path / "run")), "damaged")


def test_what_is_no_sae_is_refused(library: Library, tmp_path: Path) -> None:
    refused(library, ImportSae(str(tmp_path / "nowhere")), "does not exist")
    (tmp_path / "empty").mkdir()
    refused(library, ImportSae(str(tmp_path / "empty")), "holds no SAE")
    refused(library, ImportSae(str(tmp_path), format="onnx"), "'onnx' is not known")


# --- using them -----------------------------------------------------------------------------------


def test_an_imported_sae_is_discovered_and_steered_with(library: Library, tmp_path: Path) -> None:
    (sae_id,) = done(library, ImportSae(str(a_folder(tmp_path / "theirs"))))["sae_ids"]
    refused(library, Discover(sae_id, 2000), "Name a dataset")
    result = done(library, Discover(sae_id, 2000, dataset_id=1))
    run = library.feature_runs.get(result["feature_run_id"])
    assert run.tokenization_id == library.trainings.get(1).tokenization_id
    assert run.n_features == M and result["alive"] > 0
    steer = Steer(sae_id, [[0, 2.0]], "Once upon a time", max_new_tokens=3)
    generation = library.generations.get(done(library, steer)["generation_id"])
    assert generation.result["hook_point"] == "blocks.1.hook_resid_post"
    assert generation.result["median_norm"] > 0
    library.discard("saes", sae_id)
    assert (
        library.feature_runs.of_sae(sae_id) == []
        if hasattr(library.feature_runs, "of_sae")
        else True
    )


def test_a_transcoder_steers_what_it_writes_to(library: Library, tmp_path: Path) -> None:
    source = a_folder(tmp_path / "theirs", ACROSS)
    (sae_id,) = done(library, ImportSae(str(source)))["sae_ids"]
    done(library, Discover(sae_id, 2000, dataset_id=1))
    steer = Steer(sae_id, [[0, 2.0]], "Once upon a time", max_new_tokens=3)
    generation = library.generations.get(done(library, steer)["generation_id"])
    assert generation.result["hook_point"] == "blocks.1.hook_mlp_out"


# --- export ---------------------------------------------------------------------------------------


def test_an_imported_sae_is_exported_by_itself(library: Library, tmp_path: Path) -> None:
    (sae_id,) = done(library, ImportSae(str(a_folder(tmp_path / "theirs"))))["sae_ids"]
    for format in ("saelens", "safetensors"):
        job = Export(None, str(tmp_path / format), format, sae_id)
        assert job.title(library) == f"Export theirs as {format}"
        (place,) = done(library, job)["folders"]
        assert Path(place).exists()
    theirs = load_file(tmp_path / "theirs" / "sae_weights.safetensors")
    ours = load_file(tmp_path / "saelens" / AT.name / "sae_weights.safetensors")
    assert all(theirs[name].equal(ours[name]) for name in theirs)


def test_a_run_is_exported_as_plain_safetensors(library: Library, tmp_path: Path) -> None:
    (place,) = done(library, Export(1, str(tmp_path / "out"), "safetensors"))["folders"]
    assert Path(place) == tmp_path / "out" / f"{road.POINT}.safetensors"
    assert (tmp_path / "out" / "README.txt").is_file()


def test_what_a_format_cannot_hold_leaves_nothing_behind(library: Library, tmp_path: Path) -> None:
    (sae_id,) = done(library, ImportSae(str(a_folder(tmp_path / "theirs"))))["sae_ids"]
    refused(library, Export(None, str(tmp_path / "out"), "sparsify", sae_id), "only TopK")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
