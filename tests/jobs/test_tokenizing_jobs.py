"""Tokenise with settings and tokenizers of one's own, go on after a stop, look at the text once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from journeys import road

from mistudio.engine.datasets import encoding
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.datasets.tokenizers import CHOICES, piece, preview
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.jobs.control import Control
from mistudio.jobs.job import can_go_on, run_job, submit
from mistudio.jobs.kinds import AddDataset, AddTokenizer, AnalyseDataset, Tokenize, job_from_row
from mistudio.jobs.statistics import warnings_of
from mistudio.jobs.tokenizing import text_for
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library

MODELS = Path(__file__).parents[1] / "data" / "sentencepiece"


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run(library, job)
    assert row.status == "finished", row.error
    return row.result


def refused(library: Library, job: Any, words: str) -> None:
    before = road.contents(library.root)
    row = run(library, job)
    assert row.status == "failed"
    assert "traceback" not in row.error, row.error
    assert words in " ".join([row.error["title"] + ".", row.error["what"], row.error["next_step"]])
    assert road.contents(library.root) == before


# --- several tokenisations ------------------------------------------------------------------------


def test_settings_make_tokenisations_of_their_own_and_are_found_again(library: Library) -> None:
    padded = {"padding": "max_length", "max_length": 64}
    first = done(library, Tokenize(1, 1))["tokenization_id"]
    second = done(library, Tokenize(1, 1, settings=padded))["tokenization_id"]
    assert library.tokenizations.count() == 2
    # Without an effect on packed text, and the same twice: nothing new is made.
    assert done(library, Tokenize(1, 1, settings={"max_length": 99}))["tokenization_id"] == first
    assert done(library, Tokenize(1, 1, settings=padded))["tokenization_id"] == second
    assert library.tokenizations.count() == 2
    record = library.tokenizations.get(second)
    assert TokenStore(library.path(record.folder)).meta.layout == TokenSettings(64, "max_length")
    job = job_from_row("tokenize", {"dataset_id": 1, "model_id": 1, "settings": padded})
    assert job == Tokenize(1, 1, settings=padded)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Tokenize(1, 1, settings={"padding": "left"}), "'left' is not one of pack"),
        (Tokenize(1, 1, settings={"stride": 2}), "stride is not among"),
        (Tokenize(1), "No tokenizer is chosen"),
        (Tokenize(1, 1, 1), "Two tokenizers are chosen"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(library: Library, job: Any, words: str) -> None:
    refused(library, job, words)


def test_a_chosen_tokenisation_is_read_where_it_fits(library: Library, tmp_path: Path) -> None:
    settings = {"padding": "longest", "max_length": 64}
    chosen = done(library, Tokenize(1, 1, settings=settings))["tokenization_id"]
    from mistudio.engine.progress import SILENT

    assert text_for(library, tmp_path, 1, 1, SILENT, chosen).id == chosen
    assert text_for(library, tmp_path, 1, 1, SILENT).id != chosen  # the packed one
    own = done(library, AddTokenizer(str(MODELS / "unigram.model")))["tokenizer_id"]
    foreign = done(library, Tokenize(1, None, own))["tokenization_id"]
    with pytest.raises(Exception, match="would read its numbers as other words"):
        text_for(library, tmp_path, 1, 1, SILENT, foreign)


# --- stopping and going on ------------------------------------------------------------------------


def test_a_tokenisation_that_is_interrupted_goes_on_under_its_own_number(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 8)
    job = Tokenize(1, 1, settings={"padding": "none", "max_length": 32})
    number = submit(library, job)

    class Interrupting(Control):
        looks = 0

        def check(self) -> float:
            self.looks += 1
            if self.looks == 12:  # in the midst of the documents
                self.interrupt()
            return super().check()

    row = run_job(library, job, number, Interrupting())
    assert row.status == "interrupted"
    assert can_go_on(library, row)
    library.recover()  # as the next start does
    assert library.jobs.requeue(number)
    notes: list[str] = []
    row = run_job(library, job, number, listener=lambda seen: notes.extend(seen.notes))
    assert row.status == "finished", row.error
    assert notes[0].startswith("Going on after ")
    assert not library.checkpoint_folder(number).exists()
    whole = library.tokenizations.get(row.result["tokenization_id"])
    library.discard("tokenizations", whole.id)
    again = library.tokenizations.get(done(library, job)["tokenization_id"])
    assert again.tokens == whole.tokens
    assert {**again.statistics, "seconds": 0} == {**whole.statistics, "seconds": 0}


def test_a_cancelled_tokenisation_leaves_nothing(library: Library) -> None:
    before = road.contents(library.root)
    control = Control()
    job = Tokenize(1, 1, settings={"padding": "none"})
    row = run_job(library, job, submit(library, job), control, lambda _: control.cancel())
    assert row.status == "cancelled"
    assert road.contents(library.root) == before


# --- linked datasets ------------------------------------------------------------------------------


def test_linked_text_is_tokenised_where_it_lies(library: Library, tmp_path: Path) -> None:
    rows = [
        {"text": f"Story {i}. " + "Once upon a time there was a fox. " * 9} for i in range(1200)
    ]
    source = tmp_path / "stories.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    linked = done(library, AddDataset(str(source), keep_in_place=True))["dataset_id"]
    copied = done(library, AddDataset(str(source)))["dataset_id"]
    assert library.datasets.get(linked).documents == 1000  # only these are stored
    found = [
        library.tokenizations.get(done(library, Tokenize(dataset, 1))["tokenization_id"])
        for dataset in (linked, copied)
    ]
    assert found[0].statistics["documents"] == 1200
    ids = [(library.path(record.folder) / "train.ids").read_bytes() for record in found]
    assert ids[0] == ids[1]
    done(library, AnalyseDataset(linked))
    assert library.datasets.get(linked).statistics["documents"] == 1200


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_sentencepiece_file_becomes_a_tokenizer(empty: Library) -> None:
    result = done(empty, AddTokenizer(str(MODELS / "bpe_bytes.model"), "Mine"))
    record = empty.tokenizers.get(result["tokenizer_id"])
    assert (record.name, record.source, record.vocab_size) == ("Mine", "local", 1000)
    again = done(empty, AddTokenizer(str(MODELS / "bpe_bytes.model")))
    assert again["tokenizer_id"] == record.id
    assert empty.tokenizers.count() == 1


@pytest.mark.parametrize("form", ["folder", "tokenizer.json"])
def test_a_models_tokenizer_can_be_taken_by_itself(
    library: Library, tmp_path: Path, form: str
) -> None:
    source = road.MODEL if form == "folder" else road.MODEL / "tokenizer.json"
    own = done(library, AddTokenizer(str(source)))["tokenizer_id"]
    folder = library.path(library.tokenizers.get(own).folder)
    assert not list(folder.glob("*.safetensors"))
    # The same files as the model's: its tokens are used as they are.
    first = done(library, Tokenize(1, 1))["tokenization_id"]
    assert done(library, Tokenize(1, None, own))["tokenization_id"] == first


def test_code_that_comes_with_a_tokenizer_is_never_run(library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    shutil.copy(road.MODEL / "tokenizer.json", folder / "tokenizer.json")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "eos_token": "<|endoftext|>"})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = done(library, AddTokenizer(str(folder)))["tokenizer_id"]
    assert not (tmp_path / "ran").exists()
    assert not list(library.path(library.tokenizers.get(own).folder).glob("*.py"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"hello", "neither a tokenizer.json nor"),
        ("tokenizer.json", b"{", "The tokenizer cannot be read"),
        ("tokenizer.model", b"hello", "This is not a SentencePiece model"),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    empty: Library, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(empty, AddTokenizer(str(tmp_path / name)), words)


def test_choices_name_repositories_or_ask_for_something() -> None:
    assert [choice.key for choice in CHOICES] == ["auto", "gpt2", "llama", "custom"]
    assert all(choice.help for choice in CHOICES)


# --- preview --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from mistudio.engine.models.loading import load_tokenizer

    return load_tokenizer(road.MODEL)


def test_a_preview_shows_what_a_dataset_of_this_text_would_hold(tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    shown = preview(tokenizer, text, TokenSettings(), None, 0)
    assert [chip.id for chip in shown.chips] == ids
    assert "".join(chip.text for chip in shown.chips) == text
    assert (shown.tokens, shown.windows, shown.cut) == (len(ids), 1, 0)
    cut = preview(tokenizer, text, TokenSettings(4, "max_length"), None, 0)
    assert [chip.id for chip in cut.chips] == ids[:4]
    assert (cut.tokens, cut.windows, cut.cut) == (len(ids), 1, len(ids) - 4)
    padded = preview(tokenizer, text, TokenSettings(40, "max_length"), None, 0)
    assert len(padded.chips) == 40
    assert sum(chip.padding for chip in padded.chips) == 40 - len(ids)
    whole = preview(tokenizer, text, TokenSettings(4, "none", "do_not_truncate"), None, 0)
    assert (whole.windows, whole.cut) == (len(ids) // 4, len(ids) % 4)
    assert preview(tokenizer, "", TokenSettings(8, "max_length"), None, 0).chips == ()


def test_parts_of_a_character_are_shown_by_their_own_spelling(tokenizer: Any) -> None:
    ids = tokenizer("😀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert all(piece(tokenizer, i) and "\ufffd" not in piece(tokenizer, i) for i in ids)


# --- statistics -----------------------------------------------------------------------------------


def test_text_is_looked_at_once(library: Library) -> None:
    assert library.datasets.get(1).statistics == {}
    assert warnings_of(library, 1) == []
    done(library, AnalyseDataset(1))
    found = library.datasets.get(1).statistics
    assert found["documents"] == library.datasets.get(1).documents
    assert len(found["duplicates"]["texts"]) == len(found["duplicates"]["largest"])
    done(library, AnalyseDataset(1))
    assert library.datasets.get(1).statistics["seconds"] == found["seconds"]
    done(library, AnalyseDataset(1, again=True))
    assert library.datasets.get(1).statistics["seconds"] != found["seconds"]
    assert any(w.title == "Few tokens for training" for w in warnings_of(library, 1))


def test_tokenisations_of_earlier_versions_are_counted_later(library: Library) -> None:
    (record,) = library.tokenizations.all()
    whole = record.statistics
    store = TokenStore(library.path(record.folder))
    new = {"zipf", "coverage", "once", "half_of_text", "vocabulary"}
    if not new & set(whole):  # the library was built by an earlier version
        done(library, AnalyseDataset(1))
        whole = library.tokenizations.get(record.id).statistics
    old = {key: value for key, value in whole.items() if key not in new}
    library.tokenizations.update(record.id, statistics=old)
    done(library, AnalyseDataset(1))
    found = library.tokenizations.get(record.id).statistics
    assert found == whole
    assert found["tokens"] == sum(store.meta.tokens.values()) - sum(
        max(0, n - 1) for n in store.meta.documents.values()
    )


def test_a_cancelled_look_leaves_nothing(library: Library) -> None:
    before = road.contents(library.root)
    control = Control()
    job = AnalyseDataset(1)
    row = run_job(library, job, submit(library, job), control, lambda _: control.cancel())
    assert row.status == "cancelled"
    assert library.datasets.get(1).statistics == {}
    assert road.contents(library.root) == before
