"""Compact a checkpoint on disk: the live compaction's twin, in one process and by other means.

For people who want the small model now, and for tests: survivors are cut out of whole tensors by
plain indexing, nothing is exchanged between ranks and nothing is freed on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.state import CheckpointError, TrainState
from megatron_idea.config import Config, ConfigError, require_multiple, validate
from megatron_idea.data.tokenizer import copy_tokenizer
from megatron_idea.engine.distributed import joined
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.optimizer import finish_main_update, set_state
from megatron_idea.engine.shards import MOMENTS
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.prune.axis import cut
from megatron_idea.prune.compact import kept
from megatron_idea.prune.plan import Plan
from megatron_idea.prune.pruner import Pruner
from megatron_idea.prune.units import named_shares
from megatron_idea.records.lock import RunLock
from megatron_idea.shape import due_counts

AXIS = "ffn_hidden_size"


def compact_checkpoint(path: Path, out: Path, widths: Sequence[int] = ()) -> Path:
    """Write the checkpoint ``path`` (or a run's latest) compacted as the first of run ``out``.

    Without ``widths`` the run's own plan is carried out: what is due goes, and masked neurons leave
    as far as widths stay legal. With them (one for all layers, or one a layer) the most important
    neurons stay, by the checkpoint's scores, as many as fit.

    Holds the model and its optimizer twice in this process's memory.

    Returns: the new checkpoint; ``train`` with ``run_dir=<out>`` goes on from it.
    Raises: ConfigError for an illegal width and for an ``out`` that has checkpoints,
        CheckpointError for a checkpoint that cannot be read, RunFolderError for an ``out`` that
        another process writes to.
    """
    found = checkpoint.resolve(path)
    saved = checkpoint.read_config(found)
    # One process, and widths that are legal for the run's own layout.
    overrides = [*checkpoint.ONE_PROCESS, f"prune.alignment={saved.ffn_multiple}"]
    config = checkpoint.read_config(found, overrides)
    validate(config, world_size=1)
    state = checkpoint.read_state(found, config)
    wanted = _legal(widths, state.shape.counts(AXIS), saved)
    with RunLock(out), joined(config.parallel, config.training.seed) as groups:
        if checkpoint.complete(out):
            raise ConfigError(f"{out} has checkpoints already; name a folder that has none")
        storage.verify(found, groups)
        trainable = assemble(config.sections, groups, state.shape, initialize=False)
        pruner = Pruner(config, trainable)
        checkpoint.load(trainable, pruner, found)
        if state.plan_due and not wanted:
            plan = pruner.plan(trainable, state.consumed_tokens)
            if plan is None:
                raise CheckpointError(checkpoint.NOTHING_DUE.format(found))
        else:
            plan = _plan(trainable, pruner, wanted or _needed(pruner, state, saved))
        if plan.shape == state.shape:
            raise ConfigError(
                f"{found} has nothing to compact: its widths are "
                f"{sorted(set(state.shape.counts(AXIS)))} and at most {max(pruner.live[AXIS])} "
                "neurons of a layer live; --to asks for smaller ones"
            )
        pruner.silence(trainable, plan)
        state.shape, state.plan_due = plan.shape, False
        carried = pruner.state(trainable)
        fresh = _cut(trainable, pruner, plan, state.adam_step)
        carried |= {f"stored.{axis}": torch.cat(pruner.stored[axis]) for axis in pruner.stored}
        pruner.load_state(fresh, carried, pruner.pending_steps, pruner.memory.tolist())
        if tokenizer := checkpoint.tokenizer_beside(found):
            copy_tokenizer(tokenizer, out / checkpoint.TOKENIZER)
        new_run = configuration.replace(saved, run_dir=str(out))
        return checkpoint.save(new_run, fresh, pruner, state)


def read_widths(text: str) -> list[int]:
    """Read the numbers of ``--to``: 384, or 384,256 for two layers; none when it is empty.

    Raises: ConfigError for anything but whole numbers.
    """
    try:
        return [int(width) for width in text.split(",")] if text else []
    except ValueError as error:
        raise ConfigError(f"--to is {text!r}; give whole numbers, as in 384 or 384,256") from error


def _legal(widths: Sequence[int], present: Sequence[int], config: Config) -> tuple[int, ...]:
    """One width for each layer, all legal for the run's own layout; empty when none are given."""
    if not widths:
        return ()
    each = tuple(widths) if len(widths) > 1 else tuple(widths) * len(present)
    if len(each) != len(present):
        raise ConfigError(f"--to has {len(each)} widths; give one, or one for each of the "
                          f"{len(present)} layers")  # fmt: skip
    what = f"TP x prune.alignment = {config.ffn_multiple}"
    for layer, (width, now) in enumerate(zip(each, present, strict=True)):
        require_multiple(f"--to for layer {layer}", width, config.ffn_multiple, what)
        if width > now:
            raise ConfigError(f"--to for layer {layer} is {width}, and the layer has {now} neurons")
    return each


def _needed(pruner: Pruner, state: TrainState, config: Config) -> tuple[int, ...]:
    """Return the smallest legal widths that hold the live neurons."""
    present, live = state.shape.counts(AXIS), pruner.live[AXIS]
    return due_counts(present, live, config.ffn_multiple, block=1, final=True)


def _plan(trainable: Trainable, pruner: Pruner, widths: tuple[int, ...]) -> Plan:
    """Keep the most important live neurons, as many as ``widths`` hold."""
    alive, live = pruner.alive, pruner.live[AXIS]
    counts = [min(n, w) for n, w in zip(live, widths, strict=True)]
    if counts != live:
        if pruner.scores is None or pruner.strategy is None:
            raise ConfigError("prune.strategy is none: nothing says which neurons matter")
        pruner.scores.fold(trainable, pruner.stored)
        stats = pruner.stats(trainable)
        if any(not bool(units[AXIS].any()) for units in stats.sums.values()):
            raise ConfigError(
                "this checkpoint has no scores: it was written before the prune phase, so which "
                "neurons matter is not known yet"
            )
        alive = pruner.keep(pruner.strategy.importance(stats), {AXIS: counts})
    return Plan.of(alive, trainable.shape.with_counts(AXIS, widths), pruner.memory)


def _cut(trainable: Trainable, pruner: Pruner, plan: Plan, step: int) -> Trainable:
    """Make a second model and optimizer with the survivors of the first."""
    places = {}
    after = []
    for layer, (ids, count) in enumerate(
        zip(pruner.stored[AXIS], plan.shape.counts(AXIS), strict=True)
    ):
        places[layer] = kept(plan.alive[AXIS][layer], ids, count).nonzero().view(-1)
        after.append(ids[places[layer]])
    wholes = _survivors(trainable, places)
    fresh = assemble(trainable.sections, trainable.groups, plan.shape, initialize=False)
    with torch.no_grad():
        for name, parameter in named_parameters(fresh.chunks):
            main, *moments = wholes.pop(name).flatten(1)
            state = dict(zip(MOMENTS, moments, strict=True))
            set_state(fresh.optimizer, parameter, step, main, state)
        finish_main_update(fresh.optimizer, fresh.chunks)
    pruner.stored = {**pruner.stored, AXIS: tuple(after)}
    return fresh


@torch.no_grad()
def _survivors(trainable: Trainable, places: dict[int, Tensor]) -> dict[str, Tensor]:
    """Return main weight, exp_avg and exp_avg_sq, [3, *shape], of every parameter by its name."""
    shards = trainable.exchange()
    wholes = {}
    for name, parameter, shares in named_shares(trainable):
        gathered = shards.gather(parameter)
        assert gathered is not None, "one process has all"
        whole = gathered.view(3, *parameter.shape)
        for share in shares:
            if share.axis == AXIS and share.layer is not None:
                whole = torch.stack([cut(state, share, places[share.layer]) for state in whole])
        wholes[name] = whole
    return wholes
