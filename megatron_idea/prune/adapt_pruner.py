"""Adapt-Pruner (arXiv 2502.03460): layers that change the residual stream little lose most.

A unit's score is the plain sum of |w g| over all of its weights, and is compared inside one layer
and axis alone. How much each layer gives is decided by the cosine between what enters and what
leaves it. The paper names the idea, its released code has the formulas; where the code loses what
it has summed up, or credits scores to the wrong KV group, the default is ours and
``prune.as_released`` the code's. See docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_idea.config import AxisGoal, ModelConfig, PruneConfig
from megatron_idea.prune.plan import Units, live_counts
from megatron_idea.prune.strategy import Activation, Counts, Measure, Removed, Stats
from megatron_idea.shape import Shape

NEURONS, GROUPS, LAYERS = "ffn_hidden_size", "num_query_groups", "num_layers"
MOST = 0.99
"""Largest sparsity of a layer, unless the shape that is left may have less."""
BISECTIONS = 40
RELEASED_STEPS = 50
"""Most inner steps of a round of the released code."""


class AdaptPruner:
    """S <- clip(S + s/n - A I), S the sparsity of each layer and I its importance in [-1, 1].

    One plan takes as many inner steps, with the same scores, as it needs to bring the number of
    parameters down to the schedule's. The last step is scaled so that it is not overshot.
    """

    layer_candidates = 0
    mend = "none"

    def __init__(
        self,
        config: PruneConfig,
        goals: Mapping[str, AxisGoal],
        model: ModelConfig,
        parameters: int | None = None,
    ) -> None:
        """``parameters``: most weights at the end; None: as many as the targets of ``goals``."""
        self.axes = tuple(goals)
        self._config = config
        self._model = model
        per = "line" if config.as_released else "matrix"
        self._sums = Measure("abs", "sum", per)
        self._cosine = Activation("cosine", config.skip_first_token)
        self.measures: tuple[Measure | Activation, ...] = (self._sums, self._cosine)
        full = target = Shape.full(model)
        self._full = {axis: goal.full for axis, goal in goals.items()}
        self._block = {axis: goal.final_multiple for axis, goal in goals.items()}
        self._least: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._begin = full.parameters(model).total
        for axis, goal in goals.items():
            # A target that is given as counts says how many parameters, not how many a layer.
            least = goal.final_multiple if parameters is None else goal.least
            self._least[axis] = min(least, goal.full)
            one_less = full.with_counts(axis, goal.full - 1).parameters(model).total
            self._weights[axis] = (self._begin - one_less) // model.num_layers
            target = target.with_counts(axis, goal.target)
        self._end = parameters or target.parameters(model).total
        self._most = max(MOST, *(1 - self._least[a] / self._full[a] for a in goals))

    def is_due(self, alive: Units, removed: Removed) -> bool:
        """Say whether the model has more parameters than it is to have by now."""
        return self.parameters(self._live(alive)) > self.goal(removed)

    def goal(self, removed: Removed) -> float:
        """Return how many parameters the model may have by now: linear in what is removed."""
        return self._begin - max(removed.values()) * (self._begin - self._end)

    def parameters(self, counts: Mapping[str, Tensor]) -> float:
        """Count the parameters of a model with so many units in each layer, whole or not."""
        gone = (
            weights * (self._full[axis] - counts[axis].double()).sum()
            for axis, weights in self._weights.items()
        )
        return self._begin - float(sum(gone))

    def importance(self, stats: Stats) -> Units:
        """Add up each unit's lines; a layer's importance is its cosine with the sign turned."""
        sums = stats.sums[self._sums]
        found = {axis: sums[axis].sum(dim=1) for axis in self.axes}
        if GROUPS in found and self._config.as_released:
            found[GROUPS] = self._misattributed(sums[GROUPS], stats.alive[GROUPS])
        return found | {LAYERS: -stats.sums[self._cosine][LAYERS].sum(dim=0)}

    def budget(
        self, importance: Units, alive: Units, removed: Removed, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Bring the parameters down to the goal; ``memory`` is S, fp32 [layers]."""
        live = self._live(alive)
        of_layers = importance[LAYERS].cpu().double()
        goal, is_last = self.goal(removed), max(removed.values()) >= 1
        if self._config.as_released:
            counts = self._released(of_layers, live, goal)
            if is_last or self.parameters(counts) <= self._end:
                for axis in self.axes:
                    most = self._most_of(axis, live)
                    counts[axis] = self._rounded(axis, counts[axis].minimum(most), counts)
            return _plain(counts), memory
        sparsity = memory.double() if memory.numel() else torch.zeros_like(of_layers)
        sparsity = self._advance(sparsity, of_layers, live, goal, is_last)
        counts = self._wanted(sparsity, live, is_last)
        return _plain(self._legal(counts, live) if is_last else counts), sparsity.float()

    def step(self, of_layers: Tensor, takes_part: Tensor) -> Tensor:
        """Return what an inner step adds to S of each layer, nothing to those that are out.

        s/n - A I, with I centred and divided by its largest size over the layers that take part.
        """
        part = of_layers[takes_part]
        # Layers that are alike come to 0 exactly: in fp64 sums of fp32 numbers do not round.
        centred = part - part.sum() / len(part)
        largest = centred.abs().max()
        if float(largest) > 0:
            centred = centred / largest
        added = torch.zeros_like(of_layers)
        added[takes_part] = self._config.sparsity_step - self._config.amplitude * centred
        return added

    def _advance(
        self, sparsity: Tensor, of_layers: Tensor, live: Mapping[str, Tensor], goal: float,
        is_last: bool,
    ) -> Tensor:  # fmt: skip
        """Take inner steps until the goal is met, the last of them no longer than needed."""

        def is_met(sparsity: Tensor) -> bool:
            return self.parameters(self._wanted(sparsity, live, is_last)) <= goal

        while not is_met(sparsity):
            takes_part = self._has_units_to_give(sparsity)
            if not bool(takes_part.any()):
                break
            added = self.step(of_layers, takes_part)

            def after(share: float, start: Tensor = sparsity, added: Tensor = added) -> Tensor:
                return (start + share * added).clamp(0, self._most)

            sparsity = after(_least(lambda share: is_met(after(share))))
        return sparsity

    def _has_units_to_give(self, sparsity: Tensor) -> Tensor:
        above = [self._full[axis] * (1 - sparsity) > self._least[axis] for axis in self.axes]
        return torch.stack(above).any(dim=0) & (sparsity < self._most)

    def _wanted(
        self, sparsity: Tensor, live: Mapping[str, Tensor], is_last: bool
    ) -> dict[str, Tensor]:
        """Return the units that S leaves, within what lives and is legal.

        A block goes when S comes to all of it, so that a KV group goes once its layer owes one; in
        the last plan counts are no whole numbers, and ``_legal`` rounds them.
        """
        counts = {}
        for axis, full in self._full.items():
            left = full * (1 - sparsity)
            if not is_last:
                block = self._block[axis]
                # S is kept in fp32: a rounding must not keep a block back.
                left = torch.ceil(left / block - 1e-6) * block
            counts[axis] = left.clamp(min=self._least[axis]).minimum(self._most_of(axis, live))
        return counts

    def _most_of(self, axis: str, live: Mapping[str, Tensor]) -> Tensor:
        """Return the largest legal counts; what a layer has beyond goes first."""
        block = self._block[axis]
        return (live[axis] // block * block).clamp(min=self._least[axis]).double()

    def _legal(self, counts: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round to legal counts within the last goal, the axis with the largest blocks first.

        What the rounding of an axis leaves over goes to the next one: its layers give up less, all
        by the same share of what they would lose in this plan. Blocks go to the layers with the
        largest remainders.
        """
        legal = dict(counts)
        for axis in sorted(self.axes, key=lambda a: -self._block[a] * self._weights[a]):
            most = self._most_of(axis, live)
            wanted = counts[axis].minimum(most)

            def fits(share: float, axis: str = axis, lost: Tensor = most - wanted) -> bool:
                return self.parameters(legal | {axis: most - share * lost}) <= self._end  # noqa: B023

            share = _least(fits)
            legal[axis] = self._rounded(axis, most - share * (most - wanted), legal)
        return legal

    def _rounded(self, axis: str, wanted: Tensor, counts: Mapping[str, Tensor]) -> Tensor:
        """Round down to blocks, and up where the largest remainders are, as far as that fits.

        Layers with the same remainder go up together or not at all: none of them is better than the
        others, and without an amplitude all stay equal.
        """
        block = self._block[axis]
        legal = (wanted // block * block).clamp(min=self._least[axis])
        rest = wanted - legal
        for remainder in rest[rest > 0].unique().flip(0):
            raised = torch.where(rest == remainder, legal + block, legal)
            if self.parameters({**counts, axis: raised}) <= self._end:
                legal = raised
        return legal

    def _released(
        self, of_layers: Tensor, live: Mapping[str, Tensor], goal: float
    ) -> dict[str, Tensor]:
        """Do one round of the released code: S and the widths that it counts from begin anew.

        A cut that would leave less than a legal count is left out whole.
        """
        sparsity = torch.zeros_like(of_layers)
        added = self.step(of_layers, torch.ones_like(of_layers, dtype=torch.bool))
        begin, now = live, dict(live)
        channels = self._model.kv_channels
        for _ in range(RELEASED_STEPS):
            if self.parameters(now) <= goal:
                break
            sparsity = (sparsity + added).clamp(0, MOST)
            for axis in self.axes:
                if axis == NEURONS:
                    keep = (begin[axis] * (1 - sparsity)).trunc().long()
                else:
                    rows = (begin[axis] * channels * (1 - sparsity)).trunc().long()
                    keep = now[axis] - (now[axis] * channels - rows) // channels
                now[axis] = torch.where(keep >= self._least[axis], keep, now[axis])
        return now

    def _misattributed(self, lines: Tensor, alive: Tensor) -> Tensor:
        """Credit query heads as the released code does: head j to group j mod n, not to j // G.

        Args:
            lines: [layers, (2 G + 2) kv_channels, groups]; alive: bool [layers, groups]. n counts
                the groups that live.
        """
        channels = self._model.kv_channels
        heads = self._model.num_attention_heads // self._model.num_query_groups
        of_queries = heads * channels
        query, own, projection = lines.split([of_queries, 2 * channels, of_queries], dim=1)
        of_heads = (query + projection).unflatten(1, (heads, channels)).sum(dim=2)
        scores = own.sum(dim=1)
        for layer, here in enumerate(alive.to(lines.device)):
            by_head = of_heads[layer][:, here].T.reshape(heads, -1)
            scores[layer, here] += by_head.sum(dim=0)
        return scores

    def _live(self, alive: Units) -> dict[str, Tensor]:
        return {axis: torch.tensor(live_counts(alive[axis])) for axis in self.axes}


def _plain(counts: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {axis: [int(n) for n in count.tolist()] for axis, count in counts.items()}


def _least(is_enough: Callable[[float], bool]) -> float:
    """Return the least share in (0, 1] that is enough; 1 when none is."""
    low, high = 0.0, 1.0
    if is_enough(high):
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
