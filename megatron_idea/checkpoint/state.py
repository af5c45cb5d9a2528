"""Where a run is: ``state.json`` of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_idea import files
from megatron_idea.checkpoint.index import ForeignError, read_index
from megatron_idea.config import Config
from megatron_idea.errors import UserError
from megatron_idea.guard import Watch
from megatron_idea.huggingface.names import checkpoint_name
from megatron_idea.prune.axis import whole_shapes
from megatron_idea.prune.plan import table_size
from megatron_idea.shape import AXES, LAYER_AXES, LayerShape, Shape

MOST_LAYERS = 1 << 16
"""Of an enlarged model that a checkpoint claims to be of."""
FORMAT = 3  # 1 had no manifest, 2 kept masks in the model and widths of FFNs alone


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used; the message says why and what stands."""


@dataclass
class TrainState:
    """Where a run is: all that is not a tensor."""

    step: int
    consumed_tokens: int
    shape: Shape
    """What the model stores; the tensors of the checkpoint are of it."""
    adam_step: int = 0
    """Optimizer steps that were taken since Adam began; skipped steps are not counted."""
    was_reset: bool = False
    """Adam has just begun anew: its step count is 0, and main weights and moments are there."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_samples: int = 0
    """Samples that were left out after a loss spike."""
    watch: Watch = field(default_factory=Watch)
    """What the guard remembers."""
    pending_steps: int = 0
    """Steps that were measured since the last plan."""
    memory: list[float] = field(default_factory=list)
    """What the pruning strategy wants to be told next time."""
    plan_due: bool = False
    """Saved right before a compaction, with its plan: whoever goes on from here compacts first."""
    teacher: str = ""
    """SHA-256 of the teacher's manifest, once there is a teacher."""
    flops: int | None = None
    """Training FLOPs of all steps so far, a teacher's included; None if an older version began."""
    began_at: int = 0
    """Step at which the run has begun: 0, or that of the checkpoint that it was branched from."""
    has_scores: bool = True
    """Whether the strategy's averages are stored: a branch that asks for others has none yet."""
    layout: dict[str, int] = field(default_factory=dict)
    """TP, PP and DP of the job that wrote it, and whether it had CUDA."""

    @property
    def has_moments(self) -> bool:
        """Whether main weights and moments are stored: there are none before the first step."""
        return self.adam_step > 0 or self.was_reset

    @staticmethod
    def fresh(config: Config) -> TrainState:
        """Return the state before the first step: nothing consumed, nothing removed."""
        return TrainState(0, 0, Shape.full(config.model), flops=0)


def read_state(path: Path, config: Config | None = None) -> TrainState:
    """Read ``state.json``; with ``config``, for its model, split over its TP ranks.

    Raises: CheckpointError when it is missing, damaged, of another format, or its units do not
        split, or when the checkpoint's tensors are not those of the configuration's model.
    """
    try:
        content = files.read_json(files.inside(path, "state.json"))
        form = content.pop("format", None)
        if form == FORMAT:
            content.pop("megatron_core", None)
            state = _typed(TrainState, content)
    except files.UnsafeFileError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    if form != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {form!r:.100} and this version reads {FORMAT}: go on "
            "with the version that wrote it, or export the model with that one and begin a new run "
            "here with import"
        )
    if config is not None:
        _check_split(path, state, config.parallel.tensor_model_parallel_size)
        _check_model(path, state, config)
    return state


def _check_split(path: Path, state: TrainState, tp: int) -> None:
    for axis in LAYER_AXES:
        counts = state.shape.counts(axis)
        uneven = [count for count in counts if count % tp]
        if uneven:
            raise CheckpointError(
                f"{path} has layers with {axis} {uneven[0]}, which cannot be split over "
                f"parallel.tensor_model_parallel_size={tp}; resume with a size that divides "
                f"{math.gcd(*counts)}"
            )


def _check_model(path: Path, state: TrainState, config: Config) -> None:
    """Compare three files that may come from different hands, before memory is taken for a model.

    ``config.yaml`` and ``state.json`` say what is built, the index what there is to fill it with.
    """
    model, stored = config.model, state.shape
    # Layers are counted first: a shape with as many as a stranger likes takes memory.
    if model.num_layers > MOST_LAYERS or not stored.is_within(Shape.full(model)):
        raise CheckpointError(
            f"{path} says in state.json that it stores {stored.num_layers} layers of "
            f"{_brief(stored)}; its configuration is of a model of {model.num_layers} layers of "
            f"{_brief(Shape.full(dataclasses.replace(model, num_layers=1)))}"
        )
    try:
        found, _ = read_index(path)
    except (ForeignError, files.UnsafeFileError) as error:
        raise CheckpointError(f"{path} is damaged: .metadata: {error}") from error
    full = Shape.full(model)
    wanted = {checkpoint_name(name): size for name, size in whole_shapes(model, stored)}
    wanted |= {f"pruner.alive.{axis}": table_size(axis, full) for axis in AXES}
    for name, size in wanted.items():
        if found.get(name) != size:
            has = list(found[name]) if name in found else "not there"
            raise CheckpointError(
                f"{path} does not hold the model of its configuration: {name} is {has}, wanted "
                f"{list(size)}"
            )


def _brief(shape: Shape) -> str:
    most = {axis: max(shape.counts(axis)) for axis in LAYER_AXES}
    widths = ", ".join(f"{axis} {count}" for axis, count in most.items())
    return f"up to {widths}, hidden_size {shape.hidden_size}"


Record = TypeVar("Record")


def _typed(kind: type[Record], content: Any) -> Record:
    """A dataclass from a JSON object, every field of its type and in its range.

    Counts are not negative, widths positive, other numbers finite.
    Raises: UnsafeFileError that names what is wrong.
    """
    if not isinstance(content, dict):
        raise files.UnsafeFileError(f"{kind.__name__} is no JSON object")
    known = {one.name: str(one.type) for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    strange = sorted(content.keys() - known.keys())
    if strange:
        raise files.UnsafeFileError(f"it has {strange[0]!r:.100}, which this version does not know")
    values = {name: _value(name, known[name], value) for name, value in content.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise files.UnsafeFileError(f"a value is missing: {error}") from error


def _value(name: str, kind: str, value: Any) -> Any:
    if kind == "Watch":
        return _typed(Watch, value)
    if kind == "Shape":
        value = value if isinstance(value, dict) else {}
        layers, hidden_size = value.get("layers"), value.get("hidden_size")
        if isinstance(layers, list) and layers and files.is_whole(hidden_size, least=1):
            shape = Shape(hidden_size, tuple(_typed(LayerShape, one) for one in layers))
            if all(
                one.ffn_hidden_size and one.num_query_groups and one.heads_per_group
                for one in shape.layers
            ):
                return shape
    elif kind == "list[float]":
        if isinstance(value, list) and all(map(files.is_number, value)):
            return value
    elif (
        (kind == "str" and isinstance(value, str))
        or (kind == "int" and files.is_whole(value))
        or (kind == "int | None" and (value is None or files.is_whole(value, most=1 << 100)))
        or (kind == "bool" and isinstance(value, bool))
        or (kind == "float" and files.is_number(value))
        or (kind == "dict[str, int]" and isinstance(value, dict))
    ):
        return value
    raise files.UnsafeFileError(f"{name} is {value!r:.100}, which is no legal {kind}")
