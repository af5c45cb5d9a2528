"""The residual stream turns into its principal directions and the model computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import RandomBatches, live_run, run_job, small, train_on, whole
from test_all_axes import PP2, TP2, killed_after
from test_checkpoint import checkpoint_at, curves, tensors

from megatron_idea.checkpoint import read_state
from megatron_idea.config import Config, ConfigError, PruneTarget, replace, validate
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, TP2),
    "tp2": (2, {**TP2, "sequence_parallel": False}),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "dp2_whole": (2, {"use_distributed_optimizer": False}),
}
STEPS = 12
CONFIG = small(
    model={
        "num_layers": 4, "share_embeddings_and_output_weights": False, "init_method_std": 0.1,
    },
    schedule={
        "total_tokens": STEPS * 96, "lr": 3e-3, "min_lr": 3e-5, "enlarged_fraction": 0.25,
        "prune_fraction": 0.25, "recover_fraction": 0.5, "prune_warmup_fraction": 0.4,
    },
    prune={
        "strategy": "pca_stem", "target": PruneTarget(hidden_size=12), "channel_alignment": 4,
    },
)  # fmt: skip


def _turned(groups: ProcessGroups, config: Config) -> dict[str, Any]:
    """Train three steps, turn by hand, and compare what the model says of a batch."""
    from megatron_idea.prune.probe import Probe
    from megatron_idea.prune.rotate import principal_directions, rotate
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    for _ in range(3):
        step(run, state)
    trainable = run.trainable
    probe = Probe(trainable, RandomBatches(config, groups, seed=7), 0)
    before, gram = probe.loss(), probe.stream_gram()
    directions = principal_directions(gram, groups)
    rotate(trainable, directions)
    turned = probe.stream_gram()
    states = [whole(trainable, p, "exp_avg_sq") for p in trainable.parameters]
    return {
        "before": before,
        "after": probe.loss(),
        "gram": gram,
        "directions": directions,
        "turned": turned,
        "gains": [p.detach().clone() for p in trainable.parameters if p.shape == (16,)],
        "moments": sum(float(s.abs().sum()) for s in states),
    }


@pytest.fixture(scope="module")
def alone(workers: Workers) -> dict[str, Any]:
    (found,) = run_job(workers, _turned, 1, CONFIG)
    return found


def test_a_turned_model_computes_the_same(alone: dict[str, Any]) -> None:
    assert alone["after"] == pytest.approx(alone["before"], rel=1e-6)
    q = alone["directions"]
    assert_close(q.T @ q, torch.eye(16, dtype=torch.float64), "orthogonal", 1e-12)
    energy = alone["turned"].diagonal()
    assert (energy.diff() < 0).all(), "channels lie by falling energy"
    assert_close(alone["turned"], q.T @ alone["gram"] @ q, "the stream is x Q", 1e-3)
    # What the last directions have is what no four channels could have less of.
    assert energy[12:].sum() < alone["gram"].diagonal().sort().values[:4].sum()
    assert len(alone["gains"]) == 9 and all(bool((g == 1).all()) for g in alone["gains"])
    assert alone["moments"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_turns_alike(workers: Workers, alone: dict[str, Any], layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    for found in run_job(workers, _turned, world_size, replace(CONFIG, parallel=parallel)):
        assert_close(found["gram"], alone["gram"], "energies", 1e-5)
        assert found["before"] == pytest.approx(alone["before"], rel=1e-6)
        assert found["after"] == pytest.approx(found["before"], rel=1e-6)
        assert_close(found["turned"].diagonal(), alone["turned"].diagonal(), "turned", 1e-5)
        assert found["moments"] == 0


def _stream_gram_by_hand(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.engine.model import unwrap
    from megatron_idea.prune.probe import Probe

    run, _ = live_run(groups, config)
    seen: list[torch.Tensor] = []
    model: Any = unwrap(run.trainable.chunks[0])
    for layer in model.decoder.layers:
        layer.register_forward_hook(
            lambda _m, _a, inputs, _o: seen.append(inputs["hidden_states"]), with_kwargs=True
        )
        layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.decoder.final_layernorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    found = Probe(run.trainable, RandomBatches(config, groups), 0).stream_gram()
    rows = torch.cat([x.detach().double().flatten(0, 1) for x in seen])
    assert len(rows) == 9 * 96
    rows = rows / (rows.square().mean(1, keepdim=True) + config.model.layernorm_epsilon).sqrt()
    assert_close(found, rows.T @ rows, "gram", 1e-5)


def test_energies_are_of_what_norms_see(workers: Workers) -> None:
    run_job(workers, _stream_gram_by_hand, 1, CONFIG)


def _run(groups: ProcessGroups, config: Config) -> dict[str, Any]:
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    losses = [step(run, state)[0].loss for _ in range(STEPS)]
    return {
        "losses": losses,
        "hidden_size": run.trainable.shape.hidden_size,
        "alive": run.pruner.alive["hidden_size"].tolist(),
    }


def test_a_run_turns_once_and_keeps_the_first_channels(workers: Workers) -> None:
    (cut,) = run_job(workers, _run, 1, CONFIG)
    (silent,) = run_job(workers, _run, 1, replace(CONFIG, prune={"compact": False}))
    assert cut["alive"] == silent["alive"] == [True] * 12 + [False] * 4
    assert (cut["hidden_size"], silent["hidden_size"]) == (12, 16)
    assert cut["losses"] == pytest.approx(silent["losses"], rel=1e-5)
    parallel = {**PP2, "virtual_pipeline_model_parallel_size": 2}
    split = run_job(workers, _run, 2, replace(CONFIG, parallel=parallel))[0]
    assert split["alive"] == cut["alive"]
    assert split["losses"] == pytest.approx(cut["losses"], rel=1e-4)


def test_what_cannot_turn_is_refused() -> None:
    validate(CONFIG, 1)
    for changes in (
        {"model": {"share_embeddings_and_output_weights": True}},
        {"schedule": {"removal": "cubic"}},
    ):
        with pytest.raises(ConfigError, match="turns the residual stream once"):
            validate(replace(CONFIG, **changes), 1)


@pytest.mark.parametrize("every", [1, 0], ids=["after", "before"])
def test_a_run_that_stops_around_the_turn_goes_on_as_if_it_had_not(
    workers: Workers, tiny_halved: Config, tmp_path: Path, every: int
) -> None:
    """From the checkpoint right before, with its plan, and from one with moments of zeros."""
    config = replace(
        tiny_halved,
        model={**vars(CONFIG.model), "vocab_size": tiny_halved.model.vocab_size},
        schedule={"removal": None},
        prune={"strategy": "pca_stem", "target": PruneTarget(hidden_size=12),
               "channel_alignment": 4},
        checkpoint={"before_compaction": not every, "every_tokens": every * 128, "keep_last": 0},
        parallel={"use_distributed_optimizer": True},
        training={"precision": "bf16"},
    )  # fmt: skip
    workers.run(train_on, 2, config)
    folder = Path(config.run_dir) / "checkpoints"
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.iterdir())]
    states = {step: read_state(checkpoint_at(config.run_dir, step)) for step in steps}
    (at,) = [s for s, state in states.items() if state.plan_due or state.was_reset]
    assert (states[at].plan_due, states[at].adam_step == 0) == (not every, bool(every))
    again = killed_after(config, at, tmp_path / "again")
    workers.run(train_on, 2, again)
    assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
    ours, theirs = (tensors(checkpoint_at(c.run_dir, 24)) for c in (again, config))
    for name in theirs:
        assert_equal(ours[name], theirs[name], name)
