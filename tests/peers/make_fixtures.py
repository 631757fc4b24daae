"""Tiny SAE files written by other libraries' own classes, with the numbers those classes give.

Not a test: run it where those libraries are installed, beside miStudio and not in its environment,
and commit what changes under tests/data/sae_fixtures:

    python -m venv peers
    peers/bin/pip install sae-lens eai-sparsify zstandard
    peers/bin/pip install --no-deps dictionary-learning
    peers/bin/python tests/peers/make_fixtures.py --openai CHECKOUT_OF_openai/sparse_autoencoder

Each fixture is a folder with `files/` (what the library wrote) and `expected.safetensors`: inputs
x [8, 16], latent activations acts [8, 64] and outputs out [8, d_out], and in its header who
computed them. What no class of the library writes is written here in its published layout, and the
header's `written_by` says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parents[1] / "data" / "sae_fixtures"
D, M, K = 16, 64, 6
Numbers = tuple[torch.Tensor, torch.Tensor]  # acts, out
FIXTURES: dict[str, Callable[[Path], Numbers]] = {}
ABOUT: dict[str, dict[str, str]] = {}


def inputs() -> torch.Tensor:
    return 0.5 + 1.5 * torch.randn(8, D, generator=torch.Generator().manual_seed(1))


def fixture(name: str, **about: str) -> Callable:
    def register(make: Callable[[Path], Numbers]) -> Callable[[Path], Numbers]:
        FIXTURES[name], ABOUT[name] = make, about
        return make

    return register


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random parameters, none of them zero or of unit norm; thresholds positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if "threshold" in name:
                values = 0.5 + values.abs()
            elif parameter.ndim == 1:
                values = 0.3 * values
            elif "skip" in name:
                values = 0.2 * values
            else:
                values = values / D**0.5
            parameter.copy_(values)
    return module


def write(name: str) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    with torch.no_grad():
        acts, out = FIXTURES[name](folder / "files")
    about = {"computed_by": ABOUT[name]["library"], **ABOUT[name]}
    save_file(
        {"x": inputs(), "acts": acts.contiguous(), "out": out.contiguous()},
        folder / "expected.safetensors",
        about,
    )
    print(f"{name:<40} active per row {float((acts > 0).sum(1).float().mean()):.1f}")


# --- SAELens ------------------------------------------------------------------------------------


def saelens_version() -> str:
    return f"sae-lens {importlib.metadata.version('sae-lens')}"


def saelens_fixtures() -> None:
    from sae_lens.saes.sae import SAE, SAEMetadata

    def metadata(**more: object) -> SAEMetadata:
        named = {"model_name": "pythia-70m", "hook_name": "blocks.3.hook_resid_post"}
        return SAEMetadata(**{**named, "context_size": 64, "prepend_bos": True, **more})

    def numbers(folder: Path) -> Numbers:
        sae = SAE.load_from_disk(folder)
        return sae.encode(inputs()), sae(inputs())

    def inference(architecture: str, **options: object) -> Callable[[Path], Numbers]:
        def make(folder: Path) -> Numbers:
            across = "transcoder" in architecture
            named = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
            base = {
                "architecture": architecture,
                "d_in": D,
                "d_sae": M,
                "dtype": "float32",
                "device": "cpu",
                "apply_b_dec_to_input": not across,
                **({"d_out": D + 4 if architecture == "transcoder" else D} if across else {}),
                "metadata": metadata(**(named if across else {})).to_dict(),
                **options,
            }
            fill(SAE.from_dict(base)).save_model(folder)
            return numbers(folder)

        return make

    version = saelens_version()
    for architecture in (
        "standard", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ):  # fmt: skip
        fixture(f"saelens-{architecture}", library=version)(inference(architecture))
    for name, options in {
        "saelens-topk": {"k": K},
        "saelens-topk-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
        "saelens-topk-layer-norm": {"k": K, "normalize_activations": "layer_norm"},
        "saelens-topk-bias-not-applied": {"k": K, "apply_b_dec_to_input": False},
    }.items():
        fixture(name, library=version)(inference("topk", **options))
    fixture("saelens-standard-layer-norm", library=version)(
        inference("standard", normalize_activations="layer_norm")
    )
    fixture("saelens-constant-norm", library=version)(
        inference("standard", normalize_activations="constant_norm_rescale")
    )
    saelens_checkpoints(version)
    saelens_before_6(version)


def saelens_checkpoints(version: str) -> None:
    """Folders of runs in progress, whose input scaling is not folded in yet; the numbers are those
    of the inference SAE that the library makes of them at the end."""
    from sae_lens import SAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    named = {"model_name": "pythia-70m", "hook_name": "blocks.3.hook_resid_post"}
    kinds = {
        "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
        "matryoshka": (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [16, M]},
        ),
    }

    def checkpoint(kind: str, scaling: str, keep_scaler: bool = True) -> Callable[[Path], Numbers]:
        def make(folder: Path) -> Numbers:
            sae_class, config_class, options = kinds[kind]
            config = config_class(
                d_in=D, d_sae=M, normalize_activations=scaling, metadata=SAEMetadata(**named),
                **options,
            )  # fmt: skip
            torch.manual_seed(0)
            sae = fill(sae_class(config))
            if hasattr(sae, "topk_threshold"):
                sae.topk_threshold = torch.tensor(0.8, dtype=torch.double)
            trainer = SAETrainer(
                cfg=SAETrainerConfig(
                    total_training_samples=1024, train_batch_size_samples=64, device="cpu",
                    autocast=False, lr=1e-3, lr_end=1e-4, lr_scheduler_name="constant",
                    lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0,
                    n_restart_cycles=1, dead_feature_window=100, feature_sampling_window=100,
                    logger=LoggingConfig(log_to_wandb=False), n_checkpoints=0,
                    checkpoint_path=None, save_final_checkpoint=False,
                ),
                sae=sae,
                data_provider=iter(()),
            )  # fmt: skip
            draw = torch.Generator().manual_seed(2)
            batches = iter([0.5 + 1.5 * torch.randn(256, D, generator=draw) for _ in range(4)])
            if scaling == "expected_average_only_in":
                trainer.activation_scaler.estimate_scaling_factor(D, batches, 4)
            elif scaling == "covariance_whitening":
                trainer.activation_scaler.estimate_whitening(D, batches, 4)
            trainer.save_checkpoint("final", base_path=folder.parent / "checkpoint")
            for file in (folder.parent / "checkpoint" / "final").iterdir():
                if file.name != "trainer_state.pt":  # the optimiser's state: large, and no SAE
                    shutil.copy(file, folder)
            shutil.rmtree(folder.parent / "checkpoint")
            if not keep_scaler:
                (folder / "activation_scaler.json").unlink()
            scaler = trainer.activation_scaler
            if scaler.scaling_factor is not None:
                sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            if scaler.whitening is not None:
                sae.fold_activation_whitening(
                    scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix
                )
            with tempfile.TemporaryDirectory() as final:
                sae.save_inference_model(final)
                done = SAE.load_from_disk(final)
            return done.encode(inputs()), done(inputs())

        return make

    for name, made in {
        "saelens-checkpoint-standard-scaled": checkpoint("standard", "expected_average_only_in"),
        "saelens-checkpoint-topk-scaled": checkpoint("topk", "expected_average_only_in"),
        "saelens-checkpoint-batchtopk-scaled": checkpoint("batchtopk", "expected_average_only_in"),
        "saelens-checkpoint-matryoshka": checkpoint("matryoshka", "none"),
        "saelens-checkpoint-standard-whitened": checkpoint("standard", "covariance_whitening"),
        "saelens-checkpoint-topk-whitened": checkpoint("topk", "covariance_whitening"),
        "saelens-checkpoint-without-its-scale": checkpoint(
            "standard", "expected_average_only_in", keep_scaler=False
        ),
    }.items():
        # TopK kinds end with a decoder of unit norm, and their latents in that unit.
        unit = "none" if "standard" in name else "unit decoder"
        fixture(name, library=version, unit=unit)(made)


def saelens_before_6(version: str) -> None:
    """The flat configurations of old versions, with the keys that their published SAEs have."""
    from sae_lens.saes.sae import SAE

    written_by = "make_fixtures.py, with the keys of jbloom/GPT2-Small-SAEs-Reformatted"

    def flat(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        (folder / "cfg.json").write_text(json.dumps(config))
        save_file(tensors, folder / "sae_weights.safetensors")

    def tensors(*extra: str) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(3)
        shapes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
        found = {n: torch.randn(s, generator=draw) / D**0.5 for n, s in shapes.items()}
        if "scaling_factor" in extra:
            found["scaling_factor"] = torch.ones(M)
        return found

    @fixture("saelens-gpt2-small-res-jb", library=version, written_by=written_by)
    def res_jb(folder: Path) -> Numbers:
        place = folder / "blocks.8.hook_resid_pre"
        place.mkdir()
        config = {
            "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre",
            "hook_point_layer": 8, "hook_point_head_index": None,
            "dataset_path": "Skylion007/openwebtext", "is_dataset_tokenized": False,
            "context_size": 128, "use_cached_activations": False, "d_in": D,
            "n_batches_in_buffer": 128, "total_training_tokens": 300000000,
            "store_batch_size": 32, "device": "cpu", "seed": 42, "dtype": "torch.float32",
            "b_dec_init_method": "geometric_median", "expansion_factor": 4,
            "l1_coefficient": 8e-05, "lr": 0.0004, "use_ghost_grads": True, "d_sae": M,
        }  # fmt: skip
        flat(place, config, tensors("scaling_factor"))
        sae = SAE.load_from_disk(place)
        x = inputs()
        mean = x.mean(1, keepdim=True)  # what center_writing_weights does to the stream
        return sae.encode(x - mean), sae(x - mean) + mean

    @fixture("saelens-before-6-topk", library=version, written_by=written_by)
    def old_topk(folder: Path) -> Numbers:
        config = {
            "architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32",
            "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
            "apply_b_dec_to_input": True, "normalize_activations": "none",
            "model_name": "gemma-2-2b", "hook_name": "blocks.4.hook_mlp_out", "hook_layer": 4,
            "hook_head_index": None, "context_size": 1024, "sae_lens_training_version": "5.3.0",
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
        }  # fmt: skip
        flat(folder, config, tensors())
        sae = SAE.load_from_disk(folder)
        return sae.encode(inputs()), sae(inputs())


# --- formats that SAELens' own converters read --------------------------------------------------


def converted_fixtures() -> None:
    """Published layouts, read by SAELens' converters from local files."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAE

    version = f"{saelens_version()} (its converter)"

    def numbers(config: dict, state: dict[str, torch.Tensor]) -> tuple[SAE, Numbers]:
        sae = SAE.from_dict(loaders.handle_config_defaulting(config))
        sae.load_state_dict(state, strict=True)
        return sae, (sae.encode(inputs()), sae(inputs()))

    def local(root: Path) -> None:
        def find(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
            path = root / repo_id.split("/")[-1] / subfolder / filename
            if not path.exists():
                raise loaders.EntryNotFoundError(str(path))
            return str(path)

        loaders.hf_hub_download = find

    def params(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(4)
        shapes = {"w_enc": (D, M), "w_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
        found = {n: torch.randn(s, generator=draw) / D**0.5 for n, s in shapes.items()}
        return {**found, "threshold": 0.3 + torch.rand(M, generator=draw), **extra}

    def npz(folder: Path, place: str) -> None:
        target = folder / place
        target.mkdir(parents=True)
        arrays = {("W_" + n[2:] if n[0] == "w" else n): t.numpy() for n, t in params().items()}
        np.savez(target / "params.npz", **arrays)

    by_google = "make_fixtures.py, in the layout of google/gemma-scope"

    for kind, hook in (("res", "resid_post"), ("mlp", "mlp_out")):

        @fixture(f"gemma-scope-{hook}", library=version, written_by=by_google)
        def scope(folder: Path, kind: str = kind) -> Numbers:
            repo, place = f"gemma-scope-2b-pt-{kind}", "layer_7/width_16k/average_l0_6"
            npz(folder, f"{repo}/{place}")
            local(folder)
            config, state, _ = loaders.gemma_2_sae_huggingface_loader(
                f"google/{repo}", place, cfg_overrides={"d_in": D, "d_sae": M}
            )
            return numbers(config, state)[1]

    @fixture("gemma-scope-embedding", library=version, written_by=by_google)
    def embedding(folder: Path) -> Numbers:
        repo, place = "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
        npz(folder, f"{repo}/{place}")
        # Trained on embeddings e = x / sqrt(d). (The converter scales W_enc and W_dec for this,
        # but leaves b_dec, so its own output is off by b_dec (sqrt(d) - 1).)
        arrays = {
            n: torch.from_numpy(a) for n, a in np.load(folder / repo / place / "params.npz").items()
        }
        base = {"architecture": "jumprelu", "d_in": D, "d_sae": M, "dtype": "float32",
                "device": "cpu", "apply_b_dec_to_input": False,
                "metadata": {"sae_lens_version": "6.0.0"}}  # fmt: skip
        sae, _ = numbers(base, arrays)
        return sae.encode(inputs() / D**0.5), D**0.5 * sae(inputs() / D**0.5)

    for kind, affine in (("resid_post", False), ("transcoder", False), ("transcoder", True)):
        name = f"gemma-scope-2-{kind}{'-affine' if affine else ''}"

        @fixture(name, library=version, written_by=by_google)
        def scope_2(folder: Path, kind: str = kind, affine: bool = affine) -> Numbers:
            repo = "gemma-scope-2-1b-pt"
            place = f"{kind}/layer_7_width_16k_l0_small{'_affine' if affine else ''}"
            target = folder / repo / place
            target.mkdir(parents=True)
            draw = torch.Generator().manual_seed(5)
            extra = {"affine_skip_connection": torch.randn(D, D, generator=draw) / D}
            save_file(params(**(extra if affine else {})), target / "params.safetensors")
            config = loaders._infer_gemma_3_raw_cfg_dict(f"google/{repo}", place)
            (target / "config.json").write_text(json.dumps(config))
            local(folder)
            loaders.get_safetensors_tensor_shapes = lambda *_: {"w_enc": [D, M], "w_dec": [M, D]}
            config, state, _ = loaders.gemma_3_sae_huggingface_loader(f"google/{repo}", place)
            return numbers(config, state)[1]

    @fixture(
        "llama-scope", library=version, written_by="make_fixtures.py, in the layout of fnlp's repos"
    )
    def llama(folder: Path) -> Numbers:
        repo, place = "Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
        target = folder / repo / place
        (target / "checkpoints").mkdir(parents=True)
        p = params()
        tensors = {
            "encoder.weight": p["w_enc"].T, "encoder.bias": p["b_enc"],
            "decoder.weight": p["w_dec"].T, "decoder.bias": p["b_dec"],
        }  # fmt: skip
        save_file(
            {n: t.contiguous() for n, t in tensors.items()},
            target / "checkpoints/final.safetensors",
        )
        hyper = {
            "d_model": D, "d_sae": M, "jump_relu_threshold": 0.4, "act_fn": "jumprelu",
            "dataset_average_activation_norm": {"in": 6.5, "out": 6.5},
            "hook_point_in": "blocks.15.hook_resid_post",
            "hook_point_out": "blocks.15.hook_resid_post",
        }  # fmt: skip
        (target / "hyperparams.json").write_text(json.dumps(hyper))
        local(folder)
        config, state, _ = loaders.llama_scope_sae_huggingface_loader(
            f"fnlp/{repo}", place, cfg_overrides={"dtype": "float32"}
        )
        sae, _ = numbers(config, state)
        sae.fold_activation_norm_scaling_factor(D**0.5 / 6.5)
        return sae.encode(inputs()), sae(inputs())


# --- sparsify -----------------------------------------------------------------------------------


def sparsify_fixtures() -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    version = f"eai-sparsify {importlib.metadata.version('eai-sparsify')}"
    for name, hookpoint, options in (
        ("sparsify-sae", "layers.3", {"num_latents": M}),
        ("sparsify-sae-by-expansion", "h.5/seed1", {"expansion_factor": M // D}),
        ("sparsify-sae-skip", "layers.3.mlp", {"num_latents": M, "skip_connection": True}),
        ("sparsify-transcoder", "layers.3.mlp", {"num_latents": M, "transcode": True}),
        (
            "sparsify-transcoder-skip",
            "h.5.mlp",
            {"num_latents": M, "transcode": True, "skip_connection": True},
        ),
        ("sparsify-groupmax", "layers.3", {"num_latents": M, "activation": "groupmax", "k": 8}),
    ):

        @fixture(name, library=version)
        def coder(folder: Path, hookpoint: str = hookpoint, options: dict = options) -> Numbers:
            made = fill(SparseCoder(D, SparseCoderConfig(**{"k": K, **options})))
            made.save_to_disk(folder / hookpoint)
            again = SparseCoder.load_from_disk(folder / hookpoint)
            result = SparseCoder.forward.__wrapped__(again, inputs())
            acts = torch.zeros(8, M).scatter(1, result.latent_indices, result.latent_acts)
            return acts, result.sae_out


# --- dictionary_learning ------------------------------------------------------------------------


def dictionary_learning_fixtures() -> None:
    # Its buffer imports nnsight, which no dictionary needs.
    stand_in = types.ModuleType("nnsight")
    stand_in.LanguageModel = object
    sys.modules.setdefault("nnsight", stand_in)
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import (
        MatryoshkaBatchTopKSAE,
        MatryoshkaBatchTopKTrainer,
    )
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    version = f"dictionary-learning {importlib.metadata.version('dictionary-learning')}"
    common = {
        "steps": 10, "activation_dim": D, "dict_size": M, "layer": 3, "device": "cpu",
        "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3",
    }  # fmt: skip
    with_k = {**common, "warmup_steps": 1, "decay_start": None, "k": K}
    by_l1 = {**common, "warmup_steps": 1, "sparsity_warmup_steps": None}
    groups = {**with_k, "group_fractions": [0.25, 0.75]}
    kinds = {
        "AutoEncoder": (classes.AutoEncoder, StandardTrainer, by_l1),
        "AutoEncoderNew": (classes.AutoEncoderNew, StandardTrainer, by_l1),
        "GatedAutoEncoder": (classes.GatedAutoEncoder, GatedSAETrainer, by_l1),
        "AutoEncoderTopK": (AutoEncoderTopK, TopKTrainer, with_k),
        "BatchTopKSAE": (BatchTopKSAE, BatchTopKTrainer, with_k),
        "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer, groups),
        "JumpReluAutoEncoder": (classes.JumpReluAutoEncoder, JumpReluTrainer, by_l1),
    }

    def trained(kind: str, threshold: float | None = 0.7) -> tuple[torch.nn.Module, dict]:
        torch.manual_seed(0)
        trainer = kinds[kind][1](**kinds[kind][2])
        module = trainer.ae
        if not isinstance(module, kinds[kind][0]):  # no trainer of this release makes it
            module = kinds[kind][0](D, M)
        fill(module)
        if threshold is not None and isinstance(getattr(module, "k", None), torch.Tensor):
            module.threshold = torch.tensor(threshold)
        return module, {**trainer.config, "dict_class": kind}

    def finish(folder: Path, kind: str, state: object, config: dict) -> None:
        target = folder / "trainer_0"
        target.mkdir()
        torch.save(state, target / "ae.pt")
        text = json.dumps({"trainer": config, "buffer": {"ctx_len": 128, "io": "out"}}, default=str)
        (target / "config.json").write_text(text)

    def numbers(module: torch.nn.Module) -> Numbers:
        acts = module.encode(inputs())
        return acts, module.decode(acts)

    for kind in kinds:

        @fixture(f"dictionary-learning-{kind}", library=version)
        def make(folder: Path, kind: str = kind) -> Numbers:
            module, config = trained(kind)
            finish(folder, kind, module.state_dict(), config)
            return numbers(kinds[kind][0].from_pretrained(folder / "trainer_0" / "ae.pt"))

    @fixture("dictionary-learning-threshold-never-set", library=version)
    def unset(folder: Path) -> Numbers:
        module, config = trained("BatchTopKSAE", threshold=None)
        finish(folder, "BatchTopKSAE", module.state_dict(), config)
        return numbers(BatchTopKSAE.from_pretrained(folder / "trainer_0" / "ae.pt"))

    @fixture(
        "dictionary-learning-interrupted",
        library=version,
        written_by="make_fixtures.py, with the keys that trainSAE(backup_steps=...) saves",
    )
    def interrupted(folder: Path) -> Numbers:
        module, config = trained("BatchTopKSAE")
        backup = {
            "step": 500, "ae": module.state_dict(), "config": config, "norm_factor": 2.5,
            "optimizer": torch.optim.Adam(module.parameters()).state_dict(),
        }  # fmt: skip
        finish(folder, "BatchTopKSAE", backup, config)
        module.scale_biases(2.5)  # what trainSAE does at its end
        return numbers(module)


# --- OpenAI -------------------------------------------------------------------------------------


def openai_fixtures(checkout: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "openai_model", checkout / "sparse_autoencoder" / "model.py"
    )
    assert spec is not None and spec.loader is not None
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    version = "openai/sparse_autoencoder at 764586a"

    for name, place, make in (
        (
            "openai-topk",
            "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt",
            lambda: model.Autoencoder(M, D, activation=model.TopK(K), normalize=True),
        ),
        (
            "openai-relu",
            "gpt2-small/resid_delta_mlp/autoencoders/3.pt",
            lambda: model.Autoencoder(M, D, activation=torch.nn.ReLU()),
        ),
        (
            "openai-tied",
            "gpt2-small/resid_delta_attn_v5_32k/autoencoders/11.pt",
            lambda: model.Autoencoder(M, D, model.TopK(K), tied=True, normalize=True),
        ),
    ):

        @fixture(name, library=version)
        def coder(folder: Path, place: str = place, make: Callable = make) -> Numbers:
            coder = fill(make())
            (folder / place).parent.mkdir(parents=True)
            torch.save(coder.state_dict(), folder / place)
            acts, info = coder.encode(inputs())
            return acts, coder.decode(acts, info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openai", type=Path, help="a checkout of openai/sparse_autoencoder")
    parser.add_argument("--only", default="", help="names that contain this")
    options = parser.parse_args()
    saelens_fixtures()
    converted_fixtures()
    sparsify_fixtures()
    dictionary_learning_fixtures()
    if options.openai:
        openai_fixtures(options.openai)
    for name in FIXTURES:
        if options.only in name:
            write(name)


if __name__ == "__main__":
    main()
