"""Pruning inside of somebody else's training loop on megatron-core.

    pruning = Pruning(config, chunks, optimizer, groups, build)
    while tokens < config.schedule.total_tokens:
        tokens += config.batch_tokens
        with pruning.watched(tokens):
            ...  # forward and backward passes; gradients reduced: finalize_model_grads
        pruning.observe(tokens)
        optimizer.step()
        if pruning.after_step(tokens):
            chunks, optimizer = pruning.chunks, pruning.optimizer

The loop, the data, the learning rate and checkpoints stay the host's. docs/library.md has the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_idea.config import METHODS, Config, ParallelConfig, validate_pruning
from megatron_idea.engine.host import (
    Builder,
    Chunks,
    HostError,
    HostTrainable,
    groups_of,
    layout_of,
)
from megatron_idea.engine.passes import evaluating
from megatron_idea.prune.compact import CompactReport
from megatron_idea.prune.measures import Sums
from megatron_idea.prune.probe import Probe
from megatron_idea.prune.pruner import Pruner
from megatron_idea.prune.scores import Measured
from megatron_idea.prune.strategy import Activation
from megatron_idea.shape import Shape

__all__ = ["Builder", "HostError", "Pruning"]

SECTIONS = ("model", "training", "schedule", "prune")
"""What is read of a configuration; the rest belongs to the host."""

Losses = Callable[[], Sequence[Tensor]]


class Pruning:
    """Measures a host's model as it trains, removes units as the schedule says, and cuts them out.

    Every method but the properties is collective over all ranks, and called on all of them with the
    same ``tokens``: those that are consumed once the step is done, in all data-parallel ranks.
    """

    report: CompactReport | None = None
    """What the last rebuild did: counts before and after, seconds, change of the loss."""

    def __init__(
        self,
        config: Config,
        chunks: Chunks,
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        build: Builder,
        losses: Losses | None = None,
    ) -> None:
        """Take over the enlarged model; nothing is changed yet.

        Args:
            config: its sections ``model`` (sizes of the host's GPTModel), ``training``
                (``seq_length``, ``global_batch_size``, ``precision``, ``seed``), ``schedule``
                (phases and removal; not the learning rate) and ``prune`` count.
            chunks: GPTModel in DistributedDataParallel, one, or as many as virtual stages.
            optimizer: as ``get_megatron_optimizer`` returns it.
            groups: of all ranks of the job.
            build: makes chunks and optimizer of a smaller shape, by the code that has made these.
            losses: runs the last step's micro-batches through ``self.chunks``, forward only, and
                returns the mean loss of each on the last pipeline stage, elsewhere nothing. Called
                with dropout off, when layers are chosen by trial (``prune.layer_candidates``).
        Raises: HostError or ConfigError, on every rank, for what cannot be pruned.
        """
        self._groups = groups_of(groups)
        self.config = _accepted(config, layout_of(chunks, self._groups))
        if losses is None and self._needs_losses():
            raise HostError(
                "prune.target.num_layers: which layer goes is tried out, for which `losses` is "
                "needed; set prune.layer_candidates=0 to let scores alone decide"
            )
        self._losses = losses

        shape, built = Shape.full(config.model), (chunks, optimizer)
        self._trainable = HostTrainable.of(self.config.sections, self._groups, shape, built, build)
        self._pruner = Pruner(self.config, self._trainable)
        self._seen: tuple[int, Mapping[Activation, Sums]] | None = None
        self._observed: tuple[int, dict[Measured, Sums] | None] | None = None

    def _needs_losses(self) -> bool:
        prune = self.config.prune
        return "num_layers" in self.config.goals and prune.layer_candidates > 1

    @property
    def chunks(self) -> list[DistributedDataParallel]:
        """The model that is trained now."""
        return self._trainable.chunks

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Its optimizer, as the host's code has built it."""
        return self._trainable.given

    @property
    def shape(self) -> Shape:
        """How many units of each kind the model stores."""
        return self._trainable.shape

    @property
    def live(self) -> dict[str, list[int]]:
        """Count the units that are not zero, by axis: of each layer of the enlarged model."""
        return self._pruner.live(self._pruner.alive)

    @contextlib.contextmanager
    def watched(self, tokens: int) -> Iterator[None]:
        """Look at activations of the block's passes; at nothing where the method wants none."""
        with self._pruner.watched(self._trainable, tokens) as seen:
            yield
        self._seen = tokens, seen

    def observe(self, tokens: int) -> None:
        """Measure the step's gradients: reduced over data-parallel ranks, before the optimizer.

        Raises: HostError when the method needs activations, and the passes were not ``watched``.
        """
        seen, scores = self._seen, self._pruner.scores
        assert scores is not None
        if scores.activations and (seen is None or seen[0] != tokens):
            raise HostError(
                f"prune.strategy={self.config.prune.strategy} looks at activations: run the passes "
                f"of the step that ends at {tokens:,} tokens in `with pruning.watched({tokens}):`"
            )
        observed = self._pruner.observe(self._trainable, tokens, seen[1] if seen else None)
        self._seen, self._observed = None, (tokens, observed)

    def after_step(self, tokens: int, taken: bool = True) -> bool:
        """Remove what is due by now.

        Args:
            taken: whether the optimizer has stepped; after a step that it has skipped nothing is
                counted and nothing removed.
        Returns: whether the model was rebuilt: ``chunks`` and ``optimizer`` are new ones then, and
            the old ones are empty.
        Raises: HostError when the step was not observed, or ``build`` has made something else than
            it was asked for. CompactionError when the new model is not the old one: go back to a
            checkpoint.
        """
        observed, self._observed = self._observed, None
        if observed is None or observed[0] != tokens:
            raise HostError(
                f"the step that ends at {tokens:,} tokens was not observed: call observe({tokens}) "
                "once gradients are reduced, before the optimizer's step"
            )
        if not taken:
            return False
        self._pruner.record(observed[1])
        probe = None if self._losses is None else _HostProbe(self._trainable, self._losses)
        plan = self._pruner.plan(self._trainable, tokens, probe)
        if plan is None:
            return False
        compacts = plan.shape != self.shape
        self._pruner.silence(self._trainable, plan)
        if compacts:
            self.report = self._pruner.compact(self._trainable, plan)
        return compacts

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep of the pruning, equal on every rank.

        Numbers, lists and CPU tensors; it can be read in any layout. Weights and moments are not in
        it.
        """
        tensors = self._pruner.state(self._trainable)
        return {
            "shape": self.shape.as_dict(),
            "pending_steps": self._pruner.pending_steps,
            "memory": self._pruner.memory.tolist(),
            "tensors": {name: value.cpu() for name, value in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from what ``state_dict`` has returned. The host's weights are loaded afterwards.

        Returns: whether the model was rebuilt, in the shape that it was saved in.
        Raises: HostError for the state of another model or method; nothing was changed then.
        """
        full, device = Shape.full(self.config.model), self._groups.device
        tensors = state["tensors"]
        blank = self._pruner.blank_state(due=False)
        sizes = {name: value.shape for name, value in blank.items() if "stored." not in name}
        shape = Shape.from_dict(state["shape"])
        of_this_run = {name: tensors[name].shape for name in sizes if name in tensors} == sizes
        if not of_this_run or tensors.keys() != blank.keys() or not shape.is_within(full):
            raise HostError("the state is of another model, or of another prune.strategy")
        rebuilds = shape != self.shape
        if rebuilds:
            vars(self._trainable).update(vars(self._trainable.rebuilt(shape)))
        here = {name: value.to(device) for name, value in tensors.items()}
        self._pruner.load_state(self._trainable, here, state["pending_steps"], state["memory"])
        return rebuilds


class _HostProbe(Probe):
    """A look at the model through the host's own passes."""

    def __init__(self, trainable: HostTrainable, losses: Losses) -> None:
        self._trainable = trainable
        self._losses = losses

    def _pass(self) -> list[Tensor]:
        with evaluating(self._trainable.chunks):
            return list(self._losses())


def _accepted(config: Config, parallel: ParallelConfig) -> Config:
    """Return the configuration in the host's layout. Raises: HostError, ConfigError."""
    plain = Config()
    for name in (field.name for field in dataclasses.fields(Config)):
        if name not in SECTIONS and getattr(config, name) != getattr(plain, name):
            raise HostError(
                f"{name} means nothing here, where the loop is yours: leave it out; "
                f"{', '.join(SECTIONS)} are read"
            )
    prune, strategy = config.prune, config.prune.strategy
    if strategy == "none":
        raise HostError("prune.strategy is none: there is nothing to do")
    if METHODS[strategy].finds_shape:
        raise HostError(
            f"prune.strategy={strategy} gives layers different sizes, which a GPTModel of one "
            "TransformerConfig has not; the methods that follow prune.target do not"
        )
    if prune.scope != "layer":
        raise HostError(
            f"prune.scope={prune.scope} gives layers different sizes, which a GPTModel of one "
            "TransformerConfig has not: set prune.scope=layer"
        )
    if prune.target.hidden_size is not None:
        raise HostError(
            "prune.target.hidden_size: a norm divides by the number of channels that it stores, so "
            "the model would change with the cut; that takes norms of our own: megatron-idea train"
        )
    if prune.calibration_steps:
        raise HostError(
            f"prune.calibration_steps={prune.calibration_steps} draws batches from the training "
            "data, which is yours: scores come from your steps, set it to 0"
        )
    accepted = dataclasses.replace(config, parallel=parallel)
    validate_pruning(accepted)
    return accepted
