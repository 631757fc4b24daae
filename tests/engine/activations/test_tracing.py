"""Every stored activation leads back to the exact characters it comes from, and can be seen over
them."""

from __future__ import annotations

import numpy as np
import pytest

from mistudio.engine.activations import extraction
from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.activations.tracing import Source, heat_map, trace, windows_of
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.datasets.token_writer import write_token_store
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import adds_bos, separator_id, special_ids
from mistudio.errors import Incompatible, InvalidInput

A = HookPoint("resid_post", 1)
CONTEXT = 32
LAYOUTS = {
    "packed": TokenSettings(heldout_share=0.3),
    "padded": TokenSettings(heldout_share=0.3, padding="max_length", max_length=40),
    "cut": TokenSettings(
        heldout_share=0.3, padding="none", max_length=CONTEXT, truncation="do_not_truncate"
    ),
}


@pytest.fixture(scope="module")
def documents():
    """Texts of many lengths, with characters of one to four bytes."""
    generator = np.random.default_rng(0)
    words = [
        "the",
        "of",
        "Ishmael",
        "sea",
        "é",
        "ü",
        "漢字",
        "🐋",
        "was,",
        "1851.",
        "and\n",
        "",
        "whale’s",
    ]
    return [
        Document(f"{number} " + " ".join(generator.choice(words, generator.integers(5, 90))))
        for number in range(120)
    ]


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def made(request, tiny, tiny_tokenizer, documents, tmp_path_factory):
    """(activations, their source, the token store)."""
    folder = tmp_path_factory.mktemp(request.param)
    meta = write_token_store(
        documents,
        tiny_tokenizer,
        folder / "tokens",
        bos_id=adds_bos(tiny_tokenizer),
        separator_id=separator_id(tiny_tokenizer),
        special_ids=sorted(special_ids(tiny_tokenizer)),
        tokenizer_hash="tiny",
        pad_id=0,
        settings=LAYOUTS[request.param],
    )
    store = TokenStore(folder / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "WRITE_BUFFER", 16 * CONTEXT)
        extract(tiny, store, (A,), folder / "a", max_tokens=None, context=CONTEXT)
    return StoredActivations(folder / "a"), Source(documents, tiny_tokenizer, meta), store


def spans(tokenizer, text):
    """(id, first character, character behind the last) of every token, found by adding up the
    bytes that byte-level tokens stand for; not by the tokenizer's own offsets."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    size = dict.fromkeys(bytes_to_unicode().values(), 1)
    character_of = [i for i, c in enumerate(text) for _ in c.encode()]
    found, place = [], 0
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        n = sum(size[c] for c in tokenizer.convert_ids_to_tokens(token))
        found.append((token, character_of[place], character_of[place + n - 1] + 1))
        place += n
    assert place == len(text.encode())
    return found


def test_every_row_leads_to_its_exact_characters(made):
    stored, source, store = made
    checked = 0
    for split in ("train", "heldout"):
        for row in range(0, len(stored.rows[split]), 1 + len(stored.rows[split]) // 150):
            origin = trace(stored, split, row, source)
            # The model read that token there, in a window of that document ...
            ids = store.split(split).windows([origin.window], CONTEXT)[0]
            assert int(ids[origin.position]) == origin.token
            at = store.split(split).document_at(origin.window, origin.position, CONTEXT)
            assert at == origin.document
            # ... and it stands for those characters; offsets may leave out a leading space.
            text = source.documents[origin.document].text
            token, start, end = spans(source.tokenizer, text)[origin.place]
            assert token == origin.token and end == origin.end
            assert start <= origin.start and not text[start : origin.start].strip(" ")
            checked += 1
    assert checked > 200


def test_neighbours_in_a_window_are_neighbours_in_the_text(made):
    stored, source, _ = made
    rows = stored.rows["heldout"][:]
    pairs = 0
    for row in range(0, len(rows) - 1, 11):
        first, second = (trace(stored, "heldout", r, source) for r in (row, row + 1))
        if (first.window, first.position + 1, first.document) == (
            second.window,
            second.position,
            second.document,
        ):
            assert second.place == first.place + 1
            between = source.documents[first.document].text[first.end : second.start]
            assert not between.strip(" ")
            pairs += 1
    assert pairs > 20


def test_another_text_is_refused(made):
    stored, source, _ = made
    others = [Document("Something else entirely, " + d.text) for d in source.documents]
    with pytest.raises(Incompatible, match="does not fit these activations"):
        trace(stored, "train", 3, Source(others, source.tokenizer, source.meta))


def test_without_the_text_the_place_is_known(made):
    stored, source, _ = made
    origin = trace(stored, "train", 5)
    assert (origin.start, origin.end) == (None, None)
    whole = trace(stored, "train", 5, source)
    assert (origin.document, origin.place, origin.token) == (
        whole.document,
        whole.place,
        whole.token,
    )


@pytest.mark.parametrize("number", [0, 1, 17, -1])
def test_a_heat_map_shows_what_the_model_gave(made, tiny, number):
    stored, _, store = made
    everything = [windows_of(stored, "train", i) for i in range(len(stored.meta.blocks["train"]))]
    if number < 0:
        number += sum(map(len, everything))
    window = int(np.concatenate(everything)[number])
    ids = store.train.windows([window], CONTEXT)
    true = tiny.capture(ids, [A])[A][0]
    norms = heat_map(stored, "train", number, A, tokens=store.train)
    assert norms.window == window and norms.values.shape == (CONTEXT,)
    assert norms.ids.tolist() == ids[0].tolist()
    kept = ~np.isnan(norms.values)
    assert not kept[0] and kept.sum() == (stored.rows["train"]["window"] == window).sum()
    np.testing.assert_allclose(norms.values[kept], true.norm(dim=1).numpy()[kept], rtol=2e-3)
    some = heat_map(stored, "train", number, A, [3, 100])
    assert some.values.shape == (CONTEXT, 2) and some.dimensions.tolist() == [3, 100]
    np.testing.assert_allclose(
        some.values[kept], true[:, [3, 100]].numpy()[kept], rtol=2e-3, atol=2e-3
    )
    varied = heat_map(stored, "train", number, A, [])
    variance = stored.statistics()[A.name].variance
    assert varied.dimensions.tolist() == np.argsort(-variance, kind="stable")[:32].tolist()
    assert (varied.documents[kept] >= 0).all() and (varied.places[kept] >= 0).all()


def test_what_is_not_there_is_refused(made):
    stored, _, _ = made
    with pytest.raises(InvalidInput, match="no such window"):
        heat_map(stored, "train", 10**6, A)
    with pytest.raises(InvalidInput, match="dimensions 0 to 127"):
        heat_map(stored, "train", 0, A, [128])
