"""A store holds the very ids that the tokenizer itself gives, whatever the text is like."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mistudio.engine.datasets import encoding
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.encoding import Encoder
from mistudio.engine.datasets.sentencepiece import read_model, to_tokenizer
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.models.loading import adds_bos
from mistudio.errors import CorruptFile, InvalidInput

SAMPLE = Path(__file__).parents[3] / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
MODELS = Path(__file__).parents[2] / "data" / "sentencepiece"
KINDS = ("llama", "gpt2", "unigram")


def corpus() -> list[str]:
    with SAMPLE.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in islice(lines, 200)]


def gpt2_style() -> Any:
    """Byte-level BPE with GPT-2's way of splitting words, trained here."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(corpus(), trainer)
    end = "<|endoftext|>"
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end
    )


def sentencepiece_style(name: str) -> Any:
    """A real SentencePiece model with LLaMA's start token, and an end token for good measure."""
    backend = to_tokenizer(read_model(MODELS / f"{name}.model"))
    end = "" if name == "bpe_bytes" else " </s>:0"
    backend.post_processor = processors.TemplateProcessing(
        single=f"<s>:0 $A:0{end}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        "llama": sentencepiece_style("bpe_bytes"),
        "gpt2": gpt2_style(),
        "unigram": sentencepiece_style("unigram"),
    }


def stored(tokenizer: Any, texts: list[str], chosen: TokenSettings) -> list[list[int]]:
    """What the store holds of each text, with the BOS that its windows begin with."""
    bos = adds_bos(tokenizer) if chosen.add_special_tokens else None
    found = Encoder(tokenizer, chosen, bos).encode([Document(text) for text in texts])
    ends = np.cumsum(found.lengths)
    front = [] if bos is None or chosen.packed else [bos]
    return [
        [*front, *found.ids[end - n : end].tolist()] if n else []
        for end, n in zip(ends, found.lengths, strict=True)
    ]


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ODD = st.lists(
    st.sampled_from(
        [
            "a", "the", " ", "  ", "\n", "\r\n", "\t", "\0", "\u0301", "\u200d", "😀",
            "👨‍👩‍👧", "🇩🇪",
            "你好", "世界。", "こんにちは", "مرحبا", "שלום", "\u202e", "é", "e\u0301", "\ufeff",
            "<s>",
            "</s>", "<|endoftext|>", "▁", "\u3000", "½", "123", "'s", "\x7f",
        ]
    ),
    max_size=30,
).map("".join)  # fmt: skip
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(UNICODE | ODD, min_size=1, max_size=6))
@EXAMPLES
def test_packed_ids_are_the_tokenizers_own(
    tokenizers: dict[str, Any], kind: str, texts: list[str]
) -> None:
    tokenizer = tokenizers[kind]
    expected = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert stored(tokenizer, texts, TokenSettings()) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(
    texts=st.lists(UNICODE | ODD, min_size=1, max_size=4),
    length=st.integers(3, 40),
    special=st.booleans(),
    cut=st.booleans(),
)
@EXAMPLES
def test_single_documents_are_cut_off_and_framed_as_the_tokenizer_does(
    tokenizers: dict[str, Any],
    kind: str,
    texts: list[str],
    length: int,
    special: bool,
    cut: bool,
) -> None:
    tokenizer = tokenizers[kind]
    expected = tokenizer(
        texts, add_special_tokens=special, truncation=cut, max_length=length if cut else None
    )["input_ids"]
    chosen = TokenSettings(
        max_length=length,
        padding="longest",
        truncation="longest_first" if cut else "do_not_truncate",
        add_special_tokens=special,
    )
    extra = len(tokenizer("")["input_ids"]) if special else 0
    # A text without a token of its own has no window.
    wanted = [list(ids) if len(ids) > extra else [] for ids in expected]
    assert stored(tokenizer, texts, chosen) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", ["words", "one word", "emoji"])
def test_a_line_of_a_megabyte_is_the_tokenizers_own(
    tokenizers: dict[str, Any], kind: str, line: str
) -> None:
    text = {
        "words": " ".join(corpus())[:90_000] * 12,
        "one word": "abcdefgh" * 125_000,
        "emoji": "😀\u200d" * 143_000,
    }[line]
    assert len(text.encode()) >= 990_000
    tokenizer = tokenizers[kind]
    expected = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    assert stored(tokenizer, [text, "x"], TokenSettings())[0] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_texts_too_long_for_memory_are_joined_from_parts_that_meet_at_spaces(
    tokenizers: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "LONG_TEXT", 4000)
    text = " ".join(corpus())[:20_000]
    tokenizer = tokenizers[kind]
    found = Encoder(tokenizer, TokenSettings()).encode([Document("short"), Document(text)])
    short = list(tokenizer("short", add_special_tokens=False)["input_ids"])
    pieces = list(encoding._pieces(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1000 for piece in pieces)
    assert all(piece.startswith(" ") for piece in pieces[1:])
    expected = short + [i for p in pieces for i in tokenizer(p, add_special_tokens=False).input_ids]
    assert found.ids.tolist() == expected
    assert found.long_texts == 1
    if kind == "gpt2":  # words begin with their space: parts change nothing
        whole = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        assert found.ids.tolist() == short + whole


def test_halves_of_surrogate_pairs_become_the_replacement_character(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["gpt2"]
    expected = list(tokenizer("a\ufffdb", add_special_tokens=False)["input_ids"])
    assert stored(tokenizer, ["a\ud800b"], TokenSettings()) == [expected]


def test_a_tokenizer_file_that_truncates_and_pads_does_not_do_so_here(
    tokenizers: dict[str, Any],
) -> None:
    text = "one two three four five six"
    expected = list(tokenizers["gpt2"](text, add_special_tokens=False)["input_ids"])
    for special in (True, False):
        tokenizer = gpt2_style()
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=50)
        assert stored(tokenizer, [text], TokenSettings(add_special_tokens=special)) == [expected]


# --- conversations --------------------------------------------------------------------------------

CHAT = Document(
    "User: Hi\n\nAssistant: Hello", messages=(("user", "Hi"), ("assistant", "Hello there"))
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
)


def test_conversations_are_written_in_the_tokenizers_chat_format() -> None:
    tokenizer = sentencepiece_style("bpe_bytes")
    plain = Encoder(tokenizer, TokenSettings()).encode([CHAT]).ids.tolist()
    assert plain == list(tokenizer(CHAT.text, add_special_tokens=False)["input_ids"])
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": role, "content": content} for role, content in CHAT.messages]
    expected = list(tokenizer.apply_chat_template(messages, return_dict=False))
    found = Encoder(tokenizer, TokenSettings()).encode([CHAT, Document("plain")])
    assert found.ids[: found.lengths[0]].tolist() == expected
    assert expected != plain
    # As documents of their own they get no second start token.
    alone = TokenSettings(padding="longest", max_length=100)
    assert stored(tokenizer, [], alone) == []
    bos = adds_bos(tokenizer)
    assert Encoder(tokenizer, alone, bos).encode([CHAT]).ids.tolist() == expected[1:]


def test_a_conversation_that_the_format_refuses_is_read_as_plain_text_and_counted() -> None:
    tokenizer = sentencepiece_style("bpe_bytes")
    tokenizer.chat_template = TEMPLATE
    refused = Document("System: no", messages=(("system", "no"),))
    found = Encoder(tokenizer, TokenSettings()).encode([refused, CHAT])
    expected = list(tokenizer(refused.text, add_special_tokens=False)["input_ids"])
    assert found.ids[: found.lengths[0]].tolist() == expected
    assert found.plain_chats == 1


# --- SentencePiece files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe_bytes", "unigram"])
def test_a_sentencepiece_model_gives_the_ids_that_sentencepiece_gives(name: str) -> None:
    expected = json.loads((MODELS / "expected.json").read_text())
    backend = to_tokenizer(read_model(MODELS / f"{name}.model"))
    for text, ids in zip(expected["texts"], expected[name], strict=True):
        assert backend.encode(text, add_special_tokens=False).ids == ids, text


@given(data=st.binary(max_size=200) | st.integers(0, 14_000))
@EXAMPLES
def test_damaged_sentencepiece_models_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes | int
) -> None:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    whole = (MODELS / "bpe_bytes.model").read_bytes()
    path.write_bytes(data if isinstance(data, bytes) else whole[:data])
    try:
        to_tokenizer(read_model(path))
    except (CorruptFile, InvalidInput) as refusal:
        assert "SentencePiece" in f"{refusal.title} {refusal.what}"
