"""EfficientLLM: who goes when, against the path that its paper shows, and units' saliencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import backward, live_run, run_job, small, whole
from test_all_axes import MODEL, pruned, whole_run
from torch import Tensor

from megatron_idea import config as configuration
from megatron_idea.config import Config, replace
from megatron_idea.course import removed_by_axis
from megatron_idea.prune.efficient_llm import EfficientLLM
from megatron_idea.prune.strategy import select
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_close

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "vpp2": (
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "dp2": (2, {}),
}  # fmt: skip

NEURONS, GROUPS, CHANNELS = "ffn_hidden_size", "num_query_groups", "hidden_size"
AXES = (NEURONS, GROUPS, CHANNELS)


def method(config: Config) -> EfficientLLM:
    return EfficientLLM(config.prune, config.goals, config.model, config.parameter_goal)


def everyone(config: Config) -> dict[str, Tensor]:
    full = Shape.full(config.model)
    sizes = {axis: full.counts(axis) for axis in AXES}
    return {
        axis: torch.ones(*([len(n)] if axis != CHANNELS else []), n[0], dtype=torch.bool)
        for axis, n in sizes.items()
    }


def carried_out(
    strategy: EfficientLLM, importance: dict[str, Tensor], alive: dict[str, Tensor], removed: float
) -> dict[str, Tensor]:
    """Who is alive once so much of the removal is due."""
    shares = dict.fromkeys(strategy.axes, removed)
    due = strategy.is_due(alive, shares)
    counts, memory = strategy.budget(importance, alive, shares, torch.empty(0))
    assert len(memory) == 0
    after = {axis: select(importance[axis], alive[axis], counts[axis]) for axis in strategy.axes}
    assert due == any(not torch.equal(after[axis], alive[axis]) for axis in after)
    return {**alive, **after}


# The path of the paper's figure "auto-designed architecture", measured in its pixels to 4 neurons
# and 2 channels: tokens (B), hidden, heads, FFN, parameters (B).
PATH = (
    (0.5, 2048, 32, 8192, 1.711), (5, 2048, 28, 7973, 1.629), (10, 2048, 27, 7499, 1.546),
    (15, 2048, 26, 7040, 1.466), (20, 2048, 26, 6505, 1.387), (25, 2048, 26, 5974, 1.309),
    (30, 2048, 25, 5511, 1.228), (35, 2048, 24, 5044, 1.147), (40, 2048, 23, 4577, 1.065),
    (44, 2047, 22, 4216, 0.999), (50, 1990, 21, 3760, 0.894), (55, 1863, 20, 3516, 0.792),
    (60, 1701, 20, 3343, 0.702), (65, 1500, 20, 3211, 0.605), (70, 1328, 19, 3087, 0.516),
    (73.7, 1180, 19, 2992, 0.450),
)  # fmt: skip
HEADS_AT = (0.52, 1.13, 1.73, 2.48, 5.2, 14.2, 25.5, 31.9, 38.3, 43.2, 48.1, 54.7, 65.4)
BEGIN, UNIT = 0.524e9, 9 * 2**20
SLACK = 0.08  # B tokens: the figure ends at 73.79B, this pace at 73.87B


def published() -> Config:
    """Of SmolLM-1.7B's shape, in single units, 7,772 of which are bought in the window."""
    end = round(BEGIN + 7772 * UNIT)
    return configuration.from_dict(
        {
            "model": {
                "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 8192,
                "num_attention_heads": 32, "num_query_groups": 32, "kv_channels": 64,
                "vocab_size": 49152,
            },
            "training": {"seq_length": 2048, "global_batch_size": 512},
            "prune": {
                "strategy": "efficient_llm", "alignment": 1, "channel_alignment": 1,
                "target": {NEURONS: 8192 - 5202, GROUPS: 19, CHANNELS: 2048 - 869},
            },
            "schedule": {
                "total_tokens": 2 * end, "enlarged_fraction": 0.0, "prune_fraction": 0.5,
                "recover_fraction": 0.5, "prune_warmup_fraction": BEGIN / end,
            },
        }
    )  # fmt: skip


def order_of_the_figure() -> list[str]:
    """Axis by axis what goes next: by the tokens at which the figure has it go.

    Between rows neurons and channels go evenly, but for the 0.6B tokens after each head.
    """

    def moving(tokens: np.ndarray) -> np.ndarray:
        return tokens - sum(np.clip(tokens - at, 0, 0.6) for at in HEADS_AT)

    rows = [*PATH[:-1], (73.87, 2048 - 869, 19, 8192 - 5202, 0)]
    tokens, hidden, _, ffn, _ = map(np.array, zip(*rows, strict=True))
    events = [(at, GROUPS) for at in moving(np.array(HEADS_AT))]
    for axis, counts, number in ((NEURONS, ffn, 5202), (CHANNELS, hidden, 869)):
        gone = np.arange(1, number + 1)
        events += [(at, axis) for at in np.interp(gone, counts[0] - counts, moving(tokens))]
    return [axis for _, axis in sorted(events)]


def importance_for(order: list[str], alive: dict[str, Tensor]) -> dict[str, Tensor]:
    """Saliencies with which units go in this order; who goes differs from layer to layer."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for axis, mask in alive.items():
        turns = [turn for turn, name in enumerate(order) if name == axis]
        values = torch.tensor(turns + [len(order)] * (mask.shape[-1] - len(turns))).float()
        rows = mask.numel() // len(values)
        shuffled = [values[torch.randperm(len(values), generator=generator)] for _ in range(rows)]
        found[axis] = torch.stack(shuffled).view(mask.shape)
    return found


def test_the_published_path_is_retraced() -> None:
    config = published()
    assert config.removal == "linear"
    strategy, alive = method(config), everyone(config)
    importance = importance_for(order_of_the_figure(), alive)

    def at(tokens: float) -> dict[str, float]:
        return removed_by_axis(config, round(tokens))

    def count(axis: str) -> int:
        (number,) = {int(n) for n in alive[axis].view(-1, alive[axis].shape[-1]).sum(1)}
        return number

    for tokens, hidden, heads, ffn, parameters in PATH:
        passed = []
        for now in (tokens - SLACK, tokens, tokens + SLACK):
            alive = carried_out(strategy, importance, alive, at(now * 1e9)[NEURONS])
            shape = Shape.full(config.model)
            for axis in AXES:
                shape = shape.with_counts(axis, count(axis))
            total = shape.parameters(config.model).total / 1e9
            passed.append((count(NEURONS), count(CHANNELS), count(GROUPS), total))
        assert passed[1][2] == heads, tokens
        for before, read, after, error in zip(
            passed[0], (ffn, hidden, heads, parameters), passed[2], (4, 2, 0, 1e-3), strict=True
        ):
            assert before + error >= read >= after - error, (tokens, before, read, after)
    assert 73.8e9 < BEGIN + 7772 * UNIT < 73.9e9
    for paid, units in ((7769.5, 2), (7770.5, 0)):  # the last of all is a channel
        alive = carried_out(strategy, importance, alive, at(BEGIN + paid * UNIT)[NEURONS])
        left = count(NEURONS) - 2990 + 2 * (count(CHANNELS) - 1179) + 64 * (count(GROUPS) - 19)
        assert left == units


def test_nothing_goes_before_the_window_and_a_head_is_paid_for_64_units() -> None:
    config = published()
    strategy, alive = method(config), everyone(config)
    importance = importance_for([GROUPS, *[NEURONS] * 100], alive)
    before = carried_out(strategy, importance, alive, 0.0)
    assert all(torch.equal(before[axis], alive[axis]) for axis in AXES)
    for units, neurons in ((0.5, 0), (63.5, 0), (64.5, 1), (65.5, 2), (70.5, 7)):
        alive = carried_out(strategy, importance, alive, units / 7772)
        assert alive[GROUPS].sum(1).eq(31).all(), units
        assert alive[NEURONS].sum(1).eq(8192 - neurons).all(), units


def blocks(**prune: Any) -> Config:
    """2 layers of 64 channels, 12 groups, 48 neurons; in TP 2 of 4-neuron blocks, 8 channels."""
    return configuration.from_dict(
        {
            "model": {
                "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 48,
                "num_attention_heads": 24, "num_query_groups": 12, "kv_channels": 2,
                "vocab_size": 32,
            },
            "parallel": {"tensor_model_parallel_size": 2},
            "prune": {
                "strategy": "efficient_llm", "alignment": 2, "channel_alignment": 8,
                "target": {NEURONS: 16, GROUPS: 4, CHANNELS: 24}, **prune,
            },
        }
    )  # fmt: skip


def random_importance(alive: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.rand(mask.shape, generator=generator) for axis, mask in alive.items()}


def counts_of(alive: dict[str, Tensor]) -> dict[str, int]:
    return {axis: int(mask.view(-1, mask.shape[-1]).sum(1).max()) for axis, mask in alive.items()}


def test_prices_are_channels_of_a_matrix() -> None:
    config = blocks()
    strategy, alive = method(config), everyone(config)
    # 32 neurons, 8 groups of 2 heads of 2, 40 channels: 32 + 8 x 4 + 40 x 2 = 144.
    importance = importance_for([CHANNELS] * 8 + [GROUPS] * 2 + [NEURONS] * 4, alive)
    spent = {CHANNELS: 16, GROUPS: 8, NEURONS: 4}
    events, paid = [], 0
    for step in range(1, 29):
        before = counts_of(alive)
        alive = carried_out(strategy, importance, alive, (step - 0.5) / 144)
        changed = [axis for axis, n in counts_of(alive).items() if n != before[axis]]
        if changed:
            assert step == paid + 1, "an event begins when the last one is paid"
            events += changed
            paid += sum(spent[axis] for axis in changed)
    assert events == [CHANNELS, GROUPS, NEURONS]


def test_the_axis_goes_whose_block_has_the_lowest_mean_over_layers() -> None:
    config = blocks(target={NEURONS: 16, CHANNELS: 24})
    strategy, alive = method(config), everyone(config)
    importance = {NEURONS: torch.full((2, 48), 9.0), CHANNELS: torch.full((64,), 9.0)}
    importance[NEURONS][0, 3:7] = torch.tensor([1.0, 1.0, 1.0, 5.0])  # 2, and 4 in the other
    importance[NEURONS][1, 11:15] = 4.0
    importance[CHANNELS][::8] = torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0, 5.0, 7.0, 9.0])  # 3.125
    after = carried_out(strategy, importance, alive, 1e-9)
    assert (~after[NEURONS]).nonzero().tolist() == [
        [0, 3], [0, 4], [0, 5], [0, 6], [1, 11], [1, 12], [1, 13], [1, 14],
    ]  # fmt: skip
    importance[CHANNELS][56] = 6.0  # 2.75
    after = carried_out(strategy, importance, alive, 1e-9)
    assert (~after[CHANNELS]).nonzero().view(-1).tolist() == list(range(0, 64, 8))
    assert after[NEURONS].all()


@pytest.mark.parametrize("update", ["none", "obs"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_legal_at_every_moment_and_end_at_the_shape(seed: int, update: str) -> None:
    target = {GROUPS: 4, CHANNELS: 24}
    config = blocks(serve_tensor_model_parallel_size=2, target=target, update=update)
    strategy, alive = method(config), everyone(config)
    for step in range(41):
        alive = carried_out(strategy, random_importance(alive, seed + step), alive, step / 40)
        for axis, count in counts_of(alive).items():
            assert count % config.multiples[axis] == 0
        assert len(set(alive[GROUPS].sum(1).tolist())) == 1, "layers are alike"
    assert counts_of(alive) == {NEURONS: 48, GROUPS: 4, CHANNELS: 24}


@pytest.mark.parametrize("update", ["none", "obs"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("floors", [{}, {NEURONS: 32, CHANNELS: 32}])
def test_a_number_of_parameters_is_followed_and_met_within_a_block(
    seed: int, floors: dict[str, int], update: str
) -> None:
    full = Shape.full(blocks().model).parameters(blocks().model).total
    goal = full // 2 + 97 * seed
    target = {"parameters": goal, **floors}
    config = blocks(target=target, update=update, compaction_block=12)
    configuration.validate(config, 2)
    strategy, alive = method(config), everyone(config)
    kinds = [axis for axis in AXES if axis in config.goals]

    def parameters(counts: dict[str, int]) -> int:
        shape = Shape.full(config.model)
        for axis in AXES:
            shape = shape.with_counts(axis, counts[axis])
        return shape.parameters(config.model).total

    for step in range(41):
        importance = random_importance(alive, seed + step)
        alive = carried_out(strategy, importance, alive, step / 40)
        counts = counts_of(alive)
        assert parameters(counts) <= full - step / 40 * (full - goal)
        for axis in kinds:
            assert counts[axis] % config.final_multiples[axis] == 0
            assert counts[axis] >= config.goals[axis].least
    assert counts[GROUPS] == 12 or not floors, "axes that are not named stay"
    assert parameters(counts) <= goal
    passes = {
        axis: goal < parameters({**counts, axis: counts[axis] + config.final_multiples[axis]})
        for axis in kinds
    }
    at_floor = {axis for axis in kinds if counts[axis] == config.goals[axis].least}
    assert any(passes.values()) and all(passes[axis] or axis in at_floor for axis in kinds)


def test_with_the_update_an_event_is_a_compaction() -> None:
    config = blocks(target={NEURONS: 16}, update="obs", compaction_block=12)
    strategy, alive = method(config), everyone(config)
    seen = []
    for step in range(1, 33):
        alive = carried_out(strategy, random_importance(alive, step), alive, (step - 0.5) / 32)
        seen.append(counts_of(alive)[NEURONS])
    assert seen == [36] * 12 + [24] * 12 + [16] * 8, "blocks of 12, the last one smaller"


def test_layers_that_were_cut_to_other_widths_by_hand_wait_for_the_others() -> None:
    config = blocks(target={NEURONS: 16})
    strategy, alive = method(config), everyone(config)
    alive[NEURONS][1, 24:] = False
    alive = carried_out(strategy, random_importance(alive, 0), alive, 0.5)
    assert alive[NEURONS].sum(1).tolist() == [32, 24]
    alive = carried_out(strategy, random_importance(alive, 1), alive, 1.0)
    assert alive[NEURONS].sum(1).tolist() == [16, 16]


def in_the_engine(tied: bool = True, **prune: Any) -> Config:
    """4 layers of 24 neurons, 2 groups of 2 heads of 4; 16 channels; 20 steps, all of them window.

    The first 8 gather scores.
    """
    return small(
        model={"num_layers": 4, "share_embeddings_and_output_weights": tied},
        schedule={
            "total_tokens": 20 * 96, "enlarged_fraction": 0.0, "prune_fraction": 1.0,
            "recover_fraction": 0.0, "prune_warmup_fraction": 0.4, "lr": 3e-2,
        },
        prune={
            "strategy": "efficient_llm", "ema": 0.0, "channel_alignment": 2, "alignment": 2,
            "target": configuration.PruneTarget(
                ffn_hidden_size=12, num_query_groups=None, hidden_size=12
            ), **prune,
        },
    )  # fmt: skip


ALL_AXES = configuration.PruneTarget(parameters=4 * 1200)


def saliencies(groups: ProcessGroups, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Importance of all units, neuron 5 of layer 1, group 1 of layer 2, channel 3 being zeros.

    And, in one process, by hand in fp64.
    """
    from megatron_idea.prune.silence import silence
    from megatron_idea.prune.units import on_this_rank

    run, _ = live_run(groups, config)
    trainable, pruner = run.trainable, run.pruner
    gone = {axis: torch.zeros_like(alive) for axis, alive in pruner.alive.items()}
    gone[NEURONS][1, 5] = gone[GROUPS][2, 1] = gone[CHANNELS][3] = True
    silence(trainable, on_this_rank(gone, trainable, pruner.stored))
    backward(trainable)
    pruner.record(pruner.scores.observe(trainable))
    pruner.scores.fold(trainable, pruner.stored)
    found = pruner.strategy.importance(pruner.stats(trainable))
    by_hand = saliencies_by_hand(trainable) if groups.world.size() == 1 else {}
    as_arrays = [{axis: v.double().numpy() for axis, v in one.items()} for one in (found, by_hand)]
    return as_arrays[0], as_arrays[1]


def saliencies_by_hand(trainable: Any) -> dict[str, Tensor]:
    """|w g| of each weight, added up over whole units, by how many those are."""
    from megatron_idea.engine.model import named_parameters

    elements = {
        name: (whole(trainable, p, "main").double() * whole(trainable, p, "grad").double())
        .abs()
        .view(p.shape)
        for name, p in named_parameters(trainable.chunks)
        if p.dim() == 2
    }
    found: dict[str, list[Tensor]] = {NEURONS: [], GROUPS: []}
    channels = []
    for name, e in elements.items():
        reads = name.endswith(("fc1.weight", "qkv.weight", "embeddings.weight", "layer.weight"))
        channels.append(e.T if reads else e)
    for layer in range(trainable.shape.num_layers):
        fc1, fc2, qkv, proj = (
            elements[f"decoder.layers.{layer}.{name}.weight"]
            for name in (
                "mlp.linear_fc1", "mlp.linear_fc2",
                "self_attention.linear_qkv", "self_attention.linear_proj",
            )
        )  # fmt: skip
        neurons = torch.cat([*fc1.chunk(2), fc2.T], dim=1)
        found[NEURONS].append(neurons.mean(1))
        of_groups = [qkv.view(2, -1), proj.T.reshape(2, -1)]
        found[GROUPS].append(torch.cat(of_groups, dim=1).mean(1))
    return {
        **{axis: torch.stack(rows) for axis, rows in found.items()},
        CHANNELS: torch.cat(channels, dim=1).mean(1),
    }


@pytest.fixture(scope="module")
def saliencies_of_one_process(workers: Workers) -> dict[str, Any]:
    ((found, by_hand),) = run_job(workers, saliencies, 1, in_the_engine(target=ALL_AXES))
    assert_saliencies_close(found, by_hand, 1e-6)
    return dict(found)


def assert_saliencies_close(found: dict[str, Any], expected: dict[str, Any], within: float) -> None:
    assert found.keys() == expected.keys() == set(AXES)
    for axis, values in expected.items():
        scale = np.abs(values).max()
        assert_close(
            torch.from_numpy(found[axis] / scale), torch.from_numpy(values / scale), axis, within
        )


def test_saliency_is_the_mean_over_all_weights_of_a_unit(
    workers: Workers, saliencies_of_one_process: dict[str, Any]
) -> None:
    for axis, dead in ((NEURONS, (1, 5)), (GROUPS, (2, 1)), (CHANNELS, (3,))):
        values = saliencies_of_one_process[axis]
        assert values[dead] == 0 and (values == 0).sum() == 1, "what does nothing goes first"
    untied = in_the_engine(tied=False, target=ALL_AXES)
    ((found, by_hand),) = run_job(workers, saliencies, 1, untied)
    assert_saliencies_close(found, by_hand, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saliencies_do_not_depend_on_the_layout(
    workers: Workers, saliencies_of_one_process: dict[str, Any], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = replace(in_the_engine(target=ALL_AXES), parallel=parallel)
    for found, _ in run_job(workers, saliencies, world_size, config):
        assert_saliencies_close(found, saliencies_of_one_process, 1e-5)


def test_a_run_finds_a_shape_with_so_many_parameters(workers: Workers) -> None:
    world_size, parallel = LAYOUTS["dp2"]
    target = configuration.PruneTarget(parameters=12_000)
    config = pruned({NEURONS: 12}, model=MODEL, parallel=parallel)
    config = replace(config, prune={"strategy": "efficient_llm", "target": target})
    configuration.validate(config, world_size)
    found = run_job(workers, whole_run, world_size, config)
    assert all(rank["alive"] == found[0]["alive"] for rank in found)
    stored = found[0]["stored"]
    shape = Shape.full(config.model)
    for axis in AXES:
        assert len(set(stored[axis])) == 1
        assert stored[axis][0] % config.final_multiples[axis] == 0
        shape = shape.with_counts(axis, stored[axis][0])
    assert shape.parameters(config.model).total <= 12_000
    blocks_more = {
        axis: shape.with_counts(axis, stored[axis][0] + config.final_multiples[axis])
        for axis in AXES
        if stored[axis][0] > config.goals[axis].least
    }
    assert all(more.parameters(config.model).total > 12_000 for more in blocks_more.values())
    assert len(found[0]["compactions"]) >= 2
