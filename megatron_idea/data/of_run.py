"""The data of a run, as its configuration names it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_idea.config import Config
from megatron_idea.data.batches import Batches
from megatron_idea.data.tokenizer import Tokenizer
from megatron_idea.engine.distributed import ProcessGroups


def open_batches(
    config: Config,
    groups: ProcessGroups,
    tokenizer: Tokenizer,
    split: Literal["train", "validation"],
    num_samples: int,
) -> Batches:
    """This rank's micro-batches of one side of a run's data."""
    return Batches(
        config.data.train if split == "train" else config.data.validation,
        tokenizer,
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


def validation_batches(
    config: Config, groups: ProcessGroups, tokenizer: Tokenizer
) -> Batches | None:
    """The fixed held-out samples of a run; None when ``data.validation`` is empty."""
    if not config.data.validation:
        return None
    return open_batches(config, groups, tokenizer, "validation", config.evaluation.num_samples)


def cache_dir(config: Config) -> Path:
    """Where shuffled sample indices are kept."""
    return Path(config.data.cache_dir or Path(config.run_dir) / "data_cache")
