"""What the library remembers: one record and one table for each thing the user owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistudio.errors import InvalidInput
from mistudio.library.table import Table, now

LONGEST_NAME = 200


@dataclass(frozen=True)
class Dataset:
    """Documents of text, stored as `documents.jsonl` in `folder`.

    Where `link` is not empty it says where the documents are read each time, and the folder keeps
    only the first ones, for a look; `documents`, `characters` and `bytes` then count those.
    `statistics` of the text are computed once; empty until then."""

    id: int
    name: str
    source: str
    origin: str
    folder: str
    documents: int
    characters: int
    bytes: int
    provenance: dict[str, Any]
    created_at: str
    link: dict[str, Any]
    statistics: dict[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that belongs to no model of the library."""

    id: int
    name: str
    source: str
    origin: str
    folder: str
    tokenizer_hash: str
    vocab_size: int
    provenance: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class Model:
    """A Hugging Face model folder inside the library; `summary` is what its config says."""

    id: int
    name: str
    source: str
    origin: str
    folder: str
    precision: str
    n_layers: int
    d_model: int
    parameters: int
    bytes: int
    summary: dict[str, Any]
    provenance: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class Tokenization:
    """A token store: a dataset seen through one tokenizer with one group of settings."""

    id: int
    dataset_id: int
    tokenizer_hash: str
    settings: dict[str, Any]
    folder: str
    tokens: int
    statistics: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class Extraction:
    """Stored activations of one model at some hook points over one token store."""

    id: int
    model_id: int
    tokenization_id: int
    hook_points: list[str]
    settings: dict[str, Any]
    folder: str
    tokens: int
    bytes: int
    statistics: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class Training:
    """A run that ended with usable SAEs: completed, or stopped early and kept."""

    id: int
    name: str
    model_id: int
    dataset_id: int
    tokenization_id: int
    extraction_id: int | None
    job_id: int | None
    status: str
    config: dict[str, Any]
    record: dict[str, Any]
    folder: str
    seconds: float
    created_at: str


@dataclass(frozen=True)
class Sae:
    """One dictionary; `metrics` come from its final evaluation.

    It reads `hook_point` and reconstructs `hook_point_out`: the same, or another in a transcoder.
    `wiring` is `sae`, `skip_sae`, `transcoder` or `skip_transcoder`. An imported one (`source`)
    belongs to no run and has a `name` of its own; `provenance` says where it is from. `k` is the
    number of active latents it was trained for, 0 where that is not known.
    """

    id: int
    training_id: int | None
    model_id: int
    hook_point: str
    layer: int
    folder: str
    architecture: str
    d_in: int
    d_sae: int
    k: float
    metrics: dict[str, Any]
    created_at: str
    name: str
    source: str
    wiring: str
    hook_point_out: str
    provenance: dict[str, Any]

    @property
    def is_transcoder(self) -> bool:
        return self.hook_point_out != self.hook_point


@dataclass(frozen=True)
class FeatureRun:
    """A discovery pass over one SAE: arrays in `folder`, a few totals in `summary`."""

    id: int
    sae_id: int
    tokenization_id: int
    folder: str
    n_features: int
    tokens: int
    summary: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class Generation:
    """A steered comparison: what was asked and what came out."""

    id: int
    sae_id: int
    request: dict[str, Any]
    result: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class Template:
    """A named configuration; `kind` is `training`, `extraction` or `steering`. `config` is plain
    data that names models and datasets by what they are, so that it means the same elsewhere."""

    id: int
    kind: str
    name: str
    description: str
    favourite: bool
    config: dict[str, Any]
    created_at: str
    updated_at: str


class Datasets(Table[Dataset]):
    name, noun, record = "datasets", "dataset", Dataset

    def rename(self, record_id: int, name: str) -> None:
        """InvalidInput where a name is empty or too long to show."""
        name = " ".join(name.split())
        if not 0 < len(name) <= LONGEST_NAME:
            raise InvalidInput(
                "This name cannot be used" if name else "The name is empty",
                f"It has {len(name)} characters; at most {LONGEST_NAME} are kept." if name else "",
                "Give it a shorter one." if name else "Give the dataset a name.",
                field="name",
            )
        self.get(record_id)
        self.update(record_id, name=name)

    def provenance(self, record_id: int) -> dict[str, Any]:
        """Source, revision, licence, hashes and settings of a dataset and its tokenizations."""
        from mistudio.library.provenance import provenance_record

        return provenance_record(self._library, self.get(record_id))


class Models(Table[Model]):
    name, noun, record = "models", "model", Model


class Tokenizers(Table[Tokenizer]):
    name, noun, record = "tokenizers", "tokenizer", Tokenizer


class Tokenizations(Table[Tokenization]):
    name, noun, record = "tokenizations", "tokenization", Tokenization

    def of_dataset(self, dataset_id: int) -> list[Tokenization]:
        return self.all("dataset_id = ?", (dataset_id,))


class Extractions(Table[Extraction]):
    name, noun, record = "extractions", "extraction", Extraction

    def of_model(self, model_id: int) -> list[Extraction]:
        return self.all("model_id = ?", (model_id,))


class Trainings(Table[Training]):
    name, noun, record = "trainings", "run", Training


class Saes(Table[Sae]):
    name, noun, record = "saes", "SAE", Sae

    def of_training(self, training_id: int) -> list[Sae]:
        """The SAEs of one run, shallowest layer first."""
        return sorted(self.all("training_id = ?", (training_id,)), key=lambda sae: sae.layer)

    def imported(self) -> list[Sae]:
        """Those that belong to no run, newest first."""
        return self.all("source = 'imported'")

    def add(self, **values: object) -> int:
        # An autoencoder reconstructs what it reads.
        values.setdefault("hook_point_out", values["hook_point"])
        return super().add(**values)


class FeatureRuns(Table[FeatureRun]):
    name, noun, record = "feature_runs", "feature run", FeatureRun

    def newest_of_sae(self, sae_id: int) -> FeatureRun | None:
        runs = self.all("sae_id = ?", (sae_id,))
        return runs[0] if runs else None


class Generations(Table[Generation]):
    name, noun, record = "generations", "generation", Generation

    def of_sae(self, sae_id: int) -> list[Generation]:
        return self.all("sae_id = ?", (sae_id,))


class Templates(Table[Template]):
    name, noun, record = "templates", "template", Template

    def of_kind(self, kind: str) -> list[Template]:
        """Favourites first, then newest first."""
        found = self.all("kind = ?", (kind,))
        return sorted(found, key=lambda template: not template.favourite)

    def named(self, kind: str, name: str) -> Template | None:
        found = self.all("kind = ? AND name = ?", (kind, name))
        return found[0] if found else None

    def free_name(self, kind: str, wanted: str) -> str:
        """`wanted`, or with the first number behind it that no template of this kind has."""
        name, number = wanted, 2
        while self.named(kind, name):
            name, number = f"{wanted}_{number}", number + 1
        return name

    def save(
        self, kind: str, name: str, description: str, config: dict[str, Any], **more: Any
    ) -> int:
        """Add, under a name that is made free."""
        with self._library.transaction():
            return self.add(
                kind=kind,
                name=self.free_name(kind, name),
                description=description,
                favourite=bool(more.get("favourite", False)),
                config=config,
                updated_at=now(),
            )
