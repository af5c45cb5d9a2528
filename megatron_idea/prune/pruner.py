"""Observe, plan, apply: the pruning of a run, driven by consumed tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import Config
from megatron_idea.engine.distributed import assert_same_on_all_ranks
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.compact import CompactReport, compact
from megatron_idea.prune.distribution import Decision, Distribution
from megatron_idea.prune.idea import IdeaPrune
from megatron_idea.prune.mask import apply_mask
from megatron_idea.prune.score import ScoreTracker
from megatron_idea.prune.strategy import Plan, Stats, Strategy, live_counts, select
from megatron_idea.prune.units import to_original_numbering
from megatron_idea.schedule import gathers_scores, keep_count, keep_ratio, removal_window
from megatron_idea.shape import due_counts


def build_strategy(config: Config) -> Strategy:
    """The method that ``prune.strategy`` names."""
    return IdeaPrune(config.prune, unit=config.final_ffn_multiple)


def make_plan(alive: Tensor, widths: tuple[int, ...]) -> Plan:
    """A plan with its digest: ``alive`` [L, F] bool in original numbering, on the CPU."""
    content = alive.numpy().tobytes() + repr(widths).encode()
    return Plan(alive, widths, hashlib.sha256(content).hexdigest())


class Pruner:
    """Keeps score of a model's neurons and says which live on.

    Nothing here counts steps or stores a phase: what is due follows from the consumed tokens and
    from who is alive. ``alive`` [L, F] is equal on every rank and is derived from the masks. It is
    on the CPU, where plans are made: of a plan the host waits for the ranking of neurons only.
    """

    def __init__(self, trainable: Trainable) -> None:
        config = trainable.config
        self.config = config
        self.strategy = build_strategy(config)
        self.scores = ScoreTracker(trainable.mlps, self.strategy, config.prune.history)
        self.alive = self._read_masks(trainable)
        self.distribution = Distribution(config.schedule)
        self.decision: Decision | None = None

    def _read_masks(self, trainable: Trainable) -> Tensor:
        masks = [mlp.mask.to(torch.int32) for _, mlp in trainable.mlps]
        return self.in_original_numbering(trainable, masks).cpu() > 0

    @property
    def live(self) -> list[int]:
        """Live neurons of every layer."""
        return live_counts(self.alive)

    def observe(self, trainable: Trainable, tokens: int) -> list[Tensor] | None:
        """Importance in this step's gradients; None outside the prune phase.

        Call after gradients are reduced and before the optimizer clips and steps.
        """
        if self.config.prune.strategy == "none" or not gathers_scores(self.config.schedule, tokens):
            return None
        return self.scores.observe(trainable)

    def record(self, observed: list[Tensor] | None) -> None:
        """Let an observation count: the step that it comes from was taken."""
        if observed is not None:
            self.scores.record(observed)

    def in_original_numbering(self, trainable: Trainable, values: list[Tensor]) -> Tensor:
        """[L, ..., F] of values per local neuron, equal on every rank."""
        model = self.config.model
        return to_original_numbering(
            trainable.mlps, values, model.num_layers, model.ffn_hidden_size, trainable.groups
        )

    def plan(self, trainable: Trainable, tokens: int, pausing: bool = False) -> Plan | None:
        """What the consumed tokens ask for; None when that is what the model is already.

        ``pausing``: nothing is removed, until all must be. Collective over all ranks when something
        is due, and every rank decides alike.
        """
        config = self.config
        if config.prune.strategy == "none" or not self._mask_update_due(tokens):
            return None
        self.scores.fold(trainable.groups)
        model = config.model
        final = tokens >= removal_window(config.schedule)[1]
        if pausing and not final:
            return None
        ratio = keep_ratio(config.schedule, tokens, config.final_keep_ratio)
        count = keep_count(ratio, model.ffn_hidden_size)
        alive = self.alive
        if count * model.num_layers < sum(self.live):
            sums = self.in_original_numbering(trainable, self.scores.ema)
            importance = self.strategy.importance(Stats(sums, model.hidden_size))
            budget = self.strategy.allocate(importance, alive, count)
            alive = select(importance, alive, budget)
            self.decision = Decision(importance, self.alive, alive)
        widths = trainable.widths
        if config.prune.compact:
            widths = due_counts(
                widths, live_counts(alive), config.ffn_multiple, config.compaction_block, final
            )
        if widths == trainable.widths and torch.equal(alive, self.alive):
            return None
        return make_plan(alive, widths)

    def score_record(self, tokens: int) -> dict[str, Any] | None:
        """What the last plan's importances looked like, once a plan and at a bounded rate."""
        decision, self.decision = self.decision, None
        return self.distribution.record(decision, tokens) if decision else None

    def _mask_update_due(self, tokens: int) -> bool:
        """Every ``mask_interval_steps`` steps, and whenever the prune phase is over."""
        interval = self.config.prune.mask_interval_steps
        step = -(-tokens // self.config.batch_tokens)
        return tokens >= removal_window(self.config.schedule)[1] or step % interval == 0

    def apply(self, trainable: Trainable, plan: Plan) -> CompactReport | None:
        """Mask what the plan removes; compact when it asks for smaller widths.

        Raises: RuntimeError when the plan differs between ranks; nothing was changed then.
        """
        assert_same_on_all_ranks(plan.digest.encode(), "the pruning plan", trainable.groups)
        self.alive = plan.alive
        if plan.widths == trainable.widths:
            apply_mask(trainable.mlps, plan)
            return None
        carried = self.state(trainable)
        report = compact(trainable, plan, self.config.prune.placement)
        self.load_state(trainable, carried)
        return report

    def state(self, trainable: Trainable) -> ScoreState:
        """The scores in original numbering, whatever the layout; collective."""
        self.scores.reduce_window(trainable.groups)
        window = self.in_original_numbering(trainable, self.scores.window)
        # Equal on every rank, as the average is: only the first data-parallel ranks carry it.
        dist.broadcast(window, src=0)
        ema = self.in_original_numbering(trainable, self.scores.ema)
        return ScoreState(ema, window, self.scores.window_steps)

    def load_state(self, trainable: Trainable, state: ScoreState) -> None:
        """Take scores over into the present layout, and who is alive from the model's masks."""
        self.scores.resize(trainable.mlps)
        self.scores.window_steps = state.window_steps
        self.alive = self._read_masks(trainable)
        for (layer, mlp), ema, window in zip(
            trainable.mlps, self.scores.ema, self.scores.window, strict=True
        ):
            ema.copy_(state.ema[layer][:, mlp.neuron_ids])
            if trainable.groups.shards.rank() == 0:
                window.copy_(state.window[layer][:, mlp.neuron_ids])


@dataclass(frozen=True)
class ScoreState:
    """Scores as they are carried over a compaction and stored in a checkpoint."""

    ema: Tensor
    """[L, 3, F] fp32, original numbering, equal on every rank."""
    window: Tensor
    """[L, 3, F] fp32: sums since the average was last updated."""
    window_steps: int
