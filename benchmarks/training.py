"""What the engine, scores and masks, and a compaction cost per training step.

    python -W ignore benchmarks/training.py [--rounds 40] [--config CONFIG]

Ratios, each from functions that ran in alternation in this one process, one thread: the step of
this path to that of a plain PyTorch module of the same shape; the step with scores, plans and
zeros to the step without, of neurons alone and of all four axes; the step after a live compaction
to that of a model that was built at the final width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_idea import config as configuration
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, PruneTarget
from megatron_idea.course import target_shape
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import ProcessGroups, joined
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.prune.pruner import Pruner
from megatron_idea.schedule import phase_ends
from megatron_idea.shape import Shape

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from measure import alternate, ratio, result_file, write
from plain_gpt import PlainGPT

GOALS = {
    "engine_to_plain": 1.10,
    "pruning_to_none": 1.02,
    "pruning_all_axes_to_none": 1.05,
    "compacted_to_built": 1.01,
}


def all_axes(config: Config) -> Config:
    """The same run with half of the groups, channels and layers going, too."""
    model, neurons = config.model, config.prune.target.ffn_hidden_size
    half = PruneTarget(
        neurons, model.num_query_groups // 2, model.hidden_size // 2, model.num_layers // 2
    )
    return configuration.replace(config, prune={"target": half, "channel_alignment": 8})


class FixedBatch:
    """The same micro-batch for ever: the data loader is not what is measured."""

    num_microbatches = 1

    def __init__(self, config: Config, device: torch.device) -> None:
        training = config.training
        self.micro_batch_size, self.seq_length = training.micro_batch_size, training.seq_length
        generator = torch.Generator().manual_seed(0)
        shape = (training.micro_batch_size, training.seq_length + 1)
        text = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        batch = {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "position_ids": torch.arange(training.seq_length).expand(shape[0], -1),
            "loss_mask": torch.ones(shape[0], training.seq_length),
        }
        self.batch = {name: t.to(device) for name, t in batch.items()}

    def step(self, _consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        yield self.batch


class Silent:
    """Stands for the run's log, its progress line and its signals."""

    received = failure = None

    def event(self, kind: str, **fields: object) -> None:
        pass

    def write(self, record: object) -> None:
        pass

    update = scores = write


def stepper(
    config: Config,
    trainable: Trainable,
    data: FixedBatch,
    at_tokens: int,
    advance: bool,
    teacher: Teacher | None = None,
) -> Callable[[], None]:
    """One optimizer step of the real loop; ``advance`` lets the tokens, and so the plans, go on."""
    from megatron_idea.train import Run, step

    byte, pruner = load_tokenizer("byte"), Pruner(config, trainable)
    groups = trainable.groups
    run = Run(config, config, groups, trainable, pruner, data, None, byte, *[Silent()] * 3)
    run.teacher = teacher
    state = TrainState.fresh(config)
    state.consumed_tokens = at_tokens

    def call() -> None:
        step(run, state)
        if not advance:
            state.consumed_tokens = at_tokens

    return call


def plain_stepper(config: Config, data: FixedBatch) -> Callable[[], None]:
    """The same step in plain PyTorch: zero, forward, backward, clip, fused AdamW."""
    settings = config.optimizer
    torch.manual_seed(config.training.seed)
    model = PlainGPT(config.model, config.model.ffn_hidden_size, config.training.seq_length)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.schedule.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def call() -> None:
        optimizer.zero_grad()
        loss = model(data.batch["tokens"], data.batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        loss.item()

    return call


def measure(config: Config, groups: ProcessGroups, rounds: int) -> dict[str, dict[str, float]]:
    data = FixedBatch(config, groups.device)
    ends = phase_ends(config.schedule)
    results = {}

    full = Shape.full(config.model)
    engine = assemble(config.sections, groups, full, initialize=True)
    calls = {
        "engine": stepper(config, engine, data, 0, False),
        "plain": plain_stepper(config, data),
    }
    seconds = alternate(calls, rounds)
    results["engine_to_plain"] = ratio(seconds["engine"], seconds["plain"])

    # Zeros only, in the middle of a prune phase of very many steps: every step observes, folds,
    # plans and zeroes, and the widths stay what they are.
    middle = (ends["enlarged"] + ends["prune"]) // 2
    for name, case in (
        ("pruning_to_none", config),
        ("pruning_all_axes_to_none", all_axes(config)),
    ):
        silent = configuration.replace(case, prune={"compact": False})
        pruning = assemble(config.sections, groups, full, initialize=True)
        # The first steps remove what is due at once by then, layers among it.
        prune = stepper(silent, pruning, data, middle, True)
        for _ in range(3):
            prune()
        calls = {"pruning": prune, "none": stepper(config, engine, data, 0, False)}
        seconds = alternate(calls, rounds)
        results[name] = ratio(seconds["pruning"], seconds["none"])

    compacted = assemble(config.sections, groups, full, initialize=True)
    shrink = stepper(config, compacted, data, ends["prune"] - config.batch_tokens, True)
    shrink()
    target = target_shape(config)
    assert compacted.shape == target, compacted.shape
    built = assemble(config.sections, groups, target, initialize=True)
    calls = {
        "compacted": stepper(config, compacted, data, ends["recover"] - config.batch_tokens, False),
        "built": stepper(config, built, data, 0, False),
    }
    seconds = alternate(calls, rounds)
    results["compacted_to_built"] = ratio(seconds["compacted"], seconds["built"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--config", default="examples/configs/quickstart.yaml")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    config = configuration.load(
        arguments.config,
        ["parallel.tensor_model_parallel_size=1", "schedule.total_tokens=1e9"],
    )
    with joined(config.parallel, config.training.seed) as groups:
        measured = measure(config, groups, arguments.rounds)
        write(result_file("training"), measured, GOALS)


if __name__ == "__main__":
    main()
