"""Save and load the whole state of a run, from any parallel layout to any other.

    <run>/checkpoints/step_00000042/
        state.json     step, consumed tokens, FFN widths: read first, the model is built from it
        config.yaml    the configuration that wrote it
        manifest.json  size and checksum of every other file
        ...            tensors, by megatron-core's dist_checkpointing, one key per layer

A folder is written under a temporary name and renamed when it is complete, so it is complete or
absent. Tensors: model weights, masks and neuron ids; Adam's moments and (for bf16) fp32 main
weights, each parameter whole, by the data-parallel rank that owns it; scores; random-number states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import megatron.core
import megatron.core.dist_checkpointing.strategies.state_dict_saver  # cpu.install must see it
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_idea import config as configuration
from megatron_idea import cpu, files, huggingface, storage
from megatron_idea.checkpoint_index import ForeignError, read_index
from megatron_idea.config import BlendEntry, Config, ConfigError
from megatron_idea.core_versions import async_save
from megatron_idea.data.tokenizer import tokenizer_file
from megatron_idea.distributed import ProcessGroups, agree_or_raise, together
from megatron_idea.guard import Watch
from megatron_idea.model import prunable_mlps, unwrap
from megatron_idea.optim import (
    MOMENTS,
    ShardExchange,
    Trainable,
    adam_step,
    finish_main_update,
    has_main_copy,
    set_state,
)
from megatron_idea.prune.pruner import Pruner, ScoreState

TOKENIZER = "tokenizer"
"""Folder of a run that has a copy of its tokenizer: a run can be moved, and read from anywhere."""

FORMAT = 2  # 1 had no manifest

# Transformer Engine's modules, norms among them, keep their FP8 scales under this name, and nothing
# without FP8. Not stored: a job without Transformer Engine could not write it for one with it.
_EXTRA_STATE = "_extra_state"


NOTHING_DUE = "{} is damaged: state.json says that a compaction is due, and none is"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message says why and what stands."""


@dataclass
class TrainState:
    """Where a run is: all that is not a tensor."""

    step: int
    consumed_tokens: int
    widths: tuple[int, ...]
    """Physical FFN neurons of every layer."""
    adam_step: int = 0
    """Optimizer steps that were taken; skipped steps are not counted."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_samples: int = 0
    """Samples that were left out after a loss spike."""
    watch: Watch = field(default_factory=Watch)
    """What the guard remembers."""
    score_window_steps: int = 0
    plan_due: bool = False
    """Saved right before a compaction: whoever goes on from here plans and compacts first."""
    layout: dict[str, int] = field(default_factory=dict)
    """TP, PP and DP of the job that wrote it, and whether it had CUDA."""

    @staticmethod
    def fresh(config: Config) -> TrainState:
        """The state before the first step: nothing consumed, all layers at full width."""
        widths = (config.model.ffn_hidden_size,) * config.model.num_layers
        return TrainState(0, 0, widths)


def folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def complete(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in folder(run_dir).glob("step_[0-9]*[0-9]/state.json"))


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = complete(run_dir)
    return found[-1] if found else None


def complete_for_all(run_dir: str | Path, groups: ProcessGroups) -> list[Path]:
    """``complete`` as rank 0 sees it; a shared disk may still show others an older state."""
    found = [complete(run_dir) if groups.is_writer else []]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _tidy(run_dir: str | Path) -> None:
    """Undo what a kill cut short: put back what was being replaced, drop what is half written."""
    for rest in folder(run_dir).glob("step_*.replaced"):
        if rest.with_suffix("").exists():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.rename(rest.with_suffix(""))
    for rest in folder(run_dir).glob("step_*.partial"):
        shutil.rmtree(rest, ignore_errors=True)


def resolve(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest one of the run folder.

    Raises: ConfigError when it is neither.
    """
    found = path if (path / "state.json").is_file() else latest(path)
    if found is None:
        raise ConfigError(f"{path} is neither a checkpoint nor a run with a complete one")
    return found


ONE_PROCESS = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=1",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
)
"""Overrides for a checkpoint's configuration when one process works on it."""


def read_state(path: Path, config: Config | None = None) -> TrainState:
    """Read ``state.json``; with ``config``, for its model, split over its TP ranks.

    Raises: CheckpointError when it is missing, damaged, of another format, or its widths do not
        split, or when the checkpoint's tensors are not those of the configuration's model.
    """
    try:
        content = files.read_json(files.inside(path, "state.json"))
        form = content.pop("format", None)
        if form == FORMAT:
            content.pop("megatron_core", None)
            state = _typed(TrainState, content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    if form != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {form!r:.100}; this version reads {FORMAT}"
        )
    if config is not None:
        _check_split(path, state, config.parallel.tensor_model_parallel_size)
        _check_model(path, state, config)
    return state


def _check_split(path: Path, state: TrainState, tp: int) -> None:
    uneven = [width for width in state.widths if width % tp]
    if uneven:
        raise CheckpointError(
            f"{path} has layers of {uneven[0]} FFN neurons, which cannot be split over "
            f"parallel.tensor_model_parallel_size={tp}; resume with a size that divides "
            f"{math.gcd(*state.widths)}"
        )


def _check_model(path: Path, state: TrainState, config: Config) -> None:
    """Compare three files that may come from different hands, before memory is taken for a model.

    ``config.yaml`` and ``state.json`` say what is built, the index what there is to fill it with.
    """
    model = config.model
    if len(state.widths) != model.num_layers or max(state.widths) > model.ffn_hidden_size:
        raise CheckpointError(
            f"{path} has {len(state.widths)} layers of up to {max(state.widths)} FFN neurons; its "
            f"configuration says {model.num_layers} of up to {model.ffn_hidden_size}"
        )
    try:
        found, _ = read_index(path)
    except (ForeignError, files.UnsafeFileError) as error:
        raise CheckpointError(f"{path} is damaged: .metadata: {error}") from error
    for name, shape in huggingface.checkpoint_shapes(model, state.widths):
        if found.get(name) != shape:
            has = list(found[name]) if name in found else "not there"
            raise CheckpointError(
                f"{path} does not hold the model of its configuration: {name} is {has}, wanted "
                f"{list(shape)}"
            )


Record = TypeVar("Record")


def _typed(kind: type[Record], content: Any) -> Record:
    """A dataclass from a JSON object, every field of its type and in its range.

    Counts are not negative, widths positive, other numbers finite.
    Raises: ValueError that names what is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{kind.__name__} is no JSON object")
    known = {one.name: str(one.type) for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    strange = sorted(content.keys() - known.keys())
    if strange:
        raise ValueError(f"it has {strange[0]!r:.100}, which this version does not know")
    values = {name: _value(name, known[name], value) for name, value in content.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"a value is missing: {error}") from error


def _value(name: str, kind: str, value: Any) -> Any:
    if kind == "Watch":
        return _typed(Watch, value)
    if kind == "tuple[int, ...]" and isinstance(value, list) and value:
        if all(files.is_whole(one, least=1) for one in value):
            return tuple(value)
    elif (
        (kind == "int" and files.is_whole(value))
        or (kind == "bool" and isinstance(value, bool))
        or (kind == "float" and files.is_number(value))
        or (kind == "dict[str, int]" and isinstance(value, dict))
    ):
        return value
    raise ValueError(f"{name} is {value!r:.100}, which is no legal {kind}")


def tokenizer_beside(path: Path) -> str | None:
    """The copy of its tokenizer in the run of checkpoint ``path``; older runs have none."""
    kept = path.absolute().parents[1] / TOKENIZER
    return str(kept) if (kept / "tokenizer.json").is_file() else None


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that wrote a checkpoint, with the tokenizer that is kept beside it.

    Raises: CheckpointError when the file is none of the folder's, ConfigError as ``config.load``.
    """
    try:
        file = files.inside(path, "config.yaml")
    except files.UnsafeFileError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    kept = tokenizer_beside(path)
    if kept is not None and configuration.load(file).data.tokenizer != "byte":
        overrides = [f"data.tokenizer={kept}", *overrides]
    return configuration.load(file, list(overrides))


# What a resumed run may change: where and how it runs, not what it computes.
_FREE = {
    "run_dir", "parallel", "checkpoint", "guard", "evaluation", "logging", "data.cache_dir",
    "training.micro_batch_size", "training.kernel_implementation", "prune.compaction_block",
    "prune.placement",
}  # fmt: skip


def check_same_run(path: Path, config: Config) -> None:
    """Make sure that ``config`` continues what the checkpoint was computing.

    Compared is what is meant: a file however its path is spelled, a tokenizer by its content, the
    weights of a blend by their shares. The order of a blend counts: it decides who comes first.

    Raises: CheckpointError that names every differing value, for another model, schedule, data,
        batch or optimizer.
    """
    try:
        saved = read_config(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be resumed: {error}") from error
    was, now = _flat(dataclasses.asdict(saved)), _flat(dataclasses.asdict(config))
    then = saved.data.tokenizer
    kept = None if then == "byte" else tokenizer_beside(path)
    meant_then, meant_now = was | _meant(saved, kept or then), now | _meant(config)
    changed = [
        f"{key}: {was[key]!r} in the checkpoint, {now[key]!r} now"
        for key in sorted(was)
        if meant_then[key] != meant_now[key]
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    if changed:
        other = any(line.startswith("model.") for line in changed)
        what = "is a checkpoint of another model" if other else "was written by another run"
        raise CheckpointError(
            f"{path} {what}:\n  " + "\n  ".join(changed) + "\n"
            "Resume with the same values, or give the new run another run_dir."
        )


def _meant(config: Config, tokenizer: str = "") -> dict[str, Any]:
    """Keys whose value can be spelled in several ways, and what they stand for."""

    def shares(entries: Sequence[BlendEntry]) -> list[tuple[str, float]]:
        total = sum(entry.weight for entry in entries)
        return [(os.path.realpath(entry.prefix), entry.weight / total) for entry in entries]

    return {
        "data.train": shares(config.data.train),
        "data.validation": shares(config.data.validation),
        "data.tokenizer": _content(tokenizer or config.data.tokenizer),
    }


def _content(tokenizer: str) -> str:
    """What a tokenizer's name stands for; of a file that is not there, its place."""
    file = tokenizer_file(tokenizer)
    if tokenizer == "byte":
        return tokenizer
    if not file.is_file():
        return os.path.realpath(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def save(trainable: Trainable, pruner: Pruner, state: TrainState) -> Path:
    """Write a checkpoint of this step; collective over all ranks.

    Returns: its folder. Older ones that nobody asked to keep are removed afterwards.
    Raises: CheckpointError on every rank when it cannot be written; earlier ones stand untouched.
    """
    return Saving(trainable, pruner, state).finish()


class Saving:
    """A checkpoint on its way to the disk. What it holds is a copy: training may go on."""

    def __init__(self, trainable: Trainable, pruner: Pruner, state: TrainState) -> None:
        """Copy everything and begin to write; collective over all ranks.

        Raises: CheckpointError on every rank when it cannot be written.
        """
        groups = trainable.groups
        for chunk in trainable.chunks:
            # Until the next forward asks for them, only their owners have the weights of this step.
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        scores = pruner.state(trainable)
        self.config, self.groups = trainable.config, groups
        self.state = dataclasses.replace(
            state,
            widths=trainable.widths,
            adam_step=adam_step(trainable.optimizer, groups),
            score_window_steps=scores.window_steps,
            layout=_layout(groups),
        )
        self.path = folder(self.config.run_dir) / f"step_{state.step:08d}"
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._replaced = self.path.with_name(f"{self.path.name}.replaced")
        with self._explained():
            together(self._begin, groups)
            tree = _tensors(trainable, scores, self.state.adam_step)
            self._strategy, self._request = _begin_tensors(tree, self._partial, groups)
        self._writing = storage.Writing(self._request)

    @property
    def done(self) -> bool:
        """Whether this rank has written its part; ``finish`` will not wait for it."""
        return self._writing.done

    @property
    def seconds(self) -> float:
        """What the writing took on this rank, once it is done."""
        return self._writing.seconds

    def finish(self) -> Path:
        """Wait for all ranks' parts and make the checkpoint complete; collective over all ranks.

        Returns: its folder. Older ones that nobody asked to keep are removed afterwards.
        Raises: CheckpointError on every rank when it cannot be written; earlier ones stand.
        """
        self._writing.join()
        with self._explained():
            _finish_tensors(self._strategy, self._request, self._partial, self.groups)
            written: list[dict[str, Any]] = [{}] * self.groups.world.size()
            dist.all_gather_object(written, self._writing.files)
            together(lambda: self._complete(written), self.groups)
        if self.groups.is_writer:
            keep = self.config.checkpoint
            # Newer ones are damaged: this run was begun again before them. They must not count.
            found = [path for path in complete(self.config.run_dir) if path <= self.path]
            known = [(path, _tokens(path)) for path in found]
            storage.remove(storage.superfluous(known, keep.keep_last, keep.keep_every_tokens))
        return self.path

    def _begin(self) -> None:
        if self.groups.is_writer:
            for rest in (self._partial, self._replaced):  # of a job that was killed
                shutil.rmtree(rest, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _complete(self, written: list[dict[str, Any]]) -> None:
        if not self.groups.is_writer:
            return
        partial = self._partial
        _write(partial / "config.yaml", configuration.to_yaml(self.config))
        header = {"format": FORMAT, "megatron_core": megatron.core.__version__}
        content = header | dataclasses.asdict(self.state)
        _write(partial / "state.json", json.dumps(content, indent=1))
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}
        small = sorted(p for p in partial.iterdir() if p.name not in files)
        files |= {file.name: storage.describe(file) for file in small}
        _write(partial / storage.MANIFEST, json.dumps({"files": files}, indent=1))
        _sync_folder(partial)
        if self.path.exists():  # the one before this step's compaction
            self.path.rename(self._replaced)
        partial.rename(self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn any failure into one that says what stands; leave nothing half written."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            if self.groups.is_writer:
                shutil.rmtree(self._partial, ignore_errors=True)
            kept = latest(self.config.run_dir)
            stands = f"the last complete one is {kept}" if kept else "there is no earlier one"
            free = f"{shutil.disk_usage(self.config.run_dir).free / 1e9:.2f} GB free there"
            raise CheckpointError(
                f"cannot write checkpoint {self.path}: {_reason(error)} ({free}); {stands}"
            ) from error


def _tokens(path: Path) -> int:
    """Consumed tokens of a checkpoint; 0 for one that cannot be read."""
    try:
        return read_state(path).consumed_tokens
    except CheckpointError:
        return 0


def choose(config: Config, groups: ProcessGroups) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: the newest one, whose files are what was written.

    Collective over all ranks. Returns: it, or None at the start of a run; and what was found
    damaged and passed over, which only ``checkpoint.on_damage=previous`` allows.
    Raises: CheckpointError on every rank, saying which other checkpoint there is.
    """
    damage: list[str] = []
    together(lambda: _tidy(config.run_dir) if groups.is_writer else None, groups)
    found = complete_for_all(config.run_dir, groups)
    while found:
        path, older = found.pop(), found[-1] if found else None
        try:
            storage.verify(path, groups)
            return path, damage
        except storage.DamagedError as error:
            hint = (
                f"checkpoint.on_damage=previous goes on from {older}"
                if older
                else "there is no older one"
            )
            if config.checkpoint.on_damage == "stop" or older is None:
                raise CheckpointError(f"{error}; {hint}") from error
            damage.append(str(error))
    return None, damage


def load(trainable: Trainable, pruner: Pruner, path: Path) -> TrainState:
    """Read a checkpoint into a model that was built at the checkpoint's widths; collective.

    Random-number streams continue only in the layout that saved them, and on the same kind of
    device; elsewhere they start from the seed again, which matters with dropout alone.

    Raises: CheckpointError on every rank when a file is missing or does not fit.
    """
    state = read_state(path)
    groups = trainable.groups
    assert state.widths == trainable.widths, (state.widths, trainable.widths)
    wanted = _tensors(trainable, _empty_scores(trainable, state), state.adam_step, empty=True)
    if state.layout != _layout(groups):
        wanted.pop("rng")
    loaded = _load_tensors(wanted, path, groups)
    _take_weights(trainable.chunks, loaded, path, groups)
    if state.adam_step:
        _load_optimizer(trainable, loaded["optimizer"], state.adam_step)
    else:  # before the first step main weights are the weights
        trainable.optimizer.reload_model_params()
    pruner.load_state(
        trainable,
        ScoreState(loaded["scores"]["ema"], loaded["scores"]["window"], state.score_window_steps),
    )
    if "rng" in loaded:
        _set_rng({name: value[0] for name, value in loaded["rng"].items()}, path, groups)
    return state


def load_weights(chunks: Sequence[torch.nn.Module], path: Path, groups: ProcessGroups) -> None:
    """Read weights and masks alone, into chunks that were built at the checkpoint's widths."""
    loaded = _load_tensors(_weight_tensors(chunks, groups), path, groups)
    _take_weights(chunks, loaded, path, groups)


def _load_tensors(wanted: dict[str, Any], path: Path, groups: ProcessGroups) -> dict[str, Any]:
    """Read what is asked for. Raises: CheckpointError on every rank when one cannot."""
    error: Exception | None = None
    try:
        cpu.install()
        loaded = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    except (Exception, CheckpointException) as caught:  # agree_or_raise raises it everywhere
        error = CheckpointError(f"cannot read checkpoint {path}: {_reason(caught)}")
        error.__cause__ = caught
    agree_or_raise(error, groups)
    return loaded


def _take_weights(
    chunks: Sequence[torch.nn.Module], loaded: dict[str, Any], path: Path, groups: ProcessGroups
) -> None:
    for index, chunk in enumerate(chunks):
        found = unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [key for key in found.missing_keys if not key.endswith(_EXTRA_STATE)]
        assert not missing and not found.unexpected_keys, found
    # Neuron ids are places in tables of scores.
    config: Any = unwrap(chunks[0]).config
    full = config.ffn_hidden_size
    wild = None
    for layer, mlp in prunable_mlps(chunks):
        mlp.refresh_mask()
        if bool(((mlp.neuron_ids < 0) | (mlp.neuron_ids >= full)).any()):
            wild = CheckpointError(
                f"{path} is damaged: layer {layer} has neurons that the model of {full} has not"
            )
    agree_or_raise(wild, groups)


def _weight_tensors(chunks: Sequence[torch.nn.Module], groups: ProcessGroups) -> dict[str, Any]:
    """Weights, masks and neuron ids with their place in the whole, keyed per layer."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp}
    tree = {}
    for index, chunk in enumerate(chunks):
        state = unwrap(chunk).sharded_state_dict(metadata=metadata)
        tree[f"model{index}"] = {k: v for k, v in state.items() if not k.endswith(_EXTRA_STATE)}
    return tree


@torch.no_grad()
def _load_optimizer(trainable: Trainable, loaded: dict[str, dict[str, Tensor]], step: int) -> None:
    shards = ShardExchange(trainable)
    for name, parameter in _named(trainable):
        whole = None
        if shards.owns(parameter):
            parts = loaded.pop(name)
            # fp32 training has no main copy: the model's own weight, loaded before, is it.
            main = parts.get("main", parameter.detach())
            states = (main, *(parts[m] for m in MOMENTS))
            whole = torch.stack([x.view(-1).to(parameter.device) for x in states])
        part = shards.scatter(parameter, whole)
        if part is not None:
            moments = dict(zip(MOMENTS, part[1:], strict=True))
            set_state(trainable.optimizer, parameter, step, part[0], moments)
    finish_main_update(trainable.optimizer, trainable.chunks)


def _named(trainable: Trainable) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with a name that is unique on this rank."""
    for index, chunk in enumerate(trainable.chunks):
        for name, parameter in unwrap(chunk).named_parameters():
            yield f"{index}.{name}", parameter


def _tensors(
    trainable: Trainable, scores: ScoreState, step: int, empty: bool = False
) -> dict[str, Any]:
    """All tensors of a run with their place in the whole; ``empty``: as targets for loading."""
    groups = trainable.groups
    tree = _weight_tensors(trainable.chunks, groups)
    if step:
        tree["optimizer"] = _optimizer_tensors(trainable, tree, empty)
    rank, world = groups.world.rank(), groups.world.size()
    tree["scores"] = {
        name: ShardedTensor.from_rank_offsets(f"scores.{name}", value, replica_id=rank)
        for name, value in (("ema", scores.ema), ("window", scores.window))
    }
    tree["rng"] = {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", value[None], (0, rank, world))
        for name, value in _get_rng().items()
    }
    return tree


def _optimizer_tensors(
    trainable: Trainable, tree: dict[str, Any], empty: bool
) -> dict[str, dict[str, ShardedTensor | ShardedTensorFactory]]:
    """Main weights and moments of the parameters that this rank owns, sharded as the model is."""
    shards = ShardExchange(trainable)
    sharded = {
        id(tensor.data): tensor
        for index in range(len(trainable.chunks))
        for tensor in tree[f"model{index}"].values()
        if isinstance(tensor, (ShardedTensor, ShardedTensorFactory))
    }
    result = {}
    for name, parameter in _named(trainable):
        whole = None
        if not empty:
            whole = shards.gather(parameter)
        wanted = shards.owns(parameter) if empty else shards.is_saver(parameter)
        if not wanted:
            continue
        if whole is None:
            whole = torch.empty(3, parameter.numel())
        elif not empty:
            whole = whole.cpu()  # a whole layer's state at a time on the GPU, not all of it
        kinds = ("main", *MOMENTS) if has_main_copy(parameter) else MOMENTS
        values = dict(zip(("main", *MOMENTS), whole, strict=True))
        model_tensor = sharded[id(parameter)]
        # The owner writes for all its data-parallel peers.
        model_tensor = dataclasses.replace(
            model_tensor, replica_id=(*model_tensor.replica_id[:-1], 0)
        )
        result[name] = {
            kind: make_sharded_optimizer_tensor(
                model_tensor, values[kind].view(parameter.shape), f"optimizer.{kind}"
            )
            for kind in kinds
        }
    return result


def _empty_scores(trainable: Trainable, state: TrainState) -> ScoreState:
    model = trainable.config.model
    table = torch.empty(model.num_layers, 3, model.ffn_hidden_size, device=trainable.groups.device)
    return ScoreState(table, torch.empty_like(table), state.score_window_steps)


def _begin_tensors(
    tree: dict[str, Any], path: Path, groups: ProcessGroups
) -> tuple[_SaveTensors, AsyncRequest]:
    """What has to be written by this rank, in memory that is its own."""
    # megatron-core collects what was written through one queue of a spawned manager process,
    # seconds to start. Between threads a plain queue will do, and one for each checkpoint: what a
    # save that nobody finished left in it would become the index of the next one.
    filesystem_async._results_queue = queue.Queue()
    cpu.install()
    # dist_checkpointing.save in its parts: what rank 0 writes alone must fail on every rank.
    sharded, common = save_preprocess(tree)
    together(lambda: _save_common(common, path) if groups.is_writer else None, groups)
    live = [part for name, part in sharded.items() if name.startswith("model")]
    for tensor in nested_values(live):  # all else was gathered for this checkpoint
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
            tensor.data = tensor.data.detach().to("cpu", copy=True)
    strategy = _SaveTensors("torch_dist", 1, thread_count=1)
    return strategy, async_save(strategy, sharded, path)


def _save_common(common: dict[str, Any], path: Path) -> None:
    """What is not a tensor: nothing of ours, but no version of megatron-core reads without it."""
    torch.save(common, path / COMMON_STATE_FNAME)


def _finish_tensors(
    strategy: _SaveTensors, request: AsyncRequest, path: Path, groups: ProcessGroups
) -> None:
    """Exchange what all ranks have written and write the index; collective over all ranks."""
    for finalize in request.finalize_fns:
        finalize()

    def close() -> None:
        if strategy.error is not None:
            raise strategy.error
        if groups.is_writer:
            save_config(CheckpointingConfig(strategy.backend, strategy.version), str(path))

    together(close, groups)


class _SaveTensors(TorchDistSaveShardedStrategy):
    """megatron-core's own, but for an error when rank 0 writes the index of all tensors.

    Raised at once it would leave the other ranks waiting for rank 0's next message.
    """

    error: Exception | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *others: Any) -> Any:
        finish = writer.finish

        def finish_or_keep_error(*arguments: Any) -> None:
            try:
                finish(*arguments)
            except Exception as error:  # raised in ``_finish_tensors``, on every rank
                self.error = error

        writer.finish = finish_or_keep_error
        return super()._get_save_and_finalize_callbacks(writer, *others)


def _get_rng() -> dict[str, Tensor]:
    """Every random-number stream of this rank, as bytes."""
    streams = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        streams["cuda"] = torch.cuda.get_rng_state()
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return streams | {f"tracker.{name}": state for name, state in tracker.items()}


def _set_rng(streams: dict[str, Tensor], path: Path, groups: ProcessGroups) -> None:
    streams = {name: state.cpu() for name, state in streams.items()}
    error = None
    try:
        for name, state in streams.items():  # the tracker's are set in use, which is too late
            if name == "cpu" or groups.device.type == "cpu":
                torch.Generator().set_state(state)
        torch.set_rng_state(streams["cpu"])
        if "cuda" in streams:
            torch.cuda.set_rng_state(streams["cuda"])
    except RuntimeError as caught:
        error = CheckpointError(f"{path} is damaged: a random-number state is none: {caught}")
    agree_or_raise(error, groups)
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {n.removeprefix("tracker."): s for n, s in streams.items() if n.startswith("tracker.")}
    )


def _layout(groups: ProcessGroups) -> dict[str, int]:
    sizes = {"tp": groups.tp.size(), "pp": groups.pp.size(), "dp": groups.dp.size()}
    return sizes | {"cuda": int(groups.device.type == "cuda")}


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """In one line; torch's own account of failed ranks is their tracebacks."""
    if isinstance(error, CheckpointException):
        causes = [f"rank {rank}: {_reason(f[0])}" for rank, f in sorted(error.failures.items())]
        return "; ".join(causes) or "another rank failed, rank 0 says why"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
