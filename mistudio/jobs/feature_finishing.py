"""What a discovery adds to a store once the pass over the text is done: the features whose
directions are nearest, the scores and descriptions by rule, and the index that the search reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.progress import Progress
from mistudio.library.feature_index import FILE, IndexRow, build

if TYPE_CHECKING:
    from mistudio.engine.datasets.tokens import TokenSplit
    from mistudio.engine.features.rules import Vocabulary
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.sae.dictionary import Dictionary

FINISHING = ("directions", "scores", "search index")  # phases
EXAMPLES, AROUND = 3, 16  # top examples whose text is searched, and tokens on each side of them


def finish_store(
    folder: Path,
    tokens: TokenSplit,
    tokenizer: Any,
    dictionary: Dictionary,
    progress: Progress,
) -> None:
    """Complete the store in `folder`, which `tokens` was passed over for."""
    from mistudio.engine.features.rules import Vocabulary
    from mistudio.engine.features.score import rule_descriptions, score_store
    from mistudio.engine.features.store import (
        FeatureStore,
        add_arrays,
        add_columns,
        add_descriptions,
    )

    progress.report(0, 1, phase="directions")
    _add_neighbours(folder, dictionary, progress)
    progress.report(0, 1, phase="scores")
    store = FeatureStore(folder)
    size = max(tokens.meta.vocab_size, len(tokenizer))
    vocabulary = Vocabulary.of(tokenizer, size)
    scores = score_store(store, tokens, vocabulary, progress=progress)
    add_columns(folder, scores.columns())
    add_arrays(folder, scores.arrays())
    add_descriptions(folder, rule_descriptions(store, scores, vocabulary))
    progress.report(0, len(store), phase="search index")
    build(folder / FILE, _rows(store, tokens, tokenizer, vocabulary, progress))


def _add_neighbours(folder: Path, dictionary: Dictionary, progress: Progress) -> None:
    from mistudio.engine.features.coactivation import decoder_neighbours
    from mistudio.engine.features.store import add_arrays, add_columns

    found = decoder_neighbours(dictionary.decoder.detach().float(), progress=progress)
    nearest, cosine = found.index[:, 0], found.value[:, 0]
    add_columns(folder, {"nearest_feature": nearest, "nearest_cosine": cosine})
    add_arrays(folder, {"neighbour_ids": found.index, "neighbour_cosines": found.value})


def _rows(
    store: FeatureStore,
    tokens: TokenSplit,
    tokenizer: Any,
    vocabulary: Vocabulary,
    progress: Progress,
) -> Iterator[IndexRow]:
    def named(numbers: Sequence[int]) -> str:
        return " ".join(vocabulary.texts[number] for number in numbers)

    for feature in range(len(store)):
        if feature % 100 == 0:
            progress.check()
            progress.report(feature, len(store))
        examples = store.examples(feature, tokens, EXAMPLES)
        yield IndexRow(
            store.description(feature),
            named([entry.token for entry in store.token_counts(feature)]),
            named([token for token, _ in store.promoted(feature)]) if examples else "",
            " … ".join(
                tokenizer.decode(one.ids[max(0, one.peak - AROUND) : one.peak + AROUND + 1])
                for one in examples
            ),
        )
