"""Importers give the numbers that the libraries' own classes give (tests/peers/make_fixtures.py
wrote both the files and the numbers), or refuse with a reason; nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import JumpReLU, TopK
from mistudio.engine.sae.files import load_sae, save_sae
from mistudio.engine.sae.formats.common import ImportedSae
from mistudio.engine.sae.formats.reading import IMPORT_FORMATS, find_saes, read_sae
from mistudio.engine.sae.formats.saelens import WEIGHTS
from mistudio.engine.sae.site import Site
from mistudio.errors import CorruptFile, Incompatible, InvalidInput, NotFound, UserError

FIXTURES = Path(__file__).parents[2] / "data" / "sae_fixtures"
REFUSED = {
    "saelens-constant-norm": "constant_norm_rescale",
    "saelens-checkpoint-without-its-scale": r"nowhere in its folder.*activation_scaler\.json",
    "sparsify-groupmax": "groupmax",
}
NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
READABLE = [name for name in NAMES if name not in REFUSED]

POST_3 = ("resid_post", "resid_post", 3)
MLP_3 = ("mlp_in", "mlp_out", 3)
PLACES = {
    **dict.fromkeys([n for n in READABLE if n.startswith("saelens")], POST_3),
    **dict.fromkeys([n for n in READABLE if n.startswith("dictionary-learning")], POST_3),
    **dict.fromkeys([n for n in READABLE if n.endswith("transcoder")], MLP_3),
    "saelens-gpt2-small-res-jb": ("resid_pre", "resid_pre", 8),
    "saelens-before-6-topk": ("mlp_out", "mlp_out", 4),
    "sparsify-sae": POST_3,
    "sparsify-sae-by-expansion": ("resid_post", "resid_post", 5),
    "sparsify-sae-skip": ("mlp_out", "mlp_out", 3),
    "sparsify-transcoder-skip": ("mlp_in", "mlp_out", 5),
    "gemma-scope-resid_post": ("resid_post", "resid_post", 7),
    "gemma-scope-mlp_out": ("mlp_out", "mlp_out", 7),
    "gemma-scope-embedding": ("resid_pre", "resid_pre", 0),
    "gemma-scope-2-resid_post": ("resid_post", "resid_post", 7),
    "gemma-scope-2-transcoder": ("mlp_in", "mlp_out", 7),
    "gemma-scope-2-transcoder-affine": ("mlp_in", "mlp_out", 7),
    "llama-scope": ("resid_post", "resid_post", 15),
    "openai-topk": ("resid_post", "resid_post", 8),
    "openai-relu": ("mlp_out", "mlp_out", 3),
    "openai-tied": ("attn_out", "attn_out", 11),
}
MODELS = {
    "saelens-standard": "pythia-70m",
    "saelens-gpt2-small-res-jb": "gpt2-small",
    "dictionary-learning-BatchTopKSAE": "EleutherAI/pythia-70m-deduped",
    "gemma-scope-resid_post": "google/gemma-2-2b",
    "gemma-scope-2-transcoder": "google/gemma-3-1b-pt",
    "llama-scope": "meta-llama/Llama-3.1-8B",
    "openai-topk": "openai-community/gpt2",
}


def one(path: Path, format: str | None = None) -> ImportedSae:
    (found,) = read_sae(path, format=format)
    return found


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name / "files", tmp_path / name))


def off_by(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).abs().max() / want.abs().max())


def agrees(name: str, found: ImportedSae) -> None:
    path = FIXTURES / name / "expected.safetensors"
    want = load_file(path)
    with safe_open(path, framework="pt") as file:
        unit = file.metadata().get("unit")
    dictionary = found.dictionary
    counted = dictionary.with_unit_decoder() if unit == "unit decoder" else dictionary
    acts = counted.encode(want["x"]).dense()
    assert acts.gt(0).equal(want["acts"].gt(0))
    assert off_by(want["acts"], acts) < 1e-6
    assert off_by(want["out"], dictionary.reconstruct(want["x"])) < 1e-6


def test_every_format_has_fixtures_of_its_own_library():
    assert len(READABLE) >= 40
    assert {one(FIXTURES / name / "files").format for name in READABLE} | {"safetensors"} == set(
        IMPORT_FORMATS
    )


@pytest.mark.parametrize("name", READABLE)
def test_the_numbers_are_those_of_the_library(name):
    found = one(FIXTURES / name / "files")
    agrees(name, found)
    site = found.site
    assert site is not None
    assert (site.input.site, site.output.site, site.layer) == PLACES[name]
    assert found.model_name == MODELS.get(name, found.model_name)
    json.dumps(found.details)


@pytest.mark.parametrize("name", READABLE)
def test_what_is_imported_is_kept_with_the_same_numbers(tmp_path, name):
    found = one(FIXTURES / name / "files")
    assert found.site is not None
    save_sae(found.dictionary, tmp_path, site=found.site, model_name="m", unit_decoder=False)
    again = load_sae(tmp_path)
    agrees(name, ImportedSae(again.dictionary, again.site, "saelens", tmp_path))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_compute_something_else_is_refused_with_the_reason(name):
    with pytest.raises(Incompatible, match=REFUSED[name]) as caught:
        read_sae(FIXTURES / name / "files")
    assert caught.value.next_step


# --- which format, and where --------------------------------------------------------------------


def test_a_folder_of_many_is_read_in_natural_order(tmp_path):
    for hookpoint in ("layers.10", "layers.9", "layers.2.mlp"):
        shutil.copytree(FIXTURES / "sparsify-sae" / "files" / "layers.3", tmp_path / hookpoint)
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m"}))
    (tmp_path / "state.pt").write_bytes(b"an optimiser's state")
    found = read_sae(tmp_path)
    assert [str(sae.site) for sae in found] == [
        "blocks.2.hook_mlp_out",
        "blocks.9.hook_resid_post",
        "blocks.10.hook_resid_post",
    ]
    assert {sae.model_name for sae in found} == {"EleutherAI/pythia-160m"}


def test_a_folder_of_saelens_folders_is_read_whole(tmp_path):
    for name in ("saelens-topk", "saelens-gated"):
        shutil.copytree(FIXTURES / name / "files", tmp_path / name)
    assert len(read_sae(tmp_path, format="saelens")) == 2


def test_all_or_nothing(tmp_path):
    shutil.copytree(FIXTURES / "saelens-topk" / "files", tmp_path / "good")
    shutil.copytree(FIXTURES / "saelens-constant-norm" / "files", tmp_path / "other")
    with pytest.raises(Incompatible):
        read_sae(tmp_path)


def test_a_download_caches_links_do_not_hide_the_folders_names(tmp_path):
    place = tmp_path / "models--google--gemma-scope-2b-pt-res/snapshots/0a/layer_7/w/l0"
    place.mkdir(parents=True)
    blob = tmp_path / "blobs" / "5d41"
    blob.parent.mkdir()
    shutil.copy(next((FIXTURES / "gemma-scope-resid_post").rglob("params.npz")), blob)
    (place / "params.npz").symlink_to(blob)
    assert one(tmp_path / "models--google--gemma-scope-2b-pt-res").site == Site.at(
        HookPoint("resid_post", 7)
    )


def test_a_file_without_its_folders_does_not_say_where_it_belongs(tmp_path):
    shutil.copy(next((FIXTURES / "gemma-scope-resid_post").rglob("params.npz")), tmp_path)
    shutil.copy(next((FIXTURES / "openai-topk").rglob("8.pt")), tmp_path / "some.pt")
    assert one(tmp_path / "params.npz").site is None
    assert one(tmp_path / "some.pt").site is None
    agrees("openai-topk", one(tmp_path / "some.pt"))


def test_the_format_can_be_named_and_then_must_be_right():
    folder = FIXTURES / "saelens-topk" / "files"
    assert one(folder, "saelens").format == "saelens"
    with pytest.raises(Incompatible, match="holds saelens, not sparsify"):
        read_sae(folder, format="sparsify")
    with pytest.raises(InvalidInput, match="onnx"):
        read_sae(folder, format="onnx")


def test_what_holds_no_sae_is_refused(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        read_sae(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(NotFound, match="holds no SAE"):
        read_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(NotFound, match=r"sae_weights\.safetensors"):
        read_sae(tmp_path)


def test_a_language_model_is_no_sae(tiny_folder):
    with pytest.raises(NotFound, match="holds no SAE"):
        read_sae(tiny_folder)


def test_looking_ends_before_a_whole_disk_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr("mistudio.engine.sae.formats.reading.FOLDERS", 5)
    for number in range(9):
        (tmp_path / f"a{number}").mkdir()
    shutil.copytree(FIXTURES / "saelens-topk" / "files", tmp_path / "z")
    with pytest.raises(NotFound):
        find_saes(tmp_path)


# --- SAELens ------------------------------------------------------------------------------------


def edit(folder: Path, **changes: object) -> Path:
    """The folder with its cfg.json changed; None takes a key away."""
    config = json.loads((folder / "cfg.json").read_text())
    for key, value in changes.items():
        target = config
        while "__" in key:
            head, _, key = key.partition("__")
            target = target[head]
        target[key] = value
        if value is None:
            del target[key]
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def res_jb(tmp_path: Path, **changes: object) -> ImportedSae:
    folder = copied("saelens-gpt2-small-res-jb", tmp_path) / "blocks.8.hook_resid_pre"
    return one(edit(folder, **changes))


def test_old_gpt2_saes_are_centred_and_say_so(tmp_path):
    found = res_jb(tmp_path)
    assert found.dictionary.norm == "centre"
    assert any("mean over channels" in note for note in found.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "gemma-2b"},
        {"model_name": "mistral-7b"},
        {"model_from_pretrained_kwargs": {"center_writing_weights": False}},
        {"normalize_activations": "layer_norm"},
    ],
)
def test_saes_of_models_that_were_not_centred_are_not(tmp_path, changes):
    assert res_jb(tmp_path, **changes).dictionary.norm != "centre"


def test_centring_is_read_from_current_folders_too(tmp_path):
    folder = edit(
        copied("saelens-standard", tmp_path),
        metadata__model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    assert one(folder).dictionary.norm == "centre"


def test_a_scaling_factor_of_ones_is_dropped_and_another_is_folded(tmp_path):
    folder = copied("saelens-gpt2-small-res-jb", tmp_path) / "blocks.8.hook_resid_pre"
    plain = one(folder).dictionary
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": 1.5 * torch.ones(64)}, folder / WEIGHTS)
    with pytest.raises(Incompatible, match="whether it applies"):
        read_sae(folder)
    scaled = one(edit(folder, finetuning_scaling_factor=True)).dictionary
    assert torch.allclose(scaled.decoder, 1.5 * plain.decoder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "matching_pursuit"}, "matching_pursuit"),
        ({"reshape_activations": "hook_z"}, "heads"),
        ({"hook_head_index": 3}, "head"),
        ({"normalize_activations": "constant_scalar_rescale"}, "constant_scalar_rescale"),
        ({"metadata__hook_name": "blocks.3.attn.hook_z"}, r"belongs to blocks\.3\.attn\.hook_z"),
        ({"metadata__hook_name": "hook_embed"}, "hook_embed"),
    ],
)
def test_saelens_folders_that_cannot_be_read_say_why(tmp_path, changes, reason):
    folder = edit(copied("saelens-standard", tmp_path), **changes)
    with pytest.raises(Incompatible, match=reason):
        read_sae(folder)


def test_gemma_scope_2_transcoders_saved_by_saelens_are_placed_by_their_module(tmp_path):
    folder = edit(
        copied("saelens-jumprelu_transcoder", tmp_path), metadata__hook_name="blocks.3.hook_mlp_in"
    )
    with pytest.raises(Incompatible, match="hook_mlp_in"):
        read_sae(folder)
    edit(folder, metadata__hf_hook_name="model.layers.3.pre_feedforward_layernorm.output")
    site = one(folder).site
    assert site is not None and site.input == HookPoint("mlp_in", 3)


def test_an_old_folder_with_another_activation_function_is_refused(tmp_path):
    with pytest.raises(Incompatible, match="tanh-relu"):
        res_jb(tmp_path, activation_fn_str="tanh-relu")


def test_an_old_folder_that_scaled_its_inputs_needs_the_factor(tmp_path):
    with pytest.raises(Incompatible, match="nowhere in its folder"):
        res_jb(tmp_path / "scaled", normalize_activations=True)
    assert res_jb(tmp_path / "plain", normalize_activations=False).site is not None


def test_an_old_jumprelu_by_its_logarithm(tmp_path):
    folder = copied("saelens-jumprelu", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    want = tensors.pop("threshold")
    save_file({**tensors, "log_threshold": want.log()}, folder / "sae_weights.safetensors")
    activation = one(folder).dictionary.activation
    assert isinstance(activation, JumpReLU) and torch.allclose(activation.threshold, want)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"d_in": 17}, "d_in 17"),
        ({"d_sae": "many"}, "d_sae"),
        ({"k": 0}, "k is 0"),
        ({"k": 65}, "more than 64"),
        ({"k": True}, "k is True"),
        ({"k": 2.5}, "k is 2.5"),
        ({"k": None}, "k is None"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path, changes, reason):
    folder = edit(copied("saelens-topk", tmp_path), **changes)
    with pytest.raises(CorruptFile, match=reason):
        read_sae(folder)


def test_an_unscaled_checkpoint_needs_a_sensible_factor(tmp_path):
    folder = copied("saelens-checkpoint-standard-scaled", tmp_path)
    for text in ('{"scaling_factor": null}', '{"scaling_factor": -1}', "[]", "{"):
        (folder / "activation_scaler.json").write_text(text)
        with pytest.raises(CorruptFile):
            read_sae(folder)


def test_whitening_without_its_matrices_is_refused(tmp_path):
    folder = copied("saelens-checkpoint-standard-whitened", tmp_path)
    (folder / "activation_whitening.safetensors").unlink()
    with pytest.raises(Incompatible, match="whitening"):
        read_sae(folder)


# --- the other formats --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hookpoint", "transcode", "place"),
    [
        ("layers.7", False, ("resid_post", "resid_post", 7)),
        ("layers.7", True, ("resid_pre", "resid_post", 7)),
        ("h.7.attn", False, ("attn_out", "attn_out", 7)),
        ("layers.7.self_attn", False, ("attn_out", "attn_out", 7)),
        ("layers.7.post_feedforward_layernorm", False, ("mlp_out", "mlp_out", 7)),
        ("gpt_neox.layers.7.mlp", True, ("mlp_in", "mlp_out", 7)),
    ],
)
def test_hookpoints_are_read_as_sites(tmp_path, hookpoint, transcode, place):
    files = FIXTURES / "sparsify-sae" / "files" / "layers.3"
    shutil.copytree(files, tmp_path / hookpoint)
    edit(tmp_path / hookpoint, transcode=transcode)
    site = one(tmp_path).site
    assert site is not None and (site.input.site, site.output.site, site.layer) == place


@pytest.mark.parametrize("hookpoint", ["embed_tokens", "layers.3.mlp.gate_proj", "layers.3.norm"])
def test_hookpoints_that_are_no_site_are_refused(tmp_path, hookpoint):
    shutil.copytree(FIXTURES / "sparsify-sae" / "files" / "layers.3", tmp_path / hookpoint)
    with pytest.raises(Incompatible, match=hookpoint):
        read_sae(tmp_path)


def test_an_attention_layer_is_no_transcoder(tmp_path):
    shutil.copytree(
        FIXTURES / "sparsify-transcoder" / "files" / "layers.3.mlp", tmp_path / "h.3.attn"
    )
    with pytest.raises(Incompatible, match="attn"):
        read_sae(tmp_path)


def test_topk_and_batchtopk_are_told_apart_by_the_configuration_only(tmp_path):
    folder = copied("dictionary-learning-AutoEncoderTopK", tmp_path) / "trainer_0"
    (folder / "config.json").unlink()
    with pytest.raises(Incompatible, match=r"look alike.*config\.json"):
        read_sae(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_other_dictionaries_are_known_by_their_tensors(tmp_path, kind):
    name = f"dictionary-learning-{kind}"
    folder = copied(name, tmp_path) / "trainer_0"
    (folder / "config.json").unlink()
    found = one(folder)
    agrees(name, found)
    assert found.site is None and found.layer is None


def test_interim_states_are_read_only_when_named(tmp_path):
    folder = copied("dictionary-learning-AutoEncoderTopK", tmp_path) / "trainer_0"
    (folder / "checkpoints").mkdir()
    interim = folder / "checkpoints" / "ae_100.pt"
    shutil.copy(folder / "ae.pt", interim)
    assert one(folder).path == folder / "ae.pt"
    assert one(interim).path == interim
    assert isinstance(one(interim).dictionary.activation, TopK)


def test_a_threshold_that_was_never_set_is_told():
    (note,) = one(FIXTURES / "dictionary-learning-threshold-never-set" / "files").notes
    assert "never set" in note


def test_an_interrupted_run_is_told():
    (note,) = one(FIXTURES / "dictionary-learning-interrupted" / "files").notes
    assert "interrupted run, at step 500" in note


def test_a_submodule_without_a_known_name_leaves_the_site_open(tmp_path):
    folder = copied("dictionary-learning-AutoEncoderTopK", tmp_path) / "trainer_0"
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["submodule_name"] = None
    (folder / "config.json").write_text(json.dumps(config))
    found = one(folder)
    assert (found.site, found.layer) == (None, 3)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("gpt2-small/resid_post_attn_v5_32k/autoencoders/8.pt", "between attention and MLP"),
        ("gpt2-small/mlp_post_act/autoencoders/8.pt", "hidden layer"),
    ],
)
def test_openais_other_places_are_refused(tmp_path, place, reason):
    (tmp_path / place).parent.mkdir(parents=True)
    shutil.copy(next((FIXTURES / "openai-topk").rglob("8.pt")), tmp_path / place)
    with pytest.raises(Incompatible, match=reason):
        read_sae(tmp_path)


def test_openais_negative_topk_is_refused(tmp_path):
    state = torch.load(next((FIXTURES / "openai-topk").rglob("8.pt")), weights_only=True)
    state["activation_state_dict"]["postact_fn"] = "Identity"
    torch.save(state, tmp_path / "8.pt")
    with pytest.raises(Incompatible, match="negative"):
        read_sae(tmp_path)


@pytest.mark.parametrize("kind", ["att", "transcoders"])
def test_gemma_scopes_other_places_are_refused(tmp_path, kind):
    place = tmp_path / f"gemma-scope-2b-pt-{kind}" / "layer_7" / "width_16k" / "average_l0_6"
    place.mkdir(parents=True)
    shutil.copy(next((FIXTURES / "gemma-scope-resid_post").rglob("params.npz")), place)
    with pytest.raises(Incompatible):
        read_sae(tmp_path)


# --- damage and malice --------------------------------------------------------------------------


def weights_of(name: str, tmp_path: Path) -> Path:
    folder = copied(name, tmp_path)
    suffixes = (".safetensors", ".pt", ".npz")
    return max(
        (f for f in folder.rglob("*") if f.suffix in suffixes), key=lambda f: f.stat().st_size
    )


ONE_OF_EACH = [
    "saelens-topk",
    "sparsify-sae",
    "gemma-scope-resid_post",
    "gemma-scope-2-transcoder",
    "dictionary-learning-BatchTopKSAE",
    "openai-topk",
    "llama-scope",
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_damaged_weights_are_refused_and_left_alone(tmp_path, name, damage):
    path = weights_of(name, tmp_path)
    content = {
        "empty": b"",
        "cut": path.read_bytes()[: path.stat().st_size // 2],
        "garbage": b"garbage" * 100,
    }[damage]
    path.write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        read_sae(tmp_path / name)
    assert caught.value.title and caught.value.what and caught.value.next_step
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["saelens-topk", "sparsify-sae", "llama-scope"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_configurations_are_refused(tmp_path, name, text):
    folder = copied(name, tmp_path)
    config = next(f for f in folder.rglob("*.json"))
    config.write_text(text)
    with pytest.raises(CorruptFile):
        read_sae(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    path = weights_of("saelens-topk", tmp_path)
    tensors = load_file(path)
    tensors["W_dec"][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(CorruptFile, match="W_dec holds values that are not finite"):
        read_sae(path.parent)


def test_an_unknown_tensor_is_refused(tmp_path):
    path = weights_of("saelens-topk", tmp_path)
    save_file({**load_file(path), "W_surprise": torch.ones(3)}, path)
    with pytest.raises(Incompatible, match="W_surprise"):
        read_sae(path.parent)


def test_half_precision_is_read_as_it_is_stored(tmp_path):
    path = weights_of("saelens-topk", tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    found = one(path.parent).dictionary
    assert found.encoder.dtype == torch.float32
    assert found.W_enc.equal(tensors["W_enc"].float())


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_torch_file_is_never_run(tmp_path):
    mark = tmp_path / "ran"
    state = torch.load(next((FIXTURES / "openai-topk").rglob("8.pt")), weights_only=True)
    torch.save({**state, "activation": Evil(mark)}, tmp_path / "8.pt")
    with pytest.raises(UserError, match="holds code, not only numbers") as caught:
        read_sae(tmp_path / "8.pt")
    assert "mkdir" in caught.value.what and caught.value.next_step
    for protocol in (2, 5):
        (tmp_path / "9.pt").write_bytes(pickle.dumps(Evil(mark), protocol))
        with pytest.raises(UserError):
            read_sae(tmp_path / "9.pt")
    assert not mark.exists()


def test_code_in_a_numpy_file_is_never_run(tmp_path):
    mark = tmp_path / "ran"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Evil(mark)], dtype=object))
    with pytest.raises(UserError, match="holds code, not only numbers"):
        read_sae(tmp_path)
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(UserError):
        read_sae(tmp_path)
    assert not mark.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 3), tmp_path / "ae.pt")
    with pytest.raises(UserError, match="holds code"):
        read_sae(tmp_path)
