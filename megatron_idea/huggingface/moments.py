"""AdamW's state under Hugging Face names, for another engine to go on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, ConfigError
from megatron_idea.huggingface import names as huggingface
from megatron_idea.records.readable import megabytes
from megatron_idea.schedule import learning_rate
from megatron_idea.shape import Shape

if TYPE_CHECKING:
    from megatron_idea.huggingface.export import Shards, Weights

FOLDER = "optimizer"
"""In an exported folder. Not beside the weights: servers read every ``*.safetensors`` there."""
MAINS = "optimizer.main."
POWERS = {"optimizer.exp_avg.": -1, "optimizer.exp_avg_sq.": -2}
"""Moments, by what stands before a parameter's name in a checkpoint. A gradient's is its power:
with a weight c times as large, a gradient is 1 / c of what it was."""


def check(state: TrainState, path: Path) -> None:
    """Raises: ConfigError for a checkpoint without moments."""
    if not state.has_moments:
        raise ConfigError(
            f"{path} has no optimizer state before the first step: export it without --optimizer"
        )


def write(weights: Weights, config: Config, state: TrainState, writer: Shards) -> str:
    """Write AdamW's state beside its settings, ``optimizer.json``.

    ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, fp32, of the shapes of the exported ``weights`` and
    with their rows, zeros where those are padding. Where weights are bf16 also ``main.NAME``, what
    they were rounded from: the fp32 main weights, or an fp32 run's weights.

    Returns: a line that says what was written.
    """
    sources = {source.removeprefix("optimizer."): source for source in POWERS}
    if weights.dtype == torch.bfloat16:
        sources["main."] = MAINS if config.training.precision == "bf16" else ""
    for kind, source in sources.items():
        for name, tensor in dataclasses.replace(weights, of=source, dtype=torch.float32).in_order():
            writer.add(kind + name, tensor)
    writer.close()
    settings = json.dumps(_settings(config, state, weights.shape), indent=2)
    (writer.folder / "optimizer.json").write_text(settings + "\n")
    return f"{FOLDER}/: AdamW's state after {state.adam_step:,} steps, {megabytes(writer.bytes)}"


def _settings(config: Config, state: TrainState, shape: Shape) -> dict[str, Any]:
    """AdamW's settings, and torch's parameter groups; ``lr`` is that of the last step."""
    settings, model = config.optimizer, config.model
    scale = settings.matrix_scale(model.hidden_size)
    groups: dict[tuple[float, float], list[str]] = {}
    for name, size in huggingface.hf_shapes(model, shape):
        lr_mult = scale if len(size) > 1 and name.startswith("model.layers.") else 1.0
        decay = settings.weight_decay / lr_mult if len(size) > 1 else 0.0
        groups.setdefault((lr_mult, decay), []).append(name)
    return {
        "step": state.adam_step,
        "consumed_tokens": state.consumed_tokens,
        "skipped_samples": state.skipped_samples,
        "betas": [settings.adam_beta1, settings.adam_beta2],
        "eps": settings.adam_eps,
        "clip_grad": settings.clip_grad,
        "lr": learning_rate(config.schedule, state.consumed_tokens),
        "groups": [
            {"lr_mult": lr_mult, "weight_decay": decay, "names": of_group}
            for (lr_mult, decay), of_group in groups.items()
        ],
    }
