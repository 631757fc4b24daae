"""What each precision costs: loss beside fp32, seconds to load, memory beside the plan.

Every measurement is a process of its own. MISTUDIO_SAMPLE_MODEL may name a model folder whose loss
is measured; models with random weights (a small Llama, a 3B one with fewer layers, and GPT-2 small
with a dictionary that is trained beside it) measure memory alone, beside the plans of the whole 3B
model at Q4 on 16 GB and of GPT-2 with its training on 8 GB. `--measure JSON` and `--train FOLDER`
are one measurement each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the app

PRECISIONS = ("fp32", "bf16", "q8", "q4", "q2")
MB = 1024**2
# Llama 3.2 3B's matrices, fewer of its layers and a small vocabulary.
THREE_B = {
    "vocab_size": 8192,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
GPT2_TOKENS, GPT2_HELDOUT = 20_480, 8192  # a default run learns from 20 million
GB = 1024**3
SMALL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def measure(order: dict[str, Any]) -> dict[str, Any]:
    import torch

    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.loading import load_model, load_tokenizer, weight_files
    from mistudio.engine.models.memory import Use, plan_model
    from mistudio.engine.models.quality import document_losses
    from mistudio.engine.training.footprint import Machine

    folder, precision = Path(order["folder"]), order["precision"]
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    architecture = read_architecture(folder)
    began, cpu = time.perf_counter(), time.process_time()
    decoder = load_model(folder, precision)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    loaded = peak()
    forget_peak()
    ids = torch.randint(0, decoder.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder.model(ids, use_cache=False)
    used = peak()
    read = sum(path.stat().st_size for path in weight_files(folder))
    machine = Machine(1 << 60, 1 << 60, 1 << 60, ready=False)
    plan = plan_model(architecture, precision, machine, Use(8, 128), file_bytes=read)
    found: dict[str, Any] = {
        "seconds": seconds,
        "cpu": cpu,
        "weights": plan.weights,
        "loaded": loaded,
        "used": used,
        "planned": [phase.bytes("device") + phase.bytes("cache") for phase in plan.phases],
    }
    if order.get("texts"):
        losses = document_losses(decoder, load_tokenizer(folder), texts())
        found |= {"losses": losses.losses, "tokens": losses.tokens, "vocab": decoder.vocab_size}
    return found


def texts() -> list[str]:
    from mistudio.jobs.loaded import sample_texts

    return sample_texts(72)


def peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak of a process")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(order: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def bench(name: str, folder: Path, judged: bool) -> None:
    from mistudio.engine.models.quality import DocumentLosses, compare

    print(f"\n{name}\n")
    print(
        "precision  weights MB  load s (CPU s)  peak of load MB  plan  ratio  peak of use MB  plan"
        "  ratio  CE      delta CE           verdict"
    )
    reference = None
    for precision in PRECISIONS:
        row = in_a_process({"folder": str(folder), "precision": precision, "texts": judged})
        load, use = row["planned"]
        line = (
            f"{precision:<9}  {row['weights'] / MB:10.0f}  {row['seconds']:6.1f} "
            f"({row['cpu']:5.1f})"
            f"  {row['loaded'] / MB:15.0f}  {load / MB:4.0f}  {row['loaded'] / load:5.2f}"
            f"  {row['used'] / MB:14.0f}  {use / MB:4.0f}  {row['used'] / use:5.2f}"
        )
        if judged:
            losses = DocumentLosses(precision, tuple(row["losses"]), tuple(row["tokens"]))
            reference = reference or losses
            found = compare(losses, reference, row["vocab"])
            line += f"  {found.ce:6.3f}  {found.delta:+.4f} ± {found.error:.4f}  {found.verdict}"
        print(line, flush=True)


def random_model(folder: Path, sizes: dict[str, Any]) -> Path:
    import torch

    from mistudio.engine.models.hf import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = CONFIG_MAPPING[sizes.get("model_type", "llama")](**sizes)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    (folder / "tokenizer.json").write_text("{}")  # not read here, but a folder needs one
    return folder


# -------------------------------------------------------------------- budgets


def plan_3b() -> None:
    """All 28 layers and the whole vocabulary at Q4, generating into a KV cache of 2,048 tokens."""
    from mistudio.engine.models.architecture import describe_architecture
    from mistudio.engine.models.memory import Use, plan_model
    from mistudio.engine.training.footprint import Machine

    whole = {**THREE_B, "num_hidden_layers": 28, "vocab_size": 128_256, "head_dim": 128}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **whole}
    found = describe_architecture(json.dumps(config).encode())
    here = Machine(16 * GB, 16 * GB, 100 * GB, ready=False)
    plan = plan_model(found, "q4", here, Use(8, 128, 2048), file_bytes=2 * found.parameters)
    print(
        f"\nPlan of all {len(found.blocks)} layers ({found.parameters:,} parameters) at Q4: "
        f"weights {plan.weights / MB:.0f} MB, memory {plan.memory / MB:.0f} MB with a cache of "
        f"2,048 tokens for 8 texts; fits 16 GB with a tenth in reserve: {plan.fits}"
    )


def train_beside(folder: Path) -> dict[str, Any]:
    """Train one dictionary (default settings, fewer tokens) beside the model at fp32, judge it in
    the model, and compare the process's peak with the plan of that run and of a default one."""
    import torch

    from mistudio.engine.activations.source import LiveActivations
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.models.loading import load_model
    from mistudio.engine.models.memory import plan_model, shape_of
    from mistudio.engine.sae.loss import loss_recovered
    from mistudio.engine.training.config import TrainingConfig
    from mistudio.engine.training.footprint import Machine, RunShape
    from mistudio.engine.training.planning import plan_run, planned_sites
    from mistudio.engine.training.run import train

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    here = Machine(8 * GB, 8 * GB, 100 * GB, ready=False)
    model_plan = plan_model(read_architecture(folder), "fp32", here)
    shape, config = shape_of(read_architecture(folder), model_plan), TrainingConfig()
    plans = [
        plan_run(
            RunShape(
                shape,
                planned_sites(of, [(8, "resid_pre")], shape.d_model),
                heldout_tokens=GPT2_HELDOUT,
            ),
            here,
        )
        for of in (TrainingConfig(tokens=GPT2_TOKENS), config)
    ]
    decoder, store = load_model(folder, "fp32"), _tokens(folder)
    loaded = peak()
    forget_peak()
    source = LiveActivations(decoder, store, (HookPoint("resid_pre", 8),), config.context)
    run = train(source, TrainingConfig(tokens=GPT2_TOKENS), heldout_tokens=GPT2_HELDOUT)
    for site, result in run.sites.items():
        loss_recovered(
            decoder,
            store.heldout,
            site,
            result.dictionary,
            source.medians,
            context=config.context,
            max_tokens=2048,
        )
        latents = result.dictionary.d_sae
    return {
        "loaded": loaded,
        "peak": peak(),
        "latents": latents,
        "planned": plans[0].memory,
        "whole": plans[1].memory,
        "phases": {phase.name: phase.bytes("device") for phase in plans[0].phases},
        "fits": plans[1].fits,
    }


def _tokens(folder: Path) -> Any:
    """The shipped introductions under the tests' tokenizer, whose ids GPT-2's vocabulary holds."""
    from mistudio.engine.datasets.documents import Documents, write_documents
    from mistudio.engine.datasets.sources import read_documents
    from mistudio.engine.datasets.token_writer import write_token_store
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.models.loading import adds_bos, load_tokenizer, separator_id, special_ids

    tokenizer = load_tokenizer(ROOT / "tests" / "data" / "tiny-llama-0.9m")
    sample = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
    write_documents(read_documents(sample), folder / "documents")
    write_token_store(
        Documents(folder / "documents"),
        tokenizer,
        folder / "store",
        bos_id=adds_bos(tokenizer),
        separator_id=separator_id(tokenizer),
        special_ids=sorted(special_ids(tokenizer)),
        tokenizer_hash="tiny",
    )
    return TokenStore(folder / "store")


def bench_gpt2(folder: Path) -> None:
    command = [sys.executable, __file__, "--train", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\nGPT-2 small (random weights, fp32) with a dictionary of {row['latents']:,} latents at "
        f"resid_pre 8, {GPT2_TOKENS:,} tokens: peak {row['peak'] / MB:.0f} MB, plan "
        f"{row['planned'] / MB:.0f} MB, ratio {row['peak'] / row['planned']:.2f} (loading: "
        f"{row['loaded'] / MB:.0f} MB)\nPlan of 20 million tokens: {row['whole'] / MB:.0f} MB; "
        f"fits 8 GB with a tenth in reserve: {row['fits']}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["--train"]:
        print(json.dumps(train_beside(Path(sys.argv[2]))))
        return
    sample = os.environ.get("MISTUDIO_SAMPLE_MODEL")
    if sample:
        bench("The model of MISTUDIO_SAMPLE_MODEL, 64 documents, at most 128 tokens of each",
              Path(sample), judged=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in (("Random Llama, 8 layers of 1024", SMALL),
                            ("Random Llama 3B, 3 of its 28 layers", THREE_B)):  # fmt: skip
            bench(name, random_model(Path(folder) / str(sizes["hidden_size"]), sizes), judged=False)
        plan_3b()
        bench_gpt2(random_model(Path(folder) / "gpt2", {"model_type": "gpt2"}))


if __name__ == "__main__":
    main()
