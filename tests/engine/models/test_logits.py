"""Logits of the last positions: the model's own, from contiguous rows, with nothing left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.models.logits import last_logits
from models.tiny_models import BUILDERS, seeded

IDS = torch.tensor([[7, 9, 11, 13], [8, 10, 12, 14]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "bloom"])
def test_they_are_the_models_own_and_its_head_gets_contiguous_rows(name: str) -> None:
    model = HookedDecoder(seeded(BUILDERS[name]))
    head, seen = model.unembedding(), []
    with torch.inference_mode():
        whole = model.model(IDS, use_cache=False).logits
        handle = head.register_forward_hook(
            lambda module, args, out: seen.append(args[0].is_contiguous())
        )
        for keep in (1, 3):
            torch.testing.assert_close(last_logits(model, IDS, keep), whole[:, -keep:])
        cache = DynamicCache(config=model.model.config)
        last_logits(model, IDS[:, :3], 1, cache)
        torch.testing.assert_close(last_logits(model, IDS[:, 3:], 1, cache), whole[:, -1:])
        handle.remove()
    assert seen == [True] * 4
    assert not head._forward_pre_hooks


def test_nothing_is_left_behind_by_an_error() -> None:
    model = HookedDecoder(seeded(BUILDERS["llama"]))
    with pytest.raises(Exception, match=r"index|range"):
        last_logits(model, torch.tensor([[9999]]), 1)
    assert not model.unembedding()._forward_pre_hooks
