"""Captured tensors against a reference that shares nothing with the hooks: for every architecture
its blocks are computed here by hand, module by module, as their papers write them down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mistudio.engine.models.hooks import SITES, HookedDecoder, HookPoint

from . import tiny_models as tiny

SEQ = 9


@dataclass(frozen=True)
class Given:
    """What attention needs beside the hidden states: an additive causal mask [1, 1, seq, seq], and
    rotary angles or ALiBi slopes, where the architecture has them."""

    mask: Tensor
    rotary: Any = None
    alibi: Tensor | None = None


# (attn_out, mlp_in, mlp_out) of a block for what enters it
Block = Callable[[Any, Tensor, Given], tuple[Tensor, Tensor, Tensor]]


def attend(module: nn.Module, x: Tensor, given: Given) -> Tensor:
    return module(hidden_states=x, attention_mask=given.mask, position_embeddings=given.rotary)[0]


def sequential(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """x + attn(norm(x)), then + mlp(norm(.)): Llama and most that came after it."""
    attn = attend(block.self_attn, block.input_layernorm(x), given)
    mlp_in = block.post_attention_layernorm(x + attn)
    return attn, mlp_in, block.mlp(mlp_in)


def gpt2(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    attn = block.attn(block.ln_1(x), attention_mask=given.mask)[0]
    mlp_in = block.ln_2(x + attn)
    return attn, mlp_in, block.mlp(mlp_in)


def neox(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    attn = block.attention(
        block.input_layernorm(x), attention_mask=given.mask, position_embeddings=given.rotary
    )[0]
    mlp_in = block.post_attention_layernorm(x if block.use_parallel_residual else x + attn)
    return attn, mlp_in, block.mlp(mlp_in)


def sandwich(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Gemma 2 and 3: a norm before and one behind each part; what is added is the normed."""
    attn = block.post_attention_layernorm(attend(block.self_attn, block.input_layernorm(x), given))
    mlp_in = block.pre_feedforward_layernorm(x + attn)
    return attn, mlp_in, block.post_feedforward_layernorm(block.mlp(mlp_in))


def behind(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """OLMo 2: norms behind the parts only."""
    attn = block.post_attention_layernorm(attend(block.self_attn, x, given))
    mlp_in = x + attn
    return attn, mlp_in, block.post_feedforward_layernorm(block.mlp(mlp_in))


def phi(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """One norm, attention and MLP side by side."""
    normed = block.input_layernorm(x)
    return attend(block.self_attn, normed, given), normed, block.mlp(normed)


def falcon(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    normed = block.input_layernorm(x)
    attn = block.self_attention(
        normed, alibi=None, attention_mask=given.mask, position_embeddings=given.rotary
    )[0]
    return attn, normed, block.mlp(normed)


def opt(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    normed = block.self_attn_layer_norm(x)
    attn = block.self_attn(hidden_states=normed, attention_mask=given.mask)[0]
    mlp_in = block.final_layer_norm(x + attn)
    return attn, mlp_in, block.fc2(torch.relu(block.fc1(mlp_in)))


def bloom(block: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Its modules add what they are told to; here nothing."""
    nothing = torch.zeros_like(x)
    attn = block.self_attention(
        block.input_layernorm(x), nothing, alibi=given.alibi, attention_mask=given.mask
    )[0]
    mlp_in = block.post_attention_layernorm(x + attn)
    return attn, mlp_in, block.mlp(mlp_in, nothing)


BLOCKS: dict[str, tuple[str, Block]] = {
    "llama": ("model.layers", sequential),
    "mistral": ("model.layers", sequential),
    "mixtral": ("model.layers", sequential),
    "olmo": ("model.layers", sequential),
    "qwen2": ("model.layers", sequential),
    "qwen3": ("model.layers", sequential),
    "stablelm": ("model.layers", sequential),
    "gemma2": ("model.layers", sandwich),
    "gemma3": ("model.layers", sandwich),
    "olmo2": ("model.layers", behind),
    "phi": ("model.layers", phi),
    "gpt2": ("transformer.h", gpt2),
    "neox_parallel": ("gpt_neox.layers", neox),
    "neox_sequential": ("gpt_neox.layers", neox),
    "falcon": ("transformer.h", falcon),
    "opt": ("model.decoder.layers", opt),
    "bloom": ("transformer.h", bloom),
}


def given_to(model: Any, root: Any, layer: int, x: Tensor) -> Given:
    """What the model around the blocks hands to block `layer`."""
    seq = x.shape[1]
    mask = torch.full((seq, seq), torch.finfo(x.dtype).min).triu(1)[None, None]
    if hasattr(root, "build_alibi_tensor"):
        ones = torch.ones(x.shape[0], seq)
        return Given(mask, alibi=root.build_alibi_tensor(ones, model.config.n_head, x.dtype))
    if not hasattr(root, "rotary_emb"):
        return Given(mask)
    positions = torch.arange(seq)[None]
    kinds = getattr(model.config, "layer_types", None)
    if model.config.model_type.startswith("gemma3"):  # its local layers have angles of their own
        return Given(mask, root.rotary_emb(x, positions, kinds[layer]))
    return Given(mask, root.rotary_emb(x, positions))


def reference(model: Any, blocks_path: str, block: Block, ids: Tensor) -> dict[HookPoint, Tensor]:
    """Every site of every layer, from the embeddings on."""
    root = model.get_submodule(blocks_path.rsplit(".", 1)[0])
    found: dict[HookPoint, Tensor] = {}
    with torch.no_grad():
        x = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[0]
        for layer, module in enumerate(model.get_submodule(blocks_path)):
            attn, mlp_in, mlp_out = block(module, x, given_to(model, root, layer, x))
            found[HookPoint("resid_pre", layer)] = x
            found[HookPoint("attn_out", layer)] = attn
            found[HookPoint("mlp_in", layer)] = mlp_in
            found[HookPoint("mlp_out", layer)] = mlp_out.reshape(x.shape)
            x = x + attn + found[HookPoint("mlp_out", layer)]
            found[HookPoint("resid_post", layer)] = x
    return found


# Gemma 2 has a soft cap on attention, which PyTorch's kernels know nothing of.
CASES = [(name, "eager") for name in sorted(tiny.BUILDERS)]
CASES += [(name, "sdpa") for name in sorted(tiny.BUILDERS) if name != "gemma2"]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_captured_tensors_equal_a_forward_pass_by_hand(name: str, attention: str) -> None:
    model = tiny.build(name)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, tiny.VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(4))
    want = reference(model, *BLOCKS[name], ids)
    assert set(want) == {HookPoint(s, i) for i in range(tiny.LAYERS) for s in SITES}
    found = HookedDecoder(model).capture(ids, want)
    for point in want:
        torch.testing.assert_close(found[point], want[point], atol=1e-5, rtol=1e-5)


def test_the_reference_covers_every_architecture_of_the_tests() -> None:
    assert set(BLOCKS) == set(tiny.BUILDERS)
    assert len({name.split("_")[0] for name in BLOCKS}) >= 10
