"""What leaves miStudio steers alike where it is read by others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.site import Site
from mistudio.engine.steering.exports import (
    added_vectors,
    python_program,
    write_control_vector,
    write_neuronpedia_vector,
    write_tensors,
)
from mistudio.engine.steering.generation import Sampling, encode_prompt, generate
from mistudio.engine.steering.interventions import (
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


@pytest.fixture(scope="module")
def variant(tiny, prompt):
    norms = tiny.capture(torch.tensor([prompt]), POINTS)
    g = torch.Generator().manual_seed(3)
    vectors = []
    for point in POINTS:
        v = torch.randn(128, generator=g)
        vectors.append(v / v.norm() * norms[point][0, 1:].norm(dim=1).median() * 0.7)
    return Variant(
        tuple(SiteSteering(Site.at(p), vector=v) for p, v in zip(POINTS, vectors, strict=True))
    )


def adder(values):
    def add(module, args, output):
        return torch.cat([output[:, :1], output[:, 1:] + values], dim=1)

    return add


def test_a_control_vector_steers_alike_where_others_read_it(tiny, prompt, variant, tmp_path):
    """The file read by llama.cpp's own package, the directions added by plain hooks."""
    path = tmp_path / "control.gguf"
    write_control_vector(path, variant, "llama", tiny.n_layers)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == tiny.n_layers
    directions = {t.name: np.array(t.data) for t in reader.tensors}
    assert set(directions) == {"direction.1", "direction.3"}
    handles = []
    for name, values in directions.items():
        block = tiny.model.model.layers[int(name.removeprefix("direction."))]

        handles.append(block.register_forward_hook(adder(torch.from_numpy(values))))
    ids = torch.tensor([prompt])
    expected = tiny.model(ids).logits
    for handle in handles:
        handle.remove()
    steering = Steering(tiny, [variant], [], len(prompt))
    steering.expect(ids, 0)
    with tiny.intervene(steering.edits()):
        found = tiny.model(ids).logits
    torch.testing.assert_close(found, expected)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("point", [HookPoint("resid_post", 0), HookPoint("mlp_out", 2)])
def test_llama_cpp_has_no_place_for_some(point, tmp_path):
    with pytest.raises(Incompatible, match="no place"):
        write_control_vector(tmp_path / "x.gguf", adding(point, torch.ones(128)), "llama", 4)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_what_is_added(variant, tmp_path):
    write_tensors(tmp_path / "v.safetensors", variant, {"model": "tiny"})
    found = load_file(tmp_path / "v.safetensors")
    assert set(found) == {point.name for point in POINTS}
    for point, vector in added_vectors(variant).items():
        assert torch.equal(found[point.name], vector)


def test_neuronpedias_vector_is_one_place(variant, tmp_path):
    import json

    with pytest.raises(Incompatible, match="one place"):
        write_neuronpedia_vector(tmp_path / "v.json", variant, "tiny", "x")
    one = adding(POINTS[0], torch.arange(4.0))
    write_neuronpedia_vector(tmp_path / "v.json", one, "tiny", "counting")
    found = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert found["vector"] == [0.0, 1.0, 2.0, 3.0]
    assert (found["layer"], found["hookName"]) == (1, POINTS[0].name)


def test_the_program_writes_the_same_text(tiny, tiny_tokenizer, prompt, variant, tmp_path):
    scope = Scope("from_last")
    sampling = Sampling(
        temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.1, max_new_tokens=10, seed=4
    )
    row = generate(
        tiny, tiny_tokenizer, prompt, [variant], sampling, special_ids=SPECIAL, stop_ids={0},
        scope=scope,
    ).rows[1]  # fmt: skip
    write_tensors(tmp_path / "steering.safetensors", variant, {})
    program = python_program(
        variant,
        model=str(MODEL),
        module_paths={point: tiny.module_path(point) for point in POINTS},
        prompt_ids=prompt,
        special_ids=SPECIAL,
        stop_ids={0},
        sampling=sampling,
        scope=scope,
    )
    (tmp_path / "steer.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "steer.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == row.text
