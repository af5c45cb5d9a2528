"""Hugging Face folder -> a run that ``train`` goes on with, enlarged on any axis if wanted.

The run's first checkpoint is of step 0: weights, no optimizer state, no token consumed. Every dense
Llama or Qwen3 in safetensors can be read; what our model cannot compute is refused by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, ConfigError, ModelConfig, validate
from megatron_idea.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_idea.engine.distributed import ProcessGroups, start_distributed, stop_distributed
from megatron_idea.engine.model import named_parameters, own_part
from megatron_idea.engine.trainable import assemble
from megatron_idea.huggingface import names as huggingface
from megatron_idea.huggingface.card import Origin
from megatron_idea.prune.axis import Share, shares_of, whole_shapes
from megatron_idea.prune.pruner import Pruner
from megatron_idea.records.lock import RunLock
from megatron_idea.records.readable import human_widths
from megatron_idea.shape import AXES, LAYER_AXES, UNITS, Shape, round_up

LONGEST_DEFAULT_SEQUENCE = 2048


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    folder: Path
    """Where the model came from."""
    path: Path
    """The checkpoint of step 0."""
    config_path: Path
    before: Shape
    """The folder's model; trailing zeros of a padded export not counted."""
    shape: Shape
    """What training begins with."""
    notes: list[str]
    """What the user should know before training."""

    def as_text(self) -> str:
        lines = [
            f"{_brief(self.shape)}: {self.path}",
            f"megatron-idea train {self.config_path}",
            *(f"note: {note}" for note in self.notes),
        ]
        if self.shape != self.before:
            lines.insert(1, f"enlarged from {_brief(self.before)}: {self.folder}")
        return "\n".join(lines)


def _brief(shape: Shape) -> str:
    return ", ".join(f"{UNITS[axis]}s {human_widths(shape.counts(axis))}" for axis in AXES)


def import_checkpoint(
    folder: Path,
    run_dir: Path,
    config_path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    enlarge: Mapping[str, float] | None = None,
) -> Imported:
    """Write run ``run_dir`` with the model of ``folder`` as its checkpoint of step 0.

    The model section of the configuration comes from ``config.json``; data, schedule and the rest
    from ``config_path`` and ``overrides``. Where these are silent the precision is the folder's
    (fp16 is read as fp32), the tokenizer a copy of its ``tokenizer.json``, and the sizes to prune
    back to the folder's own. A bf16 run takes weights rounded to bf16.

    ``enlarge`` gives axes about so many times their units, the nearest legal count, and leaves
    what the model computes as it is; ``grow`` says how.

    Holds the model in memory, in bf16 with fp32 main weights besides, and once more to write it.

    Raises: ConfigError for a folder, a configuration or a size that cannot be; RunFolderError for
        a ``run_dir`` that another process writes to.
    """
    hf, weights = huggingface.check_folder(folder)
    model, whole = huggingface.from_hf_config(hf)
    tensors = _Folder(folder, weights)
    tensors.check(ModelConfig(**model), whole)
    given = configuration.load(config_path, list(overrides))
    before = _without_padding(tensors, whole, given)
    shape = _enlarged(before, enlarge or {}, given)
    for axis in AXES:
        model[axis] = max(shape.counts(axis))
    model["num_attention_heads"] = model["num_query_groups"] * shape.layers[0].heads_per_group
    # Norms divide by the enlarged hidden size.
    model["layernorm_epsilon"] *= before.hidden_size / shape.hidden_size

    base: dict[str, Any] = {"model": model, "training": _training(hf), "prune": {}}
    target = {axis: max(before.counts(axis)) for axis in AXES}
    target = {axis: count for axis, count in target.items() if count < model[axis]}
    if given.prune.target.parameters is not None:
        target = {}  # beside it they would be the least that the method may leave
    if target:
        base["prune"]["target"] = target
    elif config_path is None and not any(o.startswith("prune.") for o in overrides):
        base["prune"]["strategy"] = "none"
    its_tokenizer = str(run_dir / checkpoint.TOKENIZER)
    if (folder / "tokenizer.json").is_file():
        base["data"] = {"tokenizer": its_tokenizer}
    config = configuration.load(config_path, list(overrides), base)
    config = configuration.replace(config, run_dir=str(run_dir))
    _check(config, model, shape, folder)
    with RunLock(run_dir):
        if checkpoint.complete(run_dir):
            raise ConfigError(f"{run_dir} has checkpoints already; name a folder that has none")
        if config.data.tokenizer == its_tokenizer:
            load_tokenizer(folder)  # to hear now whether it can be used
            copy_tokenizer(folder, run_dir / checkpoint.TOKENIZER)
        path = _write(config, _Ours(tensors, config, whole, before, shape), shape)
        (run_dir / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
        Origin.of_folder(folder).save(run_dir)
    return Imported(folder, path, run_dir / "config.yaml", before, shape, _notes(config, hf))


def read_model(folder: Path) -> tuple[ModelConfig, Shape]:
    """Say what model a folder holds. Raises: ConfigError for one that ours cannot be."""
    hf, weights = huggingface.check_folder(folder)
    model, whole = huggingface.from_hf_config(hf)
    config = ModelConfig(**model)
    _Folder(folder, weights).check(config, whole)
    return config, whole


def load_folder_weights(
    chunks: Sequence[torch.nn.Module], folder: Path, config: Config, groups: ProcessGroups
) -> None:
    """Read a folder's weights into chunks of ``read_model``'s shape, in any layout.

    Args:
        config: its model is the folder's.
    """
    hf, weights = huggingface.check_folder(folder)
    _, whole = huggingface.from_hf_config(hf)
    ours = _Ours(_Folder(folder, weights), config, whole, whole, whole)
    sizes = dict(whole_shapes(config.model, whole))
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            tensor = ours.read(name, sizes[name])
            parameter.copy_(own_part(name, parameter, tensor, groups))


def read_factors(text: str) -> dict[str, float]:
    """Read ``--enlarge``: ``ffn_hidden_size=2.667,num_layers=1.25``.

    Raises: ConfigError for anything but known axes and numbers of at least 1.
    """
    factors = {}
    for part in text.split(",") if text else []:
        axis, _, number = part.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if axis not in AXES or not 1 <= factor < float("inf"):
            raise ConfigError(
                f"--enlarge has {part!r}; give axes and factors of at least 1, as in "
                f"ffn_hidden_size=2.667,num_layers=1.25. Axes are {', '.join(AXES)}"
            )
        factors[axis] = factor
    return factors


def _write(config: Config, ours: _Ours, shape: Shape) -> Path:
    """Build the model in this process, fill it, save it."""
    alone = configuration.load(None, checkpoint.ONE_PROCESS, dataclasses.asdict(config))
    groups = start_distributed(alone.parallel, config.training.seed)
    try:
        trainable = assemble(alone.sections, groups, shape, initialize=False, gradients=False)
        with torch.no_grad():
            for name, parameter in named_parameters(trainable.chunks):
                parameter.copy_(ours.read(name, tuple(parameter.shape)))
        return checkpoint.save(
            config, trainable, Pruner(config, trainable), TrainState(0, 0, shape)
        )
    finally:
        stop_distributed()


_FLOATS = ("F32", "BF16", "F16", "F64")


class _Folder:
    """The safetensors of a model folder, by name; one tensor is read at a time."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safetensors.safe_open(file, framework="pt")
            except Exception as error:  # the library's own type, and OSError
                raise ConfigError(f"cannot read {file}: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def check(self, model: ModelConfig, whole: Shape) -> None:
        """Raises: ConfigError unless the tensors are those of ``model``, no more and no less."""
        shapes = dict(huggingface.hf_shapes(model, whole))
        wanted = shapes.keys()
        missing = sorted(wanted - self._files.keys())
        if missing:
            raise ConfigError(f"{self._folder} lacks {len(missing)} tensors, as {missing[0]}")
        # A tied model may repeat its embedding; old Llamas carry the RoPE frequencies.
        known = {huggingface.WHOLE_MODEL[huggingface.OUTPUT]}
        unknown = [
            name
            for name in sorted(self._files.keys() - wanted - known)
            if not name.endswith("rotary_emb.inv_freq")
        ]
        if unknown:
            raise ConfigError(
                f"{self._folder} has {len(unknown)} tensors that our model has no place for: "
                f"{', '.join(unknown[:3])}"
            )
        for name, size in shapes.items():
            part = self._files[name].get_slice(name)
            if tuple(part.get_shape()) != size or part.get_dtype() not in _FLOATS:
                raise ConfigError(
                    f"{self._folder} has {name} as {part.get_dtype()} {part.get_shape()}; "
                    f"config.json says {list(size)}, and legal are {', '.join(_FLOATS)}"
                )

    def read(self, name: str) -> Tensor:
        """Raises: ConfigError when a number of it is none: it would pass into everything."""
        tensor: Tensor = self._files[name].get_tensor(name)
        if not bool(tensor.isfinite().all()):
            raise ConfigError(
                f"{self._folder} holds NaN or infinity in {name}; the folder is damaged, or the "
                "model had diverged when it was saved"
            )
        return tensor

    def used(self, names: Sequence[str], count: int) -> int:
        """Count units, of ``count`` that tensors have, up to the last that is not all zeros."""
        *rows, columns = names
        if any(bool(self._last(name, name == columns, count).any()) for name in names):
            return count
        lines = [self.read(name).any(dim=1) for name in rows] + [self.read(columns).any(dim=0)]
        used = torch.stack([line.view(count, -1).any(dim=1) for line in lines]).any(dim=0)
        return int(used.nonzero().max()) + 1 if bool(used.any()) else 1

    def _last(self, name: str, is_column: bool, count: int) -> Tensor:
        part = self._files[name].get_slice(name)
        lines = part.get_shape()[is_column] // count
        return part[:, -lines:] if is_column else part[-lines:]


class _Ours:
    """The folder's tensors under our names, enlarged."""

    def __init__(
        self, tensors: _Folder, config: Config, whole: Shape, before: Shape, shape: Shape
    ) -> None:
        self._tensors, self._config = tensors, config
        self._whole, self._before, self._shape = whole, before, shape
        self._sources = _sources(before.num_layers, shape.num_layers)

    def read(self, name: str, size: tuple[int, ...]) -> Tensor:
        """Return a parameter in fp32."""
        in_layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if in_layer is None:
            weight = self._grown(name, 0, name, self._tensors.read(huggingface.WHOLE_MODEL[name]))
        else:
            position, tensor = int(in_layer[1]), name[in_layer.end() :]
            source = self._sources[position]
            of_source = f"decoder.layers.{source}.{tensor}"
            weight = self._grown(name, position, of_source, self._of_layer(source, tensor))
            if self._sources.index(source) < position and tensor in _OUTPUTS:
                weight = torch.zeros_like(weight)
        assert tuple(weight.shape) == size, (name, weight.shape, size)
        return weight

    def _of_layer(self, position: int, tensor: str) -> Tensor:
        layer, whole = self._before.layers[position], self._whole.layers[position]
        groups, heads = layer.num_query_groups, layer.heads_per_group
        of_groups = (whole.num_query_groups, -1, self._config.model.kv_channels)
        *qkv, o = huggingface.names_of(position, "num_query_groups")
        gate, up, down = huggingface.names_of(position, "ffn_hidden_size")
        width = layer.ffn_hidden_size
        read = self._tensors.read
        match tensor:
            case huggingface.QKV:
                parts = (read(name).unflatten(0, of_groups)[:groups, :heads] for name in qkv)
                return huggingface.join_qkv(*parts)
            case huggingface.PROJ:
                return read(o).unflatten(1, of_groups)[:, :groups, :heads].flatten(1)
            case huggingface.FC1:
                return torch.cat([read(gate)[:width], read(up)[:width]])
            case huggingface.FC2:
                return read(down)[:, :width]
        theirs = huggingface.renamed_in_layer(self._config.model)[tensor]
        return read(f"model.layers.{position}.{theirs}")

    def _grown(self, name: str, position: int, source: str, weight: Tensor) -> Tensor:
        weight, model = weight.float(), self._config.model
        ratio = self._before.hidden_size / self._shape.hidden_size
        shares = shares_of(source, model, self._before, tp=1)
        is_qkv = name.endswith(huggingface.QKV) and model.qk_layernorm
        if is_qkv and ratio != 1 and self._config.training.precision == "fp32":
            groups = next(s.count for s in shares if s.axis == "num_query_groups")
            weight = huggingface.with_epsilon(weight, groups, model.kv_channels, ratio)
        for share in shares:
            if share.axis == "hidden_size" and weight.dim() == 1:
                weight = (weight.double() * ratio**0.5).float()
            if share.axis != "num_layers":
                counts = self._shape.counts(share.axis)
                count = counts[position if share.axis in LAYER_AXES else 0]
                draws = f"{self._config.training.seed} new {share.axis} of {name}"
                weight = grow(weight, share, count, _generator(draws))
        return weight


_OUTPUTS = (huggingface.PROJ, huggingface.FC2)
_ZERO = ("down", "projection", "word_embeddings", "linear_proj", "linear_fc2")
"""What new units write with, by the names of ``Axis.matrices``."""


def grow(weight: Tensor, share: Share, count: int, generator: torch.Generator) -> Tensor:
    """Add units to a tensor so that the model computes what it did, and the units can learn.

    What a unit reads with is random, with the spread of the matrix it comes to; what it writes
    with is zero. A neuron or KV group then adds exactly zero to the stream, a channel holds exactly
    zero, and a new layer, a copy whose two outputs are zero, passes the stream on. The zeros' first
    gradients are not zero; from the second step on the rest has gradients, too (LoRA starts so).
    The column of a tied embedding is both written and read: it is zero.

    Splitting units into copies (Net2Wider) is function-preserving, too, but copies have gradients
    that differ by a factor alone, which Adam takes out: they stay copies, and the width is wasted.
    Outputs that are random would learn sooner, and change the function.

    Args:
        share: of the tensor as it is; of several axes those of earlier dimensions come first.
        count: units to return, at least those there are; the old ones come first, bit for bit.
    """
    if count == share.count:
        return weight
    old = weight.reshape(-1, share.count, share.stride)
    slices = old.transpose(0, 1).flatten(1)
    sizes = [numel * slices.shape[1] // share.unit_numel for _, numel in share.matrices]
    new = []
    for (name, _), part in zip(share.matrices, slices.split(sizes, dim=1), strict=True):
        if name in _ZERO:
            drawn = torch.zeros(count - share.count, part.shape[1])
        elif weight.dim() == 1:  # gains
            drawn = part.mean().expand(count - share.count, 1)
        else:
            drawn = torch.randn(count - share.count, part.shape[1], generator=generator)
            drawn *= part.square().mean().sqrt()
        new.append(drawn)
    added = torch.cat(new, dim=1).unflatten(1, (len(old), share.stride)).transpose(0, 1)
    size = list(weight.shape)
    size[share.dim] = size[share.dim] // share.count * count
    return torch.cat([old, added], dim=1).reshape(size)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _sources(before: int, after: int) -> list[int]:
    """Say which old layer each of ``after`` layers is, or is a copy of: evenly spread."""
    return [(2 * position + 1) * before // (2 * after) for position in range(after)]


def _without_padding(tensors: _Folder, whole: Shape, config: Config) -> Shape:
    """Return the folder's shape without the zeros that a padded export ends with.

    A unit of zeros gets no gradient and would stay dead. What rounding up to legal counts asks for
    is kept.

    Raises: ConfigError when layers use different numbers of query heads for a key/value head.
    """
    shape = whole
    for axis, multiple in config.multiples.items():
        if axis in LAYER_AXES:
            counts = []
            for position, count in enumerate(whole.counts(axis)):
                used = tensors.used(huggingface.names_of(position, axis), count)
                counts.append(min(count, round_up(used, multiple)))
            shape = shape.with_counts(axis, counts)
    heads = min(layer.heads_per_group for layer in whole.layers)
    layers = tuple(dataclasses.replace(layer, heads_per_group=heads) for layer in shape.layers)
    for position, layer in enumerate(whole.layers):
        if layer.heads_per_group > heads:
            o = tensors.read(huggingface.names_of(position, "num_query_groups")[-1])
            if bool(
                o.unflatten(1, (layer.num_query_groups, layer.heads_per_group, -1))[
                    :, :, heads:
                ].any()
            ):
                raise ConfigError(
                    f"layer {position} has {layer.heads_per_group} query heads for each key/value "
                    f"head and others {heads} (n_heads_in_group), and ours are the same in all"
                )
    return dataclasses.replace(shape, layers=layers)


def _enlarged(shape: Shape, factors: Mapping[str, float], config: Config) -> Shape:
    """All layers at the legal counts nearest to so many times the largest."""
    for axis, factor in factors.items():
        multiple, now = config.multiples[axis], max(shape.counts(axis))
        if factor == 1:
            continue
        count = max(round(now * factor / multiple) * multiple, round_up(now, multiple))
        if axis != "num_layers":
            shape = shape.with_counts(axis, count)
            continue
        if count > 2 * now:
            raise ConfigError(
                f"--enlarge num_layers={factor:g} asks for {count} layers where there are {now}; "
                "at most twice as many: a second copy of a layer would learn what the first does"
            )
        sources = enumerate(_sources(now, count))
        layers = (dataclasses.replace(shape.layers[s], number=n) for n, s in sources)
        shape = dataclasses.replace(shape, layers=tuple(layers))
    return shape


def _training(hf: dict[str, Any]) -> dict[str, Any]:
    longest = int(hf.get("max_position_embeddings") or LONGEST_DEFAULT_SEQUENCE)
    return {
        "precision": "bf16" if _dtype(hf) == "bfloat16" else "fp32",
        "seq_length": min(longest, LONGEST_DEFAULT_SEQUENCE),
    }


def _dtype(hf: dict[str, Any]) -> str:
    return str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")


_NOT_OF_THE_WEIGHTS = {"attention_dropout", "init_method_std"}


def _check(config: Config, model: dict[str, Any], shape: Shape, folder: Path) -> None:
    """Raises: ConfigError when the configuration is not for this model, or cannot be run."""
    for name, value in model.items():
        given = getattr(config.model, name)
        if given != value and name not in _NOT_OF_THE_WEIGHTS:
            hint = ", or choose --enlarge to fit" if name in AXES else ""
            raise ConfigError(
                f"model.{name} is {given} in your configuration and {value} for {folder}; leave it "
                f"out{hint}"
            )
    widths = shape.counts("ffn_hidden_size")
    uneven = [width for width in widths if width % config.ffn_multiple]
    if uneven:
        raise ConfigError(
            f"{folder} has layers of {uneven[0]} FFN neurons, which is no multiple of TP x "
            f"prune.alignment = {config.ffn_multiple}; set prune.alignment to a divisor, or widen "
            "with --enlarge ffn_hidden_size=FACTOR"
        )
    parallel = config.parallel
    validate(config, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def _notes(config: Config, hf: dict[str, Any]) -> list[str]:
    notes = []
    if config.training.precision == "bf16" and _dtype(hf) != "bfloat16":
        notes.append(f"weights were rounded from {_dtype(hf)} to bf16")
    if config.data.tokenizer == "byte":
        notes.append("data.tokenizer is 'byte': the folder has no tokenizer.json")
    window, before = config.training.seq_length, int(hf.get("max_position_embeddings") or 0)
    if window < before:
        notes.append(
            f"trained on {window:,} tokens of context (training.seq_length), where {before:,} were "
            "possible: exports will say so"
        )
    if not config.data.train:
        notes.append("data.train is empty: import with --config or data.train=... to train on")
    return notes
