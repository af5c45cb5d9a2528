"""Survivors move bit for bit: where they go, what travels, and what a live compaction leaves."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idea.config import Config, ParallelConfig, replace, validate
from megatron_idea.testing import Workers, assert_equal

if TYPE_CHECKING:
    from megatron_idea.prune.strategy import Plan
    from megatron_idea.train import Run

# ---------------------------------------------------------------------------------- relocate


@dataclass
class Ranks:
    """One layer's neurons on tensor-parallel ranks."""

    ids: list[torch.Tensor]
    keep: list[torch.Tensor]

    @property
    def survivors(self) -> list[int]:
        return sorted(int(i) for ids, k in zip(self.ids, self.keep, strict=True) for i in ids[k])

    @property
    def counts(self) -> list[int]:
        return [int(k.sum()) for k in self.keep]

    @property
    def share(self) -> int:
        return sum(self.counts) // len(self.keep)


@st.composite
def layers(draw: st.DrawFn, max_tp: int = 4, max_width: int = 8) -> Ranks:
    """Any ids in any order, any survivors whose number the ranks can share."""
    tp = draw(st.integers(1, max_tp))
    width = draw(st.integers(1, max_width))
    total = tp * draw(st.integers(1, width))
    original = draw(st.permutations(range(2 * tp * width)))[: tp * width]
    kept = set(draw(st.permutations(original))[:total])
    ids = torch.tensor(original).view(tp, width)
    keep = torch.tensor([[int(i) in kept for i in row] for row in ids])
    return Ranks(list(ids), list(keep))


def relocated_ids(layer: Ranks, placement: str) -> tuple[list[list[int]], int]:
    """Neuron ids per rank afterwards, and how many neurons changed their rank."""
    from megatron_idea.prune.compact import relocate

    relocation = relocate(layer.ids, layer.keep, placement)
    placed = [[int(layer.ids[r][i]) for r, i in s.tolist()] for s in relocation.sources]
    return placed, relocation.moved


@given(layer=layers(), placement=st.sampled_from(["min", "ordered"]))
@settings(deadline=None)
def test_every_survivor_is_placed_once_and_ranks_are_balanced(layer: Ranks, placement: str) -> None:
    placed, _ = relocated_ids(layer, placement)
    assert sorted(itertools.chain(*placed)) == layer.survivors
    assert {len(p) for p in placed} == {layer.share}


@given(layer=layers())
@settings(deadline=None)
def test_ordered_placement_is_the_order_of_one_rank(layer: Ranks) -> None:
    placed, _ = relocated_ids(layer, "ordered")
    assert list(itertools.chain(*placed)) == layer.survivors
    together = Ranks([torch.cat(layer.ids)], [torch.cat(layer.keep)])
    assert relocated_ids(together, "ordered")[0] == [layer.survivors]


@given(layer=layers())
@settings(deadline=None)
def test_min_placement_moves_the_surplus_and_nothing_else(layer: Ranks) -> None:
    """A rank with c survivors and room for t must send c - t away: no placement moves fewer."""
    placed, moved = relocated_ids(layer, "min")
    assert moved == sum(max(0, c - layer.share) for c in layer.counts)
    for ids, keep, now in zip(layer.ids, layer.keep, placed, strict=True):
        stayed = [i for i in now if i in ids.tolist()]
        assert stayed == ids[keep].tolist()[: layer.share], "survivors that stay keep their order"


@given(layer=layers(max_tp=3, max_width=3).filter(lambda x: sum(x.counts) <= 6))
@settings(deadline=None, max_examples=40)
def test_min_placement_is_minimal_by_exhaustive_search(layer: Ranks) -> None:
    home = {int(i): rank for rank, ids in enumerate(layer.ids) for i in ids}
    fewest = len(layer.survivors)
    for ranks in itertools.product(range(len(layer.ids)), repeat=len(layer.survivors)):
        if all(n == layer.share for n in Counter(ranks).values()):
            moves = sum(home[i] != r for i, r in zip(layer.survivors, ranks, strict=True))
            fewest = min(fewest, moves)
    assert relocated_ids(layer, "min")[1] == fewest


def test_survivors_that_cannot_be_shared_are_refused() -> None:
    from megatron_idea.prune.compact import relocate

    keep = [torch.tensor([True, True]), torch.tensor([True, False])]
    with pytest.raises(AssertionError, match="3 survivors cannot be split over 2 ranks"):
        relocate([torch.arange(2), torch.arange(2, 4)], keep, "min")


# --------------------------------------------------------------------------- pack and exchange


@given(f=st.integers(1, 5), h=st.integers(1, 5), lead=st.sampled_from([(), (1,), (3,), (2, 3)]))
@settings(deadline=None)
def test_unpack_is_the_inverse_of_pack(f: int, h: int, lead: tuple[int, ...]) -> None:
    from megatron_idea.prune.units import pack, unpack

    fc1, fc2 = torch.randn(*lead, 2 * f, h), torch.randn(*lead, h, f)
    neurons = pack(fc1, fc2)
    assert neurons.shape == (f, *lead, 3, h)
    for neuron in range(f):  # gate row, up row, down column
        assert_equal(neurons[neuron, ..., 0, :], fc1[..., neuron, :])
        assert_equal(neurons[neuron, ..., 1, :], fc1[..., f + neuron, :])
        assert_equal(neurons[neuron, ..., 2, :], fc2[..., :, neuron])
    for back, was in zip(unpack(neurons), (fc1, fc2), strict=True):
        assert back.is_contiguous()
        assert_equal(back, was)


def rows_of(ids: torch.Tensor) -> torch.Tensor:
    """[f, 3, 3, 4] fp32 whose bits follow from the neuron id: any pattern, not numbers only."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (64, 3, 3, 4), generator=generator)
    bits[:, 0, 0] = torch.tensor([0x7FC00001, -(2**31), 1, 0x7F800000])  # NaN, -0.0, 1.4e-45, inf
    return bits.to(torch.int32).view(torch.float32)[ids]


def exchange_job(
    rendezvous: str, tp: int, cases: list[tuple[Ranks, str]]
) -> list[tuple[list[int], np.ndarray]]:
    """The ids that this rank holds after each case, and its rows' bits."""
    from megatron_idea.distributed import start_distributed, stop_distributed
    from megatron_idea.prune.compact import exchange, relocate

    groups = start_distributed(ParallelConfig(tensor_model_parallel_size=tp), 1, rendezvous)
    try:
        out = []
        for layer, placement in cases:
            relocation = relocate(layer.ids, layer.keep, placement)
            rows = exchange(rows_of(layer.ids[groups.tp.rank()]), relocation, groups.tp)
            source = relocation.sources[groups.tp.rank()]
            ids = torch.stack(layer.ids)[source[:, 0], source[:, 1]]
            out.append((ids.tolist(), rows.view(torch.int32).numpy()))
        return out
    finally:
        stop_distributed()


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_rows_travel_bit_for_bit(tp: int, workers: Workers) -> None:
    generator = torch.Generator().manual_seed(tp)
    everyone = torch.randperm(64, generator=generator)[: 12 * tp].view(tp, 12)
    random = [torch.rand(12, generator=generator).argsort().argsort() for _ in range(tp)]
    first, last = torch.arange(tp) == 0, torch.arange(tp) == tp - 1
    kept = {
        "the same number everywhere": torch.stack([r < 5 for r in random]),
        "all on the first rank": first[:, None].expand(tp, 12),
        "all on the last rank": last[:, None].expand(tp, 12),
        "none on the first rank": ~first[:, None] & torch.stack([r < tp for r in random]),
        "nobody leaves": torch.ones(tp, 12, dtype=torch.bool),
        "one each": torch.stack([r < 1 for r in random]),
    }
    cases = [
        (Ranks(list(everyone), list(keep)), placement)
        for keep in kept.values()
        if keep.any()
        for placement in ("min", "ordered")
    ]
    by_rank = workers.run(exchange_job, tp, tp, cases)
    for number, (layer, _) in enumerate(cases):
        arrived = [ranks[number] for ranks in by_rank]
        assert sorted(i for ids, _ in arrived for i in ids) == layer.survivors
        for ids, bits in arrived:
            expected = rows_of(torch.tensor(ids)).view(torch.int32).numpy()
            np.testing.assert_array_equal(bits, expected)


# ---------------------------------------------------------------------------- live compaction


@dataclass(frozen=True)
class Case:
    """A layout and which neurons survive in it."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    placement: str = "min"
    survivors: str = "spread"
    """``spread`` at random, or ``low``: the lowest ids, which lie on the first TP rank."""


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
}


def case_config(tiny: Config, case: Case) -> Config:
    dp = case.world_size // np.prod(
        [v for k, v in case.parallel.items() if k.endswith("model_parallel_size")], dtype=int
    )
    config = replace(
        tiny,
        training={
            "precision": case.precision,
            "micro_batch_size": 1,
            "global_batch_size": 2 * int(dp),
        },
        parallel=case.parallel,
        prune={"placement": case.placement},
        schedule={"total_tokens": 24 * 64 * int(dp)},
    )
    validate(config, case.world_size)
    return config


def make_plan(alive: torch.Tensor, widths: tuple[int, ...]) -> Plan:
    import hashlib

    from megatron_idea.prune.strategy import Plan

    content = alive.numpy().tobytes() + repr(widths).encode()
    return Plan(alive, widths, hashlib.sha256(content).hexdigest())


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

    ``ffn``: per layer the neuron ids, masks, weights [f, 3, H] and, on the rank that owns them over
    DP, [f, 3, 3, H] of main weight, exp_avg, exp_avg_sq. ``rest``: the same of other parameters.
    """
    from megatron.core import tensor_parallel

    from megatron_idea.model import named_parameters
    from megatron_idea.optim import ShardExchange
    from megatron_idea.prune.units import pack

    trainable, groups = run.trainable, run.trainable.groups
    shards = ShardExchange(trainable)
    names = {id(p): name for name, p in named_parameters(trainable.chunks)}
    mlps = {id(mlp.linear_fc1.weight): (layer, mlp) for layer, mlp in trainable.mlps}
    ffn, rest = {}, {}
    for chunk in trainable.chunks:  # overlapped gathering waits for the next forward
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    for bundle in trainable.bundles:
        wholes = [shards.gather(parameter) for parameter in bundle]
        weights = [parameter.detach().float() for parameter in bundle]
        if len(bundle) == 1:
            rest[names[id(bundle[0])]] = (weights[0].clone().numpy(), _numpy(wholes[0]))
            continue
        layer, mlp = mlps[id(bundle[0])]
        state = None
        if wholes[0] is not None:
            state = pack(*(w.view(3, *p.shape) for w, p in zip(wholes, bundle, strict=True)))
        ffn[layer] = {
            "ids": mlp.neuron_ids.tolist(),
            "mask": mlp.mask.tolist(),
            "weights": pack(*weights).numpy(),
            "state": _numpy(state),
        }
    steps = [s["step"] for s in trainable.optimizer.optimizer.state.values()]
    scores = run.pruner.state(trainable)
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "place": (groups.pp.rank(), groups.tp.rank(), groups.dp.rank()),
        "ffn": ffn,
        "rest": rest,
        "steps": [float(step) for step in steps],
        "step_objects": len({step.data_ptr() for step in steps}),
        "rng": {name: s.numpy().copy() for name, s in tracker.items()}
        | {"default": torch.get_rng_state().numpy().copy()},
        "scores": (scores.ema.numpy(), scores.window.numpy(), scores.window_steps),
        "alive": run.pruner.alive.numpy().copy(),
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
    from megatron_idea.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        for _ in range(2):
            step(run, state)
        out = []
        first = ((45, 34), (48, 40)) if survivors == "spread" else ((30, 20), (32, 24))
        for live, widths in (first, ((24, 13), (24, 16))):
            plan = make_plan(shrink(run.pruner.alive, live, survivors), widths)
            _invent_scores(run)
            before = snapshot(run)
            report = run.pruner.apply(run.trainable, plan)
            after = snapshot(run)
            record, _ = step(run, state)
            out.append(
                {
                    "before": before, "after": after, "report": vars(report), "widths": widths,
                    "loss": record["loss"], "alive": plan.alive.numpy().copy(),
                }
            )  # fmt: skip
        run.log.close()
        return out
    finally:
        stop_distributed()


def _invent_scores(run: Run) -> None:
    """Averages that are equal over DP, and windows that are not."""
    scores = run.pruner.scores
    for (layer, mlp), ema, window in zip(
        run.trainable.mlps, scores.ema, scores.window, strict=True
    ):
        ema.copy_(torch.stack([mlp.neuron_ids + 100 * (layer + 1), *2 * [mlp.neuron_ids]]) / 7)
        window.copy_(ema * (run.groups.dp.rank() + 1))
    scores.window_steps = 3


Key = tuple[int, int]


@dataclass
class Whole:
    """Snapshots of all ranks put together; replicas have been compared."""

    neurons: dict[Key, np.ndarray]
    """(layer, neuron id) -> [3, 3, H] fp32: main weight and moments of gate, up, down."""
    weights: dict[Key, np.ndarray]
    """(layer, neuron id) -> [3, H]: what the model computes with."""
    alive: dict[Key, bool]
    order: dict[int, list[int]]
    """Per layer the ids in the order of TP ranks."""
    rest: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]]


def put_together(ranks: list[dict[str, Any]]) -> Whole:
    whole = Whole({}, {}, {}, {}, {})
    home: dict[Key, int] = {}
    for rank in ranks:
        pp, tp, dp = rank["place"]
        for layer, ffn in rank["ffn"].items():
            assert len(set(ffn["ids"])) == len(ffn["ids"])
            if dp == 0:
                whole.order.setdefault(layer, []).extend(ffn["ids"])
            for i, neuron in enumerate(ffn["ids"]):
                key = (layer, neuron)
                assert home.setdefault(key, tp) == tp, f"{key} is on two ranks"
                _known(whole.weights, key, ffn["weights"][i])
                assert whole.alive.setdefault(key, ffn["mask"][i]) == ffn["mask"][i]
                if ffn["state"] is not None:
                    _known(whole.neurons, key, ffn["state"][i])
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
            assert rank["report"]["widths_after"] == list(rank["widths"])


def check_neurons(case: Case, record: dict[str, Any], before: Whole, after: Whole) -> None:
    alive = {(int(layer), int(i)) for layer, i in np.argwhere(record["alive"])}
    assert alive <= after.neurons.keys() <= before.neurons.keys()
    for layer, width in enumerate(record["widths"]):
        assert len(after.order[layer]) == width
        # Room beyond the live ones is filled with masked neurons, lowest ids first.
        spare = sorted({i for i in before.order[layer] if (layer, i) not in alive})
        stored = sorted(i for i in after.order[layer] if (layer, i) not in alive)
        assert stored == spare[: len(stored)]
        if case.placement == "ordered":
            assert after.order[layer] == sorted(after.order[layer])
    for key in after.neurons:
        assert_bits(before.neurons[key], after.neurons[key], f"state of neuron {key}")
        assert_bits(before.weights[key], after.weights[key], f"weights of neuron {key}")
        assert after.alive[key] == (key in alive)
        # The model computes with the main weight, rounded.
        main = torch.tensor(after.neurons[key][0])
        rounded = main.bfloat16().float() if case.precision == "bf16" else main
        assert_bits(rounded.numpy(), after.weights[key], f"model weight of neuron {key}")
    moments = np.stack(list(after.neurons.values()))[:, 1:]
    assert (moments != 0).mean() > 0.9, "there was little to carry"


def check_rank(before: dict[str, Any], after: dict[str, Any], alive: np.ndarray) -> None:
    """What this rank alone has: step counts, random-number streams, scores."""
    assert set(before["steps"] + after["steps"]) in ({2.0}, {3.0}), "Adam's step count changed"
    assert after["step_objects"] == len(after["steps"]), "parameters share a step tensor"
    assert before["groups"] == after["groups"]
    assert before["rng"].keys() == after["rng"].keys() and len(after["rng"]) > 1
    for name, was in before["rng"].items():
        np.testing.assert_array_equal(was, after["rng"][name], err_msg=name)
    for was, now in zip(before["scores"][:2], after["scores"][:2], strict=True):
        for layer in after["ffn"]:
            assert (was[layer] > 0).any(), "there were no scores to carry"
            ids = after["ffn"][layer]["ids"]
            assert_bits(was[layer][:, ids], now[layer][:, ids], "scores")
    assert before["scores"][2] == after["scores"][2] == 3
    np.testing.assert_array_equal(after["alive"], alive)


# ----------------------------------------------------------------------------------- memory


def leak_job(rendezvous: str, config: Config) -> list[tuple[int, int, int]]:
    """Before the first and after each of 8 compactions: width, DDP objects, bytes of tensors."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_idea.distributed import start_distributed, stop_distributed
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
        for width in (64, 56, 48, 40, 32, 24, 16, 8, 4):
            if width < 64:
                alive = shrink(run.pruner.alive, (width, width), "spread")
                run.pruner.apply(run.trainable, make_plan(alive, (width, width)))
            step(run, state)
            out.append((width, *alive_now()))
        run.log.close()
        return out
    finally:
        stop_distributed()
        gc.unfreeze()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}),
    ],
    ids=["one", "dp2_overlapped"],
)
def test_compactions_leave_nothing_behind(
    world_size: int, parallel: dict[str, Any], tiny: Config, workers: Workers
) -> None:
    # Nothing of the pruner's own: the 9 steps are in the enlarged phase.
    config = replace(
        tiny,
        parallel=parallel,
        schedule={
            "enlarged_fraction": 0.5,
            "prune_fraction": 0.25,
            "recover_fraction": 0.25,
        },
    )
    for sizes in workers.run(leak_job, world_size, config):
        assert [objects for _, objects, _ in sizes] == [1] * 9
        for (was, _, before), (width, _, after) in itertools.pairwise(sizes):
            # Weight and gradient of gate, up and down rows of 32 in 2 layers; on one rank of DP the
            # moments too, on two half of them. Half of that allows for what else is in use.
            assert before - after >= (was - width) * 2 * 3 * 32 * 4, sizes


# -------------------------------------------------------------------------------- bad plans


def refused_job(rendezvous: str, config: Config) -> dict[str, Any]:
    """The same steps without and with plans in between that must be refused."""
    from megatron_idea.distributed import start_distributed, stop_distributed
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
            out["records"].append([(r["loss"], r["grad_norm"]) for r in records])
            run.log.close()
        return out
    finally:
        stop_distributed()


def _attempts(run: Run) -> tuple[list[str], list[str]]:
    """Error messages of four plans, and what they changed."""
    from megatron_idea.prune.compact import compact

    full = run.pruner.alive
    low, spread = (shrink(full, (24, 24), survivors) for survivors in ("low", "spread"))
    mine = low if run.groups.world.rank() == 0 else spread
    before = snapshot(run)
    messages, changed = [], []
    for action in (
        lambda: compact(run.trainable, make_plan(mine, (24, 24)), "min"),
        lambda: run.pruner.apply(run.trainable, make_plan(mine, (24, 24))),
        lambda: run.pruner.apply(run.trainable, make_plan(mine, (64, 64))),  # masks alone
        lambda: compact(run.trainable, make_plan(low, (16, 16)), "min"),
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
    parallel: dict[str, Any], tiny: Config, workers: Workers
) -> None:
    for rank in workers.run(refused_job, 2, replace(tiny, parallel=parallel)):
        assert rank["changed"] == []
        assert len(rank["messages"]) == 4
        for message in rank["messages"][:3]:
            assert message.startswith("RuntimeError: the pruning plan differs between ranks")
        assert "16 neurons cannot hold 24 live ones" in rank["messages"][3]
        without, with_refusals = rank["records"]
        assert without == with_refusals
