"""The plan before a run: its figures are those of the real step, model, files and process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from work_counter import count_work

from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.models.loading import describe as describe_model
from mistudio.engine.training import cost, footprint, planning
from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.cost import (
    GPT2_SMALL,
    PUBLISHED,
    forward_cost,
    model_shape,
    probe_device,
    published_speed,
    shape_of_decoder,
    step_cost,
)
from mistudio.engine.training.footprint import (
    Machine,
    PlannedSite,
    RunShape,
    checkpoint_bytes,
    export_bytes,
    extraction_bytes,
    memory_phases,
    needs,
    site_memory,
)
from mistudio.engine.training.planning import Measured, describe, plan_run, planned_sites
from mistudio.engine.training.step import SiteTrainer
from mistudio.errors import OutOfMemory

ROOT = Path(__file__).resolve().parents[3]
GB = 1024**3
SPEED = published_speed(PUBLISHED[2], 0.4)


def a_plan(d: int = 128, batch: int = 512, **options):
    values = {"tokens": 10_000_000, "k": 16, "anneal_share": 0.0, "auxk": False, **options}
    return derive(TrainingConfig(batch_size=batch, **values), d)


def a_trainer(plan) -> tuple[SiteTrainer, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(plan.batch_size, plan.d_in, generator=generator)
    transcoder = "transcoder" in plan.config.wiring
    y = torch.randn(plan.batch_size, plan.d_out, generator=generator) if transcoder else None
    return SiteTrainer(plan, x, seed=0, target=y), x, y


def a_run(layers: int = 6, **options) -> RunShape:
    source = options.pop("source", "stream")
    places = [(layer, "resid_pre") for layer in range(1, layers + 1)]
    config = TrainingConfig(tokens=20_000_000, **options)
    return RunShape(GPT2_SMALL, planned_sites(config, places, 768), source=source)


def a_machine(free: float, total: float = 16, disk: float = 500, **options) -> Machine:
    return Machine(int(total * GB), int(free * GB), int(disk * GB), **options)


# -------------------------------------------------------------------- the cost of a step


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"sparsity": "batchtopk"}, 0.1),
        ({"sparsity": "topk"}, 0.1),
        ({"sparsity": "matryoshka"}, 0.1),
        ({"sparsity": "batchtopk", "optimizer": "sgd"}, 0.1),
        ({"wiring": "skip_sae"}, 0.1),
        ({"wiring": "transcoder"}, 0.1),
        ({"wiring": "skip_transcoder"}, 0.1),
        ({"expansion": 32, "batch": 256}, 0.1),
        ({"gradient_accumulation": 2}, 0.1),
        ({"gradient_accumulation": 8}, 0.1),
        ({"mixed_precision": True}, 0.1),
    ],
    ids=str,
)
def test_step_cost_is_what_the_step_does(options, tolerance) -> None:
    plan = a_plan(**options)
    trainer, x, y = a_trainer(plan)
    for _ in range(2):
        trainer.step(x, y, measure=False)
    counted = count_work(lambda: trainer.step(x, y, measure=False))

    found = step_cost(plan)
    assert found.flops == counted.flops
    # What the encoder writes belongs to its matrix product, which the counter leaves out.
    encoded = plan.batch_size * plan.d_sae * (2 if plan.config.mixed_precision else 4)
    moved = sum(line.moved for line in found.lines) - encoded
    assert moved == pytest.approx(counted.moved, rel=tolerance)
    gathered = sum(line.gathered for line in found.lines)
    assert gathered == pytest.approx(counted.gathered, rel=0.08)  # L0 is k within some percent
    assert found.bytes_moved == pytest.approx(counted.moved + counted.gathered + encoded, rel=0.1)
    operations = sum(line.launches for line in found.lines)
    assert operations == pytest.approx(counted.operations, rel=0.25)


def test_dead_latents_cost_what_auxk_does() -> None:
    plan = a_plan(auxk=True)
    trainer, x, _ = a_trainer(plan)
    trainer.step(x, measure=False)

    def step_with_dead_latents() -> None:
        trainer.step_number = cost.AUX_EVERY  # its turn
        trainer.tokens_since_fired[:100] = plan.dead_window + 1
        trainer.step(x, measure=False)

    counted = count_work(step_with_dead_latents)
    plain, helping = step_cost(plan), step_cost(plan, dead=100)
    assert counted.flops == plain.flops + cost.AUX_EVERY * (helping.flops - plain.flops)


def test_constants_are_those_of_the_engine() -> None:
    from mistudio.engine.activations import ring
    from mistudio.engine.sae import dictionary, loss
    from mistudio.engine.training import checkpoints, finish, run, step
    from mistudio.engine.training.objectives import jumprelu, matryoshka

    assert cost.CHUNK_CELLS == dictionary.CHUNK_CELLS
    assert cost.DENSE_SHARE == dictionary.DENSE_SHARE
    assert cost.ENTRY_BUDGET == step.ENTRY_BUDGET
    assert cost.AUX_EVERY == step.AUX_EVERY
    assert cost.NESTED == matryoshka.LEVELS
    assert 2 * cost.JUMPRELU_MARGIN == jumprelu.BANDWIDTH
    assert footprint.SAMPLE_TOKENS == run.SAMPLE_TOKENS
    assert footprint.EVALUATION_TOKENS == run.EVALUATION_TOKENS
    assert footprint.EVALUATION_BYTES == run.EVALUATION_BYTES
    assert planning.EVALUATIONS == run.EVALUATIONS
    assert footprint.CALIBRATION_TOKENS == finish.CALIBRATION_TOKENS
    assert footprint.RING == ring.RING
    assert footprint.LOGIT_CELLS == loss.LOGIT_CELLS
    assert footprint.most_kept is checkpoints.most_kept


# -------------------------------------------------------------------- the cost of the model


@pytest.mark.parametrize("site", ["resid_pre", "mlp_in", "mlp_out", "resid_post"])
def test_forward_cost_is_what_a_capture_does(tiny, site) -> None:
    ids = torch.arange(8 * 64).reshape(8, 64) % tiny.vocab_size
    point = HookPoint(site, 2)
    tiny.capture(ids, [point])  # the first one also looks for where the site is
    counted = count_work(lambda: tiny.capture(ids, [point]))
    found = forward_cost(shape_of_decoder(tiny), 2, site, context=64, tokens=ids.numel())
    products, _, rest = found.lines
    assert products.flops == pytest.approx(counted.flops, rel=0.01)  # norms count as products
    assert rest.moved == pytest.approx(counted.moved, rel=0.15)
    assert rest.launches == pytest.approx(counted.operations, rel=0.2)


def gpt2(**options) -> HookedDecoder:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(bos_token_id=None, eos_token_id=None, **options)
    return HookedDecoder(GPT2LMHeadModel(config).eval())


def test_forward_cost_of_gpt2_is_what_a_capture_does() -> None:
    model = gpt2(n_layer=4, n_embd=64, n_head=4, vocab_size=100)
    ids = torch.arange(8 * 64).reshape(8, 64) % 100
    counted = count_work(lambda: model.capture(ids, [HookPoint("resid_pre", 3)]))
    shape = shape_of_decoder(model)
    assert not shape.gated_mlp
    products, _, rest = forward_cost(shape, 3, "resid_pre", context=64, tokens=512).lines
    assert products.flops == pytest.approx(counted.flops, rel=0.03)  # biases, at this width
    assert rest.moved == pytest.approx(counted.moved, rel=0.15)


def test_shape_of_a_folder_is_that_of_the_loaded_model(tiny, tiny_folder) -> None:
    from_folder = model_shape(describe_model(tiny_folder), weight_bytes=4)
    loaded = shape_of_decoder(tiny)
    # The norm before the unembedding counts as part of the blocks.
    assert from_folder == replace(loaded, block_parameters=from_folder.block_parameters)
    assert from_folder.block_parameters == pytest.approx(loaded.block_parameters, rel=1e-3)
    assert loaded.gated_mlp
    assert loaded.bytes == sum(p.numel() * 4 for p in tiny.model.parameters())
    assert loaded.parameters_up_to(2, "resid_pre") == 2 * loaded.block_parameters
    assert loaded.parameters_up_to(1, "resid_post") == loaded.parameters_up_to(2, "resid_pre")
    mlp_in, mlp_out = (loaded.parameters_up_to(2, site) for site in ("mlp_in", "mlp_out"))
    assert mlp_out - mlp_in == loaded.mlp_parameters == 3 * 128 * 344


def test_gpt2_small_is_gpt2_small() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert GPT2_SMALL.parameters == sum(p.numel() for p in model.parameters())
    block = model.transformer.h[0]
    assert GPT2_SMALL.block_parameters == sum(p.numel() for p in block.parameters())
    # 8 blocks of 2 operations a parameter: 113 MFLOP a token, and some for the attention
    assert forward_cost(GPT2_SMALL, 8, "resid_pre").flops / 1024 == pytest.approx(116e6, rel=0.01)


# -------------------------------------------------------------------- memory and disk


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_predicted_memory_is_what_a_fresh_process_takes() -> None:
    shape = {"d": 256, "expansion": 32, "batch_size": 4096, "steps": 2}
    script = ROOT / "tests" / "benchmarks" / "bench_cost_model.py"
    child = subprocess.run(
        [sys.executable, str(script), "--memory", json.dumps(shape)],
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
    )
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["measured"] > 100 * 2**20
    # Where other work keeps the threads apart, their peaks fall apart too: less is measured then.
    assert 0.9 <= found["predicted"] / found["measured"] <= 1.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd"},
        {"sparsity": "gated"},
        {"sparsity": "jumprelu"},
        {"wiring": "skip_sae"},
        {"wiring": "skip_transcoder"},
    ],
    ids=str,
)
def test_lasting_memory_and_checkpoints_are_what_the_trainer_keeps(options) -> None:
    plan = a_plan(**options)
    trainer, x, y = a_trainer(plan)
    trainer.step(x, y)
    memory = site_memory(plan)
    state = {name: t.numel() * t.element_size() for name, t in trainer.state().items()}
    state.pop("generator")  # 5 KB
    moments = sum(size for name, size in state.items() if name.startswith("optimizer."))
    weights = sum(state.values()) - moments - state["tokens_since_fired"]
    assert memory.moments == pytest.approx(moments, rel=0.01)
    assert memory.parameters == pytest.approx(weights, rel=0.01)
    assert checkpoint_bytes(plan) == pytest.approx(sum(state.values()), rel=0.01)


def test_pre_activations_never_take_more_than_a_chunk() -> None:
    narrow, wide = a_plan(d=768, batch=4096), a_plan(d=768, batch=4096, expansion=64)
    assert site_memory(wide).pre_activations <= 3 * 4 * cost.CHUNK_CELLS
    assert cost.chunk_rows(narrow) == cost.CHUNK_CELLS // narrow.d_sae
    accumulated = a_plan(d=768, batch=4096, gradient_accumulation=16)
    assert cost.chunk_rows(accumulated) == 256
    assert site_memory(accumulated).passing < site_memory(narrow).passing


def test_finished_saes_take_the_disk_that_was_planned(tmp_path) -> None:
    from mistudio.engine.sae.files import save_sae
    from mistudio.engine.sae.site import Site

    plan = a_plan(d=64)
    trainer, x, _ = a_trainer(plan)
    trainer.step(x)
    save_sae(
        trainer.dictionary(),
        tmp_path,
        site=Site.at(HookPoint("resid_pre", 1)),
        model_name="tiny",
        frequencies=torch.zeros(plan.d_sae),
    )
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert export_bytes(plan) == pytest.approx(written, rel=0.02)


def test_stored_activations_take_the_disk_that_was_planned() -> None:
    from mistudio.engine.activations.store import estimate_bytes

    assert extraction_bytes(1000, 768 + 576) == estimate_bytes(1000, [768, 576])
    plan = plan_run(a_run(2, source="extract"), a_machine(12))
    stored = plan.disk_parts[0]
    assert stored.value == extraction_bytes(plan.run.tokens, 2 * 768)
    assert len(stored.per_site) == 2


def test_a_transcoder_captures_two_tensors_and_runs_the_mlp() -> None:
    site = PlannedSite(3, "mlp_in", a_plan(d=768, wiring="transcoder"))
    assert site.channels == 2 * 768
    assert site.deepest == (3, "mlp_out")


def test_memory_counts_every_site_but_one_working_set() -> None:
    one, four = (plan_run(a_run(n), a_machine(12)) for n in (1, 4))

    def part(plan, name):
        train = next(phase for phase in plan.phases if phase.name == "train")
        return next(part for part in train.parts if part.name == name)

    for name in ("SAE parameters", "optimiser moments"):
        assert part(four, name).value == 4 * part(one, name).value
        assert len(part(four, name).per_site) == 4
    for name in ("gradients", "pre-activations of a chunk", "model"):
        assert part(four, name).value == part(one, name).value
    assert four.memory == max(phase.bytes("device") for phase in four.phases)


def test_storing_first_keeps_model_and_training_apart() -> None:
    streamed, stored = (
        {phase.name: phase for phase in memory_phases(a_run(2, source=source), a_machine(12))}
        for source in ("stream", "extract")
    )
    names = {
        place: {name: {part.name for part in phase.parts} for name, phase in phases.items()}
        for place, phases in (("streamed", streamed), ("stored", stored))
    }
    assert "model" in names["streamed"]["train"]
    assert "model" not in names["stored"]["train"]
    assert "model" in names["stored"]["extract"]
    assert "gradients" not in names["stored"]["extract"]
    assert "model" in names["stored"]["evaluate"]
    # In turns, the dictionaries wait in memory while the model runs again.
    in_turns = memory_phases(a_run(2, source="hybrid"), a_machine(12))[0]
    assert in_turns.name == "extract"
    assert {"model", "SAE parameters"} <= {part.name for part in in_turns.parts}
    assert "gradients" not in {part.name for part in in_turns.parts}


def test_a_card_of_its_own_needs_main_memory_for_buffers_only() -> None:
    plan = plan_run(a_run(2), a_machine(12, host_free=8 * GB))
    shared = plan_run(a_run(2), a_machine(12))
    assert shared.host_memory == 0
    assert 0 < plan.host_memory < plan.memory
    assert plan.memory < shared.memory
    starved = plan_run(a_run(2), a_machine(12, host_free=GB // 8))
    assert not starved.fits
    assert "main memory" in starved.advice[0]


# -------------------------------------------------------------------- time


def test_time_comes_from_measured_speeds_first() -> None:
    run, machine = a_run(2), a_machine(12)
    unknown = plan_run(run, machine)
    assert unknown.seconds is None
    assert unknown.time_basis == ""
    overall = plan_run(run, machine, None, Measured(overall=10_000))
    assert overall.time_basis == "measured"
    assert overall.seconds == pytest.approx(run.tokens / 10_000)
    both = plan_run(run, machine, None, Measured(forward=20_000, step=10_000))
    assert both.time_basis == "measured"
    assert both.seconds == pytest.approx(run.tokens * (1 / 20_000 + 1 / 10_000))
    half = plan_run(run, machine, SPEED, Measured(step=10_000))
    assert half.time_basis == "measured and cost model"


def test_time_of_the_cost_model_is_the_sum_of_its_costs() -> None:
    run = a_run(2)
    plan = plan_run(run, a_machine(12), SPEED)
    assert plan.time_basis == "cost model"
    model, training, judging = plan.time_parts
    steps = step_cost(run.plan).seconds(SPEED) * run.plan.steps
    assert training.per_site == pytest.approx((steps, steps))
    # Two sites at layers 1 and 2: one forward pass up to the deeper one.
    forward = forward_cost(GPT2_SMALL, 2, "resid_pre").seconds(SPEED) * run.tokens / 1024
    assert forward <= model.value <= 1.2 * forward
    assert plan.seconds == pytest.approx(model.value + training.value + judging.value)
    stored = plan_run(a_run(2, source="stored"), a_machine(12), SPEED)
    assert "model" not in {part.name for part in stored.time_parts}
    # Of all that is stored once, the model runs once; in portions, over every token.
    once = replace(a_run(2, source="extract"), stored_tokens=1_000_000)
    in_turns = replace(once, source="hybrid")
    model_once, model_in_turns = (
        plan_run(shape, a_machine(12), SPEED).time_parts[0].value for shape in (once, in_turns)
    )
    assert model_in_turns == pytest.approx(model_once * run.tokens / 1_000_000)


def test_probe_measures_every_kind_of_work() -> None:
    speed = probe_device("cpu")
    rates = [value for value in vars(speed).values() if isinstance(value, float)]
    assert len(rates) == 11
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert speed.launch < 1e-3
    assert not speed.queued


def test_slow_kinds_of_work_make_the_step_slow() -> None:
    found = step_cost(a_plan(d=768, batch=2048, expansion=8))
    base = found.seconds(SPEED)
    for name in ("gemm_flops", "bandwidth", "gather", "scan", "rank", "sort"):
        slower = replace(SPEED, **{name: getattr(SPEED, name) / 10})
        assert found.seconds(slower) > 1.01 * base, name
    waiting = replace(SPEED, launch=1.0)
    assert found.seconds(waiting) == pytest.approx(sum(line.launches for line in found.lines))
    assert found.seconds(replace(waiting, queued=False)) > found.seconds(waiting)


def test_what_the_readme_says_of_a_jetson() -> None:
    """20 million tokens through GPT-2 small up to layer 8 into 6144 latents: computed."""

    def minutes(machine, share, **options) -> float:
        config = TrainingConfig(tokens=20_000_000, **options)
        run = RunShape(GPT2_SMALL, planned_sites(config, [(8, "resid_pre")], 768))
        return plan_run(run, a_machine(5, 8), published_speed(machine, share)).seconds / 60

    small, super_, card = PUBLISHED
    assert max(minutes(super_, share) for share in (0.25, 0.4)) < 30
    assert minutes(small, 0.4, mixed_precision=True) < 30
    assert minutes(small, 0.25) > 30  # the README must not promise what the model does not say
    assert minutes(card, 0.25) < minutes(super_, 0.25) < minutes(small, 0.25)


# -------------------------------------------------------------------- advice


def test_a_run_that_fits_needs_no_advice() -> None:
    plan = plan_run(a_run(6), a_machine(12))
    assert plan.fits
    assert plan.disk_fits
    assert plan.layers == 6
    assert plan.advice == ()
    plan.require()


def test_as_many_layers_are_recommended_as_fit() -> None:
    run = a_run(6, expansion=32)
    whole = plan_run(run, a_machine(100)).memory
    machine = a_machine(0.7 * whole / GB, disk=20)
    plan = plan_run(run, machine)
    assert not plan.fits
    assert 0 < plan.layers < 6
    assert plan_run(run.first(plan.layers), machine).fits
    assert not plan_run(run.first(plan.layers + 1), machine).fits
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
    assert plan.advice[0].startswith("Six layers need ")
    assert plan.advice[0].endswith(f" are free: train {words[plan.layers]} at a time.")
    with pytest.raises(OutOfMemory, match="does not fit into memory"):
        plan.require()


def test_eight_gigabytes_are_for_four_layers_at_most() -> None:
    plan = plan_run(a_run(6), a_machine(free=7.5, total=8))
    assert plan.fits
    assert plan.layers == 4
    assert "8.0 GB of memory: train at most four layers" in plan.advice[0]
    assert plan_run(a_run(4), a_machine(free=7.5, total=8)).advice == ()
    assert plan_run(a_run(6), a_machine(free=7.5, total=12)).layers == 6


def test_a_tenth_stays_in_reserve() -> None:
    need = plan_run(a_run(1), a_machine(12)).memory / GB
    assert plan_run(a_run(1), a_machine(1.11 * need)).fits
    tight = plan_run(a_run(1), a_machine(1.05 * need))
    assert not tight.fits
    assert "a tenth in reserve" in tight.advice[0]


def test_model_and_dictionaries_that_do_not_fit_together_are_taken_in_turn() -> None:
    large = replace(GPT2_SMALL, parameters=1_500_000_000, block_parameters=120_000_000)
    run = replace(a_run(1, expansion=64), model=large)
    together, _ = needs(memory_phases(run, a_machine(99)))
    apart, _ = needs(memory_phases(replace(run, source="extract"), a_machine(99)))
    assert apart < 0.8 * together
    machine = a_machine(1.12 * apart / GB)
    plan = plan_run(run, machine)
    assert plan.layers == 0
    assert "Extract first, then train:" in plan.advice[0]
    assert plan_run(replace(run, source="extract"), machine).fits
    # With little disk, they take turns.
    little = plan_run(run, replace(machine, disk_free=20 * GB))
    assert "in portions of 1,000,000 tokens" in little.advice[0]
    assert plan_run(replace(run, source="hybrid"), replace(machine, disk_free=20 * GB)).disk_fits


def test_too_small_for_one_layer_says_what_to_make_smaller() -> None:
    run = a_run(1, expansion=256)
    whole = plan_run(run, a_machine(999)).memory / GB
    plan = plan_run(run, a_machine(whole / 3, disk=9999))
    assert plan.layers == 0
    assert "latents instead of 196,608" in plan.advice[0]
    width = int(plan.advice[0].split(" latents instead")[0].split()[-1].replace(",", ""))
    narrower = replace(
        run, sites=tuple(replace(s, plan=replace(s.plan, d_sae=width)) for s in run.sites)
    )
    assert plan_run(narrower, a_machine(whole / 3)).layers == 1 or "Extract" in plan.advice[0]


def test_too_small_for_the_model_says_so() -> None:
    model = replace(GPT2_SMALL, parameters=7_000_000_000, weight_bytes=4)
    plan = plan_run(replace(a_run(1), model=model), a_machine(14))
    assert "The model alone needs 26 GB: choose a smaller one" in plan.advice[0]
    assert "half precision (13 GB)" in plan.advice[0]


def test_too_little_disk_says_how_many_tokens_there_is_room_for() -> None:
    plan = plan_run(a_run(1, source="extract"), a_machine(12, disk=1))
    assert plan.fits
    assert not plan.disk_fits
    portion = int(plan.advice[-1].split("portions of ")[1].split(" tokens")[0].replace(",", ""))
    fewer = replace(a_run(1, source="hybrid"), stored_tokens=portion)
    fitting = plan_run(fewer, a_machine(12, disk=1))
    assert fitting.disk_fits
    assert fitting.disk > 0.85 * GB
    streamed = plan_run(a_run(1), a_machine(12, disk=0.1))
    assert "free some, or choose another folder" in streamed.advice[-1]


# -------------------------------------------------------------------- as text, and for the window


def test_the_plan_in_lines() -> None:
    plan = plan_run(a_run(1), a_machine(7.1, 8), SPEED)
    memory, disk, time = describe(plan)
    assert memory.startswith("memory: ")
    assert " of 7.1 GB free (" in memory
    assert "model 237 MB" in memory
    assert "checkpoints (best and newest) " in disk
    assert time.startswith("time: about ")
    assert "(cost model: " in time
    card = plan_run(a_run(6), a_machine(7.5, 8, host_free=30 * GB))
    lines = describe(card)
    assert lines[1].startswith("main memory: ")
    assert lines[-1] == card.advice[-1]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, mistudio.engine.training.planning as p;"
        "from mistudio.engine.training.cost import GPT2_SMALL;"
        "from mistudio.engine.training.config import TrainingConfig;"
        "sites = p.planned_sites(TrainingConfig(), [(8, 'resid_pre')], 768);"
        "plan = p.plan_run(p.RunShape(GPT2_SMALL, sites), p.Machine(8, 8, 8));"
        "print(len(p.describe(plan)), 'torch' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert child.stdout.split() == ["4", "False"]
