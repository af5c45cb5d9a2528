"""Begin a run at another one's checkpoint, with another future.

The checkpoint becomes the new run's first one: its tensors are linked, or copied where the disk is
another one, and beside them lie the new configuration and a state without what that one has no use
for. From then on nothing is special about the run: it resumes from checkpoints of its own, and
whatever the other run throws away stays here.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_idea import config as configuration
from megatron_idea import files
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.folder import (
    checkpoints_of,
    complete,
    copy_origin,
    latest,
    read_config,
    tokenizer_beside,
)
from megatron_idea.checkpoint.saving import begin_folder, complete_folder, state_text
from megatron_idea.checkpoint.state import CheckpointError, TrainState, read_state
from megatron_idea.config import Config, ConfigError
from megatron_idea.course import num_steps
from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.prune.pruner import measures_alike
from megatron_idea.records.settings import check_may_branch, check_targets, keeps_teacher
from megatron_idea.schedule import PHASES, phase_ends
from megatron_idea.shape import LAYER_AXES

_OF_RUN = ("config.yaml", "state.json")


def find_source(config: Config, groups: ProcessGroups) -> Path:
    """Find the checkpoint that ``start_from`` names, as rank 0 sees it, and verify its files.

    Collective over all ranks.

    Raises: ConfigError when there is none, CheckpointError when it is damaged; on every rank.
    """
    found = [together(lambda: named(config.start_from) if groups.is_writer else None, groups)]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    try:
        storage.verify(found[0], groups)
    except storage.DamagedError as error:
        raise CheckpointError(f"start_from: {error}") from error
    return found[0]


def named(start_from: str) -> Path:
    """Return the checkpoint that a value of ``start_from`` means. Raises: ConfigError."""
    path = Path(start_from)
    if (path / "state.json").is_file():
        return path
    newest = latest(path)
    if newest is not None:
        return newest
    run, at, which = start_from.rpartition("@")
    there = complete(run) if at else []
    if not there:
        raise ConfigError(
            f"start_from is {start_from!r}, which is neither a checkpoint, nor a run with a "
            f"complete one, nor RUN@PHASE or RUN@TOKENS of such a run (phases: {', '.join(PHASES)})"
        )
    known = [(one, read_state(one).consumed_tokens) for one in there]
    config = read_config(there[-1])
    begin = _tokens_of(which, config, start_from)
    for one, tokens in known:
        if begin <= tokens < begin + config.batch_tokens:  # after the step that came there
            return one
    listed = ", ".join(f"{tokens:,}" for _, tokens in known)
    raise ConfigError(
        f"start_from is {start_from!r}, and {run} has no checkpoint from there, which is at "
        f"{begin:,} consumed tokens; it has those at {listed}. checkpoint.keep_phase_ends=true or "
        "keep_every_tokens keeps more of them"
    )


def _tokens_of(which: str, config: Config, start_from: str) -> int:
    """Return the consumed tokens that a phase or a number stands for."""
    if which in PHASES:
        return phase_ends(config.schedule)[which]
    tokens = configuration.whole_number(which)
    if tokens is None:
        raise ConfigError(
            f"start_from is {start_from!r}: after the @ comes a phase ({', '.join(PHASES)}) or a "
            "number of tokens, as in 1.5e12"
        )
    return tokens


def branch(config: Config, source: Path, groups: ProcessGroups) -> Path:
    """Make the run's first checkpoint of ``source``; collective over all ranks.

    Returns: its folder.
    Raises: ConfigError, on every rank, that names what cannot change, or CheckpointError.
    """
    path = checkpoints_of(config.run_dir) / source.name
    together(lambda: _branch(config, source, path) if groups.is_writer else None, groups)
    return path


def _branch(config: Config, source: Path, path: Path) -> None:
    before = _configuration(source)
    kept = tokenizer_beside(source) or ""
    check_may_branch(before, config, tokenizer=kept, where=str(source))
    state = read_state(source, before)
    _check_future(state, config, source)
    partial = path.with_name(f"{path.name}.partial")
    try:
        begin_folder(partial, path)
        known = files.read_json(source / storage.MANIFEST)["files"]
        tensors = {name: known[name] for name in known if name not in _OF_RUN}
        for name in tensors:
            storage.link(files.inside(source, name), partial / name)
        texts = (configuration.to_yaml(config), state_text(_future_state(state, before, config)))
        complete_folder(partial, path, dict(zip(_OF_RUN, texts, strict=True)), tensors)
        copy_origin(source, config.run_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        why = error.strerror or error
        raise CheckpointError(f"cannot begin {config.run_dir} from {source}: {why}") from error


def _configuration(source: Path) -> Config:
    try:
        return read_config(source)
    except ConfigError as error:
        raise CheckpointError(f"{source} cannot be started from: {error}") from error


def _check_future(state: TrainState, config: Config, source: Path) -> None:
    """Make sure that there is something left to do, and that it can be done.

    Units that are dead and still stored are looked at when they are known, after loading.
    """
    total = config.schedule.total_tokens
    if state.consumed_tokens >= total:
        raise ConfigError(
            f"start_from: {source} has consumed {state.consumed_tokens:,} tokens, and "
            f"schedule.total_tokens is {total:,}: nothing would be left to train"
        )
    live = {axis: list(state.shape.counts(axis)) for axis in (*LAYER_AXES, "hidden_size")}
    check_targets(config, live | {"num_layers": [state.shape.num_layers]}, str(source))


def _future_state(state: TrainState, before: Config, config: Config) -> TrainState:
    """Return the state that the branch begins with: what its own future has a use for."""
    alike = measures_alike(before, config)
    same_method = before.prune.strategy == config.prune.strategy
    same_plan = (before.prune, before.schedule) == (config.prune, config.schedule)
    skipped_samples = state.skipped_samples
    if not _shares_data(before, config):
        # Other data is read from its beginning: samples are counted modulo those of the whole run.
        batch = config.training.global_batch_size
        done = state.consumed_tokens // config.training.seq_length
        skipped_samples = num_steps(config) * batch - done
    return dataclasses.replace(
        state,
        began_at=state.step,
        has_scores=alike,
        pending_steps=state.pending_steps if alike else 0,
        memory=state.memory if alike and same_method else [],
        plan_due=state.plan_due and same_plan,
        teacher=state.teacher if keeps_teacher(before, config) else "",
        skipped_samples=skipped_samples,
    )


def _shares_data(one: Config, other: Config) -> bool:
    prefixes = [{os.path.realpath(e.prefix) for e in each.data.train} for each in (one, other)]
    return bool(prefixes[0] & prefixes[1])
