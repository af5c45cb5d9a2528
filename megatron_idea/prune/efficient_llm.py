"""EfficientLLM (arXiv 2502.06663): kinds of units compete, and all layers lose alike.

Of neurons, KV groups and channels those go next whose saliency per weight is lowest. There is no
public code: pace and prices are measured in the paper's figures, the saliency is our reading. See
docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_idea.config import AxisGoal, ModelConfig, PruneConfig
from megatron_idea.prune.plan import Units, live_counts
from megatron_idea.prune.strategy import Activation, Counts, Measure, Removed, Stats, ranked
from megatron_idea.shape import Shape


class EfficientLLM:
    """One event after the other: so many units of one axis, from every layer, when they are paid.

    With a shape to end at, the schedule pays in channels of a matrix: a neuron costs 1, a channel
    of the residual stream, written by some matrices and read by others, 2, a KV group as many as
    its query heads have. An event is due once all before it are paid. With a number of parameters
    to end at, the schedule pays parameters.

    What was bought is read off who is alive; nothing is remembered.
    """

    layer_candidates = 0

    def __init__(
        self,
        config: PruneConfig,
        goals: Mapping[str, AxisGoal],
        model: ModelConfig,
        parameter_goal: int | None,
    ) -> None:
        self.axes = tuple(goals)
        self.measures: tuple[Measure | Activation, ...] = (Measure(config.element, "sum"),)
        self.mend = "refit" if config.update == "obs" else "none"
        self._goals = goals
        self._model = model
        self._full = Shape.full(model)
        self._full_parameters = self._full.parameters(model).total
        self._goal = parameter_goal
        heads = model.num_attention_heads // model.num_query_groups
        prices = {
            "ffn_hidden_size": 1,
            "hidden_size": 2,
            "num_query_groups": heads * model.kv_channels,
        }
        self._prices = {axis: prices[axis] for axis in goals}
        # Where the shape is to be found, removal may end after any event.
        self._grids = {
            axis: goal.multiple if parameter_goal is None else goal.final_multiple
            for axis, goal in goals.items()
        }
        # An update costs as much for one unit as for a block: an event is one compaction then.
        self._events = {
            axis: max(grid, goals[axis].block // grid * grid) if config.update == "obs" else grid
            for axis, grid in self._grids.items()
        }

    def importance(self, stats: Stats) -> Units:
        """Average over all weights of a unit; gains of norms are not among them."""
        sums = stats.sums[self.measures[0]]
        return {axis: sums[axis].abs().sum(-2) / stats.sizes[axis].sum(0) for axis in self.axes}

    def is_due(self, alive: Units, removed: Removed) -> bool:
        """Say whether what was bought is paid."""
        counts = {axis: live_counts(alive[axis]) for axis in self.axes}
        return self._is_paid(counts, removed) and any(map(self._room, self.axes, counts.values()))

    def budget(
        self, importance: Units, alive: Units, removed: Removed, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Buy events until the schedule has not paid the last one."""
        counts = {axis: live_counts(alive[axis]) for axis in self.axes}
        saliency = {axis: _tails(importance[axis], alive[axis]) for axis in self.axes}
        while self._is_paid(counts, removed):
            events = {axis: self._after(axis, counts[axis]) for axis in self.axes}
            events = {axis: after for axis, after in events.items() if after != counts[axis]}
            if not events:
                break
            fitting = {axis: n for axis, n in events.items() if self._fits(counts | {axis: n})}
            if fitting:
                axis = min(fitting, key=lambda a: saliency[a](counts[a], fitting[a]))
                counts[axis] = fitting[axis]
            else:
                counts |= self._last(counts, events)
        return counts, memory

    def _is_paid(self, counts: Mapping[str, list[int]], removed: Removed) -> bool:
        share = max(removed.values())
        if self._goal is not None:
            full = self._full_parameters
            return self._parameters(counts) > full - share * (full - self._goal)
        spent = total = 0
        for axis, price in self._prices.items():
            goal = self._goals[axis]
            spent += price * (goal.full - max(counts[axis]))
            total += price * (goal.full - goal.target)
        return spent < share * total

    def _room(self, axis: str, counts: list[int]) -> bool:
        return max(counts) > self._goals[axis].least

    def _after(self, axis: str, counts: list[int], units: int | None = None) -> list[int]:
        """Return the counts after an event; what is beyond a legal count goes first."""
        most = max(counts)
        least = most - (most % self._grids[axis] or units or self._events[axis])
        return [min(n, max(least, self._goals[axis].least)) for n in counts]

    def _fits(self, counts: Mapping[str, list[int]]) -> bool:
        return self._goal is None or self._parameters(counts) >= self._goal

    def _last(
        self, counts: Mapping[str, list[int]], events: Mapping[str, list[int]]
    ) -> dict[str, list[int]]:
        """Land at or below the number of parameters: with the fewest that any axis can remove."""
        steps = {axis: self._after(axis, counts[axis], self._grids[axis]) for axis in events}
        axis = max(steps, key=lambda a: self._parameters({**counts, a: steps[a]}))
        return {axis: steps[axis]}

    def _parameters(self, counts: Mapping[str, list[int]]) -> int:
        shape = self._full
        for axis, numbers in counts.items():
            shape = shape.with_counts(axis, numbers)
        return shape.parameters(self._model).total


def _tails(importance: Tensor, alive: Tensor) -> Callable[[list[int], list[int]], float]:
    """Return what gives the mean saliency of the units that leave when counts fall.

    A mean over a layer's units, then over the layers that lose any.
    """
    best_first = importance.gather(-1, ranked(importance, alive)).double().cpu()
    rows = best_first.view(-1, best_first.shape[-1])

    def mean(before: list[int], after: list[int]) -> float:
        if len(set(before)) == len(set(after)) == 1:
            return float(rows[:, after[0] : before[0]].mean())
        tails = [row[m:n].mean() for row, n, m in zip(rows, before, after, strict=True) if m < n]
        return float(torch.stack(tails).mean())

    return mean
