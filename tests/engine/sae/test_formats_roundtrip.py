"""Whatever is trained here can be kept; what a format can hold reads back as the same function;
what it cannot hold is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import Gated, JumpReLU, ReLU, TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import load_sae, save_sae, wiring_of
from mistudio.engine.sae.formats import compare, plain, saelens, sparsify
from mistudio.engine.sae.formats.reading import read_sae
from mistudio.engine.sae.formats.writing import EXPORT_FORMATS, export_sae
from mistudio.engine.sae.site import Site
from mistudio.errors import CorruptFile, Incompatible, InvalidInput

D, M = 16, 48
AT = Site.at(HookPoint("resid_post", 3))
ACROSS = Site.across_mlp(HookPoint("mlp_in", 3))
ACTIVATIONS = ("topk", "standard", "jumprelu", "gated")
WIRINGS = ("sae", "skip_sae", "transcoder", "skip_transcoder")
IN_SAELENS = {
    ("topk", "sae"): "topk",
    ("topk", "transcoder"): "topk",
    ("standard", "sae"): "standard",
    ("standard", "skip_sae"): "skip_transcoder",
    ("standard", "transcoder"): "transcoder",
    ("standard", "skip_transcoder"): "skip_transcoder",
    ("jumprelu", "sae"): "jumprelu",
    ("jumprelu", "skip_sae"): "jumprelu_skip_transcoder",
    ("jumprelu", "transcoder"): "jumprelu_transcoder",
    ("jumprelu", "skip_transcoder"): "jumprelu_skip_transcoder",
    ("gated", "sae"): "gated",
    ("gated", "transcoder"): "gated",
}
EVERY = [(activation, wiring) for activation in ACTIVATIONS for wiring in WIRINGS]
REFUSED = sorted(set(EVERY) - set(IN_SAELENS))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(activation: str = "jumprelu", wiring: str = "sae", *, norm: str = "none") -> Dictionary:
    """Parameters as training leaves them: scaled, rows of other norms, every bias off zero."""
    across = wiring.endswith("transcoder")
    kinds = {
        "topk": TopK(5),
        "standard": ReLU(),
        "jumprelu": JumpReLU(0.3 + random(M, seed=5).abs()),
        "gated": Gated(random(M, seed=6).exp(), 0.3 * random(M, seed=7)),
    }
    skip = 0.2 * torch.eye(D) if wiring == "skip_sae" else 0.3 * random(D, D, seed=8)
    decoder = random(M, D, seed=2)
    if activation == "topk":  # what training gives: only then are its rows free to be scaled
        decoder /= decoder.norm(dim=1, keepdim=True)
    return Dictionary(
        random(M, D, seed=1),
        0.2 * random(M, seed=3),
        decoder,
        random(D, seed=4),
        kinds[activation],
        scale=0.7,
        out_scale=1.9 if across else None,
        centre=None if wiring == "sae" else random(D, seed=9),
        skip=skip if wiring.startswith("skip") else None,
        norm=norm,
    )


def site_of(wiring: str) -> Site:
    return ACROSS if wiring.endswith("transcoder") else AT


def saved(folder: Path, activation: str, wiring: str, **options: object) -> Path:
    save_sae(
        make(activation, wiring, **options),
        folder,
        site=site_of(wiring),
        model_name="m",
        hf_hook_name=f"model.layers.3{'.mlp' if wiring.endswith('transcoder') else ''}",
        hf_hook_name_out="model.layers.3.mlp",
        frequencies=torch.full((M,), 0.01),
        record={"metrics": {"l0": 5.0}},
    )
    return folder


def off_by(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).abs().max() / want.abs().max())


# --- the library's own folder -------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "wiring"), EVERY)
def test_everything_that_can_be_trained_can_be_kept(tmp_path, activation, wiring):
    trained, x = make(activation, wiring), random(40, D, seed=20)
    again = load_sae(saved(tmp_path / "sae", activation, wiring))
    assert again.site == site_of(wiring)
    assert again.hook_point == site_of(wiring).input
    assert wiring_of(again.dictionary, again.site) == wiring
    assert off_by(trained.reconstruct(x), again.dictionary.reconstruct(x)) < 1e-5
    assert (
        torch.allclose(again.dictionary.decoder.norm(dim=1), torch.ones(M), atol=1e-5)
        == (activation != "topk")
        or activation == "topk"
    )
    assert (trained.encode(x).dense() > 0).equal(again.dictionary.encode(x).dense() > 0)


@pytest.mark.parametrize("norm", ["centre", "layer_norm"])
def test_the_norms_of_imported_saes_are_kept(tmp_path, norm):
    kept, x = make("jumprelu", "sae", norm=norm), random(40, D, seed=20)
    again = load_sae(saved(tmp_path / "sae", "jumprelu", "sae", norm=norm)).dictionary
    assert again.norm == norm
    assert off_by(kept.reconstruct(x), again.reconstruct(x)) < 1e-5


def test_an_imported_sae_keeps_the_unit_of_its_latents(tmp_path):
    d, x = make(), random(40, D, seed=20)
    save_sae(d, tmp_path / "sae", site=AT, model_name="m", unit_decoder=False)
    again = load_sae(tmp_path / "sae").dictionary
    assert off_by(d.encode(x).dense(), again.encode(x).dense()) < 1e-6


@pytest.mark.parametrize("spoilt", ["W_enc", "b_enc", "threshold", "W_dec", "b_dec"])
def test_what_reads_back_otherwise_never_counts_as_saved(tmp_path, monkeypatch, spoilt):
    def save_wrongly(tensors, path, *rest):
        if spoilt in tensors:
            tensors[spoilt] = tensors[spoilt] + 1e-2
        save_file(tensors, path, *rest)

    monkeypatch.setattr("mistudio.engine.sae.files.save_file", save_wrongly)
    with pytest.raises(RuntimeError, match="reads back"):
        save_sae(make(), tmp_path / "sae", site=AT, model_name="m")


def test_a_wrong_skip_or_centre_is_noticed_too():
    d = make("jumprelu", "skip_transcoder")
    for other in (
        Dictionary(**{**d.__dict__, "skip": d.skip + 1e-2}),
        Dictionary(**{**d.__dict__, "centre": d.centre + 1e-2}),
    ):
        with pytest.raises(RuntimeError, match="reads back"):
            compare.check_same_function(d, other, Path("x"))


# --- SAELens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "wiring"), sorted(IN_SAELENS))
def test_saelens_folders_have_the_architecture_and_tensors_it_expects(tmp_path, activation, wiring):
    place = export_sae(saved(tmp_path / "sae", activation, wiring), tmp_path / "out", "saelens")
    config = json.loads((place / "cfg.json").read_text())
    tensors = load_file(place / "sae_weights.safetensors")
    name = IN_SAELENS[activation, wiring]
    assert config["architecture"] == name
    assert config["dtype"] == "float32"
    assert config["normalize_activations"] == "none"
    assert config["apply_b_dec_to_input"] == (wiring == "sae")
    assert ("d_out" in config) == ("transcoder" in name)
    assert config["metadata"]["hook_name"] == site_of(wiring).input.name
    assert config["metadata"]["hook_name_out"] == site_of(wiring).output.name
    assert config["metadata"]["sae_lens_version"] >= "6.0.0"
    want = {"W_enc", "W_dec", "b_dec"}
    want |= {"b_gate", "b_mag", "r_mag"} if name == "gated" else {"b_enc"}
    want |= {"threshold"} if activation == "jumprelu" else set()
    want |= {"W_skip"} if "skip" in name else set()
    assert set(tensors) == want
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert (place / "sparsity.safetensors").exists()
    x = random(30, D, seed=21)
    (again,) = read_sae(tmp_path / "out")
    assert off_by(make(activation, wiring).reconstruct(x), again.dictionary.reconstruct(x)) < 1e-5


@pytest.mark.parametrize(("activation", "wiring"), REFUSED)
def test_what_saelens_has_no_architecture_for_is_refused_with_a_way_out(
    tmp_path, activation, wiring
):
    source = saved(tmp_path / "sae", activation, wiring)
    with pytest.raises(Incompatible, match="BatchTopK"):
        export_sae(source, tmp_path / "out", "saelens")
    # Its name in the library's own folder is none that SAELens would load as something else.
    name = json.loads((source / "cfg.json").read_text())["architecture"]
    assert name in saelens._OURS_ALONE


def test_transcoders_between_two_widths_are_kept_and_topk_ones_refused(tmp_path):
    d = Dictionary(
        random(M, D, seed=1),
        random(M, seed=2),
        random(M, 2 * D, seed=3),
        random(2 * D, seed=4),
        TopK(4),
        centre=torch.zeros(D),
    )
    save_sae(d, tmp_path / "sae", site=ACROSS, model_name="m")
    assert load_sae(tmp_path / "sae").dictionary.d_out == 2 * D
    with pytest.raises(Incompatible, match="two widths"):
        export_sae(tmp_path / "sae", tmp_path / "out", "saelens")


def test_centring_exports_exactly_as_a_skip(tmp_path):
    source = saved(tmp_path / "sae", "standard", "sae", norm="centre")
    assert json.loads((source / "cfg.json").read_text())["normalize_activations"] == "centre"
    place = export_sae(source, tmp_path / "out", "saelens")
    config = json.loads((place / "cfg.json").read_text())
    assert (config["architecture"], config["normalize_activations"]) == ("skip_transcoder", "none")
    t, x = load_file(place / "sae_weights.safetensors"), 3 + random(30, D, seed=22)
    z = (x @ t["W_enc"] + t["b_enc"]).relu()
    by_hand = z @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T
    want = make("standard", "sae", norm="centre").reconstruct(x)
    assert off_by(want, by_hand) < 1e-5


def test_centring_beside_a_skip_folds_exactly():
    d, x = make("jumprelu", "skip_sae", norm="centre"), 3 + random(30, D, seed=23)
    assert off_by(d.reconstruct(x), saelens.without_centring(d).reconstruct(x)) < 1e-5


def test_a_layer_norm_exports_where_saelens_has_one_and_is_refused_elsewhere(tmp_path):
    source = saved(tmp_path / "sae", "topk", "sae", norm="layer_norm")
    place = export_sae(source, tmp_path / "out", "saelens")
    assert json.loads((place / "cfg.json").read_text())["normalize_activations"] == "layer_norm"
    with pytest.raises(Incompatible, match="normalises"):
        save_sae(
            make("jumprelu", "skip_sae", norm="layer_norm"),
            tmp_path / "skip",
            site=AT,
            model_name="m",
        )


# --- sparsify -----------------------------------------------------------------------------------


def sparsify_by_hand(place: Path, x: torch.Tensor) -> torch.Tensor:
    config = json.loads((place / "cfg.json").read_text())
    t = load_file(place / "sae.safetensors")
    u = x if config["transcode"] else x - t["b_dec"]
    pre = (u @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    top = pre.topk(config["k"])
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    y = z @ t["W_dec"] + t["b_dec"]
    return y + x @ t["W_skip"].T if config["skip_connection"] else y


@pytest.mark.parametrize("wiring", WIRINGS)
def test_sparsify_folders_compute_the_same(tmp_path, wiring):
    place = export_sae(saved(tmp_path / "sae", "topk", wiring), tmp_path / "out", "sparsify")
    across = wiring.endswith("transcoder")
    assert place == tmp_path / "out" / ("layers.3.mlp" if across else "layers.3")
    x = random(30, D, seed=24)
    assert off_by(make("topk", wiring).reconstruct(x), sparsify_by_hand(place, x)) < 1e-5
    (again,) = read_sae(tmp_path / "out", format="sparsify")
    assert again.site == site_of(wiring)
    assert off_by(sparsify_by_hand(place, x), again.dictionary.reconstruct(x)) < 1e-5


@pytest.mark.parametrize("activation", ["standard", "jumprelu", "gated"])
def test_sparsify_refuses_what_is_not_topk(tmp_path, activation):
    source = saved(tmp_path / "sae", activation, "sae")
    with pytest.raises(Incompatible, match=r"only TopK.*saelens"):
        export_sae(source, tmp_path / "out", "sparsify")


@pytest.mark.parametrize(
    ("site", "path", "hookpoint"),
    [
        (AT, "transformer.h.3", "h.3"),
        (AT, "gpt_neox.layers.3", "layers.3"),
        (Site.at(HookPoint("resid_pre", 3)), "transformer.h.3", "h.2"),
        (Site.at(HookPoint("mlp_out", 3)), "model.layers.3.mlp", "layers.3.mlp"),
        (AT, "model.language_model.layers.3", "language_model.layers.3"),
    ],
)
def test_hookpoints_are_modules_below_the_base_model(site, path, hookpoint):
    assert sparsify.hookpoint_of(site, path, path) == hookpoint


@pytest.mark.parametrize(
    ("site", "path", "path_out"),
    [
        (Site.at(HookPoint("resid_pre", 0)), "transformer.h.0", ""),
        (Site.at(HookPoint("mlp_in", 3)), "model.layers.3.mlp", ""),
        (ACROSS, "model.decoder.layers.3.fc1", "model.decoder.layers.3.fc2"),
        (ACROSS, "model.layers.3.mlp", ""),
    ],
)
def test_a_site_that_is_no_modules_output_has_no_hookpoint(site, path, path_out):
    with pytest.raises(Incompatible, match="no place in sparsify"):
        sparsify.hookpoint_of(site, path, path_out)


def test_an_sae_whose_module_is_not_known_is_not_exported_to_sparsify(tmp_path):
    save_sae(make("topk"), tmp_path / "sae", site=AT, model_name="m")
    with pytest.raises(Incompatible, match="does not say which"):
        export_sae(tmp_path / "sae", tmp_path / "out", "sparsify")


# --- plain safetensors --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "centre", "layer_norm"])
@pytest.mark.parametrize(("activation", "wiring"), EVERY)
def test_the_readme_of_the_plain_format_computes_the_same(tmp_path, activation, wiring, norm):
    d, x = make(activation, wiring, norm=norm).folded(), 1 + random(30, D, seed=25)
    path = plain.write(d, tmp_path, site=site_of(wiring), metadata={"context_size": 128})
    code = (tmp_path / plain.README).read_text()
    scope: dict = {}
    exec(code[code.index("import torch") :], scope)
    sae, meta = scope["load"](str(path))
    z = scope["encode"](x, sae, meta)
    assert off_by(d.encode(x).dense(), z) < 1e-5
    assert off_by(d.reconstruct(x), scope["decode"](z, x, sae, meta)) < 1e-5
    assert meta["hook_name_out"] == site_of(wiring).output.name
    (again,) = read_sae(tmp_path)
    assert again.site == site_of(wiring)
    assert off_by(d.reconstruct(x), again.dictionary.reconstruct(x)) < 1e-5


def test_the_header_of_the_plain_format_is_all_strings(tmp_path):
    path = export_sae(saved(tmp_path / "sae", "topk", "sae"), tmp_path / "out", "safetensors")
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    assert meta["k"] == "5" and meta["context_size"] == "128" and meta["model_name"] == "m"


def test_a_folder_that_saelens_reads_as_it_is_is_copied_to_the_byte(tmp_path):
    source = saved(tmp_path / "sae", "jumprelu", "skip_transcoder")
    place = export_sae(source, tmp_path / "out", "saelens")
    assert {p.name: p.read_bytes() for p in place.iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }


# --- all ----------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidInput, match="onnx"):
        export_sae(saved(tmp_path / "sae", "topk", "sae"), tmp_path / "out", "onnx")


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_an_export_that_reads_back_otherwise_fails(tmp_path, monkeypatch, format):
    # SAELens' own kind of folder is copied; this one must be written anew.
    kind, norm = ("standard", "centre") if format == "saelens" else ("topk", "none")
    source = saved(tmp_path / "sae", kind, "sae", norm=norm)

    def save_wrongly(tensors, path, *rest):
        name = next(iter(tensors))
        save_file({**tensors, name: tensors[name] * 1.01}, path, *rest)

    for module in ("plain", "sparsify", "writing"):
        monkeypatch.setattr(f"mistudio.engine.sae.formats.{module}.save_file", save_wrongly)
    with pytest.raises(RuntimeError, match="reads back"):
        export_sae(source, tmp_path / "out", format)


def test_a_plain_file_with_a_strange_header_is_refused(tmp_path):
    path = plain.write(make().folded(), tmp_path, site=AT)
    save_file(load_file(path), path, {"format": "mistudio sae 1", "norm": "none"})
    with pytest.raises(CorruptFile):
        read_sae(path)
