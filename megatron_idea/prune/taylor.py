"""First-order Taylor pruning, with its sign (after Molchanov et al. 2017, arXiv 1611.06440).

A mask m = 1 multiplies what a unit computes. Removing the unit is m = 0, which to first order
changes the loss by -dL/dm, and dL/dm is a sum of w g over what reads the unit's output. The paper
takes its size; here the sign stays, so what harms goes first. That sum:

    neuron      down's column
    KV group    the projection's columns of its heads
    channel     columns of linear_qkv and linear_fc1 of all layers, and of the output layer: a mask
                on what comes out of each norm
    layer       linear_proj and linear_fc2: a mask on what it adds to the residual stream

The gradient of a tied embedding is one sum of both its roles. There the mask of a channel is on
what comes out of the embedding, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import Activation, Measure, Scheduled, Stats


class Taylor(Scheduled):
    """A unit's importance is by how much its removal is predicted to raise the loss, in nats."""

    measures: tuple[Measure | Activation, ...] = (Measure("signed", "sum"),)

    def __init__(
        self, config: PruneConfig, goals: Mapping[str, AxisGoal], tied: bool = False
    ) -> None:
        """``tied``: embedding and output layer are one matrix, which is measured as the former."""
        super().__init__(config, goals)
        # Numbers of the matrices in the table of axes.
        self._readers = {
            "ffn_hidden_size": [2],
            "num_query_groups": [3],
            "hidden_size": [0 if tied else 1, 2, 4],
            "num_layers": [1, 3],
        }

    def importance(self, stats: Stats) -> Units:
        """Return -dL/dm, a moving average over steps."""
        sums = stats.sums[self.measures[0]]
        return {a: -sums[a][..., self._readers[a], :].sum(dim=-2) for a in self.axes}
