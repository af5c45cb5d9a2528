"""Tests that run as a job of several processes, on a small model and random tokens."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_idea import config as configuration
from megatron_idea.config import Config, Sections
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers


def small(**sections: Any) -> Config:
    """Two layers, 24 FFN neurons each, 12 sequences a step: divisible by 1, 2 and 3 ranks.

    Two micro-batches, which gradients are added up over: tensor-parallel ranks exchange messages
    for each of them, and a message over gloo takes longer than a layer of this size.
    """
    config = configuration.from_dict(
        {
            "model": {
                "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24,
                "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4,
                "vocab_size": 32, "qk_layernorm": True,
            },
            "training": {"seq_length": 8, "micro_batch_size": 6, "global_batch_size": 12},
            "prune": {"target": {"ffn_hidden_size": 12}, "alignment": 2, "compaction_block": 4},
            "checkpoint": {"before_compaction": False},
        }
    )  # fmt: skip
    return configuration.replace(config, **sections)


def run_job(
    workers: Workers, job: Callable[..., Any], world_size: int, config: Config, *arguments: Any
) -> list[Any]:
    """Call ``job(groups, config, *arguments)`` in started processes; returns results by rank."""
    if world_size == 3:  # twelve sequences: four for each of three data-parallel ranks
        config = configuration.replace(config, training={"micro_batch_size": 4})
    return workers.run(_run, world_size, job.__module__, job.__qualname__, config, arguments)


def train_on(rendezvous: str, config: Config) -> None:
    from megatron_idea.train import train

    train(config, rendezvous)


def on_ranks(world_size: int, **parallel: Any) -> Callable[..., Any]:
    """Run a test in ``world_size`` processes, as ``test(groups, config, ...)``.

    Further arguments come from pytest's parametrization.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        extra = list(inspect.signature(test).parameters.values())[2:]

        def run(workers: Workers, **given: Any) -> None:
            arguments = [given[parameter.name] for parameter in extra]
            run_job(workers, test, world_size, small(parallel=parallel), *arguments)

        workers_argument = inspect.Parameter("workers", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([workers_argument, *extra])  # type: ignore[attr-defined]
        run.__name__, run.__module__ = test.__name__, test.__module__
        run.__doc__, run.job = test.__doc__, test  # type: ignore[attr-defined]
        return run

    return decorate


def _run(
    rendezvous: str, module: str, name: str, config: Config, arguments: tuple[Any, ...]
) -> Any:
    from megatron_idea.engine.distributed import start_distributed, stop_distributed

    job = getattr(importlib.import_module(module), name)
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        return getattr(job, "job", job)(groups, config, *arguments)
    finally:
        stop_distributed()


def random_tokens(config: Config | Sections, seed: int) -> torch.Tensor:
    """[global_batch_size, seq_length + 1] token ids, the same on every rank."""
    shape = (config.training.global_batch_size, config.training.seq_length + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.model.vocab_size, shape, generator=generator)


class RandomBatches:
    """Stands for ``Batches``: a step's tokens are a function of its first sample and a seed."""

    def __init__(self, config: Config | Sections, groups: Any, seed: int = 0) -> None:
        self._config, self._groups, self._seed = config, groups, seed
        per_rank = config.training.global_batch_size // groups.dp.size()
        self.micro_batch_size = config.training.micro_batch_size
        self.seq_length = config.training.seq_length
        self.num_microbatches = per_rank // self.micro_batch_size

    def step(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        dp, training = self._groups.dp, self._config.training
        tokens = random_tokens(self._config, self._seed + consumed_samples)
        positions = torch.arange(training.seq_length, device=self._groups.device)
        mine = tokens.to(self._groups.device).chunk(dp.size())[dp.rank()]
        for part in mine.split(training.micro_batch_size):
            yield {
                "tokens": part[:, :-1],
                "labels": part[:, 1:],
                "loss_mask": torch.ones_like(part[:, 1:], dtype=torch.float32),
                "position_ids": positions.expand(len(part), -1),
            }


def ffn_shape(config: Config, widths: Sequence[int]) -> Shape:
    """The shape of ``config``'s model when layer i has ``widths[i]`` neurons."""
    return Shape.full(config.model).with_counts("ffn_hidden_size", widths)


def core_config(config: Config, shape: Shape | None = None) -> Any:
    """megatron-core's view of ``config``, of the enlarged model or of another shape."""
    from megatron_idea.engine.model import transformer_config

    shape = shape or Shape.full(config.model)
    return transformer_config(config.model, config.training, config.parallel, shape)


def built(groups: Any, config: Config, shape: Shape | None = None) -> list[Any]:
    """Chunks with their initial weights, of the enlarged model or of another shape."""
    from megatron_idea.engine.model import build_model, initialize_weights

    model, training = config.model, config.training
    chunks: list[Any] = build_model(model, training, core_config(config, shape), groups)
    initialize_weights(model, training.seed, chunks, groups)
    return chunks


def backward(trainable: Any, seed: int = 0) -> None:
    """Gradients of one global batch of random tokens, reduced over data-parallel ranks."""
    from megatron_idea.engine.passes import forward_backward

    forward_backward(trainable, RandomBatches(trainable.sections, trainable.groups, seed), 0)


def live_run(groups: Any, config: Config) -> tuple[Any, Any]:
    """A run and its state for ``train.step``, on random tokens, without logs and checkpoints."""
    from megatron_idea.checkpoint.state import TrainState
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner

    state = TrainState.fresh(config)
    trainable = assemble(config.sections, groups, state.shape, initialize=True)
    run = SimpleNamespace(
        config=config,
        groups=groups,
        trainable=trainable,
        pruner=Pruner(config, trainable),
        data=RandomBatches(config, groups),
        held_out=None,
        log=SimpleNamespace(
            event=lambda *_, **__: None,
            write=lambda record: record,
            scores=lambda record: None,
            failure=None,
        ),
        progress=SimpleNamespace(update=lambda record: None),
        stop=SimpleNamespace(received=None),
        saving=None,
    )
    return run, state


def neuron_plan(trainable: Any, pruner: Any, alive: torch.Tensor, widths: Sequence[int]) -> Any:
    """A plan that keeps the neurons ``alive`` [L, F] alone, in FFNs of ``widths``."""
    from megatron_idea.prune.plan import Plan

    shape = trainable.shape.with_counts("ffn_hidden_size", widths)
    return Plan.of({**pruner.alive, "ffn_hidden_size": alive}, shape, pruner.memory)


def cut_neurons(trainable: Any, pruner: Any, alive: torch.Tensor, widths: Sequence[int]) -> Any:
    """Carry such a plan out; returns the compaction's report."""
    plan = neuron_plan(trainable, pruner, alive, widths)
    pruner.silence(trainable, plan)
    return pruner.compact(trainable, plan)


def neuron_ids(trainable: Any, pruner: Any) -> dict[int, torch.Tensor]:
    """The numbers of the neurons on this rank, in their order, for its layers."""
    from megatron_idea.prune.plan import local_part

    stored = pruner.stored["ffn_hidden_size"]
    return {layer: local_part(stored[layer], trainable.groups.tp) for layer, _ in trainable.mlps}


def mask_of(mlp: Any) -> torch.Tensor:
    """Which neurons of this rank an FFN lets through, bool."""
    return torch.ones(mlp.width, dtype=torch.bool) if mlp._mask is None else mlp._mask.bool().cpu()


def whole(trainable: Any, parameter: torch.nn.Parameter, what: str) -> torch.Tensor:
    """The unsharded ``main``, ``grad`` or moment of a parameter, flat, on every rank."""
    from megatron_idea.engine.shards import shard_of

    part = shard_of(trainable.optimizer, parameter)
    result = torch.zeros(parameter.numel(), device=parameter.device)
    if part is not None:
        value = part.state[what] if what.startswith("exp_avg") else getattr(part, what)
        result[part.start : part.end] = value.detach().view(-1)
    if trainable.parallel.use_distributed_optimizer:
        dist.all_reduce(result, group=trainable.groups.dp)
    return result


def neuron_rows(tensor: str, weight: torch.Tensor) -> torch.Tensor:
    """[f, ..., rows, H]: what each neuron owns of fc1 [..., 2 f, H] or fc2 [..., H, f], by hand."""
    if tensor == "linear_fc1":  # gate rows above up rows
        return weight.unflatten(-2, (2, -1)).movedim(-2, 0).contiguous()
    assert tensor == "linear_fc2"
    return weight.movedim(-1, 0).unsqueeze(-2).contiguous()
