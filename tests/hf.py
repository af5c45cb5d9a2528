"""What tests of export, import and generation share: a trained run, and logits of both kinds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import live_run, small

from megatron_idea import checkpoint
from megatron_idea.config import Config
from megatron_idea.testing import Workers

# Twelve steps of 96 tokens; neurons go in steps 5 to 8.
SOON = {
    "total_tokens": 12 * 96, "lr": 1e-2, "enlarged_fraction": 0.25, "prune_fraction": 5 / 12,
    "recover_fraction": 1 / 3, "prune_warmup_fraction": 0.2,
}  # fmt: skip


def save_job(rendezvous: str, config: Config, steps: int) -> list[int]:
    """Train some steps on random tokens and save; the live neurons of every layer."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.prune.plan import live_by_axis
    from megatron_idea.train import step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = live_run(groups, config)
        for _ in range(steps):
            step(run, state)
        checkpoint.save(config, run.trainable, run.pruner, state)
        return live_by_axis(run.pruner.alive)["ffn_hidden_size"]
    finally:
        stop_distributed()


def logits_job(rendezvous: str, path: str, tokens: Any) -> Any:
    """Our own model's logits, in one process."""
    from megatron_idea.evaluation.generate import open_model

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    with open_model(Path(path)) as (forward, _):
        return forward(torch.from_numpy(tokens)).float().numpy()


def some_tokens(vocab_size: int = 264) -> Any:
    return np.random.default_rng(0).integers(vocab_size, size=(3, 8))


def ours(workers: Workers, path: Path | str) -> torch.Tensor:
    (logits,) = workers.run(logits_job, 1, str(path), some_tokens())
    return torch.from_numpy(logits)


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.from_numpy(some_tokens())).logits.float(), model


def trained(
    workers: Workers, run_dir: Path, world_size: int, steps: int, **sections: Any
) -> tuple[Config, list[int]]:
    # Weights large enough that attention, and with it RoPE and QK norm, moves the logits.
    model = {"vocab_size": 264, "init_method_std": 0.3} | sections.pop("model", {})
    prune = {"target": {"ffn_hidden_size": 12}, "compact": False} | sections.pop("prune", {})
    config = small(run_dir=str(run_dir), model=model, prune=prune, schedule=SOON, **sections)
    live = workers.run(save_job, world_size, config, steps)[0]
    return config, live


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
