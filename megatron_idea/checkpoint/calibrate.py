"""Decide who lives on from passes over some data alone: pruning without training.

Forward and backward, no update: a method that needs no memory of training can prune any model so.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from megatron_idea import config as configuration
from megatron_idea.config import (
    BlendEntry,
    Config,
    ConfigError,
    PruneConfig,
    PruneTarget,
    ScheduleConfig,
    validate_pruning,
)
from megatron_idea.data.batches import Batches
from megatron_idea.data.of_run import open_batches
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.engine.passes import forward_backward
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.activations import watched
from megatron_idea.prune.plan import Plan, Units, live_by_axis, live_layers
from megatron_idea.prune.probe import Probe
from megatron_idea.prune.pruner import Pruner
from megatron_idea.prune.strategy import Counts
from megatron_idea.shape import LAYER_AXES, Shape

ROUND = 0.05
"""Share of the parameters after which scores are measured anew."""


@dataclass(frozen=True)
class Calibration:
    """How to choose what goes, where the checkpoint's own scores do not."""

    strategy: str
    """A value of ``prune.strategy``."""
    data: tuple[str, ...] = ()
    """Prefixes of datasets, in equal parts; empty: the run's own training data."""
    samples: int = 128
    """Sequences, as long as those of training, that are measured at a time."""
    seed: int = 0
    """Of the order in which they are drawn."""


def for_calibration(config: Config, how: Calibration, target: PruneTarget) -> Config:
    """Return ``config`` with another method and target, and a measurement's sequences as the batch.

    The method has the settings of the run if it is the run's own, and its defaults if not.

    Raises: ConfigError for what the method cannot prune.
    """
    if how.samples < 1:
        raise ConfigError(f"--samples is {how.samples}; it must be at least 1")
    if how.strategy == "none":
        raise ConfigError("--strategy none chooses nothing")
    train = [BlendEntry(prefix) for prefix in how.data] or config.data.train
    if not train:
        raise ConfigError("this checkpoint's run names no training data: give --data PREFIX")
    batch = {
        "global_batch_size": how.samples,
        "micro_batch_size": math.gcd(how.samples, config.training.micro_batch_size),
        "seed": how.seed,
    }
    own = config.prune
    if own.strategy != how.strategy:
        own = PruneConfig(
            alignment=own.alignment,
            channel_alignment=own.channel_alignment,
            serve_tensor_model_parallel_size=own.serve_tensor_model_parallel_size,
        )
    prune = dataclasses.replace(
        own, strategy=how.strategy, target=target, order=[], scope="layer", moments="keep",
        ema=0.0, ema_on="history",
    )  # fmt: skip
    # When units would go is for a run: all of it now, whatever its schedule says.
    never = ScheduleConfig(total_tokens=1 << 60)
    config = configuration.replace(
        config, training=batch, data={"train": train}, prune=prune, schedule=never
    )
    validate_pruning(config)
    return config


def choose(
    trainable: Trainable, pruner: Pruner, config: Config, counts: Callable[[Units], Counts] | None
) -> Units:
    """Say who lives on. What goes is zero in ``trainable`` then, and what stays was mended.

    Args:
        trainable: of one process, with moments and the batch of ``config``.
        pruner: knows who is alive and stored.
        config: of ``for_calibration``, with the layout that counts are to be legal for.
        counts: given who is alive, how many stay; None: the target has a number of parameters, and
            the method finds the shape, in rounds of ``ROUND`` of all parameters with new scores.
    """
    chooser = Pruner(config, trainable)
    strategy, scores = chooser.strategy, chooser.scores
    assert strategy is not None and scores is not None
    chooser.alive, chooser.stored = pruner.alive, pruner.stored
    begin, rounds = 0.0, 1
    if counts is None:
        begin, rounds = _rounds(config, trainable.shape, chooser.alive)
    with tempfile.TemporaryDirectory() as cache:
        data = _data(config, cache, trainable, rounds)
        for number in range(rounds):
            samples = number * config.training.global_batch_size
            with watched(trainable, scores.activations) as seen:
                forward_backward(trainable, data, samples)
            scores.record(scores.observe(trainable, seen))
            scores.fold(trainable, chooser.stored)
            importance = strategy.importance(chooser.stats(trainable))
            memory = chooser.memory
            if counts is not None:
                keep = counts(chooser.alive)
            else:
                removed = begin + (1 - begin) * (number + 1) / rounds
                due = dict.fromkeys(strategy.axes, removed)
                if not strategy.is_due(chooser.alive, due):
                    continue
                keep, memory = strategy.budget(importance, chooser.alive, due, memory)
            probe = Probe(trainable, data, samples)
            plan = Plan.of(chooser.keep(importance, keep, probe), trainable.shape, memory)
            chooser.mend(trainable, plan, probe)
            chooser.silence(trainable, plan)
    return chooser.alive


def _data(config: Config, cache: str, trainable: Trainable, rounds: int) -> Batches:
    return open_batches(
        configuration.replace(config, data={"cache_dir": cache}),
        trainable.groups,
        load_tokenizer(config.data.tokenizer),
        "train",
        rounds * config.training.global_batch_size,
    )


def _rounds(config: Config, shape: Shape, alive: Units) -> tuple[float, int]:
    """Return what share of the removal is done already, and how many rounds the rest takes."""
    goal, full = config.parameter_goal, Shape.full(config.model)
    assert goal is not None
    if live_layers(alive) != list(range(full.num_layers)) or not bool(alive["hidden_size"].all()):
        raise ConfigError(
            "--to parameters=N is for models that have all layers and channels of their "
            "configuration yet; give counts, as in --to 384"
        )
    live = shape
    for axis, counts in live_by_axis(alive).items():
        if axis in LAYER_AXES:
            live = live.with_counts(axis, counts)
    now, begin = (one.parameters(config.model).total for one in (live, full))
    if now <= goal:
        raise ConfigError(f"--to parameters is {goal:,}, and there are {now:,}: nothing has to go")
    return (begin - now) / (begin - goal), max(1, math.ceil((now - goal) / (ROUND * now)))
