"""Records with real folders, as a finished job leaves them, without the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mistudio.library.library import Library


def folder_with_files(library: Library, name: str = "new") -> Path:
    """What a job has written in its work folder when it is ready to commit."""
    folder = library.root / "work" / name
    (folder / "deep").mkdir(parents=True)
    (folder / "text.txt").write_text("some text")
    (folder / "deep" / "numbers.bin").write_bytes(b"1234")
    return folder


def add(library: Library, table: str, kind: str, **values: Any) -> int:
    """Commit a folder and the row that names it."""
    target = library.new_folder(kind, table)
    with library.commit(folder_with_files(library, f"{table}-{target[-8:]}"), target):
        return int(getattr(library, table).add(folder=target, **values))


def add_dataset(library: Library, name: str = "Text") -> int:
    return add(
        library,
        "datasets",
        "datasets",
        name=name,
        source="local",
        origin="/somewhere/text.txt",
        documents=3,
        characters=30,
        bytes=40,
        provenance={"sha256": "00"},
    )


def add_model(library: Library, name: str = "Tiny") -> int:
    return add(
        library,
        "models",
        "models",
        name=name,
        source="local",
        origin="/somewhere/model",
        n_layers=4,
        d_model=128,
        parameters=1000,
        bytes=2000,
    )


def add_tokenization(library: Library, dataset_id: int, tokenizer: str = "aa") -> int:
    return add(
        library,
        "tokenizations",
        "datasets",
        dataset_id=dataset_id,
        tokenizer_hash=tokenizer,
        settings={"heldout_share": 0.1},
        tokens=100,
    )


def add_extraction(library: Library, model_id: int, tokenization_id: int) -> int:
    return add(
        library,
        "extractions",
        "activations",
        model_id=model_id,
        tokenization_id=tokenization_id,
        hook_points=["blocks.1.hook_resid_post"],
        tokens=100,
        bytes=25600,
    )


def add_training(
    library: Library,
    model_id: int,
    dataset_id: int,
    tokenization_id: int,
    extraction_id: int | None = None,
    job_id: int | None = None,
) -> int:
    """A run with one SAE, whose folder lies inside the run's."""
    training_id = add(
        library,
        "trainings",
        "trainings",
        name="Run",
        model_id=model_id,
        dataset_id=dataset_id,
        tokenization_id=tokenization_id,
        extraction_id=extraction_id,
        job_id=job_id,
        status="completed",
        config={"k": 8},
        seconds=1.0,
    )
    folder = library.trainings.get(training_id).folder
    library.path(f"{folder}/deep").rename(library.path(f"{folder}/blocks.1.hook_resid_post"))
    library.saes.add(
        training_id=training_id,
        model_id=model_id,
        hook_point="blocks.1.hook_resid_post",
        layer=1,
        folder=f"{folder}/blocks.1.hook_resid_post",
        architecture="jumprelu",
        d_in=128,
        d_sae=256,
        k=8.0,
    )
    return training_id


def add_feature_run(library: Library, training_id: int) -> int:
    return add(
        library,
        "feature_runs",
        "features",
        sae_id=library.saes.of_training(training_id)[0].id,
        tokenization_id=library.trainings.get(training_id).tokenization_id,
        n_features=256,
        tokens=90,
    )


def tree(root: Path) -> list[str]:
    """Every file of a library but the database's own, to compare before and after."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if not path.name.startswith("library.db")
    )
