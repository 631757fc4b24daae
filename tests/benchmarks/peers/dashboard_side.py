"""SAEDashboard's side of bench_saedashboard: its own runner on a model, an SAE and tokens on disk.

    python dashboard_side.py JOB.json      (in the environment that holds sae-dashboard)

JOB names the model folder, the SAELens folder of the SAE, tokens.npy [prompts, tokens] and the
folder for its batch files. Printed at the end: one line of JSON with the seconds that
`NeuronpediaRunner.run` had taken when each batch was done, [clock, processor], and its peak memory.

What is replaced is only how its inputs come about, outside of what is timed: its runner knows
models by their names on the Hub and draws tokens from a dataset there. The model is built by
TransformerLens from the folder with the processing that `from_pretrained` applies by default.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sae_dashboard.neuronpedia import neuronpedia_runner
from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """Without the class's name, which this environment's transformers need not know."""
    given = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {
        name: given[name] for name in ("bos_token", "eos_token", "pad_token") if given.get(name)
    }
    # Named and flagged so that TransformerLens takes it as it is instead of asking the Hub.
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        name_or_path=str(folder),
        add_bos_token=True,
        **special,
    )


def transformer_lens_model(folder: str) -> HookedSAETransformer:
    """A Llama of a folder as TransformerLens loads those it knows by name."""
    given = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    tokenizer = tokenizer_of(Path(folder))
    old = given.config
    heads = old.num_key_value_heads
    # Its transformers does not know the newer name and would take 10,000 without a word.
    written = json.loads((Path(folder) / "config.json").read_text())
    base = written.get("rope_theta") or written["rope_parameters"]["rope_theta"]
    d_head = old.hidden_size // old.num_attention_heads
    config = HookedTransformerConfig(
        model_name=Path(folder).name,
        original_architecture="LlamaForCausalLM",
        d_model=old.hidden_size,
        d_head=d_head,
        n_heads=old.num_attention_heads,
        n_key_value_heads=heads if heads != old.num_attention_heads else None,
        d_mlp=old.intermediate_size,
        n_layers=old.num_hidden_layers,
        n_ctx=min(old.max_position_embeddings, 2048),
        eps=old.rms_norm_eps,
        d_vocab=old.vocab_size,
        act_fn=old.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        rotary_base=int(base),
        final_rms=True,
        gated_mlp=True,
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedSAETransformer(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(given, config),
        fold_ln=True,
        center_writing_weights=False,  # as TransformerLens decides itself for RMS norms
        center_unembed=True,
        fold_value_biases=True,
    )
    return model


class Runner(NeuronpediaRunner):
    """Its runner with the model and the tokens of the job."""

    job: dict

    def _initialize_model(self) -> None:
        self.model = transformer_lens_model(self.job["model"])
        self.hook_name = self.sae.cfg.metadata["hook_name"]

    def _setup_activation_store(self) -> None:
        self.activations_store = None
        self.cached_activations_dir = Path(self.job["out"]) / "cached_activations"

    def get_tokens(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.job["tokens"]).astype(np.int64))


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    Runner.job = job
    tokens = np.load(job["tokens"], mmap_mode="r")
    config = NeuronpediaRunnerConfig(
        sae_set="set",
        sae_path=job["sae"],
        np_set_name="set",
        from_local_sae=True,
        outputs_dir=job["out"],
        huggingface_dataset_path="text",
        sae_dtype="float32",
        model_dtype="float32",
        n_prompts_total=len(tokens),
        n_tokens_in_prompt=tokens.shape[1],
        n_features_at_a_time=128,
        end_batch=job.get("end_batch"),
        prepend_bos=False,
        shuffle_tokens=False,
        ignore_positions=[0],
        ignore_high_activation_norm_multiple=10.0,
    )
    with contextlib.redirect_stdout(sys.stderr):
        runner = Runner(config)
        done: list[tuple[float, float]] = []
        convert = neuronpedia_runner.NeuronpediaConverter.convert_to_np_json
        began, cpu = time.perf_counter(), time.process_time()

        def timed(*arguments: object) -> str:
            text = convert(*arguments)
            done.append((time.perf_counter() - began, time.process_time() - cpu))
            return text

        neuronpedia_runner.NeuronpediaConverter.convert_to_np_json = staticmethod(timed)
        runner.run()
    print(
        json.dumps(
            {
                "batches": done,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "folder": str(runner.cfg.outputs_dir),
            }
        )
    )


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(sys.argv[1])
