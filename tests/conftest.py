"""What several test files share: worker processes, a small indexed dataset, a small config."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_idea import config as configuration
from megatron_idea.config import Config

if hasattr(os, "SCHED_BATCH"):  # as engine.distributed.let_threads_finish, for all that tests start
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Those that take longest, in few tests: begun last, one of them would be all that runs at the end.
FIRST = (
    "slurm", "quickstart", "faults", "first_hour", "compare_jobs", "kernels_triton", "cuda_path",
    "stop", "train",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    gc.freeze()  # tests and what they import stay: collections look at what a test makes


def pytest_unconfigure() -> None:
    gc.unfreeze()  # objects that outlive the interpreter make bindings report leaks at exit


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Processes that run functions in parallel: ``workers.run(function, world_size, ...)``."""
    from megatron_idea.testing import Workers

    pool = Workers(tmp_path_factory.mktemp("rendezvous"), forked=True)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte-level dataset: ``_train`` and ``_heldout`` follow it.

    It never changes: tolerances are measured on it.
    """
    from megatron_idea.data.tokenizer import load_tokenizer
    from megatron_idea.data.tokenizing import tokenize

    folder = tmp_path_factory.mktemp("dataset")
    draw, words = random.Random(0), ["the", "gate", "opens", "and", "an", "old", "neuron", "leaves"]
    for number in range(24):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=600)))
    tokenize(sorted(folder.glob("*.txt")), folder / "text", load_tokenizer("byte"), held_out=0.25)
    return folder / "text"


@pytest.fixture()
def tiny(dataset: Path, tmp_path: Path) -> Config:
    """A whole run of 24 steps: 2 layers, FFN 64 -> 24, pruned in steps 7 to 16."""
    return configuration.from_dict(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {
                "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64,
                "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
                "vocab_size": 264, "qk_layernorm": True,
            },
            "data": {
                "train": [{"prefix": f"{dataset}_train"}],
                "validation": [{"prefix": f"{dataset}_heldout"}],
                "cache_dir": str(tmp_path / "cache"),
            },
            "training": {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 4},
            "schedule": {
                "total_tokens": 24 * 128, "lr": 3e-3, "min_lr": 3e-5,
                "enlarged_fraction": 0.25, "prune_fraction": 5 / 12, "recover_fraction": 1 / 3,
                "prune_warmup_fraction": 0.2,
            },
            "prune": {"target": {"ffn_hidden_size": 24}, "alignment": 4, "compaction_block": 8},
            "checkpoint": {"before_compaction": False},
            "evaluation": {"num_samples": 4, "around_compaction": False},
            "logging": {"tensorboard": False, "progress": False},
        }
    )  # fmt: skip


@pytest.fixture()
def tiny_halved(tiny: Config) -> Config:
    """``tiny`` in two micro-batches: one for each of two data-parallel ranks."""
    return configuration.replace(tiny, training={"micro_batch_size": 2})
