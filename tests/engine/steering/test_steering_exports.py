"""What leaves miStudio steers alike where it is read by others."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.exports import (
    added_vectors,
    cost_of_every_position,
    python_program,
    save_tensors,
    save_text,
    write_control_vector,
    write_neuronpedia_vector,
    write_tensors,
)
from mistudio.engine.steering.generation import Sampling, encode_prompt, generate
from mistudio.engine.steering.interventions import (
    FeatureEdit,
    Scope,
    SiteSteering,
    Steering,
    Variant,
    adding,
)
from mistudio.errors import Incompatible

POINTS = [HookPoint("resid_post", 1), HookPoint("resid_post", 3)]
SPECIAL = [0, 1]
MODEL = Path(__file__).resolve().parents[3] / "tests" / "data" / "tiny-llama-0.9m"


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer):
    return encode_prompt(tiny_tokenizer, "The government of the", False)


def vector_at(tiny, prompt, point, seed=3):
    """A random direction of 0.7 of the usual norm at a point."""
    norm = tiny.capture(torch.tensor([prompt]), [point])[point][0, 1:].norm(dim=1).median()
    v = torch.randn(128, generator=torch.Generator().manual_seed(seed))
    return v / v.norm() * norm * 0.7


@pytest.fixture(scope="module")
def variant(tiny, prompt):
    sites = [SiteSteering(Site.at(p), vector=vector_at(tiny, prompt, p, 3)) for p in POINTS]
    return Variant(tuple(sites))


# --- llama.cpp ------------------------------------------------------------------------------------


def read_gguf(path):
    """(metadata, {name: float32 values}) by the format's own text, with neither miStudio nor the
    gguf package: little endian, "GGUF", version 3, counts, key-values, tensor infos, aligned data
    (ggml/docs/gguf.md). Only the kinds that occur: uint32, string; 1-D float32."""
    data = path.read_bytes()
    at = 0

    def take(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    assert data[:4] == b"GGUF"
    at = 4
    assert take("I") == 3
    n_tensors, n_values = take("Q"), take("Q")
    metadata = {}
    for _ in range(n_values):
        key, kind = text(), take("I")
        assert kind in (4, 8)
        metadata[key] = text() if kind == 8 else take("I")
    infos = []
    for _ in range(n_tensors):
        name, dimensions = text(), take("I")
        assert dimensions == 1  # llama.cpp: "invalid (non-1D) direction tensor shape"
        size, kind, offset = take("Q"), take("I"), take("Q")
        assert kind == 0  # F32, or "invalid (non-F32) direction tensor type"
        infos.append((name, size, offset))
    start = -(-at // 32) * 32
    return metadata, {
        name: torch.frombuffer(bytearray(data[start + o : start + o + 4 * n]), dtype=torch.float32)
        for name, n, o in infos
    }


def as_llama_cpp(tiny, path, ids, first=0):
    """Logits with the file's directions added as llama.cpp does it: `common_control_vector_load`
    stores direction.N for layer N > 0, `build_cvec` adds it to `l_out` of block N, counted from 0.
    It does so from position 0 on; `first` leaves earlier ones alone."""
    _, directions = read_gguf(path)
    handles = []
    for name, values in directions.items():
        prefix, number = name.split(".")
        assert prefix == "direction" and int(number) > 0  # "invalid (zero) ... layer index"

        def add(module, args, output, values=values):
            return torch.cat([output[:, :first], output[:, first:] + values], dim=1)

        handles.append(tiny.model.model.layers[int(number)].register_forward_hook(add))
    try:
        with torch.inference_mode():
            return tiny.model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


def as_here(tiny, variant, ids):
    steering = Steering(tiny, [variant], [], ids.shape[1])
    steering.expect(ids, 0)
    with torch.inference_mode(), tiny.intervene(steering.edits()):
        return tiny.model(ids).logits


def kl(logits, others):
    """Mean KL(softmax(logits) || softmax(others)) by torch's own loss."""
    logs = [x.flatten(0, 1).log_softmax(1) for x in (others, logits)]
    return float(torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True))


def test_a_control_vector_steers_alike_where_others_read_it(tiny, prompt, variant, tmp_path):
    path = tmp_path / "control.gguf"
    write_control_vector(path, variant, "llama", {"features": "#1 × 2"})
    metadata, directions = read_gguf(path)
    assert metadata["general.architecture"] == "controlvector"
    assert metadata["controlvector.model_hint"] == "llama"
    assert metadata["controlvector.layer_count"] == len(directions) == 2
    assert "every position" in metadata["general.description"]
    assert metadata["mistudio.features"] == "#1 × 2"
    assert set(directions) == {"direction.1", "direction.3"}
    ids = torch.tensor([prompt])
    found = as_here(tiny, variant, ids)
    torch.testing.assert_close(as_llama_cpp(tiny, path, ids, first=1), found, rtol=0, atol=1e-4)
    # What the file and the screen warn of: from position 0 on it is not the same.
    wide = as_llama_cpp(tiny, path, ids)
    assert float((wide - found).abs().max()) > 1e-3
    cost, effect = cost_of_every_position(tiny, variant, prompt, [])
    here, unsteered = found[:, 1:], tiny.model(ids).logits[:, 1:]
    assert cost == pytest.approx(kl(here, wide[:, 1:]), rel=1e-3)
    assert effect == pytest.approx(kl(here, unsteered), rel=1e-3) and effect > 0.05
    assert cost_of_every_position(tiny, variant, prompt[:1], []) is None
    assert list(tmp_path.iterdir()) == [path]


def test_the_stream_before_a_block_is_that_after_the_one_before(tiny, prompt, tmp_path):
    point = HookPoint("resid_pre", 3)
    one = adding(point, vector_at(tiny, prompt, point))
    two = adding(HookPoint("resid_post", 2), torch.ones(128))
    write_control_vector(tmp_path / "x.gguf", Variant((*one.sites, *two.sites)), "llama")
    _, directions = read_gguf(tmp_path / "x.gguf")
    assert set(directions) == {"direction.2"}
    both, ids = Variant((*one.sites, *two.sites)), torch.tensor([prompt])
    torch.testing.assert_close(
        as_llama_cpp(tiny, tmp_path / "x.gguf", ids, first=1), as_here(tiny, both, ids),
        rtol=0, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "point", [HookPoint("resid_post", 0), HookPoint("resid_pre", 1), HookPoint("mlp_out", 2)]
)
def test_llama_cpp_has_no_place_for_some(point, tmp_path):
    with pytest.raises(Incompatible, match="no place") as caught:
        write_control_vector(tmp_path / "x.gguf", adding(point, torch.ones(128)), "llama")
    assert point.name in caught.value.what and caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def dictionary_of(activation, **more):
    g = torch.Generator().manual_seed(7)
    decoder = torch.randn(24, 128, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    return Dictionary(
        encoder=decoder * 4, b_enc=torch.randn(24, generator=g), decoder=decoder,
        b_dec=torch.randn(128, generator=g) * 0.1, activation=activation, **more,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["clamp", "clamp_min", "scale", "ablate", "orthogonal", "cap"])
def test_what_depends_on_the_text_is_no_vector(method, tmp_path):
    edits = (FeatureEdit(1, 2.0, 1.0), FeatureEdit(2, 2.0, 1.0, method))
    site = SiteSteering(Site.at(POINTS[0]), dictionary_of(ReLU()), edits)
    for write in (
        lambda v: write_control_vector(tmp_path / "x", v, "llama"),
        lambda v: write_tensors(tmp_path / "x", v, {}),
        lambda v: write_neuronpedia_vector(tmp_path / "x", v, "m", "l", 4),
    ):
        with pytest.raises(Incompatible, match="more than a vector") as caught:
            write(Variant((site,)))
        assert method in caught.value.what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [{"keep_norm": True}, {"control": 3}])
def test_neither_is_a_kept_norm_or_a_random_control(more, tmp_path):
    with pytest.raises(Incompatible, match="more than a vector"):
        write_control_vector(
            tmp_path / "x", Variant(adding(POINTS[0], torch.ones(128)).sites, **more), "llama"
        )


def test_a_write_that_fails_leaves_what_was_there(variant, tmp_path, monkeypatch):
    path = tmp_path / "v.gguf"
    path.write_bytes(b"before")
    import gguf

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        write_control_vector(path, variant, "llama")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


# --- tensors, Neuronpedia -------------------------------------------------------------------------


def test_tensors_are_what_is_added(variant, tmp_path):
    write_tensors(tmp_path / "v.safetensors", variant, {"model": "tiny"})
    found = load_file(tmp_path / "v.safetensors")
    assert set(found) == {point.name for point in POINTS}
    for point, vector in added_vectors(variant).items():
        assert torch.equal(found[point.name], vector)


def test_neuronpedias_vector_is_what_its_api_takes(variant, tmp_path):
    path = tmp_path / "v.json"
    with pytest.raises(Incompatible, match="one place"):
        write_neuronpedia_vector(path, variant, "tiny", "x", 4)
    write_neuronpedia_vector(path, adding(POINTS[0], torch.arange(4.0)), "tiny", "counting", 4)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "modelId": "tiny", "layerNumber": 2, "hookType": "hook_resid_pre",
        "vector": [0.0, 1.0, 2.0, 3.0], "vectorDefaultSteerStrength": 1.0,
        "vectorLabel": "counting",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("point", "width"),
    [(HookPoint("resid_post", 3), 4), (HookPoint("mlp_out", 1), 4), (POINTS[0], 24_577)],
)
def test_neuronpedia_has_no_place_for_some(point, width, tmp_path):
    with pytest.raises(Incompatible, match="no place"):
        write_neuronpedia_vector(
            tmp_path / "v.json", adding(point, torch.ones(width)), "tiny", "x", 4
        )
    assert list(tmp_path.iterdir()) == []


# --- the program ----------------------------------------------------------------------------------

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)
DRAWN = Sampling(
    temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.1, max_new_tokens=12, seed=4
)
MLP = Site.across_mlp(HookPoint("mlp_in", 2))


def cases(tiny, prompt):
    """Name: (variant, sampling, scope, a variant that must not be mistaken for it)."""
    at = Site.at(POINTS[0])
    norms = tiny.capture(torch.tensor([prompt]), [POINTS[0]])[POINTS[0]][0, 1:].norm(dim=1)
    top = float(norms.median()) * 0.5

    def edits(dictionary, method, strength, n=6, site=at, **more):
        found = tuple(FeatureEdit(i, strength, top, method) for i in range(n))
        return Variant((SiteSteering(site, dictionary, found),), **more)

    jump, relu = dictionary_of(JumpReLU(torch.full((24,), 5.0))), dictionary_of(ReLU())
    gated = dictionary_of(Gated(torch.full((24,), 1.6), torch.full((24,), 0.5)))
    normed = dictionary_of(ReLU(), norm="layer_norm", centre=torch.zeros(128))
    vector = vector_at(tiny, prompt, POINTS[1])
    first, last = adding(POINTS[0], vector), adding(POINTS[1], vector)
    both = edits(jump, "clamp", 1.5, 2, MLP).sites
    turned = Variant((*last.sites, *edits(jump, "orthogonal", 6.0).sites))
    return {
        "two layers": (Variant((*first.sites, *last.sites)), DRAWN, Scope(), last),
        "generated": (last, DRAWN, Scope("generated"), None),
        "from last": (last, GREEDY, Scope("from_last"), None),
        "last": (last, DRAWN, Scope("last"), None),
        "chosen": (first, DRAWN, Scope("chosen", (1, 2)), None),
        "keep norm": (Variant(adding(POINTS[0], 3 * vector).sites, keep_norm=True), DRAWN, Scope(),
                      adding(POINTS[0], 3 * vector)),
        "before a block": (adding(HookPoint("resid_pre", 2), vector), DRAWN, Scope(), None),
        "mlp's input": (adding(HookPoint("mlp_in", 2), vector * 2), DRAWN, Scope(), None),
        "clamp": (edits(jump, "clamp", 1.5), DRAWN, Scope(), edits(jump, "add", 1.5)),
        "clamp_min": (edits(relu, "clamp_min", 0.5), DRAWN, Scope(), edits(relu, "clamp", 0.5)),
        "scale": (edits(relu, "scale", 3.0), DRAWN, Scope(), edits(jump, "scale", 3.0)),
        "ablate": (edits(relu, "ablate", 0.0), DRAWN, Scope(), edits(jump, "ablate", 0.0)),
        "jump": (edits(jump, "scale", 3.0), DRAWN, Scope(), edits(relu, "scale", 3.0)),
        "orthogonal": (turned, DRAWN, Scope(), last),
        "cap": (edits(jump, "cap", -0.5), DRAWN, Scope(), None),
        "topk": (edits(dictionary_of(TopK(5)), "scale", 4.0), DRAWN, Scope(),
                 edits(relu, "scale", 4.0)),
        "gated": (edits(gated, "scale", 3.0), DRAWN, Scope(), edits(relu, "scale", 3.0)),
        "norm": (edits(normed, "clamp", 1.5), DRAWN, Scope(), edits(relu, "clamp", 1.5)),
        "transcoder": (Variant((*both, *last.sites)), DRAWN, Scope(), last),
    }  # fmt: skip


DRIVER = """
import importlib.abc, runpy, sys, traceback
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mistudio", "gguf", "PySide6"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Refuse())
for path in sys.argv[1:]:
    runpy.run_path(path)
    sys.stdout.write("\\0")
"""


def test_the_program_writes_the_same_text(tiny, tiny_tokenizer, prompt, tmp_path):
    """Every intervention, scope and setting, where neither miStudio nor its folder is at hand;
    each text differs from the unsteered one and from that of something like it, so that what is
    left out is seen."""
    expected = {}
    for name, (variant, sampling, scope, other) in cases(tiny, prompt).items():
        rows, others = (
            generate(
                tiny, tiny_tokenizer, prompt, [one], sampling, special_ids=SPECIAL,
                stop_ids={0}, scope=scope,
            ).rows
            for one in (variant, other or variant)
        )  # fmt: skip
        assert rows[0].ids != rows[1].ids, name
        assert other is None or others[1].ids != rows[1].ids, name
        program = python_program(
            variant,
            model=str(MODEL),
            module_paths=tiny.module_path,
            prompt_ids=prompt,
            special_ids=SPECIAL,
            stop_ids={0},
            sampling=sampling,
            scope=scope,
            vectors=f"{name}.safetensors",
        )
        save_tensors(tmp_path / f"{name}.safetensors", program.tensors, {})
        save_text(tmp_path / f"{name}.py", program.text)
        told = f"--- Unsteered\n{rows[0].text}\n--- Steered\n{rows[1].text}"
        expected[tmp_path / f"{name}.py"] = told
    done = subprocess.run(
        [sys.executable, "-I", "-c", DRIVER, *map(str, expected)],
        cwd="/" if sys.platform != "win32" else None,  # the vectors are beside the program
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    texts = [text.removesuffix("\n") for text in done.stdout.split("\0")]
    assert dict(zip(expected, texts, strict=False)) == expected


def test_the_program_of_a_random_control_is_refused(tiny, variant):
    with pytest.raises(Incompatible, match="control"):
        python_program(
            Variant(variant.sites, control=1), model="x", module_paths=tiny.module_path,
            prompt_ids=[1], special_ids=[], stop_ids=[], sampling=GREEDY,
        )  # fmt: skip
