"""Rows of imported SAEs: the migration that makes room for them, several committed at once, what
they hold on to, and where they go when they are deleted."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from library.rows import add_dataset, add_model, add_tokenization, add_training, tree
from mistudio.errors import InUse
from mistudio.library import database
from mistudio.library.library import UNNAMED, Library


def add_imported(library: Library, model_id: int, name: str = "Theirs") -> int:
    folder = library.new_folder("saes", name)
    source = library.root / "work" / name
    source.mkdir(parents=True)
    (source / "cfg.json").write_text("{}")
    with library.commit(source, folder):
        return library.saes.add(**row(model_id, folder, name))


def row(model_id: int, folder: str, name: str) -> dict[str, object]:
    return {
        "training_id": None,
        "model_id": model_id,
        "hook_point": "blocks.1.mlp.hook_in",
        "hook_point_out": "blocks.1.hook_mlp_out",
        "layer": 1,
        "folder": folder,
        "architecture": "topk",
        "wiring": "transcoder",
        "d_in": 128,
        "d_sae": 256,
        "k": 8.0,
        "name": name,
        "source": "imported",
        "provenance": {"format": "sparsify", "notes": ["a note"]},
    }


def test_a_library_of_the_first_version_keeps_its_saes(root: Path, monkeypatch) -> None:
    (first,) = [step for step in database.migrations() if step[0] == 1]
    root.mkdir()
    db = database.connect(root / "library.db")
    database._apply(db, *first)
    for table, columns in {
        "models": "id, name, source, origin, folder, n_layers, d_model, parameters, bytes, "
        "created_at",
        "saes": "id, model_id, hook_point, layer, folder, architecture, d_in, d_sae, k, created_at",
    }.items():
        values = {
            "models": "1, 'm', 'local', 'x', 'models/m', 4, 128, 1, 1, ''",
            "saes": "7, 1, 'blocks.2.hook_resid_post', 2, 'trainings/a/b', 'topk', 128, 256, 8, ''",
        }[table]
        db.conn.execute(f"INSERT INTO {table} ({columns}) VALUES ({values})")
    db.conn.close()
    library = Library(root)
    sae = library.saes.get(7)
    assert (sae.hook_point, sae.hook_point_out) == ("blocks.2.hook_resid_post",) * 2
    assert (sae.name, sae.source, sae.wiring, sae.provenance) == ("", "trained", "sae", {})
    assert not sae.is_transcoder
    library.close()


def test_an_autoencoder_reconstructs_what_it_reads(library: Library) -> None:
    model, dataset = add_model(library), add_dataset(library)
    training = add_training(library, model, dataset, add_tokenization(library, dataset))
    (sae,) = library.saes.of_training(training)
    assert sae.hook_point_out == sae.hook_point
    assert library.saes.imported() == []


def test_only_trained_and_imported_are_sources(library: Library) -> None:
    values = {**row(add_model(library), "saes/x", "x"), "source": "stolen"}
    with pytest.raises(sqlite3.IntegrityError):
        library.saes.add(**values)


def test_an_imported_sae_goes_to_the_trash_whole(library: Library) -> None:
    model = add_model(library)
    sae = library.saes.get(add_imported(library, model))
    assert sae.is_transcoder
    with pytest.raises(InUse, match="1 SAE uses this model"):
        library.discard("models", model)
    library.discard("saes", sae.id)
    assert library.saes.count() == 0
    assert not library.path(sae.folder).exists()
    assert any((folder / "cfg.json").exists() for folder in (library.root / "trash").iterdir())
    library.discard("models", model)


def test_several_are_committed_together_or_not_at_all(library: Library) -> None:
    model = add_model(library)
    sources = {}
    for name in ("one", "two"):
        source = library.work_folder(5) / name
        source.mkdir()
        (source / "cfg.json").write_text(name)
        sources[f"saes/{name}"] = source
    before = tree(library.root)
    with pytest.raises(sqlite3.IntegrityError), library.commit_all(sources):
        library.saes.add(**row(model, "saes/one", "one"))
        library.saes.add(**{**row(model, "saes/two", "two"), "model_id": 99})
    assert library.saes.count() == 0
    assert [p for p in tree(library.root) if UNNAMED not in p] == before
    with library.commit_all(sources):
        for name in ("one", "two"):
            library.saes.add(**row(model, f"saes/{name}", name))
    assert [sae.name for sae in library.saes.imported()] == ["two", "one"]
    assert not list((library.root / "saes").rglob(UNNAMED))


def test_a_folder_that_cannot_be_placed_puts_the_others_back(library: Library) -> None:
    source = library.work_folder(5) / "one"
    source.mkdir()
    (source / "cfg.json").write_text("one")
    other = library.work_folder(5) / "two"
    other.mkdir()
    (other / "cfg.json").write_text("two")
    blocked = library.root / "saes" / "two"
    blocked.mkdir()
    (blocked / "someone's").write_text("in the way")
    with pytest.raises(OSError), library.commit_all({"saes/one": source, "saes/two": other}):
        raise AssertionError("never reached")
    assert (source / "cfg.json").exists() and (other / "cfg.json").exists()
    assert not (library.root / "saes" / "one").exists()


def test_a_kill_before_the_row_sends_the_folder_to_the_trash(library: Library) -> None:
    kept = library.saes.get(add_imported(library, add_model(library)))
    orphan = library.root / "saes" / "orphan"
    orphan.mkdir()
    (orphan / UNNAMED).touch()
    (library.path(kept.folder) / UNNAMED).touch()  # killed after the row
    Library(library.root).close()
    assert not orphan.exists()
    assert library.path(kept.folder).is_dir()
    assert not (library.path(kept.folder) / UNNAMED).exists()
