"""A tiny model that really learnt something, and text for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent.parent / "data"
SAMPLE = Path(__file__).parents[2] / "resources" / "sample" / "wikipedia_vital_intros.jsonl"


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return DATA / "tiny-llama-0.9m"


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny trained model, fp32."""
    from mistudio.engine.models.loading import load_model

    return load_model(tiny_folder, "fp32")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    from mistudio.engine.models.loading import load_tokenizer

    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory, tiny_tokenizer):
    """A token store of 200 real documents under the tiny model's tokenizer."""
    from itertools import islice

    from mistudio.engine.datasets.documents import Documents, write_documents
    from mistudio.engine.datasets.sources import read_documents
    from mistudio.engine.datasets.token_writer import write_token_store
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.models.loading import adds_bos, separator_id, special_ids

    folder = tmp_path_factory.mktemp("tokens")
    write_documents(islice(read_documents(SAMPLE), 200), folder / "documents")
    write_token_store(
        Documents(folder / "documents"),
        tiny_tokenizer,
        folder / "store",
        bos_id=adds_bos(tiny_tokenizer),
        separator_id=separator_id(tiny_tokenizer),
        special_ids=sorted(special_ids(tiny_tokenizer)),
        tokenizer_hash="tiny",
    )
    return TokenStore(folder / "store")


@pytest.fixture
def planted():
    """Sparse sums of 160 known directions in 48 dimensions, off-centre: (draw(n), directions)."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(160, 48, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    offset = 2 * torch.randn(48, generator=generator)

    def draw(n: int) -> torch.Tensor:
        active = torch.rand(n, 160, generator=generator) < 0.02
        size = 1 + 2 * torch.rand(n, 160, generator=generator)
        return (active * size) @ directions * 5 + offset

    return draw, directions
