"""The loop: build, train, step. Reads top to bottom; all curves come from ``schedule``."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea import checkpoint, guard
from megatron_idea import config as configuration
from megatron_idea.checkpoint.saving import Saving
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, ConfigError, ParallelConfig, validate
from megatron_idea.course import (
    TeacherSize,
    layout_at,
    num_steps,
    removed_at,
    wants_fewer_nodes,
)
from megatron_idea.data.batches import Batches
from megatron_idea.data.of_run import open_batches, validation_batches
from megatron_idea.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from megatron_idea.distill.source import (
    average_snapshots,
    due_snapshots,
    inherit_teacher,
    open_teacher,
    take_snapshot,
)
from megatron_idea.distill.teacher import Lessons, Teacher
from megatron_idea.engine.distributed import (
    ProcessGroups,
    joined,
    memory_bytes,
    regroup,
    together,
    world_size_from_environment,
)
from megatron_idea.engine.gpus import peak_flops
from megatron_idea.engine.launcher import nodes_from_environment
from megatron_idea.engine.optimizer import clip_and_step, squared_grad_norm
from megatron_idea.engine.passes import forward_backward
from megatron_idea.engine.trainable import Trainable, assemble, modules_left_alone
from megatron_idea.evaluation.generate import sample_live
from megatron_idea.evaluation.held_out import held_out_loss
from megatron_idea.prune.plan import Plan
from megatron_idea.prune.probe import Probe
from megatron_idea.prune.pruner import Pruner
from megatron_idea.prune.relocate import extension
from megatron_idea.records.lock import RunLock
from megatron_idea.records.log import RecordError, RunLog
from megatron_idea.records.progress import Progress
from megatron_idea.records.record import Record
from megatron_idea.records.saved import saved_tokens
from megatron_idea.records.settings import check_targets
from megatron_idea.schedule import (
    crossed,
    distillation_share,
    learning_rate,
    phase,
    phase_ended,
    teaching_begins,
)


@dataclass
class Run:
    """The parts of a run on this rank."""

    config: Config
    given: Config
    """What the user has asked for: the same but for the layout, which may have changed since."""
    groups: ProcessGroups
    trainable: Trainable
    pruner: Pruner
    data: Batches
    held_out: Batches | None
    tokenizer: Tokenizer
    log: RunLog
    progress: Progress
    stop: StopSignal
    teacher: Teacher | None = None
    """A model that the loss listens to, once there is one."""
    saving: Saving | None = None
    """A checkpoint on its way to the disk."""
    saved_step: int = -1
    """Of the last checkpoint that this process has completed; -1: of none."""


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR1; the loop finishes its step, saves and leaves.

    The same one again means now. Another one does not: Slurm warns with SIGUSR1 and preempts with
    SIGTERM. Nor does an echo: Slurm may signal every process of a job step, and the launcher, which
    is one of them, passes its signal on.
    """

    ECHO_S = 2.0

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = name, now
        elif name == self.received and now - self._received_at > self.ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def train(config: Config, rendezvous: str | None = None) -> TrainState:
    """Train from the latest checkpoint of ``config.run_dir``, or from its start, to the last token.

    A run starts from its seed, or at the checkpoint that ``config.start_from`` names.

    ``rendezvous`` as in ``start_distributed``; torchrun needs none.

    Returns: the state at the end; its tokens are fewer than the total when a signal ended the run.
    Raises: ConfigError, DataError, CheckpointError, RunFolderError, on every rank, for what the
        user can mend.
    """
    # Model and process groups are garbage in cycles, and the groups' threads wake all the time:
    # at the end they are collected, or another run of this process would keep them for good.
    with modules_left_alone():
        extension()  # a wrong switch is found now, not at the first compaction
        now = config
        if config.parallel_after_prune is None:
            validate(config, world_size_from_environment())
        if not config.data.train:
            raise ConfigError("data.train is empty: name at least one indexed dataset to train on")

        def choose() -> ParallelConfig:
            nonlocal now
            saved = [saved_tokens(config.run_dir) if dist.get_rank() == 0 else 0]
            dist.broadcast_object_list(saved, src=0)
            now = layout_at(config, saved[0])
            validate(now, world_size_from_environment())
            return now.parallel

        choosing = None if config.parallel_after_prune is None else choose
        with joined(config.parallel, config.training.seed, rendezvous, choosing) as groups:
            lock = RunLock(config.run_dir)
            together(lambda: lock.acquire() if groups.is_writer else None, groups)
            try:
                return loop(now, groups, config)
            finally:
                lock.release()


def loop(config: Config, groups: ProcessGroups, given: Config) -> TrainState:
    """Step after step, with what is done between them, to the last token or until told to stop.

    Args:
        given: what the user has asked for, of which ``config`` is the present layout.
    """
    run, state = build(config, groups, given)
    if state.step == state.began_at:
        evaluate(run, state, "start")
        if not state.teacher:
            prepare_teacher(run, state)
    while state.consumed_tokens < config.schedule.total_tokens:
        before = state.consumed_tokens
        watch = state.watch
        record, stopping = step(run, state)
        if guard.begins(watch, state.watch) and react(run, state, record.loss):
            run, state = roll_back(run, state)
            continue
        prepare_teacher(run, state)
        tokens = state.consumed_tokens
        ended = phase_ended(config.schedule, before, tokens)
        if ended:
            evaluate(run, state, "phase_end")
        elif crossed(config.evaluation.every_tokens, before, tokens):
            evaluate(run, state, "every")
        leaving = wants_fewer_nodes(config, tokens, nodes_from_environment())
        ending = stopping or leaving
        if ended or ending or crossed(config.checkpoint.every_tokens, before, tokens):
            save(run, state, wait=stopping)
        if leaving:
            finish_saving(run)  # of the phase's end, or of this step
            run.log.event("fewer_nodes", step=state.step, tokens=tokens)
            run.progress.note(f"saved, to go on on {config.nodes_after_prune} nodes")
            break
        is_last = stopping or tokens >= config.schedule.total_tokens
        if not is_last and run.config.parallel != layout_at(given, tokens).parallel:
            run, state = change_layout(run, state)
        if stopping and state.consumed_tokens < config.schedule.total_tokens:
            run.log.event("signal", step=state.step, name=run.stop.received)
            run.progress.note(f"stopped by a signal after step {state.step:,}, which is saved")
            break
    else:
        finish_saving(run)
        run.log.event("finished", step=state.step, tokens=state.consumed_tokens)
    finish_saving(run)
    run.progress.close()
    run.log.close()
    together(run.log.check, run.groups)
    dist.barrier()  # a launcher ends all workers when the first has left with a status
    return state


def change_layout(run: Run, state: TrainState) -> tuple[Run, TrainState]:
    """Go on in the layout of the small model, from a checkpoint of this step."""
    before, given, stop = run.groups, run.given, run.stop
    config, was = layout_at(given, state.consumed_tokens), before.layout
    finish_saving(run)
    if run.saved_step != state.step:
        save(run, state, wait=True)
    leave(run)
    del run
    groups = regroup(before, config.parallel, config.training.seed)
    again, state = build(config, groups, given)
    again.stop.received = again.stop.received or stop.received
    place = {"step": state.step, "tokens": state.consumed_tokens}
    again.log.event("layout_changed", was=was, now=groups.layout, **place)
    again.progress.note(f"from {was} to {groups.layout}")
    return again, state


def leave(run: Run) -> None:
    """Give back what a run holds, before another one takes its place in this process."""
    run.progress.close()
    run.log.close()
    run.trainable.release()
    run.teacher = None
    gc.collect()  # a teacher is in cycles


def build(
    config: Config, groups: ProcessGroups, given: Config | None = None
) -> tuple[Run, TrainState]:
    """Assemble a run at its latest checkpoint, or at its start.

    Args:
        given: what the user has asked for, where ``config`` has another layout.
    """
    given = given or config
    run_dir = Path(config.run_dir)
    path, damage = checkpoint.choose(config, groups)
    source = None
    if path is None and config.start_from:
        source = checkpoint.find_source(config, groups)
        together(lambda: inherit_teacher(config, source) if groups.is_writer else None, groups)
        path = checkpoint.branch(config, source, groups)
    if path is not None:
        checkpoint.check_same_run(path, config)
    state = TrainState.fresh(config) if path is None else checkpoint.read_state(path, config)
    num_samples = num_steps(config) * config.training.global_batch_size
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = open_batches(config, groups, tokenizer, "train", num_samples)
    held_out = validation_batches(config, groups, tokenizer)
    trainable = assemble(config.sections, groups, state.shape, initialize=path is None)
    pruner = Pruner(config, trainable)
    if path is not None:
        checkpoint.load(trainable, pruner, path)
    if source is not None:
        check_targets(config, pruner.live(pruner.alive), str(source))

    def open_log() -> RunLog:
        if groups.is_writer:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / "config.yaml").write_text(configuration.to_yaml(given), "utf-8")
                if config.data.tokenizer != "byte":
                    copy_tokenizer(config.data.tokenizer, run_dir / checkpoint.TOKENIZER)
            except OSError as error:
                raise RecordError.of(run_dir, error) from error
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        total = peak * groups.world.size() if peak else None
        return RunLog(run_dir, config, groups.is_writer, step=state.step, peak_flops=total)

    log = together(open_log, groups)
    progress = Progress(config, groups.is_writer)
    # Again after a kill before the first step was done, which may have come before this event, too.
    if config.start_from and state.step == state.began_at:
        place = {"step": state.step, "tokens": state.consumed_tokens}
        log.event("branched", source=str(source or config.start_from), **place)
    for found in damage:
        log.event("damaged", reason=found)
        progress.note(found)
    if path is not None:
        done = state.consumed_tokens >= config.schedule.total_tokens
        going_on = f"starting from {source}" if source else f"resuming at {path.name}"
        progress.note(f"{path.name}: this run is finished" if done else going_on)
    run = Run(
        config,
        given,
        groups,
        trainable,
        pruner,
        data,
        held_out,
        tokenizer,
        log,
        progress,
        StopSignal(),
    )
    if config.distill.teaches and (config.distill.teacher != "self" or state.teacher):
        run.teacher, state.teacher = open_teacher(config, groups, tokenizer, state.teacher)
    if plan := pruner.due_plan(trainable, state.consumed_tokens):
        apply(run, state, plan)
    return run, state


def step(run: Run, state: TrainState) -> tuple[Record, bool]:
    """One optimizer step: forward, backward, observe, update, plan, apply.

    Returns: the step's record, and whether any rank was asked to stop.
    """
    config, trainable, pruner = run.config, run.trainable, run.pruner
    begin = time.perf_counter()
    tokens = state.consumed_tokens + config.batch_tokens
    lr = learning_rate(config.schedule, tokens)
    samples = samples_before(run, state, state.consumed_tokens)
    alpha = distillation_share(config.schedule, config.distill, tokens)
    with taught(run, samples, alpha) as lessons, pruner.watched(trainable, tokens) as seen:
        losses = forward_backward(trainable, run.data, samples)
    # Weights before the update, gradients reduced over data-parallel ranks and not yet clipped.
    observed = pruner.observe(trainable, tokens, seen)
    means, grad_norm, stopping, saved = share(run, losses, lessons)
    loss = means["loss"]
    taken = math.isfinite(loss) and math.isfinite(grad_norm)
    if taken:
        clip_and_step(trainable.optimizer, lr, grad_norm)
    if saved:
        finish_saving(run)
    step_s = time.perf_counter() - begin
    before, state.watch = state.watch, guard.observe(config.guard, state.watch, loss, taken)
    state.step += 1
    state.consumed_tokens = tokens
    state.skipped += not taken
    if state.flops is not None:
        state.flops += config.batch_tokens * flops_per_token(run, taught=alpha > 0)
    plan = None
    if taken:
        pruner.record(observed)
        plan = decide(run, state, before)
    grad_norm = grad_norm if math.isfinite(loss) else math.nan
    measured = Measured(lr=lr, grad_norm=grad_norm, step_s=step_s, **means)
    record = note(run, state, measured, plan)
    if plan is not None:
        apply(run, state, plan)
    return record, stopping


def decide(run: Run, state: TrainState, before: guard.Watch) -> Plan | None:
    """Say what the step that was taken removes; ``before``: what the guard knew before it."""
    # A compaction would save this step, and the rollback that follows would go back to it.
    if guard.rolls_back(run.config.guard, before, state.watch):
        return None
    pausing = guard.pauses_pruning(run.config.guard, state.watch)
    return run.pruner.plan(run.trainable, state.consumed_tokens, probe(run, state), pausing)


def probe(run: Run, state: TrainState) -> Probe:
    """Return the batch of the step that ``state`` ends with, to look at the model again."""
    last = state.consumed_tokens - run.config.batch_tokens
    return Probe(run.trainable, run.data, samples_before(run, state, last))


@dataclass(frozen=True)
class Measured:
    """What a step has measured of itself."""

    loss: float
    lr: float
    grad_norm: float
    step_s: float
    kl: float | None = None
    teacher_loss: float | None = None
    acceptance: float | None = None


def note(run: Run, state: TrainState, measured: Measured, plan: Plan | None) -> Record:
    """Write down the step that ``state`` ends with, and why ``plan`` chose as it did."""
    config, pruner, tokens = run.config, run.pruner, state.consumed_tokens
    record = Record(
        step=state.step,
        tokens=tokens,
        phase=phase(config.schedule, tokens),
        removed=removed_at(config, tokens),
        live=pruner.live((plan or pruner).alive),
        stored=(plan or run.trainable).shape.by_number(config.model.num_layers),
        tokens_per_s=config.batch_tokens / measured.step_s,
        skipped=state.skipped,
        memory_bytes=memory_bytes(),
        flops=state.flops,
        **vars(measured),
    )
    run.progress.update(run.log.write(record))
    if run.groups.is_writer:
        for scores in pruner.score_records(tokens):
            run.log.scores({"step": state.step, "tokens": tokens, **scores})
    for trial in pruner.take_trials():
        run.log.event("layer_removed", step=state.step, tokens=tokens, **vars(trial))
    if plan is not None and bool((plan.gains != 1).any()):
        gains = plan.gains.tolist()
        run.log.event("norms_rescaled", step=state.step, tokens=tokens, gains=gains)
    return record


def flops_per_token(run: Run, taught: bool) -> int:
    """Training FLOPs of a token in the present shape; ``taught``: with the teacher's pass."""
    model, seq_length = run.config.model, run.config.training.seq_length
    flops = run.trainable.shape.flops_per_token(model, seq_length)
    if taught:
        assert run.teacher is not None
        flops += TeacherSize(run.teacher.model, run.teacher.shape).flops_per_token(seq_length)
    return flops


def react(run: Run, state: TrainState, loss: float) -> bool:
    """A spike has begun: log it. Returns: whether to roll back.

    Raises: DivergedError when that was done too often already.
    """
    settings, watch = run.config.guard, state.watch
    run.log.event(
        "spike", step=state.step, tokens=state.consumed_tokens, loss=loss, average=watch.average
    )
    run.progress.note(f"loss spike at step {state.step:,}: {loss:.3f}")
    if settings.on_spike != "rollback":
        return False
    if watch.rollbacks >= settings.max_rollbacks:
        raise guard.DivergedError(
            f"a loss spike at step {state.step} after {watch.rollbacks} rollbacks, as many as "
            "guard.max_rollbacks allows; a lower schedule.lr may help"
        )
    finish_saving(run)
    return bool(checkpoint.complete_for_all(run.config.run_dir, run.groups))


def roll_back(run: Run, state: TrainState) -> tuple[Run, TrainState]:
    """Go on from the last checkpoint, with the data that comes after the spike."""
    config, groups, rollbacks = run.config, run.groups, state.watch.rollbacks + 1
    given = run.given
    stop = run.stop  # may be told to stop until the new one takes over
    spike_at = state.step, state.consumed_tokens, state.skipped_samples
    leave(run)
    del run
    again, state = build(config, groups, given)
    again.stop.received = again.stop.received or stop.received
    window = (spike_at[1] - state.consumed_tokens) // config.training.seq_length
    state.skipped_samples = spike_at[2] + window
    state.watch = dataclasses.replace(state.watch, rollbacks=rollbacks)
    again.log.event(
        "rolled_back", step=state.step, from_step=spike_at[0], skipped_samples=state.skipped_samples
    )
    return again, state


def apply(run: Run, state: TrainState, plan: Plan) -> None:
    """Zero what the plan removes, and cut zeros out when it asks for a smaller shape.

    Before units go for good a checkpoint is made, unless we come from it.
    """
    compacts = plan.shape != run.trainable.shape
    if run.config.checkpoint.before_compaction and compacts and run.pruner.due is None:
        run.pruner.decide(plan)
        save(run, state, wait=True)  # the compaction needs it complete, and its memory
    run.pruner.mend(run.trainable, plan, probe(run, state))
    run.pruner.silence(run.trainable, plan)
    if not compacts:
        return
    measured = run.config.evaluation.around_compaction
    if measured:
        measure(run, state, "compaction_before")
    report = run.pruner.compact(run.trainable, plan)
    state.shape = run.trainable.shape
    run.log.event("compacted", step=state.step, tokens=state.consumed_tokens, **vars(report))
    if measured:
        measure(run, state, "compaction_after")


def samples_before(run: Run, state: TrainState, tokens: int) -> int:
    """Count the training samples that come before the step after ``tokens`` consumed tokens."""
    training = run.config.training
    samples = tokens // training.seq_length + state.skipped_samples
    # Skipping past the end of the data goes on at its beginning.
    return samples % (num_steps(run.config) * training.global_batch_size)


@contextlib.contextmanager
def taught(run: Run, samples: int, alpha: float) -> Iterator[Lessons | None]:
    """Let the teacher into the loss of the next step; None where nobody asks it."""
    if alpha == 0:
        yield None
        return
    assert run.teacher is not None, "its time has come, and it was not prepared"
    with run.teacher.teaching(run.trainable.chunks, run.data, samples, alpha) as lessons:
        yield lessons


def prepare_teacher(run: Run, state: TrainState) -> None:
    """Take the snapshots that are due; after the last of them the run has its own teacher."""
    config, groups = run.config, run.groups
    for mark in due_snapshots(config, state.consumed_tokens):
        take_snapshot(config, run.trainable, mark)
        if mark < teaching_begins(config.schedule, config.distill):
            continue
        run.teacher, state.teacher = average_snapshots(config, groups)
        found: dict[str, Any] = {"digest": state.teacher}
        if run.held_out is not None:
            found["val_loss"], _ = held_out_loss(run.teacher.chunks, run.held_out, groups)
        run.log.event("teacher", step=state.step, tokens=state.consumed_tokens, **found)


def share(
    run: Run, losses: list[Tensor], lessons: Lessons | None = None
) -> tuple[dict[str, float], float, bool, bool]:
    """Exchange what all ranks must know of a step; of all in it only this makes the host wait.

    Returns: means over the whole batch, under the names of ``Measured``: ``loss`` is the cross
    entropy, whatever was learnt from; the global gradient norm, whether to stop, and whether all
    ranks have written their part of a checkpoint.
    Raises: RecordError on every rank when rank 0 could not write the last step's records.
    """
    groups = run.groups

    def number(value: float) -> Tensor:
        return torch.full((), float(value), dtype=torch.float64, device=groups.device)

    means = {"loss": losses}
    if lessons is not None:
        means = {
            "loss": lessons.cross_entropy,
            "kl": lessons.kl,
            "teacher_loss": lessons.teacher_cross_entropy,
        }
        if run.config.distill.acceptance:
            means["acceptance"] = lessons.acceptance
    counts = bool(losses) and groups.tp.rank() == 0
    word = torch.stack(
        [
            *(
                torch.stack(each).double().mean() / groups.dp.size() if counts else number(0.0)
                for each in means.values()
            ),
            number(run.stop.received is not None),
            number(run.saving is not None and not run.saving.done),
            number(run.log.failure is not None),
        ]
    )
    dist.all_reduce(word)
    squared_norm = squared_grad_norm(run.trainable.optimizer)
    *found, stops, writing, failed, squared = torch.cat([word, squared_norm.double()]).tolist()
    if failed:
        together(run.log.check, groups)
    saved = run.saving is not None and not writing
    return dict(zip(means, found, strict=True)), squared**0.5, stops > 0, saved


def evaluate(run: Run, state: TrainState, why: str) -> None:
    """Measure the held-out loss, and let the model write; log both."""
    measure(run, state, why)
    if run.config.evaluation.sample_prompts:
        place = {"step": state.step, "tokens": state.consumed_tokens}
        for one in sample_live(run.trainable.chunks, run.config, run.groups, run.tokenizer):
            run.log.sample(place | {"prompt": one.prompt, "text": one.text})


def measure(run: Run, state: TrainState, why: str) -> None:
    """Measure the held-out loss and log it; nothing without held-out data."""
    if run.held_out is None:
        return
    loss, scored = held_out_loss(run.trainable.chunks, run.held_out, run.groups)
    place = {"step": state.step, "tokens": state.consumed_tokens}
    run.log.event("evaluated", **place, val_loss=loss, scored_tokens=scored, why=why)
    run.progress.note(f"held-out loss {loss:.4f} after {state.consumed_tokens:,} tokens")


def save(run: Run, state: TrainState, wait: bool = False) -> None:
    """Begin to write a checkpoint; the end of it comes now with ``wait``, else some steps later."""
    finish_saving(run)
    run.saving = checkpoint.Saving(run.config, run.trainable, run.pruner, state)
    if wait or not run.config.checkpoint.asynchronous:
        finish_saving(run)


def finish_saving(run: Run) -> None:
    """Complete the checkpoint that is being written, if there is one, and log it."""
    saving, run.saving = run.saving, None
    if saving is None:
        return
    begin = time.perf_counter()
    path = saving.finish()
    run.saved_step = saving.state.step
    waited_s = time.perf_counter() - begin
    run.log.event(
        "saved", step=saving.state.step, path=str(path), seconds=saving.seconds, waited_s=waited_s
    )
