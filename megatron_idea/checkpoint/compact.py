"""Compact a checkpoint on disk: the live compaction's twin, in one process and by other means.

For people who want the small model now, and for tests: survivors are cut out of whole tensors by
plain indexing, nothing is exchanged between ranks and nothing is freed on the way.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.calibrate import Calibration, choose, for_calibration
from megatron_idea.config import (
    Config,
    ConfigError,
    PruneTarget,
    multiple_of,
    require_multiple,
    validate,
)
from megatron_idea.data.tokenizer import copy_tokenizer
from megatron_idea.engine.distributed import joined
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.optimizer import adam_step, finish_main_update, set_state
from megatron_idea.engine.shards import MOMENTS
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.prune.axis import Share
from megatron_idea.prune.compact import kept
from megatron_idea.prune.plan import (
    Plan,
    StoredUnits,
    Units,
    live_by_axis,
    live_counts,
    live_layers,
)
from megatron_idea.prune.pruner import Pruner
from megatron_idea.prune.units import named_shares
from megatron_idea.records.lock import RunLock
from megatron_idea.records.readable import spread
from megatron_idea.shape import AXES, LAYER_AXES, Shape, due_shape

Sizes = Mapping[str, Sequence[int]]
"""What ``--to`` asks for: axis -> one count, or one for each stored layer. ``parameters`` -> the
most weights of the whole model."""
PARAMETERS = "parameters"


def compact_checkpoint(
    path: Path, out: Path, sizes: Sizes | None = None, how: Calibration | None = None
) -> Path:
    """Write the checkpoint ``path`` (or a run's latest) compacted as the first of run ``out``.

    Without ``sizes`` the run's own plan is carried out: what is due goes, and zeroed units leave
    as far as counts stay legal. With them the most important units stay, by the checkpoint's
    scores, as many as fit; or, with ``how``, by those that a method has of passes over some data.
    The run's own method, its scores and its settings stay what they are.

    Holds the model and its optimizer twice in this process's memory.

    Returns: the new checkpoint; ``train`` with ``run_dir=<out>`` goes on from it.
    Raises: ConfigError for an illegal size, for an ``out`` that has checkpoints and for a plan that
        fits weights to training data, CheckpointError for a checkpoint that cannot be read,
        RunFolderError for an ``out`` that another process writes to.
    """
    found = checkpoint.resolve(path)
    saved = checkpoint.read_config(found)
    config = checkpoint.read_config(found, checkpoint.ONE_PROCESS)
    validate(config, world_size=1)
    state = checkpoint.read_state(found, config)
    asked = dict(sizes or {})
    sizes = asked.copy()
    (parameters,) = sizes.pop(PARAMETERS, [None])
    _check(sizes, parameters, how)
    wanted = _legal(sizes, state.shape, saved)
    sections, chooser = config.sections, None
    if how is not None:
        chooser = for_calibration(saved, how, _target(saved, wanted, parameters))
        sections = dataclasses.replace(sections, training=chooser.training)
    with RunLock(out), joined(config.parallel, config.training.seed) as groups:
        if checkpoint.complete(out):
            raise ConfigError(f"{out} has checkpoints already; name a folder that has none")
        storage.verify(found, groups)
        trainable = assemble(sections, groups, state.shape, initialize=False)
        pruner = Pruner(config, trainable)
        pruner.goals = saved.goals  # counts are to be legal for the run's own layout
        checkpoint.load(trainable, pruner, found)
        if chooser is not None:
            plan = _chosen(trainable, pruner, chooser, wanted)
        elif wanted:
            plan = _plan(trainable, pruner, wanted)
        else:
            plan = pruner.due_plan(trainable, state.consumed_tokens)
            if plan is not None and _mends(pruner, plan):
                raise ConfigError(
                    f"{found} is due for a compaction that first fits weights to the run's "
                    "training data: train goes on with it; --to cuts units out as they are"
                )
        if plan is None:
            live, layers = live_by_axis(pruner.alive), live_layers(pruner.alive)
            shape = due_shape(trainable.shape, live, layers, saved.goals, saved.goals)
            plan = Plan.of(pruner.alive, shape, pruner.memory)
        if plan.shape == state.shape:
            raise ConfigError(
                f"{found} has nothing to compact: it stores {_brief(state.shape)}, and that is "
                "what its live units need; --to asks for less"
            )
        pruner.silence(trainable, plan)
        state.shape = plan.shape
        carried = pruner.state(trainable)
        fresh, stored = _cut(trainable, pruner, plan, adam_step(trainable.optimizer, groups))
        carried |= {f"stored.{axis}": torch.cat(stored[axis]) for axis in stored}
        pruner.load_state(fresh, carried, pruner.pending_steps, pruner.memory.tolist())
        if tokenizer := checkpoint.tokenizer_beside(found):
            copy_tokenizer(tokenizer, out / checkpoint.TOKENIZER)
        words = {}
        if asked:
            to = "; ".join(f"{axis} {spread(counts)}" for axis, counts in asked.items())
            words["cut"] = f"{how.strategy if how else 'the scores of its run'}, to {to}"
        checkpoint.copy_origin(found, out, **words)
        new_run = configuration.replace(saved, run_dir=str(out))
        return checkpoint.save(new_run, fresh, pruner, state)


def _mends(pruner: Pruner, plan: Plan) -> bool:
    """Say whether a plan removes units and does more to the weights than that."""
    assert pruner.strategy is not None
    removes = any(not torch.equal(pruner.alive[axis], plan.alive[axis]) for axis in AXES)
    return removes and pruner.strategy.mend != "none"


def read_sizes(text: str) -> dict[str, list[int]]:
    """Read ``--to``: 384 neurons, 384,256 for two layers, or ``hidden_size=256 num_layers=3``.

    Axes are parted by blanks or semicolons; a number without an axis is a width of FFNs.
    ``parameters=1_000_000`` is the most weights of the whole model.

    Raises: ConfigError for anything but known axes and whole numbers.
    """
    sizes = {}
    for part in text.replace(";", " ").split():
        axis, equals, counts = part.rpartition("=")
        axis = axis if equals else "ffn_hidden_size"
        try:
            numbers = [int(count) for count in counts.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"--to is {text!r}; give whole numbers, as in 384 or 384,256, or axes, "
                "as in num_query_groups=4 num_layers=20"
            ) from error
        if axis not in (*AXES, PARAMETERS):
            raise ConfigError(
                f"--to names {axis!r}; axes are {', '.join(AXES)}, and there is {PARAMETERS}"
            )
        if axis in sizes:
            raise ConfigError(f"--to names {axis} twice")
        if axis == PARAMETERS and len(numbers) > 1:
            raise ConfigError(f"--to {PARAMETERS} is one number; it has {len(numbers)}")
        sizes[axis] = numbers
    return sizes


def _check(sizes: Sizes, parameters: int | None, how: Calibration | None) -> None:
    if parameters is not None and sizes:
        raise ConfigError(f"--to names {PARAMETERS} beside counts: give the one or the others")
    if parameters is not None and how is None:
        raise ConfigError(f"--to {PARAMETERS} needs a method that finds the shape: give --strategy")
    if how is not None and parameters is None and not sizes:
        raise ConfigError("--strategy chooses what goes: say with --to how much is to stay")


def _legal(sizes: Sizes, shape: Shape, config: Config) -> dict[str, tuple[int, ...]]:
    """Return one count for each stored layer, or one, all legal for the run's own layout."""
    legal = {}
    for axis, counts in sizes.items():
        present = shape.counts(axis)
        each = tuple(counts) if len(counts) > 1 else tuple(counts) * len(present)
        if len(each) != len(present):
            raise ConfigError(
                f"--to has {len(each)} values for {axis}; give one"
                + (f", or one for each of the {len(present)} layers" if axis in LAYER_AXES else "")
            )
        for layer, (count, now) in enumerate(zip(each, present, strict=True)):
            what = f"--to {axis}" + (f" of layer {layer}" if axis in LAYER_AXES else "")
            require_multiple(what, count, config.multiples[axis], multiple_of(axis, config))
            if count > now:
                raise ConfigError(f"{what} is {count}, and there are {now}")
            if axis == "num_layers" and count < 2:
                raise ConfigError(f"{what} is {count}; at least two layers stay")
        legal[axis] = each
    return legal


def _brief(shape: Shape) -> str:
    counts = {axis: sorted(set(shape.counts(axis))) for axis in AXES}
    return ", ".join(f"{axis} {'/'.join(map(str, each))}" for axis, each in counts.items())


def _plan(trainable: Trainable, pruner: Pruner, wanted: Mapping[str, tuple[int, ...]]) -> Plan:
    """Keep the most important live units, as many as ``wanted`` holds; scores choose layers."""
    alive = pruner.alive
    counts = _counts(trainable.shape, alive, wanted)
    if any(counts[axis] != live_counts(alive[axis]) for axis in counts):
        if pruner.scores is None or pruner.strategy is None:
            raise ConfigError("prune.strategy is none: nothing says which units matter")
        unknown = [axis for axis in counts if axis not in pruner.strategy.axes]
        if unknown:
            raise ConfigError(
                f"this checkpoint has no scores of {unknown[0]}: it is no axis of its prune.target"
            )
        pruner.scores.fold(trainable, pruner.stored)
        stats = pruner.stats(trainable)
        known = [units[a] for units in stats.sums.values() for a in counts if a in units]
        if not all(bool(units.any()) for units in known):
            raise ConfigError(
                "this checkpoint has no scores: it was written before the prune phase, so which "
                "units matter is not known yet"
            )
        alive = pruner.keep(pruner.strategy.importance(stats), counts)
    return Plan.of(alive, _shape(trainable.shape, alive, wanted), pruner.memory)


def _counts(
    shape: Shape, alive: Units, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, list[int]]:
    """Count who stays: one number for each layer of the enlarged model, or one."""
    numbers = [layer.number for layer in shape.layers]
    counts = {}
    for axis, sizes in wanted.items():
        due = dict(zip(numbers, sizes, strict=True)) if axis in LAYER_AXES else {0: sizes[0]}
        live = live_counts(alive[axis])
        counts[axis] = [min(n, due.get(row, 0)) for row, n in enumerate(live)]
    return counts


def _shape(shape: Shape, alive: Units, wanted: Mapping[str, tuple[int, ...]]) -> Shape:
    for axis, sizes in wanted.items():
        if axis != "num_layers":
            shape = shape.with_counts(axis, sizes)
    return shape.with_layers(live_layers(alive))


def _target(
    config: Config, wanted: Mapping[str, tuple[int, ...]], parameters: int | None
) -> PruneTarget:
    """Return what a method has to know of what it prunes; how much, ``wanted`` says itself."""
    if parameters is not None:
        return PruneTarget(parameters=parameters)
    least = {axis: config.final_multiples[axis] for axis in wanted}
    if "num_layers" in wanted:
        least["num_layers"] = max(2, config.parallel.num_stages)
    return PruneTarget(**least)


def _chosen(
    trainable: Trainable, pruner: Pruner, config: Config, wanted: Mapping[str, tuple[int, ...]]
) -> Plan:
    """Keep what a method chooses: ``wanted`` of each axis, or as many parameters as its target."""
    shape = trainable.shape
    if wanted:
        alive = choose(trainable, pruner, config, lambda alive: _counts(shape, alive, wanted))
        shape = _shape(shape, alive, wanted)
    else:
        alive, goals = choose(trainable, pruner, config, None), config.goals
        shape = due_shape(shape, live_by_axis(alive), live_layers(alive), goals, goals)
    return Plan.of(alive, shape, pruner.memory)


def _cut(
    trainable: Trainable, pruner: Pruner, plan: Plan, step: int
) -> tuple[Trainable, StoredUnits]:
    """Make a second model and optimizer with the survivors of the first."""
    old, new = trainable.shape, plan.shape
    position = {layer.number: n for n, layer in enumerate(new.layers)}
    places: dict[tuple[str, int | None], Tensor] = {}
    stored: dict[str, tuple[Tensor, ...]] = {
        "num_layers": (torch.tensor([layer.number for layer in new.layers]),)
    }
    for axis in ("ffn_hidden_size", "num_query_groups", "hidden_size"):
        after = []
        for n, ids in enumerate(pruner.stored[axis]):
            number = old.layers[n].number if axis in LAYER_AXES else None
            if number is not None and number not in position:
                continue
            alive = plan.alive[axis] if number is None else plan.alive[axis][number]
            count = new.counts(axis)[0 if number is None else position[number]]
            keep = kept(alive, ids, count).nonzero().view(-1)
            places[axis, None if number is None else n] = keep
            after.append(ids[keep])
        stored[axis] = tuple(after)
    wholes = _survivors(trainable, places)
    fresh = assemble(trainable.sections, trainable.groups, new, initialize=False)
    originals = [layer.number for layer in old.layers]
    with torch.no_grad():
        for name, parameter in named_parameters(fresh.chunks):
            layer = re.match(r"decoder\.layers\.(\d+)\.", name)
            if layer:
                before = originals.index(new.layers[int(layer[1])].number)
                name = f"decoder.layers.{before}.{name[layer.end() :]}"
            main, *moments = wholes.pop(name).flatten(1)
            state = dict(zip(MOMENTS, moments, strict=True))
            set_state(fresh.optimizer, parameter, step, main, state)
        finish_main_update(fresh.optimizer, fresh.chunks)
    return fresh, stored


@torch.no_grad()
def _survivors(
    trainable: Trainable, places: Mapping[tuple[str, int | None], Tensor]
) -> dict[str, Tensor]:
    """Return main weight, exp_avg and exp_avg_sq, [3, *shape], of every parameter by its name.

    By plain indexing of a tensor's dimensions; what goes with a layer stays here whole.
    """
    shards = trainable.exchange()
    wholes = {}
    for name, parameter, shares in named_shares(trainable):
        gathered = shards.gather(parameter)
        assert gathered is not None, "one process has all"
        whole = gathered.view(3, *parameter.shape)
        for share in shares:
            place = (share.axis, None if share.axis == "hidden_size" else share.layer)
            if place in places:
                whole = whole.index_select(1 + share.dim, _lines(share, parameter, places[place]))
        wholes[name] = whole
    return wholes


def _lines(share: Share, parameter: torch.nn.Parameter, units: Tensor) -> Tensor:
    """Return the indices, along the dimension that gets shorter, of what ``units`` have there."""
    length = parameter.shape[share.dim]
    inner = share.stride // math.prod(parameter.shape[share.dim + 1 :])
    indices = torch.arange(length).view(-1, share.count, inner)
    return indices[:, units].reshape(-1)
