"""What forward passes show of units: against plain sums, in any layout, and without a trace."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import backward, live_run, on_ranks, run_job, small
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megatron_idea.config import Config, PruneTarget, replace
from megatron_idea.prune.strategy import Activation
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

UNITS = ("ffn_hidden_size", "num_query_groups", "hidden_size")
STATISTICS = ("mean", "mean_square", "sequence_mean", "sequence_norm", "cosine")
ASKED = tuple(Activation(name, skip) for name in STATISTICS for skip in (False, True))
# Weights far from the start's, so that layers turn the residual stream; KV groups of two heads.
CONFIG = small(
    model={
        "num_layers": 4, "num_attention_heads": 8, "num_query_groups": 4, "init_method_std": 0.3,
    },
    prune={"strategy": "minitron", "ema": 0.0, "channel_alignment": 4, "target": PruneTarget(
        ffn_hidden_size=12, num_query_groups=2, hidden_size=8, num_layers=2,
    )},
    schedule={"prune_warmup_fraction": 0.9},
)  # fmt: skip
LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-no-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": False}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2-dp2": (4, {"tensor_model_parallel_size": 2}),
}  # fmt: skip


def asker() -> Any:
    """Stands for a method that wants to know everything."""
    return SimpleNamespace(axes=(*UNITS, "num_layers"), measures=ASKED)


def seen_in(run: Any, seeds: range = range(1)) -> dict[Any, dict[str, Tensor]]:
    """The tables of all activations, over a step for each seed."""
    from megatron_idea.prune.activations import watched
    from megatron_idea.prune.scores import Scores

    trainable, pruner = run.trainable, run.pruner
    scores = Scores(asker(), trainable.model, 0.0, trainable.groups.device)
    for seed in seeds:
        with watched(trainable, scores.activations) as seen:
            backward(trainable, seed)
        scores.record(scores.observe(trainable, seen))
    scores.fold(trainable, pruner.stored)
    return scores.now(trainable, pruner.stored)


def flat(tables: dict[Any, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {
        f"{asked.statistic} {asked.skip_first} {axis}": table.double().numpy()
        for asked, of_axis in tables.items()
        for axis, table in of_axis.items()
    }


def tables(groups: ProcessGroups, config: Config) -> dict[str, np.ndarray]:
    run, _ = live_run(groups, config)
    return flat(seen_in(run, range(2)))


def keeping(run: Any) -> dict[Any, list[Tensor]]:
    """What hooks of this test see of one process's passes, fp64 [s, b, ...]: by axis and place."""
    (chunk,) = run.trainable.chunks
    seen: dict[Any, list[Tensor]] = {}

    def keep(key: Any, x: Tensor) -> None:
        seen.setdefault(key, []).append(x.detach().double())

    decoder = chunk.module.decoder
    for n, layer in enumerate(decoder.layers):
        for axis, linear in (
            ("ffn_hidden_size", layer.mlp.linear_fc2),
            ("num_query_groups", layer.self_attention.linear_proj),
        ):
            linear.register_forward_pre_hook(lambda _, x, at=(axis, n): keep(at, x[0]))
        for place, norm in ((2 * n, layer.input_layernorm), (2 * n + 1, layer.pre_mlp_layernorm)):
            norm.register_forward_hook(lambda _m, _x, y, at=("hidden_size", place): keep(at, y))
        layer.register_forward_hook(
            lambda _m, _x, given, y, n=n: keep(
                ("num_layers", n),
                cosine_similarity(given["hidden_states"].double(), y[0].double(), dim=-1),
            ),
            with_kwargs=True,
        )
    decoder.final_layernorm.register_forward_hook(lambda _m, _x, y: keep(("hidden_size", 8), y))
    return seen


def by_hand(groups: ProcessGroups, config: Config) -> dict[str, np.ndarray]:
    """The same in fp64 over whole samples, of what hooks of this test have seen."""
    run, _ = live_run(groups, config)
    seen = keeping(run)
    for seed in range(2):
        backward(run.trainable, seed)
    whole = {key: torch.cat(parts, dim=1) for key, parts in seen.items()}  # [s, samples, ...]
    assert all(x.shape[:2] == (8, 24) for x in whole.values())
    found: dict[Any, dict[str, Tensor]] = {}
    for asked in ASKED:
        kept = {key: x[int(asked.skip_first) :] for key, x in whole.items()}
        if asked.statistic == "cosine":
            value = torch.stack([kept["num_layers", n].mean() for n in range(4)])
            found[asked] = {"num_layers": value[None]}
            continue
        of = functools.partial(statistic, asked.statistic)
        found[asked] = {
            "ffn_hidden_size": torch.stack(
                [of(kept["ffn_hidden_size", n][..., None]) for n in range(4)]
            ),
            "num_query_groups": torch.stack(
                [of(kept["num_query_groups", n].unflatten(-1, (4, 8))) for n in range(4)]
            ),
            "hidden_size": torch.cat([of(kept["hidden_size", n][..., None]) for n in range(9)]),
        }
    return flat(found)


def statistic(name: str, x: Tensor) -> Tensor:
    """[s, samples, units, lines] to [lines or 1, units], by the definition."""
    if name == "mean":
        return x.mean((0, 1)).T
    if name == "mean_square":
        return (x**2).mean((0, 1)).T
    if name == "sequence_mean":
        return (x.abs().mean(0) ** 2).sum(-1).mean(0)[None]
    assert name == "sequence_norm"
    return (x**2).sum((0, -1)).sqrt().mean(0)[None]


def assert_tables_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float
) -> None:
    """Relative to the largest number of each table."""
    assert actual.keys() == expected.keys()
    for name, table in expected.items():
        scale = np.abs(table).max()
        assert scale > 0
        assert_close(
            torch.tensor(actual[name] / scale), torch.tensor(table / scale), name, tolerance
        )


@pytest.fixture(scope="module")
def expected(workers: Workers) -> dict[str, np.ndarray]:
    (found,) = run_job(workers, by_hand, 1, CONFIG)
    return found


@pytest.mark.parametrize("micro_batch_size", [2, 12])
def test_one_process_sees_what_the_definitions_say(
    workers: Workers, expected: dict[str, np.ndarray], micro_batch_size: int
) -> None:
    config = replace(CONFIG, training={"micro_batch_size": micro_batch_size})
    (found,) = run_job(workers, tables, 1, config)
    assert_tables_close(found, expected, 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sees_what_one_process_sees(
    workers: Workers, expected: dict[str, np.ndarray], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    first, *others = run_job(workers, tables, world_size, replace(CONFIG, parallel=parallel))
    for other in others:
        for name, table in first.items():
            np.testing.assert_array_equal(other[name], table)
    assert_tables_close(first, expected, 1e-5)


def again(forward: Any, reentrant: bool) -> Any:
    """A layer's pass that keeps its input alone, and is done again in backward."""
    from torch.utils.checkpoint import checkpoint

    def call(hidden_states: Tensor, **others: Any) -> Any:
        return checkpoint(lambda x: forward(x, **others), hidden_states, use_reentrant=reentrant)

    return call


@on_ranks(1)
def test_what_backward_computes_again_is_seen_once(groups: ProcessGroups, _config: Config) -> None:
    plain, _ = live_run(groups, CONFIG)
    expected = flat(seen_in(plain))
    for how in ("megatron", "reentrant", "not reentrant"):
        run, _ = live_run(groups, CONFIG)
        decoder = run.trainable.chunks[0].module.decoder
        passes = []
        decoder.layers[0].input_layernorm.register_forward_hook(lambda *_, at=passes: at.append(1))
        if how == "megatron":
            decoder.config.recompute_granularity = "full"
            decoder.config.recompute_method = "uniform"
            decoder.config.recompute_num_layers = 1
        else:
            for layer in decoder.layers:
                layer.forward = again(layer.forward, reentrant=how == "reentrant")
        found = flat(seen_in(run))
        assert len(passes) == 2 * 2, f"{how}: two micro-batches, each twice"
        for name, table in expected.items():
            np.testing.assert_array_equal(found[name], table)


class FusedNorm(torch.nn.Module):
    """Stands for Transformer Engine's linear layer with a norm of its own."""

    def __init__(self, norm: Any, linear: Any) -> None:
        super().__init__()
        self.layer_norm_weight, self.eps = norm.weight, norm.eps
        self.weight, self._linear = linear.weight, [linear]

    def forward(self, x: Tensor) -> Any:
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return self._linear[0](normed)


@on_ranks(1)
def test_norms_inside_of_linear_layers_are_seen_with_the_gains_of_their_pass(
    groups: ProcessGroups, _config: Config
) -> None:
    plain, _ = live_run(groups, CONFIG)
    fused, _ = live_run(groups, CONFIG)

    def gather(linear: Any, _inputs: Any) -> None:  # as overlap_param_gather: right before a pass
        with torch.no_grad():
            linear.layer_norm_weight.fill_(0.5)

    for run in (plain, fused):
        for layer in run.trainable.chunks[0].module.decoder.layers:
            for owner, norm, linear in (
                (layer.self_attention, "input_layernorm", "linear_qkv"),
                (layer.mlp, "pre_mlp_layernorm", "linear_fc1"),
            ):
                ours = getattr(layer, norm)
                if run is plain:
                    ours.weight.data.fill_(0.5)
                    continue
                behind = FusedNorm(ours, getattr(owner, linear))
                behind.register_forward_pre_hook(gather)
                setattr(owner, linear, behind)
                setattr(layer, norm, torch.nn.Identity())
    expected, found = flat(seen_in(plain)), flat(seen_in(fused))
    assert_tables_close(found, expected, 1e-6)


@on_ranks(1)
def test_equal_steps_average_to_one_of_them_from_the_first_plan_on(
    groups: ProcessGroups, _config: Config
) -> None:
    run, _ = live_run(groups, replace(CONFIG, prune={"ema": 0.7}))
    found = []
    for _ in range(3):
        _observe(run, 0)
        run.pruner.scores.fold(run.trainable, run.pruner.stored)
        found.append(flat(run.pruner.scores.now(run.trainable, run.pruner.stored)))
    expected = seen_in(live_run(groups, CONFIG)[0])
    for each in found:
        assert_tables_close(each, {n: t for n, t in flat(expected).items() if n in each}, 2e-6)


def hooks_of(run: Any) -> int:
    modules = [module for chunk in run.trainable.chunks for module in chunk.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@on_ranks(2, tensor_model_parallel_size=2)
def test_watching_leaves_no_trace(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.train import step

    config = replace(CONFIG, parallel=vars(config.parallel))
    weights = {}
    for strategy in ("minitron", "random"):
        run, state = live_run(groups, replace(config, prune={"strategy": strategy}))
        state.consumed_tokens = config.batch_tokens * 20834  # in the warm-up of the prune phase
        before = hooks_of(run)
        with run.pruner.watched(run.trainable, state.consumed_tokens) as seen:
            watching = hooks_of(run)
        assert (watching > before, bool(seen)) == ((strategy == "minitron"),) * 2
        for _ in range(3):
            step(run, state)
        assert hooks_of(run) == before and bool(run.pruner.alive["ffn_hidden_size"].all())
        assert run.pruner.pending_steps == 0 and (strategy == "random" or averages(run))
        weights[strategy] = [p.detach().clone() for p in run.trainable.parameters]
    for watched, plain in zip(*weights.values(), strict=True):
        assert_equal(watched, plain)


def averages(run: Any) -> bool:
    return all(bool(t.any()) for of in run.pruner.scores.average.values() for t in of.values())


def _halfway(groups: ProcessGroups, config: Config) -> tuple[dict[str, Tensor], ...]:
    """What is saved with two steps pending, and what comes of it after one more step."""
    run, _ = live_run(groups, config)
    for seed in range(3):
        _observe(run, seed)
        if seed == 0:
            run.pruner.scores.fold(run.trainable, run.pruner.stored)
    saved = {name: tensor.clone() for name, tensor in run.pruner.state(run.trainable).items()}
    return saved, _go_on(run)


def _observe(run: Any, seed: int) -> None:
    from megatron_idea.prune.activations import watched

    scores = run.pruner.scores
    with watched(run.trainable, scores.activations) as seen:
        backward(run.trainable, seed)
    scores.record(scores.observe(run.trainable, seen))


def _go_on(run: Any) -> dict[str, Tensor]:
    """After the fold, and after one more step and another."""
    found = {}
    for when in ("folded", "a step later"):
        run.pruner.scores.fold(run.trainable, run.pruner.stored)
        for asked, of in run.pruner.scores.now(run.trainable, run.pruner.stored).items():
            if isinstance(asked, Activation):
                found |= {f"{when} {asked} {axis}": table.clone() for axis, table in of.items()}
        _observe(run, 3)
    return found


def _resumed(groups: ProcessGroups, config: Config, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    run, _ = live_run(groups, config)
    blank = run.pruner.blank_state(due=False)
    assert {n: (t.shape, t.dtype) for n, t in blank.items()} == {
        n: (t.shape, t.dtype) for n, t in saved.items()
    }
    run.pruner.load_state(run.trainable, saved, pending_steps=2, memory=[])
    return _go_on(run)


@pytest.mark.parametrize("strategy", ["minitron", "shortgpt"])
def test_what_was_seen_is_saved_and_goes_on_in_any_layout(workers: Workers, strategy: str) -> None:
    target = {axis: CONFIG.prune.target.counts[axis] for axis in AXES_OF[strategy]}
    base = replace(
        CONFIG, prune={"strategy": strategy, "ema": 0.3, "target": PruneTarget(**target)}
    )
    of = {name: replace(base, parallel=parallel) for name, (_, parallel) in LAYOUTS.items()}
    for begun in ("tp2-no-sp", "dp2"):
        (saved, went_on), *_ = run_job(workers, _halfway, 2, of[begun])
        assert any(name.endswith("of_zeros") for name in saved)
        for later in {begun, "pp2"}:
            for found in run_job(workers, _resumed, 2, of[later], saved):
                assert found.keys() == went_on.keys()
                for name, value in went_on.items():
                    if later == begun or name.startswith("folded"):
                        assert_equal(found[name], value, f"{name}, {begun} to {later}")


AXES_OF = {
    "minitron": (*UNITS, "num_layers"),
    "flap_score": UNITS[:2],
    "shortgpt": ("num_layers",),
}
