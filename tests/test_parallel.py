"""Layouts against world size 1, and masks against compaction: the same numbers from the same run.

Every run is driven step by step through ``train.build`` and ``train.step`` in worker processes and
comes back as plain data; it is run once and many claims are checked on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import mask_of

from megatron_idea.config import BlendEntry, Config, replace, validate
from megatron_idea.testing import Workers

if TYPE_CHECKING:  # the workers load megatron-core, this process has no use for it
    from megatron_idea.engine.distributed import ProcessGroups
    from megatron_idea.train import Run

STEPS = 26
FFN, TARGET = 64, 24
WORDS = ("the", "gate", "opens", "and", "an", "old", "neuron", "leaves")
MULTIPLE = 8  # neurons; the same TP x alignment in every layout, so that the widths can be compared

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class Layout:
    """How many processes, which ``parallel`` settings, and what else has to fit them."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 2
    num_layers: int = 2


LAYOUTS = {
    "one": Layout(),
    # One micro-batch: a message over gloo takes longer than a layer of this size.
    "tp2": Layout(2, TP2, micro_batch_size=4),
    "tp2_whole_sequence": Layout(2, TP2 | {"sequence_parallel": False}, micro_batch_size=4),
    "pp2": Layout(2, PP2),
    "dp2": Layout(2),
    "dp2_replicated": Layout(2, {"use_distributed_optimizer": False}),
    # An FFN has 6144 weights, the embedding 8448: each layer has buckets of its own. Two
    # micro-batches, so that gradients are reduced while the last backward is still running.
    "dp2_overlapped": Layout(
        2,
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000},
        micro_batch_size=1,
    ),
    "tp2_pp2": Layout(4, TP2 | PP2),
    "pp2_interleaved": Layout(2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, num_layers=4),
}


@dataclass
class Recorded:
    """One run as plain data, merged over ranks."""

    loss: np.ndarray
    grad_norm: np.ndarray
    widths: list[tuple[int, ...]]
    alive: np.ndarray
    """[step, L, F] bool, after the step."""
    ema: list[np.ndarray]
    """[L, 3, F] after each step of the prune phase."""
    initial: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    """Whole weights by canonical name."""
    masked_gradient: float
    """Largest |gradient| that any masked neuron's weight had in any step."""
    masked_activation: float
    masked_seen: int
    """Masked neurons that were looked at, added up over steps."""

    @property
    def changes(self) -> list[int]:
        """Steps in which a neuron was removed."""
        gone = (self.alive[1:] != self.alive[:-1]).any(axis=(1, 2))
        return [int(step) for step in np.flatnonzero(gone) + 1]

    @property
    def first_compaction(self) -> int:
        return next(i for i, w in enumerate(self.widths) if w != self.widths[0])


def record(rendezvous: str, configs: list[Config]) -> list[dict[str, Any]]:
    """Train each config to its end in this worker; all have the same layout."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed

    groups = start_distributed(configs[0].parallel, configs[0].training.seed, rendezvous)
    try:
        return [_record(config, groups) for config in configs]
    finally:
        stop_distributed()


def _record(config: Config, groups: ProcessGroups) -> dict[str, Any]:
    from megatron.core import tensor_parallel

    from megatron_idea.schedule import gathers_scores
    from megatron_idea.train import build, step

    # Every run of a worker starts from the random-number streams of a fresh process.
    torch.manual_seed(config.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed, force_reset_rng=True)
    run, state = build(config, groups)
    out: dict[str, Any] = {name: [] for name in ("loss", "grad_norm", "widths", "alive", "ema")} | {
        "rank": (groups.pp.rank(), groups.tp.rank(), groups.dp.rank())
    }
    out["initial"] = _local_weights(run)
    silent = Silence(run)
    while state.consumed_tokens < config.schedule.total_tokens:
        silent.listen()
        line, _ = step(run, state)
        out["loss"].append(line.loss)
        out["grad_norm"].append(line.grad_norm)
        out["widths"].append(state.shape.counts("ffn_hidden_size"))
        out["alive"].append(run.pruner.alive["ffn_hidden_size"].numpy().copy())
        if gathers_scores(config.schedule, state.consumed_tokens):
            scores = run.pruner.state(run.trainable)
            ema = scores.get("scores.average.0.ffn_hidden_size", torch.zeros(0))
            out["ema"].append(ema.numpy())
        else:
            out["ema"].append(np.zeros(0))
    for chunk in run.trainable.chunks:  # overlapped gathering would wait for the next forward
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    out["final"] = _local_weights(run)
    out["silent"] = (silent.gradient, silent.activation, silent.seen)
    run.log.close()
    run.progress.close()
    return out


class Silence:
    """Watches what masked neurons do in every step: activations, and gradients once reduced."""

    def __init__(self, run: Run) -> None:
        self.gradient = self.activation = 0.0
        self.seen = 0
        self._run = run
        self._observe = run.pruner.observe
        run.pruner.observe = self._look

    def listen(self) -> None:
        """Hook the model's MLPs; again after a compaction, which makes new ones."""
        for _, mlp in self._run.trainable.mlps:
            if not mlp.linear_fc2._forward_pre_hooks:
                mlp.linear_fc2.register_forward_pre_hook(
                    lambda _fc2, args, mlp=mlp: self._hear(args[0][..., ~mask_of(mlp)])
                )

    def _hear(self, activations: torch.Tensor) -> None:
        self.activation = max(self.activation, _largest(activations))

    def _look(self, trainable: Any, tokens: int, seen: Any) -> Any:
        for _, mlp in trainable.mlps:
            dead = ~mask_of(mlp)
            self.seen += int(dead.sum())
            fc1, fc2 = mlp.linear_fc1.weight.main_grad, mlp.linear_fc2.weight.main_grad
            self.gradient = max(
                self.gradient, _largest(fc1[torch.cat([dead, dead])]), _largest(fc2[:, dead])
            )
        return self._observe(trainable, tokens, seen)


def _largest(x: torch.Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _local_weights(run: Run) -> dict[str, tuple[np.ndarray, int | None]]:
    """This rank's parts by canonical name, and the axis along which TP splits them."""
    from megatron_idea.engine.model import named_parameters

    return {
        name: (
            p.detach().float().clone().numpy(),
            p.partition_dim if p.tensor_model_parallel else None,
        )
        for name, p in named_parameters(run.trainable.chunks)
    }


def _whole_weights(ranks: list[dict[str, Any]], when: str) -> dict[str, np.ndarray]:
    """Weights by canonical name, parts put together over TP; replicas must be bit-equal."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    axes = {}
    for rank in ranks:
        tp = rank["rank"][1]
        for name, (value, axis) in rank[when].items():
            known = parts.setdefault(name, {}).setdefault(tp, value)
            np.testing.assert_array_equal(known, value, err_msg=f"replicas of {name}")
            axes[name] = axis
    whole = {}
    for name, by_tp in parts.items():
        pieces = [by_tp[tp] for tp in sorted(by_tp)]
        if axes[name] is None:
            for piece in pieces:
                np.testing.assert_array_equal(piece, pieces[0], err_msg=f"replicas of {name}")
            whole[name] = pieces[0]
        elif name.endswith("linear_fc1.weight"):  # [gate; up] on every rank
            halves = [np.split(piece, 2) for piece in pieces]
            whole[name] = np.concatenate([h[i] for i in (0, 1) for h in halves])
        else:
            whole[name] = np.concatenate(pieces, axis=axes[name])
    return whole


def _merge(ranks: list[dict[str, Any]]) -> Recorded:
    first = ranks[0]
    for rank in ranks[1:]:
        for name in ("loss", "grad_norm", "widths"):
            assert rank[name] == first[name], f"{name} differs between ranks"
        np.testing.assert_array_equal(rank["alive"], first["alive"], err_msg="live neurons")
        for mine, its in zip(rank["ema"], first["ema"], strict=True):
            np.testing.assert_array_equal(mine, its, err_msg="scores")
    silent = [rank["silent"] for rank in ranks]
    return Recorded(
        np.array(first["loss"]),
        np.array(first["grad_norm"]),
        first["widths"],
        np.array(first["alive"]),
        first["ema"],
        _whole_weights(ranks, "initial"),
        _whole_weights(ranks, "final"),
        max(s[0] for s in silent),
        max(s[1] for s in silent),
        sum(s[2] for s in silent),
    )


@dataclass(frozen=True)
class Pair:
    """The same run with masks alone and with compactions."""

    masked: Recorded
    compacted: Recorded


Runs = Callable[..., Pair]


@pytest.fixture(scope="module")
def cache() -> dict[Any, Pair]:
    return {}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset that never changes: tolerances are measured on it."""
    from megatron_idea.data.tokenizer import load_tokenizer
    from megatron_idea.data.tokenizing import tokenize

    folder = tmp_path_factory.mktemp("words")
    words = random.Random(0).choices(
        ["the", "gate", "opens", "and", "an", "old", "neuron", "leaves"], k=3000
    )
    (folder / "words.txt").write_text(" ".join(words))
    tokenize([folder / "words.txt"], folder / "words", load_tokenizer("byte"), held_out=0.0)
    return folder / "words_train"


@pytest.fixture()
def tiny(tiny: Config, text: Path) -> Config:
    return replace(tiny, data={"train": [BlendEntry(str(text))], "validation": []})


@pytest.fixture()
def pair(tiny: Config, workers: Workers, cache: dict[Any, Pair]) -> Runs:
    """``pair(layout, section={...})``: both runs, from the cache when another test had them."""

    def run(layout: str, **sections: dict[str, Any]) -> Pair:
        key = (layout, repr(sorted(sections.items())))
        if key not in cache:
            config = config_of(tiny, layout, **sections)
            configs = [replace(config, prune={"compact": compact}) for compact in (False, True)]
            cache[key] = Pair(*train(workers, layout, configs))
        return cache[key]

    return run


@pytest.fixture()
def pairs(pair: Runs) -> Callable[[str], tuple[Pair, Pair]]:
    """The runs of a layout, and those of one process."""

    def run(layout: str) -> tuple[Pair, Pair]:
        model = {"num_layers": LAYOUTS[layout].num_layers}
        return pair(layout, model=model), pair("one", model=model)

    return run


def train(workers: Workers, layout: str, configs: list[Config]) -> list[Recorded]:
    by_rank = workers.run(record, LAYOUTS[layout].world_size, configs)
    return [_merge(list(ranks)) for ranks in zip(*by_rank, strict=True)]


def config_of(tiny: Config, layout: str, **sections: dict[str, Any]) -> Config:
    """``tiny`` in a layout: 26 steps, scores from step 3, 64 -> 24 neurons in steps 5 to 12.

    Weights start at 0.1, not 0.02: norms divide by the size of what they see, and with vectors of
    size 0.02 single tokens have gradients hundreds of times larger than the others. Rounding is
    then amplified as much, and no tight tolerance would hold.
    """
    at = LAYOUTS[layout]
    tp = at.parallel.get("tensor_model_parallel_size", 1)
    config = replace(
        tiny,
        model={"init_method_std": 0.1, "ffn_hidden_size": FFN, "num_layers": at.num_layers},
        training={"micro_batch_size": at.micro_batch_size},
        parallel=at.parallel,
        prune={"target": {"ffn_hidden_size": TARGET}, "alignment": MULTIPLE // tp},
        schedule={
            "total_tokens": STEPS * 128,
            "enlarged_fraction": 2 / 26,
            "prune_fraction": 10 / 26,
            "recover_fraction": 14 / 26,
        },
    )
    config = replace(config, **sections)
    validate(config, at.world_size)
    return config


# What rounding may do, relative; about four times what was measured over all layouts. A loss is one
# fp32 number of 3 to 5 a micro-batch, the next of which is 8e-8 to 1.2e-7 away: measured at most
# 1.2e-7, that rounding and no drift. Gradient norms 2.9e-7, averaged scores 7.2e-7 of the layer's
# largest: sums over 32 weights whose gradients are sums over 128 tokens.
LOSS, GRAD_NORM, SCORE = 5e-7, 1e-6, 3e-6


def assert_near(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=0, err_msg=what)


def assert_same_run(
    actual: Recorded, expected: Recorded, loss: float = LOSS, grad_norm: float = GRAD_NORM
) -> None:
    np.testing.assert_array_equal(actual.alive, expected.alive, err_msg="live neurons")
    assert_near(actual.loss, expected.loss, loss, "loss")
    assert_near(actual.grad_norm, expected.grad_norm, grad_norm, "gradient norm")


def assert_masked_equals_compacted(runs: Pair, **tolerance: float) -> None:
    masked, compacted = runs.masked, runs.compacted
    first = compacted.first_compaction
    assert STEPS - 1 - first >= 20, "too few steps after the first compaction"
    assert len(set(compacted.widths)) >= 3, "fewer than two compactions"
    assert set(masked.widths) == {masked.widths[0]}, "the masked run changed its size"
    assert_same_run(compacted, masked, **tolerance)
    # Up to there the two are the same program.
    np.testing.assert_array_equal(compacted.loss[: first + 1], masked.loss[: first + 1])
    np.testing.assert_array_equal(compacted.grad_norm[: first + 1], masked.grad_norm[: first + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_and_compacted_runs_agree(layout: str, pairs: Callable[..., Any]) -> None:
    runs, _ = pairs(layout)
    assert_masked_equals_compacted(runs)
    assert set(runs.compacted.widths[-1]) == {TARGET}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_weights_do_not_depend_on_the_layout(layout: str, pairs: Callable[..., Any]) -> None:
    runs, reference = pairs(layout)
    initial, expected = runs.compacted.initial, reference.compacted.initial
    assert initial.keys() == expected.keys()
    for name, value in initial.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_computes_the_run_of_one_process(
    layout: str, pairs: Callable[..., Any]
) -> None:
    runs, reference = pairs(layout)
    for mine, its in ((runs.masked, reference.masked), (runs.compacted, reference.compacted)):
        assert_same_run(mine, its)
        assert mine.widths == its.widths
        assert mine.loss[-1] < mine.loss[0] - 1.0, "it does not learn: equal losses mean little"


def test_four_tensor_parallel_ranks_compute_the_run_of_one_process(
    tiny: Config, workers: Workers
) -> None:
    """They need four query groups: a model of its own, so masks alone are not run again."""
    sections = {"model": {"num_query_groups": 4}, "training": {"micro_batch_size": 4}}
    one = config_of(tiny, "one", **sections)
    tp4 = {"tensor_model_parallel_size": 4}
    four = replace(one, parallel=tp4, prune={"alignment": MULTIPLE // 4})
    (expected,) = train(workers, "one", [one])
    actual = _merge([recorded for (recorded,) in workers.run(record, 4, [four])])
    assert_same_run(actual, expected)
    assert actual.widths == expected.widths
    assert set(actual.widths[-1]) == {TARGET}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_scores_do_not_depend_on_the_layout(layout: str, pairs: Callable[..., Any]) -> None:
    runs, reference = pairs(layout)
    mine, its = runs.compacted, reference.compacted
    assert len(its.changes) >= 6
    for step in its.changes:
        scale = its.ema[step].max(axis=(1, 2), keepdims=True)
        assert (scale > 0).all()
        error = np.abs(mine.ema[step] - its.ema[step]) / scale
        assert error.max() <= SCORE, f"step {step}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_neurons_have_no_activation_and_no_gradient(
    layout: str, pairs: Callable[..., Any]
) -> None:
    """Exactly zero: gate rows, up rows, down columns, and what the down matrix sees of them."""
    runs, _ = pairs(layout)
    assert runs.masked.masked_seen > 1000
    assert runs.masked.masked_activation == 0.0
    assert runs.masked.masked_gradient == 0.0
    # Between compactions too.
    assert runs.compacted.masked_seen > 0
    assert runs.compacted.masked_activation == runs.compacted.masked_gradient == 0.0


def test_untied_embeddings_without_qk_norm(pair: Runs) -> None:
    model = {"share_embeddings_and_output_weights": False, "qk_layernorm": False}
    runs, reference = pair("pp2", model=model), pair("one", model=model)
    names = runs.masked.initial.keys()
    assert "output_layer.weight" in names
    assert not any("q_layernorm" in name for name in names)
    for both in (runs, reference):
        assert_masked_equals_compacted(both)
    assert_same_run(runs.compacted, reference.compacted)


def test_masked_and_compacted_runs_agree_in_bf16(pair: Runs) -> None:
    """bf16 keeps 8 bits: a sum of another width may round to the neighbour, 2^-8 away.

    One of the 4096 hidden values of a batch that is 2^-8 off moves the mean loss by some 1e-6. The
    bounds leave room for hundreds of them, of either sign; measured are 0 and 1e-7.
    """
    runs = pair("dp2", training={"precision": "bf16"})
    assert_masked_equals_compacted(runs, loss=1e-4, grad_norm=1e-3)


def test_one_ranking_over_all_layers_gives_layers_their_own_widths(pair: Runs) -> None:
    sections = {"model": {"num_layers": 4}, "prune": {"scope": "global"}}
    runs, reference = pair("tp2", **sections), pair("one", **sections)
    final = runs.compacted.widths[-1]
    assert len(set(final)) > 1
    assert sum(final) == 4 * TARGET
    assert list(final) == runs.compacted.alive[-1].sum(axis=1).tolist()
    for both in (runs, reference):
        assert_masked_equals_compacted(both)
    assert_same_run(runs.compacted, reference.compacted)
    assert runs.compacted.widths == reference.compacted.widths


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_dropout_does_not_notice_a_compaction(layout: str, pair: Runs) -> None:
    """Another draw of a tenth of the hidden values would change the loss in its second digit."""
    runs = pair(layout, model={"hidden_dropout": 0.1})
    assert_masked_equals_compacted(runs)
    undropped = pair(layout, model={"num_layers": 2})
    assert abs(runs.masked.loss[0] - undropped.masked.loss[0]) > 1e-3


def test_keep_ratio_of_one_is_plain_training(tiny: Config, workers: Workers) -> None:
    plain = config_of(tiny, "one", prune={"strategy": "none"})
    # validate asks for a target below the full width: there is nothing to prune otherwise.
    pruned = replace(plain, prune={"strategy": "idea", "target": {"ffn_hidden_size": FFN}})
    a, b = train(workers, "one", [plain, pruned])
    assert b.ema[10].max() > 0, "the pruned run did not even observe"
    assert b.alive.all()
    np.testing.assert_array_equal(a.loss, b.loss)
    np.testing.assert_array_equal(a.grad_norm, b.grad_norm)
    for name, value in a.final.items():
        np.testing.assert_array_equal(value, b.final[name], err_msg=name)


def save_job(rendezvous: str, config: Config) -> list[str]:
    """Train three steps and save; names of the weights that another model reads differently."""
    from megatron_idea import checkpoint
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.train import build, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        for _ in range(3):
            step(run, state)
        path = checkpoint.save(config, run.trainable, run.pruner, state)
        fresh = assemble(config.sections, groups, state.shape, initialize=False)
        checkpoint.load_weights(fresh.chunks, path, groups)
        for chunk in run.trainable.chunks:
            chunk.start_param_sync(force_sync=True)
        trained = dict(named_parameters(run.trainable.chunks))
        run.log.close()
        return [n for n, p in named_parameters(fresh.chunks) if not torch.equal(p, trained[n])]
    finally:
        stop_distributed()


def test_a_checkpoint_has_weights_whose_gathering_is_overlapped(
    tiny: Config, workers: Workers
) -> None:
    """After a step only their owner has the new weights, until the next forward asks for them."""
    assert workers.run(save_job, 2, config_of(tiny, "dp2_overlapped")) == [[], []]
