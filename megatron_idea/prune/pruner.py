"""Observe, plan, silence, compact: the pruning of a run, driven by consumed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_idea.config import Config
from megatron_idea.engine.distributed import assert_same_on_all_ranks, on_device
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.compact import CompactReport, compact
from megatron_idea.prune.distribution import Decision, Distribution
from megatron_idea.prune.idea import IdeaPrune
from megatron_idea.prune.magnitude import Magnitude
from megatron_idea.prune.measures import Sums, unit_sizes
from megatron_idea.prune.plan import (
    Plan,
    StoredUnits,
    Units,
    first_units,
    live_counts,
    misfit,
    present,
)
from megatron_idea.prune.random import RandomPrune
from megatron_idea.prune.scores import Scores
from megatron_idea.prune.silence import silence
from megatron_idea.prune.strategy import Counts, Goal, Measure, Stats, Strategy, select
from megatron_idea.prune.units import on_this_rank
from megatron_idea.schedule import gathers_scores, removal_window, removed
from megatron_idea.shape import AXES, LAYER_AXES, Shape, due_counts


def build_strategy(config: Config) -> Strategy | None:
    """Build the method that ``prune.strategy`` names; None for plain training."""
    goals = {
        "ffn_hidden_size": Goal(
            config.model.ffn_hidden_size, config.target_ffn_hidden_size, config.final_ffn_multiple
        )
    }
    if config.prune.strategy == "none":
        return None
    if config.prune.strategy == "random":
        return RandomPrune(config.prune, goals, config.training.seed)
    if config.prune.strategy == "magnitude":
        return Magnitude(config.prune, goals)
    return IdeaPrune(config.prune, goals)


class Pruner:
    """Measures a model's units and says which live on.

    Nothing here counts steps or stores a phase: what is due follows from the consumed tokens and
    from who is alive. All of its state is equal on every rank, but for the sums of the steps since
    the last plan, which each rank has of its own shards.
    """

    alive: Units
    """Who is alive. Kept here alone; what the model's layers know of it is derived."""
    stored: StoredUnits
    """Who is in memory, and where."""
    memory: Tensor
    """What the strategy wants to be told next time."""

    def __init__(self, config: Config, trainable: Trainable) -> None:
        """Begin with everything alive; ``load_state`` says otherwise."""
        self.config = config
        self.strategy = build_strategy(config)
        self.full = Shape.full(config.model)
        self.stored = first_units(trainable.shape)
        self.alive = present(self.stored, trainable.shape, self.full)
        self.memory = torch.empty(0)
        self.scores = (
            Scores(self.strategy, self.full, config.prune.history, trainable.groups.device)
            if self.strategy is not None
            else None
        )
        self.distribution = Distribution(config.schedule)
        self.decision: Decision | None = None

    @property
    def live(self) -> dict[str, list[int]]:
        """Count the live units of every layer."""
        return {axis: live_counts(self.alive[axis]) for axis in LAYER_AXES}

    def observe(self, trainable: Trainable, tokens: int) -> dict[Measure, Sums] | None:
        """Measure this step's gradients; None outside the prune phase.

        Call after gradients are reduced and before the optimizer clips and steps.
        """
        if self.scores is None or not gathers_scores(self.config.schedule, tokens):
            return None
        return self.scores.observe(trainable)

    def record(self, observed: dict[Measure, Sums] | None) -> None:
        """Let an observation count: the step that it comes from was taken."""
        if observed is not None:
            assert self.scores is not None
            self.scores.record(observed)

    def plan(self, trainable: Trainable, tokens: int, pausing: bool = False) -> Plan | None:
        """Say what the consumed tokens ask for; None when that is what the model is already.

        ``pausing``: nothing is removed, until all must be. Collective over all ranks when something
        is due, and every rank decides alike.
        """
        if self.scores is None or not self._plan_due(tokens):
            return None
        self.scores.fold(trainable, self.stored)
        final = tokens >= removal_window(self.config.schedule)[1]
        if pausing and not final:
            return None
        alive, memory = self._choose(trainable, removed(self.config.schedule, tokens))
        shape = self.due_shape(trainable.shape, alive, final)
        if shape == trainable.shape and alive is self.alive:
            return None
        return Plan.of(alive, shape, memory)

    def _plan_due(self, tokens: int) -> bool:
        """Every ``mask_interval_steps`` steps, and whenever the prune phase is over."""
        interval = self.config.prune.mask_interval_steps
        step = -(-tokens // self.config.batch_tokens)
        return tokens >= removal_window(self.config.schedule)[1] or step % interval == 0

    def _choose(self, trainable: Trainable, share: float) -> tuple[Units, Tensor]:
        """Ask the strategy who lives on when ``share`` of the removal is due, and what to keep."""
        strategy = self.strategy
        assert strategy is not None
        if not strategy.is_due(self.alive, share):
            return self.alive, self.memory
        importance = strategy.importance(self.stats(trainable))
        counts, memory = strategy.budget(importance, self.alive, share, self.memory)
        return self.keep(importance, counts), memory

    def stats(self, trainable: Trainable) -> Stats:
        """Return what is known of all units now; collective over all ranks."""
        assert self.scores is not None and self.strategy is not None
        sizes = unit_sizes(self.config.model, trainable.shape, self.strategy.axes)
        device = trainable.groups.device
        return Stats(
            self.scores.now(trainable, self.stored),
            {axis: on_device(size, device) for axis, size in sizes.items()},
            self.alive,
        )

    def keep(self, importance: Units, counts: Counts) -> Units:
        """Choose the most important units; ``alive`` itself when nobody goes."""
        chosen = {
            axis: select(importance[axis], self.alive[axis], list(counts[axis])) for axis in counts
        }
        for axis, kept in chosen.items():  # recorded for axes that a picture can show
            self.decision = Decision(importance[axis], self.alive[axis], kept)
        if all(torch.equal(kept, self.alive[axis]) for axis, kept in chosen.items()):
            return self.alive
        return {**self.alive, **chosen}

    def due_shape(self, shape: Shape, alive: Units, final: bool) -> Shape:
        """Return the shape to store from now on: as it is, or smaller when a block can be shed."""
        config, axis = self.config, "ffn_hidden_size"
        if not config.prune.compact:
            return shape
        counts = due_counts(
            shape.counts(axis),
            live_counts(alive[axis]),
            config.ffn_multiple,
            config.compaction_block,
            final,
        )
        return shape.with_counts(axis, counts)

    def score_record(self, tokens: int) -> dict[str, Any] | None:
        """Describe the last plan's importances, once a plan and at a bounded rate."""
        decision, self.decision = self.decision, None
        return self.distribution.record(decision, tokens) if decision else None

    def silence(self, trainable: Trainable, plan: Plan) -> None:
        """Zero what the plan removes.

        Raises: RuntimeError when the plan differs between ranks; nothing was changed then.
        """
        assert_same_on_all_ranks(plan.digest.encode(), "the pruning plan", trainable.groups)
        gone = {axis: self.alive[axis] & ~plan.alive[axis] for axis in AXES}
        silence(trainable, on_this_rank(gone, trainable, self.stored))
        self.alive, self.memory = plan.alive, plan.memory
        self.tell_layers(trainable)

    def compact(self, trainable: Trainable, plan: Plan) -> CompactReport:
        """Cut zeros out of the live model, down to the plan's shape; ``silence`` comes first."""
        assert self.pending_steps == 0, "sums over units where they are now must be folded first"
        report, self.stored = compact(trainable, plan, self.stored, self.config.prune.placement)
        self.tell_layers(trainable)
        return report

    def tell_layers(self, trainable: Trainable) -> None:
        """Derive the masks of this rank's FFNs from who is alive."""
        alive = on_this_rank(self.alive, trainable, self.stored)["ffn_hidden_size"]
        for layer, mlp in trainable.mlps:
            mlp.set_alive(alive[layer])

    @property
    def pending_steps(self) -> int:
        """Steps that were measured since the last plan."""
        return self.scores.pending_steps if self.scores is not None else 0

    def state(self, trainable: Trainable) -> dict[str, Tensor]:
        """Return all of a pruner that is a tensor, whatever the layout; collective."""
        scores = self.scores.state(trainable, self.stored) if self.scores is not None else {}
        return self._units() | {f"scores.{name}": value for name, value in scores.items()}

    def blank_state(self, trainable: Trainable) -> dict[str, Tensor]:
        """Return tensors of the same names and sizes, to be read into."""
        scores = self.scores.blank_state() if self.scores is not None else {}
        return self._units() | {f"scores.{name}": value for name, value in scores.items()}

    def _units(self) -> dict[str, Tensor]:
        alive = {f"alive.{axis}": self.alive[axis].clone() for axis in AXES}
        return alive | {f"stored.{axis}": torch.cat(self.stored[axis]) for axis in AXES}

    def unfit(self, trainable: Trainable, tensors: Mapping[str, Tensor]) -> str:
        """Say in what way units of a checkpoint are none of this model's; empty if they are."""
        found = (
            misfit(
                axis,
                tensors[f"alive.{axis}"].cpu(),
                tensors[f"stored.{axis}"].cpu(),
                trainable.shape,
                self.full,
            )
            for axis in AXES
        )
        return next(filter(None, found), "")

    def load_state(
        self,
        trainable: Trainable,
        tensors: Mapping[str, Tensor],
        pending_steps: int,
        memory: Sequence[float],
    ) -> None:
        """Take over what ``state`` returned, in the present layout."""
        self.alive = {axis: tensors[f"alive.{axis}"].cpu() for axis in AXES}
        self.stored = self._split(trainable.shape, tensors)
        self.memory = torch.tensor(memory)
        if self.scores is not None:
            of_scores = {
                name.removeprefix("scores."): value
                for name, value in tensors.items()
                if name.startswith("scores.")
            }
            self.scores.load_state(of_scores, pending_steps, trainable, self.stored)
        self.tell_layers(trainable)

    def _split(self, shape: Shape, tensors: Mapping[str, Tensor]) -> StoredUnits:
        return {
            axis: tensors[f"stored.{axis}"].cpu().split(list(shape.counts(axis))) for axis in AXES
        }
