"""Every real kind of job on the tiny trained model and real text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from journeys import road

from mistudio.engine.datasets.documents import Documents
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.sae.files import load_sae
from mistudio.jobs.control import Control, Snapshot
from mistudio.jobs.features import open_features
from mistudio.jobs.job import JobContext, run_job, submit
from mistudio.jobs.kinds import (
    AddDataset,
    AddModel,
    AddSampleDataset,
    Discover,
    Export,
    Extract,
    Steer,
    Tokenize,
    Train,
    job_from_row,
)
from mistudio.jobs.models import loaded_model, unload_model
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

POINT = road.POINT


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run(library, job)
    assert row.status == "finished", row.error
    return row.result


def refused(library: Library, job: Any, words: str) -> None:
    """The job fails with these words and leaves the library as it was."""
    before = road.contents(library.root)
    row = run(library, job)
    assert row.status == "failed"
    assert "traceback" not in row.error, row.error
    assert words in " ".join([row.error["title"] + ".", row.error["what"], row.error["next_step"]])
    assert road.contents(library.root) == before


# --- datasets -------------------------------------------------------------------------------------


def test_a_local_file_becomes_a_dataset_with_its_provenance(empty: Library, tmp_path: Path) -> None:
    path = road.write_texts(tmp_path / "some.jsonl", 30)
    result = done(empty, AddDataset(str(path), name="Encyclopedia"))
    dataset = empty.datasets.get(result["dataset_id"])
    expected = [row["text"] for row in road.texts(30)]
    assert [d.text for d in Documents(empty.path(dataset.folder))] == expected
    assert (dataset.name, dataset.source, dataset.origin) == ("Encyclopedia", "local", str(path))
    assert dataset.documents == 30
    assert dataset.characters == sum(map(len, expected))
    assert len(dataset.provenance["sha256"]) == 64


def test_bad_rows_are_skipped_where_asked_counted_and_named(empty: Library, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one"}\nbroken\n{"text": "three"}\n{"n": 4}\n')
    refused(empty, AddDataset(str(path)), "some.jsonl, line 2")
    result = done(empty, AddDataset(str(path), skip_bad_rows=True))
    assert (result["skipped"], result["skipped_rows"]) == (2, ["some.jsonl:2", "some.jsonl:4"])
    dataset = empty.datasets.get(result["dataset_id"])
    assert (dataset.documents, dataset.provenance["skipped_rows"]) == (2, 2)


def test_the_sample_text_is_added_once(empty: Library) -> None:
    first = done(empty, AddSampleDataset())["dataset_id"]
    assert done(empty, AddSampleDataset())["dataset_id"] == first
    (dataset,) = empty.datasets.all()
    assert "CC BY-SA" in dataset.provenance["licence"]
    with road.CORPUS.open(encoding="utf-8") as lines:
        assert dataset.documents == sum(1 for _ in lines)


def test_tokens_are_made_once_for_a_dataset_and_a_tokenizer(
    library: Library, tmp_path: Path
) -> None:
    first = done(library, Tokenize(1, 1))["tokenization_id"]
    assert library.tokenizations.count() == 1  # made when the library was built
    # A second model with the same tokenizer shares them; one with another tokenizer does not.
    twin = done(library, AddModel(str(road.MODEL)))["model_id"]
    assert done(library, Tokenize(1, twin))["tokenization_id"] == first
    shutil.copytree(road.MODEL, tmp_path / "other")
    config = tmp_path / "other" / "tokenizer_config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))
    other = done(library, AddModel(str(tmp_path / "other")))["model_id"]
    assert done(library, Tokenize(1, other))["tokenization_id"] != first
    assert library.tokenizations.count() == 2


def test_two_jobs_that_make_the_same_tokens_at_once_share_them(library: Library) -> None:
    library.discard("trainings", 1)
    library.discard("extractions", 1)
    library.discard("tokenizations", 1)
    inner: list[int] = []

    def listen(snapshot: Snapshot) -> None:
        if not inner:  # in the middle of the first job, a second one does all of it
            inner.append(0)
            inner[0] = done(library, Tokenize(1, 1))["tokenization_id"]

    row = run(library, Tokenize(1, 1), listener=listen)
    assert (row.status, row.result["tokenization_id"]) == ("finished", inner[0]), row.error
    assert library.tokenizations.count() == 1
    road.check_whole(library.root)


def test_a_token_store_says_what_it_was_made_of(library: Library) -> None:
    (tokenization,) = library.tokenizations.all()
    store = TokenStore(library.path(tokenization.folder))
    assert store.meta.documents_sha256 == library.datasets.get(1).provenance["sha256"]
    assert store.meta.tokenizer_hash == tokenization.tokenizer_hash
    assert tokenization.statistics["split_tokens"] == store.meta.tokens
    assert tokenization.statistics["documents"] == library.datasets.get(1).documents


# --- models ---------------------------------------------------------------------------------------


def test_a_local_folder_becomes_a_model_that_needs_the_folder_no_more(
    empty: Library, tmp_path: Path
) -> None:
    shutil.copytree(road.MODEL, tmp_path / "mine")
    (tmp_path / "mine" / "pytorch_model.bin").write_bytes(b"pickle")
    model = empty.models.get(done(empty, AddModel(str(tmp_path / "mine"), "fp32"))["model_id"])
    shutil.rmtree(tmp_path / "mine")
    assert (model.name, model.source, model.precision) == ("mine", "local", "fp32")
    assert (model.n_layers, model.d_model, model.parameters) == (4, 128, 857_216)
    assert not (empty.path(model.folder) / "pytorch_model.bin").exists()
    decoder = loaded_model(empty, model.id)
    assert decoder.dtype == torch.float32
    assert loaded_model(empty, model.id) is decoder
    unload_model()


def test_an_unknown_precision_is_refused(empty: Library) -> None:
    refused(empty, AddModel(str(road.MODEL), "fp8"), "'fp8' is not one of auto")


def test_a_name_that_is_neither_folder_nor_repository_is_refused(empty: Library) -> None:
    refused(empty, AddModel("/no/such/model"), "neither a folder here nor")


# --- activations ----------------------------------------------------------------------------------


def test_extraction_stores_the_models_activations_and_their_places(library: Library) -> None:
    from mistudio.engine.activations.store import StoredActivations

    points = ["blocks.3.hook_resid_post", "blocks.0.hook_resid_post"]
    result = done(library, Extract(1, 1, points, max_tokens=3000, context=64))
    record = library.extractions.get(result["extraction_id"])
    assert record.hook_points == points[::-1]
    stored = StoredActivations(library.path(record.folder))
    model = loaded_model(library, 1)
    tokens = TokenStore(library.path(library.tokenizations.get(1).folder))
    rows = stored.rows["heldout"]
    ids = tokens.heldout.windows([int(rows[0]["window"])], 64)
    for point in stored.points:
        true = model.capture(ids, (point,))[point][0, int(rows[0]["position"])].float()
        kept = next(iter(stored.select((point,)).heldout(1, 1)))[point][0]
        assert torch.allclose(kept, true, rtol=2e-3, atol=2e-3 * float(true.abs().max()))
    files = library.path(record.folder).rglob("*")
    assert result["bytes"] == sum(
        f.stat().st_size for f in files if f.is_file() and f.name != ".no-record-yet"
    )
    assert result["tokens"] == sum(map(len, stored.rows.values()))


def test_too_little_text_is_refused_before_anything_is_kept(
    library: Library, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Call me Ishmael. " * 40)
    dataset = done(library, AddDataset(str(tmp_path / "short.txt")))["dataset_id"]
    done(library, Tokenize(dataset, 1))
    refused(library, Extract(1, dataset, [POINT]), "needs at least 8 windows of 128 tokens")


@pytest.mark.parametrize("layer", [4, 400])
def test_a_layer_that_the_model_does_not_have_is_refused(library: Library, layer: int) -> None:
    name = f"blocks.{layer}.hook_resid_post"
    refused(library, Extract(1, 1, [name]), f"has the layers 0 to 3; {layer} was asked")
    refused(library, Train(1, 1, [name]), f"has the layers 0 to 3; {layer} was asked")


# --- training -------------------------------------------------------------------------------------


def check_run(library: Library, training_id: int, config: dict[str, Any]) -> dict[str, Any]:
    """What every run must have kept; its record is returned."""
    training = library.trainings.get(training_id)
    folder = library.path(training.folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["job"]["config"] == config == training.config
    assert record["model"]["name"] == road.MODEL.name
    assert record["dataset"]["provenance"]["sha256"]
    assert {"mistudio", "python", "torch", "transformers"} <= set(record["versions"])
    assert record["tokens"] > 0 and record["tokens_per_second"] > 0
    saes = library.saes.of_training(training_id)
    assert set(record["sites"]) == {sae.hook_point for sae in saes}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for sae in saes:
        saved = load_sae(library.path(sae.folder))
        assert saved.hook_point.name == sae.hook_point
        assert (saved.dictionary.d_in, saved.dictionary.d_sae) == (128, sae.d_sae)
        assert saved.record["plan"]["config"]["seed"] == config.get("seed", 0)
        history = [row for row in rows if row["site"] == sae.hook_point]
        assert len(history) >= 2
        assert history[-1]["tokens"] == record["tokens"]
        assert {"loss", "fvu", "l0", "dead", "learning_rate"} <= set(history[0])
        assert 0 < sae.metrics["explained_variance"] < 1
        assert sae.metrics["ce_zero"] > sae.metrics["ce_clean"]
        assert sae.metrics["median_norm"] > 0
    return record


def test_streamed_training_of_two_layers_gives_two_saes(library: Library) -> None:
    phases: list[str] = []

    def listen(snapshot: Snapshot) -> None:
        if snapshot.phase not in phases:
            phases.append(snapshot.phase)

    job = Train(1, 1, ["blocks.2.hook_resid_post", "blocks.0.hook_mlp_out"], {**road.QUICK})
    row = run(library, job, listener=listen)
    assert (row.status, row.result["status"]) == ("finished", "completed"), row.error
    record = check_run(library, row.result["training_id"], road.QUICK)
    assert record["source"] == "streamed"
    saes = library.saes.of_training(row.result["training_id"])
    assert [(sae.hook_point, sae.layer) for sae in saes] == [
        ("blocks.0.hook_mlp_out", 0),
        ("blocks.2.hook_resid_post", 2),
    ]
    assert phases == ["tokenize", "load model", "train", "evaluate"]
    assert library.trainings.get(row.result["training_id"]).job_id == row.id


def test_training_from_stored_activations_gives_an_sae(library: Library) -> None:
    (extraction,) = library.extractions.all()
    job = Train(1, 1, [POINT], {**road.QUICK, "seed": 3}, extraction.id, "From the store")
    result = done(library, job)
    record = check_run(library, result["training_id"], job.config)
    assert record["source"] == "stored activations"
    training = library.trainings.get(result["training_id"])
    assert (training.name, training.extraction_id) == ("From the store", extraction.id)


def test_the_same_seed_gives_the_same_dictionary(library: Library) -> None:
    (extraction,) = library.extractions.all()
    job = Train(1, 1, [POINT], {**road.QUICK, "tokens": 2000}, extraction.id, loss_tokens=256)
    decoders = []
    for _ in range(2):
        (sae,) = library.saes.of_training(done(library, job)["training_id"])
        decoders.append(load_sae(library.path(sae.folder)).dictionary.decoder)
    assert torch.equal(*decoders)


def test_training_that_is_stopped_early_keeps_a_usable_sae(library: Library) -> None:
    control = Control()
    contexts: list[JobContext] = []

    def listen(snapshot: Snapshot) -> None:
        if snapshot.phase == "train" and contexts[0].metrics and contexts[0].metrics.since(0):
            control.finish_early()

    (extraction,) = library.extractions.all()
    job = Train(1, 1, [POINT], {**road.QUICK, "tokens": 400_000}, extraction.id)
    row = run(library, job, control=control, listener=listen, on_start=contexts.append)
    assert (row.status, row.result["status"]) == ("finished", "stopped"), row.error
    training = library.trainings.get(row.result["training_id"])
    assert training.status == "stopped"
    assert training.record["stopped"] is True
    assert 0 < training.record["tokens"] < 400_000
    (sae,) = library.saes.of_training(training.id)
    saved = load_sae(library.path(sae.folder))
    codes = saved.dictionary.encode(torch.randn(10, 128) * sae.metrics["median_norm"] / 11)
    assert torch.isfinite(codes.values).all()
    assert done(library, Discover(sae.id, max_tokens=1000, top_k=2))["alive"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"k": 5000}}, "Target L0 must be between"),
        ({"config": {"k": 128, "expansion": 1}}, "The target L0 is too large"),
        ({"config": {"colour": 1}}, "There is no option 'colour'"),
        ({"hook_points": ["blocks.2.hook_resid_post"], "extraction_id": 1}, "lack a layer"),
        ({"config": {"context": 8192}}, "windows of 8192 tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    library: Library, change: dict[str, Any], words: str
) -> None:
    refused(
        library, Train(**{"model_id": 1, "dataset_id": 1, "hook_points": [POINT], **change}), words
    )


def test_activations_of_another_dataset_are_refused(library: Library, tmp_path: Path) -> None:
    text = road.write_texts(tmp_path / "other.jsonl", 60)
    dataset = done(library, AddDataset(str(text)))["dataset_id"]
    done(library, Tokenize(dataset, 1))
    refused(library, Train(1, dataset, [POINT], {}, 1), "was made from other inputs")


# --- discovery and steering -----------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False])
def test_discovery_finds_every_latents_strongest_examples(library: Library, stored: bool) -> None:
    if not stored:
        library.trainings.update(1, extraction_id=None)
    (sae,) = library.saes.all()
    result = done(library, Discover(sae.id, max_tokens=4000, top_k=3))
    run_ = library.feature_runs.get(result["feature_run_id"])
    store, tokens = open_features(library, run_)
    assert len(store) == run_.n_features == 128
    assert result["alive"] == int(store.alive.sum()) > 100
    dictionary = load_sae(library.path(sae.folder)).dictionary
    model = loaded_model(library, 1)
    for feature in store.alive.nonzero()[0][:5].tolist():
        examples = store.examples(feature, tokens)
        assert [e.activation for e in examples] == sorted(
            (e.activation for e in examples), reverse=True
        )
        best = examples[0]
        point = load_sae(library.path(sae.folder)).hook_point
        activations = model.capture(tokens.windows([best.window], 64), (point,))[point]
        codes = dictionary.encode(activations[0, best.position][None].float())
        value = codes.values[codes.latents == feature]
        assert value.item() == pytest.approx(best.activation, rel=0.03)


def test_a_new_discovery_stands_beside_the_old_one(library: Library) -> None:
    old = library.feature_runs.newest_of_sae(1)
    new = done(library, Discover(1, max_tokens=1000, top_k=2))["feature_run_id"]
    assert old is not None and old.id != new
    assert library.path(old.folder).is_dir()
    newest = library.feature_runs.newest_of_sae(1)
    assert newest is not None and newest.id == new


@pytest.mark.parametrize(("option", "value"), [("top_k", 0), ("top_k", 5000), ("max_tokens", 0)])
def test_discovery_out_of_range_is_refused(library: Library, option: str, value: int) -> None:
    refused(
        library, Discover(1, **{option: value}), f"{option.replace('_', ' ')} must be between 1"
    )


def test_strength_zero_changes_no_token_and_no_probability(library: Library) -> None:
    job = Steer(1, [[3, 0.0]], "The sea was", max_new_tokens=12, seed=4)
    generation = library.generations.get(done(library, job)["generation_id"])
    (variant,) = generation.result["variants"]
    assert variant["ids"] == generation.result["unsteered_ids"]
    assert variant["text"] == generation.result["unsteered"]
    assert variant["kl_per_token"] == 0
    assert variant["perplexity_ratio"] == pytest.approx(1)
    assert variant["percent_of_norm"] == 0


def test_steering_changes_the_text_and_is_kept_with_its_request(library: Library) -> None:
    job = Steer(1, [[3, 2.0], [5, -1.0]], "The sea was", max_new_tokens=8, scales=(1.0, 2.0))
    generation = library.generations.get(done(library, job)["generation_id"])
    weak, strong = generation.result["variants"]
    assert 0 < weak["kl_per_token"] < strong["kl_per_token"]
    assert strong["ids"] != generation.result["unsteered_ids"]
    assert strong["percent_of_norm"] == pytest.approx(2 * weak["percent_of_norm"])
    assert job_from_row("steer", generation.request) == job
    same = done(library, job)["generation_id"]
    again = library.generations.get(same).result
    assert [v["ids"] for v in again["variants"]] == [weak["ids"], strong["ids"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": []}, "No feature chosen"),
        ({"features": [[128, 1.0]]}, "128"),
        ({"features": [[-1, 1.0]]}, "-1"),
        ({"prompt": "  "}, "The prompt is empty"),
        ({"temperature": 9.0}, "temperature must be between 0 and 2"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    library: Library, change: dict[str, Any], words: str
) -> None:
    values = {"sae_id": 1, "features": [[3, 1.0]], "prompt": "Hello", "max_new_tokens": 2}
    refused(library, Steer(**{**values, **change}), words)


def test_steering_before_discovery_is_refused(library: Library) -> None:
    library.discard("feature_runs", 1)
    refused(library, Steer(1, [[3, 1.0]], "Hello"), "has no discovery pass")


# --- export ---------------------------------------------------------------------------------------


def test_an_export_is_a_complete_copy_that_loads(library: Library, tmp_path: Path) -> None:
    (tmp_path / "new" / "place").mkdir(parents=True)
    for place in ("other", "new/place"):  # a folder may be there, if it is empty
        (folder,) = done(library, Export(1, str(tmp_path / place)))["folders"]
        original = library.path(library.saes.get(1).folder)
        assert Path(folder) == tmp_path / place / POINT
        assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == {
            p.name: p.read_bytes() for p in original.iterdir()
        }
        assert load_sae(Path(folder)).dictionary.d_sae == 128


def test_an_export_does_not_touch_a_folder_with_something_in_it(
    library: Library, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        refused(library, Export(1, str(tmp_path / place)), "already holds something")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["mine.txt"]


def test_an_export_that_fails_or_is_stopped_leaves_nothing(
    library: Library, tmp_path: Path
) -> None:
    control = Control()
    row = run(
        library,
        Export(1, str(tmp_path / "out" / "here")),
        control=control,
        listener=lambda snapshot: control.cancel(),
    )
    assert row.status == "cancelled"
    assert list((tmp_path / "out").iterdir()) == []
    weights = library.path(library.saes.get(1).folder) / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(library, Export(1, str(tmp_path / "out" / "here")), str(weights.parent))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_in_an_unknown_format_is_refused(library: Library, tmp_path: Path) -> None:
    refused(library, Export(1, str(tmp_path / "x"), "onnx"), "'onnx' is not known")


def test_an_export_clears_what_a_killed_one_left_and_only_that(
    library: Library, tmp_path: Path
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = tmp_path / f".out.partial-{child.pid}"
    living = tmp_path / f".out.partial-{os.getppid()}"
    foreign = tmp_path / ".out.partial-notes"
    for folder in (dead, living, foreign):
        folder.mkdir()
    done(library, Export(1, str(tmp_path / "out")))
    assert not dead.exists()
    assert living.exists() and foreign.exists()
