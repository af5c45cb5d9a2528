"""Observe, plan, silence, compact: the pruning of a run, driven by consumed tokens."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_idea.config import Config
from megatron_idea.course import finished_axes, num_steps, removed_by_axis
from megatron_idea.engine.distributed import assert_same_on_all_ranks, on_device
from megatron_idea.engine.layers import PrunableMLP
from megatron_idea.engine.optimizer import reset_moments
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.activations import watched
from megatron_idea.prune.adapt_pruner import AdaptPruner
from megatron_idea.prune.compact import CompactReport, compact
from megatron_idea.prune.distribution import Decision, Distribution
from megatron_idea.prune.efficient_llm import EfficientLLM
from megatron_idea.prune.flap import FlapScore
from megatron_idea.prune.idea import IdeaPrune
from megatron_idea.prune.llm_pruner import LlmPruner
from megatron_idea.prune.magnitude import Magnitude
from megatron_idea.prune.measures import Sums, unit_sizes
from megatron_idea.prune.minitron import Minitron
from megatron_idea.prune.pca_stem import PcaStem
from megatron_idea.prune.plan import (
    Plan,
    StoredUnits,
    Units,
    first_units,
    live_by_axis,
    live_layers,
    misfit,
    present,
    unfit_plan,
)
from megatron_idea.prune.probe import Probe
from megatron_idea.prune.random import RandomPrune
from megatron_idea.prune.refit import refit
from megatron_idea.prune.rotate import principal_directions, rotate
from megatron_idea.prune.scores import Measured, Scores
from megatron_idea.prune.shortgpt import ShortGpt
from megatron_idea.prune.silence import rescale_norms, silence
from megatron_idea.prune.strategy import (
    Activation,
    Counts,
    Stats,
    Strategy,
    ranked,
    select,
)
from megatron_idea.prune.taylor import Taylor
from megatron_idea.prune.units import on_this_rank
from megatron_idea.prune.wanda import Wanda
from megatron_idea.schedule import gathers_scores, removal_window
from megatron_idea.shape import AXES, LAYER_AXES, Shape, due_shape


def build_strategy(config: Config) -> Strategy | None:
    """Build the method that ``prune.strategy`` names; None for plain training."""
    prune, goals = config.prune, config.goals
    methods: dict[str, Callable[[], Strategy | None]] = {
        "none": lambda: None,
        "idea": lambda: IdeaPrune(prune, goals),
        "random": lambda: RandomPrune(prune, goals, config.training.seed),
        "magnitude": lambda: Magnitude(prune, goals),
        "taylor": lambda: Taylor(
            prune, goals, tied=config.model.share_embeddings_and_output_weights
        ),
        "llm_pruner": lambda: LlmPruner(prune, goals),
        "wanda": lambda: Wanda(prune, goals),
        "flap_score": lambda: FlapScore(prune, goals),
        "minitron": lambda: Minitron(prune, goals),
        "shortgpt": lambda: ShortGpt(prune, goals),
        "pca_stem": lambda: PcaStem(prune, goals),
        "efficient_llm": lambda: EfficientLLM(prune, goals, config.model, config.parameter_goal),
        "adapt_pruner": lambda: AdaptPruner(prune, goals, config.model, config.parameter_goal),
    }
    return methods[prune.strategy]()


def measures_alike(one: Config, other: Config) -> bool:
    """Tell whether two runs' strategies want to know the same of units: then scores carry over."""
    ours, theirs = build_strategy(one), build_strategy(other)
    if ours is None or theirs is None:
        return ours is theirs
    return (ours.axes, ours.measures) == (theirs.axes, theirs.measures)


@dataclass(frozen=True)
class LayerTrial:
    """Why a layer went."""

    layer: int
    losses: dict[int, float]
    """Loss of the step's batch without each of the candidates, in nats per token."""


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value.clone() for name, value in tensors.items()}


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
    due: tuple[Units, Tensor] | None
    """Who lives on, and the gains, of a plan that is decided and not yet carried out: a checkpoint
    made right before a compaction has it."""

    def __init__(self, config: Config, trainable: Trainable) -> None:
        """Begin with everything alive; ``load_state`` says otherwise."""
        self.config = config
        self.strategy = build_strategy(config)
        self.goals = config.goals
        self.full = Shape.full(config.model)
        self.stored = first_units(trainable.shape)
        self.alive = present(self.stored, trainable.shape, self.full)
        self.memory = torch.empty(0)
        self.due = None
        self.trials: list[LayerTrial] = []
        # What was drawn for a plan is all that it knows.
        history = 0.0 if config.prune.calibration_steps else config.prune.history
        self.scores = (
            Scores(self.strategy, config.model, history, trainable.groups.device)
            if self.strategy is not None
            else None
        )
        self.distribution = Distribution(config.schedule)
        self.decisions: dict[str, Decision] = {}
        self._counted: tuple[Units, dict[str, list[int]]] = self.alive, live_by_axis(self.alive)

    def watched(
        self, trainable: Trainable, tokens: int
    ) -> contextlib.AbstractContextManager[dict[Activation, Sums]]:
        """Watch the forward passes of the step that ends at ``tokens``, if a method asks for it."""
        scores = self._gathering(tokens)
        return watched(trainable, {} if scores is None else scores.activations)

    def _gathering(self, tokens: int) -> Scores | None:
        """Return the scores, if they come of the step that ends at ``tokens``."""
        if self.config.prune.calibration_steps or not gathers_scores(self.config.schedule, tokens):
            return None
        return self.scores

    def observe(
        self, trainable: Trainable, tokens: int, seen: Mapping[Activation, Sums] | None = None
    ) -> dict[Measured, Sums] | None:
        """Measure this step's gradients; None outside the prune phase.

        Call after gradients are reduced and before the optimizer clips and steps.

        Args:
            seen: what ``watched`` saw.
        """
        scores = self._gathering(tokens)
        return None if scores is None else scores.observe(trainable, seen)

    def record(self, observed: dict[Measured, Sums] | None) -> None:
        """Let an observation count: the step that it comes from was taken."""
        if observed is not None:
            assert self.scores is not None
            self.scores.record(observed)

    def plan(
        self,
        trainable: Trainable,
        tokens: int,
        probe: Probe | None = None,
        pausing: bool = False,
    ) -> Plan | None:
        """Say what the consumed tokens ask for; None when that is what the model is already.

        ``pausing``: nothing is removed, until all must be. Collective over all ranks when something
        is due, and every rank decides alike. Without ``probe`` scores alone choose layers.
        """
        if self.scores is None or not self._plan_due(tokens):
            return None
        self.scores.fold(trainable, self.stored)
        if pausing and tokens < removal_window(self.config.schedule)[1]:
            return None
        alive, memory = self._choose(trainable, tokens, probe)
        shape = self.due_shape(trainable.shape, alive, finished_axes(self.config, tokens))
        if shape == trainable.shape and alive is self.alive:
            return None
        return Plan.of(alive, shape, memory, self._gains(alive, probe))

    def due_plan(self, trainable: Trainable, tokens: int) -> Plan | None:
        """Return the plan that a checkpoint had decided on, as it is in this layout; None if none.

        Who lives on is decided; the shape follows from that and from how the model is split now.
        """
        if self.due is None:
            return None
        alive, gains = self.due
        shape = self.due_shape(trainable.shape, alive, finished_axes(self.config, tokens))
        return Plan.of(alive, shape, self.memory, gains)

    def decide(self, plan: Plan) -> None:
        """Let a plan be part of what is saved, until ``silence`` carries it out."""
        self.due, self.memory = (plan.alive, plan.gains), plan.memory

    def _plan_due(self, tokens: int) -> bool:
        """Every ``mask_interval_steps`` steps, and whenever the prune phase is over."""
        interval = self.config.prune.mask_interval_steps
        step = -(-tokens // self.config.batch_tokens)
        return tokens >= removal_window(self.config.schedule)[1] or step % interval == 0

    def _choose(
        self, trainable: Trainable, tokens: int, probe: Probe | None
    ) -> tuple[Units, Tensor]:
        """Ask the strategy who lives on after ``tokens`` consumed tokens, and what to keep."""
        strategy, removed = self.strategy, removed_by_axis(self.config, tokens)
        assert strategy is not None
        if not strategy.is_due(self.alive, removed):
            return self.alive, self.memory
        self._calibrate(trainable, tokens, probe)
        importance = strategy.importance(self.stats(trainable))
        counts, memory = strategy.budget(importance, self.alive, removed, self.memory)
        return self.keep(importance, counts, probe), memory

    def _calibrate(self, trainable: Trainable, tokens: int, probe: Probe | None) -> None:
        """Measure batches that are drawn for this plan, if scores come from such."""
        config, number = self.config, self.config.prune.calibration_steps
        if not number or self.scores is None:
            return
        assert probe is not None, "calibration needs data"
        draw = random.Random(f"{config.training.seed} calibration {tokens}")
        batch = config.training.global_batch_size
        begins = [draw.randrange(num_steps(config)) * batch for _ in range(number)]
        probe.measure(self.scores, begins)
        self.scores.fold(trainable, self.stored)

    def _gains(self, alive: Units, probe: Probe | None) -> Tensor | None:
        """Return what keeps every norm's output of the channels that stay as it was.

        sqrt(sum x^2 after / sum x^2 before): a norm divides by the root of what is left.
        """
        axis = "hidden_size"
        before, after = self.alive[axis], alive[axis]
        if self.config.prune.norm_rescale == "none" or probe is None or torch.equal(before, after):
            return None
        squares = probe.norm_inputs(self.stored, len(before))
        share = squares[:, after].sum(dim=1) / squares[:, before].sum(dim=1)
        return torch.where(share > 0, share, 1.0).sqrt().float()

    def stats(self, trainable: Trainable) -> Stats:
        """Return what is known of all units now; collective over all ranks."""
        assert self.scores is not None and self.strategy is not None
        sizes = unit_sizes(self.config.model, self.alive, self.strategy.axes)
        device = trainable.groups.device
        return Stats(
            self.scores.now(trainable, self.stored),
            {axis: on_device(size, device) for axis, size in sizes.items()},
            self.alive,
        )

    def keep(self, importance: Units, counts: Counts, probe: Probe | None = None) -> Units:
        """Choose the most important units; ``alive`` itself when nobody goes."""
        chosen = {
            axis: select(importance[axis], self.alive[axis], list(counts[axis]))
            for axis in counts
            if axis != "num_layers"
        }
        if "num_layers" in counts:
            (count,) = counts["num_layers"]
            layers = self._keep_layers(importance["num_layers"], count, probe)
            chosen["num_layers"] = layers
            for axis in LAYER_AXES:  # what a layer has goes with it
                chosen[axis] = chosen.get(axis, self.alive[axis]) & layers[:, None]
        if all(torch.equal(kept, self.alive[axis]) for axis, kept in chosen.items()):
            return self.alive
        for axis, kept in chosen.items():
            if axis in importance:
                rows = (importance[axis], self.alive[axis], kept)
                self.decisions[axis] = Decision(*map(torch.atleast_2d, rows))
        return {**self.alive, **chosen}

    def _keep_layers(self, importance: Tensor, count: int, probe: Probe | None) -> Tensor:
        """Choose layers one by one: of the least important the one that the loss misses least."""
        assert self.strategy is not None
        alive = self.alive["num_layers"].clone()
        candidates = self.strategy.layer_candidates
        if probe is None or candidates < 2:
            return select(importance, alive, [count])
        while int(alive.sum()) > count:
            least = ranked(importance, alive)[: int(alive.sum())].tolist()[-candidates:]
            gone = (~alive).nonzero().view(-1).tolist()
            losses = {layer: probe.loss([*gone, layer]) for layer in sorted(least)}
            layer = min(losses, key=lambda number: (losses[number], number))
            alive[layer] = False
            self.trials.append(LayerTrial(layer, losses))
        return alive

    def due_shape(self, shape: Shape, alive: Units, final: Sequence[str]) -> Shape:
        """Return the shape to store from now on: as it is, or smaller when a block can be shed."""
        if not self.config.prune.compact:
            return shape
        return due_shape(shape, self.live(alive), live_layers(alive), self.goals, final)

    def live(self, alive: Units) -> dict[str, list[int]]:
        """Count the live units of every axis; once for each ``alive``, which few steps change."""
        if self._counted[0] is not alive:
            self._counted = alive, live_by_axis(alive)
        return self._counted[1]

    def score_records(self, tokens: int) -> list[dict[str, Any]]:
        """Describe the last plan's importances by axis, once a plan and at a bounded rate."""
        decisions, self.decisions = self.decisions, {}
        return self.distribution.records(decisions, tokens)

    def take_trials(self) -> list[LayerTrial]:
        """Return why layers went since the last call."""
        trials, self.trials = self.trials, []
        return trials

    def mend(self, trainable: Trainable, plan: Plan, probe: Probe) -> None:
        """Let the weights that stay make up for what the plan removes; ``silence`` comes next.

        A function of the model, the plan and the batch of ``probe``, so a run that was interrupted
        in between does it again and alike.
        """
        mend = "none" if self.strategy is None else self.strategy.mend
        if mend == "rotate":
            rotate(trainable, principal_directions(probe.stream_gram(), trainable.groups))
        elif mend == "refit":
            refit(trainable, self.alive, plan.alive, self.stored, probe, self.config.prune)

    def silence(self, trainable: Trainable, plan: Plan) -> None:
        """Zero what the plan removes; with ``prune.moments=reset`` Adam begins anew if it does.

        Raises: RuntimeError when the plan differs between ranks; nothing was changed then.
        """
        assert_same_on_all_ranks(plan.digest.encode(), "the pruning plan", trainable.groups)
        gone = {axis: self.alive[axis] & ~plan.alive[axis] for axis in AXES}
        rescale_norms(trainable, plan.gains)
        silence(trainable, on_this_rank(gone, trainable, self.stored))
        if self.config.prune.moments == "reset" and any(
            bool(units.any()) for units in gone.values()
        ):
            reset_moments(trainable.optimizer)
        self.alive, self.memory, self.due = plan.alive, plan.memory, None
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
            if isinstance(mlp, PrunableMLP):  # another one does with zeros alone
                mlp.set_alive(alive[layer])

    @property
    def pending_steps(self) -> int:
        """Steps that were measured since the last plan."""
        return self.scores.pending_steps if self.scores is not None else 0

    def state(self, trainable: Trainable) -> dict[str, Tensor]:
        """Return all of a pruner that is a tensor, whatever the layout; collective."""
        scores = self.scores.state(trainable, self.stored) if self.scores is not None else {}
        return self._units(self.due) | _prefixed("scores", scores)

    def blank_state(self, due: bool, has_scores: bool = True) -> dict[str, Tensor]:
        """Return tensors of the same names and sizes, to be read into.

        Args:
            due: with a plan.
            has_scores: with what the strategy has measured; without it begins anew.
        """
        scores = self.scores.blank_state() if self.scores is not None and has_scores else {}
        blank = (self.alive, torch.ones(2 * self.full.num_layers + 1)) if due else None
        return self._units(blank) | _prefixed("scores", scores)

    def _units(self, due: tuple[Units, Tensor] | None) -> dict[str, Tensor]:
        found = _prefixed("alive", self.alive)
        found |= {f"stored.{axis}": torch.cat(self.stored[axis]) for axis in AXES}
        if due is not None:
            found |= _prefixed("due", due[0]) | {"gains": due[1].clone()}
        return found

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
        problem = next(filter(None, found), "")
        if problem or "gains" not in tensors:
            return problem
        of_now, due = (
            {axis: tensors[f"{kind}.{axis}"].cpu().bool() for axis in AXES}
            for kind in ("alive", "due")
        )
        return unfit_plan(of_now, due, tensors["gains"].cpu())

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
        if "gains" in tensors:
            self.due = {axis: tensors[f"due.{axis}"].cpu() for axis in AXES}, tensors["gains"].cpu()
        of_scores = {
            name.removeprefix("scores."): value
            for name, value in tensors.items()
            if name.startswith("scores.")
        }
        if self.scores is not None and of_scores.keys() == self.scores.blank_state().keys():
            self.scores.load_state(of_scores, pending_steps, trainable, self.stored)
        self.tell_layers(trainable)

    def _split(self, shape: Shape, tensors: Mapping[str, Tensor]) -> StoredUnits:
        return {
            axis: tensors[f"stored.{axis}"].cpu().split(list(shape.counts(axis))) for axis in AXES
        }
