"""What a pruning method decides. A method is one file with one class that follows this protocol.

A method sees numbers about units and answers with numbers about units. It knows no tensor of the
model, no rank and no optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.engine.distributed import on_device
from megatron_idea.guard import DivergedError
from megatron_idea.prune.plan import Units, live_counts
from megatron_idea.shape import LAYER_AXES, live_count

Counts = Mapping[str, list[int]]
"""Axis -> units to keep: one number for each layer of the enlarged model, or one."""

Removed = Mapping[str, float]
"""Axis -> share of its whole removal that is due by now, in [0, 1]."""


@dataclass(frozen=True)
class Measure:
    """One value per weight, reduced over the weights that a unit has in one matrix."""

    element: str
    """``abs`` |w g|, ``squared`` (w g)^2, ``signed`` w g, ``fisher`` |w g - w^2 v / 2|: from the
    gradients of training steps and v, Adam's second moment before the step, 0 before the first.
    ``weight`` |w|: from the weights as they are when a plan is made."""
    reduction: str
    """``sum``, ``sum_of_squares``, ``max``."""
    per: str = "matrix"
    """``matrix``: one number for each matrix of a unit, as the table of axes has them. ``line``,
    of neurons and KV groups: one for each row that makes activations and each column that reads
    them: gate, up, down; the rows of queries, key and value, the columns of the projection."""

    @property
    def needs_gradients(self) -> bool:
        return self.element != "weight"

    @property
    def needs_second_moment(self) -> bool:
        return self.element == "fisher"

    def axes(self, pruned: Sequence[str]) -> tuple[str, ...]:
        """List what is measured for a method that prunes some axes."""
        return tuple(pruned)


@dataclass(frozen=True)
class Activation:
    """A mean over the tokens, or samples, of training steps, of what passes through a unit.

    A KV group has as many activations as its query heads have channels. A channel has a line for
    each norm of the residual stream, of what comes out of it: two a layer, and the final one.
    """

    statistic: str
    """``mean``, ``mean_square``: of each activation, over tokens. ``sequence_mean``: over samples,
    the square of the mean over a sample's tokens of the activation's size; ``sequence_norm``: over
    samples, the L2 norm over its tokens; both of a KV group with all its activations: the sum of
    their squares, the norm over them, too. ``cosine``: over tokens, between the residual stream
    before and after a layer, whatever is pruned."""
    skip_first: bool = False
    """Leave the first token of each sequence out: it often gathers attention and nothing else."""

    def axes(self, pruned: Sequence[str]) -> tuple[str, ...]:
        """List what is measured for a method that prunes some axes."""
        if self.statistic == "cosine":
            return ("num_layers",)
        return tuple(axis for axis in pruned if axis != "num_layers")


@dataclass(frozen=True)
class Stats:
    """What was measured, reduced over all ranks and equal on all of them."""

    sums: Mapping[Measure | Activation, Units]
    """fp32 [layers, lines, units] for neurons and KV groups, [lines, units] for channels and
    layers, where lines are matrices unless the measure says otherwise; 0 for units that are gone.
    All but measures of weights are moving averages over steps; those of activations are weighted
    means at any time, not drawn to the zeros that a run begins with."""
    sizes: Mapping[str, Tensor]
    """Axis -> fp32 [matrices, 1], for layers [matrices, units]: weights that a unit has in each
    matrix, those of living units of the other axes alone; 0 where the model has no such matrix."""
    alive: Units
    """bool; what a method says of units that are gone is not heard."""


class Strategy(Protocol):
    """A pruning method: pure functions of what was measured and of who is alive."""

    axes: tuple[str, ...]
    """What it prunes."""
    measures: tuple[Measure | Activation, ...]
    """What it has to know; nothing is measured for a method that asks for nothing."""
    layer_candidates: int
    """Of so many layers of the least importance that one goes which the loss misses least; 0: the
    least important one."""
    mend: str
    """What is done to weights between a plan and the zeros that it asks for: ``none``; ``refit``,
    those that stay make up for the inputs that matrices lose; ``rotate``, the residual stream turns
    into its principal directions."""

    def is_due(self, alive: Units, removed: Removed) -> bool:
        """Say whether anything has to go by now; nothing is asked of the method before."""
        ...

    def importance(self, stats: Stats) -> Units:
        """Return one fp32 number per unit of every axis of ``axes``; larger is more important."""
        ...

    def budget(
        self, importance: Units, alive: Units, removed: Removed, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Say how many units live on, never more than are alive.

        Args:
            importance: on the device that it was measured on; ``alive`` is on the CPU.
            memory: what the method returned last time; empty fp32 at the start of a run. It is
                saved with the run.
        Returns: counts for ``axes``, and the new memory.
        """
        ...


def reduce_matrices(sums: Tensor, sizes: Tensor, config: PruneConfig) -> Tensor:
    """Make one number a unit of one number a matrix: [..., matrices, units] to [..., units].

    ``prune.row_reduce`` says what a matrix's number is of its weights, ``prune.matrix_reduce`` how
    matrices are joined. Signed sums take their absolute value here.
    """
    rows = sums.abs()
    if config.row_reduce == "mean":
        rows = rows / sizes.clamp(min=1)
    elif config.row_reduce == "l2":
        rows = rows.sqrt()
    if config.matrix_reduce == "max":
        return rows.amax(dim=-2)
    return rows.mean(dim=-2) if config.matrix_reduce == "mean" else rows.sum(dim=-2)


def reduction(config: PruneConfig) -> str:
    """Return how a measure has to reduce weights for ``reduce_matrices``."""
    return {"l2": "sum_of_squares", "max": "max"}.get(config.row_reduce, "sum")


class Scheduled:
    """What the methods share that leave it to the schedule how many units go, on every axis.

    ``prune.scope``: ``layer`` keeps the same number in every layer; ``global`` ranks all layers of
    an axis against each other, and the mean over layers follows the schedule.
    """

    measures: tuple[Measure | Activation, ...] = ()
    layer_candidates = 0
    mend = "none"

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal]) -> None:
        self.axes = tuple(goals)
        self._config = config
        self._goals = goals

    def is_due(self, alive: Units, removed: Removed) -> bool:
        """Say whether the schedule wants fewer units than live, on any axis."""
        return any(self._wanted(axis, alive, removed) < int(alive[axis].sum()) for axis in removed)

    def budget(
        self, importance: Units, alive: Units, removed: Removed, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Follow the schedule; equal counts in all layers, or one ranking over them."""
        counts = {}
        for axis, goal in self._goals.items():
            live = live_counts(alive[axis])
            if self._config.scope == "global" and axis in LAYER_AXES:
                total = self._wanted(axis, alive, removed)
                counts[axis] = drop_blocks(
                    importance[axis], alive[axis], total, goal.final_multiple
                )
            else:
                due = live_count(goal.full, goal.target, removed[axis])
                counts[axis] = [min(due, n) for n in live]
        return counts, memory

    def _wanted(self, axis: str, alive: Units, removed: Removed) -> int:
        """Count the units that shall live by now, over all layers that are left."""
        goal = self._goals[axis]
        layers = int(alive[axis].any(dim=1).sum()) if axis in LAYER_AXES else 1
        return live_count(goal.full, goal.target, removed[axis]) * layers


class Weighted(Scheduled):
    """A scheduled method whose importance is one number a matrix of a unit, reduced to one."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal], element: str) -> None:
        super().__init__(config, goals)
        self.measures = (Measure(element, reduction(config)),)

    def importance(self, stats: Stats) -> Units:
        """Reduce over a unit's matrices; a maximum comes after averaging, which is linear."""
        sums = stats.sums[self.measures[0]]
        return {a: reduce_matrices(sums[a], stats.sizes[a], self._config) for a in self.axes}


COSINE = Activation("cosine")


def block_influence(stats: Stats) -> Tensor:
    """Return 1 - the mean cosine of the residual stream before and after each layer, [layers].

    Source: ShortGPT (Men et al. 2024, arXiv 2403.03853); ``COSINE`` has to be measured.
    """
    return 1 - stats.sums[COSINE]["num_layers"][0]


def drop_blocks(importance: Tensor, alive: Tensor, total: int, multiple: int) -> list[int]:
    """Rank every layer's tail blocks of ``multiple`` units against each other by their mean.

    Counts stay multiples at every moment and no layer falls below one block, so the last plan lands
    on legal counts whose mean is the target. What a layer has beyond a multiple goes first: after a
    resume with a larger one, and at the full width.
    """
    order = ranked(importance, alive)
    counts = live_counts(alive)
    best_first = pad(importance.gather(1, order), (0, -order.shape[1] % multiple))
    tails = best_first.unfold(1, multiple, multiple).mean(dim=2).tolist()

    def rank(layer: int) -> tuple[bool, float, int]:
        live = counts[layer]
        return live % multiple == 0, tails[layer][(live - 1) // multiple], layer

    while True:
        cuts = [n % multiple or multiple for n in counts]
        spare = sum(counts) - total
        layers = [i for i, n in enumerate(counts) if cuts[i] <= min(spare, n - multiple)]
        if not layers:
            return counts
        layer = min(layers, key=rank)
        counts[layer] -= cuts[layer]


def select(importance: Tensor, alive: Tensor, counts: list[int]) -> Tensor:
    """Keep the most important live units of each row; ties go to the lower number.

    Importance is ranked where it is, and the order is the one thing that the host waits for.

    Args:
        importance: fp32 [layers, units] or [units]; alive: bool, likewise, on the CPU; counts: one
            a row.
    Returns: bool on the CPU, a subset of ``alive``.
    Raises: DivergedError when importance is not finite: a broken gradient must not pick units.
    """
    here = on_device(alive, importance.device)
    finite = (torch.isfinite(importance) | ~here).all()
    order = torch.where(finite, ranked(importance, here), -1).reshape(len(counts), -1).cpu()
    if int(order[0, 0]) < 0:
        raise DivergedError("importance of a live unit is not finite")
    keep = torch.zeros(order.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        keep[row, order[row, :count]] = True
    keep = keep.view_as(alive)
    assert not bool((keep & ~alive).any()), "a removed unit was selected"
    return keep


def ranked(importance: Tensor, alive: Tensor) -> Tensor:
    """Return unit numbers from most to least important, removed ones last, ties by number.

    On the device of ``importance``; ``alive`` may be on the CPU.
    """
    score = importance.masked_fill(~on_device(alive, importance.device), float("-inf"))
    return torch.sort(score, dim=-1, descending=True, stable=True).indices
