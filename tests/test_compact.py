"""A live compaction: what it carries bit for bit, what it leaves behind, what it refuses."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import cut_neurons, live_run, mask_of, neuron_ids, neuron_plan, neuron_rows, on_ranks

from megatron_idea.config import Config, replace, validate
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups
    from megatron_idea.train import Run


@dataclass(frozen=True)
class Case:
    """A layout and which neurons survive in it."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    placement: str = "min"
    survivors: str = "spread"
    """``spread`` at random, or ``low``: the lowest ids, which lie on the first TP rank."""
    model: dict[str, Any] = field(default_factory=dict)


TP2 = {"tensor_model_parallel_size": 2}
REPLICATED = {"use_distributed_optimizer": False}
CASES = {
    "one": Case(),
    "one_replicated_bf16": Case(1, REPLICATED, "bf16"),
    "tp2": Case(2, TP2),
    "tp2_ordered_bf16": Case(2, TP2, "bf16", placement="ordered"),
    "tp2_all_on_one_rank": Case(2, TP2, survivors="low"),
    "tp2_all_on_one_rank_ordered": Case(2, TP2, placement="ordered", survivors="low"),
    "pp2": Case(2, {"pipeline_model_parallel_size": 2}),
    "dp2": Case(2),
    "dp2_bf16": Case(2, precision="bf16"),
    "dp2_replicated": Case(2, REPLICATED),
    "dp2_replicated_bf16": Case(2, REPLICATED, "bf16"),
    # Buckets of one layer: shards of a parameter are cut elsewhere, gathering is under way.
    "dp2_overlapped_bf16": Case(
        2,
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000},
        "bf16",
    ),
    # Shards that are no multiple of anything.
    "dp3": Case(3),
    # Owners over DP and exchange over TP must pair up.
    "tp2_dp2_bf16": Case(4, TP2, "bf16"),
    "tp4_all_on_one_rank": Case(
        4, {"tensor_model_parallel_size": 4}, survivors="low", model={"num_query_groups": 4}
    ),
    # The embedding is on both stages, in a bucket of its own.
    "pp2_dp2_tied": Case(
        4,
        {"pipeline_model_parallel_size": 2},
        model={"share_embeddings_and_output_weights": True},
    ),
    "tp2_pp2_dp2_overlapped": Case(
        8,
        {
            **TP2,
            "pipeline_model_parallel_size": 2,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        "bf16",
    ),
}


def case_config(tiny: Config, case: Case) -> Config:
    dp = case.world_size // np.prod(
        [v for k, v in case.parallel.items() if k.endswith("model_parallel_size")], dtype=int
    )
    config = replace(
        tiny,
        model=case.model,
        training={
            "precision": case.precision,
            "micro_batch_size": 1,
            "global_batch_size": 2 * int(dp),
        },
        parallel=case.parallel,
        # Widths like 24 and 40 are legal for TP = 4 as well.
        prune={"placement": case.placement, "alignment": 2},
        schedule={"total_tokens": 24 * 64 * int(dp)},
    )
    validate(config, case.world_size)
    return config


def shrink(alive: torch.Tensor, live: tuple[int, ...], survivors: str) -> torch.Tensor:
    """[L, F]: keep ``live[l]`` of layer ``l``'s live neurons."""
    rank = torch.arange(alive.shape[1]).expand(alive.shape).double()
    if survivors == "spread":
        rank = torch.rand(alive.shape, generator=torch.Generator().manual_seed(sum(live))).double()
    order = rank.masked_fill(~alive, float("inf")).argsort(dim=1)
    kept = torch.zeros_like(alive)
    for layer, count in enumerate(live):
        kept[layer, order[layer, :count]] = True
    return kept & alive


def snapshot(run: Run) -> dict[str, Any]:
    """All that a compaction carries on this rank, as plain data.

    ``ffn``: per layer the neuron ids and masks, and of both tensors the weights [f, rows, H] and,
    on the rank that owns it over DP, [f, 3, rows, H] of main weight, exp_avg, exp_avg_sq.
    ``rest``: the same of other parameters.
    """
    from megatron.core import tensor_parallel

    from megatron_idea.engine.model import named_parameters

    trainable, groups = run.trainable, run.trainable.groups
    shards = trainable.exchange()
    rest: dict[str, Any] = {}
    ids = neuron_ids(trainable, run.pruner)
    ffn: dict[int, Any] = {
        layer: {"ids": ids[layer].tolist(), "mask": mask_of(mlp).tolist()}
        for layer, mlp in trainable.mlps
    }
    for chunk in trainable.chunks:  # overlapped gathering waits for the next forward
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    for name, parameter in named_parameters(trainable.chunks):
        state, weight = shards.gather(parameter), parameter.detach().float()
        if ".mlp." not in name or "layernorm" in name:
            rest[name] = (weight.clone().numpy(), _numpy(state))
            continue
        layer, tensor = int(name.split(".")[2]), name.split(".")[-2]
        if state is not None:
            state = neuron_rows(tensor, state.view(3, *parameter.shape))
        ffn[layer][tensor] = (neuron_rows(tensor, weight).numpy(), _numpy(state))
    steps = [s["step"] for s in trainable.optimizer.optimizer.state.values()]
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "place": (groups.pp.rank(), groups.tp.rank(), groups.dp.rank()),
        "ffn": ffn,
        "rest": rest,
        "steps": [float(step) for step in steps],
        "step_objects": len({step.data_ptr() for step in steps}),
        "rng": {name: s.numpy().copy() for name, s in tracker.items()}
        | {"default": torch.get_rng_state().numpy().copy()},
        "pruner": {k: v.numpy().copy() for k, v in run.pruner.state(trainable).items()},
        # What ``update`` does not set in every step.
        "groups": [
            {k: v for k, v in group.items() if k not in ("params", "lr", "weight_decay")}
            for group in trainable.optimizer.param_groups
        ],
    }


def _numpy(x: torch.Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().clone().numpy()


def live_job(rendezvous: str, config: Config, survivors: str) -> list[dict[str, Any]]:
    """Train, compact, train, compact, train; what there was around each compaction."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        for _ in range(2):
            step(run, state)
        out = []
        first = ((45, 34), (48, 40)) if survivors == "spread" else ((30, 20), (32, 24))
        for live, widths in (first, ((24, 13), (24, 16))):
            alive = shrink(run.pruner.alive["ffn_hidden_size"], live, survivors)
            for averages in run.pruner.scores.average.values():
                averages["ffn_hidden_size"] += torch.arange(1, 65) / 7
            before = snapshot(run)
            report = cut_neurons(run.trainable, run.pruner, alive, widths)
            after = snapshot(run)
            record, _ = step(run, state)
            out.append(
                {
                    "before": before, "after": after, "report": vars(report), "widths": widths,
                    "loss": record.loss, "alive": alive.numpy(),
                }
            )  # fmt: skip
        run.log.close()
        return out
    finally:
        stop_distributed()


Key = tuple[int, int, str]


@dataclass
class Whole:
    """Snapshots of all ranks put together; replicas have been compared."""

    neurons: dict[Key, np.ndarray]
    """(layer, neuron id, tensor) -> [3, rows, H] fp32: main weight and moments."""
    weights: dict[Key, np.ndarray]
    """(layer, neuron id, tensor) -> [rows, H]: what the model computes with."""
    alive: dict[tuple[int, int], bool]
    order: dict[int, list[int]]
    """Per layer the ids in the order of TP ranks."""
    rest: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]]


def put_together(ranks: list[dict[str, Any]]) -> Whole:
    whole = Whole({}, {}, {}, {}, {})
    home: dict[tuple[int, int], int] = {}
    for rank in ranks:
        pp, tp, dp = rank["place"]
        for layer, ffn in rank["ffn"].items():
            assert len(set(ffn["ids"])) == len(ffn["ids"])
            if dp == 0:
                whole.order.setdefault(layer, []).extend(ffn["ids"])
            for i, neuron in enumerate(ffn["ids"]):
                key = (layer, neuron)
                assert home.setdefault(key, tp) == tp, f"{key} is on two ranks"
                assert whole.alive.setdefault(key, ffn["mask"][i]) == ffn["mask"][i]
                for tensor in ("linear_fc1", "linear_fc2"):
                    weight, state = ffn[tensor]
                    _known(whole.weights, (*key, tensor), weight[i])
                    if state is not None:
                        _known(whole.neurons, (*key, tensor), state[i])
        for name, (weight, state) in rank["rest"].items():
            if state is not None:
                known = whole.rest.setdefault((name, pp, tp), (weight, state))
                for a, b in zip(known, (weight, state), strict=True):
                    assert_bits(a, b, name)
    assert whole.neurons.keys() == whole.weights.keys()
    return whole


def _known(table: dict[Key, np.ndarray], key: Key, value: np.ndarray) -> None:
    assert_bits(table.setdefault(key, value), value, f"replicas of neuron {key}")


def assert_bits(a: np.ndarray, b: np.ndarray, what: str) -> None:
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, what
    assert a.tobytes() == b.tobytes(), f"{what} changed"


@pytest.fixture(params=CASES)
def compactions(
    request: pytest.FixtureRequest, tiny: Config, workers: Workers
) -> tuple[Case, list[list[dict[str, Any]]]]:
    """Two compactions of a case, each as its records by rank."""
    case = CASES[request.param]
    by_rank = workers.run(live_job, case.world_size, case_config(tiny, case), case.survivors)
    return case, [list(ranks) for ranks in zip(*by_rank, strict=True)]


def test_a_live_compaction_carries_every_survivor_and_nothing_else_changes(
    compactions: tuple[Case, list[list[dict[str, Any]]]],
) -> None:
    case, both = compactions
    for ranks in both:
        before = put_together([r["before"] for r in ranks])
        after = put_together([r["after"] for r in ranks])
        check_neurons(case, ranks[0], before, after)
        # All other parameters, wherever they are kept: weight, main weight, moments.
        assert before.rest.keys() == after.rest.keys()
        for name, pair in before.rest.items():
            for was, now in zip(pair, after.rest[name], strict=True):
                assert_bits(was, now, str(name))
        for rank in ranks:
            check_rank(rank["before"], rank["after"], rank["alive"])
            assert rank["loss"] == ranks[0]["loss"] and np.isfinite(rank["loss"])
            report = rank["report"]
            assert report["after"] == {"ffn_hidden_size": list(rank["widths"])}
            # Gate, up and down rows of 32 in three states of fp32.
            assert report["moved_bytes"] == report["moved_units"] * 3 * 3 * 32 * 4
            assert (report["moved_units"] > 0) == ("tensor_model_parallel_size" in case.parallel)


def check_neurons(case: Case, record: dict[str, Any], before: Whole, after: Whole) -> None:
    alive = {(int(layer), int(i)) for layer, i in np.argwhere(record["alive"])}
    assert alive <= after.alive.keys() <= before.alive.keys()
    assert after.neurons.keys() <= before.neurons.keys()
    assert len(after.neurons) == 2 * len(after.alive)
    for layer, width in enumerate(record["widths"]):
        assert len(after.order[layer]) == width
        # Room beyond the live ones is filled with removed neurons, lowest ids first.
        spare = sorted({i for i in before.order[layer] if (layer, i) not in alive})
        stored = sorted(i for i in after.order[layer] if (layer, i) not in alive)
        assert stored == spare[: len(stored)]
        if case.placement == "ordered":
            assert after.order[layer] == sorted(after.order[layer])
    for key in after.neurons:
        lives = key[:2] in alive
        for was, now in ((before.neurons, after.neurons), (before.weights, after.weights)):
            expected = was[key] if lives else np.zeros_like(was[key])
            assert_bits(expected, now[key], f"neuron {key}")
        assert after.alive[key[:2]] == lives
        # The model computes with the main weight, rounded.
        main = torch.tensor(after.neurons[key][0])
        rounded = main.bfloat16().float() if case.precision == "bf16" else main
        assert_bits(rounded.numpy(), after.weights[key], f"model weight of neuron {key}")
    living = [state for key, state in after.neurons.items() if key[:2] in alive]
    moments = np.concatenate([state[1:].ravel() for state in living])
    assert (moments != 0).mean() > 0.9, "there was little to carry"


def check_rank(before: dict[str, Any], after: dict[str, Any], alive: np.ndarray) -> None:
    """What this rank alone has: step counts, random-number streams, scores."""
    assert set(before["steps"] + after["steps"]) in ({2.0}, {3.0}), "Adam's step count changed"
    assert after["step_objects"] == len(after["steps"]), "parameters share a step tensor"
    assert before["groups"] == after["groups"]
    assert before["rng"].keys() == after["rng"].keys() and len(after["rng"]) > 1
    for name, was in before["rng"].items():
        np.testing.assert_array_equal(was, after["rng"][name], err_msg=name)
    scores = {name for name in after["pruner"] if name.startswith("scores.average.")}
    assert scores, "there were no scores to carry"
    for name in scores:
        assert (after["pruner"][name] > 0).any()
        assert_bits(before["pruner"][name], after["pruner"][name], name)
    np.testing.assert_array_equal(after["pruner"]["alive.ffn_hidden_size"], alive)


# ----------------------------------------------------------------------------------- memory


def leak_job(rendezvous: str, config: Config) -> list[tuple[int, int, int]]:
    """Before the first and after each of 20 compactions: width, DDP objects, bytes of tensors."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, step

    def alive_now() -> tuple[int, int]:
        gc.collect()
        things = gc.get_objects()
        wrapped = sum(type(thing) is DistributedDataParallel for thing in things)
        tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return wrapped, sum(storages.values())

    # Modules and what earlier jobs of this process left are no longer looked at from here on.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    gc.freeze()
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        out = []
        for width in range(64, 3, -3):
            if width < 64:
                alive = shrink(run.pruner.alive["ffn_hidden_size"], (width, width), "spread")
                cut_neurons(run.trainable, run.pruner, alive, (width, width))
            step(run, state)
            out.append((width, *alive_now()))
        run.log.close()
        return out
    finally:
        stop_distributed()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}),
    ],
    ids=["one", "dp2_overlapped"],
)
def test_compactions_leave_nothing_behind(
    world_size: int, parallel: dict[str, Any], tiny_halved: Config, workers: Workers
) -> None:
    # Nothing of the pruner's own: all 21 steps are in the enlarged phase.
    config = replace(
        tiny_halved,
        parallel=parallel,
        schedule={
            "total_tokens": 48 * 128,
            "enlarged_fraction": 0.5,
            "prune_fraction": 0.25,
            "recover_fraction": 0.25,
        },
    )
    for sizes in workers.run(leak_job, world_size, config):
        assert [objects for _, objects, _ in sizes] == [1] * 21
        for (was, _, before), (width, _, after) in itertools.pairwise(sizes):
            # Weight and gradient of gate, up and down rows of 32 in 2 layers; on one rank of DP the
            # moments too, on two half of them. Half of that allows for what else is in use.
            assert before - after >= (was - width) * 2 * 3 * 32 * 4, sizes


# -------------------------------------------------------------------------------- bad plans


def refused_job(rendezvous: str, config: Config) -> dict[str, Any]:
    """The same steps without and with plans in between that must be refused."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        out: dict[str, Any] = {"records": []}
        for attempt in (False, True):
            run, state = build(config, groups)
            records = [step(run, state)[0] for _ in range(2)]
            if attempt:
                out["messages"], out["changed"] = _attempts(run)
            records += [step(run, state)[0] for _ in range(2)]
            out["records"].append([(r.loss, r.grad_norm) for r in records])
            run.log.close()
        return out
    finally:
        stop_distributed()


def _attempts(run: Run) -> tuple[list[str], list[str]]:
    """Error messages of three plans, and what they changed."""
    trainable, pruner = run.trainable, run.pruner
    full = pruner.alive["ffn_hidden_size"]
    low, spread = (shrink(full, (24, 24), survivors) for survivors in ("low", "spread"))
    mine = low if run.groups.world.rank() == 0 else spread
    before = snapshot(run)
    messages, changed = [], []
    for action in (
        lambda: pruner.silence(trainable, neuron_plan(trainable, pruner, mine, (24, 24))),
        lambda: pruner.silence(trainable, neuron_plan(trainable, pruner, mine, (64, 64))),
        lambda: pruner.compact(trainable, neuron_plan(trainable, pruner, low, (16, 16))),
    ):
        try:
            action()
        except (RuntimeError, AssertionError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        changed += _differences(before, snapshot(run))
    return messages, changed


def _differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Names of what is not bit-equal in two nested snapshots."""
    if isinstance(before, dict):
        same_keys = [] if before.keys() == after.keys() else [where]
        parts = (_differences(v, after[k], f"{where}.{k}") for k, v in before.items() if k in after)
        return same_keys + list(itertools.chain(*parts))
    if isinstance(before, (tuple, list)):
        if len(before) != len(after):
            return [where]
        parts = (
            _differences(a, b, f"{where}.{i}")
            for i, (a, b) in enumerate(zip(before, after, strict=True))
        )
        return list(itertools.chain(*parts))
    if isinstance(before, np.ndarray):
        return [] if before.tobytes() == after.tobytes() else [where]
    return [] if before == after else [where]


@pytest.mark.parametrize("parallel", [TP2, {}], ids=["tp2", "dp2"])
def test_a_plan_that_differs_between_ranks_is_refused_before_anything_changes(
    parallel: dict[str, Any], tiny_halved: Config, workers: Workers
) -> None:
    for rank in workers.run(refused_job, 2, replace(tiny_halved, parallel=parallel)):
        assert rank["changed"] == []
        assert len(rank["messages"]) == 3
        for message in rank["messages"][:2]:
            assert message.startswith("RuntimeError: the pruning plan differs between ranks")
        assert "16 units cannot hold 24 live ones" in rank["messages"][2]
        without, with_refusals = rank["records"]
        assert without == with_refusals


@on_ranks(1)
def test_releasing_a_model_empties_transformer_engines_stand_ins_for_gradients(
    groups: ProcessGroups, config: Config
) -> None:
    import sys
    from types import SimpleNamespace

    from megatron_idea.engine.trainable import assemble

    kept = {(48, 16): torch.empty(48, 16)}
    name = "transformer_engine.pytorch.module.base"
    assert name not in sys.modules
    sys.modules[name] = SimpleNamespace(_dummy_wgrads=kept)  # type: ignore[assignment]
    try:
        assemble(config.sections, groups, Shape.full(config.model), initialize=True).release()
    finally:
        del sys.modules[name]
    assert not kept


@on_ranks(1)
def test_a_due_plan_that_needs_no_compaction_any_more_is_not_due_twice(
    groups: ProcessGroups, config: Config
) -> None:
    """More tensor-parallel ranks than the job that saved it had may round widths up."""
    from megatron_idea.train import apply, step

    run, state = live_run(groups, config)
    step(run, state)
    alive = run.pruner.alive["ffn_hidden_size"].clone()
    alive[:, 20:] = False
    run.pruner.decide(neuron_plan(run.trainable, run.pruner, alive, (20, 20)))
    run.pruner.goals = {
        axis: dataclasses.replace(goal, multiple=12) for axis, goal in config.goals.items()
    }
    plan = run.pruner.due_plan(run.trainable, state.consumed_tokens)
    assert plan.shape == run.trainable.shape
    apply(run, state, plan)
    assert run.pruner.due_plan(run.trainable, state.consumed_tokens) is None
    assert run.pruner.alive["ffn_hidden_size"].sum(1).tolist() == [20, 20]
    assert run.trainable.shape.counts("ffn_hidden_size") == (24, 24)


@on_ranks(1)
def test_a_compaction_compares_what_megatron_core_writes_on_parameters_and_nothing_else(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.compact import PARAMETER_ATTRIBUTES
    from megatron_idea.prune.pruner import Pruner

    state_of_a_step = {"grad_added_to_main_grad", "zero_out_wgrad", "main_param_sharded"}
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    update(trainable.optimizer, lr=0.0)
    for parameter in trainable.parameters:
        written = {k for k, v in vars(parameter).items() if isinstance(v, (bool, int, str))}
        assert written - state_of_a_step <= set(PARAMETER_ATTRIBUTES)
        parameter._do_not_clear = True  # type: ignore[attr-defined]  # Transformer Engine's
    pruner = Pruner(config, trainable)
    alive = torch.ones(2, 24, dtype=torch.bool)
    alive[:, 16:] = False
    cut_neurons(trainable, pruner, alive, (16, 16))
    assert trainable.shape.counts("ffn_hidden_size") == (16, 16)

    norm = trainable.chunks[0].module.decoder.final_layernorm.weight
    norm.sequence_parallel = not norm.sequence_parallel
    alive[:, 8:] = False
    with pytest.raises(AssertionError, match=r"final_layernorm\.weight lost an attribute"):
        cut_neurons(trainable, pruner, alive, (8, 8))
