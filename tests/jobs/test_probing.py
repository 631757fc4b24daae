"""Typed text through model and SAE, and that it never mixes with what a job computes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mistudio.engine.models.loading import load_tokenizer
from mistudio.engine.sae.files import load_sae
from mistudio.errors import Busy, InvalidInput
from mistudio.jobs.control import Control, Phase
from mistudio.jobs.job import JobContext, device_turn, run_job, submit
from mistudio.jobs.loaded import loaded_model
from mistudio.jobs.probing import Probe, probe
from mistudio.library.library import Library

TEXT = "The ships sailed — 日本 — in 1905. 🚢!"


@dataclass(frozen=True)
class Probing:
    """A job in whose run somebody types."""

    sae_id: int

    kind: ClassVar[str] = "probing"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("all", 1),)

    def title(self, library: Library) -> str:
        return "Probing"

    def run(self, context: JobContext) -> dict[str, Any]:
        with pytest.raises(Busy):
            probe(context.library, self.sae_id, TEXT)
        return {"busy": True}


@pytest.fixture
def found(library: Library) -> Probe:
    return probe(library, library.saes.all()[0].id, TEXT)


def test_activations_are_those_of_a_plain_forward_pass(library: Library, found: Probe) -> None:
    (sae,) = library.saes.all()
    model, saved = loaded_model(library, sae.model_id), load_sae(library.path(sae.folder))
    with torch.inference_mode():
        stream = model.capture(torch.tensor([found.ids]), [saved.site.input])[saved.site.input][0]
        codes = saved.dictionary.encode(stream.float()).dense().numpy()
    expected = np.where(found.counted[:, None], codes, 0)
    dense = np.zeros_like(expected)
    dense[found.tokens, found.features] = found.values
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-5)
    assert found.counted.sum() > 5
    strongest = int(found.features[found.values.argmax()])
    np.testing.assert_allclose(found.of(strongest), expected[:, strongest], rtol=1e-4, atol=1e-5)


def test_the_text_is_shown_to_the_character_and_the_first_position_never_counts(
    library: Library, found: Probe
) -> None:
    assert "".join(found.pieces[1:]) == TEXT
    assert len(found.pieces) == len(found.ids) == len(found.counted)
    assert not found.counted[0]
    assert 0 not in found.tokens
    record = library.models.get(library.saes.all()[0].model_id)
    tokenizer = load_tokenizer(library.path(record.folder))
    assert list(found.ids[1:]) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["", "word " * 3000])
def test_no_text_and_too_long_a_text_are_refused(library: Library, text: str) -> None:
    with pytest.raises(InvalidInput):
        probe(library, library.saes.all()[0].id, text)


def test_a_job_and_typed_text_wait_for_each_other(library: Library) -> None:
    (sae,) = library.saes.all()
    with device_turn, pytest.raises(Busy):
        probe(library, sae.id, TEXT)
    job = Probing(sae.id)
    number = submit(library, job)
    with device_turn:
        thread = threading.Thread(target=run_job, args=(library, job, number))
        thread.start()
        thread.join(0.3)
        assert library.jobs.get(number).status == "running"
    thread.join(60)
    assert library.jobs.get(number).result == {"busy": True}
    assert not device_turn.locked()


def test_a_job_that_waits_for_its_turn_hears_cancel(library: Library) -> None:
    job, control = Probing(1), Control()
    number = submit(library, job)
    control.cancel()
    with device_turn:
        assert run_job(library, job, number, control).status == "cancelled"
