"""Hook points mean the same in every architecture, read what the model computes and change it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistudio.engine.models.hooks import SITES, HookedDecoder, HookPoint
from mistudio.errors import InvalidInput, UnsupportedModel

from . import tiny_models as tiny

DATA = Path(__file__).resolve().parents[2] / "data"
ARCHITECTURES = sorted(tiny.BUILDERS)
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@lru_cache
def decoder_of(name: str) -> HookedDecoder:
    return HookedDecoder(tiny.build(name))


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCAB, (batch, seq), generator=generator)


def all_points(layers: int = tiny.LAYERS) -> list[HookPoint]:
    return [HookPoint(site, layer) for layer in range(layers) for site in SITES]


def logits_of(decoder: HookedDecoder, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return decoder.model(input_ids=ids, use_cache=False).logits


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- names ----------------------------------------------------------------------------------------


def test_names_are_transformerlens_names_and_parse_back() -> None:
    names = {site: HookPoint(site, 3).name for site in SITES}
    assert names == {
        "resid_pre": "blocks.3.hook_resid_pre",
        "resid_post": "blocks.3.hook_resid_post",
        "mlp_in": "blocks.3.mlp.hook_in",
        "mlp_out": "blocks.3.hook_mlp_out",
        "attn_out": "blocks.3.hook_attn_out",
    }
    assert all(HookPoint.parse(point.name) == point for point in all_points(12))


@pytest.mark.parametrize(
    "name", ["", "blocks.3", "blocks.x.hook_mlp_out", "blocks.3.hook_z", "blocks.-1.hook_mlp_out"]
)
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        HookPoint.parse(name)


@pytest.mark.parametrize(("site", "layer"), [("resid", 0), ("mlp_out", -1), ("mlp_out", 1.5)])
def test_points_that_are_none_are_refused(site: str, layer: Any) -> None:
    with pytest.raises(InvalidInput):
        HookPoint(site, layer)


def test_points_sort_in_the_order_of_the_forward_pass() -> None:
    order = [(p.layer, p.site) for p in sorted(all_points(2))]
    sites = ["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    assert order == [(layer, site) for layer in (0, 1) for site in sites]


# --- what a site is -------------------------------------------------------------------------------


@every_architecture
def test_residual_stream_is_what_transformers_calls_hidden_states(name: str) -> None:
    decoder, ids = decoder_of(name), some_ids()
    with torch.inference_mode():
        hidden = decoder.model(
            input_ids=ids, use_cache=False, output_hidden_states=True
        ).hidden_states
    found = decoder.capture(ids, all_points())
    for layer in range(tiny.LAYERS):
        assert torch.equal(found[HookPoint("resid_pre", layer)], hidden[layer])
    for layer in range(tiny.LAYERS - 1):  # transformers' last one has gone through the final norm
        assert torch.equal(found[HookPoint("resid_post", layer)], hidden[layer + 1])


@every_architecture
def test_block_adds_attention_and_mlp_to_the_residual_stream(name: str) -> None:
    found = decoder_of(name).capture(some_ids(), all_points())
    for layer in range(tiny.LAYERS):
        pre, post, attn, mlp = (
            found[HookPoint(site, layer)]
            for site in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        )
        torch.testing.assert_close(pre + attn + mlp, post, atol=2e-6, rtol=1e-5)
        assert attn.norm() > 0.1 and mlp.norm() > 0.1


@every_architecture
def test_attention_reads_other_positions_and_the_mlp_does_not(name: str) -> None:
    # Swapping the two would keep the sum right.
    decoder, ids = decoder_of(name), some_ids(1)
    attn, mlp_in, mlp_out = (HookPoint(site, 1) for site in ("attn_out", "mlp_in", "mlp_out"))
    before = decoder.capture(ids, [attn, mlp_out])

    def other_start(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :1].flip(-1) * 2 + 1, tensor[:, 1:]], dim=1)

    with decoder.intervene({HookPoint("resid_pre", 1): other_start}):
        after = decoder.capture(ids, [attn])
    assert not torch.allclose(before[attn][:, 1:], after[attn][:, 1:], atol=1e-4)
    with decoder.intervene({mlp_in: other_start}):
        after = decoder.capture(ids, [mlp_out])
    assert not torch.allclose(before[mlp_out][:, 0], after[mlp_out][:, 0], atol=1e-4)
    torch.testing.assert_close(before[mlp_out][:, 1:], after[mlp_out][:, 1:])


@every_architecture
def test_mlp_out_depends_on_the_block_by_mlp_in_alone(name: str) -> None:
    decoder = decoder_of(name)
    pre, mlp_in, mlp_out = (HookPoint(site, 1) for site in ("resid_pre", "mlp_in", "mlp_out"))
    plain = decoder.capture(some_ids(), [mlp_in, mlp_out])
    edits = {pre: lambda tensor: 3 - tensor, mlp_in: lambda _tensor: plain[mlp_in]}
    with decoder.intervene(edits):
        assert torch.equal(decoder.capture(some_ids(), [mlp_out])[mlp_out], plain[mlp_out])


MODULE_PATHS = {
    "llama": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "gpt2": ("transformer.h.1", "attn", "mlp", "mlp"),
    "neox_parallel": ("gpt_neox.layers.1", "attention", "mlp", "mlp"),
    "neox_sequential": ("gpt_neox.layers.1", "attention", "mlp", "mlp"),
    "gemma2": ("model.layers.1", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "gemma3": ("model.layers.1", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "qwen2": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "qwen3": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "phi": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "mistral": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "opt": ("model.decoder.layers.1", "self_attn", "fc1", "fc2"),
    "olmo2": ("model.layers.1", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "mixtral": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "falcon": ("transformer.h.1", "self_attention", "mlp", "mlp"),
    "stablelm": ("model.layers.1", "self_attn", "mlp", "mlp"),
    "olmo": ("model.layers.1", "self_attn", "mlp", "mlp"),
    # BLOOM's modules add the stream themselves; the parts are their last linear maps.
    "bloom": (
        "transformer.h.1",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
}


@every_architecture
def test_module_paths_and_widths(name: str) -> None:
    decoder = decoder_of(name)
    block, attn, mlp_in, mlp_out = MODULE_PATHS[name]
    expected = {
        "resid_pre": block,
        "resid_post": block,
        "attn_out": f"{block}.{attn}",
        "mlp_in": f"{block}.{mlp_in}",
        "mlp_out": f"{block}.{mlp_out}",
    }
    assert {site: decoder.module_path(HookPoint(site, 1)) for site in SITES} == expected
    assert {decoder.width(HookPoint(site, 1)) for site in SITES} == {32}
    assert (decoder.n_layers, decoder.d_model, decoder.vocab_size) == (3, 32, tiny.VOCAB)


def test_sites_are_found_where_weights_are_still_zero() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    decoder = HookedDecoder(model)
    assert decoder.module_path(HookPoint("attn_out", 2)) == "model.layers.2.self_attn"
    assert decoder.module_path(HookPoint("mlp_out", 2)) == "model.layers.2.mlp"
    assert not model.model.layers[2].mlp.down_proj.weight.any()  # the probe worked on a copy


def test_half_precision_models_have_the_same_sites() -> None:
    decoder = HookedDecoder(tiny.build("gemma2").to(torch.bfloat16))
    points = {site: HookPoint(site, 2) for site in SITES}
    found = decoder.capture(some_ids(), points.values())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    path = decoder.module_path(points["mlp_out"])
    assert path == "model.layers.2.post_feedforward_layernorm"
    total = sum(found[points[s]].float() for s in ("resid_pre", "attn_out", "mlp_out"))
    torch.testing.assert_close(total, found[points["resid_post"]].float(), atol=5e-2, rtol=2e-2)


# --- capture --------------------------------------------------------------------------------------


@every_architecture
def test_nothing_runs_behind_the_deepest_point(name: str) -> None:
    decoder = decoder_of(name)
    ran: list[str] = []
    watched = {
        "next block": decoder.model.get_submodule(decoder.module_path(HookPoint("resid_pre", 2))),
        "head": decoder.model.get_output_embeddings(),
        "own block": decoder.model.get_submodule(decoder.module_path(HookPoint("resid_pre", 1))),
    }
    handles = [
        module.register_forward_hook(lambda *_, key=key: ran.append(key))
        for key, module in watched.items()
    ]
    points = {site: HookPoint(site, 1) for site in SITES}  # found first: probing runs forwards
    for point in points.values():
        decoder.check_point(point)
    try:
        ran.clear()
        decoder.capture(some_ids(), [points["resid_post"]])
        assert ran == ["own block"]
        ran.clear()
        for site in ("resid_pre", "attn_out", "mlp_in"):
            decoder.capture(some_ids(), [points[site]])
        assert ran == []
        logits_of(decoder, some_ids())
        assert ran == ["own block", "next block", "head"]
    finally:
        for handle in handles:
            handle.remove()


@every_architecture
def test_many_points_in_one_forward_equal_one_by_one(name: str) -> None:
    decoder, ids = decoder_of(name), some_ids()
    together = decoder.capture(ids, all_points())
    assert set(together) == set(all_points())
    for point in all_points():
        assert torch.equal(together[point], decoder.capture(ids, [point])[point]), point
        assert together[point].shape == (2, 9, 32)


def test_attention_mask_hides_what_it_masks() -> None:
    decoder, point = decoder_of("gpt2"), HookPoint("resid_post", 1)
    ids, others = some_ids(1), some_ids(1, seed=1)
    others[:, 3:] = ids[:, 3:]
    mask = torch.tensor([[0] * 3 + [1] * 6])
    seen, same = (decoder.capture(i, [point], mask)[point][:, 3:] for i in (ids, others))
    torch.testing.assert_close(seen, same)
    seen, same = (decoder.capture(i, [point])[point][:, 3:] for i in (ids, others))
    assert not torch.allclose(seen, same, atol=1e-3)


def test_position_ids_place_the_tokens() -> None:
    decoder, ids, point = decoder_of("gpt2"), some_ids(1), HookPoint("resid_pre", 0)
    counted = torch.arange(9)[None]
    plain = decoder.capture(ids, [point])[point]
    assert torch.equal(decoder.capture(ids, [point], position_ids=counted)[point], plain)
    table = decoder.model.get_submodule("transformer.wpe").weight
    moved = decoder.capture(ids, [point], position_ids=counted + 5)[point]
    torch.testing.assert_close(moved - plain, (table[5:14] - table[:9])[None])


def test_captured_tensors_are_copies_that_autograd_can_save() -> None:
    decoder, ids, point = decoder_of("llama"), some_ids(), HookPoint("resid_post", 1)
    tensor = decoder.capture(ids, [point])[point]
    weight = torch.ones(32, requires_grad=True)
    (tensor * weight).sum().backward()
    assert weight.grad is not None
    again = decoder.capture(ids, [point])[point]
    tensor.zero_()
    assert again.any()


def test_layer_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(InvalidInput, match="from 0 to 2"):
        decoder_of("llama").capture(some_ids(), [HookPoint("resid_post", 3)])


class _TupleBlock(nn.Module):
    """Old transformers' decoder blocks: the hidden states in a tuple."""

    def __init__(self, block: nn.Module, form: Any) -> None:
        super().__init__()
        self.block, self.form = block, form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(self.block(*args, **kwargs))


class _Unwrap(nn.Module):
    """Takes the tensor out again, so that the model around it runs on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return out[0] if isinstance(out, tuple | list) else out


def _with_wrapped_block(form: Any) -> tuple[HookedDecoder, HookedDecoder]:
    """(plain, the same model whose second block returns `form` of its output)."""
    plain, other = tiny.build("llama"), tiny.build("llama")
    decoder = HookedDecoder(other)
    wrapped = _TupleBlock(other.model.layers[1], form)
    other.model.layers[1] = _Unwrap(wrapped)
    decoder._blocks[1] = wrapped
    decoder._paths = {id(module): path for path, module in other.named_modules()}
    return HookedDecoder(plain), decoder


@pytest.mark.parametrize("form", [lambda t: (t, "attention"), lambda t: [t, None]])
def test_blocks_that_return_tuples_are_read_and_changed(form: Any) -> None:
    plain, wrapped = _with_wrapped_block(form)
    ids, point = some_ids(), HookPoint("resid_post", 1)
    assert torch.equal(wrapped.capture(ids, [point])[point], plain.capture(ids, [point])[point])
    with plain.intervene({point: torch.neg}), wrapped.intervene({point: torch.neg}):
        assert torch.equal(logits_of(wrapped, ids), logits_of(plain, ids))


@pytest.mark.parametrize("form", [lambda t: {"hidden": t}, lambda t: (None, t), lambda t: ()])
def test_outputs_of_another_kind_fail_with_the_name_of_the_site(form: Any) -> None:
    _, wrapped = _with_wrapped_block(form)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.hook_resid_post"):
        wrapped.capture(some_ids(), [HookPoint("resid_post", 1)])
    assert hooks_on(wrapped.model) == 0


def test_capture_fails_where_the_site_never_ran() -> None:
    decoder = HookedDecoder(tiny.build("llama"))
    point = HookPoint("resid_post", 1)
    decoder._blocks[1] = nn.Identity()  # a module that the model does not call
    decoder._paths[id(decoder._blocks[1])] = "nowhere"
    with pytest.raises(RuntimeError, match=r"captured at blocks\.1\.hook_resid_post"):
        decoder.capture(some_ids(), [point])


# --- intervene ------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("site", SITES)
def test_edits_reach_the_logits_and_adding_zero_does_not(name: str, site: str) -> None:
    decoder, ids = decoder_of(name), some_ids()
    point = HookPoint(site, 1)
    plain = logits_of(decoder, ids)
    shapes = []

    def push(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor + torch.linspace(-1, 1, 32)

    with decoder.intervene({point: lambda tensor: tensor + 0}) as nothing:
        assert torch.equal(logits_of(decoder, ids), plain)
    with decoder.intervene({point: push}):
        assert not torch.allclose(logits_of(decoder, ids), plain, atol=1e-3)
    assert nothing.calls == {point: 1}
    assert shapes == [(2, 9, 32)]
    assert torch.equal(logits_of(decoder, ids), plain)


@every_architecture
def test_removing_attention_and_mlp_leaves_the_stream_as_it_was(name: str) -> None:
    decoder, ids = decoder_of(name), some_ids()
    pre, post = HookPoint("resid_pre", 1), HookPoint("resid_post", 1)
    edits = {HookPoint("attn_out", 1): torch.zeros_like, HookPoint("mlp_out", 1): torch.zeros_like}
    with decoder.intervene(edits):
        found = decoder.capture(ids, [pre, post])
    torch.testing.assert_close(found[post], found[pre])


def test_edits_are_applied_at_every_step_of_cached_generation() -> None:
    decoder, ids = decoder_of("llama"), some_ids(1, 4)
    points = [HookPoint(site, 1) for site in SITES]
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with decoder.intervene(dict.fromkeys(points, note)) as edited:
        decoder.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert edited.calls == dict.fromkeys(points, 3)
    assert shapes == [(1, 4, 32)] * 5 + [(1, 1, 32)] * 10


def test_capture_inside_an_intervention_sees_the_edited_tensor() -> None:
    decoder, ids, point = decoder_of("llama"), some_ids(), HookPoint("resid_post", 1)
    with decoder.intervene({point: torch.zeros_like}):
        assert not decoder.capture(ids, [point])[point].any()


def test_probing_inside_an_intervention_does_not_count_as_an_edit() -> None:
    decoder = HookedDecoder(tiny.build("gemma2"))
    point = HookPoint("resid_post", 0)
    with decoder.intervene({point: torch.zeros_like}) as edited:
        path = decoder.module_path(HookPoint("mlp_out", 2))
        assert path == "model.layers.2.post_feedforward_layernorm"
        assert edited.calls == {point: 0}
        logits_of(decoder, some_ids())
    assert edited.calls == {point: 1}


def test_an_edit_that_was_never_reached_is_an_error() -> None:
    decoder = decoder_of("llama")
    hooks = hooks_on(decoder.model)  # transformers leaves some of its own
    shallow, deep = HookPoint("resid_post", 0), HookPoint("resid_post", 2)
    with (
        pytest.raises(RuntimeError, match=r"blocks\.2\.hook_resid_post was never applied"),
        decoder.intervene({deep: torch.neg, shallow: torch.neg}),
    ):
        decoder.capture(some_ids(), [shallow])
    assert hooks_on(decoder.model) == hooks


def test_hooks_are_gone_after_an_exception() -> None:
    decoder, ids = decoder_of("opt"), some_ids()
    plain, hooks = logits_of(decoder, ids), hooks_on(decoder.model)
    points = [HookPoint(site, 1) for site in SITES]

    def broken(_tensor: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), decoder.intervene(dict.fromkeys(points, broken)):
        logits_of(decoder, ids)
    with pytest.raises(ZeroDivisionError), decoder.intervene({points[0]: broken}):
        decoder.capture(ids, points)
    assert hooks_on(decoder.model) == hooks
    assert torch.equal(logits_of(decoder, ids), plain)


@pytest.mark.parametrize("edit", [lambda t: t[:, :1], lambda t: None])
def test_edits_that_return_something_else_are_an_error(edit: Any) -> None:
    decoder = decoder_of("llama")
    point = HookPoint("mlp_out", 1)
    with (
        pytest.raises(RuntimeError, match=r"the edit at blocks\.1\.hook_mlp_out returned"),
        decoder.intervene({point: edit}),
    ):
        logits_of(decoder, some_ids())


# --- logit lens -----------------------------------------------------------------------------------


def head_output(decoder: HookedDecoder, ids: Tensor) -> Tensor:
    """Logits before a soft cap."""
    seen: list[Tensor] = []
    head = decoder.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        logits_of(decoder, ids)
    finally:
        handle.remove()
    return seen[0]


def by_hand(decoder: HookedDecoder, resid: Tensor) -> Tensor:
    """Logits from the residual stream by gain, norm and unembedding weight, in fp64."""
    gain, centred = decoder.final_norm_gain()
    x = resid.double()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    if decoder.final_norm() is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return (x * gain.double()) @ decoder.unembedding_weight().double().T


def biases(decoder: HookedDecoder) -> Tensor:
    """What norm bias and head bias add to the logits, which the gain leaves out."""
    total = torch.zeros(tiny.VOCAB, dtype=torch.float64)
    norm, head = decoder.final_norm(), decoder.unembedding()
    if getattr(norm, "bias", None) is not None:
        total += decoder.unembedding_weight().double() @ norm.bias.double()
    if getattr(head, "bias", None) is not None:
        total += head.bias.double()
    return total


@every_architecture
def test_gain_and_unembedding_give_the_models_logits(name: str) -> None:
    decoder, ids = decoder_of(name), some_ids()
    last = HookPoint("resid_post", tiny.LAYERS - 1)
    expected = head_output(decoder, ids).double()
    with torch.inference_mode():
        lens = by_hand(decoder, decoder.capture(ids, [last])[last]) + biases(decoder)
    torch.testing.assert_close(lens, expected, atol=2e-4, rtol=1e-3)
    assert expected.std() > 0.1


@every_architecture
def test_layer_norms_are_centred_and_rms_norms_are_not(name: str) -> None:
    layer_norm = {"gpt2", "neox_parallel", "neox_sequential", "phi", "opt", "bloom"}
    layer_norm |= {"falcon", "stablelm", "olmo"}
    assert decoder_of(name).final_norm_gain()[1] == (name in layer_norm)


def test_gemmas_gain_is_one_plus_its_weight() -> None:
    decoder = decoder_of("gemma2")
    norm: Any = decoder.final_norm()
    torch.testing.assert_close(decoder.final_norm_gain()[0], 1 + norm.weight, atol=1e-4, rtol=1e-4)


def test_projection_before_the_head_is_folded_into_the_unembedding() -> None:
    decoder = HookedDecoder(tiny.opt_350m_like())
    assert decoder.final_norm() is None
    assert decoder.unembedding_weight().shape == (tiny.VOCAB, 32)
    last = HookPoint("resid_post", tiny.LAYERS - 1)
    with torch.inference_mode():
        lens = by_hand(decoder, decoder.capture(some_ids(), [last])[last])
    torch.testing.assert_close(lens, logits_of(decoder, some_ids()).double(), atol=1e-5, rtol=1e-4)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [tiny.granite, tiny.opt_350m_like])
def test_blocks_that_do_not_simply_add_keep_only_the_residual_sites(builder: Any) -> None:
    decoder = HookedDecoder(builder())
    for site in ("attn_out", "mlp_out", "mlp_in"):
        with pytest.raises(UnsupportedModel, match="resid_pre or resid_post"):
            decoder.check_point(HookPoint(site, 1))
    pre, post = HookPoint("resid_pre", 1), HookPoint("resid_post", 0)
    found = decoder.capture(some_ids(), [pre, post])
    assert torch.equal(found[pre], found[post])


@pytest.mark.parametrize(("builder", "word"), [(tiny.bert, "encoder"), (tiny.t5, "encoder-decod")])
def test_encoders_and_encoder_decoders_are_refused(builder: Any, word: str) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        HookedDecoder(builder())


# --- a trained model ------------------------------------------------------------------------------


def test_trained_model_predicts_text_of_its_kind() -> None:
    folder = DATA / "tiny-llama-0.9m"
    decoder = HookedDecoder(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = (
        "The old sailor leaned upon the rail and told us of the winter when his ship was lost "
        "among the ice, and how the crew lived two months on seals before a whaler found them. "
        "I recommend to the Congress the passage of a law for the protection of such men, and "
        "ask your attention to the harbors of the northern coast."
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    point = HookPoint("resid_post", 2)
    plain = cross_entropy(logits_of(decoder, ids), ids)
    assert 2.5 < plain < 4.2  # 3.3 on average over held-out text; random would be 6.9
    with decoder.intervene({point: torch.zeros_like}):
        assert cross_entropy(logits_of(decoder, ids), ids) > plain + 1


def cross_entropy(logits: Tensor, ids: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
