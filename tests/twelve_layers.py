"""A model of twelve blocks, and a run over all of them: small enough for a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "data" / "tiny-llama-0.9m"
CORPUS = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
LAYERS = 12
WIDTH = 32
POINTS = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]


def model(folder: Path) -> Path:
    """Random weights, the tokenizer of the tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    known = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        vocab_size=known["vocab_size"],
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=known["bos_token_id"],
        eos_token_id=known["eos_token_id"],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(folder: Path) -> Path:
    """The folder of a run over all layers, in a library of its own below `folder`."""
    from mistudio.jobs.job import run_job, submit
    from mistudio.jobs.kinds import AddDataset, AddModel, Train
    from mistudio.library.library import Library

    folder.mkdir(parents=True)
    text = folder / "text.jsonl"
    with CORPUS.open(encoding="utf-8") as lines:
        text.write_text("".join(line for line, _ in zip(lines, range(120), strict=False)), "utf-8")
    library = Library(folder / "library")
    config = {"steps": 12, "batch_size": 256, "expansion": 2, "k": 4, "context": 64}
    for job in (
        AddDataset(str(text)),
        AddModel(str(model(folder / "model")), "fp32"),
        Train(1, 1, POINTS, config, loss_tokens=128),
    ):
        record = run_job(library, job, submit(library, job))
        if record.status != "finished":
            raise RuntimeError(record.error)
    found = library.path(library.trainings.get(1).folder)
    library.close()
    return found
