"""Layouts against world size 1, and masks against compaction: the same numbers from the same run.

Every run is driven step by step through ``train.build`` and ``train.step`` in worker processes and
comes back as plain data; it is run once and many claims are checked on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_idea.config import Config, replace, validate
from megatron_idea.distributed import ProcessGroups, start_distributed, stop_distributed
from megatron_idea.testing import Workers

STEPS = 32
MULTIPLE = 8  # neurons; the same TP x alignment in every layout, so that the widths can be compared

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class Layout:
    """How many processes, which ``parallel`` settings, and what else has to fit them."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 2


LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(2, TP2),
    "tp2_whole_sequence": Layout(2, TP2 | {"sequence_parallel": False}),
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
    # Interleaving takes two chunks a stage: 4 layers.
    "pp2_interleaved": Layout(2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
}  # fmt: skip


@dataclass
class Recorded:
    """One run as plain data, merged over ranks."""

    loss: np.ndarray
    grad_norm: np.ndarray
    widths: list[tuple[int, ...]]
    alive: np.ndarray
    """[step, L, F] bool, after the step."""
    ema: np.ndarray
    """[step, L, 3, F], after the step."""
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
    groups = start_distributed(configs[0].parallel, configs[0].training.seed, rendezvous)
    try:
        return [_record(config, groups) for config in configs]
    finally:
        stop_distributed()


def _record(config: Config, groups: ProcessGroups) -> dict[str, Any]:
    from megatron.core import tensor_parallel

    from megatron_idea.train import build, step

    torch.manual_seed(config.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed, force_reset_rng=True)
    run, state = build(config, groups)
    out: dict[str, Any] = {
        name: [] for name in ("loss", "grad_norm", "widths", "alive", "ema")
    } | {"rank": (groups.pp.rank(), groups.tp.rank(), groups.dp.rank())}
    out["initial"] = _local_weights(run)
    silent = Silence(run)
    while state.consumed_tokens < config.schedule.total_tokens:
        silent.listen()
        line, _ = step(run, state)
        out["loss"].append(line["loss"])
        out["grad_norm"].append(line["grad_norm"])
        out["widths"].append(state.widths)
        out["alive"].append(run.pruner.alive.numpy().copy())
        out["ema"].append(run.pruner.state(run.trainable).ema.numpy().copy())
    out["final"] = _local_weights(run)
    out["silent"] = (silent.gradient, silent.activation, silent.seen)
    run.log.close()
    run.progress.close()
    return out


class Silence:
    """Watches what masked neurons do in every step: activations, and gradients once reduced."""

    def __init__(self, run: Any) -> None:
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
                    lambda _fc2, args, mlp=mlp: self._hear(args[0][..., ~mlp.mask])
                )

    def _hear(self, activations: torch.Tensor) -> None:
        self.activation = max(self.activation, _largest(activations))

    def _look(self, trainable: Any, tokens: int) -> Any:
        for _, mlp in trainable.mlps:
            dead = ~mlp.mask
            self.seen += int(dead.sum())
            fc1, fc2 = mlp.linear_fc1.weight.main_grad, mlp.linear_fc2.weight.main_grad
            self.gradient = max(
                self.gradient, _largest(fc1[torch.cat([dead, dead])]), _largest(fc2[:, dead])
            )
        return self._observe(trainable, tokens)


def _largest(x: torch.Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _local_weights(run: Any) -> dict[str, tuple[np.ndarray, int | None]]:
    from megatron_idea.model import named_parameters

    return {
        name: (
            p.detach().float().numpy().copy(),
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
        for name in ("alive", "ema"):
            np.testing.assert_array_equal(rank[name], first[name], err_msg=name)
    silent = [rank["silent"] for rank in ranks]
    return Recorded(
        np.array(first["loss"]),
        np.array(first["grad_norm"]),
        first["widths"],
        np.array(first["alive"]),
        np.array(first["ema"]),
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


@pytest.fixture(scope="module")
def cache() -> dict[Any, Pair]:
    return {}


@pytest.fixture()
def pair(
    tiny: Config, workers: Workers, cache: dict[Any, Pair], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pair]:
    """``pair(layout, section={...})``: both runs, from the cache when another test had them."""

    def run(layout: str, **sections: dict[str, Any]) -> Pair:
        key = (layout, repr(sorted(sections.items())))
        if key not in cache:
            configs = [
                config_of(tiny, layout, sections | {"prune": p | sections.get("prune", {})})
                for p in ({"compact": False}, {"compact": True})
            ]
            by_rank = workers.run(record, LAYOUTS[layout].world_size, configs)
            cache[key] = Pair(*(_merge(list(ranks)) for ranks in zip(*by_rank, strict=True)))
        return cache[key]

    return run


def config_of(tiny: Config, layout: str, sections: dict[str, dict[str, Any]]) -> Config:
    """``tiny`` in a layout: 32 steps, pruned in steps 7 to 14, 64 -> 24 neurons a layer."""
    at = LAYOUTS[layout]
    tp = at.parallel.get("tensor_model_parallel_size", 1)
    config = replace(
        tiny,
        training={"micro_batch_size": at.micro_batch_size},
        parallel=at.parallel,
        prune={"alignment": MULTIPLE // tp},
        schedule={
            "total_tokens": STEPS * 128,
            "enlarged_fraction": 4 / 32,
            "prune_fraction": 10 / 32,
            "recover_fraction": 18 / 32,
        },
    )
    config = replace(config, **sections)
    validate(config, at.world_size)
    return config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x(layout, pair):
    import time
    t=time.time()
    v = {"model": {"num_layers": 4}} if layout == "pp2_interleaved" else {}
    p = pair(layout, **v)
    print(layout, "secs", time.time()-t)
    one = pair("one", **v)
    m, c = p.masked, p.compacted
    rel = lambda a, b: np.abs(a/b-1).max()
    print("changes", c.changes, "first", c.first_compaction, c.widths[::4])
    print("mc loss", rel(c.loss, m.loss), "norm", rel(c.grad_norm, m.grad_norm), "alive", (c.alive==m.alive).all())
    print("silent", m.masked_gradient, m.masked_activation, m.masked_seen, c.masked_seen)
    print("vs one loss", rel(c.loss, one.compacted.loss), np.abs(c.loss/one.compacted.loss-1)[[0,5,9,15,-1]], "norm", rel(c.grad_norm, one.compacted.grad_norm), "alive", (c.alive==one.compacted.alive).all(), c.widths==one.compacted.widths)
    e, eo = c.ema, one.compacted.ema
    print("ema", (np.abs(e-eo).max(axis=(1,2,3))/np.maximum(1e-30,eo.max(axis=(1,2,3))))[[5,8,13,-1]])
    print("init", all((c.initial[k]==one.compacted.initial[k]).all() for k in one.compacted.initial), c.loss[[0,-1]])
