"""Templates: named, bound to what a library has, sent away and taken in with distrust."""

from __future__ import annotations

import copy
import json
import random
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mistudio.engine.training.config import TrainingConfig, parse
from mistudio.errors import UserError
from mistudio.jobs import templates
from mistudio.jobs.template_files import MOST_BYTES, entries_of, read_templates
from mistudio.library.library import Library

AT = datetime(2026, 3, 4, 14, 30)

V1 = {
    "version": "1.0",
    "exported_at": "2025-10-05T12:00:00Z",
    "training_templates": [
        {
            "id": "t1",
            "name": "sparse_8x_10000steps_1430",
            "description": "from the mock",
            "model_id": "m1",
            "dataset_id": None,
            "encoder_type": "skip",
            "hyperparameters": {
                "learningRate": 0.0001,
                "batchSize": 256,
                "l1Coefficient": 0.001,
                "expansionFactor": 8,
                "trainingSteps": 10000,
                "trainingLayers": [12, 6, 6],
                "optimizer": "AdamW",
                "lrSchedule": "Cosine",
                "ghostGradPenalty": True,
            },
            "is_favorite": True,
            "created_at": "x",
            "updated_at": "y",
        }
    ],
    "extraction_templates": [
        {
            "id": "e1",
            "name": "quick",
            "description": "",
            "layers": [0, 6, 11],
            "hook_types": ["residual", "mlp"],
            "max_samples": 5000,
            "top_k_examples": 50,
            "is_favorite": False,
        }
    ],
    "steering_presets": [
        {
            "id": "p1",
            "training_id": "job",
            "name": "Formal Tone",
            "description": "",
            "features": [{"feature_id": 89, "coefficient": 4.0}],
            "intervention_layers": [8, 12],
            "temperature": 0.8,
            "is_favorite": False,
        }
    ],
}
WEB_TRAINING = {
    "version": "1.0",
    "templates": [
        {
            "id": "a",
            "name": "web",
            "description": "d",
            "model_id": "m_1",
            "dataset_ids": ["d_1"],
            "encoder_type": "transcoder",
            "hyperparameters": {
                "learning_rate": 3e-4,
                "batch_size": 128,
                "latent_dim": 4096,
                "total_steps": 5000,
                "l1_alpha": 0.05,
                "top_k": 64,
                "training_layers": [3],
                "sparsity_warmup_steps": 100,
            },
            "is_favorite": False,
            "extra_metadata": {},
        }
    ],
    "exported_at": "z",
}
WEB_EXTRACTION = {
    "version": "1.0",
    "export_date": "z",
    "count": 1,
    "templates": [
        {
            "name": "web-e",
            "description": None,
            "layer_indices": [1],
            "hook_types": ["attention"],
            "max_samples": 100,
            "batch_size": 8,
            "top_k_examples": 10,
            "is_favorite": True,
        }
    ],
}


@pytest.fixture
def library(tmp_path: Path) -> Any:
    made = Library(tmp_path / "library")
    made.execute("PRAGMA synchronous = OFF")  # a thousand imports need not reach the disk
    yield made
    made.close()


def everything(library: Library) -> list[Any]:
    return library.rows("SELECT * FROM templates ORDER BY id") and [
        tuple(row) for row in library.rows("SELECT * FROM templates ORDER BY id")
    ]


# --- what a library begins with -------------------------------------------------------------------


def test_a_new_library_has_the_seeds_and_a_deleted_one_stays_deleted(tmp_path: Path) -> None:
    first = Library(tmp_path / "one")
    names = [template.name for template in first.templates.of_kind("training")]
    assert names == [
        "5-minute classroom", "Fast Prototyping", "High Quality SAE", "Large Expansion",
    ]  # fmt: skip
    assert [t.favourite for t in first.templates.of_kind("training")] == [True, True, True, False]
    assert [t.name for t in first.templates.of_kind("extraction")] == [
        "Quick Scan", "Full Analysis",
    ]  # fmt: skip
    seed = first.templates.named("training", "Large Expansion")
    assert seed is not None
    first.templates.remove(seed.id)
    first.close()
    again = Library(tmp_path / "one")
    assert again.templates.named("training", "Large Expansion") is None
    again.close()


def test_every_seed_is_one_that_a_file_may_hold(library: Library, tmp_path: Path) -> None:
    templates.export_templates(library, tmp_path / "out.json")
    entries = read_templates(tmp_path / "out.json")
    assert len(entries) == 6 and [entry.problem for entry in entries] == [""] * 6


# --- names ----------------------------------------------------------------------------------------


def test_names_say_what_is_in_it_and_when_it_was_saved() -> None:
    config = {"hyperparameters": {"wiring": "sae", "expansion": 8, "steps": 10000}}
    assert templates.training_name(config, AT) == "sparse_8x_10000steps_1430"
    wide = {"hyperparameters": {"wiring": "skip_transcoder", "width": 4096, "tokens": 500000}}
    assert templates.training_name(wide, AT) == "skip_transcoder_4096latents_500000tokens_1430"
    extraction = {"sites": ["resid_post", "mlp_out"], "layers": [11, 0], "max_documents": 1000}
    assert (
        templates.extraction_name(extraction, AT)
        == "resid_post-mlp_out_layers0-11_1000samples_1430"
    )
    assert templates.extraction_name({"sites": ["mlp_out"]}, AT) == "mlp_out_no-layers_all_1430"
    one = {"features": [{}] * 2, "layers": [6]}
    assert templates.steering_name(one, AT) == "steering_2features_layer6_1430"
    assert templates.steering_name(one | {"layers": [8, 12]}, AT) == (
        "steering_2features_layers8-12_1430"
    )


def test_a_name_that_is_taken_gets_a_number(library: Library) -> None:
    save = lambda: library.templates.save("training", "mine", "", {"layers": []})  # noqa: E731
    names = [library.templates.get(save()).name for _ in range(3)]
    assert names == ["mine", "mine_2", "mine_3"]
    assert library.templates.get(library.templates.save("steering", "mine", "", {})).name == "mine"


# --- out and in -----------------------------------------------------------------------------------


def fill(library: Library) -> None:
    values = {
        "sparsity": "jumprelu", "wiring": "skip_transcoder", "width": 4096, "k": 24,
        "learning_rate": 7e-4, "tokens": 123456, "optimizer": "sgd", "auxk": False, "seed": 7,
    }  # fmt: skip
    model = {"name": "m", "repository": "a/b", "revision": "c0ffee", "d_model": 8, "n_layers": 6}
    library.templates.save(
        "training", "mine", "Grüße, 你好",
        {"model": model, "dataset": {"name": "d", "sha256": "ab"}, "layers": [0, 1],
         "site": "mlp_in", "source": "hybrid", "hyperparameters": values},
        favourite=True,
    )  # fmt: skip
    library.templates.save(
        "extraction", "cut", "",
        {"model": {}, "dataset": {}, "layers": [3], "sites": ["mlp_in", "attn_out"],
         "max_tokens": 5000, "batch_size": 16, "context": 64},
    )  # fmt: skip
    library.templates.save(
        "steering", "calm", "",
        {"features": [{"feature_id": 3, "coefficient": -1.5, "label": "anger", "layer": 4}],
         "layers": [4], "temperature": 0.7, "model": model,
         "sae": {"name": "s", "d_sae": 99, "layer": 4},
         "title": "SAE • m • d", "settings": {"seed": 1, "prompt": "Hello", "cache": True}},
    )  # fmt: skip


def test_every_template_round_trips(library: Library, tmp_path: Path) -> None:
    fill(library)
    path = tmp_path / templates.export_name(AT)
    assert path.name == "miStudio-templates-2026-03-04.json"
    assert templates.export_templates(library, path) == 9
    other = Library(tmp_path / "other")
    outcomes = templates.import_templates(other, read_templates(path))
    assert [o.result for o in outcomes].count("kept") == 6  # the seeds
    assert [o.result for o in outcomes].count("added") == 3
    for kind in ("training", "extraction", "steering"):
        assert {(t.name, t.description, t.favourite, json.dumps(t.config, sort_keys=True))
                for t in library.templates.of_kind(kind)} == {
            (t.name, t.description, t.favourite, json.dumps(t.config, sort_keys=True))
            for t in other.templates.of_kind(kind)
        }  # fmt: skip
    other.close()


def test_every_hyperparameter_survives(library: Library, tmp_path: Path) -> None:
    config = TrainingConfig(
        sparsity="matryoshka", wiring="skip_sae", k=17, expansion=3.5, tokens=7777, batch_size=64,
        learning_rate=2e-3, schedule="linear", optimizer="adamw", gradient_accumulation=2, seed=5,
    )  # fmt: skip
    values = {name: value for name, value in vars(config).items() if value is not None}
    library.templates.save("training", "all", "", {"layers": [1], "hyperparameters": values})
    templates.export_templates(library, tmp_path / "x.json")
    (entry,) = [e for e in read_templates(tmp_path / "x.json") if e.name == "all"]
    assert entry.config is not None and parse(entry.config["hyperparameters"]) == config


def test_files_of_version_1_0_are_read(library: Library) -> None:
    training, extraction, preset = entries_of(V1)
    assert (training.problem, extraction.problem, preset.problem) == ("", "", "")
    assert training.favourite and training.config is not None
    assert training.config["layers"] == [6, 12]
    values = training.config["hyperparameters"]
    assert parse(values) == parse({
        "wiring": "skip_sae", "learning_rate": 1e-4, "batch_size": 256, "expansion": 8,
        "steps": 10000, "optimizer": "adamw", "schedule": "cosine", "auxk": True, "revive": True,
    })  # fmt: skip
    assert "L1 coefficient" in training.notes[0] and "another library" in training.notes[1]
    assert extraction.config is not None
    assert extraction.config["sites"] == ["resid_post", "mlp_out"]
    assert extraction.config["max_documents"] == 5000 and "discovery" in extraction.notes[0]
    assert preset.config is not None
    assert preset.config["features"] == [{"feature_id": 89, "coefficient": 4.0}]
    assert preset.config["layers"] == [8, 12] and preset.config["temperature"] == 0.8


def test_the_web_editions_files_are_read() -> None:
    (training,) = entries_of(WEB_TRAINING)
    assert training.kind == "training" and training.problem == "" and training.config
    assert training.config["layers"] == [3]
    assert training.config["hyperparameters"] == {
        "wiring": "transcoder", "learning_rate": 3e-4, "batch_size": 128, "width": 4096,
        "steps": 5000, "k": 64,
    }  # fmt: skip
    assert any("sparsity_warmup_steps" in note for note in training.notes)
    (extraction,) = entries_of(WEB_EXTRACTION)
    assert extraction.kind == "extraction" and extraction.config
    assert extraction.config["layers"] == [1] and extraction.config["sites"] == ["attn_out"]


def test_one_bad_entry_leaves_the_others_alone(library: Library) -> None:
    document = copy.deepcopy(V1)
    document["training_templates"].append({"name": "bad", "hyperparameters": {"batchSize": -3}})
    document["training_templates"].append(["nonsense"])
    outcomes = templates.import_templates(library, entries_of(document))
    assert [o.result for o in outcomes] == ["added", "refused", "refused", "added", "added"]
    assert "Batch size" in outcomes[1].entry.problem
    assert library.templates.named("training", "bad") is None


def test_a_name_that_is_there_is_numbered_or_replaced(library: Library) -> None:
    entries = entries_of(WEB_EXTRACTION)
    first, *_ = templates.import_templates(library, entries)
    assert (first.result, first.name) == ("added", "web-e")
    same, *_ = templates.import_templates(library, entries)
    assert same.result == "kept"
    changed = copy.deepcopy(WEB_EXTRACTION)
    changed["templates"][0]["layer_indices"] = [2, 3]
    numbered, *_ = templates.import_templates(library, entries_of(changed))
    assert (numbered.result, numbered.name) == ("added", "web-e_2")
    changed["templates"][0]["layer_indices"] = [4]
    replaced, *_ = templates.import_templates(library, entries_of(changed), replace=True)
    assert (replaced.result, replaced.name) == ("replaced", "web-e")
    found = library.templates.named("extraction", "web-e")
    assert found is not None and found.config["layers"] == [4]


def test_an_import_that_fails_half_way_changes_nothing(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls, real = everything(library), [], library.templates.add

    def full_disk(**values: object) -> int:
        calls.append(values)
        if len(calls) == 2:
            raise sqlite3.OperationalError("database or disk is full")
        return real(**values)

    monkeypatch.setattr(library.templates, "add", full_disk)
    with pytest.raises(sqlite3.OperationalError):
        templates.import_templates(library, entries_of(V1))
    assert everything(library) == before


# --- what is no file of templates -----------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00\xff\xfe", b"null", b"[]", b"3", b'"x"', b"{}", b'{"version": "9"}',
        b'{"version": {"a": 1}, "training_templates": []}', b'{"training_templates": {}}',
        b'{"training_templates": [NaN]}', b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf{",
        b'{"templates": 5}', b'{"training_templates": [' + b"{}," * 1001 + b"{}]}",
    ],
)  # fmt: skip
def test_what_holds_no_templates_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_templates(path)
    assert caught.value.next_step


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(UserError, match="100 MB"):
        read_templates(path)
    assert MOST_BYTES < 100_000_000
    with pytest.raises(UserError):
        read_templates(tmp_path)
    with pytest.raises(UserError):
        read_templates(tmp_path / "none.json")


ODD = (
    None, True, -1, 0, 2**70, 10**400, 1e308, -0.0, 0.1, "", " ", "../../etc/passwd", "C:\\x",
    "a" * 5000, "\x00", "\ud800", "🙂", "<b>x</b>", "'; DROP TABLE templates; --", [], {}, [[]],
    {"a": {"b": {"c": []}}}, [1, "2", None], {"name": "x"}, "1e5", "nan", "auto",
)  # fmt: skip


def mutated(value: Any, chance: random.Random) -> Any:
    if chance.random() < 0.08:
        return copy.deepcopy(chance.choice(ODD))
    if isinstance(value, dict):
        kept = {k: mutated(v, chance) for k, v in value.items() if chance.random() > 0.05}
        if chance.random() < 0.1:
            kept[str(chance.choice(ODD))[:50]] = chance.choice(ODD)
        return kept
    if isinstance(value, list):
        return [mutated(entry, chance) for entry in value] * chance.choice((1, 1, 1, 0, 2))
    return value


def test_a_thousand_damaged_files_never_crash_and_what_they_add_is_sound(
    library: Library, tmp_path: Path
) -> None:
    fill(library)
    templates.export_templates(library, tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
    chance, read, refused = random.Random(0), 0, 0
    path = tmp_path / "file.json"
    for number in range(1000):
        source = (whole, V1, WEB_TRAINING, WEB_EXTRACTION)[number % 4]
        data = json.dumps(mutated(source, chance)).encode()
        if number % 10 == 9:  # cut, or with a byte turned
            at = chance.randrange(len(data) + 1)
            data = data[:at] if number % 20 == 9 else data[:at] + b"\xff" + data[at + 1 :]
        path.write_bytes(data)
        before = everything(library)
        try:
            entries = read_templates(path)
        except UserError:
            refused += 1
            assert everything(library) == before
            continue
        outcomes = templates.import_templates(library, entries)
        read += 1
        for outcome in outcomes:
            assert (outcome.result == "refused") == bool(outcome.entry.problem)
        added = [o for o in outcomes if o.result in ("added", "replaced")]
        assert len(everything(library)) == len(before) + len(added)
        for outcome in added:
            template = library.templates.named(outcome.entry.kind, outcome.name)
            assert template is not None and 0 < len(template.name) <= 130
            if template.kind == "training":
                parse(template.config["hyperparameters"])
        library.execute("DELETE FROM templates WHERE id > 9")
    assert read > 400 and refused > 50


# --- what it is bound to --------------------------------------------------------------------------


def add_model(library: Library, name: str, **more: Any) -> int:
    values: dict[str, Any] = {
        "name": name, "source": "hub", "origin": f"a/{name}", "folder": f"models/{name}",
        "n_layers": 2, "d_model": 8, "parameters": 1, "bytes": 1, "summary": {}, "provenance": {},
    }  # fmt: skip
    return library.models.add(**values | more)


def test_a_model_is_found_by_what_it_is_not_by_its_number(library: Library) -> None:
    add_model(library, "other", provenance={"revision": "1111111111"})
    wanted = add_model(library, "copy", origin="a/b", provenance={"revision": "c0ffee0000"})
    reference = templates.model_reference(library.models.get(wanted))
    found, note = templates.find_model(library, reference)
    assert found is not None and found.id == wanted and note == ""
    found, note = templates.find_model(library, reference | {"revision": "deadbeef00"})
    assert found is not None and found.id == wanted and "another revision" in note
    assert templates.find_model(library, reference | {"d_model": 9})[0] is None
    found, note = templates.find_model(library, {"name": "gone", "repository": "x/gone"})
    assert found is None and "gone is not in this library" in note
    assert templates.find_model(library, {}) == (None, "")
    assert templates.find_model(library, reference | {"n_layers": 9})[0] is None


def test_a_model_is_known_by_its_weights_whatever_it_is_called(library: Library) -> None:
    def weights(*hashes: str) -> dict[str, Any]:
        return {"weights": [{"name": str(i), "sha256": h} for i, h in enumerate(hashes)]}

    mine = add_model(library, "mine", source="local", origin="/x", provenance=weights("1", "2"))
    add_model(library, "theirs", source="local", origin="/y", provenance=weights("1"))
    reference = templates.model_reference(library.models.get(mine))
    assert len(reference["sha256"]) == 64
    renamed = reference | {"name": "theirs", "repository": ""}
    found, note = templates.find_model(library, renamed)
    assert found is not None and (found.id, note) == (mine, "")
    found, note = templates.find_model(library, renamed | {"sha256": "9"})
    assert found is not None and found.name == "theirs" and "other weights" in note
    assert templates.model_of_other_shape(library, reference) is None
    other = templates.model_of_other_shape(library, reference | {"n_layers": 9})
    assert other is not None and other.id == mine


def test_a_dataset_is_found_by_its_text_before_its_name(library: Library) -> None:
    base = {"source": "local", "documents": 1, "characters": 1, "bytes": 1}
    library.datasets.add(
        name="books", origin="/x", folder="datasets/a", provenance={"sha256": "1"}, **base
    )
    same_text = library.datasets.add(
        name="copy", origin="/y", folder="datasets/b", provenance={"sha256": "2"}, **base
    )
    found, note = templates.find_dataset(library, {"name": "books", "sha256": "2"})
    assert found is not None and found.id == same_text and note == ""
    found, note = templates.find_dataset(library, {"name": "books", "sha256": "3"})
    assert found is not None and found.name == "books" and "not the same" in note
