"""Held-out loss of a model in training, or of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_idea import checkpoint, storage
from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError, validate
from megatron_idea.data.batches import Batches
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.distributed import (
    ProcessGroups,
    start_distributed,
    stop_distributed,
    world_size_from_environment,
)
from megatron_idea.model import build_model, transformer_config


def open_batches(
    config: Config, groups: ProcessGroups, split: Literal["train", "validation"], num_samples: int
) -> Batches:
    """This rank's micro-batches of one side of a run's data."""
    return Batches(
        config.data.train if split == "train" else config.data.validation,
        load_tokenizer(config.data.tokenizer),
        split=split,
        model_vocab_size=config.model.vocab_size,
        seq_length=config.training.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        num_samples=num_samples,
        seed=config.training.seed,
        cache_dir=cache_dir(config),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        device=groups.device,
    )


def validation_batches(config: Config, groups: ProcessGroups) -> Batches | None:
    """The fixed held-out samples of a run; None when ``data.validation`` is empty."""
    if not config.data.validation:
        return None
    return open_batches(config, groups, "validation", config.evaluation.num_samples)


def cache_dir(config: Config) -> Path:
    """Where shuffled sample indices are kept."""
    return Path(config.data.cache_dir or Path(config.run_dir) / "data_cache")


def _forward(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def add_up(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = (losses.float() * batch["loss_mask"]).sum()
        return total, {"sums": torch.stack([total.detach(), batch["loss_mask"].sum()]).double()}

    return losses, add_up


@torch.no_grad()
def held_out_loss(
    chunks: Sequence[torch.nn.Module], batches: Batches, groups: ProcessGroups
) -> tuple[float, int]:
    """Mean loss in nats per token over the held-out samples, and how many tokens those are.

    Collective over all ranks and equal on all of them.
    """
    for chunk in chunks:
        chunk.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=groups.device)
    for begin in range(0, batches.num_samples, batches.global_batch_size):
        iterators = [batches.step(begin) for _ in chunks]
        results = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=batches.num_microbatches,
            seq_length=batches.seq_length,
            micro_batch_size=batches.micro_batch_size,
            forward_only=True,
        )
        if groups.is_last_stage and groups.tp.rank() == 0:
            sums += sum(result["sums"] for result in results)
    dist.all_reduce(sums)
    for chunk in chunks:
        chunk.train()
    total, tokens = sums.tolist()
    return total / tokens, int(tokens)


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = ()) -> dict[str, float | int]:
    """Held-out loss of a checkpoint folder, or of the latest checkpoint of a run folder.

    Takes the checkpoint's own configuration with ``overrides``, by default in one process; under
    torchrun the overrides say how it is split.

    Returns: ``loss`` in nats per token, ``perplexity``, ``tokens``; ``bits_per_byte`` when the
        dataset knows the size of its text.
    Raises: ConfigError without a checkpoint or without held-out data.
    """
    found = checkpoint.resolve(path)
    world_size = world_size_from_environment()
    defaults = checkpoint.ONE_PROCESS if world_size == 1 else ()
    config = configuration.load(found / "config.yaml", [*defaults, *overrides])
    if world_size == 1:
        config = configuration.replace(
            config, training={"global_batch_size": config.training.micro_batch_size}
        )
    validate(config, world_size)
    if not config.data.validation:
        raise ConfigError("data.validation is empty: there is nothing to measure on")
    state = checkpoint.read_state(found, config.parallel.tensor_model_parallel_size)
    groups = start_distributed(config.parallel, config.training.seed)
    try:
        storage.verify(found, groups)
        batches = validation_batches(config, groups)
        assert batches is not None
        chunks = build_model(config, transformer_config(config), state.widths, groups)
        checkpoint.load_weights(chunks, found, groups)
        loss, tokens = held_out_loss(chunks, batches, groups)
    finally:
        stop_distributed()
    result: dict[str, float | int] = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    if batches.bytes_per_token:
        result["bits_per_byte"] = loss / math.log(2) / batches.bytes_per_token
    return result
