"""Tests that run as a job of several processes, on a small model and random tokens."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_idea import config as configuration
from megatron_idea.config import Config
from megatron_idea.testing import Workers


def small(**sections: Any) -> Config:
    """Two layers, 24 FFN neurons each, 12 sequences a step: divisible by 1, 2 and 3 ranks."""
    config = configuration.from_dict(
        {
            "model": {
                "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24,
                "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4,
                "vocab_size": 32, "qk_layernorm": True,
            },
            "training": {"seq_length": 8, "micro_batch_size": 2, "global_batch_size": 12},
            "prune": {"target_ffn_hidden_size": 12, "alignment": 2, "compaction_block": 4},
        }
    )  # fmt: skip
    return configuration.replace(config, **sections)


def run_job(
    workers: Workers, job: Callable[..., Any], world_size: int, config: Config, *arguments: Any
) -> list[Any]:
    """Call ``job(groups, config, *arguments)`` in started processes; returns results by rank."""
    return workers.run(_run, world_size, job.__module__, job.__qualname__, config, arguments)


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
    from megatron_idea.distributed import start_distributed, stop_distributed

    job = getattr(importlib.import_module(module), name)
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        return getattr(job, "job", job)(groups, config, *arguments)
    finally:
        stop_distributed()


def random_tokens(config: Config, seed: int) -> torch.Tensor:
    """[global_batch_size, seq_length + 1] token ids, the same on every rank."""
    shape = (config.training.global_batch_size, config.training.seq_length + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.model.vocab_size, shape, generator=generator)


def backward(trainable: Any, seed: int = 0) -> None:
    """Gradients of one global batch of random tokens, reduced over data-parallel ranks."""
    from megatron_idea.train import forward_backward

    config, dp = trainable.config, trainable.groups.dp
    tokens = random_tokens(config, seed).to(trainable.groups.device)
    position_ids = torch.arange(config.training.seq_length, device=tokens.device)
    batches = [
        {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "loss_mask": torch.ones_like(part[:, 1:], dtype=torch.float32),
            "position_ids": position_ids.expand(len(part), -1),
        }
        for part in tokens.chunk(dp.size())[dp.rank()].split(config.training.micro_batch_size)
    ]
    data = SimpleNamespace(step=lambda _: iter(batches), num_microbatches=len(batches))
    run = SimpleNamespace(config=config, trainable=trainable, data=data)
    forward_backward(run, SimpleNamespace(consumed_tokens=0))  # type: ignore[arg-type]
