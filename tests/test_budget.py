"""Budgets: what does not fit is refused with a reason, estimates are sums that can be redone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from jobs import live_run, run_job
from rich.console import Console

from megatron_idea import checkpoint
from megatron_idea import config as configs
from megatron_idea.config import Config, ConfigError
from megatron_idea.course import shape_plan, target_shape
from megatron_idea.engine.gpus import GPUS, gpu_named
from megatron_idea.planning import budget as budgets
from megatron_idea.planning import footprint
from megatron_idea.planning.budget import (
    Assumptions,
    Budget,
    checkpoint_bytes,
    make_budget,
    step_seconds,
    suggest,
    suggest_after_prune,
)
from megatron_idea.planning.dry_run import dry_run
from megatron_idea.planning.footprint import parameter_sizes
from megatron_idea.planning.view import (
    draw_budget,
    render_after_prune,
    render_budget,
    render_layouts,
)
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers
from megatron_idea.train import step

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"


@pytest.fixture(scope="module")
def paper() -> Config:
    return configs.load(EXAMPLES / "2p8b_to_1p3b.yaml")


@pytest.fixture(scope="module")
def budget(paper: Config) -> Budget:
    return make_budget(paper, 256, GPUS["h100"])


def small(**sections: Any) -> Config:
    """Four layers, 1M parameters, two compactions."""
    config = configs.from_dict(
        {
            "model": {
                "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 1024, "vocab_size": 2048,
                "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
            },
            "training": {
                "seq_length": 64, "micro_batch_size": 4, "global_batch_size": 16,
                "precision": "bf16",
            },
            "schedule": {"total_tokens": 256 * 1024},
            "prune": {"target": {"ffn_hidden_size": 512}, "compaction_block": 256},
        }
    )  # fmt: skip
    return configs.replace(config, **sections)


def neurons(budget: Budget) -> list[int]:
    return [stretch.stored["ffn_hidden_size"] for stretch in budget.stretches]


def test_the_paper_run_fits_and_shrinks(budget: Budget) -> None:
    totals = [stretch.total_bytes for stretch in budget.stretches]
    assert budget.refusal == "" and budget.peak_bytes == totals[0] < budget.usable_bytes
    assert totals == sorted(totals, reverse=True)
    assert neurons(budget)[:: len(totals) - 1] == [16384, 6144]
    # No compaction needs more than training does.
    assert all(0 < s.compaction_peak_bytes < totals[0] for s in budget.stretches[1:])
    # bf16 weights and fp32 gradients of 1.4B parameters; 12 bytes more of each over 128 ranks.
    memory, parameters = budget.stretches[0].memory, budget.stages[0].parameters
    assert memory.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert memory.gradients == pytest.approx(4 * parameters, rel=1e-3)
    assert memory.main_weights + memory.moments == pytest.approx(12 * parameters / 128, rel=1e-3)


def test_gpu_hours_are_flops_over_peak_times_mfu(budget: Budget) -> None:
    per_hour = 3600 * 989e12 * 0.4
    for phase in budget.phases:
        assert phase.this_run == pytest.approx(phase.tokens * phase.flops_per_token / per_hour)
        assert phase.target_from_scratch <= phase.this_run <= phase.zeros_only
    assert budget.days == pytest.approx(sum(p.this_run for p in budget.phases) / 256 / 24)


def test_activations_between_two_shapes_are_never_below_those_of_a_step() -> None:
    config = small()
    made = make_budget(config, 1, GPUS["h100"])
    stretches = made.stretches
    assert neurons(made) == [1024, 760, 512]
    wide = configs.replace(config, model={"ffn_hidden_size": 760})
    exact = make_budget(wide, 1, GPUS["h100"]).stretches[0]
    assert stretches[1].memory.weights == exact.memory.weights
    assert exact.memory.activations <= stretches[1].memory.activations
    assert stretches[1].memory.activations == pytest.approx(exact.memory.activations, rel=0.02)


def test_all_axes_are_worked_out_over_uneven_stages() -> None:
    target = {"ffn_hidden_size": 512, "num_query_groups": 2, "hidden_size": 32, "num_layers": 6}
    config = small(
        model={"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 4},
        prune={"target": configs.PruneTarget(**target), "channel_alignment": 16},
        parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4},
    )
    made = make_budget(config, 16, GPUS["h100"])
    last = made.stretches[-1]
    assert last.stored == target
    assert [s.stage for s in made.stages] == [0, 1, 3]
    totals = [stretch.total_bytes for stretch in made.stretches]
    assert totals == sorted(totals, reverse=True) and len(totals) > 4
    for stretch in made.stretches[1:]:
        assert 0 < stretch.compaction_peak_bytes < totals[0]
        assert stretch.compaction_sent_bytes > 0
    # 6 layers on 4 stages: two have two, where one and a half is the share.
    compute = 16 * 64 * target_shape(config).flops_per_token(config.model, 64) / (16 * 989e12 * 0.4)
    sent = dict.fromkeys(("tp", "pp", "dp", "embedding"), 0)
    seconds = step_seconds(config, 16, GPUS["h100"], Assumptions(), target_shape(config), sent)
    assert seconds["compute"] == pytest.approx(compute)
    assert seconds["bubble"] == pytest.approx(compute * (4 / 3 * (1 + 3 / 2) - 1))
    # bf16 weights of the stage that is the fullest; buffers are padded.
    shape = target_shape(config)
    sizes = parameter_sizes(config.sections, shape, last.stage)
    assert last.memory.weights == pytest.approx(2 * sum(sizes.values()), rel=0.02)
    assert last.checkpoint_bytes == 14 * shape.parameters(config.model).total


def test_what_lies_between_corners_is_never_below_what_a_step_needs() -> None:
    target = {"ffn_hidden_size": 512, "num_query_groups": 1, "hidden_size": 32, "num_layers": 2}
    config = small(
        prune={
            "target": configs.PruneTarget(**target),
            "channel_alignment": 16,
            "compaction_block": 0,
        }
    )
    stretches = make_budget(config, 1, GPUS["h100"]).stretches
    shapes = [change.shape for change in shape_plan(config)]
    for stretch, shape in list(zip(stretches[1:], shapes, strict=True))[1::3]:
        with dry_run(config, 1) as dry:
            step = footprint.step(dry, footprint.build(config, dry, shape))
        # Norms make their scaled gains anew once channels are gone.
        assert step.activation_bytes <= stretch.memory.activations * 1.001
        assert stretch.memory.activations == pytest.approx(step.activation_bytes, rel=0.05)


def test_a_pipeline_of_1024_gpus_is_worked_out(paper: Config) -> None:
    config = configs.replace(
        paper,
        parallel={"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
    )
    made = make_budget(config, 1024, GPUS["h100"])
    assert made.data_parallel == 32
    first, last = made.stages
    # The tied embedding is on both; the last stage has the final norm, too.
    assert last.parameters - first.parameters == 2048
    # Four micro-batches are in flight on the first stage, one on the last.
    assert 2 < first.memory.activations / last.memory.activations < 4
    assert made.stretches[0].stage == 0


def test_what_does_not_fit_is_refused_with_a_reason(paper: Config) -> None:
    zeros_only = configs.replace(paper, prune={"compact": False})
    refusal = make_budget(zeros_only, 256, GPUS["a100-40"]).refusal
    for part in ("46.8 GB", "36.0 of the 40 GB", "activations (38.3 GB)", "micro_batch_size below"):
        assert part in refusal


def test_unsharded_optimizer_state_is_refused_with_the_switch_that_shards_it() -> None:
    memory = budgets.Memory(1, 2, 10**11, 2 * 10**11, 5, 0)
    plain = configs.replace(small(), parallel={"use_distributed_optimizer": False})
    assert "use_distributed_optimizer=true" in budgets.refusal(plain, memory, GPUS["h100"])
    assert "more GPUs, or TP above 1" in budgets.refusal(small(), memory, GPUS["h100"])


def test_suggestions_fit_and_are_ranked_and_the_rest_says_why_not() -> None:
    config = small()
    everything, none = suggest(config, 4, GPUS["h100"])
    assert none == []
    most = max(layout.total_bytes for layout in everything if layout.micro_batch_size == 1)
    gpu = dataclasses.replace(GPUS["h100"], memory_bytes=(most - 1) / 0.9)
    fitting, refused = suggest(config, 4, gpu)
    assert 0 < len(fitting) < len(everything) and [x.total_bytes for x in refused] == [most]
    assert all(layout.total_bytes < most for layout in fitting)
    times = [layout.step_s for layout in fitting]
    assert times == pytest.approx(sorted(times), rel=0.01)
    for layout in fitting:
        assert layout.tensor_parallel * layout.pipeline_parallel * layout.data_parallel == 4
        assert layout.step_s == pytest.approx(sum(layout.seconds.values()))
    assert all("too much" in layout.refusal for layout in refused)
    best = fitting[0]
    chosen = configs.replace(
        config,
        parallel={
            "tensor_model_parallel_size": best.tensor_parallel,
            "pipeline_model_parallel_size": best.pipeline_parallel,
        },
        training={"micro_batch_size": best.micro_batch_size},
    )
    exact = make_budget(chosen, 4, gpu)
    assert exact.refusal == ""
    # Activations are scaled up from a micro-batch of one: a little too high, never too low.
    assert exact.stretches[0].total_bytes <= best.total_bytes * 1.001
    assert exact.stretches[0].step_s == pytest.approx(best.step_s, rel=0.01)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_layouts(fitting, refused, gpu))
    assert "fastest first" in capture.get() and "does not fit" in capture.get()


def test_the_small_models_own_layout_is_suggested_with_what_it_saves_and_planned() -> None:
    # A batch so large that computing takes longer than exchanging gradients.
    large = {"training": {"global_batch_size": 64}, "schedule": {"prune_warmup_fraction": 0.2}}
    config, gpu = small(parallel={"tensor_model_parallel_size": 2}, **large), GPUS["h100"]
    after = suggest_after_prune(config, 4, gpu)
    assert after is not None and after.now.tensor_parallel == 2 and after.best.tensor_parallel == 1
    saved_s = after.now.step_s - after.best.step_s
    assert after.steps == pytest.approx(0.35 * 64, abs=1)
    assert after.gpu_hours_saved == pytest.approx(saved_s * after.steps * 4 / 3600) and saved_s > 0
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_after_prune(after))
    assert "parallel_after_prune: {tensor_model_parallel_size: 1," in capture.get()
    one = dataclasses.replace(config.parallel, tensor_model_parallel_size=1)
    changes, stays, small_from_start = (
        make_budget(each, 4, gpu)
        for each in (
            configs.replace(config, parallel_after_prune=one),
            config,
            configs.replace(config, parallel=vars(one)),
        )
    )
    assert changes.stretches[:-1] == stays.stretches[:-1]
    last, theirs = changes.stretches[-1], small_from_start.stretches[-1]
    assert (last.memory, last.step_s) == (theirs.memory, pytest.approx(theirs.step_s))
    assert suggest_after_prune(small(prune={"strategy": "none"}), 4, gpu) is None
    best = suggest_after_prune(configs.replace(config, parallel_after_prune=one), 4, gpu)
    assert best is not None and best.best is best.now and best.gpu_hours_saved == 0


def test_no_legal_layout_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no TP x PP x DP is legal for 7 GPUs"):
        suggest(small(), 7, GPUS["h100"])


def test_an_unknown_gpu_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="known GPUs: a100-40, a100, h100"):
        gpu_named("tpu")


def test_the_tables_and_the_picture_say_what_is_assumed(budget: Budget, tmp_path: Path) -> None:
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render_budget(budget))
    text = capture.get()
    for shown in ("256 x H100", "assumed, not measured: MFU 0.4", "activations", "zeros only"):
        assert shown in text
    draw_budget(budget, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plain_training_has_one_stretch_and_no_compactions() -> None:
    made = make_budget(small(prune={"strategy": "none"}), 2, GPUS["h100"], Assumptions(mfu=0.5))
    assert len(made.stretches) == 1 and made.assumptions.mfu == 0.5
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render_budget(made))
    assert "Compactions" not in capture.get()


def test_a_teacher_is_in_memory_messages_and_hours_and_kept_apart() -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    plain = make_budget(small(parallel=layout), 8, GPUS["h100"])
    taught = small(parallel=layout, distill={"teacher": "self"})
    made = make_budget(taught, 8, GPUS["h100"])
    on_host = make_budget(configs.replace(taught, distill={"keep_hidden": "host"}), 8, GPUS["h100"])
    # Two micro-batches of four sequences, half of the tokens and bf16, on the last stage alone.
    hidden = 2 * 4 * 64 // 2 * 64 * 2
    for at, without, hosted in zip(made.stages, plain.stages, on_host.stages, strict=True):
        weights = 2 * at.parameters
        assert hosted.memory.teacher == weights
        assert at.memory.teacher == weights + (hidden if at.stage == 1 else 0)
        assert at.memory.activations == hosted.memory.activations
        assert without.memory.teacher == 0
        # Forward passes of its own, but no gradients.
        assert at.sent_bytes["tp"] > without.sent_bytes["tp"]
        assert at.sent_bytes["dp"] == without.sent_bytes["dp"]
        kinds = ("weights", "gradients", "main_weights", "moments")
        assert all(getattr(at.memory, k) == getattr(without.memory, k) for k in kinds)
    # Its logits, in bf16, on the last stage. The first has one micro-batch more in flight.
    assert made.stages[1].memory.activations >= 4 * 64 * 2048 // 2 * 2
    for at, without in zip(made.stretches, plain.stretches, strict=True):
        assert at.memory.teacher == made.stages[at.stage].memory.teacher
        assert at.step_s > without.step_s
    for at, without in zip(made.stretches[1:], plain.stretches[1:], strict=True):
        more = at.compaction_peak_bytes - without.compaction_peak_bytes
        assert more in [2 * stage.parameters for stage in made.stages]
    per_hour = 3600 * 989e12 * 0.4
    forward = Shape.full(taught.model).flops_per_token(taught.model, 64) // 3
    assert [phase.teacher for phase in made.phases] == [
        0,
        *(pytest.approx(phase.tokens * forward / per_hour) for phase in made.phases[1:]),
    ]
    assert [p.this_run for p in made.phases] == [p.this_run for p in plain.phases]
    assert made.days > plain.days
    console = Console(width=130)
    with console.capture() as capture:
        console.print(render_budget(made))
    assert "hidden states that wait" in capture.get()
    elsewhere = make_budget(small(distill={"teacher": "nowhere"}), 1, GPUS["h100"])
    assert all(phase.teacher is None for phase in elsewhere.phases)
    with console.capture() as capture:
        console.print(render_budget(elsewhere))
    assert "its size cannot be read" in capture.get()
    with pytest.raises(ConfigError, match=r"distill\.teacher \(nowhere\) cannot be read"):
        suggest(small(distill={"teacher": "nowhere"}), 1, GPUS["h100"])


def save_a_checkpoint(groups: Any, config: Config) -> int:
    run, state = live_run(groups, config)
    step(run, state)
    folder = checkpoint.save(config, run.trainable, run.pruner, state)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_checkpoint_has_the_size_that_was_planned(
    workers: Workers, tmp_path: Path, precision: str
) -> None:
    config = small(training={"precision": precision}, run_dir=str(tmp_path))
    (written,) = run_job(workers, save_a_checkpoint, 1, config)
    # Masks, neuron ids, scores and names come on top; a model of 1M parameters shows them.
    assert checkpoint_bytes(config, Shape.full(config.model)) == pytest.approx(written, rel=0.05)
