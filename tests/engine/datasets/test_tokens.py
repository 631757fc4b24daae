"""The token store holds the tokenizer's own ids, packed, traceable, split and counted rightly."""

from __future__ import annotations

import hashlib
import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from mistudio.engine.datasets.documents import Document, Documents, write_documents
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.datasets.token_writer import write_token_store
from mistudio.engine.datasets.tokens import TokenSplit, TokenStore
from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput

SAMPLE = Path(__file__).parents[3] / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
SEPARATOR = 0


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Real documents; some twice, one without any token of its own in the end."""
    with SAMPLE.open(encoding="utf-8") as lines:
        rows = [Document(json.loads(line)["text"]) for line in islice(lines, 150)]
    folder = tmp_path_factory.mktemp("documents")
    write_documents([*rows, *rows[::5]], folder)
    return Documents(folder)


def store_of(
    documents: Documents,
    tokenizer: Any,
    folder: Path,
    *,
    bos_id: int | None = None,
    separator_id: int | None = SEPARATOR,
    **options: Any,
) -> TokenStore:
    write_token_store(
        documents,
        tokenizer,
        folder,
        bos_id=bos_id,
        separator_id=separator_id,
        special_ids=[0],
        tokenizer_hash="h",
        **options,
    )
    return TokenStore(folder)


@pytest.fixture(scope="module")
def store(
    documents: Documents, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> TokenStore:
    return store_of(documents, tiny_tokenizer, tmp_path_factory.mktemp("tokens"))


def encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def all_ids(split: TokenSplit) -> list[int]:
    """Every id of a split that lies in whole windows of one token."""
    n = split.n_windows(2 if split.meta.bos_id is not None else 1)
    return split.windows(np.arange(n), 2 if split.meta.bos_id is not None else 1)[:, -1].tolist()


def heldout(text: str, share: float = 0.1) -> bool:
    """The rule of the split, written down a second time."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def test_ids_are_the_tokenizers_own_with_one_separator_between_documents(
    documents: Documents, tiny_tokenizer: Any, store: TokenStore
) -> None:
    expected: dict[str, list[int]] = {"train": [], "heldout": []}
    for document in documents:
        ids = expected["heldout" if heldout(document.text) else "train"]
        ids += [SEPARATOR] * bool(ids) + encoded(tiny_tokenizer, document.text)
    assert all_ids(store.train) == expected["train"]
    assert all_ids(store.heldout) == expected["heldout"]
    assert store.meta.tokens == {name: len(ids) for name, ids in expected.items()}
    assert sum(store.meta.documents.values()) == len(documents)


def test_without_a_separator_documents_follow_each_other(
    documents: Documents, tiny_tokenizer: Any, store: TokenStore, tmp_path: Path
) -> None:
    bare = store_of(documents, tiny_tokenizer, tmp_path, separator_id=None)
    assert all_ids(bare.train) == [i for i in all_ids(store.train) if i != SEPARATOR]


@pytest.mark.parametrize("context", [16, 100, 128])
def test_windows_are_packed_without_padding_and_only_the_last_part_is_left_out(
    store: TokenStore, context: int
) -> None:
    split = store.train
    n = split.n_windows(context)
    assert n == len(split) // context
    windows = split.windows(np.arange(n), context)
    assert windows.dtype == torch.int64
    assert windows.shape == (n, context)
    assert windows.flatten().tolist() == all_ids(split)[: n * context]
    chosen = split.windows([n - 1, 0, 2], context)
    assert torch.equal(chosen, windows[[n - 1, 0, 2]])


def test_where_the_model_uses_bos_every_window_starts_with_it_and_no_token_is_lost(
    documents: Documents, tiny_tokenizer: Any, store: TokenStore, tmp_path: Path
) -> None:
    with_bos = store_of(documents, tiny_tokenizer, tmp_path, bos_id=7).train
    n = with_bos.n_windows(64)
    assert n == len(with_bos) // 63
    windows = with_bos.windows(np.arange(n), 64)
    assert (windows[:, 0] == 7).all()
    assert windows[:, 1:].flatten().tolist() == all_ids(store.train)[: n * 63]


@pytest.mark.parametrize("bos_id", [None, 7])
@pytest.mark.parametrize("separator_id", [None, SEPARATOR])
def test_every_token_is_traced_to_its_document(
    documents: Documents,
    tiny_tokenizer: Any,
    tmp_path: Path,
    bos_id: int | None,
    separator_id: int | None,
) -> None:
    context = 64
    options = {"bos_id": bos_id, "separator_id": separator_id}
    split = store_of(documents, tiny_tokenizer, tmp_path, **options).train
    expected = []
    for number, document in enumerate(documents):
        if not heldout(document.text):
            expected += [-1] * (bool(expected) and separator_id is not None)
            expected += [number] * len(encoded(tiny_tokenizer, document.text))
    first = 0 if bos_id is None else 1
    places = iter(expected)
    for window in range(split.n_windows(context)):
        for position in range(first, context):
            document = next(places)
            if document >= 0:  # separators belong to none
                assert split.document_at(window, position, context) == document


def test_exact_duplicates_are_on_one_side_of_the_split(
    documents: Documents, store: TokenStore, tiny_tokenizer: Any
) -> None:
    sides: dict[str, set[str]] = {}
    for split in (store.train, store.heldout):
        for number in set(np.asarray(split._documents).tolist()):
            sides.setdefault(documents[number].text, set()).add(split.name)
    assert len(sides) < len(documents)  # there are duplicates
    assert all(len(names) == 1 for names in sides.values())
    assert {name for names in sides.values() for name in names} == {"train", "heldout"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_that_is_held_out_can_be_chosen(
    documents: Documents, tiny_tokenizer: Any, tmp_path: Path, share: float
) -> None:
    store = store_of(
        documents, tiny_tokenizer, tmp_path, settings=TokenSettings(heldout_share=share)
    )
    counted = sum(heldout(document.text, share) for document in documents)
    assert store.meta.documents["heldout"] == counted
    assert len(store.train) + len(store.heldout) == sum(store.meta.tokens.values())


def test_statistics_equal_a_plain_recount(
    documents: Documents, tiny_tokenizer: Any, store: TokenStore
) -> None:
    lists = [encoded(tiny_tokenizer, document.text) for document in documents]
    lengths = [len(ids) for ids in lists]
    counts: dict[int, int] = {}
    for ids in lists:
        for i in ids:
            counts[i] = counts.get(i, 0) + 1
    statistics = store.meta.statistics
    assert statistics["tokens"] == sum(lengths)
    assert statistics["documents"] == len(lists)
    assert statistics["unique_tokens"] == len(counts)
    assert statistics["length_min"] == min(lengths)
    assert statistics["length_max"] == max(lengths)
    assert statistics["length_mean"] == pytest.approx(sum(lengths) / len(lengths))
    ordered = sorted(lengths)
    middle = len(ordered) // 2
    assert statistics["length_median"] == (ordered[middle] + ordered[~middle]) / 2
    edges = [*statistics["length_edges"], float("inf")]
    assert statistics["length_histogram"] == [
        sum(low <= length < high for length in lengths) for low, high in pairwise(edges)
    ]
    best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
    assert statistics["top_tokens"] == [list(item) for item in best]


def test_top_tokens_name_only_tokens_that_occur(tiny_tokenizer: Any, tmp_path: Path) -> None:
    write_documents([Document("aaa")], tmp_path)
    store = store_of(Documents(tmp_path), tiny_tokenizer, tmp_path / "tokens")
    assert all(count > 0 for _, count in store.meta.statistics["top_tokens"])


# --- widths of ids --------------------------------------------------------------------------------


def word_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(("vocabulary", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_the_vocabulary_allows_and_four_elsewhere(
    tmp_path: Path, vocabulary: int, width: int
) -> None:
    words = [f"w{i}" for i in range(vocabulary - 40, vocabulary)]
    write_documents([Document(" ".join(words))], tmp_path)
    store = store_of(
        Documents(tmp_path),
        word_tokenizer(vocabulary),
        tmp_path / "t",
        settings=TokenSettings(heldout_share=0.0),
    )
    assert (tmp_path / "t" / "train.ids").stat().st_size == 40 * width
    assert all_ids(store.train) == list(range(vocabulary - 40, vocabulary))


# --- refusals and stops ---------------------------------------------------------------------------


def test_too_little_text_is_refused_with_numbers(store: TokenStore) -> None:
    have = store.heldout.n_windows(128)
    store.heldout.require_windows(128, have, "Judging")
    with pytest.raises(
        InvalidInput,
        match=rf"Judging needs at least {have + 1} windows of 128 tokens; the heldout split has "
        rf"{have} \({len(store.heldout):,} tokens\)",
    ):
        store.heldout.require_windows(128, have + 1, "Judging")


def test_a_split_without_documents_has_no_windows(
    documents: Documents, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    empty = store_of(
        documents, tiny_tokenizer, tmp_path, settings=TokenSettings(heldout_share=0.0)
    ).heldout
    assert (len(empty), empty.n_windows(16)) == (0, 0)


def test_long_documents_are_tokenised_in_small_steps(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A stop is heard at least every 200,000 characters, whatever the documents are like."""
    write_documents([Document("word " * 20_000)] * 8, tmp_path)
    checks = []

    class Stop:
        def check(self) -> None:
            checks.append(1)
            if len(checks) == 3:
                raise Cancelled

        def report(self, *args: object, **metrics: object) -> None: ...

    with pytest.raises(Cancelled):
        store_of(Documents(tmp_path), tiny_tokenizer, tmp_path / "t", progress=Stop())
