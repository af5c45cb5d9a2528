"""Forecast what a run takes of a cluster: memory per GPU, GPU-hours, messages; layouts that fit.

Memory and messages come from dry runs of the code itself (``footprint.py``), FLOPs from shapes
(``estimate.py``). Seconds and GPU-hours are estimates: FLOPs over the GPU's peak times an assumed
MFU, bytes over the bandwidth of data sheets. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError, validate
from megatron_idea.course import TeacherSize, num_steps, shape_plan, target_shape
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.gpus import USABLE, Gpu
from megatron_idea.engine.model import layers_by_stage
from megatron_idea.planning import footprint
from megatron_idea.planning.dry_run import DryRun, dry_run
from megatron_idea.planning.estimate import Counts, Forecast, counts, forecast, teacher_size
from megatron_idea.schedule import phase_ends
from megatron_idea.shape import Shape


@dataclass(frozen=True)
class Assumptions:
    """Holds what cannot be read off shapes; every figure in seconds or hours rests on it."""

    mfu: float = 0.4
    """Model FLOPs utilization: share of the peak that the model's own FLOPs reach."""
    network_bytes_per_s: float = 50e9
    """Of one GPU to other nodes, one way: a port of 400 Gb/s each."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by kind."""

    weights: int
    gradients: int
    main_weights: int
    moments: int
    activations: int
    teacher: int
    """Its weights, and on the last stage its hidden states of a step, unless the host keeps them.
    It comes when teaching begins, which is before the first compaction."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Stretch:
    """Training in one shape, from ``tokens`` on; and the compaction that led to it."""

    tokens: int
    stored: Counts
    stage: int
    """Pipeline stage whose GPUs are the fullest in this shape: the figures are theirs."""
    memory: Memory
    total_bytes: int
    compaction_peak_bytes: int
    """Most bytes at once on any GPU while compacting to this shape, gradients freed; 0 at the
    start. Which units and layers go is drawn by chance."""
    compaction_sent_bytes: int
    """By the GPU that sends most."""
    compaction_wire_s: float
    """Those bytes over the network alone; the rebuild itself is not in it."""
    sent_bytes: dict[str, int]
    """By one GPU in one optimizer step."""
    checkpoint_bytes: int
    step_s: float


@dataclass(frozen=True)
class PhaseHours:
    """GPU-hours of a phase, and of the same tokens trained otherwise."""

    name: str
    tokens: int
    flops_per_token: float
    this_run: float
    teacher: float | None
    """Of its forward passes, which are not in the others; None where its size cannot be read."""
    zeros_only: float
    target_from_scratch: float


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of those that may be the fullest, see ``stages_to_measure``."""

    stage: int
    parameters: int
    """On one of its GPUs, in the enlarged shape."""
    shard: int
    """Parameters whose optimizer state one of its GPUs holds: the most of any."""
    memory: Memory
    sent_bytes: dict[str, int]


@dataclass(frozen=True)
class Budget:
    """A run on so many GPUs. Made by ``make_budget``."""

    gpu: str
    gpus: int
    gpu_memory_bytes: float
    usable_bytes: float
    assumptions: Assumptions
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    micro_batch_size: int
    num_microbatches: int
    stages: list[Stage]
    stretches: list[Stretch]
    phases: list[PhaseHours]
    days: float
    peak_bytes: int
    refusal: str
    """Why it does not fit and what would help; empty where it does."""


def checkpoint_bytes(config: Config, shape: Shape) -> int:
    """Add up a checkpoint's tensors: weights, both moments and, for bf16, fp32 main weights."""
    each = 2 + 4 + 8 if config.training.precision == "bf16" else 4 + 8
    return each * shape.parameters(config.model).total


def num_microbatches(config: Config, world_size: int) -> int:
    """Count the micro-batches of one data-parallel rank in an optimizer step."""
    parallel, training = config.parallel, config.training
    dp = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    return training.global_batch_size // (training.micro_batch_size * dp)


def step_seconds(
    config: Config,
    world_size: int,
    gpu: Gpu,
    assume: Assumptions,
    shape: Shape,
    sent: dict[str, int],
    teacher: TeacherSize | None = None,
) -> dict[str, float]:
    """Estimate one optimizer step: ``compute`` at the assumed MFU, and what waits beside it.

    With ``teacher`` its forward passes are computed, too, over the same stages.

    ``bubble``: compute x (PP - 1) / (virtual PP x micro-batches), and where layers do not divide
    the wait for ranks that have more than their share. ``tp``, ``pp``: bytes over
    NVLink inside a node, over the network between nodes. ``dp``: over the network; with
    overlap_grad_reduce only what is longer than the computation.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    flops = shape.flops_per_token(config.model, config.training.seq_length)
    flops += teacher.flops_per_token(config.training.seq_length) if teacher else 0
    compute = config.batch_tokens * flops / (world_size * gpu.peak_flops * assume.mfu)
    stages = layers_by_stage(shape.num_layers, parallel.num_stages)
    most = max(sum(map(len, stages[rank::pp])) for rank in range(pp)) * pp / shape.num_layers
    passes = parallel.virtual_pipeline_model_parallel_size * num_microbatches(config, world_size)

    def wire(kind: str, ranks: int) -> float:
        is_inside = ranks <= gpu.gpus_per_node
        return sent[kind] / (gpu.link_bytes_per_s if is_inside else assume.network_bytes_per_s)

    dp = wire("dp", world_size) + wire("embedding", world_size)
    return {
        "compute": compute,
        "bubble": compute * (most * (1 + (pp - 1) / passes) - 1),
        "tp": wire("tp", tp),
        "pp": wire("pp", tp * pp),
        "dp": max(0.0, dp - compute) if parallel.overlap_grad_reduce else dp,
    }


@dataclass(frozen=True)
class _Measured:
    """One stage in one shape."""

    stage: int
    layers: int
    """On one of its GPUs."""
    parameters: int
    shard: int
    memory: Memory
    sent: dict[str, int]


@dataclass(frozen=True)
class _Teaching:
    """A teacher on one stage."""

    teacher: Teacher
    hidden_bytes: int
    """Of a micro-batch, on a GPU of this stage."""
    bytes: int
    """Of its weights, and of what waits for the step's losses on the GPU."""

    @staticmethod
    def of(
        dry: DryRun, config: Config, world_size: int, size: TeacherSize | None
    ) -> _Teaching | None:
        if size is None:
            return None
        teacher, pp = footprint.build_teacher(config, dry, size), dry.groups.pp
        is_last = pp.rank() == pp.size() - 1
        hidden = footprint.hidden_bytes(config, size) if is_last else 0
        waits = (
            num_microbatches(config, world_size) if config.distill.keep_hidden == "device" else 0
        )
        return _Teaching(teacher, hidden, footprint.teacher_bytes(teacher) + waits * hidden)


def _measure(
    dry: DryRun,
    config: Config,
    stage: int,
    shape: Shape,
    teaching: _Teaching | None,
    runs: bool,
) -> _Measured:
    """Build a stage's first rank; ``runs`` takes a step, else activations and messages are none."""
    trainable = footprint.build(config, dry, shape)
    kept = footprint.kept_bytes(trainable)
    shard, mine = footprint.fullest_shard(trainable), footprint.own_shard(trainable)
    for kind in ("main_weights", "moments"):
        kept[kind] = kept[kind] * shard // mine
    step = footprint.Step(0, {})
    if runs and teaching:
        step = footprint.step(dry, trainable, teaching.teacher, teaching.hidden_bytes)
    elif runs:
        step = footprint.step(dry, trainable)
    parameters = sum(p.numel() for p in trainable.parameters)
    memory = Memory(
        **kept, activations=step.activation_bytes, teacher=teaching.bytes if teaching else 0
    )
    layers = len(trainable.mlps)
    return _Measured(stage, layers, parameters, shard, memory, step.sent_bytes)


def _compactions(
    dry: DryRun,
    config: Config,
    full: Shape,
    changes: Sequence[footprint.Change],
    teaching: _Teaching | None,
) -> list[footprint.Compaction]:
    """Take a stage's first rank through all compactions, its teacher beside it."""
    done = []
    beside = footprint.teacher_bytes(teaching.teacher) if teaching else 0
    trainable = footprint.build(config, dry, full)
    for change in changes:
        trainable, compaction = footprint.compact(dry, trainable, change)
        peak = compaction.peak_bytes + beside
        done.append(dataclasses.replace(compaction, peak_bytes=peak))
    return done


def _corners(first: Shape, last: Shape) -> Iterator[tuple[dict[str, bool], Shape]]:
    """Iterate over the shapes in which each axis has its first or its last count.

    Yields: axis -> whether it has the last one, for the axes that shrink; shape.
    """
    before, after = counts(first), counts(last)
    axes = [axis for axis in before if after[axis] < before[axis]]
    for ends in itertools.product((False, True), repeat=len(axes)):
        shape = first
        for axis, at_end in zip(axes, ends, strict=True):
            shape = shape.with_counts(axis, after[axis]) if at_end else shape
        yield dict(zip(axes, ends, strict=True)), shape


def _figures(
    dry: DryRun,
    config: Config,
    stage: int,
    shapes: Sequence[Shape],
    teaching: _Teaching | None,
) -> Iterator[_Measured]:
    """Measure a stage in each of ``shapes``; steps are run in the corners between the first and the
    last, and what lies between them is interpolated.

    A peak is a maximum of sums of products of counts: convex in each count alone, so straight lines
    from corner to corner are never below it, but for a vector or two of one number a channel.
    Messages are such sums. The count of layers is that of the stage.
    """
    corners = [
        (ends, _measure(dry, config, stage, shape, teaching, runs=True))
        for ends, shape in _corners(shapes[0], shapes[-1])
    ]
    first, last = corners[0][1], corners[-1][1]
    ends_of = {axis: (counts(shapes[0])[axis], counts(shapes[-1])[axis]) for axis in corners[0][0]}
    if "num_layers" in ends_of:
        ends_of["num_layers"] = (first.layers, last.layers)
    for shape in shapes:
        at = _measure(dry, config, stage, shape, teaching, runs=False)
        here = counts(shape) | {"num_layers": at.layers}
        gone = {a: (begin - here[a]) / max(1, begin - end) for a, (begin, end) in ends_of.items()}
        shares = [
            math.prod(gone[axis] if at_end else 1 - gone[axis] for axis, at_end in ends.items())
            for ends, _ in corners
        ]
        sides = [corner for _, corner in corners]

        def mix(values: Iterable[int], shares: Sequence[float] = shares) -> int:
            return round(sum(map(operator.mul, shares, values)))

        activations = mix([side.memory.activations for side in sides])
        yield dataclasses.replace(
            at,
            memory=dataclasses.replace(at.memory, activations=activations),
            sent={kind: mix([side.sent[kind] for side in sides]) for kind in first.sent},
        )


def stages_to_measure(config: Config, shapes: Sequence[Shape]) -> list[int]:
    """List the pipeline stages one of which is the fullest: the ends, and perhaps the second.

    A stage between the ends has fewer micro-batches in flight than the first and no embedding. But
    where layers do not divide, the second has one more.
    """
    pp, stages = config.parallel.pipeline_model_parallel_size, config.parallel.num_stages
    is_uneven = any(shape.num_layers % stages for shape in shapes)
    return sorted({0, pp - 1} | ({1} if is_uneven and pp > 2 else set()))


def make_budget(
    config: Config, world_size: int, gpu: Gpu, assume: Assumptions | None = None
) -> Budget:
    """Work out what a run takes of ``world_size`` GPUs.

    Raises: ConfigError when the configuration cannot run on so many.
    """
    assume = assume or Assumptions()
    config = _on_gpus(config)
    run, changes = forecast(config, world_size), shape_plan(config)
    teacher = teacher_size(config)
    shapes = [Shape.full(config.model), *(change.shape for change in changes)]
    begins = [0, *(change.tokens for change in changes)]
    drawn = footprint.random_changes(config, shapes)
    by_stage, compactions = {}, []
    for stage in stages_to_measure(config, shapes):
        with dry_run(config, world_size, stage) as dry:
            teaching = _Teaching.of(dry, config, world_size, teacher)
            by_stage[stage] = list(_figures(dry, config, stage, shapes, teaching))
            compactions.append(_compactions(dry, config, shapes[0], drawn, teaching))
    small: _Measured | None = None
    if config.parallel_after_prune is not None and changes:
        small = _fullest(config.after_prune, world_size, shapes[-1], teacher)
    none = footprint.Compaction(0, 0)
    stretches = []
    for number, (tokens, shape, *done) in enumerate(
        zip(begins, shapes, *([none, *of_stage] for of_stage in compactions), strict=True)
    ):
        at = max((of[number] for of in by_stage.values()), key=lambda of: of.memory.total)
        there = config
        if small is not None and shape is shapes[-1]:
            at, there = small, config.after_prune
        sent_bytes = max(change.sent_bytes for change in done)
        seconds = step_seconds(there, world_size, gpu, assume, shape, at.sent, teacher)
        stretches.append(
            Stretch(
                tokens=tokens,
                stored=counts(shape),
                stage=at.stage,
                memory=at.memory,
                total_bytes=at.memory.total,
                compaction_peak_bytes=max(change.peak_bytes for change in done),
                compaction_sent_bytes=sent_bytes,
                compaction_wire_s=sent_bytes / assume.network_bytes_per_s,
                sent_bytes=at.sent,
                checkpoint_bytes=checkpoint_bytes(config, shape),
                step_s=sum(seconds.values()),
            )
        )
    phases = list(_phase_hours(config, run, gpu, assume))
    peak = max(max(s.total_bytes, s.compaction_peak_bytes) for s in stretches)
    return Budget(
        gpu=gpu.name,
        gpus=world_size,
        gpu_memory_bytes=gpu.memory_bytes,
        usable_bytes=USABLE * gpu.memory_bytes,
        assumptions=assume,
        tensor_parallel=run.tensor_parallel,
        pipeline_parallel=run.pipeline_parallel,
        data_parallel=run.data_parallel,
        micro_batch_size=config.training.micro_batch_size,
        num_microbatches=num_microbatches(config, world_size),
        stages=[
            Stage(s, at[0].parameters, at[0].shard, at[0].memory, at[0].sent)
            for s, at in by_stage.items()
        ],
        stretches=stretches,
        phases=phases,
        days=sum(p.this_run + (p.teacher or 0) for p in phases) / world_size / 24,
        peak_bytes=peak,
        refusal=refusal(config, stretches[0].memory, gpu),
    )


def _on_gpus(config: Config) -> Config:
    """Return the configuration with what its layouts leave open chosen as on GPUs."""
    after = config.parallel_after_prune
    return configuration.replace(
        config,
        parallel=config.parallel.resolved(cuda=True),
        parallel_after_prune=None if after is None else after.resolved(cuda=True),
    )


def _fullest(
    config: Config, world_size: int, shape: Shape, teacher: TeacherSize | None
) -> _Measured:
    """Measure the stage whose GPUs are the fullest in one shape, with the most messages of any."""
    stages = _stages(config, world_size, shape, teacher)
    sent = {kind: max(at.sent[kind] for at in stages) for kind in stages[0].sent}
    return dataclasses.replace(max(stages, key=lambda at: at.memory.total), sent=sent)


def _stages(
    config: Config, world_size: int, shape: Shape, teacher: TeacherSize | None
) -> list[_Measured]:
    """Take a step of each stage that may be the fullest, in one shape."""
    found = []
    for stage in stages_to_measure(config, [shape]):
        with dry_run(config, world_size, stage) as dry:
            teaching = _Teaching.of(dry, config, world_size, teacher)
            found.append(_measure(dry, config, stage, shape, teaching, runs=True))
    return found


def _phase_hours(
    config: Config, run: Forecast, gpu: Gpu, assume: Assumptions
) -> Iterator[PhaseHours]:
    per_hour = 3600 * gpu.peak_flops * assume.mfu
    full, target = (
        shape.flops_per_token(config.model, config.training.seq_length)
        for shape in (Shape.full(config.model), target_shape(config))
    )
    for phase in run.phases:
        yield PhaseHours(
            name=phase.name,
            tokens=phase.tokens,
            flops_per_token=phase.flops / phase.tokens if phase.tokens else 0.0,
            this_run=phase.flops / per_hour,
            teacher=None if phase.teacher_flops is None else phase.teacher_flops / per_hour,
            zeros_only=phase.tokens * full / per_hour,
            target_from_scratch=phase.tokens * target / per_hour,
        )


def refusal(config: Config, memory: Memory, gpu: Gpu) -> str:
    """Say why training does not fit a GPU, which memory is most, what helps; empty if it fits."""
    usable = USABLE * gpu.memory_bytes
    if memory.total <= usable:
        return ""
    kinds = dataclasses.asdict(memory)
    largest = max(kinds, key=lambda kind: kinds[kind])
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    micro = config.training.micro_batch_size
    smaller = f"TP above {tp}" if tp < gpu.gpus_per_node else f"PP above {pp}"
    if largest == "activations":
        help_ = f"training.micro_batch_size below {micro}" if micro > 1 else smaller
    elif largest in ("main_weights", "moments"):
        is_sharded = config.parallel.use_distributed_optimizer
        help_ = "more GPUs" if is_sharded else "parallel.use_distributed_optimizer=true"
        help_ += f", or {smaller}"
    else:
        help_ = smaller
        if largest == "teacher" and config.distill.keep_hidden == "device":
            help_ += ", or distill.keep_hidden=host"
    return (
        f"{memory.total / 1e9:.1f} GB are needed on a GPU, {usable / 1e9:.1f} of the "
        f"{gpu.memory_bytes / 1e9:.0f} GB of one {gpu.name} may be filled: "
        f"{(memory.total - usable) / 1e9:.1f} GB too much. Most are {largest.replace('_', ' ')} "
        f"({kinds[largest] / 1e9:.1f} GB); what helps: {help_}"
    )


@dataclass(frozen=True)
class Layout:
    """One way to split a run over GPUs, in one shape."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    micro_batch_size: int
    num_microbatches: int
    memory: Memory
    total_bytes: int
    seconds: dict[str, float]
    step_s: float
    refusal: str


SIZES = (1, 2, 4, 8)
"""Of TP and of PP that are tried."""


def suggest(
    config: Config, world_size: int, gpu: Gpu, assume: Assumptions | None = None
) -> tuple[list[Layout], list[Layout]]:
    """Try TP x PP x DP with micro-batches of 1, 2, 4, ... sequences.

    TP stays inside a node. Activations are taken at a micro-batch of 1 and grow with its size.

    Returns: layouts that fit, fastest first; and the smallest of each kind that does not fit.
    Raises: ConfigError when no layout is legal for so many GPUs, or the teacher cannot be read.
    """
    assume = assume or Assumptions()
    if config.distill.teaches and teacher_size(config) is None:
        raise ConfigError(
            f"distill.teacher ({config.distill.teacher}) cannot be read, and what fits depends on "
            "its size: put it there, or set distill.teacher=none to plan without it"
        )
    config = _on_gpus(config)
    fitting, refused = _try(config, world_size, gpu, assume, Shape.full(config.model))
    if not fitting and not refused:
        raise ConfigError(
            f"no TP x PP x DP is legal for {world_size} GPUs: training.global_batch_size "
            f"({config.training.global_batch_size}) must be a multiple of DP, and heads, layers "
            "and widths of TP and PP"
        )
    return fitting, refused


@dataclass(frozen=True)
class AfterPrune:
    """What the small model would gain from another layout."""

    now: Layout
    """The one that it has in this run."""
    best: Layout
    """The fastest one that ``parallel_after_prune`` may name; the same where none is faster."""
    steps: int
    """From the end of the prune phase on."""
    gpu_hours_saved: float


def suggest_after_prune(
    config: Config, world_size: int, gpu: Gpu, assume: Assumptions | None = None
) -> AfterPrune | None:
    """Look for a faster layout for the model that pruning leaves, at the same micro-batch size.

    Returns: None where nothing is pruned, or nothing is trained afterwards.
    Raises: ConfigError when the run's own layout is not legal.
    """
    assume = assume or Assumptions()
    steps = num_steps(config) - -(-phase_ends(config.schedule)["prune"] // config.batch_tokens)
    if not config.goals or steps <= 0:
        return None
    config = _on_gpus(config)
    validate(config, world_size)
    micro, shape = config.training.micro_batch_size, target_shape(config)
    smaller = [
        each
        for tp, pp in itertools.product(SIZES, SIZES)
        if config.parallel.tensor_model_parallel_size % tp == 0
        and pp <= min(config.parallel.num_stages, shape.num_layers)
        for each in _legal(config, world_size, tp, pp)
        if each.training.micro_batch_size == micro
    ]
    now, *others = (
        layout
        for each in (config.after_prune, *smaller)
        for layout in _layouts([each], world_size, gpu, assume, shape)
    )
    fitting = [layout for layout in others if not layout.refusal]
    best = min([now, *fitting], key=lambda layout: layout.step_s)
    hours = (now.step_s - best.step_s) * steps * world_size / 3600
    return AfterPrune(now, best, steps, hours)


def _try(
    config: Config, world_size: int, gpu: Gpu, assume: Assumptions, shape: Shape
) -> tuple[list[Layout], list[Layout]]:
    """Try all layouts in one shape; those that fit, fastest first, and the smallest that do not."""
    fitting, refused = [], []
    for tp, pp in itertools.product(SIZES, SIZES):
        if tp > gpu.gpus_per_node or shape.num_layers < pp:
            continue
        sizes = list(_legal(config, world_size, tp, pp))
        if not sizes:
            continue
        tried = list(_layouts(sizes, world_size, gpu, assume, shape))
        fitting += [layout for layout in tried if not layout.refusal]
        if tried[0].refusal:
            refused.append(tried[0])
    # A larger micro-batch makes larger GEMMs, which the estimate does not see: first among equals.
    fitting.sort(key=lambda layout: (float(f"{layout.step_s:.3g}"), -layout.micro_batch_size))
    return fitting, sorted(refused, key=lambda layout: layout.total_bytes)


def _legal(config: Config, world_size: int, tp: int, pp: int) -> Iterator[Config]:
    """Iterate over ``config`` in this layout with each micro-batch size that it can run with."""
    for power in range(5):
        changed = configuration.replace(
            config,
            parallel={
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "virtual_pipeline_model_parallel_size": 1,
            },
            parallel_after_prune=None,
            training={"micro_batch_size": 2**power},
        )
        try:
            validate(changed, world_size)
        except ConfigError:
            continue
        yield changed


def _layouts(
    sizes: list[Config], world_size: int, gpu: Gpu, assume: Assumptions, shape: Shape
) -> Iterator[Layout]:
    base, teacher = sizes[0], teacher_size(sizes[0])
    stages = _stages(base, world_size, shape, teacher)
    for config in sizes:
        times = config.training.micro_batch_size // base.training.micro_batch_size
        memory = max(
            (
                dataclasses.replace(at.memory, activations=at.memory.activations * times)
                for at in stages
            ),
            key=lambda memory: memory.total,
        )
        sent = {kind: max(at.sent[kind] for at in stages) for kind in stages[0].sent}
        seconds = step_seconds(config, world_size, gpu, assume, shape, sent, teacher)
        parallel = config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        yield Layout(
            tensor_parallel=tp,
            pipeline_parallel=pp,
            data_parallel=world_size // (tp * pp),
            micro_batch_size=config.training.micro_batch_size,
            num_microbatches=num_microbatches(config, world_size),
            memory=memory,
            total_bytes=memory.total,
            seconds=seconds,
            step_s=sum(seconds.values()),
            refusal=refusal(config, memory, gpu),
        )
